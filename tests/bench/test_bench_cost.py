"""bench.saving, bench.cpu and bench.growth: what they derive from times, and what they refuse."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cpu, growth, saving
from bench.measure import machine, memory, results, timing
from bench.reporting import sections
from bench.workloads import blocks, sizes
from bench.workloads import models as steps
from pixart_kernels import flash_attention

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"seconds": 0, "least_rounds": 3}


@pytest.mark.parametrize(
    ("size", "published"), [("1k", 0.123), ("2k", 0.248), ("4k", 0.333), ("512", 0.041)]
)
def test_composed_blocks_save_the_published_share_of_flops(size: str, published: float) -> None:
    work = (sum(blocks.flops(size, ratio).values()) for ratio in (1, 2))
    before, after = saving.compose(sizes.XL2, *work)
    assert 1 - after / before == pytest.approx(published, abs=6e-4)
    assert before == sizes.step_flops(size, 1, compressed=False)
    assert after == sizes.step_flops(size, 1, compressed=True)


def test_a_model_is_composed_of_its_dense_and_its_compressed_blocks() -> None:
    assert saving.compose(sizes.XL2, 3, 2) == (28 * 3, 14 * 3 + 14 * 2)
    assert saving.compose(sizes.XL2._replace(depth=5), 3, 2) == (5 * 3, 2 * 3 + 3 * 2)


def _row(
    dense: dict[str, float],
    compressed: dict[str, float],
    size: str = "2k",
    times: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Of a block whose families of operations take these seconds, and one round of each; or with the
    times of whole models."""
    seconds = {
        "1": dict.fromkeys(blocks.FAMILIES, 0.0) | dense,
        "2": dict.fromkeys(blocks.FAMILIES, 0.0) | compressed,
    }
    took = times or {name: sum(families.values()) for name, families in seconds.items()}
    timed = {
        name: timing.summarize([median], "wall")
        for name, median in (took | {saving.THEIRS: 3.0}).items()
    }
    passes = {name: [families] for name, families in seconds.items()}
    return saving._result(size, 2, times is not None, timed, passes)[0]


def test_what_is_eaten_adds_up_to_the_saving_that_is_missing() -> None:
    row = _row(
        {blocks.SELF: 0.5, blocks.MLP: 1.5},
        {blocks.SELF: 0.2, blocks.MLP: 1.4, blocks.MERGING: 0.6},
    )
    assert row["time_saved"] == pytest.approx(-0.05)
    assert sum(row["eaten"].values()) == pytest.approx(row["flops_saved"] - row["time_saved"])
    assert row["eaten"][blocks.MERGING] == pytest.approx(0.15)
    assert row["eaten"][blocks.MLP] == pytest.approx(-0.025)


def test_what_whole_models_lose_beside_the_profiled_blocks_is_the_rest() -> None:
    dense, compressed = {blocks.SELF: 0.5}, {blocks.SELF: 0.2, blocks.MERGING: 0.1}
    row = _row(dense, compressed, times={"1": 30, "2": 29.4})  # the blocks alone saved 20 %
    assert row["time_saved"] == pytest.approx(0.02)
    assert sections._eaten(row)[sections.REST] == pytest.approx(0.2 - 0.02)
    assert sections.culprit(row) == "not in the profile: 18.0 points"


def test_a_saving_is_that_of_a_round_for_a_slow_round_slows_both() -> None:
    timed = {"1": [1.0, 2.0, 2.1], "2": [0.8, 1.7, 1.6], saving.THEIRS: [1.0, 1.0, 1.0]}
    passes = {
        name: [dict.fromkeys(blocks.FAMILIES, one) for one in timed[name]] for name in ("1", "2")
    }
    all_of_them = {name: timing.summarize(samples, "wall") for name, samples in timed.items()}
    row, compressed = saving._result("2k", 2, True, all_of_them, passes)
    assert compressed.samples == (0.8, 1.7, 1.6)
    assert row["time_saved"] == pytest.approx(0.2)
    # Half of the blocks save as much of each of 6 families; of FLOPs merging saves none.
    assert row["eaten"][blocks.MERGING] == pytest.approx(-0.2 / 2 / 6)
    assert row["operations"]["dense"][blocks.MLP] == 2.0


