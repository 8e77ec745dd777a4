"""Run by test_shards_among.py: tars that several processes draw, or one that is killed. Prints a line of JSON
for each case: exit codes, and what each process said."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generate_cases import command

from pixart.generation.shards import painter
from pixart.pipeline import Pipeline, Request
from pixart.pipeline.pictures import encode_picture

LINES = ["a red circle", "a blue square", "a green star", "a red star", "a blue circle"]
FAST = ["--prompts", "list.txt", "--size", "64", "--steps", "2", "--device", "cpu"]
TARS = [*FAST, "--shard-size", "2", "--json"]


def into(folder: str) -> list[str]:
    return [*TARS, "--output", f"{folder}/{{shard:03d}}.tar"]


def at_the_fourth(act: Callable[[], object]) -> Callable[[], None]:
    """Does something when the second picture of the second tar is to be written."""

    def before() -> None:
        count = 0

        def encode(*given: Any) -> bytes:
            nonlocal count
            count += 1
            if count == 4:
                act()
            return encode_picture(*given)

        painter.encode_picture = encode  # type: ignore[attr-defined]

    return before


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def apart() -> None:
    """Not as torchrun starts processes, which know of each other."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        del os.environ[name]


def as_tasks() -> None:
    """As tasks of a Slurm array from 4 to 6 in steps of 2."""
    number = int(os.environ["RANK"])
    apart()
    values = {"ID": 4 + 2 * number, "COUNT": 2, "MIN": 4, "MAX": 6, "STEP": 2}
    os.environ |= {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


def full_disk() -> None:
    def refuse() -> None:
        raise OSError(28, "No space left on device")

    at_the_fourth(refuse)()


def second_fails() -> None:
    """Of two processes, the second has the second tar alone."""
    if os.environ["RANK"] == "1":

        def refuse(*_: Any) -> bytes:
            raise OSError(28, "No space left on device")

        painter.encode_picture = refuse  # type: ignore[attr-defined]


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: command(1, *FAST, "--no-cache", "--output", "plain/{index:09d}.png"),
    "alone": lambda: command(1, *into("alone")),
    "killed": lambda: command(1, *into("killed"), before=at_the_fourth(killed)),
    "left": lambda: {"left": sorted(os.listdir("killed"))},
    "resumed": lambda: command(1, *into("killed")),
    "torchrun": lambda: command(2, *into("torchrun")),
    "array": lambda: command(2, *into("array"), before=as_tasks),
    "twice": lambda: command(2, *into("twice"), before=apart),
    "full": lambda: command(1, *into("full"), before=full_disk),
    "one full": lambda: command(2, *into("one-full"), before=second_fails),
    "one bad": lambda: command(2, *into("one-bad"), "--scheduler", "x"),
}


def open_once() -> None:
    """The embedded model, all of it in memory, for all processes that come."""
    pipe = Pipeline.from_pretrained(device="cpu", cache_dir=None)
    pipe.resident = True
    pipe.draw(Request("a red circle", size="64", steps=1))
    pipe.forget_prompts()
    Pipeline.from_pretrained = staticmethod(lambda *_, **__: pipe)  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    open_once()
    Path("list.txt").write_text("\n".join(LINES))
    for name, case in CASES.items():
        if len(sys.argv) < 3 or name in sys.argv[2:]:
            print(json.dumps({"case": name, **case()}), flush=True)
