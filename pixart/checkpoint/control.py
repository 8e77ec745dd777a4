"""Open ControlNet-Transformers: official files, which hold their base too, diffusers' research format, and
safetensors of our own.

Official names are ours: `controlnet.N.{copied_block,before_proj,after_proj}.*` beside `base_model.*`.
What had to be assumed or initialised is logged to "pixart" at INFO, what may not fit at WARNING.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.checkpoint.config import Surroundings, infer_compression, infer_config, shape_of
from pixart.checkpoint.load import (
    TRANSFORMER_FILES,
    NoInitialisation,
    OpenedTransformer,
    check_range,
    naming_file,
)
from pixart.checkpoint.names import (
    INSIDE_NAMES,
    NULL_CAPTION,
    check_tensors,
    from_diffusers,
    to_diffusers,
)
from pixart.checkpoint.read import Payload, read_payload, widened
from pixart.config import EMBEDDED_CONTROL, PixArtConfig
from pixart.files import CheckpointError, listed
from pixart.model.control import ControlNet
from pixart.releases import CONTROL_REPOSITORY, CONTROLS
from pixart.weights import check_finite, resolve

CONTROL = "control"  # the folder of a control within a training run's state
_WRAPPER = r"((?:(?:module|model)\.)*)"
_OFFICIAL = re.compile(
    _WRAPPER + r"controlnet\.(\d{1,3})\.(copied_block|before_proj|after_proj)\.(.+)"
)
_DIFFUSERS = re.compile(
    _WRAPPER
    + r"((?:controlnet\.)?)controlnet_blocks\.(\d{1,3})\.(transformer_block|before_proj|after_proj)\.(.+)"
)
_SAME, _RELATED = 0.01, 0.5  # differences of weights: beyond rounding to bf16, and of two networks
# What a control and its base must agree in. Whether keys are compressed, for what size it was trained and
# how it was regularised is the base's own affair.
_ARCHITECTURE = (
    "hidden_size", "num_heads", "depth", "mlp_ratio", "qk_norm", "in_channels", "patch_size",
    "caption_channels", "caption_embedding",
)  # fmt: skip
_FAMILY = ("micro_condition", "model_max_length")
_WAY_OUT = (
    "; to use it all the same, take it out of the file: python -m pixart.convert FILE "
    "control.safetensors --control"
)
_ROWS = 8  # of each matrix that are compared

logger = logging.getLogger("pixart")


@dataclass
class ControlContents:
    """A control file as read. tensors: of the control, under their official names. base: its base's, as
    far as the file holds one. config: of the base, if the file says it. format: the one save_control would
    write, None if none. files: which hold them."""

    tensors: dict[str, Tensor]
    base: dict[str, Tensor]
    config: PixArtConfig | None
    naming: str
    format: str | None
    files: list[Path]
    notes: list[str] = field(default_factory=list)

    @property
    def copies(self) -> int:
        """How many blocks it has. ValueError if one between them is missing."""
        found = {int(name.split(".")[1]) for name in self.tensors}
        if absent := sorted(set(range(max(found) + 1)) - found):
            raise ValueError(f"missing {listed(f'controlnet.{number}' for number in absent)}")
        return len(found)


@dataclass(eq=False)
class OpenedControl:
    """A control that fits its base; its weights wait in the file."""

    config: PixArtConfig
    copies: int
    path: Path
    files: list[Path]
    _dtype: torch.dtype | None
    _tensors: dict[str, Tensor] = field(repr=False)
    _network: ControlNet | None = field(default=None, repr=False)

    @classmethod
    def of(cls, network: ControlNet) -> "OpenedControl":
        """A network of the caller's, in the place of a file."""
        path = Path("a control")
        return cls(network.config, network.copies, path, [], None, {}, network)

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has read the weights."""
        return self._network is not None

    def load(self, device: str | torch.device = "cpu") -> ControlNet:
        """The network in eval mode: read into the device's memory the first time, the same later."""
        if self._network is None:
            with naming_file(self.path):
                self._network = _build(self, torch.device(device))
            self._tensors = {}
        return self._network


