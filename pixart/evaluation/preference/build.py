"""`preference build`: blind pairs. Whoever has the study, but not its key, cannot tell the models apart by
file names, by order, by size, or by what a file says about itself.

Names are made from a secret of the study's own, for each place of each pair another: without it nobody
can hash pictures that he has, and a picture that comes again has a new name.
"""

import hmac
import os
import random
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from pixart.evaluation.preference.attention_checks import known_pictures
from pixart.evaluation.preference.options import Build
from pixart.evaluation.preference.sources import Source, open_sources
from pixart.evaluation.preference.study import KEY, PICTURES, STUDY, VERSION
from pixart.evaluation.prompt_sets.files import read_prompts
from pixart.evaluation.store.entries import Prompt
from pixart.files import check_writable, write_json, written_aside
from pixart.progress import counted

if TYPE_CHECKING:
    from PIL.Image import Image

PROMPTS = 300  # as the paper's study had
QUALITY = 95  # of JPEG: its blocks are not seen, and PNG would tell sizes of hundreds of MB
MOST_SIDE = 65_500  # of a JPEG
PADDING = (128, 128, 128)


@dataclass(frozen=True)
class Planned:
    """A pair before it has a name. left, right: places in the list of models, and whose prompt each picture
    was drawn for, which in some checks is another."""

    prompt: Prompt
    left: tuple[int, Prompt]
    right: tuple[int, Prompt]
    check: dict[str, str] = field(default_factory=dict)


def build(options: Build) -> str:
    """Write the study; returns a sentence on it. ValueError for pictures that are missing, a folder that
    is in use, and what else cannot be built."""
    _check(options)
    prompts = read_prompts(options.prompts)
    sources = open_sources(options.pictures, prompts)
    seed = secrets.randbits(32) if options.seed is None else options.seed
    rng = random.Random(seed)
    prompts = _chosen(prompts, options.count, rng)
    for source in sources:
        source.check(prompts)
    pairs = plan(prompts, len(sources), options.design, rng)
    count = max(1, round(options.checks * len(pairs))) if options.checks else 0
    checks = plan_checks(prompts, sources, count, options.check_kind, rng)
    with written_aside(options.output) as aside:
        _write(aside, [*pairs, *checks], sources, options, seed)
        if options.output.is_dir() and any(options.output.iterdir()):
            raise _in_use(options.output)
    models = ", ".join(source.name for source in sources)
    return (
        f"{options.output}: {len(pairs)} pairs of {len(prompts)} prompts and {len(checks)} attention "
        f"checks of {models}; keep {KEY} from voters"
    )


def _check(options: Build) -> None:
    if not 0 <= options.checks <= 1:
        raise ValueError(f"--checks must be a share from 0 to 1, got {options.checks:g}")
    if not 16 <= options.side <= MOST_SIDE:
        raise ValueError(f"--side must be from 16 to {MOST_SIDE:,} pixels, got {options.side:,}")
    if options.count is not None and options.count < 1:
        raise ValueError(f"--count must be at least 1, got {options.count}")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {options.output}")
    if options.output.is_dir() and any(options.output.iterdir()):
        raise _in_use(options.output)
    check_writable(options.output / STUDY)


def _in_use(folder: Path) -> ValueError:
    return ValueError(f"--output must be a new or empty folder, {folder} holds something")


def _chosen(prompts: list[Prompt], count: int | None, rng: random.Random) -> list[Prompt]:
    if count is not None and count > len(prompts):
        raise ValueError(
            f"--count must be at most the {len(prompts)} prompts there are, got {count}"
        )
    chosen = sorted(rng.sample(range(len(prompts)), min(count or PROMPTS, len(prompts))))
    return [prompts[k] for k in chosen]


def plan(prompts: Sequence[Prompt], models: int, design: str, rng: random.Random) -> list[Planned]:
    """The pairs that count. Of every two models each is on the left in half of their pairs, give or take
    one, at random places: who likes the left side favours nobody."""
    met: dict[tuple[int, int], list[Prompt]] = {}
    for prompt, two in meetings(prompts, models, design, rng):
        met.setdefault(two, []).append(prompt)
    pairs = []
    for (a, b), theirs in met.items():
        swapped = [k % 2 == 0 for k in range(len(theirs))]
        if len(theirs) % 2 and rng.random() < 0.5:
            swapped = [not one for one in swapped]
        rng.shuffle(swapped)
        for prompt, is_swapped in zip(theirs, swapped, strict=True):
            left, right = (b, a) if is_swapped else (a, b)
            pairs.append(Planned(prompt, (left, prompt), (right, prompt)))
    return pairs


