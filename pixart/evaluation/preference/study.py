"""A study on the disk: what voters may see, and the key to it.

study.json          pairs of pictures under names that say nothing, in an order that says nothing
pictures/NAME.jpg   each place of each pair has a name of its own: none comes twice
key.json            which model drew what, and which pairs are checks; never served
votes.jsonl         pixart.evaluation.preference.votes
judgements.jsonl    pixart.evaluation.preference.judging
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pixart.files import MAX_INDEX, listed, read_json, short

STUDY, KEY, VOTES, JUDGEMENTS = "study.json", "key.json", "votes.jsonl", "judgements.jsonl"
PICTURES = "pictures"
VERSION = 1
QUESTIONS = ("quality", "alignment")
SIDES = ("left", "right")
ANSWERS = (*SIDES, "tie")
NAME = re.compile(r"[0-9a-f]{32}\.jpg")
ID = re.compile(r"[0-9a-f]{16}")
MAX_SIDE = 2**16


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt. left, right: their files' names. width, height: pixels of both."""

    id: str
    prompt: str
    left: str
    right: str
    width: int
    height: int


@dataclass(frozen=True)
class Study:
    """What voters may see."""

    folder: Path
    id: str
    pairs: tuple[Pair, ...]

    @cached_property
    def by_id(self) -> Mapping[str, Pair]:
        return {pair.id: pair for pair in self.pairs}

    @cached_property
    def pictures(self) -> frozenset[str]:
        return frozenset(name for pair in self.pairs for name in (pair.left, pair.right))

    def picture(self, name: str) -> Path:
        return self.folder / PICTURES / name


@dataclass(frozen=True)
class Answer:
    """What is known of a pair. left, right: the models. prompt: its id. check: for an attention check, the
    right answer of each question that has one, empty for a pair that counts."""

    left: str
    right: str
    prompt: str
    category: str
    check: Mapping[str, str]


@dataclass(frozen=True)
class Key:
    """models: in the order of the command line. secret: hexadecimal; what file names and forms are made
    with."""

    models: tuple[str, ...]
    secret: str
    answers: Mapping[str, Answer]
    settings: Mapping[str, Any]


def read_study(folder: Path) -> Study:
    """ValueError for a folder that `build` has not made, or with what is no study in its file."""
    path = folder / STUDY
    if not path.is_file():
        raise ValueError(f"{folder}: must be a study, it has no {STUDY}; make one with build")
    values = read_json(path, MAX_INDEX)
    _check_version(path, values)
    if not _matches(ID, values.get("study")):
        raise ValueError(f"{path}: study must be 16 hexadecimal digits")
    given = values.get("pairs")
    if not isinstance(given, list) or not given:
        raise ValueError(f"{path}: pairs must be a list that is not empty")
    pairs = tuple(_pair(f"{path} pair {number}", one) for number, one in enumerate(given, 1))
    names = [name for pair in pairs for name in (pair.left, pair.right)]
    if len({pair.id for pair in pairs}) < len(pairs) or len(set(names)) < len(names):
        raise ValueError(f"{path}: ids of pairs and names of pictures must be unique")
    return Study(folder, values["study"], pairs)


def read_key(study: Study) -> Key:
    """ValueError for a key that is not there, or not this study's."""
    path = study.folder / KEY
    values = read_json(path, MAX_INDEX)
    _check_version(path, values)
    models, given, secret = values.get("models"), values.get("pairs"), values.get("secret")
    is_list = isinstance(models, list) and all(isinstance(one, str) and one for one in models)
    if not is_list or len(set(models)) < len(models) or len(models) < 2:  # type: ignore[arg-type]
        raise ValueError(f"{path}: models must be two names at least, all different")
    if values.get("study") != study.id or not isinstance(given, dict):
        raise ValueError(f"{path}: must be the key of study {study.id}, it is of another")
    if set(given) != set(study.by_id):
        raise ValueError(f"{path}: must know the pairs of {STUDY}, it knows others")
    if not isinstance(secret, str) or not re.fullmatch(r"[0-9a-f]{64}", secret):
        raise ValueError(f"{path}: secret must be 64 hexadecimal digits")
    answers = {
        pair: _answer(f"{path} pair {pair}", one, models)  # type: ignore[arg-type]
        for pair, one in given.items()
    }
    settings = values.get("settings")
    return Key(
        tuple(models),  # type: ignore[arg-type]
        secret,
        answers,
        settings if isinstance(settings, dict) else {},
    )


def _check_version(path: Path, values: Mapping[str, Any]) -> None:
    if values.get("version") != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {short(values.get('version'))}")


def _pair(place: str, values: Any) -> Pair:
    if not isinstance(values, dict):
        raise ValueError(f"{place}: must be an object")
    sizes = [values.get(name) for name in ("width", "height")]
    if not _matches(ID, values.get("id")):
        raise ValueError(f"{place}: id must be 16 hexadecimal digits")
    if not all(_matches(NAME, values.get(side)) for side in SIDES):
        raise ValueError(f"{place}: left and right must be names of pictures")
    if not isinstance(values.get("prompt"), str):
        raise ValueError(f"{place}: prompt must be text")
    if not all(type(size) is int and 0 < size <= MAX_SIDE for size in sizes):
        raise ValueError(f"{place}: width and height must be pixels")
    return Pair(values["id"], values["prompt"], values["left"], values["right"], *sizes)  # type: ignore[arg-type]


def _answer(place: str, values: Any, models: list[str]) -> Answer:
    if not isinstance(values, dict) or not all(values.get(side) in models for side in SIDES):
        raise ValueError(f"{place}: left and right must be models of the study")
    if not all(isinstance(values.get(name), str) for name in ("prompt", "category")):
        raise ValueError(f"{place}: prompt and category must be text")
    check = values.get("check")
    if not isinstance(check, dict) or not all(
        question in QUESTIONS and answer in ANSWERS for question, answer in check.items()
    ):
        raise ValueError(f"{place}: check must give answers to questions")
    return Answer(values["left"], values["right"], values["prompt"], values["category"], check)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def check_pictures(study: Study) -> None:
    """ValueError if one of the pictures is not there any more."""
    missing = sorted(name for name in study.pictures if not study.picture(name).is_file())
    if missing:
        raise ValueError(
            f"{study.folder / PICTURES}: must have all pictures of the study, {len(missing)} are "
            f"missing: {listed(missing)}"
        )
