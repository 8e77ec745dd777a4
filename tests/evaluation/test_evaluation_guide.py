"""The guide names every metric and every command."""

import re
from typing import get_args

import pytest
from documents import prose

from pixart.evaluation.metrics import METRICS
from pixart.evaluation.options import Command

GUIDE = "pixart/evaluation/README.md"


@pytest.mark.parametrize("heading", ["Metrics", "Commands"])
def test_the_guides_tables_name_all_that_there_is(heading: str) -> None:
    part = prose(GUIDE).split(f"## {heading}")[1].split("\n## ")[0]
    first = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
    named = {name.split()[0] for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    commands = {get_args(one)[1].name for one in get_args(Command)}
    known = set(METRICS) if heading == "Metrics" else commands
    assert known <= named | {"pixart"} and named - {"pixart"} <= known
