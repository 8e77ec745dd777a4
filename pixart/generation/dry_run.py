"""`--dry-run`: what a run has to do, and how long it will take. Nothing is written."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pixart.config import KVCompression
from pixart.generation.drafts import without_own
from pixart.generation.options import Options
from pixart.generation.report import Report
from pixart.generation.team import Team
from pixart.pipeline.request import Request, passes

if TYPE_CHECKING:
    from pixart.pipeline.parallel import Layout
    from pixart.pipeline.rehearsal import PassCost
    from pixart.pipeline.text_to_image import Pipeline

_GUIDED = 2.0  # any scale above 1 takes as long as any other
_SHOWN = (
    "steps",
    "scheduler",
    "guidance",
    "strength",
    "upscale",
    "tiles",
    "pag",
    "kv_schedule",
    "reuse_blocks",
)


def check_options(options: Options, processes: int) -> None:
    """ValueError for --processes that says nothing. processes: that there are."""
    if options.processes is None:
        return
    if not options.dry_run:
        raise ValueError(
            f"--processes must be given with --dry-run, which counts for them, got {options.processes}; "
            "torchrun starts processes"
        )
    if processes > 1:
        raise ValueError(
            f"--processes must be left out under torchrun, which started {processes}, got {options.processes}"
        )
    if options.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {options.processes}")


@dataclass(frozen=True)
class Kind:
    """Pictures that take the same time. request: the first of them. exchanged: bytes that each process
    receives in a step."""

    request: Request
    pictures: int
    passes: int
    cost: "PassCost"
    exchanged: float

    @property
    def seconds(self) -> dict[str, float]:
        """Of a picture, by stage."""
        return {stage: spent / self.cost.pictures for stage, spent in self.cost.seconds.items()}

    def to_dict(self) -> dict[str, Any]:
        height, width = self.request.final_size
        settings = {name: getattr(self.request, name) for name in _SHOWN}
        return {
            "width": width,
            "height": height,
            **{name: value for name, value in settings.items() if value is not None},
            "pictures": self.pictures,
            "passes": self.passes,
            "steps_of_a_pass": self.cost.steps,
            "seconds_of_a_step": self.cost.step,
            "seconds_of_a_picture": self.seconds,
            "bytes_received_in_a_step": round(self.exchanged),
        }


@dataclass(frozen=True)
class Tars:
    """there: how many are there. left: how many each process has to draw. size: pictures of each."""

    there: int
    left: list[int]
    size: int

    def to_dict(self) -> dict[str, Any]:
        left = sum(self.left)
        return {
            "all": self.there + left,
            "there": self.there,
            "left": left,
            "pictures_of_each": self.size,
            "of_each_process": self.left,
        }


@dataclass(frozen=True)
class Forecast:
    """there: pictures that need not be drawn. shares: what falls to each process. is_measured: whether the
    processes are these; otherwise what one alone takes is shared evenly. seconds: of one process in all,
    by stage, of the one that has most to do. compression: of keys and values."""

    there: int
    shares: list["Share"]
    layout: "Layout"
    compression: str | None
    is_measured: bool
    kinds: list[Kind]
    texts: int
    seconds: dict[str, float]
    tars: Tars | None = None

    @property
    def left(self) -> int:
        """Pictures to draw."""
        return sum(kind.pictures for kind in self.kinds)

    def to_dict(self) -> dict[str, Any]:
        hours = {stage: spent / 3600 for stage, spent in self.seconds.items()}
        tars = {} if self.tars is None else {"tars": self.tars.to_dict()}
        return {
            "dry_run": True,
            "pictures": {"all": self.there + self.left, "there": self.there, "left": self.left},
            **tars,
            "prompts": self.texts,
            "processes": len(self.shares),
            "parallel": self.layout.name,
            "passes_of_each_process": [share.passes for share in self.shares],
            "kv_compression": self.compression,
            "is_measured": self.is_measured,
            "kinds": [kind.to_dict() for kind in self.kinds],
            "hours_of_a_card": hours | {"all": sum(hours.values())},
        }

    def to_text(self) -> str:
        """A few lines."""
        all_of_them = _count(self.there + self.left, "picture")
        lines = [f"{all_of_them}: {self.there:,} there already, {self.left:,} left"]
        if self.tars is not None:
            all_tars = _count(self.tars.there + sum(self.tars.left), "tar")
            per_tar = _count(self.tars.size, "picture")
            lines.append(f"{all_tars} of {per_tar}: {self.tars.there:,} there already")
        if not self.kinds:
            return "\n".join([*lines, "nothing is left to draw"])
        lines += [
            self._said_of_processes(),
            f"keys and values: {self.compression or 'not compressed'}",
        ]
        for kind in self.kinds:
            lines += _lines_of(kind)
        hours = sum(self.seconds.values()) / 3600
        parts = ", ".join(f"{stage} {_hours(one / 3600)}" for stage, one in self.seconds.items())
        lines.append(f"in all {_hours(hours)} of each card: {parts}")
        origin = "measured here, in a few steps of each kind"
        if not self.is_measured:
            origin = (
                "predicted for processes that are not here: one was measured, its steps are shared evenly, and "
                "what is exchanged takes no time"
            )
        return "\n".join([*lines, f"{origin}; writing files is not counted"])

    def _said_of_processes(self) -> str:
        passes = [share.passes for share in self.shares]
        processes = _count(len(passes), "process", "es")
        if self.layout.is_together:
            return (
                f"{processes}, all together ({self.layout.name}): {_count(passes[0], 'pass', 'es')}"
            )
        fewest, most = min(passes), max(passes)
        each = _count(most, "pass", "es") if fewest == most else f"{fewest:,} to {most:,} passes"
        return f"{processes}, {self.layout.name}: {each} each"


def _lines_of(kind: Kind) -> list[str]:
    height, width = kind.request.final_size
    settings = ", ".join(
        f"{name} {value}" for name in _SHOWN if (value := getattr(kind.request, name)) is not None
    )
    parts = ", ".join(f"{stage} {spent:.3g} s" for stage, spent in kind.seconds.items())
    seconds = sum(kind.seconds.values())
    lines = [
        f"{width}x{height}, {settings}: {_count(kind.pictures, 'picture')} of {seconds:.3g} s",
        f"  {parts}; a step of {_count(kind.cost.pictures, 'picture')} {kind.cost.step:.3g} s",
    ]
    if kind.exchanged:
        lines.append(
            f"  each process receives {kind.exchanged / 1e6:,.3g} MB in a step (computed from the sizes)"
        )
    return lines


@dataclass
class Share:
    """What falls to a process. pictures: by their kind, see `_alike`. texts: digests of the prompts, each
    with its block. blocks: for each of which T5 is read."""

    passes: int = 0
    pictures: Counter[Request] = field(default_factory=Counter)
    texts: set[int] = field(default_factory=set)
    blocks: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Planned:
    """A pass of so many pictures that agree with the resolved request in all but prompts and seed. texts: prompts
    and negative prompts of them. block: in which they are encoded; another one knows nothing of them."""

    request: Request
    pictures: int
    texts: Sequence[str]
    block: int = 0


class Tally:
    """Counts passes by what takes the same time. largest: of each kind, its request and how many pictures."""

    def __init__(self) -> None:
        self.largest: dict[Request, Planned] = {}
        self.passes: Counter[Request] = Counter()
        self._kinds: dict[Request, Request] = {}

    def share(self, planned: Iterable[Planned]) -> Share:
        """Of the passes of a process."""
        share = Share()
        for one in planned:
            kind = self._kind(one.request)
            if kind not in self.largest or one.pictures > self.largest[kind].pictures:
                self.largest[kind] = one
            self.passes[kind] += 1
            share.passes += 1
            share.pictures[kind] += one.pictures
            share.texts.update(hash((one.block, text)) for text in one.texts)
            share.blocks.add(one.block)
        return share

    def _kind(self, request: Request) -> Request:
        if request not in self._kinds:
            self._kinds[request] = _alike(request)
        return self._kinds[request]


def forecast_run(
    pipe: "Pipeline | None",
    there: int,
    left: Sequence[Request],
    options: Options,
    team: Team,
    load: float,
) -> Forecast:
    """Of a run that draws files. there: pictures that are drawn. left: the resolved requests of the others. load:
    seconds that opening took. Under torchrun, all processes must call it."""
    from pixart.pipeline.parallel import Layout, choose_layout

    count, tally = process_count(options, team), Tally()
    groups = [
        Planned(
            without_own(group[0]),
            len(group),
            [text for one in group for text in (one.prompt, one.negative)],
        )
        for group in passes(list(left), options.batch)
    ]
    layout = team.layout or Layout()
    if pipe is not None and left and count > team.count:
        layout = choose_layout(options.parallel, count, len(groups), pipe, left)
    if layout.is_together:
        shares = [tally.share(groups)] * count
    else:
        shares = [tally.share(groups[rank::count]) for rank in range(count)]
    texts = len(set().union(*(share.texts for share in shares)))
    return forecast(pipe, there, shares, tally, layout, team, load, texts)


def tell(found: Forecast, options: Options, team: Team, report: Report) -> None:
    """In a few lines, or with --json in the report."""
    if options.json:
        report.forecast = found.to_dict()
    elif team.rank == 0:
        print(found.to_text())


def process_count(options: Options, team: Team) -> int:
    """For how many processes it is counted."""
    return team.count if options.processes is None else options.processes


def forecast(
    pipe: "Pipeline | None",
    there: int,
    shares: list[Share],
    tally: Tally,
    layout: "Layout",
    team: Team,
    load: float,
    texts: int,
    tars: Tars | None = None,
    blocks: int = 1,
) -> Forecast:
    """texts: that one process encodes, in so many blocks. The others as in `Forecast` and `forecast_run`."""
    compression = None if pipe is None else _spelt(pipe.opened.config.kv_compression)
    seconds, is_here = {"load": load}, len(shares) == team.count
    if pipe is None or not tally.largest:
        return Forecast(there, shares, layout, compression, is_here, [], 0, seconds, tars)
    text = next(iter(tally.largest.values())).texts[0]
    seconds |= _text_seconds(pipe, text, texts, blocks, team)
    kinds = _kinds(pipe, tally, shares, layout, text, team)
    spent = [_total(share, kinds) for share in shares]
    longest = max(spent, key=lambda one: sum(one.values()))
    seconds |= longest
    found = list(kinds.values())
    return Forecast(there, shares, layout, compression, is_here, found, texts, seconds, tars)


def _text_seconds(
    pipe: "Pipeline", text: str, count: int, blocks: int, team: Team
) -> dict[str, float]:
    """Of so many texts, and of reading T5 for each block of them, in the first process; the others wait for it."""
    from pixart.pipeline.parallel import share_prompts

    def encode() -> float:
        pipe.forget_prompts()
        started = time.perf_counter()
        pipe.captions.ensure(text)
        return time.perf_counter() - started

    found: dict[str, float] = {}
    if team.rank == 0:
        first, of_one = encode(), encode()
        found = {"load T5": max(first - of_one, 0.0), "text": of_one * count}
        if blocks > 1:  # files that were read once come from memory
            pipe.text_encoder.release()
            found["load T5"] += (blocks - 1) * max(encode() - of_one, 0.0)
    if not team.is_alone:
        share_prompts(pipe, [text], {text})
    pipe.text_encoder.release()
    return found


def _kinds(
    pipe: "Pipeline",
    tally: Tally,
    shares: Sequence[Share],
    layout: "Layout",
    text: str,
    team: Team,
) -> dict[Request, Kind]:
    """Each kind, measured in its largest pass. text: a prompt that is encoded."""
    from pixart.pipeline.inputs import Inputs
    from pixart.pipeline.parallel import step_bytes
    from pixart.pipeline.rehearsal import rehearse

    team.share(pipe)
    found = {}
    for kind, largest in tally.largest.items():
        # All of one prompt: how long it is changes little.
        group = [replace(largest.request, prompt=text, negative=text)] * largest.pictures
        cost = rehearse(pipe, group, Inputs())
        if layout.is_together and team.is_alone:
            cost = _shared(cost, layout)
        request, count = largest.request, largest.pictures
        exchanged = step_bytes(pipe, request, layout, count, cost.kv_ratios)
        several = shares[:1] if layout.is_together else shares
        pictures = sum(share.pictures[kind] for share in several)
        found[kind] = Kind(request, pictures, tally.passes[kind], cost, exchanged)
    return found


def _alike(request: Request) -> Request:
    """What those have in common that take the same time."""
    scales = ("guidance", "upscale_guidance")
    found = {name: getattr(request, name) for name in scales}
    named = {name: min(scale, _GUIDED) for name, scale in found.items() if scale is not None}
    if request.image is not None:
        named["image"] = "image"
    if request.mask is not None:
        named["mask"] = "mask"
    if request.control_image is not None:
        named["control_image"] = tuple(map(str, range(len(request.control_image))))
    return replace(without_own(request), **named)


def _shared(cost: "PassCost", layout: "Layout") -> "PassCost":
    """The steps of one process shared among many; the VAE's work is left as it is. Of steps that are not
    guided, two halves of guidance share nothing."""
    own = cost.seconds["denoise"] - (cost.of_second if layout.guidance > 1 else 0.0)
    return replace(cost, seconds=cost.seconds | {"denoise": own / layout.tokens})


def _total(share: Share, kinds: dict[Request, Kind]) -> dict[str, float]:
    """Seconds by stage of what falls to a process."""
    found: dict[str, float] = {}
    for kind, pictures in share.pictures.items():
        for stage, spent in kinds[kind].seconds.items():
            found[stage] = found.get(stage, 0.0) + pictures * spent
    return found


def _spelt(compression: KVCompression | None) -> str | None:
    """As --kv-compress takes it."""
    if compression is None or compression.ratio == 1:
        return None
    return compression.to_text()


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number:,} {what}{plural * (number != 1)}"


def _hours(hours: float) -> str:
    return f"{hours:,.3g} h" if hours >= 1 else f"{hours * 60:.3g} min"
