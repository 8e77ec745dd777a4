"""GenEval (arXiv:2310.11513) from what a detector found, whatever detector that is.

A picture is right where all clauses of its prompt hold: `include`, at least so many detections of a class (the
likeliest of them are looked at), of a colour, in a position to those of a clause before; `exclude`, fewer
than so many. Detections count above a confidence of 0.3, of counting prompts above 0.9, 16 of a class at most;
none is left out for overlapping. GenEval is the mean over its tasks of the share of right pictures.

GenEval's numbers are those of mmdet's Mask2Former; of another detector they are its own (the protocol is
"geneval/DETECTOR"), and published ones differ by more than the detector: of today's models GenEval is
off from what people say by up to 17.7 points (GenEval 2, arXiv:2512.16853).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pixart.evaluation.detecting.detections import Detection, Found, Picture
from pixart.evaluation.judges.prompt_questions import EMBEDDED_SET
from pixart.evaluation.judges.shapes_objects import shapes_geneval
from pixart.evaluation.metric import Context, Estimate, PictureMetric, Score
from pixart.evaluation.metrics.judged import shown
from pixart.evaluation.needs import Need
from pixart.evaluation.statistics.intervals import mean_over_prompts
from pixart.evaluation.statistics.pooled import mean_of_means, pooled_mean
from pixart.evaluation.store.entries import Prompt

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

COUNTING = "counting"
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
MOST_OBJECTS = 16  # of a class
POSITION_THRESHOLD = 0.1  # of the sides of both boxes: so far apart is no direction yet
DIRECTION = 0.5  # of the distance, that has to lie along a direction
RELATIONS = ("left of", "right of", "above", "below")


class GenEval(PictureMetric):
    """Score.parts: of the kinds of clauses that a prompt has, 1 where all of them hold."""

    source = "GenEval, arXiv:2310.11513; github.com/djghosh13/geneval at af4902f"

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.found = Found(context)

    @property
    def protocol(self) -> str:
        """ "geneval/hf-mask2former" of our adapter's detections."""
        return f"geneval/{self.found.detector.partition(':')[0]}"

    @property
    def constants(self) -> Mapping[str, Any]:
        return {
            "protocol": self.protocol,
            "detector": self.found.detector,
            "detections": self.found.digest,
            "threshold": THRESHOLD,
            "counting_threshold": COUNTING_THRESHOLD,
            "most_objects": MOST_OBJECTS,
            "position_threshold": POSITION_THRESHOLD,
        }

    def needs(self) -> Sequence[Need]:
        return self.found.needs()

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        scores = []
        for entry, image in zip(entries, shown(images, entries), strict=True):
            picture = self.found.of(entry, image)
            try:
                held = clauses_hold(picture, clauses_of(entry.prompt))
            except ValueError as error:
                raise ValueError(f"{entry.key}: {error}") from error
            scores.append(Score(float(all(held.values())), {k: float(v) for k, v in held.items()}))
        return scores

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The mean over tasks, each task, all pictures alike, and prompts of which any picture is right."""
        tags = [clauses_of(entry.prompt)["tag"] for entry in entries]
        groups = {
            tag: [[one.value] if its == tag else [] for its, one in zip(tags, scores, strict=True)]
            for tag in sorted(set(tags))
        }
        best: dict[str, float] = {}
        for entry, one in zip(entries, scores, strict=True):
            best[entry.prompt.id] = max(one.value, best.get(entry.prompt.id, 0.0))
        found = {self.name: mean_of_means(entries, groups)}
        found |= {f"{self.name}/{tag}": pooled_mean(entries, some) for tag, some in groups.items()}
        found[f"{self.name}-pictures"] = pooled_mean(entries, [[one.value] for one in scores])
        any_right = [best[entry.prompt.id] for entry in entries]
        found[f"{self.name}-any-right"] = mean_over_prompts(entries, any_right)
        note = f"of detections by {self.found.detector}: not GenEval's own detector"
        return {name: replace(one, notes=(*one.notes, note)) for name, one in found.items()}


def clauses_of(prompt: Prompt) -> Mapping[str, Any]:
    """What is wanted: {"tag", "include", "exclude"}, of the prompt's meta. ValueError for what is none."""
    meta = prompt.meta
    if "include" not in meta and prompt.set == EMBEDDED_SET:
        meta = shapes_geneval(prompt.prompt)
    if not isinstance(meta.get("tag"), str):
        raise ValueError(f"prompt {prompt.id!r}: must have a task as meta.tag, it has none")
    include, exclude = meta.get("include", []), meta.get("exclude", [])
    for name, clauses in (("include", include), ("exclude", exclude)):
        if not isinstance(clauses, list | tuple):
            raise ValueError(f"prompt {prompt.id!r}: meta.{name} must be a list")
        for place, clause in enumerate(clauses):
            if not _is_clause(clause, place):
                raise ValueError(
                    f"prompt {prompt.id!r}: meta.{name} must be of class, count, color and position "
                    f"[{', '.join(RELATIONS)}; a clause before], got {clause!r:.200}"
                )
    if not include and not exclude:
        raise ValueError(f"prompt {prompt.id!r}: must want something in meta.include")
    return {"tag": meta["tag"], "include": include, "exclude": exclude}


