"""`python -m bench.studies.editing`: do pictures made from pictures hold what they promise?

Draws with the embedded model, and judges with the exact checker: pictures moved, inpainted, recoloured,
outpainted, drawn larger and drawn under every kind of guidance. --out keeps every verdict, and the
pictures that others are made of: what is there is not drawn again. It is kept/ unless another folder is named;
verdicts of an experiment that is not whole are committed there, and another machine goes on with them.
--write puts the figures into bench/results/, of which `python -m bench.report` makes the page. --pictures
draws those of the guide, into --out.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.studies.editing.__main__")

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import results
from bench.measure.machine import ROOT
from bench.studies.editing.experiments import EXPERIMENTS
from bench.studies.editing.record import Record, row
from bench.studies.editing.sheets import SHEETS, draw_sheets
from bench.studies.editing.studio import Studio
from pixart.config import EMBEDDED
from pixart.files import write_json
from pixart.pipeline.text_to_image import Pipeline

KIND = "studies.editing"
RESULTS = ROOT / "bench" / "results" / "editing.json"
KEPT = Path(__file__).parent / "kept"  # git ignores the pictures in it
STEPS, COUNT = 20, 300


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{KIND}", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="folder for verdicts and pictures (kept/ beside this file)")
    add("--count", type=int, default=COUNT, help=f"cases of each setting ({COUNT})")
    add("--only", help=f"some of {','.join(EXPERIMENTS)}")
    add("--settings", help="some of its settings, between semicolons")
    add("--steps", type=int, default=STEPS, help=f"of every picture ({STEPS})")
    add("--batch", type=int, default=8, help="pictures denoised in one pass (8)")
    add("--threads", type=int, default=1, help="of PyTorch (1)")
    add("--control", help="a ControlNet of outlines, as the recipe shapes-control trains it")
    add("--write", action="store_true", help=f"what DIR holds into {RESULTS.relative_to(ROOT)}")
    add("--pictures", action="store_true", help="those of the guide, instead of measuring")
    options = parser.parse_args(arguments)
    if options.pictures and options.out is None:
        raise ValueError("--out must be a folder for the pictures of --pictures, got none")
    options.out = options.out or KEPT
    known = SHEETS if options.pictures else EXPERIMENTS
    names = options.only.split(",") if options.only else list(known)
    if not options.only and options.control is None:
        names.remove("control")
    if "control" in names and options.control is None and not options.write:
        raise ValueError(
            "--control must be given for control, got none; train one with shapes-control"
        )
    for name in names:
        if name not in known:
            raise ValueError(f"--only must be of {', '.join(known)}, got {name!r}")
    torch.set_num_threads(options.threads)
    if options.write:
        return _write(options.out, names)
    control = [options.control] if options.control else []
    pipe = Pipeline.from_pretrained(EMBEDDED, control=control, device="cpu", cache_dir=None)
    studio = Studio(pipe, options.out, options.steps, options.batch)
    if options.pictures:
        draw_sheets(studio, options.out, names)
        return 0
    typed = list(sys.argv[1:] if arguments is None else arguments)
    for name in names:
        chosen = options.settings.split(";") if options.settings else EXPERIMENTS[name].settings
        run = results.started(KIND, typed, torch.device("cpu"))
        _measure(studio, name, chosen, options.count, run)
    return 0


def _measure(
    studio: Studio, name: str, settings: Sequence[str], count: int, run: results.Content
) -> None:
    """The cases that are missing, some of every setting in turn."""
    experiment = EXPERIMENTS[name]
    for setting in settings:
        if setting not in experiment.settings:
            known = ", ".join(experiment.settings)
            raise ValueError(f"--settings of {name} must be of {known}, got {setting!r}")
    record = Record.open(studio.folder, name, studio.steps, run)
    for end in [*range(experiment.at_once, count, experiment.at_once), count]:
        for setting in settings:
            numbers = range(record.count(setting), end)
            if numbers:
                began = time.monotonic()
                found = experiment.measure(studio, setting, numbers)
                record.add(setting, found, time.monotonic() - began)
        print(f"{name}: {end} of {count}", flush=True)


def _write(folder: Path, names: Sequence[str]) -> int:
    """A run for each experiment that the folder holds, in the place of earlier ones of the same settings."""
    files = [folder / f"{name}.json" for name in names]
    records = {file.stem: Record.read(file) for file in files if file.exists()}
    if not records:
        raise ValueError(f"--out must hold verdicts, got {folder}; measure first, without --write")
    content = results.read(RESULTS) if RESULTS.exists() else None
    for name, record in records.items():
        side = EXPERIMENTS[name].side
        rows = [row(name, setting, found, side) for setting, found in record.verdicts.items()]
        is_whole = all(one["cases"] >= COUNT for one in rows)
        run = {**record.run, "rows": rows, "complete": is_whole}
        content = results.merged(content, KIND, results.plain(run), one_machine=False)
    write_json(RESULTS, content, indent=1)
    print(f"{RESULTS}\nrun python -m bench.report")
    return 0
