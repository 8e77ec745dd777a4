"""Weights that are not finite are refused by name, wherever they come from."""

import math

import pytest
import torch

from pixart.command import FAILURE, exit_code
from pixart.files import CheckpointError
from pixart.weights import check_finite

FLOATS = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16,
    torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_number_that_is_not_finite_is_found_in_every_dtype(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    sound = torch.tensor([[largest, -largest, 0.0] * 5] * 3, dtype=torch.float64).to(dtype)
    check_finite({"a": sound, "none": sound[:0], "ids": torch.arange(3)}, "x")
    for value in (math.nan, math.inf, -math.inf):
        if dtype == torch.float8_e4m3fn and math.isinf(value):  # has no infinity: becomes NaN
            continue
        broken = sound.float().clone()
        broken[1, 7] = value
        broken = broken.t().to(dtype)
        with pytest.raises(CheckpointError, match=r"^x: must be finite, .* in b, c;") as caught:
            check_finite({"a": sound, "b": broken, "c": broken[:, 1]}, "x")
        assert exit_code(caught.value) == FAILURE


def test_only_the_first_few_are_named() -> None:
    broken = torch.tensor(math.nan)
    with pytest.raises(CheckpointError, match=r"in t0, t1, .*, t9 and 20 more;"):
        check_finite({f"t{i}": broken for i in range(30)}, "x")
