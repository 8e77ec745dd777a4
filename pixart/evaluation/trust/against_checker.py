"""Which metric notices which kind of error, against the exact checker: `python -m pixart.evaluate trust`.

    pairs      of each kind of statement, scenes with one wrong fact in the caption or in the picture: a metric of
               single pictures must score the true one higher. Paired accuracy (chance 0.5) and AUC.
    damages    drawn pictures that are blurred, noisy, compressed or of something else: what each costs in a
               metric of sets, beside what other undamaged pictures cost.
    model      pictures of a model at few and many steps: whether a metric ranks them as the checker does.

The checker is one of the metrics in every run, and must be right in every pair.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart import process
from pixart.device import full_precision
from pixart.evaluation.in_memory import Pictures
from pixart.evaluation.metric import Estimate, Metric, PictureMetric, SetMetric
from pixart.evaluation.protocols.protocol import Use
from pixart.evaluation.report.numbers import estimate
from pixart.evaluation.running import results as kept
from pixart.evaluation.running.opening import Given, check_needs, open_metrics
from pixart.evaluation.statistics.intervals import auc, paired_accuracy
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.evaluation.trust.damages import DAMAGES, distances
from pixart.evaluation.trust.wrong_facts import KINDS, SIDE, Pair, pairs
from pixart.files import read_json, read_json_lines, write_bytes, write_json
from pixart.progress import counted, say

SHIPPED = (  # what is measured where nothing is named: by the CLIP that comes with the library
    Use("clip", {"clip-model": "shapes-clip"}),
    Use("kid", {"features": "shapes-clip"}),
)
CHECKER = "shapes"  # the metric that is right by definition
JUDGED = "vqascore"  # by which a judge is asked
VERSION = "1"  # of the pairs and the damages
CHANCE = 0.5
HALF_SEEN = 0.75  # of a metric that sees half of the wrong facts and guesses the others
LEAST, MOST = 8, 10_000  # with fewer pairs even one who is always right is not told from chance
BATCH = 32
_DIRECTIONS = ("caption", "picture")


def trust(
    output: Path,
    metrics: Sequence[str] = (),
    *,
    count: int = 100,
    seed: int = 0,
    given: Given | None = None,
    model: str | None = None,
    model_count: int = 96,
) -> dict[str, Any]:
    """Measure metrics against the checker, and write results.json, README.md, report.html and plots/ into
    `output`; returns what results.json says. What is there is not measured again. Where neither metrics nor a
    judge are named, it measures `clip` and `kid` of the CLIP that comes with the library.

    count: pairs of each kind, and pictures of a set. given: what metrics are opened with; its judge is asked
    whether the picture shows its caption.
    model: a pipeline of the embedded world, whose pictures the metrics are to rank; model_count: how many.
    ValueError for what cannot be measured, MissingError for weights that are not there.
    """
    from pixart.device import choose_device
    from pixart.evaluation.report.trust_page import write_pages
    from pixart.evaluation.trust.trusted_model import ranked

    for name, number in (("count", count), ("model_count", model_count)):
        if not LEAST <= number <= MOST:
            raise ValueError(f"{name} must be from {LEAST} to {MOST:,}, got {number}")
    given = given or Given()
    named = [CHECKER, *metrics, *([JUDGED] if given.judge else [])]
    uses = [Use(name) for name in dict.fromkeys(named)]
    opened = open_metrics(uses if len(uses) > 1 else [*uses, *SHIPPED], given)
    check_needs(opened)
    process.at_work()
    protocol = _write_protocol(output, count, seed)
    blocks = {}
    for metric in opened:
        if isinstance(metric, SetMetric):
            blocks[metric.name] = _damaged(output, metric, count, seed)
        else:
            assert isinstance(metric, PictureMetric)
            blocks[metric.name] = _paired(output, metric, count, seed)
            if model is not None:
                block = blocks[metric.name]
                block["model"] = ranked(
                    output, metric, model, model_count, choose_device(given.device)
                )
        _release(metric)
    results = {
        "version": kept.VERSION,
        "protocol": protocol,
        "model": model,
        "pictures": 2 * count * len(KINDS),
        "errors": 0,
        "metrics": blocks,
    }
    write_json(output / kept.RESULTS, results, indent=2)
    write_pages(output, results, [pairs(kind, 1, seed)[0] for kind in KINDS])
    return results


def _write_protocol(output: Path, count: int, seed: int) -> dict[str, Any]:
    """Write how it is measured, or refuse a folder in which it was another way."""
    decides = {
        "name": "trust",
        "prompts": count * len(KINDS),
        "images_per_prompt": 1,
        "pairs": count,
        "seed": seed,
        "size": f"{SIDE}x{SIDE}",
        "kinds": list(KINDS),
        "damages": list(DAMAGES),
        "pairs_version": VERSION,
    }
    text = json.dumps(decides, sort_keys=True)
    protocol = {"id": f"trust/{hashlib.sha256(text.encode()).hexdigest()[:8]}", **decides}
    file = output / kept.PROTOCOL
    if file.is_file():
        before = read_json(file)
        if before.get("id") != protocol["id"]:
            raise ValueError(
                f"{output}: holds results of {before.get('id')}, not of {protocol['id']}: other pairs; "
                "name another --output"
            )
    write_json(file, protocol, indent=2)
    return protocol


@dataclass(frozen=True)
class Scores:
    """What a metric says of a pair: of what is true, of the picture with the other caption, and of the
    other picture with the caption."""

    right: float
    caption: float
    picture: float


def _paired(output: Path, metric: PictureMetric, count: int, seed: int) -> dict[str, Any]:
    """The block of results.json: paired accuracy of wrong captions under the metric's own name, of wrong
    pictures, and both as AUC; over all kinds, and by kind."""
    found = {
        kind: _scores(output, metric, pairs(kind, count, seed))
        for kind in counted(iter(KINDS), metric.name, len(KINDS))
    }
    by_kind = {kind: _numbers(metric, scores) for kind, scores in found.items()}
    whole = _numbers(metric, [one for scores in found.values() for one in scores])
    # Kinds differ in how high their scores are: over all of them only pairs can be compared.
    whole = {name: one for name, one in whole.items() if "auc" not in name}
    if metric.name == CHECKER:
        _check_checker(by_kind)
    block = kept.block_of(metric, whole, by_kind)
    block["verdicts"] = {kind: verdict(metric.name, by_kind[kind]) for kind in KINDS}
    block["sentence"] = sentence(metric.name, block["verdicts"])
    return block


def _check_checker(by_kind: Mapping[str, Mapping[str, Estimate]]) -> None:
    wrong = [kind for kind, all_ in by_kind.items() if any(one.value < 1 for one in all_.values())]
    if wrong:
        raise RuntimeError(
            f"the exact checker must be right in every pair, it is not in {', '.join(wrong)}: nothing can be "
            "measured against it"
        )


def _numbers(metric: PictureMetric, scores: Sequence[Scores]) -> dict[str, Estimate]:
    sign = 1 if metric.higher_is_better else -1
    right = [sign * one.right for one in scores]
    numbers = {}
    for direction in _DIRECTIONS:
        wrong = [sign * getattr(one, direction) for one in scores]
        name = own_name(metric.name, direction)
        numbers[name] = paired_accuracy(right, wrong)
        numbers[f"{metric.name}/{direction}-auc"] = auc(right, wrong, paired=True)
    return numbers


def own_name(metric: str, direction: str) -> str:
    """Of the paired accuracy: the metric's own number is that of wrong captions."""
    return metric if direction == "caption" else f"{metric}/{direction}"


