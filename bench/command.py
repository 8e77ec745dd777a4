"""What the commands that measure one thing share: options, one run, a row after the other kept."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measure import machine, results
from bench.measure.case import FAULTS, Case, Context, readied
from bench.reporting import pages
from bench.workloads import sizes


class Command:
    """`python -m bench.KIND`. at: the sizes that are measured unless told; more: others allowed."""

    def __init__(
        self, kind: str, about: str | None, at: Sequence[str], more: Sequence[str]
    ) -> None:
        self.kind = kind
        self.parser = argparse.ArgumentParser(prog=f"python -m bench.{kind}", description=about)
        add = self.parser.add_argument
        add("--json", type=Path, help="file to keep the result in, beside earlier runs'")
        add("--sizes", nargs="+", default=at, choices=[*at, *more], help="all of the first ones")
        add("--rounds", type=int, default=5, help="how often to time each, at least (5)")
        add("--seconds", type=float, default=10, help="go on timing for so long (10)")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        self.arguments = list(sys.argv[1:] if arguments is None else arguments)
        self.options = self.parser.parse_args(self.arguments)
        return self.options

    def run(self, cases: Sequence[Case]) -> int:
        """Measure and keep every case, and print the page of it; 1 if a row is of a failure."""
        options = self.options
        device, tiny = torch.device(options.device), sizes.TINY in options.sizes
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # streams and events are of the current device
        run = results.started(self.kind, self.arguments, device, dry_run=tiny)
        context = Context(device)
        context.seconds, context.least_rounds = options.seconds, options.rounds
        context.peaks = run["peaks"] = machine.peaks(device, tiny=tiny)
        with readied(device):
            for case in cases:
                run["rows"] += context.run(self.kind, case)
                run["complete"] = case is cases[-1]
                content = results.save(options.json, self.kind, run)
        return told(content, run, options.json)


def told(content: results.Content, run: results.Row, file: Path | None) -> int:
    """Print the page of a result, and what of its last run is broken; 1 if something is."""
    print(pages.page(content, file.name if file else ""))
    broken = [row for row in run["rows"] if row["status"].startswith(FAULTS)]
    for row in broken:
        print(f"{row['id']}: {row['status']}", file=sys.stderr)
    return 1 if broken else 0
