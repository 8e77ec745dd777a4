"""A pass of pictures without numbers: what each of its stages keeps and allocates."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pixart.checkpoint.control import empty_control
from pixart.checkpoint.load import OpenedTransformer, empty_model
from pixart.device import free_memory
from pixart.pipeline.drawing import Hooks, Pass
from pixart.pipeline.graphs import PictureGraphs
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.memory.fakes import Fakes, without_numbers
from pixart.pipeline.memory.meter import Meter
from pixart.pipeline.request import Request
from pixart.pipeline.stages import Stage
from pixart.pipeline.text_to_image import Pipeline
from pixart.plans.schedule import KVSchedule
from pixart.sampler.denoiser import PictureControl, StepReuse
from pixart.sampler.guidance import Captions, Guide
from pixart.sampler.schedulers import Scheduler
from pixart.text.encoder import PromptEmbeddings
from pixart.vae.autoencoder import VAE, to_levels

_STATES = 6  # of latents: noise, state, what a solver of the second order remembers, and its sums


@dataclass(frozen=True)
class StageMemory:
    """Bytes of a stage on the device. resident: what is there all the time, by part. activations: what comes
    and goes, at most; largest: of one tensor of it. kept: what glibc holds beside, of freed blocks and in holes.
    host: what a GPU's picture keeps in host memory. tile: side in pixels of the VAE's, None where it has none."""

    name: str
    size: tuple[int, int] | None
    resident: Mapping[str, int]
    activations: int = 0
    largest: int = 0
    kept: int = 0
    host: int = 0
    tile: int | None = None
    note: str = ""

    @property
    def total(self) -> int:
        return sum(self.resident.values()) + self.activations + self.kept


class Parts:
    """What a `Pass` draws with, of a pipeline that was opened for its sizes. tokens: of each text. free: bytes of
    the device before anything is there."""

    mesh = None

    def __init__(self, pipe: Pipeline, tokens: Mapping[str, int], free: int) -> None:
        self.device, self.attention, self.controls = pipe.device, pipe.attention, pipe.controls
        self.graphs: PictureGraphs = pipe.graphs
        self.multiple, self._solver = pipe.multiple, pipe.solver
        dtype = pipe.opened.dtype or torch.float32
        model, vae = empty_model(pipe.opened.config).to(dtype), copy.deepcopy(pipe.vae.model)
        controls = [empty_control(one.config, one.copies).to(dtype) for one in pipe.controls.opened]
        self.fakes = Fakes()
        with self.fakes.made():
            self.transformer = without_numbers(model, self.device)
            self.vae = _FixedVAE(without_numbers(vae, self.device))
            self.networks = [without_numbers(one, self.device) for one in controls]
        self.opened = OpenedTransformer.of(self.transformer)
        self.transformer.set_attention(pipe.attention)
        for network in self.networks:
            network.set_attention(pipe.attention)
        self.captions: Any = _Captions(pipe, tokens)
        mapped = pipe.opened.mapped_beside() if self.device.type == "cpu" else 0
        self.weights = {
            "transformer": bytes_of(self.transformer),
            "VAE": bytes_of(self.vae.model),
            **({"its file, mapped beside": mapped} if mapped else {}),
            **({"ControlNets": sum(map(bytes_of, self.networks))} if self.networks else {}),
        }
        self.vae.memory = self.memory = max(free - sum(self.weights.values()), 0)
        self.vae.is_sample = True

    def solver(self, name: str | None) -> Scheduler:
        return self._solver(name)

    def prepare(self, *_: Any) -> None:
        """Prompts are no part of a pass."""

    def modules(self) -> list[nn.Module]:
        return [self.transformer, self.vae.model, *self.networks]


class _FixedVAE(VAE):
    def to(self, device: torch.device | str) -> "VAE":
        return self


class _Captions:
    """Captions of as many tokens as they have, with nothing in them."""

    def __init__(self, pipe: Pipeline, tokens: Mapping[str, int]) -> None:
        self._tokens, self._most = tokens, pipe.opened.config.model_max_length
        self._width, self._dtype = pipe.opened.config.caption_channels, pipe.text_encoder.dtype
        self._is_own = pipe.captions.mask == "own-mask"

    def pair(self, prompt: str, negative: str) -> tuple[PromptEmbeddings, PromptEmbeddings]:
        seen = self._of(prompt)
        is_null = not negative.strip()
        return seen, self._of(negative) if not is_null or self._is_own else seen

    def _of(self, text: str) -> PromptEmbeddings:
        count = self._tokens.get(text, self._most)
        features = torch.empty(1, count, self._width, dtype=self._dtype)
        return PromptEmbeddings(features, torch.ones(1, count, dtype=torch.bool))


class Survey(Pass):
    """Of a group of resolved requests that agree in everything but prompts and seed; within `Parts.fakes`."""

    def __init__(
        self, parts: Parts, group: list[Request], inputs: Inputs, reuse: StepReuse | None
    ) -> None:
        super().__init__(parts, group, Hooks(None, None, None, None), inputs)  # type: ignore[arg-type]
        self._parts = parts
        # It is computed and kept; where it is added again there is less to hold.
        self._reused = None if reuse is None else replace(reuse, timesteps=frozenset())
        self._recorded = 0

    @property
    def request(self) -> Request:
        """With what memory decides."""
        return self._group[0]

    def stages(self) -> list[StageMemory]:
        """In their order."""
        found, pipe = [], self._parts
        for number, stage in enumerate(self._stages):
            if number:
                found.append(self._decoding(self._stages[number - 1]))
            begins = number or self._canvas is not None or pipe.networks
            if begins and not (stage.strength == 1 and not stage.is_masked and not pipe.networks):
                found.append(self._encoding(stage))
            found.append(self._denoising(stage))
        return [*found, self._decoding(self._stages[-1])]

    def _denoising(self, stage: Stage) -> StageMemory:
        pipe, count = self._parts, self._count
        size = (stage.height, stage.width)
        height, width = stage.seen
        seen = replace(stage, height=height, width=width, tiles=None)
        is_recorded = pipe.graphs.of_size(*self._seen) is not None

        def work(meter: Meter) -> Any:
            states = [self._latents(stage, count) for _ in range(_STATES)]
            config = pipe.opened.config
            patch = config.patch_size
            like = torch.empty(config.hidden_size, dtype=pipe.transformer.dtype, device=pipe.device)
            # A model keeps it, but for tensors without numbers.
            table = pipe.transformer.position_tables(
                (states[0].shape[2] // patch, states[0].shape[3] // patch), like
            )
            denoiser = self._denoiser(seen, None)
            inputs = self._latents(seen, count)
            # The scheduler is asked by APG alone, which adds some latents.
            guidance, batched = replace(stage.guidance, apg=None), bool(self.request.batched)
            guide = Guide(guidance, None, batched)  # type: ignore[arg-type]

            def evaluate(captions: Captions) -> Tensor:
                given = torch.cat([inputs, inputs]) if captions == "both" else inputs
                output = denoiser(given, torch.empty(len(given), device=pipe.device), captions)
                return output.float()[:, : given.shape[1]]

            for _ in range(2):  # the first makes what later ones find
                for share in self._shares(stage):
                    guide(evaluate, inputs, 0.0, share)
            return states, denoiser, table

        found = self._measured("denoise", size, work, "captions, latents and tables")
        if is_recorded:
            self._recorded = max(self._recorded, found.activations)
        return found

    def _shares(self, stage: Stage) -> list[float]:
        """A place of the trajectory that is guided, and one that is not, if there are such."""
        start, end = stage.guidance.interval
        return list(dict.fromkeys([0.0, start, end])) if stage.is_guided else [0.0]

    def _encoding(self, stage: Stage) -> StageMemory:
        size = stage.height, stage.width
        tile = self._parts.vae._plan("encode", stage.height * stage.width, self.request.tile).tile

        def work(_: Meter) -> Tensor:
            return self._encode(torch.empty(1, 3, *size))

        return self._measured("encode", size, work, "latents", tile)

    def _decoding(self, stage: Stage) -> StageMemory:
        vae, size = self._parts.vae, (stage.height, stage.width)
        tile = vae.choose_tile(*size, self.request.tile) or None

        def work(_: Meter) -> list[Tensor]:
            latents = self._latents(stage, self._count)
            latent = latents[:1]
            latent.isfinite().all()
            image = vae.decode(latent, tile=tile or False)
            image.isfinite().all()
            return [latents, image, to_levels(image)]

        beside = {"CUDA graphs": self._recorded} if self._recorded else {}
        return self._measured("decode", size, work, "latents and picture", tile, beside)

    def _measured(
        self,
        name: str,
        size: tuple[int, int],
        work: Callable[[Meter], Any],
        kept: str,
        tile: int | None = None,
        beside: Mapping[str, int] | None = None,
    ) -> StageMemory:
        """What the work allocates; `kept` names what it returns."""
        pipe, host = self._parts, torch.device("cpu")
        meter, waiting = Meter(pipe.device), Meter(host)
        meter.own(tensor for module in pipe.modules() for tensor in module.parameters())
        if pipe.device.type == "cpu":
            with meter:
                left = work(meter)
        else:
            with waiting, meter:
                left = work(meter)
        stays = meter.now
        del left
        resident = {**pipe.weights, kept: stays, **(beside or {})}
        return StageMemory(
            name, size, resident, meter.peak - stays, meter.largest, meter.held - meter.peak,
            0 if pipe.device.type == "cpu" else waiting.peak, tile,
        )  # fmt: skip

    def _latents(self, stage: Stage, count: int) -> Tensor:
        side, channels = self._parts.vae.downsample, self._parts.opened.config.in_channels
        sides = stage.height // side, stage.width // side
        return torch.empty(count, channels, *sides, device=self._parts.device)

    def _controls(self, stage: Stage) -> list[PictureControl]:
        if not self.request.control_image:
            return []
        return [
            PictureControl(network, self._latents(stage, 1)) for network in self._parts.networks
        ]

    def _reuse(self) -> StepReuse | None:
        return self._reused

    def _kv_schedule(self) -> KVSchedule | None:
        # Where the timestep decides there may be one at which nothing is merged.
        found = super()._kv_schedule()
        return None if found is None or found.is_bounded else found


def bytes_of(network: nn.Module) -> int:
    """Of its weights and buffers."""
    tensors: Sequence[Tensor] = [*network.parameters(), *network.buffers()]
    return sum(one.numel() * one.itemsize for one in tensors)


def free_on(device: torch.device) -> int | None:
    """Bytes, None for a device that is not here."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    return free_memory(device)
