"""From what is asked for to a folder that is whole or not there."""

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart import process
from pixart.evaluation.report.folder import Evaluated, open_evaluated
from pixart.files import check_writable, written_aside
from pixart.libraries import silenced
from pixart.pipeline import load
from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata
from pixart.pipeline.pictures import write_picture
from pixart.pipeline.request import Request
from pixart.publishing.card import (
    Facts,
    Shown,
    is_of_embedded_world,
    model_card,
    world_prompts,
)
from pixart.publishing.folder import check_publishable, write_repository
from pixart.publishing.hub import Target
from pixart.publishing.source import Base, Source, base_of, find_source

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline

CARD, PREVIEWS = "README.md", "previews"
_CACTUS = "a cactus with a happy face"
_MOST_PREVIEWS = 4


@dataclass(frozen=True)
class Order:
    """What `python -m pixart.publish` was asked for; its options explain the fields."""

    target: Target
    model: str
    license: str | None
    base: str | None
    results: Sequence[Path]
    prompts: Sequence[str]
    previews: bool
    seed: int
    dtype: str | None
    max_shard_size: str
    device: str | None


def publish(order: Order) -> None:
    """Write the folder. Everything that can be refused is, before anything is written; where something
    fails later, nothing is left behind and what was there stays."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    if order.prompts and not order.previews:
        raise ValueError("--prompt must be left out with --no-previews")
    source = find_source(order.model)
    base = source.base if order.base is None else base_of(order.base)
    license = license_of(order.license, base, source)
    requests = [Request(text, seed=order.seed) for text in _prompts(order, source)]
    results = [open_evaluated(folder) for folder in order.results]
    with silenced():
        _write(order, Facts(order.target.name, Path(), license, base, source, results), requests)


def _write(order: Order, facts: Facts, requests: Sequence[Request]) -> None:
    from pixart.pipeline.text_to_image import Pipeline

    found = load.find_source(facts.source.pipeline, None, None)
    _check_variants(found)
    pipe = Pipeline.from_pretrained(facts.source.pipeline, device="cpu", cache_dir=None)
    check_publishable(pipe)
    for one in facts.results:
        _check_of(one, pipe)
    check_writable(order.target.folder)
    process.at_work()
    with written_aside(order.target.folder) as aside:
        write_repository(aside, pipe, found.directory, order.dtype, order.max_shard_size)
        facts = replace(facts, folder=aside, previews=list(_draw(aside, requests, order)))
        (aside / CARD).write_text(model_card(pipe, facts), encoding="utf-8")


def license_of(asked: str | None, base: Base | None, source: Source) -> str:
    """The licence to publish under. ValueError where nobody says it: it is never made up."""
    if asked is not None:
        if not re.fullmatch(r"[\w.+-]{1,100}", asked):
            raise ValueError(
                f"--license must be a name of the hub such as openrail++, got {asked!r}"
            )
        return asked
    known = (None if base is None else base.license) or source.license
    if known is not None:
        return known
    whose = "" if base is None or base.name == source.pipeline else f" of {base.name}, the base"
    raise ValueError(
        f"the licence{whose} of {source.pipeline} is not known here; give it with --license, as the hub calls "
        "it (openrail++, apache-2.0 ...)"
    )


def _prompts(order: Order, source: Source) -> Sequence[str]:
    if not order.previews:
        return ()
    if order.prompts:
        return order.prompts
    validated = source.settings.get("validation.prompts")
    if isinstance(validated, list) and validated:
        return [str(text) for text in validated[:_MOST_PREVIEWS]]
    return world_prompts() if is_of_embedded_world(source) else (_CACTUS,)


def _check_variants(found: load.Source) -> None:
    """diffusers takes weights without a variant unless it is asked."""
    for folder, variant in found.variants.items():
        if variant is not None and folder != "transformer":
            raise ValueError(
                f"{found.directory / folder}: must have weights without a variant to be published, got "
                f"{variant} alone; rename them, or save them anew"
            )


def _check_of(one: Evaluated, pipe: "Pipeline") -> None:
    """Numbers of another model say nothing of this one."""
    said = (one.results.get("weights") or {}).get("transformer")
    if said is None:
        raise ValueError(
            f"{one.path}: must say the weights that it measured, it does not; evaluate the model with "
            "pixart evaluate run"
        )
    if said != pipe.weights["transformer"]:
        raise ValueError(
            f"{one.path}: measured other weights than those that are published ({one.model}); evaluate this "
            "model, or leave it out"
        )


def _draw(folder: Path, requests: Sequence[Request], order: Order) -> Iterator[Shown]:
    """Draw with the repository as it was written, and keep the pictures in it."""
    if not requests:
        return
    from pixart.pipeline.text_to_image import Pipeline

    pipe = Pipeline.from_pretrained(folder, device=order.device, cache_dir=None)
    asked_model: dict[str, Any] = {
        **dict.fromkeys(MODEL_OPTIONS), "model": order.target.name, "lora": [], "control": [],
        "preprocessor_weights": [], "ema": False, "cuda_graph": "auto",
    }  # fmt: skip
    for number, (request, drawn) in enumerate(zip(requests, pipe.draw_many(requests), strict=True)):
        file = f"{PREVIEWS}/{number}.png"
        metadata = Metadata.of(drawn, pipe, request, asked_model)
        write_picture(drawn.image, folder / file, metadata)
        yield Shown(file, request.prompt, request.seed)
