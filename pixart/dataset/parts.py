"""What `prepare` keeps in work/: of each chunk of samples what became of it, of each resolution a report.

Each file carries a digest of what it holds. One that is damaged counts as not there, and is made again.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pixart.files import MAX_INDEX, CheckpointError, digest, read_json, write_json

DIGEST = "digest"


@dataclass
class Part:
    """What became of a chunk, as the index and the report show it."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, str]] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)


def write_part(file: Path, part: Part) -> None:
    """Write a chunk's file. OSError if the disk refuses."""
    write_checked(file, asdict(part))


def read_part(file: Path) -> Part | None:
    """What a chunk's file holds, None if it is damaged or not there."""
    values = read_checked(file)
    return None if values is None or not _is_part(values) else Part(**values)


def _is_part(values: Mapping[str, Any]) -> bool:
    """Whether this is what write_part writes: a digest tells of damage, not who wrote it."""

    def are_lines(lines: Any, *names: str) -> bool:
        return isinstance(lines, list) and all(
            isinstance(line, dict) and all(isinstance(line.get(name), str) for name in names)
            for line in lines
        )

    return (
        values.keys() == {"samples", "rejected", "notes"}
        and are_lines(values["rejected"], "path", "reason")
        and are_lines(values["notes"], "path", "note")
        and are_lines(values["samples"], "path")
        and all(_has_places(sample) for sample in values["samples"])
    )


def _has_places(sample: Mapping[str, Any]) -> bool:
    captions = sample.get("captions")
    places = [*(captions.values() if isinstance(captions, dict) else [None])]
    places += [sample[kind] for kind in ("image", "control") if kind in sample]
    return all(
        isinstance(place, list) and [type(one) for one in place] == [str, str] for place in places
    )


def write_report(work: Path, resolution: int, report: Mapping[str, Any]) -> None:
    """Write the report of a resolution. OSError if the disk refuses."""
    write_checked(work / f"report-{resolution}.json", report)


def merged_reports(work: Path) -> dict[str, Any]:
    """The reports of all resolutions as one; of one that cannot be read, a note that says so."""
    reports = {
        int(found[1]): read_checked(file)
        for file in work.glob("report-*.json")
        if (found := re.fullmatch(r"report-(\d{1,9})", file.stem))
    }
    merged: dict[str, Any] = {"prepared": {}, "rejected": [], "notes": []}
    for resolution, report in sorted(reports.items()):
        if report is None:
            file = work / f"report-{resolution}.json"
            note = "damaged, or of an earlier version; prepare at this resolution again"
            report = {"notes": [{"path": str(file), "note": note}]}
        else:
            merged["prepared"][str(resolution)] = report["prepared"]
        for kind in ("rejected", "notes"):
            merged[kind] += [{"resolution": resolution, **line} for line in report.get(kind, ())]
    return merged


def write_checked(file: Path, values: Mapping[str, Any]) -> None:
    """Write an object with a digest of it. OSError if the disk refuses."""
    write_json(file, {**values, DIGEST: _digest(values)})


def read_checked(file: Path) -> dict[str, Any] | None:
    """What write_checked wrote, None if it is damaged or not there."""
    try:
        values = read_json(file, MAX_INDEX)
    except CheckpointError:
        return None
    return values if values.pop(DIGEST, None) == _digest(values) else None


def _digest(values: Mapping[str, Any]) -> str:
    return digest(json.dumps(values, sort_keys=True).encode())
