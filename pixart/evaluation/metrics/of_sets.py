"""What metrics that compare sets have in common: whose features, how sure, and what a reference lacks."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixart.evaluation.metric import Context, Features, Moments, SetMetric
from pixart.evaluation.metrics.cosine import digest_of
from pixart.evaluation.networks import open_extractor
from pixart.evaluation.statistics.estimate import Estimate

if TYPE_CHECKING:
    from pixart.evaluation.needs import Need

INTERVALS = ("jackknife", "none")
NORMAL = 1.959964  # standard errors on either side of a 95 % interval


class FeatureMetric(SetMetric):
    """With `--option features=NAME`, an extractor of pixart.evaluation.networks, in place of the metric's
    own; `--option interval=none` leaves out what takes long."""

    usual = ""  # the extractor's name
    rows = 1  # that its features have of a picture

    def __init__(self, name: str, context: Context) -> None:
        self.name, self.device = name, context.device
        self.interval = context.options.get("interval", INTERVALS[0])
        if self.interval not in INTERVALS:
            raise ValueError(
                f"option interval must be one of {', '.join(INTERVALS)}, got {self.interval!r}"
            )
        self.extractor = open_extractor(context.options.get("features", self.usual), context)
        if self.extractor.rows != self.rows:
            raise ValueError(
                f"{name} needs features with one row a picture, {self.extractor.name} has "
                f"{self.extractor.rows}"
            )

    @property
    def constants(self) -> Mapping[str, Any]:
        return {
            "features": self.extractor.name,
            "weights": digest_of(self.extractor),
            "category_pictures": self.category_pictures,
        }

    def needs(self) -> "Sequence[Need]":
        return self.extractor.needs()

    def release(self) -> None:
        self.extractor.release()

    def features_of(self, reference: Features | Moments) -> Features:
        """ValueError for moments, which have no pairs and no neighbours."""
        if isinstance(reference, Moments):
            raise ValueError(
                f"{self.name} needs features of single reference pictures, mean and covariance are not "
                "enough; give the folder of pictures, or statistics made with --keep-features"
            )
        return reference

    def notes(self) -> tuple[str, ...]:
        """Where the features are not those of the name."""
        if self.extractor.name == self.usual:
            return ()
        return (
            f"By features of {self.extractor.name}, not of {self.usual}: other numbers than published.",
        )


def groups(features: Features) -> list[str]:
    """The prompt of each row: pictures of one are alike, and stand or fall together."""
    return [key.rpartition("/")[0] or key for key in features.keys]


def estimate(
    value: float,
    error: float,
    n: int,
    method: str,
    notes: Sequence[str] = (),
    *,
    least: float = -math.inf,
) -> Estimate:
    """A number with its standard error; an infinite one says nothing. least: below which it cannot be."""
    half = NORMAL * error
    return Estimate(
        value,
        max(least, value - half) if math.isfinite(error) else -math.inf,
        value + half,
        n,
        method,
        tuple(notes),
    )
