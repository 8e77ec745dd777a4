"""Which of several GPUs the clocks, watts and driver of a result are of."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.measure import machine

# Two cards as nvidia-smi counts them, of which CUDA_VISIBLE_DEVICES=1 leaves this process the second.
CARDS = {"GPU-aaaa": (1110, 2220, 333, 44), "GPU-bbbb": (1510, 2620, 699, 71)}
SMI = """#!/bin/sh
test "$1" = -i || exit 2
case "$2$3" in
GPU-bbbb--query-gpu=driver_version) echo 580.1 ;;
0--query-gpu=clocks*) echo '1110, 2220, 333, 44' ;;
GPU-aaaa--query-gpu=clocks*) echo '1110, 2220, 333, 44' ;;
1--query-gpu=clocks*|GPU-bbbb--query-gpu=clocks*) echo '1510, 2620, 699, 71' ;;
*) echo 'No devices were found'; exit 6 ;;
esac
"""
CUDA = torch.device("cuda", 0)


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An nvidia-smi that knows two cards, and what PyTorch says of the only one that it sees."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    properties = SimpleNamespace(
        name="Some GPU", uuid="bbbb", major=9, minor=0, multi_processor_count=132,
        total_memory=1, L2_cache_size=1,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return properties


def test_the_driver_is_asked_of_the_gpu_that_pytorch_uses(cards: SimpleNamespace) -> None:
    found = machine.identity(CUDA)
    assert (found["gpu"], found["uuid"], found["driver"]) == ("Some GPU", "GPU-bbbb", "580.1")
    cards.uuid = "cccc"  # of which nvidia-smi knows nothing: another card's driver would be a lie
    assert machine.identity(CUDA)["driver"] is None


@pytest.mark.parametrize("uuid", ["aaaa", "bbbb"])
def test_clocks_are_those_of_the_gpu_that_pytorch_uses(cards: SimpleNamespace, uuid: str) -> None:
    cards.uuid = uuid
    log = machine.ClockLog(CUDA, interval=3600)
    begun = time.time()
    while not log.readings and time.time() < begun + 20:
        time.sleep(0.01)
    expected = dict(zip(machine.READINGS, CARDS[f"GPU-{uuid}"], strict=True))
    assert log.since(0) == expected


def test_a_gpu_that_nvidia_smi_does_not_know_has_no_clocks(cards: SimpleNamespace) -> None:
    cards.uuid = "cccc"
    log = machine.ClockLog(CUDA, interval=3600)
    log._watch("GPU-cccc")  # ends, as the thread has
    assert log.since(0) is None
