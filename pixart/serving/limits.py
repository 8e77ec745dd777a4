"""How much one request, and all that are kept, may ask of the machine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """pixels: of one picture, its enlargement too. images: of one order. steps: of one picture, those of its
    enlargement too. body: bytes of one request. picture_pixels: of a picture that is sent. queue: orders
    that wait. queue_of_client: of these, those of one client. rate: requests a minute that one client may
    make, those for progress not counted. keep_seconds, keep_bytes: how long, and how much at most, finished
    orders are kept.
    """

    pixels: int = 17_000_000
    images: int = 16
    steps: int = 200
    body: int = 20_000_000
    picture_pixels: int = 34_000_000
    queue: int = 64
    queue_of_client: int = 32
    rate: int = 240
    keep_seconds: float = 3600.0
    keep_bytes: int = 2**30