def test_the_operation_that_eats_the_difference_is_named() -> None:
    eaten = _row({blocks.SELF: 1, blocks.MLP: 1}, {blocks.SELF: 1, blocks.MLP: 1})
    assert sections.culprit(eaten).startswith(f"{blocks.SELF}: 24.8 points")
    merged = _row({blocks.SELF: 1}, {blocks.SELF: 0.25, blocks.MERGING: 0.7})
    assert sections.culprit(merged).startswith(f"{blocks.MERGING}: 35.0 points")
    enough = _row({blocks.SELF: 1}, {blocks.SELF: 0.25})
    assert sections.culprit(enough).startswith("nothing")


@pytest.mark.parametrize("whole", [True, False])
def test_a_saving_is_measured_on_whole_models_or_composed_of_blocks(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "WHOLE_ON_CPU", (sizes.TINY,) if whole else ())
    timed: list[dict[str, timing.Timing]] = []
    measure_all = timing.measure_all

    def spy(*args: Any, **kwargs: Any) -> dict[str, timing.Timing]:
        timed.append(measure_all(*args, **kwargs))
        return timed[-1]

    monkeypatch.setattr(timing, "measure_all", spy)
    found = saving.measure(sizes.TINY, (2, 4), CPU, seconds=0, rounds=3)
    depth = 1 if whole else sizes.TINY_MODEL.depth
    for row, compressed in found:
        assert row["compressed"] == compressed.summary()
        dense, other = timed[0]["1"].median, timed[0][str(row["ratio"])]
        assert row["scope"] == ("whole" if whole else "block")
        assert row["dense"]["median"] == pytest.approx(depth * dense)
        assert row["diffusers"]["median"] == pytest.approx(depth * timed[0][saving.THEIRS].median)
        kept = [
            (second if whole else first + second)
            for first, second in zip(timed[0]["1"].samples, other.samples, strict=True)
        ]
        assert compressed.samples == pytest.approx(kept)
        for seconds in row["operations"].values():
            assert set(seconds) == set(blocks.FAMILIES) and min(seconds.values()) >= 0


