"""`python -m bench.report`: BENCHMARKS.md from bench/results/*.json, and from nothing else.

No figure is typed: a test regenerates the file and compares. What has no result is called not
measured.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS, OUTPUT = ROOT / "bench" / "results", ROOT / "BENCHMARKS.md"

Result = dict[str, Any]


class Target(NamedTuple):
    """What a GPU is to reach, and the kernel whose compiled code predicts it."""

    name: str
    goal: str
    kernel: str = ""
    case: str = ""


TARGETS = (
    Target(
        "attention, D = 72, 4K, forward",
        "≥ 480 useful TFLOP/s, ≥ 1.25 × the best SDPA backend, ≥ 1.0 × FA4",
        "attention_forward.forward",
        "self-bf16-72",
    ),
    Target(
        "attention, D = 72, 4K, backward: dQ",
        "≥ 400 useful TFLOP/s, both kernels together",
        "attention_backward.backward_q",
        "self-bf16-72",
    ),
    Target(
        "attention, D = 72, 4K, backward: dK, dV",
        "≥ 400 useful TFLOP/s, both kernels together",
        "attention_backward.backward_kv",
        "self-bf16-72",
    ),
    Target("compress_kv, 2K and 4K", "≥ 85 % of the copy bandwidth, ≥ 1.0 × torch.compile"),
    Target("modulate, 2K and 4K", "≥ 85 % of the copy bandwidth, ≥ 1.0 × torch.compile"),
    Target("gate_add_modulate, 2K and 4K", "≥ 85 % of the copy bandwidth, ≥ 1.0 × torch.compile"),
    Target("denoising step at 4K, compressed", "≥ 33 % faster than ours without compression"),
    Target("denoising step at 4K", "≥ 2 × diffusers, eager and dense"),
)


def read_results(folder: Path) -> list[tuple[str, Result]]:
    """The results by file name."""
    return [(path.name, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]


def render(results: Sequence[tuple[str, Result]]) -> str:
    """BENCHMARKS.md."""
    compiled = [(name, result) for name, result in results if result["kind"] == "resources"]
    parts = [
        "# Benchmarks\n\nWritten by `python -m bench.report` from `bench/results/`; nothing is typed.",
        "## On a GPU\n\n"
        "Not measured: no GPU was available so far. `python -m bench.gpu --out DIR` measures all of it "
        "in one run.",
        _targets([result for _, result in compiled]),
        "## On a CPU\n\nNot measured.",
    ]
    parts += [_resources(name, result) for name, result in compiled]
    return "\n\n".join(parts) + "\n"


def _targets(compiled: Sequence[Result]) -> str:
    """What is to be reached on an H200, and the cycles that the compiled code will need."""
    lines = [
        "Cycles are those that a tile of 64 queries × 128 keys takes at least on each pipe of an "
        "sm_90 SM, counted in the compiled code of the default configuration: tensor cores / "
        "exponentials / FMA / ALU / issue slots. The largest is the bound.",
        "",
        "| what | to be reached on one H200 | measured | "
        + " | ".join(f"cycles, Triton {result['triton']}" for result in compiled)
        + " |",
        "|---" * (3 + len(compiled)) + "|",
    ]
    for target in TARGETS:
        cycles = [_cycles(result, target) for result in compiled]
        lines.append(f"| {target.name} | {target.goal} | not measured | {' | '.join(cycles)} |")
    return "\n".join(lines)


def _cycles(result: Result, target: Target) -> str:
    for row in result["rows"]:
        matches = row["kernel"].strip("_").removesuffix("_kernel").endswith(target.kernel)
        is_case = "4k" in row["floor_bytes"].get(target.case, ()) and row["architecture"] == "sm_90"
        if target.kernel and matches and is_case and row["default"] and row.get("cycles"):
            return " / ".join(str(count) for count in row["cycles"].values())
    return ""


def _resources(name: str, result: Result) -> str:
    head = (
        f"## Compiled code, Triton {result['triton']}\n\n"
        f"`{result['command']}` wrote `bench/results/{name}` from sources "
        f"`{result['source_sha256'][:12]}`. It needs no GPU. Counts are of the inner loop.\n\n"
        "| GPU | kernel | configuration | registers | spilled bytes | shared KiB | warps per SM "
        "| useful / issued | waits | defects |\n" + "|---" * 10 + "|"
    )
    return "\n".join([head, *_rows(result["rows"])])


def _rows(rows: Iterable[Result]) -> Iterable[str]:
    for row in rows:
        if not row["default"]:
            continue
        name = f"| {row['architecture']} | {row['kernel'].strip('_')} | {row['config']} "
        defects = "; ".join(row["defects"])
        if row["error"]:
            yield f"{name}| | | | | | | {defects} |"
            continue
        useful = "" if row["useful_share"] is None else f"{row['useful_share']:.3f}"
        yield (
            f"{name}| {row['registers']} | {row['spill_bytes']} | {row['shared_bytes'] / 1024:.0f} "
            f"| {row['resident_warps']} | {useful} | {row['waits']} | {defects} |"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is current")
    options = parser.parse_args(arguments)
    text = render(read_results(RESULTS))
    if not options.check:
        OUTPUT.write_text(text, encoding="utf-8")
        return 0
    if OUTPUT.read_text(encoding="utf-8") == text:
        return 0
    print(f"{OUTPUT.name} is not what bench/results says; run python -m bench.report")
    return 1


if __name__ == "__main__":
    sys.exit(main())
