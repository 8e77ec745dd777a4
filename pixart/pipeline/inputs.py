"""The pictures that requests name: opened once, upright and in sRGB, with digests by which another day
can tell whether they are still the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart import files
from pixart.pictures import (
    decoding,
    head_of,
    open_picture,
    over,
    read_content,
    to_srgb,
    upright,
)
from pixart.pipeline.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

MIN_SIDE = 16  # pixels: below, there is nothing to see
ALPHA = "alpha"  # as a mask: where the picture itself is transparent
_HELD = 4  # pictures that are kept open: an image, its mask and two controls


@dataclass(frozen=True)
class Input:
    """image: RGB, or RGBA if anything in it is transparent, 8 bits. digest: see `Inputs`."""

    image: "Image"
    digest: str


class Inputs:
    """Opens pictures by their names: those in `pictures` are in memory, any other is a file.

    The digest of a file is the sha256 of its bytes, of a picture in memory that of mode, size and pixels
    once it is upright and in sRGB. Everything raises ValueError, one line that names the picture.
    """

    def __init__(self, pictures: "Mapping[str, Image] | None" = None) -> None:
        self._pictures = _checked(pictures or {})
        self._digests: dict[str, str] = {}
        self.open = lru_cache(maxsize=_HELD)(self._open)
        self.open_mask = lru_cache(maxsize=_HELD)(self._open_mask)

    def size(self, name: str) -> tuple[int, int]:
        """Height and width in pixels, upright; of a file the pixels are not read."""
        name_shown = files.printable(name)
        if name in self._pictures:
            width, height = self.open(name).image.size
        else:
            head = head_of(Path(name), name_shown)
            height, width = head.height, head.width
        if min(height, width) < MIN_SIDE:
            raise ValueError(
                f"{name_shown}: must be at least {MIN_SIDE} px a side to draw from, got {width}x{height}"
            )
        return height, width

    def digests(self, request: Request) -> dict[str, str]:
        """Of every picture that the request names, by name."""
        return {name: self.digest(name) for name in named_in(request)}

    def digest(self, name: str) -> str:
        """By which another day tells whether it is the same picture."""
        if name not in self._digests:
            self._note(name, self._digest(name))
        return self._digests[name]

    def _digest(self, name: str) -> str:
        if name in self._pictures:
            return self.open(name).digest
        return hashlib.sha256(read_content(Path(name), files.printable(name))).hexdigest()

    def _note(self, name: str, digest: str) -> None:
        if self._digests.setdefault(name, digest) != digest:
            raise ValueError(
                f"{files.printable(name)}: has become another picture since it was first opened; start "
                "again with it"
            )

    def _open(self, name: str) -> Input:
        image, digest = self._read(name)
        with decoding(files.printable(name)):
            image = to_srgb(upright(image))
        if digest is None:
            head = f"{image.mode} {image.size[0]}x{image.size[1]} ".encode()
            digest = hashlib.sha256(head + image.tobytes()).hexdigest()
        self._note(name, digest)
        return Input(image, digest)

    def _open_mask(self, name: str) -> "Image":
        """Grey of 8 bits, upright: white is drawn anew. What is transparent in it is not.

        Its levels are numbers and no colours: an ICC profile changes nothing.
        """
        image, digest = self._read(name)
        if digest is None:  # taken now, of what is drawn by: the caller may change it later
            digest = self.digest(name)
        image = image.copy()
        image.info.pop("icc_profile", None)
        with decoding(files.printable(name)):
            mask = over(to_srgb(upright(image)), "black").convert("L")
        self._note(name, digest)
        return mask

    def _read(self, name: str) -> "tuple[Image, str | None]":
        """As it is stored, and the digest of a file."""
        if name in self._pictures:
            return self._pictures[name], None
        shown = files.printable(name)
        content = read_content(Path(name), shown)
        return open_picture(content, shown), hashlib.sha256(content).hexdigest()


def _checked(pictures: "Mapping[str, Image]") -> "dict[str, Image]":
    """ValueError for what is no picture: an array does not say what its numbers mean."""
    if not isinstance(pictures, Mapping):
        raise ValueError(f"pictures must be names with pictures, got a {type(pictures).__name__}")
    if not pictures:
        return {}
    from PIL import Image

    for name, picture in pictures.items():
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f"{files.printable(str(name))} must be a file or a PIL.Image.Image, got "
                f"{files.short(picture)}; Image.fromarray makes one of an array"
            )
    return dict(pictures)


def named_in(request: Request) -> list[str]:
    """The names of the pictures that a request is drawn from, each once."""
    mask = None if request.mask == ALPHA else request.mask
    names = [request.image, mask, *(request.control_image or ())]
    return list(dict.fromkeys(name for name in names if name is not None))


def name_pictures(
    image: "Image | str | Path | None",
    mask: "Image | str | Path | None",
    control_image: "Image | str | Path | Sequence[Image | str | Path] | None",
) -> "tuple[dict[str, Image], dict[str, Any]]":
    """Pictures in memory by the names that they are given, and the fields of a request that name them
    and the files."""
    pictures: dict[str, Image] = {}

    def name(given: "Image | str | Path", called: str) -> str:
        if isinstance(given, str | Path):
            return str(given)
        pictures[called] = given
        return called

    fields: dict[str, Any] = {}
    for field, given in (("image", image), ("mask", mask)):
        if given is not None:
            fields[field] = name(given, field)
    if control_image is not None:
        several = control_image
        if isinstance(several, str | Path) or not isinstance(several, Sequence):
            several = [several]
        fields["control_image"] = tuple(
            name(given, f"control-{number}") for number, given in enumerate(several, 1)
        )
    return pictures, fields


def check_digests(expected: Mapping[str, str], inputs: Inputs) -> None:
    """ValueError for the first picture that is not there, or no longer the one it was."""
    for name, digest in expected.items():
        if inputs.digest(name) != digest:
            raise ValueError(
                f"{files.printable(name)}: must be the picture it was drawn from, it is another"
            )
