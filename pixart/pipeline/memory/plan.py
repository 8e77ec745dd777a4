"""A plan of memory: what each stage of a call keeps on the device, before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pixart.pipeline.fast import step_reuse
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.memory.meter import Meter
from pixart.pipeline.memory.survey import Parts, StageMemory, Survey
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.text.encoder import TextEncoder
from pixart.text.stream import computed_in, tokens_of_pass
from pixart.text.t5 import BIAS, norm, position_bias, run_block


@dataclass(frozen=True)
class Streamed:
    """T5 from the disk: bytes that travel to the device, for each pass over its blocks."""

    bytes: int
    passes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Of a pass of so many pictures like `request`, in which all that memory decides is settled. free: bytes of
    the device before anything is there. streamed: of a T5 that is not kept in memory."""

    request: Request
    pictures: int
    stages: list[StageMemory]
    free: int
    streamed: Streamed | None = None

    @property
    def peak(self) -> int:
        """Bytes, of the stage that takes most."""
        return max(stage.total for stage in self.stages)

    @property
    def largest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.peak <= self.free


def plan_memory(
    pipe: Pipeline,
    group: list[Request],
    tokens: Mapping[str, int],
    free: int,
    encoder_memory: str | None = None,
) -> MemoryPlan:
    """What drawing a group of resolved requests takes, that agree in everything but prompts and seed.

    pipe: opened with sizes_only. tokens: of each text that T5 reads; of others it has features. free: bytes of the
    device before anything is there, by which is chosen what a request leaves open. encoder_memory: another than
    that of the pipeline's text encoder. ValueError for what the device's memory has no choice for.
    """
    parts = Parts(pipe, tokens, free)
    stages, streamed = [], None
    if missing := {text: n for text, n in tokens.items() if not pipe.captions.is_ready(text)}:
        stage, streamed = _reading(pipe, parts, missing, free, encoder_memory)
        stages.append(stage)
    reuse = step_reuse(group[0], pipe.solver(group[0].scheduler))
    with parts.fakes.made():
        survey = Survey(parts, group, Inputs(), reuse)
        stages += survey.stages()
    return MemoryPlan(survey.request, len(group), stages, free, streamed)


def _reading(
    pipe: Pipeline,
    parts: Parts,
    tokens: Mapping[str, int],
    free: int,
    encoder_memory: str | None,
) -> tuple[StageMemory, Streamed | None]:
    encoder = pipe.text_encoder
    # On a GPU the VAE waits in host memory meanwhile.
    beside = {"VAE": parts.weights["VAE"]} if pipe.device.type == "cpu" else {}
    memory = encoder.choose_memory(free - sum(beside.values()), encoder_memory)
    footprint = encoder.footprint()
    held = footprint.stream if memory == "stream" else footprint.resident
    how = "streamed" if memory == "stream" else memory
    resident = {f"text encoder, {how}": held, **beside}
    shape = encoder.t5_shape()
    if shape is None:  # of transformers: its activations are small, and not known
        return StageMemory("text", None, resident, note="without activations"), None
    groups = _passes(list(tokens.values()), encoder, memory, pipe.device)
    largest = max(groups, key=sum)
    computed = computed_in(encoder.dtype, pipe.device)
    with parts.fakes.made():
        meter = Meter(pipe.device)
        weights = {
            name: torch.empty(size, dtype=computed, device=pipe.device)
            for name, size in shape.block.items()
        }
        bias = torch.empty(shape.tensors[BIAS], dtype=computed, device=pipe.device)
        meter.own([*weights.values(), bias])
        with meter:
            options: dict[str, Any] = {"dtype": computed, "device": pipe.device}
            streams = [torch.empty(1, count, shape.width, **options) for count in largest]
            longest = max(range(len(largest)), key=largest.__getitem__)
            seen = position_bias(bias, largest[longest], 0, shape)
            for _ in range(2):
                streams[longest] = run_block(streams[longest], weights, seen, shape)
            norm(streams[longest], torch.empty(shape.width, **options), shape).to(encoder.dtype)
    found = StageMemory(
        "text", None, resident, meter.peak, meter.largest, meter.held - meter.peak
    )  # fmt: skip
    streamed = Streamed(encoder.streamed_bytes, len(groups)) if memory == "stream" else None
    return found, streamed


def _passes(
    counts: list[int], encoder: TextEncoder, memory: str, device: torch.device
) -> list[list[int]]:
    """Tokens of the texts that go through the blocks together."""
    if memory != "stream" and not encoder.has_passes:
        return [[count] for count in counts]
    groups: list[list[int]] = []
    for count in counts:
        if not groups or sum(groups[-1]) + count > tokens_of_pass(device):
            groups.append([])
        groups[-1].append(count)
    return groups
