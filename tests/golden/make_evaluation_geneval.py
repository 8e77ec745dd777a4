"""GenEval's evaluate_image() over 400 random detection sets, and relative_position() over 200 pairs of boxes:
tests/golden/evaluation/geneval.json. See official_scorers.py.

    python make_evaluation_geneval.py CHECKOUT     # of github.com/djghosh13/geneval at af4902f
"""

import random
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
from official_scorers import functions, write

CLASSES = ("dog", "cat", "bench")
COLOURS = ("red", "blue", "green")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
CONSTANTS = {"THRESHOLD": 0.3, "COUNTING_THRESHOLD": 0.9, "MAX_OBJECTS": 16, "NMS_THRESHOLD": 1.0,
             "POSITION_THRESHOLD": 0.1, "COLORS": list(COLOURS)}  # fmt: skip


def clauses(rng: random.Random, tag: str) -> dict[str, Any]:
    first, second = rng.sample(CLASSES, 2)
    one: dict[str, Any] = {"class": first, "count": 1}
    two: dict[str, Any] = {"class": second, "count": 1}
    if tag == "counting":
        count = rng.randint(2, 4)
        return {"include": [one | {"count": count}], "exclude": [one | {"count": count + 1}]}
    if tag in ("colors", "color_attr"):
        one["color"], two["color"] = rng.choices(COLOURS, k=2)
    if tag == "position":
        two["position"] = [rng.choice(RELATIONS), 0]
        if rng.random() < 0.3:
            one["count"] = 2
        if rng.random() < 0.3:
            two["color"] = rng.choice(COLOURS)
    return {"include": [one] if tag in ("single_object", "colors") else [one, two]}


def box(rng: random.Random) -> list[int]:
    x, y = sorted(rng.sample(range(513), 2)), sorted(rng.sample(range(513), 2))
    return [x[0], y[0], x[1], y[1]]


def detections(rng: random.Random, tag: str) -> list[dict[str, Any]]:
    found = []
    for name in CLASSES:
        count = rng.choice((0, 1, 1, 2, 3, 4) if rng.random() < 0.97 else (18,))
        low = 0.85 if tag == "counting" else 0.2
        scores = rng.sample(
            [round(low + k / 2000, 4) for k in range(int((0.999 - low) * 2000))], count
        )
        for score in scores:
            one = {"class": name, "score": score, "box": box(rng), "color": rng.choice(COLOURS)}
            found.append(one)
    return found


def main() -> None:
    source = Path(sys.argv[1]) / "evaluation" / "evaluate_images.py"
    space = functions(
        source, ("compute_iou", "relative_position", "evaluate", "evaluate_image"),
        np=np, json=__import__("json"), classnames=list(CLASSES), object_detector=None,
        Image=MagicMock(), ImageOps=MagicMock(),
        # The colour of a detection comes in the place of its mask.
        color_classification=lambda image, boxes, name: [colour for _, colour in boxes],
        **CONSTANTS,
    )  # fmt: skip
    rng = random.Random(0)
    sets = []
    for number in range(400):
        tag = TAGS[number % len(TAGS)]
        found = detections(rng, tag)
        rows = {n: [one for one in found if one["class"] == n] for n in CLASSES}
        boxes = [
            np.array([[*o["box"], o["score"]] for o in rows[n]]).reshape(-1, 5) for n in CLASSES
        ]
        colours = [[one["color"] for one in rows[name]] for name in CLASSES]
        space["inference_detector"] = lambda *_, result=(boxes, colours): result
        wanted = {"tag": tag, **clauses(rng, tag)}
        result = space["evaluate_image"]("picture", wanted | {"prompt": ""})
        listed = [[one["class"], one["score"], one["box"], one["color"]] for one in found]
        sets.append({"wanted": wanted, "detections": listed, "correct": bool(result["correct"])})
    pairs = []
    for _ in range(200):
        a, b = box(rng), box(rng)
        found = space["relative_position"]((np.array([*a, 1.0]), None), (np.array([*b, 1.0]), None))
        pairs.append([a, b, sorted(found)])
    made = (
        "github.com/djghosh13/geneval af4902f, evaluation/evaluate_images.py: evaluate_image with "
    )
    made += "made-up detections, relative_position"
    write("geneval", {"made_by": made, "sets": sets, "positions": pairs})


if __name__ == "__main__":
    main()
