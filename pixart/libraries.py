"""transformers, diffusers and peft, which import torchvision wherever it is installed.

A torchvision that was built for another torch, as beside a CPU build, breaks all three: they end in
"Could not import module 'BloomPreTrainedModel'" and the like, which nobody asked for.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class BrokenLibraryError(ImportError):
    """A library is installed that cannot be imported: one line with its name and the way out."""

    exit_code = 1  # of a command: not the fault of what was asked for


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of these libraries. Raises BrokenLibraryError where torchvision is why they fail."""
    try:
        yield
    except (Exception, SystemExit) as error:  # whatever a broken library raises
        fault = _fault_of_torchvision(error)
        if fault is None:
            raise
        have = " and ".join(f"{name} {_version(name)}" for name in ("torchvision", "torch"))
        raise BrokenLibraryError(
            f"torchvision must fit torch, got {have}: {fault}; install the torchvision of this torch, "
            "or remove it, which is enough here (pip uninstall torchvision)"
        ) from error


@contextmanager
def silenced() -> Iterator[None]:
    """Around what opens and saves with them: no bars and no reports of their own (`--quiet` is quiet,
    errors of ours take one line)."""
    with importing():
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

    loggings: tuple[Any, ...] = (of_diffusers, of_transformers)
    before = [(each.is_progress_bar_enabled(), each.get_verbosity()) for each in loggings]
    for each in loggings:
        each.disable_progress_bar()
        each.set_verbosity_error()
    try:
        yield
    finally:
        for each, (had_progress_bar, verbosity) in zip(loggings, before, strict=True):
            each.set_verbosity(verbosity)
            if had_progress_bar:
                each.enable_progress_bar()


def _fault_of_torchvision(error: BaseException) -> str | None:
    """What importing it raises, or what of it `error` came from; None if it is not there or works."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except (Exception, SystemExit) as fault:
        return _said(fault)
    cause: BaseException | None = error
    while cause is not None:  # a part of it that is missing or broken
        if "torchvision" in str(cause):
            return _said(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def _said(fault: BaseException) -> str:
    return f"{type(fault).__name__} {' '.join(str(fault).split())[:300]}".strip()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of no version"
