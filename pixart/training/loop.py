"""The training loop: resumable, exact, and the same for every stage.

The batch of a step is a function of (seed, stage, step) alone, so a resumed run sees what an
uninterrupted one would have seen, and no data position has to be stored.
"""

import json
import math
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pixart.training.parallel import any_process, average_gradients, draw_number, rank
from pixart.training.state import load_state, save_state

MUON_MIN_SIDE = 64  # orthogonalising a thin matrix says little; those are left to AdamW

Losses = dict[str, Tensor]  # must hold "loss"; everything else is only logged


@dataclass(frozen=True)
class Optimisation:
    """How one stage is optimised: linear warm-up, a plateau, then a linear decay.

    optimizer "muon" orthogonalises the updates of large linear layers, at the size that AdamW's
    would have, and leaves everything else to AdamW.
    """

    steps: int
    learning_rate: float
    optimizer: str = "adamw"
    warmup_steps: int = 200
    decay_fraction: float = 0.3  # of the steps, at the end
    final_ratio: float = 0.02  # of the learning rate, at the last step
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    skip_ratio: float = 10.0  # a gradient norm this many times its running mean skips the step
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step (counted from 0)."""
        start = self.steps * (1 - self.decay_fraction)
        left = min(1.0, (self.steps - step) / max(1.0, self.steps - start))
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return self.learning_rate * warm * (self.final_ratio + (1 - self.final_ratio) * left)


def build_optimizers(model: nn.Module, settings: Optimisation) -> list[torch.optim.Optimizer]:
    """The optimizers that share the parameters of a model among them."""
    if settings.optimizer not in ("adamw", "muon"):
        raise ValueError(f'optimizer must be "adamw" or "muon", got {settings.optimizer!r}')
    matrices: list[Tensor] = []
    if settings.optimizer == "muon":
        linears = (module for module in model.modules() if isinstance(module, nn.Linear))
        matrices = [m.weight for m in linears if min(m.weight.shape) >= MUON_MIN_SIDE]
    chosen = {id(weight) for weight in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=rate, betas=settings.betas, weight_decay=decay)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


class Stage:
    """A stage in progress: weights, optimiser, EMA and step, in `directory`/state.pt.

    `loss(step)` draws the batch of that step and returns its losses. Global random numbers are
    seeded per step, so nothing else has to be restored for an exact resume.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        loss: Callable[[int], Losses],
        optimisation: Optimisation,
        directory: Path,
    ) -> None:
        self.name, self.model, self.loss, self.settings = name, model, loss, optimisation
        self.directory, self.step, self.mean_norm = directory, 0, 0.0
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = build_optimizers(model, optimisation)
        self.ema = [p.detach().clone() for p in self.parameters]

    @property
    def done(self) -> bool:
        return self.step >= self.settings.steps

    def save(self) -> None:
        if rank():  # all processes hold the same state
            return
        state = {
            "step": self.step,
            "mean_norm": self.mean_norm,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema,
        }
        save_state(state, self.directory / "state.pt")

    def resume(self) -> bool:
        """Take up the saved state, if there is one."""
        state = load_state(self.directory / "state.pt")
        if state is None:
            return False
        self.step, self.mean_norm = state["step"], state["mean_norm"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema = state["ema"]
        return True

    def advance(self) -> dict[str, float]:
        """One optimiser step. A gradient that explodes is skipped, and the log says so."""
        torch.manual_seed(_step_seed(self.settings.seed, self.name, draw_number(self.step)))
        losses = self.loss(self.step)
        self.model.zero_grad(set_to_none=True)
        losses["loss"].backward()
        average_gradients(self.parameters)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm))
        skipped = not self._accept(norm)
        if not skipped:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self.settings.rate(self.step)
                optimizer.step()
            self._average()
        self.step += 1
        values = {key: float(value.detach()) for key, value in losses.items()}
        return {**values, "norm": norm, "skipped": float(skipped)}

    def _accept(self, norm: float) -> bool:
        limit = self.settings.skip_ratio * self.mean_norm
        warm = self.step < self.settings.warmup_steps
        good = math.isfinite(norm) and (warm or norm <= limit)
        if good:
            rest = min(0.98, self.step / (self.step + 1))
            self.mean_norm = rest * self.mean_norm + (1 - rest) * norm
        return good

    def _average(self) -> None:
        # Early on a long average would mostly remember the random start.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)


def run(
    stage: Stage,
    *,
    save_every: int = 200,
    stop_after: int | None = None,
    log_every: int = 20,
) -> bool:
    """Advance a stage to its end, or for `stop_after` steps, or until SIGTERM or Ctrl-C; saves
    each time. Appends to `directory`/log.jsonl. Returns whether the stage is finished."""
    stage.resume()
    last = stage.settings.steps if stop_after is None else stage.step + stop_after
    stop = _StopSignals()
    stage.directory.mkdir(parents=True, exist_ok=True)
    started, seen = time.monotonic(), stage.step
    bar = tqdm(
        total=stage.settings.steps,
        initial=stage.step,
        desc=stage.name,
        mininterval=5,
        disable=rank() > 0,
    )
    with open(stage.directory / "log.jsonl", "a", buffering=1) as log, stop, bar:
        while not stage.done and stage.step < last and not any_process(stop.asked):
            values = stage.advance()
            bar.update()
            if stage.step % log_every == 0 and rank() == 0:
                rate = (stage.step - seen) / (time.monotonic() - started)
                bar.set_postfix(loss=f"{values['loss']:.4f}")
                log.write(json.dumps({"step": stage.step, "steps_per_s": rate, **values}) + "\n")
            if stage.step % save_every == 0:
                stage.save()
        stage.save()
    return stage.done


class _StopSignals:
    """Turns SIGTERM and Ctrl-C into a wish to stop after the current step."""

    asked = False

    def __enter__(self) -> None:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _step_seed(seed: int, stage: str, step: int) -> int:
    # Not hash(): it differs from process to process.
    return zlib.crc32(f"{seed}/{stage}/{step}".encode())
