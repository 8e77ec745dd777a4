"""What a compiled kernel must not do."""

from collections.abc import Iterator
from typing import Any

from bench.compiled import predictions
from bench.compiled.architectures import TENSOR_MEMORY

Row = dict[str, Any]

COMPILED = "compiled"  # the status of a row
LEAST_USEFUL = 0.90  # of the tensor cores' work: 72 of 80 columns
MOST_WAITS = {"forward": 4, "backward": 6}  # for wgmma, per iteration


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
    if row["loop_spills"]:
        found.append(f"spills inside a loop, {row['loop_spills']} times")
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
        most = MOST_WAITS[predictions.passes_of(row["what"])]
        if not row["wgmma"]:
            yield "does not use wgmma"
        if row["serialised"] or row["waits"] > most:
            yield f"waits {row['waits']} times for wgmma"
        yield from _partition_defects(row, most)


def _partition_defects(row: Row, most: int) -> Iterator[str]:
    """Of warpgroups that have code of their own. In others it is other programs that hide exponentials."""
    if not any(partition["number"] for partition in row["partitions"]):
        return
    for partition in row["partitions"]:
        name = f"partition {partition['number']}" + ", online" * partition["online"]
        if partition["serialised"] or partition["waits"] > most:
            yield f"{name}: {partition['waits']} waits for {partition['wgmma']} wgmma"
        # One pass of the backward has too few registers for ptxas to leave them where they are written.
        if partition["exposed"] and "hopper_sums" not in row["what"]:
            yield f"{name}: {partition['exposed']} exponentials while no product is under way"
