"""Inception and DINOv2, with random weights, against the references' code."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import dinov2_weights
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from seeded_weights import pictures, weights_of
from tiny_detectors import build_mask2former, build_owl
from tiny_judges import build_blip, build_llava

from pixart.evaluation.detecting.detectors import open_detector
from pixart.evaluation.judges import open_judge
from pixart.evaluation.metric import Context
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.metrics.of_sets import FeatureMetric
from pixart.evaluation.networks import open_extractor
from pixart.evaluation.networks.inception import WEIGHTS
from pixart.evaluation.networks.inception_network import network
from pixart.evaluation.networks.preparing import bicubic_of_floats
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import CheckpointError
from pixart.weights import NotFiniteError

GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"
ENTRY = Entry(Prompt("1", "a star"), 0, Path("0000.png"))
CPU = torch.device("cpu")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))


def near(ours: np.ndarray, golden: np.ndarray, rounding: float = 1e-4) -> None:
    """Relative to the largest: fp32 sums of some thousand terms in another order, through 48 layers."""
    assert ours.shape == golden.shape
    assert np.abs(ours - golden).max() <= rounding * np.abs(golden).max()


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Inception's file: random weights, and the classifier that is not used. The digest in
    its name is not theirs, so it goes by a name without one."""
    folder = tmp_path_factory.mktemp("weights")
    state = weights_of(network())
    state |= {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save(state, folder / WEIGHTS.name)
    return folder


@pytest.fixture
def _any_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.evaluation.needs.check_digest", lambda path, known: None)


@pytest.mark.parametrize("way", ["clean", "pytorch", "tf"])
@pytest.mark.usefixtures("_any_digest")
def test_inception_gives_the_features_of_the_references(inception: Path, way: str) -> None:
    golden = load_file(GOLDEN / "inception.safetensors")[way].numpy()
    sizes = json.loads((GOLDEN / "inception.json").read_text())["sizes"]
    extractor = open_extractor(f"inception-{way}", Context(CPU, inception))
    assert extractor.needs() == ()
    prepared = [extractor.prepare(image, ENTRY) for image in pictures(sizes)]
    features = extractor(prepared)
    assert features.dtype == np.float32 and features.shape[1] == extractor.width
    near(features, golden)


def test_the_three_ways_into_inception_differ_by_more_than_rounding() -> None:
    golden = {k: v.numpy() for k, v in load_file(GOLDEN / "inception.safetensors").items()}
    # Twenty times what `near` lets pass.
    for one, other in (("clean", "pytorch"), ("clean", "tf"), ("pytorch", "tf")):
        assert np.abs(golden[one] - golden[other]).max() > 2e-3 * np.abs(golden[one]).max()


def test_the_clean_way_resizes_as_clean_fid_does() -> None:
    golden = json.loads((GOLDEN / "inception.json").read_text())
    image = pictures(golden["sizes"])[1]
    ours = bicubic_of_floats(image, 299, 299).transpose(1, 2, 0)[::37, ::41]
    assert np.abs(ours - np.array(golden["clean_resized_of_picture_1"])).max() < 1e-4


def test_inceptions_file_is_refused_by_its_digest_when_it_is_another(inception: Path) -> None:
    extractor = open_extractor("inception-tf", Context(CPU, inception))
    with pytest.raises(CheckpointError, match="must have the SHA-256 6726825d..., got"):
        _ = extractor.digest


@pytest.mark.usefixtures("_any_digest")
def test_weights_of_another_network_are_refused_by_name(tmp_path: Path) -> None:
    state = weights_of(network())
    state["Mixed_9z.conv.weight"] = state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, tmp_path / WEIGHTS.name)
    extractor = open_extractor("inception-clean", Context(CPU, tmp_path))
    prepared = [extractor.prepare(image, ENTRY) for image in pictures([(32, 32)])]
    with pytest.raises(
        CheckpointError, match="misses Mixed_7c.branch_pool.conv.weight; has Mixed_9z"
    ):
        extractor(prepared)
    state["Mixed_7c.branch_pool.conv.weight"] = state.pop("Mixed_9z.conv.weight") * torch.nan
    torch.save(state, tmp_path / WEIGHTS.name)
    with pytest.raises(NotFiniteError, match="Mixed_7c.branch_pool.conv.weight"):
        extractor(prepared)


