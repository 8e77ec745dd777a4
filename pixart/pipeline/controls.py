"""The ControlNets of a pipeline, and the pictures that they go by: fitted to what is drawn, preprocessed,
and encoded as latents.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pixart.checkpoint.control import OpenedControl
from pixart.model.control import ControlNet
from pixart.pictures import over
from pixart.pipeline.editing import canvas_size, cover, to_unit
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.request import Request
from pixart.pipeline.stages import Stage
from pixart.preprocess import Preprocessor, open_preprocessor
from pixart.sampler.denoiser import PictureControl
from pixart.sampler.mesh import Mesh
from pixart.sampler.schedulers import Scheduler
from pixart.sampler.walk import timesteps_within
from pixart.vae.autoencoder import VAE

if TYPE_CHECKING:
    from PIL.Image import Image

_KEPT = 4  # encoded pictures: many prompts may go by the same ones
_WHOLE = (0.0, 1.0)


class Controls:
    """Networks in the order in which requests name their pictures.

    places: where the networks of preprocessors are, see pixart.preprocess.
    """

    def __init__(
        self,
        opened: Sequence[OpenedControl] = (),
        device: torch.device | str = "cpu",
        places: Mapping[str, str | Path] | None = None,
    ) -> None:
        self.opened, self._device, self._places = list(opened), torch.device(device), places
        self._preprocessors: dict[str, Preprocessor] = {}
        self._hints: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()

    def of(self, opened: Sequence[OpenedControl]) -> "Controls":
        """Other networks, with the preprocessors and the encoded pictures of these."""
        other = Controls(opened, self._device, self._places)
        other._preprocessors, other._hints = self._preprocessors, self._hints
        return other

    def networks(self, precision: str | None = None) -> list[ControlNet]:
        """The networks on the device, whose weights are read when they are first asked for. precision: of
        their self-attention, see PixArt.set_attention."""
        found = [one.load(self._device).to(self._device) for one in self.opened]
        for network in found:
            network.set_attention(precision)
        return found

    def move(self, device: torch.device | str) -> None:
        """Take those that are loaded to another device, and forget what was encoded."""
        self._hints.clear()
        for one in self.opened:
            if one.is_loaded:
                one.load(self._device).to(device)

    def resolve(self, request: Request, inputs: Inputs) -> Request:
        """The request with a preprocessor, a scale and an interval for each of its control pictures, which
        are opened. ValueError unless there is one for each network."""
        names = request.control_image
        if names is None:
            return request
        if len(names) != len(self.opened):
            has = f"{len(self.opened)} of control" if self.opened else "none: give control files"
            raise ValueError(
                f"control_image must be one picture for each ControlNet, got {len(names)} for {has}"
            )
        kinds = _each(request.control_preprocessor, "none", len(names))
        for name, kind in zip(names, kinds, strict=True):
            inputs.size(name)
            inputs.open(name)
            self._preprocessor(kind)
        return replace(
            request,
            control_preprocessor=kinds,
            control_scale=_each(request.control_scale, 1.0, len(names)),
            control_interval=_each(request.control_interval, _WHOLE, len(names)),
        )

    def of_stage(
        self,
        request: Request,
        stage: Stage,
        inputs: Inputs,
        vae: VAE,
        solver: Scheduler,
        precision: str | None,
        mesh: Mesh | None = None,
    ) -> list[PictureControl]:
        """What steers a stage of a resolved request; those of scale 0 are left out. mesh: the processes that
        draw it together, and encode its pictures together."""
        names = request.control_image or ()
        if not names:
            return []
        assert request.control_scale and request.control_interval and request.control_preprocessor
        found = []
        for network, name, kind, scale, interval in zip(
            self.networks(precision), names, request.control_preprocessor,
            request.control_scale, request.control_interval, strict=True,
        ):  # fmt: skip
            if scale == 0:
                continue
            hint = self._hint(name, kind, request, stage, inputs, vae, mesh)
            control = PictureControl(network, hint, scale)
            if interval != _WHOLE:
                within = timesteps_within(solver, request.schedule, interval)
                control = replace(control, timesteps=within)
            found.append(control)
        return found

    def _hint(
        self,
        name: str,
        kind: str,
        request: Request,
        stage: Stage,
        inputs: Inputs,
        vae: VAE,
        mesh: Mesh | None,
    ) -> Tensor:
        """(1, C, h, w) latents of a picture for a stage."""
        assert request.height and request.width
        size = (request.height, request.width)
        seen = (stage.height, stage.width)
        if canvas_size(*size, vae.downsample * self.opened[0].config.patch_size) != seen:
            size = seen  # it is made larger
        key = (inputs.digest(name), kind, size, seen, request.tile)
        is_missing = key not in self._hints
        # One that has read a prompt has forgotten its own, and cannot encode without the others.
        if is_missing if mesh is None else mesh.any(is_missing):
            pixels = np.asarray(self.picture(inputs.open(name).image, kind, *size))
            vae.to(self._device)
            # The mean of the posterior. The official code draws from it, whose deviation is small beside a
            # map's contrasts: so a picture does not depend on a draw that no seed of its own decides.
            border = [(0, seen[0] - size[0]), (0, seen[1] - size[1]), (0, 0)]
            image = to_unit(np.pad(pixels, border, "edge"))
            strips = None if mesh is None else mesh.strips
            latents = vae.encode(image, sample=False, tile=request.tile, strips=strips)
            self._hints[key] = latents.to(self._device)
            if len(self._hints) > _KEPT:
                self._hints.popitem(last=False)
        self._hints.move_to_end(key)
        return self._hints[key]

    def picture(self, image: "Image", kind: str, height: int, width: int) -> "Image":
        """What a network goes by, RGB: the picture scaled and cut about its middle to the size of what is
        drawn, border and all, then preprocessed, so that lines are as wide as in training."""
        fitted = cover(over(image, "black").convert("RGB"), height, width)
        return self._preprocessor(kind)(fitted)

    def digests(self, request: Request) -> dict[str, str]:
        """Of the networks that preprocess a request's pictures, by "preprocessor hed" and so on."""
        kinds = dict.fromkeys(request.control_preprocessor or ())
        found = {f"preprocessor {kind}": self._preprocessor(kind).digest for kind in kinds}
        return {name: digest for name, digest in found.items() if digest}

    def _preprocessor(self, kind: str) -> Preprocessor:
        if kind not in self._preprocessors:
            self._preprocessors[kind] = open_preprocessor(kind, self._places, self._device)
        return self._preprocessors[kind]


def _each(values: tuple[Any, ...] | None, default: Any, count: int) -> tuple[Any, ...]:
    """One for each of so many."""
    values = values or (default,)
    return values if len(values) == count else values * count
