"""The tar of a shard: the same pictures make the same bytes, and its head says of what it was made.

WebDataset takes members that follow each other under one name before the dot for one sample. The mark is
the comment of a pax header for the whole archive, which readers pass over (git archive puts the commit there).
"""

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pixart.files import parse_json

LAYOUT = 1
HEAD = 4096  # bytes, in which the mark is
_ROOM = 256  # characters of a mark: it is written first, and once more when the length is known


@dataclass(frozen=True)
class Mark:
    """What a tar was made of. requests, model: digests of what was asked for, and of what drew it. length: bytes
    of the whole archive. layout: of the tar."""

    requests: str
    model: str
    pictures: int
    length: int = 0
    layout: int = LAYOUT

    def header(self) -> bytes:
        text = json.dumps({"pixart": asdict(self)}).ljust(_ROOM)
        assert len(text) == _ROOM
        return tarfile.TarInfo.create_pax_global_header({"comment": text})

    @classmethod
    def read(cls, head: bytes) -> "Mark | None":
        """That of an archive that begins so; None if it has none of ours."""
        try:
            with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
                values = parse_json(tar.pax_headers.get("comment", ""), "mark")
            mark = cls(**values["pixart"])
        except (tarfile.TarError, ValueError, TypeError, KeyError, OSError):
            return None
        kinds = {"requests": str, "model": str, "pictures": int, "length": int, "layout": int}
        return mark if all(type(getattr(mark, name)) is kinds[name] for name in kinds) else None


class ShardTar:
    """An archive that is being written."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar

    def add(self, name: str, content: bytes) -> None:
        """A member: of nobody and of no time, which differ from run to run."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._tar.addfile(header, io.BytesIO(content))


@contextmanager
def written_tar(path: Path, mark: Mark) -> Iterator[ShardTar]:
    """Write an archive in place; whoever calls has it written aside. OSError if the disk refuses."""
    with path.open("wb") as file:
        file.write(mark.header())
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            yield ShardTar(tar)
        length = file.seek(0, io.SEEK_END)
        file.seek(0)
        file.write(replace(mark, length=length).header())
