"""Which pictures of a set show the same: resized, recompressed, or cropped by 2 % at their sides.

A perceptual hash alone decides nothing. The 64 bits of a DCT (Zauner 2010) move by more than 4 when 2 %
are cut off a picture with detail, and pictures of one colour have no bits at all. So the hash only finds
who is to be compared: each picture's own against those of all others cropped in 16 ways, within a
Hamming distance of 4. Then the thumbnails of the two are laid over each other, the crop fitted, and
every place of one must be as in the other, in brightness and colour.
"""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, CHROMA = 32, 8  # pixels of a thumbnail's brightness, and of its two colours
THUMBNAIL = SIDE**2 + 2 * CHROMA**2  # bytes
MOST = 4  # bits that the hashes of two candidates differ in
CROPS = ((0.0, 0.0), (0.0, 0.02), (0.02, 0.0), (0.02, 0.02))
_LOW = 8  # the DCT's lowest frequencies, of both directions
# A wave of one level of brightness has 16; below, coefficients are the rounding of plain colours.
_SILENCE = 8.0
_BANDS = 5  # MOST + 1: of two hashes within MOST, one band at least is the same in both
_AT_ONCE = 1 << 21  # pairs of hashes
_FITTED = 512  # pairs of thumbnails
_MOST_CUT = 0.025  # of a side
_ROUNDS = 4
# Of a fit: levels of noise over the share that a crop may be expected to take.
_STIFFNESS = (2.0 / 0.01) ** 2
# What one crop of a picture may differ from it by, in levels of 256: at any place DEVIATION times the change
# around it and NOISE, on the whole QUIET and SHARE of the variance where there is detail; COLOUR.
NOISE, DEVIATION, QUIET, SHARE, COLOUR, PLAIN = 16.0, 1.0, 2.1, 0.12, 20, 4
# Of the change of colour around a place: 2 % of a side move it by .16 of one of CHROMA places.
_BLEEDS = 0.25
# Of the means of two: what 2 % off each side move, at most, of the range from darkest to lightest.
_MEAN, _MOVED = 3.0, 0.1


def thumbnail(image: "Image") -> "np.ndarray":
    """What pictures are compared by: uint8 (THUMBNAIL,), brightness 32 x 32, then Cb and Cr 8 x 8."""
    from PIL.Image import Resampling

    small = image.resize((SIDE, SIDE), Resampling.BILINEAR).convert("YCbCr")
    light, *colours = small.split()
    parts = [light, *(colour.resize((CHROMA, CHROMA), Resampling.BILINEAR) for colour in colours)]
    return np.concatenate([np.asarray(part, dtype=np.uint8).ravel() for part in parts])


def hashes(thumbnails: "np.ndarray", *, only_whole: bool = False) -> "np.ndarray":
    """uint64 (N, 16): the hashes of thumbnails (N, THUMBNAIL), of each as it is and cropped. only_whole:
    (N, 1), as it is."""
    light = _light(thumbnails)
    count = 1 if only_whole else len(CROPS)
    maps = _cropped_cosines()[: count * _LOW]
    found = (maps @ light @ maps.T).reshape(-1, count, _LOW, count, _LOW)
    found = found.transpose(0, 1, 3, 2, 4).reshape(len(light), count**2, _LOW**2)
    found = np.where(np.abs(found) < _SILENCE, 0, found)
    middle = np.median(found[..., 1:], axis=-1, keepdims=True)
    return np.packbits(found > middle, axis=-1).view(">u8")[..., 0].astype(np.uint64)


def _light(thumbnails: "np.ndarray") -> "np.ndarray":
    return thumbnails[:, : SIDE**2].reshape(-1, SIDE, SIDE).astype(np.float32)


@cache
def _cropped_cosines() -> "np.ndarray":
    """(4·8, 32): for each of CROPS what takes a row of pixels to its DCT's low end."""
    place = (np.arange(SIDE) + 0.5) / SIDE
    waves = np.cos(np.pi * np.arange(_LOW)[:, None] * place) * (2 / SIDE) ** 0.5
    waves[0] *= 0.5**0.5
    ends = np.arange(SIDE + 1) / SIDE
    maps = []
    for before, behind in CROPS:
        cut = before + (1 - before - behind) * ends
        shared = np.minimum(cut[1:, None], ends[1:]) - np.maximum(cut[:-1, None], ends[:-1])
        shared = shared.clip(0)
        maps.append(waves @ (shared / shared.sum(1, keepdims=True)))
    return np.concatenate(maps).astype(np.float32)


