"""`python -m bench.resources`: what every kernel asks of every GPU, compiled ahead of time, without one.

A row is one binary: calls that compile to the same code share it. What is in it, compiled/rows.py says.
The file is written anew after each call that was compiled.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.resources")

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import product, repeat
from pathlib import Path

import triton

from bench.compiled import ahead_of_time, candidates, sass
from bench.compiled.ahead_of_time import Launch
from bench.compiled.architectures import ARCHITECTURES
from bench.compiled.rows import row_of
from bench.measure import results
from bench.measure.case import Unavailable
from bench.measure.results import Row
from bench.reporting import pages, targets
from bench.workloads.operators import Workload
from pixart import workers
from pixart_kernels.dispatch.registration import INTERPRETED


def report(
    architecture: str,
    cases: Iterable[Workload],
    *,
    dump: Path | None = None,
    defaults_only: bool = False,
) -> list[Row]:
    """One row per kernel, configuration and binary that these calls launch on an architecture."""
    rows: list[Row] = []
    names: Counter[tuple[str, str]] = Counter()
    for case in cases:
        name = case.operator.label(case)
        for launch in _launches(case, architecture, defaults_only):
            code = launch.compiled.hash if launch.compiled else ""
            same = (row for row in rows if _is_of(row, launch, code, name))
            row = next(same, None)
            if row is None:
                variant = f"{name}-{case.size}-{launch.config}"
                names[launch.kernel, variant] += 1
                number = names[launch.kernel, variant]  # of binaries, for other arguments
                row = row_of(architecture, case, launch, variant + f"-{number}" * (number > 1))
                rows.append(row)
                if dump is not None and launch.compiled:
                    _dump(dump, row, launch)
            row["default"] |= launch.is_default
            row["floor_bytes"].setdefault(name, {})[case.size] = launch.floor_bytes
    return rows


def _launches(case: Workload, architecture: str, defaults_only: bool) -> Iterator[Launch]:
    """Those of the operator, and those of kernels that are not what it takes by itself."""
    with suppress(Unavailable):  # no such products there
        yield from ahead_of_time.compile_all(case, architecture, defaults_only)
    yield from candidates.compile_all(case, architecture, defaults_only)


def _is_of(row: Row, launch: Launch, code: str, name: str) -> bool:
    """Whether it is of this binary; what does not compile is of its call."""
    same = (row["what"], row["config"], row["binary"]) == (launch.kernel, launch.config, code)
    return same and bool(code or row["variant"].startswith(f"{name}-"))


def _dump(directory: Path, row: Row, launch: Launch) -> None:
    stem = f"{row['what']}.{row['variant']}.{row['architecture']}"
    machine_code = sass.disassemble(launch.compiled)
    if "amdgcn" in launch.compiled.asm:
        (directory / f"{stem}.amdgcn").write_text(machine_code)
    else:
        (directory / f"{stem}.sass").write_text(machine_code)
        (directory / f"{stem}.ptx").write_text(launch.compiled.asm["ptx"])


def _report_calls(setting: tuple[str, str], dump: Path | None, defaults_only: bool) -> list[Row]:
    """Of all calls of one name on one architecture."""
    architecture, name = setting
    cases = [case for case in ahead_of_time.cases() if case.operator.label(case) == name]
    return report(architecture, cases, dump=dump, defaults_only=defaults_only)


def _join(rows: list[Row], more: Iterable[Row]) -> None:
    """Calls of several names may share a binary."""
    for row in more:
        keys = ("architecture", "what", "config", "binary")
        same = (other for other in rows if all(other[key] == row[key] for key in keys))
        known = next(same, None) if row["binary"] else None
        if known is None:
            rows.append(row)
        else:
            known["default"] |= row["default"]
            known["floor_bytes"] |= row["floor_bytes"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row to FILE")
    parser.add_argument(
        "--dump", type=Path, metavar="DIR", help="write PTX and machine code to DIR"
    )
    parser.add_argument(
        "--defaults", action="store_true", help="only the configuration that is tried first of each"
    )
    cases = ahead_of_time.cases()
    known = list(dict.fromkeys(case.operator.label(case) for case in cases))
    families = {case.operator.name.removeprefix("flash_") for case in cases}
    parser.add_argument(
        "--case", nargs="+", choices=sorted({*known, *families}), default=[],
        help="only these calls, or all of an operator's",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if INTERPRETED:
        sys.exit("bench.resources compiles, and the interpreter does not: unset TRITON_INTERPRET")
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
    chosen = {
        case.operator.label(case): None
        for case in cases
        if not options.case
        or {case.operator.label(case), case.operator.name.removeprefix("flash_")} & {*options.case}
    }
    run = results.started("resources", sys.argv[1:] if arguments is None else arguments, None)
    run["triton"] = triton.__version__
    settings = list(product(options.arch, chosen))
    with workers.pool() as pool:
        parallel = pool.map if len(options.arch) > 1 else map
        every = parallel(_report_calls, settings, repeat(options.dump), repeat(options.defaults))
        for rows in every:
            _join(run["rows"], rows)
            run["targets"] = targets.predicted(run["rows"])
            results.save(options.json, "resources", run, beside=False)
    run["complete"] = True
    content = results.save(options.json, "resources", run, beside=False)
    print(pages.page(content, options.json.name if options.json else ""))
