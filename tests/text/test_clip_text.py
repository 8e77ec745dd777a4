"""Prompts as Stable Diffusion 2 reads them: the text half of a CLIP against transformers itself."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_pipeline import WIDTH, build_clip_pipeline, write_clip_tokenizer, write_text_model
from safetensors.torch import load_file, save_file
from text_encoders import encoder
from torch import Tensor

from pixart.files import CheckpointError
from pixart.pipeline.directory import caption_length_of, check_fit
from pixart.text import networks
from pixart.text.networks import features_width, kind_of, layers_used, longest_caption
from pixart.text.tokenizer import load_tokenizer

PROMPTS = ["a cat and a dog", "", "A  CAT's 42 naïve, l'été — and 猫?"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_clip_pipeline(tmp_path_factory.mktemp("clip"), with_transformer=False)


def by_transformers(folder: Path, prompts: list[str], length: int = 77) -> Tensor:
    """As diffusers' StableDiffusionPipeline: padded, without a mask. No tokenizer of ours."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    ids = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return CLIPTextModel.from_pretrained(folder / "text_encoder").eval()(ids).last_hidden_state


def test_features_are_those_of_transformers_for_all_77_tokens(clip: Path) -> None:
    found = encoder(clip).encode(PROMPTS)
    expected = by_transformers(clip, PROMPTS)
    assert found.features.shape == (3, 77, WIDTH) and bool(found.mask.all())
    assert float((found.features - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("text", [*PROMPTS, "don't <|endoftext|> stop", "\tcatdog\n\n dog 1 2"])
def test_tokens_are_those_of_transformers(clip: Path, text: str) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(clip / "tokenizer")
    assert load_tokenizer(clip / "tokenizer", "clip").encode(text) == theirs(text).input_ids


def test_an_exclamation_mark_is_a_word_and_no_padding(clip: Path) -> None:
    tokenizer = load_tokenizer(clip / "tokenizer", "clip")
    vocabulary = json.loads((clip / "tokenizer" / "vocab.json").read_text())
    assert tokenizer.encode("a cat!")[-2] == vocabulary["!</w>"]
    assert tokenizer.padding == vocabulary["!"]


def test_padding_changes_no_feature_of_the_text_and_counts(clip: Path) -> None:
    short, whole = encoder(clip, max_length=20).encode(["a cat"]), encoder(clip).encode(["a cat"])
    assert torch.allclose(short.features, whole.features[:, :20], atol=1e-5)
    other = encoder(clip).encode(["a dog"])
    assert not torch.allclose(other.features[:, 30], whole.features[:, 30], atol=1e-2)


def test_a_saved_tokenizer_json_and_another_padding_are_read(clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined]

    CLIPTokenizerFast.from_pretrained(clip / "tokenizer").save_pretrained(tmp_path / "whole")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "whole" / name).unlink(missing_ok=True)
    ours = load_tokenizer(tmp_path / "whole", "clip")
    plain = load_tokenizer(clip / "tokenizer", "clip")
    for text in PROMPTS:
        assert ours.encode(text) == plain.encode(text)
    end = write_clip_tokenizer(tmp_path / "other", "<|endoftext|>")
    other = load_tokenizer(tmp_path / "other", "clip")
    assert other.padding == end == plain.encode("")[-1] != plain.padding
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).unlink()
    assert load_tokenizer(tmp_path / "other", "clip").padding == end


def test_what_was_cached_is_read_without_weights(clip: Path, cache: Path) -> None:
    fresh = encoder(clip, cache).encode(PROMPTS)
    reader = encoder(clip, cache)
    cached = reader.encode(PROMPTS, keep_padding=True)  # the same for a CLIP
    assert not reader.is_loaded and reader.is_cached("a cat and a dog", keep_padding=True)
    assert cached.features.equal(fresh.features) and cached.mask.equal(fresh.mask)
    assert len(list(cache.iterdir())) == 3
    encoder(clip, cache, max_length=20).encode(PROMPTS[:1])
    assert len(list(cache.iterdir())) == 4


def test_other_weights_or_another_padding_have_their_own_entries(
    clip: Path, cache: Path, tmp_path: Path
) -> None:
    encoder(clip, cache).encode(["a cat"])
    other = shutil.copytree(clip, tmp_path / "other")
    end = write_clip_tokenizer(other / "tokenizer", "<|endoftext|>")
    encoder(other, cache).encode(["a cat"])
    write_text_model(other / "text_encoder", end, seed=5)
    encoder(other, cache).encode(["a cat"])
    assert len(list(cache.iterdir())) == 3


