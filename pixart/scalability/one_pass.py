"""A process that measures one forward pass: a question as JSON on standard input, the answer on standard output.

    echo '{"row": "SD2-C320", "device": "cpu", "size": 256, "dtype": "fp32", "batch": 1}' \
      | python -m pixart.scalability.one_pass
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pixart.files import parse_json
from pixart.scalability.meter import Meter
from pixart.scalability.rows import ROWS, Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WARM_UP, LEAST, MOST = 2, 3, 30  # passes before the measured ones; of these at least, at most
SECONDS = 3.0  # that they take about


def main() -> None:
    question = parse_json(sys.stdin.read(), "the question")
    device = torch.device(question["device"])
    row, dtype = ROWS[question["row"]], DTYPES[question["dtype"]]
    row.forward(row.build(), question["size"])  # imports what it needs, before memory is counted
    meter = Meter(device)
    try:
        module = with_weights(row, device, dtype)
        with torch.inference_mode():
            times = timed(lambda: row.forward(module, question["size"], question["batch"]), device)
    except torch.OutOfMemoryError:
        print(json.dumps({"left_out": f"out of memory on {device}"}))
        return
    answer: dict[str, Any] = {
        "milliseconds": 1e3 * statistics.median(times),
        "repeats": len(times),
        "peak_bytes": meter.peak(),
    }
    print(json.dumps(answer))


def with_weights(row: Row, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The denoiser with small random weights, never twice in memory: one dtype's at a time."""
    module = row.build().to(dtype).to_empty(device=device)
    for weight in module.parameters():
        weight.requires_grad_(False)
        if weight.dim() > 1:
            weight.uniform_(-0.02, 0.02)
        else:
            weight.fill_(0.02)
    for buffer in module.buffers():
        buffer.zero_()
    return module


def timed(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each pass, after some that are not counted."""
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    while len(times) < LEAST or (len(times) < MOST and sum(times) < SECONDS):
        times.append(_seconds(call, device))
    return times


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
