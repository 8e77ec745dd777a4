"""Prompt features against transformers used directly, and the cache against fresh encodings."""

import importlib.util
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import published
import pytest
import torch
from text_encoders import encoder

from pixart.files import fingerprint
from pixart.text import encoder as text_module
from pixart.text.encoder import PromptEmbeddings, TextEncoder
from pixart.text.tokenizer import load_tokenizer, tokenize

PROMPTS = ["a red circle left of a blue square", "", "Two happy birds, and a cloud in the snow!"]
LONG = "a cat and a dog on a boat with the moon above a river at night"


def padded_t5(pipeline: Path, prompts: list[str], max_length: int) -> tuple[torch.Tensor, ...]:
    """What the official code and diffusers do: pad to the limit, mask the padding."""
    from sentencepiece import SentencePieceProcessor
    from transformers import T5EncoderModel

    tokenizer = SentencePieceProcessor(model_file=str(pipeline / "tokenizer" / "spiece.model"))
    ids = torch.zeros(len(prompts), max_length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        tokens = [*tokenizer.encode(prompt)[: max_length - 1], 1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    model = T5EncoderModel.from_pretrained(pipeline / "text_encoder").eval()
    with torch.no_grad():
        return model(ids, attention_mask=mask).last_hidden_state, mask.bool()


def test_features_equal_those_of_padded_t5_on_every_kept_token(pipeline: Path) -> None:
    ours = encoder(pipeline).encode(PROMPTS)
    features, mask = padded_t5(pipeline, PROMPTS, 300)
    assert ours.mask.sum(1).tolist() == mask.sum(1).tolist()
    expected, got = features[mask], ours.features[ours.mask]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert ours.features.shape[1] == mask.sum(1).max(), "no longer than the longest prompt"


def test_keep_padding_gives_what_t5_makes_of_the_padding(pipeline: Path) -> None:
    ours = encoder(pipeline, max_length=40).encode(["", "a cat"], keep_padding=True)
    features, mask = padded_t5(pipeline, ["", "a cat"], 40)
    assert ours.mask.equal(mask)
    assert (ours.features - features).abs().max() <= 1e-5 * features.abs().max()
    assert (ours.features[0, 1] - ours.features[0, 0]).abs().max() > 0.1, "padding is not zero"


def test_a_prompt_has_the_same_bits_in_any_batch(pipeline: Path) -> None:
    model = encoder(pipeline, dtype=torch.bfloat16)
    together = model.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = model.encode([prompt])
        assert together.features[row][together.mask[row]].equal(alone.features[0])


def test_cached_features_equal_fresh_ones_bit_for_bit(pipeline: Path, cache: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        fresh = encoder(pipeline, cache, dtype=dtype).encode(PROMPTS)
        reader = encoder(pipeline, cache, dtype=dtype)
        cached = reader.encode(PROMPTS)
        assert not reader.is_loaded
        assert cached.features.dtype == dtype
        assert cached.features.equal(fresh.features) and cached.mask.equal(fresh.mask)
        assert cached.features.equal(encoder(pipeline, dtype=dtype).encode(PROMPTS).features)


def test_cached_prompts_need_neither_weights_nor_tokenizer_nor_transformers(
    pipeline: Path, cache: Path
) -> None:
    encoder(pipeline, cache).encode(PROMPTS)
    program = f"""
import sys, torch
from pixart.text import TextEncoder
pipeline, cache = {str(pipeline)!r}, {str(cache)!r}
model = TextEncoder.from_pretrained(pipeline, dtype=torch.float32, cache_dir=cache)
assert model.encode({PROMPTS!r}).features.shape[0] == 3
loaded = {{"transformers", "diffusers", "sentencepiece", "tokenizers"}} & set(sys.modules)
assert not loaded and not model.is_loaded, loaded
"""
    repository = Path(text_module.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=repository)


def test_only_the_prompts_that_are_not_cached_are_encoded(pipeline: Path, cache: Path) -> None:
    encoder(pipeline, cache).encode(PROMPTS[:2])
    assert len(list(cache.iterdir())) == 2
    model = encoder(pipeline, cache)
    model.encode(PROMPTS)
    assert model.is_loaded and len(list(cache.iterdir())) == 3


def test_every_setting_that_changes_the_features_has_its_own_entry(
    pipeline: Path, cache: Path
) -> None:
    encoder(pipeline, cache).encode(["a cat"])
    encoder(pipeline, cache, dtype=torch.bfloat16).encode(["a cat"])
    encoder(pipeline, cache, max_length=20).encode(["a cat"])
    encoder(pipeline, cache).encode(["a cat"], keep_padding=True)
    encoder(pipeline, cache).encode(["A cat"])
    assert len(list(cache.iterdir())) == 5
    encoder(pipeline, cache).encode([" a cat\n"])
    assert len(list(cache.iterdir())) == 5, "space around a prompt is no part of it"


def test_other_weights_do_not_read_this_ones_entries(
    pipeline: Path, cache: Path, tmp_path: Path
) -> None:
    first = encoder(pipeline, cache).encode(["a cat"])
    other = published.build_sigma(tmp_path / "other", with_transformer=False, seed=1)
    second = encoder(other, cache).encode(["a cat"])
    assert not second.features.equal(first.features)
    copy = shutil.copytree(pipeline, tmp_path / "copy")
    os.utime(copy / "text_encoder" / "config.json", (0, 0))
    reader = encoder(copy, cache)
    assert reader.encode(["a cat"]).features.equal(first.features) and not reader.is_loaded


@pytest.mark.parametrize("size", [100_000, 5_000_000])
def test_fingerprint_sees_one_changed_matrix(tmp_path: Path, size: int) -> None:
    file = tmp_path / "model.safetensors"
    content = bytearray(os.urandom(size))
    file.write_bytes(content)
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    matrix = size // 100  # a shard of T5-XXL holds about a hundred
    content[size // 2 : size // 2 + matrix] = os.urandom(matrix)
    file.write_bytes(content)
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_entry_is_ignored_with_a_warning_and_rewritten(
    pipeline: Path, cache: Path, damage: bytes | None
) -> None:
    fresh = encoder(pipeline, cache).encode(["a cat"])
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-7] if damage is None else damage)
    with pytest.warns(UserWarning, match="unreadable prompt cache entry"):
        again = encoder(pipeline, cache).encode(["a cat"])
    assert again.features.equal(fresh.features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = encoder(pipeline, cache)
        reader.encode(["a cat"])
    assert not reader.is_loaded


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
    pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.warns(UserWarning, match="cannot cache prompts"):
        encoder(pipeline, tmp_path / "file" / "prompts").encode(["a cat"])


def test_the_default_cache_is_in_the_users_cache_directory_and_can_be_off(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    TextEncoder.from_pretrained(pipeline, cache_dir=None).encode(["a cat"])
    assert not list(tmp_path.iterdir())
    TextEncoder.from_pretrained(pipeline).encode(["a cat"])
    assert len(list((tmp_path / "pixart" / "prompts").iterdir())) == 1


def test_a_long_prompt_warns_each_time_with_the_text_that_was_cut(
    pipeline: Path, cache: Path
) -> None:
    tokenizer = load_tokenizer(pipeline / "tokenizer")
    body = tokenizer.encode(LONG)[:-1]
    limit = len(tokenizer.encode("a cat and a dog"))
    for _ in ("fresh", "cached"):
        with pytest.warns(UserWarning, match=f"{limit} tokens.*on a boat.*at night") as caught:
            got = encoder(pipeline, cache, max_length=limit).encode([LONG])
        assert len(caught) == 1 and "dog" not in str(caught[0].message)
    expected, _ = padded_t5(pipeline, [LONG], limit)
    assert (got.features - expected).abs().max() <= 1e-5 * expected.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(pipeline, max_length=len(body) + 1).encode([LONG])


def test_release_frees_the_weights_and_the_next_prompt_brings_them_back(pipeline: Path) -> None:
    model = encoder(pipeline)
    first = model.encode(["a cat"])
    assert model.is_loaded
    model.release()
    assert not model.is_loaded
    assert model.encode(["a cat"]).features.equal(first.features)


def test_half_precision_keeps_the_feed_forward_of_t5_from_overflowing(pipeline: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        model = encoder(pipeline, dtype=dtype)
        assert model.encode(["a cat"]).features.dtype == dtype
        down = model._network._blocks[0]["layer.1.DenseReluDense.wo.weight"].parts[0]
        assert down.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_spiece_and_its_json_conversion_give_the_same_tokens(
    pipeline: Path, tmp_path: Path
) -> None:
    pytest.importorskip("google.protobuf", reason="transformers 5 converts spiece.model with it")
    from transformers import T5TokenizerFast

    T5TokenizerFast.from_pretrained(pipeline / "tokenizer").save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink(missing_ok=True)
    slow, fast = load_tokenizer(pipeline / "tokenizer"), load_tokenizer(tmp_path)
    for prompt in [*PROMPTS, LONG, "tab\tand  space", "caf\u00e9 \u201cquoted\u201d \ufb01sh"]:
        assert slow.encode(prompt) == fast.encode(prompt)
        assert tokenize(slow, prompt, 4)[0] == tokenize(fast, prompt, 4)[0]
    assert tokenize(slow, LONG, 4)[1] == tokenize(fast, LONG, 4)[1] == LONG[len("a cat and ") :]


def test_a_null_caption_can_be_seen_through_the_prompts_mask(pipeline: Path) -> None:
    model = encoder(pipeline, max_length=40)
    prompts = model.encode(PROMPTS)
    null = model.encode([""], keep_padding=True).with_mask_of(prompts)
    padded, _ = padded_t5(pipeline, [""], 40)
    assert null.mask.equal(prompts.mask) and null.features.shape == prompts.features.shape
    length = prompts.features.shape[1]
    assert (null.features - padded[:, :length]).abs().max() <= 1e-5 * padded.abs().max()
    with pytest.raises(ValueError, match="at least"):
        model.encode([""]).with_mask_of(prompts)


def test_embeddings_concatenate_select_and_move_without_losing_a_token(pipeline: Path) -> None:
    model = encoder(pipeline)
    parts = [model.encode([prompt]) for prompt in PROMPTS]
    joined = PromptEmbeddings.concatenate(parts)
    whole = model.encode(PROMPTS)
    assert joined.features.equal(whole.features) and joined.mask.equal(whole.mask)
    again = joined[[1, 1, 0]].padded(50).to(dtype=torch.float64)
    assert len(again) == 3 and again.features.dtype == torch.float64
    assert again.mask.sum(1).tolist() == [1, 1, int(whole.mask[0].sum())]
    assert again.features[2][again.mask[2]].float().equal(whole.features[0][whole.mask[0]])
    with pytest.raises(ValueError, match="features must be"):
        PromptEmbeddings(whole.features, whole.mask[:2])


def test_quantised_weights_are_refused_off_cuda_with_the_way_out(pipeline: Path) -> None:
    for quantization in ("8bit", "4bit"):
        with pytest.raises(ValueError, match=f"{quantization} must run on CUDA.*'cpu': use bf16"):
            encoder(pipeline, quantization=quantization)
    with pytest.raises(ValueError, match="'8bit' or '4bit', got '2bit'"):
        encoder(pipeline, quantization="2bit")


def test_quantised_weights_without_bitsandbytes_name_the_command(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install bitsandbytes accelerate"):
        encoder(pipeline, quantization="8bit", device="cuda")


def test_wrong_arguments_are_named(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts must be a list"):
        encoder(pipeline).encode("a cat")
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encoder(pipeline, max_length=0)
    with pytest.raises(FileNotFoundError, match="must have a tokenizer folder"):
        encoder(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="spiece.model or tokenizer.json"):
        load_tokenizer(tmp_path / "empty")
