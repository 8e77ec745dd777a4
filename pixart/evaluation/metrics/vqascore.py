"""VQAScore (arXiv:2404.01291, github.com/linzhiqiu/t2v_metrics): P("Yes") when a judge is asked whether the
picture shows its prompt.

The paper's words are "Does this figure show '...'? Please answer yes or no."; the end is what a chat model is
told behind every question that has these answers. The probability is the judge's own, of all that it could
have said: of a judge that answers with "Sure", it is small. "vqascore-yes-no" is P("Yes") / (P("Yes") +
P("No")).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixart.evaluation.judges.judge import check_probabilities, one_line
from pixart.evaluation.metric import Estimate, Score
from pixart.evaluation.metrics.judged import JudgedMetric, shown
from pixart.evaluation.statistics.intervals import mean_over_prompts

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

TEMPLATE = "Does this figure show '{}'?"
CHOICES = ("Yes", "No")


class VqaScore(JudgedMetric):
    source = "VQAScore, arXiv:2404.01291; github.com/linzhiqiu/t2v_metrics"

    @property
    def constants(self) -> Mapping[str, Any]:
        return {**super().constants, "template": TEMPLATE}

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        scores = []
        for entry, image in zip(entries, shown(images, entries), strict=True):
            # Not str.format: a prompt with braces is a prompt.
            question = TEMPLATE.replace("{}", one_line(entry.prompt.prompt))
            try:
                answers = self.judge.answer(image, question, CHOICES)
                check_probabilities(answers, question)
            except ValueError as error:
                raise ValueError(f"{entry.key}: {error}") from error
            yes, no = (answers[choice] for choice in CHOICES)
            scores.append(Score(min(1.0, yes), {"no": min(1.0, no)}))
        return scores

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        relative = [one.value / (one.value + one.parts["no"]) for one in scores]
        return {
            self.name: mean_over_prompts(entries, [one.value for one in scores]),
            f"{self.name}-yes-no": mean_over_prompts(entries, relative),
        }
