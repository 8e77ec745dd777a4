"""What bench.tune makes of its measurements: who wins, what the table holds then, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_context import CPU, quick

from bench import tune
from bench.measure import table
from bench.measure.results import Row
from bench.workloads import candidates, columns
from bench.workloads.candidates import ALWAYS, CHOSEN, NEVER, SWITCHES, TILES, Place
from pixart_kernels.dispatch import configurations
from pixart_kernels.dispatch.configurations import describe

FORWARD = Place("attention.forward", "sm_90", 16, 72)
SUMS = Place("modulation.forward", "sm_90", 16, 1152)
FIRST = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
OTHER = {"BLOCK_Q": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}


def _row(
    stage: str,
    candidate: dict[str, Any],
    seconds: float | None,
    pairs: int = 2**24,
    place: Place = FORWARD,
    passed: bool = True,
) -> Row:
    row: Row = {"part": "configurations", "what": "attention", "dtype": "bfloat16"}
    row |= {"shape": {"tokens": pairs}, "pairs": pairs, "stage": stage, "candidate": candidate}
    row |= {**place._asdict(), "config": describe(candidate), "passed": passed}
    if seconds is None:
        return row | {"status": "died: signal 11"}
    status = "measured" if passed else "computes something else: 0.5 from fp64"
    return row | {"status": status, "seconds": {"median": seconds}}


def _candidates(rows: list[Row], place: Place = FORWARD) -> list[dict[str, Any]]:
    """Of what was measured, and right in fp16 too unless a row of the last stage says otherwise."""
    tried = [row for row in rows if row["stage"] == TILES]
    halves = [
        row | {"stage": CHOSEN, "dtype": "float16", "status": "measured", "passed": True}
        for row in tried
        if row.get("seconds") is not None
    ]
    made = [
        one
        for one in candidates.entries([*rows, *halves], lambda: "measured")
        if one["kernel"] == place.kernel
    ]
    return made[0]["candidates"] if made else []


def test_the_fastest_over_all_calls_wins_and_the_others_follow() -> None:
    rows = [_row(TILES, FIRST, 1.0), _row(TILES, OTHER, 1.1)]
    rows += [_row(TILES, FIRST, 3.0, 2**28), _row(TILES, OTHER, 2.0, 2**28)]
    assert _candidates(rows) == [OTHER, FIRST]
    assert candidates.entries(rows, lambda: "measured") == [], "fp16 was not tried"
    rows += [_row(CHOSEN, OTHER, 1.0) | {"dtype": "float16"}]
    (entry,) = candidates.entries(rows, lambda: "measured on X, commit Y")
    assert entry["architectures"] == ["sm_90"] and entry["bits"] == 16
    assert entry["sizes"] == [65, 72] and entry["source"] == "measured on X, commit Y"


def test_the_first_stays_first_where_nobody_is_faster_by_more_than_noise() -> None:
    assert _candidates([_row(TILES, FIRST, 1.005), _row(TILES, OTHER, 1.0)]) == [FIRST, OTHER]


@pytest.mark.parametrize("ended", [{"passed": False, "seconds": 0.1}, {"seconds": None}])
def test_who_is_wrong_or_dies_at_any_call_is_not_in_the_table(ended: dict[str, Any]) -> None:
    rows = [_row(TILES, FIRST, 1.0), _row(TILES, OTHER, 0.1)]
    rows += [_row(TILES, FIRST, 1.0, 2**28), _row(TILES, OTHER, pairs=2**28, **ended)]
    assert _candidates(rows) == [FIRST]
    assert _candidates([_row(TILES, FIRST, pairs=2**28, **ended)]) == []


def test_a_row_has_a_candidate_for_tensors_that_the_copy_engine_cannot_take() -> None:
    gluon = {"language": "gluon", "BLOCK_K": 128}
    rows = [_row(TILES, FIRST, 1.0), _row(TILES, gluon, 0.5)]
    assert _candidates(rows) == [gluon, FIRST]
    assert _candidates([_row(TILES, FIRST, 1.0, passed=False), rows[1]]) == []


def test_who_is_wrong_in_fp16_is_not_in_the_table() -> None:
    rows = [_row(TILES, one, 1.0, 1, SUMS) for one in (FIRST, OTHER)]
    rows.append(_row(CHOSEN, FIRST, 1.0, 1, SUMS, passed=False))
    assert _candidates(rows, SUMS) == [OTHER]


def _switches(pairs: int, *, always: float, never: float, pointers: float = 2.0) -> list[Row]:
    return [
        _row(SWITCHES, FIRST, 1.0, pairs),
        _row(SWITCHES, FIRST | {"bound_from": ALWAYS}, always, pairs),
        _row(SWITCHES, FIRST | {"bound_from": NEVER}, never, pairs),
        _row(SWITCHES, FIRST | {"tma": False}, pointers, pairs),
    ]


def test_the_bound_is_looked_for_from_where_it_pays() -> None:
    rows = _switches(2**20, always=2, never=1) + _switches(2**22, always=3, never=2)
    rows += _switches(2**24, always=8, never=10)
    assert candidates.switched(FIRST, rows, FORWARD) == FIRST | {"bound_from": 2**24}
    rows = _switches(2**20, always=2, never=1)
    assert candidates.switched(FIRST, rows, FORWARD)["bound_from"] == NEVER


def test_pointers_are_taken_where_they_are_faster() -> None:
    rows = _switches(2**24, always=1, never=2, pointers=0.5)
    made = candidates.switched(FIRST, rows, FORWARD)
    assert made == FIRST | {"tma": False, "bound_from": 2**24}


def test_what_was_put_together_wins_once_it_was_right() -> None:
    rows = [_row(TILES, FIRST, 1.0), *_switches(2**24, always=1, never=2)]
    final = FIRST | {"bound_from": 2**24}
    assert _candidates(rows) == [FIRST]
    assert _candidates([*rows, _row(CHOSEN, final, 1.0, passed=False)]) == [FIRST]
    assert _candidates([*rows, _row(CHOSEN, final, 1.0) | {"dtype": "float16"}]) == [final, FIRST]


def test_a_table_that_was_measured_is_measured_again_from_its_plain_candidates() -> None:
    final = FIRST | {"bound_from": 2**24}
    assert candidates.plain([final, FIRST, OTHER]) == [FIRST, OTHER]
    wide = [one | {"V_TAIL": 16} for one in (FIRST, OTHER)]
    gluon = {"language": "gluon", "BLOCK_K": 128}
    assert candidates.plain([*wide, gluon]) == [*wide, gluon]
    assert candidates.plain(wide) == wide and candidates.plain([*wide, FIRST]) == [FIRST]


def test_the_table_is_written_as_it_was_and_served_by_the_new_rows(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    table.write(path, table.read())
    assert table.read(path) == table.read()
    new = table.entry("attention.forward", "sm_90", 16, (65, 72), "measured on X", [OTHER])
    table.write(path, table.with_entries(table.read(), [new]))
    rows = configurations.parse(path.read_text())
    assert len(rows) == len(table.read()) + 1

    def first(architecture: str, bits: int, size: int) -> Any:
        return next(
            row
            for row in rows
            if row.kernel == "attention.forward" and row.serves(architecture, bits, size)
        )

    assert first("sm_90", 16, 72).source == "measured on X"
    for others in (("sm_90", 16, 64), ("sm_90", 32, 72), ("sm_80", 16, 72)):
        assert first(*others) == configurations.find("attention.forward", *others)
    again = new | {"source": "measured on Y"}
    table.write(path, table.with_entries(table.read(path), [again]))
    assert [one["source"] for one in table.read(path)].count("measured on Y") == 1
    assert "measured on X" not in path.read_text()


def test_what_is_no_table_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(ValueError, match="row 0 of the configurations"):
        table.write(path, [{"kernel": "k", "architectures": ["*"], "tiles": 1, "candidates": [{}]}])
    assert not path.exists()


def test_sizes_stand_for_those_that_are_cut_alike() -> None:
    assert table.span_of("attention.forward", 72) == (65, 72)
    assert table.span_of("attention.backward_q", 64) == (57, 64)
    assert table.span_of("modulation.forward", 1152) == (1025, 2048)


def _exact(candidate: dict[str, Any], dtype: str, exact: bool | None) -> Row:
    row: Row = {"part": "columns", "columns": 8, "dtype": dtype, "config": describe(candidate)}
    return row if exact is None else row | {"exact": exact}


def test_narrow_columns_are_right_in_every_dtype_or_they_are_not_used() -> None:
    narrow = [one | {"V_TAIL": 8} for one in (FIRST, OTHER)]
    wide = [one | {"V_TAIL": 16} for one in (FIRST, OTHER)]
    right = [_exact(one, dtype, True) for one in narrow for dtype in ("bfloat16", "float16")]

    def chosen(rows: list[Row]) -> list[Any]:
        return columns.chosen([FIRST, OTHER], 8, columns.exact_configurations(rows))

    assert chosen(right) == [FIRST, OTHER]
    assert chosen(right[:-1]) == wide  # the process ended before the last one
    assert chosen([*right[:-1], _exact(narrow[1], "float16", None)]) == wide  # it died
    assert chosen([*right[:-1], _exact(narrow[1], "float16", False)]) == wide
    assert columns.chosen([FIRST], 16, set()) == [FIRST]  # as Triton 3.6 has them anyway


def test_a_kernel_for_hopper_whose_columns_are_wrong_is_no_candidate() -> None:
    hoppers = {"language": "gluon", "BLOCK_K": 128}
    rows = [_exact(one, d, True) for one in (FIRST | {"V_TAIL": 8}, hoppers) for d in ("a", "b")]
    right = columns.exact_configurations(rows)
    assert columns.chosen([FIRST, hoppers], 8, right) == [FIRST, hoppers]
    assert columns.chosen([FIRST, hoppers], 8, right - {describe(hoppers)}) == [FIRST]
    place = candidates.Place("attention.forward", "sm_90", 16, 72)
    assert {"tma": False} not in candidates.switches(place, hoppers)


@pytest.mark.parametrize("dtype", columns.DTYPES)
@pytest.mark.parametrize("make", [columns.one_key, columns.same_weights])
def test_the_exact_results_are_exact_in_any_right_attention(make: Any, dtype: torch.dtype) -> None:
    q, k, v, expected = (tensor.double() for tensor in make(CPU, dtype))
    batch, head = -1, -1
    scores = 72**-0.5 * q[batch, :, head] @ k[batch, :, head].T
    weights = (scores.float() - scores.float().amax(1, keepdim=True)).exp().double()
    made = weights @ v[batch, :, head] / weights.sum(1, keepdim=True)
    assert torch.equal(made.to(dtype), expected[batch, :, head].to(dtype))
    if make is columns.one_key:
        assert bool(((weights > 0).sum(1) == 1).all())


def test_without_kernels_nothing_is_tried(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    context = quick()
    for case in (columns.cases(out)[0], columns.cases(out)[-1]):
        context.run("columns", case)
    context.run("configurations", candidates.cases(("tiny",), out)[-1])
    assert all(row["status"].startswith("not measured: no ") for row in context.rows)
    assert not out.exists()


def test_without_a_gpu_tuning_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "table.json"
    assert tune.main(["--out", str(out)]) == 2
    assert capsys.readouterr().err == "bench.tune measures a GPU, and torch sees none here\n"
    assert not out.exists()


def test_what_was_found_goes_into_the_checkouts_table_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.json"
    table.write(own, table.read())
    monkeypatch.setattr(configurations, "PATH", own)
    new = table.entry("attention.forward", "sm_90", 16, (65, 72), "measured on X", [OTHER])
    content: dict[str, Any] = {"runs": [{"rows": [{"status": "measured"}, {"entries": [new]}]}]}
    before = own.read_text()
    assert tune._keep({"runs": [{"rows": [{}]}]}, tmp_path / "out.json", is_ours=True) == 1
    assert tune._keep(content, tmp_path / "out.json", is_ours=False) == 0
    assert own.read_text() == before
    assert tune._keep(content, tmp_path / "out.json", is_ours=True) == 0
    assert json.loads(own.read_text())["rows"][0] == new
    assert capsys.readouterr().out.endswith(f"{own}: 1 rows, measured on X\n")


def test_candidates_are_checked_then_timed_and_the_right_ones_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that launches by the table, whose second candidate computes something else."""
    right, wrong = {"MOST_ROWS": 4}, {"MOST_ROWS": 8}
    modulate = candidates.OPERATORS["modulate"]
    row = configurations.Row(SUMS.kernel, ("sm_90",), "compiled code", (right, wrong))

    def ours(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        taken = configurations.choose(SUMS.kernel, "sm_90", 16, 1152)
        made: torch.Tensor = modulate.reference(x, *rest, **more)
        return made if taken == right else made * 2

    monkeypatch.setattr(configurations, "rows", lambda: (row,))
    monkeypatch.setattr(table, "adopt", lambda path: None)
    monkeypatch.setattr(candidates, "OPERATORS", {"modulate": modulate._replace(ours=ours)})
    monkeypatch.setattr(candidates, "_place", lambda *_: SUMS)
    monkeypatch.setattr(candidates, "source", lambda device: "measured on X, commit Y")
    out, context = tmp_path / "table.json", quick()
    for case in candidates.cases(("tiny",), out):
        context.run("configurations", case)
    statuses = {row["config"]: row["status"] for row in context.known if "config" in row}
    assert statuses["MOST_ROWS=4"] == "measured"
    assert statuses["MOST_ROWS=8"].startswith("computes something else: 1 from fp64")
    first = table.read(out)[[one["kernel"] for one in table.read(out)].index(SUMS.kernel)]
    assert first["candidates"] == [right] and first["source"] == "measured on X, commit Y"
