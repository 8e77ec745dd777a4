"""From prompts to pictures, on small random pipelines in the published layouts.

sample_size 16 with an f8 VAE makes a Σ of 128 px; α keeps its published 128, from which follows that
it is conditioned on sizes, and is drawn small.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CHANNELS, SMALL, drawn, levels_apart, link_all_but, open_pipeline
from published import build_alpha, build_sigma
from tiny_checkpoints import edit_json

from pixart.checkpoint.load import load_transformer
from pixart.checkpoint.save import save_transformer
from pixart.config import KVCompression
from pixart.device import choose_device
from pixart.files import CheckpointError
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.loop import Cancelled, Progress, initial_noise, seed_generators


@pytest.fixture(scope="module")
def sigma_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sigma")
    return build_sigma(path, sample_size=16, vae_channels=CHANNELS)


@pytest.fixture(scope="module")
def alpha_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_alpha(tmp_path_factory.mktemp("alpha"), vae_channels=CHANNELS)


@pytest.fixture(scope="module")
def sigma(sigma_dir: Path) -> Pipeline:
    return open_pipeline(sigma_dir)


@pytest.fixture(scope="module")
def alpha(alpha_dir: Path) -> Pipeline:
    return open_pipeline(alpha_dir)


@pytest.fixture(scope="module")
def alpha_with_table(alpha_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """α as the official .pth has it: its null caption is a stored table."""
    model = load_transformer(alpha_dir)
    model.y_embedder.y_embedding.normal_(generator=torch.Generator().manual_seed(3))
    model.null_caption_stored = True
    path = tmp_path_factory.mktemp("official") / "PixArt-XL-2-1024-MS.pth"
    save_transformer(model, path, format="official")
    return open_pipeline(alpha_dir, transformer=path)


def padded_features(encoder: Any, source: Path, text: str, length: int) -> tuple[Any, Any]:
    """What diffusers' pipelines make of a prompt: T5 over all `length` tokens, padding included."""
    from sentencepiece import SentencePieceProcessor

    ids = SentencePieceProcessor(model_file=str(source / "tokenizer/spiece.model")).encode(text)
    ids = ids + [1]  # </s>
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids))])
    ids = torch.tensor([ids + [0] * (length - len(ids))])
    with torch.no_grad():
        return encoder(ids, attention_mask=mask)[0], mask


@pytest.mark.parametrize("family", ["sigma", "alpha"])
@pytest.mark.parametrize("batched", [True, False])
def test_a_picture_is_that_of_diffusers_to_one_level(
    family: str, batched: bool, request: pytest.FixtureRequest
) -> None:
    import diffusers

    pipe: Pipeline = request.getfixturevalue(family)
    source: Path = request.getfixturevalue(f"{family}_dir")
    name = {"sigma": "PixArtSigmaPipeline", "alpha": "PixArtAlphaPipeline"}[family]
    # No tokenizer: reading a spiece.model transformers wants protobuf, which is no dependency here.
    theirs = getattr(diffusers, name).from_pretrained(source, tokenizer=None)
    theirs.set_progress_bar_config(disable=True)
    length = {"sigma": 300, "alpha": 120}[family]
    embeds, mask = padded_features(theirs.text_encoder, source, "a small cactus", length)
    null, null_mask = padded_features(theirs.text_encoder, source, "", length)
    expected = theirs(
        negative_prompt=None,
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=null,
        negative_prompt_attention_mask=null_mask,
        height=128,
        width=192,
        num_inference_steps=4,
        latents=initial_noise((4, 16, 24), seed_generators([7])),
        clean_caption=False,
        use_resolution_binning=False,
    ).images[0]
    image = pipe.draw(
        Request("a small cactus", height=128, width=192, steps=4, seed=7, batched=batched)
    ).image
    assert image.size == (192, 128)
    assert np.asarray(expected).std() > 10  # a picture, not a plane
    assert levels_apart(image, expected) <= 1


def test_pictures_come_prompt_by_prompt_and_seed_by_seed_each_as_if_drawn_alone(
    sigma: Pipeline,
) -> None:
    prompts = ["a cat", "two red birds without a tree", "a cat"]
    images = sigma(prompts, num_images=2, seed=5, **SMALL)
    alone = [drawn(sigma, prompt, seed=seed) for prompt in prompts for seed in (5, 6)]
    assert len(images) == 6
    assert [levels_apart(a, b) for a, b in zip(images, alone, strict=True)] == [0] * 6
    assert levels_apart(images[0], images[1]) and levels_apart(images[0], images[2])


def test_a_fresh_pipeline_draws_the_same_bits(sigma: Pipeline, sigma_dir: Path) -> None:
    assert levels_apart(drawn(open_pipeline(sigma_dir), "a cat"), drawn(sigma, "a cat")) == 0


