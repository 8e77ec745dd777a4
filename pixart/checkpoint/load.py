"""Open transformers: official .pth, diffusers directories, and safetensors of our own.

names.py has the tensor names, config.py infers the configuration, read.py and write.py do the files.
What had to be assumed or initialised is logged to "pixart" at INFO.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pixart.checkpoint.config import (
    NO_PIPELINE,
    Surroundings,
    caption_length,
    config_from_diffusers,
    infer_config,
    open_compression,
)
from pixart.checkpoint.names import (
    CONFIG,
    NULL_CAPTION,
    POSITIONS,
    SIDECAR,
    as_in_file,
    check_depth,
    check_tensors,
)
from pixart.checkpoint.read import Contents, read_checkpoint
from pixart.config import KVCompression, PixArtConfig
from pixart.few_step import FewStep
from pixart.files import CheckpointError, read_json
from pixart.model.transformer import PixArt
from pixart.releases import release_of
from pixart.weights import WEIGHTS, check_finite, not_finite, resolve

# What a hub repository must give for its transformer alone: resolve(..., allow_patterns=...).
INDEX = "model_index.json"
TRANSFORMER_FILES = (INDEX, "transformer/*", CONFIG, WEIGHTS + "*", SIDECAR)

logger = logging.getLogger("pixart")


@dataclass(eq=False)
class OpenedTransformer:
    """A checkpoint whose names and sizes are those of `config`; its weights wait in the file.

    null_caption_stored: whether the checkpoint holds the model's y_embedding. changes: what is done to
    the model, in order, when its weights are read. is_joined: whether some of its tensors are made of
    several in the file.
    """

    config: PixArtConfig
    null_caption_stored: bool
    _path: Path
    _dtype: torch.dtype | None
    _tensors: dict[str, Tensor] = field(repr=False)
    changes: list[Callable[[PixArt], object]] = field(default_factory=list, repr=False)
    _model: PixArt | None = field(default=None, repr=False)
    is_joined: bool = False

    @classmethod
    def of(cls, model: PixArt) -> "OpenedTransformer":
        """A model of the caller's, in the place of a checkpoint."""
        opened = cls(model.config, True, Path("a model"), model.dtype, {})
        opened.replace(model)
        return opened

    @property
    def path(self) -> Path:
        """Where it was found, for messages."""
        return self._path

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the model; None for that of the file."""
        return self._dtype

    def tensors(self) -> dict[str, Tensor]:
        """Its weights as they are now: of the file until they are read, before any of `changes`."""
        return self._tensors if self._model is None else self._model.state_dict()

    def mapped_beside(self) -> int:
        """Bytes of the file that stay mapped beside a model on a CPU, which has copies of them: page cache, which
        the system takes back when it needs it."""
        if not self.is_joined or any(one.dtype != self._dtype for one in self._tensors.values()):
            return 0
        joined = re.compile(r".*\.(?:qkv|kv_linear)\.(?:weight|bias)")
        return sum(one.nbytes for name, one in self._tensors.items() if joined.fullmatch(name))

    @property
    def is_loaded(self) -> bool:
        """Whether `load` has read the weights."""
        return self._model is not None

    def load(self, device: str | torch.device = "cpu") -> PixArt:
        """The model in eval mode: read into the device's memory the first time, the same later."""
        if self._model is None:
            with naming_file(self._path):
                model = _build(self, torch.device(device))
                for change in self.changes:
                    change(model)
            self._model = model
            # Or a model that was moved or cast would lie in memory twice.
            self._tensors = {}
        return self._model

    def replace(self, model: PixArt) -> None:
        """Another model of the caller's takes the checkpoint's place."""
        self.config, self._model, self._tensors = model.config, model, {}
        self.null_caption_stored = getattr(model, "null_caption_stored", True)


