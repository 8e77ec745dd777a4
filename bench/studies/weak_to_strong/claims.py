"""What the papers claim of the experiments, and what the losses say to it.

One run of each experiment judges a claim by its scenes. Where both experiments of a claim were run
again with several seeds, these alone judge: the first run chose which claims needed them, and may have
begun from an earlier embedded model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from bench.studies.weak_to_strong.differences import Difference, over_scenes, over_seeds

Results = Mapping[str, Any]  # as results.json has it
AGREES, DISAGREES = "Agrees", "Does not agree"
UNDECIDED, UNDECIDABLE = "Not decided here", "Not decidable at this size"


@dataclass(frozen=True)
class Claim:
    """That an experiment has the lower loss. at: the place of the mark, first or last."""

    low: str
    high: str
    words: str
    at: int = 0


# What stands for a row of PixArt-Σ's table 3a and 3b here, with that row's FID at 512 px.
DEPTHS = {"conv shallow third": 9.278, "conv middle third": 9.063, "conv deep third": 8.532}
SAMPLINGS = {
    "conv deep half, mean": 8.505,
    "discard deep half": 8.918,
    "average deep half": 9.415,
}


def _as_ranked(fids: Mapping[str, float], source: str) -> tuple[Claim, ...]:
    """For each two: that the one of lower FID in the paper's table ends lower."""
    return tuple(
        Claim(
            low,
            high,
            f"“{low}” ends lower than “{high}” "
            f"(table {source}: FID {fids[low]:.3f} against {fids[high]:.3f})",
            at=-1,
        )
        for low, high in combinations(sorted(fids, key=fids.__getitem__), 2)
    )


INTERPOLATION = Claim("interpolated", "extrapolated", "interpolation starts lower")
AVERAGING = Claim(
    "conv deep half, mean",
    "conv deep half, random",
    "averaging starts lower than random weights",
)
CALIBRATION = Claim(
    "conv deep half, calibrated",
    "conv deep half, mean",
    "the calibrated start lies lower than averaging (ours, not the paper's)",
)
DEPTHS_RANKED, SAMPLINGS_RANKED = _as_ranked(DEPTHS, "3a"), _as_ranked(SAMPLINGS, "3b")
CLAIMS = (INTERPOLATION, AVERAGING, CALIBRATION, *DEPTHS_RANKED, *SAMPLINGS_RANKED)


def undecided(results: Results) -> list[Claim]:
    """The claims that the first run of each experiment does not decide."""
    return [claim for claim in CLAIMS if not _first(claim, results).is_decided]


def judge(claim: Claim, results: Results) -> str:
    """Whether a claim holds, as a sentence or two."""
    first, again = _first(claim, results), _again(claim, results)
    step = _experiment(results, claim.low)["marks"][claim.at]["step"]
    start = f"At step {step} the loss of “{claim.high}” minus that of “{claim.low}” is "
    if again is None:
        return f"**{_verdict(first, UNDECIDED)}**: {claim.words}. {start}{_figure(first)}."
    verdict, seeds = _verdict(again, UNDECIDABLE), len(again.each)
    each = ", ".join(f"{mean:+.5f}" for mean in again.each)
    sentences = [
        f"**{verdict}**: {claim.words}.",
        f"{start}{_figure(again)} over {seeds} seeds ({each}); {again.factor:.2f} standard errors "
        f"decide.",
    ]
    if verdict == UNDECIDABLE:
        sentences.append(
            f"A study of so many seeds and scenes sees a difference of {again.detectable:.5f} four "
            f"times in five; this one is {abs(again.mean):.5f}."
        )
    turned = ", the other way" if first.mean * again.mean < 0 else ""
    return " ".join([*sentences, f"The first run had {_figure(first)}{turned}."])


def seeds_of(results: Results, name: str) -> dict[int, dict[str, Any]]:
    """The runs of an experiment that were made again, by seed."""
    runs = results.get("repeats", {}).get("runs", ())
    return {one["seed"]: one for one in runs if one["name"] == name}


def _first(claim: Claim, results: Results) -> Difference:
    low, high = (
        _experiment(results, name)["marks"][claim.at]["losses"] for name in (claim.low, claim.high)
    )
    return over_scenes(low, high)


def _again(claim: Claim, results: Results) -> Difference | None:
    """Over the seeds that both experiments have; None where they are fewer than two."""
    lows, highs = seeds_of(results, claim.low), seeds_of(results, claim.high)
    common = sorted(lows.keys() & highs.keys())
    if len(common) < 2:
        return None
    return over_seeds(
        *([runs[seed]["marks"][claim.at]["losses"] for seed in common] for runs in (lows, highs))
    )


def _experiment(results: Results, name: str) -> dict[str, Any]:
    return next(one for one in results["experiments"] if one["name"] == name)


def _verdict(difference: Difference, otherwise: str) -> str:
    if not difference.is_decided:
        return otherwise
    return AGREES if difference.mean > 0 else DISAGREES


def _figure(difference: Difference) -> str:
    return f"{difference.mean:+.5f} ± {difference.error:.5f}"
