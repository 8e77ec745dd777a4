"""Pictures that 2, 3 and 4 processes draw together, against the same drawn by one."""

from typing import Any

import pytest
import torch
from forked import lines_of

from pixart.pipeline.graphs import PictureGraphs
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.loop import Cancelled
from pixart.sampler.mesh import Mesh


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return lines_of("mesh_cases.py", "2", "3", "4")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[1, 2], [2, 1], [1, 3], [2, 2]])
def test_pictures_are_those_of_one_process(found: Any, mesh: list[int]) -> None:
    lines = [line for line in found if line["mesh"] == mesh and line["case"] != "cancelled"]
    assert len(lines) >= 10
    assert all(line["error"] <= _most(line["case"]) for line in lines), lines
    # A level where rounding falls on the other side, and the same picture for all.
    assert all(line["levels"] <= 1 and line["pictures"] == 1 for line in lines), lines


def _most(case: str) -> float:
    """An enlarged picture begins with the levels of the one before: where one rounds the other way, it goes on."""
    return 5e-4 if case.startswith("enlarged") else 1e-5


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


class _Alone:
    """A mesh of one process, which counts what is asked of all."""

    guidance, tokens, exchange, strips = 1, 1, None, None

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def any(self, flag: bool) -> bool:
        self.asked.append(flag)
        return flag

    def least(self, number: int) -> int:
        return number


def test_processes_with_other_prompts_to_encode_ask_each_other_as_often() -> None:
    """One has encoded them before, another reads all in one pass, as where T5 is streamed."""
    pipe: Any = Pipeline.from_pretrained(device="cpu", cache_dir=None)
    request = Request("a red circle", negative="green", steps=1, size="64")
    asked = []
    for is_known, in_one in ((False, True), (True, False), (False, False)):
        if is_known:
            pipe.prepare(["a red circle", "green"])
        mesh: Any = _Alone()
        pipe.share(mesh)
        with pytest.MonkeyPatch.context() as patch:
            if in_one:
                patch.setattr(pipe.text_encoder, "passes", lambda texts: [texts])
            pipe.draw(request)
        asked.append(len(mesh.asked))
        pipe.forget_prompts()
    assert len({*asked}) == 1 and asked[0] > 0


def test_who_is_cancelled_over_prompts_says_so_where_all_ask() -> None:
    pipe = Pipeline.from_pretrained(device="cpu", cache_dir=None)
    mesh: Any = _Alone()
    pipe.share(mesh)
    with pytest.raises(Cancelled, match="before a picture"):
        pipe.draw(Request("a red circle", steps=1, size="64"), cancel=lambda: True)
    assert mesh.asked == [True]