def meetings(
    prompts: Sequence[Prompt], models: int, design: str, rng: random.Random
) -> Iterator[tuple[Prompt, tuple[int, int]]]:
    """Which two models meet over which prompt; see Build.design."""
    every = list(combinations(range(models), 2))
    rounds = tournament(models)
    for place, prompt in enumerate(rng.sample(list(prompts), len(prompts))):
        if design == "against-first":
            chosen = [(0, other) for other in range(1, models)]
        else:
            chosen = every if design == "round-robin" else rounds[place % len(rounds)]
        yield from ((prompt, two) for two in chosen)


def tournament(models: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every two models meet once, and each model at most once a round (the circle
    method; of an odd number one rests)."""
    seats = [*range(models), *([None] if models % 2 else [])]
    half, rounds = len(seats) // 2, []
    for _ in range(len(seats) - 1):
        sides = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in sides if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def plan_checks(
    prompts: Sequence[Prompt], sources: Sequence[Source], count: int, kind: str, rng: random.Random
) -> list[Planned]:
    """So many attention checks: the same picture twice; of kind "checker" every second one a right picture
    beside a wrong one, by the same model."""
    tie = {"quality": "tie", "alignment": "tie"}
    known = known_pictures(prompts, sources, count // 2, rng) if kind == "checker" else []
    checks = []
    for right, wrong in known:
        sides = [right, wrong]
        rng.shuffle(sides)
        answer = "left" if sides[0] == right else "right"
        checks.append(Planned(right[1], sides[0], sides[1], {"alignment": answer}))
    for prompt in rng.choices(prompts, k=count - len(checks)):
        one = (rng.randrange(len(sources)), prompt)
        checks.append(Planned(prompt, one, one, tie))
    return checks


def _write(
    folder: Path, planned: list[Planned], sources: Sequence[Source], options: Build, seed: int
) -> None:
    secret = secrets.token_bytes(32)

    def named(what: str, digits: int) -> str:
        return hmac.digest(secret, what.encode(), "sha256").hex()[:digits]

    (folder / PICTURES).mkdir(parents=True)
    # Written in the order of their ids, which are random: the times of the files say nothing either, and
    # checks lie anywhere.
    ids = [named(f"pair {number}", 16) for number in range(len(planned))]
    ordered = sorted(zip(ids, planned, strict=True), key=lambda two: two[0])
    pairs, answers = [], {}
    for pair, one in counted(ordered, "build", len(ordered)):
        sides = (one.left, one.right)
        images = alike([sources[k].open(prompt) for k, prompt in sides], options.side)
        names = [f"{named(f'{pair} {side}', 32)}.jpg" for side in ("left", "right")]
        for name, image in zip(names, images, strict=True):
            image.save(folder / PICTURES / name, "JPEG", quality=QUALITY, subsampling=0)
        left, right = (sources[k].name for k, _ in sides)
        pairs.append(
            {"id": pair, "prompt": one.prompt.prompt, "left": names[0], "right": names[1],
             "width": images[0].width, "height": images[0].height}
        )  # fmt: skip
        answers[pair] = {
            "left": left, "right": right, "prompt": one.prompt.id,
            "category": one.prompt.category, "check": one.check,
        }  # fmt: skip
    study = named("study", 16)
    write_json(folder / STUDY, {"version": VERSION, "study": study, "pairs": pairs}, indent=1)
    settings = {**asdict(options), "seed": seed, "prompts": str(options.prompts)}
    settings = {k: v for k, v in settings.items() if k not in ("output", "pictures")}
    settings["folders"] = {source.name: str(source.folder) for source in sources}
    key = {
        "version": VERSION, "study": study, "secret": secret.hex(),
        "models": [source.name for source in sources], "pairs": answers, "settings": settings,
    }  # fmt: skip
    write_json(folder / KEY, key, indent=1)
    os.chmod(folder / KEY, 0o600)


def alike(images: "Sequence[Image]", most: int) -> "list[Image]":
    """RGB pictures of one size, and nothing but pixels: the longer side is the shortest that one of them
    has, `most` at most, so that none is enlarged; other proportions get a grey border."""
    import numpy as np
    from PIL import Image

    longer = min(most, *(max(image.size) for image in images))
    scaled = []
    for image in images:
        scale = longer / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        scaled.append(image if size == image.size else image.resize(size, Image.Resampling.LANCZOS))
    canvas = tuple(max(sides) for sides in zip(*(image.size for image in scaled), strict=True))
    made = []
    for image in scaled:
        # From the pixels: a copy has the profile, the resolution and the comments of its file.
        bare = Image.fromarray(np.asarray(image.convert("RGB")))
        if bare.size != canvas:
            framed = Image.new("RGB", canvas, PADDING)
            framed.paste(bare, ((canvas[0] - bare.width) // 2, (canvas[1] - bare.height) // 2))
            bare = framed
        made.append(bare)
    return made
