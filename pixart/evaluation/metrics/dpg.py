"""DPG-Bench (ELLA, arXiv:2403.05135): questions of which some make no sense where another has the answer no.

A question counts 1 where the judge gives the right answer (which is always yes there); it counts 0 where any
of its parents counts 0, so too where the parent was zeroed itself. A picture's score is the mean over its
questions, DPG the mean over prompts of the mean over pictures. Categories are scored by the answers as they
were given: "dpg/entity", and in detail "dpg/entity - whole".

    --option dpg-grid=yes           each picture is a 2 x 2 grid of four, as the official script wants them
    --option official-quirks=yes    as the official script: the first line of `--file questions=FILE` is
                                    dropped, a parent that stands behind its child is zeroed too late to
                                    count, and the categories of a grid are those of its last picture
"""

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

from pixart.evaluation.judges.judge import likeliest
from pixart.evaluation.judges.prompt_questions import Question
from pixart.evaluation.metric import Context, Estimate, Score
from pixart.evaluation.metrics.judged import by_kind, flag, shown
from pixart.evaluation.metrics.tifa import QuestionMetric
from pixart.evaluation.statistics.intervals import mean_over_prompts

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry, Prompt

GRID = "grid."  # parts of a picture of a grid are "grid.0.QUESTION"


class Dpg(QuestionMetric):
    """Score.parts: of each question by id, 1 for the right answer, not zeroed; of a grid, "grid.K.ID"."""

    source = "DPG-Bench, arXiv:2403.05135; github.com/TencentQQGYLab/ELLA at 3c228f1"

    def __init__(self, name: str, context: Context) -> None:
        super().__init__(name, context)
        self.is_grid = flag(context, "dpg-grid")
        self.has_quirks = flag(context, "official-quirks")
        if self.has_quirks and "questions" not in context.files:
            raise ValueError(
                "--option official-quirks=yes needs --file questions=FILE for dpg: its first line is the "
                "one that the official script drops"
            )

    @property
    def constants(self) -> Mapping[str, Any]:
        return {**super().constants, "grid": self.is_grid, "official_quirks": self.has_quirks}

    def worth(self, question: Question, answers: Mapping[str, float]) -> float:
        return float(likeliest(answers, question.question) == question.answer)

    def asked_of(self, prompt: "Prompt") -> tuple[Question, ...]:
        """The questions of a prompt that count."""
        questions = self.questions.of(prompt)
        if not self.has_quirks or prompt.id != self.questions.first_prompt:
            return questions
        if len(questions) == 1:
            raise ValueError(
                f"prompt {prompt.id!r} has one question, which the official script drops"
            )
        return questions[1:]

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        scores = []
        for entry, image in zip(entries, shown(images, entries), strict=True):
            questions = self.asked_of(entry.prompt)
            if not self.is_grid:
                worth = self.ask(entry, image, questions)
                scores.append(Score(zeroed_mean(questions, worth, self.has_quirks), worth))
                continue
            each = [self.ask(entry, part, questions) for part in quarters(image, entry.key)]
            values = [zeroed_mean(questions, worth, self.has_quirks) for worth in each]
            parts = {f"{GRID}{k}.{i}": w for k, one in enumerate(each) for i, w in one.items()}
            scores.append(Score(sum(values) / len(values), parts))
        return scores

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The metric's own, and by category, broad and detailed."""
        own = {self.name: mean_over_prompts(entries, [one.value for one in scores])}
        kinds = list(map(self._by_type, entries, scores))
        broad: list[dict[str, list[float]]] = []
        for one in kinds:
            broad.append({})
            for kind, values in one.items():
                broad[-1].setdefault(kind.split("-")[0].strip(), []).extend(values)
        return own | by_kind(self.name, entries, broad) | by_kind(self.name, entries, kinds)

    def _by_type(self, entry: "Entry", score: Score) -> dict[str, list[float]]:
        prefixes = [""]
        if self.is_grid:
            prefixes = [f"{GRID}{k}." for k in (range(3, 4) if self.has_quirks else range(4))]
        kinds: dict[str, list[float]] = {}
        for one in self.asked_of(entry.prompt):
            if one.type:
                worth = [score.parts[f"{prefix}{one.id}"] for prefix in prefixes]
                kinds.setdefault(one.type, []).extend(worth)
        return kinds


def zeroed_mean(
    questions: Sequence[Question], worth: Mapping[str, float], in_file_order: bool = False
) -> float:
    """The mean over questions, each 0 where a parent counts 0. in_file_order: each is looked at once, as they
    stand, so that a parent behind its child is not zeroed yet."""
    counted = dict(worth)
    parents = {one.id: [p for p in one.parents if p in counted] for one in questions}
    order = list(parents) if in_file_order else list(TopologicalSorter(parents).static_order())
    for one in order:
        if any(counted[parent] == 0 for parent in parents[one]):
            counted[one] = 0.0
    return sum(counted.values()) / len(counted)


def quarters(image: "Image", key: str) -> "list[Image]":
    """The four pictures of a 2 x 2 grid, by rows. ValueError for a side that is odd."""
    width, height = image.size
    if width % 2 or height % 2:
        raise ValueError(f"{key}: a grid of 2 x 2 must have even sides, got {width}x{height}")
    x, y = width // 2, height // 2
    return [image.crop((a, b, a + x, b + y)) for b in (0, y) for a in (0, x)]
