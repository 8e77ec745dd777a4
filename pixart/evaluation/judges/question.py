"""A question about a picture, with the answer that is right."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pixart.evaluation.judges.judge import check_question, quoted
from pixart.files import listed

YES_OR_NO = ("yes", "no")
_KNOWN = {"prompt", "id", "question", "choices", "answer", "type", "parents"}


@dataclass(frozen=True)
class Question:
    """id: unique among a prompt's. answer: one of choices. parents: ids."""

    id: str
    question: str
    choices: tuple[str, ...] = YES_OR_NO
    answer: str = "yes"
    type: str = ""
    parents: tuple[str, ...] = ()


def parse_question(values: Any) -> Question:
    """ValueError for what is no question, or has an answer that is none of its choices."""
    if not isinstance(values, Mapping):
        raise ValueError(f"question must be a JSON object, got {type(values).__name__}")
    if unknown := sorted(map(str, values.keys() - _KNOWN)):
        raise ValueError(f"question must have {listed(sorted(_KNOWN))} only, got {listed(unknown)}")
    words = {name: values.get(name, other) for name, other in (("type", ""), ("answer", "yes"))}
    words |= {name: values.get(name) for name in ("id", "question")}
    for name, value in words.items():
        if not isinstance(value, str):
            raise ValueError(f"question must have {name} as text, got {value!r:.80}")
    rows = {"choices": values.get("choices", YES_OR_NO), "parents": values.get("parents", ())}
    for name, value in rows.items():
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"question must have {name} as a list of texts, got {value!r:.80}")
    question = Question(
        words["id"], words["question"], tuple(rows["choices"]), words["answer"], words["type"],
        tuple(rows["parents"]),
    )  # fmt: skip
    check_question(question.question, question.choices)
    if question.answer not in question.choices:
        raise ValueError(
            f"answer must be one of {list(question.choices)!r}, got {question.answer!r} "
            f"to {quoted(question.question)}"
        )
    return question


def checked(questions: Iterable[Question], name: str) -> tuple[Question, ...]:
    """The questions of one prompt. ValueError, which begins with `name`, for ids twice, parents that are
    none of them, and for questions that depend on themselves."""
    found = tuple(questions)
    counts = Counter(one.id for one in found)
    if twice := [one for one, count in counts.items() if count > 1]:
        raise ValueError(f"{name}: ids of questions must differ, got {listed(twice)} twice")
    for one in found:
        if unknown := [parent for parent in one.parents if parent not in counts]:
            raise ValueError(
                f"{name}: parents of question {one.id!r} must be questions of the same prompt, "
                f"got {listed(unknown)}"
            )
    try:
        TopologicalSorter({one.id: one.parents for one in found}).prepare()
    except CycleError as error:
        circle = " -> ".join(error.args[1])
        raise ValueError(f"{name}: questions must not depend on themselves, got {circle}") from None
    return found
