"""Which blocks merge keys and values at which timesteps, and how many: a KV schedule.

Merging needs no training where a block is dense: R×R tokens become their mean (PixArt-Σ, section 3.2, without
the convolution and the norm that it trains). A block that was trained to merge keeps what it has, and a
schedule may merge its merged tokens further, by a whole factor. Imports no torch.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pixart.config import KVCompression, PixArtConfig, numbers_of, ranges_of
from pixart.files import check_text, near, parse_json, read_bounded, short

RATIOS = (1, 2, 3, 4)  # of the operator that merges
NOISIEST = 1000.0  # timesteps are of the 1,000 that every PixArt was trained with
MOST_RULES = 10_000
MOST_BYTES = 1 << 20
_LONGEST = 100_000  # characters
_NUMBER = r"\d{1,4}(?:\.\d{1,6})?"
_RULE = re.compile(rf"([\d,\s-]+):\s*(\d)\s*(?:@\s*({_NUMBER})\s*-\s*({_NUMBER})\s*)?", re.ASCII)
_KEYS = ("blocks", "ratio", "timesteps")


@dataclass(frozen=True)
class Rule:
    """Blocks that merge ratio × ratio tokens at timesteps from the first number, the noisier one, down to the
    second, both included."""

    blocks: tuple[int, ...]
    ratio: int
    timesteps: tuple[float, float] = (NOISIEST, 0.0)

    @property
    def is_bounded(self) -> bool:
        """Whether the timestep decides."""
        return self.timesteps != (NOISIEST, 0.0)

    def __str__(self) -> str:
        high, low = (_number(one) for one in self.timesteps)
        return f"{ranges_of(self.blocks)}:{self.ratio}" + (
            f"@{high}-{low}" if self.is_bounded else ""
        )


@dataclass(frozen=True)
class KVSchedule:
    """Rules, of which the last one that names a block and a timestep decides; where none does, a block does
    what it was made for."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "KVSchedule":
        """BLOCKS:RATIO[@HIGH-LOW], several with ";" between: "14-27:2; 0-13:2@1000-600"."""
        check_text("kv_schedule", text)
        if len(text) > _LONGEST:
            raise ValueError(
                f"kv_schedule must be {_LONGEST:,} characters at most, got {len(text):,}"
            )
        parts = [part for part in text.split(";") if part.strip()]
        _check_count(parts)  # before each takes its time
        return cls(tuple(map(_parse_rule, parts)))

    @classmethod
    def from_list(cls, values: object) -> "KVSchedule":
        """Of JSON: [{"blocks": "14-27", "ratio": 2, "timesteps": [1000, 600]}], the last one optional."""
        if not isinstance(values, list):
            raise ValueError(f"kv_schedule must be a list of rules, got {short(values)}")
        _check_count(values)
        return cls(tuple(map(_rule_of, values)))

    @classmethod
    def read(cls, place: str) -> "KVSchedule":
        """The schedule of a text, or of the JSON file that the text names: see from_list."""
        if not _RULE.fullmatch(place.split(";")[0].strip()) and Path(place).suffix == ".json":
            values = parse_json(read_bounded(Path(place), MOST_BYTES), place, unique=True)
            try:
                return cls.from_list(values)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        return cls.parse(place)

    def __str__(self) -> str:
        """What `parse` reads, in one form for all ways to write it."""
        return "; ".join(map(str, self.rules))

    def to_list(self) -> list[dict[str, Any]]:
        """What `from_list` reads."""
        return [
            {"blocks": ranges_of(rule.blocks), "ratio": rule.ratio}
            | ({"timesteps": [*rule.timesteps]} if rule.is_bounded else {})
            for rule in self.rules
        ]

    @property
    def is_bounded(self) -> bool:
        """Whether the timestep decides anything."""
        return any(rule.is_bounded for rule in self.rules)

    def check(self, config: PixArtConfig) -> None:
        """ValueError for blocks that a model does not have, or that cannot merge so."""
        for rule in self.rules:
            if rule.blocks[-1] >= config.depth:
                raise ValueError(
                    f"kv_schedule must be of blocks from 0 to {config.depth - 1} for this model, got "
                    f"{rule.blocks[-1]}"
                )
            for block in rule.blocks:
                check_ratio(config.kv_compression, block, rule.ratio)

    def ratios(self, timestep: float, config: PixArtConfig) -> tuple[int, ...]:
        """What each block merges at a timestep, () where that is what all were made for."""
        own = own_ratios(config)
        found = list(own)
        for rule in self.rules:
            if rule.timesteps[0] >= timestep >= rule.timesteps[1]:
                for block in rule.blocks:
                    found[block] = rule.ratio
        return () if tuple(found) == own else tuple(found)


