"""`--dry-run`: what a command would have to do, and how long that takes, by a few pictures that it does.

Nothing is written where the results would be: what is measured goes to a temporary folder, or nowhere.
"""

import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pixart.dataset.chunks import Chunks
from pixart.dataset.features import ShardStore
from pixart.dataset.samples import Item, Prompt, Rejected, Sample
from pixart.progress import counted

FEW = 8  # pictures that are measured
PATIENCE = 60.0  # seconds for them, or fewer are


@dataclass
class Forecast:
    """what: is counted, "picture" or "prompt". most: of the few. listed: how many are; done: of earlier runs;
    left: to be done; rejected: the others, by kind. captions: how many of those that are done or left have one of
    a name. chunks, chunks_done: None where a command has none. few: of those that are left. seconds: of one, None
    if it was not measured; refused: of the few, by kind. device: what was measured. workers: that would share the
    work, None if it was not said."""

    what: str = "picture"
    most: int = FEW
    listed: int = 0
    done: int = 0
    left: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    chunks: int | None = None
    chunks_done: int | None = None
    few: list[Sample | Prompt] = field(default_factory=list)
    measured: int = 0
    seconds: float | None = None
    refused: Counter[str] = field(default_factory=Counter)
    device: str = ""
    workers: int | None = None

    def reject(self, reason: str) -> None:
        self.rejected[kind_of(reason)] += 1

    def leave(self, sample: Sample | Prompt) -> None:
        """It is to be done."""
        self.left += 1
        if len(self.few) < self.most:
            self.few.append(sample)

    @property
    def hours(self) -> float | None:
        """Of one worker, for all that is left."""
        return None if self.seconds is None else self.seconds * self.left / 3600

    def measure(
        self,
        work: Callable[[Sequence[Any]], Iterable[Rejected]],
        device: str,
        are_together: Callable[[], bool] = lambda: False,
    ) -> None:
        """Do some of the few. work: gives those that were rejected. are_together: asked after the first, whether
        many at once take hardly longer than one does: then all of the few are done so."""
        self.device = device
        if not self.few:
            return
        began = time.monotonic()
        list(work(self.few[:1]))  # what is loaded and tuned the first time is no part of the others
        first = time.monotonic() - began
        count = max(1, min(FEW, int(PATIENCE / max(first, 1e-3))))
        few = self.few if are_together() else self.few[:count]
        began = time.monotonic()
        for rejected in work(few):
            self.refused[kind_of(rejected.reason)] += 1
        self.seconds, self.measured = (time.monotonic() - began) / len(few), len(few)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for --json; what a command has not is null."""
        named = max(1, self.done + self.left)
        return {
            f"{self.what}s": self.listed,
            "done": self.done,
            "left": self.left,
            "rejected": dict(self.rejected),
            "chunks": self.chunks,
            "chunks_done": self.chunks_done,
            "captions": {name: count / named for name, count in sorted(self.captions.items())},
            "measured": self.measured,
            "measured_rejected": dict(self.refused),
            "device": self.device,
            f"seconds_a_{self.what}": self.seconds,
            "hours": self.hours,
            "workers": self.workers,
        }

    def summary(self) -> str:
        """The same in lines."""
        of = ""
        if self.chunks is not None and self.chunks_done is not None:
            of = f" in {self.chunks - self.chunks_done:,} of {self.chunks:,} chunks"
        lines = [f"{self.listed:,} {self.what}s: {self.done:,} done, {self.left:,} to do{of}"]
        lines[0] += f", {sum(self.rejected.values()):,} rejected"
        lines += [f"rejected: {_listed(self.rejected)}"] if self.rejected else []
        if self.captions:
            named = max(1, self.done + self.left)
            shares = (
                f"{name} {count / named:.0%}" for name, count in sorted(self.captions.items())
            )
            lines.append(f"captions: {', '.join(shares)} of the {self.what}s")
        lines.append(self._time())
        return "\n".join([*lines, "nothing was written"])

    def _time(self) -> str:
        if self.seconds is None or self.hours is None:
            return "time: not measured, nothing is left to do"
        said = (
            f"time: {self.seconds:.3g} s a {self.what} on {self.device}, measured with {self.measured} "
            f"of them: {self.hours:.2g} hours"
        )
        if self.workers:
            said += f", {self.hours / self.workers:.2g} in {self.workers} such workers"
        if self.refused:
            said += f"; of those rejected: {_listed(self.refused)}"
        return said


def kind_of(reason: str) -> str:
    """A reason without what is of one picture alone: numbers, and what follows a colon."""
    return re.sub(r"\d+(\.\d+)?", "N", reason.partition(":")[0])


def of_preparing(
    preparation: Chunks, items: Iterable[Any], device: str, what: str = "picture"
) -> Forecast:
    """What `prepare` or `prompts` has to do."""
    found = Forecast(what, max(FEW, preparation.at_once), chunks=0, chunks_done=0)
    for chunk in preparation.chunks(counted(items, "list")):
        found.listed += len(chunk.items)
        found.chunks = (found.chunks or 0) + 1
        part = preparation.part(chunk.file)
        if part is not None:
            found.chunks_done = (found.chunks_done or 0) + 1
            found.done += len(part.samples)
            for sample in part.samples:
                found.captions.update(sample["captions"].keys())
            for line in part.rejected:
                found.reject(line["reason"])
            continue
        for item in chunk.items:
            if isinstance(item, Rejected):
                found.reject(item.reason)
            elif isinstance(item, Sample) and not item.captions:
                found.reject(item.uncaptioned)
            else:
                found.captions.update(item.captions.keys())
                found.leave(item)

    def work(samples: Sequence[Any]) -> Iterable[Rejected]:
        with tempfile.TemporaryDirectory() as folder:
            part = preparation.encoding.into(ShardStore(Path(folder))).encode(samples)
        return [Rejected(**line) for line in part.rejected]

    found.measure(work, device, preparation.takes_together)
    return found


def of_pictures(
    items: Iterable[Item],
    is_known: Callable[[Sample], bool],
    work: Callable[[Sequence[Sample]], Iterable[Any]],
    device: str,
    few: int = FEW,
) -> Forecast:
    """What a command has to do that does one picture after the other. work: gives what becomes of each. few:
    pictures that are measured at most."""
    found = Forecast()
    for item in counted(items, "list"):
        found.listed += 1
        if isinstance(item, Rejected):
            found.reject(item.reason)
            continue
        found.captions.update(item.captions.keys())
        if is_known(item):
            found.done += 1
        else:
            found.leave(item)
    del found.few[few:]
    found.measure(lambda few: [one for one in work(few) if isinstance(one, Rejected)], device)
    return found


def _listed(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
