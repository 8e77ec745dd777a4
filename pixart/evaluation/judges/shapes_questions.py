"""Questions about pictures of the embedded world, from what their captions state: a question each.

With the exact checker as judge their answers are those of pixart.shapes.checker.check, so that metrics
by questions run without weights, and their numbers are known. Any other judge can read them too: each is
a sentence that holds the whole caption.
"""

from collections.abc import Sequence

from pixart.evaluation.judges.question import Question
from pixart.shapes.caption import Statement, parse

_ORDER = ("first", "second")
_BEGINNING, _END = 'A picture was asked for by the caption "', '". '
# Of DPG-Bench: category - part of it.
_TYPES = {
    "background": "global - background",
    "count": "other - count",
    "shape": "entity - shape",
    "colour": "attribute - colour",
    "size": "attribute - size",
    "position": "relation - position",
    "relation": "relation - spatial",
}


def shapes_questions(caption: str) -> list[Question]:
    """A question for every statement, in order of `parse`; the right answer is "yes". Colour, size and place
    of a thing depend on its shape's question, a relation on both. ValueError for a caption that states
    nothing."""
    statements = parse(caption)
    if not statements:
        raise ValueError(f"caption must be of the embedded world's grammar, got {caption!r:.200}")
    texts = question_texts(caption, statements)
    names = [f"{one.kind}-{one.subject + 1}" for one in statements]
    return [
        Question(name, text, type=_TYPES[one.kind], parents=_parents(one, names))
        for name, text, one in zip(names, texts, statements, strict=True)
    ]


def question_texts(caption: str, statements: Sequence[Statement]) -> list[str]:
    """What is asked about each statement."""
    alone = max((one.subject for one in statements), default=0) == 0
    several = alone and any(one.kind == "count" and one.value != "1" for one in statements)
    return [f"{_BEGINNING}{caption}{_END}{_asked(one, alone, several)}" for one in statements]


def caption_of(question: str) -> str | None:
    """The caption that a question of `question_texts` is about, None for any other."""
    beginning, end, _ = question.rpartition(_END)
    return beginning.removeprefix(_BEGINNING) if end and beginning.startswith(_BEGINNING) else None


def _parents(statement: Statement, names: Sequence[str]) -> tuple[str, ...]:
    if statement.kind in ("background", "count", "shape"):
        return ()
    wanted = (0, 1) if statement.kind == "relation" else (statement.subject,)
    return tuple(name for name in (f"shape-{one + 1}" for one in wanted) if name in names)


def _asked(statement: Statement, alone: bool, several: bool) -> str:
    which = "each" if several else "the" if alone else f"the {_ORDER[statement.subject]}"
    thing = f"{which} thing"
    article = "an" if statement.value[:1] in "aeiou" else "a"
    return {
        "background": f"Is the background {statement.value}?",
        "count": f"Is the number of things exactly {statement.value}?",
        "shape": f"Is {thing} {article} {statement.value}?",
        "colour": f"Is {thing} {statement.value}?",
        "size": f"Is {thing} {statement.value} in size?",
        "position": f"Is {thing} in the place called {statement.value}?",
        "relation": f"Is the first thing {statement.value} the second thing?",
    }[statement.kind]
