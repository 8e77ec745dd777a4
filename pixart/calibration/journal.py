"""What was measured so far, kept beside the plan until it is written: a run that is cut off goes on there."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pixart.files import CheckpointError, read_json, write_json

_SECONDS = 5.0  # between two writings


class Journal:
    """Numbers by name. about: all that they depend on; what another run found does not count."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path, self._about = path, about
        self._found = _read(path, about)
        self.taken_up = len(self._found)
        self._written = time.monotonic()

    def measured(self, name: str, measure: Callable[[], Sequence[float]]) -> list[float]:
        """The numbers of that name, measured now unless they are known."""
        if name not in self._found:
            self._found[name] = [float(one) for one in measure()]
            if time.monotonic() - self._written > _SECONDS:
                self.write()
        return self._found[name]

    def write(self) -> None:
        """Keep what was found."""
        if self._found:
            write_json(self._path, {"about": self._about, "found": self._found})
        self._written = time.monotonic()

    def remove(self) -> None:
        """When it is not needed any more."""
        self._path.unlink(missing_ok=True)


def _read(path: Path, about: dict[str, Any]) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    try:
        values = read_json(path)
    except CheckpointError:
        return {}  # it is of this command alone, and begins anew
    found = values.get("found")
    if values.get("about") != about or not isinstance(found, dict):
        return {}
    return {name: one for name, one in found.items() if _are_numbers(one)}


def _are_numbers(values: object) -> bool:
    return isinstance(values, list) and all(
        isinstance(one, int | float) and not isinstance(one, bool) and not math.isnan(one)
        for one in values
    )
