"""accelerate() where forward is somebody else's by now, and models that are saved and copied whole."""

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_model import TOLERANCE, arguments, count_calls, diffusers_model, masks, run
from diffusers_model import kernels_can_run as kernels_can_run  # a fixture
from small_model import relative_error

from pixart.config import KVCompression
from pixart.patch import accelerate, restore


class Package:
    """Like a model that was compiled ahead of time: it takes the inputs that it was compiled for."""

    def __init__(self, function: Callable[..., Any], names: set[str]) -> None:
        self.function, self.names = function, names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert kwargs.keys() == self.names, f"unexpected inputs {kwargs.keys() ^ self.names}"
        return self.function(*args, **kwargs)


def given(mask: str = "scattered") -> dict[str, Any]:
    return arguments() | {"encoder_attention_mask": masks()[mask], "return_dict": False}


def as_method(package: Package) -> Callable[..., Any]:
    return lambda *args, **kwargs: package(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda package: package, as_method])
def test_what_was_compiled_ahead_of_time_gets_the_inputs_that_it_was_compiled_for(
    wrap: Callable[[Package], Any],
) -> None:
    model = diffusers_model()
    expected = run(model, masks()["scattered"])
    package = Package(copy.deepcopy(model).forward, set(given()))
    accelerate(model).forward = wrap(package)
    assert torch.equal(model(**given())[0], expected)
    del model.forward
    assert torch.equal(run(restore(model), masks()["scattered"]), expected)


def test_an_accelerated_model_can_be_exported() -> None:
    model = diffusers_model(num_layers=1)
    values = {name: value for name, value in given().items() if name != "return_dict"}
    expected = run(accelerate(model), masks()["scattered"])
    with torch.no_grad():
        program = torch.export.export(model, args=(), kwargs=values).module()
        model.forward = Package(program, set(values))
        assert relative_error(model(**values).sample, expected) < TOLERANCE


def test_a_forward_around_diffusers_own_stays_accelerated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = accelerate(diffusers_model(), kv_compression=KVCompression([1]))
    expected = run(model, masks()["prefix"])
    attention = count_calls(monkeypatch, "flash_attention")
    original = model.forward

    @functools.wraps(original)
    def watched(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    model.forward = watched
    assert torch.equal(run(model, masks()["prefix"]), expected) and len(attention) == 4


def saved_and_loaded(model: Any) -> Any:
    content = io.BytesIO()
    torch.save(model, content)
    content.seek(0)
    return torch.load(content, weights_only=False)


@pytest.mark.parametrize("way", ["torch.save", "deepcopy"])
@pytest.mark.parametrize("kv_compression", [None, KVCompression([1])])
def test_a_model_that_was_saved_or_copied_is_accelerated_and_stands_by_itself(
    way: str, kv_compression: KVCompression | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = diffusers_model()
    plain = run(model, masks()["scattered"])
    accelerate(model, kv_compression=kv_compression)
    expected = run(model, masks()["scattered"])
    ways = {"torch.save": saved_and_loaded, "deepcopy": copy.deepcopy}
    other = ways[way](model)
    passes = count_calls(monkeypatch, "gate_add_modulate")
    assert torch.equal(run(other, masks()["scattered"]), expected) and len(passes) == 2
    with torch.no_grad():
        other.transformer_blocks[0].ff.net[2].weight.zero_()
    assert torch.equal(run(model, masks()["scattered"]), expected)
    assert not torch.equal(run(other, masks()["scattered"]), expected)
    with pytest.raises(ValueError, match="must be restored first"):
        accelerate(other)
    restore(other)
    assert torch.equal(run(model, masks()["scattered"]), expected)
    assert torch.equal(run(saved_and_loaded(restore(model)), masks()["scattered"]), plain)
