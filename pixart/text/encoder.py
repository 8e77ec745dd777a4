"""Prompts to the features of T5 or of a CLIP, and the on-disk cache that makes either optional the second
time.

The tokenizer and the encoder are read from a pipeline directory's `tokenizer/` and `text_encoder/`,
neither before a prompt needs it: when every prompt is cached, transformers is not even imported.

Numerics. Prompts are encoded one at a time and without padding, so features depend on the prompt
alone, bit for bit, and never on its batch. Where T5's weights are streamed or packed, several prompts go
through each block in turn (`stream`): a pass, which changes no bit either. The official code pads to the limit
and masks the padding; the kept tokens are the same but for rounding (relative 1e-6 in fp32), and 300 tokens
cost fifteen times as much as 20. Padding that is to be *seen* is the one exception: see `keep_padding`.

A CLIP is used as Stable Diffusion 2 uses OpenCLIP-H: the output of its penultimate layer (`networks`), with
the final LayerNorm, of all `max_length` tokens, every one of which counts. Padding is behind the text and
a CLIP is causal: it changes no feature of the text, and sums the text up. Whether the transformers of "On
the Scalability of Diffusion-based Text-to-Image Generation" saw it the paper does not say; its UNets did,
which know no mask, and its GMACs are those of 77 tokens. So do ours: PromptEmbeddings of a CLIP mask nothing.

Null captions. diffusers encodes "" and attends to its one token: `encode([""])`. The Σ reference
code shows T5("") padded to 300 through the prompt's own mask, the α one shows its stored table in
that way: `encode([""], keep_padding=True).with_mask_of(prompts)`, or
`PromptEmbeddings(table[None], ...).with_mask_of(prompts)`.
"""

import gc
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pixart.device import return_cached
from pixart.files import CheckpointError, check_text, fingerprint, fingerprint_files
from pixart.tensors import read_tensors
from pixart.text.cache import Encoded, PromptCache, default_cache_dir
from pixart.text.networks import (
    Network,
    OpenedT5,
    is_packed,
    kind_of,
    load_network,
    longest_caption,
    open_t5,
)
from pixart.text.stream import Footprint, Ids, Memory, choose_memory, computed_in, tokens_of_pass
from pixart.text.t5 import T5Shape, block_name
from pixart.text.tokenizer import Tokenizer, load_tokenizer, tokenize
from pixart.weights import T5_WEIGHTS, NotFiniteError, find_weights

Quantization = Literal["8bit", "4bit"]
TextMemory = Literal["auto", "resident", "stream"]
LENGTH_OF_T5 = 300  # tokens, where nobody says how many


@dataclass(frozen=True)
class PromptEmbeddings:
    """Features of B prompts: features (B, L, C), mask (B, L) bool, true where a token counts."""

    features: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2]:
            raise ValueError(
                "features must be (B, L, C) and mask (B, L), "
                f"got {tuple(self.features.shape)} and {tuple(self.mask.shape)}"
            )

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, rows: slice | list[int]) -> "PromptEmbeddings":
        """Some prompts, in any order and any number of times."""
        return PromptEmbeddings(self.features[rows], self.mask[rows])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "PromptEmbeddings":
        """The mask follows to the device and stays bool."""
        features = self.features.to(device=device, dtype=dtype)
        return PromptEmbeddings(features, self.mask.to(features.device))

    def padded(self, length: int) -> "PromptEmbeddings":
        """At least `length` tokens, the added ones zero and masked."""
        missing = max(length - self.features.shape[1], 0)
        features = F.pad(self.features, (0, 0, 0, missing))
        return PromptEmbeddings(features, F.pad(self.mask, (0, missing)))

    def with_mask_of(self, other: "PromptEmbeddings") -> "PromptEmbeddings":
        """These features seen through another's mask, as the reference code sees null captions."""
        rows, length = other.mask.shape
        if len(self) not in (1, rows) or self.features.shape[1] < length:
            raise ValueError(
                f"features must have 1 or {rows} rows of at least {length} tokens, "
                f"got {tuple(self.features.shape)}"
            )
        features = self.features[:, :length].expand(rows, -1, -1)
        return PromptEmbeddings(features, other.mask)

    @staticmethod
    def concatenate(parts: "list[PromptEmbeddings]") -> "PromptEmbeddings":
        """All rows of all parts, padded to the longest."""
        length = max(part.features.shape[1] for part in parts)
        parts = [part.padded(length) for part in parts]
        features = torch.cat([part.features for part in parts])
        return PromptEmbeddings(features, torch.cat([part.mask for part in parts]))


