"""What is drawn, and how each picture is judged: one function for each way to edit.

An experiment has settings, and draws the same cases for each. A verdict is what is told of one picture, by
the words that head its column: true or false, or a number, or None where there was nothing to see.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.studies.editing import cases, judging
from bench.studies.editing.studio import Studio, pixels
from pixart.pipeline.request import Request
from pixart.sampler.windows import Windows
from pixart.shapes.caption import parse
from pixart.shapes.checker import check
from pixart.shapes.edges import measure as edges_of
from pixart.shapes.following import Outlined, follow, sample_outlined

Verdict = dict[str, bool | float | None]
AGAIN = 10_000  # added to a case's number: the seed of what is drawn from its picture
LARGE, WINDOW, LATENT = 512, 256, 8  # pixels: of a picture, of a window, of a latent
HOLDS, OWN_KEPT = "caption holds", "all else unchanged to the bit"


@dataclass(frozen=True)
class Experiment:
    """measure: the verdicts of a setting on these cases, in their order. side: of what is drawn, in pixels.
    at_once: cases between two writings of the record."""

    settings: tuple[str, ...]
    measure: Callable[[Studio, str, Sequence[int]], list[Verdict]]
    side: int = cases.SIDE
    at_once: int = 24


def move(studio: Studio, setting: str, numbers: Sequence[int]) -> list[Verdict]:
    """A thing is to lie at the opposite place. "noise": drawn without the picture."""
    asked = [cases.move(number) for number in numbers]
    changes: Mapping[str, Any] = {}
    bases: dict[int, Image.Image] = {}
    if setting != "noise":
        bases = _bases(studio, "move", numbers, [one.caption for one in asked])
        changes = {"strength": float(setting)}
    requests = _edits(numbers, [one.moved for one in asked], bases, **changes)
    drawn = studio.draw(requests, _named(bases))
    return [
        {
            HOLDS: judging.is_right(picture, one.moved),
            "a thing at the old place": judging.is_taken(picture, one.place),
        }
        for one, picture in zip(asked, map(pixels, drawn), strict=True)
    ]


def inpaint(studio: Studio, setting: str, numbers: Sequence[int]) -> list[Verdict]:
    """Another thing is to lie in the free half. setting: of --mask-blur."""
    asked = [cases.addition(number) for number in numbers]
    bases = _bases(studio, "inpaint", numbers, [one.caption for one in asked])
    masks = dict(zip(numbers, (one.mask for one in asked), strict=True))
    requests = _edits(numbers, [one.both for one in asked], bases, masks, mask_blur=int(setting))
    drawn = studio.draw(requests, _named(bases, masks))
    return [
        {
            "new thing right": judging.is_right_but_for(picture, one.both, one.subject),
            HOLDS: judging.is_right(picture, one.both),
            OWN_KEPT: is_kept(bases[number], picture, masks[number]),
        }
        for number, one, picture in zip(numbers, asked, map(pixels, drawn), strict=True)
    ]


def recolour(studio: Studio, setting: str, numbers: Sequence[int]) -> list[Verdict]:
    """One of two things is to have another colour, inside a box around it."""
    asked = [cases.recolouring(number) for number in numbers]
    bases = _bases(studio, "recolour", numbers, [one.caption for one in asked])
    masks = dict(zip(numbers, (one.mask for one in asked), strict=True))
    texts = [one.recoloured for one in asked]
    requests = _edits(numbers, texts, bases, masks, strength=float(setting))
    drawn = studio.draw(requests, _named(bases, masks))
    return [
        _recolour_verdict(one, pixels(bases[number]), pixels(picture), masks[number])
        for number, one, picture in zip(numbers, asked, drawn, strict=True)
    ]


def _recolour_verdict(
    one: cases.Recolouring, base: np.ndarray, picture: np.ndarray, mask: Image.Image
) -> Verdict:
    kept = judging.of_thing(picture, one.recoloured, 1 - one.subject)
    before = judging.of_thing(base, one.caption, 1 - one.subject)
    return {
        "statements of the kept thing": sum(kept) / len(kept),
        "the same, before": sum(before) / len(before),
        "new colour right": judging.is_right_but_for(picture, one.recoloured, 1 - one.subject),
        HOLDS: judging.is_right(picture, one.recoloured),
        OWN_KEPT: is_kept(Image.fromarray(base), picture, mask),
    }


def outpaint(studio: Studio, setting: str, numbers: Sequence[int]) -> list[Verdict]:
    """A picture is to go on to one or two sides."""
    asked = [
        cases.extension(number, {"one side": 1, "two sides": 2}[setting]) for number in numbers
    ]
    bases = _bases(studio, "outpaint", numbers, [one.caption for one in asked])
    requests = _edits(numbers, [one.extended for one in asked], bases)
    requests = [
        replace(request, outpaint=one.border) for request, one in zip(requests, asked, strict=True)
    ]
    drawn = studio.draw(requests, _named(bases))
    return [
        _outpaint_verdict(one, pixels(bases[number]), pixels(picture))
        for number, one, picture in zip(numbers, asked, drawn, strict=True)
    ]


def _outpaint_verdict(one: cases.Extension, base: np.ndarray, picture: np.ndarray) -> Verdict:
    left, top, right, bottom = map(int, one.border.split(","))
    height, width = picture.shape[:2]
    own = picture[top : height - bottom, left : width - right]
    lines = [_border(picture, base, side, one) for side in one.sides]
    seen = [line for line in lines if line is not None]
    return {
        OWN_KEPT: np.array_equal(own, base),
        HOLDS: judging.is_right(picture, one.extended),
        **_line_verdict(max(seen, key=lambda line: line.step - line.most, default=None)),
    }


def _border(
    picture: np.ndarray, base: np.ndarray, side: str, one: cases.Extension
) -> judging.Line | None:
    """The line on one side of the picture that was given, without what was added on the other."""
    added = cases.WIDE if len(one.sides) == 1 else cases.NARROW
    whole = judging.turned(picture, side)
    own = whole.shape[1] - added
    other = own - judging.turned(base, side).shape[1]
    return judging.border_of(whole[:, other:], own - other)


UPSCALED: dict[str, Mapping[str, Any]] = {
    "256 px": {"upscale": "256x256"},
    "512 px": {"upscale": "512x512"},
    "512 px, guided": {"upscale": "512x512", "guidance": 2.0},
    "512 px, tiles": {"upscale": "512x512", "tiles": WINDOW},
}
WHOLE = {name: name.replace(", tiles", "") for name in UPSCALED if "tiles" in name}


def upscale(studio: Studio, setting: str, numbers: Sequence[int]) -> list[Verdict]:
    """A picture is to be drawn larger. setting: one of UPSCALED, or "resized", to 512 px and no more."""
    texts = [cases.caption(("one", "pair")[number % 2], number) for number in numbers]
    bases = _bases(studio, "upscale", numbers, texts)
    large = _upscaled(studio, setting, numbers, texts, bases)
    whole = {}
    if setting in WHOLE:
        whole = _upscaled(studio, WHOLE[setting], numbers, texts, bases)
    return [
        _upscale_verdict(text, pixels(bases[number]), pixels(large[number]), whole.get(number))
        for number, text in zip(numbers, texts, strict=True)
    ]


def _upscaled(
    studio: Studio,
    setting: str,
    numbers: Sequence[int],
    texts: Sequence[str],
    bases: Mapping[int, Image.Image],
) -> dict[int, Image.Image]:
    if setting == "resized":
        size = (LARGE, LARGE)
        return {n: one.resize(size, Image.Resampling.LANCZOS) for n, one in bases.items()}
    asked = [replace(one, **UPSCALED[setting]) for one in _edits(numbers, texts, bases)]
    folder = "upscale-" + setting.replace(",", "").replace(" ", "-")
    return studio.keep(folder, dict(zip(numbers, asked, strict=True)), _named(bases))


def _upscale_verdict(
    text: str, base: np.ndarray, large: np.ndarray, whole: Image.Image | None
) -> Verdict:
    before, after = judging.is_right(base, text), judging.is_right(large, text)
    edges = edges_of(base), edges_of(large)
    verdict: Verdict = {
        HOLDS: after,
        "the same, of those right before": after if before else None,
        "overlap before": float(np.mean(edges[0].overlaps or [0])),
        "overlap": float(np.mean(edges[1].overlaps or [0])),
        "clean": edges[1].are_clean,
    }
    if whole is None:
        return verdict
    apart = np.abs(large.astype(np.float32) - pixels(whole)).mean(axis=-1)
    verdict |= {"difference from whole": float(apart.mean())}
    borders = window_borders()
    across = [
        judging.seams_of(judging.turned(large, side), borders) for side in ("right", "bottom")
    ]
    seen = [line for line in across if line is not None]
    return verdict | _line_verdict(max(seen, key=lambda line: line.step - line.most, default=None))


@cache
def window_borders() -> list[int]:
    """Columns at which a window begins or ends inside of a picture of LARGE pixels."""
    starts: set[int] = set()

    def look(latents: torch.Tensor, timesteps: torch.Tensor, captions: str) -> torch.Tensor:
        starts.add(int(latents[0, 0, 0, 0]))
        return latents

    whole, window = LARGE // LATENT, WINDOW // LATENT
    columns = torch.arange(whole, dtype=torch.float32).expand(1, 1, whole, whole)
    Windows(look, window, window)(columns, torch.zeros(1), "conditional")
    ends = {start + window for start in starts}
    return [LATENT * column for column in sorted((starts | ends) - {0, whole})]


GUIDED: dict[str, Mapping[str, Any]] = {"none": {"guidance": 1.0}}
for _scale in (2.0, 4.5, 8.0):
    GUIDED |= {
        f"CFG {_scale:g}": {"guidance": _scale},
        f"rescale 0.7, {_scale:g}": {"guidance": _scale, "guidance_rescale": 0.7},
        f"APG {_scale:g}": {"guidance": _scale, "apg": True},
        f"PAG 3, CFG {_scale:g}": {"guidance": _scale, "pag": 3.0},
    }
GUIDED |= {
    "PAG 3 alone": {"guidance": 1.0, "pag": 3.0},
    "PAG 3 in block 1, CFG 2": {"guidance": 2.0, "pag": 3.0, "pag_blocks": "1"},
    "PAG 3 in block 5, CFG 2": {"guidance": 2.0, "pag": 3.0, "pag_blocks": "5"},
    "PAG 3 in blocks 2-4, CFG 2": {"guidance": 2.0, "pag": 3.0, "pag_blocks": "2-4"},
}


def guidance(studio: Studio, setting: str, numbers: Sequence[int]) -> list[Verdict]:
    """Pairs, drawn from the same noise under each kind of guidance."""
    texts = [cases.caption("pair", number) for number in numbers]
    requests = _edits(numbers, texts, {}, **GUIDED[setting])
    found: list[Verdict] = []
    for text, drawn in zip(texts, studio.draw(requests), strict=True):
        edges = edges_of(pixels(drawn))
        right = judging.is_right(pixels(drawn), text)
        overlap = float(np.mean(edges.overlaps or [0]))
        found.append({HOLDS: right, "clean": edges.are_clean, "overlap": overlap})
    return found


def control(studio: Studio, setting: str, numbers: Sequence[int]) -> list[Verdict]:
    """Captions that tell neither shapes nor places, with outlines that do: "outline", "none" without them,
    and "scale 0" with a control that is to do nothing."""
    asked = list(sample_outlined(numbers[-1] + 1, 0, cases.SIDE))[numbers[0] :]
    named = {
        f"outline-{n}": Image.fromarray(o.outline) for n, o in zip(numbers, asked, strict=True)
    }
    plain = [Request(one.caption, seed=n) for n, one in zip(numbers, asked, strict=True)]
    steered = [
        replace(one, control_image=(name,), control_scale=(float(setting != "scale 0"),))
        for one, name in zip(plain, named, strict=True)
    ]
    if setting == "scale 0":
        # One at a time, as those with a control are: a batch's bits may differ by rounding.
        apart = replace(studio, batch=1)
        pairs = zip(apart.draw(plain), apart.draw(steered, named), strict=True)
        return [{"the base's to the bit": np.array_equal(pixels(a), pixels(b))} for a, b in pairs]
    drawn = studio.draw(plain if setting == "none" else steered, named)
    return [
        _control_verdict(one, pixels(picture)) for one, picture in zip(asked, drawn, strict=True)
    ]


def _control_verdict(one: Outlined, picture: np.ndarray) -> Verdict:
    followed = follow(picture, one.scene)
    return {
        "follows the outline": followed.is_followed,
        "shapes": followed.shapes,
        "places": followed.places,
        "sizes": followed.sizes,
        HOLDS: all(check(picture, parse(one.caption))),
        "clean": edges_of(picture).are_clean,
    }


def _bases(
    studio: Studio, name: str, numbers: Sequence[int], texts: Sequence[str]
) -> dict[int, Image.Image]:
    """The pictures that are edited, drawn by their captions."""
    asked = {n: Request(text, seed=n) for n, text in zip(numbers, texts, strict=True)}
    return studio.keep(name, asked)


def _edits(
    numbers: Sequence[int],
    texts: Sequence[str],
    bases: Mapping[int, Image.Image],
    masks: Mapping[int, Image.Image] | None = None,
    **changes: Any,
) -> list[Request]:
    """A request for each case: of its picture and mask, where it has them."""
    return [
        Request(
            text,
            seed=AGAIN + number,
            image=f"image-{number}" if number in bases else None,
            mask=f"mask-{number}" if masks else None,
            **changes,
        )
        for number, text in zip(numbers, texts, strict=True)
    ]


def _named(
    bases: Mapping[int, Image.Image], masks: Mapping[int, Image.Image] | None = None
) -> dict[str, Image.Image]:
    """The pictures by the names that `_edits` gives them."""
    found = {f"image-{number}": picture for number, picture in bases.items()}
    return found | {f"mask-{number}": mask for number, mask in (masks or {}).items()}


def is_kept(base: Image.Image, picture: np.ndarray, mask: Image.Image) -> bool:
    """Whether every pixel is the base's where the mask is black."""
    outside = np.asarray(mask) == 0
    return picture.shape == pixels(base).shape and np.array_equal(
        picture[outside], pixels(base)[outside]
    )


def _line_verdict(line: judging.Line | None) -> Verdict:
    if line is None:
        return dict.fromkeys(
            (
                "no line", "line within the picture's own", "step there", "elsewhere",
                "elsewhere at most", "drift there", "drift elsewhere at most",
            )
        )  # fmt: skip
    return {
        "no line": not line.is_seen,
        "line within the picture's own": line.is_within,
        "step there": line.step,
        "elsewhere": line.usual,
        "elsewhere at most": line.most,
        "drift there": line.drift,
        "drift elsewhere at most": line.most_drift,
    }


EXPERIMENTS: dict[str, Experiment] = {
    "move": Experiment(("0.3", "0.6", "0.8", "noise"), move),
    "inpaint": Experiment(("0", "8"), inpaint),
    "recolour": Experiment(("1", "0.6"), recolour),
    "outpaint": Experiment(("one side", "two sides"), outpaint),
    "upscale": Experiment((*UPSCALED, "resized"), upscale, LARGE, 8),
    "guidance": Experiment(tuple(GUIDED), guidance),
    "control": Experiment(("outline", "none", "scale 0"), control),
}
