"""One run of the study: a denoiser trained for its steps, and what is measured on the way."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pixart.config import EMBEDDED
from pixart.device import processor_name
from pixart.diffusion import training_loss
from pixart.evaluation.caption_accuracy import Task, captions
from pixart.evaluation.metrics.shapes import check_caption
from pixart.files import written_aside
from pixart.pipeline.directory import open_directory
from pixart.sampler.loop import initial_noise, sample, seed_generators
from pixart.sampler.schedulers import make_scheduler
from pixart.scalability.study.denoisers import LATENTS, Prompted, Reader, build, cost, guided
from pixart.scalability.study.plan import (
    BATCH,
    PASSES,
    SHOWN,
    TERA,
    Run,
    Scale,
    identity,
    level_steps,
    mark_steps,
    scored_steps,
    settings,
)
from pixart.scalability.study.store import picture_name
from pixart.scalability.study.world import END, SIDE, Feed, World, padded, tokenizer
from pixart.shapes.caption import KINDS
from pixart.training.ema import EMA
from pixart.training.optimizers import OptimizerSettings, build_optimizers, set_rate
from pixart.vae.autoencoder import VAE

PREDICTION = "v_prediction"
OPTIMIZER = OptimizerSettings(
    name="muon", learning_rate=1e-3, betas=(0.9, 0.99), clip_norm=1.0, warmup_steps=50
)
EMA_DECAY = 0.999
STEPS, GUIDANCE = 10, 3.0  # of a picture
PICTURES = 24  # denoised in one pass
OWN_SCENES = 256  # of the training set, whose loss tells how much of it is known by heart


class OutOfTimeError(Exception):
    """The study's time was over before the run was."""