@dataclass(eq=False)
class TextEncoder:
    """T5 or a CLIP from a pipeline directory, loaded when a prompt is not cached: see `from_pretrained`.

    Text is taken as it is but for surrounding space. α's captions were lowercased in training, Σ's
    were not; diffusers' pipelines lowercase for both, which matters to whoever compares images.
    """

    directory: Path
    dtype: torch.dtype
    device: torch.device
    max_length: int
    quantization: Quantization | None
    cache_dir: str | Path | None
    variant: str | None = None
    file: Path | None = None
    memory: TextMemory = "auto"
    _cache: PromptCache | None = field(default=None, init=False, repr=False)
    _tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    _network: Network | None = field(default=None, init=False, repr=False)
    _is_clip: bool | None = field(default=None, init=False, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        pipeline_dir: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        max_length: int | None = None,
        quantization: Quantization | None = None,
        cache_dir: str | Path | None = "auto",
        variant: str | None = None,
        file: str | Path | None = None,
        memory: TextMemory = "auto",
    ) -> "TextEncoder":
        """Checks the arguments and reads no weights yet, but for the names in `file`.

        max_length: tokens of a prompt; None is 300 of T5, and as many as a CLIP has positions for, 77.
        cache_dir: "auto" is the user's cache directory, and no cache where that cannot be used; None is no
        cache. variant: "fp16" or another of the weights; None takes the plain ones, or the only variant there
        is. bf16 is the safe half precision: fp16 overflows in T5's feed-forward layers, whose last matrix is
        therefore kept in fp32, as transformers does. bf16 on a CPU without such products is computed in fp32.
        quantization needs CUDA, bitsandbytes and accelerate. file: of a T5's encoder in a format of
        `pixart.text.stored`, in the place of the folder's weights. memory: "resident" keeps T5's weights on the
        device, "stream" reads them from the disk block by block, "auto" does that where they do not fit what is
        free; the features have the same bits. CheckpointError for a file that is no T5 of the folder's sizes.
        """
        directory, device = Path(pipeline_dir), torch.device(device)
        for folder in ("tokenizer", "text_encoder"):
            if not (directory / folder).is_dir():
                raise FileNotFoundError(f"{directory} must have a {folder} folder, it has none")
        most = longest_caption(directory / "text_encoder")
        max_length = (most or LENGTH_OF_T5) if max_length is None else max_length
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if most is not None and max_length > most:
            raise ValueError(
                f"max_length must be at most {most} for the CLIP in {directory / 'text_encoder'}, which has "
                f"positions for no more tokens, got {max_length}"
            )
        if "\0" in str(cache_dir):  # which no system call takes
            raise ValueError(f"cache_dir must be a folder, got {str(cache_dir)!r}")
        _check_quantization(quantization, device)
        file = None if file is None else Path(file)
        opened = cls(
            directory,
            dtype,
            device,
            max_length,
            quantization,
            cache_dir or None,
            variant,
            file,
            memory,
        )
        opened._check_memory()
        if file is not None:
            open_t5(directory / "text_encoder", variant, file)
        return opened

    def _check_memory(self) -> None:
        """ValueError for a file or a way to hold it that this encoder has no use for."""
        if self.memory not in get_args(TextMemory):
            known = ", ".join(get_args(TextMemory))
            raise ValueError(f"text-encoder-memory must be {known}, got {self.memory!r}")
        own = None if self._is_ours else "a CLIP" if self.is_clip else "bitsandbytes"
        if own is not None and self.memory == "stream":
            raise ValueError(
                f"text-encoder-memory must be resident or auto with {own}, got stream: only a T5 that is not "
                "quantised by bitsandbytes is streamed"
            )
        if own is not None and self.file is not None:
            raise ValueError(
                f"text-encoder must be left out with {own}, got {self.file}: a file stands for the weights of a "
                "T5, in the precision that it has"
            )

    @property
    def _is_ours(self) -> bool:
        """Whether it is a T5 that is computed here."""
        folder = self.directory / "text_encoder"
        is_packed_folder = self.file is None and is_packed(folder)
        return not (self.is_clip or self.quantization or is_packed_folder)

    @property
    def is_clip(self) -> bool:
        """Whether it is the text half of a CLIP, whose prompts are padded; else it is T5."""
        if self._is_clip is None:
            self._is_clip = kind_of(self.directory / "text_encoder") == "clip"
        return self._is_clip

    @property
    def is_loaded(self) -> bool:
        """Whether the weights, or what they are streamed through, are in memory."""
        return self._network is not None

    def encode(self, prompts: list[str], *, keep_padding: bool = False) -> PromptEmbeddings:
        """Features of the prompts on the encoder's device, padded to the longest of them.

        keep_padding pads every prompt to max_length before T5 sees it and keeps what T5 makes of
        the padding; the mask still marks the prompt's own tokens. A CLIP's are always padded, and
        all count: there it changes nothing. A prompt over the limit is cut,
        with a warning that shows the lost text.
        """
        encoded = self.encode_each(prompts, keep_padding=keep_padding)
        for item in dict.fromkeys(encoded.values()):
            if item.cut:
                warnings.warn(self.note_of(item), stacklevel=2)
        return self._collated([encoded[prompt] for prompt in prompts])

    def encode_each(
        self, prompts: Sequence[str], *, keep_padding: bool = False
    ) -> dict[str, Encoded]:
        """The features of each prompt by itself, (L, C) in host memory, by the prompt: as `encode` has them."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts must be a list of at least one string, got {prompts!r}")
        for prompt in prompts:
            check_text("prompt", prompt)
        keep_padding = keep_padding and not self.is_clip
        # Each text once: pictures of a batch mostly share their negative prompt.
        encoded = self._encoded(list(dict.fromkeys(one.strip() for one in prompts)), keep_padding)
        return {prompt: encoded[prompt.strip()] for prompt in prompts}

    def note_of(self, encoded: Encoded) -> str:
        """What to tell of a prompt that was cut."""
        return f"the prompt is longer than {self.max_length} tokens; cut off: {encoded.cut!r}"

    def is_cached(self, prompt: str, *, keep_padding: bool = False) -> bool:
        """Whether encoding the prompt needs neither the weights nor the tokenizer."""
        cache = self._opened_cache()
        keep_padding = keep_padding and not self.is_clip
        return cache is not None and cache.holds(prompt.strip(), keep_padding, self.dtype)

    def release(self) -> None:
        """Free the weights; the next prompt that is not cached loads them again."""
        if self._network is None:
            return
        self._network = None
        # A model may hold itself in a circle, and its memory until a collection.
        gc.collect()
        return_cached(self.device)

    def passes(self, texts: Sequence[str]) -> list[list[str]]:
        """The texts in groups that are encoded together: one each where the weights are in memory as they are
        computed with, else as many as a pass has tokens for. Loads the encoder."""
        if not self._ready_network().has_passes:
            return [[text] for text in texts]
        groups: list[list[str]] = []
        tokens = most = tokens_of_pass(self.device)
        for text in texts:
            count = len(self._tokens(text.strip(), False)[0][0])
            if tokens + count > most:
                groups.append([])
                tokens = 0
            groups[-1].append(text)
            tokens += count
        return groups

    def count_tokens(self, text: str, *, keep_padding: bool = False) -> int:
        """How many tokens the encoder reads of a text. Loads the tokenizer."""
        return len(self._tokens(text.strip(), keep_padding)[0][0])

    def choose_memory(self, free: int | None = None, wanted: str | None = None) -> Memory:
        """How the weights are held with so many bytes free, None for those that are now. wanted: None for
        `memory`."""
        if not self._is_ours:
            return "resident"
        opened = self._opened_t5()
        footprint = opened.footprint(self.dtype, self.device)
        return choose_memory(wanted or self.memory, opened.weights, footprint, self.device, free)

    def t5_shape(self) -> T5Shape | None:
        """The sizes of a T5 that is computed here, else None."""
        return self._opened_t5().shape if self._is_ours else None

    @property
    def has_passes(self) -> bool:
        """Whether prompts share a pass where the weights are in memory too: they are made dense for each."""
        if not self._is_ours:
            return False
        plain = all(one.is_plain for one in self._opened_t5().weights.tensors.values())
        return not plain or computed_in(self.dtype, self.device) != self.dtype

    @property
    def streamed_bytes(self) -> int:
        """That are read of the weights in a pass over the blocks, of a T5 that is streamed."""
        opened = self._opened_t5()
        names = {
            block_name(layer, one)
            for layer in range(opened.shape.layers)
            for one in opened.shape.block
        }
        return sum(opened.weights.tensors[name].bytes for name in names)

    def _opened_t5(self) -> OpenedT5:
        return open_t5(self.directory / "text_encoder", self.variant, self.file)

    def footprint(self) -> Footprint:
        """What the weights take on the device, by the headers of their files."""
        folder = self.directory / "text_encoder"
        if self._is_ours:
            return self._opened_t5().footprint(self.dtype, self.device)
        files, _ = find_weights(folder, self.variant, T5_WEIGHTS)
        count = sum(tensor.numel() for file in files for tensor in read_tensors(file).values())
        bytes_each = {"8bit": 1.0, "4bit": 0.5}.get(self.quantization or "", self.dtype.itemsize)
        return Footprint(round(count * bytes_each), round(count * bytes_each))

    def _encoded(self, texts: list[str], keep_padding: bool) -> dict[str, Encoded]:
        cache = self._opened_cache()
        found: dict[str, Encoded] = {}
        for text in texts if cache is not None else ():
            known = cache.read(text, keep_padding, self.dtype)  # type: ignore[union-attr]
            if known is not None:
                found[text] = known
        missing = [text for text in texts if text not in found]
        for group in self.passes(missing) if len(missing) > 1 else [missing] * bool(missing):
            for text, item in zip(group, self._run(group, keep_padding), strict=True):
                found[text] = item
                if cache is not None:
                    cache.write(text, keep_padding, item)
        return found

    def _opened_cache(self) -> PromptCache | None:
        if self._cache is None and self.cache_dir is not None:
            needed = self.cache_dir != "auto"
            directory = Path(self.cache_dir) if needed else default_cache_dir()
            if directory is not None:
                self._cache = PromptCache(directory, self._identity(), needed=needed)
        return self._cache

    def _run(self, texts: Sequence[str], keep_padding: bool) -> Iterator[Encoded]:
        """Features of texts that go through the encoder together."""
        tokens = [self._tokens(text, keep_padding) for text in texts]
        network = self._ready_network()
        for (ids, _), _ in tokens:
            self._check_ids(ids, network.vocabulary)
        found = network([prompt for prompt, _ in tokens])
        for text, ((ids, padding), cut), features in zip(texts, tokens, found, strict=True):
            if not features.isfinite().all():
                raise NotFiniteError(
                    f"{self.place}: must give finite features, got others for "
                    f"{text[:60]!r}; use bf16 or fp32 for the text encoder, not {self.dtype}"
                )
            yield Encoded(features.cpu(), len(ids) - padding, cut)

    def _tokens(self, text: str, keep_padding: bool) -> tuple[Ids, str]:
        """What the encoder reads of a text, and the text that was cut."""
        if self._tokenizer is None:
            kind = kind_of(self.directory / "text_encoder")
            self._tokenizer = load_tokenizer(self.directory / "tokenizer", kind)
        ids, cut = tokenize(self._tokenizer, text, self.max_length)
        padding = self.max_length - len(ids) if keep_padding or self.is_clip else 0
        # All tokens of a CLIP count.
        return (ids + [self._tokenizer.padding] * padding, 0 if self.is_clip else padding), cut

    @property
    def place(self) -> Path:
        """Of the weights."""
        return self.file or self.directory / "text_encoder"

    def _check_ids(self, ids: Sequence[int], vocabulary: int) -> None:
        """A tokenizer of another encoder gives tokens that this one has no vectors for."""
        if max(ids) >= vocabulary:
            raise CheckpointError(
                f"{self.directory / 'tokenizer'}: must be that of the text encoder, which knows "
                f"{vocabulary} tokens, got token {max(ids)}"
            )

    def _ready_network(self) -> Network:
        if self._network is None:
            folder = self.directory / "text_encoder"
            self._network = load_network(
                folder,
                self.dtype,
                self.device,
                self.quantization,
                self.variant,
                self.file,
                self.memory,
            )
        return self._network

    def _collated(self, items: list[Encoded]) -> PromptEmbeddings:
        length = max(item.features.shape[0] for item in items)
        features = [F.pad(x.features, (0, 0, 0, length - x.features.shape[0])) for x in items]
        tokens = torch.tensor([item.tokens for item in items])
        mask = torch.arange(length) < tokens[:, None]
        return PromptEmbeddings(torch.stack(features), mask).to(self.device)

    def _identity(self) -> dict[str, object]:
        """Everything but the text that a feature's bits depend on."""
        folder = self.directory / "text_encoder"
        computed = computed_in(self.dtype, self.device) if self._is_ours else self.dtype
        return {
            "encoder": fingerprint(folder)
            if self.file is None
            else fingerprint_files({"config": folder / "config.json", "file": self.file}),
            "tokenizer": fingerprint(self.directory / "tokenizer"),
            "max_length": self.max_length,
            "dtype": str(self.dtype),
            "quantization": self.quantization,
            "variant": self.variant,
            # Devices and versions differ in rounding.
            "device": self.device.type,
            "software": [importlib.metadata.version(name) for name in ("torch", "transformers")],
            # The keys of T5 are those of before.
            **({"network": "clip"} if self.is_clip else {}),
            **({"products": str(computed)} if computed != self.dtype else {}),
        }


def _check_quantization(quantization: str | None, device: torch.device) -> None:
    if quantization is None:
        return
    if quantization not in ("8bit", "4bit"):
        raise ValueError(f"quantization must be None, '8bit' or '4bit', got {quantization!r}")
    if device.type != "cuda":
        raise ValueError(
            f"text-encoder-dtype {quantization} must run on CUDA, where bitsandbytes computes it, "
            f"got device {str(device)!r}: use bf16 there"
        )
    missing = [m for m in ("bitsandbytes", "accelerate") if importlib.util.find_spec(m) is None]
    if missing:
        command = f"pip install {' '.join(missing)}"
        raise ModuleNotFoundError(f"text-encoder-dtype {quantization} needs: {command}")
