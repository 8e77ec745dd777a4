"""What a GPU is to reach, what it reached, and the kernel whose compiled code predicts it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.reporting.format import MISSING, percent
from bench.workloads import sizes

GPU = "H200"
Row = dict[str, Any]
Measured = dict[tuple[str, ...], dict[str, Row]]  # by what was measured, then by variant


class Target(NamedTuple):
    """reached: what rows say of it, None where they do not."""

    name: str
    goal: str
    reached: Callable[[Measured], str | None]
    kernel: str = ""
    case: str = ""


def measured(target: Target, rows: Sequence[Row]) -> str:
    """What these rows of bench.gpu say of a target: those of one picture, merged as published."""
    found: Measured = {}
    for row in rows:
        shape = row.get("shape") or {}
        usual = (shape.get("ratio", sizes.RATIO), shape.get("batch", 1)) == (sizes.RATIO, 1)
        if usual and row["part"] in ("operators", "steps") and "median" in row:
            found.setdefault(_key(row), {})[row["variant"]] = row
    return target.reached(found) or MISSING


def _key(row: Row) -> tuple[str, ...]:
    if row["part"] == "steps":
        return (row["step"], row["resolution"])
    names = ("operator", "kind", "direction", "resolution")
    return tuple(row.get(name, "") for name in names)


def _attention(direction: str) -> Callable[[Measured], str | None]:
    def reached(found: Measured) -> str | None:
        variants = found.get(("flash_attention", "self", direction, "4k"), {})
        if "ours" not in variants:
            return None
        ours = variants["ours"]
        said = [f"{ours['flops_per_second'] / 1e12:.0f} TFLOP/s"]
        backends = [row for name, row in variants.items() if name.startswith("sdpa")]
        rivals = {"the best SDPA": backends, "FA4": [variants["fa4"]] if "fa4" in variants else []}
        for name, rows in rivals.items():
            best = min((row["median"] for row in rows), default=None)
            said.append(f"{name} {MISSING}" if best is None else _times(best, ours, name))
        return ", ".join(said)

    return reached


def _streaming(operator: str) -> Callable[[Measured], str | None]:
    def reached(found: Measured) -> str | None:
        said = []
        for (name, kind, direction, resolution), variants in _operators(found):
            if (name, resolution in ("2k", "4k"), "ours" in variants) != (operator, True, True):
                continue
            ours = variants["ours"]
            what = " ".join(part for part in (resolution, kind, direction) if part)
            text = f"{what}: {percent(ours['share_of_copy'], 0)}"
            if "compiled" in variants:
                text += f", {_times(variants['compiled']['median'], ours, 'torch.compile')}"
            said.append(text)
        return "; ".join(said) or None

    return reached


def _operators(found: Measured) -> list[tuple[tuple[str, str, str, str], dict[str, Row]]]:
    return [
        ((key[0], key[1], key[2], key[3]), rows) for key, rows in found.items() if len(key) == 4
    ]


def _times(seconds: float, ours: Row, name: str) -> str:
    return f"{seconds / ours['median']:.2f} × {name}"


def _compressed_step(found: Measured) -> str | None:
    variants = found.get(("denoise", "4k"), {})
    if not {"ours", "ours compressed"} <= set(variants):
        return None
    share = 1 - variants["ours compressed"]["median"] / variants["ours"]["median"]
    return f"{percent(share)} of the time saved"


def _dense_step(found: Measured) -> str | None:
    variants = found.get(("denoise", "4k"), {})
    if not {"ours", "diffusers"} <= set(variants):
        return None
    return _times(variants["diffusers"]["median"], variants["ours"], "diffusers")


_STREAMING = "≥ 85 % of the copy bandwidth, ≥ 1.0 × torch.compile"
TARGETS = (
    Target(
        "attention, D = 72, 4K, forward",
        "≥ 480 useful TFLOP/s, ≥ 1.25 × the best SDPA backend, ≥ 1.0 × FA4",
        _attention("forward"),
        "attention_forward.forward",
        "self-bf16-72",
    ),
    Target(
        "attention, D = 72, 4K, backward: dQ",
        "≥ 400 useful TFLOP/s, both kernels together",
        _attention("backward"),
        "attention_backward.backward_q",
        "self-bf16-72",
    ),
    Target(
        "attention, D = 72, 4K, backward: dK, dV",
        "≥ 400 useful TFLOP/s, both kernels together",
        _attention("backward"),
        "attention_backward.backward_kv",
        "self-bf16-72",
    ),
    Target("compress_kv, 2K and 4K", _STREAMING, _streaming("compress_kv")),
    Target("modulate, 2K and 4K", _STREAMING, _streaming("modulate")),
    Target("gate_add_modulate, 2K and 4K", _STREAMING, _streaming("gate_add_modulate")),
    Target(
        "denoising step at 4K, compressed",
        "≥ 33 % faster than ours without compression",
        _compressed_step,
    ),
    Target("denoising step at 4K", "≥ 2 × diffusers, eager and dense", _dense_step),
)
