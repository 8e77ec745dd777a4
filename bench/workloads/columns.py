"""Whether products of 8 columns are right on this GPU: attention whose results are known exactly.

For head dimensions up to 72 the tail of V has 8 columns where the tensor cores take so few: on sm_90
a product m64n8k16 whose operand lies in shared memory without a swizzle, the rarest corner of Triton's
layouts. Here each query has one key, far ahead of all others, so that its result is that key's value,
bit for bit; or all keys have the same weight and values are whole numbers, so that sums are exact. If a
single number differs, or the process ends, the table of this run takes 16 columns.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import compilation, table, timing
from bench.measure.case import Case, Context, failed
from bench.measure.results import Row
from bench.workloads.candidates import few, is_gluon, plain
from bench.workloads.operators import OPERATORS
from pixart_kernels.dispatch import configurations
from pixart_kernels.dispatch.configurations import Candidate

PART = "columns"
KERNEL = "attention.forward"
HEAD_DIM = 72
NARROW, WIDE = 8, 16
DTYPES = (torch.bfloat16, torch.float16)
ONE_KEY = (2, 384, 320, 3)  # batch, queries, keys, heads
SAME_WEIGHTS = (1, 4096, 1024, 1)  # N · M from which the bound on scores is looked for


def cases(out: Path, most: int | None = None) -> list[Case]:
    """The narrow tiles first, then the wide ones; then the table that follows, written to `out`."""
    made = [
        Case(
            f"{columns} columns/{str(dtype).removeprefix('torch.')}",
            partial(_try, columns, dtype, most),
            always=columns == NARROW,  # what was not tried would count as wrong
        )
        for columns in (NARROW, WIDE)
        for dtype in (DTYPES if most is None else DTYPES[:1])
    ]
    return [*made, Case("decision", partial(_decide, out), always=True)]


def _try(columns: int, dtype: torch.dtype, most: int | None, context: Context) -> None:
    what = _what(dtype)
    found = _launched(context.device, dtype)
    if found is None:
        context.row("ours", "not measured: no kernel of ours runs here", **what)
        return
    row, usual = found
    tried = [one for one in few(plain(row.candidates), most) if _can_have(one, columns, usual)]
    if not tried:
        context.row("ours", f"not measured: tails have {usual} columns here", **what)
        return
    named = {configurations.describe(one): one for one in (_with(one, columns) for one in tried)}
    context.announce("", compilation.SECONDS)
    compilation.ahead([partial(_compute, context.device, dtype, one) for one in named.values()])
    for text, one in named.items():
        facts: Row = {"columns": columns, "config": text}
        if reason := context.crashed(text):
            context.row(text, reason, **what, **facts)
            continue
        context.announce(text)
        try:
            made = _compute(context.device, dtype, one)
            wrong = {name: _wrong(*pair) for name, pair in made.items()}
        except Exception as error:  # told, and the wide ones are taken
            reason = failed(timing.survive(error, context.device))
            context.row(text, reason, **what, **facts)
        else:
            context.row(text, **what, **facts, wrong_numbers=wrong, exact=not any(wrong.values()))


def _what(dtype: torch.dtype) -> Row:
    shape = {"size": "exact", "batch": ONE_KEY[0], "head_dim": HEAD_DIM}
    name = str(dtype).removeprefix("torch.")
    return {"what": "flash_attention of exact results", "shape": shape, "dtype": name}


def _launched(device: torch.device, dtype: torch.dtype) -> tuple[configurations.Row, int] | None:
    """The row of the table, and the columns that the tail of V has; None if no kernel runs."""
    configurations.forget_chosen()
    q = torch.zeros(1, 16, 1, HEAD_DIM, dtype=dtype, device=device)
    OPERATORS["flash_attention"].ours(q, q, q)
    found = configurations.chosen().get(KERNEL)
    if found is None:
        return None
    from pixart_kernels.attention.forward_launcher import value_tail
    from pixart_kernels.dispatch import launch

    usual = value_tail(HEAD_DIM, launch.architecture(device))
    return found[0], found[1].get("V_TAIL", usual)


def _compute(
    device: torch.device, dtype: torch.dtype, candidate: Candidate
) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, results and what they must be."""
    found = {}
    with configurations.pinned({KERNEL: candidate}):
        for name, inputs in {"one key": one_key, "same weights": same_weights}.items():
            q, k, v, expected = inputs(device, dtype)
            found[name] = OPERATORS["flash_attention"].ours(q, k, v), expected
    return found


