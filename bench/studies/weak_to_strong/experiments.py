"""What weak-to-strong training changes about a model, and how the model takes it.

Every experiment starts from the same weights, changes one thing, and trains the transformer on; the
loss on fixed scenes and the share of captions that are followed are measured on the way.

Axis letters: B scenes.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pixart.config import EMBEDDED, KVCompression
from pixart.evaluation.caption_accuracy import Task as Captions
from pixart.evaluation.caption_accuracy import measure, requests
from pixart.files import written_aside
from pixart.model.transformer import PixArt
from pixart.pipeline.directory import open_directory
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.training.batch import TrainingSample, diffusion_losses, stack
from pixart.training.ema import EMA
from pixart.training.recipe import load_recipe
from pixart.training.scenes import draw_sample, token_conditions
from pixart.training.stage import ResolvedStage
from pixart.training.tasks.autoencoder import load_vae
from pixart.training.tasks.shapes import Pair, ShapesTask, open_pair
from pixart.training.trainer import Trainer
from pixart.training.transitions import add_kv_compression, interpolate_positions

CPU = torch.device("cpu")
LEARNING_RATE = 3e-4
EMA_DECAY = 0.98  # looks back about 50 steps: single steps are noisy, and 50 is the first mark
CALIBRATION = 4  # batches
PROCESSES = 2  # experiments at the same time, unless told


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    marks: tuple[int, ...] = (0, 50, 100, 500)
    recovery: int = 500
    images: int = 32
    """Of a training step at the native size; larger pictures are fewer, the same pixels."""
    scenes: int = 192
    """Held fixed for the loss."""
    captions: int = 100
    doubled_captions: int = 28
    """At the doubled size, where a picture takes 16 times as long."""
    shown: int = 4


TINY = Scale(marks=(0, 1), recovery=1, images=4, scenes=4, captions=2, doubled_captions=2, shown=2)


@dataclass(frozen=True)
class Experiment:
    """One change. kv: LAYERS:RATIO:SAMPLING, empty for none."""

    name: str
    resolution: int = 128
    positions: Literal["interpolated", "extrapolated"] = "interpolated"
    kv: str = ""
    start: Literal["mean", "calibrated", "random"] = "mean"


DOUBLED = 512  # the embedded model knows 128 and 256
EXPERIMENTS = (
    Experiment("interpolated", resolution=DOUBLED),
    Experiment("extrapolated", resolution=DOUBLED, positions="extrapolated"),
    Experiment("conv deep half, mean", kv="3-5:2:conv"),
    Experiment("conv deep half, calibrated", kv="3-5:2:conv", start="calibrated"),
    Experiment("conv deep half, random", kv="3-5:2:conv", start="random"),
    Experiment("average deep half", kv="3-5:2:average"),
    Experiment("discard deep half", kv="3-5:2:uniform"),
    Experiment("conv shallow third", kv="0-1:2:conv"),
    Experiment("conv middle third", kv="2-3:2:conv"),
    Experiment("conv deep third", kv="4-5:2:conv"),
    Experiment("dense"),
)


@dataclass
class Mark:
    """What was measured after so many steps. losses: of each of the fixed scenes."""

    step: int
    losses: list[float]
    right: int
    of: int


def study_stage(resolution: int, images: int, marks: Sequence[int], seed: int = 0) -> ResolvedStage:
    """How every experiment trains: as the recipe's `double` does, at a constant rate. seed: decides
    data, their order, noise, timesteps and which captions are dropped."""
    double = next(stage for stage in load_recipe("shapes") if stage.name == "double")
    native = double.resolved()
    return replace(
        native,
        name="study",
        start=EMBEDDED,
        pipeline=EMBEDDED,
        resolution=resolution,
        data=replace(double.data, sizes=()),
        batch=replace(double.batch, images=max(1, images * native.resolution**2 // resolution**2)),
        steps=max(marks),
        seed=seed,
        ema=EMA_DECAY,
        optimizer=replace(
            double.optimizer, learning_rate=LEARNING_RATE, warmup_steps=10, schedule="constant"
        ),
    )


def open_dense() -> Pair:
    """The embedded model without its compression: its other weights, which were made with it."""
    pair, _ = open_pair(study_stage(128, 1, (1,)))
    compressed = pair.transformer
    dense = PixArt(replace(compressed.config, kv_compression=None))
    kept = dense.state_dict().keys()
    dense.load_state_dict({k: v for k, v in compressed.state_dict().items() if k in kept})
    return Pair(dense, pair.text_encoder)


class Study:
    """A model in training whose text encoder stays as it is, as T5 does for PixArt."""

    def __init__(self, pair: Pair, stage: ResolvedStage, folder: Path, scale: Scale) -> None:
        self.stage, self.scale = stage, scale
        pair.text_encoder.requires_grad_(False)
        self.pipe = Pipeline.from_pretrained(EMBEDDED, device=CPU, cache_dir=None)
        self.pipe.transformer = pair.transformer
        embedded = open_directory(EMBEDDED, True)
        spiece, vae = embedded / "tokenizer" / "spiece.model", load_vae(embedded / "vae")
        self.task = ShapesTask(pair, stage, spiece, vae)
        self.transformer = pair.transformer
        self.folder = folder
        self.scenes = [self._scene(number) for number in range(scale.scenes)]

    def _scene(self, number: int) -> TrainingSample:
        rng = random.Random(f"fixed/{number}")
        whole = replace(self.stage, data=replace(self.stage.data, caption_dropout=0.0))
        return draw_sample(rng, self.task.tokenizer, self.stage.resolution, whole)

    def prepare(self) -> None:
        """Make the trainer, after the model was changed."""
        self.trainer = Trainer(self.task, self.stage, self.folder, CPU)

    def advance(self, step: int) -> None:
        while self.trainer.step < step:
            self.trainer.advance(self.task.load(self.trainer.step, 1))

    def mark(self, kind: str) -> tuple[Mark, list[Image.Image]]:
        with self._averaged():
            losses, pictures, (right, of) = self._losses(), self._pictures(kind), self._asked(kind)
        return Mark(self.trainer.step, losses, right, of), pictures

    def losses(self) -> list[float]:
        """Of each of the fixed scenes, by the averaged weights."""
        with self._averaged():
            return self._losses()

    def captions(self, kind: str) -> tuple[int, int]:
        """How many captions are followed, and of how many, by the averaged weights."""
        with self._averaged():
            return self._asked(kind)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        ema = self.trainer.ema
        assert isinstance(ema, EMA)
        self.trainer.model.eval()
        with ema.swapped(), torch.no_grad():
            yield
        self.trainer.model.train()

    def _asked(self, kind: str) -> tuple[int, int]:
        doubled = self.stage.resolution == DOUBLED
        count = self.scale.doubled_captions if doubled else self.scale.captions
        asked = Captions(kind, self.stage.resolution, count=count)
        found = measure(self.pipe, asked, Request("", seed=1))
        return found.right, found.of

    def _losses(self) -> list[float]:
        values: list[float] = []
        per_batch, exact = self.stage.batch.images, replace(self.stage, precision="fp32")
        for start in range(0, len(self.scenes), per_batch):
            part = stack(self.scenes[start : start + per_batch])
            terms = diffusion_losses(self.task.model, part, exact, *token_conditions(part))
            values += terms.mse.tolist()
        return values

    def _pictures(self, kind: str) -> list[Image.Image]:
        asked = Captions(kind, self.stage.resolution, count=self.scale.shown)
        drawn = self.pipe.draw_many(requests(asked, Request("", seed=2)), batch=4)
        return [one.image for one in drawn]


def recover(file: Path, scale: Scale) -> None:
    """Train the embedded model without its compression, and store its transformer's weights."""
    with TemporaryDirectory() as folder:
        stage = study_stage(128, scale.images, (scale.recovery,))
        study = Study(open_dense(), stage, Path(folder), scale)
        study.prepare()
        study.advance(scale.recovery)
        ema = study.trainer.ema
        assert isinstance(ema, EMA)
        with ema.swapped(), written_aside(file) as aside:
            save_file(study.transformer.state_dict(), aside)


