"""What a kernel asks of an SM and of global memory: copies, barriers, products, sums.

Who knows what is kept in vector clocks: a partition learns what another one did only through a
barrier that the other arrived at, or through a number in global memory that it released. So a mistake
is found whether or not the order of events of this run would have shown it in the numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gluon_simulator.schedule import Copy, Schedule
from gluon_simulator.tiles import Barrier, Clock, Descriptor, Region, Tile, learn
from gluon_simulator.values import Accumulator, Fault, Pointer, Tensor, data, rounded


class Machine(Schedule):
    """Runs one program, or several that wait for each other."""

    def __init__(self, seed: int = 0, resident: int | None = None) -> None:
        super().__init__(seed, resident)
        self._next_copy = 0
        self._released: dict[
            tuple[int, int], Clock
        ] = {}  # (array, index) -> what was released there
        self._adders: dict[tuple[int, int], tuple[str, int]] = {}  # who added last, and when
        self._version = 0  # of all numbers in global memory that programs wait for

    # Shared memory

    def copy(
        self, box: Descriptor, start: Sequence[Any], barrier: Barrier, tile: Tile, pred: Any = True
    ) -> None:
        """Start a copy from global into shared memory; its bytes count at the barrier."""
        if not bool(pred):
            return
        (region,) = tile.regions
        values = box.read([int(x) for x in start])
        if values.shape != region.data.shape or box.dtype != tile.dtype:
            raise Fault(f"copies {values.shape} into a tile of {region.data.shape}")
        self._before_write(region)
        self.me.tick()
        region.data[...] = np.nan
        region.copy, region.reads, region.stored = self._next_copy, {}, None
        self.under_way.append(Copy(self._next_copy, region, values, barrier))
        self._next_copy += 1
        self.switch()

    def write(self, tile: Tile, value: Tensor) -> None:
        (region,) = tile.regions
        self._before_write(region)
        values = tile.view([region.data])
        if values.shape != value.data.shape:
            raise Fault(f"stores {value.data.shape} into a tile of {values.shape}")
        values[...] = value.data  # a view of the region, transposed or not
        region.copy, region.reads, region.fenced = None, {}, False
        region.stored = self.me.name, self.me.tick()
        self.me.unfenced.append(region)
        self.switch()

    def fence(self) -> None:
        """What this partition has stored may be multiplied, by those that know of it."""
        for region in self.me.unfenced:
            region.fenced = True
        self.me.unfenced = []

    def read(self, tile: Tile) -> Tensor:
        now = self.me.tick()
        for region in tile.regions:
            self._before_read(region)
            region.reads[self.me.name] = now
        return Tensor(tile.values().copy(), tile.dtype)

    def _before_write(self, region: Region) -> None:
        for who, when in region.reads.items():
            if when is None or self.me.clock.get(who, 0) < when:
                raise Fault(f"writes a tile that {who} may still read")
        if region.copy is not None and region.copy not in self.me.copies and not region.reads:
            raise Fault("writes a tile that a copy may still be writing")

    def _before_read(self, region: Region) -> None:
        if region.stored:
            who, when = region.stored
            if self.me.clock.get(who, 0) < when:
                raise Fault(f"reads a tile without having waited for what {who} stores")
        elif region.copy is None:
            raise Fault("reads a tile that nothing was copied to")
        elif region.copy not in self.me.copies:
            raise Fault("reads a tile without having waited for its copy")

    # Barriers

    def init(self, barrier: Barrier, count: Any = 1) -> None:
        barrier.count = int(count)

    def arrive(self, barrier: Barrier, count: Any = 1, pred: Any = True) -> None:
        if not bool(pred):
            return
        self.me.tick()
        learn(barrier.clock, self.me.clock)
        barrier.copies |= self.me.copies
        barrier.arrived += int(count)
        barrier.settle()
        self.switch()

    def expect(self, barrier: Barrier, size: Any, pred: Any = True) -> None:
        if not bool(pred):
            return
        barrier.bytes += int(size)
        self.arrive(barrier, 1)

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        """Until the phase of this parity is over."""
        if not bool(pred):
            return
        parity = int(phase)
        if parity not in (0, 1):
            raise Fault(f"waits for phase {parity}, which is no parity")
        self.wait_until(lambda: barrier.phase & 1 != parity)
        clock, copies = barrier.past
        learn(self.me.clock, clock)
        self.me.copies |= copies

    # Products

    def multiply(
        self, a: Any, b: Tile, acc: Any, use_acc: Any = True, is_async: Any = False, **_: Any
    ) -> Any:
        """acc + a b. Operands in shared memory are read until it is waited for."""
        value = acc.value if isinstance(acc, Accumulator) else acc.data
        regions = [region for x in (a, b) if isinstance(x, Tile) for region in x.regions]
        for region in regions:
            self._before_read(region)
            if region.stored and not region.fenced:
                raise Fault("multiplies what was stored without a fence")
            region.reads[self.me.name] = None
        if a.dtype != b.dtype:
            raise Fault(f"multiplies {a.dtype} and {b.dtype}")
        left = a.values() if isinstance(a, Tile) else a.data
        with np.errstate(all="ignore"):
            product = left.astype(np.float32) @ b.values()
            product = product + value if bool(use_acc) else product
        if product.shape != value.shape:
            raise Fault(f"adds a product of {product.shape} to {value.shape}")
        self.me.groups += 1
        self.me.reads.append((self.me.groups, regions))
        result = Accumulator(product, self.me.groups)
        self.switch()
        return result if is_async else self.finish(0, [result])

    def finish(self, pending: Any, deps: Sequence[Any] = ()) -> Any:
        """Wait until at most `pending` products are under way; deps with their values."""
        me = self.me
        done = me.groups - int(pending)
        now = me.tick()
        finished = [regions for group, regions in me.reads if group <= done]
        me.reads = [(group, regions) for group, regions in me.reads if group > done]
        reading = {id(region) for _, regions in me.reads for region in regions}
        for regions in finished:
            for region in regions:
                if id(region) not in reading:
                    region.reads[me.name] = now
        out = []
        for dep in deps:
            if isinstance(dep, Accumulator) and dep.group > done:
                raise Fault("takes a product that is still under way")
            out.append(Tensor(dep.value, "fp32") if isinstance(dep, Accumulator) else dep)
        self.switch()
        return out[0] if len(out) == 1 else tuple(out)

    # Global memory

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
        where, keep = pointer.places(mask)
        out = np.full(where.shape, data(other), pointer.array.dtype)
        out[keep] = pointer.array[where[keep]]
        return Tensor(out, pointer.dtype.element_ty)

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        values = np.asarray(data(value))
        where, keep = pointer.places(
            mask, np.broadcast_shapes(np.shape(pointer.offset), values.shape)
        )
        if values.dtype.kind == "f":
            values = rounded(values, pointer.dtype.element_ty)
        pointer.array[where[keep]] = np.broadcast_to(values, where.shape)[keep]

    def add(self, pointer: Pointer, value: Any, mask: Any = None, sem: str | None = None) -> Any:
        """Atomically: of a tile, a sum whose order must be fixed; of a number, one to wait for."""
        if isinstance(value, Tensor) and value.data.ndim:
            return self._add_tile(pointer, value, mask)
        return self._add_number(pointer, int(value), sem)

    def _add_tile(self, pointer: Pointer, value: Tensor, mask: Any) -> None:
        where, keep = pointer.places(mask, value.data.shape)
        now = self.me.tick()
        key = id(pointer.array), int(where.flat[0])
        last, when = self._adders.get(key, (self.me.name, 0))
        if last != self.me.name and self.me.clock.get(last, 0) < when:
            raise Fault(f"adds to what {last} adds to, in no fixed order")
        self._adders[key] = self.me.name, now
        pointer.array[where[keep]] += value.data[keep]
        self.switch()

    def _add_number(self, pointer: Pointer, value: int, sem: str | None) -> Tensor:
        where, _ = pointer.places(None, ())
        key = id(pointer.array), int(where)
        if not value and self.me.polled == (key, self._version):  # nothing has changed since
            version = self._version
            self.wait_until(lambda: self._version != version)
        else:
            self.switch()
        self.me.tick()
        old = pointer.array[key[1]]
        known = self._released.setdefault(key, {})
        if sem in ("release", "acq_rel", None):  # Triton's default is acq_rel
            learn(known, self.me.clock)
        if sem in ("acquire", "acq_rel", None):
            learn(self.me.clock, known)
        if value:
            pointer.array[key[1]] += value
            self._version += 1
        self.me.polled = key, self._version
        return Tensor(np.int64(old))
