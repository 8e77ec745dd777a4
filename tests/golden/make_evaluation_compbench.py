"""T2I-CompBench's determine_position() over 400 random pairs of boxes, and its 3-in-1 rule:
tests/golden/evaluation/compbench.json. See official_scorers.py.

    python make_evaluation_compbench.py CHECKOUT     # of github.com/Karine-Huang/T2I-CompBench at 1b70949
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

from official_scorers import functions, module, write

PLACES = ("next to", "on side of", "near", "on the left of", "on the right of", "on the bottom of",
          "on the top of", "on top of")  # fmt: skip
NAMES = ("x_min", "y_min", "x_max", "y_max")
TEXTS = {
    "complex_val": ["a.", "b.", "c."],
    "complex_val_spatial": ["a."],
    "complex_val_action": ["B."],
}


def box(rng: random.Random, near: list[int] | None) -> list[int]:
    """near: half of the pairs overlap or nearly do."""
    if near is not None and rng.random() < 0.5:
        shift = [rng.randint(-120, 120) for _ in range(2)]
        return [near[k] + shift[k % 2] for k in range(4)]
    x, y = sorted(rng.sample(range(480), 2)), sorted(rng.sample(range(480), 2))
    return [x[0], y[0], x[1], y[1]]


def three_in_one(source: Path, scores: dict[str, list[float]]) -> list[float]:
    """main() of the script, in a folder with the files that it reads."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, values in scores.items():
            place = folder / part
            place.mkdir(parents=True)
            rows = [{"question_id": k, "answer": value} for k, value in enumerate(values)]
            (place / "vqa_result.json").write_text(json.dumps(rows))
        for text, lines in TEXTS.items():
            (folder / f"{text}.txt").write_text("\n".join(lines))
        space = module(source)
        args = argparse.Namespace(outpath=name, data_path=name)
        with patch.dict(space, {"parse_args": lambda: args}):
            space["main"]()
        result = json.loads((folder / "annotation_3_in_1" / "vqa_result.json").read_text())
    return [one["answer"] for one in result]


def main() -> None:
    root = Path(sys.argv[1])
    space = functions(root / "UniDet_eval" / "2D_spatial_eval.py", ("determine_position",))
    rng = random.Random(0)
    pairs = []
    for number in range(400):
        first = box(rng, None)
        second = box(rng, first)
        place = PLACES[number % len(PLACES)]
        boxes = [dict(zip(NAMES, one, strict=True)) for one in (first, second)]
        pairs.append([place, first, second, space["determine_position"](place, *boxes)])
    folders = {
        "attribute": "annotation_blip",
        "spatial": "labels/annotation_obj_detection_2d",
        "action": "annotation_clip",
    }
    scores = {part: [round(rng.random(), 3) for _ in range(30)] for part in folders}
    found = three_in_one(
        root / "3_in_1_eval" / "3_in_1.py", {folders[part]: some for part, some in scores.items()}
    )
    kinds = ["spatial"] * 10 + ["action"] * 10 + ["spatialaction"] * 10
    rows = [
        [kind, scores["attribute"][k], scores["spatial"][k], scores["action"][k], found[k]]
        for k, kind in enumerate(kinds)
    ]
    made = "github.com/Karine-Huang/T2I-CompBench 1b70949, UniDet_eval/2D_spatial_eval.py: "
    made += "determine_position; 3_in_1_eval/3_in_1.py: main"
    write("compbench", {"made_by": made, "positions": pairs, "complex": rows})


if __name__ == "__main__":
    main()
