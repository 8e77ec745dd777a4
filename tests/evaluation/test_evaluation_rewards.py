"""PickScore, HPSv2, ImageReward and the aesthetic predictors against the references' own code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from seeded_weights import drawn, pictures, weights
from tiny_clip import write_clip, write_tokenizer
from tiny_reward import write_bert_tokenizer

from pixart.evaluation.metric import Context
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.networks.clip import open_clip
from pixart.evaluation.networks.hps import open_hps
from pixart.evaluation.networks.preparing import centre_cropped, letterboxed, normalised
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import CheckpointError

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"
CPU = torch.device("cpu")
LAION = "CLIP-ViT-H-14-laion2B-s32B-b79K"


@pytest.fixture(autouse=True)
def _nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip.cache_clear()
    open_hps.cache_clear()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def golden(name: str) -> dict:  # type: ignore[type-arg]
    return json.loads((GOLDEN / f"{name}.json").read_text())


def entries(texts: list[str]) -> list[Entry]:
    return [Entry(Prompt(str(k), text), 0, Path("0000.png")) for k, text in enumerate(texts)]


def by_features(name: str, context: Context, texts: list[str], sizes: list) -> list[float]:  # type: ignore[type-arg]
    metric = open_metric(name, context)
    assert list(metric.needs()) == []
    some = entries(texts)
    prepared = [metric.extractor.prepare(i, e) for i, e in zip(pictures(sizes), some, strict=True)]
    features = metric.extractor(prepared)
    assert features.shape == (len(texts), metric.extractor.width)
    found = [one.value for one in metric.score(some, None, features)]
    metric.release()
    return found


# HPSv2


@pytest.fixture
def hps(tmp_path: Path) -> Context:
    """A trainer's file, as published: the state dict beside other things, in half precision and named
    for version 2.1; and the tokenizer."""
    state = weights(golden("hps")["shapes"], gain=1.0)
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    write_tokenizer(tmp_path / LAION)
    (tmp_path / LAION / "config.json").write_text('{"model_type": "clip"}')
    return Context(CPU, tmp_path)


@pytest.mark.parametrize(
    ("antialias", "key"), [(True, "pixels"), (False, "pixels_without_antialias")]
)
def test_hps_letterboxes_as_its_reference(hps: Context, antialias: bool, key: str) -> None:
    expected = golden("hps")
    options = {"hps-antialias": "yes" if antialias else "no"}
    extractor = open_metric("hpsv2.1", Context(CPU, hps.weights, options=options)).extractor
    for k, image in enumerate(pictures(expected["sizes"])):
        ours = extractor.prepare(image, entries(["a"])[0])
        assert ours.shape == (3, 224, 224)
        # fp32 rounding of values up to 3.
        assert np.abs(ours[:, ::17, ::19] - np.array(expected[key][k])).max() < 2e-6


def test_antialias_is_no_matter_of_rounding() -> None:
    image = pictures([(500, 300)])[0]
    with_, without = letterboxed(image, 224), letterboxed(image, 224, antialias=False)
    assert np.abs(with_ - without).max() > 0.05
    assert not with_[:, :40].any()  # (224 - 134) / 2 rows of black above


def test_hps_scores_as_its_reference(hps: Context) -> None:
    expected = golden("hps")
    texts = ["a red star", "a blue circle on white", "a red star above a blue circle"]
    found = by_features("hpsv2.1", hps, texts, expected["sizes"])
    # 100 cosines of fp32 features.
    assert found == pytest.approx(expected["scores"], abs=1e-3)


def test_versions_of_hps_have_files_of_their_own(hps: Context) -> None:
    needs = open_metric("hpsv2.0", hps).needs()
    assert [need.name for need in needs] == ["HPS_v2_compressed.pt"]
    assert open_metric("hpsv2.0", hps).constants["weights"] == "missing"
    right = open_metric("hpsv2.1", hps).constants
    other = open_metric(
        "hpsv2.1", Context(CPU, hps.weights, options={"hps-antialias": "no"})
    ).constants
    assert right["weights"] != other["weights"] and right["antialias"] != other["antialias"]
    with pytest.raises(ValueError, match="hps-antialias must be yes or no, got 'maybe'"):
        open_metric("hpsv2.1", Context(CPU, hps.weights, options={"hps-antialias": "maybe"}))


def test_a_file_of_another_network_is_refused(hps: Context, tmp_path: Path) -> None:
    state = weights(golden("hps")["shapes"], gain=1.0)
    state["visual.extra.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(CheckpointError, match="got visual.extra.weight beside"):
        open_metric("hpsv2.1", hps).extractor.opened()
    del state["visual.extra.weight"], state["visual.transformer.resblocks.1.mlp.c_fc.weight"]
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(
        CheckpointError, match=r"missing vision_model.encoder.layers.1.mlp.fc1.weight"
    ):
        open_metric("hpsv2.1", hps).extractor.opened()


# PickScore


def test_pickscore_is_the_logit_of_its_model(tmp_path: Path) -> None:
    model = write_clip(tmp_path / "PickScore_v1")
    write_clip(tmp_path / LAION)  # the processor's
    for file in ("preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / "PickScore_v1" / file).unlink()
    context = Context(CPU, tmp_path)
    texts, sizes = ["a red star", "a blue circle"], [(64, 48), (33, 70)]
    from transformers import AutoTokenizer, CLIPImageProcessor

    words = AutoTokenizer.from_pretrained(tmp_path / LAION)(
        texts, padding=True, return_tensors="pt"
    )
    processor = CLIPImageProcessor.from_pretrained(tmp_path / LAION)
    pixels = processor(pictures(sizes), return_tensors="pt").pixel_values
    with torch.inference_mode():
        logits = model(pixel_values=pixels, **words).logits_per_image.diagonal()
    assert by_features("pickscore", context, texts, sizes) == pytest.approx(
        logits.tolist(), abs=1e-5
    )
    needs = open_metric("pickscore", Context(CPU, tmp_path / "none")).needs()
    assert [need.name for need in needs] == ["yuvalkirstain/PickScore_v1", f"laion/{LAION}"]


# ImageReward


@pytest.fixture
def reward(tmp_path: Path) -> Context:
    state = weights(golden("image_reward")["shapes"], gain=6.0)
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state |= {"blip.vision_proj.weight": torch.zeros(4, 4), "blip.text_proj.bias": torch.zeros(4)}
    torch.save(state, tmp_path / "ImageReward.pt")
    write_bert_tokenizer(tmp_path / "bert-base-uncased")
    return Context(CPU, tmp_path)


def test_image_reward_scores_as_its_reference(reward: Context) -> None:
    expected = golden("image_reward")
    metric = open_metric("image-reward", reward)
    assert list(metric.needs()) == []
    some = entries(expected["texts"])
    found = metric.score(some, pictures(expected["sizes"]), None)
    # fp32 through two encoders and five layers, whose rounding is that of the largest reward.
    largest = max(map(abs, expected["rewards"]))
    wanted = pytest.approx(expected["rewards"], abs=1e-5 * largest)
    assert [one.value for one in found] == wanted
    assert [one.parts["cut"] for one in found] == [0, 0, 1]
    notes = metric.reduce(some, found)["image-reward"].notes
    assert any("1 of 3 prompts" in note for note in notes)


def test_image_rewards_goldens_tell_pictures_and_texts_apart() -> None:
    rewards = golden("image_reward")["rewards"]
    assert min(abs(a - b) for k, a in enumerate(rewards) for b in rewards[:k]) > 0.01


def test_image_reward_sees_pictures_as_its_reference() -> None:
    expected = golden("image_reward")
    for k, image in enumerate(pictures(expected["sizes"])):
        ours = normalised(centre_cropped(image, 224, 224, 224))
        assert np.abs(ours[:, ::17, ::19] - np.array(expected["pixels"][k])).max() < 1e-6


def test_image_reward_says_what_is_missing_and_refuses_another_file(
    reward: Context, tmp_path: Path
) -> None:
    needs = open_metric("image-reward", Context(CPU, tmp_path / "none")).needs()
    assert [need.name for need in needs] == ["ImageReward.pt", "google-bert/bert-base-uncased"]
    torch.save({"layers.0.weight": torch.zeros(1, 3)}, tmp_path / "ImageReward.pt")
    with pytest.raises(CheckpointError, match="must hold ImageReward, got layers.0.weight beside"):
        open_metric("image-reward", reward).score(entries(["a"]), pictures([(8, 8)]), None)


def test_damaged_weights_are_no_fault_of_the_pictures(reward: Context, tmp_path: Path) -> None:
    from pixart.evaluation.running.computing import scoring

    (tmp_path / "ImageReward.pt").write_bytes(b"PK\x03\x04 broken off")
    one = Entry(Prompt("0", "a red star"), 0, tmp_path / "0.png")
    pictures([(8, 8)])[0].save(one.path)
    with pytest.raises(CheckpointError, match="ImageReward.pt: is truncated or damaged"):
        list(scoring(open_metric("image-reward", reward), None)(iter([[one]])))


# aesthetic

SIZES = [24, 16, 8, 4, 2, 1]
PLACES = [0, 2, 4, 6, 7]  # of linear layers among those of dropout


@pytest.fixture
def aesthetic(tmp_path: Path) -> Context:
    write_clip(tmp_path / "clip-vit-large-patch14")
    shapes: dict[str, tuple[int, ...]] = {}
    for place, into, out in zip(PLACES, SIZES[:-1], SIZES[1:], strict=True):
        shapes |= {f"layers.{place}.weight": (out, into), f"layers.{place}.bias": (out,)}
    torch.save(weights(shapes), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    single = weights({"weight": (1, 24), "bias": (1,)})
    torch.save(single, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    return Context(CPU, tmp_path)


@pytest.mark.parametrize("name", ["aesthetic", "aesthetic-v1"])
def test_aesthetic_is_linear_layers_on_a_feature_of_length_one(
    aesthetic: Context, name: str
) -> None:
    metric = open_metric(name, aesthetic)
    features = 30 * drawn((3, 24), "features")
    expected = features.astype(np.float64)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    state = torch.load(aesthetic.weights / metric.weights.name, weights_only=True)  # type: ignore[operator]
    prefixes = [f"layers.{place}." for place in PLACES] if name == "aesthetic" else [""]
    for at in prefixes:
        weight, bias = state[f"{at}weight"].double().numpy(), state[f"{at}bias"].double().numpy()
        expected = expected @ weight.T + bias
    found = [one.value for one in metric.score(entries(["a", "b", "c"]), None, features)]
    assert found == pytest.approx(expected[:, 0].tolist(), abs=1e-6)


def test_aesthetic_shares_the_features_of_clip_score(aesthetic: Context) -> None:
    ours, clip = open_metric("aesthetic", aesthetic), open_metric("clip", aesthetic)
    assert (ours.extractor.name, ours.extractor.digest) == (
        clip.extractor.name,
        clip.extractor.digest,
    )
    versions = [
        open_metric(name, aesthetic).constants["head"] for name in ("aesthetic", "aesthetic-v1")
    ]
    assert versions[0] != versions[1]


def test_aesthetic_refuses_features_that_are_all_zero_and_other_files(
    aesthetic: Context, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="features of pictures must be finite and not all 0"):
        open_metric("aesthetic", aesthetic).score(
            entries(["a"]), None, np.zeros((1, 24), np.float32)
        )
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(CheckpointError, match="must hold linear layers layers.NUMBER.weight"):
        open_metric("aesthetic", aesthetic).score(
            entries(["a"]), None, np.ones((1, 24), np.float32)
        )
