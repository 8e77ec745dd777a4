"""Runs the parts of bench.gpu, case by case, and tells each event in one line of a file.

A case may break the GPU's context, or hang: then this process ends, bench.gpu starts it again with
the same file, and it goes on after what the file says, without the variant that was running.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.measure import machine, results, timing
from bench.measure.case import Case, Context, readied

ATTEMPTS = 3  # at one case
REFUSED = 2  # exit codes: this machine cannot run the parts at all;
LOST = 3  # the GPU's context is broken


class Part(NamedTuple):
    """share: of the time, relative to the parts after it. cases: most important first."""

    name: str
    share: float
    cases: Callable[[], Sequence[Case]]


def main(
    parts: Sequence[Part], device: str, events: Path, deadline: float, *, dry: bool = False
) -> None:
    """dry: whether a stub stands for the driver, and nothing is computed."""
    if device == "cuda" and not torch.cuda.is_available():
        print("this needs a GPU, and torch sees none; --dry-run tries it out as far as the driver")
        sys.exit(REFUSED)
    history = results.read_events(events)
    with open(events, "a", buffering=1, encoding="utf-8") as file:  # a line is kept when it ends

        def tell(event: dict[str, Any]) -> None:
            file.write(json.dumps(results.plain(event), allow_nan=False) + "\n")

        context = Context(torch.device(device, 0), tell, history)
        context.hurried, context.dry = True, dry
        context.seconds = 0.5 if device == "cuda" else 0.02
        try:
            with readied(context.device):
                run(parts, context, deadline)
        except timing.DeviceLost as error:
            print(f"the GPU's context is broken: {error}", flush=True)
            os._exit(LOST)  # an orderly end would wait for the GPU


def run(parts: Sequence[Part], context: Context, deadline: float) -> None:
    """All cases that the history does not know as done, until the deadline (of time.time())."""
    started = results.started("gpu", [], context.device, dry_run=context.device.type == "cpu")
    context.peaks = started["peaks"] = machine.peaks(context.device, tiny=started["dry_run"])
    context.emit("start", run=started, parts=[part.name for part in parts])
    finished = {event["part"] for event in context.history if event["event"] == "part"}
    left = [part for part in parts if part.name not in finished]
    for index, part in enumerate(left):
        rest = sum(later.share for later in left[index:])
        end = time.time() + (deadline - time.time()) * part.share / rest
        if context.dry:
            end = deadline
        context.part, context.case = part.name, ""
        _run_part(part, context, end)
    context.part = context.case = ""
    context.emit("finish")


def _run_part(part: Part, context: Context, end: float) -> None:
    own = [event for event in context.history if event["part"] == part.name]
    done = {event["case"] for event in own if event["event"] in ("done", "failure", "skipped")}
    crashes = [event for event in own if event["event"] == "crash"]
    try:
        cases = part.cases()
    except Exception as error:  # the other parts go on
        context.survive(error)
        cases = []
    for case in cases:
        context.case = case.name
        ends = [event["variant"] for event in crashes if event["case"] == case.name]
        if case.name in done:
            continue
        if len(ends) == ATTEMPTS or "" in ends:
            context.emit("skipped", reason="ended the process, see crashes")
        elif time.time() > end and not case.always:
            context.emit("skipped", reason="out of time")
        else:
            _run_case(case, context)
    context.case = ""
    context.emit("part")


def _run_case(case: Case, context: Context) -> None:
    context.case = case.name
    context.emit("case")
    try:
        context.run(context.part, case)
    except Exception as error:  # the other cases go on, if the GPU does
        context.survive(error)
    else:
        context.emit("done")
