"""Files of JSON lines that only grow: votes and judgements, each on the disk before it counts."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pixart.files import MAX_INDEX, parse_json, printable, read_bounded
from pixart.locks import claimed

MAX_LINE = 2**16  # bytes


class Log:
    """Appends to a file; from several threads one after the other."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._file, self._is_open = path, descriptor, True
        self._lock = threading.Lock()

    def append(self, values: Mapping[str, Any]) -> None:
        """Returns when the disk has the line. OSError if it refuses, and then the file is as it was; or
        if the log was closed."""
        line = json.dumps(values, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            if not self._is_open:
                raise OSError("it is being closed")
            size = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) != len(line):  # a disk that is nearly full
                    raise OSError("the disk took a part of the line")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, size)
                raise

    def close(self) -> None:
        """Waits for a line that is being written; none is taken from then on."""
        with self._lock:
            self._is_open = False


@contextmanager
def appending(path: Path) -> Iterator[Log]:
    """Open a file to append to. No other process may have done so: ValueError. A last line that broke off
    with its machine is cut off."""
    with claimed(path.with_name(f".{path.name}.lock"), wait=False) as mine:
        if not mine:
            raise ValueError(f"{path}: another process writes it; wait until it has ended")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        log = Log(path, descriptor)
        try:
            _end_last_line(path, descriptor)
            yield log
        finally:
            log.close()
            os.close(descriptor)


def read_lines(path: Path, check: Callable[[Mapping[str, Any]], None]) -> list[dict[str, Any]]:
    """The objects of a file, [] if there is none. A last line without its end is one that was never
    acknowledged, and is left out. ValueError names a line that is no JSON, or that `check` refuses."""
    if not path.exists():
        return []
    *lines, _ = read_bounded(path, MAX_INDEX).split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        values = parse_json(line, place, MAX_LINE, unique=True)
        if not isinstance(values, dict):
            raise ValueError(f"{place}: must be an object, got {printable(repr(values), 80)}")
        try:
            check(values)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        found.append(values)
    return found


def _end_last_line(path: Path, descriptor: int) -> None:
    content = read_bounded(path, MAX_INDEX)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.ftruncate(descriptor, whole)
