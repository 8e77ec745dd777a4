"""Samples of a preference study for tests/fuzz/targets.py: its own files, and what voters send."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

STUDY, VOTER = "0123456789abcdef", "p" + "a" * 16
PAIRS = [
    {"id": f"{k:016x}", "prompt": f"a circle «{k}»", "left": f"{2 * k:032x}.jpg", "right": f"{2 * k + 1:032x}.jpg",
     "width": 64, "height": 64}
    for k in range(3)
]  # fmt: skip
ANSWERS = {"quality": "left", "alignment": "tie"}


def _study_files(folder: Path) -> None:
    pairs = {
        pair["id"]: {"left": "a", "right": "b", "prompt": "0", "category": "", "check": {}}
        for pair in PAIRS
    }
    study = {"version": 1, "study": STUDY, "pairs": PAIRS}
    key = {"version": 1, "study": STUDY, "secret": "0" * 64, "models": ["a", "b"], "pairs": pairs}
    (folder / "study.json").write_text(json.dumps(study), encoding="utf-8")
    (folder / "key.json").write_text(json.dumps(key), encoding="utf-8")


def make_study(folder: Path) -> Path:
    """All files that are read, with a vote taken back and a judgement."""
    _study_files(folder)
    pair, more = PAIRS[0]["id"], {"pair": PAIRS[1]["id"], "voter": VOTER}
    vote = {"pair": pair, "voter": VOTER, **ANSWERS, "ms": 900, "order": 1, "agent": "page desk"}
    votes = [vote, vote | more | {"order": 2}, more | {"undone": True, "order": 3}]
    judged = {"pair": pair, "order": "left-first", "model": "m", "prompt": "0" * 16, "quality": "first",
              "alignment": "tie", "reason": "so", "repaired": False}  # fmt: skip
    for name, lines in (("votes.jsonl", votes), ("judgements.jsonl", [judged])):
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def read_study_files(place: Path) -> object:
    from pixart.evaluation.preference.judgements import read_judgements, verdicts
    from pixart.evaluation.preference.study import read_key, read_study
    from pixart.evaluation.preference.votes import read_votes

    study = read_study(place)
    return read_key(study), read_votes(study), verdicts(read_judgements(study))


def make_saved(folder: Path) -> Path:
    votes = [
        {"pair": pair["id"], **ANSWERS, "ms": 900, "order": k, "agent": ""}
        for k, pair in enumerate(PAIRS, 1)
    ]
    values = {
        "format": "pixart-votes",
        "version": 1,
        "study": STUDY,
        "voter": VOTER,
        "votes": votes,
    }
    (folder / "votes.json").write_text(json.dumps(values), encoding="utf-8")
    return folder / "votes.json"


def read_saved_votes(place: Path) -> object:
    from pixart.evaluation.preference.adding import read_saved
    from pixart.evaluation.preference.study import Pair, Study

    pairs: list[Any] = [Pair(**pair) for pair in PAIRS]  # type: ignore[arg-type]
    return read_saved(place, Study(place.parent, STUDY, tuple(pairs)))


PREFERENCE: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "preference-study": (make_study, read_study_files),
    "preference-votes": (make_saved, read_saved_votes),
}