def load_transformer(
    path: str | Path,
    *,
    config: PixArtConfig | None = None,
    kv_compression: KVCompression | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    ema: bool = False,
    variant: str | None = None,
    few_step: FewStep | None = None,
) -> PixArt:
    """Open a checkpoint as a model in eval mode. CheckpointError says in one line why it cannot.

    path: an official .pth, a safetensors file, a diffusers directory (transformer or pipeline).
    config: replaces what the checkpoint says or suggests about itself. kv_compression: opens a
    dense checkpoint as a compressed one, whose new tensors start as the mean and a plain LayerNorm.
    dtype: None keeps the stored one. ema: take the averaged weights. variant: "fp16" or another. few_step:
    how it is drawn, where it does not say it itself.

    The model's null_caption_stored says whether its y_embedding came from the checkpoint. If not,
    it holds random numbers: save_transformer leaves them out until null_caption_stored is True.
    """
    opened = open_transformer(
        path, config=config, kv_compression=kv_compression, dtype=dtype, ema=ema, variant=variant,
        few_step=few_step,
    )  # fmt: skip
    return opened.load(device)


def open_transformer(
    path: str | Path,
    *,
    config: PixArtConfig | None = None,
    kv_compression: KVCompression | None = None,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    variant: str | None = None,
    around: Surroundings = NO_PIPELINE,
    few_step: FewStep | None = None,
    sizes_only: bool = False,
) -> OpenedTransformer:
    """The first half of load_transformer: whatever is wrong with the checkpoint is found here, and
    the memory for its weights is taken by `OpenedTransformer.load`.

    around: what is known from the pipeline that it is opened for. few_step: what is known of it by its name,
    where it does not say it itself. sizes_only: whether the numbers are finite is not looked at, which reads
    them all.
    """
    path = Path(path)
    with naming_file(path):
        contents = read_checkpoint(
            path, ema=ema, variant=variant, dtype=dtype, sizes_only=sizes_only
        )
        config = config or _configuration(contents, kv_compression, _known(path, contents, around))
        config = _with_few_step(config, path, contents, few_step)
        config, notes = open_compression(config, kv_compression, contents.tensors)
        contents.notes += notes
        check_depth(config.depth, contents.tensors, contents.naming)
        tensors = dict(contents.tensors)
        tensors.pop(POSITIONS, None)
        expected = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
        check_tensors(tensors, expected, contents.present, contents.naming)
    # Last, as it reads all of the file; the load finds it in the system's cache.
    in_file = {as_in_file(name, contents.naming): t for name, t in contents.tensors.items()}
    if not sizes_only:
        check_finite(in_file, str(path))
    stored = NULL_CAPTION in tensors
    if not stored and contents.naming == "official":  # diffusers' files never hold it
        contents.notes.append(
            f"{NULL_CAPTION} is absent: the null caption must come from the text encoder"
        )
    for note in contents.notes:
        logger.info("%s: %s", path, note)
    is_joined = contents.naming == "diffusers"
    return OpenedTransformer(config, stored, path, dtype, tensors, is_joined=is_joined)


def read_config(path: str | Path) -> PixArtConfig:
    """A JSON file of PixArtConfig's fields."""
    path = Path(path)
    with naming_file(path):
        return PixArtConfig.from_dict(read_json(path))


def find_transformer(source: str | Path) -> Path:
    """Where a transformer is: a path, or what the hub gives of a repository. Of a folder or repository that
    has one safetensors file and no configuration, as those of Nitro, that file."""
    path = resolve(source, allow_patterns=TRANSFORMER_FILES)
    has_layout = any((path / name).exists() for name in (CONFIG, INDEX, "transformer"))
    if not path.is_dir() or has_layout:
        return path
    if not Path(source).is_dir():
        path = resolve(source, allow_patterns=("*.safetensors",))
    files = sorted(path.glob("*.safetensors"))
    return files[0] if len(files) == 1 else path


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn a ValueError into a CheckpointError that starts with the path, on one line."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(" ".join(f"{path}: {error}".split())) from error


