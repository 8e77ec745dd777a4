"""`python -m pixart.convert SRC DST --to official`: a transformer from one format to another; with
--text-encoder a T5, from one precision to another.

The numbers stay as they are unless --dtype asks otherwise, and what belongs to K/V compression goes
along. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["convert", *sys.argv[1:]])

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from pixart import process
from pixart.command import DONE, parse, run_command

if TYPE_CHECKING:
    import torch

NAME = "convert"
PRECISIONS = ("fp32", "bf16", "fp8")  # of a text encoder


@dataclass(frozen=True)
class Options:
    """Convert a PixArt-Σ or -α transformer, or its text encoder. What a file is, is read from its contents."""

    src: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """An official .pth, a .safetensors file, a diffusers directory (transformer or whole pipeline),
    a hub id, or hub-id/file."""
    dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Where to write: a file, or for diffusers a directory."""
    to: Literal["official", "diffusers", "pixart", "comfyui", "fp32", "bf16", "fp8"] | None = None
    """official: .pth. diffusers: a transformer directory. pixart: one .safetensors that knows its
    configuration. comfyui: one .safetensors that ComfyUI opens, or, where it would open another
    network, only the loader of pixart.comfyui. By default what DST's suffix says: one of the first three.
    fp32, bf16, fp8: of --text-encoder, the precision; fp8 with a scale for each matrix."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """The precision of the written numbers. Default: as stored."""
    ema: bool = False
    """Take the averaged weights of an official .pth."""
    variant: str | None = None
    """The variant of a diffusers directory: fp16, for diffusion_pytorch_model.fp16.safetensors."""
    kv_compress: str | None = None
    """Open a dense transformer compressed: LAYERS:RATIO[:SAMPLING], such as 14-27:2."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """PATH[:WEIGHT] of a LoRA to merge into the weights; may be given several times."""
    config: Path | None = None
    """A JSON file of PixArtConfig's fields, for a source that does not tell its own."""
    control: bool = False
    """Convert the ControlNet that SRC is, or holds beside its transformer, in the place of that."""
    text_encoder: bool = False
    """Convert the T5 that SRC is (fp32, bf16, fp16, fp8, GGUF), or holds beside its transformer, to one file
    of the precision that --to names: in a folder that opens as a pipeline's text_encoder, with its
    config.json, or alone where DST ends in .safetensors."""
    base: str | None = None
    """Of --control --to official: the transformer whose weights the file holds too, as the official code
    wants it. Default: that of SRC, if it has one."""
    max_shard_size: str | None = None
    """Split a diffusers directory's weights into files of this size, such as 5GB."""
    overwrite: bool = False
    """Replace DST even if it is the source, or no checkpoint of the same format."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME, lambda: run(parse(Options, NAME, arguments)), "cancelled; nothing was written"
    )


def run(options: Options) -> int:
    print(convert(options))
    return DONE


def convert(options: Options) -> str:
    """Convert as the options ask. Returns a sentence on what was written."""
    import logging

    import torch

    from pixart.checkpoint.load import find_transformer, load_transformer, read_config
    from pixart.checkpoint.save import save_transformer
    from pixart.config import KVCompression
    from pixart.files import check_writable
    from pixart.lora.adapters import load_lora, merge_lora, parse_lora
    from pixart.releases import release_named

    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("pixart").setLevel(logging.INFO)
    if options.text_encoder:
        return _convert_text_encoder(options)
    if options.to in PRECISIONS:
        raise ValueError(f"--to {options.to} must be given with --text-encoder; see --dtype")
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    # Read before anything is downloaded.
    adapters = [parse_lora(text) for text in options.lora]
    source = find_transformer(options.src)
    _check_not_source(options, source)
    check_writable(options.dst)
    dtype = dtypes[options.dtype] if options.dtype else None
    if options.control:
        return _convert_control(options, source, dtype)
    if options.base is not None:
        raise ValueError(f"--base must be given with --control, got {options.base}")
    model = load_transformer(
        source,
        config=read_config(options.config) if options.config else None,
        kv_compression=KVCompression.parse(options.kv_compress) if options.kv_compress else None,
        dtype=dtype,
        ema=options.ema,
        variant=options.variant,
        few_step=release.few_step if (release := release_named(options.src)) else None,
    )
    merge_lora(load_lora(model, adapters))
    process.at_work()
    save_transformer(
        model,
        options.dst,
        format=options.to,  # type: ignore[arg-type]
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    return _described(options.dst, list(model.parameters()))


def _convert_text_encoder(options: Options) -> str:
    from pixart.text.convert import convert_text_encoder

    others = (
        "dtype",
        "ema",
        "variant",
        "kv_compress",
        "lora",
        "config",
        "control",
        "base",
        "max_shard_size",
    )
    if idle := [name for name in others if getattr(options, name)]:
        raise ValueError(f"--{idle[0].replace('_', '-')} must be left out with --text-encoder")
    if options.to not in PRECISIONS:
        raise ValueError(
            f"--to must be {', '.join(PRECISIONS)} with --text-encoder, got {options.to}"
        )
    process.at_work()
    to: Any = options.to  # one of PRECISIONS
    return convert_text_encoder(options.src, options.dst, to, overwrite=options.overwrite)


def _convert_control(options: Options, source: Path, dtype: "torch.dtype | None") -> str:
    from pixart.checkpoint.control import open_control_alone
    from pixart.checkpoint.load import TRANSFORMER_FILES, load_transformer, read_config
    from pixart.checkpoint.save import choose_format
    from pixart.checkpoint.save_control import save_control
    from pixart.weights import resolve

    if idle := [name for name in ("ema", "kv_compress", "lora") if getattr(options, name)]:
        raise ValueError(f"--{idle[0].replace('_', '-')} must be left out with --control")
    format = choose_format(options.dst, options.to, options.max_shard_size)
    config = read_config(options.config) if options.config else None
    opened, contents = open_control_alone(
        source, config=config, dtype=dtype, variant=options.variant
    )
    base = None
    if format == "official" and (options.base or contents.base):
        place = resolve(options.base, allow_patterns=TRANSFORMER_FILES) if options.base else source
        base = load_transformer(place, config=config, dtype=dtype)
    elif options.base is not None:
        raise ValueError(f"--base must be given with --to official, got {format}")
    network = opened.load()
    process.at_work()
    save_control(
        network, options.dst, base=base, config=contents.config, format=format,
        max_shard_size=options.max_shard_size, overwrite=options.overwrite,
    )  # fmt: skip
    return _described(options.dst, list(network.parameters()))


def _described(path: Path, parameters: "list[torch.nn.Parameter]") -> str:
    count = sum(parameter.numel() for parameter in parameters)
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    return f"{path}: {count:,} parameters, {', '.join(kinds)}"


def _check_not_source(options: Options, source: Path) -> None:
    # Of a pipeline only its transformer is read.
    sources = (source.resolve(), (source / "transformer").resolve())
    if options.dst.resolve() in sources and not options.overwrite:
        raise ValueError(f"DST must not be SRC without --overwrite, got {options.dst} for both")