def test_a_long_prompt_warns_with_the_text_that_was_cut(clip: Path, cache: Path) -> None:
    words = "a cat and a dog " * 20
    for _ in ("fresh", "cached"):
        with pytest.warns(UserWarning, match="longer than 77 tokens; cut off: '.*and a dog'"):
            found = encoder(clip, cache).encode([words])
    expected = by_transformers(clip, [words])
    assert torch.allclose(found.features, expected, atol=1e-5 * float(expected.abs().max()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(clip).encode(["a cat " * 37])  # 74 tokens, the start and the end


def test_more_tokens_than_positions_are_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match="max_length must be at most 77 for the CLIP in .* got 78"):
        encoder(clip, max_length=78)
    assert encoder(clip).max_length == longest_caption(clip / "text_encoder") == 77
    assert caption_length_of(clip) == 77


def test_a_full_openclip_h_gives_its_penultimate_layer(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layers_used({"hidden_size": 1024, "num_hidden_layers": 24}) == 23
    assert layers_used({"hidden_size": 1024, "num_hidden_layers": 23}) == 23  # Stable Diffusion 2's
    assert layers_used({"hidden_size": 768, "num_hidden_layers": 12}) == 12  # ViT-L, SD 1
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3}
    monkeypatch.setattr(networks, "OPENCLIP_H", sizes)
    found = encoder(clip).encode(PROMPTS).features
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip / "tokenizer", pad_token="!")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    model: Any = CLIPTextModel.from_pretrained(clip / "text_encoder").eval()
    norm = getattr(model, "text_model", model).final_layer_norm
    with torch.no_grad():
        expected = norm(model(ids, output_hidden_states=True).hidden_states[-2])
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def whole_clip(clip: Path, path: Path) -> Path:
    """The same text half in a CLIPModel, whose config.json has two parts."""
    from transformers import CLIPConfig, CLIPModel

    inner = json.loads((clip / "text_encoder" / "config.json").read_text())
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = {**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=inner, vision_config=vision, projection_dim=8))
    half = load_file(clip / "text_encoder" / "model.safetensors")
    names = {n if n.startswith("text_model.") else f"text_model.{n}": t for n, t in half.items()}
    missing, unexpected = model.load_state_dict(names, strict=False)
    assert not unexpected and not [name for name in missing if name.startswith("text_model.enc")]
    shutil.copytree(clip, path)
    shutil.rmtree(path / "text_encoder")
    model.save_pretrained(path / "text_encoder")
    return path


def test_the_text_half_of_a_whole_clip_is_taken(clip: Path, tmp_path: Path) -> None:
    whole = whole_clip(clip, tmp_path / "whole")
    assert features_width(whole / "text_encoder") == WIDTH
    found = encoder(whole).encode(PROMPTS)
    assert torch.allclose(found.features, encoder(clip).encode(PROMPTS).features, atol=1e-6)


def test_t5_is_still_t5(pipeline: Path) -> None:
    assert kind_of(pipeline / "text_encoder") == "t5" and not encoder(pipeline).is_clip
    assert longest_caption(pipeline / "text_encoder") is None
    assert "network" not in encoder(pipeline)._identity()


def broken(clip: Path, path: Path, **changes: Any) -> Path:
    shutil.copytree(clip, path)
    file = path / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    "changes, rule",
    [
        ({"hidden_size": 80}, "cannot be used .mismatched"),
        ({"hidden_size": 144}, "must describe the .* weights there are"),
        ({"num_hidden_layers": 4}, "missing .*layers.3"),
        ({"num_hidden_layers": 2}, "unexpected .*layers.2"),
        ({"num_attention_heads": 5}, "hidden_size must be divisible by num_attention_heads 5"),
        ({"vocab_size": 10**12}, "vocab_size must be a whole number that fits"),
        ({"layer_norm_eps": 1e30}, "layer_norm_eps must be a number above 0"),
        ({"max_position_embeddings": "77"}, "max_position_embeddings must be a positive integer"),
    ],
)
def test_weights_of_another_shape_are_refused_in_one_line(
    clip: Path, tmp_path: Path, changes: dict[str, Any], rule: str
) -> None:
    path = broken(clip, tmp_path / "broken", **changes)
    with pytest.raises(CheckpointError, match=rule) as caught:
        encoder(path).encode(["a cat"])
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_weights_that_are_not_finite_are_refused(clip: Path, tmp_path: Path) -> None:
    path = broken(clip, tmp_path / "nan")
    file = path / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="must be finite"):
        encoder(path).encode(["a cat"])


def test_a_tokenizer_that_is_missing_damaged_or_anothers_is_refused(
    clip: Path, pipeline: Path, tmp_path: Path
) -> None:
    path = broken(clip, tmp_path / "m")
    (path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold vocab\.json and merges\.txt"):
        encoder(path).encode(["a cat"])
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\nq q q q\n")
    with pytest.raises(CheckpointError, match="is damaged"):
        encoder(path).encode(["a cat"])
    shutil.copytree(clip / "tokenizer", path / "tokenizer", dirs_exist_ok=True)
    vocabulary = json.loads((path / "tokenizer" / "vocab.json").read_text())
    vocabulary["<|endoftext|>"] = 60000
    (path / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(
        CheckpointError, match="must be that of the text encoder, .* got token 60000"
    ):
        encoder(path).encode(["a cat"])
    del vocabulary["<|endoftext|>"]
    (path / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match=r"must define the token <\|endoftext\|>"):
        encoder(path).encode(["a cat"])


def test_a_transformer_for_other_features_is_refused(clip: Path) -> None:
    from dataclasses import replace

    from clip_pipeline import BARE

    check_fit(BARE, Path("m"), clip)
    wide = replace(BARE, caption_embedding=True, caption_channels=24)
    with pytest.raises(CheckpointError, match="made for 24 caption channels, but .* has 72"):
        check_fit(wide, Path("m"), clip)
    with pytest.raises(CheckpointError, match="captions of 300 tokens, but the CLIP in .* for 77"):
        check_fit(replace(BARE, model_max_length=300), Path("m"), clip)
