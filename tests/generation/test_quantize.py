"""--quantize: weights of 8 bits by torchao, what they do not go with, and that pictures say so."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from pixart.generate import main
from pixart.model.transformer import PixArt
from pixart.pipeline import Pipeline
from pixart.pipeline.memory.survey import bytes_of
from pixart.pipeline.metadata import MODEL_OPTIONS
from pixart.pipeline.pictures import read_metadata
from pixart.quantize import check_quantize, quantize_linear

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="needs torchao: pip install 'pixart-fast[quant]' (.ci/with-torchao has it)",
)
CPU = torch.device("cpu")
WORDS = [
    "a red circle on white",
    "--size",
    "64x64",
    "--steps",
    "2",
    "--no-cache",
    "--device",
    "cpu",
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def installed(monkeypatch: Any) -> None:
    """As if torchao were there: what is refused beside it is refused before it is imported."""
    module = ModuleType("torchao")
    module.__spec__ = importlib.util.spec_from_loader("torchao", None)
    monkeypatch.setitem(sys.modules, "torchao", module)
    for name in [name for name in sys.modules if name.startswith("torchao.")]:
        monkeypatch.delitem(sys.modules, name)  # of one that is


def refusal(capsys: Any, *words: str) -> str:
    assert main([*WORDS, *words]) == 2
    said: str = capsys.readouterr().err
    assert said.count("\n") == 1 and not [*Path().glob("outputs*")]
    return said


def test_without_torchao_the_extra_is_named(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    for kind in ("int8", "fp8"):
        assert "pip install 'pixart-fast[quant]'" in refusal(capsys, "--quantize", kind)
        with pytest.raises(ValueError, match=r"without torchao, got .*\[quant\]"):
            Pipeline.from_pretrained(device="cpu", quantize=kind)  # type: ignore[arg-type]


def test_a_torchao_that_cannot_be_imported_is_one_line(installed: None) -> None:
    with pytest.raises(ValueError, match="a torchao that has weights of 8 bits, got int8"):
        quantize_linear(nn.Linear(2, 2), "int8")


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_it_does_not_go_with_is_refused(kind: str, installed: None, capsys: Any) -> None:
    given = ("--quantize", kind)
    assert "must be left out for fp16" in refusal(capsys, *given, "--dtype", "fp16")
    assert "left out of a plan of memory (--plan)" in refusal(capsys, *given, "--plan")


def test_python_is_refused_the_same(installed: None) -> None:
    def opened(**options: Any) -> None:
        Pipeline.from_pretrained(device="cpu", **options)

    for other in ("int4", "", True):
        with pytest.raises(ValueError, match="quantize must be int8 or fp8"):
            opened(quantize=other)
    with pytest.raises(ValueError, match="for fp16"):
        opened(quantize="fp8", dtype=torch.float16)
    with pytest.raises(ValueError, match="plan of memory"):
        opened(quantize="int8", sizes_only=True)
    with pytest.raises(ValueError, match="on mps"):
        check_quantize("fp8", None, torch.device("mps"))
    check_quantize("fp8", torch.bfloat16, CPU)
    check_quantize(None, torch.float16, CPU, is_planned=True)
    model = Pipeline.from_pretrained(device="cpu").transformer
    with pytest.raises(ValueError, match="quantize must be left out beside a model"):
        opened(quantize="int8", transformer=model)


def test_the_plan_of_other_weights_is_not_taken(installed: None, tmp_path: Path) -> None:
    plans = Path(sys.modules["pixart"].__path__[0]) / "assets" / "shapes" / "plans"
    own = Pipeline.from_pretrained(device="cpu", plan="balanced")
    assert own.plan is not None and own.plan.model is not None
    anyones = Pipeline.from_pretrained(device="cpu", plan="balanced", quantize="int8")
    assert anyones.plan is not None and anyones.plan.model is None
    with pytest.raises(ValueError, match="fast must be off, balanced, fast with quantize"):
        Pipeline.from_pretrained(device="cpu", plan=plans / "balanced.json", quantize="int8")


def test_it_is_the_last_that_is_done_to_weights(installed: None, monkeypatch: Any) -> None:
    """After adapters are merged, which know no quantised weights."""
    done: list[str] = []
    monkeypatch.setattr("pixart.pipeline.load.load_lora", lambda model, lora: model)
    monkeypatch.setattr("pixart.pipeline.load.merge_lora", lambda model: done.append("merged"))
    monkeypatch.setattr("pixart.pipeline.load.find_adapter", lambda path: Path(path))
    monkeypatch.setattr("pixart.pipeline.load.quantize_linear", lambda _, kind: done.append(kind))
    pipe = Pipeline.from_pretrained(device="cpu", lora=[("a", 1.0)], quantize="fp8")
    assert done == []
    assert isinstance(pipe.transformer, PixArt) and done == ["merged", "fp8"]
    pipe.transformer = pipe.transformer
    assert pipe.quantize is None  # of another model nothing is known


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_pictures_say_it_and_are_drawn_so_again(kind: str, capsys: Any) -> None:
    assert main([*WORDS, "--quiet", "--output", "plain.png"]) == 0
    assert main([*WORDS, "--quiet", "--quantize", kind, "--output", "first.png"]) == 0
    said = read_metadata(Path("first.png"))
    assert (
        said.model["quantize"] == kind
        and read_metadata(Path("plain.png")).model["quantize"] is None
    )
    assert "quantize" in MODEL_OPTIONS and json.loads(said.to_text())["model"]["quantize"] == kind
    assert main(["--from-image", "first.png", "--no-cache", "--quiet"]) == 0
    plain, first, again = (Image.open(f"{name}.png") for name in ("plain", "first", "first-again"))
    assert first.tobytes() == again.tobytes() != plain.tobytes()
    assert capsys.readouterr().err == ""


@needs_torchao
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_take_a_byte_each(kind: Any) -> None:
    plain = Pipeline.from_pretrained(device="cpu", dtype=torch.bfloat16).transformer
    model = Pipeline.from_pretrained(device="cpu", dtype=torch.bfloat16, quantize=kind).transformer
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert layers and all(type(m.weight) is not nn.Parameter for m in layers.values())
    saved = 0
    for name, layer in layers.items():
        before = plain.get_submodule(name).weight
        weight: Any = layer.weight
        assert weight.qdata.itemsize == 1 and weight.shape == before.shape
        # A step of int8 is a 127th of a row's largest; e4m3 has three bits behind the point.
        largest = before.abs().amax(1, keepdim=True)
        step = largest / 127 if kind == "int8" else before.abs() / 8 + largest / 448
        assert ((weight.dequantize() - before).abs() <= step).all()
        saved += before.nbytes - weight.qdata.nbytes - weight.scale.nbytes
    assert saved > 0.35 * bytes_of(plain)
