"""The pictures of the models that are compared: a folder each, a picture for every prompt."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixart.evaluation.entries import Prompt
from pixart.files import listed, printable
from pixart.pictures import open_rgb, readable_suffixes

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLE = "0000"  # of several pictures of a prompt the first


@dataclass(frozen=True)
class Source:
    """A model's pictures. name: as the report has it."""

    name: str
    folder: Path

    def check(self, prompts: Iterable[Prompt]) -> None:
        """ValueError that lists the prompts without a picture: a study of fewer is another study."""
        missing = [prompt.id for prompt in prompts if self._find(prompt) is None]
        if missing:
            raise ValueError(
                f"{self.folder}: must have a picture (ID/{SAMPLE}.png or ID.png) for every prompt, "
                f"{len(missing)} have none: {listed(missing)}"
            )

    def open(self, prompt: Prompt) -> "Image":
        """RGB. PictureError, ValueError if there is none."""
        path = self._find(prompt)
        if path is None:
            self.check([prompt])
            raise AssertionError
        return open_rgb(path, str(path))

    def _find(self, prompt: Prompt) -> Path | None:
        top = self.folder / "images" if (self.folder / "images").is_dir() else self.folder
        for stem in (f"{prompt.id}/{SAMPLE}", prompt.id):
            for suffix in sorted(readable_suffixes()):
                if (path := top / f"{stem}{suffix}").is_file():
                    return path
        return None


def open_sources(given: Sequence[str]) -> list[Source]:
    """From [NAME=]FOLDER. ValueError for fewer than two, folders that are not there, names that are there
    twice."""
    sources = []
    for one in given:
        name, _, place = one.rpartition("=")
        if Path(one).is_dir():  # a folder whose name has an =
            name, place = "", one
        folder = Path(place).expanduser()
        if not folder.is_dir():
            raise ValueError(f"--pictures must be [NAME=]FOLDER, there is no folder {folder}")
        sources.append(Source(name.strip() or folder.resolve().name, folder))
    names = [source.name for source in sources]
    if len(sources) < 2:
        raise ValueError(f"--pictures must be given for two models at least, got {len(sources)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"--pictures must have different names, got {printable(twice, 80)!r} twice; give NAME=FOLDER"
        )
    return sources
