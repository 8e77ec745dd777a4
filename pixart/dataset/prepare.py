"""`prepare`: pictures and captions to VAE moments and text features, once, on disk.

What cannot be used is quarantined: it is left out, listed in report.json with its resolution and
reason, and the work goes on.

The source is cut into chunks of 64 samples. Any number of processes may run the same command: each
takes the chunks that no other has taken, and all end when everything is done. A chunk that is done
is a file in work/, named by a digest of its samples and the settings, so that the same command does
again only what was not finished, or what has changed since. One that would prepare the same resolution
from something else or otherwise is refused meanwhile.
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pixart.config import MAX_LENGTH, Family
from pixart.dataset.annotations import in_order
from pixart.dataset.controls import Controls
from pixart.dataset.features import FORMAT, ShardStore, features_of
from pixart.dataset.images import ImageError
from pixart.dataset.loading import Loader, Picture, Settings
from pixart.dataset.parts import Part, merged_reports, read_part, write_part, write_report
from pixart.dataset.samples import Item, Rejected, Sample
from pixart.files import digest, fingerprint, write_json
from pixart.locks import claimed, occupied
from pixart.pipeline.captions import as_trained
from pixart.pipeline.directory import caption_length_of, family_of, open_directory
from pixart.pipeline.directory import text_dtype as default_text_dtype
from pixart.progress import counted
from pixart.text.encoder import TextEncoder
from pixart.vae.autoencoder import VAE

CHUNK = 64


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


class Preparation:
    """The features of a source in `directory`; see the module. workers: threads that read and
    scale pictures while others are encoded. controls: where the pictures come from that steer."""

    def __init__(
        self,
        directory: Path,
        encoders: Encoders,
        settings: Settings,
        workers: int = 4,
        controls: Controls | None = None,
    ) -> None:
        if settings.resolution < 1 or settings.resolution % encoders.multiple:
            raise ValueError(
                f"resolution must be a multiple of {encoders.multiple}, got {settings.resolution}"
            )
        if not settings.max_ratio >= 1:
            raise ValueError(f"max_ratio must be at least 1, got {settings.max_ratio}")
        if settings.min_side is not None and settings.min_side < 1:
            raise ValueError(f"min_side must be at least 1, got {settings.min_side}")
        self.directory, self.encoders, self.settings = directory, encoders, settings
        self.workers, self.controls = workers, controls
        self.store = ShardStore(directory / "features")
        self.loader = Loader(
            settings,
            encoders.multiple,
            encoders.vae_identity,
            self._is_stored,
            controls,
        )
        self.work = directory / "work"
        self.report = directory / "report.json"

    def run(self, source: Callable[[], Iterable[Item]], origin: str = "") -> dict[str, Any]:
        """Prepare what `source()` gives, which is called again if other processes are at work. origin:
        what it reads and how, the same in processes that share the work.

        Returns this resolution's report. Raises ValueError if there is nothing in the source, and
        Occupied while another process prepares something else for this resolution: an index would
        be written over the other.
        """
        resolution = self.settings.resolution
        what = json.dumps([*self._made_by(), origin], sort_keys=True)
        work = f"preparing other data or with other settings at {resolution} px"
        with occupied(self.work / str(resolution), work, shared=digest(what.encode())):
            return self._run(source)

    def parts(self, source: Iterable[Item]) -> list[str]:
        """The names of the chunks' files: they change with the samples, and with what encodes them."""
        return [self._part_file(chunk).name for chunk in _chunks(source)]

    def _run(self, source: Callable[[], Iterable[Item]]) -> dict[str, Any]:
        parts: list[Path] = []
        # First what nobody has begun; then wait for what others are doing. Where one of them dies
        # its lock opens, and the chunk is done here.
        for wait in (False, True):
            parts = []
            for chunk in _chunks(counted(source(), "prepare")):
                parts.append(self._part_file(chunk))
                self._do(chunk, parts[-1], wait)
            if all(part.exists() for part in parts):
                break
        if not parts:
            raise ValueError("source must hold at least one picture or caption, it holds none")
        return self._finish(parts)

    def _do(self, chunk: list[Item], file: Path, wait: bool) -> None:
        if self._is_done(file):
            return
        lock = file.with_suffix(".lock")
        with claimed(lock, wait=wait) as mine:
            # Asked again: it may have been done while this process waited for the lock.
            if mine and not self._is_done(file):
                # Others may have encoded captions that this chunk shares.
                self.store.refresh()
                write_part(file, self._prepare(chunk))
        if mine:
            # Safe although others may hold the removed file locked and a new one at the same time:
            # both find the chunk done. Windows removes no file that is open elsewhere.
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)

    def _is_done(self, file: Path) -> bool:
        """Whether a chunk was prepared, and nobody has deleted its features since."""
        part = read_part(file)
        if part is None:
            return False
        shards = {shard for sample in part.samples for shard, _ in features_of(sample)}
        return all((self.store.folder / shard).exists() for shard in shards)

    def _is_stored(self, name: str) -> bool:
        """Whether the moments of a picture are."""
        return self.store.shard_of(f"{name}.mean") is not None

    def _made_by(self) -> list[Any]:
        """All that features depend on, short of the samples."""
        encoders = self.encoders
        identities = [encoders.vae_identity, encoders.text_identity]
        controls = [self.controls.identity] if self.controls else []
        return [FORMAT, asdict(self.settings), identities, *controls]

    def _part_file(self, chunk: list[Item]) -> Path:
        """Named by all that the chunk's features depend on, short of the pictures' bytes."""
        content = [_told(item) for item in chunk]
        key = json.dumps([*self._made_by(), content], sort_keys=True)
        return self.work / f"{digest(key.encode())}.json"

    def _prepare(self, chunk: list[Item]) -> Part:
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
        captions = [self._captions(picture.sample, new, part) for picture in pictures]
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

    def _captions(self, sample: Sample, new: dict[str, Tensor], part: Part) -> dict[str, str]:
        """The names of the captions' features; a caption that was cut is noted in the report."""
        names = {}
        for caption, written in sample.captions.items():
            text = as_trained(written, self.encoders.family)
            names[caption] = name = digest(f"{self.encoders.text_identity}\n{text}".encode())
            if name in new or self.store.shard_of(name):
                continue
            with warnings.catch_warnings(record=True) as caught:
                # By default the same words are shown once, and later samples would have no note.
                warnings.simplefilter("always")
                encoded = self.encoders.text.encode([text])
            part.notes += [{"path": sample.path, "note": str(w.message)} for w in caught]
            new[name] = encoded.features[0, encoded.mask[0]].cpu()
        return names

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
            "captions": {key: [shard_of(name), name] for key, name in captions.items()},
            **control,
        }

    def _finish(self, parts: list[Path]) -> dict[str, Any]:
        merged = Part()
        for file in parts:
            part = read_part(file)
            if part is None:
                raise RuntimeError(f"{file} was damaged meanwhile; run prepare again")
            merged.samples += part.samples
            merged.rejected += part.rejected
            merged.notes += part.notes
        vae = {
            "identity": self.encoders.vae_identity,
            "scaling_factor": self.encoders.vae.scaling_factor,
        }
        index = {
            "format": FORMAT,
            **asdict(self.settings),
            "vae": vae,
            "text": {"identity": self.encoders.text_identity},
            **({"control": self.controls.identity} if self.controls else {}),
            "parts": [file.name for file in parts],
            "samples": merged.samples,
        }
        report = {
            "prepared": len(merged.samples),
            "rejected": merged.rejected,
            "notes": merged.notes,
        }
        write_json(self.directory / f"index-{self.settings.resolution}.json", index)
        write_report(self.work, self.settings.resolution, report)
        self._merge_reports()
        return report

    def _merge_reports(self) -> None:
        """report.json from every resolution's own, again until nobody has added to them meanwhile:
        of processes that end together, the last to write it has then seen what all have found."""
        written, merged = None, merged_reports(self.work)
        while merged != written:
            write_json(self.report, merged, indent=1)
            written, merged = merged, merged_reports(self.work)


