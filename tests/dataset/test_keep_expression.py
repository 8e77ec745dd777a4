"""The language of --keep: what it says, and that nothing else is let in."""

import json
from pathlib import Path
from typing import Any

import pytest
from pictures import write

from pixart.dataset.expression import NUMBER, TEXT, TRUTH, NotMeasured, check_names, parse_rules
from pixart.dataset.funnel import Funnel, kept

VALUES: dict[str, Any] = {
    "width": 640, "height": 480, "aesthetic": 5.5, "clip": 0.25, "duplicate": False,
    "format": "JPEG", "jpeg_quality": None, "zero": 0,
}  # fmt: skip
KINDS = {
    "width": NUMBER, "height": NUMBER, "aesthetic": NUMBER, "clip": NUMBER, "duplicate": TRUTH,
    "format": TEXT, "jpeg_quality": NUMBER, "zero": NUMBER,
}  # fmt: skip


def holds(expression: str) -> bool:
    rules = parse_rules(expression)
    check_names(rules, KINDS)
    return all(rule.holds(VALUES) for rule in rules)


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("min(width,height)>=512 and aesthetic>=5 and clip>=.22 and not duplicate", False),
        ("min(width,height)>=480 and aesthetic>=5 and clip>=.22 and not duplicate", True),
        ("1 < width / height <= 4/3", True),
        ("1 < width / height < 4/3", False),
        ("max(width, height, 700) == 700 or duplicate", True),
        ("-width + 2 * 320 == 0", True),
        ("not (duplicate or width < 5)", True),
        ("format == 'JPEG' and format != \"PNG\"", True),
        ("not duplicate == duplicate", False),
        ("format != 'JPEG' or jpeg_quality >= 60 or width > 1", NotMeasured),
        ("format == 'JPEG' or jpeg_quality >= 60", True),
        ("width > 1 or jpeg_quality >= 60", True),
        ("width/zero > 1", ValueError),
        ("width * 1e308 * 10 > 1", ValueError),
        (" width > 1\n", True),
    ],
)
def test_expressions_mean_what_python_means(expression: str, expected: Any) -> None:
    if isinstance(expected, bool):
        assert holds(expression) is expected
    else:
        with pytest.raises(expected):
            holds(expression)


@pytest.mark.parametrize(
    ("expression", "part"),
    [
        ("__import__('os').system('x')", "cannot have"),
        ("width.real > 1", "'width.real'"),
        ("open('f')", "\"open('f')\""),
        ("[width for width in 'ab']", "cannot have"),
        ("(lambda: 1)() > 1", "cannot have"),
        ("width ** 9 ** 9 ** 9 > 1", "cannot have 'width **"),
        ("width if height else 1", "cannot have"),
        ("(w := 1) > 1", "cannot have"),
        ("f'{width}' == 'a'", "cannot have"),
        ("width in (1, 2)", "cannot have 'width in (1, 2)'"),
        ("duplicate is True", "cannot have"),
        ("duplicate == True", "cannot have 'True'"),
        ("min(width) > 1", "two at least"),
        ("min(*width, 1) > 1", "cannot have '*width'"),
        ("min(width, 1, key=abs) > 1", "cannot have"),
        ("1j > 1", "cannot have '1j'"),
        ("width > 1" + "0" * 400, "too large"),
        ("width > 1e999", "too large"),
        ("width % 2 == 0", "cannot have 'width % 2'"),
        ("~width > 1", "cannot have '~width'"),
        ("width", "must be true or false there, it is a number"),
        ("aesthetic and width > 1", "'aesthetic': it must be true or false"),
        ("duplicate > 1", "only numbers have an order"),
        ("format > 'A'", "only numbers have an order"),
        ("width == 'a'", "it must be a number there, it is a text"),
        ("not width > 1 + duplicate", "it must be a number there, it is true or false"),
        ("blur > 1", "there is no blur; there are aesthetic, clip, duplicate"),
        ("min > 1", "there is no min"),
        ("width >", "must be an expression"),
        ("width > 1; import os", "must be an expression"),
        ("", "must be an expression"),
        ("width = 1", "must be an expression"),
        ("width > 1 \x00", "must be an expression"),
        ("width AND height", "must be an expression"),
        ("(" * 5000 + "width" + ")" * 5000 + " > 1", "characters"),
        ("(" * 900 + "width" + ")" * 900 + " > 1", "--keep"),
        ("not " * 101 + "duplicate", "at most 100 deep"),
        ("not " * 2400 + "duplicate", "--keep"),
        ("-" * 9000 + "width > 1", "--keep"),
        ("width > " + "-" * 300 + "1", "at most 100 deep"),
        ("width > " + "1" * 5000, "--keep"),
    ],
)
def test_anything_else_is_refused_in_one_line(expression: str, part: str) -> None:
    with pytest.raises(ValueError, match="--keep") as caught:
        holds(expression)
    said = str(caught.value)
    assert part in said and "\n" not in said and len(said) < 500


def test_a_funnel_counts_each_rule_by_what_reaches_it() -> None:
    funnel = Funnel(parse_rules("a > 1 and (b > 1 and not c) and a < b"))
    lines: list[dict[str, Any]] = [
        {"path": "1", "unreadable": "torn"},
        {"path": "2", "a": 1, "b": 1, "c": True},
        {"path": "3", "a": 2, "b": None, "c": True},
        {"path": "4", "a": 2, "c": True},
        {"path": "5", "a": 2, "b": 2, "c": True},
        {"path": "6", "a": 2, "b": 2, "c": False},
        {"path": "7", "a": 2, "b": 3, "c": False},
    ]
    taken = [funnel.take(line) for line in lines]
    assert [one and one[0] for one in taken] == [0, 1, 2, 2, 3, 4, None]
    counts = [(s.rule, s.before, s.after, s.unmeasured) for s in funnel.steps]
    assert counts == [
        ("can be read", 7, 6, 0),
        ("a > 1", 6, 5, 0),
        ("b > 1", 5, 3, 2),
        ("not c", 3, 2, 0),
        ("a < b", 2, 1, 0),
    ]


def test_what_prepare_cannot_keep_by_is_one_line(tmp_path: Path) -> None:
    lines = [
        {"path": "a", "width": 5, "zero": 1, "never": None, "duplicate": False},
        {"path": "b", "width": 5, "zero": 0, "never": None, "duplicate": True},
    ]
    file = write(tmp_path / "clean.jsonl", "\n".join(map(json.dumps, lines)))
    for keep, reason in {
        "width > 1 and wide > 1": "there is no wide; there are duplicate, never, width, zero",
        "width / zero > 1": "of 'b', width / zero > 1 cannot be computed",
        "duplicate": None,
        "never > 1": None,
    }.items():
        if reason is None:
            assert kept([], keep, file) is not None
            continue
        with pytest.raises(ValueError, match="--keep") as caught:
            kept([], keep, file)
        assert reason in str(caught.value)
    with pytest.raises(ValueError, match="given together"):
        kept([], "width > 1", None)
    with pytest.raises(ValueError, match="given together"):
        kept([], None, file)
    with pytest.raises(ValueError, match="there is none"):
        kept([], "width > 1", tmp_path / "absent.jsonl")
    for content in ("[1]", '{"path": 1}', "{", '{"path": "a", "b": [1]}'):
        write(file, content)
        with pytest.raises(ValueError, match="line 1"):
            kept([], "b > 1", file)
