"""Pictures that several processes decode together, each some rows, against those of one."""

from typing import Any

import pytest
from forked import lines_of


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return lines_of("strip_cases.py", "2", "3", "4")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_pictures_are_those_of_one_process(found: Any, count: int) -> None:
    lines = [one for one in found if one["processes"] == count and one["kind"] == "whole"]
    assert len(lines) == 6
    assert all(one["error"] <= 1e-5 for one in lines), lines


@pytest.mark.slow
def test_progress_counts_what_one_process_has_to_do(found: Any) -> None:
    assert all(one["counted"] for one in found)
    tiles = {
        one["processes"]: one["tiles"]
        for one in found
        if (one["kind"], one["size"], one["tile"]) == ("whole", "even", 64)
    }
    assert tiles[4] < tiles[2]  # a strip is less than another


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unaware", "edged"])
def test_statistics_and_rows_of_others_are_needed(found: Any, kind: str) -> None:
    lines = [one for one in found if one["kind"] == kind]
    assert len(lines) == 3
    assert all(one["error"] > 1e-2 for one in lines), lines