def open_encoders(
    pipeline: str | Path,
    *,
    device: torch.device | str = "cpu",
    vae_dtype: torch.dtype = torch.float32,
    text_dtype: torch.dtype | None = None,
    max_length: int | None = None,
) -> Encoders:
    """The VAE and the text encoder of a pipeline directory, a hub id, or "shapes". text_dtype: None
    is bf16 for a large one, else fp32. max_length: None is that of the pipeline's CLIP, or its family's."""
    directory = open_directory(pipeline, with_transformer=False)
    of_length: Family = "alpha" if max_length == MAX_LENGTH["alpha"] else "sigma"
    family = family_of(directory) or of_length
    if max_length is None:
        max_length = caption_length_of(directory) or MAX_LENGTH[family]
    text_dtype = text_dtype or default_text_dtype(directory, None, torch.float32)[0]
    vae = VAE.from_pretrained(directory, dtype=vae_dtype, device=device)
    # No cache of prompts: the features are kept here, and once is enough.
    text = TextEncoder.from_pretrained(
        directory, dtype=text_dtype, device=device, max_length=max_length, cache_dir=None
    )
    weights = [fingerprint(directory / name) for name in ("text_encoder", "tokenizer")]
    text_identity = f"{' '.join(weights)} {text_dtype} {max_length}"
    # The VAE's own dtype: one that overflows in fp16 runs in fp32 whatever was asked for.
    return Encoders(
        vae=vae,
        text=text,
        family=family,
        vae_identity=f"{fingerprint(directory / 'vae')} {vae.dtype}",
        text_identity=text_identity + (" lower case" if family == "alpha" else ""),
    )


def _told(item: Item) -> list[Any]:
    """What tells an item from others, short of the pictures' bytes."""
    if isinstance(item, Rejected):
        return [asdict(item)]
    told = [item.path, item.version, dict(item.captions), item.uncaptioned]
    return told if item.control is None else [*told, item.control.path, item.control.version]


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk
