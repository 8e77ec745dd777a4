"""`python -m bench.studies.weak_to_strong.seeds`: run what one run did not decide again, several times.

The rows are those that the report of results.json calls not decided; what they compare is trained again
with seeds 1, 2, 3. A run is kept in repeats/ as it ends, and what is there is not run again: after an
interruption the same command goes on, on another machine too, but for a seed that was not whole there.
results.json keeps its numbers and has the new ones beside them.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.studies.weak_to_strong.seeds", "command")

import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro

from bench.measure import machine
from bench.studies.weak_to_strong.claims import Claim, Results, undecided
from bench.studies.weak_to_strong.experiments import (
    CPU,
    EXPERIMENTS,
    PROCESSES,
    TINY,
    Experiment,
    Scale,
    recover,
    repeat,
)
from bench.studies.weak_to_strong.report import file_name, write_report
from pixart.files import read_json, sha256_of, write_json
from pixart.workers import pool

FOLDER = Path(__file__).parent
WORK = FOLDER / "repeats"  # git ignores the weights in it
Kept = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """An experiment with a seed, and where it is kept."""

    experiment: Experiment
    seed: int
    file: Path

    @property
    def name(self) -> str:
        return f"{self.experiment.name}, seed {self.seed}"


def main(
    output: Path = FOLDER,
    work: Path = WORK,
    seeds: int = 3,
    processes: int = PROCESSES,
    tiny: bool = False,
    dry_run: bool = False,
) -> int:
    """Run again what the study did not decide, and write its report anew.

    output: where results.json of the study is, README.md too. work: where finished runs are kept.
    seeds: runs of each experiment. processes: runs at the same time, each on one thread. tiny: a few
    pictures and steps, for a study that was tiny too. dry_run: only say what is to be run, and how
    long it takes.
    """
    if seeds < 2:
        raise ValueError(f"--seeds must be at least 2, or there is no spread to see, got {seeds}")
    if processes < 1:
        raise ValueError(f"--processes must be at least 1, got {processes}")
    scale, file = TINY if tiny else Scale(), output / "results.json"
    results = read_json(file)
    _check_scale(results, scale, file)
    claims = undecided(results)
    if not claims:
        print(f"{file}: every row is decided")
        return 0
    runs = _runs(claims, work, seeds)
    start = _kept_start(work, scale)
    kept = _kept_runs(runs, scale, start)
    lacks_start = start is None and len(kept) < len(runs)
    print(_plan(results, claims, runs, kept, lacks_start, processes))
    if dry_run:
        return 0
    work.mkdir(parents=True, exist_ok=True)
    kept = _run_all(runs, kept, start, work, scale, processes)
    results["repeats"] = _repeats([kept[run.name] for run in runs], read_json(work / "start.json"))
    write_json(file, results, indent=1)
    write_report(output)
    print(output / "README.md")
    return 0


def _check_scale(results: Results, scale: Scale, file: Path) -> None:
    """Raise ValueError for a study of another scale: its rows would be judged by other scenes."""
    marks = results["experiments"][0]["marks"]
    found = {
        **results["scale"],
        "marks": [mark["step"] for mark in marks],
        "scenes": len(marks[0]["losses"]),
    }
    for name, value in found.items():
        wanted = asdict(scale)[name]
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if value != wanted:
            raise ValueError(
                f"{file} must be of a study with {name} {wanted}, got {value}; "
                "name another --output, or leave --tiny out or in as it was there"
            )


def _runs(claims: Sequence[Claim], work: Path, seeds: int) -> list[Run]:
    """All that the claims compare, with every seed."""
    names = {name for claim in claims for name in (claim.low, claim.high)}
    return [
        Run(one, seed, work / f"{file_name(one.name)}-{seed}.json")
        for one in EXPERIMENTS
        if one.name in names
        for seed in range(1, seeds + 1)
    ]


def _kept_start(work: Path, scale: Scale) -> Kept | None:
    """What is known of the weights in the folder, None if there are none. Raises ValueError for those
    of another scale."""
    file = work / "start.json"
    if not file.exists() or not (work / "dense.safetensors").exists():
        return None
    start = read_json(file)
    _expect_same(file, start, {"scale": _plain(scale)})
    _expect_same(file, start, {"weights": sha256_of(work / "dense.safetensors")})
    return start


def _kept_runs(runs: Sequence[Run], scale: Scale, start: Kept | None) -> dict[str, Kept]:
    """Finished runs that count, by name. A seed's are compared with each other, so they must begin from the
    same weights: those in the folder, or others if all of the seed's are there. Raises ValueError for those
    of another scale."""
    kept: dict[str, Kept] = {}
    for seed in {run.seed for run in runs}:
        own = [run for run in runs if run.seed == seed]
        found = {run.name: one for run in own if (one := _kept(run, scale)) is not None}
        begun = {one["weights"] for one in found.values()}
        if len(found) < len(own) or len(begun) > 1:
            begun = {start["weights"]} if start else set()
        kept |= {name: one for name, one in found.items() if one["weights"] in begun}
    return kept


def _kept(run: Run, scale: Scale) -> Kept | None:
    """A finished run, None if there is none. Raises ValueError for one of another scale."""
    if not run.file.exists():
        return None
    found = read_json(run.file)
    wanted = {"name": run.experiment.name, "seed": run.seed, "scale": _plain(scale)}
    _expect_same(run.file, found, wanted)
    return found


def _expect_same(file: Path, found: Kept, wanted: Kept) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{file}: must have {name} {value}, got {found.get(name)}; "
                "name another --work, or remove that folder to begin anew"
            )


def _plain(scale: Scale) -> Kept:
    """As JSON has it."""
    return {**asdict(scale), "marks": list(scale.marks)}


def _plan(
    results: Results,
    claims: Sequence[Claim],
    runs: Sequence[Run],
    kept: dict[str, Kept],
    with_start: bool,
    processes: int,
) -> str:
    """The rows, and the CPU time of what is still to be run.

    A run is taken to cost what finished ones did on average, before there are any what the first
    study's did: at most that, as it also drew pictures, and larger ones.
    """
    if kept:
        each, source = fmean(one["cpu_seconds"] for one in kept.values()), "those that are finished"
    else:
        # One job more than experiments: the start.
        jobs = len(results["experiments"]) + 1
        each = results["seconds"] * results.get("processes", PROCESSES) / jobs
        source = f"the first study's {results['seconds'] / 60:.0f} minutes"
    left = [run for run in runs if run.name not in kept]
    lines = ["Not decided by one run:"]
    for claim in claims:
        own = sum(run.experiment.name in (claim.low, claim.high) for run in left)
        lines.append(
            f"  “{claim.low}” against “{claim.high}”: {own} runs, {own * each / 60:.0f} CPU-minutes"
        )
    rounds = -(-len(left) // processes)
    wall, spent = (rounds + with_start) * each / 60, (len(left) + with_start) * each / 60
    lines.append(
        f"Rows share runs: {len(left)} of {len(runs)} runs are left{' and the start' * with_start}, "
        f"{spent:.0f} CPU-minutes by {source}; {wall:.0f} minutes with {processes} processes on as "
        "many idle cores."
    )
    return "\n".join(lines)


def _run_all(
    runs: Sequence[Run],
    kept: dict[str, Kept],
    start: Kept | None,
    work: Path,
    scale: Scale,
    processes: int,
) -> dict[str, Kept]:
    """Those that are missing, each kept as it ends; all by name."""
    kept, weights = dict(kept), work / "dense.safetensors"
    if len(kept) == len(runs):
        return kept
    with pool(processes, partial(torch.set_num_threads, 1)) as workers:
        if start is None:
            start = workers.submit(_recover, weights, scale).result()
            print(f"the start: {start['cpu_seconds'] / 60:.1f} CPU-minutes", flush=True)
        # A seed after the other: whatever ends it, whole seeds are there. Larger pictures first.
        order = sorted(runs, key=lambda run: (run.seed, -run.experiment.resolution))
        futures = {
            workers.submit(_measure, run, weights, scale): run.name
            for run in order
            if run.name not in kept
        }
        for future in as_completed(futures):
            one = kept[futures[future]] = future.result()
            last = one["marks"][-1]
            print(
                f"{futures[future]}: loss {fmean(last['losses']):.5f} at step {last['step']}, "
                f"{one['cpu_seconds'] / 60:.1f} CPU-minutes; {len(kept)} of {len(runs)}",
                flush=True,
            )
    return kept


def _recover(weights: Path, scale: Scale) -> Kept:
    """Make the weights that all begin from, and say which they are."""
    began = time.process_time()
    recover(weights, scale)
    start = {
        "scale": _plain(scale),
        "weights": sha256_of(weights),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    write_json(weights.with_name("start.json"), start)
    return start


def _measure(run: Run, weights: Path, scale: Scale) -> Kept:
    """Make a run and keep it."""
    known = {
        "scale": _plain(scale),
        "weights": sha256_of(weights),
        "sources": machine.source_hash(),
    }
    found = repeat(run.experiment, weights, scale, run.seed) | known
    write_json(run.file, found)
    return found


def _repeats(kept: Sequence[Kept], start: Kept) -> Kept:
    """What results.json holds of the runs."""
    apart = ("scale", "weights", "sources")
    return {
        "machine": machine.identity(CPU) | machine.revision(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "make weak-to-strong-seeds",
        "sources": sorted({one["sources"] for one in kept}),
        "cpu_seconds": round(start["cpu_seconds"] + sum(one["cpu_seconds"] for one in kept)),
        "runs": [{key: one[key] for key in one if key not in apart} for one in kept],
    }


def command() -> int | None:
    """Run the command line."""
    return tyro.cli(main, prog="python -m bench.studies.weak_to_strong.seeds")
