"""The exact checker of the embedded world as a judge: questions about what a caption states.

It understands three kinds of questions and no other (see judges.shapes_questions, which makes the first):
a statement of a caption, "Does this figure show '...'?", and a phrase with a question mark ("a red
star?": is there such a thing). Its answers are certain.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pixart.evaluation.judges.judge import Judge, check_question, quoted
from pixart.evaluation.judges.shapes_questions import caption_of, question_texts
from pixart.shapes.caption import Statement, parse
from pixart.shapes.checker import check

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

VERSION = "1"
_SHOWS = re.compile(r"Does this figure show '(.+)'\?", re.DOTALL)
_PHRASE = re.compile(r"([^?]+)\?")


class CheckerJudge(Judge):
    """Needs no weights. choices must be yes and no, in any case."""

    digest = ""

    def __init__(self) -> None:
        # A picture is asked about many times in a row; read once for each caption. The array itself is
        # kept, as its id alone may come back for another picture.
        self._last: tuple[bytes, str, dict[str, bool]] | None = None

    @property
    def id(self) -> str:
        return f"checker-{VERSION}"

    def answer(self, image: "Image", question: str, choices: Sequence[str]) -> Mapping[str, float]:
        check_question(question, choices)
        plain = {one.strip().lower(): one for one in choices}
        if set(plain) != {"yes", "no"}:
            raise ValueError(f"choices must be yes and no for the checker, got {list(choices)!r}")
        holds = self._holds(image, question)
        return {plain["yes"]: float(holds), plain["no"]: float(not holds)}

    def _holds(self, image: "Image", question: str) -> bool:
        import numpy as np

        pixels = np.asarray(image.convert("RGB"))
        if (caption := caption_of(question)) is not None:
            held = self._statements(pixels, caption)
            if question in held:
                return held[question]
        elif shows := _SHOWS.fullmatch(question):
            return all(self._statements(pixels, shows[1], question).values())
        elif phrase := _PHRASE.fullmatch(question):
            return _is_there(pixels, phrase[1], question)
        raise _not_understood(question)

    def _statements(
        self, pixels: "np.ndarray", caption: str, question: str = ""
    ) -> dict[str, bool]:
        """Whether each statement of a caption holds, by its question."""
        content = pixels.tobytes() + repr(pixels.shape).encode()
        if self._last is None or self._last[:2] != (content, caption):
            statements = parse(caption)
            if not statements:
                raise _not_understood(question or caption)
            held = check(pixels, statements) or [False] * len(statements)
            texts = question_texts(caption, statements)
            self._last = content, caption, dict(zip(texts, held, strict=True))
        return self._last[2]


def _is_there(pixels: "np.ndarray", phrase: str, question: str) -> bool:
    """Whether a thing, or the ground, is as the phrase has it; other things may be there as well."""
    stated = parse(phrase)
    if sum(one.kind == "shape" for one in stated) > 1:
        raise _not_understood(question)
    # An article is no count here: "a red star" is there beside others too.
    statements = [Statement(s.kind, s.value, s.subject) for s in stated if s.kind != "count"]
    if not statements:
        raise _not_understood(question)
    return bool(held := check(pixels, statements)) and all(held)


def _not_understood(question: str) -> ValueError:
    return ValueError(
        "question must be about what a caption of the embedded world states for the checker, got "
        f"{quoted(question)}; another --judge reads it"
    )