@pytest.mark.usefixtures("_any_digest")
def test_another_file_gives_another_digest(inception: Path, tmp_path: Path) -> None:
    one = open_extractor("inception-clean", Context(CPU, inception)).digest
    assert open_extractor("inception-clean", Context(CPU, inception / WEIGHTS.name)).digest == one
    torch.save({"a": torch.zeros(3)}, tmp_path / WEIGHTS.name)
    assert open_extractor("inception-clean", Context(CPU, tmp_path)).digest != one


def test_inception_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    needs = open_extractor("inception-clean", Context(CPU, tmp_path)).needs()
    assert [need.name for need in needs] == ["pt_inception-2015-12-05-6726825d.pth"]


@pytest.fixture
def dinov2(tmp_path: Path) -> Context:
    dinov2_weights.write_folder(tmp_path / "dinov2-large")
    return Context(CPU, tmp_path)


def test_dinov2_prepares_pictures_as_dgm_eval_and_gives_the_published_features(
    dinov2: Context,
) -> None:
    golden = json.loads((GOLDEN / "dinov2.json").read_text())
    extractor = open_extractor("dinov2", dinov2)
    assert extractor.needs() == []
    prepared = [extractor.prepare(image, ENTRY) for image in pictures(golden["sizes"])]
    for ours, theirs in zip(prepared, golden["pixels"], strict=True):
        # fp32 rounding of values up to 2.7.
        assert np.abs(ours[:, ::17, ::19] - np.array(theirs)).max() < 1e-6
    features = extractor(prepared)
    assert features.shape[1] == extractor.width
    near(features, np.array(golden["features"]), 1e-5)


def test_dinov2_of_another_size_has_another_name() -> None:
    other = Context(CPU, options={"dinov2-model": "facebook/dinov2-small"})
    assert open_extractor("dinov2", Context(CPU)).name == "dinov2"
    assert open_extractor("dinov2", other).name == "dinov2-dinov2-small"
    metric = open_metric("fd-dinov2", other)
    assert isinstance(metric, FeatureMetric)
    assert metric.constants["features"] == "dinov2-dinov2-small"
    assert metric.notes() == (
        "By features of dinov2-dinov2-small, not of dinov2: other numbers than published.",
    )


def test_dinov2_takes_the_class_token_behind_the_layer_norm(dinov2: Context) -> None:
    from transformers import Dinov2Model

    extractor = open_extractor("dinov2", dinov2)
    prepared = [extractor.prepare(image, ENTRY) for image in pictures([(280, 280)])]
    model = Dinov2Model.from_pretrained(dinov2.weights / "dinov2-large")  # type: ignore[operator]
    with torch.inference_mode():
        output = model(pixel_values=torch.from_numpy(np.stack(prepared)))
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    # Of other positions, by transformers' way to make them: near and not the same.
    gap = np.abs(extractor(prepared) - output.pooler_output.numpy()).max()
    assert 1e-5 < gap < 0.5


def test_dinov2_says_what_is_missing_and_tells_weights_apart(
    tmp_path: Path, dinov2: Context
) -> None:
    needs = open_extractor("dinov2", Context(CPU, tmp_path / "none")).needs()
    assert [need.name for need in needs] == ["facebook/dinov2-large"]
    one = open_extractor("dinov2", dinov2).digest
    dinov2_weights.write_folder(tmp_path / "dinov2-large", seed=1)
    assert open_extractor("dinov2", dinov2).digest != one


@pytest.mark.parametrize("what", ["missing", "not finite", "more"])
@pytest.mark.parametrize("build", [build_owl, build_mask2former, build_blip, build_llava])
def test_judges_and_detectors_ask_whether_their_weights_are_whole(
    tmp_path: Path, build: Callable[[Path], Path], what: str
) -> None:
    """A network with a layer that is missing would judge by random numbers."""
    folder = build(tmp_path / "blip-network")
    [path] = folder.glob("*.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(".weight"))
    if what == "missing":
        del tensors[name]
    elif what == "not finite":
        tensors[name].view(-1)[0] = torch.nan
    else:  # of older versions of the class, as published files have them
        tensors["left.over"] = torch.zeros(1)
    save_file(tensors, path, {"format": "pt"})
    if build in (build_owl, build_mask2former):
        use = partial(open_detector(str(folder), Context(CPU)), NOISE, ("dog",))
    else:
        use = partial(open_judge(str(folder), Context(CPU)).answer, NOISE, "Is it?", ("yes", "no"))
    if what == "more":
        use()
        return
    with pytest.raises(ValueError, match="missing|finite") as caught:
        use()
    # transformers names parts of a chat model otherwise than its files.
    assert name.removeprefix("language_model.") in str(caught.value)
    assert str(folder) in str(caught.value)
