"""Every candidate of the table of configurations at the shapes of a model: whether it is right, how fast
it is, and the rows of the table that follow.

Three stages over the same calls. "tiles": the candidates of each kernel's row. "switches": the best of
attention's with plain pointers for the copy engine, with 16 columns for the tail of V where 8 would do,
with the bound on the scores looked for always and never. "chosen": the best, with the switches that
pay. A candidate that is wrong, fails or ends the process at any call wins at none, and what was put
together is checked before it may win.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import compilation, machine, table, timing
from bench.measure.case import MEASURED, Case, Context, failed, measured
from bench.measure.results import Row
from bench.workloads import accuracy, comparisons
from bench.workloads.operators import OPERATORS, Workload
from pixart_kernels.dispatch import configurations
from pixart_kernels.dispatch.configurations import Candidate

TILES, SWITCHES, CHOSEN = "tiles", "switches", "chosen"
ATTENTION = "attention.forward"  # which has switches
BACKWARD = "attention.backward"  # which of Triton's two kernels or Gluon's it is launched with
WIDE_TAIL = 16  # columns that every tensor core takes
ALWAYS, NEVER = 0, 2**62  # N · M from which the bound is looked for
GAIN = 0.01  # of the time, for which the first candidate gives way
WRONG = "computes something else"


class Place(NamedTuple):
    """What a row of the table is for."""

    kernel: str
    architecture: str
    bits: int
    size: int


Calls = Sequence[tuple[Workload, bool]]


def cases(at: Sequence[str], out: Path, most: int | None = None) -> list[Case]:
    """At these sizes; the table that follows is written to `out`, and launched by from then on. most:
    candidates of each kernel that are tried, in bf16 alone; all, and fp16 too, if None."""
    return [case for size in at for case in _round(size, out, most)]


def _round(size: str, out: Path, most: int | None) -> list[Case]:
    """All that is tried at a size, and a table after each: there may be no time for the next one."""
    found = calls(size)
    attention = [one for one in found if _has_switches(*one)]
    # A row is for every call of its head dimension: few keys, and keys that do not count, too.
    checked = [*found, *further(size)]
    halves = [(work._replace(dtype=torch.float16), backward) for work, backward in checked]
    tried: list[tuple[str, Calls]] = [(TILES, found), (SWITCHES, attention)]
    final = [*attention, *further(size), *halves] if most is None else attention
    tried += [(CHOSEN, final)]
    made = [
        Case(f"{stage}/{work.name}/{_way(backward)}", partial(_try, stage, work, backward, most))
        for stage, some in tried
        for work, backward in some
    ]
    return [*made, Case(f"table/{size}", partial(_write, out), always=True)]


def calls(size: str) -> Calls:
    """Of every kernel, forward and backward."""
    return [
        (Workload(operator, size, kind), backward)
        for operator in OPERATORS.values()
        for kind in operator.tuned
        for backward in (False, True)
    ]


def further(size: str) -> Calls:
    """Attention as it is not timed to choose: over a caption's keys, and over keys that do not count."""
    operator = OPERATORS.get("flash_attention")
    if operator is None:
        return []
    return [
        (Workload(operator, size, kind, batch), backward)
        for kind, batch in (("cross", 1), ("masked", 2))
        for backward in (False, True)
    ]


def _has_switches(work: Workload, backward: bool) -> bool:
    return work.operator.name == "flash_attention" and not backward


def _way(backward: bool) -> str:
    return comparisons.DIRECTIONS[backward]


def _try(stage: str, work: Workload, backward: bool, most: int | None, context: Context) -> None:
    inputs = work.inputs(context.device)
    what = comparisons.describe(work, backward)
    context.announce("")
    configurations.forget_chosen()
    call = comparisons.call_of(work.variants()["ours"], inputs, backward)
    configurations.forget_chosen()
    call()
    launched = configurations.chosen()
    if not launched:
        context.row("ours", "not measured: no kernel of ours runs here", **what)
        return
    check = _Check(work, inputs, backward, context)
    # Last the choice between kernels, with what was found best of those that one choice has.
    beside: dict[str, Candidate] = {}
    for kernel, (row, _) in sorted(launched.items(), key=lambda one: one[0] == BACKWARD):
        place = _place(kernel, work, context.device)
        tried = _tried(stage, place, few(plain(row.candidates), most), context.known)
        _measure(stage, place, tried, call, check, what, context, beside)
        beside[kernel] = ranked(context.known, TILES, place, plain(row.candidates))[0]


def _place(kernel: str, work: Workload, device: torch.device) -> Place:
    from pixart_kernels.dispatch import launch

    size = work.heads[1] if kernel.startswith("attention.") else work.width
    return Place(kernel, launch.architecture(device), 8 * work.dtype.itemsize, size)


def _tried(
    stage: str, place: Place, candidates: Sequence[Candidate], known: Iterable[Row]
) -> list[Candidate]:
    if stage == TILES:
        return plain(candidates)
    best = ranked(known, TILES, place, plain(candidates))[0]
    if stage == CHOSEN:
        return [best if place.kernel != ATTENTION else switched(best, known, place)]
    return [best, *(best | change for change in switches(place, best))]


