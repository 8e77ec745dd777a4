"""A recipe in a directory: DIRECTORY/STAGE holds what each stage has reached.

Stages run one after the other; a stage that starts from the previous one takes the averaged weights
of its newest checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pixart.checkpoint.load import empty_model, open_transformer
from pixart.dataset.batches import FeatureDataset
from pixart.device import measure_peak
from pixart.distributed import barrier, rank, world_size
from pixart.model.transformer import PixArt
from pixart.pipeline.directory import open_directory
from pixart.pipeline.text_to_image import Pipeline
from pixart.training.plan import EFFICIENCY, plan, table
from pixart.training.progress import Progress
from pixart.training.stage import DRAWN, PREVIOUS, RANDOM, Data, Stage
from pixart.training.starts import (
    adapt,
    add_adapters,
    add_compression,
    check_null_caption,
    planned_config,
    set_null_caption,
    start_transformer,
    transformer_config,
)
from pixart.training.state import latest_checkpoint, load_average, read_progress
from pixart.training.tasks.autoencoder import AutoencoderTask, build_vae, load_vae
from pixart.training.tasks.shapes import (
    Pair,
    ShapesTask,
    build_pair,
    build_text_encoder,
    open_pair,
    train_tokenizer,
)
from pixart.training.tasks.text_encoder import ReadingTask, load_text_encoder
from pixart.training.tasks.transformer import DenoisingTask
from pixart.training.trackers import Tracker
from pixart.training.trainer import Task, Trainer, step_seed


@dataclass
class Run:
    """Stages of a recipe, in order, trained in a directory on one device per process."""

    directory: Path
    stages: Sequence[Stage]
    device: torch.device
    save_every: int = 500
    keep: int = 2
    trackers: tuple[Tracker, ...] = ()
    quiet: bool = False
    start_from: Path | None = None
    """A checkpoint to go on from instead of a stage's newest."""
    _by_name: dict[str, Stage] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._by_name = {stage.name: stage for stage in self.stages}

    def train(self, name: str, stop_after: int | None = None) -> bool:
        """Bring a stage to its end, or so many steps further. Returns whether it is finished."""
        stage = self._by_name[name]
        if self.start_from is None and self._is_finished(stage):
            return True
        stage = self._with_batches_as_begun(stage)
        stage.batch.unit(world_size())  # raises for what cannot be shared
        torch.manual_seed(step_seed(stage.seed, stage.name, 0))
        task = self.task(stage)
        trainer = Trainer(task, stage, self._folder(name), self.device, self.save_every, self.keep)
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(stage.precision, torch.bfloat16)
        progress = Progress(
            self._folder(name),
            name,
            peak=world_size() * measure_peak(self.device, dtype),
            trackers=self.trackers,
            quiet=self.quiet,
        )
        return trainer.run(progress, stop_after, self.start_from)

    def _with_batches_as_begun(self, stage: Stage) -> Stage:
        """Sized for the processes that the run began with: a step means the same images to any number
        of them."""
        if stage.batch.tokens is None or stage.batch.multiple is not None:
            return stage
        checkpoint = self.start_from or latest_checkpoint(self._folder(stage.name))
        begun = None if checkpoint is None else read_progress(checkpoint).get("batch_unit")
        return replace(stage, batch=replace(stage.batch, multiple=begun))

    def plan(self, name: str) -> str:
        """What a stage will cost, in words; estimates."""
        stage = self._with_batches_as_begun(self._by_name[name])
        if stage.trains != "transformer":
            part = (
                build_vae()
                if stage.trains == "autoencoder"
                else build_text_encoder(stage.size.caption_channels)
            )
            weights = sum(p.numel() for p in part.parameters())
            what = stage.trains.replace("_", " ")
            return f"{name}: {weights / 1e6:.1f} M parameters of the {what}, {stage.steps} steps"
        config = planned_config(stage, self.stages)
        model = empty_model(config)
        weights = sum(p.numel() for p in model.parameters())
        add_adapters(stage, model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        costs = list(plan(stage, config, weights, trained, self.device, world_size()))
        adapters = f" and {trained / 1e6:.1f} M of adapters" if stage.lora.rank else ""
        hours = stage.steps * max(cost.seconds for cost in costs) / 3600
        return (
            f"{name}: {weights / 1e6:.1f} M parameters{adapters}, {stage.steps} steps, "
            f"about {hours:.1f} h on {world_size()} × {self.device.type} (estimate: "
            f"{EFFICIENCY:.0%} of this machine's matrix products)\n{table(costs)}"
        )

    def _is_finished(self, stage: Stage) -> bool:
        checkpoint = latest_checkpoint(self._folder(stage.name))
        if checkpoint is None:
            return False
        reached = read_progress(checkpoint)
        out_of_time = stage.hours is not None and reached["seconds"] >= stage.hours * 3600
        return reached["step"] >= stage.steps or out_of_time

    def _folder(self, name: str) -> Path:
        return self.directory / name

    def task(self, stage: Stage) -> Task:
        """What a stage trains, from where the recipe says that it starts."""
        drawn = stage.data.source == DRAWN
        if stage.trains != "transformer" and not drawn:
            raise ValueError(
                f'data.source must be "{DRAWN}" where trains is {stage.trains}, '
                f"got {stage.data.source!r}"
            )
        if stage.trains != "transformer" and stage.validation.prompts:
            raise ValueError(
                f"validation.prompts must be empty where trains is {stage.trains}, which draws "
                "nothing; name another stage with --stage"
            )
        if drawn and stage.validation.every and not stage.validation.images:
            raise ValueError("validation.images must be positive for drawn data, got 0")
        if drawn and stage.batch.tokens is not None:
            raise ValueError(f"batch.tokens is for prepared data only, got {stage.batch.tokens}")
        _check_data(stage.data, drawn)
        if stage.trains == "autoencoder":
            return self._autoencoder_task(stage)
        if stage.trains == "text_encoder":
            if stage.start != RANDOM:
                raise ValueError(f"start of a text_encoder must be random, got {stage.start!r}")
            return ReadingTask(stage, self._tokenizer())
        return self._shapes_task(stage) if drawn else self._denoising_task(stage)

    def _autoencoder_task(self, stage: Stage) -> AutoencoderTask:
        if stage.start not in (PREVIOUS, RANDOM):
            raise ValueError(
                f"start of an autoencoder must be previous or random, got {stage.start!r}"
            )
        task = AutoencoderTask(build_vae(), stage)
        if stage.start == PREVIOUS:
            load_average(self._previous(stage), task.model)
        return task

    def _tokenizer(self) -> Path:
        """The run's own, learned from the captions once."""
        spiece = self.directory / "tokenizer" / "spiece.model"
        if rank() == 0 and not spiece.exists():
            train_tokenizer(spiece)
        barrier()
        return spiece

    def _before(self, stage: Stage) -> Stage:
        """The stage before this one in the recipe."""
        position = [other.name for other in self.stages].index(stage.name)
        if position == 0:
            raise ValueError(
                f"stage {stage.name} is the first and cannot start from the previous one; "
                "give --start"
            )
        return self.stages[position - 1]

    def _previous(self, stage: Stage) -> Path:
        """The checkpoint of the stage before this one in the recipe."""
        return self._newest(self._before(stage).name)

    def _newest(self, name: str) -> Path:
        checkpoint = latest_checkpoint(self._folder(name))
        if checkpoint is None:
            raise ValueError(
                f"stage {name} must be trained first, {self._folder(name)} has no checkpoint"
            )
        return checkpoint

    def _shapes_task(self, stage: Stage) -> ShapesTask:
        if stage.aspect:
            raise ValueError(f'aspect must be false for the source "{DRAWN}", got true')
        pair, spiece = self._pair(stage)
        task = ShapesTask(pair, stage, spiece, self._vae(stage))
        add_compression(stage, task)
        return task

    def _vae(self, stage: Stage) -> torch.nn.Module:
        if not stage.pipeline:
            raise ValueError(
                "pipeline must be the stage that trains the VAE, or a pipeline that has one, got none"
            )
        if stage.pipeline in self._by_name:
            folder = self._newest(stage.pipeline)
        else:
            folder = open_directory(stage.pipeline, with_transformer=False)
        vae = load_vae(folder / "vae")
        if stage.vae_scale != vae.config.scaling_factor:
            raise ValueError(
                f"vae_scale must be that of the VAE, {vae.config.scaling_factor}, "
                f"got {stage.vae_scale}"
            )
        return vae

    def _pair(self, stage: Stage) -> tuple[Pair, Path]:
        """Transformer and text encoder as a stage begins, and the tokenizer that goes with them."""
        if stage.start not in (PREVIOUS, RANDOM):
            return open_pair(stage)
        read = stage.start == PREVIOUS and self._before(stage).trains == "text_encoder"
        if read or stage.start == RANDOM:
            pair = build_pair(transformer_config(stage))
            if read:
                load_text_encoder(self._previous(stage), pair.text_encoder)
            return pair, self._tokenizer()
        previous = self._previous(stage)
        folder = previous / "pipeline"
        pair = build_pair(open_transformer(folder / "transformer").config)
        load_average(previous, pair)
        adapt(pair.transformer, stage)
        return pair, folder / "tokenizer" / "spiece.model"

    def _denoising_task(self, stage: Stage) -> DenoisingTask:
        if not stage.data.source:
            raise ValueError(
                f"stage {stage.name} must have data, got none; give --data.source FOLDER, made by "
                "`python -m pixart.data prepare`"
            )
        previous = self._previous(stage) if stage.start == PREVIOUS else None
        dataset = FeatureDataset(stage.data.source, stage.resolution)
        prior = None
        if stage.data.prior:
            prior = FeatureDataset(stage.data.prior, stage.resolution)
        model = start_transformer(stage, previous)
        pipe = self._pipeline(stage, model)
        if pipe is None and stage.start != RANDOM and stage.data.caption_dropout:
            check_null_caption(model)
        model = model.to(self.device)
        task = DenoisingTask(model, stage, dataset, self.device, prior=prior, pipeline=pipe)
        add_compression(stage, task)
        add_adapters(stage, model)
        return task

    def _pipeline(self, stage: Stage, model: PixArt) -> Pipeline | None:
        """What reads and draws for a stage, around the model that it trains. T5 runs here, once."""
        if not stage.pipeline:
            if stage.validation.prompts:
                raise ValueError(
                    "pipeline must be named to draw validation.prompts, got none; give --pipeline"
                )
            return None
        pipe = Pipeline.from_pretrained(
            stage.pipeline, transformer=model, device=self.device, dtype=torch.float32
        )
        predicts = pipe.scheduler_config.get("prediction_type", "epsilon")
        if predicts != stage.prediction:
            raise ValueError(
                f"prediction must be that of {stage.pipeline}, {predicts}, got {stage.prediction}"
            )
        set_null_caption(model, pipe)
        pipe.prepare([*stage.validation.prompts, ""])
        return pipe


def _check_data(data: Data, drawn: bool) -> None:
    """Refuse what would do nothing with such data."""
    idle = ("captions", "prior", "prior_weight") if drawn else ("scenes", "sizes", "crop")
    for name in idle:
        if getattr(data, name) != getattr(Data(), name):
            kind = "prepared data" if drawn else f'the source "{DRAWN}"'
            raise ValueError(f"data.{name} is for {kind} only, got {getattr(data, name)}")