def verdict(metric: str, numbers: Mapping[str, Estimate]) -> str:
    """ "sees", "in captions", "in pictures", "does not see", "not decided" or "prefers the wrong": by
    whether the intervals of the paired accuracies leave chance out, and HALF_SEEN."""
    found = [numbers[own_name(metric, direction)] for direction in _DIRECTIONS]
    above = [one.low > CHANCE for one in found]
    if all(above):
        return "sees"
    if any(above):
        return "in captions" if above[0] else "in pictures"
    if any(one.high < CHANCE for one in found):
        return "prefers the wrong"
    return "does not see" if all(one.high < HALF_SEEN for one in found) else "not decided"


_WORDS = {"swap": "swap of two colours"}


def sentence(metric: str, verdicts: Mapping[str, str]) -> str:
    """What the verdicts come to, in words."""
    said = {
        "sees": "sees a wrong {}",
        "in captions": "sees a wrong {} in captions only",
        "in pictures": "sees a wrong {} in pictures only",
        "does not see": "does not see a wrong {}",
        "not decided": "may or may not see a wrong {}, of which more pairs would tell",
        "prefers the wrong": "prefers a wrong {}",
    }
    parts = []
    for told, words in said.items():
        kinds = [_WORDS.get(kind, kind) for kind, one in verdicts.items() if one == told]
        if kinds:
            parts.append(words.format(_listed(kinds)).replace("a wrong swap", "a swap"))
    return f"{metric} {'; it '.join(parts)}."


