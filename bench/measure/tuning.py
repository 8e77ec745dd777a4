"""Configurations of our kernels: which were launched, and one candidate of the table at a time."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pixart_kernels.dispatch import configurations
from pixart_kernels.dispatch.configurations import Candidate, Row, describe

__all__ = ["Candidate", "Row", "chosen", "describe", "forget", "pinned", "sources", "used"]


def forget() -> None:
    """So that `used` and `chosen` tell of the launches from here on."""
    configurations.forget_chosen()


def used() -> dict[str, Row]:
    """By kernel launched since `forget`, the row of the table that it was launched by."""
    return {kernel: row for kernel, (row, _) in sorted(configurations.chosen().items())}


def chosen() -> dict[str, str]:
    """By kernel, the configuration that was launched last since `forget`."""
    found = configurations.chosen()
    return {kernel: describe(candidate) for kernel, (_, candidate) in sorted(found.items())}


def sources() -> dict[str, str]:
    """By kernel, where that row comes from: compiled code, or a measurement."""
    return {kernel: row.source for kernel, row in used().items()}


@contextmanager
def pinned(choice: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Launch with these, {kernel: candidate}."""
    with configurations.pinned(choice):
        yield
