"""What `check-weights` says of weights: pass, fail, or why not checked. No published weights are here, so
that the published numbers are set to those of small networks."""

import json
import re
from pathlib import Path

import pytest
import torch
from seeded_weights import pictures, weights, weights_of
from tiny_clip import write_clip
from tiny_reward import write_bert_tokenizer

from pixart.evaluation.metric import Context
from pixart.evaluation.networks import check_weights as checking
from pixart.evaluation.networks.check_weights import (
    FAIL,
    PASS,
    UNCHECKED,
    Row,
    as_text,
    check_weights,
)
from pixart.evaluation.networks.clip import open_clip
from pixart.evaluation.networks.inception import WEIGHTS as INCEPTION
from pixart.evaluation.networks.inception_network import network

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip.cache_clear()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "w").mkdir()
    return tmp_path / "w"


def rows(folder: Path) -> dict[str, Row]:
    return {row.what: row for row in check_weights(folder, Context(torch.device("cpu")))}


def test_of_an_empty_folder_nothing_is_checked_and_the_reason_is_said(folder: Path) -> None:
    found = rows(folder)
    assert {row.verdict for row in found.values()} == {UNCHECKED}
    assert found["Inception: SHA-256"].said == f"because {INCEPTION.name} is not here"
    assert len(found) == 10
    assert as_text(list(found.values())).count("\n") == 9
    with pytest.raises(ValueError, match="must be a folder of weights, it is none"):
        rows(folder / "none")


def test_inceptions_file_of_another_digest_fails_while_its_shapes_pass(folder: Path) -> None:
    state = weights_of(network()) | {"fc.weight": torch.zeros(1008, 2048)}
    torch.save(state, folder / INCEPTION.name)
    found = rows(folder)
    assert found["Inception: SHA-256"].verdict == FAIL
    assert "must have the SHA-256 6726825d..., got" in found["Inception: SHA-256"].said
    assert found["Inception: shapes"].verdict == PASS
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, folder / INCEPTION.name)
    wrong = rows(folder)["Inception: shapes"]
    assert wrong == Row(
        "Inception: shapes", FAIL, "fc.weight must be (1008, 2048), got (1000, 2048)"
    )


def test_image_rewards_numbers_are_compared_with_the_published_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = json.loads((GOLDEN / "image_reward.json").read_text())
    torch.save(weights(golden["shapes"], gain=6.0), folder / "ImageReward.pt")
    write_bert_tokenizer(folder / "bert-base-uncased")
    what = "ImageReward: four pictures"
    assert "because 1.webp, 2.webp, 3.webp, 4.webp" in rows(folder)[what].said
    (folder / "images").mkdir()
    for k, image in enumerate(pictures([*golden["sizes"], (40, 40)])):
        image.save(folder / "images" / f"{k + 1}.webp", lossless=True)
    assert rows(folder)[what].verdict == FAIL
    monkeypatch.setattr(checking, "REWARD_PROMPT", golden["texts"][0])
    monkeypatch.setattr(checking, "REWARDS", {"1.webp": golden["rewards"][0]})
    assert rows(folder)[what].verdict == PASS
    # These weights are steep: other kernels of a CPU move a reward in its fourth digit.
    monkeypatch.setattr(checking, "REWARDS", {"1.webp": golden["rewards"][0] + 0.025})
    failed = rows(folder)[what]
    assert failed.verdict == FAIL
    found = re.search(r"at most (\S+) apart, 0\.01 are allowed", failed.said)
    assert found and float(found[1]) == pytest.approx(0.025, abs=2e-3)


def test_clips_probabilities_are_compared_with_the_published_ones(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_clip(folder / "clip-vit-base-patch32")
    what = "CLIP ViT-B/32: CLIP.png"
    assert "CLIP.png (of github.com/openai/CLIP) is not here" in rows(folder)[what].said
    image = pictures([(50, 40)])[0]
    image.save(folder / "CLIP.png")
    assert rows(folder)[what].verdict == FAIL
    from transformers import AutoTokenizer, CLIPImageProcessor

    place = folder / "clip-vit-base-patch32"
    texts = ["a diagram", "a dog", "a cat"]
    words = AutoTokenizer.from_pretrained(place)(texts, padding=True, return_tensors="pt")
    pixels = CLIPImageProcessor.from_pretrained(place)(image, return_tensors="pt").pixel_values
    with torch.inference_mode():
        shares = model(pixel_values=pixels, **words).logits_per_image.softmax(1)[0]
    expected = dict(zip(texts, shares.tolist(), strict=True))
    monkeypatch.setattr(checking, "DIAGRAM_PROBABILITIES", expected)
    assert rows(folder)[what].verdict == PASS


def test_other_weights_are_opened_and_damaged_ones_fail(folder: Path) -> None:
    golden = json.loads((GOLDEN / "hps.json").read_text())
    write_clip(folder / "PickScore_v1")
    write_clip(folder / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    torch.save({"state_dict": weights(golden["shapes"], 1.0)}, folder / "HPS_v2_compressed.pt")
    (folder / "HPS_v2.1_compressed.pt").write_bytes(b"PK\x03\x04 broken off")
    torch.save(weights({"weight": (1, 24), "bias": (1,)}), folder / "sa_0_4_vit_l_14_linear.pth")
    found = rows(folder)
    assert found["hpsv2.0: shapes"].verdict == PASS
    assert found["hpsv2.1: shapes"].verdict == FAIL
    assert "HPS_v2.1_compressed.pt: is truncated or damaged" in found["hpsv2.1: shapes"].said
    assert found["PickScore: shapes"].said.startswith("opens, 24 features")
    assert found["aesthetic-v1: shapes"].verdict == PASS
    assert found["aesthetic: shapes"].verdict == UNCHECKED
