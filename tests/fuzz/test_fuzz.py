"""Damaged files: 200 mutants of each reader's sample, from seeds that are always the same.

`make fuzz SECONDS=600` goes on with fresh ones.
"""

from pathlib import Path

import pytest
from run import try_seeds
from targets import TARGETS

MUTANTS = 200


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_read_or_refused_in_one_line_that_names_it(
    target: str, tmp_path: Path
) -> None:
    faults = list(try_seeds(target, range(MUTANTS), tmp_path / "work", tmp_path / "kept"))
    assert not faults, "\n".join(map(str, faults))
