"""TIFA and Soft-TIFA: of the questions about a prompt, how many does the picture answer rightly.

TIFA (arXiv:2303.11897, github.com/Yushi-Hu/tifa): a question counts 1 where the likeliest choice is the
right answer, 0 else; a picture's score is the mean over its questions, and TIFA the mean over prompts. By
type of element: the mean of all questions of a type. Theirs lets the judge answer freely and takes the choice
whose sentence embedding is nearest; here the choice is the one that the judge itself finds likeliest, which
needs no second network and cannot map a wrong answer to a right choice.

Soft-TIFA (GenEval 2, arXiv:2512.16853): the probability of the right answer instead of 0 or 1. A picture's
atoms by arithmetic mean, and, as "soft-tifa-geometric", by geometric mean: one atom that is surely missing
makes it 0.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixart.evaluation.judges.judge import check_probabilities, likeliest
from pixart.evaluation.judges.prompt_questions import Question, Questions
from pixart.evaluation.metric import Context, Estimate, Score
from pixart.evaluation.metrics.judged import JudgedMetric, by_kind, shown
from pixart.evaluation.needs import Need
from pixart.evaluation.statistics.intervals import mean_over_prompts

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry


class QuestionMetric(JudgedMetric):
    """Score.parts: of each question by id, what it counts."""

    def __init__(self, name: str, context: Context) -> None:
        super().__init__(name, context)
        self.questions = Questions(context)

    @property
    def constants(self) -> Mapping[str, Any]:
        return {**super().constants, "questions": self.questions.digest}

    def needs(self) -> Sequence[Need]:
        return [*super().needs(), *self.questions.needs()]

    def worth(self, question: Question, answers: Mapping[str, float]) -> float:
        """What a question counts, given the judge's probabilities."""
        raise NotImplementedError

    def value(self, question: Sequence[Question], worth: Mapping[str, float]) -> float:
        """A picture's score, of what its questions count."""
        return sum(worth.values()) / len(worth)

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        scores = []
        for entry, image in zip(entries, shown(images, entries), strict=True):
            questions = self.questions.of(entry.prompt)
            worth = self.ask(entry, image, questions)
            scores.append(Score(self.value(questions, worth), worth))
        return scores

    def ask(
        self, entry: "Entry", image: "Image", questions: Sequence[Question]
    ) -> dict[str, float]:
        """What each question counts, by id. ValueError, with key and question, for what is not answered."""
        worth = {}
        for one in questions:
            try:
                worth[one.id] = self.worth(one, self.judge.answer(image, one.question, one.choices))
            except ValueError as error:
                raise ValueError(f"{entry.key}, question {one.id!r}: {error}") from error
        return worth

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The metric's own, and by type of element."""
        own = {self.name: mean_over_prompts(entries, [one.value for one in scores])}
        return own | by_kind(self.name, entries, map(self._by_type, entries, scores))

    def _by_type(self, entry: "Entry", score: Score) -> dict[str, list[float]]:
        kinds: dict[str, list[float]] = {}
        for one in self.questions.of(entry.prompt):
            if one.type:
                kinds.setdefault(one.type, []).append(score.parts[one.id])
        return kinds


class Tifa(QuestionMetric):
    source = "TIFA, arXiv:2303.11897; github.com/Yushi-Hu/tifa at 8e37050"

    @property
    def constants(self) -> Mapping[str, Any]:
        return {**super().constants, "choice": "likeliest"}

    def worth(self, question: Question, answers: Mapping[str, float]) -> float:
        return float(likeliest(answers, question.question) == question.answer)


class SoftTifa(QuestionMetric):
    source = "Soft-TIFA of GenEval 2, arXiv:2512.16853"

    def worth(self, question: Question, answers: Mapping[str, float]) -> float:
        check_probabilities(answers, question.question)
        return min(1.0, answers[question.answer])

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        geometric = [_geometric_mean(list(one.parts.values())) for one in scores]
        found = dict(super().reduce(entries, scores))
        found[f"{self.name}-geometric"] = mean_over_prompts(entries, geometric)
        return found


def _geometric_mean(values: Sequence[float]) -> float:
    if min(values) == 0:
        return 0.0
    return math.exp(math.fsum(map(math.log, values)) / len(values))
