"""What a process holds of the memory that it asked glibc for: more than it uses, as freed blocks are kept.

Blocks of 32 MiB and more are mapped by themselves, and given back at once. Smaller ones lie in one heap, which is
given back from its end alone: what is freed below a block in use stays with the process, for blocks that fit
into it (malloc/malloc.c of glibc 2.39: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, both of which grow with what is freed).
Blocks that are not of tensors lie in between: the same work held a quarter more in one process of six
(512 px in the embedded world), so one hole of the largest block counts as lost.
"""

import bisect

LARGEST_KEPT = 32 * 2**20  # DEFAULT_MMAP_THRESHOLD_MAX of 64-bit systems
_PAGE = 4096
_ALIGNED = 64  # bytes: PyTorch asks for as much
_SPARE = 2**17  # M_TOP_PAD, which stays at the end


class Heap:
    """The blocks of one arena: they are what threads that compute share, as one allocates for all."""

    def __init__(self) -> None:
        self.mapped = 0  # bytes of blocks that have a mapping of their own
        self.peak = 0
        self._largest = 0  # of the blocks of the heap
        self._touched = self._end = (
            0  # of the heap: where it was written to, and where it is in use
        )
        self._free: list[tuple[int, int]] = []  # holes by their address: (address, bytes)
        self._used: dict[
            int, tuple[int, int]
        ] = {}  # by the caller's key; address -1 of mapped ones

    @property
    def held(self) -> int:
        """Bytes that the process holds."""
        return self.mapped + self._touched

    def take(self, key: int, size: int) -> None:
        """A block, whose key is free."""
        size = -(-(size + _ALIGNED) // _ALIGNED) * _ALIGNED
        if size >= LARGEST_KEPT:
            size = -(-size // _PAGE) * _PAGE
            self._used[key] = (-1, size)
            self.mapped += size
        else:
            self._used[key] = (self._place(size), size)
            self._largest = max(self._largest, size)
        self.peak = max(self.peak, self.held + self._largest)

    def give(self, key: int) -> None:
        """Free a block."""
        address, size = self._used.pop(key)
        if address < 0:
            self.mapped -= size
            return
        place = bisect.bisect(self._free, (address, size))
        if place < len(self._free) and self._free[place][0] == address + size:
            size += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == address:
            address, before = self._free.pop(place - 1)
            size, place = size + before, place - 1
        if address + size == self._end:
            self._end = address
            if self._touched - self._end > 2 * LARGEST_KEPT:
                self._touched = self._end + _SPARE
        else:
            self._free.insert(place, (address, size))

    def _place(self, size: int) -> int:
        """In the smallest hole that it fits in, or else at the end."""
        fitting = [(hole, place) for place, (_, hole) in enumerate(self._free) if hole >= size]
        if not fitting:
            self._end += size
            self._touched = max(self._touched, self._end)
            return self._end - size
        hole, place = min(fitting)
        address, _ = self._free.pop(place)
        if hole > size:
            self._free.insert(place, (address + size, hole - size))
        return address
