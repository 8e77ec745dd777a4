"""The rungs of a picture of 4096 × 4096: what is drawn is what is counted, and a figure is a range, measured, or
published with its source."""

import re
from typing import Any

import pytest
import torch
from bench_context import CPU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import ladder as command
from bench.measure.case import Context
from bench.reporting import ladder as page
from bench.reporting.ladder import PEAK, Rates
from bench.workloads import ladder, pipelines, sizes
from pixart.model.transformer import PixArt

RUN: dict[str, Any] = {"machine": {"device": "cuda", "gpu": "An H200"}, "rows": []}
LOW, HIGH = 400, 600  # TFLOP/s


def compiled(*names: str) -> tuple[str, dict[str, Any]]:
    """A result that predicts these rates of attention."""
    found: list[dict[str, Any]] = [
        {"name": name, "tensor + issue": {"tflops": LOW}, "in order": {"tflops": [HIGH, 500]}}
        for name in names
    ]
    return "resources", {"kind": "resources", "runs": [RUN | {"targets": found}]}


def measured(seconds: float, **changes: Any) -> tuple[str, dict[str, Any]]:
    timing = {"median": seconds, "p20": seconds, "p80": seconds, "count": 1, "method": "wall"}
    row: dict[str, Any] = {
        "part": "ladder",
        "variant": "whole",
        "rung": ladder.RUNGS[2].name,
        "seconds": timing,
    }
    row |= {"shape": {"size": "4k"}, "peak_bytes": 3 * 2**30, **changes}
    return "gpu", {"kind": "gpu", "runs": [RUN | {"rows": [row]}]}


def line(text: str, name: str) -> list[str]:
    (found,) = [one for one in text.splitlines() if one.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.strip("|").split("|")]


@pytest.fixture(scope="module")
def context() -> Context:
    made = Context(CPU)
    made.seconds, made.peaks = 0.0, {"matmul": {"per_second": 1.0}, "copy": {"per_second": 1.0}}
    return made