def find_control(source: str | Path) -> Path:
    """The file or folder of a control: a path, a short name ("controlnet-512"), a hub id or id/file, the
    folder of a state that trained one, or "shapes-control", the embedded model's."""
    if str(source) == EMBEDDED_CONTROL:
        return Path(__file__).parent.parent / "assets" / EMBEDDED_CONTROL / f"{CONTROL}.safetensors"
    if str(source) == CONTROL_REPOSITORY:
        raise CheckpointError(f"{source}: holds several; name one, {' or '.join(CONTROLS)}")
    place = resolve(source, allow_patterns=TRANSFORMER_FILES)
    # Of a training run's state, which holds other folders too.
    inside = place / CONTROL
    return inside if inside.is_dir() else place


def open_control(
    source: str | Path,
    base: OpenedTransformer,
    *,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> OpenedControl:
    """Open a control for a base, which it must fit. CheckpointError says in one line why it does not.

    A file that holds a base of its own must hold one of the same shape and family; weights of its that
    are another network's are refused, those that differ by a fine-tuning are warned of. Where the base
    compresses keys and values and the copies do not, the copies take the base's convolutions and norms.
    """
    path = find_control(source)
    with naming_file(path):
        contents = read_control(path, variant=variant, dtype=dtype)
        copies = contents.copies
        check_finite(contents.tensors, str(path))
        _check_fit(contents, base, path)
        _add_compression(contents, base)
        _check_names(contents, base.config)
    for note in contents.notes:
        logger.info("%s: %s", path, note)
    return OpenedControl(base.config, copies, path, contents.files, dtype, contents.tensors)


def open_control_alone(
    source: str | Path,
    *,
    config: PixArtConfig | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> tuple[OpenedControl, ControlContents]:
    """Open a control without a base, to convert it: its configuration says of the base what the file
    does. config: replaces it."""
    path = find_control(source)
    with naming_file(path):
        contents = read_control(path, variant=variant, dtype=dtype)
        contents.config = config or contents.config
        shape = contents.config or _shape(contents)
        if contents.copies >= shape.depth:
            raise ValueError(
                f"must have fewer copies than its base has blocks, {shape.depth}, got {contents.copies}"
            )
        _check_names(contents, shape)
        check_finite(contents.tensors | contents.base, str(path))
    for note in contents.notes:
        logger.info("%s: %s", path, note)
    tensors = dict(contents.tensors)
    opened = OpenedControl(shape, contents.copies, path, contents.files, dtype, tensors)
    return opened, contents


def read_control(
    path: Path, *, variant: str | None = None, dtype: torch.dtype | None = None
) -> ControlContents:
    """Read a file, or a diffusers directory. dtype: what it will be cast to."""
    payload = read_payload(path, variant)
    plain = {INSIDE_NAMES.sub("", name): tensor for name, tensor in payload.tensors.items()}
    if len(plain) < len(payload.tensors):
        raise ValueError("holds a tensor twice, with and without a wrapper")
    for naming, pattern in (("official", _OFFICIAL), ("diffusers", _DIFFUSERS)):
        if found := {name: match for name in plain if (match := pattern.fullmatch(name))}:
            contents = _sort(plain, found, naming, payload)
            break
    else:
        what = "a transformer alone" if any("blocks.0." in name for name in plain) else "others"
        raise ValueError(f"holds no ControlNet but {what}: {listed(plain) or 'no tensors'}")
    contents.tensors = widened(contents.tensors, dtype, contents.notes)
    contents.base = widened(contents.base, dtype, [])
    return contents


def control_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of diffusers' research code; q, k and v are views of what was one matrix."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        _, number, part, tail = _OFFICIAL.fullmatch(name).groups()  # type: ignore[union-attr]
        if part == "copied_block":
            theirs = to_diffusers({f"blocks.{number}.{tail}": tensor})
            start, place = f"transformer_blocks.{number}.", "transformer_block."
            inside = {place + n.removeprefix(start): t for n, t in theirs.items()}
        else:
            inside = {f"{part}.{tail}": tensor}
        renamed |= {f"controlnet_blocks.{number}.{n}": t for n, t in inside.items()}
    return renamed


def _sort(
    plain: dict[str, Tensor], found: Mapping[str, Any], naming: str, payload: Payload
) -> ControlContents:
    """The control's tensors and the base's, apart."""
    prefixes = {match[1] for match in found.values()}
    if len(prefixes) > 1:
        raise ValueError(f"holds {len(prefixes)} ControlNets, under {listed(sorted(prefixes))}")
    if naming == "official":
        tensors = {name.removeprefix(*prefixes): plain[name] for name in found}
        start = f"{prefixes.pop()}base_model."
    else:
        tensors = _from_diffusers({name: plain[name] for name in found}, found)
        start = f"{prefixes.pop()}transformer."
    base = {n.removeprefix(start): t for n, t in plain.items() if n.startswith(start)}
    beside = [name for name in plain if name not in found and not name.startswith(start)]
    if beside:
        raise ValueError(f"unexpected {listed(beside)}")
    if naming == "diffusers":
        base = from_diffusers(base)
    config = None if payload.config is None else PixArtConfig.from_dict(payload.config)
    return ControlContents(tensors, base, config, naming, payload.format, payload.files)


def _from_diffusers(tensors: dict[str, Tensor], found: Mapping[str, Any]) -> dict[str, Tensor]:
    blocks, others = {}, {}
    for name, tensor in tensors.items():
        _, _, number, part, tail = found[name].groups()
        if part == "transformer_block":
            blocks[f"transformer_blocks.{number}.{tail}"] = tensor
        else:
            others[f"controlnet.{number}.{part}.{tail}"] = tensor
    return {_in_control(name): tensor for name, tensor in from_diffusers(blocks).items()} | others


def _in_control(name: str) -> str:
    """blocks.3.attn.qkv.weight, or what has no official name, as a tensor of the control."""
    return re.sub(r"^(?:transformer_)?blocks\.(\d+)\.", r"controlnet.\1.copied_block.", name)


def _as_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The copied blocks' tensors as if they were a transformer's."""
    pattern = re.compile(r"controlnet\.(\d+)\.copied_block\.")
    return {
        pattern.sub(r"blocks.\1.", name): tensor
        for name, tensor in tensors.items()
        if pattern.match(name)
    }


def _shape(contents: ControlContents) -> PixArtConfig:
    """A configuration in which the control has the shapes that it has: its base's if that is in the file,
    else one that says of the base no more than the copies show."""
    if contents.base:
        return infer_config(contents.base, None, Surroundings())[0]
    width, _ = shape_of(contents.tensors, "controlnet.0.after_proj.weight", 2)
    blocks = _as_blocks(contents.tensors)
    hidden, _ = shape_of(blocks, "blocks.0.mlp.fc1.weight", 2)
    # The number of heads leaves no trace in any shape.
    heads = next((width // side for side in (72, 64, 32, 16, 8, 4) if width % side == 0), 0)
    if not heads:
        raise ValueError(f"must have a width that is a multiple of 4, got {width}")
    return PixArtConfig(
        hidden_size=width,
        num_heads=heads,
        depth=contents.copies + 1,
        mlp_ratio=hidden / width,
        qk_norm=any(".attn.q_norm." in name for name in blocks),
        kv_compression=infer_compression(blocks, None),
    )


def _check_fit(contents: ControlContents, base: OpenedTransformer, path: Path) -> None:
    own, config = base.config, contents.config
    width, _ = shape_of(contents.tensors, "controlnet.0.after_proj.weight", 2)
    if width != own.hidden_size:
        raise ValueError(
            f"is a control of width {width}, and the transformer {base.path} has width "
            f"{own.hidden_size}: they do not fit"
        )
    if contents.copies >= own.depth:
        raise ValueError(
            f"has {contents.copies} copied blocks, and the transformer {base.path} has {own.depth} "
            "blocks: it must have more"
        )
    if contents.base:
        around = Surroundings(config=own, source=f"the transformer {base.path}")
        config = config or infer_config(contents.base, None, around)[0]
    if config is None:
        return
    if differing := _differing(config, own, _ARCHITECTURE):
        raise ValueError(f"{_contrast(config, own, differing, base.path)}: they do not fit")
    # A base without its null caption does not say how long its captions are.
    says_length = contents.config is not None or NULL_CAPTION in contents.base
    if differing := _differing(config, own, _FAMILY if says_length else _FAMILY[:1]):
        contrast = _contrast(config, own, differing, base.path)
        if contents.base:
            raise ValueError(f"{contrast}: they are of two families{_WAY_OUT}")
        logger.warning("%s: %s: it may not do what it has learned", path, contrast)
    if contents.base and path.resolve() != base.path.resolve():
        _compare_weights(contents.base, base, path)


def _differing(config: PixArtConfig, own: PixArtConfig, names: Sequence[str]) -> list[str]:
    return [name for name in names if getattr(config, name) != getattr(own, name)]


def _contrast(config: PixArtConfig, own: PixArtConfig, names: Sequence[str], base: Path) -> str:
    has, wants = (
        " and ".join(f"{name} {getattr(each, name)}" for name in names) for each in (config, own)
    )
    return f"was trained for a transformer of {has}, and {base} has {wants}"


def _compare_weights(theirs: Mapping[str, Tensor], base: OpenedTransformer, path: Path) -> None:
    """By a few rows of each matrix of the blocks: whatever trains a network changes some of all."""
    change, size = 0.0, 0.0
    for name, tensor in base.tensors().items():
        other = theirs.get(name)
        if name.startswith("blocks.") and other is not None and other.shape == tensor.shape:
            own = tensor[:_ROWS].float()
            change += (other[:_ROWS].float().to(own.device) - own).square().sum().item()
            size += own.square().sum().item()
    share = (change / size) ** 0.5 if size else 0.0
    if share > _RELATED:
        raise ValueError(
            f"was trained with another transformer than {base.path}, whose weights differ from the "
            f"file's own by {share:.0%}{_WAY_OUT}"
        )
    if share > _SAME:
        logger.warning(
            "%s: was trained with a transformer whose weights differ from those of %s by %s: it may "
            "not do all that it has learned", path, base.path, f"{share:.0%}",
        )  # fmt: skip


def _add_compression(contents: ControlContents, base: OpenedTransformer) -> None:
    compression, blocks = base.config.kv_compression, _as_blocks(contents.tensors)
    layers = [] if compression is None else compression.layers
    layers = [n for n in layers if n < contents.copies and compression.applies_to(n)]  # type: ignore[union-attr]
    if any(re.match(r"blocks\.\d+\.attn\.(sr|norm)\.", name) for name in blocks):
        if not layers:
            raise ValueError(
                f"compresses keys and values, and the transformer {base.path} does not; open that "
                "with kv_compression too"
            )
        return
    wanted = re.compile(rf"blocks\.({'|'.join(map(str, layers))})\.attn\.(sr|norm)\.\w+")
    added = {name: tensor for name, tensor in base.tensors().items() if wanted.fullmatch(name)}
    contents.tensors |= {_in_control(name): tensor.clone() for name, tensor in added.items()}
    if layers:
        contents.notes.append(
            f"was dense; its blocks {', '.join(map(str, layers))} compress as the transformer's do, "
            f"with {'the same convolutions and norms' if added else 'nothing to learn'}"
        )


def _check_names(contents: ControlContents, config: PixArtConfig) -> None:
    expected = empty_control(config, contents.copies).state_dict()
    sizes = {name: tensor.shape for name, tensor in expected.items()}
    check_tensors(contents.tensors, sizes, contents.tensors, "official")


def empty_control(config: PixArtConfig, copies: int) -> ControlNet:
    """A control that has names and sizes, and no memory for its numbers."""
    with torch.device("meta"), NoInitialisation():
        return ControlNet(config, copies)


def _build(opened: OpenedControl, device: torch.device) -> ControlNet:
    moved = {name: t.to(device, opened._dtype) for name, t in opened._tensors.items()}
    check_range(opened._tensors, moved)
    network = empty_control(opened.config, opened.copies)
    network.load_state_dict(moved, assign=True)
    return network.eval()
