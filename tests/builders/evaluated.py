"""A folder as `python -m pixart.evaluate run` leaves it, small and made by hand: build(folder)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixart.evaluation.metric import Score
from pixart.evaluation.running.results import score_folder
from pixart.evaluation.store.parts import Row, ScoreStore, identity_of

CATEGORIES = ("one", "pair", "group")
COLOURS = ((200, 40, 40), (40, 90, 200), (230, 200, 60), (60, 150, 80))
HOSTILE = (
    '<script>document.title="broken"</script> "quotes" & \u202eright-to-left\u202c ' + "long" * 60
)
HOSTILE_NAME = HOSTILE[:150]  # longer ones are refused
ARABIC = "دائرة حمراء صغيرة على خلفية بيضاء"


def build(
    folder: Path,
    *,
    model: str = "shapes",
    count: int = 30,
    better: float = 0.0,
    seed: int = 0,
    prompts: Mapping[str, str] | None = None,
    protocol: Mapping[str, Any] | None = None,
    constants: Mapping[str, Any] | None = None,
    errors: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """count: prompts, one picture each. better: what is added to every score. seed: of scores and pictures.
    prompts: words of single prompts, by id. protocol, constants: settings that are not as always."""
    rng = np.random.default_rng(seed)
    ids = [f"{number:05d}" for number in range(count)]
    lines = []
    clip, shapes = {}, {}
    for number, name in enumerate(ids):
        category = CATEGORIES[number % len(CATEGORIES)]
        text = f"a small {category} on white, number {number}"
        lines.append({"id": name, "prompt": (prompts or {}).get(name, text), "set": "made",
                      "category": category})  # fmt: skip
        _picture(folder / "images" / name / "0000.png", rng)
        clip[f"{name}/0000"] = 0.28 + 0.03 * float(rng.standard_normal()) + better
        shapes[f"{name}/0000"] = float(rng.random() < 0.7 + better)
    _write_lines(folder / "prompts.jsonl", lines)
    of_clip = constants or {"model": "clip-tiny", "times": 1}
    _scores(folder, score_folder("clip", "1", of_clip), clip, {})
    _scores(folder, score_folder("shapes", "2", {}), shapes, {"colour": 1.0})
    of_category = {line["id"]: line["category"] for line in lines}
    paper = {
        "value": 0.2797,
        "source": "PixArt-Σ, Table 6",
        "same_protocol": False,
        "because": [f"{count} prompts, the paper has 30,000", "another set of prompts"],
    }
    metrics = {
        "clip": metric("1", clip, of_category, of_clip, "clip")
        | {"paper": {"clip": paper}},
        "shapes": metric("2", shapes, of_category, {}, "shapes"),
        "fid-clean": {
            "version": "1", "unit": "", "higher_is_better": False, "per_picture": False,
            "constants": {"extractor": "inception-clean-00"}, "source": "arXiv:1706.08500",
            "values": {
                "fid-clean": estimate(20.0 - 10 * better, 1.5, count, "jackknife over 50 blocks",
                                      ["biased below 10,000 pictures"]),
                "fid-infinity": estimate(14.0 - 10 * better, 2.5, count, "jackknife over 50 blocks"),
            },
        },
    }  # fmt: skip
    settings = {"id": "made/0123abcd", "name": "made", "prompts": count, "images_per_prompt": 1,
                "size": "48x48", "sampling": {"scheduler": "dpm-solver++", "steps": 20}}  # fmt: skip
    results = {
        "version": 1,
        "protocol": settings | dict(protocol or {}),
        "model": model,
        "weights": {"transformer": f"{seed:08x}"},
        "pictures": count,
        "errors": len(errors),
        "metrics": metrics,
    }
    write(folder, results)
    if errors:
        _write_lines(folder / "errors.jsonl", errors)
    command = ["python", "-m", "pixart.evaluate", "run", "made", "--model", model, "--shard", "1/4"]
    (folder / "run.json").write_text(json.dumps({"command": command}))
    return folder


def hostile(folder: Path) -> Path:
    """With HOSTILE wherever a file or somebody's metric may have words of its own."""
    build(
        folder,
        model=HOSTILE,
        prompts={f"{number:05d}": HOSTILE for number in range(30)},
        protocol={"id": HOSTILE, HOSTILE: HOSTILE},
        constants={HOSTILE: HOSTILE},
        errors=[{"key": HOSTILE, "error": HOSTILE}],
    )
    results = results_of(folder)
    clip = results["metrics"].pop("clip")
    clip["values"] = {HOSTILE: clip["values"]["clip"] | {"notes": [HOSTILE], "method": HOSTILE}}
    clip["categories"] = {HOSTILE: clip["values"]}
    clip["paper"] = {HOSTILE: clip["paper"]["clip"] | {"because": [HOSTILE], "source": HOSTILE}}
    own = {"source": HOSTILE, "unit": HOSTILE, "version": HOSTILE[:30]}
    results["metrics"][HOSTILE_NAME] = clip | own
    write(folder, results)
    return folder


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def write(folder: Path, results: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


def metric(
    version: str,
    scores: Mapping[str, float],
    categories: Mapping[str, str],
    constants: Mapping[str, Any],
    name: str,
) -> dict[str, Any]:
    """Of a metric that scores pictures: its mean, with the normal interval."""

    def mean(keys: Sequence[str]) -> dict[str, Any]:
        values = np.array([scores[key] for key in keys])
        half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
        return estimate(float(values.mean()), half, len(values), "bootstrap over prompts")

    by_category = {
        one: [key for key in scores if categories[key.split("/")[0]] == one]
        for one in dict.fromkeys(categories.values())
    }
    return {
        "version": version, "unit": "", "higher_is_better": True, "per_picture": True,
        "constants": dict(constants), "source": "made by hand",
        "values": {name: mean(list(scores))},
        "categories": {one: {name: mean(keys)} for one, keys in by_category.items()},
    }  # fmt: skip


def estimate(
    value: float, half: float, n: int, method: str, notes: Sequence[str] = ()
) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "method": method,
            "notes": list(notes)}  # fmt: skip


def _picture(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True)
    pixels = np.full((48, 48, 3), 245, np.uint8)
    x, y, side = rng.integers(2, 28), rng.integers(2, 28), rng.integers(8, 18)
    pixels[y : y + side, x : x + side] = COLOURS[rng.integers(len(COLOURS))]
    Image.fromarray(pixels).save(path)


def _scores(
    folder: Path, name: str, scores: Mapping[str, float], parts: Mapping[str, float]
) -> None:
    """In two parts, as two processes might have left them."""
    store = ScoreStore(folder / "scores" / name)
    rows = []
    for key, value in scores.items():
        picture = identity_of(folder / "images" / f"{key}.png")
        rows.append(Row(key, str(picture), Score(value, parts)))
    middle = len(rows) // 2
    store.write(0, rows[:middle])
    store.write(1, rows[middle:])


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
