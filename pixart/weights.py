"""Weights on disk or on the hub: where a model is, which files of its directory hold them, and whether they
are those of a network."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.files import AGAIN, CheckpointError, listed, read_json
from pixart.libraries import silenced
from pixart.releases import place_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model"
T5_WEIGHTS = ("model", "pytorch_model")

_AT_A_TIME = 2**24  # numbers of 8 bits that are widened to be looked at


class NotFiniteError(CheckpointError):
    """Weights that hold NaN or infinity: what they compute is black, or noise."""

    exit_code = (
        1  # of a command: a training that diverged is no mistake of who names its checkpoint
    )


_downloads: ContextVar[bool] = ContextVar("downloads", default=True)


def find_weights(
    directory: Path, variant: str | None, stems: tuple[str, ...] = (WEIGHTS,)
) -> tuple[list[Path], str | None]:
    """The weight files of a directory, and the variant they are.

    stems: how their names begin: diffusers', or T5_WEIGHTS. As these libraries do: safetensors
    before .bin, an index before a single file. If there is nothing but one variant (".fp16."), it
    is taken.
    """
    found = _by_variant(directory, stems)
    if not found:
        raise CheckpointError(_no_weights(directory, stems[0]))
    variants = sorted(name for name in found if name is not None)
    if variant not in found:
        if variant is not None or len(variants) > 1:
            has = ", ".join(variants) or "none"
            wanted = f"variant {variant!r}" if variant else "weights without a variant"
            raise CheckpointError(
                f"{directory}: has no {wanted}; choose one of its variants: {has}"
            )
        variant = variants[0]
    for kind in ("safetensors index", "safetensors", "bin index", "bin"):
        if kind in found[variant]:
            path = found[variant][kind]
            return (_shards(path) if kind.endswith("index") else [path]), variant
    raise AssertionError("found holds no empty entry")


def variants_of(directory: Path, stems: tuple[str, ...] = (WEIGHTS,)) -> list[str]:
    """The variants that a directory has, without the plain one."""
    return sorted(name for name in _by_variant(directory, stems) if name is not None)


_NOTHING = dict.fromkeys(("missing", "mismatched", "unexpected"), re.compile(r"(?!)"))


def check_loaded(
    folder: Path, info: Mapping[str, Any], pardoned: Mapping[str, re.Pattern[str]] = _NOTHING
) -> None:
    """Raise CheckpointError unless a library's loading_info says that the files fit the model.

    pardoned: for "missing", "mismatched" and "unexpected", the names that do no harm.
    """
    problems = []
    for kind, harmless in pardoned.items():
        entries = info.get(f"{kind}_keys") or ()
        # Names of mismatched tensors come with both sizes.
        names = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in entries)
        names = [name for name in names if not harmless.fullmatch(name)]
        if names:
            problems.append(f"{kind} {', '.join(names)}")
    if problems:
        raise CheckpointError(f"{folder}: cannot be used ({'; '.join(problems)}); {AGAIN}")


@contextmanager
def errors_naming(folder: Path) -> Iterator[None]:
    """Other libraries say what is wrong with a file, but not with which."""
    try:
        yield
    except (CheckpointError, MemoryError, ImportError):
        raise
    except Exception as error:  # what libraries raise over a damaged file has no common kind
        if type(error).__name__ == "OutOfMemoryError":  # of a GPU
            raise
        reason = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")
        raise CheckpointError(f"{folder}: cannot be used ({reason})") from error


def check_finite(tensors: "Mapping[str, Tensor]", where: str) -> None:
    """Raise NotFiniteError, which begins with `where`, unless all numbers are finite. Names the first few
    tensors of those that are not. Reads each once, at the speed of a sum; fp8 too."""
    if found := not_finite(tensors):
        raise NotFiniteError(
            f"{where}: must be finite, got NaN or infinity in {listed(found)}; "
            "take a checkpoint from before its training diverged"
        )


def not_finite(tensors: "Mapping[str, Tensor]") -> list[str]:
    """The names of those that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not _is_finite(tensor)]


def _is_finite(tensor: "Tensor") -> bool:
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    if tensor.itemsize > 1:
        # The extremes are NaN where any number is; isfinite() takes ten times as long.
        return all(bool(end.isfinite()) for end in tensor.aminmax())
    parts = tensor.reshape(-1).split(_AT_A_TIME)
    return all(_is_finite(part.bfloat16()) for part in parts)


def fit(
    network: "nn.Module", tensors: "Mapping[str, Tensor]", path: Path, unused: str = "(?!)"
) -> None:
    """Load a state dict in place, as fp32. path: the file, for messages. unused: a pattern of names that
    the file may hold beside. CheckpointError unless all others fit; NotFiniteError for NaN."""
    own = network.state_dict()
    # A counter of training steps, which old files do not have.
    own_names = {name for name in own if not name.endswith("num_batches_tracked")}
    names = {
        name
        for name in tensors
        if not name.endswith("num_batches_tracked") and not re.fullmatch(unused, name)
    }
    problems = []
    if missing := sorted(own_names - names):
        problems.append(f"misses {listed(missing)}")
    if left := sorted(names - own_names):
        problems.append(f"has {listed(left)} beside")
    wrong = [
        f"{name} {tuple(tensors[name].shape)} in the place of {tuple(own[name].shape)}"
        for name in sorted(names & own_names)
        if tensors[name].shape != own[name].shape
    ]
    if wrong:
        problems.append(f"has {listed(wrong)}")
    if problems:
        raise CheckpointError(
            f"{path}: must hold the weights of this network, but {'; '.join(problems)}; {AGAIN}"
        )
    taken = {name: tensors[name].float() for name in sorted(names)}
    check_finite(taken, str(path))
    network.load_state_dict(taken, strict=False)


