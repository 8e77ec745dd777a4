"""What guidance costs: the evaluations that the bench and the guide state are those that are made."""

from typing import Any

import pytest
import torch

from bench.workloads.guidance import WAYS, request
from pixart.config import EMBEDDED
from pixart.pipeline.text_to_image import Pipeline

STEPS, SIDE = 4, 128


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(EMBEDDED, device="cpu", cache_dir=None)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_takes_as_many_evaluations_as_stated(
    pipe: Pipeline, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = pipe.transformer.forward

    def counted(latents: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
        rows.append(len(latents))
        return forward(latents, *others, **more)

    monkeypatch.setattr(pipe.transformer, "forward", counted)
    pipe.draw(request(way, SIDE, STEPS))
    assert sum(rows) / STEPS == WAYS[way][0]