@dataclass
class Bench:
    """What every run of a process measures with: opened once."""

    world: World
    scale: Scale

    @cached_property
    def reader(self) -> Reader:
        return Reader()

    @cached_property
    def vae(self) -> VAE:
        return VAE.from_pretrained(open_directory(EMBEDDED, True))

    @cached_property
    def texts(self) -> list[str]:
        """Captions that say everything, of single things and of pairs in turn."""
        half = -(-self.scale.captions // 2)
        one, pair = (captions(Task(kind, SIDE, count=half), 1) for kind in ("one", "pair"))
        both = [text for two in zip(one, pair, strict=True) for text in two]
        return both[: self.scale.captions]

    @cached_property
    def text_ids(self) -> Tensor:
        reads = tokenizer()
        return padded([reads.encode(text) for text in self.texts])


class Training:
    """A run as it goes: `advance` to a step, and measure there."""

    def __init__(self, run: Run, bench: Bench) -> None:
        self.run, self.bench, self.step = run, bench, 0
        torch.manual_seed(run.seed)
        self.model = build(run).train()
        self.weights = list(self.model.parameters())
        self.ema = EMA(self.weights, EMA_DECAY)
        self.optimizers = build_optimizers(self.model, OPTIMIZER)
        self.feed = Feed(bench.world, run)

    def advance(self, steps: int, look: Callable[[], None]) -> None:
        """Train until so many steps are done. look: called before each."""
        while self.step < steps:
            look()
            latents, noise, timesteps, ids = self.feed.next()
            loss = _losses(self.model, self.bench, latents, noise, timesteps, ids).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(self.weights, OPTIMIZER.clip_norm)
            rate = OPTIMIZER.rate(self.step, steps, BATCH)  # constant after the warm-up
            for optimizer in self.optimizers:
                set_rate(optimizer, rate)
                optimizer.step()
                optimizer.zero_grad()
            self.ema.update(self.step)
            self.step += 1

    def held_losses(self) -> list[float]:
        """Of each (scene, timestep, noise) that no run trains on."""
        held = self.bench.world
        return self._measure(held.held_latents, held.held_noise, held.held_timesteps, held.held_ids)

    def own_losses(self) -> list[float]:
        """Of scenes that the run trains on, in its own captions, at the timesteps and noise of
        `held_losses`."""
        held = self.bench.world
        own = Feed(held, self.run)
        count = min(OWN_SCENES, len(held.held_latents))
        scenes = own.allowed[torch.arange(count) % len(own.allowed)]
        ids = own.captions(scenes, dropped=0.0)
        noise, timesteps = held.held_noise[:count], held.held_timesteps[:count]
        return self._measure(held.latents[scenes], noise, timesteps, ids)

    @torch.no_grad()
    def _measure(
        self, latents: Tensor, noise: Tensor, timesteps: Tensor, ids: Tensor
    ) -> list[float]:
        self.model.eval()
        found: list[float] = []
        for part in torch.arange(len(latents)).split(4 * BATCH):
            given = latents[part], noise[part], timesteps[part], ids[part]
            found += _losses(self.model, self.bench, *given).tolist()
        self.model.train()
        return found

    def draw(self, ids: Tensor) -> np.ndarray:
        """A picture for each caption (B, L), of a noise of its own: (B, 128, 128, 3) uint8."""
        self.model.eval()
        scheduler = make_scheduler("dpm-solver++", {"prediction_type": PREDICTION})
        drawn = []
        for part in torch.arange(len(ids)).split(PICTURES):
            noise = initial_noise(LATENTS, seed_generators(part.tolist()))
            prompts = guided(self.bench.reader, ids[part], [END])
            latents = sample(
                Prompted(self.model, prompts), noise, scheduler, STEPS, guidance=GUIDANCE
            )
            drawn.append(self.bench.vae.decode(latents, tile=False))
        self.model.train()
        pixels = ((torch.cat(drawn).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).numpy()

    def accuracy(self) -> dict[str, Any]:
        """What holds of pictures for captions that say everything: by kind of statement (right, of), and
        of each caption the share of its statements."""
        checked = [
            check_caption(picture, text)
            for picture, text in zip(self.draw(self.bench.text_ids), self.bench.texts, strict=True)
        ]
        right, of = Counter[str](), Counter[str]()
        for one in checked:
            for kind in KINDS:
                right[kind] += sum(one.of_kind(kind))
                of[kind] += len(one.of_kind(kind))
        return {
            "step": self.step,
            "by_kind": {kind: [right[kind], of[kind]] for kind in KINDS if of[kind]},
            "all_right": sum(one.is_right for one in checked),
            "captions": len(checked),
            "shares": listed([sum(one.holds) / len(one.holds) for one in checked]),
        }


def _losses(
    model: nn.Module, bench: Bench, latents: Tensor, noise: Tensor, timesteps: Tensor, ids: Tensor
) -> Tensor:
    """The squared error of the velocity of each picture, (B,)."""
    prompts = bench.reader(ids)
    return training_loss(
        lambda x_t, t: model(x_t, t, prompts.features, prompts.mask),
        latents,
        timesteps,
        noise,
        prediction_type=PREDICTION,
    ).loss


def listed(values: list[float]) -> str:
    """Numbers as results.json has many of them: four digits, on one line."""
    return " ".join(f"{value:.4g}" for value in values)


def train(run: Run, bench: Bench, folder: Path, until: float) -> dict[str, Any]:
    """Train and measure one run. Returns what results.json has of it; its pictures are FOLDER/NAME.png, a
    row for each level. until: time.time() at which OutOfTimeError is raised."""
    began, started = time.time(), time.process_time()

    def look() -> None:
        if time.time() > until:
            raise OutOfTimeError(run.name)

    parameters, flops = cost(run)
    step_flops = PASSES * flops * BATCH
    scale, training = bench.scale, Training(run, bench)
    levels = level_steps(run, scale, step_flops)
    marks, accuracies, rows = [], [], []
    scored = scored_steps(run, scale, step_flops)
    for step in mark_steps(run, scale, step_flops):
        training.advance(step, look)
        is_level = step in levels.values()
        mark = measure(training, with_scenes=is_level or step == scale.shared)
        if is_level:
            with training.ema.swapped():
                mark["ema_loss"] = rounded(float(np.mean(training.held_losses())))
            if run.name in SHOWN:
                rows.append(training.draw(bench.text_ids[: scale.shown]))
        if step in scored:
            accuracies.append(training.accuracy())
        mark["tflop"] = rounded(step * step_flops / TERA)
        marks.append(mark)
    if rows:
        write_rows(rows, folder / picture_name(run.name))
    return {
        **settings(run, scale),
        "identity": identity(run, scale),
        "parameters": parameters,
        "forward_flops": flops,
        "steps": training.step,
        "seen_scenes": min(len(training.feed.allowed), training.step * BATCH),
        "levels": {f"{level:g}": step for level, step in levels.items()},
        "marks": marks,
        "accuracy": accuracies,
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(time.process_time() - started, 1),
        "processor": processor_name(),
    }


def measure(training: Training, with_scenes: bool) -> dict[str, Any]:
    """The losses at a step: of held-out scenes and of the run's own. with_scenes: each of the former too."""
    held, own = training.held_losses(), training.own_losses() if with_scenes else []
    mark: dict[str, Any] = {"step": training.step, "loss": rounded(float(np.mean(held)))}
    if with_scenes:
        mark |= {"own_loss": rounded(float(np.mean(own))), "losses": listed(held)}
    return mark


def rounded(value: float) -> float:
    """To six digits, which is more than any of these losses can be told to."""
    return float(f"{value:.6g}")


def write_rows(rows: list[np.ndarray], path: Path) -> None:
    """Pictures side by side, a row for each level from the top."""
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
    with written_aside(path) as aside, aside.open("wb") as file:
        Image.fromarray(sheet).save(file, "PNG")
