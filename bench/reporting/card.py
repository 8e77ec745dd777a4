"""Writes the embedded model's card from its run, that of its conversion, and the accuracy measured of
both, so that no figure in it is typed: `python -m bench.reporting.card RUN CONVERTED MODEL`."""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.reporting.card", "command")

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import tyro

from bench.reporting.text import TEMPLATES, fill, table
from pixart.evaluation import caption_accuracy
from pixart.files import parse_json, write_bytes
from pixart.training.recipe import load_recipe

TEMPLATE = TEMPLATES / "card.md"


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


def main(
    run: tyro.conf.Positional[Path],
    converted: tyro.conf.Positional[Path],
    model: tyro.conf.Positional[Path],
) -> None:
    """Write MODEL/README.md and MODEL/log from the runs of `shapes` and of `shapes-kv`, and from
    what pixart.evaluate wrote to MODEL/accuracy.json and accuracy-shapes-kv.json."""
    stages = copy_logs("shapes", run, model / "log")
    (conversion,) = copy_logs("shapes-kv", converted, model / "log")
    settings, before = caption_accuracy.read_report(model / "accuracy.json")
    settings_after, after = caption_accuracy.read_report(model / "accuracy-shapes-kv.json")
    if settings != settings_after:
        sys.exit(f"both must be measured alike, got {settings} and {settings_after}")
    options = " ".join(f"--{key} {settings[key]}" for key in ("seed", "steps", "guidance", "dtype"))
    count = max(result.of for result in before)
    rows = [[one.stage, str(one.steps), f"{one.loss:.4f}"] for one in stages]
    parts = {
        "STAGES": table(("stage", "steps", "last loss"), rows),
        "TABLE": caption_accuracy.table(before),
        "COMMAND": f"python -m pixart.evaluate --count {count} {options}",
        "CONVERSION": f"{conversion.steps} steps, last loss {conversion.loss:.4f}",
        "CONVERTED": caption_accuracy.table(after),
    }
    write_bytes(model / "README.md", fill(TEMPLATE, parts).encode())


def command() -> int | None:
    """Run the command line."""
    return tyro.cli(main, prog="python -m bench.reporting.card")
