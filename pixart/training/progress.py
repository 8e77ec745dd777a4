"""What a person sees of a run: a bar, or a line now and then where nobody watches, a log of JSON lines,
and trackers that are asked for."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pixart.device import peak_memory
from pixart.distributed import rank
from pixart.files import parse_json, write_bytes
from pixart.progress import Bar
from pixart.training.bounds import MAX_STEPS
from pixart.training.trackers import Tracker, TrackerName

LOG = "log.jsonl"


class Progress:
    """Reports of one stage, from the first process only; the others keep silent.

    every: steps between two lines of the log; the first and the last step have one too.
    peak: FLOP/s that the devices reach in matrix products, for the share that is used (MFU).
    """

    def __init__(
        self,
        directory: Path,
        stage: str,
        *,
        every: int = 20,
        peak: float = 0.0,
        trackers: Sequence[TrackerName] = (),
        quiet: bool = False,
    ) -> None:
        self.directory, self.stage, self.every, self.quiet = directory, stage, every, quiet
        self.peak = peak
        self._is_first = rank() == 0
        self._trackers = [Tracker(name, directory, stage) for name in trackers if self._is_first]
        self._since = _Sums()
        self._cpu_before = 0.0  # of the runs that this one goes on from

    def start(self, step: int, total: int) -> None:
        """Take up the log at a step: what a killed run wrote beyond it will be written again."""
        self._total, self._step = total, step
        if self._is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._cpu_before = _cut_log(self.directory / LOG, step)

    def __enter__(self) -> "Progress":
        silent = self.quiet or not self._is_first
        self._bar = Bar(self.stage, self._total, done=self._step, quiet=silent)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        for tracker in self._trackers:
            tracker.close()

    def step(
        self,
        step: int,
        values: dict[str, float],
        seconds: float,
        waited: float,
        images: int,
        tokens: int,
        flops: float,
    ) -> None:
        """One step is done. seconds: of the step; waited: those spent on waiting for data. flops: of
        the forward pass of all images; the whole step takes three times as many."""
        self._since.add(values, seconds, waited, images, tokens, flops)
        if not self._is_first or step % self.every and step not in (1, self._total):
            self._bar.reach(step)
            return
        report = self._since.report(self.peak) | {
            "memory_bytes": float(peak_memory()),
            "cpu_seconds": self._cpu_before
            + time.process_time(),  # of the stage, this process's alone
        }
        self._since = _Sums()
        self._bar.reach(step, _shown(report))
        self._write({"step": step, **report})

    def validation(self, step: int, values: dict[str, float]) -> None:
        if self._is_first and values:
            self._write({"step": step, **{f"validation/{k}": v for k, v in values.items()}})

    def _write(self, line: dict[str, float]) -> None:
        path = self.directory / LOG
        # JSON has no word for what is not finite.
        values = {key: value if math.isfinite(value) else None for key, value in line.items()}
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(values) + "\n")
        except OSError as error:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        for tracker in self._trackers:
            tracker.log(line)


def _shown(report: dict[str, float]) -> str:
    """What stands behind the count and the time left."""
    shown = {
        "loss": f"{report['loss']:.4f}",
        "img/s": f"{report['images_per_s']:.1f}",
        "tok/s": f"{report['tokens_per_s']:.0f}",
        "wait": f"{report['data_wait']:.0%}",
        "GB": f"{report['memory_bytes'] / 1e9:.1f}",
    }
    shown |= {"MFU": f"{report['mfu']:.0%}"} if "mfu" in report else {}
    return " ".join(f"{name}={value}" for name, value in shown.items())


class _Sums:
    """Means and rates over the steps since the last line."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.images, self.tokens, self.flops = 0, 0, 0.0
        self.values: dict[str, float] = {}

    def add(
        self,
        values: dict[str, float],
        seconds: float,
        waited: float,
        images: int,
        tokens: int,
        flops: float,
    ) -> None:
        self.steps += 1
        self.seconds += seconds
        self.waited += waited
        self.images += images
        self.tokens += tokens
        self.flops += flops
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def report(self, peak: float) -> dict[str, float]:
        seconds = max(self.seconds, 1e-9)
        rates = {
            "seconds_per_step": seconds / self.steps,
            "images_per_s": self.images / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait": self.waited / seconds,
        }
        if self.flops and peak:
            rates["mfu"] = 3 * self.flops / seconds / peak
        return {name: value / self.steps for name, value in self.values.items()} | rates


def read_log(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log and what they say; those that are damaged, as the last of a killed run, are left
    out. ValueError for what is no file."""
    if not path.is_file():
        raise ValueError(f"{path}: must be a file")
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = parse_json(line, str(path))
        except ValueError:
            continue
        step = values.get("step") if isinstance(values, dict) else None
        if type(step) is int and 0 <= step <= MAX_STEPS:
            yield line, values


def _cut_log(path: Path, step: int) -> float:
    """Leave the lines up to `step`. Returns the CPU seconds that they count."""
    if not path.exists():
        return 0.0
    kept = [(line, values) for line, values in read_log(path) if values["step"] <= step]
    write_bytes(path, "".join(line + "\n" for line, _ in kept).encode())
    counted = (values.get("cpu_seconds", 0.0) for _, values in kept)
    return max((value for value in counted if isinstance(value, int | float)), default=0.0)
