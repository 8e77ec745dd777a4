"""What a metric is: something that scores pictures one by one, or that compares two sets of them.

    Score       what a metric says of one picture
    Estimate    a number with its interval: what is printed. There is no other way to print one.
    Extractor   a network that turns a picture into numbers, kept on disk and shared by metrics
    PictureMetric, SetMetric

Estimate stands in a module of its own, below what computes it. A metric is opened for a run by
`pixart.evaluation.metrics.open_metric`, with a Context.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.evaluation.statistics.estimate import Estimate
from pixart.files import sha256_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image

    from pixart.evaluation.needs import Need
    from pixart.evaluation.store.entries import Entry


@dataclass(frozen=True)
class Score:
    """What a metric says of one picture. parts: of a question, of a kind of statement, ...; each a number
    that JSON holds."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What metrics are opened with.

    weights: a folder of weights and hub snapshots, `--weights`. files: `--file NAME=PATH`, what single
    metrics need (questions, phrases, detections). judge: `--judge`, who answers questions about
    pictures: "checker", a folder or hub id, or an http(s) address with `#MODEL`. options: `--option
    NAME=VALUE`, constants of metrics that are not the default; they are part of a metric's identity.
    """

    device: "torch.device"
    weights: Path | None = None
    judge: str | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)

    def digest_of(self, name: str) -> str:
        """16 hexadecimal digits of the contents of a `--file`, "" where it is not given or not there."""
        path = self.files.get(name)
        return sha256_of(path)[:16] if path is not None and path.is_file() else ""


class Extractor:
    """A network that turns pictures into rows of numbers. Loaded when it is first called.

    name: of network and preprocessing, a word for a folder ("inception-clean"). digest: hexadecimal, of
    the weights and the version of the code that prepares pictures: other features, another digest.
    """

    name: str
    width: int
    rows: int = 1  # per picture; several for patches

    def needs(self) -> "Sequence[Need]":
        """What is missing to run it; nothing is opened or downloaded."""
        return ()

    @property
    def digest(self) -> str:
        raise NotImplementedError

    def prepare(self, image: "Image", entry: "Entry") -> Any:
        """What of an RGB picture goes into the network; called in threads, once a picture."""
        raise NotImplementedError

    def __call__(self, prepared: Sequence[Any]) -> "np.ndarray":
        """(pictures, width), or (pictures, rows, width), fp32, finite."""
        raise NotImplementedError

    def release(self) -> None:
        """Let go of the network: one is in memory at a time."""


class Metric:
    """name: as the command line has it, with the variant ("fid-clean", "hpsv2.1"). version: other formulas
    or constants, another version; scores of two are never mixed. constants: everything that decides the
    number, for people and for the protocol's id. opposite: names of its numbers that are better
    the other way than the metric's own. unit: behind the number ("", "%", "x1000"). reads_prompts: False
    lets a folder of pictures be scored whose prompts nobody knows.
    """

    name: str
    version: str = "1"
    higher_is_better: bool = True
    opposite: Sequence[str] = ()
    unit: str = ""
    source: str = ""  # paper and code that define it
    reads_prompts: bool = True

    @property
    def constants(self) -> Mapping[str, Any]:
        return {}

    def needs(self) -> "Sequence[Need]":
        """What is missing to run it; nothing is opened or downloaded."""
        return ()

    def release(self) -> None:
        """Let go of the network."""


class PictureMetric(Metric):
    """Scores every picture by itself. extractor: whose features of the pictures it reads, None if it looks
    at the pictures."""

    extractor: Extractor | None = None

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        """A score for each entry. images: RGB, where there is no extractor; features: (n, width) of the
        extractor else. Raises ValueError for what it cannot score, never gives a substitute."""
        raise NotImplementedError

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The numbers of a set, by name; the metric's own is under its name. By default the mean over
        prompts of the mean over a prompt's pictures, with a bootstrap over prompts."""
        from pixart.evaluation.statistics.intervals import mean_over_prompts

        return {self.name: mean_over_prompts(entries, [one.value for one in scores])}


@dataclass(frozen=True)
class Features:
    """Rows of an extractor for pictures in order of their keys. values: (n, width) or (n, rows, width),
    fp32."""

    keys: Sequence[str]
    values: "np.ndarray"


class SetMetric(Metric):
    """Compares a set of pictures with a reference set, by the features of both. category_pictures: as many
    a category must have in both sets to be compared by itself; one of the constants."""

    extractor: Extractor
    category_pictures: int = 1000
    higher_is_better = False
    reads_prompts = False

    def compare(
        self,
        ours: Features,
        reference: "Features | Moments",
    ) -> Mapping[str, Estimate]:
        """The numbers by name. ValueError where the reference does not have what it needs (moments alone
        have no neighbours)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Moments:
    """What pytorch-fid's and our `.npz` files keep of a reference set: mean (d,) and covariance (d, d),
    unbiased, fp64; n None where the file does not say."""

    mean: "np.ndarray"
    covariance: "np.ndarray"
    n: int | None = None
    extractor: str | None = None  # "NAME-DIGEST" where the file says
