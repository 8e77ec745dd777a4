"""How fast a device multiplies at most."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixart import device
from pixart.device import check_attention, measure_peak

CPU = torch.device("cpu")


class Machine:
    """A clock that products move on. rates: FLOP/s of later and later products, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *rates: float) -> None:
        self.now, self.rates, self.sizes = 0.0, list(rates), []  # type: ignore[var-annotated]
        monkeypatch.setattr(device, "_product", self.product)
        monkeypatch.setattr(device, "_seconds_of", self.seconds_of)
        monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def product(self, rows: int, size_in: int, size_out: int, *_: Any) -> Callable[[], int]:
        self.sizes.append((rows, size_in, size_out))
        return lambda: 2 * rows * size_in * size_out

    def seconds_of(self, call: Callable[[], int], times: int, _: torch.device) -> float:
        rate = self.rates.pop(0) if len(self.rates) > 1 else self.rates[0]
        self.now += times * call() / rate
        return times * call() / rate


@pytest.fixture(autouse=True)
def measured_anew() -> Iterator[None]:
    measure_peak.cache_clear()
    yield
    measure_peak.cache_clear()


def test_the_peak_is_the_most_that_any_product_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every other call is the first of a shape, in which libraries choose their kernels.
    machine = Machine(monkeypatch, 9e12, 1e12, 9e12, 3e12, 9e12, 2e12, 1e12)
    assert measure_peak(CPU, torch.float32) == pytest.approx(3e12)
    assert (1024, 1152, 4608) in machine.sizes and machine.now >= 1.0


def test_a_disturbed_product_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, *[1e11] * 20, 5e11, 1e11)
    assert measure_peak(CPU, torch.float32) == pytest.approx(5e11)
    assert len(machine.sizes) < 10


def test_a_slow_processor_is_spared_the_long_products(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 1e9)
    assert measure_peak(CPU, torch.bfloat16) == pytest.approx(1e9)
    assert machine.sizes == [(256, 256, 256), (512, 512, 512)]
    assert machine.now < 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_real_peak_is_that_of_real_products(dtype: torch.dtype) -> None:
    assert 1e8 < measure_peak(CPU, dtype, 0.02) < 1e16


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "where", "message"),
    [
        ("int4", CPU, 'must be "int8", "fp8" or None, got \'int4\''),
        ("int8", torch.device("mps"), 'must be None on mps, got "int8"'),
        ("fp8", GPU, 'must be "int8" or None on A100, got "fp8": its matrix units have no e4m3'),
    ],
)
def test_8_bit_attention_is_refused_where_it_cannot_be(
    wanted: str, where: torch.device, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for right in (("int8", GPU), ("fp8", CPU), (None, torch.device("mps"))):
        check_attention(*right)
    with pytest.raises(ValueError, match=f"attention {message}"):
        check_attention(wanted, where)
