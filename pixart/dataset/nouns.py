"""The nouns of captions, by which data sets are compared: a door to what finds them.

spacy:MODEL       what a pipeline of spaCy tags as NOUN or PROPN, by its lemma in lower case
words:FILE        the words of a list: a noun a line, its other forms behind commas ("mouse, mice")
MODULE:FUNCTION   a function of yours, from a caption to its nouns, each as often as it is named
shapes            the nouns of the embedded world's grammar, exactly
"""

import importlib
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pixart.dataset.scoring import load_function
from pixart.files import MAX_INDEX, printable, read_bounded, short

FORMS = "spacy:MODEL, words:FILE, MODULE:FUNCTION or shapes"
MAX_NOUN = 100  # characters: what is longer is none, and would only fill the memory
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")

# From captions to the nouns of each, in their order and each as often as it is named.
Nouns = Callable[[Sequence[str]], list[list[str]]]


def open_nouns(name: str) -> Nouns:
    """What finds nouns, by one of the FORMS. Raises ValueError, which says how to install what is missing."""
    kind, colon, value = name.partition(":")
    if name == "shapes":
        from pixart.shapes.caption import nouns_of

        return lambda captions: [nouns_of(caption) for caption in captions]
    if not (colon and kind and value):
        raise ValueError(f"nouns must be {FORMS}, got {name!r}")
    if kind == "spacy":
        return _of_spacy(value)
    if kind == "words":
        return _of_words(Path(value).expanduser())
    return _of_function(name)


def _of_spacy(model: str) -> Nouns:
    install = f"pip install spacy && python -m spacy download {model}"
    try:
        spacy: Any = importlib.import_module("spacy")
    except ImportError as error:
        raise ValueError(
            f"nouns by spacy:{model} need spaCy, which is not here: {install}"
        ) from error
    try:
        # Neither is asked for, and they take most of the time.
        pipeline = spacy.load(model, exclude=["parser", "ner"])
    except (OSError, ImportError, ValueError) as error:
        reason = printable(" ".join(str(error).split()), 160)
        raise ValueError(
            f"nouns by spacy:{model} need that model of spaCy ({reason}): {install}"
        ) from error
    parts = set(pipeline.pipe_names)
    if "lemmatizer" not in parts or not parts & {"tagger", "morphologizer"}:
        raise ValueError(
            f"nouns by spacy:{model} need a tagger and a lemmatizer, it has "
            f"{', '.join(sorted(parts)) or 'neither'}; give a pipeline such as en_core_web_sm"
        )
    return lambda captions: [
        _kept(
            word.lemma_.lower()
            for word in document
            if word.pos_ in ("NOUN", "PROPN") and any(map(str.isalpha, word.text))
        )
        for document in pipeline.pipe(captions)
    ]


def _of_words(file: Path) -> Nouns:
    nouns = _listed(file)

    def find(caption: str) -> list[str]:
        words = _WORD.findall(unicodedata.normalize("NFC", caption).lower())
        return [nouns[word] for word in words if word in nouns]

    return lambda captions: [find(caption) for caption in captions]


def _listed(file: Path) -> dict[str, str]:
    """From each form in a list to its noun."""
    try:
        lines = read_bounded(file, MAX_INDEX).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ValueError(f"nouns must be listed in a file, {file} is none") from None
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8, byte {error.start} is not") from error
    nouns: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = unicodedata.normalize("NFC", line.partition("#")[0]).lower()
        forms = [form.strip() for form in line.split(",") if form.strip()]
        for form in forms:
            if not _WORD.fullmatch(form):
                raise ValueError(
                    f"{file}:{number} must be a noun and its forms with commas between, each one word, "
                    f"got {form!r}"
                )
            if nouns.setdefault(form, forms[0]) != forms[0]:
                raise ValueError(
                    f"{file}:{number} must not give {form!r} to {forms[0]!r}, it is a form of "
                    f"{nouns[form]!r}"
                )
    if not nouns:
        raise ValueError(f"{file} must list nouns, it lists none")
    return nouns


def _of_function(name: str) -> Nouns:
    function = load_function(name, "nouns")

    def find(caption: str) -> list[str]:
        try:
            found = function(caption)
            if isinstance(found, str):
                raise TypeError("it must give a list of nouns, it gives text")
            return _kept(str(noun) for noun in found)
        except (Exception, SystemExit) as error:  # a function of the user's may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"nouns: {name} fails over {short(caption)!r} ({reason})") from error

    return lambda captions: [find(caption) for caption in captions]


def _kept(nouns: Any) -> list[str]:
    return [noun for noun in nouns if 0 < len(noun) <= MAX_NOUN]