def open_pretrained(
    kind: Any, folder: Path, dtype: "torch.dtype | None" = None, *, may_hold_more: bool = False
) -> Any:
    """A model of transformers from its folder, for use alone. kind: its class, or one that chooses it.
    dtype: fp32 unless given. may_hold_more: published files keep what older versions of the class had.
    CheckpointError for weights that do not fit, are missing, or are not finite."""
    import torch

    files, variant = find_weights(folder, None, T5_WEIGHTS)
    options: dict[str, Any] = {
        # transformers 4 knows no `dtype` in all of its versions
        "torch_dtype": torch.float32 if dtype is None else dtype,
        "variant": variant,
        "use_safetensors": files[0].suffix == ".safetensors",
        "output_loading_info": True,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    with errors_naming(folder), silenced():
        model, info = kind.from_pretrained(folder, **options)
    check_loaded(folder, {**info, "unexpected_keys": ()} if may_hold_more else info)
    check_finite(dict(model.named_parameters()), str(folder))
    return model.eval().requires_grad_(False)


def _by_variant(directory: Path, stems: tuple[str, ...]) -> dict[str | None, dict[str, Path]]:
    """variant -> kind of file -> path."""
    found: dict[str | None, dict[str, Path]] = {}
    stem = "|".join(map(re.escape, stems))
    single = re.compile(rf"(?:{stem})(?:\.(\w+))?\.(safetensors|bin)")
    index = re.compile(rf"(?:{stem})\.(safetensors|bin)\.index(?:\.(\w+))?\.json")
    for path in sorted(directory.iterdir()):
        if match := index.fullmatch(path.name):
            found.setdefault(match[2], {})[f"{match[1]} index"] = path
        elif match := single.fullmatch(path.name):
            found.setdefault(match[1], {})[match[2]] = path
    return found


def _no_weights(directory: Path, stem: str) -> str:
    suffixes = (".pth", ".pt", ".safetensors", ".bin")
    files = sorted(path.name for path in directory.iterdir() if path.suffix in suffixes)
    way_out = f"; name one of its files: {', '.join(files[:8])}" if files else ""
    return f"{directory}: is a directory without {stem}.safetensors{way_out}"


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: must have a weight_map")
    shards = sorted({str(name) for name in names.values()})
    for name in shards:
        # An index may come from anywhere: it must not lead out of its folder.
        if Path(name).name != name:
            raise CheckpointError(f"{index}: must name files beside it, got {name!r}")
        if not _is_file(index.parent / name):
            raise CheckpointError(f"{index.parent}: lacks the shard {name}; {AGAIN}")
    return [index.parent / name for name in shards]


def _is_file(path: Path) -> bool:
    """False for a name that is too long, or holds what no name can, too."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


@contextmanager
def without_downloads() -> Iterator[None]:
    """Within this context `resolve` takes from the hub what its cache has, and asks for nothing."""
    before = _downloads.set(False)
    try:
        yield
    finally:
        _downloads.reset(before)


def may_download() -> bool:
    """Whether `resolve` may ask the hub: not in `without_downloads`."""
    return _downloads.get()


def is_on_hub(path_or_hub_id: str | Path) -> bool:
    """Whether `resolve` looks for it on the hub or in its cache: it has the form of a hub id, or is the
    short name of a release, and is no path that is here."""
    name = _long_name(path_or_hub_id)
    return not _local(name).exists() and _hub_place(name) is not None


def _local(name: str) -> Path:
    """CheckpointError for what no path can be: a name that is too long, or the home of nobody."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{name}: is no path ({getattr(error, 'strerror', error)})"
        ) from error
    return path


def _long_name(path_or_hub_id: str | Path) -> str:
    name = place_of(path_or_hub_id) if isinstance(path_or_hub_id, str) else None
    return name or str(path_or_hub_id)


def _hub_place(name: str) -> tuple[str, str | None] | None:
    """The repository, and the file in it, that an absent path may stand for."""
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", name)
    if (
        not match
        or _local(name).parent.is_dir()
        or Path(match[1]).suffix in (".pth", ".pt", ".safetensors")
    ):
        return None
    return match[1], match[2]


def resolve(path_or_hub_id: str | Path, *, allow_patterns: Iterable[str] | None = None) -> Path:
    """A local path as it is, else a Hugging Face hub id or id/file, from the hub or its cache. The short
    name of a release (pixart.releases) stands for its place."""
    name = _long_name(path_or_hub_id)
    path = _local(name)
    if path.exists():
        return path
    place = _hub_place(name)
    if place is None:
        raise CheckpointError(f"{path}: no such file or directory")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import logging as of_hub
    except ImportError as error:
        raise CheckpointError(
            f"{path}: no such file or directory (a hub id needs `pip install huggingface_hub`)"
        ) from error
    repository, file = place
    options: dict[str, Any] = {} if may_download() else {"local_files_only": True}
    verbosity = of_hub.get_verbosity()
    of_hub.set_verbosity_error()  # it tells of every try; what comes of them is one line
    try:
        if file:
            return Path(hf_hub_download(repository, file, **options))
        patterns = None if allow_patterns is None else list(allow_patterns)
        return Path(snapshot_download(repository, allow_patterns=patterns, **options))
    except (OSError, ValueError, HfHubHTTPError) as error:
        if not may_download():  # what the library advises is an option that nobody has here
            raise CheckpointError(
                f"{name}: is neither a local path nor in the hub's cache, and nothing is downloaded to plan; "
                f"check the name, or download it first: hf download {repository}"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name}: is no local path, and the hub did not give it ({reason}); "
            "check the name and the network, or download it and give its path"
        ) from error
    finally:
        of_hub.set_verbosity(verbosity)