def clauses_hold(picture: Picture, clauses: Mapping[str, Any]) -> dict[str, bool]:
    """By kind of clause ("count", "color", "position", "exclude"), whether all of that kind hold. ValueError
    for a detection without a color where one is asked for."""
    threshold = COUNTING_THRESHOLD if clauses["tag"] == COUNTING else THRESHOLD
    seen: dict[str, list[Detection]] = {}
    for one in picture.detections:
        of_class = seen.setdefault(one.name, [])
        if one.score > threshold and len(of_class) < MOST_OBJECTS:
            of_class.append(one)
    held: dict[str, bool] = {}
    matched: list[list[Detection]] = []  # by clause; nothing where it does not hold
    for clause in clauses["include"]:
        objects = seen.get(clause["class"], [])[: clause["count"]]
        holds = len(objects) == clause["count"]
        _note(held, "count", holds)
        if "color" in clause and holds:
            colours = [_colour(one) for one in objects]
            holds = colours.count(clause["color"]) == len(objects)
        if "color" in clause:
            _note(held, "color", holds)
        if "position" in clause:
            wanted, target = clause["position"]
            holds = holds and bool(matched[target])
            pairs = [(one, other) for one in objects for other in matched[target]]
            holds = holds and all(wanted in relative_position(*map(_box, pair)) for pair in pairs)
            _note(held, "position", holds)
        matched.append(objects if holds else [])
    for clause in clauses["exclude"]:
        _note(held, "exclude", len(seen.get(clause["class"], [])) < clause["count"])
    return held


def relative_position(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box lies from another's view: the offset of centres, each component shortened by a tenth of
    both sides, has to be more than half of the whole offset."""
    offset, shortened = [], []
    for low, high in ((0, 2), (1, 3)):
        gap = (box[low] + box[high]) / 2 - (other[low] + other[high]) / 2
        sides = abs(box[high] - box[low]) + abs(other[high] - other[low])
        rest = max(abs(gap) - POSITION_THRESHOLD * sides, 0.0)
        offset.append(gap)
        shortened.append(rest if gap > 0 else -rest)
    # As theirs: nothing that is left of an offset is no direction.
    if all(abs(one) < 1e-3 for one in shortened):
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    dx, dy = (one / length for one in shortened)
    found = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
    return {name for name, along in found.items() if along > DIRECTION}


def _is_clause(clause: Any, place: int) -> bool:
    if not isinstance(clause, Mapping) or not clause.keys() <= {
        "class",
        "count",
        "color",
        "position",
    }:
        return False
    name, count, color = clause.get("class"), clause.get("count"), clause.get("color", "")
    position = clause.get("position", ("above", 0))
    return (
        isinstance(name, str)
        and isinstance(color, str)
        and isinstance(count, int)
        and count > 0
        and isinstance(position, list | tuple)
        and len(position) == 2
        and position[0] in RELATIONS
        and isinstance(position[1], int)
        and ("position" not in clause or 0 <= position[1] < place)
    )


def _note(held: dict[str, bool], kind: str, holds: bool) -> None:
    held[kind] = held.get(kind, True) and holds


def _colour(detection: Detection) -> str:
    if detection.color is None:
        raise ValueError(
            f"detections of {detection.name!r} must have a color, which is asked for; detect with colours"
        )
    return detection.color


def _box(detection: Detection) -> tuple[float, float, float, float]:
    return detection.box
