"""How a scene is described, and what a sentence states: the caption grammar, both ways.

`describe` puts a scene into words; `parse` reads a sentence back into statements. What training
shows and what the checker demands are therefore the same thing: the statements of the text.
"""

import random
import re
import unicodedata
from dataclasses import dataclass, replace

from pixart.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    RADII,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
)

KINDS = ("background", "count", "shape", "colour", "size", "position", "relation")

_RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# Where the two things of a relation lie, each by itself.
_SIDES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
_BACKGROUND_PHRASES = ("on a {} background", "against a {} background", "on {}")
_OPENINGS = ("", "", "", "a picture of ", "a drawing of ")
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_COUNT_WORDS = {1: "one", 2: "two", 3: "three"}

_WORD_SIZES = {word: size for size, words in _SIZE_WORDS.items() for word in words}
_WORD_COUNTS = {"a": 1, "an": 1, **{word: n for n, word in _COUNT_WORDS.items()}}
_PLURALS = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
_WORD_SHAPES = {word: s for s in SHAPES for word in (s, _PLURALS[s])}
PRONOUN = "one"  # stands for a shape behind what else is said of a thing: "a red one"
_WORD_BACKGROUNDS = {**{b: b for b in BACKGROUNDS}, "grey": "gray"}
_FILLERS = frozenset(
    [
        "a",
        "an",
        "the",
        "in",
        "on",
        "at",
        "to",
        "of",
        "and",
        "is",
        "with",
        "against",
        "background",
        "picture",
        "drawing",
        "corner",
        "middle",
        "center",
        "centre",
        "left",
        "right",
        "top",
        "bottom",
        "above",
        "over",
        "below",
        "under",
        "upper",
        "lower",
    ]
)
# What the grammar's sentences name, by each form of it: shapes, and what a picture has.
_NOUNS = {
    **_WORD_SHAPES,
    **{noun: noun for noun in ("background", "picture", "drawing", "corner", "center", "middle")},
    "centre": "center",
}
WORDS = frozenset(
    _FILLERS | {*COLOURS, *_WORD_SIZES, *_WORD_COUNTS, *_WORD_SHAPES, *_WORD_BACKGROUNDS}
)


@dataclass(frozen=True)
class Statement:
    """One checkable claim. `subject` is the thing it is about, in the order of the sentence;
    a relation holds from thing 0 to thing 1."""

    kind: str
    value: str
    subject: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.subject}: {self.value}"


def describe(
    scene: Scene,
    rng: random.Random,
    omit: float = 0.1,
    apart: float = 0.3,
    is_nameless: bool = False,
) -> str:
    """A caption of the scene. Each clause that may be left out is, with probability `omit`.

    apart: share of pairs of which the relation is stated by the side of each thing ("a red star on
    the left and a blue circle on the right"); this teaches which word goes with which thing.
    is_nameless: tell neither shapes nor places: "a small red one and a large blue one on white".
    """
    if is_nameless:
        return _with_background(_nameless(scene, rng, omit), scene.background, rng, omit)
    if scene.kind == "one":
        body = _noun(scene.things[0], rng, omit)
        if rng.random() >= omit:
            body += " " + _position_phrase(scene.layout, rng)
    elif scene.kind == "pair":
        first, second = (_noun(thing, rng, omit) for thing in scene.things)
        if rng.random() < apart:
            here, there = (_position_phrase(side, rng) for side in _SIDES[scene.layout])
            body = f"{first} {here} and {second} {there}"
        else:
            link = rng.choice(_RELATION_PHRASES[scene.layout]) if rng.random() >= omit else "and"
            body = f"{first} {link} {second}"
    else:
        count = _COUNT_WORDS[len(scene.things)]
        body = _noun(scene.things[0], rng, omit, article=count, plural=True)
    return _with_background(body, scene.background, rng, omit)


def _nameless(scene: Scene, rng: random.Random, omit: float) -> str:
    """Things by colour and size alone, in words that the embedded model knows: it never saw "thing"."""
    if scene.kind == "group":
        count, first = _COUNT_WORDS[len(scene.things)], scene.things[0]
        return f"{count} {first.colour}"
    return " and ".join(_noun(replace(thing, shape=PRONOUN), rng, omit) for thing in scene.things)


def _noun(
    thing: Thing, rng: random.Random, omit: float, article: str = "a", plural: bool = False
) -> str:
    words = [thing.colour, _PLURALS[thing.shape] if plural else thing.shape]
    if rng.random() >= omit:
        words.insert(0, rng.choice(_SIZE_WORDS[thing.size]))
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join((article, *words))


def _position_phrase(position: str, rng: random.Random) -> str:
    if position == "center":
        return rng.choice(("in the center", "in the middle"))
    if " " in position:
        return rng.choice(("in the {}", "in the {} corner")).format(position)
    return rng.choice(
        ("at the {}", "on the {}") if position in ("left", "right") else ("at the {}",)
    ).format(position)