def run(experiment: Experiment, weights: Path, scale: Scale) -> dict[str, Any]:
    """Measure an experiment that starts from the recovered weights.

    Returns its fields, its marks as plain values, and the pictures drawn at each mark.
    """
    kind, marks, pictures = _kind(experiment), [], []
    with _begun(experiment, weights, scale) as study:
        for step in scale.marks:
            study.advance(step)
            mark, drawn = study.mark(kind)
            marks.append(asdict(mark))
            pictures.append(drawn)
    return {**asdict(experiment), "captions": kind, "marks": marks, "pictures": pictures}


def repeat(experiment: Experiment, weights: Path, scale: Scale, seed: int) -> dict[str, Any]:
    """Run an experiment with another seed than the first run's, 0: other data in another order, other
    dropped captions, another random convolution, other batches to calibrate by. The scenes of the
    loss and the captions stay the same.

    Returns name, seed, the losses at each mark, the captions followed at the last, and CPU seconds.
    """
    began, kind, marks = time.process_time(), _kind(experiment), []
    with _begun(experiment, weights, scale, seed) as study:
        for step in scale.marks:
            study.advance(step)
            marks.append({"step": step, "losses": study.losses()})
        right, of = study.captions(kind)
    measured = {"marks": marks, "captions": kind, "right": right, "of": of}
    seconds = round(time.process_time() - began, 1)
    return {"name": experiment.name, "seed": seed, **measured, "cpu_seconds": seconds}


def _kind(experiment: Experiment) -> str:
    """Of the captions."""
    return "pair" if experiment.resolution == 128 else "one"


@contextmanager
def _begun(experiment: Experiment, weights: Path, scale: Scale, seed: int = 0) -> Iterator[Study]:
    """The model changed and ready to train."""
    torch.manual_seed(seed)  # a random start of the convolution
    pair = open_dense()
    pair.transformer.load_state_dict(load_file(weights))
    stage = study_stage(experiment.resolution, scale.images, scale.marks, seed)
    with TemporaryDirectory() as folder:
        study = Study(pair, stage, Path(folder), scale)
        if experiment.resolution != 128:
            # Half the published divisor: positions as dense as at 256 px, running on beyond it.
            divisor = DOUBLED / 512 / (2 if experiment.positions == "extrapolated" else 1)
            interpolate_positions(pair.transformer, experiment.resolution, divisor)
        if experiment.kv:
            # The batches are a fixed row: each seed has its own part of it.
            first = CALIBRATION * seed
            row = islice(study.task.noised_batches(first + CALIBRATION), first, None)
            add_kv_compression(
                pair.transformer,
                KVCompression.parse(experiment.kv),
                start=experiment.start,
                batches=row if experiment.start == "calibrated" else (),
            )
        study.prepare()
        yield study
