"""What a caption of the embedded world wants to be found in its picture, as GenEval and T2I-CompBench say it.

Two things of one shape are told apart by their colours: their classes are "red star" and "blue star", as
the checker names what it finds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pixart.shapes.caption import parse

_PLACES = {
    "left of": "on the left of",
    "right of": "on the right of",
    "above": "on the top of",
    "below": "on the bottom of",
}


@dataclass(frozen=True)
class Wanted:
    """The things of a caption in its order. name: of the class. noun: as a phrase."""

    names: tuple[str, ...]
    colours: tuple[str | None, ...]
    nouns: tuple[str, ...]
    count: int
    relation: str | None


def wanted_of(caption: str) -> Wanted:
    """ValueError for a caption that names no shape."""
    statements = parse(caption)
    subjects = sorted({one.subject for one in statements if one.kind == "shape"})
    if not subjects:
        raise ValueError(f"caption must name a shape of the embedded world, got {caption!r:.200}")
    stated = {(one.kind, one.subject): one.value for one in statements}
    shapes = [stated["shape", one] for one in subjects]
    colours = [stated.get(("colour", one)) for one in subjects]
    alike = len(set(shapes)) < len(shapes)
    names = [
        f"{colour} {shape}" if alike and colour else shape
        for shape, colour in zip(shapes, colours, strict=True)
    ]
    nouns = []
    for subject, shape, colour in zip(subjects, shapes, colours, strict=True):
        words = [stated.get(("size", subject)), colour, shape]
        nouns.append(" ".join(("a", *(word for word in words if word))))
    relation = stated.get(("relation", 0))
    return Wanted(tuple(names), tuple(colours), tuple(nouns), int(stated["count", 0]), relation)


def shapes_geneval(caption: str) -> dict[str, Any]:
    """The clauses of GenEval: {"tag", "include", "exclude"}."""
    wanted = wanted_of(caption)
    clauses: list[dict[str, Any]] = []
    each = wanted.count if len(wanted.names) == 1 else 1
    for name, colour in zip(wanted.names, wanted.colours, strict=True):
        clauses.append({"class": name, "count": each} | ({"color": colour} if colour else {}))
    values: dict[str, Any] = {"tag": _tag(wanted, clauses)}
    if wanted.relation:
        # A clause's position is relative to one before it.
        clauses = [clauses[1], clauses[0] | {"position": [wanted.relation, 0]}]
    values["include"] = clauses
    if len(wanted.names) == 1:
        values["exclude"] = [{"class": wanted.names[0], "count": each + 1}]
    return values


def shapes_spatial(caption: str) -> tuple[str, str, str] | None:
    """First thing, relation and second thing as T2I-CompBench has them; None where no relation is stated."""
    wanted = wanted_of(caption)
    if wanted.relation is None:
        return None
    first, second = wanted.names
    return first, _PLACES[wanted.relation], second


def shapes_phrases(caption: str) -> Sequence[str]:
    """The noun phrases, with the size and colour that are stated."""
    return wanted_of(caption).nouns


def _tag(wanted: Wanted, clauses: Sequence[dict[str, Any]]) -> str:
    coloured = any("color" in clause for clause in clauses)
    if len(clauses) == 2:
        return "position" if wanted.relation else "color_attr" if coloured else "two_object"
    if wanted.count > 1:
        return "counting"
    return "colors" if coloured else "single_object"