@lru_cache(maxsize=64)
def own_ratios(config: PixArtConfig) -> tuple[int, ...]:
    """What each block merges by what it was made for."""
    one = config.kv_compression
    return tuple(
        one.ratio if one is not None and one.applies_to(layer) else 1
        for layer in range(config.depth)
    )


def check_ratios(ratios: Sequence[int], config: PixArtConfig) -> None:
    """ValueError unless they are () or a ratio for each block that it can have."""
    if len(ratios) not in (0, config.depth):
        raise ValueError(f"kv_ratios must be none or {config.depth}, got {len(ratios)}")
    for block, ratio in enumerate(ratios):
        check_ratio(config.kv_compression, block, ratio)


def check_ratio(compression: KVCompression | None, block: int, ratio: int) -> None:
    """ValueError for a ratio that a block cannot have beside what it was trained for."""
    if isinstance(ratio, bool) or ratio not in RATIOS:
        raise ValueError(f"kv_schedule must have ratios of 1, 2, 3 or 4, got {ratio}")
    if compression is None or not compression.applies_to(block) or ratio == compression.ratio:
        return
    if compression.sampling == "uniform_every":
        raise ValueError(
            f"kv_schedule must leave block {block} its ratio {compression.ratio}: what it takes of the "
            f"tokens is no grid that could be merged further, got {ratio}"
        )
    if ratio % compression.ratio:
        raise ValueError(
            f"kv_schedule must give block {block} a multiple of {compression.ratio}, which it was trained "
            f"to merge, got {ratio}"
        )


def _check_count(rules: Sequence[object]) -> None:
    if not rules or len(rules) > MOST_RULES:
        raise ValueError(f"kv_schedule must have 1 to {MOST_RULES:,} rules, got {len(rules):,}")


def _parse_rule(text: str) -> Rule:
    match = _RULE.fullmatch(text.strip())
    if not match:
        raise ValueError(
            f"kv_schedule must be BLOCKS:RATIO[@HIGH-LOW] like 14-27:2@1000-600, got {short(text.strip())}"
        )
    ends = (NOISIEST, 0.0) if match[3] is None else (float(match[3]), float(match[4]))
    return _rule(_parse_blocks(match[1]), int(match[2]), ends)


def _rule_of(values: object) -> Rule:
    if not isinstance(values, Mapping):
        raise ValueError(f"kv_schedule must have rules of {', '.join(_KEYS)}, got {short(values)}")
    if unknown := [key for key in values if key not in _KEYS]:
        meant = near(str(unknown[0]), _KEYS)
        way_out = f"did you mean {meant!r}?" if meant else f"known are {', '.join(_KEYS)}"
        raise ValueError(f"unknown key {short(unknown[0])} of a rule; {way_out}")
    blocks, ratio = values.get("blocks"), values.get("ratio")
    ends = values.get("timesteps", [NOISIEST, 0.0])
    if not isinstance(blocks, str):
        raise ValueError(f'blocks of a rule must be text like "14-27", got {short(blocks)}')
    if not isinstance(ends, list) or len(ends) != 2 or not all(map(_is_number, ends)):
        raise ValueError(f"timesteps of a rule must be two numbers, got {short(ends)}")
    if not isinstance(ratio, int) or isinstance(ratio, bool):
        raise ValueError(f"ratio of a rule must be a whole number, got {short(ratio)}")
    return _rule(_parse_blocks(blocks), ratio, (float(ends[0]), float(ends[1])))


def _rule(blocks: tuple[int, ...], ratio: int, timesteps: tuple[float, float]) -> Rule:
    if ratio not in RATIOS:
        raise ValueError(f"kv_schedule must have ratios of 1, 2, 3 or 4, got {ratio}")
    high, low = timesteps
    if not NOISIEST >= high >= low >= 0:
        raise ValueError(
            f"kv_schedule must have timesteps HIGH-LOW from {NOISIEST:g} down to 0, got "
            f"{_number(high)}-{_number(low)}"
        )
    return Rule(blocks, ratio, timesteps)


@lru_cache(maxsize=256)
def _parse_blocks(text: str) -> tuple[int, ...]:
    blocks: set[int] = set()
    for part in text.split(","):
        if not (span := numbers_of(part)):
            raise ValueError(f"kv_schedule must have blocks like 14-27 or 3,5, got {short(part)}")
        blocks.update(span)
    return tuple(sorted(blocks))


def _is_number(value: object) -> bool:
    # Whole numbers may be beyond a float's range.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")
