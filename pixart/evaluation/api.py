"""Evaluation from Python: `evaluate`, and the Result that it returns."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart import process
from pixart.evaluation import results as kept
from pixart.evaluation.entries import Prompt
from pixart.evaluation.folders import Found, find_pictures, reference_pictures
from pixart.evaluation.metric import Context, Metric
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.prompt_files import as_lines, read_prompts
from pixart.evaluation.scoring import Reference, Scoring, check_needs
from pixart.files import check_writable, listed, read_json, write_bytes, write_json
from pixart.progress import say


def score_folder(
    output: Path,
    metrics: Sequence[str],
    *,
    images: Path | None = None,
    prompts: Path | None = None,
    reference: Path | None = None,
    samples: int | None = None,
    name: str | None = None,
    weights: Path | None = None,
    judge: str | None = None,
    files: Mapping[str, Path] | None = None,
    options: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Score pictures and write results.json into `output`; returns what it says."""
    from pixart.device import choose_device

    context = Context(choose_device(device), weights, judge, files or {}, options or {})
    opened = [open_metric(one, context) for one in metrics]
    check_needs(opened)
    own = output / kept.IMAGES
    folder = images or own
    _check_apart(folder, output, images)
    check_writable(output / kept.RESULTS)
    file = prompts or (output / kept.PROMPTS if images is None else None)
    found = find_pictures(folder, read_prompts(file) if file else None, samples)
    if found.extra:
        say(
            f"{folder}: {len(found.extra)} pictures belong to no prompt and are left aside "
            f"({listed(found.extra)})"
        )
    against = _reference(reference, found.prompts)
    protocol = _protocol(found, opened, against)
    process.at_work()
    _settle(output, protocol, found)
    scoring = Scoring(output, found, opened, against)
    blocks = scoring.run(allow_missing=allow_missing)
    results = {
        "version": kept.VERSION,
        "protocol": protocol,
        "model": name or (folder.resolve().name if images else None),
        "pictures": scoring.pictures,
        "errors": scoring.failed,
        "metrics": blocks,
    }
    write_json(output / kept.RUN, {"images": str(folder.resolve())}, indent=2)
    write_json(output / kept.RESULTS, results, indent=2)
    return results


def _check_apart(folder: Path, output: Path, images: Path | None) -> None:
    if images is not None and (
        output.resolve() == images.resolve() or images.resolve() in output.resolve().parents
    ):
        raise ValueError(
            f"--output must not lie in --images, got {output} in {images}; results are no pictures"
        )


def _reference(path: Path | None, prompts: Sequence[Prompt]) -> Reference | None:
    if path is None:
        return None
    named = [one.reference for one in prompts if one.reference is not None]
    found = reference_pictures(path, named if len(named) == len(prompts) else None)
    return Reference(found, None, "")


def _protocol(
    found: Found, metrics: Sequence[Metric], reference: Reference | None
) -> dict[str, Any]:
    """How pictures of others are scored."""
    decides = {
        "prompts_sha256": hashlib.sha256(as_lines(found.prompts)).hexdigest(),
        "images_per_prompt": found.samples,
        "metrics": {one.name: [one.version, dict(one.constants)] for one in metrics},
    }
    text = json.dumps(decides, sort_keys=True)
    return {
        "id": f"pictures/{hashlib.sha256(text.encode()).hexdigest()[:8]}",
        "name": "pictures",
        "prompts": len(found.prompts),
        "images_per_prompt": found.samples,
        "prompts_sha256": decides["prompts_sha256"],
    }


def _settle(output: Path, protocol: Mapping[str, Any], found: Found) -> None:
    """Write how the pictures are judged, or refuse a folder in which it was another way."""
    file = output / kept.PROTOCOL
    if file.is_file():
        before = read_json(file)
        if before.get("prompts_sha256") != protocol["prompts_sha256"]:
            raise ValueError(
                f"{output}: holds results of {before.get('id')}, of other prompts; name another --output"
            )
    write_bytes(output / kept.PROMPTS, as_lines(found.prompts))
    write_json(file, dict(protocol), indent=2)
