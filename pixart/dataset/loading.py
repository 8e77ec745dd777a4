"""From a sample to pixels of the size of its bucket, and the names of their features.

Every picture is scaled to cover the nearest bucket of a resolution and cropped to its middle.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pixart.dataset.controls import Controls
from pixart.dataset.images import LANCZOS_FROM, ImageError, cover, decode, head_of
from pixart.dataset.samples import Item, Rejected, Sample
from pixart.files import CheckpointError, digest
from pixart.pictures import Head
from pixart.resolution import nearest_bucket

MAX_RATIO = 4.5  # long side / short side; the buckets end at 4


@dataclass(frozen=True)
class Settings:
    """resolution: pixels of the buckets' square; square: crop everything to that. max_ratio: long
    side / short side beyond which a picture is rejected. half: store moments in fp16, not fp32.
    min_side: pixels of the shorter side below which it is rejected; None is half of its bucket's."""

    resolution: int
    square: bool = False
    max_ratio: float = MAX_RATIO
    half: bool = False
    min_side: int | None = None

    def bucket(self, height: int, width: int, multiple: int) -> tuple[int, int]:
        """The (height, width) that a picture is brought to; sides are multiples of `multiple`."""
        if self.square:
            return self.resolution, self.resolution
        return nearest_bucket(height, width, self.resolution, multiple)

    def fault(self, height: int, width: int, bucket: tuple[int, int]) -> str:
        """Why a picture of that size is rejected, "" if it is not."""
        ratio = max(height, width) / min(height, width)
        if ratio > self.max_ratio:
            return f"ratio {ratio:.4g}:1 of {width}x{height} is over {self.max_ratio:g}:1"
        least = min(bucket) // 2 if self.min_side is None else self.min_side
        if min(height, width) < least:
            return f"{width}x{height} is too small, its shorter side must be at least {least} px"
        return ""


@dataclass(frozen=True)
class Steering:
    """The picture that steers another. pixels (3, H, W): None where it is made of that one's (is_made), or
    its moments are in the store. note: as of Picture."""

    name: str
    pixels: Tensor | None
    note: str = ""
    is_made: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture that passed; pixels (3, H, W) only if something is to be made of them that is not in the
    store. note: what is to be told of it, "" for nothing."""

    sample: Sample
    size: tuple[int, int]
    bucket: tuple[int, int]
    name: str
    pixels: Tensor | None
    note: str
    control: Steering | None = None


@dataclass(frozen=True)
class Loader:
    """multiple: what buckets' sides are multiples of. vae_identity: of what encodes. is_stored: whether the
    moments of a name are there already. controls: where pictures that steer come from, None for none. Of
    use in several threads at once."""

    settings: Settings
    multiple: int
    vae_identity: str
    is_stored: Callable[[str], bool]
    controls: Controls | None = None

    def load(self, item: Item) -> Picture | Rejected:
        """Read, check, scale. Raises nothing over a picture."""
        if isinstance(item, Rejected):
            return item
        if not item.captions:
            return Rejected(item.path, item.uncaptioned)
        try:
            content = item.read()
            head = head_of(content)
            size = head.height, head.width
            bucket = self.settings.bucket(*size, self.multiple)
            if fault := self.settings.fault(*size, bucket):
                return Rejected(item.path, fault)
            name = self._image_name(content, head, bucket)
            control = self._steering(item, name, size, bucket)
            wanted = [name, control.name] if control and control.is_made else [name]
            pixels = None
            if not all(map(self.is_stored, wanted)):
                pixels = self._pixels(content, head, bucket)
        except (ImageError, CheckpointError) as error:
            return Rejected(item.path, str(error))
        except OSError as error:
            return Rejected(item.path, f"unreadable file: {error.strerror or error}")
        notes = (head.profile_fault, control.note if control else "")
        return Picture(item, size, bucket, name, pixels, "; ".join(filter(None, notes)), control)

    def _pixels(self, content: bytes, head: Head, bucket: tuple[int, int]) -> Tensor:
        image = decode(content)
        if image.size != (head.width, head.height):
            says = f"{head.width}x{head.height}, it is {image.width}x{image.height}"
            raise ImageError(f"unreadable image: its head says {says}")
        return cover(image, bucket, self.settings.resolution)

    def _steering(
        self, item: Sample, name: str, size: tuple[int, int], bucket: tuple[int, int]
    ) -> Steering | None:
        """What steers a picture of this name and size. ImageError, which says of which picture it is."""
        if self.controls is None:
            return None
        if self.controls.preprocessor is not None:
            made_from = json.dumps([name, self.controls.identity])
            return Steering(digest(made_from.encode()), None, is_made=True)
        file = item.control
        assert file is not None  # with_controls rejects a sample without
        try:
            content = file.read()
            head = head_of(content)
            if (head.height, head.width) != size:
                raise ImageError(
                    f"must be of {size[1]}x{size[0]} as its picture, got {head.width}x{head.height}"
                )
            # By the same name as of a picture: many may be the same, or be pictures as well.
            name = self._image_name(content, head, bucket)
            pixels = None if self.is_stored(name) else self._pixels(content, head, bucket)
        except (ImageError, CheckpointError) as error:
            raise ImageError(f"control picture {file.path}: {error}") from error
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"control picture {file.path}: unreadable file: {reason}") from error
        note = f"control picture: {head.profile_fault}" if head.profile_fault else ""
        return Steering(name, pixels, note)

    def _image_name(self, content: bytes, head: Head, bucket: tuple[int, int]) -> str:
        method = "lanczos" if self.settings.resolution >= LANCZOS_FROM else "bicubic"
        stored = "fp16" if self.settings.half else "fp32"
        made_from = [digest(content), self.vae_identity, bucket, method, stored]
        if head.has_profile and not head.profile_fault:
            made_from.append("sRGB")  # not the features of its colours as they are stored
        return digest(json.dumps(made_from).encode())
