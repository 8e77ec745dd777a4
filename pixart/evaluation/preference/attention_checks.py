"""Pairs whose right answer the exact checker of the shapes world knows: for attention checks."""

import random
from collections.abc import Sequence

from pixart.evaluation.preference.sources import Source
from pixart.evaluation.store.entries import Prompt
from pixart.shapes.caption import parse

Picture = tuple[int, Prompt]  # a model's place in the list, and the prompt that it was drawn for

MOST_HELD = 0.5  # of a prompt's statements in a picture that nobody can take for the right one


def known_pictures(
    prompts: Sequence[Prompt], sources: Sequence[Source], count: int, rng: random.Random
) -> list[tuple[Picture, Picture]]:
    """So many times a picture in which all that its prompt states holds, and one by the same model, of
    another prompt, in which half of that at most does. ValueError if there are too few."""
    found: list[tuple[Picture, Picture]] = []
    candidates = [(k, prompt) for k in range(len(sources)) for prompt in prompts]
    rng.shuffle(candidates)
    for place, prompt in candidates:
        if len(found) == count:
            break
        if held(sources[place], prompt, prompt) < 1:
            continue
        others = [other for other in prompts if other.prompt != prompt.prompt]
        for other in rng.sample(others, min(8, len(others))):
            if held(sources[place], other, prompt) <= MOST_HELD:
                found.append(((place, prompt), (place, other)))
                break
    if len(found) < count:
        raise ValueError(
            f"--check-kind checker needs {count} right pictures of the shapes world, there are "
            f"{len(found)}; use --check-kind same"
        )
    return found


def held(source: Source, drawn: Prompt, asked: Prompt) -> float:
    """The share of what `asked` states that holds in the picture drawn for `drawn`; 0 if it states
    nothing."""
    import numpy as np

    from pixart.shapes.checker import check

    statements = parse(asked.prompt)
    if not statements:
        return 0.0
    holds = check(np.asarray(source.open(drawn)), statements)
    return sum(holds) / len(statements)
