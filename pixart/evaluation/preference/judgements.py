"""Judgements of models: two lines a pair in judgements.jsonl, one for each order of the two pictures.

    {"pair", "order": "left-first"|"right-first", "model", "prompt", "quality": "first"|"second"|"tie",
     "alignment": ..., "reason", "repaired"}

prompt: a digest of all words that the model was asked with. Where the two orders do not agree the place
decided and not the picture: that is a tie, and a flip.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pixart.evaluation.preference.log import read_lines
from pixart.evaluation.preference.study import JUDGEMENTS, QUESTIONS, SIDES, Study
from pixart.evaluation.statistics.estimate import Estimate
from pixart.evaluation.statistics.intervals import wilson
from pixart.files import short

CHOICES = ("first", "second", "tie")
ORDERS = ("left-first", "right-first")
MOST_FLIPS = 0.3  # of pairs; a judge that flips more often judges the place
MAX_REASON = 1000  # characters


@dataclass(frozen=True)
class Judgement:
    """What a model said of a pair shown in one order. repaired: whether it had to be asked twice."""

    pair: str
    order: str
    model: str
    prompt: str
    quality: str
    alignment: str
    reason: str = ""
    repaired: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def side(self, question: str) -> str:
        """The answer as a side of the pair."""
        choice = getattr(self, question)
        first, second = SIDES if self.order == "left-first" else SIDES[::-1]
        return {"first": first, "second": second}.get(choice, "tie")


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of one question. sides: of each pair judged in both orders. flips: how many of them
    came out otherwise in the other order."""

    model: str
    question: str
    sides: Mapping[str, str]
    flips: int

    @property
    def flip_rate(self) -> float:
        return self.flips / len(self.sides) if self.sides else 0.0

    @property
    def flipped(self) -> Estimate | None:
        """The flip rate with its interval, None where no pair was judged in both orders."""
        if not (n := len(self.sides)):
            return None
        return Estimate(self.flip_rate, *wilson(self.flips, n), n, "Wilson")

    @property
    def is_usable(self) -> bool:
        return self.flip_rate <= MOST_FLIPS


def read_judgements(study: Study) -> list[Judgement]:
    """All lines, in order. ValueError names one that is none of this study's."""
    lines = read_lines(study.folder / JUDGEMENTS, lambda values: _check(values, study))
    return [Judgement(**values) for values in lines]


def verdicts(judgements: list[Judgement]) -> list[Verdicts]:
    """By model and question, of pairs that were judged in both orders; of several judgements of an order
    the last counts."""
    by_model: dict[str, dict[str, dict[str, Judgement]]] = {}
    for one in judgements:
        by_model.setdefault(one.model, {}).setdefault(one.pair, {})[one.order] = one
    found = []
    for model, pairs in sorted(by_model.items()):
        both = {pair: orders for pair, orders in sorted(pairs.items()) if len(orders) == 2}
        for question in QUESTIONS:
            sides = {
                pair: {o.side(question) for o in orders.values()} for pair, orders in both.items()
            }
            agreed = {pair: next(iter(s)) if len(s) == 1 else "tie" for pair, s in sides.items()}
            flips = sum(len(s) > 1 for s in sides.values())
            found.append(Verdicts(model, question, agreed, flips))
    return found


def _check(values: Mapping[str, Any], study: Study) -> None:
    wanted = {"pair", "order", "model", "prompt", *QUESTIONS, "reason", "repaired"}
    if set(values) != wanted:
        raise ValueError(
            f"a judgement must have {', '.join(sorted(wanted))}, got {short(list(values), 120)}"
        )
    if not isinstance(values["pair"], str) or values["pair"] not in study.by_id:
        raise ValueError("pair must be one of this study's")
    if values["order"] not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}")
    if not isinstance(values["model"], str) or not 0 < len(values["model"]) <= 300:
        raise ValueError("model must be a name")
    if not isinstance(values["prompt"], str) or not re.fullmatch("[0-9a-f]{16}", values["prompt"]):
        raise ValueError("prompt must be 16 hexadecimal digits")
    for question in QUESTIONS:
        if values[question] not in CHOICES:
            raise ValueError(f"{question} must be one of {', '.join(CHOICES)}")
    if not isinstance(values["reason"], str) or not isinstance(values["repaired"], bool):
        raise ValueError("reason must be text, repaired true or false")
