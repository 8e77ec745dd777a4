"""KVSchedule: what a text or a file says, and what it gives each block at each timestep."""

import json
from pathlib import Path
from typing import Any

import pytest

from pixart.config import KVCompression, PixArtConfig
from pixart.plans.schedule import KVSchedule

SMALL: dict[str, Any] = {"input_size": 16, "hidden_size": 144, "depth": 4, "num_heads": 2}
DENSE = PixArtConfig(**SMALL)
TRAINED = PixArtConfig(**SMALL, kv_compression=KVCompression((2, 3), 2))
TEXT = "0-3:2; 1,3:4@1000-500.5; 0:1@600-400"


def test_the_last_rule_that_names_a_block_and_a_timestep_decides() -> None:
    schedule = KVSchedule.parse(TEXT)
    assert schedule.is_bounded
    expected = {
        999.0: (2, 4, 2, 4), 500.5: (1, 4, 2, 4), 500.4: (1, 2, 2, 2), 400.0: (1, 2, 2, 2), 399.9: (2, 2, 2, 2),
    }  # fmt: skip
    for timestep, ratios in expected.items():
        assert schedule.ratios(timestep, DENSE) == ratios


def test_where_blocks_do_what_they_were_made_for_there_is_nothing_to_set() -> None:
    assert KVSchedule.parse("0-3:1").ratios(500, DENSE) == ()
    assert KVSchedule.parse("0:2@300-0").ratios(301, DENSE) == ()
    assert KVSchedule.parse("2-3:2").ratios(500, TRAINED) == ()
    assert KVSchedule.parse("2:4").ratios(500, TRAINED) == (1, 1, 4, 2)
    assert not KVSchedule.parse("2:4").is_bounded


@pytest.mark.parametrize("text", [TEXT, "3,0-1:3", " 0 - 1 : 2 @ 1000 - 0 ;"])
def test_text_and_list_come_back_as_they_were(text: str) -> None:
    schedule = KVSchedule.parse(text)
    assert KVSchedule.parse(str(schedule)) == schedule
    assert KVSchedule.from_list(json.loads(json.dumps(schedule.to_list()))) == schedule


def test_a_file_is_read_where_a_text_names_it(tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    file.write_text('[{"blocks": "0-3", "ratio": 2, "timesteps": [1000, 600]}]')
    assert str(KVSchedule.read(str(file))) == "0-3:2@1000-600"
    assert str(KVSchedule.read("0-3:2")) == "0-3:2"
    with pytest.raises(FileNotFoundError):
        KVSchedule.read(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have 1 to 10,000 rules, got 0"),
        ("14-27", "must be BLOCKS:RATIO"),
        ("0:2@500", "must be BLOCKS:RATIO"),
        ("0:2:conv", "must be BLOCKS:RATIO"),
        ("0:5", "ratios of 1, 2, 3 or 4, got 5"),
        ("0:0", "ratios of 1, 2, 3 or 4, got 0"),
        ("3-1:2", "blocks like 14-27 or 3,5, got '3-1'"),
        ("1,,2:2", "blocks like 14-27 or 3,5, got ''"),
        ("0:2@100-200", "from 1000 down to 0, got 100-200"),
        ("0:2@1001-0", "from 1000 down to 0, got 1001-0"),
        ("\N{ARABIC-INDIC DIGIT ONE}:2", "must be BLOCKS:RATIO"),
        ("0:2;" * 30_000, "100,000 characters at most"),
        ("\udcff:2", "must be UTF-8"),
        ("0\n:2", "xx"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(text: str, said: str) -> None:
    if said == "xx":  # blanks of any kind are none of its meaning
        assert str(KVSchedule.parse(text)) == "0:2"
        return
    with pytest.raises(ValueError) as error:
        KVSchedule.parse(text)
    assert said in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[]", "[1]", '[{"blocks": "0"}]', '[{"blocks": 0, "ratio": 2}]',
        '[{"blocks": "0", "ratio": true}]', '[{"blocks": "0", "ratio": 2.0}]',
        '[{"blocks": "0", "ratio": 2, "timesteps": [1000]}]',
        '[{"blocks": "0", "ratio": 2, "timesteps": [1e999, 0]}]',
        '[{"blocks": "0", "ratio": 2, "timesteps": [NaN, 0]}]',
        '[{"blocks": "0", "ratio": 2, "timestep": [9, 0]}]',
        '[{"blocks": "0", "blocks": "1", "ratio": 2}]', "[" * 100_000, "\x00", '"0:2"',
    ],
)  # fmt: skip
def test_a_hostile_file_is_one_line_that_names_it(content: str, tmp_path: Path) -> None:
    file = tmp_path / "kv.json"
    file.write_text(content)
    with pytest.raises(ValueError) as error:
        KVSchedule.read(str(file))
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)


def test_blocks_and_ratios_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks from 0 to 3 for this model, got 4"):
        KVSchedule.parse("0-4:2").check(DENSE)
    for ratio in (1, 3):
        with pytest.raises(ValueError, match=f"give block 2 a multiple of 2.*got {ratio}"):
            KVSchedule.parse(f"0-3:{ratio}").check(TRAINED)
    KVSchedule.parse("0-1:3; 2-3:4").check(TRAINED)


def test_rules_are_counted_before_they_are_read() -> None:
    with pytest.raises(ValueError, match="1 to 10,000 rules, got 10,001"):
        KVSchedule.parse("no rule;" * 10_001)
    with pytest.raises(ValueError, match="timesteps of a rule must be two numbers"):
        KVSchedule.from_list([{"blocks": "0", "ratio": 2, "timesteps": [10**400, 0]}])
