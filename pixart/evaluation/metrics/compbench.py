"""T2I-CompBench (arXiv:2307.06350, github.com/Karine-Huang/T2I-CompBench): a score for each category of prompts.

    color, shape, texture   the product over at most 8 noun phrases of P(yes) / (P(yes) + P(no)), a judge
                            being asked "PHRASE?"
    spatial                 of the likeliest detection of each of two objects: a quarter of each confidence and
                            half of the position's score; 0 where that is below a half or one is not found
    non-spatial             the cosine of CLIP ViT-B/32, as it is
    complex                 the mean of attribute and spatial, of attribute and action (CLIP's cosine with the
                            prompt's words but its adjectives), or of all three, by meta.complex

Phrases are read from a file (`--file phrases=FILE`), as whoever tags words makes them, a line for a prompt:

    {"prompt": "complex-00000", "phrases": ["The red hat", "the brown coat rack"],
     "objects": ["hat", "rack"], "action": "The hat was on top of the coat rack."}

prompt: its id, or its words. objects, action: of complex prompts; objects [] is none that were understood, which
scores 0. Their script takes spaCy's noun chunks but "top", "the side", "the left", "the right".

    --option compbench-categories=color,spatial   what there is, so that nothing else is asked for
    --option official-quirks=yes                  "on top of" is understood as no position, as by their script
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.evaluation.detecting.detections import Found
from pixart.evaluation.judges.judge import check_probabilities, one_line
from pixart.evaluation.judges.prompt_questions import EMBEDDED_SET
from pixart.evaluation.judges.question import YES_OR_NO
from pixart.evaluation.judges.shapes_objects import shapes_phrases, shapes_spatial
from pixart.evaluation.metric import Context, Estimate, Score
from pixart.evaluation.metrics.compbench_positions import OFFICIAL_SIDE, position_score, scale_of
from pixart.evaluation.metrics.cosine import digest_of
from pixart.evaluation.metrics.judged import JudgedMetric, flag, shown
from pixart.evaluation.needs import MissingError, Need
from pixart.evaluation.networks.clip import ClipImages, normalised_rows
from pixart.evaluation.statistics.pooled import mean_of_means, pooled_mean
from pixart.evaluation.store.entries import Prompt
from pixart.files import MAX_INDEX, listed, read_json_lines

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from pixart.evaluation.store.entries import Entry

ATTRIBUTE, SPATIAL, ACTION = ("color", "shape", "texture"), "spatial", "non-spatial"
CATEGORIES = (*ATTRIBUTE, SPATIAL, ACTION, "complex")
COMPLEX = {"spatial": ("spatial",), "action": ("action",), "spatialaction": ("spatial", "action")}
MOST_PHRASES = 8
CONFIDENCE = 0.5  # of detections that count
CLIP = "openai/clip-vit-base-patch32"
PLACES = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of",
          "on the top of", "on top of")  # fmt: skip
PEOPLE = ("girl", "boy", "man", "woman")
_ARTICLE = re.compile(r"^(a|an|the)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Phrases:
    """A line of the file of phrases. objects, action: None where the line has none."""

    phrases: tuple[str, ...]
    objects: tuple[str, ...] | None
    action: str | None


class CompBench(JudgedMetric):
    source = "T2I-CompBench, arXiv:2307.06350; github.com/Karine-Huang/T2I-CompBench at 1b70949"

    def __init__(self, name: str, context: Context) -> None:
        super().__init__(name, context)
        self.found = Found(context)
        self.has_quirks = flag(context, "official-quirks")
        asked = context.options.get("compbench-categories", ",".join(CATEGORIES))
        self.categories = tuple(one.strip() for one in asked.split(","))
        if unknown := [one for one in self.categories if one not in CATEGORIES]:
            raise ValueError(
                f"--option compbench-categories must be of {', '.join(CATEGORIES)}, got {listed(unknown)}"
            )
        self._clip = ClipImages("clip-b32", context, CLIP)
        self._file = context.files.get("phrases")

    @property
    def constants(self) -> Mapping[str, Any]:
        values: dict[str, Any] = {"categories": list(self.categories)}
        if self._wants(*ATTRIBUTE, "complex"):
            values |= {**super().constants, "phrases": self.context.digest_of("phrases")}
            values["most_phrases"] = MOST_PHRASES
        if self._wants(SPATIAL, "complex"):
            values |= {"detector": self.found.detector, "detections": self.found.digest}
            values |= {"confidence": CONFIDENCE, "side": OFFICIAL_SIDE, "distance": 150}
            values["official_quirks"] = self.has_quirks
        if self._wants(ACTION, "complex"):
            values |= {"clip": CLIP, "clip_weights": digest_of(self._clip)}
        return values

    def needs(self) -> Sequence[Need]:
        needs: list[Need] = []
        if self._wants(*ATTRIBUTE, "complex"):
            needs += super().needs()
            if self._file is not None and not self._file.is_file():
                needs.append(Need(str(self._file), "a tagger of words", "--file phrases=FILE"))
        if self._wants(SPATIAL, "complex"):
            needs += self.found.needs()
        if self._wants(ACTION, "complex"):
            needs += self._clip.needs()
        return needs

    def release(self) -> None:
        super().release()
        self._clip.release()

    def score(
        self,
        entries: "Sequence[Entry]",
        images: "Sequence[Image] | None",
        features: "np.ndarray | None",
    ) -> list[Score]:
        scores = []
        for entry, image in zip(entries, shown(images, entries), strict=True):
            try:
                scores.append(self._score(entry, image))
            except MissingError:
                raise
            except ValueError as error:
                raise ValueError(f"{entry.key}: {error}") from error
        return scores

    def reduce(self, entries: "Sequence[Entry]", scores: Sequence[Score]) -> Mapping[str, Estimate]:
        """The mean over categories, each category, and what the spatial score would be were 150 pixels those of
        the picture ("compbench-raw/spatial")."""
        kinds = [self.category_of(entry.prompt) for entry in entries]

        def of(kind: str, values: Sequence[float]) -> list[list[float]]:
            return [[v] if its == kind else [] for its, v in zip(kinds, values, strict=True)]

        own = {kind: of(kind, [one.value for one in scores]) for kind in sorted(set(kinds))}
        found = {self.name: mean_of_means(entries, own)}
        found |= {f"{self.name}/{kind}": pooled_mean(entries, some) for kind, some in own.items()}
        if SPATIAL in own:
            raw = of(SPATIAL, [one.parts.get("spatial-raw", 0.0) for one in scores])
            found[f"{self.name}-raw/{SPATIAL}"] = pooled_mean(entries, raw)
        return found

    def category_of(self, prompt: Prompt) -> str:
        """ValueError for a prompt of none of the categories that are asked for."""
        category = prompt.category
        if prompt.set == EMBEDDED_SET:
            category = SPATIAL if shapes_spatial(prompt.prompt) else "color"
        if category not in self.categories:
            raise ValueError(
                f"prompt {prompt.id!r}: category must be one of {', '.join(self.categories)}, got {category!r}"
            )
        return category

    def _wants(self, *categories: str) -> bool:
        return any(one in self.categories for one in categories)

    def _score(self, entry: "Entry", image: "Image") -> Score:
        category = self.category_of(entry.prompt)
        if category in ATTRIBUTE:
            return self._attribute(entry.prompt, image)
        if category == SPATIAL:
            return self._spatial(entry, image, *self._objects(entry.prompt))
        if category == ACTION:
            value = self._cosine(entry, image, entry.prompt.prompt)
            return Score(value, {"action": value})
        return self._complex(entry, image)

    def _attribute(self, prompt: Prompt, image: "Image") -> Score:
        phrases = self._phrases(prompt)
        value, parts = 1.0, {}
        for number, phrase in enumerate(phrases):
            question = f"{one_line(phrase)}?"
            answers = self.judge.answer(image, question, YES_OR_NO)
            check_probabilities(answers, question)
            yes, no = (answers[one] for one in YES_OR_NO)
            parts[f"phrase-{number + 1}"] = yes / (yes + no)
            value *= parts[f"phrase-{number + 1}"]
        return Score(value, parts | {"attribute": value})

    def _spatial(
        self,
        entry: "Entry",
        image: "Image",
        first: str | None,
        place: str | None,
        second: str | None,
    ) -> Score:
        picture = self.found.of(entry, image)
        best = [
            next((o for o in picture.detections if o.name == name and o.score > CONFIDENCE), None)
            for name in (first, second)
        ]
        one, other = best
        if one is None or other is None or place is None:
            return Score(0.0, {"spatial": 0.0, "spatial-raw": 0.0})
        parts = {}
        for name, scale in (("spatial", scale_of(*image.size)), ("spatial-raw", 1.0)):
            position = position_score(place, one.box, other.box, scale)
            value = (one.score + other.score) / 4 + position / 2
            # Theirs leaves out what is below a half, which is all without a position: no confidence is 1.
            parts[name] = value if value >= 0.5 and position > 0 else 0.0
        return Score(parts["spatial"], parts)

    def _complex(self, entry: "Entry", image: "Image") -> Score:
        kind = entry.prompt.meta.get("complex", "spatialaction")
        if kind not in COMPLEX:
            raise ValueError(f"meta.complex must be one of {', '.join(COMPLEX)}, got {kind!r:.80}")
        attribute = self._attribute(entry.prompt, image)
        parts, values = dict(attribute.parts), [attribute.value]
        if "spatial" in COMPLEX[kind]:
            spatial = self._spatial(entry, image, *self._objects(entry.prompt))
            parts |= spatial.parts
            values.append(spatial.value)
        if "action" in COMPLEX[kind]:
            action = self._line(entry.prompt).action
            if action is None:
                raise ValueError(f"{self._file}: must have action for prompt {entry.prompt.id!r}")
            parts["action"] = self._cosine(entry, image, action)
            values.append(parts["action"])
        return Score(sum(values) / len(values), parts)

    def _cosine(self, entry: "Entry", image: "Image", text: str) -> float:
        clip = self._clip.opened()
        seen = normalised_rows(clip.pictures([self._clip.prepare(image, entry)]), "pictures")
        return float(seen[0].astype(float) @ clip.texts([text]).features[0].astype(float))

    def _objects(self, prompt: Prompt) -> tuple[str | None, str | None, str | None]:
        """First object, position and second object; None for what is not understood."""
        if prompt.set == EMBEDDED_SET:
            return shapes_spatial(prompt.prompt) or (None, None, None)
        if prompt.category == SPATIAL:
            first, found, second = spatial_objects(prompt)
            place: str | None = found
        else:
            names = self._line(prompt).objects
            if names is None:
                raise ValueError(f"{self._file}: must have objects for prompt {prompt.id!r}")
            if len(names) != 2:
                return None, None, None
            first, second = map(_class_of, names)
            place = _place_in(prompt.prompt)
        if place == "on top of" and not self.has_quirks:
            # Their function knows "on the top of" alone; of 300 complex prompts 33 are written so.
            place = "on the top of"
        return first, place, second

    def _phrases(self, prompt: Prompt) -> Sequence[str]:
        if self._file is None and prompt.set == EMBEDDED_SET:
            return shapes_phrases(prompt.prompt)[:MOST_PHRASES]
        phrases = self._line(prompt).phrases[:MOST_PHRASES]
        if not phrases:
            raise ValueError(f"{self._file}: must have phrases for prompt {prompt.id!r}")
        return phrases

    def _line(self, prompt: Prompt) -> Phrases:
        if self._file is None:
            need = Need("phrases.jsonl", "a tagger of words", "--file phrases=FILE")
            raise MissingError(self.name, [need])
        found = self._lines.get(prompt.id) or self._lines.get(prompt.prompt)
        if found is None:
            raise ValueError(
                f"{self._file}: must have phrases for prompt {prompt.id!r}, it has none"
            )
        return found

    @cached_property
    def _lines(self) -> Mapping[str, Phrases]:
        assert self._file is not None
        return read_phrases(self._file)


def read_phrases(path: Path) -> dict[str, Phrases]:
    """A file of phrases by prompt, its id or its words. ValueError with file and line for what is wrong."""
    found: dict[str, Phrases] = {}
    for place, values in read_json_lines(path, MAX_INDEX):
        prompt, action = values.get("prompt"), values.get("action")
        if not isinstance(prompt, str) or not isinstance(action, str | None):
            raise ValueError(f"{place}: prompt and action must be text, got {prompt!r:.80}")
        if prompt in found:
            raise ValueError(f"{place}: prompt must be there once, got {prompt!r:.80} again")
        objects = values.get("objects")
        some = [] if objects is None else objects
        for name, value in (("phrases", values.get("phrases")), ("objects", some)):
            if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
                raise ValueError(f"{place}: must have {name} as texts, got {value!r:.80}")
        phrases = tuple(values["phrases"])
        found[prompt] = Phrases(phrases, None if objects is None else tuple(objects), action)
    return found


def spatial_objects(prompt: Prompt) -> tuple[str, str, str]:
    """First object, position and second object of a spatial prompt ("a giraffe next to a lamp"). ValueError for
    a prompt of another form."""
    place = _place_in(prompt.prompt)
    if place is None:
        raise ValueError(f"prompt must have one of {', '.join(PLACES)}, got {prompt.prompt!r:.120}")
    first, _, second = prompt.prompt.lower().strip(" .").partition(place)
    return _class_of(first), place, _class_of(second)


def _place_in(text: str) -> str | None:
    return next((one for one in PLACES if one in text.lower()), None)


def _class_of(words: str) -> str:
    name = _ARTICLE.sub("", words.strip().lower())
    return "person" if name in PEOPLE else name
