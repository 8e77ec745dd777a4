"""`python -m bench.studies.weak_to_strong`: run the study on two processes, write its report.

results.json has every number, README.md and the pictures are made from it and from what was drawn. What
it does not decide is run again by `python -m bench.studies.weak_to_strong.seeds`; another study begins
without such runs.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.studies.weak_to_strong.__main__", "command")

from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import tyro

from bench.measure import machine
from bench.studies.weak_to_strong.experiments import (
    CPU,
    EXPERIMENTS,
    PROCESSES,
    TINY,
    Scale,
    recover,
    run,
)
from bench.studies.weak_to_strong.report import (
    contact_sheet,
    file_name,
    modulation_costs,
    write_report,
)
from pixart.files import write_json
from pixart.workers import pool

FOLDER = Path(__file__).parent


def main(output: Path | None = None, tiny: bool = False, processes: int = PROCESSES) -> int:
    """Measure the weak-to-strong claims on the embedded world.

    output: where results.json, README.md and the pictures go, this folder if left out. tiny: a few
    pictures and steps, to try the command out; wants an output. processes: experiments at the same
    time, each on one thread.
    """
    if tiny and (output is None or output.resolve() == FOLDER):
        raise ValueError(
            "--output must be given with --tiny, and be another folder than that of the committed study"
        )
    output = FOLDER if output is None else output
    began, scale = perf_counter(), TINY if tiny else Scale()
    output.mkdir(parents=True, exist_ok=True)
    one_thread = partial(torch.set_num_threads, 1)
    with TemporaryDirectory() as folder, pool(processes, one_thread) as workers:
        weights = Path(folder) / "dense.safetensors"
        workers.submit(recover, weights, scale).result()
        # The largest first, so that the processes end together.
        order = sorted(EXPERIMENTS, key=lambda one: -one.resolution)
        futures = {one.name: workers.submit(run, one, weights, scale) for one in order}
        found = [futures[one.name].result() for one in EXPERIMENTS]
    for one in found:
        contact_sheet(one.pop("pictures")).save(output / f"{file_name(one['name'])}.png")
    results = {
        "machine": machine.identity(CPU) | machine.revision(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": "make weak-to-strong",
        "seconds": round(perf_counter() - began),
        "processes": processes,
        "scale": {"images": scale.images, "recovery": scale.recovery},
        "experiments": found,
        "modulation": modulation_costs(),
    }
    write_json(output / "results.json", results, indent=1)
    write_report(output)
    print(output / "README.md")
    return 0


def command() -> int | None:
    """Run the command line."""
    return tyro.cli(main, prog="python -m bench.studies.weak_to_strong")
