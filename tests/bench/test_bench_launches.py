"""The first calls of every operator, as a process of its own makes them."""

import torch

from bench.workloads import launches
from bench.workloads.operators import OPERATORS


def test_every_operator_that_has_calls_of_its_own_is_called() -> None:
    found = launches.first_and_second(torch.device("cpu"), "tiny")
    names = {name.rsplit(" ", 1)[0] for name in found}
    assert names == {name for name, operator in OPERATORS.items() if operator.kinds}
    assert all(len(seconds) == 2 for seconds in found.values())
