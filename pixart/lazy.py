"""Names of a module that are imported when they are asked for: what needs torch takes seconds.

Nothing that takes time is imported here: importing `pixart` imports it.
"""

TYPE_CHECKING = False  # type checkers take it for typing's
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def lazily(module: str, homes: "Mapping[str, str]") -> "Callable[[str], Any]":
    """What a module has as `__getattr__`. homes: of each name the module that defines it."""

    def find(name: str) -> "Any":
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(homes[name]), name)

    return find