def _with_background(body: str, background: str, rng: random.Random, omit: float) -> str:
    if rng.random() < omit:
        return rng.choice(_OPENINGS) + body
    phrase = rng.choice(_BACKGROUND_PHRASES).format(background)
    if rng.random() < 0.15:
        return f"{phrase}, {body}"
    return f"{rng.choice(_OPENINGS)}{body} {phrase}"


def words_of(text: str) -> list[str]:
    """The words of a sentence, lower-case, without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def nouns_of(text: str) -> list[str]:
    """The nouns of a sentence of the grammar, in their singular, each as often as it is named. Sides ("at
    the left") and colours ("on white") are none, nor is "one" in the place of a shape."""
    return [_NOUNS[word] for word in words_of(text) if word in _NOUNS]


def unknown_words(text: str) -> list[str]:
    """Words of any alphabet, and signs such as emoji, that the embedded model never saw in training, in
    order, each once. Letters of full width are those of ASCII to its tokenizer."""
    words = dict.fromkeys(_all_words(text.lower()))
    return [word for word in words if unicodedata.normalize("NFKC", word) not in WORDS]


def _all_words(text: str) -> list[str]:
    """Runs of letters and digits, and runs of signs."""
    words, last = [""], "between"
    for letter in text:
        kind = _kind_of(letter)
        if kind == "mark":
            kind = last
        if kind != last:
            words.append("")
        if kind != "between":
            words[-1] += letter
        last = kind
    return [word for word in words if word]


def _kind_of(letter: str) -> str:
    category = unicodedata.category(letter)
    if category[0] in "LN":
        return "word"
    # Accents, vowels of some scripts, and what joins several emoji to one.
    if category[0] == "M" or category == "Cf":
        return "mark"
    # Emoji of a Unicode that is younger than this Python's are "not assigned".
    is_sign = category[0] == "S" or category in ("Cn", "Co")
    return "sign" if is_sign and not letter.isascii() else "between"


def parse(text: str) -> list[Statement]:
    """What a sentence of the grammar states. Words outside the grammar state nothing; a sentence
    that has no shape, nor "one" in the place of one, yields at most its background."""
    words = words_of(text)
    statements = [
        Statement("background", _WORD_BACKGROUNDS[w]) for w in words if w in _WORD_BACKGROUNDS
    ][:1]
    nouns = [i for i in range(len(words)) if _is_noun(words, i)][:2]
    if not nouns:
        return statements
    starts = [0, *(i + 1 for i in nouns[:-1])]
    spans = [words[start : end + 1] for start, end in zip(starts, nouns, strict=True)]
    counts = [
        next((_WORD_COUNTS[w] for w in reversed(span) if w in _WORD_COUNTS), 1) for span in spans
    ]
    statements.append(Statement("count", str(sum(counts))))
    for subject, span in enumerate(spans):
        statements += _thing_statements(span, subject)
    if len(nouns) == 2:
        return statements + _relation_statements(words[nouns[0] + 1 : nouns[1]])
    return statements + (
        _position_statements(words[: nouns[0]] + words[nouns[0] + 1 :]) if counts == [1] else []
    )


def _is_noun(words: list[str], place: int) -> bool:
    """Whether a word names a shape, or stands for one: behind a colour or a size "one" counts nothing."""
    if words[place] in _WORD_SHAPES:
        return True
    before = words[place - 1] if place else ""
    return words[place] == PRONOUN and (before in COLOURS or before in _WORD_SIZES)


def _thing_statements(span: list[str], subject: int) -> list[Statement]:
    statements = [
        Statement("shape", _WORD_SHAPES[w], subject) for w in span[-1:] if w in _WORD_SHAPES
    ]
    statements += [Statement("colour", w, subject) for w in span if w in COLOURS][-1:]
    return (
        statements
        + [Statement("size", _WORD_SIZES[w], subject) for w in span if w in _WORD_SIZES][-1:]
    )


def _relation_statements(between: list[str]) -> list[Statement]:
    text = f" {' '.join(between)} "
    for relation, phrases in _RELATION_PHRASES.items():
        sides = (f"{_SIDES[relation][0]} and",)
        if any(f" {phrase} " in text for phrase in phrases + sides):
            return [Statement("relation", relation)]
    return []


def _position_statements(words: list[str]) -> list[Statement]:
    names = {"middle": "center", "centre": "center", "upper": "top", "lower": "bottom"}
    named = {names.get(word, word) for word in words}
    parts = [name for name in ("top", "bottom", "left", "right") if name in named]
    name = "center" if "center" in named and not parts else " ".join(parts)
    return [Statement("position", name)] if name in POSITIONS else []


assert set(_RELATION_PHRASES) == set(RELATIONS) and set(_SIZE_WORDS) == set(RADII)