def plain(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no switch was set in when the table was measured. A wide tail is none if all have it."""
    found = [one for one in candidates if not one.keys() & {"tma", "bound_from"}]
    if any("V_TAIL" not in one and not is_gluon(one) for one in found):
        found = [one for one in found if "V_TAIL" not in one]
    return found


def is_gluon(candidate: Candidate) -> bool:
    """Whether it is of the kernels for Hopper, whose tails have 8 columns and which need TMA."""
    return configurations.language(candidate) == "gluon"


def few(candidates: Sequence[Candidate], most: int | None) -> list[Candidate]:
    """The first `most` in each language, all if None."""
    parts = [[one for one in candidates if is_gluon(one) is gluon] for gluon in (False, True)]
    return list(candidates) if most is None else [one for part in parts for one in part[:most]]


def switches(place: Place, candidate: Candidate) -> list[dict[str, Any]]:
    """What can be changed about a candidate of attention besides its tiles."""
    from pixart_kernels.attention.forward_launcher import value_tail

    found: list[dict[str, Any]] = [{"bound_from": ALWAYS}, {"bound_from": NEVER}]
    if is_gluon(candidate):
        return found
    tail = candidate.get("V_TAIL", value_tail(place.size, place.architecture))
    return [*found, {"tma": False}, *([{"V_TAIL": WIDE_TAIL}] * (0 < tail < WIDE_TAIL))]


class _Check:
    """Whether what a call gives is within twice the error of eager PyTorch."""

    def __init__(
        self, work: Workload, inputs: dict[str, Any], backward: bool, context: Context
    ) -> None:
        self.work, self.inputs, self.backward = work, inputs, backward
        self.truth = accuracy.oracle(work, inputs, backward)
        eager = accuracy.results(work.operator.reference, inputs, backward)
        self.eager = accuracy.errors(eager, self.truth)

    def __call__(self) -> tuple[dict[str, float], bool]:
        """Errors against fp64, and whether they are small enough."""
        made = accuracy.results(self.work.operator.ours, self.inputs, self.backward)
        errors = accuracy.errors(made, self.truth)
        return errors, accuracy.within(errors, self.eager, self.work.dtype)


def _measure(
    stage: str,
    place: Place,
    tried: Sequence[Candidate],
    call: Callable[[], Any],
    check: _Check,
    what: Row,
    context: Context,
    beside: Mapping[str, Candidate],
) -> None:
    """A row for each candidate: checked, then those that are right timed in turn. beside: how other
    kernels of the call are launched meanwhile."""
    named = {f"{place.kernel} {configurations.describe(one)}": one for one in tried}
    pinned = {name: _pinned(call, {**beside, place.kernel: one}) for name, one in named.items()}
    found: dict[str, Row] = {}
    context.announce("", compilation.SECONDS)
    compilation.ahead([pinned[name] for name in named if not context.crashed(name)])
    for name, one in named.items():
        found[name] = {"status": context.crashed(name) or MEASURED}
        if found[name]["status"] != MEASURED:
            continue
        context.announce(name)
        try:
            errors, passed = _pinned(check, {**beside, place.kernel: one})()
        except Exception as error:  # another candidate may fit where this one does not
            found[name]["status"] = failed(timing.survive(error, context.device))
            continue
        found[name] |= {"errors": errors, "errors_from": "fp64", "passed": passed}
        if not passed and not context.dry:
            worst = max(errors.values())
            found[name]["status"] = f"{WRONG}: {worst:.2g} from fp64"
    right = {name: [pinned[name]] for name, row in found.items() if row["status"] == MEASURED}
    times = timing.measure(
        right, context.device, seconds=context.seconds / 3, announce=context.announce
    )
    for name, one in named.items():
        facts: Row = {
            **place._asdict(),
            "stage": stage,
            "candidate": dict(one),
            "config": configurations.describe(one),
            "chosen": one is tried[0],
            "pairs": _pairs(what["shape"]),
        }
        took = measured(context, times[name]) if name in right else {}
        context.row(name, **what, **facts, **found[name] | took)


def _pairs(shape: Mapping[str, Any]) -> int:
    """N · M of an attention."""
    return int(shape["tokens"]) * int(shape.get("keys", 1))


def _pinned(call: Callable[[], Any], candidates: Mapping[str, Candidate]) -> Callable[[], Any]:
    def pinned_call() -> Any:
        with configurations.pinned(candidates):
            return call()

    return pinned_call


def ranked(
    rows: Iterable[Row], stage: str, place: Place, candidates: Sequence[Candidate]
) -> list[Candidate]:
    """Those candidates that are right wherever any was measured, the fastest first: by the mean of
    the logarithm of its time over the best one's. The first of the table stays first where nobody is
    faster by more than GAIN; without any figure the order is the table's."""
    calls = _by_call(rows, stage, place)
    texts = {configurations.describe(one): one for one in candidates}
    scores = {text: _score(text, calls) for text in texts}
    finite = [text for text in texts if math.isfinite(scores[text])]
    order = sorted(finite, key=lambda text: scores[text])
    first = next(iter(texts))
    if first in order and scores[first] <= scores[order[0]] + GAIN:
        order = [first, *(text for text in order if text != first)]
    return [texts[text] for text in order] or list(candidates)


def _by_call(rows: Iterable[Row], stage: str, place: Place) -> dict[str, dict[str, float]]:
    """By call and candidate, seconds; infinitely many of what is wrong or failed."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("stage") == stage and Place(*(row[name] for name in Place._fields)) == place:
            is_right = row["status"] == MEASURED and row["passed"]
            call = f"{row['what']} {sorted(row['shape'].items(), key=str)} {row['dtype']}"
            seconds = row["seconds"]["median"] if is_right else math.inf
            found.setdefault(call, {})[row["config"]] = seconds
    return found


def _score(text: str, calls: Mapping[str, Mapping[str, float]]) -> float:
    total = 0.0
    for times in calls.values():
        seconds = times.get(text, math.inf)
        if not math.isfinite(seconds):
            return math.inf
        total += math.log(seconds / min(times.values()))
    return total / max(len(calls), 1)


def switched(best: Candidate, rows: Iterable[Row], place: Place) -> Candidate:
    """The candidate with those switches that made it faster; the bound from the N · M that would have
    made the calls that were timed the fastest."""
    rows = list(rows)
    made = dict(best)
    for change in ({"tma": False}, {"V_TAIL": WIDE_TAIL}):
        if ranked(rows, SWITCHES, place, [best, best | change])[0] != best:
            made |= change
    times = {
        threshold: _by_pairs(rows, place, best | {"bound_from": threshold})
        for threshold in (ALWAYS, NEVER)
    }
    shared = sorted(times[ALWAYS].keys() & times[NEVER].keys())
    if not shared:
        return made

    def total(threshold: int) -> float:
        side = {pairs: NEVER if pairs < threshold else ALWAYS for pairs in shared}
        return sum(math.log(times[side[pairs]][pairs]) for pairs in shared)

    return made | {"bound_from": min([NEVER, *reversed(shared)], key=total)}


def _by_pairs(rows: Iterable[Row], place: Place, candidate: Candidate) -> dict[int, float]:
    text = configurations.describe(candidate)
    return {
        row["pairs"]: row["seconds"]["median"]
        for row in rows
        if row.get("stage") == SWITCHES
        and row["kernel"] == place.kernel
        and row["config"] == text
        and row["status"] == MEASURED
    }


def entries(rows: Sequence[Row], source: Callable[[], str]) -> list[table.Entry]:
    """The rows of the table that follow from what was measured of its candidates: of each kernel the
    ones that are right, the best first. source() says where they come from."""
    places: dict[Place, dict[str, Candidate]] = {}
    for row in rows:
        if row.get("stage") == TILES:
            place = Place(*(row[name] for name in Place._fields))
            places.setdefault(place, {})[row["config"]] = row["candidate"]
    made = []
    for place, tried in places.items():
        calls = _by_call(rows, TILES, place)
        checked = _by_call(rows, CHOSEN, place)
        right = [
            one
            for text, one in tried.items()
            if math.isfinite(_score(text, calls)) and _stands(text, checked) is not False
        ]
        if all(map(is_gluon, right)):  # there must be one for tensors that TMA cannot take
            continue
        order = ranked(rows, TILES, place, right)
        if place.kernel == ATTENTION:
            final = switched(order[0], rows, place)
            if _stands(configurations.describe(final), checked):
                order = [final, *(one for one in order if one != final)]
        proved = [one for one in order if _stands(configurations.describe(one), checked)]
        if not proved:  # there was no time to try it in fp16, for which the row is too
            continue
        order = [proved[0], *(one for one in order if one != proved[0])]
        span = table.span_of(place.kernel, place.size)
        made.append(
            table.entry(place.kernel, place.architecture, place.bits, span, source(), order)
        )
    return made


def _stands(text: str, checked: Mapping[str, Mapping[str, float]]) -> bool | None:
    """Whether a candidate was right at every call of the last stage, None if it was not tried there in
    fp16."""
    found = {call: times[text] for call, times in checked.items() if text in times}
    if not all(map(math.isfinite, found.values())):
        return False
    return True if any(call.endswith(" float16") for call in found) else None


def _write(out: Path, context: Context) -> None:
    """The table with what was found, for all that comes after; nothing where nothing was."""
    new = [] if context.dry else entries(context.known, lambda: source(context.device))
    what: Row = {"what": "table of configurations", "shape": {}, "dtype": None}
    if not new:
        context.row("ours", "not measured: no candidate is known to be right", **what)
        return
    table.write(out, table.with_entries(table.read(), new))
    table.adopt(out)
    context.row("ours", **what, entries=new)


def source(device: torch.device) -> str:
    """Where a row comes from: the GPU, and the commit or, without a history, the kernels' hash."""
    revision = machine.revision()
    commit = revision["commit"]
    if commit is None:
        origin = f"sources {revision['kernels_sha256'][:12]}"
    else:
        origin = f"commit {commit[:12]}" + " with changes" * revision["modified"]
    return f"measured on {torch.cuda.get_device_properties(device).name}, {origin}"