def one_key(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the result. Keys are vectors of signs, whose products with others stay below 2/3 of
    that with themselves; queries are 64 times one of them: all other weights are 0 in fp32."""
    batch, queries, keys, heads = ONE_KEY
    generator = torch.Generator().manual_seed(0)
    k = torch.randint(0, 2, (batch, keys, heads, HEAD_DIM), generator=generator).to(dtype) * 2 - 1
    v = torch.randn(batch, keys, heads, HEAD_DIM, generator=generator).to(dtype)
    order = torch.randint(0, keys, (batch, queries, heads, 1), generator=generator)
    order = order.expand(-1, -1, -1, HEAD_DIM)
    q, expected = 64 * k.gather(1, order), v.gather(1, order)
    return q.to(device), k.to(device), v.to(device), expected.to(device)


def same_weights(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the result: queries of zeros, a power of two of keys, whole numbers for values."""
    batch, queries, keys, heads = SAME_WEIGHTS
    generator = torch.Generator().manual_seed(1)
    q = torch.zeros(batch, queries, heads, HEAD_DIM, dtype=dtype)
    k = torch.randn(batch, keys, heads, HEAD_DIM, generator=generator).to(dtype)
    v = torch.randint(-8, 9, k.shape, generator=generator).to(dtype)
    expected = v.double().mean(dim=1, keepdim=True).to(dtype).expand(q.shape)
    return q.to(device), k.to(device), v.to(device), expected.to(device)


def _wrong(made: Tensor, expected: Tensor) -> int:
    """How many numbers are others; NaN is."""
    return int((made != expected).sum())


def _decide(out: Path, context: Context) -> None:
    found = None if context.dry else _launched(context.device, torch.bfloat16)
    what = _what(torch.bfloat16)
    if found is None:
        context.row("ours", "not measured: no kernel of ours ran here", **what)
        return
    row, usual = found
    from pixart_kernels.dispatch import launch

    right = exact_configurations(context.known)
    taken = chosen(plain(row.candidates), usual, right)
    new = []
    if taken != plain(row.candidates):
        known = [one for one in context.known if one["part"] == PART and "config" in one]
        words = "wrong" if any(not one.get("exact") for one in known) else "not tried"
        origin = f"{row.source}; products of {NARROW} columns were {words}"
        place = (KERNEL, launch.architecture(context.device), 16, table.span_of(KERNEL, HEAD_DIM))
        new = [table.entry(*place, origin, taken)]
        table.write(out, table.with_entries(table.read(), new))
        table.adopt(out)
    columns = taken[0].get("V_TAIL", usual)
    context.row("ours", **what, columns=columns, entries=new)


def _can_have(candidate: Candidate, columns: int, usual: int) -> bool:
    """Whether a tail of V can have so many columns: the kernels for Hopper always have the fewest."""
    return columns == NARROW if is_gluon(candidate) else columns >= usual


def _with(candidate: Candidate, columns: int) -> Candidate:
    return candidate if is_gluon(candidate) else {**candidate, "V_TAIL": columns}


def exact_configurations(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Those that were tried in every dtype and never wrong."""
    found: dict[str, dict[str, bool]] = {}
    for row in rows:
        if row["part"] == PART and "config" in row:
            found.setdefault(row["config"], {})[row["dtype"]] = bool(row.get("exact"))
    return {
        config
        for config, exact in found.items()
        if len(exact) == len(DTYPES) and all(exact.values())
    }


def chosen(candidates: Sequence[Candidate], usual: int, right: set[str]) -> list[Candidate]:
    """The candidates of the table that remain: with wide tails unless all narrow ones are right, and
    without those kernels for Hopper that are wrong. usual: columns of a tail where none says."""
    plain_ones = [one for one in candidates if not is_gluon(one)]
    narrow = usual >= WIDE or all(
        configurations.describe(_with(one, usual)) in right for one in plain_ones
    )
    return [
        one if is_gluon(one) or narrow else {**one, "V_TAIL": WIDE}
        for one in candidates
        if not is_gluon(one) or configurations.describe(one) in right
    ]
