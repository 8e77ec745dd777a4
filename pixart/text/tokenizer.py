"""Prompts to token ids, from a pipeline's `tokenizer/` folder and without transformers."""

import importlib.util
from pathlib import Path
from typing import Any, Literal, Protocol

from pixart.files import AGAIN, CheckpointError, read_json

START, END = "<|startoftext|>", "<|endoftext|>"  # of CLIP
# Words with the space before them, contractions and single digits, as CLIP was trained.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer(Protocol):
    """Text to token ids, end-of-text last and no padding, and back. padding: the token that pads."""

    @property
    def padding(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


def tokenize(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[list[int], str]:
    """At most max_length ids, the last of them end-of-text, and the text that did not fit."""
    *body, end = tokenizer.encode(text)
    cut = body[max_length - 1 :]
    # A text that is cut ends like any other: T5 saw no text without its end.
    return body[: max_length - 1] + [end], tokenizer.decode(cut) if cut else ""


def load_tokenizer(directory: Path, kind: Literal["t5", "clip"] = "t5") -> Tokenizer:
    """Read `tokenizer.json`, or the published `spiece.model` of T5 or `vocab.json` and `merges.txt` of a
    CLIP, without transformers.

    transformers 4 needs another class for either file, and transformers 5 needs protobuf to convert
    a spiece.model. The two small libraries under them do without and import in milliseconds.
    """
    if kind == "clip":
        return _load_clip_tokenizer(directory)
    if (directory / "tokenizer.json").is_file():
        return JsonTokenizer(directory / "tokenizer.json")
    if (directory / "spiece.model").is_file():
        return SentencePieceTokenizer(directory / "spiece.model")
    raise FileNotFoundError(f"{directory} must hold spiece.model or tokenizer.json, it has neither")


def _load_clip_tokenizer(directory: Path) -> "ClipTokenizer":
    whole, parts = (
        directory / "tokenizer.json",
        (directory / "vocab.json", directory / "merges.txt"),
    )
    if not whole.is_file() and not all(part.is_file() for part in parts):
        raise FileNotFoundError(
            f"{directory} must hold vocab.json and merges.txt, or tokenizer.json, of a CLIP; it has neither"
        )
    file = whole if whole.is_file() else parts[0]
    try:
        if whole.is_file():
            from tokenizers import Tokenizer as FastTokenizer

            tokenizer: Any = FastTokenizer.from_file(str(whole))
        else:
            tokenizer = _byte_pairs(*parts)
    except Exception as error:  # the library in Rust raises nothing narrower
        raise _damaged(file, error) from error
    return ClipTokenizer(file, tokenizer, _padding_token(directory))


def _byte_pairs(vocabulary: Path, merges: Path) -> Any:
    """What transformers makes of the two files of a CLIP: text in lower case, words apart, bytes merged."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as FastTokenizer

    model: Any = models.BPE.from_file(
        str(vocabulary), str(merges), end_of_word_suffix="</w>", unk_token=END
    )
    tokenizer: Any = FastTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _padding_token(directory: Path) -> str:
    """What pads: "!", token 0, in Stable Diffusion 2, whose special_tokens_map.json says so; else the end of
    the text, as in other CLIPs. A "!" of the prompt stays a word, as in OpenCLIP's own code and Stable
    Diffusion 2's; transformers takes it for padding."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = directory / name
        token = read_json(file).get("pad_token") if file.is_file() else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return END


class ClipTokenizer:
    """A CLIP's: the start of the text first, words of bytes in lower case, the end last."""

    def __init__(self, file: Path, tokenizer: Any, padding: str) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = {token: tokenizer.token_to_id(token) for token in (START, END, padding)}
        if absent := [token for token, number in ids.items() if number is None]:
            raise CheckpointError(f"{file}: must define the token {absent[0]}, it does not")
        self._tokenizer.add_special_tokens([START, END])  # one token each where a text has them
        self._start, self._end, self.padding = ids[START], ids[END], ids[padding]

    def encode(self, text: str) -> list[int]:
        body: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._start, *body, self._end]

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text.replace("</w>", " ").strip()


class SentencePieceTokenizer:
    """Reads spiece.model, as T5 is published."""

    padding = 0

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

    padding = 0

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
