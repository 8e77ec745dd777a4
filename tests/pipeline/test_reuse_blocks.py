"""Reused blocks in pictures: against the evaluations themselves, redrawn, in plans, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pixart.calibration.studio import Scene, Settings, Studio
from pixart.model.transformer import Reuse
from pixart.pipeline.drawing import Hooks, Pass
from pixart.pipeline.fast import identity_of, note_of
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.metadata import MODEL_OPTIONS, Metadata
from pixart.pipeline.rehearsal import rehearse
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.plans.plan import Plan
from pixart.plans.reuse import BlockReuse
from pixart.sampler.loop import initial_noise, sample, seed_generators

CAPTION = Request("a large red circle at the left on a white background", steps=9, batched=True)
REUSED = replace(CAPTION, reuse_blocks="1:3,5,7")


def levels(pipe: Pipeline, request: Request) -> np.ndarray:
    return np.asarray(pipe.draw(request).image)


@torch.no_grad()
def evaluated(pipe: Pipeline, request: Request, reused: tuple[int, ...]) -> torch.Tensor:
    """The latents of a guided picture by calls of the model itself, one for each half of guidance."""
    request = pipe.resolve(request)
    conditional, unconditional = pipe.captions.pair(request.prompt, "")
    captions = {"conditional": conditional, "unconditional": unconditional}
    encoded = {
        half: pipe.transformer.encode_caption(one.features, one.mask)
        for half, one in captions.items()
    }
    kept: dict[str, torch.Tensor] = {}
    seen: list[float] = []

    def denoise(latents: torch.Tensor, timesteps: torch.Tensor, captions: str) -> torch.Tensor:
        now = float(timesteps[0])
        seen[:] = seen if now in seen else [*seen, now]
        reuse = Reuse(1, kept.get(captions) if len(seen) in reused else None)
        output = pipe.transformer(latents, timesteps, encoded[captions], reuse=reuse)
        kept[captions] = reuse.change  # type: ignore[assignment]
        return output

    generators = seed_generators([request.seed])
    side = (request.height or 0) // pipe.vae.downsample
    noise = initial_noise((4, side, side), generators)
    interval = request.guidance_interval or (0.0, 1.0)
    return sample(
        denoise, noise, pipe.solver(request.scheduler), request.steps, guidance=request.guidance,  # type: ignore[arg-type]
        guidance_interval=interval, batched=False,
    )  # fmt: skip


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_a_picture_is_that_of_the_calls_themselves(
    batched: bool, interval: tuple[float, float], pipe: Pipeline
) -> None:
    steps: list[Any] = []
    request = replace(REUSED, batched=batched, guidance_interval=interval)
    pipe.draw(request, callback=steps.append)
    # From the middle on guided, no half that is new is reused: step 6 is its first.
    expected = evaluated(pipe, request, (3, 5, 7))
    torch.testing.assert_close(steps[-1].latents, expected, rtol=1e-3, atol=1e-3)
    plain = evaluated(pipe, request, ())
    assert (steps[-1].latents - plain).abs().max() > 1e-2


def test_what_is_kept_dies_with_the_picture(pipe: Pipeline) -> None:
    first = levels(pipe, REUSED)
    levels(pipe, replace(REUSED, seed=3, prompt="a blue star"))
    assert np.array_equal(levels(pipe, REUSED), first)
    several = [one.image for one in pipe.draw_many([REUSED, replace(REUSED, seed=1)], batch=2)]
    assert np.abs(np.asarray(several[0]).astype(int) - first).max() <= 2


def test_off_is_the_same_bits(pipe: Pipeline) -> None:
    plain = levels(pipe, CAPTION)
    assert not np.array_equal(levels(pipe, REUSED), plain)
    assert np.array_equal(levels(pipe, replace(REUSED, reuse_blocks=None)), plain)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"scheduler": "sa-solver"}, "scheduler that adds noise at every step .sa-solver"),
        ({"scheduler": "euler-a"}, "scheduler that adds noise at every step .euler-a"),
        ({"scheduler": "lcm", "steps": None}, "scheduler that adds noise at every step .lcm"),
        ({"scheduler": "heun"}, "scheduler that evaluates a step more than once .heun"),
        ({"steps": 8}, "left out with 8 steps or fewer, got 8"),
        ({"steps": None, "timesteps": (999, 749, 499, 249)}, "8 steps or fewer, got 4"),
        ({"reuse_blocks": "6:3"}, "fewer than the 6 blocks of this model, got 6"),
        ({"reuse_blocks": "1:10"}, "of steps from 2 to 9, got 10"),
        ({"reuse_blocks": "1:1"}, "have steps from 2"),
    ],
)
def test_what_gains_nothing_or_has_no_steps_is_refused(
    asked: Any, said: str, pipe: Pipeline
) -> None:
    with pytest.raises(ValueError, match=f"^reuse_blocks must .*{said}"):
        pipe.resolve(replace(REUSED, **asked))


@pytest.mark.parametrize(
    "asked", [{"image": "x", "strength": 0.5}, {"upscale": "2x"}, {"pag": 2.0}], ids=str
)
def test_pictures_from_pictures_and_further_guidance_reuse_too(asked: Any, pipe: Pipeline) -> None:
    from PIL import Image

    pictures = {"x": Image.new("RGB", (128, 128), (255, 80, 80))}
    request = replace(REUSED, steps=20, reuse_blocks="1:3-19/2", **asked)
    drawn, plain = (
        np.asarray(pipe.draw(one, pictures=pictures).image).astype(int)
        for one in (request, replace(request, reuse_blocks=None))
    )
    assert 0 < np.abs(drawn - plain).mean() < 30


def test_a_plan_sets_it_for_its_own_steps_and_a_picture_draws_itself_again(pipe: Pipeline) -> None:
    reuse = BlockReuse.parse("1:3-9/2")
    pipe.plan = Plan(identity_of(pipe), 9, (0.0, 0.7), 2.0, "dpm-solver++", reuse_blocks=reuse)
    again = Plan.from_dict(json.loads(json.dumps(pipe.plan.to_dict())))
    assert again == pipe.plan and again.digest() != replace(again, reuse_blocks=None).digest()
    assert "blocks reused 1:3,5,7,9" in note_of(pipe.plan)
    assert pipe.resolve(Request("a")).reuse_blocks == "1:3,5,7,9"
    assert pipe.resolve(Request("a", steps=9)).reuse_blocks == "1:3,5,7,9"
    assert pipe.resolve(Request("a", steps=12)).reuse_blocks is None
    assert pipe.resolve(Request("a", reuse_blocks="2:4")).reuse_blocks == "2:4"
    asked = replace(CAPTION, steps=None)
    drawn = pipe.draw(asked)
    options: dict[str, Any] = {
        **dict.fromkeys(MODEL_OPTIONS), "model": "shapes", "lora": [], "control": [],
        "preprocessor_weights": [], "ema": False, "cuda_graph": "auto", "fast": "plan.json",
    }  # fmt: skip
    read = Metadata.from_text(Metadata.of(drawn, pipe, asked, options).to_text())
    assert read.request.reuse_blocks == "1:3,5,7,9" and read.asked.reuse_blocks is None
    pipe.plan = None
    assert np.array_equal(levels(pipe, read.request), np.asarray(drawn.image))


def test_a_plan_file_of_before_has_none_and_one_of_other_steps_is_refused(pipe: Pipeline) -> None:
    plan = Plan(identity_of(pipe), 12, guidance=2.0, scheduler="dpm-solver++")
    values = plan.to_dict()
    values.pop("reuse_blocks")
    assert Plan.from_dict(values) == plan
    with pytest.raises(ValueError, match="reuse_blocks must be of the 12 steps, got 13"):
        Plan.from_dict({**values, "reuse_blocks": "1:13"})
    with pytest.raises(ValueError, match="reuse_blocks must be text or null"):
        Plan.from_dict({**values, "reuse_blocks": 3})


def test_a_studio_draws_and_counts_what_the_pipeline_does(pipe: Pipeline) -> None:
    steps: list[Any] = []
    request = pipe.resolve(replace(REUSED, guidance_interval=(0.0, 0.5)))
    pipe.draw(request, callback=steps.append)
    studio, settings = Studio(pipe, request.height or 0, request.width or 0), Settings.of(request)
    scene = Scene(request.prompt, request.seed)
    assert torch.equal(studio.latents(scene, settings), steps[-1].latents)
    assert settings.request(scene, 128, 128).reuse_blocks == "1:3,5,7"
    whole = studio.cost(replace(settings, reuse=None), scene)
    # Of 5 guided and 4 plain evaluations, 14 halves, two steps of 2 and one of 1 compute a block of six.
    assert studio.cost(settings, scene) / whole == pytest.approx((9 + 5 / 6) / 14, abs=0.02)


def test_a_rehearsal_measures_steps_of_either_kind(pipe: Pipeline) -> None:
    request = pipe.resolve(replace(REUSED, guidance_interval=(0.0, 0.5)))
    pipe.prepare([request.prompt, ""])
    assert rehearse(pipe, [request], Inputs()).evaluations == 9
    stage = Pass(pipe, [request], Hooks(None, None, None, None), Inputs())
    from pixart.pipeline.fast import step_reuse
    from pixart.pipeline.rehearsal import _Noted

    noted = _Noted([], lambda _: (), step_reuse(request, pipe.solver(None)))
    stage._sample(noted, stage._stages[0], None, seed_generators([0]), None)
    counts = {(kind[0], kind[3]): count for kind, count in noted.counts.items()}
    assert counts == {
        ("both", False): 3, ("both", True): 2, ("conditional", False): 3, ("conditional", True): 1,
    }  # fmt: skip
