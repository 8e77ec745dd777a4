"""Pictures that 2, 3 and 4 processes draw together, against the same drawn by one."""

from typing import Any

import pytest
import torch
from forked import lines_of

from pixart.pipeline.graphs import PictureGraphs
from pixart.sampler.mesh import Mesh


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return lines_of("mesh_cases.py", "2", "3", "4")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[1, 2], [2, 1], [1, 3], [2, 2]])
def test_pictures_are_those_of_one_process(found: Any, mesh: list[int]) -> None:
    lines = [line for line in found if line["mesh"] == mesh and line["case"] != "cancelled"]
    assert len(lines) >= 5
    assert all(line["error"] <= 1e-5 for line in lines), lines


@pytest.mark.slow
def test_all_stop_at_the_step_at_which_one_is_cancelled(found: Any) -> None:
    stopped = [line["stopped"] for line in found if line["case"] == "cancelled"]
    assert stopped == [[[1, 2]] * count for count in (2, 2, 3, 4)]


def test_a_mesh_that_is_not_all_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="1 or 2 by as many as make 1 processes, got 2 by 3"):
        Mesh(2, 3, torch.device("cpu"))


def test_a_recording_that_is_asked_for_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.pipeline.graphs.check_cuda_graph", lambda *_: None)
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match="cuda_graph must be left out where processes draw"):
        PictureGraphs(True, cuda, is_shared=True)
    assert PictureGraphs("auto", cuda).of_size(512, 512) is not None
    assert PictureGraphs("auto", cuda, is_shared=True).of_size(512, 512) is None
