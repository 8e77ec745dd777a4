"""A vision-language model of transformers as a judge of pairs: the likelihood of "first", "second" and
"tie", for quality and for alignment apart."""

from typing import TYPE_CHECKING, Any

import torch

from pixart.evaluation.judges.chat import ChatJudge
from pixart.evaluation.judges.judge import one_line
from pixart.evaluation.metric import Context
from pixart.evaluation.needs import MissingError
from pixart.evaluation.preference.judgements import CHOICES
from pixart.evaluation.preference.judges import (
    BEGINNING,
    CRITERIA,
    IGNORE,
    JudgeOfPairs,
    Verdict,
)
from pixart.evaluation.preference.options import Judge

if TYPE_CHECKING:
    from PIL.Image import Image


class LocalOfPairs(JudgeOfPairs):
    """The choice that the model itself finds likeliest; nothing is drawn at random."""

    def __init__(self, model: str, device: "torch.device") -> None:
        self._chat = ChatJudge(model, Context(device))
        if needs := self._chat.needs():
            raise MissingError("judge", needs)
        self.id = f"{self._chat.id}@{self._chat.digest}"

    def asked(self, prompt: str) -> str:
        return "\n".join(question(name, prompt) for name in CRITERIA)

    def compare(self, prompt: str, first: "Image", second: "Image") -> Verdict:
        parts: list[dict[str, Any]] = [
            {"type": "text", "text": "First picture:"},
            {"type": "image", "image": first},
            {"type": "text", "text": "Second picture:"},
            {"type": "image", "image": second},
        ]
        verdict: Verdict = {"repaired": False}
        reasons = []
        for name in CRITERIA:
            likely = self._chat.answer_about(parts, question(name, prompt), CHOICES)
            verdict[name] = max(CHOICES, key=lambda choice: likely[choice])
            said = ", ".join(f"{choice} {likely[choice]:.3f}" for choice in CHOICES)
            reasons.append(f"{name}: {said}")
        return {**verdict, "reason": "; ".join(reasons)}


def question(name: str, prompt: str) -> str:
    """The words of one question."""
    return f"{BEGINNING} {CRITERIA[name]} {IGNORE} Prompt: «{one_line(prompt)}»"


def open_local(options: Judge) -> LocalOfPairs:
    """By the options. MissingError (exit code 3) for a model that is not on this machine."""
    from pixart.device import choose_device

    return LocalOfPairs(str(options.model), torch.device(choose_device(options.device)))
