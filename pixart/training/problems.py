"""All that is wrong with a stage at once: lines that are collected, and raised together."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from pixart.command import message_of

Value = TypeVar("Value")


class Problems(ValueError):
    """What is wrong, a line each."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines = tuple(dict.fromkeys(lines))
        super().__init__("\n".join(self.lines))


def refuse(lines: Iterable[str]) -> None:
    """Raise Problems if there are any."""
    if found := list(lines):
        raise Problems(found)


def problems_of(check: Callable[[], object]) -> Iterator[str]:
    """Yield the complaints of a function that raises; nothing where it returns."""
    try:
        check()
    except Problems as error:
        yield from error.lines
    except (ValueError, OSError, ModuleNotFoundError) as error:
        yield " ".join(message_of(error).split())


def attempt(work: Callable[[], Value]) -> tuple[Value | None, list[str]]:
    """What a function returns, or None and what it complains of."""
    results: list[Value] = []
    lines = list(problems_of(lambda: results.append(work())))
    return (results[0] if results else None), lines
