"""Protocols: shipped files, what is refused, and what makes an id."""

from pathlib import Path

import pytest

from pixart.evaluation.entries import Prompt
from pixart.evaluation.protocol import Protocol, Sampling, Use, load_protocol, shipped

MINIMAL = "title: mine\nset: lines\ncount: 3\nmetrics: [{name: clip}]\n"


def mine(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_protocol_loads_under_its_files_name(name: str) -> None:
    assert load_protocol(name).name == name


def test_a_file_of_ones_own_is_named_after_itself(tmp_path: Path) -> None:
    assert load_protocol(mine(tmp_path, MINIMAL)).name == "mine"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (MINIMAL + "metrcs: []\n", r"metrcs is unknown; did you mean 'metrics'\?"),
        (MINIMAL + "sampling: {stps: 3}\n", r"sampling.stps is unknown; did you mean 'steps'\?"),
        (MINIMAL.replace("3", "three"), "count must be a whole number, got 'three'"),
        (MINIMAL.replace("3", "true"), "count must be a whole number, got True"),
        (MINIMAL.replace("3", "0"), "count must be from 1 to 10,000,000, got 0"),
        (MINIMAL + "size: 512\n", "size must be text; put it in quotes, got 512"),
        (
            MINIMAL + "size: 9000x1\n",
            "size must be WIDTHxHEIGHT, each 1 to 8192 pixels, got '9000x1'",
        ),
        (MINIMAL + "sampling: {guidance: .inf}\n", "sampling.guidance must be a finite number"),
        (MINIMAL + "seed_rule: random\n", "seed_rule must be one of prompt, category, same"),
        (MINIMAL.replace("[{name: clip}]", "[]"), "metrics must name one at least"),
        (MINIMAL.replace("[{name: clip}]", "[clip]"), r"metrics\[0\] must be a mapping of fields"),
        (MINIMAL.replace("title: mine", ""), "title must be given"),
        ("- a\n", "it must be a mapping of fields"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_with_file_and_field(
    tmp_path: Path, text: str, rule: str
) -> None:
    path = mine(tmp_path, text)
    with pytest.raises(ValueError, match=rule) as error:
        load_protocol(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'shapes'"):
        load_protocol("shape")


def small(**fields: object) -> Protocol:
    values = {"name": "a", "title": "", "set": "lines", "count": 2, "metrics": (Use("clip"),)}
    return Protocol(**{**values, **fields})  # type: ignore[arg-type]


def prompts(*categories: str) -> list[Prompt]:
    return [Prompt(f"{k}", "text", category=one) for k, one in enumerate(categories)]


@pytest.mark.parametrize(
    ("rule", "seeds"),
    [
        ("prompt", [5, 6, 7, 8, 9, 10]),
        ("category", [5, 6, 5, 6, 7, 8]),
        ("same", [5, 6, 5, 6, 5, 6]),
    ],
)
def test_seeds_follow_the_rule(rule: str, seeds: list[int]) -> None:
    protocol = small(seed=5, seed_rule=rule, images_per_prompt=2)
    found = list(protocol.seeds(prompts("a", "b", "a")))
    assert [seed for _, _, seed in found] == seeds
    assert [sample for _, sample, _ in found] == [0, 1] * 3


def test_what_the_command_line_gave_instead_is_listed() -> None:
    changed = small(sampling=Sampling(steps=20)).changed(
        count=2, size="64", steps=3, guidance=2, metrics=["shapes"]
    )
    assert changed.changes == (
        "size None → 64x64",
        "steps 20 → 3",
        "guidance None → 2.0",
        "metrics clip → shapes",
    )
