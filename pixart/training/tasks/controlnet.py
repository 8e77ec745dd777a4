"""Training a control: a ControlNet-Transformer that steers a base by a picture, while the base stays as it is.

The base lies outside of the module that trains. So it is in no state, no average and no exchange, and each
process holds all of it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.checkpoint.control import CONTROL, empty_control, open_control
from pixart.checkpoint.load import OpenedTransformer
from pixart.checkpoint.save_control import save_control
from pixart.cost import forward_flops
from pixart.dataset.batches import FeatureBatch, FeatureDataset
from pixart.distributed import rank
from pixart.lora.adapters import merge_lora
from pixart.model.control import Control, ControlNet
from pixart.model.exchange import TokenExchange
from pixart.model.transformer import PixArt
from pixart.training.batch import TrainingSample, unread_data, whole_state
from pixart.training.plan import control_plan
from pixart.training.prepared import prepared_problems, source_problems
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.stage import CONTROLNET, DIT, PREVIOUS, RANDOM, ResolvedStage, Stage
from pixart.training.starts import (
    adapt,
    add_control_adapters,
    check_null_caption,
    control_blocks,
    pipeline_is_here,
    pipeline_problems,
    weightless_control,
)
from pixart.training.tasks.transformer import DenoisingTask, open_pipeline


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that trains a control on prepared features."""
    yield from base_problems(stage)
    yield from prepared_problems(stage)
    yield from unread_data(stage, "prior", "prior_weight")
    if stage.validation.prompts:
        yield (
            f"validation.prompts must be empty where trains is {CONTROLNET}, got "
            f"{len(stage.validation.prompts)}: a prompt alone has no picture that steers"
        )