# A grid of 6 × 6 that 2 divides is merged by a product; one of 4 is not, and compress_kv runs.
@pytest.mark.parametrize(("ratio", "projections", "merging"), [(1, 4, 0), (2, 5, 1), (4, 4, 1)])
def test_every_operation_of_a_block_is_put_into_its_family(
    ratio: int, projections: int, merging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixart.model.folding.FOLDED_TOKENS", 1)
    call = blocks.ours(sizes.TINY, ratio, CPU, torch.bfloat16)
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        call()
    events = [event for event in profile.events() if event.cpu_parent is None]
    named = zip(blocks._ordered(events), blocks._families(events, 144), strict=True)
    work = [
        (event.name, family)
        for event, family in named
        if event.name in blocks._PRODUCTS or event.name.startswith("pixart::")
    ]
    counts = {family: sum(one == family for _, one in work) for family in blocks.FAMILIES}
    assert counts[blocks.SELF] == counts[blocks.CROSS] == 1
    assert counts[blocks.MLP] == 2 and counts[blocks.ELEMENTWISE] == 3
    assert counts[blocks.PROJECTIONS] == projections
    assert counts[blocks.MERGING] == (1 if ratio == 4 else 0)
    assert bool(merging) == any(
        family == blocks.MERGING and event.name in ("aten::layer_norm", "pixart::compress_kv")
        for event, family in zip(
            blocks._ordered(events), blocks._families(events, 144), strict=True
        )
    )


def test_blocks_are_profiled_in_turn_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []
    monkeypatch.setattr(blocks, "_profile", lambda call, width, device: met.append(call()))
    calls = {name: (lambda name=name: name) for name in ("1", "2", "4")}
    blocks.operations(calls, sizes.TINY, CPU, 3)
    assert met == ["1", "2", "4", "4", "2", "1", "1", "2", "4"]


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_the_flops_of_a_block_are_those_of_the_step(ratio: int) -> None:
    one = sizes.TINY_MODEL._replace(depth=1)
    keys = sizes.tokens(sizes.TINY, ratio)
    expected = sizes.forward_flops(one, sizes.tokens(sizes.TINY), keys, 1)
    assert sum(blocks.flops(sizes.TINY, ratio).values()) == expected


def test_floors_of_a_block_have_its_flops_and_every_byte() -> None:
    grid = sizes.grid(sizes.TINY)
    for variant, ratio in (("dense", 1), ("compressed", 2), ("diffusers", 1)):
        work = growth.floors(sizes.TINY_MODEL, grid, variant)
        assert sum(flops for flops, _ in work) == sum(blocks.flops(sizes.TINY, ratio).values())
        assert all(moved > 0 for _, moved in work)
    width, tokens = 144, 36
    qkv = 2 * (tokens * (1 + 3) * width + 3 * width * width)
    assert growth.floors(sizes.TINY_MODEL, grid, "dense")[0] == (6 * tokens * width**2, qkv)


def _variants() -> dict[str, Any]:
    models = steps.build_ours(sizes.TINY, CPU, None), steps.build_theirs(sizes.TINY, CPU)
    return cpu.variants(sizes.TINY, torch.float32, *models)


def test_the_models_agree_and_are_compared_with_the_same_weights() -> None:
    rows = cpu.measure(sizes.TINY, torch.float32, _variants(), **QUICK)
    by_name = {row["variant"]: row for row in rows}
    assert set(by_name) == {"ours", "ours, caption encoded", "diffusers"}
    assert all(row["difference_from_diffusers"] < 1e-5 for row in rows)
    theirs = by_name["diffusers"]
    assert by_name["ours"]["flops"] == theirs["flops"]
    # A caption's embedder, 48 -> 144 -> 144, and keys and values in 2 blocks, of 12 tokens.
    encoded = 2 * 12 * 144 * (48 + 144 + 2 * 2 * 144)
    assert theirs["flops"] - by_name["ours, caption encoded"]["flops"] == encoded
    for row in rows:
        assert row["times_as_fast"] == theirs["median"] / row["median"]
        assert row["reps"] >= 3 and row["p20"] <= row["median"] <= row["p80"]


def test_nothing_is_timed_if_the_models_disagree() -> None:
    calls = _variants()
    wrong = {**calls, "ours": lambda: (1 + 1e-5) * calls["ours"]()}
    with pytest.raises(RuntimeError, match="ours must agree with diffusers within 3e-06"):
        cpu.measure(sizes.TINY, torch.float32, wrong, **QUICK)
    with pytest.raises(RuntimeError, match="got nan"):
        cpu.check({"ours": float("nan")}, torch.bfloat16)


@pytest.mark.skipif(not os.access(memory.RESET, os.W_OK), reason="the kernel does not tell")
@pytest.mark.parametrize("command", ["growth", "cpu"])
def test_a_peak_has_nothing_of_what_is_set_up_once(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 64 << 20
    kept: list[torch.Tensor] = []

    def call() -> torch.Tensor:
        if not kept:
            kept.append(torch.ones(size, dtype=torch.uint8))
        return torch.ones(8)

    monkeypatch.setattr(blocks, "ours", lambda *arguments: call)
    if command == "growth":
        (row,) = growth.measure(sizes.TINY, ["dense"], CPU, torch.float32, **QUICK)
    else:
        (row,) = cpu.measure(sizes.TINY, torch.float32, {"diffusers": call}, **QUICK)
    assert kept and row["peak_bytes"] < size // 4


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_exponents_are_fitted_in_logarithms(power: float) -> None:
    points = [(n, 3 * n**power) for n in (256, 1024, 4096)]
    assert sections.exponent(points) == pytest.approx(power)
    uneven = [(n, y * factor) for (n, y), factor in zip(points, (2, 1, 2), strict=True)]
    assert sections.exponent(uneven) == pytest.approx(power)


def test_a_roofline_takes_the_slower_of_flops_and_bytes_of_each_operation() -> None:
    row = {"floors": [[100, 1], [1, 100]]}
    assert sections.roofline(row, (10, 5)) == 100 / 10 + 100 / 5
    assert sections.roofline({"floors": None}, (10, 5)) is None


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


MACHINE = {"device": "cpu", "processor": "One", "cores": 2, "threads": 2}


def _content(command: str, **cases: float) -> dict[str, Any]:
    rows = [{"case": case, "value": value} for case, value in cases.items()]
    run = {"command": command, "date": command, "machine": MACHINE, "rows": rows}
    return {"kind": "saving", "runs": [run]}


def test_a_later_run_replaces_what_it_measured_again_and_nothing_else() -> None:
    first = results.merge(None, _content("first", a=1, b=2))
    both = results.merge(first, _content("second", b=3, c=4))
    found = [
        (run["command"], row["case"], row["value"]) for run in both["runs"] for row in run["rows"]
    ]
    assert found == [("first", "a", 1), ("second", "b", 3), ("second", "c", 4)]
    # The run that is going on saves again; a run of which nothing is left disappears.
    again = results.merge(both, _content("second", b=3, c=4, d=5))
    assert [len(run["rows"]) for run in again["runs"]] == [1, 3]
    assert [run["command"] for run in results.merge(again, _content("third", a=0))["runs"]] == [
        "second",
        "third",
    ]


def test_results_of_another_command_or_machine_are_not_mixed() -> None:
    first, other = _content("first", a=1), _content("second", a=1)
    with pytest.raises(ValueError, match="must name a file of cpu, got one of saving"):
        results.merge(first, {**other, "kind": "cpu"})
    other["runs"][0]["machine"] = {**MACHINE, "threads": 1}
    with pytest.raises(
        ValueError, match="of this machine, One, 2 cores, 1 threads, got one of One"
    ):
        results.merge(first, other)


def test_what_other_processes_took_is_told() -> None:
    before, after = results.Moment(), results.Moment()
    cores = results.os.cpu_count() or 1
    before.wall, before.own, before.all = 10, 5, 100
    after.wall, after.own, after.all = 20, 8, 100 + 3 + 4 * cores
    assert after.elsewhere(before) == pytest.approx(0.4)
    after.wall = 10.5
    assert after.elsewhere(before) is None
    after.wall, after.all = 20, None
    assert after.elsewhere(before) is None


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A commit of a source and of a result."""
    for name in ("bench/deep/a.py", "bench/results/r.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    machine._git("init")
    machine._git("add", ".")
    machine._git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    return tmp_path


@pytest.mark.parametrize("changed", ["bench/deep/a.py", "bench/b.py"])
def test_a_tree_is_edited_if_a_source_is_and_not_if_a_result_is(
    repository: Path, changed: str
) -> None:
    before = machine.revision()
    (repository / "bench/results/r.json").write_text("2")
    assert machine.revision() == before and before["commit"] and not before["modified"]
    (repository / changed).write_text("2")
    after = machine.revision()
    assert after["modified"] and after["source_sha256"] != before["source_sha256"]


def test_the_peaks_are_those_that_training_takes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.bfloat16: 2e9, torch.float32: 1e9}
    monkeypatch.setattr(machine, "measure_peak", lambda device, dtype, seconds: rates[dtype])
    monkeypatch.setattr(
        timing,
        "measure",
        lambda calls, *_, **__: {name: timing.summarize([4.0, 2.0], "wall") for name in calls},
    )
    peaks = machine.peaks(CPU, tiny=True)
    assert peaks["copy"]["per_second"] == 2 * (1 << 22) / 2.0  # of the quickest
    assert machine.product_rate(peaks, torch.float16) == rates[torch.bfloat16]
    assert machine.product_rate(peaks, torch.float32) == rates[torch.float32]


@pytest.mark.parametrize("module", [saving, cpu, growth])
def test_a_command_prints_its_table_and_keeps_its_rows(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    quick = ["--sizes", sizes.TINY, "--seconds", "0", "--rounds", "1", "--device", "cpu"]
    assert module.main([*quick, "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    (run,) = content["runs"]
    assert run["command"].startswith(f"python -m bench.{content['kind']} --sizes tiny")
    assert run["tiny"] and run["rows"] and run["peaks"]["copy"]["per_second"] > 0
    assert {"commit", "modified", "source_sha256", "libraries"} <= set(run["machine"])
    printed = capsys.readouterr().out
    assert "| tiny | 36 |" in printed or "| tiny | float32 |" in printed
    assert "not measured" in printed and f"1. `{run['command']}`; {run['date']}" in printed
