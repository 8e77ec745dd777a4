"""Votes: a line each in votes.jsonl, which only grows. The last line of a voter about a pair counts; one
that undoes a vote leaves none.

    {"pair", "voter", "quality": "left"|"right"|"tie", "alignment": ..., "ms", "order", "agent"}
    {"pair", "voter", "undone": true, "order"}

voter: random, of the browser; nothing says who it is. ms: milliseconds from showing to voting, null where
nobody measured them. order: counts the lines of a voter, from 1. agent: what kind of page and browser.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pixart.evaluation.preference.log import read_lines
from pixart.evaluation.preference.study import ANSWERS, QUESTIONS, VOTES, Study
from pixart.files import printable

VOTER = re.compile(r"[ps][0-9a-f]{16}")  # of a page, or a server
MAX_ORDER, MAX_MS = 10**7, 10**9
_AGENT = re.compile(r"[a-z0-9 .-]{0,40}")
_KEYS = {"pair", "voter", "quality", "alignment", "ms", "order", "agent"}


@dataclass(frozen=True)
class Vote:
    pair: str
    voter: str
    quality: str
    alignment: str
    ms: int | None
    order: int
    agent: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Standing = dict[tuple[str, str], Vote]  # by voter and pair


def undoing(vote: Vote, order: int) -> dict[str, Any]:
    """The line that takes a vote back."""
    return {"pair": vote.pair, "voter": vote.voter, "undone": True, "order": order}


def read_votes(study: Study) -> tuple[Standing, dict[str, int]]:
    """The votes that stand, by voter and pair in the order in which they were given, and how many lines
    each voter has. ValueError names a line that is none of this study's."""
    standing: Standing = {}
    orders: dict[str, int] = {}
    for values in read_lines(study.folder / VOTES, lambda values: check_line(values, study)):
        take(standing, values)
        voter = values["voter"]
        orders[voter] = max(orders.get(voter, 0), values["order"])
    return standing, orders


def take(standing: Standing, values: Mapping[str, Any]) -> None:
    """Let a checked line count."""
    place = values["voter"], values["pair"]
    standing.pop(place, None)  # what is voted again is the voter's last
    if not values.get("undone"):
        standing[place] = Vote(**values)


def check_line(values: Mapping[str, Any], study: Study) -> None:
    """ValueError for what is no line of votes of this study."""
    is_undone = values.get("undone") is True
    wanted = {"pair", "voter", "undone", "order"} if is_undone else _KEYS
    if set(values) != wanted:
        raise ValueError(
            f"a vote must have {', '.join(sorted(wanted))}, got {printable(repr(list(values)), 120)}"
        )
    if not isinstance(values["voter"], str) or not VOTER.fullmatch(values["voter"]):
        raise ValueError("voter must be s or p and 16 hexadecimal digits")
    if not isinstance(values["pair"], str) or values["pair"] not in study.by_id:
        raise ValueError(f"pair must be one of this study's, got {_said(values['pair'])}")
    if type(values["order"]) is not int or not 1 <= values["order"] <= MAX_ORDER:
        raise ValueError(f"order must be from 1 to {MAX_ORDER:,}, got {_said(values['order'])}")
    if is_undone:
        return
    for question in QUESTIONS:
        check_answer(question, values[question])
    ms = values["ms"]
    if ms is not None and (type(ms) is not int or not 0 <= ms <= MAX_MS):
        raise ValueError(f"ms must be from 0 to {MAX_MS:,}, or null, got {_said(ms)}")
    if not isinstance(values["agent"], str) or not _AGENT.fullmatch(values["agent"]):
        raise ValueError(
            f"agent must be a few words in small letters, got {_said(values['agent'])}"
        )


def check_answer(question: str, answer: object) -> None:
    if not isinstance(answer, str) or answer not in ANSWERS:
        raise ValueError(f"{question} must be one of {', '.join(ANSWERS)}, got {_said(answer)}")


def _said(value: object) -> str:
    return printable(repr(value), 60)
