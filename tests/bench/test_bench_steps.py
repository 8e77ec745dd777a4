"""Whole steps and pictures: what the models compute, who agrees with whom, and what a machine may lack."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_context import quick, rows
from small_model import SMALL
from torch import nn

from bench.measure import timing
from bench.measure.case import Case, measured
from bench.workloads import agreement, models, pictures, pipelines, sizes
from bench.workloads.models import OURS, THEIRS
from pixart import cost
from pixart.config import KVCompression, PixArtConfig
from pixart.model import compression
from pixart.model.folding import FoldedProjection
from pixart.model.transformer import PixArt

MERGED = sizes.Compression(everywhere=True).variant
CHECKPOINTED = "ours checkpointed"
CASES = [models.denoise(sizes.TINY), models.train(sizes.TINY)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_models_agree_with_diffusers_and_compressed_ones_with_eager_operators(case: Case) -> None:
    found = rows(case, OURS, CHECKPOINTED, MERGED, THEIRS)
    assert (CHECKPOINTED in found) == (case is CASES[1])
    assert all(row["status"] == "measured" for row in found.values())
    assert found[OURS]["errors_from"] == "diffusers" and 0 < found[OURS]["errors"]["out0"] < 0.02
    assert found[MERGED]["errors_from"] == "eager operators"
    assert found[MERGED]["errors"]["out0"] < 0.02
    assert found[THEIRS]["errors"] == {"out0": 0}


@pytest.mark.parametrize("branch", ["attn.proj", "cross_attn.proj", "mlp.fc2"])
@pytest.mark.parametrize("step", ["denoise", "train"])
def test_a_branch_that_computes_nothing_is_found_and_not_timed(step: str, branch: str) -> None:
    def empty_branch(model: nn.Module, resolution: str) -> None:
        assert isinstance(model, PixArt)
        nn.init.zeros_(model.blocks[-1].get_parameter(f"{branch}.weight"))

    recipes = {OURS: models.Recipe(change=empty_branch), THEIRS: models.Recipe(THEIRS)}
    found = rows(models.case("case", step, "step", sizes.TINY, recipes))
    assert found[OURS]["status"].startswith("computes something else: out0 is 0.")
    assert "seconds" not in found[OURS] and found[THEIRS]["status"] == "measured"


@pytest.fixture
def no_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)


def _zeros(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return q * 0


@pytest.mark.parametrize("step", ["denoise", "train"])
def test_without_diffusers_dense_models_are_compared_with_eager_operators(
    step: str, no_diffusers: None
) -> None:
    found = rows({"denoise": CASES[0], "train": CASES[1]}[step], OURS, THEIRS)
    assert found[THEIRS]["status"].startswith("not installed")
    assert found[OURS]["status"] == "measured" and found[OURS]["agrees"] is True
    assert found[OURS]["errors_from"] == "eager operators"
    assert set(found[OURS]["errors"]) == {"out0"}


@pytest.mark.parametrize("step", ["denoise", "train"])
def test_attention_that_gives_zeros_is_found_without_diffusers(
    step: str, no_diffusers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = agreement.OPERATORS["flash_attention"]
    monkeypatch.setitem(agreement.OPERATORS, "flash_attention", attention._replace(ours=_zeros))
    monkeypatch.setattr("pixart.model.blocks.flash_attention", _zeros)
    ours = rows({"denoise": CASES[0], "train": CASES[1]}[step], OURS)[OURS]
    assert ours["agrees"] is False and "seconds" not in ours
    assert ours["status"].startswith("computes something else: out0 is ")
    assert ours["status"].endswith("from that of eager operators")


def test_who_was_changed_must_compute_what_its_model_did() -> None:
    """One that replays what it was recorded with gives the result of other latents."""

    def stuck(model: nn.Module, resolution: str) -> None:
        made: list[torch.Tensor] = []

        def keep(module: nn.Module, arguments: Any, out: torch.Tensor) -> torch.Tensor:
            made.append(out)
            return made[0]

        model.register_forward_hook(keep)

    recipes = {OURS: models.Recipe(), "ours stuck": models.Recipe(change=stuck)}
    found = rows(models.case("case", "denoise", "step", sizes.TINY, recipes))
    assert found[OURS]["agrees"] is True and found[OURS]["errors_beside"] == {}
    assert found["ours stuck"]["agrees"] is False
    assert found["ours stuck"]["errors_beside"][OURS] > 0.05


def test_where_nothing_can_be_compared_nothing_agrees(
    no_diffusers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_eager", lambda *_: None)
    ours = rows(CASES[0], OURS)[OURS]
    assert ours["status"] == "measured" and ours["agrees"] is None
    assert ours["errors"] == {} and ours["errors_from"] == "not compared"


def test_compression_that_is_not_what_its_formula_says_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folded = FoldedProjection.weights

    def mirrored(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = folded(*arguments)
        return weight.flip(0), bias

    monkeypatch.setattr(FoldedProjection, "weights", mirrored)
    monkeypatch.setattr("pixart.model.folding.FOLDED_TOKENS", 1)
    assert rows(CASES[0], MERGED)[MERGED]["status"].startswith("computes something else")


def test_eager_operators_are_the_references_in_every_module_of_the_model() -> None:
    import pixart_kernels
    from pixart.model import blocks, transformer

    with agreement.eager_operators():
        assert blocks.flash_attention is pixart_kernels.flash_attention_reference
        assert blocks.gate_add_modulate is pixart_kernels.gate_add_modulate_reference
        assert compression.compress_kv is pixart_kernels.compress_kv_reference
        assert transformer.modulate is pixart_kernels.modulate_reference
    assert blocks.flash_attention is pixart_kernels.flash_attention


def test_without_a_compiler_compiled_models_are_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import config

    options = {"backend": "inductor", "dynamic": False}
    monkeypatch.setattr(models, "compile_options", lambda resolution: options)
    with config.patch({"cpp.cxx": (None, "/nonexistent/g++")}):
        found = rows(CASES[0], OURS, "ours compiled")
    assert found["ours compiled"]["status"].startswith("no C++ compiler, which inductor needs")
    assert found[OURS]["status"] == "measured"


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 1 / 8), (torch.float16, 1 / 8), (torch.float32, 1 / 2)]
)
def test_flops_are_a_share_of_the_peak_of_their_dtype(dtype: torch.dtype, share: float) -> None:
    context = quick()
    context.peaks = {"matmul": {"per_second": 8.0}, "matmul_fp32": {"per_second": 2.0}}
    row = measured(context, timing.summarize([1.0], "wall"), 1, 0, dtype)
    assert row["share_of_matmul"] == share


def test_steps_count_the_captions_that_they_make_and_training_three_passes() -> None:
    for name, captions in ((OURS, 0), (THEIRS, 1)):
        config = sizes.config(sizes.TINY)
        made = cost.forward_flops(config, (6, 6), encoded=not captions)
        recipe = models.RECIPES[name]
        assert models.step_flops("denoise", sizes.TINY, recipe) == made
        whole = cost.forward_flops(config, (6, 6))
        assert models.step_flops("train", sizes.TINY, recipe) == 3 * whole


def test_stages_of_a_picture_state_their_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "LEAST_PICTURES", 1)
    context = quick()
    context.peaks["matmul_fp32"] = {"per_second": 1e11}
    context.run("pictures", pictures.picture("embedded"))
    found = {row["variant"]: row for row in context.rows}
    assert {n for n, row in found.items() if "flops" in row} == {"text encoder", "denoiser", "VAE"}
    assert 0 < found["text encoder"]["flops"] < found["VAE"]["flops"] < found["denoiser"]["flops"]
    vae = found["VAE"]
    assert vae["dtype"] == "float32" and vae["shape"]["size"] == str(vae["shape"]["height"])
    speed = vae["flops"] / vae["seconds"]["median"]
    assert vae["share_of_matmul"] == pytest.approx(speed / 1e11)


def test_a_picture_is_drawn_with_a_pipeline_of_random_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "LEAST_PICTURES", 1)
    monkeypatch.setattr(pictures, "MERGED", (sizes.TINY,))
    found = rows(pictures.picture(sizes.TINY))
    assert set(found) == set(pictures.STAGES)
    assert {row["shape"]["height"] for row in found.values()} == {sizes.PIXELS[sizes.TINY]}
    assert all(row["weights"] == "random" and row["tile"] is False for row in found.values())
    config = sizes.config(sizes.TINY, sizes.Compression())
    texts = (12, 1)  # pieces of the prompt, and of the empty one
    once = [cost.forward_flops(config, (6, 6), text, encoded=True) for text in texts]
    assert found["denoiser"]["flops"] == 20 * sum(once)


def test_sizes_that_do_not_fit_are_skipped_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(*_: Any) -> None:
        raise torch.OutOfMemoryError("GPU is full")

    monkeypatch.setattr(pipelines, "write", write)
    found = rows(pictures.picture("4k"))
    assert list(found) == list(pictures.STAGES)
    assert all("OutOfMemoryError: GPU is full" in row["status"] for row in found.values())


def test_pipelines_have_the_published_sizes() -> None:
    with torch.device("meta"), pipelines.half_precision():
        text, vae = pipelines.text_encoder(sizes.config("1k")), pipelines.vae(sizes.config("1k"))
    assert sum(p.numel() for p in text.parameters()) == 4_762_310_656
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert next(text.parameters()).dtype == torch.float16


def test_the_flops_of_a_picture_are_those_of_kept_tokens_and_merged_keys() -> None:
    def drawn_by(merging: KVCompression | None, kept: tuple[int, int]) -> int:
        pipe = SimpleNamespace(
            opened=SimpleNamespace(config=PixArtConfig(**SMALL, kv_compression=merging)),
            native=80,
            multiple=16,  # 5 × 5 tokens
            resolve=lambda request: replace(request, steps=20),
            caption_tokens=lambda prompt: kept,
        )
        return pictures._flops(pipe)

    dense = drawn_by(None, (7, 1))
    assert drawn_by(None, (1, 1)) == dense - 20 * 2 * 4 * 25 * 6 * 144
    # A grid of 5 × 5 becomes 3 × 3, by a convolution of 2 × 2 of keys and of values.
    merging = 2 * 2 * 9 * 144 * 4
    saved = 4 * 25 * (25 - 9) * 144 - merging
    assert drawn_by(KVCompression((1,)), (7, 1)) == dense - 20 * 2 * saved
