"""What the command line of `pixart.serve` takes."""

import math
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import tyro

from pixart.config import EMBEDDED
from pixart.serving.limits import Limits


@dataclass(frozen=True)
class Options:
    """Draw pictures for programs, over HTTP, and for people, in a page. Ctrl-C ends it."""

    model: str | None = None
    """A pipeline directory, a hub id, a release (sigma-1024, alpha-512, dmd-512 ...), or the embedded model
    "shapes", which is the default."""
    transformer: str | None = None
    """A transformer to use in the pipeline: official .pth, .safetensors or diffusers directory."""
    lora_folder: Path | None = None
    """A folder of LoRAs that clients may choose by name: .safetensors files, or folders in peft's layout."""
    control: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PLACE of a ControlNet that clients may choose by name: a file in the official layout, a diffusers
    folder or a hub id. Give it again for further ones."""
    preprocessor_weights: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PLACE of a network that prepares control pictures: hed=, depth=, pose= or person=; a path or a hub
    id. Default: from the hub or its cache."""
    host: str = "127.0.0.1"
    """The address to listen at. Any but a loopback address needs --token-file."""
    port: int = 7860
    """The port; 0 takes a free one."""
    name: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A host name under which clients reach this machine, such as draw.example.org. Requests under any other
    name are refused. Give it again for further ones."""
    https: bool = False
    """Clients come through a proxy that speaks https: cookies are for https alone. Nothing that a proxy says
    of its clients is believed."""
    token_file: Path | None = None
    """A file of tokens, NAME:TOKEN a line, # for a comment. Each is a client of its own, and nobody else is
    served."""
    max_pixels: int = Limits.pixels
    """Of one picture, its enlargement too."""
    max_steps: int = Limits.steps
    """Of one picture."""
    max_images: int = Limits.images
    """Of one order."""
    max_queue: int = Limits.queue
    """Orders that wait; half of them at most are one client's."""
    rate: int = Limits.rate
    """Requests a minute that one client may make, those for progress not counted."""
    keep_minutes: float = Limits.keep_seconds / 60
    """How long finished pictures are kept."""
    keep_megabytes: int = Limits.keep_bytes // 2**20
    """How much of them is kept at most; the oldest go first. Pictures that wait to be drawn from may take as
    much again."""
    ui: bool = True
    """Serve the page (the extra `ui`) beside the calls (the extra `serve`)."""
    kv_compress: str | None = None
    """Open a dense transformer compressed: LAYERS:RATIO[:SAMPLING], such as 14-27:2."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of transformer and VAE. Default bf16 on CUDA, fp32 on a CPU."""
    text_encoder_dtype: Literal["fp32", "bf16", "fp16", "8bit", "4bit"] | None = None
    """Of T5. Default bf16 if it is large, else that of the rest. 8bit and 4bit need CUDA."""
    text_encoder: str | None = None
    """A file of T5 in the place of the pipeline's: .safetensors as published, in fp8, plain or with scales, or
    .gguf; a path or hub-id/file."""
    text_encoder_memory: Literal["auto", "resident", "stream"] = "auto"
    """Where T5's weights are while prompts are read: on the device, or streamed there from the disk, block by
    block. auto: streamed where they do not fit what is free. Pictures have the same bits."""
    quantize: Literal["int8", "fp8"] | None = None
    """The transformer's linear weights in 8 bits, by torchao (the extra `quant`): half of their memory, 0.6 GB of
    XL/2 in bf16; T5 takes more. Others measured it slower on most cards. Not with fp16, or the file of a plan."""
    fast: str | None = None
    """Less work a picture: balanced, fast, or the file of a plan, which python -m pixart.calibrate makes. An order
    that says fast off, or that no plan goes with, is drawn without. Default off."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    quiet: bool = False
    """Nothing on standard error but what went wrong."""


def check_options(options: Options) -> None:
    """ValueError for the first value that cannot be, before anything is opened."""
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, got {options.port}")
    for name in ("max_pixels", "max_steps", "max_images", "max_queue", "rate", "keep_megabytes"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
    if not 0 < options.keep_minutes < math.inf:
        raise ValueError(f"--keep-minutes must be above 0, got {options.keep_minutes}")


def limits_of(options: Options) -> Limits:
    return Limits(
        pixels=options.max_pixels,
        images=options.max_images,
        steps=options.max_steps,
        queue=options.max_queue,
        queue_of_client=max(1, options.max_queue // 2),
        rate=options.rate,
        keep_seconds=options.keep_minutes * 60,
        keep_bytes=options.keep_megabytes * 2**20,
    )


def model_name(options: Options) -> str:
    """What clients call the model: of a path no more than its end."""
    place = options.transformer or options.model or EMBEDDED
    name = PurePath(place).name
    return name.removesuffix(".pth").removesuffix(".safetensors") or place
