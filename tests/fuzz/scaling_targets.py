"""Samples for tests/fuzz/targets.py of what is measured and counted: pictures, nouns, runs."""

import json
from collections.abc import Callable
from pathlib import Path

KEEP = "width >= 50 and (sharpness > 1 or format == 'PNG') and not duplicate"
MEASUREMENT = {"run": "a", "params": 10, "compute": 1e9, "images": 64, "step": 4, "loss": 0.5,
               "accuracy": {"colour": 0.5}}  # fmt: skip


def _written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def make_clean(folder: Path) -> Path:
    one = {"path": "a.png", "width": 64, "format": "PNG", "sharpness": 3.5, "jpeg_quality": None,
           "duplicate": False, "duplicate_of": None}  # fmt: skip
    lines = [
        one,
        one | {"path": "b.png", "duplicate": True},
        {"path": "c", "unreadable": "damaged"},
    ]
    return _written(folder, "clean.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))


def read_clean(place: Path) -> object:
    from pixart.dataset.funnel import kept
    from pixart.dataset.samples import Rejected

    return list(kept([Rejected("d.png", "damaged")], KEEP, place))


def make_nouns(folder: Path) -> Path:
    return _written(folder, "nouns.txt", "mouse, mice  # and no rat\nstar, stars\n")


def read_nouns(place: Path) -> object:
    from pixart.dataset.nouns import open_nouns

    return open_nouns(f"words:{place}")(["two mice under a star"])


def make_json(folder: Path) -> Path:
    values = [MEASUREMENT, MEASUREMENT | {"compute": 1e10, "accuracy": {}}]
    return _written(folder, "results.json", json.dumps({"measurements": values}))


def make_jsonl(folder: Path) -> Path:
    return _written(folder, "runs.jsonl", f"{json.dumps(MEASUREMENT)}\n" * 2)


def make_csv(folder: Path) -> Path:
    return _written(folder, "runs.csv", "run,compute,loss\na,1e9,0.5\nb,1e10,0.25\n")


def read_runs(place: Path) -> object:
    from pixart.scalability.measurements import columns_of, read_measurements

    return columns_of(place, read_measurements(place), ["compute", "loss"], "run")


def make_results(folder: Path) -> Path:
    """Of a study's trial, with the first of its runs."""
    from pixart.scalability.study.plan import TINY, TINY_RUNS, VERSION, identity, settings

    run = TINY_RUNS[0]
    mark = {
        "step": 1,
        "loss": 0.5,
        "tflop": 0.1,
        "losses": "0.4 0.6",
        "own_loss": 0.4,
        "ema_loss": 0.5,
    }
    drawn = {
        "step": 1,
        "by_kind": {"colour": [1, 2]},
        "all_right": 0,
        "captions": 1,
        "shares": "0.5",
    }
    kept = settings(run, TINY) | {"identity": identity(run, TINY), "parameters": 10, "marks": [mark],
        "forward_flops": 9, "steps": 1, "levels": {"4": 1}, "accuracy": [drawn], "cpu_seconds": 1.0,
        "processor": "p"}  # fmt: skip
    told = {"version": VERSION, "scale": kept["scale"], "seconds": 9, "runs": [kept]}
    (folder / "pictures").mkdir()
    (folder / "pictures" / "72x2.png").write_bytes(b"")
    _written(folder, "results.json", json.dumps(told))
    return folder


def read_results(place: Path) -> object:
    from pixart.scalability.study.plan import TINY, TINY_RUNS
    from pixart.scalability.study.store import Store

    store = Store(place, TINY, TINY_RUNS)
    store.write()
    return store.missing


SCALING: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "clean": (make_clean, read_clean),
    "nouns": (make_nouns, read_nouns),
    "runs-json": (make_json, read_runs),
    "runs-jsonl": (make_jsonl, read_runs),
    "runs-csv": (make_csv, read_runs),
    "study": (make_results, read_results),
}
