"""Which pictures a pipeline draws by graphs, and what it does where it cannot; the graphs are fake_cuda's."""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda, fake_cuda
from pipelines import CHANNELS, SMALL, levels_apart, open_pipeline
from published import build_sigma

from pixart.device import check_cuda_graph
from pixart.graphs.capture import GraphError
from pixart.pipeline.graphs import AUTO_PIXELS, PictureGraphs
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.resolution import ASPECT_RATIOS
from pixart.sampler.cuda_graphs import CudaGraphs

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = tmp_path_factory.mktemp("sigma")
    return open_pipeline(build_sigma(path, sample_size=16, vae_channels=CHANNELS))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return fake_cuda(monkeypatch)


def with_graphs(plain: Pipeline, wanted: bool | str) -> Pipeline:
    """The pipeline as it were on a CUDA device, and computes on the CPU."""
    pipe = replace(plain)
    pipe.graphs = PictureGraphs(wanted, CUDA)  # type: ignore[arg-type]
    return pipe


@pytest.mark.parametrize(
    ("wanted", "device", "drawn"),
    [
        ("auto", CUDA, [True, True, False]), (True, CUDA, [True, True, True]),
        (False, CUDA, [False] * 3), ("auto", CPU, [False] * 3), (False, CPU, [False] * 3),
    ],
)  # fmt: skip
def test_auto_is_for_pictures_of_up_to_1k_on_cuda(
    wanted: Any, device: torch.device, drawn: list[bool]
) -> None:
    graphs = PictureGraphs(wanted, device)
    sizes = [(512, 512), (1024, 1024), (2048, 2048)]
    assert [isinstance(graphs.of_size(*size), CudaGraphs) for size in sizes] == drawn


def test_every_bucket_of_1k_is_one_and_none_of_2k() -> None:
    for height, width in ASPECT_RATIOS[1024].values():
        assert height * width <= AUTO_PIXELS
    assert all(height * width > AUTO_PIXELS for height, width in ASPECT_RATIOS[2048].values())


@pytest.mark.parametrize("wanted", [True, "on", 1, None])
def test_what_cannot_be_meant_is_refused(wanted: Any) -> None:
    rule = "must be False on cpu, got True" if wanted is True else 'must be True, False or "auto"'
    with pytest.raises(ValueError, match=f"cuda_graph {rule}"):
        check_cuda_graph(wanted, CPU)


@pytest.mark.parametrize("wanted", [True, "auto"])
@pytest.mark.parametrize("batched", [True, False])
def test_pictures_are_those_without_graphs(
    plain: Pipeline, cuda: FakeCuda, wanted: bool | str, batched: bool
) -> None:
    pipe = with_graphs(plain, wanted)
    requests = [
        Request(
            text, seed=k, batched=batched, guidance_interval=(0.0, 0.9), **{**SMALL, "steps": 6}
        )
        for k, text in enumerate(["a cat", "two red birds without a tree"])
    ]
    for drawn, expected in zip(pipe.draw_many(requests), plain.draw_many(requests), strict=True):
        assert levels_apart(drawn.image, expected.image) <= 1
        assert drawn.cuda_graph and not expected.cuda_graph
    assert cuda.replayed > cuda.recorded > 0


def test_one_step_is_never_recorded(plain: Pipeline, cuda: FakeCuda) -> None:
    pipe = with_graphs(plain, "auto")
    pipe.draw(Request("a cat", guidance=1.0, **{**SMALL, "steps": 1}))
    assert cuda.recorded == 0


@pytest.fixture
def hooked(plain: Pipeline) -> Iterator[None]:
    handle = plain.transformer.blocks[0].register_forward_hook(lambda *_: None)
    yield
    handle.remove()


def reading(plain: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which a layer waits for the GPU."""
    mlp: Any = plain.transformer.blocks[1].mlp
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda x: forward(x) * (1 if x.sum().item() else 1))


def test_auto_warns_once_and_draws_the_same_picture_without(
    plain: Pipeline, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(plain, monkeypatch)
    pipe, request = with_graphs(plain, "auto"), Request("a cat", **SMALL, scheduler="sa-solver")
    steps: list[int] = []
    with pytest.warns(
        UserWarning, match=r"test_graphs.py:\d+\) waits for .*: drawing without CUDA"
    ):
        drawn = pipe.draw(request, callback=lambda progress: steps.append(progress.step))
    assert not drawn.cuda_graph and steps == [1, 1, 2, 3], "begun again from the first step"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = pipe.draw(request)
    expected = plain.draw(request)
    assert levels_apart(drawn.image, expected.image) == levels_apart(again.image, drawn.image) == 0


def test_where_graphs_are_asked_for_it_raises(
    plain: Pipeline, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading(plain, monkeypatch)
    with pytest.raises(GraphError, match="cannot be a CUDA graph: .*; use cuda_graph=False"):
        with_graphs(plain, True).draw(Request("a cat", **SMALL))


def test_hooks_are_a_reason(plain: Pipeline, cuda: FakeCuda, hooked: None) -> None:
    with pytest.warns(UserWarning, match=r"blocks\.0 has a forward hook"):
        assert not with_graphs(plain, "auto").draw(Request("a cat", **SMALL)).cuda_graph


def test_memory_is_given_back_when_the_model_leaves_the_gpu(
    plain: Pipeline, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = with_graphs(plain, "auto")
    pipe.draw(Request("a cat", **SMALL))
    assert cuda.alive
    pipe.transformer = pipe.transformer
    assert not cuda.alive
