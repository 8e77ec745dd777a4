"""Prompts to token ids, from a pipeline's `tokenizer/` folder and without transformers."""

import importlib.util
from pathlib import Path
from typing import Protocol

from pixart.files import AGAIN, CheckpointError


class Tokenizer(Protocol):
    """Text to token ids, end-of-text last and no padding, and back."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def tokenize(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[list[int], str]:
    """At most max_length ids, the last of them end-of-text, and the text that did not fit."""
    *body, end = tokenizer.encode(text)
    cut = body[max_length - 1 :]
    # A text that is cut ends like any other: T5 saw no text without its end.
    return body[: max_length - 1] + [end], tokenizer.decode(cut) if cut else ""


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read `tokenizer.json`, or the published `spiece.model`, without transformers.

    transformers 4 needs another class for either file, and transformers 5 needs protobuf to convert
    a spiece.model. The two small libraries under them do without and import in milliseconds.
    """
    if (directory / "tokenizer.json").is_file():
        return JsonTokenizer(directory / "tokenizer.json")
    if (directory / "spiece.model").is_file():
        return SentencePieceTokenizer(directory / "spiece.model")
    raise FileNotFoundError(f"{directory} must hold spiece.model or tokenizer.json, it has neither")


class SentencePieceTokenizer:
    """Reads spiece.model, as T5 is published."""

    def __init__(self, file: Path) -> None:
        if importlib.util.find_spec("sentencepiece") is None:
            raise ModuleNotFoundError(f"reading {file} needs: pip install sentencepiece")
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise _damaged(file, error) from error

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text) + [self._processor.eos_id()]

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)


class JsonTokenizer:
    """Reads tokenizer.json, as transformers converts it."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library in Rust raises nothing narrower
            raise _damaged(file, error) from error
        # The file keeps the settings of whoever saved it; limit and padding are the caller's.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        end = self._tokenizer.token_to_id("</s>")
        if end is None:
            raise CheckpointError(f"{file}: must define the token </s>, it does not")
        self._end: int = end

    def encode(self, text: str) -> list[int]:
        # Not every tokenizer.json adds the end by itself.
        return self._tokenizer.encode(text, add_special_tokens=False).ids + [self._end]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{file}: is damaged ({reason}); {AGAIN}")
