"""`python -m bench.quality A B [--count 300] [--write FILE]`: pictures of A beside those of B, in pairs.

A and B are what to draw with: `off`, `balanced`, `fast`, the file of a plan, settings as JSON such as
'{"steps": 12}'; or a folder of pictures that `pixart.generate` has written, of the same names in both. Accuracy
comes first, how alike the pictures are second: guidance in a part of the trajectory changes a picture and keeps
what it shows. What is finished is kept beside FILE, and the same command goes on there.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.quality")

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import machine
from pixart.calibration.journal import Journal
from pixart.calibration.pictures import NOT_A_CAPTION, is_right
from pixart.calibration.run import relative_square
from pixart.calibration.studio import Scene, Settings, Studio
from pixart.config import EMBEDDED
from pixart.evaluation.statistics.intervals import wilson
from pixart.files import check_writable, parse_json, write_json
from pixart.pictures import open_rgb, readable_suffixes
from pixart.pipeline.fast import find_plan
from pixart.pipeline.pictures import read_metadata
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.progress import Bar
from pixart.sampler.loop import Progress
from pixart.shapes.purity import purity
from pixart.similarity import WINDOW, psnr, ssim

# Settings by which the transformer is called otherwise than plain guidance calls it.
_NOT_COUNTED = ("pag", "upscale", "tiles", "image", "control_image")
SEED = 2_000_003  # of captions that neither the model card nor a plan was measured with
KINDS = ("one", "pair", "group")
_SAID = (
    "scheduler",
    "steps",
    "timesteps",
    "guidance",
    "guidance_interval",
    "kv_schedule",
    "reuse_blocks",
)
UNKNOWN = -1.0  # in the place of a number that there is none of
# Of a pair, in this order; those of either picture first.
EACH = ("right", "purity", "seconds")
PAIR = ("error", "psnr", "ssim")


@dataclass(frozen=True)
class Picture:
    """levels: (height, width, 3) uint8. latents, seconds: None of a picture that was there."""

    levels: np.ndarray
    latents: torch.Tensor | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Folder:
    """Pictures that are there."""

    place: Path

    @property
    def names(self) -> list[str]:
        kinds = readable_suffixes()
        return sorted(one.name for one in self.place.iterdir() if one.suffix.lower() in kinds)

    def picture(self, name: str) -> Picture:
        path = self.place / name
        return Picture(np.asarray(open_rgb(path, str(path))))


@dataclass(frozen=True)
class Way:
    """What to draw with. settings: of requests, which take the rest from the pipeline and its plan."""

    pipe: Pipeline
    plan: Any
    settings: Mapping[str, Any]

    @contextmanager
    def planned(self) -> Iterator[None]:
        """The pipeline with this plan."""
        before, self.pipe.plan = self.pipe.plan, self.plan
        try:
            yield
        finally:
            self.pipe.plan = before

    def resolved(self, request: Request) -> Request:
        with self.planned():
            return self.pipe.resolve(replace(request, **self.settings))

    def picture(self, request: Request) -> Picture:
        steps: list[Progress] = []

        def keep(progress: Progress) -> None:
            steps[:] = [progress]

        with self.planned():
            drawn = self.pipe.draw(replace(request, **self.settings), callback=keep)
        return Picture(np.asarray(drawn.image), steps[-1].latents.cpu(), drawn.seconds["denoise"])

    def cost(self, request: Request) -> int | None:
        """FLOPs of the transformer for one picture; None where settings ask for calls that are not counted."""
        resolved = self.resolved(request)
        assert resolved.height and resolved.width
        if any(getattr(resolved, name) for name in _NOT_COUNTED):
            return None
        studio = Studio(self.pipe, resolved.height, resolved.width)
        return studio.cost(Settings.of(resolved), Scene(resolved.prompt, resolved.seed))


Side = Folder | Way


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    pipe = None
    if not (Path(options.a).is_dir() and Path(options.b).is_dir()):
        pipe = Pipeline.from_pretrained(options.model, device=options.device)
    sides = [_side(word, pipe, options) for word in (options.a, options.b)]
    requests = _requests(sides, options)
    about = {
        "a": options.a, "b": options.b, "model": options.model, "seed": options.seed,
        "requests": {name: request.to_dict() for name, request in requests.items()},
        "resolved": [
            side.resolved(next(iter(requests.values()))).to_dict() if isinstance(side, Way) else None
            for side in sides
        ],
        "sources": machine.source_hash(),
    }  # fmt: skip
    partial = (options.write or Path("quality.json")).with_suffix(".partial")
    journal = Journal(partial, about) if options.write else None
    if pipe is not None:
        pipe.prepare([request.prompt for request in requests.values()] + [""])
    pairs = []
    try:
        with Bar("quality", len(requests)) as bar:
            for name, request in requests.items():
                pairs.append(_pair(name, request, sides, journal))
                bar.advance()
    finally:
        if journal is not None:
            journal.write()
    found = _summary(options, sides, requests, pairs)
    if options.write:
        write_json(options.write, found, indent=2)
    if journal is not None:
        journal.remove()
    print(page(found))
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    add = parser.add_argument
    add("a", help="off, balanced, fast, a plan, settings as JSON, or a folder of pictures")
    add("b", help="the same; what is compared with A")
    add(
        "--count",
        type=int,
        default=48,
        help="captions, of one thing, pairs and groups in turn (48)",
    )
    add("--omit", type=float, default=0.0, help="share of clauses that captions leave out (0)")
    add("--size", type=int, default=128, help="of pictures, in pixels (128)")
    add("--seed", type=int, default=SEED, help="of captions and pictures")
    add("--model", default=EMBEDDED, help="a model of the embedded world (shapes)")
    add("--device", default=None, help="cpu, cuda ...")
    add("--threads", type=int, default=None, help="of the CPU")
    add("--write", type=Path, default=None, help="a JSON file for the result")
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    if not 0 <= options.omit <= 1:
        raise ValueError(f"--omit must be from 0 to 1, got {options.omit:g}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.write is not None:
        check_writable(options.write)
    return options


def _side(word: str, pipe: Pipeline | None, options: argparse.Namespace) -> Side:
    if Path(word).is_dir():
        return Folder(Path(word))
    assert pipe is not None
    if word.lstrip().startswith("{"):
        settings = parse_json(word, "settings", unique=True)
        Request.from_dict({"prompt": "", **settings})  # what is wrong with it
        return Way(pipe, None, settings)
    from pixart.pipeline.directory import open_directory

    directory = open_directory(options.model, with_transformer=True)
    return Way(pipe, find_plan(word, pipe, directory), {})


def _requests(sides: Sequence[Side], options: argparse.Namespace) -> dict[str, Request]:
    """By name. Of folders those that their pictures were drawn from; else captions of the world."""
    folders = [side for side in sides if isinstance(side, Folder)]
    if not folders:
        return _captions(options)
    names = folders[0].names
    if any(folder.names != names for folder in folders) or not names:
        counts = " and ".join(str(len(folder.names)) for folder in folders)
        raise ValueError(f"folders must have pictures of the same names, got {counts}")
    found: dict[str, Request] = {}
    for name in names:
        found[name] = _bare(read_metadata(folders[0].place / name).request)
        prompts = {found[name].prompt: None}
        for folder in folders[1:]:
            with suppress(ValueError):  # of a picture that something else has written
                prompts[read_metadata(folder.place / name).request.prompt] = None
        if len(prompts) > 1:
            raise ValueError(
                f"folders must have pictures of the same prompts, got {name} of {' and '.join(map(repr, prompts))}"
            )
    return found


def _bare(request: Request) -> Request:
    """What is drawn, without how."""
    return Request(
        request.prompt, request.negative, request.seed, height=request.height, width=request.width
    )


def _captions(options: argparse.Namespace) -> dict[str, Request]:
    import random

    from pixart.shapes.caption import describe
    from pixart.shapes.scene import sample_scene

    found = {}
    for number in range(options.count):
        kind = KINDS[number % len(KINDS)]
        rng = random.Random(f"quality/{options.seed}/{number}")
        text = describe(sample_scene(rng, kind), rng, omit=options.omit, apart=0.0)
        size = {"height": options.size, "width": options.size}
        found[f"{number:04d}-{kind}"] = Request(text, seed=options.seed + number, **size)
    return found


def _pair(
    name: str, request: Request, sides: Sequence[Side], journal: Journal | None
) -> dict[str, float]:
    """The numbers of a pair, by name; `a/` and `b/` before those of either picture."""

    def measure() -> list[float]:
        a, b = (
            side.picture(name) if isinstance(side, Folder) else side.picture(request)
            for side in sides
        )
        return [*_of_each(a, request), *_of_each(b, request), *_of_pair(a, b)]

    numbers = measure() if journal is None else journal.measured(name, measure)
    keys = [*(f"{side}/{key}" for side in "ab" for key in EACH), *PAIR]
    return dict(zip(keys, numbers, strict=True))


def _of_each(picture: Picture, request: Request) -> list[float]:
    seconds = UNKNOWN if picture.seconds is None else picture.seconds
    return [is_right(picture.levels, request.prompt), purity(picture.levels), seconds]


def _of_pair(a: Picture, b: Picture) -> list[float]:
    error = UNKNOWN
    if a.latents is not None and b.latents is not None and a.latents.shape == b.latents.shape:
        error = math.sqrt(relative_square(b.latents, a.latents))
    if a.levels.shape != b.levels.shape or min(a.levels.shape[:2]) < WINDOW:
        raise ValueError(
            f"pictures must be of one size, {WINDOW} pixels a side at least, got {a.levels.shape} and "
            f"{b.levels.shape}"
        )
    alike = psnr(b.levels, a.levels)
    return [error, UNKNOWN if alike == math.inf else alike, ssim(b.levels, a.levels)]


def _summary(
    options: argparse.Namespace, sides: Sequence[Side], requests: Mapping[str, Request],
    pairs: Sequence[Mapping[str, float]],
) -> dict[str, Any]:  # fmt: skip
    """What the page and the file say; None for what there is nothing of."""

    def mean(key: str) -> float | None:
        values = [one[key] for one in pairs if one[key] != UNKNOWN]
        return float(np.mean(values)) if values else None

    found: dict[str, Any] = {
        "model": options.model, "count": len(pairs), "seed": options.seed,
        "omit": options.omit, "commit": machine.revision(),
        "machine": machine.name(machine.identity(torch.device(options.device or "cpu"))),
        "same": sum(one["psnr"] == UNKNOWN for one in pairs),
    }  # fmt: skip
    is_checked = all(one[f"{side}/right"] != NOT_A_CAPTION for one in pairs for side in "ab")
    for side in "ab":
        found[side] = {"what": getattr(options, side)}
        if is_checked:
            right = int(sum(one[f"{side}/right"] for one in pairs))
            found[side] |= {"right": right, "interval": [*wilson(right, len(pairs))]}
            found[side]["purity"] = mean(f"{side}/purity")
        found[side]["seconds"] = mean(f"{side}/seconds")
    if is_checked:
        found["only_a_right"] = sum(one["a/right"] > one["b/right"] for one in pairs)
        found["only_b_right"] = sum(one["b/right"] > one["a/right"] for one in pairs)
    first = next(iter(requests.values()))
    for side, way in zip("ab", sides, strict=True):
        if isinstance(way, Way):
            if (flops := way.cost(first)) is not None:
                found[side]["flops"] = flops
            resolved = way.resolved(first)
            found[side] |= {key: getattr(resolved, key) for key in _SAID}
    return found | {key: mean(key) for key in PAIR} | {"pairs": [dict(one) for one in pairs]}


def page(found: Mapping[str, Any]) -> str:
    """For people."""
    lines, count = [], found["count"]
    whole = found["a"].get("flops")
    for side in "ab":
        one = found[side]
        said = [f"{side.upper()}  {one['what']}"]
        if "right" in one:
            low, high = one["interval"]
            said.append(
                f"right {one['right']} of {count}, {one['right'] / count:.1%} ({low:.1%} to {high:.1%})"
            )
            said.append(f"purity {one['purity']:.1%}")
        if whole and "flops" in one:
            said.append(f"FLOPs {one['flops'] / whole:.1%}")
        if one["seconds"] is not None:
            said.append(f"{one['seconds']:.2f} s a picture")
        lines.append(", ".join(said))
    if "only_a_right" in found:
        change = 100 * (found["b"]["right"] - found["a"]["right"]) / count
        lines.append(
            f"accuracy {change:+.1f} points: {found['only_a_right']} pairs right in A alone, "
            f"{found['only_b_right']} in B alone"
        )
    others = count - found["same"]
    told = [f"{found['same']} of {count} pictures are the same to the bit"]
    if others:
        told.append(f"PSNR of the others {found['psnr']:.1f} dB")
    told.append(f"SSIM {found['ssim']:.3f}")
    if found["error"] is not None:
        told.append(f"relative error of the latents {found['error']:.4f}")
    return "\n".join([*lines, ", ".join(told)])
