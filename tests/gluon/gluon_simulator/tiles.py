"""What a kernel keeps in shared memory, and where it comes from: tiles, barriers, descriptors."""

import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gluon_simulator.values import BYTES, Fault, Tensor

if TYPE_CHECKING:
    from gluon_simulator.machine import Machine

Clock = dict[str, int]  # for each partition, how much of what it did is known to have happened


class Descriptor:
    """A box of an array, as the copy engine sees it: zeros beyond the array's end.

    array: any number of dimensions, values of dtype kept as fp32; box: the size that a copy has.
    """

    def __init__(self, array: np.ndarray, box: Sequence[int], dtype: str = "bf16") -> None:
        assert array.ndim == len(box), (array.shape, box)
        self.array = array
        self.dtype = dtype
        self.layout = None
        self.block_type = types.SimpleNamespace(shape=list(box))

    def read(self, start: Sequence[int]) -> np.ndarray:
        box = self.block_type.shape
        out = np.zeros(box, np.float32)
        part = self.array[
            tuple(
                slice(first, min(first + count, size))
                for first, count, size in zip(start, box, self.array.shape, strict=True)
            )
        ]
        out[tuple(slice(0, n) for n in part.shape)] = part
        return out


class Region:
    """One tile of shared memory, and who touched it."""

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        self.data = np.full(shape, np.nan, np.float32)
        self.bytes = self.data.size * BYTES[dtype]
        self.copy: int | None = None  # number of the copy that wrote it
        self.stored: tuple[str, int] | None = None  # or which partition did, and its clock then
        self.fenced = False  # what was stored, for those who multiply it
        # Partition -> its clock when it was known to have read; None while a product is under way.
        self.reads: dict[str, int | None] = {}


class Tile:
    """Regions as the kernel sees them: `per` of them at each index, and a view of what is in those."""

    def __init__(
        self,
        machine: "Machine",
        regions: Sequence[Region],
        dtype: str,
        view: Callable[[list[np.ndarray]], np.ndarray] | None = None,
        per: int = 1,
    ) -> None:
        self.machine = machine
        self.regions = regions
        self.dtype = dtype
        self.view = view or (lambda parts: parts[0])
        self.per = per

    def index(self, i: Any) -> "Tile":
        first = int(i) * self.per
        if not 0 <= first < len(self.regions):
            raise Fault("an index beyond the tiles that there are")
        part = self.regions[first : first + self.per]
        return type(self)(self.machine, part, self.dtype, self.view, self.per)

    def values(self) -> np.ndarray:
        return self.view([region.data for region in self.regions])

    @property
    def shape(self) -> list[int]:
        return list(self.values().shape)

    def _then(self, function: Callable[[np.ndarray], np.ndarray]) -> "Tile":
        view = self.view
        return type(self)(
            self.machine, self.regions, self.dtype, lambda x: function(view(x)), self.per
        )

    def reshape(self, shape: Any) -> "Tile":
        return self._then(lambda x: x.reshape([int(n) for n in shape]))

    def permute(self, order: Any) -> "Tile":
        return self._then(lambda x: x.transpose([int(i) for i in order]))

    def viewed_as(self, dtype: str, shape: Any, layout: Sequence[Sequence[int]]) -> "Tile":
        """As `shape[0]` tiles of shape[1:], in which `layout` says where an element lies.

        layout: the bases of a SharedLinearLayout: for each bit of an element's offset, where in the
        new shape it leads. What is in a region is taken to lie there row by row, so it must not have
        been swizzled.
        """
        count, *shape = (int(n) for n in shape)
        where = np.zeros((1, len(shape)), int)
        for base in layout:
            where = np.concatenate((where, where ^ np.asarray(base)))
        if len(where) != np.prod(shape) or len({tuple(x) for x in where}) != len(where):
            raise Fault("a layout that does not cover its tile")

        def view(parts: list[np.ndarray]) -> np.ndarray:
            out = np.empty(shape, np.float32)
            out[tuple(where.T)] = np.concatenate([x.ravel() for x in parts])
            return out

        return type(self)(self.machine, self.regions, dtype, view, len(self.regions) // count)

    def load(self, layout: Any = None) -> Tensor:
        return self.machine.read(self)

    def store(self, value: Tensor) -> None:
        self.machine.write(self, value)


class NewestTile(Tile):
    reinterpret = Tile.viewed_as


class OldestTile(Tile):
    """With the names of Triton 3.6."""

    _reinterpret = Tile.viewed_as


class Barrier:
    """An mbarrier: a phase is over after `count` arrivals and all bytes that were announced."""

    def __init__(self) -> None:
        self.count = 0
        self.phase = self.arrived = self.bytes = 0
        self.clock: Clock = {}  # what those know that have arrived
        self.copies: set[int] = set()
        self.past: tuple[Clock, frozenset[int]] = ({}, frozenset())  # of phases that are over

    def settle(self) -> None:
        """End the phase if it is over."""
        if self.arrived > self.count:
            raise Fault("a barrier has more arrivals than it was made for")
        if self.arrived == self.count and self.bytes == 0:
            self.past = (dict(self.clock), frozenset(self.copies))
            self.phase += 1
            self.arrived = 0


class Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        if not 0 <= int(i) < len(self.barriers):
            raise Fault("an index beyond the barriers that there are")
        return self.barriers[int(i)]


def learn(clock: Clock, other: Clock) -> None:
    """Add to a clock what another one knows."""
    for who, when in other.items():
        clock[who] = max(clock.get(who, 0), when)