def _listed(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


# Scores of the pairs of a kind, kept in a file.


def _scores(output: Path, metric: PictureMetric, made: Sequence[Pair]) -> list[Scores]:
    folder = kept.score_folder(metric.name, metric.version, metric.constants)
    file = output / "scores" / folder / f"{made[0].kind}.jsonl"
    ids = [one.id for one in made]
    there = _read(file)
    if list(there) != ids:
        there = dict(zip(ids, _compute(metric, made), strict=True))
        lines = (
            json.dumps({"id": key, **vars(one)}, allow_nan=False) for key, one in there.items()
        )
        write_bytes(file, ("\n".join(lines) + "\n").encode())
    return list(there.values())


def _read(file: Path) -> dict[str, Scores]:
    """The scores by id; none of a file that is not there, or damaged."""
    if not file.is_file():
        return {}
    try:
        names = ("right", "caption", "picture")
        return {
            one["id"]: Scores(*(float(one[name]) for name in names))
            for _, one in read_json_lines(file, 2**26)
        }
    except (ValueError, KeyError, TypeError) as error:
        say(f"{file}: is damaged and made again ({error})")
        return {}


def _compute(metric: PictureMetric, made: Sequence[Pair]) -> Iterator[Scores]:
    for start in range(0, len(made), BATCH):
        yield from _of_batch(metric, made[start : start + BATCH])


def _of_batch(metric: PictureMetric, made: Sequence[Pair]) -> list[Scores]:
    import numpy as np
    from PIL import Image

    count = len(made)
    images = [Image.fromarray(one.picture) for one in made]
    images += [Image.fromarray(one.other_picture) for one in made]
    captions = [one.caption for one in made]
    asked = [captions, [one.other_caption for one in made], captions]
    entries = [
        [_entry(f"{one.id}-{way}", text) for one, text in zip(made, texts, strict=True)]
        for way, texts in zip(("right", *_DIRECTIONS), asked, strict=True)
    ]
    rows = [range(count), range(count), range(count, 2 * count)]
    with full_precision():
        if metric.extractor is not None:
            features = Pictures([*entries[0], *entries[2]], images).features(metric.extractor)
            told = [
                metric.score(some, None, features[list(places)])
                for some, places in zip(entries, rows, strict=True)
            ]
        else:
            told = [
                metric.score(some, [images[k] for k in places], None)
                for some, places in zip(entries, rows, strict=True)
            ]
    values = np.array([[one.value for one in some] for some in told])
    if not np.isfinite(values).all():
        raise ValueError(f"{metric.name}: scores must be finite, got NaN or infinity")
    return [Scores(*map(float, column)) for column in values.T]


def _entry(name: str, caption: str) -> Entry:
    return Entry(Prompt(name, caption, "trust"), 0, Path(f"{name}.png"))


# Sets.


def _damaged(output: Path, metric: SetMetric, count: int, seed: int) -> dict[str, Any]:
    folder = kept.score_folder(metric.name, metric.version, metric.constants)
    file = output / "scores" / folder / "damages.json"
    if not file.is_file():
        found = distances(metric, count, seed)
        plain = next(iter(found))
        block = kept.block_of(
            metric,
            {metric.name: found[plain]},
            {name: {metric.name: one} for name, one in found.items()},
        )
        block["sentence"] = costs(metric.name, found)
        write_json(file, block, indent=2)
    return read_json(file)


def costs(metric: str, found: Mapping[str, Estimate]) -> str:
    """What each damage costs, in words: those whose interval lies above that of undamaged pictures, the
    dearest first."""
    (_, plain), *others = found.items()
    dear = sorted((one for one in others if one[1].low > plain.high), key=lambda one: -one[1].value)
    even = [name for name, one in others if one.low <= plain.high]
    parts = []
    if dear:
        told = ", ".join(f"{name} ({estimate(one)})" for name, one in dear)
        parts.append(f"{metric} sees, the dearest first, {told}")
    if even:
        parts.append(
            f"{'it' if dear else metric} does not tell {_listed(even)} from undamaged pictures"
        )
    return f"{'; '.join(parts)}. Undamaged pictures cost {estimate(plain)}."


def _release(metric: Metric) -> None:
    metric.release()
    if (extractor := getattr(metric, "extractor", None)) is not None:
        extractor.release()
