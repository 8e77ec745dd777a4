"""A case of the benches: variants of one computation, checked, then timed in turn.

`pytest bench`, `python -m bench.gpu` and the commands that measure one thing all run cases, each with a
Context that says how long to take and keeps the rows (see results.py).
"""

import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from bench.measure import compilation, machine, timing
from bench.measure.results import Row

MEASURED = "measured"
FAULTS = ("failed", "computes something else")  # as the status of what should not be begins
NOT_COMPARED = "not compared"
OURS = "ours"  # the beginning of a variant's name
DRY = "not measured: went as far as a stub of the driver, nothing was computed"
_OF_RESULTS = {"seconds", "samples", "share_of_matmul", "share_of_copy", "images_per_second"}
_OF_RESULTS |= {"errors", "errors_from", "errors_beside", "agrees", "passed", "repeatable", "exact"}
T = TypeVar("T")


class Unavailable(RuntimeError):
    """Why a variant is not measured."""


class Case(NamedTuple):
    """variants: what it times in turn, a row each; empty if it compares nothing. always: whether it runs
    when the time of its part is over, because others go by what it decides."""

    name: str
    run: Callable[["Context"], None]
    variants: tuple[str, ...] = ()
    always: bool = False


class Context:
    """What a case needs, and where it leaves what it found.

    rows: what the case that runs now, or ran last, found; known: all rows, of earlier cases and
    processes too. chosen: the variants to run, None for all. tell: is called with each event as it
    happens. history: the events of earlier processes. dry: whether nothing is computed, because a stub
    stands for the driver: then no row says that anything was measured, or is right.
    """

    def __init__(
        self,
        device: torch.device,
        tell: Callable[[dict[str, Any]], None] = lambda event: None,
        history: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.device = device
        self.seconds = 1.0  # to time the variants of a case, all together
        self.least_rounds: int | None = None  # of each, where not as many as the case says
        self.hurried = False  # whether there are minutes for everything
        self.peaks: dict[str, dict[str, Any]] = {}
        self.clocks = machine.ClockLog(device)
        self.part = self.case = ""
        self.rows: list[Row] = []
        self.known: list[Row] = [event["row"] for event in history if event["event"] == "row"]
        self.dry = False
        self.chosen: frozenset[str] | None = None
        self.history = history
        self._tell = tell
        self._begun = machine.Moment()

    def run(self, part: str, case: Case) -> list[Row]:
        self.part, self.case = part, case.name
        self.rows = []
        self._begun = machine.Moment()
        case.run(self)
        return self.rows

    def choose(self, variants: Mapping[str, T]) -> dict[str, T]:
        """Those that were asked for; of a dry run, what launches kernels of ours."""
        wanted = self.chosen
        return {
            name: one
            for name, one in variants.items()
            if (wanted is None or name in wanted) and (name.startswith(OURS) or not self.dry)
        }

    def emit(self, event: str, **values: Any) -> None:
        self._tell({"event": event, "part": self.part, "case": self.case, **values})

    def announce(self, variant: str, patience: float | None = None) -> None:
        """What runs next: if this process dies, that did it. patience: seconds that it may be silent
        for before it counts as hung, where that is more than others may."""
        more = {} if patience is None else {"patience": patience}
        self.emit("variant", variant=variant, **more)

    def row(self, variant: str, status: str = MEASURED, **values: Any) -> None:
        """Keep a row, with what else the machine did since the case began."""
        row: Row = {
            "id": f"{self.part}/{self.case}/{variant}",
            "part": self.part,
            "variant": variant,
        }
        row |= {"status": status, **values}
        if self.dry and status == MEASURED:
            row = {name: value for name, value in row.items() if name not in _OF_RESULTS}
            row["status"] = DRY
        row |= {
            "clocks": self.clocks.since(self._begun.wall),
            "busy_elsewhere": machine.Moment().elsewhere(self._begun),
        }
        self.rows.append(row)
        self.known.append(row)
        self.emit("row", row=row)

    def crashed(self, variant: str) -> str | None:
        """How this variant ended an earlier process in this case, None if it did not."""
        crash = ("crash", self.part, self.case, variant)
        for event in self.history:
            if (event["event"], event["part"], event["case"], event.get("variant")) == crash:
                return event["reason"]
        return None

    def survive(self, error: Exception) -> None:
        """Tell of an error; raises DeviceLost if nothing can go on after it."""
        text = "".join(traceback.format_exception(error))
        print(text, flush=True)
        timing.survive(error, self.device)
        self.emit("failure", reason=text[-4000:])


class Ready(NamedTuple):
    """A variant that has run once. calls: the same on several inputs, which no cache can hold.
    flops, bytes: of a call, at least. result: for `judge`. facts: for its row."""

    calls: Sequence[timing.Call]
    flops: int = 0
    bytes: int = 0
    result: Any = None
    facts: Row = {}


class Verdict(NamedTuple):
    """errors: relative ones, by result, from those of errors_from. agrees: whether it computes the
    same as the others, None where that cannot be known. beside: the relative error from a variant
    that it must agree with as well, by its name."""

    errors: dict[str, float]
    errors_from: str
    agrees: bool | None
    beside: dict[str, float] = {}


Judge = Callable[[Mapping[str, Ready]], Mapping[str, Verdict]]


def time_variants(
    context: Context,
    builders: Mapping[str, Callable[[], Ready]],
    judge: Judge = lambda ready: {},
    *,
    dtype: torch.dtype = torch.bfloat16,
    with_host: bool = False,
    least_rounds: int = 5,
    compiling: Collection[str] = (),
) -> dict[str, Row]:
    """By variant, the part of its row that says how it computes and how fast. Builds all, compares
    their results, and times those that compute the same, in turn.

    Whoever is not there, fails, or computes something else gets that for its status, and leaves the
    others alone. Whoever the judge says nothing of is timed, and its row says that nothing was
    compared. dtype: of the products that FLOPs count. compiling: variants that generate code when
    they are built, which takes long.
    """
    ready: dict[str, Ready] = {}
    found: dict[str, Row] = {}
    for name, build in context.choose(builders).items():
        found[name] = {"status": context.crashed(name) or MEASURED}
        if found[name]["status"] != MEASURED:
            continue
        context.announce(name, compilation.SECONDS if name in compiling else None)
        with warnings.catch_warnings(record=True) as said:  # why a backend of PyTorch is not viable
            warnings.simplefilter("always")
            try:
                ready[name] = build()
            except Unavailable as reason:
                found[name]["status"] = str(reason)
            except Exception as error:  # a peer may fail in any way
                found[name]["status"] = failed(error, said)
                timing.survive(error, context.device)
    for name in ready:
        found[name] |= {"agrees": None, "errors_from": NOT_COMPARED}
    for name, verdict in ({} if context.dry else judge(ready)).items():
        found[name] |= {"errors": verdict.errors, "errors_from": verdict.errors_from}
        found[name] |= {"agrees": verdict.agrees, "errors_beside": verdict.beside}
        if verdict.agrees is False:
            found[name]["status"] = f"computes something else: {worst(verdict)}"
    same = {name: one for name, one in ready.items() if found[name]["status"] == MEASURED}
    times = timing.measure(
        {name: one.calls for name, one in same.items()},
        context.device,
        seconds=context.seconds,
        least_rounds=context.least_rounds or least_rounds,
        with_host=with_host,
        announce=context.announce,
    )
    for name, one in same.items():
        found[name] |= {**measured(context, times[name], one.flops, one.bytes, dtype), **one.facts}
    return found


def measured(
    context: Context,
    result: timing.Timing | Exception,
    flops: int = 0,
    moved: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Row:
    """The part of a row that says how fast, and how near to what this machine can do at most."""
    if isinstance(result, Exception):
        return {"status": failed(result)}
    row: Row = {
        "status": MEASURED,
        "seconds": result.summary(),
        "samples": result.samples,
    }
    if flops:
        share = flops / result.median / machine.product_rate(context.peaks, dtype)
        row |= {"flops": flops, "share_of_matmul": share}
    if moved:
        share = moved / result.median / context.peaks["copy"]["per_second"]
        row |= {"bytes": moved, "share_of_copy": share}
    return row


def failed(error: Exception, said: Iterable[warnings.WarningMessage] = ()) -> str:
    reasons = [str(warning.message).split(" (Triggered internally")[0] for warning in said]
    return "failed: " + "; ".join([f"{type(error).__name__}: {error}", *reasons])[:1000]


def worst(verdict: Verdict) -> str:
    found = [(error, name, verdict.errors_from) for name, error in verdict.errors.items()]
    found += [(error, "its result", other) for other, error in verdict.beside.items()]
    error, name, other = max(found)
    return f"{name} is {error:.2g} from that of {other}"


@contextmanager
def readied(device: torch.device) -> Iterator[None]:
    """The process as timing on this device needs it."""
    if device.type != "cuda":
        yield
        return
    # The default stream cannot be captured, and a backward pass runs where its forward pass did.
    torch.cuda.set_stream(torch.cuda.Stream())
    yield