def test_one_prompt_may_be_a_string(sigma: Pipeline) -> None:
    [image] = sigma("a cat", **SMALL)
    assert levels_apart(image, drawn(sigma, "a cat")) == 0


def test_the_native_size_is_the_default(sigma: Pipeline, alpha: Pipeline) -> None:
    assert (sigma.native, alpha.native, sigma.multiple) == (128, 1024, 16)
    assert sigma.draw(Request("a cat", steps=1)).image.size == (128, 128)


def test_guidance_of_both_halves_in_turn_is_that_of_both_at_once(sigma: Pipeline) -> None:
    assert (
        levels_apart(drawn(sigma, "a cat", batched=True), drawn(sigma, "a cat", batched=False)) <= 1
    )


def test_guidance_1_evaluates_the_prompt_alone(sigma: Pipeline, monkeypatch: Any) -> None:
    rows = []
    forward = sigma.transformer.forward
    monkeypatch.setattr(
        sigma.transformer,
        "forward",
        lambda x, *args, **options: rows.append(len(x)) or forward(x, *args, **options),
    )
    plain = drawn(sigma, "a cat", guidance=1.0)
    assert rows == [1, 1, 1]
    assert levels_apart(plain, drawn(sigma, "a cat", guidance=1.0, negative="a dog")) == 0
    assert levels_apart(plain, drawn(sigma, "a cat")) > 5


def test_a_negative_prompt_changes_the_picture_and_a_blank_one_does_not(sigma: Pipeline) -> None:
    plain = drawn(sigma, "a cat")
    assert levels_apart(plain, drawn(sigma, "a cat", negative="a blue moon")) > 5
    assert levels_apart(plain, drawn(sigma, "a cat", negative="  ")) == 0


def test_sigma_reads_capitals_and_alpha_does_not(sigma: Pipeline, alpha: Pipeline) -> None:
    assert levels_apart(drawn(sigma, "a CAT"), drawn(sigma, "a cat")) > 0
    assert levels_apart(drawn(alpha, "a CAT"), drawn(alpha, "a cat")) == 0


def test_alpha_is_conditioned_on_the_size_in_pixels(alpha: Pipeline, monkeypatch: Any) -> None:
    given = []
    forward = alpha.transformer.forward
    monkeypatch.setattr(
        alpha.transformer,
        "forward",
        lambda *args, **options: given.append(args[4:]) or forward(*args, **options),
    )
    drawn(alpha, "a cat", height=128, width=256)
    size, ratio = given[0]
    assert (size.tolist(), ratio.tolist()) == ([[128, 256]], [[0.5]])


def test_what_the_callback_sees_can_be_shown(sigma: Pipeline) -> None:
    shown: list[Any] = []
    drawn(sigma, "a cat", callback=lambda progress: shown.extend(sigma.preview(progress.predicted)))
    assert [image.size for image in shown] == [(16, 16)] * SMALL["steps"]


def test_the_callback_sees_every_step(sigma: Pipeline) -> None:
    seen: list[Progress] = []
    drawn(sigma, "a cat", callback=seen.append)
    assert [(p.step, p.total) for p in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0].predicted.shape == (1, 4, 16, 16)


def test_cancel_is_asked_before_every_step_and_raises(sigma: Pipeline) -> None:
    seen: list[Progress] = []
    with pytest.raises(Cancelled):
        sigma(["a cat", "a dog"], callback=seen.append, cancel=lambda: len(seen) == 2, **SMALL)
    assert len(seen) == 2


def test_a_scheduler_may_be_named(sigma: Pipeline) -> None:
    assert levels_apart(drawn(sigma, "a cat", scheduler="dpm-solver++"), drawn(sigma, "a cat")) == 0
    assert levels_apart(drawn(sigma, "a cat", scheduler="euler"), drawn(sigma, "a cat")) > 0


def test_a_stochastic_scheduler_draws_the_same_picture_twice(sigma: Pipeline) -> None:
    first, again = (drawn(sigma, "a cat", scheduler="sa-solver") for _ in range(2))
    assert levels_apart(first, again) == 0


def test_a_picture_says_where_its_time_went(sigma: Pipeline) -> None:
    one = sigma.draw(Request("a cat", seed=3, **SMALL))
    assert (one.request.prompt, one.request.seed, set(one.seconds)) == (
        "a cat",
        3,
        {"text", "load", "denoise", "decode"},
    )


def null_as_seen(pipe: Pipeline, prompt: str) -> tuple[Any, Any, Any]:
    """Features and mask of the null caption that guidance uses, and the prompt's own mask."""
    conditional = pipe.captions.features(prompt)
    null = pipe.captions.null(conditional)
    return null.features, null.mask, conditional.mask


