"""`prompts`: features of prompts alone, without pictures, for training that needs none.

In one directory:

    features/*.safetensors   NAME of captions, (L, D), as `prepare` writes them
    prompts.json             what the directory is, and which prompt has which features
    report.json              what is there twice, and what was rejected or cut
    work/                    who does what while it is done

The work is shared, and goes on where it was stopped, as that of `prepare` (pixart.dataset.chunks).
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from torch import Tensor

from pixart.dataset.chunks import Chunks, Work, open_chunk_worker
from pixart.dataset.encoding import CaptionEncoding, Texts
from pixart.dataset.features import FORMAT, HOLDS, PROMPTS, ShardStore
from pixart.dataset.parts import Part
from pixart.dataset.samples import (
    MAX_CAPTION,
    PROMPT,
    CaptionError,
    Prompt,
    Rejected,
    captions_of,
    text_of,
)
from pixart.files import check_text, digest, parse_json, write_json

if TYPE_CHECKING:
    from pixart.dataset.options import Prompts

CHUNK = 256  # prompts: a T5 that is streamed is read once for all of them
SHOWN = 20  # places of duplicates that a report names


class PromptFile:
    """The prompts of a file, each text once: of a .txt one a line, of a .jsonl the captions of an object a
    line, named as in an index of pictures. In .txt a line that begins with `#` is none, unless `\\#` spells it, as
    for `generate --prompts`. It is read from the start each time, and never held: only a digest of each text is.

    empty, duplicates: how many lines without a prompt, or with those of an earlier line, the last reading
    passed over. ValueError for what is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_text = path.suffix.lower() == ".txt"
        if not (self.is_text or path.suffix.lower() == ".jsonl"):
            raise ValueError(
                f"FILE must be .txt, a prompt a line, or .jsonl, an object a line, got {path}"
            )
        if not path.is_file():
            what = "it is no file" if path.exists() else "there is none"
            raise ValueError(f"FILE must be a file of prompts, got {path}: {what}")
        self._forget()

    def _forget(self) -> None:
        self.empty, self.duplicates, self.places = 0, 0, list[str]()

    def check(self) -> None:
        """ValueError for a file without a single prompt. Reads no further than the first."""
        first: Rejected | None = None
        for item in self:
            if isinstance(item, Prompt):
                return
            first = first or item
        why = f": {first.path}: {first.reason}" if first else ""
        raise ValueError(f"{self.path} must hold at least one prompt, it holds none{why}")

    def __iter__(self) -> Iterator[Prompt | Rejected]:
        self._forget()
        seen: set[str] = set()
        with self.path.open("rb") as file:
            for number, line in _lines(file):
                item = self._item(f"line {number}", line)
                if item is None:
                    self.empty += 1
                elif isinstance(item, Prompt) and (key := _key(item)) in seen:
                    self.duplicates += 1
                    self.places += [item.path] if len(self.places) < SHOWN else []
                else:
                    seen |= {key} if isinstance(item, Prompt) else set()
                    yield item

    def _item(self, place: str, line: bytes) -> Prompt | Rejected | None:
        if len(line) > MAX_CAPTION:
            return Rejected(place, f"a line must be at most {MAX_CAPTION:,} bytes, it is longer")
        try:
            text = text_of(line)
            if not text or (self.is_text and text[0] == "#"):
                return None
            if "\0" in text:  # every second byte of UTF-16
                raise CaptionError("caption must be UTF-8 text, it has a zero byte")
            captions = {PROMPT: text.removeprefix("\\") if text.startswith("\\#") else text}
            if not self.is_text:
                captions = _captions_in(text)
            for name, caption in captions.items():
                check_text("name of a caption", name)
                check_text(f"caption {name}", caption)
        except ValueError as error:  # CaptionError too
            return Rejected(place, str(error))
        return Prompt(place, captions)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines; of one that is too long so much that this can be seen."""
    number = 1
    while line := file.readline(MAX_CAPTION + 1):
        yield number, line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_CAPTION)
        number += 1


def _captions_in(line: str) -> dict[str, str]:
    values = parse_json(line, "a line")
    if not isinstance(values, dict):
        raise CaptionError("a line must be an object with a prompt")
    captions = captions_of(values)
    if not captions:
        raise CaptionError("must have a prompt that is not empty")
    return captions


def _key(prompt: Prompt) -> str:
    return digest(repr(sorted(prompt.captions.items())).encode())


class PromptEncoding:
    """Features of prompts, added to a store."""

    def __init__(self, store: ShardStore, texts: Texts) -> None:
        self.store, self.texts = store, texts
        self._captions = CaptionEncoding(store, texts)

    def into(self, store: ShardStore) -> "PromptEncoding":
        """The same for another store."""
        return PromptEncoding(store, self.texts)

    def made_by(self) -> list[Any]:
        """All that features depend on, short of the prompts."""
        return [FORMAT, HOLDS, self.texts.identity]

    def encode(
        self,
        chunk: Iterable[Prompt | Rejected],
        *,
        before_captions: Any = lambda: None,
        before_writing: Any = lambda: None,
    ) -> Part:
        """As of `pixart.dataset.encoding.Encoding`."""
        items = list(chunk)
        rejected = [item for item in items if isinstance(item, Rejected)]
        prompts = [item for item in items if isinstance(item, Prompt)]
        part = Part(rejected=[{"path": one.path, "reason": one.reason} for one in rejected])
        new: dict[str, Tensor] = {}
        before_captions()
        named = self._captions.encode(prompts, new, part)
        before_writing()
        new = {name: tensor for name, tensor in new.items() if self.store.shard_of(name) is None}
        if new:
            self.store.add(new)
        part.samples = [
            {"path": prompt.path, "captions": self._captions.places(names)}
            for prompt, names in zip(prompts, named, strict=True)
        ]
        return part


class PromptPreparation(Chunks):
    """The features of a file of prompts in `directory`; see the module. `run` takes the file and returns the
    report. ValueError for a directory of prepared pictures, which has samples of another kind."""

    label = "prompts"
    at_once = CHUNK

    def __init__(self, directory: Path, texts: Texts, file: PromptFile) -> None:
        if any(directory.glob("index-*.json")):
            raise ValueError(
                f"OUTPUT must be a folder of its own, {directory} holds prepared pictures"
            )
        encoding = PromptEncoding(ShardStore(directory / "features"), texts)
        conflict = "encoding other prompts, or with other settings"
        super().__init__(directory, encoding, CHUNK, "prompts", conflict)
        self.texts, self.file = texts, file

    def takes_together(self) -> bool:
        """A T5 that is streamed is read for all of a chunk."""
        return len(self.texts.encoder.passes(["a", "b"])) == 1

    def finish(self, parts: list[str]) -> dict[str, Any]:
        merged = self.merged(parts)
        if not merged.samples:
            raise ValueError(f"{self.file.path} must hold at least one prompt, it holds none")
        report = {
            "prompts": len(merged.samples),
            "duplicates": {"count": self.file.duplicates, "first": self.file.places},
            "empty": self.file.empty,
            "rejected": merged.rejected,
            "notes": merged.notes,
        }
        write_json(self.report, report, indent=1)
        index = {
            "format": FORMAT,
            "holds": HOLDS,
            "file": os.path.abspath(self.file.path),
            "text": {"identity": self.texts.identity, "family": self.texts.family},
            "parts": parts,
            "samples": merged.samples,
        }
        write_json(self.directory / PROMPTS, index)
        return report


def open_prompts(options: "Prompts") -> PromptPreparation:
    """What a command line asks for. Raises what opening its model raises."""
    import torch

    from pixart.dataset.encoding import open_texts
    from pixart.device import choose_device

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    texts = open_texts(
        options.model,
        device=choose_device(options.device),
        dtype=dtypes[options.text_dtype] if options.text_dtype else None,
        max_length=options.max_length,
        file=options.text_encoder,
        memory=options.text_encoder_memory,
    )
    return PromptPreparation(options.output, texts, PromptFile(options.file))


def open_prompt_worker(options: "Prompts", made_by: list[Any], claim: Path) -> Work:
    """What does chunks of `options` in a process of any machine; see `open_chunk_worker`."""
    return open_chunk_worker(
        partial(open_prompts, options), options.output, options.model, made_by, claim
    )


def summary(report: Mapping[str, Any], where: str) -> str:
    """What was encoded and what was not, in a sentence. where: the report's file."""
    passed = [
        f"{count:,} {what}"
        for count, what in (
            (report["duplicates"]["count"], "said before"),
            (report["empty"], "empty or comments"),
        )
        if count
    ]
    said = f"{report['prompts']:,} prompts encoded, {len(report['rejected']):,} rejected"
    said += f", {len(report['notes']):,} cut" if report["notes"] else ""
    said += f"; lines passed over: {', '.join(passed)}" if passed else ""
    return f"{said}; see {where}"
