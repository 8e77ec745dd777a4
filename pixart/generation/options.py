"""What the command line of `pixart.generate` takes."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pixart.command import parse
from pixart.pipeline.request import PER_CONTROL, SETTINGS, Parallel, as_options, is_flag

# A size is one option; prompts have three ways in.
SAMPLING = tuple(name for name in SETTINGS if name not in ("prompt", "height", "width"))
_PICTURE = ("image", "strength", "fit", "mask", "invert_mask", "mask_blur", "outpaint")
_UPSCALING = ("upscale", "upscale_strength", "upscale_guidance", "tiles")
_GUIDANCE = (
    "guidance", "guidance_interval", "guidance_rescale", "apg", "apg_eta", "apg_momentum", "apg_norm",
    "pag", "pag_blocks",
)  # fmt: skip
_REST = tuple(
    name for name in SAMPLING if name not in (*_PICTURE, *_UPSCALING, *_GUIDANCE, *PER_CONTROL)
)
_Rest: Any = as_options(_REST)
_Picture: Any = as_options(_PICTURE, "To begin with a picture.")
_Upscaling: Any = as_options(_UPSCALING, "To draw larger than a model does at once.")
_Guidance: Any = as_options(_GUIDANCE, "How closely the prompt is followed.")
_Conditions: Any = as_options(PER_CONTROL)


@dataclass(frozen=True)
class _Control(_Conditions):
    """To follow the outlines, the depth or the pose in a picture."""

    control: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A ControlNet: a file in the official layout, a diffusers folder or a hub id. Give it again for further
    ones: each goes by a --control-image of its own, and they add up."""
    preprocessor_weights: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=PLACE of a network of --control-preprocessor: hed=, depth=, pose= or person=, which finds whose
    pose is taken; a path or a hub id. Default: from the hub or its cache."""


@dataclass(frozen=True)
class _Preview:
    """To see a picture before it is finished."""

    preview: Annotated[int | None, tyro.conf.arg(metavar="[EVERY]")] = None
    """Show the picture so far after every step, or after every so many: as NAME-preview.png beside
    --output until the picture is finished, and in terminals that can show pictures."""
    taesd: str | None = None
    """A folder or hub id of a TAESD, in diffusers' layout, that decodes what --preview shows at full
    size. Default: a pixel for each latent."""


@dataclass(frozen=True)
class _General(_Rest):
    """What is in no group of its own."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to draw; several prompts give several pictures."""
    prompts: Path | None = None
    """A file of prompts: .txt, one a line and # for a comment, or .jsonl with a prompt, a name for the
    file, and any of seed, size, steps ..."""
    seed: int | Literal["random"] | None = None
    """Seed of the first picture, or "random" for one that is drawn by lot, and said. Default 0."""
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """SETTING=VALUE,VALUE,... such as guidance=3,4.5,6: a picture for each value. Give it again for further
    settings: every combination is drawn. A JSON list may stand for the values."""
    from_image: Path | None = None
    """Draw a picture again from what its file says; other options change single settings."""
    model: str | None = None
    """A pipeline directory, a hub id, a release (sigma-1024, alpha-512, lcm-1024 ...), or the embedded
    model "shapes", which is the default."""
    transformer: str | None = None
    """A transformer to use in the pipeline: official .pth, .safetensors or diffusers directory."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH[:WEIGHT] of a LoRA: a folder in peft's layout, a .safetensors file, a hub id, or lcm-lora or
    flash-pixart; the weight is 1 unless given. Give it again for further ones: they add up."""
    config: Path | None = None
    """A JSON file of PixArtConfig's fields, for a transformer that does not tell its own."""
    variant: str | None = None
    """Of the weights: fp16, for diffusion_pytorch_model.fp16.safetensors and its like."""
    ema: bool = False
    """Take the averaged weights of an official .pth."""
    output: Path | None = None
    """A file, a directory, or a template with {prompt}, {seed}, {guidance:.1f} or any other setting,
    {index} and {name}. Default outputs, with --from-image NAME-again beside it. Where there is another
    picture, -2, -3 ... is added; what the very request drew before is not drawn again. With {shard} and
    .tar, as in tars/{shard:05d}.tar, WebDataset tars of pictures, captions and requests, for any number."""
    shard: str | None = None
    """I/N: draw the tars that fall to process I of N, from 0 to N - 1. Default: the task of a Slurm array, or
    all. Processes that torchrun started share them further."""
    shard_size: int | None = None
    """Pictures of a tar. Default 1000."""
    engine: Literal["here", "ray"] = "here"
    """ray: let the workers of a Ray cluster draw the tars. They have the bits that they have without it."""
    address: str | None = None
    """With --engine ray: auto for the Ray that runs here or that RAY_ADDRESS names, HOST:PORT, or
    ray://HOST:PORT. Default: a Ray of its own on this machine, which ends with the run."""
    workers: int | None = None
    """With --engine ray. Default: one on each GPU, or on each machine where there are none; the CPUs are
    shared."""
    overwrite: bool = False
    """Draw what is there again, in place, and take the places of other pictures."""
    grid: bool = False
    """Also a sheet of all pictures, labelled with what differs, as grid.png beside them."""
    format: Literal["png", "jpg", "webp"] | None = None
    """File format; by default that of --output, or png."""
    quality: int | None = None
    """Of JPEG and WebP, from 1 to 100. Default 95."""
    num_images: int = 1
    """Pictures per prompt, with seeds from --seed upwards."""
    batch: int = 1
    """Pictures to denoise in one pass, where they agree in everything but prompts and seed. Above 1
    their bits may differ by rounding from those of a picture drawn alone."""
    kv_compress: str | None = None
    """Open a dense transformer compressed: LAYERS:RATIO[:SAMPLING], such as 14-27:2."""
    null_caption: Literal["own-mask", "prompt-mask"] | None = None
    """How guidance sees the empty caption: as diffusers does, or as the reference code does."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of transformer and VAE. Default bf16 on CUDA, fp32 on a CPU."""
    text_encoder_dtype: Literal["fp32", "bf16", "fp16", "8bit", "4bit"] | None = None
    """Of T5. Default bf16 if it is large, else that of the rest. 8bit and 4bit need CUDA."""
    text_encoder: str | None = None
    """A file of T5 in the place of the pipeline's: .safetensors as published, in fp8, plain or with scales, or
    .gguf; a path or hub-id/file. The tokenizer is the pipeline's."""
    text_encoder_memory: Literal["auto", "resident", "stream"] = "auto"
    """Where T5's weights are while prompts are read: on the device, or streamed there from the disk, block by
    block. auto: streamed where they do not fit what is free. Pictures have the same bits."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default CUDA when there is one."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Record a denoising step once per size and replay it: quicker where the CPU launches more slowly than
    the GPU computes. auto: on CUDA, for pictures of up to 1024x1024 pixels. CUDA only."""
    parallel: Parallel = "auto"
    """How the processes that torchrun started share the pictures. pictures: each draws its own. All draw
    each picture together by guidance, whose halves are for two, by sequence, which shares the tokens, or by
    both. auto: pictures where there is one for each process, otherwise together."""
    dry_run: bool = False
    """Draw nothing: say what is to be done, and how many hours of each card it takes by a few steps that are
    measured now. Nothing is written."""
    plan: bool = False
    """Draw nothing and read no weights: say what memory each stage takes on the device, whether it fits, and
    what would make it fit. Nothing is written or downloaded."""
    memory: str | None = None
    """With --plan: for a device with so much free, such as 8GiB, which need not be here. Default: what is free
    now."""
    processes: int | None = None
    """With --dry-run and without torchrun: count for so many processes, which are not here."""
    attention: Literal["int8", "fp8"] | None = None
    """Self-attention with 8-bit products. fp8 wants an NVIDIA GPU of sm_89 or later. Default: those of
    --dtype."""
    quantize: Literal["int8", "fp8"] | None = None
    """The transformer's linear weights in 8 bits, by torchao (the extra `quant`): half of their memory, 0.6 GB of
    XL/2 in bf16; T5 takes more. Others measured it slower on most cards. Not with fp16, --plan, or the file of a
    plan."""
    fast: str | None = None
    """Less work a picture: balanced, fast, or the file of a plan, which python -m pixart.calibrate makes. Sets
    steps, guidance, --guidance-interval, --scheduler, --kv-schedule and --reuse-blocks where they are not given.
    Default off."""
    cache: Annotated[bool | None, tyro.conf.arg(aliases=["--no-cache"], metavar="")] = None
    """Keep prompt embeddings on disk, so that T5 need not be loaded again for the same text. Default: yes,
    but not of tars, whose prompts would fill it."""
    json: bool = False
    """Print the result as JSON: files, every setting, seconds by stage and picture, peak memory."""
    quiet: bool = False
    """Nothing on standard error but what went wrong."""


