"""The pictures of the models that are compared: a folder each, a picture for every prompt."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pixart.evaluation.store.entries import Prompt
from pixart.evaluation.store.folders import find_pictures
from pixart.files import listed, printable
from pixart.pictures import open_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

DRAWN = "images"  # where evaluated folders have their pictures


@dataclass(frozen=True)
class Source:
    """A model's pictures. name: as the report has it. paths: of each prompt's first picture, by its id."""

    name: str
    folder: Path
    paths: Mapping[str, Path]

    def check(self, prompts: Iterable[Prompt]) -> None:
        """ValueError that lists the prompts without a picture: a study of fewer is another study."""
        missing = [prompt.id for prompt in prompts if prompt.id not in self.paths]
        if missing:
            raise ValueError(
                f"{self.folder}: must have a picture (ID/0000.png or ID.png) for every prompt, "
                f"{len(missing)} have none: {listed(missing)}"
            )

    def open(self, prompt: Prompt) -> "Image":
        """RGB. PictureError."""
        path = self.paths[prompt.id]
        return open_rgb(path, str(path))


def open_sources(given: Sequence[str], prompts: Sequence[Prompt]) -> list[Source]:
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
        sources.append(_opened(name.strip() or folder.resolve().name, folder, prompts))
    names = [source.name for source in sources]
    if len(sources) < 2:
        raise ValueError(f"--pictures must be given for two models at least, got {len(sources)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"--pictures must have different names, got {printable(twice, 80)!r} twice; give NAME=FOLDER"
        )
    return sources


def _opened(name: str, folder: Path, prompts: Sequence[Prompt]) -> Source:
    top = folder / DRAWN if (folder / DRAWN).is_dir() else folder
    found = find_pictures(top, prompts)
    paths = {
        entry.prompt.id: entry.path
        for entry in found.entries
        if entry.sample == 0 and entry.key not in found.missing
    }
    return Source(name, folder, paths)
