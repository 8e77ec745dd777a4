"""Whole steps: what the models compute, who agrees with whom, and what a machine may lack."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_model import SMALL
from torch import nn

from bench import bench_pipeline
from bench.measure import timing
from bench.measure.worker import Case, Context
from bench.workloads import comparisons, models, pipelines
from bench.workloads import sizes as shapes
from pixart.config import EMBEDDED, KVCompression, PixArtConfig
from pixart.model.folding import FoldedProjection
from pixart.model.transformer import PixArt

CPU = torch.device("cpu")
COMPRESSED = "ours compressed everywhere"


def _rows(case: Case, *names: str) -> dict[str, dict[str, Any]]:
    context = Context(CPU)
    context.seconds, context.chosen = 0, frozenset(names)
    context.peaks = {name: {"per_second": 1e12} for name in ("matmul", "copy")}
    context.run(case)
    return {row["variant"]: row for row in context.rows}


CASES = [models.denoise(shapes.TINY), models.train(shapes.TINY)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_agree_with_diffusers_and_compressed_ones_with_eager_operators(case: Case) -> None:
    rows = _rows(case, "ours", COMPRESSED, "diffusers")
    assert all(row["agrees"] for row in rows.values())
    assert 0 < rows["ours"]["difference_from_diffusers"] < 0.02
    assert rows[COMPRESSED]["difference_from_eager"] < 0.02


@pytest.mark.parametrize("branch", ["attn.proj", "cross_attn.proj", "mlp.fc2"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_branch_that_computes_nothing_is_found(case: Case, branch: str) -> None:
    def empty_branch(model: nn.Module, resolution: str) -> None:
        assert isinstance(model, PixArt)
        nn.init.zeros_(model.blocks[-1].get_parameter(f"{branch}.weight"))

    broken = models.RECIPES["ours"]._replace(change=empty_branch)
    case = models._case(case.name.split("/")[0], shapes.TINY, {**models.RECIPES, "ours": broken})
    rows = _rows(case, "ours", "diffusers")
    assert rows["ours"]["agrees"] is False and rows["diffusers"]["agrees"] is True


def test_compression_that_is_not_what_its_formula_says_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded = FoldedProjection.weights

    def mirrored(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = folded(*arguments)
        return weight.flip(0), bias

    monkeypatch.setattr(FoldedProjection, "weights", mirrored)
    monkeypatch.setattr("pixart.model.folding.FOLDED_TOKENS", 1)
    assert _rows(CASES[0], COMPRESSED)[COMPRESSED]["agrees"] is False


def test_without_a_compiler_compiled_models_are_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    options = {"backend": "inductor", "dynamic": False}
    monkeypatch.setattr(models, "compile_options", lambda resolution: options)
    with config.patch({"cpp.cxx": (None, "/nonexistent/g++")}):
        rows = _rows(CASES[0], "ours", "ours compiled", "diffusers compiled")
    for name in ("ours compiled", "diffusers compiled"):
        assert rows[name]["status"].startswith("no C++ compiler, which inductor needs on a CPU")
    assert rows["ours"]["status"] == "measured"


def test_the_flops_of_a_row_are_a_share_of_the_peak_of_its_dtype() -> None:
    context = Context(CPU)
    context.peaks = {"matmul": {"per_second": 8.0}, "matmul_fp32": {"per_second": 2.0}}
    took = timing.summarize([1.0], "wall")
    shares = {
        dtype: comparisons.measured(took, context, 1, 0, dtype)["share_of_matmul"]
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    }
    assert shares == {torch.bfloat16: 1 / 8, torch.float16: 1 / 8, torch.float32: 1 / 2}


def test_stages_of_a_picture_state_their_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_pipeline, "LEAST_PICTURES", 1)
    context = Context(CPU)
    context.seconds = 0
    context.peaks = {name: {"per_second": 1e12} for name in ("matmul", "copy")}
    context.peaks["matmul_fp32"] = {"per_second": 1e11}
    bench_pipeline._draw_often(EMBEDDED, context)
    rows = {row["variant"]: row for row in context.rows}
    counted = {name for name, row in rows.items() if "flops" in row}
    assert counted == {"text encoder", "denoiser", "VAE"}
    assert 0 < rows["text encoder"]["flops"] < rows["VAE"]["flops"] < rows["denoiser"]["flops"]
    vae = rows["VAE"]
    assert vae["dtype"] == "torch.float32" and vae["resolution"] == str(vae["height"])
    assert vae["share_of_matmul"] == pytest.approx(vae["flops_per_second"] / 1e11)


def test_a_picture_is_drawn_with_a_pipeline_of_random_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_pipeline, "LEAST_PICTURES", 1)
    monkeypatch.setattr(bench_pipeline, "MERGED", (shapes.TINY,))
    context = Context(CPU)
    context.seconds = 0
    context.peaks = {name: {"per_second": 1e12} for name in ("matmul", "matmul_fp32", "copy")}
    bench_pipeline._draw_often(shapes.TINY, context)
    rows = {row["variant"]: row for row in context.rows}
    assert set(rows) == set(bench_pipeline.STAGES)
    assert {row["height"] for row in rows.values()} == {shapes.PIXELS[shapes.TINY]}
    assert all(row["weights"] == "random" and row["tile"] is False for row in rows.values())
    sizes, tokens = shapes.TINY_MODEL, shapes.tokens(shapes.TINY)
    once = [
        shapes.forward_flops(sizes._replace(text_tokens=text), tokens, tokens // 4, 1)
        for text in (12, 1)  # pieces of the prompt, and of the empty one
    ]
    assert rows["denoiser"]["flops"] == 20 * sum(once)


def test_sizes_that_do_not_fit_are_skipped_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(*_: Any) -> None:
        raise torch.OutOfMemoryError("GPU is full")

    monkeypatch.setattr(pipelines, "write", write)
    context = Context(CPU)
    bench_pipeline._draw_often("4k", context)
    assert [row["variant"] for row in context.rows] == list(bench_pipeline.STAGES)
    assert all("OutOfMemoryError: GPU is full" in row["status"] for row in context.rows)


def test_pipelines_have_the_published_sizes() -> None:
    with torch.device("meta"), pipelines.half_precision():
        text, vae = pipelines.text_encoder(shapes.XL2), pipelines.vae(shapes.XL2)
    assert sum(p.numel() for p in text.parameters()) == 4_762_310_656
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert next(text.parameters()).dtype == torch.float16


def _pipeline(compression: KVCompression | None, kept: tuple[int, int]) -> Any:
    config = PixArtConfig(**SMALL, kv_compression=compression)
    masks = [SimpleNamespace(mask=torch.arange(12)[None] < count) for count in kept]
    return SimpleNamespace(
        opened=SimpleNamespace(config=config),
        native=80,
        multiple=16,  # 5 × 5 tokens
        scheduler_config={"_class_name": "DPMSolverMultistepScheduler"},
        _captions=SimpleNamespace(pair=lambda prompt, negative: masks),
    )


def test_the_flops_of_a_picture_are_those_of_kept_tokens_and_merged_keys() -> None:
    dense = bench_pipeline._flops(_pipeline(None, (7, 1)))
    assert bench_pipeline._flops(_pipeline(None, (1, 1))) == dense - 20 * 2 * 4 * 25 * 6 * 144
    merged = bench_pipeline._flops(_pipeline(KVCompression((1,)), (7, 1)))
    assert merged == dense - 20 * 2 * 4 * 25 * (25 - 9) * 144  # a grid of 5 × 5 becomes 3 × 3
