"""CLIP (arXiv:2103.00020) from a folder or the user's cache: features of pictures and of texts.

Read by transformers 4.57 and 5; pictures are prepared here, as the folder's preprocessor_config.json
says, and texts are cut here, so that who was cut is known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pixart.evaluation.metric import Context, Extractor
from pixart.evaluation.needs import Need, need_snapshot, open_snapshot
from pixart.evaluation.networks.preparing import CLIP_MEAN, CLIP_STD, centre_cropped, normalised
from pixart.evaluation.networks.weighing import weights_digest, width_in
from pixart.files import CheckpointError, read_json
from pixart.libraries import importing, silenced
from pixart.weights import T5_WEIGHTS, errors_naming, find_weights, open_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

# Extractors by name; the first is what OpenAI's and most papers' CLIP scores are made with.
MODELS = {
    "clip-l14": "openai/clip-vit-large-patch14",
    "clip-l14-336": "openai/clip-vit-large-patch14-336",
    "shapes-clip": "shapes-clip",  # of the embedded world, in pixart/assets
}
BATCH = 32
_VERSION = "1"  # of preparing pictures and texts: another one, other features
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
_OLD_END = 2  # text_config.eos_token_id of published CLIPs, which is not their tokenizers'


@dataclass(frozen=True)
class Preparation:
    """What preprocessor_config.json says: the shorter side in pixels, the crop, Pillow's filter, mean and
    standard deviation of the channels."""

    shortest: int = 224
    width: int = 224
    height: int = 224
    resample: int = 3
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, image: "Image") -> np.ndarray:
        """(3, height, width) fp32."""
        levels = centre_cropped(image, self.shortest, self.width, self.height, self.resample)
        return normalised(levels, self.mean, self.std)


def read_preparation(folder: Path) -> Preparation:
    """CheckpointError for a folder that has none, or one of another kind than CLIP's."""
    path = next((folder / name for name in _PROCESSOR if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: must have preprocessor_config.json, it has none")
    values = read_json(path)
    values = values.get("image_processor", values)
    size, crop = values.get("size", 224), values.get("crop_size", 224)
    shortest: Any = size.get("shortest_edge") if isinstance(size, dict) else size
    crop = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    steps = ("do_resize", "do_center_crop", "do_normalize", "do_rescale")
    skipped = [name for name in steps if not values.get(name, True)]
    width, height = crop.get("width"), crop.get("height")
    sides: tuple[Any, ...] = (shortest, width, height)
    if skipped or not all(isinstance(side, int) and side > 0 for side in sides):
        raise CheckpointError(
            f"{path}: must resize the shorter side, crop the centre and normalise, as CLIP's do, got "
            f"size {size} and crop {crop}{f', without {skipped[0]}' if skipped else ''}"
        )
    mean = tuple(values.get("image_mean", CLIP_MEAN))
    std = tuple(values.get("image_std", CLIP_STD))
    return Preparation(sides[0], sides[1], sides[2], int(values.get("resample", 3)), mean, std)


@dataclass(frozen=True)
class Texts:
    """Features (n, width) fp32, and how many tokens each text has, the two at its ends included."""

    features: np.ndarray
    tokens: list[int]


class Clip:
    """The network, its tokenizer, and where they are."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, name: str) -> None:
        self.limit = int(model.config.text_config.max_position_embeddings)
        *self._start, self._end = tokenizer("").input_ids
        _check_end(name, model.config.text_config.eos_token_id, self._end, tokenizer)
        self._model, self._tokenizer, self._device = model.to(device), tokenizer, device

    @property
    def scale(self) -> float:
        """What cosines were multiplied with in training, exp(logit_scale)."""
        return float(self._model.logit_scale.detach().double().exp())

    @torch.inference_mode()
    def pictures(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """(n, width) fp32, not normalised."""
        found = []
        for k in range(0, len(prepared), BATCH):
            pixels = torch.from_numpy(np.stack(prepared[k : k + BATCH])).to(self._device)
            found.append(_tensor(self._model.get_image_features(pixel_values=pixels)).cpu())
        return torch.cat(found).float().numpy()

    def texts(self, texts: Sequence[str], *, whole: bool = False) -> Texts:
        """Features of length 1. A text beyond the limit is cut, or with `whole` falls into windows of equal
        limit whose features are averaged: their mean is shorter than 1, so that a dot product with it is
        the mean of the windows' cosines."""
        rows, owners, tokens = [], [], []
        room = self.limit - len(self._start) - 1
        for place, text in enumerate(texts):
            ids = self._tokenizer(text).input_ids
            body = ids[len(self._start) : -1]
            tokens.append(len(ids))
            windows = [body[k : k + room] for k in range(0, max(1, len(body)), room)]
            for window in windows if whole else windows[:1]:
                rows.append([*self._start, *window, self._end])
                owners.append(place)
        features = normalised_rows(self._encoded(rows), "texts")
        mean = np.zeros((len(texts), features.shape[1]), np.float64)
        np.add.at(mean, owners, features)
        counts = np.bincount(owners, minlength=len(texts))
        return Texts((mean / counts[:, None]).astype(np.float32), tokens)

    @torch.inference_mode()
    def _encoded(self, rows: Sequence[list[int]]) -> np.ndarray:
        found = []
        for k in range(0, len(rows), BATCH):
            part = rows[k : k + BATCH]
            longest = max(map(len, part))
            # Behind its end a text is not looked at, so that it may be filled with any token; with the
            # end's, the first of the highest is the end.
            ids = [row + [self._end] * (longest - len(row)) for row in part]
            mask = [[1] * len(row) + [0] * (longest - len(row)) for row in part]
            given = {"input_ids": ids, "attention_mask": mask}
            tensors = {name: torch.tensor(v, device=self._device) for name, v in given.items()}
            found.append(_tensor(self._model.get_text_features(**tensors)).cpu())
        return torch.cat(found).float().numpy()


def normalised_rows(features: np.ndarray, what: str) -> np.ndarray:
    """Each row of length 1, fp32. ValueError for a row that has no direction."""
    lengths = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise ValueError(f"features of {what} must be finite and not all 0")
    return (features / lengths).astype(np.float32)


def _tensor(output: Any) -> Tensor:
    """transformers 4 gives the projected features themselves, 5 an object around them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _check_end(name: str, configured: int, end: int, tokenizer: Any) -> None:
    """A text's feature is read at its end: with eos_token_id 2 transformers takes the place of the highest
    id for it, and otherwise the first place that has the id, or the very first token where none has."""
    highest = max(tokenizer.get_vocab().values())
    if configured == _OLD_END:
        if end != highest:
            raise CheckpointError(
                f"{name}: text_config.eos_token_id must be {end}, the tokenizer's, got 2: by that a text is "
                f"read at its highest id, which is not its end (up to {highest}), and the words behind it "
                "are not seen; correct config.json"
            )
    elif configured != end:
        raise CheckpointError(
            f"{name}: text_config.eos_token_id must be {end}, the tokenizer's, got {configured}: no text has "
            "it, and all would be read at their first token; correct config.json"
        )


@lru_cache(maxsize=1)
def open_clip(folder: Path, processor: Path, device: torch.device) -> Clip:
    """A CLIP, shared by all that read the same folder: one is in memory at a time. processor: the folder
    with the tokenizer. CheckpointError for files that do not fit."""
    with importing():
        from transformers import CLIPModel

    model = open_pretrained(CLIPModel, folder)
    return Clip(model, open_tokenizer(processor), device, str(folder))


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; CheckpointError where there is none."""
    with importing():
        from transformers import AutoTokenizer

    with errors_naming(folder), silenced():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def files_of(folder: Path, processor: Path) -> Mapping[str, Path]:
    """All that decides features, by name."""
    weights, _ = find_weights(folder, None, T5_WEIGHTS)
    found = {path.name: path for path in (folder / "config.json", *weights)}
    found |= {name: processor / name for name in (*_PROCESSOR, *_TOKENIZER)}
    return {name: path for name, path in found.items() if path.is_file()}


class ClipImages(Extractor):
    """Features of pictures, as they come. name: of MODELS, or "clip-NAME" of any other id. model:
    hub id or folder, None for that of the name. processor: another that has the tokenizer and the
    preprocessor_config.json, None for the same."""

    def __init__(
        self, name: str, context: Context, model: str | None = None, processor: str | None = None
    ) -> None:
        if model is None and name not in MODELS:
            raise ValueError(f"name must be one of {', '.join(MODELS)}, got {name!r}")
        self.name, self.model = name, model or MODELS[name]
        self.processor = processor or self.model
        self._context = context
        self._preparation: Preparation | None = None

    def needs(self) -> Sequence[Need]:
        ids = dict.fromkeys((self.model, self.processor))
        files = {self.model: "config.json", self.processor: _PROCESSOR[0]}
        return [
            need for hub_id in ids for need in need_snapshot(hub_id, self._context, [files[hub_id]])
        ]

    @property
    def width(self) -> int:  # type: ignore[override]
        return width_in(self._folders()[0] / "config.json", "projection_dim")

    @property
    def digest(self) -> str:
        return weights_digest(_VERSION, list(files_of(*self._folders()).values()))

    def prepare(self, image: "Image", entry: "Entry") -> Any:
        if self._preparation is None:
            self._preparation = read_preparation(self._folders()[1])
        return self._preparation(image)

    def __call__(self, prepared: Sequence[Any]) -> np.ndarray:
        return self.opened().pictures(prepared)

    def opened(self) -> Clip:
        """The network, for texts too."""
        return open_clip(*self._folders(), self._context.device)

    def release(self) -> None:
        open_clip.cache_clear()

    def _folders(self) -> tuple[Path, Path]:
        folder = open_snapshot(self.name, self.model, self._context)
        if self.processor == self.model:
            return folder, folder
        return folder, open_snapshot(self.name, self.processor, self._context, [_PROCESSOR[0]])


def shown(model: str) -> str:
    """A hub id as it is, of a folder its name: results are to be the same wherever it lies."""
    is_path = Path(model).is_absolute() or model.startswith((".", "~"))
    return Path(model).name if is_path else model


def extractor_of(model: str, context: Context) -> ClipImages:
    """The extractor of a hub id or a folder. Its name is the same for the same model, however it is asked
    for, so that features are shared."""
    known = {hub_id: name for name, hub_id in MODELS.items()}
    last = Path(model).name.lower()
    return ClipImages(known.get(model) or f"clip-{last.removeprefix('clip-')}", context, model)
