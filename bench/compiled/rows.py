"""A compiled kernel as a row of results: what it asks of an SM, and what that predicts.

Counts are of the inner loop, per warp and iteration (counts.py); `cycles` are what 64 queries × 128
keys of one head take at least of each of an SM's pipes, at the rates in ARCHITECTURES.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.compiled import counts, predictions, sass, turns
from bench.compiled.ahead_of_time import Launch
from bench.compiled.architectures import ARCHITECTURES, Architecture, resident_warps
from bench.compiled.candidates import constants
from bench.compiled.defects import COMPILED, defects
from bench.compiled.turns import Turn
from bench.workloads.operators import Workload

Row = dict[str, Any]

_LOOP = re.compile(r"^(?=( *)[^\n]*\bscf\.(?:for|while)\b[^\n]*(.*?)^\1\})", re.M | re.S)
_PRODUCT = re.compile(r"tt\.dot .*: tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x")


def row_of(architecture: str, case: Workload, launch: Launch, variant: str) -> Row:
    """variant: what the row is called. Its defects are among it, floors are the caller's to add."""
    row: Row = {
        "id": f"resources/{architecture}/{launch.kernel}/{variant}",
        "part": "resources",
        "what": launch.kernel,
        "variant": variant,
        "shape": {},
        "dtype": case.dtype_name,
        "status": f"does not compile: {launch.error}" if launch.error else COMPILED,
        "architecture": architecture,
        "default": launch.is_default,
        "binary": launch.compiled.hash if launch.compiled else "",
        "head_dim": case.operator.shape(case).get("head_dim", 0),  # of attention
        "config": launch.config,
        "floor_bytes": {},
    }
    if launch.compiled is not None:
        row |= _asked(row, launch.compiled, ARCHITECTURES[architecture])
    return row | {"defects": defects(row)}


def _asked(row: Row, compiled: Any, limits: Architecture) -> Row:
    program = sass.parse(sass.disassemble(compiled))
    registers, spills = sass.registers_and_spills(compiled)
    metadata, warps = compiled.metadata, _warps(compiled)
    asked = {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": metadata.shared,
        "shared_limit": limits.shared,
        "tensor_memory": getattr(metadata, "tmem_size", 0),
        "warps": warps,
        "resident_warps": resident_warps(limits, registers, metadata.shared, warps),
        **counts.count(program),
        "loads": counts.transfers(program, "load"),
        "stores": counts.transfers(program, "store"),
        "loop_spills": turns.loop_spills(program),
        "scaled": bool(constants(compiled).get("SCALED")),  # q comes multiplied by the scale
        "partitions": [],
        "predictions": [],
    }
    if row["head_dim"]:
        found = turns.turns(program, registers)
        asked |= {"partitions": partitions(found)}
        asked |= {"predictions": _predictions(row | asked, found, constants(compiled))}
        if turns.are_specialised(found):
            return asked | _shared_work(row, found, limits)
    return asked | _tile_work(row | asked, compiled, limits)


def partitions(found: Iterable[Turn]) -> list[Row]:
    """What is in the turns of each."""
    return [
        {
            "number": turn.partition,
            "online": turn.online,
            "registers": turn.registers,
            "instructions": len(turn.body),
            "wgmma": turn.wgmma,
            "waits": turn.waits,
            "serialised": turn.serialised,
            "spills": turn.spills,
            "exponentials": turn.exponentials,
            "exposed": turn.exposed,
        }
        for turn in found
    ]


def _predictions(row: Row, found: Sequence[Turn], known: Row) -> list[Row]:
    """Of sm_90: elsewhere no published kernel's code is known to hold them against."""
    programs = row["resident_warps"] // row["warps"]
    if row["architecture"] != "sm_90" or not programs or any(turn.serialised for turn in found):
        return []
    flops = (
        predictions.FLOPS[predictions.passes_of(row["what"])] * predictions.UNIT * row["head_dim"]
    )
    turned = bool(known.get("TURNS"))
    made = predictions.predict(found, row["warps"], programs, taking_turns=turned)
    # One that sums over keys only, or over queries only, leaves the other half to another.
    is_whole = not re.search(r"_(q|kv)(_kernel)?$", row["what"])
    return [predictions.as_json(prediction, flops, is_whole) for prediction in made]


def _shared_work(row: Row, found: Sequence[Turn], limits: Architecture) -> Row:
    """_tile_work of a kernel whose warpgroups have code of their own, from that code alone."""
    groups = turns.alternatives(found)[0]
    scores = sum(turn.scores for turn in groups)
    ops = [op for turn in groups for op in turn.body]
    issued = sum(sass.multiplies(sass.tensor_shape(op.name)) for op in ops)
    products = issued // (scores * row["head_dim"])  # padding is less than one of them
    tiles = predictions.UNIT / scores
    lanes = 4 * limits.warp_size * tiles
    return {
        "products": products,
        "useful_share": products * scores * row["head_dim"] / issued,
        "cycles": {
            "tensor": round(issued * tiles / limits.multiplies),
            **{
                pipe: round(counts.on(pipe, ops) * lanes / rate)
                for pipe, rate in (("exp", limits.exp), ("fma", limits.fma), ("alu", limits.alu))
            },
            "issue": round(len(ops) * tiles),
        },
    }


def _warps(compiled: Any) -> int:
    threads = re.search(r"\.(?:req|max)ntid (\d+)", compiled.asm.get("ptx", ""))
    return int(threads[1]) // 32 if threads else compiled.metadata.num_warps


def _tile_work(row: Row, compiled: Any, limits: Architecture) -> Row:
    """The share of tensor-core work that is not padding, and the cycles of a tile of scores."""
    products = loop_products(compiled.asm["ttir"]) if row["head_dim"] else []
    work: Row = {"products": len(products), "useful_share": None, "cycles": None}
    if not products or not row["tensor"]:
        return work
    known = constants(compiled)
    scores = math.prod(v for name, v in known.items() if name.startswith("BLOCK_"))
    written = sum(math.prod(product) for product in products)  # multiply-adds of a program
    if "?" in row["tensor"]:
        work["tensor"] = {f"{m}x{n}x{k}": products.count((m, n, k)) for m, n, k in products}
        issued, warpgroups = written, row["warps"] / 4
    else:
        once = sum(sass.multiplies(shape) * count for shape, count in row["tensor"].items())
        # A power of two of warps or warpgroups issues that; what is more than written is padding.
        issuers = 1 << max(0, math.ceil(math.log2(written / once)))
        issued, warpgroups = once * issuers, issuers if row["wgmma"] else issuers / 4
    parts = 2 if known.get("TAIL") else 1
    work["useful_share"] = len(products) // parts * scores * row["head_dim"] / issued
    tiles = predictions.UNIT / scores
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
