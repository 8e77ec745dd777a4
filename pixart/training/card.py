"""Writes the embedded model's card from its run and its measured accuracy, so that no figure in it
is typed: `python -m pixart.training.card RUN MODEL`."""

import json
import shutil
import sys
from pathlib import Path

import tyro

from pixart.training.evaluation import read_report, table
from pixart.training.stages import load_recipe

TEMPLATE = Path(__file__).with_name("card.md")


def stages_table(run: Path, logs: Path) -> str:
    """The stages with what their logs end with, as Markdown; copies the logs to `logs`."""
    logs.mkdir(exist_ok=True)
    lines = ["| stage | steps | last loss |", "|---|---|---|"]
    for stage in load_recipe("shapes"):
        log = run / stage.name / "log.jsonl"
        if not log.exists():
            continue
        shutil.copy(log, logs / f"{stage.name}.jsonl")
        steps = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
        last = steps[-1]
        lines.append(f"| {stage.name} | {last['step']} | {last['loss']:.4f} |")
    return "\n".join(lines)


def main(run: tyro.conf.Positional[Path], model: tyro.conf.Positional[Path]) -> None:
    """Write MODEL/README.md and MODEL/log from the training run and MODEL/accuracy.json."""
    report, results = read_report(model / "accuracy.json")
    count = max(result.of for result in results)
    options = f"--count {count} " + " ".join(
        f"--{key} {report[key]}" for key in ("seed", "steps", "guidance", "dtype")
    )
    text = TEMPLATE.read_text(encoding="utf-8")
    text = text.replace("@STAGES@", stages_table(run, model / "log"))
    text = text.replace("@TABLE@", table(results))
    text = text.replace("@COMMAND@", f"python -m pixart.training.evaluation {options}")
    (model / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m pixart.training.card"))
