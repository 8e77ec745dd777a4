"""CLIP score: pictures as the processor has them, texts as the model reads them, and the EOS trap."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from seeded_weights import pictures
from tiny_clip import TEXTS, write_clip

from pixart.evaluation.metric import Context
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.networks import open_extractor
from pixart.evaluation.networks.clip import ClipImages, open_clip, read_preparation
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import CheckpointError

SIZES = [(64, 48), (33, 70), (32, 32)]
LONG = "a red star " * 12  # 131 tokens of single bytes and their two ends


@pytest.fixture(autouse=True)
def _nothing_is_kept() -> None:
    open_clip.cache_clear()


def entries(texts: list[str]) -> list[Entry]:
    return [Entry(Prompt(str(k), text), 0, Path("0000.png")) for k, text in enumerate(texts)]


def context(folder: Path, **options: str) -> Context:
    given = {"clip-model": str(folder)} | {k.replace("_", "-"): v for k, v in options.items()}
    return Context(torch.device("cpu"), options=given)


def scores(
    given: Context, texts: list[str], sizes: list[tuple[int, int]] | None = None
) -> list[float]:
    metric = open_metric("clip", given)
    assert metric.needs() == []
    prepared = [metric.extractor.prepare(i, entries(["a"])[0]) for i in pictures(sizes or SIZES)]
    features = metric.extractor(prepared)
    assert features.shape == (len(prepared), metric.extractor.width)
    return [one.value for one in metric.score(entries(texts), None, features)]


def test_pictures_are_prepared_as_transformers_processor_does(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    write_clip(tmp_path)
    theirs = CLIPImageProcessor.from_pretrained(tmp_path)
    prepare = read_preparation(tmp_path)
    for image in pictures([*SIZES, (70, 33), (32, 100), (500, 31)]):
        expected = theirs(image, return_tensors="np").pixel_values[0]
        # The same 8-bit levels; the last bits are of the order of scaling and shifting.
        assert np.abs(prepare(image) - expected).max() < 1e-6


def test_the_score_is_the_cosine_that_the_model_computes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessor

    model = write_clip(tmp_path)
    images, tokenizer = pictures(SIZES), AutoTokenizer.from_pretrained(tmp_path)
    pixels = CLIPImageProcessor.from_pretrained(tmp_path)(images, return_tensors="pt").pixel_values
    words = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(pixel_values=pixels, **words)
    expected = output.logits_per_image.double().diagonal() / model.logit_scale.double().exp()
    assert scores(context(tmp_path), TEXTS) == pytest.approx(expected.tolist(), abs=1e-6)


def test_variants_are_what_papers_call_clip_score(tmp_path: Path) -> None:
    write_clip(tmp_path, seed=3)
    cosine = scores(context(tmp_path), TEXTS)
    assert min(cosine) < 0 < max(cosine)  # or clamping would not be seen
    hundred = scores(context(tmp_path, clip_variant="x100"), TEXTS)
    clamped = scores(context(tmp_path, clip_variant="x100-clamped"), TEXTS)
    weighed = scores(context(tmp_path, clip_variant="clipscore"), TEXTS)
    assert hundred == pytest.approx([100 * c for c in cosine])
    assert clamped == pytest.approx([max(100 * c, 0) for c in cosine])
    assert weighed == pytest.approx([2.5 * max(c, 0) for c in cosine])
    with pytest.raises(ValueError, match="clip-variant must be one of cosine, .*got 'percent'"):
        open_metric("clip", context(tmp_path, clip_variant="percent"))


def test_long_prompts_are_cut_and_that_is_said(tmp_path: Path) -> None:
    write_clip(tmp_path)
    cut = scores(context(tmp_path), [LONG], SIZES[:1])
    assert cut == scores(context(tmp_path), [LONG + " and more"], SIZES[:1])
    assert cut != scores(context(tmp_path), ["b" + LONG], SIZES[:1])
    metric = open_metric("clip", context(tmp_path))
    some = entries([LONG, *TEXTS])
    features = np.ones((4, metric.extractor.width), np.float32)
    found = metric.score(some, None, features)
    assert [one.parts["cut"] for one in found] == [1, 0, 0, 0]
    notes = metric.reduce(some, found)["clip"].notes
    assert any(note.startswith("1 of 4 prompts (25 %) are longer") for note in notes)
    short = metric.reduce(some[1:], found[1:])["clip"].notes
    assert not any("longer" in note for note in short)


def test_a_prompt_is_cut_from_the_first_token_too_many(tmp_path: Path) -> None:
    write_clip(tmp_path)
    metric = open_metric("clip", context(tmp_path))
    texts = ["a" * 75, "a" * 76]  # a token for each letter, and two at the ends
    found = metric.score(entries(texts), None, np.ones((2, metric.extractor.width), np.float32))
    assert [one.parts for one in found] == [{"tokens": 77, "cut": 0}, {"tokens": 78, "cut": 1}]


def test_long_prompts_may_be_read_in_windows(tmp_path: Path) -> None:
    model = write_clip(tmp_path)
    whole = scores(context(tmp_path, clip_long="mean"), [LONG], SIZES[:1])[0]
    clip = open_clip(tmp_path, tmp_path, torch.device("cpu"))
    from transformers import AutoTokenizer

    body = AutoTokenizer.from_pretrained(tmp_path)(LONG).input_ids[1:-1]
    end = model.config.text_config.eos_token_id
    windows = [body[k : k + 75] for k in range(0, len(body), 75)]
    assert len(windows) == 2
    picture = clip.pictures([read_preparation(tmp_path)(pictures(SIZES[:1])[0])])[0]
    cosines = []
    for window in windows:
        ids = torch.tensor([[end - 1, *window, end]])
        with torch.inference_mode():
            text = model.get_text_features(input_ids=ids)
        text = getattr(text, "pooler_output", text)[0].numpy()
        cosines.append(picture @ text / np.linalg.norm(picture) / np.linalg.norm(text))
    assert whole == pytest.approx(np.mean(cosines), abs=1e-6)
    assert scores(context(tmp_path, clip_long="mean"), TEXTS) == pytest.approx(
        scores(context(tmp_path), TEXTS)
    )


def test_a_text_that_would_be_read_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    """transformers pools at the highest id where eos_token_id is 2; here that is the end: as published."""
    write_clip(tmp_path / "published", end=2)
    write_clip(tmp_path / "right")
    assert scores(context(tmp_path / "published"), TEXTS) == scores(
        context(tmp_path / "right"), TEXTS
    )
    # A word that was added to the vocabulary behind the end: what follows it would not be seen.
    vocabulary = tmp_path / "published" / "vocab.json"
    tokens = json.loads(vocabulary.read_text())
    tokens["zz</w>"] = len(tokens)
    vocabulary.write_text(json.dumps(tokens))
    config = tmp_path / "published" / "config.json"
    state = load_file(tmp_path / "published" / "model.safetensors")
    words = "text_model.embeddings.token_embedding.weight"
    state[words] = torch.cat([state[words], state[words][:1]])
    save_file(state, tmp_path / "published" / "model.safetensors", {"format": "pt"})
    values = json.loads(config.read_text())
    values["text_config"]["vocab_size"] += 1
    config.write_text(json.dumps(values))
    open_clip.cache_clear()
    with pytest.raises(CheckpointError, match="eos_token_id must be 513, the tokenizer's, got 2: "):
        scores(context(tmp_path / "published"), TEXTS)
    write_clip(tmp_path / "wrong", end=7)
    with pytest.raises(CheckpointError, match="eos_token_id must be 513, .* got 7: no text has it"):
        scores(context(tmp_path / "wrong"), TEXTS)


def test_another_processor_is_refused_in_one_line(tmp_path: Path) -> None:
    write_clip(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "do_center_crop": False}))
    with pytest.raises(
        CheckpointError, match="must resize the shorter side, .*without do_center_crop"
    ):
        read_preparation(tmp_path)
    path.write_text(json.dumps({**values, "size": 32, "crop_size": 32}))  # of old files
    assert read_preparation(tmp_path).shortest == 32
    path.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    assert read_preparation(tmp_path).width == 32
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="must have preprocessor_config.json, it has none"):
        read_preparation(tmp_path)


def test_missing_weights_are_a_need_and_others_another_digest(tmp_path: Path) -> None:
    none = Context(torch.device("cpu"), tmp_path)
    metric = open_metric("clip", none)
    assert [need.name for need in metric.needs()] == ["openai/clip-vit-large-patch14"]
    assert metric.constants["weights"] == "missing"
    write_clip(tmp_path / "clip-vit-large-patch14")
    one = open_metric("clip", none).constants["weights"]
    assert open_extractor("clip-l14", none).digest == one
    write_clip(tmp_path / "clip-vit-large-patch14", seed=1)
    assert open_metric("clip", none).constants["weights"] not in (one, "missing")


def test_results_do_not_say_where_a_model_lies(tmp_path: Path) -> None:
    write_clip(tmp_path / "one" / "mine")
    write_clip(tmp_path / "other" / "mine")
    one = open_metric("clip", context(tmp_path / "one" / "mine")).constants
    assert one["model"] == "mine"
    assert one == open_metric("clip", context(tmp_path / "other" / "mine")).constants


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="missing text_projection.weight"):
        open_clip(tmp_path, tmp_path, torch.device("cpu"))


def test_one_network_serves_what_asks_for_the_same_model(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip-vit-large-patch14")
    given = Context(torch.device("cpu"), tmp_path)
    clip, other = open_metric("clip", given).extractor, open_extractor("clip-l14", given)
    assert isinstance(clip, ClipImages) and isinstance(other, ClipImages)
    assert (clip.name, clip.digest) == (other.name, other.digest)
    assert clip.opened() is other.opened()
    other.release()
    assert open_clip.cache_info().currsize == 0
