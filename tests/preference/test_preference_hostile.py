"""Files that others had in their hands: saved votes, and a study's own, damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
from preference_study import build_study

from pixart.evaluation.preference.judgements import read_judgements
from pixart.evaluation.preference.study import (
    KEY,
    STUDY,
    Key,
    Study,
    check_pictures,
    read_key,
    read_study,
)
from pixart.evaluation.preference.votes import read_votes
from pixart.preference import main


@pytest.fixture
def built(tmp_path: Path) -> tuple[Study, Key]:
    return build_study(tmp_path, 3, checks=0)


def saved(study: Study, **changes: Any) -> dict[str, Any]:
    votes = [
        {"pair": pair.id, "quality": "left", "alignment": "tie", "ms": 1200, "order": k, "agent": "page desk keys"}
        for k, pair in enumerate(study.pairs, 1)
    ]  # fmt: skip
    return {"format": "pixart-votes", "version": 1, "study": study.id, "voter": "p" + "a" * 16,
            "votes": votes, **changes}  # fmt: skip


def add(study: Study, values: Any, name: str = "votes.json") -> int:
    path = study.folder.parent / name
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return main(["add", str(study.folder), str(path)])


def test_a_file_adds_its_votes_once(
    built: tuple[Study, Key], capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = built
    assert add(study, saved(study)) == 0
    assert "3 votes added" in capsys.readouterr().out
    before = (study.folder / "votes.jsonl").read_bytes()
    assert add(study, saved(study), "again.json") == 0
    assert "0 votes added" in capsys.readouterr().out
    assert (study.folder / "votes.jsonl").read_bytes() == before


def test_what_a_voter_changed_later_counts_and_an_older_file_takes_nothing_back(
    built: tuple[Study, Key],
) -> None:
    study, _ = built
    old, new = saved(study), saved(study)
    new["votes"][0] |= {"quality": "right", "order": 7}
    for values in (old, new, old):
        assert add(study, values) == 0
    standing, _ = read_votes(study)
    assert [v.quality for v in standing.values() if v.pair == study.pairs[0].id] == ["right"]
    assert len(standing) == 3


VOTE = {"quality": "left", "alignment": "tie", "ms": 1, "order": 1, "agent": ""}


@pytest.mark.parametrize(
    "change",
    [
        {"format": "else"},
        {"version": 2},
        {"version": True, "study": "0" * 16},
        {"study": "0" * 16},
        {"voter": "s" + "a" * 16},  # a voter of the server: nobody else's vote can be changed
        {"voter": "p" + "A" * 16},
        {"voter": None},
        {"more": 1},
        {"votes": {}},
        {"votes": [1]},
        {"votes": [{}]},
        {"votes": [VOTE]},
        {"votes": [VOTE | {"pair": "0" * 16}]},
        {"votes": [VOTE | {"pair": ["0"]}]},
        *({"votes": [VOTE | {"pair": "first"} | wrong]} for wrong in (
            {"quality": "both"}, {"quality": None}, {"alignment": 1}, {"ms": -1}, {"ms": 1e400}, {"ms": True},
            {"ms": "1"}, {"order": 0}, {"order": 1.5}, {"order": 10**30}, {"agent": "x" * 41},
            {"agent": "\u001b[31m"}, {"agent": None}, {"undone": True},
        )),
        {"votes": [VOTE | {"pair": "first"}] * 2},
        {"votes": [VOTE | {"pair": "first"}] * 4},
    ],
)  # fmt: skip
def test_what_is_no_vote_of_this_study_adds_nothing(
    built: tuple[Study, Key], change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = built
    text = json.dumps(saved(study) | change).replace('"first"', json.dumps(study.pairs[0].id))
    good = study.folder.parent / "good.json"
    good.write_text(json.dumps(saved(study, voter="p" + "b" * 16)))
    (study.folder.parent / "bad.json").write_text(text)
    arguments = ["add", str(study.folder), str(good), str(study.folder.parent / "bad.json")]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("pixart.preference: ") and err.count("\n") == 1 and "bad.json" in err
    assert "\x1b" not in err
    assert read_votes(study)[0] == {}


@pytest.mark.parametrize(
    "text", ["", "[]", "nul", "[" * 100_000, '{"a": 1', "\x00\xff", '"' + "x" * 100]
)
def test_what_is_no_json_adds_nothing(
    built: tuple[Study, Key], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert add(built[0], text) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_of_gigabytes_is_not_read(
    built: tuple[Study, Key], capsys: pytest.CaptureFixture[str]
) -> None:
    path = built[0].folder.parent / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**33)
    assert main(["add", str(built[0].folder), str(path)]) == 2
    assert "must be at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"study": "../../etc"},
        {"pairs": []},
        {"pairs": {"a": 1}},
        {"pairs": [1]},
        *({"pairs": [{"change": change}]} for change in (
            {"left": "../key.json"}, {"left": "/etc/passwd"}, {"left": "a.jpg"}, {"left": None},
            {"id": "x"}, {"prompt": 1}, {"width": 0}, {"height": "1"}, {"width": True}, {"width": 10**9},
        )),
    ],
)  # fmt: skip
def test_a_damaged_study_is_one_line(built: tuple[Study, Key], change: dict[str, Any]) -> None:
    study, _ = built
    values = json.loads((study.folder / STUDY).read_text())
    if isinstance(pairs := change.get("pairs"), list) and pairs and isinstance(pairs[0], dict):
        change = {"pairs": [values["pairs"][0] | pairs[0]["change"]]}
    (study.folder / STUDY).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=r"study\.json"):
        read_study(study.folder)


def test_a_picture_in_two_places_is_refused(built: tuple[Study, Key]) -> None:
    study, _ = built
    values = json.loads((study.folder / STUDY).read_text())
    values["pairs"][0]["left"] = values["pairs"][1]["left"]
    (study.folder / STUDY).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="must be unique"):
        read_study(study.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0}, {"study": "0" * 16}, {"models": ["ours"]}, {"models": ["ours", "ours"]},
        {"models": 5}, {"pairs": {}}, {"pairs": []}, {"secret": "00"}, {"secret": None},
        *({"change": change} for change in ({"left": "x"}, {"check": 1}, {"prompt": 1},
                                           {"check": {"quality": "up"}})),
    ],
)  # fmt: skip
def test_a_damaged_key_is_one_line(built: tuple[Study, Key], change: dict[str, Any]) -> None:
    study, _ = built
    values = json.loads((study.folder / KEY).read_text())
    if "change" in change:
        first = next(iter(values["pairs"]))
        values["pairs"][first] |= change["change"]
        change = {}
    (study.folder / KEY).write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=r"key\.json"):
        read_key(study)


def test_a_picture_that_is_gone_is_named(
    built: tuple[Study, Key], capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = built
    name = study.pairs[0].left
    study.picture(name).unlink()
    with pytest.raises(ValueError, match=name):
        check_pictures(study)
    for arguments in (["serve", "--port", "0"], ["page"], ["judge", "--judge", "checker"]):
        assert main([arguments[0], str(study.folder), *arguments[1:]]) == 2
        assert name in capsys.readouterr().err


def test_a_line_that_broke_off_is_cut_and_one_that_is_damaged_is_named(
    built: tuple[Study, Key],
) -> None:
    study, _ = built
    assert add(study, saved(study)) == 0
    votes = study.folder / "votes.jsonl"
    whole = votes.read_bytes()
    votes.write_bytes(whole + b'{"pair": "12')
    assert len(read_votes(study)[0]) == 3
    other = saved(study, voter="p" + "c" * 16)
    assert add(study, other) == 0
    assert votes.read_bytes().startswith(whole) and len(read_votes(study)[0]) == 6
    votes.write_bytes(whole.replace(b'"tie"', b'"both"', 1))
    with pytest.raises(ValueError, match=r"votes\.jsonl, line 1: alignment must be one of"):
        read_votes(study)


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", "x", '{"pair": 1, "order": "left-first", "model": "m", "prompt": "0", "quality": "tie", '
     '"alignment": "tie", "reason": "", "repaired": false}'],
)  # fmt: skip
def test_a_damaged_judgement_is_named(built: tuple[Study, Key], line: str) -> None:
    (built[0].folder / "judgements.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"judgements\.jsonl, line 1"):
        read_judgements(built[0])


def test_a_name_or_a_prompt_is_text_in_the_report_too(tmp_path: Path) -> None:
    study, _ = build_study(tmp_path, 2, ("<img src=x>|", "theirs"))
    assert main(["judge", str(study.folder), "--judge", "checker"]) == 0
    assert main(["fit", str(study.folder), "--resamples", "100", "--no-figure"]) == 0
    assert "<img src=x>" not in (study.folder / "report.html").read_text()
    assert "<img" not in (study.folder / "README.md").read_text()
