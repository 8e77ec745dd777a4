"""Runs a worker (worker.py) until it is through: a case that hangs or dies is told, and the rest goes on."""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.measure import results

STALL_SECONDS = 90  # without an event: a kernel hangs
GRACE_SECONDS = 20  # after the deadline, for the case that is running


def add_worker_options(parser: argparse.ArgumentParser) -> None:
    """What a command tells the worker that it is."""
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--events", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)


def measure(
    kind: str, arguments: Sequence[str], path: Path | None, minutes: float
) -> tuple[results.Content | None, str]:
    """Run `python -m bench.KIND --worker` with these arguments for so long. Results, kept in the file
    while it runs, and the end of what was printed; its log stays beside the file. None if no worker
    came to measure anything."""
    with tempfile.TemporaryDirectory() as folder:
        events = Path(folder) / "events.jsonl"
        log = Path(folder) / "log" if path is None else path.resolve().with_suffix(".log")
        log.unlink(missing_ok=True)
        began = time.time()
        deadline = began + 60 * minutes

        def save(ended: bool = False) -> results.Content | None:
            run = assemble(results.read_events(events), kind, began, arguments, ended=ended)
            return None if run is None else results.save(path, "gpu", run)

        command = [sys.executable, "-m", f"bench.{kind}", *arguments]
        command += ["--worker", "--events", str(events), "--deadline", str(deadline)]
        supervise(command, events, log, deadline, save)
        return save(ended=True), log.read_text(encoding="utf-8")[-2000:]


def supervise(
    command: Sequence[str],
    events: Path,
    log: Path,
    deadline: float,
    save: Callable[[], object],
    stall_seconds: float = STALL_SECONDS,
) -> None:
    """Run the worker until it is through or out of time, starting it again when it dies.

    It goes on after what its file of events says. One that dies without having begun anything new
    is not started again.
    """
    while True:
        known = len(results.read_events(events))
        with open(log, "a", encoding="utf-8") as output:
            worker = subprocess.Popen(
                list(command), stdout=output, stderr=output, start_new_session=True
            )
        try:
            reason = _watch(worker, events, deadline, save, stall_seconds)
        finally:
            _end(worker)
        seen = results.read_events(events)
        if any(event["event"] == "finish" for event in seen):
            return
        _tell_crash(events, seen, reason, log)
        if time.time() > deadline or not any(e["event"] == "case" for e in seen[known:]):
            return


def _watch(
    worker: subprocess.Popen[bytes],
    events: Path,
    deadline: float,
    save: Callable[[], object],
    stall_seconds: float,
) -> str:
    """Why the worker is no more, or should be no more."""
    size = events.stat().st_size if events.exists() else 0
    moved = saved = time.time()
    patience = 4 * stall_seconds  # until its first sign of life: it imports, and starts the GPU
    while worker.poll() is None:
        now = time.time()
        if events.exists() and events.stat().st_size != size:
            size, moved = events.stat().st_size, now
            patience = max(_announced(events), stall_seconds)
        if now - moved > patience:
            return f"hung: nothing for {patience:.0f} s"
        if now > deadline + GRACE_SECONDS:
            return "out of time"
        if now - saved > 5:
            save()
            saved = now
        time.sleep(0.1)
    code = worker.returncode
    return f"died: signal {-code}" if code < 0 else f"died: exit code {code}"


def _announced(events: Path) -> float:
    """For how many seconds what runs now said that it may be silent, 0 if it did not."""
    seen = results.read_events(events)
    return float(seen[-1].get("patience", 0)) if seen else 0


def _end(worker: subprocess.Popen[bytes]) -> None:
    """The worker and the compilers that it started: it leads a process group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()


def _tell_crash(events: Path, seen: list[dict[str, Any]], reason: str, log: Path) -> None:
    """In the file of events, with the case and the variant that were running."""
    running: dict[str, str] = {"part": "", "case": "", "variant": ""}
    for event in seen:
        if event["event"] == "variant":
            running["variant"] = event["variant"]
        elif event["event"] in ("case", "done", "failure", "crash"):
            case = event["case"] if event["event"] == "case" else ""
            running = {"part": event["part"], "case": case, "variant": ""}
    line = {"event": "crash", "reason": reason, "log": log.read_text("utf-8")[-2000:], **running}
    text = events.read_bytes() if events.exists() else b""
    with open(events, "a", encoding="utf-8") as file:
        file.write(("\n" if text and not text.endswith(b"\n") else "") + json.dumps(line) + "\n")


def assemble(
    events: Iterable[dict[str, Any]],
    kind: str,
    began: float,
    arguments: Sequence[str],
    *,
    ended: bool = True,
) -> dict[str, Any] | None:
    """The run of results; None if no worker came to measure anything. A case that was started again
    keeps its last rows only. ended: whether parts that no event speaks of were skipped."""
    run: dict[str, Any] | None = None
    rows: dict[tuple[str, str], list[results.Row]] = {}
    left: dict[str, None] = {}
    for event in events:
        kind_of, place = event["event"], (event["part"], event["case"])
        if kind_of == "start":
            run = run or event["run"]
            left = left or dict.fromkeys(event.get("parts", ()))
        elif kind_of == "case":
            rows[place] = []
        elif kind_of == "row":
            rows[place].append(event["row"])
        elif kind_of == "part":
            left.pop(event["part"], None)
        elif run is not None and kind_of == "finish":
            run["complete"] = True
        elif run is not None and kind_of in ("failure", "crash", "skipped"):
            run["unfinished"].append({"variant": "", **event})
    if run is not None:
        told = {"event": "skipped", "case": "what was left of it", "variant": ""}
        for part in left if ended else ():
            run["unfinished"].append({**told, "part": part, "reason": f"out of time: {part}"})
        run["command"] = results.command(kind, arguments)
        run["date"] = time.strftime(results.DATE, time.gmtime(began))
        run["rows"] = [row for case in rows.values() for row in case]
    return run