@dataclass(frozen=True)
class Options(_General, _Picture, _Upscaling, _Guidance, _Control, _Preview):
    """Draw pictures from text, and from pictures, with PixArt-Σ or -α."""

    def __post_init__(self) -> None:
        for name in PER_CONTROL:
            object.__setattr__(self, name, getattr(self, name) or None)


# As --help shows them.
_GROUPS = {
    "input_picture": _Picture, "upscaling": _Upscaling, "guiding": _Guidance, "controls": _Control,
    "previews": _Preview,
}  # fmt: skip
_CommandLine: Any = make_dataclass(
    "_CommandLine",
    [
        (name, tyro.conf.OmitArgPrefixes[kind], field(default_factory=kind))  # type: ignore[valid-type,misc]
        for name, kind in _GROUPS.items()
    ],
    bases=(_General,),
    frozen=True,
)
_CommandLine.__doc__ = Options.__doc__


def parse_options(command: str, words: Sequence[str] | None) -> Options:
    """The options of a command line. Raises ValueError as `pixart.command.parse` does."""
    words = with_places(with_values(sys.argv[1:] if words is None else words))
    line = parse(_CommandLine, command, words)
    parts = [line, *(getattr(line, group) for group in _GROUPS)]
    given = {one.name: getattr(part, one.name) for part in parts for one in fields(part)}
    return Options(**{one.name: given[one.name] for one in fields(Options)})


