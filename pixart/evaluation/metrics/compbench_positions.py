"""How well two boxes are in a stated position to each other, by T2I-CompBench's rule (arXiv:2307.06350).

"next to", "near" and "on side of" hold within 150 pixels along either axis, and less and less beyond. Which
pixels: their detector sees pictures whose shorter side was resized to 479 (the longer to 480 at most), and its
boxes are in those. So boxes of other pictures are scaled to that first; 150 pixels of the picture itself
would make the score depend on its resolution.
"""

from collections.abc import Sequence

OFFICIAL_SIDE, OFFICIAL_LONGEST = 479, 480  # pixels of their detector's pictures
DISTANCE = 150.0  # of centres, in those pixels
OVERLAP = 0.1  # intersection over union, from which on a position holds less
BESIDE = ("next to", "on side of", "near")
# The axis, and the sign of the first object's centre from the second's.
DIRECTIONS = {
    "on the left of": (0, -1),
    "on the right of": (0, 1),
    "on the top of": (1, -1),
    "on the bottom of": (1, 1),
}


def scale_of(width: int, height: int) -> float:
    """What makes pixels of a picture those of their detector's."""
    return min(OFFICIAL_SIDE / min(width, height), OFFICIAL_LONGEST / max(width, height))


def position_score(
    place: str, first: Sequence[float], second: Sequence[float], scale: float = 1.0
) -> float:
    """From 0 to 1. first, second: left, top, right, bottom in pixels. place: of BESIDE or DIRECTIONS, any other
    scores 0."""
    apart = [
        scale * ((first[k] + first[k + 2]) / 2 - (second[k] + second[k + 2]) / 2) for k in (0, 1)
    ]
    if place in BESIDE:
        if min(map(abs, apart)) < DISTANCE:
            return 1.0
        return DISTANCE / max(map(abs, apart))
    if place not in DIRECTIONS:
        return 0.0
    axis, sign = DIRECTIONS[place]
    along = apart[axis] * sign
    if along <= 0 or along <= abs(apart[1 - axis]):
        return 0.0
    overlap = intersection_over_union(first, second)
    return 1.0 if overlap < OVERLAP else OVERLAP / overlap


def intersection_over_union(first: Sequence[float], second: Sequence[float]) -> float:
    """Of two boxes; 0 where both have no area."""
    sides = [max(0.0, min(first[k + 2], second[k + 2]) - max(first[k], second[k])) for k in (0, 1)]
    shared = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0
