"""Writes the embedded model's card from its run, that of its conversion, and the accuracy measured of
both, so that no figure in it is typed, and draws its sheet of pictures:
`python -m bench.reporting.card RUN CONVERTED MODEL`."""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.reporting.card", "command")

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import tyro

from bench.reporting.text import TEMPLATES, fill, table
from pixart.evaluation import caption_accuracy
from pixart.evaluation.caption_accuracy import Task
from pixart.evaluation.options import SAMPLING
from pixart.files import parse_json, write_bytes
from pixart.generation.sheet import Cell, draw_sheet
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.training.recipe import load_recipe

TEMPLATE = TEMPLATES / "card.md"
# The sheet: the first captions of each set that accuracy is measured on, not the best of them.
SHEET = (
    Task("one", 256, count=4),
    Task("pair", 256, count=4),
    Task("group", 256, count=4),
    Task("one", 256, held_out=True, count=2),
    Task("pair", 256, held_out=True, count=2),
)


class Ended(NamedTuple):
    """What a stage's log ends with."""

    stage: str
    steps: int
    loss: float


def copy_logs(recipe: str, run: Path, logs: Path) -> list[Ended]:
    """Copies the log of every stage of a run to the folder `logs`."""
    logs.mkdir(exist_ok=True)
    ended = []
    for stage in load_recipe(recipe):
        log = Path(shutil.copy(run / stage.name / "log.jsonl", logs / f"{stage.name}.jsonl"))
        lines = [
            parse_json(line, str(log)) for line in log.read_text(encoding="utf-8").splitlines()
        ]
        last = [line for line in lines if "loss" in line][-1]
        ended.append(Ended(stage.name, last["step"], last["loss"]))
    return ended


def write_sheet(model: Path, settings: Mapping[str, Any]) -> None:
    """Draw MODEL/sheet.png, with the seeds and settings of its accuracy."""
    like = Request("", seed=settings["seed"], **{name: settings[name] for name in SAMPLING})
    asked = [one for task in SHEET for one in caption_accuracy.requests(task, like)]
    pipe = Pipeline.from_pretrained(model, device="cpu", cache_dir=None)
    with TemporaryDirectory() as folder:
        cells = []
        for number, drawn in enumerate(pipe.draw_many(asked, batch=len(asked))):
            path = Path(folder) / f"{number}.png"
            drawn.image.save(path)
            cells.append(Cell(path, drawn.request, {}))
        draw_sheet(cells).save(model / "sheet.png", optimize=True)


def _option(name: str, value: object) -> str:
    words = " ".join(map(str, value)) if isinstance(value, list) else value
    return f"--{name.replace('_', '-')} {words}"


def _in_words(settings: Mapping[str, Any]) -> str:
    first, last = settings["guidance_interval"]
    part = "" if (first, last) == (0, 1) else f" from {first:g} to {last:g} of the way"
    return f"{settings['steps']} steps and guidance {settings['guidance']:g}{part}"


def main(
    run: tyro.conf.Positional[Path],
    converted: tyro.conf.Positional[Path],
    model: tyro.conf.Positional[Path],
) -> None:
    """Write MODEL/README.md, MODEL/log and MODEL/sheet.png from the runs of `shapes` and of `shapes-kv`,
    from what pixart.evaluate wrote to MODEL/accuracy.json and accuracy-shapes-kv.json, and from MODEL."""
    stages = copy_logs("shapes", run, model / "log")
    (conversion,) = copy_logs("shapes-kv", converted, model / "log")
    settings, before = caption_accuracy.read_report(model / "accuracy.json")
    settings_after, after = caption_accuracy.read_report(model / "accuracy-shapes-kv.json")
    if settings != settings_after:
        sys.exit(f"both must be measured alike, got {settings} and {settings_after}")
    write_sheet(model, settings)
    options = " ".join(_option(name, settings[name]) for name in ("seed", *SAMPLING, "dtype"))
    count = max(result.of for result in before)
    rows = [[one.stage, str(one.steps), f"{one.loss:.4f}"] for one in stages]
    parts = {
        "SAMPLING": _in_words(settings),
        "STAGES": table(("stage", "steps", "last loss"), rows),
        "TABLE": caption_accuracy.table(before),
        "COMMAND": f"python -m pixart.evaluate accuracy --count {count} {options}",
        "CONVERSION": f"{conversion.steps} steps, last loss {conversion.loss:.4f}",
        "CONVERTED": caption_accuracy.table(after),
    }
    write_bytes(model / "README.md", fill(TEMPLATE, parts).encode())


def command() -> int | None:
    """Run the command line."""
    return tyro.cli(main, prog="python -m bench.reporting.card")