def _known(path: Path, contents: Contents, around: Surroundings) -> Surroundings:
    """A file that is named after a release, and as large, is taken for it where it says nothing itself."""
    release = release_of(path)
    if release is None:
        return around
    last = f"blocks.{release.config.depth - 1}.attn.qkv.weight"
    after = f"blocks.{release.config.depth}.attn.qkv.weight"
    weight = contents.tensors.get(last)
    width = release.config.hidden_size
    if weight is None or weight.shape[1:] != (width,) or after in contents.tensors:
        return around
    return Surroundings(
        release.model_max_length, release.config, f"the release {release.name}, whose name it has"
    )


def _with_few_step(
    config: PixArtConfig, path: Path, contents: Contents, known: FewStep | None
) -> PixArtConfig:
    """What the checkpoint was distilled for: as its configuration says, or its pipeline, or its name."""
    said = None
    if contents.index_few_step is not None:
        said = FewStep.from_dict(contents.index_few_step)
        if config.few_step not in (None, said):
            raise ValueError(
                f"few_step must be the same in model_index.json and in the transformer's {CONFIG}, got {said} "
                f"and {config.few_step}"
            )
    release = release_of(path)
    by_name = known or (release.few_step if release else None)
    return replace(config, few_step=config.few_step or said or by_name)


def _configuration(
    contents: Contents, requested: KVCompression | None, around: Surroundings
) -> PixArtConfig:
    """What the checkpoint says about itself, else what its tensors show."""
    if contents.config is not None:
        return PixArtConfig.from_dict(contents.config)
    if contents.diffusers_config is None:
        config, notes = infer_config(contents.tensors, requested, around)
        contents.notes += notes
        return config
    length = contents.model_max_length
    if length is None:
        length, assumed = caption_length("csize_embedder.mlp.0.weight" in contents.tensors, around)
        if assumed:
            contents.notes.append(
                f"does not say how long its captions are: assumed {length} tokens"
            )
    return config_from_diffusers(
        contents.diffusers_config,
        contents.tensors,
        model_max_length=length,
        class_dropout_prob=contents.class_dropout_prob,
        kv_compression=requested,
    )


class NoInitialisation(TorchFunctionMode):
    """Leave the tensors alone: random numbers on the meta device cost two seconds of imports."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **kwargs)


def empty_model(config: PixArtConfig) -> PixArt:
    """A model that has names and sizes, and no memory for its numbers."""
    with torch.device("meta"), NoInitialisation():
        return PixArt(config)


def _build(opened: OpenedTransformer, device: torch.device) -> PixArt:
    model, tensors, config = empty_model(opened.config), dict(opened._tensors), opened.config
    if not opened.null_caption_stored:
        # The published initialisation, from a seed: the same file opens as the same model.
        shape = (config.model_max_length, config.caption_channels)
        table = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        table *= config.caption_channels**-0.5
        tensors[NULL_CAPTION] = table.to(tensors["x_embedder.proj.weight"].dtype)
    moved = {name: t.detach().to(device=device, dtype=opened._dtype) for name, t in tensors.items()}
    check_range(tensors, moved)
    # assign: on the meta device there is no memory to copy into.
    model.load_state_dict(moved, assign=True)
    model.null_caption_stored = opened.null_caption_stored  # type: ignore[assignment]
    return model.eval()


def check_range(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """fp16 ends at 65504: a larger weight becomes infinite, and every picture black."""
    narrowed = {
        name: tensor
        for name, tensor in after.items()
        if torch.finfo(tensor.dtype).max < torch.finfo(before[name].dtype).max / 2
    }
    if names := not_finite(narrowed):
        kind = str(after[names[0]].dtype).removeprefix("torch.")
        raise ValueError(f"{', '.join(names)} must fit into {kind}, got larger numbers; use bf16")
