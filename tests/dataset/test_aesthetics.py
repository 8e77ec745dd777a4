"""Scores by a function that the user names."""

import json
from pathlib import Path

import pictures
import pytest

from pixart.dataset.scoring import load_scorer, quantiles, score_source
from pixart.dataset.sources import open_source


def test_a_named_function_scores_rgb_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taste.py").write_text(
        "def score(image):\n    assert image.mode == 'RGB'\n    return image.getpixel((0, 0))[0]\n"
        "def broken(image):\n    return float('nan')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = pictures.folder(tmp_path / "s", 3)
    output = tmp_path / "o.jsonl"
    assert score_source(open_source(source), output, load_scorer("taste:score")).new == 3
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["path"] for line in lines] == ["0.png", "1.png", "2.png"]
    assert score_source(open_source(source), output, load_scorer("taste:score")).known == 3
    broken = score_source(open_source(source), tmp_path / "b.jsonl", load_scorer("taste:broken"))
    assert [r.reason for r in broken.rejected] == ["score must be finite, got nan"] * 3


def test_a_function_that_fails_costs_the_picture_and_a_module_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sour.py").write_text("def score(image):\n    return {}['x']\n")
    (tmp_path / "foul.py").write_text("raise RuntimeError('no')")
    (tmp_path / "torn.py").write_text("def")
    (tmp_path / "quit.py").write_text("raise SystemExit(3)")
    (tmp_path / "tired.py").write_text("def score(image):\n    raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    source, output = pictures.folder(tmp_path / "s", 1), tmp_path / "o.jsonl"
    (rejected,) = score_source(open_source(source), output, load_scorer("sour:score")).rejected
    assert rejected.reason == "the scorer raises KeyError: 'x'"
    (rejected,) = score_source(open_source(source), output, load_scorer("tired:score")).rejected
    assert rejected.reason == "the scorer raises SystemExit: 3"
    for name, reason in (
        ("foul", "RuntimeError: no"),
        ("torn", "SyntaxError"),
        ("quit", "SystemExit: 3"),
        ("..x", "TypeError"),
    ):
        with pytest.raises(ValueError, match=f"^scorer must be importable, got .*{reason}"):
            load_scorer(f"{name}:f")
    output.write_text('{"path": "a", "score": 1}\n{"path": "b", "score": "c"}\n')
    assert quantiles(output) == "90% reach 1, 50% reach 1, 10% reach 1"


def test_what_names_no_function_is_refused() -> None:
    for name, reason in (
        ("taste", "MODULE:FUNCTION"),
        ("no_such_module:f", "importable"),
        ("json:no_such", "a function of json"),
        ("json:__name__", "a function of json"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_scorer(name)


def test_quantiles_say_what_a_score_would_keep(tmp_path: Path) -> None:
    lines = [json.dumps({"path": str(n), "score": n}) for n in range(101)]
    file = tmp_path / "o.jsonl"
    file.write_text("\n".join(lines))
    assert quantiles(file) == "90% reach 10, 50% reach 50, 10% reach 90"
    file.write_text("")
    assert quantiles(file) == "no scores"
