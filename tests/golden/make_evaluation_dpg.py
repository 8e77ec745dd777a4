"""DPG-Bench's script over random questions, dependencies and answers: tests/golden/evaluation/dpg.json.
See official_scorers.py.

    python make_evaluation_dpg.py CHECKOUT     # of github.com/TencentQQGYLab/ELLA at 3c228f1

prepare_dpg_data and compute_dpg_one_sample are called as main() does, and main()'s gathering of categories
is written out: it needs accelerate.
"""

import argparse
import csv
import os
import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
from official_scorers import functions, write

BROAD = {"entity": ("whole", "part"), "attribute": ("color", "size"), "relation": ("spatial",)}


class Frame:
    """As much of pandas' as the script asks for."""

    def __init__(self, path: str) -> None:
        with open(path, encoding="utf-8", newline="") as file:
            self.rows = [argparse.Namespace(**row) for row in csv.DictReader(file)]

    def iterrows(self) -> Any:
        return enumerate(self.rows)


def questions(rng: random.Random, prompts: int) -> list[dict[str, str]]:
    rows = []
    for prompt in range(prompts):
        for number in range(1, rng.randint(2, 8) + 1):
            # The first prompt's first row is dropped: the script fails over whoever depends on it.
            before = [k for k in range(1, number) if prompt or k > 1]
            parents = rng.sample(before, min(len(before), rng.randint(0, 2)))
            broad = rng.choice(list(BROAD))
            detailed = rng.choice(BROAD[broad])
            rows.append({
                "item_id": f"p{prompt}", "text": f"text {prompt}", "keywords": "",
                "proposition_id": str(number), "dependency": ", ".join(map(str, parents)) or "0",
                "category_broad": broad, "category_detailed": detailed,
                "tuple": f"{broad} - {detailed} (a)",
                "question_natural_language": f"question {number} of {prompt}?",
            })  # fmt: skip
    return rows


def main() -> None:
    source = Path(sys.argv[1]) / "dpg_bench" / "compute_dpg_bench.py"
    pandas = MagicMock()
    pandas.read_csv = Frame
    image = MagicMock()
    space = functions(
        source, ("prepare_dpg_data", "crop_image", "compute_dpg_one_sample"),
        pd=pandas, defaultdict=defaultdict, osp=os.path, Image=image,
    )  # fmt: skip
    rng = random.Random(0)
    rows = questions(rng, 40)
    answers = {
        one["question_natural_language"]: [rng.choice(("yes", "yes", "no")) for _ in range(4)]
        for one in rows
    }
    crops = [(0, 0), (8, 0), (0, 8), (8, 8)]  # of a grid of 16 x 16
    image.open = lambda path: argparse.Namespace(crop=lambda box: crops.index(box[:2]))
    judge = argparse.Namespace(vqa=lambda crop, question: answers[question][crop])
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dpg.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        for count in (1, 4):
            args = argparse.Namespace(csv=str(path), pic_num=count, res_path=f"{folder}/r.txt")
            prepared = space["prepare_dpg_data"](args)
            scores = {}
            categories: dict[str, list[float]] = defaultdict(list)
            for prompt in prepared:
                score, tuples, given = space["compute_dpg_one_sample"](
                    args, prepared, f"{prompt}.png", judge, 8
                )
                scores[prompt] = score
                for number, words in tuples.items():
                    name = words.split("(")[0].strip()
                    categories[name].append(given[number])
                    categories[name.split("-")[0].strip()].append(given[number])
            means = {name: float(np.mean(some)) for name, some in sorted(categories.items())}
            results[f"{count}"] = {
                "score": float(np.mean(list(scores.values()))), "prompts": scores, "categories": means,
            }  # fmt: skip
    keys = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
    made = (
        "github.com/TencentQQGYLab/ELLA 3c228f1, dpg_bench/compute_dpg_bench.py: prepare_dpg_data, "
    )
    made += "compute_dpg_one_sample, with made-up questions and answers"
    write("dpg", {
        "made_by": made,
        "rows": [{key: one[key] for key in keys} for one in rows],
        "answers": [[question, some] for question, some in answers.items()],
        "results": results,
    })  # fmt: skip


if __name__ == "__main__":
    main()
