"""`python -m bench.resources`: what every kernel asks of every GPU, compiled ahead of time, without one.

Counts are of the inner loop, per warp and iteration (see sass.py); `cycles` are what 64 queries × 128
keys of one head take at least of each of an SM's pipes, at the rates in ARCHITECTURES. A row is one
binary: calls that compile to the same code share it.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.resources")

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import triton

from bench.compiled import ahead_of_time, sass
from bench.compiled.ahead_of_time import Launch
from bench.measure import processes, results
from bench.measure.case import Unavailable
from bench.measure.results import Row
from bench.reporting import pages
from bench.workloads.operators import Workload
from pixart_kernels.dispatch.registration import INTERPRETED

COMPILED = "compiled"  # the status of a row

LEAST_USEFUL = 0.90  # of the tensor cores' work: 72 of 80 columns
MOST_WAITS = {"forward": 4, "backward": 6}  # for wgmma, per iteration
_LOOP = re.compile(r"^(?=( *)[^\n]*\bscf\.(?:for|while)\b[^\n]*(.*?)^\1\})", re.M | re.S)
_PRODUCT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x")
TILE = 64 * 128  # queries × keys that cycles are given for


class Architecture(NamedTuple):
    """Limits of an SM (AMD: CU) and what it does per clock."""

    shared: int  # bytes, of one program
    shared_total: int
    warps: int
    programs: int
    multiplies: int  # 16-bit tensor-core multiply-adds, summed in fp32
    fma: int  # lanes
    alu: int
    exp: int
    registers: int = 65536
    warp_size: int = 32


_KIB = 1024
ARCHITECTURES = {
    "sm_80": Architecture(163 * _KIB, 164 * _KIB, 64, 32, 1024, 64, 64, 16),
    # 86, 89 and 120: the GeForce rate, which is half of the workstation cards'.
    "sm_86": Architecture(99 * _KIB, 100 * _KIB, 48, 16, 256, 128, 64, 16),
    "sm_89": Architecture(99 * _KIB, 100 * _KIB, 48, 24, 256, 128, 64, 16),
    "sm_90": Architecture(227 * _KIB, 228 * _KIB, 64, 32, 2048, 128, 64, 16),
    "sm_100": Architecture(227 * _KIB, 228 * _KIB, 64, 32, 4096, 128, 64, 16),
    "sm_120": Architecture(99 * _KIB, 100 * _KIB, 48, 24, 256, 128, 64, 16),
    "gfx942": Architecture(64 * _KIB, 64 * _KIB, 32, 32, 1024, 64, 64, 16, 4 * 512 * 64, 64),
}
TENSOR_MEMORY = 512  # columns, of sm_100


def report(
    architecture: str,
    cases: Iterable[Workload],
    *,
    dump: Path | None = None,
    defaults_only: bool = False,
) -> list[Row]:
    """One row per kernel, configuration and binary that these calls launch on an architecture."""
    rows: dict[tuple[str, str, str], Row] = {}
    names: Counter[tuple[str, str]] = Counter()
    for case in cases:
        name = case.operator.label(case)
        try:
            launches = ahead_of_time.compile_all(case, architecture, defaults_only)
        except Unavailable:  # no such products there
            continue
        for launch in launches:
            code = launch.compiled.hash if launch.compiled else name
            key = launch.kernel, launch.config, code
            if key not in rows:
                config = f"{name}-{case.size}-{launch.config}"
                names[launch.kernel, config] += 1
                number = names[launch.kernel, config]  # of binaries, for other arguments
                config += f"-{number}" * (number > 1)
                rows[key] = _row(architecture, case, launch, config)
                if dump is not None and launch.compiled:
                    _dump(dump, rows[key], launch)
            rows[key]["default"] |= launch.is_default
            rows[key]["floor_bytes"].setdefault(name, {})[case.size] = launch.floor_bytes
    return list(rows.values())


def _row(architecture: str, case: Workload, launch: Launch, config: str) -> Row:
    row: Row = {
        "id": f"resources/{architecture}/{launch.kernel}/{config}",
        "part": "resources",
        "what": launch.kernel,
        "variant": config,
        "shape": {},
        "dtype": case.dtype_name,
        "status": f"does not compile: {launch.error}" if launch.error else COMPILED,
        "architecture": architecture,
        "default": launch.is_default,
        "head_dim": case.operator.shape(case).get("head_dim", 0),  # of attention
        "floor_bytes": {},
    }
    if launch.compiled is None:
        return row
    limits = ARCHITECTURES[architecture]
    program = sass.parse(sass.disassemble(launch.compiled))
    registers, spills = sass.registers_and_spills(launch.compiled)
    metadata = launch.compiled.metadata
    warps = _warps(launch.compiled)
    row |= {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": metadata.shared,
        "shared_limit": limits.shared,
        "tensor_memory": getattr(metadata, "tmem_size", 0),
        "warps": warps,
        "resident_warps": resident_warps(limits, registers, metadata.shared, warps),
        **sass.count(program),
        "loads": sass.transfers(program, "load"),
        "stores": sass.transfers(program, "store"),
    }
    return row | _tile_work(row, launch.compiled, limits)


def _warps(compiled: Any) -> int:
    threads = re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm.get("ptx", ""))
    return int(threads[1]) // 32 if threads else compiled.metadata.num_warps


def resident_warps(limits: Architecture, registers: int, shared: int, warps: int) -> int:
    """How many warps an SM holds at once."""
    per_warp = math.ceil(registers / 8) * 8 * limits.warp_size
    fitting = limits.registers // per_warp // 4 * 4  # registers belong to quarters of an SM
    reserved = 0 if limits.warp_size == 64 else _KIB
    programs = min(
        limits.programs,
        limits.warps // warps,
        fitting // warps,
        limits.shared_total // max(1, shared + reserved),
    )
    return programs * warps


def _tile_work(row: Row, compiled: Any, limits: Architecture) -> Row:
    """The share of tensor-core work that is not padding, and the cycles of a tile of scores."""
    products = loop_products(compiled.asm["ttir"]) if row["head_dim"] else []
    work: Row = {"products": len(products), "useful_share": None, "cycles": None}
    if not products or not row["tensor"]:
        return work
    names = compiled.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in compiled.src.constants.items()}
    scores = math.prod(v for name, v in constants.items() if name.startswith("BLOCK_"))
    written = sum(math.prod(product) for product in products)  # multiply-adds of a program
    if "?" in row["tensor"]:
        work["tensor"] = {f"{m}x{n}x{k}": products.count((m, n, k)) for m, n, k in products}
        issued, warpgroups = written, row["warps"] / 4
    else:
        once = sum(sass.multiplies(shape) * count for shape, count in row["tensor"].items())
        # A power of two of warps or warpgroups issues that; what is more than written is padding.
        issuers = 1 << max(0, math.ceil(math.log2(written / once)))
        issued, warpgroups = once * issuers, issuers if row["wgmma"] else issuers / 4
    parts = 2 if constants.get("TAIL") else 1
    work["useful_share"] = len(products) // parts * scores * row["head_dim"] / issued
    tiles = TILE / scores
    lanes = 4 * warpgroups * limits.warp_size * tiles
    work["cycles"] = {
        "tensor": round(issued * tiles / limits.multiplies),
        "exp": round(row["exp"] * lanes / limits.exp),
        "fma": round(row["fma"] * lanes / limits.fma),
        "alu": round(row["alu"] * lanes / limits.alu),
        "issue": round(row["instructions"] * warpgroups * tiles),
    }
    return work


def loop_products(ttir: str) -> list[tuple[int, int, int]]:
    """(m, n, k) of the matrix products in the innermost loop that has most of them."""
    bodies = [body for _, body in _LOOP.findall(ttir) if not _LOOP.search(body)]
    products = [_PRODUCT.findall(body) for body in bodies]
    return [(int(m), int(n), int(k)) for m, k, n in max(products, key=len, default=[])]


def defects(row: Row) -> list[str]:
    """What a configuration must not do, in words; empty if it does nothing of that."""
    if row["status"] != COMPILED:
        return [row["status"]]
    found: list[str] = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"takes {row['shared_bytes']} of {row['shared_limit']} bytes of shared memory")
    if row["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"takes {row['tensor_memory']} of {TENSOR_MEMORY} columns of tensor memory")
    if row["resident_warps"] == 0:
        found.append("does not fit into an SM")
    if row["head_dim"] and row["dtype"] != "float32":
        found += _attention_defects(row)
    return found


def _attention_defects(row: Row) -> Iterator[str]:
    if row["loads"].keys() & {"1", "2"} or not row["loads"].keys() & {"TMA", "16"}:
        yield f"loads {row['loads']} (bytes: times)"
    if not row["products"]:
        return
    useful = row["useful_share"] or 0
    if round(useful, 3) < LEAST_USEFUL:
        yield f"{useful:.3f} of the tensor cores' work is useful"
    if row["architecture"] == "sm_90":
        most = MOST_WAITS["backward" if "backward" in row["what"] else "forward"]
        if not row["wgmma"]:
            yield "does not use wgmma"
        if row["serialised"] or row["waits"] > most:
            yield f"waits {row['waits']} times for wgmma"


def _dump(directory: Path, row: Row, launch: Launch) -> None:
    stem = f"{row['what']}.{row['variant']}.{row['architecture']}"
    machine_code = sass.disassemble(launch.compiled)
    if "amdgcn" in launch.compiled.asm:
        (directory / f"{stem}.amdgcn").write_text(machine_code)
    else:
        (directory / f"{stem}.sass").write_text(machine_code)
        (directory / f"{stem}.ptx").write_text(launch.compiled.asm["ptx"])


def _report_all(
    architecture: str, dump: Path | None, defaults_only: bool, names: Sequence[str]
) -> list[Row]:
    every = ahead_of_time.cases()
    cases = [case for case in every if not names or case.operator.label(case) in names]
    return report(architecture, cases, dump=dump, defaults_only=defaults_only)


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
    known = sorted({case.operator.label(case) for case in ahead_of_time.cases()})
    parser.add_argument("--case", nargs="+", choices=known, default=[], help="only these calls")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        sys.exit("bench.resources compiles, and the interpreter does not: unset TRITON_INTERPRET")
    if options.dump:
        options.dump.mkdir(parents=True, exist_ok=True)
    run = results.started("resources", sys.argv[1:] if arguments is None else arguments, None)
    with processes.pool() as pool:
        parallel = pool.map if len(options.arch) > 1 else map
        settings = (repeat(options.dump), repeat(options.defaults), repeat(options.case))
        for rows in parallel(_report_all, options.arch, *settings):
            run["rows"] += [{**row, "defects": defects(row)} for row in rows]
    run |= {"complete": True, "triton": triton.__version__}
    content = results.save(options.json, "resources", run, beside=False)
    print(pages.page(content, options.json.name if options.json else ""))
