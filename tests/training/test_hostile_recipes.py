"""Recipes that break parsers, and numbers that break models: one line each, with file and field."""

import random
import time
from pathlib import Path
from typing import Any, get_args

import pytest

from pixart.plain_yaml import MAX_BYTES, read_yaml
from pixart.train import main as train
from pixart.training.problems import Problems
from pixart.training.recipe import (
    RECIPES,
    build_stage,
    load_recipe,
    pair_fields,
    stage_fields,
)

A = "stages:\n  - name: a\n"
DOUBLINGS = "".join(f"  a{n + 1}: &a{n + 1} {{x: *a{n}, y: *a{n}}}\n" for n in range(30))
HOSTILE = {
    # Depth and size.
    "lists": ("[" * 20_000, "[0][0][0]"),
    "mappings": ("{a: " * 20_000, "a.a.a"),
    "blocks": (A + "".join(" " * (4 + n) + "data:\n" for n in range(99)), "stages[0].data.data"),
    "laughs": (
        f"defaults:\n  a0: &a0 {{x: 1, y: 2}}\n{DOUBLINGS}stages: [{{name: a}}]",
        "defaults.",
    ),
    "merged": ("a: &a {x: 1}\n" + "b: &a {<<: [*a, *a, *a], y: *a}\n" * 40, "b"),
    "itself": ("stages: &a [*a]", "stages[0]"),
    "itself, inside": ("stages: [{name: a, data: {captions: &c {x: *c}}}]", "captions.x"),
    "large": (A * 20_000, f"at most {MAX_BYTES:,} bytes"),
    "many": ("stages: [" + "1, " * 60_000 + "]", "stages["),
    # Keys.
    "twice": ("stages: [{name: a}]\nstages: [{name: b}]", "line 2: stages stands there twice"),
    "a number": ("stages: [{name: a, 1: 2}]", "a.1: names must be text, got 1"),
    "a number on top": ("1: 2\nstages: [{name: a}]", "knows `stages` and `defaults`, got 1"),
    "a list": ("stages: [{name: a, ? [1, 2] : 2}]", "stages[0] must have names that are text"),
    "a mapping": ("stages: [{name: a, data: {{a: 1}: 1}}]", "stages[0].data must have names"),
    "no mapping": ("stages: [{name: a, <<: 3}]", "stages[0].<< must be a mapping"),
    # Characters.
    "tab": ("stages:\n\t- name: a\n", "line 2"),
    "NUL": ("stages: [{name: a\0}]", "#x0000"),
    "NUL, escaped": ('stages: [{name: "a\\0b"}]', "stages[0].name must be readable as str"),
    "surrogate": ('stages: [{name: "\\ud800"}]', "stages[0].name must be readable as str"),
    "beyond Unicode": ('stages: [{name: "\\U99999999"}]', "is not YAML"),
    "UTF-16": ("stages: [{name: a}]".encode("utf-16"), "must be UTF-8 text"),
    "binary": (bytes(range(256)) * 9, "must be UTF-8 text"),
    # Types.
    "code": ("stages: [!!python/object/apply:os.system [exit]]", "stages[0] must be a plain value"),
    "set": ("stages: [{name: a, data: !!set {a}}]", "stages[0].data must be a plain value"),
    "no number": ("stages: [{name: a, steps: !!int abc}]", "stages[0].steps must be readable"),
    "no truth": ("stages: [{name: a, seed: !!bool abc}]", "stages[0].seed must be readable"),
    "no time": ("stages: [{name: a, seed: !!timestamp abc}]", "stages[0].seed must be a plain"),
    "digits": (f"stages: [{{name: a, steps: {'9' * 5000}}}]", "stages[0].steps must be readable"),
    "directive": (f"%YAML {'9' * 5000}.1\n--- a", "is not YAML"),
    # Documents.
    "none": ("", "must hold a list under `stages`"),
    "two": ("stages: [{name: a}]\n---\nb: 1", "line 2: the document must be the only one"),
    "defaults": ("defaults: 5\nstages: [{name: a}]", "defaults must be a mapping of fields, got 5"),
    "defaults, listed": ("defaults: [1]\nstages: [{name: a}]", "defaults must be a mapping"),
    "the folder above": ("stages: [{name: ..}]", "stages[0].name must be that of a folder"),
    "a folder below": ("stages: [{name: a/b}]", "stages[0].name must be that of a folder"),
    "two lines": ('stages: [{name: "a\\nb"}]', "stages[0].name must be that of a folder"),
    "a long name": (f"stages: [{{name: {'a' * 300}}}]", "stages[0].name must have at most"),
    "blocks without end": (f"{A}    kv_compress: '{'0-9999,' * 999}1:2'\n", "a.kv_compress must"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused_in_one_line_and_a_second(
    tmp_path: Path, capsys: Any, name: str
) -> None:
    content, what = HOSTILE[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    assert train([str(path), "--dry-run", "--output", str(tmp_path / "run")]) == 2
    assert time.process_time() - started < 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pixart.train: {path}: ") and what in line and len(line) < 500


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ValueError, match=f"{path}: must be a file"):
            load_recipe(path)


def test_anchors_merges_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = "a: &a {x: 1, y: [1, 2]}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], x: 0}\nd: *a\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    values = read_yaml(path)
    assert values["c"] == {"x": 0, "y": [1, 2], "z": 4} and values["d"] == values["a"]


def test_any_damage_of_a_recipe_is_one_line_or_none(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "r.yaml"
    sources = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
    marks = [
        b"[",
        b"{",
        b"&a ",
        b"*a",
        b"!!",
        b"\t",
        b"\0",
        b": ",
        b"- ",
        b'"',
        b"\xff",
        b"%",
        b"|",
    ]
    refused = 0
    for _ in range(60):
        content = bytearray(rng.choice(sources))
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(len(content))
            content[place : place + rng.choice((0, 1, 30))] = rng.choice(marks) * rng.randint(1, 3)
        path.write_bytes(content)
        try:
            load_recipe(path)
        except ValueError as error:
            refused += 1
            lines = error.lines if isinstance(error, Problems) else (str(error),)
            assert all(line.startswith(f"{path}: ") for line in lines)
    assert refused > 30


def _numbers() -> list[str]:
    """Every field of a stage that holds numbers."""
    kinds = {name: {kind, *get_args(kind)} for name, kind in stage_fields().items()}
    nested = {name: {x for k in one for x in (k, *get_args(k))} for name, one in kinds.items()}
    return [name for name, one in nested.items() if {int, float} & one or name in pair_fields()]


@pytest.mark.parametrize("name", _numbers())
def test_every_number_of_a_stage_is_bounded(name: str) -> None:
    """Also that of a field that a later day adds. Python's integers know no bound, YAML's floats have
    .inf and .nan."""
    kind = stage_fields()[name]
    for number in (float("inf"), -float("inf"), float("nan"), 1e38, -1e38, 10**30, -(10**30)):
        value: Any = number
        if name in pair_fields():
            value = {"one": number}
        elif "tuple" in str(kind):
            value = [number] * 3
        values: dict[str, Any] = {"name": "a"}
        inside = values
        *above, last = name.split(".")
        for part in above:
            inside = inside.setdefault(part, {})
        inside[last] = value
        with pytest.raises(Problems) as error:
            build_stage(values)
        assert error.value.lines[0].startswith(name), number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer.learning-rate", "inf"], "optimizer.learning_rate must be a finite number"),
        (["--optimizer.learning-rate", "1e38"], "optimizer.learning_rate must be at most 1, got"),
        (["--optimizer.weight-decay", "inf"], "optimizer.weight_decay must be a finite number"),
        (["--optimizer.final-ratio", "nan"], "optimizer.final_ratio must be a finite number"),
        (["--optimizer.betas", "0.9", "1"], "optimizer.betas must be below 1, got (0.9, 1.0)"),
        (["--timesteps", "logit-normal:1e30"], "timesteps must be uniform or logit-normal:MEAN"),
        (["--data.scenes", "one", "nan"], "data.scenes.one must be a finite number, got nan"),
        (["--threads", "-1"], "--threads must not be negative, got -1"),
        (["--threads", "1000000"], "--threads must be at most 1024, got 1000000"),
        (["--log-every", "0"], "--log-every must be at least 1, got 0"),
        (["--pipeline", "\udcff"], "--pipeline must be UTF-8 text, got '\\udcff'"),
    ],
)
def test_an_absurd_option_is_refused_by_name(
    tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    output = ["--output", str(tmp_path / "run"), "--stage", "base", "--device", "cpu"]
    assert train(["shapes", *output, "--optimizer.name", "adamw", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pixart.train: {message}") and not list(tmp_path.iterdir())
