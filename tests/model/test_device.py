"""How fast a device multiplies at most, and which GPUs cannot run the kernels."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pixart import Pipeline, device
from pixart.device import check_kernels, measure_peak, peak_memory
from pixart.pipeline import load
from pixart.train import main as train

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


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a Tesla T4 as its second GPU, beside one that is newer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capabilities[device.index]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


def test_the_most_memory_is_that_of_the_gpu_that_was_worked_on(
    turing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = {0: 0, 1: 5 << 30}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index=0: allocated[index])
    assert peak_memory() == 5 << 30
    allocated[1] = 0
    assert 10**8 < peak_memory() < 1 << 40  # of the process


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell no peak of a process alone")
def test_a_peak_is_not_that_of_the_process_that_began_this_one() -> None:
    child = "from pixart.device import peak_memory; print(peak_memory())"
    code = (
        f"import subprocess, sys; held = bytearray(1 << 30); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10**7 < int(done.stdout) < 1 << 30


TOO_OLD = (
    "device must run the kernels, got cuda:1: the kernels need compute capability 8.0, Tesla T4 "
    "has less; use --device cpu"
)


def test_a_gpu_without_the_kernels_instructions_is_told_by_name(
    turing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runs in (CPU, torch.device("mps"), torch.device("cuda:0")):
        check_kernels(runs)
    with pytest.raises(ValueError) as refusal:
        check_kernels(torch.device("cuda:1"))
    assert str(refusal.value) == TOO_OLD
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="got cuda:0: the kernels need Triton"):
        check_kernels(torch.device("cuda:0"))


def test_a_pipeline_on_such_a_gpu_is_refused_before_anything_is_fetched(
    turing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "find_source", lambda *_: pytest.fail("it looks for the model"))
    with pytest.raises(ValueError) as refusal:
        Pipeline.from_pretrained("sigma-1024", device="cuda:1")
    assert str(refusal.value) == TOO_OLD


def test_training_a_transformer_on_such_a_gpu_is_refused(
    turing: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "run")
    assert train(["shapes-kv", "--device", "cuda:1", "--output", output, "--dry-run"]) == 2
    assert TOO_OLD in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