def base_problems(stage: Stage) -> Iterator[str]:
    """Yield what a stage asks of a base that stays as it is."""
    if stage.start == RANDOM or stage.start.startswith(DIT):
        yield f"start must be a trained PixArt, which a control steers, got {stage.start}"
    if stage.kv_compress:
        rule = f"kv_compress must be empty where trains is {CONTROLNET}, whose base stays as it is"
        yield f"{rule}, got {stage.kv_compress}; name a compressed one as --start"
    if stage.micro_condition:
        yield f"micro_condition must be false where trains is {CONTROLNET}: the base's own counts"


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield what is wrong with the base, the pipeline and the data that a stage names."""
    yield from before_problems(stage, run)
    model, lines = attempt(lambda: run.known_model(stage))
    yield from lines
    start, _ = attempt(lambda: run.start(stage))  # complained of above
    if model is not None:
        yield from problems_of(lambda: weightless_control(stage, model))
    if start is not None:
        yield from problems_of(lambda: check_null_caption(stage, start.null_caption_stored))
    config = None if model is None else model.config
    if stage.pipeline and pipeline_is_here(stage):
        yield from pipeline_problems(stage, config)
    data_problems = list(source_problems(stage, run, config))
    yield from data_problems
    if stage.data.source and not data_problems:
        data = run.dataset(stage.data.source, stage.resolution)
        yield from problems_of(data.check_controls)


def before_problems(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield why a stage cannot start from the one before it."""
    if stage.start != PREVIOUS:
        return
    yield from problems_of(lambda: run.expect_previous(stage))
    before, _ = attempt(lambda: run.before(stage))
    if before is not None and not (before.trains_transformer or before.trains == CONTROLNET):
        yield f"start must be no {before.trains}, which stage {before.name} trains, got previous"


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words and a table what a stage will cost."""
    return control_plan(stage, run)


def build(stage: ResolvedStage, run: Run) -> "ControlTask":
    """Make the task as the stage begins. T5 runs here, once."""
    data = run.dataset(stage.data.source, stage.resolution)
    start = run.start(stage)
    assert start is not None  # a rule of `check`
    check_null_caption(stage, start.null_caption_stored)
    base = adapt(start.load(), stage)
    if stage.pipeline:
        open_pipeline(stage, base, run.device)  # its T5 gives the null caption
    base = base.to(run.device)
    return ControlTask(begin_control(stage, run, base), base, stage, data, run.device)


# The control.


def begin_control(stage: ResolvedStage, run: Run, base: PixArt) -> ControlNet:
    """The control that a stage begins with, with the adapters that alone train where it asks for any:
    stage.control.start, the previous stage's, or copies of the base's blocks. Raises ValueError for one
    that does not fit."""
    place = _begun(stage, run)
    if place is None:
        network = base.new_control(control_blocks(stage, base.config))
    else:
        opened = open_control(place, OpenedTransformer.of(base), dtype=torch.float32)
        network = opened.load(base.x_embedder.proj.weight.device)
        _check_blocks(stage, network)
    return add_control_adapters(stage, network)


def _begun(stage: ResolvedStage, run: Run) -> Path | None:
    """Where the control is that a stage goes on from."""
    if stage.control.start:
        return Path(stage.control.start)
    if stage.start == PREVIOUS and run.before(stage).trains == CONTROLNET:
        return run.previous(stage)
    return None


def _check_blocks(stage: Stage, network: ControlNet) -> None:
    if stage.control.blocks not in (None, network.copies):
        raise ValueError(
            f"control.blocks must be those of the control that it goes on from, {network.copies}, got "
            f"{stage.control.blocks}"
        )


class Controlled(nn.Module):
    """A control on its base, called as the base is, but for the hint before all: (B, C, h, w) latents."""

    def __init__(self, network: ControlNet, base: PixArt) -> None:
        super().__init__()
        self.network = network
        self._base = (base.requires_grad_(False),)  # in a tuple: no part of this module

    @property
    def base(self) -> PixArt:
        return self._base[0]

    def forward(
        self,
        hint: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        *conditions: Tensor,
        exchange: TokenExchange | None = None,
    ) -> Tensor:
        controls = [Control(self.network, hint)]
        return self.base(x_t, timesteps, *conditions, controls=controls, exchange=exchange)


def export_control(model: nn.Module, stage: Stage, base: PixArt, folder: Path) -> None:
    """FOLDER/control in diffusers' research layout and FOLDER/control.safetensors under the official names, the
    control alone in both, with adapters merged. Called by all processes."""
    state = whole_state(model)
    if rank() != 0:
        return
    network = add_control_adapters(stage, empty_control(base.config, _copies(state)))
    weights = {name.removeprefix("network."): weight for name, weight in state.items()}
    network.load_state_dict(weights, assign=True)
    if stage.lora.rank:
        merge_lora(network)
    save_control(network, folder / CONTROL, config=base.config, format="diffusers")
    save_control(network, folder / f"{CONTROL}.safetensors", config=base.config)


def _copies(state: dict[str, Any]) -> int:
    return sum(name.endswith(".after_proj.weight") for name in state)


def control_flops(stage: Stage, network: ControlNet, forward: float) -> float:
    """FLOPs of a forward pass of base and copies, so counted that three make a step. forward: those of the
    base. It is frozen, and has gradients of its inputs alone; so have copies beside adapters."""
    copies = network.copies / network.config.depth
    return forward * (2 + (2 if stage.lora.rank else 3) * copies) / 3


# Learning it from prepared features.


class ControlTask(DenoisingTask):
    """A Task of pixart.training.trainer: the published loss of a PixArt on a FeatureDataset with pictures
    that steer, which a control learns to follow."""

    is_steered = True

    def __init__(
        self,
        network: ControlNet,
        base: PixArt,
        stage: ResolvedStage,
        dataset: FeatureDataset,
        device: torch.device,
    ) -> None:
        super().__init__(base, stage, dataset, device)
        self.network = network
        self.model = Controlled(network, base)

    def draw_control(self, one: FeatureBatch, generator: torch.Generator) -> Tensor:
        assert one.control_mean is not None and one.control_std is not None
        noise = torch.randn(one.control_mean.shape, generator=generator)
        return (one.control_mean + one.control_std * noise) * self.scale

    def bind(self, model: nn.Module, part: TrainingSample) -> Callable[..., Tensor]:
        return partial(model, part.control)

    def flops(self, part: TrainingSample) -> float:
        one = forward_flops(self.config, self.tokens(part) // len(part))
        return len(part) * control_flops(self.stage, self.network, one)

    def export(self, folder: Path) -> None:
        export_control(self.model, self.stage, self.transformer, folder)
