"""Pictures that several processes decode and encode together, each some rows, against those of one."""

from typing import Any

import pytest
from forked import lines_of


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return lines_of("strip_cases.py", "2", "3", "4")


def _of(found: list[dict[str, Any]], work: str, kind: str) -> list[dict[str, Any]]:
    return [one for one in found if (one["work"], one["kind"]) == (work, kind)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("work", ["decoded", "encoded"])
def test_what_is_shared_is_as_of_one_process(found: Any, count: int, work: str) -> None:
    lines = [one for one in _of(found, work, "whole") if one["processes"] == count]
    assert len(lines) == 6
    assert all(one["error"] <= 1e-5 for one in lines), lines


@pytest.mark.slow
def test_all_are_given_the_same_latents(found: Any) -> None:
    assert all(one["same"] for one in _of(found, "encoded", "whole"))


@pytest.mark.slow
def test_progress_counts_what_one_process_has_to_do(found: Any) -> None:
    assert all(one["counted"] for one in found if one["work"] == "decoded")
    tiles = {
        one["processes"]: one["tiles"]
        for one in _of(found, "decoded", "whole")
        if (one["size"], one["tile"]) == ("even", 64)
    }
    assert tiles[4] < tiles[2]  # a strip is less than another


@pytest.mark.slow
@pytest.mark.parametrize("work", ["decoded", "encoded"])
@pytest.mark.parametrize("kind", ["unaware", "edged"])
def test_statistics_and_rows_of_others_are_needed(found: Any, kind: str, work: str) -> None:
    lines = _of(found, work, kind)
    assert len(lines) == 3
    assert all(one["error"] > 1e-2 for one in lines), lines
