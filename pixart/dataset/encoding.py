"""Samples to features: what encodes them, and a chunk of them at a time into a store."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.config import MAX_LENGTH, Family
from pixart.dataset.annotations import in_order
from pixart.dataset.controls import Controls
from pixart.dataset.features import FORMAT, ShardStore
from pixart.dataset.images import ImageError
from pixart.dataset.loading import Loader, Picture, Settings
from pixart.dataset.parts import Part
from pixart.dataset.samples import Item, Prompt, Rejected, Sample
from pixart.files import digest, fingerprint, fingerprint_files
from pixart.pipeline.captions import as_trained
from pixart.pipeline.directory import caption_length_of, family_of, open_directory
from pixart.pipeline.directory import text_dtype as default_text_dtype
from pixart.pipeline.load import find_text_encoder
from pixart.text.encoder import TextEncoder, TextMemory
from pixart.vae.autoencoder import VAE


@dataclass(frozen=True)
class Texts:
    """What turns captions into features. family: whose captions they are. identity: names weights, precision
    and what is done to captions."""

    encoder: TextEncoder
    family: Family
    identity: str


@dataclass(frozen=True)
class Encoders:
    """What turns pictures and captions into features. family: whose captions they are. The
    identities name weights, precision and what is done to captions."""

    vae: VAE
    text: TextEncoder
    family: Family
    vae_identity: str
    text_identity: str

    @property
    def multiple(self) -> int:
        """Sides in pixels are multiples of this: the VAE's factor times the transformer's patch of 2."""
        return self.vae.downsample * 2

    @property
    def texts(self) -> Texts:
        """The half that needs no pictures."""
        return Texts(self.text, self.family, self.text_identity)


class CaptionEncoding:
    """Captions to features of a store, each text once."""

    def __init__(self, store: ShardStore, texts: Texts) -> None:
        self.store, self.texts = store, texts

    def encode(
        self, items: Sequence[Sample | Prompt], new: dict[str, Tensor], part: Part
    ) -> list[dict[str, str]]:
        """The names of the captions' features, by the captions' names. What the store does not have is encoded
        together into `new`; a caption that was cut is noted in the report."""
        named: list[dict[str, str]] = []
        missing: dict[str, tuple[str, str]] = {}
        for item in items:
            named.append({})
            for caption, written in item.captions.items():
                text = as_trained(written, self.texts.family)
                name = digest(f"{self.texts.identity}\n{text}".encode())
                named[-1][caption] = name
                if name not in new and not self.store.shard_of(name):
                    missing.setdefault(name, (text, item.path))
        if missing:
            encoded = self.texts.encoder.encode_each([text for text, _ in missing.values()])
            for name, (text, path) in missing.items():
                one = encoded[text]
                if one.cut:
                    part.notes.append({"path": path, "note": self.texts.encoder.note_of(one)})
                new[name] = one.features[: one.tokens].clone()
        return named

    def places(self, names: Mapping[str, str]) -> dict[str, list[str | None]]:
        """Where a reader finds features: the shard and the name of each, by the captions' names."""
        return {caption: [self.store.shard_of(name), name] for caption, name in names.items()}


