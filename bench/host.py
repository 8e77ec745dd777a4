"""`python -m bench.host [--json FILE]`: how long a call keeps the host busy, without a GPU.

A stub stands for the CUDA driver (bench/compiled/stub_driver.py): a call of an operator passes all that it
passes on a GPU, and no kernel runs. What the real driver itself takes is missing.
Times are CPU time of one thread, and the least counts: the rest is what else the machine does. `--before`
measures an earlier revision, checked out somewhere, by the same calls.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.host")

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from bench.command import told
from bench.compiled import host_worker, stub_driver
from bench.compiled.host_worker import (
    BACKWARD,
    EAGER,
    FORWARD,
    LAYER_NORM,
    MODEL,
    OURS,
    PASSES,
    RECORDING,
    ROOT,
    THEIRS,
)
from bench.measure import results
from bench.measure.case import Case, Context, failed

OPERATORS = (
    "flash_attention self",
    "flash_attention cross",
    "flash_attention bounded",
    "modulate",
    "gate_add",
    "gate_add_modulate",
    "compress_kv",
)
PART = "host"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    device = torch.device("cpu")
    run = results.started(PART, typed, device)
    context = Context(device)
    context.seconds, context.least_rounds = options.seconds, options.rounds
    for what in ("operators", "model") if options.model else ("operators",):
        for case in cases(what, options.before):
            run["rows"] += context.run(PART, case)
    run["complete"] = True
    content = results.save(options.json, PART, run)
    return told(content, run, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, help="file to keep the result in, beside earlier runs'")
    add("--model", action="store_true", help="a model of 28 small blocks, too, and diffusers'")
    add("--before", type=Path, metavar="CHECKOUT", help="of an earlier revision, to measure too")
    add("--rounds", type=int, default=20, help="how often to time each, at least (20)")
    add("--seconds", type=float, default=1, help="go on timing each for so long (1)")
    options = parser.parse_args(arguments)
    if options.before and not (options.before / "kernels" / "pixart_kernels").is_dir():
        parser.error(f"--before must be a checkout of this project, got {options.before}")
    return options


def cases(what: str, before: Path | None = None) -> list[Case]:
    """Of "operators" or of the "model"."""
    return operators(before) if what == "operators" else models(before)


def operators(before: Path | None = None) -> list[Case]:
    """Each operator without gradients, recording one, and backward."""
    found = [_case(LAYER_NORM, ("torch",), {}, None)]
    for way in (FORWARD, RECORDING, BACKWARD):
        for name in OPERATORS:
            tokens = 2048 if "bounded" in name else 16
            found.append(_case(f"{name} {way}", (OURS,), {"tokens": tokens}, before))
    return found


def models(before: Path | None = None) -> list[Case]:
    """A step of the model with our operators, with their references, and of diffusers' model."""
    found = []
    for way, names in zip(PASSES, ((OURS, EAGER, THEIRS), (OURS, EAGER)), strict=True):
        found.append(_case(f"{MODEL}, {way}", names, {"tokens": 16}, before))
    return found


def _case(name: str, variants: tuple[str, ...], shape: dict[str, int], before: Path | None) -> Case:
    if before is not None:
        variants = (*variants, _called(before))
    return Case(name, partial(_measure, name, variants, shape, before), variants)


def _called(tree: Path) -> str:
    """ "ours at b775c57", after the commit that is checked out there."""
    command = ["git", "rev-parse", "--short=7", "HEAD"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    return f"{OURS} at {done.stdout.strip() or tree.name}"


_started = lru_cache(host_worker.start)  # one process measures many cases


def _measure(
    name: str,
    variants: tuple[str, ...],
    shape: dict[str, int],
    before: Path | None,
    context: Context,
) -> None:
    how = "model" if name.startswith(MODEL) else "operators"
    how_long = context.seconds, context.least_rounds or 5
    found, absent = {}, "not installed"  # diffusers, of which the worker says nothing then
    try:
        stub_driver.build()
        found = _started(how, *how_long, ROOT)[name]
        if before is not None:
            found = {**found, _called(before): _started(how, *how_long, before)[name][OURS]}
    except stub_driver.NoCompiler as reason:
        absent = str(reason)
    except RuntimeError as error:
        absent = failed(error)
    described: dict[str, Any] = {
        "what": f"{PART}: {name}",
        "shape": {"batch": 1, **shape},
        "dtype": "bfloat16",
    }
    for variant in context.choose(dict.fromkeys(variants)):
        if variant in found:
            context.row(variant, **described, **found[variant])
        else:
            context.row(variant, absent, **described)
