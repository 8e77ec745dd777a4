"""The recipe of the embedded model: its stages, and what each starts from.

vae-crops -> vae-whole: the autoencoder. base: transformer and text encoder from random weights at
128 px, beside the autoencoder, whose latent space is known beforehand. double: from base, at 256 and
128 px in turn. export: the averaged weights as a pipeline.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pixart.model import PixArt
from pixart.text import load_tokenizer
from pixart.training.autoencoder import build_vae, vae_stage
from pixart.training.export import export_pipeline
from pixart.training.loop import Optimisation, Stage, run
from pixart.training.shapes import (
    VOCABULARY,
    build_text_encoder,
    build_transformer,
    shapes_stage,
    train_tokenizer,
)
from pixart.training.state import load_state

SIZE = 128
STAGES = {
    "vae-crops": Optimisation(
        steps=2500, learning_rate=1e-3, decay_fraction=0.5, warmup_steps=50, ema_decay=0.998
    ),
    "vae-whole": Optimisation(
        steps=600, learning_rate=5e-4, decay_fraction=0.9, warmup_steps=20, ema_decay=0.995
    ),
    "base": Optimisation(
        steps=9000, learning_rate=1e-3, optimizer="muon", warmup_steps=300, decay_fraction=0.25
    ),
    "double": Optimisation(
        steps=1800, learning_rate=4e-4, optimizer="muon", warmup_steps=50, decay_fraction=0.8
    ),
}


@dataclass
class ShapesRun:
    """A run of the recipe in a directory. scale multiplies the steps of every stage."""

    directory: Path
    scale: float = 1.0

    @property
    def stages(self) -> list[str]:
        return [*STAGES, "export"]

    def train(self, name: str, *, save_every: int, stop_after: int | None) -> bool:
        """Bring a stage to its end, or `stop_after` steps further. Returns whether it is done."""
        if name == "export":
            self.export()
            return True
        return run(self.stage(name), save_every=save_every, stop_after=stop_after)

    def stage(self, name: str) -> Stage:
        torch.manual_seed(0)
        place = self.directory / name
        settings = self._scaled(STAGES[name])
        if name == "vae-crops":
            return vae_stage(build_vae(), settings, place, size=SIZE, batch=16, crop=64)
        if name == "vae-whole":
            vae = self._finished("vae-crops", build_vae())
            return vae_stage(vae, settings, place, size=SIZE, batch=8, crop=None)
        pair = self._denoiser() if name == "base" else self._finished("base", self._denoiser())
        return shapes_stage(
            pair["transformer"],
            pair["text_encoder"],
            self.tokenizer,
            settings,
            place,
            sizes=(SIZE,) if name == "base" else (2 * SIZE, SIZE),
            pixels=64 * SIZE**2,
        )

    def export(self) -> None:
        """Write the averaged weights of the finished stages to `directory`/pipeline."""
        pair = self._finished("double", self._denoiser())
        export_pipeline(
            self.directory / "pipeline",
            transformer=pair["transformer"],
            text_encoder=pair["text_encoder"],
            vae=self._finished("vae-whole", build_vae()),
            spiece=self.directory / "tokenizer" / "spiece.model",
            prediction_type="v_prediction",
        )

    @cached_property
    def tokenizer(self) -> Any:
        path = self.directory / "tokenizer" / "spiece.model"
        if not path.exists():
            train_tokenizer(path)
        return load_tokenizer(path.parent)

    def _denoiser(self) -> Any:
        transformer: PixArt = build_transformer(SIZE)
        text_encoder = build_text_encoder(VOCABULARY)
        return nn.ModuleDict({"transformer": transformer, "text_encoder": text_encoder})

    def _finished(self, name: str, model: Any) -> Any:
        """The model with the averaged weights that a stage ended with."""
        state = load_state(self.directory / name / "state.pt")
        if state is None:
            raise ValueError(
                f"stage {name} must be trained first, {self.directory / name} has no state"
            )
        model.load_state_dict(state["model"])
        with torch.no_grad():
            trained = [p for p in model.parameters() if p.requires_grad]
            torch._foreach_copy_(trained, state["ema"])
        return model

    def _scaled(self, settings: Optimisation) -> Optimisation:
        return replace(settings, steps=max(1, round(settings.steps * self.scale)))
