"""Parts: found again, shared, mended, and the same whatever was stopped."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixart.evaluation.metric import Score
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.evaluation.store.parts import (
    FeatureStore,
    Filling,
    ScoreStore,
    Store,
    identity_of,
)

Batch = list[Entry]
BATCH = 4


def _entries(count: int) -> list[Entry]:
    return [Entry(Prompt(f"{k:05d}", "p"), 0, Path("x")) for k in range(count)]


class Scorer:
    """Scores an entry by its number; notes the batches that it got. stop: raised before that batch."""

    def __init__(self, stop: int | None = None) -> None:
        self.batches: list[list[str]] = []
        self.stop = stop

    def __call__(self, batches: Iterator[Batch]) -> Iterator[list[Any]]:
        for batch in batches:
            if len(self.batches) == self.stop:
                raise KeyboardInterrupt
            self.batches.append([entry.prompt.id for entry in batch])
            yield [Score(int(entry.prompt.id) / 7, {"x": 0.1}) for entry in batch]


def _fill(
    store: Store, entries: list[Entry], scorer: Any, identities: dict[str, str] | None = None
) -> Filling:
    there = {entry.key: "p" for entry in entries} if identities is None else identities
    filling = Filling(store, entries, there, BATCH)
    filling.run(scorer, "test")
    return filling


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.evaluation.store.parts.PART", 12)


def test_what_is_there_is_not_done_again(tmp_path: Path) -> None:
    store, entries = ScoreStore(tmp_path), _entries(30)
    first = Scorer()
    rows = list(_fill(store, entries, first).rows())
    assert [row.key for row in rows] == [entry.key for entry in entries]
    assert [row.value.value for row in rows] == [k / 7 for k in range(30)]
    assert sorted(path.name for path in tmp_path.glob("part-*")) == [
        "part-00000.jsonl", "part-00001.jsonl", "part-00002.jsonl",
    ]  # fmt: skip
    again = Scorer()
    assert list(_fill(store, entries, again).rows()) == rows and not again.batches


def test_what_is_stopped_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    entries = _entries(30)
    whole = Scorer()
    _fill(ScoreStore(tmp_path / "a"), entries, whole)
    store = ScoreStore(tmp_path / "b")
    stopped, rest = Scorer(stop=5), Scorer()
    with pytest.raises(KeyboardInterrupt):
        _fill(store, entries, stopped)
    _fill(store, entries, rest)
    assert stopped.batches + rest.batches == whole.batches
    for path in (tmp_path / "a").glob("part-*"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_picture_that_changed_is_scored_again_with_its_batch(tmp_path: Path) -> None:
    store, entries = ScoreStore(tmp_path), _entries(9)
    _fill(store, entries, Scorer())
    changed, identities = Scorer(), {entry.key: "p" for entry in entries}
    identities[entries[5].key] = "other"
    _fill(store, entries, changed, identities)
    assert changed.batches == [["00004", "00005", "00006", "00007"]]


def test_a_missing_picture_moves_no_other_to_another_batch(tmp_path: Path) -> None:
    store, entries, scorer = ScoreStore(tmp_path), _entries(9), Scorer()
    there = {entry.key: "p" for entry in entries if entry.prompt.id != "00001"}
    filling = _fill(store, entries, scorer, there)
    assert [batch[0] for batch in scorer.batches] == ["00000", "00004", "00008"]
    assert len(list(filling.rows())) == 8
    rest = Scorer()
    _fill(store, entries, rest)
    assert rest.batches == [["00000", "00001", "00002", "00003"]]


def test_parts_of_pictures_that_are_no_more_are_taken_away(tmp_path: Path) -> None:
    store = ScoreStore(tmp_path)
    _fill(store, _entries(30), Scorer())
    _fill(store, _entries(13), Scorer())
    assert len(list(tmp_path.glob("part-*"))) == 2


@pytest.mark.parametrize("kind", [ScoreStore, FeatureStore])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "junk"])
def test_damaged_parts_are_found_and_made_again(
    tmp_path: Path, kind: type[Store], damage: str, capsys: Any
) -> None:
    store, entries = kind(tmp_path), _entries(9)

    def compute(batches: Iterator[Batch]) -> Iterator[list[Any]]:
        for batch in batches:
            values = [float(entry.prompt.id) + 1.5 for entry in batch]
            yield [
                Score(one) if kind is ScoreStore else np.full(3, one, np.float32) for one in values
            ]

    before = [str(row) for row in _fill(store, entries, compute).rows()]
    path = store.path(0)
    content = path.read_bytes()
    if damage == "flip":
        place = content.rindex(b"9.5") if kind is ScoreStore else len(content) - 3
        flipped = b"8" if kind is ScoreStore else bytes([content[place] ^ 1])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
    else:
        path.write_bytes({"cut": content[:-20], "empty": b"\x00", "junk": b"{}\n"}[damage])
    assert [str(row) for row in _fill(store, entries, compute).rows()] == before
    assert "is damaged and made again" in capsys.readouterr().err


def test_features_keep_their_bits_and_errors_their_reasons(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {f"{k:05d}": rng.normal(size=(2, 5)).astype(np.float32) for k in range(9)}
    error = ValueError("x.png: cannot be read")

    def compute(batches: Iterator[Batch]) -> Iterator[list[Any]]:
        for batch in batches:
            yield [error if e.prompt.id == "00003" else values[e.prompt.id] for e in batch]

    rows = list(_fill(FeatureStore(tmp_path), _entries(9), compute).rows())
    assert [row.error for row in rows if row.error] == ["x.png: cannot be read"]
    for row in rows:
        if not row.error:
            assert np.array_equal(row.value, values[row.key[:5]])


def test_a_score_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    def compute(batches: Iterator[Batch]) -> Iterator[list[Any]]:
        for batch in batches:
            yield [Score(float("nan")) for _ in batch]

    [row] = _fill(ScoreStore(tmp_path), _entries(1), compute).rows()
    assert row.value is None and "must be finite, got nan" in row.error


def test_several_at_once_share_the_work_and_each_batch_is_done_once(tmp_path: Path) -> None:
    entries, scorers = _entries(60), [Scorer() for _ in range(3)]
    threads = [
        threading.Thread(target=_fill, args=(ScoreStore(tmp_path), entries, scorer))
        for scorer in scorers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = sorted(batch for scorer in scorers for batch in scorer.batches)
    assert len(done) == 15 and len({batch[0] for batch in done}) == 15


def test_lines_of_scores_are_json_that_others_read(tmp_path: Path) -> None:
    _fill(ScoreStore(tmp_path), _entries(1), Scorer())
    [line] = (tmp_path / "part-00000.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert told.pop("crc") and told == {
        "key": "00000/0000", "value": 0.0, "parts": {"x": 0.1}, "picture": "p",
    }  # fmt: skip


def test_the_identity_of_a_picture_is_its_head_and_its_size(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "x"
    path.write_bytes(b"a" * 70_000)
    assert identity_of(path) == hashlib.sha1(b"a" * 65_536).hexdigest() + "-70000"
    assert identity_of(tmp_path / "absent") is None and identity_of(tmp_path) is None
