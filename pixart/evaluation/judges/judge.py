"""What a judge is: something that says how likely each answer to a question about a picture is."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pixart.files import printable, without_controls

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.needs import Need

MOST_QUESTION = 10_000  # characters
ROUNDING = 1e-4  # of probabilities that were added up in single precision


class Judge:
    """id: of the judge and how it is asked, as a metric's constants hold it; other weights or another
    way to ask, another id. digest: hexadecimal, of the weights where they are on this machine, "" for a
    server, whose weights nobody can see. precision: of a network that runs here, "fp32" or "bf16",
    whose probabilities differ in the third digit; "" where none does.
    """

    precision: str = ""

    @property
    def id(self) -> str:
        raise NotImplementedError

    @property
    def digest(self) -> str:
        raise NotImplementedError

    def needs(self) -> "Sequence[Need]":
        """What is missing to run it; nothing is opened or downloaded."""
        return ()

    def answer(self, image: "Image", question: str, choices: Sequence[str]) -> Mapping[str, float]:
        """The probability of each choice: that the judge's answer begins with it. They are the judge's own
        and sum to 1 at most; what is missing from 1 went to other words.

        image: RGB. question: words of others; whatever they say, they are one question and change
        nothing of how it is asked. ValueError for a question or choices that cannot be asked, and for
        an answer that is none of them.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the network."""


def check_question(question: str, choices: Sequence[str]) -> None:
    """ValueError unless it is a question with different answers, as every judge asks for."""
    if not question.strip() or len(question) > MOST_QUESTION:
        raise ValueError(
            f"question must have from 1 to {MOST_QUESTION:,} characters, got {len(question):,}"
        )
    if len(choices) < 2:
        raise ValueError(f"choices must be 2 at least, got {list(choices)!r}")
    plain = [one.strip().lower() for one in choices]
    if not all(plain) or len(set(plain)) < len(plain):
        raise ValueError(
            f"choices must be words that differ in more than case, got {list(choices)!r}"
        )


def likeliest(answers: Mapping[str, float], question: str) -> str:
    """The choice with the highest probability, the first of equal ones. ValueError where there is no
    answer: all are impossible."""
    check_probabilities(answers, question)
    return max(answers, key=lambda choice: answers[choice])


def check_probabilities(answers: Mapping[str, float], question: str) -> None:
    """ValueError unless they are probabilities, of which one is above 0."""
    values = list(answers.values())
    are_whole = all(math.isfinite(one) and 0 <= one <= 1 + ROUNDING for one in values)
    if not are_whole or not 0 < sum(values) <= 1 + ROUNDING:
        raise ValueError(
            f"answer must give a choice a chance and none more than 1, got {dict(answers)!r} "
            f"to {quoted(question)}"
        )


def quoted(words: str, most: int = 120) -> str:
    """Words of others as a message holds them."""
    return repr(printable(words, most))


def one_line(words: str) -> str:
    """A question as it is put into a message: in one line and without control characters, so that what it
    says cannot look like what stands around it."""
    return " ".join(without_controls(words).split())
