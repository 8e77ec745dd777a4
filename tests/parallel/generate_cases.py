"""Run by test_generate_among.py: commands on several processes. Prints a line of JSON for each: exit codes,
and what each process said."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forked import codes_among

from pixart.generate import main
from pixart.generation import drawing

FIVE = ["a red circle", "a blue square", "a green star", "a red star", "a blue circle"]
FAST = ["--steps", "2", "--no-cache", "--json"]
ONE = ["a red circle left of a blue square", *FAST, "--steps", "3"]


def command(count: int, *words: str, before: Callable[[], object] = lambda: None) -> dict[str, Any]:
    def run() -> int:
        before()
        return main(list(words))

    said = Path.cwd() / "said"
    said.mkdir(exist_ok=True)
    codes = codes_among(count, run, said)
    out, err = (
        [(said / f"{rank}.{kind}").read_text() for rank in range(count)] for kind in ("out", "err")
    )
    return {"codes": codes, "out": out, "err": err}


def full_disk() -> None:
    """The second process cannot write."""

    def write(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "there")

    if os.environ["RANK"] == "1":
        drawing.write_picture = write


def elsewhere() -> None:
    folder = Path(f"machine-{os.environ['RANK']}")
    folder.mkdir()
    if os.environ["RANK"] == "1":
        (folder / "p.png").write_text("something else")
    os.chdir(folder)


def lots() -> None:
    """Each process draws another lot."""
    lot = 100 + int(os.environ["RANK"])
    drawing.secrets = SimpleNamespace(randbelow=lambda _: lot)  # type: ignore[assignment]


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "five alone": lambda: command(1, *FIVE, *FAST, "--batch", "2", "--output", "alone"),
    "five by two": lambda: command(2, *FIVE, *FAST, "--batch", "2", "--output", "two", "--grid"),
    "five by three": lambda: command(3, *FIVE, *FAST, "--batch", "2", "--output", "three"),
    "five again": lambda: command(2, *FIVE, *FAST, "--batch", "2", "--output", "two"),
    "one alone": lambda: command(1, *ONE, "--batched=False", "--output", "one.png"),
    "one, auto": lambda: command(2, *ONE, "--output", "auto.png"),
    "one, sequence": lambda: command(
        2, *ONE, "--parallel", "sequence", "--batched=False", "--output", "sequence.png"
    ),
    "one by four": lambda: command(4, *ONE, "--output", "four.png"),
    "by lot": lambda: command(2, *ONE, "--seed", "random", "--output", "lot.png", before=lots),
    "too many": lambda: command(4, *ONE, "--parallel", "sequence", "--output", "no.png"),
    "halves for three": lambda: command(3, *ONE, "--parallel", "guidance", "--output", "no.png"),
    "no halves": lambda: command(
        2, *ONE, "--parallel", "guidance", "--guidance", "1", "--output", "no.png"
    ),
    "bad option": lambda: command(2, *ONE, "--steps", "many", "--output", "no.png"),
    "bad value": lambda: command(2, *ONE, "--steps", "0", "--output", "no.png"),
    "alone together": lambda: command(1, *ONE, "--parallel", "sequence", "--output", "no.png"),
    "full disk": lambda: command(2, *FIVE, *FAST, "--output", "full", before=full_disk),
    "dry run": lambda: command(
        2, *ONE, "--dry-run", "--parallel", "sequence", "--output", "dry/no.png"
    ),
    "dry run of tars": lambda: command(
        2, *FIVE, *FAST, "--dry-run", "--shard-size", "2", "--output", "dry/{shard}.tar"
    ),
    "machines": lambda: command(2, *ONE, "--output", "p.png", before=elsewhere),
}

if __name__ == "__main__":
    os.chdir(sys.argv[1])
    for name, case in CASES.items():
        if len(sys.argv) < 3 or name in sys.argv[2:]:
            print(json.dumps({"case": name, **case()}), flush=True)
