"""Pictures that steer a control (`--control`): beside a source's pictures, or made of them.

    FOLDER     a picture of the same relative name for each, x.png or with another suffix of a picture
    members    KEY.control.png of tar shards
    canny ...  what a preprocessor makes of each picture at the size that it is trained at

One that lies beside its picture has its size, and is scaled and cropped as it is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from torch import Tensor

from pixart.dataset.images import ImageError, as_image, as_pixels
from pixart.dataset.samples import MISSING, Item, PictureFile, Rejected, Sample
from pixart.dataset.sources import picture_file
from pixart.pictures import readable_suffixes
from pixart.preprocess import (
    PREPROCESSORS,
    Preprocessor,
    networks_of,
    open_preprocessor,
    parse_places,
)

if TYPE_CHECKING:
    import torch

MEMBERS = "members"
FILES = "pictures"  # what an index says where they were not made
MADE = tuple(name for name in PREPROCESSORS if name != "none")


@dataclass(frozen=True)
class Controls:
    """preprocessor: what makes them, None where they lie beside their pictures."""

    preprocessor: Preprocessor | None = None

    @property
    def identity(self) -> str:
        """Differs where what is made of a picture may."""
        return self.preprocessor.identity if self.preprocessor else FILES

    def made_of(self, pixels: Tensor) -> Tensor:
        """What the preprocessor makes of a picture at its bucket's size, both (3, H, W) in [-1, 1]. Raises
        ImageError."""
        assert self.preprocessor is not None
        try:
            return as_pixels(self.preprocessor(as_image(pixels)))
        except ValueError as error:
            raise ImageError(f"no control picture can be made of it: {error}") from error


def open_controls(
    control: str | None, weights: Sequence[str] = (), device: "torch.device | str" = "cpu"
) -> Controls | None:
    """What `--control` asks for, None for nothing; weights: NAME=PLACE of a preprocessor's networks. Raises
    ValueError, and what open_preprocessor raises."""
    places = parse_places(weights)
    if unread := places.keys() - set(networks_of(control or "")):
        raise ValueError(
            f"--preprocessor-weights must be of networks that --control has, got {', '.join(sorted(unread))} "
            f"with {f'--control {control}' if control else 'none'}"
        )
    if control is None:
        return None
    if control in MADE:
        return Controls(open_preprocessor(control, places, device))
    if control != MEMBERS and not Path(control).expanduser().is_dir():
        raise ValueError(
            f"--control must be a folder, {MEMBERS} or one of {', '.join(MADE)}, got {control!r}"
        )
    return Controls()


def with_controls(items: Iterable[Item], control: str | None) -> Iterable[Item]:
    """The items with the pictures that steer them where `--control` asks for some that lie beside; those
    that have none are rejected."""
    if control is None or control in MADE:
        return _without(items)
    return _members(items) if control == MEMBERS else _beside(items, Path(control).expanduser())


def _without(items: Iterable[Item]) -> Iterator[Item]:
    """The items without the pictures of shards that steer, which nothing will read."""
    for item in items:
        yield replace(item, control=None) if isinstance(item, Sample) else item


def _members(items: Iterable[Item]) -> Iterator[Item]:
    for item in items:
        if isinstance(item, Sample) and item.control is None:
            item = Rejected(item.path, f"{MISSING}: no member .control.png beside it in tar shards")
        yield item


def _beside(items: Iterable[Item], folder: Path) -> Iterator[Item]:
    for item in items:
        if isinstance(item, Sample):
            found = _find(folder, item.relative)
            if isinstance(found, str):
                yield Rejected(item.path, found)
                continue
            item = replace(item, control=found)
        yield item


def _find(folder: Path, relative: str) -> PictureFile | str:
    """The picture that steers, or why there is none."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        return f"must lie within its source to have a control picture, got {relative}"
    # Pictures in JPEG have edges in PNG.
    suffixes = dict.fromkeys((path.suffix, ".png", *sorted(readable_suffixes())))
    for suffix in suffixes:
        found = picture_file(folder / path.with_suffix(suffix))
        if isinstance(found, PictureFile):
            return found
        if found.reason != MISSING:
            return f"control picture {found.path}: {found.reason}"
    return f"{MISSING}: no control picture {folder / path}"
