"""Work on the pictures of a source in workers of a Ray cluster, with what one process would give.

What is done with pictures is a `Work`: from a stream of items to what becomes of each, in their order. In this
process it is called with all of them. On a cluster every worker opens one of its own and is given a batch
at a time, and the results come back in the order of the source, as if there were one. A worker that is
lost costs the batch that it had; what others did meanwhile stays.

Workers read pictures themselves, from a disk that all machines see, which is looked at first. Pictures of
tar shards are read here and sent along.
"""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from pixart.cluster import Cluster, run_on_ray
from pixart.dataset.samples import Item, Sample
from pixart.files import digest

Work = Callable[[Iterable[Any]], Iterator[Any]]

BATCH = 16  # pictures that a worker is given at a time, which are done again if it is lost
WINDOW = 256  # batches that are taken while the oldest is not done: their results wait in memory
_LOOKED_AT = 100  # samples, for a picture that can be read


@dataclass(frozen=True)
class Sight:
    """A picture that every worker must see as this machine does."""

    path: str
    read: Callable[[], bytes]
    digest: str

    def check(self) -> None:
        """Raises ValueError on a machine that does not."""
        try:
            reason = "" if digest(self.read()) == self.digest else "there it is another file"
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        if reason:
            raise ValueError(
                f"source must be seen by all machines, {socket.gethostname()} cannot read {self.path} "
                f"({reason}); put it on a shared disk, or into tar shards, whose pictures are sent along"
            )


def sights_of(items: Iterable[Item]) -> list[Sight]:
    """The first picture of a source that can be read here, and what steers it."""
    for item in islice(items, _LOOKED_AT):
        if isinstance(item, Sample):
            files: list[Any] = [item] if item.control is None else [item, item.control]
            try:
                return [Sight(file.path, file.read, digest(file.read())) for file in files]
            except (OSError, ValueError):  # it will be rejected
                continue
    return []


def on_ray(
    open_work: Callable[[], Work],
    cluster: Cluster,
    sights: Iterable[Sight] = (),
    batch: int = BATCH,
) -> Work:
    """The work that `open_work`, picklable and called once in each worker, opens. Raises what the work does,
    and what run_on_ray raises."""
    import torch

    # On CPUs numbers depend on how many threads sum them: workers have as many as this process.
    opened = partial(_open, open_work, tuple(sights), torch.get_num_threads())

    def work(items: Iterable[Any]) -> Iterator[Any]:
        early: dict[int, list[Any]] = {}
        turn = 0
        batches = enumerate(_batches(items, batch))
        done: Any = run_on_ray(
            batches, opened, cluster, named=partial(_named, batch), window=WINDOW
        )
        try:
            with closing(done):
                for number, results in done:
                    early[number] = results
                    while turn in early:
                        yield from early.pop(turn)
                        turn += 1
        except (Exception, KeyboardInterrupt):
            # What is done is not lost over what is not, though it has not had its turn.
            for number in sorted(early):
                yield from early[number]
            raise

    return work


def _open(
    open_work: Callable[[], Work], sights: tuple[Sight, ...], threads: int
) -> Callable[[tuple[int, list[Any]]], tuple[int, list[Any]]]:
    import torch

    torch.set_num_threads(threads)
    for sight in sights:
        sight.check()
    work = open_work()

    def do(batch: tuple[int, list[Any]]) -> tuple[int, list[Any]]:
        number, items = batch
        return number, list(work(items))

    return do


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _named(size: int, batch: tuple[int, list[Any]]) -> str:
    first = batch[0] * size + 1
    return f"items {first} to {first + len(batch[1]) - 1}" if size > 1 else f"chunk {first}"
