"""Stages trained by 2, 3 and 4 processes that share the tokens of pictures, against the same on one."""

from pathlib import Path
from typing import Any

import pytest
from forked import lines_of

MESHES = {
    "1x2": {"dense", "R2"},
    "1x3": {"dense", "sized"},
    "2x2": {"mixed", "sized", "adapters", "control"},
    "1x4": {"R2"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place: Path = tmp_path_factory.mktemp("among")
    return lines_of("training_cases.py", place)


def of(found: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [line for line in found if line["case"].startswith(names)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_losses_and_gradients_are_those_of_one_process(found: Any, mesh: str) -> None:
    lines = [line for line in of(found, *MESHES[mesh]) if line["mesh"] == mesh]
    assert {line["case"] for line in lines} == MESHES[mesh]
    assert all(line["tensors"] >= 40 for line in lines)
    assert all(max(line["losses"], line["gradients"]) <= 1e-5 for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixed", "sized", "adapters", "control"])
def test_steps_of_a_mesh_come_to_what_one_process_comes_to(found: Any, case: str) -> None:
    """Weights, averages, losses, norms and validation; pictures and tokens are counted once."""
    [line] = [line for line in of(found, case) if line["mesh"] == "2x2"]
    assert max(line["log"], line["weights"]) <= 1e-5 and line["same count"], line


@pytest.mark.slow
def test_a_run_goes_on_in_other_layouts(found: Any) -> None:
    """A step on 2 × 2 that share tokens, one on 1 × 3, and one on two with ddp."""
    [line] = of(found, "moved")
    assert max(line["log"], line["weights"]) <= 1e-5, line


@pytest.mark.slow
def test_an_exchange_that_loses_what_others_send_is_found_out(found: Any) -> None:
    lines = of(found, "broken")
    assert len(lines) == 2
    assert all(line["losses"] > 1e-4 and line["gradients"] > 1e-1 for line in lines), lines


@pytest.mark.slow
def test_bytes_are_computed_as_they_are_received(found: Any) -> None:
    lines = of(found, "bytes")
    assert len(lines) == 3
    assert all(line["received"] == line["computed"] > 0 for line in lines), lines
