"""`filter`: a score for every picture of a source, from a function that the user names.

    # mymodule.py, in the working directory or installed
    def score(image):                 # an RGB Pillow image
        return model(preprocess(image)).item()

`--scorer mymodule:score` imports it once, so that its module may load a model. The pictures are
decoded as `prepare` decodes them.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset.annotations import Tally, Work, annotating, finite, read_lines, write_lines
from pixart.dataset.images import ImageError
from pixart.dataset.samples import Item

if TYPE_CHECKING:
    from PIL.Image import Image

Scorer = Callable[["Image"], float]


def load_scorer(name: str) -> Scorer:
    """The function that "module:function" names. Raises ValueError if there is none."""
    return load_function(name, "scorer")


def load_function(name: str, what: str) -> Callable[..., Any]:
    """The same of any function. what: it is, for messages."""
    module_name, colon, function_name = name.partition(":")
    if not (colon and module_name and function_name):
        raise ValueError(f"{what} must be MODULE:FUNCTION, got {name!r}")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what} must be importable, got {name!r} ({reason})") from error
    function: Callable[..., Any] | None = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{what} must be a function of {module_name}, got {function_name!r}")
    return function


def score_source(items: Iterable[Item], output: Path, scorer: Scorer) -> Tally:
    """`write_scores` with a scorer in this process."""
    return write_scores(items, output, scoring(scorer))


def write_scores(items: Iterable[Item], output: Path, work: Work) -> Tally:
    """Append {"path", "score"} for every picture without a score. work: as `scoring` makes it."""
    return write_lines(items, output, work, is_scored)


def is_scored(line: Mapping[str, Any]) -> bool:
    return "score" in line


def open_scoring(name: str) -> Work:
    """The work of a scorer by its name. Raises what load_scorer raises."""
    return scoring(load_scorer(name))


def scoring(scorer: Scorer) -> Work:
    """From items to lines with a score, one after the other, as a function of a user's may not share threads."""

    def annotate_one(image: "Image") -> dict[str, Any]:
        try:
            # Also a number of NumPy's or PyTorch's, which JSON cannot hold.
            score = float(scorer(image))
        except (Exception, SystemExit) as error:  # a function of the user's may raise anything
            raise ImageError(f"the scorer raises {type(error).__name__}: {error}") from error
        return {"score": finite(score, "score")}

    return annotating(annotate_one)


def quantiles(output: Path) -> str:
    """What share of the pictures each score would keep, for choosing a --min-score."""
    found = (line.get("score") for line in read_lines(output))
    scores = sorted(score for score in found if isinstance(score, int | float))
    if not scores:
        return "no scores"
    kept = {share: scores[round((1 - share) * (len(scores) - 1))] for share in (0.9, 0.5, 0.1)}
    return ", ".join(f"{share:.0%} reach {score:.4g}" for share, score in kept.items())