def with_places(words: list[str]) -> list[str]:
    """The words, where --output is a URI with it as a path can hold it. Raises ValueError for one that it
    cannot."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    for place, word in enumerate(words[:end]):
        is_value = place > 0 and words[place - 1] == "--output"
        option, between, value = word.partition("=")
        if not is_value and (option, between) == ("--output", "="):
            value = _place(value)
            words[place] = f"--output={value}"
        elif is_value:
            words[place] = _place(word)
    return words


def _place(text: str) -> str:
    if "://" not in text:
        return text
    from pixart.storage import local_or_store

    return local_or_store(text)


_FLAGS = {"--cache", *(f"--{name.replace('_', '-')}" for name in SAMPLING if is_flag(name))}
_NUMBER = r"[-+]?[\d.]+"


def with_values(words: Sequence[str]) -> list[str]:
    """The words of a command line, each option with a value: `--preview=1` for a --preview that no number
    follows, `--apg=True` for --apg and `--apg=False` for --no-apg. What does follow is a prompt."""
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    for place, word in enumerate(words[:end]):
        option, after = word.replace("_", "-"), "".join(words[place + 1 : place + 2])
        if option == "--preview" and not re.fullmatch(_NUMBER, after):
            words[place] = "--preview=1"
        elif option in _FLAGS and after not in ("True", "False"):
            words[place] = f"{option}=True"
        elif option.startswith("--no-") and f"--{option[5:]}" in _FLAGS:
            words[place] = f"--{option[5:]}=False"
    return words