def fitted(whole: "np.ndarray", part: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """How brightness (P, 32, 32) of pictures deviates from that of those they may be cut from: residual
    and the levels that it may be compared with, after a crop of at most 2.5 % at each side is fitted."""
    cuts = np.zeros((len(whole), 4), np.float32)  # left, right, top, bottom
    place = ((np.arange(SIDE) + 0.5) / SIDE).astype(np.float32)
    for _ in range(_ROUNDS):
        seen = _cut(whole, cuts)
        down, right = np.gradient(seen, axis=(1, 2))
        down, right = down * SIDE, right * SIDE
        slopes = np.stack([right * (1 - place), -right * place,
                           down * (1 - place)[:, None], -down * place[:, None]], -1)  # fmt: skip
        slopes = slopes.reshape(len(whole), -1, 4)
        turned = slopes.transpose(0, 2, 1)
        lacking = (part - seen).reshape(len(whole), -1, 1)
        system = turned @ slopes + _STIFFNESS * np.eye(4, dtype=np.float32)
        step = np.linalg.solve(system, turned @ lacking - _STIFFNESS * cuts[..., None])
        cuts = (cuts + step[..., 0]).clip(0, _MOST_CUT)
    seen = _cut(whole, cuts)
    low, high = _neighbours(seen)
    return np.abs(part - seen), high - low


def _cut(light: "np.ndarray", cuts: "np.ndarray") -> "np.ndarray":
    """Pictures without what `cuts` (P, 4) takes off them, at their size again."""
    return _rows(_rows(light, cuts[:, 2:]).transpose(0, 2, 1), cuts[:, :2]).transpose(0, 2, 1)


def _rows(light: "np.ndarray", cuts: "np.ndarray") -> "np.ndarray":
    before, behind = cuts[:, :1], cuts[:, 1:]
    place = (np.arange(SIDE) + 0.5) / SIDE
    at = (before + (1 - before - behind) * place) * SIDE - 0.5
    weights = (1 - np.abs(at.clip(0, SIDE - 1)[..., None] - np.arange(SIDE))).clip(0)
    return (weights.astype(np.float32)) @ light


def _neighbours(light: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """The least and the most of each place and its eight neighbours. light: (P, side, side)."""
    wide = np.pad(light, ((0, 0), (1, 1), (1, 1)), mode="edge")
    side = light.shape[1]
    rows = [wide[:, k : k + side] for k in range(3)]
    low, high = np.minimum.reduce(rows), np.maximum.reduce(rows)
    columns = [slice(k, k + side) for k in range(3)]
    return (
        np.minimum.reduce([low[:, :, k] for k in columns]),
        np.maximum.reduce([high[:, :, k] for k in columns]),
    )


def same(first: "np.ndarray", second: "np.ndarray") -> "np.ndarray":
    """bool (P,): which pairs of thumbnails (P, THUMBNAIL) show the same, one of them cropped or not."""
    found = np.zeros(len(first), bool)
    for start in range(0, len(first), _FITTED):
        part = slice(start, start + _FITTED)
        found[part] = _same(first[part], second[part])
    return found


def _same(first: "np.ndarray", second: "np.ndarray") -> "np.ndarray":
    found = (first == second).all(1)
    open_ = np.flatnonzero(~found)
    open_ = open_[_have_same_colours(first[open_], second[open_])]
    if len(open_):
        a, b = _light(first[open_]), _light(second[open_])
        found[open_] = _is_part(a, b) | _is_part(b, a)
    return found


def _have_same_colours(first: "np.ndarray", second: "np.ndarray") -> "np.ndarray":
    one, other = (part[:, SIDE**2 :].astype(np.int16) for part in (first, second))
    changes = np.maximum(np.ptp(one.reshape(-1, 2, CHROMA**2), 2).max(1),
                         np.ptp(other.reshape(-1, 2, CHROMA**2), 2).max(1))  # fmt: skip
    apart = np.abs(one - other)
    # What is of one colour may differ by the rounding of a JPEG alone.
    most = np.minimum(COLOUR, PLAIN + changes)
    found = apart.max(1, initial=0) <= most + _BLEEDS * changes
    chosen = np.flatnonzero(found)
    if len(chosen):
        low, high = _neighbours(one[chosen].reshape(-1, CHROMA, CHROMA))
        moved = _BLEEDS * (high - low).reshape(len(chosen), -1)
        found[chosen] = (apart[chosen] - moved).max(1) <= most[chosen]
    return found


def _is_part(whole: "np.ndarray", part: "np.ndarray") -> "np.ndarray":
    found = _may_be_part(whole, part)
    chosen = np.flatnonzero(found)
    if len(chosen):
        whole, part = whole[chosen], part[chosen]
        residual, span = fitted(whole, part)
        worst = (residual / (NOISE + span)).max((1, 2))
        # Resampling errs where there is detail: of a small thing on plain ground little is forgiven.
        allowed = QUIET**2 + SHARE * (span > NOISE).mean((1, 2)) * whole.var((1, 2))
        found[chosen] = (worst <= DEVIATION) & (np.square(residual).mean((1, 2)) <= allowed)
    return found


def _may_be_part(whole: "np.ndarray", part: "np.ndarray") -> "np.ndarray":
    """False only where the fit would say no: no crop takes a place further than to its neighbours."""
    low, high = _neighbours(whole)
    outside = np.maximum(low - part, 0) + np.maximum(part - high, 0)
    least: np.ndarray = np.square(outside).mean((1, 2))
    return least <= QUIET**2 + SHARE * whole.var((1, 2))


class Groups:
    """Which of N things belong together."""

    def __init__(self, count: int) -> None:
        self.parent = np.arange(count)

    def root(self, one: int) -> int:
        parent = self.parent
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = int(parent[one])
        return one

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        self.parent[max(one, other)] = min(one, other)

    def roots(self) -> "np.ndarray":
        """The first of each thing's group."""
        while (self.parent[self.parent] != self.parent).any():
            self.parent = self.parent[self.parent]
        return self.parent


def find_groups(thumbnails: "np.ndarray", at_once: int = 1024) -> "np.ndarray":
    """int64 (N,): of each picture the first of those that show the same. thumbnails: uint8 (N, THUMBNAIL),
    may lie in a file; `at_once` of them are in memory, and some 100 bytes of every one."""
    count = len(thumbnails)
    groups = Groups(count)
    own = np.zeros(count, np.uint64)
    means = _Means(count)
    for start in range(0, count, at_once):
        part = np.asarray(thumbnails[start : start + at_once])
        own[start : start + at_once] = hashes(part, only_whole=True)[:, 0]
        means.put(start, part)
    near = _Near(own)
    for run in near.runs():
        _join_alike(thumbnails, run, means, groups)
    for start in range(0, count, at_once):
        part = np.asarray(thumbnails[start : start + at_once])
        for one, other in near.pairs(hashes(part), start):
            roots = groups.roots()
            chosen = means.alike(one, other) & (roots[one] != roots[other])
            one, other = one[chosen], other[chosen]
            for begin in range(0, len(one), _FITTED):
                a, b = one[begin : begin + _FITTED], other[begin : begin + _FITTED]
                is_same = same(thumbnails[a], thumbnails[b])
                for first, second in zip(a[is_same], b[is_same], strict=True):
                    groups.join(int(first), int(second))
    return groups.roots()


def represented(
    thumbnails: "np.ndarray", groups: "np.ndarray", order: "np.ndarray"
) -> "np.ndarray":
    """int64 (N,): of each picture the first, by `order`, that shows the same and is a copy of none itself.
    groups: what find_groups found; order: places, the best first.

    In a group each is like another, and the first need not be like the last: pictures out of a film that turns
    are a row of which each is a little beside the one before.
    """
    found = np.arange(len(groups))
    ranked = order[np.argsort(groups[order], kind="stable")]
    edges = np.flatnonzero(np.diff(groups[ranked], prepend=-1, append=-1))
    for start, end in zip(edges, edges[1:], strict=False):
        rest = ranked[start:end]
        while len(rest) > 1:
            one, rest = rest[0], rest[1:]
            parts = [rest[at : at + _FITTED] for at in range(0, len(rest), _FITTED)]
            is_same = np.concatenate([
                same(np.broadcast_to(thumbnails[one], (len(part), THUMBNAIL)), thumbnails[part])
                for part in parts
            ])  # fmt: skip
            found[rest[is_same]] = one
            rest = rest[~is_same]
    return found


class _Means:
    """Mean brightness, Cb and Cr of every picture, and the range of its brightness: to pass over most
    pairs at once."""

    def __init__(self, count: int) -> None:
        self.values = np.zeros((count, 3), np.float32)
        self.moves = np.zeros(count, np.float32)  # how far a crop may move the means

    def put(self, start: int, thumbnails: "np.ndarray") -> None:
        ends = (0, SIDE**2, SIDE**2 + CHROMA**2, THUMBNAIL)
        parts = [thumbnails[:, a:b] for a, b in zip(ends, ends[1:], strict=False)]
        here = slice(start, start + len(thumbnails))
        self.values[here] = np.stack([part.mean(1) for part in parts], 1)
        self.moves[here] = _MEAN + _MOVED * np.max([np.ptp(part, 1) for part in parts], 0)

    def alike(self, one: "np.ndarray", other: "np.ndarray") -> "np.ndarray":
        moves = np.maximum(self.moves[one], self.moves[other])
        apart = np.abs(self.values[one] - self.values[other]).max(1)
        return np.asarray(apart <= moves)


def _join_alike(thumbnails: "np.ndarray", run: "np.ndarray", means: _Means, groups: Groups) -> None:
    """Compare pictures of the same hash, in the order of their brightness: thousands may be of one colour.
    What joined another is compared with no third: all of it are compared with the first."""
    run = run[np.argsort(means.values[run, 0], kind="stable")]
    free = np.ones(len(run), bool)
    light = means.values[run, 0]
    furthest = light + means.moves[run].max()
    for place, one in enumerate(run):
        if not free[place]:
            continue
        end = int(np.searchsorted(light, furthest[place], "right"))
        others = place + 1 + np.flatnonzero(free[place + 1 : end])
        others = others[means.alike(np.full(len(others), one), run[others])]
        for start in range(0, len(others), _FITTED):
            some = others[start : start + _FITTED]
            first = np.broadcast_to(thumbnails[one], (len(some), THUMBNAIL))
            found = some[same(first, thumbnails[run[some]])]
            free[found] = False
            for other in run[found]:
                groups.join(int(one), int(other))


class _Near:
    """Hashes in bands, so that those within MOST of another are found without looking at all."""

    def __init__(self, own: "np.ndarray") -> None:
        self.own = own
        self.order = np.argsort(own, kind="stable")
        self.known, self.first, self.times = np.unique(
            own[self.order], return_index=True, return_counts=True
        )
        self.bands = [np.argsort(_band(self.known, number)) for number in range(_BANDS)]
        self.sorted = [_band(self.known, number)[order] for number, order in enumerate(self.bands)]

    def runs(self) -> "Iterator[np.ndarray]":
        """The pictures of each hash that several have."""
        for place in np.flatnonzero(self.times > 1):
            yield self.order[self.first[place] :][: self.times[place]]

    def pairs(self, cropped: "np.ndarray", start: int) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
        """Pictures of which a crop has nearly the hash of another that is not their own. cropped: the hashes
        (n, C) of those from `start` on."""
        place = np.repeat(np.arange(len(cropped)), cropped.shape[1]).astype(np.uint64)
        asked = np.unique(np.stack([place, cropped.ravel()], 1), axis=0)
        owner, wanted = asked[:, 0].astype(np.int64) + start, asked[:, 1]
        for number in range(_BANDS):
            band = _band(wanted, number)
            low = np.searchsorted(self.sorted[number], band, "left")
            found = np.searchsorted(self.sorted[number], band, "right") - low
            for some in _portions(found):
                query, at = _expanded(low[some], found[some])
                query += some.start
                near = self.bands[number][at]
                close = _distance(wanted[query], self.known[near]) <= MOST
                close &= self.known[near] != self.own[owner[query]]
                couples = np.unique(np.stack([owner[query[close]], near[close]], 1), axis=0)
                yield from self._members(couples[:, 0], couples[:, 1])

    def _members(
        self, one: "np.ndarray", place: "np.ndarray"
    ) -> "Iterator[tuple[np.ndarray, np.ndarray]]":
        """Each picture beside every one that has a hash."""
        times = self.times[place]
        for some in _portions(times):
            query, at = _expanded(self.first[place[some]], times[some])
            yield one[query + some.start], self.order[at]


def _band(found: "np.ndarray", number: int) -> "np.ndarray":
    return (found >> np.uint64(13 * number)) & np.uint64(0x1FFF)


def _portions(counts: "np.ndarray") -> Iterator[slice]:
    """Parts of a list whose counts add up to _AT_ONCE at most, where one alone does not exceed it."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + _AT_ONCE, "right")))
        yield slice(start, end)
        start = end


def _expanded(first: "np.ndarray", counts: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """(which, first[which] + 0, 1 ... counts[which] - 1), for all in turn."""
    which = np.repeat(np.arange(len(counts)), counts)
    inner = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return which, first[which] + inner


_BITS = np.array([number.bit_count() for number in range(2**16)], np.uint8)


def _distance(one: "np.ndarray", other: "np.ndarray") -> "np.ndarray":
    """Bits that differ."""
    differ = np.ascontiguousarray(one ^ other).view(np.uint16).reshape(-1, 4)
    return _BITS[differ].sum(1)
