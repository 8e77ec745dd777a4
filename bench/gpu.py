"""Everything that only a GPU can tell, in one run: `python -m bench.gpu --out DIR [--minutes 8]`.

Correctness of every operator against fp64, the machine's peaks, every operator against its peers,
whole denoising and training steps, and what tuning chose. Writes DIR/gpu.json, complete at every
moment for what is done so far, and DIR/gpu.log; prints a table last. Needs torch and triton; peers
that are not installed are told as such. A failing or hanging part is told, and the rest goes on.
`--device cpu` runs the same at tiny shapes without a GPU, to try the script out.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.reporting import summary

SCHEMA = 1
# Of the time, in this order.
SHARES = {"correctness": 0.22, "operators": 0.39, "steps": 0.27, "backends": 0.02, "tuning": 0.1}
STALL_SECONDS = 90  # without an event: a kernel hangs
GRACE_SECONDS = 20  # after the deadline, for the case that is running


def main(arguments: Sequence[str] | None = None) -> int:
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

    def save(complete: bool = False) -> dict[str, Any]:
        result = assemble(read_events(events), began, sys.argv[1:], complete)
        write(options.out / "gpu.json", result)
        return result

    command = [sys.executable, "-m", "bench.gpu", "--worker", "--device", options.device]
    command += ["--out", str(options.out), "--deadline", str(deadline)]
    command += ["--only", *options.only] if options.only else []
    supervise(command, events, log, deadline, save)
    result = save(complete=True)
    events.unlink(missing_ok=True)
    print(summary.render(result))
    if not result["machine"]:
        print(log.read_text(encoding="utf-8")[-2000:])
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.log")
    parser.add_argument("--minutes", type=float, default=8, help="when to stop (8)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--only", nargs="+", choices=SHARES, help="parts to run (all)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _work(options: argparse.Namespace) -> int:
    from bench.measure import worker
    from bench.workloads import comparisons, models

    makers = {
        "correctness": comparisons.correctness,
        "operators": comparisons.operators,
        "steps": models.steps,
        "backends": comparisons.backends,
        "tuning": comparisons.tuned,
    }
    names = [name for name in SHARES if name in (options.only or SHARES)]
    chosen = [worker.Part(name, SHARES[name], makers[name]) for name in names]
    worker.main(chosen, options.device, options.out / "gpu.jsonl", options.deadline)
    return 0


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
        known = len(read_events(events))
        with open(log, "a", encoding="utf-8") as output:
            worker = subprocess.Popen(
                list(command), stdout=output, stderr=output, start_new_session=True
            )
        try:
            reason = _watch(worker, events, deadline, save, stall_seconds)
        finally:
            _end(worker)
        seen = read_events(events)
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
            size, moved, patience = events.stat().st_size, now, stall_seconds
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
            active = event["event"] == "case"
            running = {
                "part": event["part"],
                "case": event["case"] if active else "",
                "variant": "",
            }
    line = {"event": "crash", "reason": reason, "log": log.read_text("utf-8")[-2000:], **running}
    text = events.read_bytes() if events.exists() else b""
    with open(events, "a", encoding="utf-8") as file:
        file.write(("\n" if text and not text.endswith(b"\n") else "") + json.dumps(line) + "\n")


def read_events(path: Path) -> list[dict[str, Any]]:
    """A worker may have died in the middle of a line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def assemble(
    events: Sequence[dict[str, Any]], began: float, arguments: Sequence[str], complete: bool
) -> dict[str, Any]:
    """What bench.report reads. A case that was started again keeps its last rows only."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": " ".join(["python -m bench.gpu", *arguments]),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.time() - began, 1),
        "complete": complete,  # came to its end, whatever failed on the way
        "machine": {},
        "peaks": [],
        "parts": {},
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    problems: dict[str, list[dict[str, Any]]] = {"failure": [], "crash": [], "skipped": []}
    for event in events:
        kind, case = event["event"], event.get("case", "")
        values = {key: value for key, value in event.items() if key != "event"}
        if kind == "machine":
            result["machine"] = {key: values[key] for key in values if key not in ("part", "case")}
        elif kind == "peaks":
            result["peaks"].append(values["peaks"] | {"clocks": values["clocks"]})
        elif kind == "case":
            rows[case] = []
        elif kind == "row":
            rows[case].append(values | {"peaks": len(result["peaks"]) - 1})
        elif kind == "part":
            part = result["parts"].setdefault(event["part"], {"seconds": 0.0})
            part["seconds"] = round(part["seconds"] + event["seconds"], 1)
        elif kind in problems:
            problems[kind].append(values)
    result["dry_run"] = result["machine"].get("device") == "cpu"
    result["rows"] = [row for case in rows.values() for row in case]
    return result | {
        "failures": problems["failure"],
        "crashes": problems["crash"],
        "skipped": problems["skipped"],
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Aside, then renamed: a file is whole or is not there."""
    aside = path.with_suffix(".json.part")
    aside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
