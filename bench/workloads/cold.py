"""A picture of the embedded model from a process that is started for it: what imports, opening and drawing take.

CPU seconds of the process, user and system: what else the machine does meanwhile adds little to them. The files
are in memory before, since each variant runs once that is not counted.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.measure import machine, timing
from bench.measure.case import Case, Context, measured
from bench.measure.results import Row

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle on white"
OURS = "ours"
IMPORT = f"{OURS}, PyTorch's import alone"  # no peer to be compared with


def case(before: Path | None = None) -> Case:
    """before: a checkout of an earlier revision, to draw with too."""
    trees = {OURS: ROOT} | ({f"{OURS} at {_revision(before)}": before} if before else {})
    return Case("cold", partial(_measure, trees), (*trees, IMPORT))


def _measure(trees: dict[str, Path], context: Context) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "picture.png")
        draw = ["-m", "pixart.generate", PROMPT, "--overwrite", "--quiet", "--output", output]
        calls = {name: partial(_started, draw, tree) for name, tree in trees.items()}
        calls[IMPORT] = partial(_started, ["-c", "import torch"], ROOT)
        calls = dict(context.choose(calls))
        samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(max(context.least_rounds or 3, 1) + 1):
            for name, call in calls.items():  # in turn
                samples[name].append(call())
    for name, found in samples.items():
        spent, waited = (timing.summarize(times, "CPU") for times in zip(*found[1:], strict=True))
        row: Row = {
            "what": "picture from a cold process", "dtype": "float32",
            "shape": {"size": "128", "batch": 1, "tokens": 64},
        }  # fmt: skip
        wall = waited._replace(method="wall").summary()
        context.row(name, **row, **measured(context, spent), seconds_of_wall=wall)


def _started(command: Sequence[str], tree: Path) -> tuple[float, float]:
    """CPU and wall seconds of a Python process in a checkout."""
    paths = os.pathsep.join((str(tree), str(tree / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("GOMP_SPINCOUNT", None)  # ours, which each is to set by itself
    began, before = machine.Moment(), os.times()
    subprocess.run(
        [sys.executable, *command], cwd=tree, env=environment, check=True, capture_output=True
    )
    after, ended = os.times(), machine.Moment()
    spent = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    return spent, ended.wall - began.wall


def _revision(tree: Path) -> str:
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    return done.stdout.strip() or tree.name
