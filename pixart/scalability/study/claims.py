"""What the paper says, or what the study was laid out to ask, each as a difference between two of its sides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pixart.scalability.study.plan import BASE
from pixart.scalability.study.verdicts import Difference, Results

Section = Literal["compute", "shapes", "data", "captions", "quality", "denoisers"]


@dataclass(frozen=True)
class Claim:
    """first, second: names of runs; the claim is that the first is better. by: what is compared. level: TFLOP
    at which, None at the end. at_step: at the step that all runs reach instead. source: whose claim."""

    section: Section
    text: str
    first: str
    second: str
    by: Literal["loss", "accuracy"]
    source: str
    level: float | None = None
    at_step: bool = False


OURS = "ours"
_DEPTH = "the paper's section 3: depth is the more parameter-efficient"
_MIX = "the paper's table 4: TIFA .835 with one of five, .833 with the top one, .810 with real captions"
_FILTER = "the paper's section 4: 250 M filtered pictures for 1 B raw ones"
_UNET = "the paper's section 3: TIFA .80 of SD2's UNet, .78 of a PixArt as large"
_IMAGES = "the paper's section 3: larger models learn in fewer steps"
CLAIMS = (
    Claim("compute", "after as many pictures 144x4 has a lower loss than 72x2", BASE, "72x2", "loss",
          _IMAGES, at_step=True),
    Claim("compute", "after as many pictures 216x6 has a lower loss than 144x4", "216x6", BASE, "loss",
          _IMAGES, at_step=True),
    Claim("compute", "after as little as 0.75 TFLOP 72x2 has a lower loss than 144x4", "72x2", BASE, "loss",
          OURS, level=0.75),
    Claim("compute", "after 4 TFLOP 144x4 has a lower loss than 72x2", BASE, "72x2", "loss", OURS,
          level=4.0),
    Claim("shapes", "72x10 ends lower than 144x2, as many parameters", "72x10", "144x2", "loss", _DEPTH),
    Claim("shapes", "144x6 ends lower than 216x2, 12 % fewer parameters", "144x6", "216x2", "loss",
          _DEPTH),
    Claim("shapes", "144x6 ends lower than 216x3, 22 % more parameters", "144x6", "216x3", "loss",
          _DEPTH),
    Claim("data", "128 scenes end lower than 32", "128 scenes", "32 scenes", "loss", OURS),
    Claim("data", "512 scenes end lower than 128", "512 scenes", "128 scenes", "loss", OURS),
    Claim("data", "2,048 scenes end lower than 512", "2048 scenes", "512 scenes", "loss", OURS),
    Claim("data", "all scenes, each seen once, end lower than 2,048", BASE, "2048 scenes", "loss", OURS),
    Claim("captions", "raw and synthetic captions in turn are followed better than raw ones alone",
          "raw and synthetic", "raw captions", "accuracy", _MIX),
    Claim("captions", "one of five descriptions is followed better than the top one alone",
          BASE, "top caption", "accuracy", _MIX),
    Claim("captions", "descriptions alone are followed better than half of them beside raw captions",
          BASE, "raw and synthetic", "accuracy", OURS),
    Claim("quality", "right captions end lower than 30 % wrong ones", BASE, "wrong captions", "loss",
          OURS),
    Claim("quality", "right captions are followed better than 30 % wrong ones", BASE, "wrong captions",
          "accuracy", OURS),
    Claim("quality", "what the checker left of them, 30 % fewer scenes, ends lower than all", "filtered",
          "wrong captions", "loss", _FILTER),
    Claim("quality", "what the checker left of them is followed better than all", "filtered",
          "wrong captions", "accuracy", _FILTER),
    Claim("denoisers", "the UNet ends lower than the transformer", "UNet", BASE, "loss", _UNET),
    Claim("denoisers", "the UNet follows captions better than the transformer", "UNet", BASE,
          "accuracy", _UNET),
)  # fmt: skip


def difference(claim: Claim, results: Results) -> Difference:
    """How much better the first side is than the second."""
    if claim.by == "accuracy":
        return results.accuracy_difference(claim.first, claim.second)
    step = results.told["scale"]["shared"] if claim.at_step else None
    return results.loss_difference(claim.second, claim.first, claim.level, step)


def judged(claim: Claim, results: Results) -> str:
    """The claim with its verdict and its numbers, as a sentence of Markdown."""
    absent = [name for name in (claim.first, claim.second) if name not in results]
    if absent:
        return f"**Not run**: {claim.text} ({claim.source}). Missing: {', '.join(absent)}."
    found = difference(claim, results)
    where = _WHERE[claim.by](claim, results)
    error = "its error is not known, as no run was repeated"
    if found.error is not None:
        error = f"± {found.error:{_FORMAT[claim.by]}}"
    order = (claim.first, claim.second) if claim.by == "accuracy" else (claim.second, claim.first)
    return (
        f"**{found.verdict}**: {claim.text} ({claim.source}). {where} “{order[0]}” minus that of "
        f"“{order[1]}” is {found.value:+{_FORMAT[claim.by]}}{',' if found.error is None else ''} {error}."
    )


def _where_loss(claim: Claim, results: Results) -> str:
    if claim.at_step:
        return f"After {results.told['scale']['shared']} steps the loss of"
    at = "At the end" if claim.level is None else f"After {claim.level:g} TFLOP"
    return f"{at} the loss of"


def _where_accuracy(claim: Claim, results: Results) -> str:
    return "At the end the share of statements that hold of"


_WHERE: dict[str, Callable[[Claim, Results], str]] = {
    "loss": _where_loss,
    "accuracy": _where_accuracy,
}
_FORMAT = {"loss": ".5f", "accuracy": ".3f"}