@pytest.mark.parametrize("family", ["sigma", "alpha"])
def test_without_a_stored_table_guidance_sees_the_one_token_of_the_empty_caption(
    family: str, request: pytest.FixtureRequest
) -> None:
    pipe: Pipeline = request.getfixturevalue(family)
    features, mask, _ = null_as_seen(pipe, "a small cactus")
    assert mask.tolist() == [[True]]
    assert torch.equal(features, pipe.text_encoder.encode([""]).features)


def test_alpha_with_a_stored_table_shows_it_through_the_prompts_mask(
    alpha_with_table: Pipeline,
) -> None:
    features, mask, own = null_as_seen(alpha_with_table, "a small cactus")
    length = own.shape[1]
    assert length > 1 and torch.equal(mask, own)
    table = alpha_with_table.transformer.y_embedder.y_embedding
    assert torch.equal(features[0], table[:length])


def test_sigma_shows_the_padding_of_the_empty_caption_when_asked_to(sigma: Pipeline) -> None:
    pipe = replace(sigma, null_caption="prompt-mask")
    features, mask, own = null_as_seen(pipe, "a small cactus")
    padded = pipe.text_encoder.encode([""], keep_padding=True).features
    assert torch.equal(mask, own) and own.shape[1] > 1
    assert torch.equal(features, padded[:, : own.shape[1]])
    assert levels_apart(drawn(pipe, "a cat"), drawn(sigma, "a cat")) > 0


def test_own_mask_passes_over_a_stored_table(alpha_with_table: Pipeline, alpha: Pipeline) -> None:
    pipe = replace(alpha_with_table, null_caption="own-mask")
    assert levels_apart(drawn(pipe, "a cat"), drawn(alpha, "a cat")) == 0
    assert levels_apart(drawn(alpha_with_table, "a cat"), drawn(alpha, "a cat")) > 0


@pytest.mark.parametrize("null_caption", ["own-mask", "prompt-mask"])
def test_text_is_encoded_once_and_the_encoder_let_go_before_drawing(
    sigma_dir: Path, null_caption: Any
) -> None:
    pipe = open_pipeline(sigma_dir, null_caption=null_caption)
    encoded: list[str] = []
    run = pipe.text_encoder._run

    def noted(texts: Any, keep_padding: bool) -> Any:
        encoded.extend(texts)
        return run(texts, keep_padding)

    pipe.text_encoder._run = noted  # type: ignore[method-assign]
    loaded_while_drawing = []
    pipe(
        ["a cat", "a dog", "a cat "],
        num_images=2,
        callback=lambda _: loaded_while_drawing.append(pipe.text_encoder.is_loaded),
        **SMALL,
    )
    # Two prompts and "", and where it is asked for "" with its padding.
    assert len(encoded) == {"own-mask": 3, "prompt-mask": 4}[null_caption]
    assert not any(loaded_while_drawing)


def test_embeddings_wait_in_host_memory(sigma: Pipeline) -> None:
    sigma.prepare(["a cat"])
    assert {e.features.device.type for e in sigma.captions.held.values()} == {"cpu"}


def test_prepare_reports_each_text_once(sigma: Pipeline) -> None:
    seen: list[str] = []
    sigma.prepare(["a cat", "", "a cat"], seen.append)
    assert seen == ["a cat", ""]


def test_another_transformer_takes_the_place_of_the_directorys(
    sigma_dir: Path, sigma: Pipeline, tmp_path: Path
) -> None:
    model = load_transformer(sigma_dir)
    model.final_layer.linear.weight.data *= 2
    save_transformer(model, tmp_path / "x.safetensors")
    other = open_pipeline(sigma_dir, transformer=tmp_path / "x.safetensors")
    assert levels_apart(drawn(other, "a cat"), drawn(sigma, "a cat")) > 0
    assert other.source == f"{sigma_dir} with {tmp_path / 'x.safetensors'}"


def test_a_dense_transformer_may_be_opened_compressed(sigma_dir: Path, sigma: Pipeline) -> None:
    compression = KVCompression([1], 2)
    pipe = open_pipeline(sigma_dir, kv_compression=compression)
    assert pipe.transformer.config.kv_compression == compression
    assert levels_apart(drawn(pipe, "a cat"), drawn(sigma, "a cat")) > 0


def test_half_precision_is_near_full_precision(sigma_dir: Path, sigma: Pipeline) -> None:
    pipe = open_pipeline(sigma_dir, dtype=torch.bfloat16)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.bfloat16)
    apart = np.abs(drawn(pipe, "a cat") - drawn(sigma, "a cat")).mean()
    assert 0 < apart < 3  # of 255 levels; another prompt is 9 away, another seed 43


