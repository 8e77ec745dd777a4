"""`statistics`: what data sets hold, as the papers' tables tell it.

PixArt-α, Tab. 1 (arXiv:2310.00426), and Σ's: total nouns, nouns per image, DN the distinct nouns, VN those
that appear more than 10 times, ACL the words of a caption. arXiv:2404.02883, Tab. 3: image-noun pairs, the sum
over images of the distinct nouns of their captions, and the mean of an aesthetic score. Pictures are not
opened. Memory grows with the distinct nouns, and with the files of captions and scores.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pixart.dataset.nouns import Nouns
from pixart.dataset.samples import Item, Rejected, Sample
from pixart.progress import counted

VALID = 10  # times that a valid noun appears more often than
LIMITS = (120, 300)  # tokens that α and Σ read of a caption
NORMAL = 1.959964  # standard deviations of a normal distribution that 95 % lie within
CHUNK = 256  # pictures whose captions are looked at together


@dataclass
class Mean:
    """The mean of numbers that are met one after another, with its standard error (Welford's method)."""

    n: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, value: float) -> None:
        self.n += 1
        away = value - self.mean
        self.mean += away / self.n
        self._squares += away * (value - self.mean)

    @property
    def margin(self) -> float | None:
        """Half the 95 % interval of the mean, by the normal distribution; None for less than two numbers."""
        if self.n < 2:
            return None
        return NORMAL * math.sqrt(self._squares / (self.n - 1) / self.n)


@dataclass
class Count:
    """What was counted of the captions of one name, "" for all, in one data set.

    images: with such a caption. uncaptioned: without. words, tokens: of all captions; over: captions with more
    tokens than each of LIMITS. nouns: how often each appears. pairs: sum over images of the distinct
    nouns of their captions.
    """

    data: str
    name: str
    images: int = 0
    uncaptioned: int = 0
    captions: int = 0
    words: int = 0
    tokens: int = 0
    over: list[int] = field(default_factory=lambda: [0] * len(LIMITS))
    nouns: Counter[str] = field(default_factory=Counter)
    pairs: int = 0
    score: Mean = field(default_factory=Mean)

    def add(
        self,
        captions: Sequence[str],
        nouns: Mapping[str, Sequence[str]],
        tokens: Mapping[str, int],
        score: float | None,
    ) -> None:
        """An image with its captions. nouns, tokens: by caption, where they are counted."""
        if not captions:
            self.uncaptioned += 1
            return
        self.images += 1
        self.captions += len(captions)
        self.words += sum(len(caption.split()) for caption in captions)
        for length in (tokens[caption] for caption in captions if tokens):
            self.tokens += length
            self.over = [n + (length > most) for n, most in zip(self.over, LIMITS, strict=True)]
        named = [noun for caption in captions for noun in nouns.get(caption, ())]
        self.nouns.update(named)
        self.pairs += len(set(named))
        if score is not None:
            self.score.add(score)

    def row(self, with_nouns: bool, with_tokens: bool) -> dict[str, Any]:
        """The numbers by name, None for those that were not asked for or have nothing to be of."""
        total = self.nouns.total() if with_nouns else None
        distinct = len(self.nouns) if with_nouns else None
        valid = sum(n > VALID for n in self.nouns.values()) if with_nouns else None
        pairs = self.pairs if with_nouns else None
        return {
            "data": self.data,
            "name": self.name or None,
            "images": self.images,
            "uncaptioned": self.uncaptioned,
            "captions": self.captions,
            "words_per_caption": _ratio(self.words, self.captions),
            "tokens_per_caption": _ratio(self.tokens if with_tokens else None, self.captions),
            **{
                f"over_{limit}_tokens": _ratio(over if with_tokens else None, self.captions)
                for limit, over in zip(LIMITS, self.over, strict=True)
            },
            "total_nouns": total,
            "nouns_per_image": _ratio(total, self.images),
            "distinct_nouns": distinct,
            "valid_nouns": valid,
            "valid_share": _ratio(valid, distinct),
            "image_noun_pairs": pairs,
            "pairs_per_image": _ratio(pairs, self.images),
            "score": self.score.mean if self.score.n else None,
            "score_margin": self.score.margin,
            "scored": self.score.n,
        }


@dataclass
class Counts:
    """What was counted in a data set, by name of caption. rejected: how many could not be used; example:
    the first of them."""

    of_names: list[Count]
    rejected: int = 0
    example: Rejected | None = None

    def pass_on(self, items: Iterable[Item]) -> Iterator[Sample]:
        """The samples among items; the others are counted."""
        for item in items:
            if isinstance(item, Rejected):
                self.rejected += 1
                self.example = self.example or item
            else:
                yield item


