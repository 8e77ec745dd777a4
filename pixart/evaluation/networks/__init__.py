"""Networks that turn pictures and texts into numbers, from files that the user has. EXTRACTORS: name ->
"module:callable". `open_extractor` opens one, `register_extractor` adds one of yours."""

from importlib import import_module
from typing import TYPE_CHECKING

from pixart.evaluation.metric import Context, Extractor

if TYPE_CHECKING:
    from collections.abc import Callable

# Each is called with (name, context), and must not open anything before its `needs` are met.
EXTRACTORS: "dict[str, str | Callable[[str, Context], Extractor]]" = {
    "inception-clean": "pixart.evaluation.networks.inception:Inception",
    "inception-pytorch": "pixart.evaluation.networks.inception:Inception",
    "inception-tf": "pixart.evaluation.networks.inception:Inception",
    "dinov2": "pixart.evaluation.networks.dinov2:Dinov2",
    "clip-l14": "pixart.evaluation.networks.clip:ClipImages",
    "clip-l14-336": "pixart.evaluation.networks.clip:ClipImages",
    "shapes-clip": "pixart.evaluation.networks.clip:ClipImages",
    "hpsv2.0-pictures": "pixart.evaluation.networks.hps:HpsImages",
    "hpsv2.1-pictures": "pixart.evaluation.networks.hps:HpsImages",
}


def register_extractor(name: str, extractor: "str | Callable[[str, Context], Extractor]") -> None:
    """Add an extractor under a name that is free. extractor: what is called with (name, context), or
    "module:callable" for one that is imported when it is opened. ValueError for a name that is taken."""
    if name in EXTRACTORS:
        raise ValueError(f"name must be free, there is an extractor {name!r} already")
    EXTRACTORS[name] = extractor


def open_extractor(name: str, context: Context) -> Extractor:
    """ValueError for a name that nobody knows."""
    if name not in EXTRACTORS:
        known = ", ".join(sorted(EXTRACTORS)) or "none"
        raise ValueError(f"features must be one of {known}, got {name!r}")
    extractor = EXTRACTORS[name]
    if isinstance(extractor, str):
        module, _, attribute = extractor.partition(":")
        extractor = getattr(import_module(module), attribute)
    return extractor(name, context)
