"""The pictures so far of a run: files that viewers refresh, and the terminal where it can show them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pixart.files import written_aside
from pixart.generation.console import Console
from pixart.generation.names import Places
from pixart.generation.options import Options
from pixart.pictures import enlarged, open_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from pixart.pipeline.text_to_image import Pipeline
    from pixart.sampler.loop import Progress

MARK = "pixart-preview"  # the key of a PNG text chunk: such a file may be replaced


def check_options(options: Options) -> None:
    """ValueError for what no run could do."""
    if options.preview is not None and options.preview < 1:
        raise ValueError(f"--preview must be every 1 or more steps, got {options.preview}")
    if options.taesd is not None and options.preview is None:
        raise ValueError("--taesd must come with --preview, whose pictures it decodes")


class Previews:
    """Of the pass that is drawn: each picture's beside its file, as NAME-preview.png until it is written.

    paths: where the pictures go, in the order in which they are drawn. every: so many steps from one to the
    next; the last step always has one. preview: latents to pictures, None for no previews. scale: how
    many pixels of the finished picture one of a preview is.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        console: Console,
        preview: "Callable[[Tensor], list[Image]] | None" = None,
        every: int = 1,
        scale: int = 1,
    ) -> None:
        self._console, self._preview, self._every, self._scale = console, preview, every, scale
        self._paths, self._done = list(paths), 0
        self._places = Places()
        for path in paths:
            self._places.take(path)
        self._files: dict[int, Path] = {}  # by the number of the picture
        self._writes = True

    @classmethod
    def of(
        cls, pipe: "Pipeline", paths: Sequence[Path], options: Options, console: Console
    ) -> "Previews":
        """As the options ask. Raises what `pixart.vae.preview.Preview` does for a --taesd."""
        if options.preview is None:
            return cls(paths, console)
        if options.taesd is None:
            return cls(paths, console, pipe.preview, options.preview, pipe.vae.downsample)
        from pixart.vae.preview import Preview

        return cls(paths, console, Preview(pipe.vae, options.taesd), options.preview)

    def step(self, progress: "Progress") -> None:
        """A step is done of the pass that begins with the first picture that is not finished."""
        is_due = progress.step % self._every == 0 or progress.step == progress.total
        if self._preview is None or not is_due:
            return
        images = [enlarged(image, self._scale) for image in self._preview(progress.predicted)]
        for number, image in enumerate(images, start=self._done):
            self._write(number, image)
        self._console.show(_side_by_side(images))

    def finish(self) -> None:
        """The next picture is in its own file."""
        self._remove(self._done)
        self._done += 1

    def _write(self, number: int, image: "Image") -> None:
        from PIL.PngImagePlugin import PngInfo

        if not self._writes:
            return
        if number not in self._files:
            self._files[number] = self._place(self._paths[number])
        path, info = self._files[number], PngInfo()
        info.add_text(MARK, "not finished")
        try:
            with written_aside(path, durable=False) as aside:
                image.save(aside, "PNG", pnginfo=info, compress_level=1)
        except OSError as error:
            self._give_up(path, "written", error)

    def _give_up(self, path: Path, done: str, error: OSError) -> None:
        """A look at a picture is no reason to lose it."""
        self._writes = False
        reason = error.strerror or str(error)
        self._console.remark(f"{path}: cannot be {done} ({reason}); previews end here")

    def _place(self, path: Path) -> Path:
        """NAME-preview.png, or with -2, -3 ... where that is a picture of this run or not a preview."""
        wanted = path.with_name(f"{path.stem}-preview.png")
        while True:
            place = self._places.free(wanted, beside=False)
            self._places.take(place)
            if not os.path.lexists(place) or _is_preview(place):
                return place

    def _remove(self, number: int) -> None:
        path = self._files.pop(number, None)
        if path is None or not _is_preview(path):
            return
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._give_up(path, "removed", error)

    def __enter__(self) -> "Previews":
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._files):
            self._remove(number)


def _is_preview(path: Path) -> bool:
    """Not what somebody else has put there, nor what a link leads to."""
    try:
        return not path.is_symlink() and MARK in open_picture(path, str(path)).info
    except (ValueError, OSError):
        return False


def _side_by_side(images: "Sequence[Image]") -> "Image":
    if len(images) == 1:
        return images[0]
    from PIL import Image as PILImage

    widths = [image.width for image in images]
    row = PILImage.new("RGB", (sum(widths), max(image.height for image in images)))
    for number, image in enumerate(images):
        row.paste(image, (sum(widths[:number]), 0))
    return row