def test_the_transformer_is_called_for_what_is_counted(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the rung that has all: fewer steps, guidance in a part of them, and a schedule."""
    rung, calls = ladder.RUNGS[-2], list[tuple[int, tuple[int, ...]]]()
    forward = PixArt.forward

    def recorded(model: Any, latents: Any, *args: Any, **options: Any) -> Any:
        calls.append((len(latents), tuple(options.get("kv_ratios", ()))))
        return forward(model, latents, *args, **options)

    monkeypatch.setattr(PixArt, "forward", recorded)
    rows = context.run("ladder", ladder.case(rung, sizes.TINY))
    assert [row["variant"] for row in rows] == [*ladder.STAGES]
    assert {row["status"] for row in rows} == {"measured"}
    found = {row["variant"]: row for row in rows}
    parts = sum(found[stage]["seconds"]["median"] for stage in ladder.STAGES[:-1])
    assert found["whole"]["seconds"]["median"] == pytest.approx(parts)
    assert found["denoising"]["flops"] == ladder.flops(rung, sizes.TINY)
    asked = [(one.halves, one.ratios) for one in ladder.evaluations(rung, sizes.TINY)]
    assert calls[-len(asked) :] == asked
    assert {1, 2} == {halves for halves, _ in asked} and {(), (4, 4)} == {
        ratios for _, ratios in asked
    }


@pytest.mark.parametrize(("size", "grid"), [("tiny", (6, 5)), ("1k", (8, 8))])
def test_text_encoder_and_decoder_take_the_flops_that_torch_counts(
    size: str, grid: tuple[int, int]
) -> None:
    config = sizes.config(size)
    with torch.device("meta"), pipelines.half_precision():
        text, vae = pipelines.text_encoder(config), pipelines.vae(config)
        tokens, latents = torch.zeros(1, 12, dtype=torch.long), torch.empty(1, 4, *grid)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vae.decode(latents)  # type: ignore[operator]
        assert counter.get_total_flops() == pipelines.decoder_flops(config, grid)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        text(tokens)
        assert counter.get_total_flops() == pipelines.text_flops(config, 12)


def test_a_rung_takes_less_than_the_one_before_it() -> None:
    work = [ladder.flops(rung, "4k") for rung in ladder.RUNGS]
    assert work == sorted(work, reverse=True) and len({*work}) == len(work)
    assert [case.name for case in ladder.cases()] == [rung.name for rung in ladder.RUNGS[::-1]]


def test_work_is_split_without_a_rest() -> None:
    """Attention and other products are all FLOPs, but for the merging, which only moves."""
    for rung in ladder.RUNGS[1], ladder.RUNGS[-2]:
        config, grid = sizes.config("4k", rung.compression), sizes.grid("4k")
        merging = []
        for one in ladder.evaluations(rung, "4k"):
            attention, products, moved = page.work(config, grid, one.ratios)
            whole = page.cost.forward_flops(config, grid, encoded=True, kv_ratios=one.ratios)
            merging.append(whole - attention - products)
            assert 0 < merging[-1] < 0.002 * whole and moved > 0
        assert sum(merging) < 0.002 * ladder.flops(rung, "4k")


def test_a_prediction_goes_from_the_fastest_to_the_slowest_of_what_is_taken() -> None:
    rates = page.attention_rates(
        [compiled("forward, Triton", "forward, Triton, online", "forward, Tritonal")],
        "forward, Triton",
    )
    assert rates == (LOW * 1e12, HIGH * 1e12)
    rung = ladder.RUNGS[0]
    low, high = page.denoising(rung, "4k", Rates.of(rates))
    attention = 40 * 28 * page.cost.attention_flops(65536, 65536, 1152)
    assert attention / rates[1] < low < high < 1.4 * attention / rates[0]
    found = page.stages(rung, "4k", Rates.of(rates))
    assert found["whole"] == pytest.approx(
        tuple(sum(found[stage][end] for stage in ladder.STAGES[:-1]) for end in (0, 1))
    )
    assert found["VAE"][0] == ladder.decoder_flops("4k") / (page.VAE[1] * PEAK)


def test_without_results_nothing_is_predicted_and_nothing_is_measured() -> None:
    text = page.overview([])
    for rung in ladder.RUNGS:
        cells = line(text, rung.name)
        assert cells[3:6] == ["no kernel was compiled"] * 2 + ["not measured"]


def test_what_was_measured_stands_beside_its_prediction() -> None:
    """Of this rung, size and GPU, and nothing else's."""
    name = ladder.RUNGS[2].name
    there = [compiled("forward, Triton"), measured(12.5)]
    cells = line(page.overview(there), name)
    assert cells[5] == "12.5 s (12.5 to 12.5), 3.0 GiB at its peak"
    low, high = re.fullmatch(r"(\S+) to (\S+) s", cells[3]).groups()  # type: ignore[union-attr]
    assert 0 < float(low) < float(high)
    for other in (
        measured(1, rung="another"),
        measured(1, shape={"size": "2k"}),
        measured(1, variant="VAE"),
        measured(1, part="pictures"),
    ):
        assert line(page.overview([other]), name)[5] == "not measured"
    elsewhere = measured(1)
    elsewhere[1]["runs"][0]["machine"] = {"device": "cuda", "gpu": "An A100"}
    assert line(page.overview([elsewhere]), name)[5] == "not measured"


def test_what_others_publish_has_its_machine_and_its_source(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for size in ("1k", "2k", "4k"):
        assert command.main(["--size", size]) == 0
        text = capsys.readouterr().out
        (said,) = [one for one in text.splitlines() if one.startswith("- Published: ")]
        for one in page.PUBLISHED:
            if size in one.seconds:
                assert f"**{one.seconds[size]:g} s**, published" in text
                assert one.name in said and one.source in said and "A100" in one.source
    assert "published: less than" in text
