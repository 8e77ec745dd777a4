"""The embedded world's control: outlines of drawn scenes, and the scenes that they are outlines of."""

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from pixart.cost import forward_flops
from pixart.distributed import rank
from pixart.model.control import ControlNet
from pixart.pipeline.directory import open_directory
from pixart.pipeline.text_to_image import Pipeline
from pixart.shapes.caption import describe
from pixart.shapes.scene import draw_outlines
from pixart.training.batch import TrainingSample, drawn_data_problems
from pixart.training.parallel import sharing_problems
from pixart.training.plan import control_plan
from pixart.training.previews import draw_pictures
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.scenes import drawing_problems, drawn_sizes, token_conditions
from pixart.training.stage import PREVIOUS, ResolvedStage, Stage
from pixart.training.starts import start_is_here, weightless_control
from pixart.training.tasks.controlnet import (
    Controlled,
    base_problems,
    before_problems,
    begin_control,
    control_flops,
    export_control,
)
from pixart.training.tasks.shapes import Pair, ShapesTask, begin_pair, start_folder


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that trains a control on drawn outlines."""
    yield from base_problems(stage)
    yield from drawn_data_problems(stage, "scenes", "sizes", "nameless")
    yield from drawing_problems(stage)
    if stage.validation.prompts:
        yield "validation.prompts must be empty for drawn outlines, got some; name validation.metrics"


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield what a stage needs and is not there, or does not fit it."""
    yield from before_problems(stage, run)
    if stage.start != PREVIOUS and start_is_here(stage):
        yield from problems_of(lambda: start_folder(stage))
    model, lines = attempt(lambda: run.known_model(stage))
    yield from lines
    if model is not None:
        yield from problems_of(lambda: weightless_control(stage, model))
        yield from sharing_problems(stage, model.config, drawn_sizes(stage))


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words and a table what a stage will cost."""
    return control_plan(stage, run)


def build(stage: ResolvedStage, run: Run) -> "ShapesControlTask":
    """Make the task as the stage begins."""
    pair, spiece = begin_pair(stage, run)
    pair = pair.to(run.device)
    network = begin_control(stage, run, pair.transformer)
    return ShapesControlTask(network, pair, stage, spiece, _folder(stage, run))


def _folder(stage: ResolvedStage, run: Run) -> Path:
    """The pipeline of the base."""
    origin = run.origin(stage)
    if origin.start == PREVIOUS:
        return run.previous(origin) / "pipeline"
    return open_directory(origin.start, True)


class ShapesControlTask(ShapesTask):
    """A Task of pixart.training.trainer: a control of a pair that stays as it is, on drawn outlines.

    folder: the pipeline that the pair is of, which draws what validation looks at.
    """

    def __init__(
        self, network: ControlNet, pair: Pair, stage: ResolvedStage, spiece: Path, folder: Path
    ) -> None:
        super().__init__(pair, stage, spiece, None)
        pair.requires_grad_(False)
        self.network, self.folder = network, folder
        self.model = Controlled(network, pair.transformer)

    def bind(self, model: nn.Module, part: TrainingSample) -> Callable[[Tensor, Tensor], Tensor]:
        ids, mask = token_conditions(part)
        with torch.no_grad(), self.stage.autocast(ids.device):
            features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return lambda x_t, timesteps: model(part.control, x_t, timesteps, features, mask)

    def flops(self, part: TrainingSample) -> float:
        one = forward_flops(self.transformer.config, self.tokens(part) // len(part))
        return len(part) * control_flops(self.stage, self.network, one)

    def export(self, folder: Path) -> None:
        export_control(self.model, self.stage, self.transformer, folder)

    def _draw_pictures(self, folder: Path) -> dict[str, float]:
        """Of outlines whose captions tell neither shapes nor places; metrics score them by captions that
        do, which only the outline can have told."""
        scenes = self._measuring.scenes
        if not scenes:
            return {}
        rng = random.Random("validation/nameless")
        prompts = [describe(scene, rng, omit=0.0, is_nameless=True) for scene, _ in scenes]
        side = self.stage.resolution
        outlines = [Image.fromarray(draw_outlines(scene, side)) for scene, _ in scenes]
        with tempfile.TemporaryDirectory() as place:
            self.export(Path(place))
            if rank() != 0:
                return {}
            device = next(self.model.parameters()).device
            pipe = Pipeline.from_pretrained(
                self.folder, device=device, cache_dir=None, control=[Path(place)]
            )
            drawn = draw_pictures(pipe, self.stage, folder / "metrics", prompts, outlines)
        return self._measuring([text for _, text in scenes], drawn)
