"""Where the weights of a judge or a detector lie: a folder, one in --weights, or the hub's cache.

Nothing is downloaded: a hub id that was never fetched is a Need.
"""

import os
import re
from pathlib import Path

from pixart.evaluation.metric import Context
from pixart.evaluation.needs import MissingError, Need

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find_folder(name: str, context: Context) -> Path | None:
    """The folder that holds config.json of a model, by path or hub id; None where there is none."""
    places = [Path(name)]
    if context.weights is not None:
        places += [context.weights / name, context.weights / name.rpartition("/")[2]]
    for place in places:
        if (place / "config.json").is_file():
            return place
    return _cached(name) if HUB_ID.fullmatch(name) else None


def folder_of(what: str, name: str, context: Context) -> Path:
    """As `find_folder`. MissingError where there is none."""
    folder = find_folder(name, context)
    if folder is None:
        raise MissingError(what, [need_of(name, context)])
    return folder


def need_of(name: str, context: Context, size: int | None = None) -> Need:
    """What is missing where `find_folder` finds nothing."""
    weights = f"{context.weights}/{name.rpartition('/')[2]}, " if context.weights else ""
    if not HUB_ID.fullmatch(name):
        return Need(name, "a model of transformers with its config.json", f"{weights}that folder")
    source = f"https://huggingface.co/{name}"
    fetched = f"the hub's cache (hf download {name})"
    return Need(name, source, f"{weights}{fetched}", size)


def _cached(name: str) -> Path | None:
    """The snapshot of `main` in the cache of huggingface_hub, which keeps them as files and links."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    model = cache / f"models--{name.replace('/', '--')}"
    try:
        revision = (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    snapshot = model / "snapshots" / revision
    return snapshot if (snapshot / "config.json").is_file() else None
