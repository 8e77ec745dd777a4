"""transformers, diffusers and peft, which import torchvision wherever it is installed.

A torchvision that was built for another torch, as beside a CPU build, breaks all three: they end in
"Could not import module 'BloomPreTrainedModel'" and the like, which nobody asked for.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class BrokenLibraryError(ImportError):
    """A library is installed that cannot be imported: one line with its name and the way out."""

    exit_code = 1  # of a command: not the fault of what was asked for


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of these libraries. Raises BrokenLibraryError where torchvision is why they fail."""
    try:
        yield
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        fault = _fault_of_torchvision()
        if fault is None:
            raise
        have = " and ".join(f"{name} {_version(name)}" for name in ("torchvision", "torch"))
        raise BrokenLibraryError(
            f"torchvision must fit torch, got {have}: {fault}; install the torchvision of this torch, "
            "or remove it, which is enough here (pip uninstall torchvision)"
        ) from error


def _fault_of_torchvision() -> str | None:
    """What importing it raises, None if it is not there or works."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever a broken library raises
        return f"{type(error).__name__} {' '.join(str(error).split())[:300]}".strip()
    return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of no version"
