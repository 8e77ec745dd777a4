"""Ctrl-C at random moments is one line and 130; `make fuzz` presses it 30 times."""

import pytest
from interrupts import Trial, attempt


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_ctrl_c_at_any_moment_is_one_line(seed: int) -> None:
    assert attempt(Trial.of(seed)) == ""
