"""Many pictures by one generator: order, passes of several, cancelling, what a pipeline fills in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import CHANNELS, SMALL, levels_apart, open_pipeline
from published import build_alpha, build_sigma

from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.loop import Cancelled, Progress
from pixart.sampler.schedulers import SCHEDULERS

PROMPTS = ("a cat", "two red birds without a tree", "a dog", "a very small moon")


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    path = tmp_path_factory.mktemp("sigma")
    return open_pipeline(build_sigma(path, sample_size=16, vae_channels=CHANNELS))


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return open_pipeline(build_alpha(tmp_path_factory.mktemp("alpha"), vae_channels=CHANNELS))


def requests(**changes: Any) -> list[Request]:
    settings = {**SMALL, **changes}
    return [Request(prompt, seed=k, **settings) for k, prompt in enumerate(PROMPTS)]


def rows_of(pipe: Pipeline, monkeypatch: Any) -> list[int]:
    """How many samples each call of the transformer has."""
    rows: list[int] = []
    forward = pipe.transformer.forward

    def counted(latents: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        rows.append(len(latents))
        return forward(latents, *others, **options)

    monkeypatch.setattr(pipe.transformer, "forward", counted)
    return rows


def test_pictures_come_in_order_each_as_if_drawn_alone(sigma: Pipeline) -> None:
    asked = requests()
    pictures = list(sigma.draw_many(asked))
    assert [one.request.prompt for one in pictures] == list(PROMPTS)
    for one, request in zip(pictures, asked, strict=True):
        assert levels_apart(one.image, sigma.draw(request).image) == 0
        assert one.batch == 1


@pytest.mark.parametrize("family", ["sigma", "alpha"])
@pytest.mark.parametrize("settings", [{}, {"guidance": 1.0}, {"scheduler": "sa-solver"}])
def test_several_in_one_pass_are_the_pictures_drawn_alone_but_for_rounding(
    family: str, settings: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: Any
) -> None:
    pipe: Pipeline = request.getfixturevalue(family)
    asked = requests(negative="fog", batched=True, **settings)
    alone = list(pipe.draw_many(asked))
    rows = rows_of(pipe, monkeypatch)
    together = list(pipe.draw_many(asked, batch=3))
    halves = 1 if settings.get("guidance") == 1.0 else 2
    steps = SMALL["steps"]
    assert rows == [3 * halves] * steps + [halves] * steps
    assert [one.batch for one in together] == [3, 3, 3, 1]
    assert all(levels_apart(a.image, b.image) <= 1 for a, b in zip(alone, together, strict=True))
    assert levels_apart(alone[3].image, together[3].image) == 0, "it was drawn alone"
    assert levels_apart(together[0].image, together[1].image) > 5


def test_prompt_masks_of_the_null_caption_stay_with_their_pictures(
    sigma: Pipeline, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sigma.captions, "null_caption", "prompt-mask")
    alone = list(sigma.draw_many(requests()))
    together = list(sigma.draw_many(requests(), batch=4))
    assert all(levels_apart(a.image, b.image) <= 1 for a, b in zip(alone, together, strict=True))


def test_pictures_of_another_size_are_drawn_in_passes_of_their_own(
    sigma: Pipeline, monkeypatch: Any
) -> None:
    wide = Request("a cat", size="192x128", steps=3)
    asked = [*requests()[:2], wide, *requests()[2:]]
    rows = rows_of(sigma, monkeypatch)
    pictures = list(sigma.draw_many(asked, batch=8))
    assert [one.image.size for one in pictures] == [(128, 128)] * 2 + [(192, 128)] + [
        (128, 128)
    ] * 2
    assert rows == [4] * 3 + [2] * 3 + [4] * 3


def test_a_picture_is_handed_over_before_the_next_is_drawn(sigma: Pipeline) -> None:
    seen: list[Progress] = []
    pictures = sigma.draw_many(requests(), callback=seen.append)
    assert not seen, "nothing is drawn before it is asked for"
    next(pictures)
    assert len(seen) == 3


def test_all_requests_are_checked_before_anything_runs(sigma: Pipeline, monkeypatch: Any) -> None:
    monkeypatch.setattr(Pipeline, "prepare", lambda *_: pytest.fail("encoded text"))
    for wrong in ({"steps": 2000}, {"height": 100}, {"scheduler": "dmd", "steps": 3}):
        with pytest.raises(ValueError):
            sigma.draw_many([*requests(), Request("a cat", **{**SMALL, **wrong})])
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        sigma.draw_many(requests(), batch=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_cancelling_ends_between_pictures_and_within_one(sigma: Pipeline, batch: int) -> None:
    for steps in (3, 4):  # at the end of the first pass, and in the second
        seen: list[Progress] = []
        drawn = []

        def is_enough(seen: list = seen, steps: int = steps) -> bool:
            return len(seen) == steps

        with pytest.raises(Cancelled):
            for one in sigma.draw_many(
                requests(), batch=batch, callback=seen.append, cancel=is_enough
            ):
                drawn.append(one)
        assert (len(seen), len(drawn)) == (steps, batch)


def test_hooks_see_every_text_step_and_tile(sigma: Pipeline) -> None:
    texts: list[str] = []
    steps: list[Progress] = []
    tiles: list[tuple[int, int]] = []
    count = len(list(sigma.draw_many(
        requests(), batch=2, encoding=texts.append, callback=steps.append,
        decoding=lambda *done: tiles.append(done),
    )))  # fmt: skip
    assert count == 4 and texts == [PROMPTS[0], "", *PROMPTS[1:]]
    assert [one.step for one in steps] == [1, 2, 3] * 2
    assert steps[0].latents.shape == (2, 4, 16, 16)
    assert tiles == [(1, 1)] * 4


def test_recorded_steps_serve_passes_of_several(sigma: Pipeline, monkeypatch: Any) -> None:
    """What a CUDA graph replays is keyed by sizes; here it is called instead."""

    def replayed(
        model: Callable[..., Any],
        latents: Any,
        timesteps: Any,
        caption: Any,
        sizes: Any,
        **options: Any,
    ) -> Any:
        return model(latents, timesteps, caption, None, *sizes, **options)

    plain = list(sigma.draw_many(requests(), batch=4))
    monkeypatch.setattr(sigma.graphs, "of_size", lambda height, width: replayed)
    recorded = list(sigma.draw_many(requests(), batch=4))
    assert all(levels_apart(a.image, b.image) <= 1 for a, b in zip(plain, recorded, strict=True))


def test_a_drawn_picture_says_every_setting_and_is_drawn_again_by_them(sigma: Pipeline) -> None:
    one = sigma.draw(Request("a cat", steps=3))
    settings = one.request
    assert (settings.height, settings.width, settings.steps, settings.guidance) == (
        128,
        128,
        3,
        4.5,
    )
    assert (settings.scheduler, settings.batched, settings.tile) == ("dpm-solver++", True, False)
    assert np.array_equal(np.asarray(sigma.draw(settings).image), np.asarray(one.image))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "dmd"])
def test_the_pipelines_own_scheduler_is_called_by_its_name(name: str, monkeypatch: Any) -> None:
    from pixart.pipeline.defaults import name_of_scheduler
    from pixart.sampler.schedulers import make_scheduler

    facts = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    config: Any = make_scheduler(name, facts).config
    own = {key: value for key, value in config.items() if key != "_use_default_values"}
    own["_class_name"] = SCHEDULERS[name].class_name
    assert name_of_scheduler(make_scheduler(None, own), own) == name
    if "solver_order" in own:
        tuned = {**own, "solver_order": 3}
        assert name_of_scheduler(make_scheduler(None, tuned), tuned) is None


def test_a_pipeline_says_which_weights_it_draws_with(sigma: Pipeline, tmp_path: Path) -> None:
    assert set(sigma.weights) == {"transformer", "text_encoder", "vae"}
    assert all(len(digest) == 64 for digest in sigma.weights.values())
    source = Path(sigma.source)
    again = open_pipeline(source)
    assert again.weights == sigma.weights
    again.transformer = again.transformer
    assert set(again.weights) == {"text_encoder", "vae"}, "a model of the caller's has no file"
    from pixart.checkpoint.save import save_transformer

    model = open_pipeline(source).transformer
    save_transformer(model, tmp_path / "x.safetensors")
    model.final_layer.linear.weight.data *= 2
    save_transformer(model, tmp_path / "y.safetensors")
    x, y = (
        open_pipeline(source, transformer=tmp_path / f"{name}.safetensors").weights for name in "xy"
    )
    assert x["transformer"] != y["transformer"] and x["vae"] == y["vae"] == sigma.weights["vae"]