@dataclass
class Statistician:
    """Counts data sets. names: of captions to count apart, none for all together. nouns, tokens: what finds
    nouns, and how many tokens a caption has; None to leave them out."""

    names: Sequence[str] = ()
    nouns: Nouns | None = None
    tokens: Callable[[str], int] | None = None

    def count(self, name: str, items: Iterable[Item], scores: Mapping[str, float]) -> Counts:
        """Count a data set. scores: by a sample's key. Raises ValueError where it has no caption of a
        name."""
        counts = Counts([Count(name, of) for of in self.names or ("",)])
        met: set[str] = set()
        samples = counts.pass_on(counted(items, name))
        while chunk := list(islice(samples, CHUNK)):
            self._count_chunk(chunk, counts.of_names, scores)
            met.update(of for sample in chunk for of in sample.captions)
        for count in counts.of_names:
            if not count.images:
                raise ValueError(_absent(count, met, counts))
        return counts

    def _count_chunk(
        self, chunk: Sequence[Sample], counts: Sequence[Count], scores: Mapping[str, float]
    ) -> None:
        # A caption that several pictures or names share is looked at once.
        wanted = [[_chosen(sample, count.name) for count in counts] for sample in chunk]
        texts = list(dict.fromkeys(text for row in wanted for one in row for text in one))
        nouns = dict(zip(texts, self.nouns(texts), strict=True)) if self.nouns else {}
        tokens = {text: self.tokens(text) for text in texts} if self.tokens else {}
        for sample, row in zip(chunk, wanted, strict=True):
            for count, chosen in zip(counts, row, strict=True):
                count.add(chosen, nouns, tokens, scores.get(sample.key))


def tokens_of(place: Path) -> Callable[[str], int]:
    """How many tokens of T5, its end among them, a text has. place: a tokenizer's folder, that of a pipeline,
    or "shapes". Raises OSError or ValueError for what holds no tokenizer."""
    from pixart.pipeline.directory import EMBEDDED, open_directory
    from pixart.text.tokenizer import load_tokenizer

    folder = place.expanduser()
    if str(place) == EMBEDDED:
        folder = open_directory(EMBEDDED, with_transformer=False)
    inner = folder / "tokenizer"
    tokenizer = load_tokenizer(inner if inner.is_dir() else folder)
    return lambda text: len(tokenizer.encode(text))


def report(
    counts: Sequence[Counts], statistician: Statistician, nouns: str | None
) -> dict[str, Any]:
    """What --json prints."""
    asked = statistician.nouns is not None, statistician.tokens is not None
    return {
        "nouns": nouns,
        "data": [
            {**one.row(*asked), "rejected": each.rejected}
            for each in counts
            for one in each.of_names
        ],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a report side by side, as columns; what none has is left out."""
    heads = [row["data"] + (f": {row['name']}" if row["name"] else "") for row in rows]
    lines = [["", *heads]]
    for label, write in _LINES:
        cells = [write(row) for row in rows]
        if any(cells):
            lines.append([label, *(cell or "-" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    )


def _number(name: str, form: str = ",d") -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row[name] is None else format(row[name], form)


def _unless_none(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row[name]:,d}" if row[name] else ""


def _percent(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row[name] is None else f"{100 * row[name]:.1f} %"


def _score(row: Mapping[str, Any]) -> str:
    mean, margin = row["score"], row["score_margin"]
    if mean is None:
        return ""
    if not margin:  # of a single number, or of equal ones
        return f"{mean:.4g}"
    decimals = min(max(1 - math.floor(math.log10(margin)), 0), 9)
    return f"{mean:.{decimals}f} ± {margin:.{decimals}f}"


_LINES: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("images", _number("images")),
    ("images without captions", _unless_none("uncaptioned")),
    ("rejected", _unless_none("rejected")),
    ("captions", _number("captions")),
    ("words a caption (ACL)", _number("words_per_caption", ".1f")),
    ("T5 tokens a caption", _number("tokens_per_caption", ".1f")),
    *((f"  of more than {limit}", _percent(f"over_{limit}_tokens")) for limit in LIMITS),
    ("total nouns", _number("total_nouns")),
    ("  an image", _number("nouns_per_image", ".1f")),
    ("distinct nouns (DN)", _number("distinct_nouns")),
    (f"valid nouns (VN, > {VALID} times)", _number("valid_nouns")),
    ("VN/DN", _percent("valid_share")),
    ("image-noun pairs", _number("image_noun_pairs")),
    ("  an image", _number("pairs_per_image", ".1f")),
    ("mean score, 95 % interval", _score),
)


def _chosen(sample: Sample, name: str) -> list[str]:
    """A sample's captions of a name, or of its number: "synth" is synth.1, synth.2 ... too."""
    return [
        text
        for of, text in sample.captions.items()
        if not name or name in (of, of.partition(".")[0])
    ]


def _ratio(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole


def _absent(count: Count, met: Iterable[str], counts: Counts) -> str:
    if met:
        return f"captions must be of {', '.join(sorted(met))} in {count.data}, got {count.name!r}"
    why = f": {counts.example.path} ({counts.example.reason})" if counts.example else ""
    return f"{count.data} must hold captioned pictures, it holds none{why}"
