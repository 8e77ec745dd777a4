"""bench.saving, bench.cpu and bench.growth: what they derive from times, and what they refuse."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_context import CPU, quick

from bench import cpu, growth, saving
from bench.measure import memory, results, timing
from bench.workloads import blocks, models, sizes
from bench.workloads.models import OURS, THEIRS
from bench.workloads.sizes import Compression
from pixart import cost
from pixart_kernels import flash_attention

MERGED = Compression()
R2 = MERGED.variant


@pytest.mark.parametrize(
    ("size", "published"), [("1k", 0.123), ("2k", 0.248), ("4k", 0.333), ("512", 0.041)]
)
def test_composed_blocks_save_the_published_share_of_flops(size: str, published: float) -> None:
    one, merged = (sum(blocks.flops(size, kind).values()) for kind in (None, MERGED))
    before, after = 28 * one, saving.compose(size, one, merged)
    assert 1 - after / before == pytest.approx(published, abs=6e-4)
    for kind, composed in ((None, before), (MERGED, after)):
        config = sizes.config(size, kind)
        ends = cost.ends_flops(config, sizes.grid(size))
        assert composed == cost.forward_flops(config, sizes.grid(size), encoded=True) - ends


def _saving(
    dense: dict[str, float], compressed: dict[str, float], samples: Any = None, size: str = "2k"
) -> dict[str, Any]:
    """Of a block whose families of operations take these seconds, and one round of each; or of models
    of these samples."""
    seconds = [dict.fromkeys(blocks.FAMILIES, 0.0) | one for one in (dense, compressed)]
    took = [sum(families.values()) for families in seconds]
    whole = samples or [[28 * took[0]], [saving.compose(size, *took)]]
    passes = {name: [one] for name, one in zip((OURS, R2), seconds, strict=True)}
    rows = [{"samples": one} for one in whole]
    return saving.saving(size, MERGED, rows[0], rows[1], passes)


def test_what_is_lost_adds_up_to_the_saving_that_is_missing() -> None:
    found = _saving(
        {blocks.SELF: 0.5, blocks.MLP: 1.5},
        {blocks.SELF: 0.2, blocks.MLP: 1.4, blocks.MERGING: 0.6},
    )
    assert found["time"]["median"] == pytest.approx(-0.05)
    missing = found["flops"] - found["time"]["median"]
    assert sum(found["lost"].values()) == pytest.approx(missing)
    assert found["lost"][blocks.MERGING] == pytest.approx(0.15, abs=1e-3)
    assert found["lost"][blocks.MLP] == pytest.approx(-0.025)


def test_a_saving_is_that_of_a_round_for_a_slow_round_slows_both() -> None:
    samples = [[1.0, 2.0, 2.1], [0.8, 1.7, 1.6]]
    found = _saving({blocks.SELF: 1}, {blocks.SELF: 1}, samples)
    assert found["time"]["median"] == pytest.approx(0.2)
    assert found["time"]["p20"] == pytest.approx(0.15) and found["paper"] == 0.34


@pytest.mark.parametrize("whole", [True, False])
def test_a_saving_is_measured_on_whole_models_or_composed_of_blocks(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "WHOLE_ON_CPU", (sizes.TINY,) if whole else ())
    timed: list[Any] = []
    measure = timing.measure

    def spy(*args: Any, **kwargs: Any) -> Any:
        timed.append(measure(*args, **kwargs))
        return timed[-1]

    monkeypatch.setattr(timing, "measure", spy)
    found = {row["variant"]: row for row in quick().run("saving", saving.case(sizes.TINY))}
    depth = 1 if whole else 2
    assert {row["scope"] for row in found.values()} == {"whole" if whole else "block"}
    for name in (OURS, THEIRS):
        expected = [depth * sample for sample in timed[0][name].samples]
        assert found[name]["samples"] == pytest.approx(expected)
    for name in (R2, Compression(4).variant):
        pairs = zip(timed[0][OURS].samples, timed[0][name].samples, strict=True)
        expected = [one if whole else dense + one for dense, one in pairs]
        assert found[name]["samples"] == pytest.approx(expected)
        for seconds in found[name]["saving"]["operations"].values():
            assert set(seconds) == set(blocks.FAMILIES) and min(seconds.values()) >= 0


# A grid of 6 × 6 that 2 divides is merged by a product; one of 4 is not, and compress_kv runs.
@pytest.mark.parametrize(("ratio", "projections", "merging"), [(1, 4, 0), (2, 5, 1), (4, 4, 1)])
def test_every_operation_of_a_block_is_put_into_its_family(
    ratio: int, projections: int, merging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixart.model.folding.FOLDED_TOKENS", 1)
    kind = None if ratio == 1 else Compression(ratio)
    call = blocks.ours(sizes.TINY, kind, CPU, torch.bfloat16)
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        call()
    events = [event for event in profile.events() if event.cpu_parent is None]
    ordered, families = blocks._ordered(events), list(blocks._families(events, 144))
    named = [(event.name, family) for event, family in zip(ordered, families, strict=True)]
    work = [
        family for name, family in named if name in blocks._PRODUCTS or name.startswith("pixart::")
    ]
    assert work.count(blocks.SELF) == work.count(blocks.CROSS) == 1
    assert work.count(blocks.MLP) == 2 and work.count(blocks.ELEMENTWISE) == 3
    assert work.count(blocks.PROJECTIONS) == projections
    assert work.count(blocks.MERGING) == (1 if ratio == 4 else 0)
    merged = [name for name, family in named if family == blocks.MERGING]
    assert bool(merging) == bool({"aten::layer_norm", "pixart::compress_kv"} & set(merged))


def test_blocks_are_profiled_in_turn_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []
    monkeypatch.setattr(blocks, "_profile", lambda call, width, device: met.append(call()))
    calls = {name: (lambda name=name: name) for name in ("1", "2", "4")}
    blocks.operations(calls, sizes.TINY, CPU, 3)
    assert met == ["1", "2", "4", "4", "2", "1", "1", "2", "4"]


def test_floors_of_a_block_have_its_flops_and_every_byte() -> None:
    for kind in (None, MERGED):
        work = blocks.floors(sizes.TINY, kind)
        assert sum(flops for flops, _ in work) == sum(blocks.flops(sizes.TINY, kind).values())
        assert all(moved > 0 for _, moved in work)
    width, tokens = 144, 36
    qkv = 2 * (tokens * (1 + 3) * width + 3 * width * width)
    assert blocks.floors(sizes.TINY, None)[0] == (6 * tokens * width**2, qkv)


def test_models_that_disagree_are_not_timed_and_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = models._call_theirs
    monkeypatch.setattr(models, "_call_theirs", lambda *inputs: (1 + 1e-5) * theirs(*inputs))
    quickly = ["--sizes", sizes.TINY, "--seconds", "0", "--rounds", "1", "--device", "cpu"]
    assert cpu.main([*quickly, "--dtypes", "float32"]) == 1
    error = capsys.readouterr().err
    assert "cpu/tiny/float32/ours: computes something else: out0 is 1e-05" in error


@pytest.mark.skipif(not os.access(memory.RESET, os.W_OK), reason="the kernel does not tell")
def test_a_peak_is_of_the_call_and_not_of_what_came_before_or_is_set_up_once() -> None:
    size = 64 << 20
    kept: list[torch.Tensor] = []

    def first_is_large() -> torch.Tensor:
        if not kept:
            kept.append(torch.ones(size, dtype=torch.uint8))
        return torch.ones(size // 8, dtype=torch.uint8)

    out, small = memory.of_next(first_is_large, CPU)
    assert small is not None and len(out) == size // 8 and size // 8 <= small < size // 2
    _, large = memory.of(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    assert large is not None and size <= large < 2 * size
    meter = memory.Meter(CPU)
    held = torch.ones(size, dtype=torch.uint8)
    assert (meter.held() or 0) >= 0.9 * len(held)


def test_a_meter_tells_nothing_where_nobody_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RESET", Path("/nowhere"))
    assert memory.of(lambda: 1, CPU) == (1, None) and memory.Meter(CPU).held() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_never_holds_all_scores(dtype: torch.dtype, masked: bool) -> None:
    tokens, heads = 4096, 2
    q, k, v = torch.randn(3, 1, tokens, heads, 72, dtype=dtype).unbind(0)
    lengths = torch.tensor([tokens // 2], dtype=torch.int32) if masked else None
    with torch.no_grad():
        _, peak = memory.of(lambda: flash_attention(q, k, v, kv_lengths=lengths), CPU)
    if peak is None:
        pytest.skip("the peak of a process is known on Linux")
    assert peak < heads * tokens**2 * dtype.itemsize / 2


@pytest.mark.parametrize("module", [saving, cpu, growth])
def test_a_command_prints_its_page_and_keeps_its_rows(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    quickly = ["--sizes", sizes.TINY, "--seconds", "0", "--rounds", "1", "--device", "cpu"]
    assert module.main([*quickly, "--json", str(file)]) == 0
    content = results.read(file)
    (run,) = content["runs"]
    assert run["command"].startswith(f"python -m bench.{content['kind']} --sizes tiny")
    assert run["dry_run"] and run["complete"] and run["rows"]
    assert all({"busy_elsewhere", "clocks"} <= set(row) for row in run["rows"])
    printed = capsys.readouterr().out
    assert "| tiny |" in printed and f"1. `{run['command']}`; {run['date']}" in printed


def test_a_picture_is_the_sum_of_its_evaluations() -> None:
    from bench.workloads import planned

    ways = planned.WAYS
    whole = ways[OURS].evaluations(28)
    assert whole == {("both", 28): 20}
    reused = next(way for way in ways.values() if way.reuse is not None).evaluations(28)
    assert reused == {("both", 28): 11, ("both", 1): 9}
    kinds = [("both", 28), ("conditional", 28)]
    times = dict(zip(kinds, ((2.0, 3.0), (1.0, 1.5)), strict=True))
    assert planned._sum(whole, times, 0) == 40.0 and planned._sum(whole, times, 1) == 60.0
    shorter = planned.Way(10, (0.0, 0.5)).evaluations(28)
    assert shorter == {("both", 28): 5, ("conditional", 28): 5}
    assert planned._sum(shorter, times, 0) == 15.0 and planned._halves(shorter) == 15


def test_pictures_and_compiled_blocks_are_rows_of_bench_cpu(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    arguments = ["--sizes", "tiny", "--dtypes", "float32", "--parts", "pictures", "compiled"]
    cpu.main([*arguments, "--rounds", "1", "--seconds", "0", "--json", str(file)])
    rows = {row["id"]: row for row in results.read(file)["runs"][0]["rows"]}
    picture = rows["cpu/picture/tiny/float32/ours"]
    plans = [row for name, row in rows.items() if "picture" in name and row is not picture]
    assert len(plans) == 3 and all(row["flops"] < picture["flops"] for row in plans)
    assert rows["cpu/compiled/tiny/float32/ours compiled"]["seconds_of_first_call"] > 0


def test_a_checkout_that_is_none_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cpu.main(["--parts", "cold", "--before", str(tmp_path)])
    assert "--before must be a checkout of this project" in capsys.readouterr().err