def test_the_text_encoder_may_have_a_dtype_of_its_own(sigma_dir: Path) -> None:
    pipe = open_pipeline(sigma_dir, text_encoder_dtype=torch.bfloat16)
    assert pipe.text_encoder.encode(["a cat"]).features.dtype == torch.bfloat16
    assert pipe.transformer.dtype == torch.float32
    assert drawn(pipe, "a cat").std() > 10


def test_a_large_text_encoder_is_opened_in_bf16_by_default(
    sigma_dir: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("pixart.pipeline.directory._SMALL_TEXT_ENCODER", 1000)
    assert open_pipeline(sigma_dir).text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize("side", [-128, 0, 10**6])
def test_a_side_that_no_picture_has_is_refused(sigma: Pipeline, side: int) -> None:
    with pytest.raises(ValueError, match=f"height must be 1 to 8192 pixels, got {side}"):
        sigma("a cat", height=side, width=128)


@pytest.mark.parametrize("side", [8, 100, 129])
def test_a_size_that_the_tokens_do_not_tile_is_refused(sigma: Pipeline, side: int) -> None:
    with pytest.raises(ValueError, match=f"height must be a multiple of 16 pixels, got {side}"):
        sigma("a cat", height=side, width=128)


def test_no_pictures_at_all_are_refused(sigma: Pipeline) -> None:
    with pytest.raises(ValueError, match="num_images must be at least 1, got 0"):
        sigma("a cat", num_images=0)


def test_an_unknown_null_caption_is_refused(sigma_dir: Path) -> None:
    with pytest.raises(
        ValueError, match="null_caption must be own-mask or prompt-mask, got 'none'"
    ):
        open_pipeline(sigma_dir, null_caption="none")


@pytest.mark.parametrize(
    "device, rule",
    [("gpu", "must be cpu, cuda"), ("meta", "must be cpu, cuda"), ("cuda:99", "'cuda:99'")],
)
def test_a_device_that_is_not_there_is_refused(device: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        choose_device(device)


def test_a_directory_without_a_transformer_asks_for_one(sigma_dir: Path, tmp_path: Path) -> None:
    bare = link_all_but(sigma_dir, tmp_path / "bare", "transformer")
    with pytest.raises(CheckpointError, match="has no transformer folder; .* --transformer"):
        open_pipeline(bare)
    assert open_pipeline(bare, transformer=sigma_dir / "transformer").native == 128


def test_missing_folders_are_named(sigma_dir: Path, tmp_path: Path) -> None:
    bare = link_all_but(sigma_dir, tmp_path / "bare", "vae", "scheduler")
    with pytest.raises(CheckpointError, match="has no vae, scheduler folder; give the directory"):
        open_pipeline(bare)


@pytest.mark.parametrize(
    "folder, key, value, rule",
    [
        ("text_encoder", "d_model", 64, "made for 32 caption channels, but .* has 64"),
        ("vae", "latent_channels", 16, "made for 4 in channels, but .* has 16"),
    ],
)
def test_a_transformer_of_another_pipeline_is_refused(
    sigma_dir: Path, tmp_path: Path, folder: str, key: str, value: int, rule: str
) -> None:
    other = link_all_but(sigma_dir, tmp_path / "other", folder)
    shutil.copytree(sigma_dir / folder, other / folder)
    edit_json(other / folder / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rule):
        open_pipeline(other, transformer=sigma_dir / "transformer")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_scheduler_configuration_is_named(
    sigma_dir: Path, tmp_path: Path, text: str
) -> None:
    broken = link_all_but(sigma_dir, tmp_path / "broken", "scheduler")
    (broken / "scheduler").mkdir()
    (broken / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="scheduler_config.json: .* JSON"):
        open_pipeline(broken)


def test_graphs_are_refused_where_nothing_can_record_them(sigma: Pipeline) -> None:
    with pytest.raises(ValueError, match="cuda_graph must be False on cpu"):
        replace(sigma, cuda_graph=True)


@pytest.mark.parametrize("attention", ["int8", "fp8"])
def test_8_bit_attention_draws_nearly_the_same(
    attention: str, sigma: Pipeline, sigma_dir: Path
) -> None:
    pipe = open_pipeline(sigma_dir, attention=attention)
    image, full = drawn(pipe, "a cat"), drawn(sigma, "a cat")
    assert {block.attn.precision for block in pipe.transformer.blocks} == {attention}
    assert {block.attn.precision for block in sigma.transformer.blocks} == {None}
    assert 0 < levels_apart(image, full) <= 25
