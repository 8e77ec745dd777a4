"""Ctrl-C at random moments: `python tests/fuzz/interrupts.py [--trials 30] [--seed N]`.

Each trial starts a command, presses the key after 0.1 to 5 seconds, and wants one line and 130, or, if
the command was quicker, 0. What does not is printed with the command that repeats it.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent.parent
MOMENTS = (0.1, 5.0)
PATIENCE = 120  # seconds for a step that is under way, on a machine that has others to run
SHAPES = str(ROOT / "pixart" / "assets" / "shapes")
# Each takes longer than it is given.
COMMANDS = {
    "generate": ["a red circle", "--json", "--no-cache", "--num-images", "50", "--output", "out"],
    "convert": [SHAPES, "made.safetensors"],
    "data": ["prepare", "pictures", "prepared", "--resolution", "128", "--square"],
    "train": ["shapes", "--steps", "1000", "--output", "run"],
    "evaluate": ["accuracy", "--count", "50"],
}


@dataclass(frozen=True)
class Trial:
    """A command, and after how many seconds it is interrupted."""

    name: str
    seconds: float
    as_module: bool

    @classmethod
    def of(cls, seed: int) -> "Trial":
        rng = random.Random(seed)
        return cls(rng.choice(list(COMMANDS)), rng.uniform(*MOMENTS), rng.random() < 0.5)

    def run(self, folder: Path) -> str:
        """What is wrong with the way in which it ends, "" if nothing."""
        start = [f"pixart.{self.name}"] if self.as_module else ["pixart", self.name]
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        process = subprocess.Popen(
            [sys.executable, "-m", *start, *COMMANDS[self.name]], cwd=folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        time.sleep(self.seconds)
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"goes on for {PATIENCE} s, {process.communicate()[1][-300:]!r}"
        return self._judge(process.returncode, out, err, folder)

    def _judge(self, code: int, out: str, err: str, folder: Path) -> str:
        frames = re.findall(r'^  File "(.*?)"', err, re.MULTILINE)
        is_starting = code != 130 and frames and all(f.startswith("<frozen") for f in frames)
        if code == 0 or is_starting or (code != 130 and "<frozen site>" in err):
            return ""  # Python itself was still starting, or all was done
        # The names of pictures that are finished, and notes, come before.
        last = err.splitlines()[-1] if err else ""
        is_said = re.match(rf"pixart\.{self.name}: cancelled|stopped in stage", last)
        if code != 130 or not is_said or "Traceback" in err or not err.endswith("\n"):
            return f"code {code}, {err[-300:]!r}"
        if self.name == "generate" and len(json.loads(out)["images"]) != len(
            list(folder.glob("out/*.png"))
        ):
            return f"reports other pictures than there are: {out[:300]!r}"
        left = [path.name for path in folder.rglob(".*") if path.is_file()]
        return f"leaves {left}" if left else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    # A shell starts what runs in its background without it, and what is ignored is inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fresh = random.SystemRandom().randrange(2**40)
    seeds = range(fresh, fresh + options.trials) if options.seed is None else [options.seed]
    faults = 0
    for seed in seeds:
        trial = Trial.of(seed)
        if what := attempt(trial):
            faults += 1
            print(
                f"{trial}: {what}\n  again: python tests/fuzz/interrupts.py --seed {seed}",
                flush=True,
            )
    print(f"{len(seeds)} times Ctrl-C, {faults} faults")
    return 1 if faults else 0


def attempt(trial: Trial) -> str:
    """Run a trial in a folder of its own; see Trial.run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        for number in range(100):
            Image.new("RGB", (200, 160), (number, 20, 30)).save(folder / f"pictures/{number}.png")
            (folder / f"pictures/{number}.txt").write_text("a red circle")
        return trial.run(folder)


if __name__ == "__main__":
    sys.exit(main())
