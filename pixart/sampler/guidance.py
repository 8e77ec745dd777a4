"""Guidance: one prediction made of those for the prompt, without it, and with perturbed attention.

What a step costs, in evaluations of one picture: 1, or 2 with a scale above 1, and 1 more with PAG. The
guidance interval spares all but the first outside of it: T-GATE (arXiv:2404.02747), which stops guiding
after its gate step, is the interval (0, gate step / steps).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pixart.sampler.prediction import clean_per_output, predict_clean
from pixart.sampler.schedulers import Scheduler

Captions = Literal["both", "conditional", "unconditional", "perturbed"]
_TINY = 1e-30  # for quotients of sums of squares that may be 0


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance (arXiv:2410.02416): classifier-free guidance of the clean latents, in
    three parts that may each be off.

    momentum: how much of the running difference is added to the next one, below 0 to push away from it;
    it counts evaluations, which are two in a step of Heun's. norm: longest difference, over all values of
    an image, 0 for any; the paper's 15 is for 4 x 128 x 128 of them. eta: share of the part of the
    difference along the prediction that is kept, 1 for all.
    """

    eta: float = 0.0
    momentum: float = -0.5
    norm: float = 15.0

    def __post_init__(self) -> None:
        for name in ("eta", "momentum"):
            if not -1 <= getattr(self, name) <= 1:
                raise ValueError(f"apg_{name} must be from -1 to 1, got {getattr(self, name)}")
        _check_finite("apg_norm", self.norm)


@dataclass(frozen=True)
class Guidance:
    """How predictions are guided.

    scale: s of u + s (c - u), of the conditional prediction c and the unconditional u; at most 1 is c
    alone. interval: the part of the trajectory that is guided at all, from 0 (noise) to 1 (image); outside
    only c is evaluated, and T-GATE is nothing else. apg: takes the place of u + s (c - u).
    pag: perturbed-attention guidance (arXiv:2403.17377) adds pag (c - p), p being the prediction with
    perturbed attention; it needs no u. rescale: from 0 to 1, how much of the result's deviation is brought
    back to c's, image by image (arXiv:2305.08891, section 3.4), after all else.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    apg: APG | None = None
    pag: float = 0.0

    def __post_init__(self) -> None:
        _check_finite("guidance", self.scale)
        _check_finite("pag", self.pag)
        start, end = self.interval if len(self.interval) == 2 else (math.nan, math.nan)
        if not 0 <= start <= end <= 1:
            raise ValueError(
                f"guidance_interval must be 0 <= start <= end <= 1, got {self.interval}"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale must be from 0 to 1, got {self.rescale}")
        if self.apg is not None and self.scale <= 1:
            raise ValueError(f"apg must be given with guidance above 1, got {self.scale}")
        if self.rescale and self.scale <= 1 and not self.pag:
            raise ValueError(
                f"guidance_rescale must be given with guidance above 1 or with pag, got {self.scale}"
            )

    def check(self, scheduler: Scheduler) -> None:
        """ValueError for a scheduler whose predictions cannot be guided like this."""
        predicts_noise = scheduler.config.prediction_type == "epsilon"
        if self.apg is not None and predicts_noise and not scheduler.alphas_cumprod[-1] > 0:
            raise ValueError(
                f"apg must be left out for {type(scheduler).__name__} with rescale_betas_zero_snr: "
                "where nothing of the picture is left, a prediction of noise says nothing of it"
            )


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be a finite number from 0 up, got {number}")


class Guide:
    """The guidance of one run, whose momentum lives here, image by image.

    batched: c and u in one evaluation of twice the batch.
    """

    def __init__(self, guidance: Guidance, scheduler: Scheduler, batched: bool) -> None:
        self._guidance, self._scheduler, self._batched = guidance, scheduler, batched
        self._running: Tensor | None = None

    def __call__(
        self,
        evaluate: Callable[[Captions], Tensor],
        inputs: Tensor,
        timestep: float,
        share: float,
    ) -> Tensor:
        """The guided prediction (B, C, h, w) of an evaluation at this share of the trajectory."""
        wanted, (start, end) = self._guidance, self._guidance.interval
        is_guided = start <= share < end and (wanted.scale > 1 or wanted.pag > 0)
        if not is_guided:
            return evaluate("conditional")
        if wanted.scale > 1:
            unconditional, conditional = self._pair(evaluate)
            if wanted.apg is None:
                guided = unconditional + wanted.scale * (conditional - unconditional)
            else:
                guided = self._projected(wanted.apg, conditional, unconditional, inputs, timestep)
        else:
            guided = conditional = evaluate("conditional")
        if wanted.pag:
            guided = guided + wanted.pag * (conditional - evaluate("perturbed"))
        return rescaled(guided, conditional, wanted.rescale) if wanted.rescale else guided

    def _pair(self, evaluate: Callable[[Captions], Tensor]) -> tuple[Tensor, Tensor]:
        if self._batched:
            unconditional, conditional = evaluate("both").chunk(2)
            return unconditional, conditional
        return evaluate("unconditional"), evaluate("conditional")

    def _projected(
        self,
        apg: APG,
        conditional: Tensor,
        unconditional: Tensor,
        inputs: Tensor,
        timestep: float,
    ) -> Tensor:
        # The clean latents are linear in the prediction: as a difference of predictions, theirs loses
        # nothing to rounding where the noise is large or small, and the way back is a division.
        slope = clean_per_output(self._scheduler, timestep)
        if slope == 0:  # no noise is left, and no prediction of it changes the picture
            return conditional
        difference = slope * (conditional - unconditional)
        if self._running is not None:
            difference = difference + apg.momentum * self._running
        self._running = difference
        if apg.norm:
            length = _for_each(lambda one: one.norm(), difference)
            difference = difference * (apg.norm / length.clamp_min(_TINY)).clamp_max(1)
        clean = predict_clean(self._scheduler, inputs, conditional, timestep)
        along = _for_each(
            lambda d, x: (d * x).sum() / (x * x).sum().clamp_min(_TINY), difference, clean
        )
        update = difference + (apg.eta - 1) * along * clean
        return conditional + (self._guidance.scale - 1) / slope * update


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """The guided prediction with this share of its deviation brought to the conditional's."""
    ratio = _for_each(lambda g, c: c.std() / g.std().clamp_min(_TINY), guided, conditional)
    return guided * (share * ratio + (1 - share))


def _for_each(measure: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A number for each image, (B, 1, 1, 1). One after the other, so that an image's bits do not depend
    on its batch. In float32, whose sums torch makes pairwise, to 1e-6: Apple's GPUs have no float64."""
    numbers = [measure(*images) for images in zip(*tensors, strict=True)]
    return torch.stack(numbers).view(-1, 1, 1, 1)