class Encoding:
    """Features of samples, added to a store. workers: threads that read and scale pictures while others
    are encoded. controls: where the pictures come from that steer."""

    def __init__(
        self,
        store: ShardStore,
        encoders: Encoders,
        settings: Settings,
        workers: int = 4,
        controls: Controls | None = None,
    ) -> None:
        self.store, self.encoders, self.settings = store, encoders, settings
        self.workers, self.controls = workers, controls
        self.captions = CaptionEncoding(store, encoders.texts)
        self.loader = Loader(
            settings,
            encoders.multiple,
            encoders.vae_identity,
            self._is_stored,
            controls,
        )

    def into(self, store: ShardStore) -> "Encoding":
        """The same for another store."""
        return Encoding(store, self.encoders, self.settings, self.workers, self.controls)

    def made_by(self) -> list[Any]:
        """All that features depend on, short of the samples."""
        encoders = self.encoders
        identities = [encoders.vae_identity, encoders.text_identity]
        controls = [self.controls.identity] if self.controls else []
        return [FORMAT, asdict(self.settings), identities, *controls]

    def encode(
        self,
        chunk: Sequence[Item],
        *,
        before_captions: Callable[[], None] = lambda: None,
        before_writing: Callable[[], None] = lambda: None,
    ) -> Part:
        """What becomes of each sample; what is new of it lies in the store afterwards. The calls may wait for
        what others add to the store: it is not encoded, or not kept, again."""
        part = Part()
        new: dict[str, Tensor] = {}
        pictures: list[Picture] = []
        # Threads read ahead, this one encodes in order: a shard has the same content in every run.
        for result in in_order(self.loader.load, chunk, self.workers):
            if isinstance(result, Picture):
                result = self._encode(result, new)
            if isinstance(result, Rejected):
                part.rejected.append(asdict(result))
            else:
                pictures.append(result)
        part.notes = [{"path": p.sample.path, "note": p.note} for p in pictures if p.note]
        before_captions()
        captions = self.captions.encode([picture.sample for picture in pictures], new, part)
        before_writing()
        new = {name: tensor for name, tensor in new.items() if self.store.shard_of(name) is None}
        if new:
            self.store.add(new)
        for picture, names in zip(pictures, captions, strict=True):
            part.samples.append(self._record(picture, names))
        return part

    def _encode(self, picture: Picture, new: dict[str, Tensor]) -> Picture | Rejected:
        """One picture at a time, so that its moments do not depend on its neighbours."""
        dtype = torch.float16 if self.settings.half else torch.float32
        path = picture.sample.path
        try:
            for name, pixels in self._wanted(picture):
                moments = self.encoders.vae.posterior(pixels[None])
                mean, std = (moment[0].to("cpu", dtype) for moment in moments)
                if not (mean.isfinite().all() and std.isfinite().all()):
                    return Rejected(path, "the VAE gives latents that are not finite")
                new[f"{name}.mean"], new[f"{name}.std"] = mean, std
        except ImageError as error:  # nothing can be made of it that steers
            return Rejected(path, str(error))
        control = picture.control and replace(picture.control, pixels=None)
        return replace(picture, pixels=None, control=control)

    def _wanted(self, picture: Picture) -> Iterator[tuple[str, Tensor]]:
        """Names and pixels of what is not in the store, of a picture and of what steers it."""
        control = picture.control
        if not self._is_stored(picture.name):
            assert picture.pixels is not None
            yield picture.name, picture.pixels
        if control is not None and not self._is_stored(control.name):
            pixels = control.pixels
            if pixels is None:
                assert self.controls is not None and picture.pixels is not None
                pixels = self.controls.made_of(picture.pixels)
            yield control.name, pixels

    def _record(self, picture: Picture, captions: dict[str, str]) -> dict[str, Any]:
        """An index's line: every feature with the shard that holds it."""
        shard_of = self.store.shard_of

        def moments(name: str) -> list[str | None]:
            return [shard_of(f"{name}.mean"), name]

        control = {"control": moments(picture.control.name)} if picture.control else {}
        return {
            "path": picture.sample.path,
            "size": picture.size,
            "bucket": picture.bucket,
            "image": moments(picture.name),
            "captions": self.captions.places(captions),
            **control,
        }

    def _is_stored(self, name: str) -> bool:
        """Whether the moments of a picture are."""
        return self.store.shard_of(f"{name}.mean") is not None


def open_encoders(
    pipeline: str | Path,
    *,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype | None = None,
    max_length: int | None = None,
    text_encoder: str | Path | None = None,
    text_memory: TextMemory = "auto",
) -> Encoders:
    """The VAE and the text encoder of a pipeline directory, a hub id, or "shapes". text_dtype: None
    is bf16 for a large one, else fp32. max_length: None is that of the pipeline's CLIP, or its family's.
    text_encoder, text_memory: a file of T5 and where its weights are, as `Pipeline.from_pretrained` has them."""
    texts = open_texts(
        pipeline,
        device=device,
        dtype=text_dtype,
        max_length=max_length,
        file=text_encoder,
        memory=text_memory,
    )
    directory = texts.encoder.directory
    vae = VAE.from_pretrained(directory, dtype=vae_dtype, device=device)
    # The VAE's own dtype: one that overflows in fp16 runs in fp32 whatever was asked for.
    return Encoders(
        vae=vae,
        text=texts.encoder,
        family=texts.family,
        vae_identity=f"{fingerprint(directory / 'vae')} {vae.dtype}",
        text_identity=texts.identity,
    )


def open_texts(
    pipeline: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    file: str | Path | None = None,
    memory: TextMemory = "auto",
) -> Texts:
    """The text encoder of a pipeline; the arguments are those of `open_encoders`."""
    found = None if file is None else find_text_encoder(file)
    directory = open_directory(pipeline, with_transformer=False, with_text_encoder=found is None)
    of_length: Family = "alpha" if max_length == MAX_LENGTH["alpha"] else "sigma"
    family = family_of(directory) or of_length
    if max_length is None:
        max_length = caption_length_of(directory) or MAX_LENGTH[family]
    dtype = dtype or default_text_dtype(directory, None, torch.float32, file=found)[0]
    # No cache of prompts: the features are kept here, and once is enough.
    encoder = TextEncoder.from_pretrained(
        directory, dtype=dtype, device=device, max_length=max_length, cache_dir=None,
        file=found, memory=memory,
    )  # fmt: skip
    weights = [fingerprint(directory / "text_encoder"), fingerprint(directory / "tokenizer")]
    if found is not None:
        config = directory / "text_encoder" / "config.json"
        weights[0] = fingerprint_files({"config": config, "file": found})
    identity = f"{' '.join(weights)} {dtype} {max_length}"
    return Texts(encoder, family, identity + (" lower case" if family == "alpha" else ""))
