"""What the sampler calls to denoise: a transformer beside the captions of a picture, which are
encoded once and not at every step, launched kernel by kernel or replayed as a CUDA graph.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pixart.model.blocks import EncodedCaption
from pixart.model.control import Control, ControlNet
from pixart.model.transformer import PixArt, Reuse
from pixart.plans.schedule import KVSchedule
from pixart.sampler.cuda_graphs import CudaGraphs
from pixart.sampler.guidance import Captions
from pixart.sampler.mesh import Mesh
from pixart.text.encoder import PromptEmbeddings

# As `Denoiser` has them in one batch.
_HALVES: dict[Captions, tuple[str, ...]] = {"both": ("unconditional", "conditional")}


@dataclass(frozen=True)
class PictureControl:
    """What steers a picture. hint: (1 or B, in_channels, h, w) latents of the picture's size. timesteps:
    (high, low), between which it is evaluated and beyond which it is not: see timesteps_within."""

    network: ControlNet
    hint: Tensor
    scale: float = 1.0
    timesteps: tuple[float, float] = (math.inf, -math.inf)

    @property
    def is_bounded(self) -> bool:
        """Whether the timestep decides."""
        return self.timesteps != (math.inf, -math.inf)


@dataclass(frozen=True)
class StepReuse:
    """first: how many blocks are computed in any case. timesteps: at which the others are not, but for a half of
    guidance that was not evaluated before."""

    first: int
    timesteps: frozenset[float]


class PictureDenoiser:
    """A `pixart.sampler.Denoiser` for one picture.

    prompts: the embeddings of each choice of captions; those of "perturbed" are the conditional ones.
    height, width: pixels, for micro-conditioned models. graphs: replays recorded launches; the model must
    then be on a CUDA device. controls: what steers the picture. perturbed: blocks in which attention is
    the identity when captions are "perturbed". mesh: the processes that draw the picture together, all of
    which make the same calls; no recording can hold what they exchange. kv_schedule: what the transformer's
    blocks merge at which timesteps, checked for its configuration; controls keep what they have. reuse: where
    blocks add what they added before; what that was is kept for each half of guidance, as long as this lives.
    """

    def __init__(
        self,
        transformer: PixArt,
        prompts: Mapping[Captions, PromptEmbeddings],
        height: int,
        width: int,
        device: torch.device,
        graphs: "CudaGraphs | None" = None,
        *,
        controls: Sequence[PictureControl] = (),
        perturbed: Collection[int] = (),
        mesh: Mesh | None = None,
        kv_schedule: KVSchedule | None = None,
        reuse: StepReuse | None = None,
    ) -> None:
        if mesh is not None and graphs is not None:
            raise ValueError("graphs must be None with a mesh: no recording holds an exchange")
        if mesh is not None and reuse is not None:
            raise ValueError("reuse must be None with a mesh: its processes know other halves")
        self.transformer, self.prompts, self.device, self.graphs = (
            transformer,
            prompts,
            device,
            graphs,
        )
        self.controls = [control for control in controls if control.scale != 0]
        self.perturbed = tuple(sorted(set(perturbed)))
        self.mesh = mesh
        self.kv_schedule = kv_schedule
        self.reuse = reuse
        self._changes: dict[str, Tensor] = {}
        self._size = (height, width)
        self._encoded: dict[tuple[str, int | None], EncodedCaption] = {}
        self._hints: dict[int, Tensor] = {}
        self._crops: dict[tuple[int, ...], PictureDenoiser] = {}
        self._sizes: tuple[Tensor, ...] = ()
        if transformer.config.micro_condition:
            size = torch.tensor([[height, width]], dtype=torch.float32, device=device)
            self._sizes = (size, size[:, :1] / size[:, 1:])

    def __call__(self, latents: Tensor, timesteps: Tensor, captions: Captions, /) -> Tensor:
        if captions == "both" and self.mesh is not None and self.mesh.guidance > 1:
            return self.mesh.both(self._half, latents, timesteps)
        return self._evaluate(latents, timesteps, captions)

    def _half(self, is_conditional: bool, latents: Tensor, timesteps: Tensor) -> Tensor:
        captions: Captions = "conditional" if is_conditional else "unconditional"
        return self._evaluate(latents, timesteps, captions)

    def _evaluate(self, latents: Tensor, timesteps: Tensor, captions: Captions) -> Tensor:
        perturbed = self.perturbed if captions == "perturbed" else ()
        seen = "conditional" if captions == "perturbed" else captions
        caption = self._encode(seen)
        controls = self._active(timesteps, seen)
        kv_ratios = self._kv_ratios(timesteps)
        reuse = self._reused(timesteps, captions)
        is_computed = reuse is None or reuse.change is None
        output = self._call(latents, timesteps, caption, perturbed, controls, kv_ratios, reuse)
        if is_computed and reuse is not None and reuse.change is not None:
            halves = _HALVES.get(captions, (captions,))
            self._changes.update(zip(halves, reuse.change.chunk(len(halves)), strict=True))
        return output

    def _call(
        self,
        latents: Tensor,
        timesteps: Tensor,
        caption: EncodedCaption,
        perturbed: Collection[int],
        controls: tuple[Control, ...],
        kv_ratios: tuple[int, ...],
        reuse: Reuse | None,
    ) -> Tensor:
        if self.graphs is None:
            return self.transformer(
                latents,
                timesteps,
                caption,
                None,
                *self._sizes,
                perturbed=perturbed,
                controls=controls,
                exchange=None if self.mesh is None else self.mesh.exchange,
                kv_ratios=kv_ratios,
                reuse=reuse,
            )
        given = (self.transformer, latents, timesteps, caption, self._sizes)
        return self.graphs(
            *given, perturbed=perturbed, controls=controls, kv_ratios=kv_ratios, reuse=reuse
        )

    def _reused(self, timesteps: Tensor, captions: Captions) -> Reuse | None:
        """With what the blocks added for all of these captions, where it is to be added again."""
        if self.reuse is None:
            return None
        halves = _HALVES.get(captions, (captions,))
        # Asked only where it decides: it waits for the GPU.
        wanted = self.reuse.timesteps
        is_reused = bool(wanted) and timesteps.flatten()[0].item() in wanted
        if not is_reused or not self._changes.keys() >= set(halves):
            return Reuse(self.reuse.first)
        changes = [self._changes[half] for half in halves]
        return Reuse(self.reuse.first, changes[0] if len(changes) == 1 else torch.cat(changes))

    def crop(self, rows: slice, columns: slice, whole: tuple[int, int]) -> "PictureDenoiser":
        """The denoiser of a part of the picture, whose latents are `whole` high and wide: with that part of
        the hints, the same captions and, where a model is told its picture's size, that of the part, as it
        was trained to be."""
        key = (rows.start, rows.stop, columns.start, columns.stop)
        if key not in self._crops:
            hints = [
                replace(one, hint=one.hint[..., rows, columns].contiguous())
                for one in self.controls
            ]
            height, width = (
                pixels * (part.stop - part.start) // latents
                for pixels, part, latents in zip(self._size, (rows, columns), whole, strict=True)
            )
            part = PictureDenoiser(
                self.transformer, self.prompts, height, width, self.device, self.graphs,
                controls=hints, perturbed=self.perturbed, mesh=self.mesh, kv_schedule=self.kv_schedule,
                reuse=self.reuse,
            )  # fmt: skip
            part._encoded = self._encoded
            self._crops[key] = part
        return self._crops[key]

    def _kv_ratios(self, timesteps: Tensor) -> tuple[int, ...]:
        """What the blocks merge at this timestep."""
        schedule = self.kv_schedule
        if schedule is None:
            return ()
        # Asked only where it decides: it waits for the GPU.
        now = timesteps.flatten()[0].item() if schedule.is_bounded else 0.0
        return schedule.ratios(now, self.transformer.config)

    def _active(self, timesteps: Tensor, captions: Captions) -> tuple[Control, ...]:
        """The controls of this timestep, encoded."""
        # Asked only where it decides: it waits for the GPU.
        decides = any(one.is_bounded for one in self.controls)
        now = timesteps.flatten()[0].item() if decides else 0.0
        return tuple(
            Control(one.network, self._hint(number), one.scale, self._encode(captions, number))
            for number, one in enumerate(self.controls)
            if one.timesteps[0] >= now >= one.timesteps[1]
        )

    def _hint(self, number: int) -> Tensor:
        if number not in self._hints:
            control = self.controls[number]
            self._hints[number] = self.transformer.encode_hint(
                control.network, control.hint.to(self.device)
            )
        return self._hints[number]

    def _encode(self, captions: Captions, number: int | None = None) -> EncodedCaption:
        """For the transformer, or for the control of this number."""
        key = (captions, number)
        if key not in self._encoded:
            prompt = self.prompts[captions]
            network = () if number is None else (self.controls[number].network,)
            # The mask stays on the host: its counts are needed there.
            caption = self.transformer.encode_caption(
                prompt.features.to(self.device), prompt.mask, *network
            )
            if self.graphs is not None:  # so that one recording serves every prompt
                caption = caption.pad(self.transformer.config.model_max_length)
            self._encoded[key] = caption
        return self._encoded[key]
