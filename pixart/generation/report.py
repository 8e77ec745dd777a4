"""What a run tells with --json: each picture with its settings and seconds, and how long the whole took."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixart.generation.drafts import Job
    from pixart.pipeline.metadata import Metadata

STAGES = (
    "load",
    "text",
    "denoise",
    "decode",
    "write",
)  # and "encode" where pictures are drawn from


@dataclass
class Report:
    """What is finished, also when it ends early. images: by the job's index. shards: tars by their number,
    None for a run that writes none. forecast: of a dry run, in the place of all else. peak_memory: measures
    the bytes used; nothing is imported for a report, which may follow on a lack of memory."""

    images: dict[int, dict[str, Any]] = field(default_factory=dict)
    shards: dict[int, dict[str, Any]] | None = None
    drawn: int = 0
    grid: str | None = None
    forecast: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    peak_memory: Callable[[], int] = lambda: 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[Callable[[], float]]:
        """Count a stage's seconds; yields what tells those of this time."""
        before, started = self.seconds[stage], time.perf_counter()
        try:
            yield lambda: self.seconds[stage] - before
        finally:
            self.seconds[stage] += time.perf_counter() - started

    def add(
        self,
        job: "Job",
        metadata: "Metadata",
        size: tuple[int, int],
        note: str,
        seconds: dict[str, float] | None = None,
    ) -> None:
        """A picture that is in its file. seconds: by stage, None if it was there."""
        settings = metadata.request.to_dict()
        del settings["version"]
        self.images[job.index] = {
            "file": str(job.path),
            "prompt": job.request.prompt,
            "seed": job.request.seed,
            "width": size[0],
            "height": size[1],
            "note": note,
            "settings": settings,
            "model": dict(metadata.model),
            "inputs": dict(metadata.inputs),
            "seconds": None if seconds is None else _rounded(seconds),
        }

    def add_shard(
        self, number: int, file: str, pictures: int, note: str, seconds: Mapping[str, float] | None
    ) -> None:
        """A tar that is there. seconds: by stage, None if it was there before."""
        self.shards = self.shards or {}
        spent = None if seconds is None else _rounded(seconds)
        self.shards[number] = {"file": file, "pictures": pictures, "note": note, "seconds": spent}
        if seconds is not None:
            self.count(seconds, pictures)

    def count(self, seconds: Mapping[str, float], pictures: int = 1) -> None:
        """So many more are drawn, in so many seconds of each stage."""
        self.drawn += pictures
        for stage, spent in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def share(self, indices: Collection[int]) -> dict[str, Any]:
        """What this process adds to the report of a run that several share: pictures by these jobs, and what
        was spent on them. Opening models and encoding prompts is not added up: all do it at once."""
        spent = {stage: self.seconds[stage] for stage in self.seconds.keys() - {"load", "text"}}
        images = {index: self.images[index] for index in indices}
        return {"images": images, "drawn": len(images), "seconds": spent if images else {}}

    def share_of_shards(self) -> dict[str, Any]:
        """As `share` has it, of all tars of this process."""
        spent = {stage: self.seconds[stage] for stage in self.seconds.keys() - {"load", "text"}}
        return {"images": {}, "shards": self.shards, "drawn": self.drawn, "seconds": spent}

    def merge(self, share: dict[str, Any]) -> None:
        """Add what another process has drawn."""
        self.images |= share["images"]
        if share.get("shards") is not None:
            self.shards = (self.shards or {}) | share["shards"]
        self.drawn += share["drawn"]
        for stage, spent in share["seconds"].items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def to_dict(self) -> dict[str, Any]:
        if self.forecast is not None:
            return self.forecast
        shards = self.shards
        tars = {} if shards is None else {"shards": [shards[number] for number in sorted(shards)]}
        return {
            "images": [self.images[index] for index in sorted(self.images)],
            **tars,
            "drawn": self.drawn,
            "grid": self.grid,
            "seconds": _rounded(self.seconds),
            "peak_memory_bytes": self.peak_memory(),
        }


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {stage: round(spent, 3) for stage, spent in seconds.items()}
