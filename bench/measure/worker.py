"""Runs the parts of bench.gpu, case by case, and tells each event in one line of a file.

A case may break the GPU's context, or hang: then this process ends, bench.gpu starts it again with
the same file, and it goes on after what the file says, without the variant that was running.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from bench.gpu import read_events
from bench.measure import machine, timing, tuning
from bench.measure.results import plain

ATTEMPTS = 3  # at one case
REFUSED = 2  # exit codes: this machine cannot run the parts at all;
LOST = 3  # the GPU's context is broken

T = TypeVar("T")


class Case(NamedTuple):
    """variants: what it times in turn, each told in a row of its own; empty if it compares nothing."""

    name: str
    run: Callable[["Context"], None]
    variants: tuple[str, ...] = ()


class Part(NamedTuple):
    """share: of the time, relative to the parts after it. cases(tiny): most important first."""

    name: str
    share: float
    cases: Callable[[bool], Sequence[Case]]


class Context:
    """What a case needs, and how it tells what it found.

    rows: what the case that runs now, or ran last, found. chosen: the variants to run, None for all.
    events: a file that is told as well.
    """

    def __init__(self, device: torch.device, events: Path | None = None) -> None:
        self.device = device
        self.tiny = device.type == "cpu"
        self.seconds = 0.02 if self.tiny else 0.5  # to time the variants of a case
        self.peaks: dict[str, dict[str, Any]] = {}
        self.clocks = machine.ClockLog(device)
        self.part = self.case = ""
        self.rows: list[dict[str, Any]] = []
        self.chosen: frozenset[str] | None = None
        self.history = read_events(events) if events else []
        self._file = open(events, "a", buffering=1, encoding="utf-8") if events else None  # noqa: SIM115

    def run(self, case: Case) -> None:
        self.rows.clear()
        case.run(self)

    def choose(self, variants: Mapping[str, T]) -> dict[str, T]:
        """Those that were asked for."""
        return {
            name: variant
            for name, variant in variants.items()
            if self.chosen is None or name in self.chosen
        }

    def emit(self, event: str, **values: Any) -> None:
        if self._file is None:
            return
        line = {"event": event, "part": self.part, "case": self.case, **values}
        self._file.write(json.dumps(plain(line), allow_nan=False) + "\n")

    def announce(self, variant: str) -> None:
        """What runs next: if this process dies, that did it."""
        self.emit("variant", variant=variant)

    def row(self, **values: Any) -> None:
        self.rows.append(values)
        # The samples would make up most of a file that is read for its medians.
        self.emit("row", **{key: value for key, value in values.items() if key != "samples"})

    def crashed(self, variant: str) -> str | None:
        """How this variant ended an earlier process in this case, None if it did not."""
        crash = ("crash", self.case, variant)
        for event in self.history:
            if (event["event"], event["case"], event.get("variant")) == crash:
                return event["reason"]
        return None

    def failure(self, error: Exception) -> None:
        """Tell of an error; raises DeviceLost if nothing can go on after it."""
        text = "".join(traceback.format_exception(error))
        print(text, flush=True)
        timing.survive(error, self.device)
        self.emit("failure", error=text[-4000:])


def run(parts: Sequence[Part], context: Context, deadline: float) -> None:
    """All cases that the file does not know as done, until the deadline (of time.time())."""
    context.emit("machine", **machine.identity(context.device))
    context.peaks = machine.peaks(context.device, tiny=context.tiny)
    context.emit("peaks", peaks=context.peaks, clocks=context.clocks.since(0))
    finished = {event["part"] for event in context.history if event["event"] == "part"}
    parts = [part for part in parts if part.name not in finished]
    for index, part in enumerate(parts):
        rest = sum(later.share for later in parts[index:])
        end = time.time() + (deadline - time.time()) * part.share / rest
        context.part, context.case = part.name, ""
        _run_part(part, context, end)
    context.part = context.case = ""
    context.emit("finish")


def _run_part(part: Part, context: Context, end: float) -> None:
    ended = ("done", "failure", "skipped")
    done = {event["case"] for event in context.history if event["event"] in ended}
    crashes = [event for event in context.history if event["event"] == "crash"]
    begin = time.time()
    try:
        cases = part.cases(context.tiny)
    except Exception as error:  # the other parts go on
        context.failure(error)
        cases = []
    for case in cases:
        context.case = f"{part.name}/{case.name}"
        if context.case in done:
            continue
        ends = [event["variant"] for event in crashes if event["case"] == context.case]
        if len(ends) == ATTEMPTS or "" in ends:
            context.emit("skipped", reason="ended the process, see crashes")
        elif time.time() > end:
            context.emit("skipped", reason="out of time")
        else:
            _run_case(case, context)
    context.case = ""
    context.emit("part", seconds=time.time() - begin)


def _run_case(case: Case, context: Context) -> None:
    begin = time.time()
    context.emit("case")
    try:
        context.run(case)
    except Exception as error:  # the other cases go on, if the GPU does
        context.failure(error)
    else:
        context.emit("done", seconds=time.time() - begin)


@contextmanager
def readied(device: torch.device) -> Iterator[None]:
    """The process as timing on this device needs it."""
    if device.type != "cuda":
        yield
        return
    # The default stream cannot be captured, and a backward pass runs where its forward pass did.
    torch.cuda.set_stream(torch.cuda.Stream())
    with tuning.parallel_compilation(os.cpu_count() or 1):
        yield


def main(parts: Sequence[Part], device: str, events: Path, deadline: float) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu needs a GPU; --device cpu tries the script out at tiny shapes")
        sys.exit(REFUSED)
    context = Context(torch.device(device, 0), events)
    try:
        with readied(context.device):
            run(parts, context, deadline)
    except timing.DeviceLost as error:
        print(f"the GPU's context is broken: {error}", flush=True)
        os._exit(LOST)  # an orderly end would wait for the GPU
