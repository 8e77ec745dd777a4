"""Everything that only a GPU can tell, in one run: `python -m bench.gpu --out DIR [--minutes 8]`.

Correctness of every operator against fp64, each configuration of their kernels, every operator against
its peers, whole steps, and pictures: the cases of `pytest bench`, in a process that is started again
when it dies, and kept as they end. Writes DIR/gpu.json, complete at every moment for what is done so
far, and DIR/gpu.log; prints a page last. Needs torch and triton; peers that are not installed are told
as such. A failing or hanging case is told, and the rest goes on.
`--device cpu` runs the same at tiny shapes without a GPU, to try the script out.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.gpu")

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.measure import results
from bench.reporting import pages
from bench.workloads import sizes

# Of the time, in this order. Last what may leave something behind: a profiler.
SHARES = {
    "correctness": 0.22,
    "configurations": 0.1,
    "operators": 0.35,
    "steps": 0.26,
    "pictures": 0.05,
    "backends": 0.02,
}
STALL_SECONDS = 90  # without an event: a kernel hangs
GRACE_SECONDS = 20  # after the deadline, for the case that is running


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    if options.worker:
        return _work(options)
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    events, log = options.out / "gpu.jsonl", options.out / "gpu.log"
    events.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    began = time.time()
    deadline = began + 60 * options.minutes

    def save() -> results.Content | None:
        run = assemble(results.read_events(events), began, arguments)
        return None if run is None else results.save(options.out / "gpu.json", "gpu", run)

    command = [sys.executable, "-m", "bench.gpu", "--worker", *arguments]
    command += ["--out", str(options.out), "--deadline", str(deadline)]
    supervise(command, events, log, deadline, save)
    content = save()
    events.unlink(missing_ok=True)
    if content is None:
        print(log.read_text(encoding="utf-8")[-2000:])
        return 2
    print(pages.page(content, "gpu.json"))
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop (8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="parts to run (all)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _work(options: argparse.Namespace) -> int:
    from bench.measure import worker

    made = parts(tiny=options.device == "cpu")
    names = [name for name in SHARES if name in (options.only or SHARES)]
    chosen = [worker.Part(name, SHARES[name], made[name]) for name in names]
    worker.main(chosen, options.device, options.out / "gpu.jsonl", options.deadline)
    return 0


def parts(tiny: bool) -> dict[str, Callable[[], list[Any]]]:
    """The cases of each part, by its name. tiny: all at the tiny size, and few of them."""
    from bench.workloads import comparisons, models, pictures

    at = (sizes.TINY,) if tiny else sizes.GPU_SIZES
    denoised, trained = (at, at) if tiny else (("4k", "1k", "512", "2k"), ("1k", "512", "2k", "4k"))
    drawn = ("embedded",) if tiny else ("embedded", "1k")
    tuned = at if tiny else ("4k", "1k", "2k")
    return {
        "correctness": lambda: comparisons.correctness(at),
        "configurations": lambda: comparisons.configurations(tuned),
        "operators": lambda: comparisons.operators(at) + ([] if tiny else comparisons.further()),
        "steps": lambda: models.steps(denoised, trained),
        "pictures": lambda: [pictures.picture(model) for model in drawn],
        "backends": lambda: comparisons.backends(sizes.TINY if tiny else "1k"),
    }


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
    events: Iterable[dict[str, Any]], began: float, arguments: Sequence[str]
) -> dict[str, Any] | None:
    """The run of results; None if no worker came to measure anything. A case that was started again
    keeps its last rows only."""
    run: dict[str, Any] | None = None
    rows: dict[tuple[str, str], list[results.Row]] = {}
    for event in events:
        kind, place = event["event"], (event["part"], event["case"])
        if kind == "start":
            run = run or event["run"]
        elif kind == "case":
            rows[place] = []
        elif kind == "row":
            rows[place].append(event["row"])
        elif run is not None and kind == "finish":
            run["complete"] = True
        elif run is not None and kind in ("failure", "crash", "skipped"):
            run["unfinished"].append({"variant": "", **event})
    if run is not None:
        run["command"] = results.command("gpu", arguments)
        run["date"] = time.strftime(results.DATE, time.gmtime(began))
        run["rows"] = [row for case in rows.values() for row in case]
    return run
