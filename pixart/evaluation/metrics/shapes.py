"""The embedded world's own metrics, exact and without a network: what a caption states holds in the picture
or does not, and outlines are clean or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pixart.evaluation.metric import Context, Estimate, PictureMetric, Score
from pixart.evaluation.statistics.intervals import mean_over_prompts
from pixart.shapes.caption import KINDS, Statement, parse
from pixart.shapes.checker import check
from pixart.shapes.edges import CLEAN, STRAY
from pixart.shapes.edges import measure as edges_of
from pixart.shapes.purity import NEAR, purity

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

SOURCE = "pixart.shapes.checker"


@dataclass(frozen=True)
class Checked:
    """Which statements of a caption hold in a picture."""

    statements: tuple[Statement, ...]
    holds: tuple[bool, ...]

    @property
    def is_right(self) -> bool:
        """Whether all hold."""
        return all(self.holds)

    def of_kind(self, kind: str) -> list[bool]:
        """Whether each statement of a kind holds."""
        pairs = zip(self.statements, self.holds, strict=True)
        return [held for statement, held in pairs if statement.kind == kind]

    @property
    def has_count(self) -> bool:
        """Whether there are as many things as stated."""
        return all(self.of_kind("count"))


def check_caption(picture: "np.ndarray", caption: str) -> Checked:
    """Check every statement of a caption in a (height, width, 3) uint8 picture. ValueError for a caption that
    says nothing about shapes."""
    statements = parse(caption)
    if not any(statement.kind == "shape" for statement in statements):
        raise ValueError(f"caption must say which shapes there are, got {caption[:80]!r}")
    holds = check(picture, statements) or [False] * len(statements)
    return Checked(tuple(statements), tuple(holds))


class ShapesAccuracy(PictureMetric):
    """Share of pictures in which every statement of their caption holds, and of each kind of statement the
    share that holds ("shapes/colour")."""

    source = SOURCE

    def __init__(self, name: str, context: Context) -> None:
        self.name = name

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        """1 where all statements hold, else 0; parts: of each kind that is stated, the share that holds."""
        return [_accuracy(entry, image) for entry, image in zip(entries, images or (), strict=True)]

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The mean over prompts of the score, and of each kind of statement."""
        found = {self.name: mean_over_prompts(entries, [one.value for one in scores])}
        for kind in KINDS:
            stated = [
                (entry, one)
                for entry, one in zip(entries, scores, strict=True)
                if kind in one.parts
            ]
            if stated:
                values = [one.parts[kind] for _, one in stated]
                found[f"{self.name}/{kind}"] = mean_over_prompts([e for e, _ in stated], values)
        return found


def _accuracy(entry: "Entry", image: "Image") -> Score:
    import numpy as np

    checked = check_caption(np.asarray(image), entry.prompt.prompt)
    kinds = {kind: checked.of_kind(kind) for kind in KINDS}
    parts = {kind: sum(held) / len(held) for kind, held in kinds.items() if held}
    return Score(float(checked.is_right), parts)


class ShapesEdges(PictureMetric):
    """Share of pictures with as many things as stated, all of clean outlines, and nothing lying about; and
    the overlap of outlines with ideal shapes ("shapes-edges/overlap", from 0 to 1)."""

    source = "pixart.shapes.edges"

    def __init__(self, name: str, context: Context) -> None:
        self.name = name

    @property
    def constants(self) -> Mapping[str, Any]:
        return {"clean": CLEAN, "stray": STRAY}

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        """1 where the picture is clean, else 0; parts: the mean overlap of its things, 0 where there is
        none, and the share of pixels that lie about."""
        return [
            _cleanness(entry, image) for entry, image in zip(entries, images or (), strict=True)
        ]

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The mean over prompts of the score, and of the overlap."""
        overlaps = [one.parts["overlap"] for one in scores]
        return {
            self.name: mean_over_prompts(entries, [one.value for one in scores]),
            f"{self.name}/overlap": mean_over_prompts(entries, overlaps),
        }


def _cleanness(entry: "Entry", image: "Image") -> Score:
    import numpy as np

    picture = np.asarray(image)
    edges = edges_of(picture)
    is_clean = edges.are_clean and check_caption(picture, entry.prompt.prompt).has_count
    overlap = sum(edges.overlaps) / max(1, len(edges.overlaps))
    return Score(float(is_clean), {"overlap": overlap, "stray": edges.stray})


class ShapesPurity(PictureMetric):
    """Mean share of pixels that are near a colour of the world: pictures that are blurred, or drawn in too few
    steps, have others."""

    source = "pixart.shapes.purity"

    def __init__(self, name: str, context: Context) -> None:
        self.name = name

    @property
    def constants(self) -> Mapping[str, Any]:
        return {"near": NEAR}

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        """The share, of each picture."""
        import numpy as np

        return [Score(purity(np.asarray(image))) for image in images or ()]
