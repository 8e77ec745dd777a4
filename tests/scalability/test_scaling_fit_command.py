"""`pixart scaling fit`: tables of any kind in, words, JSON and a figure out, one line for bad input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pixart.scalability.measurements import Measurement
from pixart.scalability.published import LAWS, POINTS
from pixart.scaling import main

Rows = list[dict[str, object]]


@pytest.fixture
def rows() -> Rows:
    """Eight runs of a law with a floor."""
    rng = np.random.default_rng(1)
    found: Rows = []
    for run in range(8):
        noise = rng.normal(0, 0.02)
        for compute in np.geomspace(1e10, 3e12, 8):
            loss = (2e7 * compute**-0.7 + 0.4) * np.exp(noise + rng.normal(0, 0.01))
            found.append({"run": f"r{run}", "compute": float(compute), "loss": float(loss)})
    return found


@pytest.fixture
def fit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        code = main(["fit", *map(str, words)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


Command = Callable[..., tuple[int, str, str]]


def write_csv(path: Path, rows: Rows) -> Path:
    lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_csv_a_jsonl_and_a_studys_results_say_the_same(
    tmp_path: Path, rows: Rows, fit: Command
) -> None:
    write_csv(tmp_path / "a.csv", rows)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    measured = [
        Measurement(str(row["run"]), 10, float(row["compute"]), 20, 30, float(row["loss"]))  # type: ignore[arg-type]
        for row in rows
    ]
    results = {"measurements": [vars(one) for one in measured], "claims": []}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = []
    for name in ("a.csv", "a.jsonl", "results.json"):
        code, told, _ = fit(tmp_path / name, "--json", "--resamples", 200)
        assert code == 0
        found.append(json.loads(told)["laws"])
    assert found[0] == found[1] == found[2]
    (law,) = found[0]
    assert law["identified"] and law["runs"] == 8 and law["points"] == 64
    assert law["parameters"]["b"]["low"] < 0.7 < law["parameters"]["b"]["high"]
    assert law["parameters"]["c"]["low"] < 0.4 < law["parameters"]["c"]["high"]


def test_what_is_not_identified_is_said_and_is_no_failure(
    tmp_path: Path, rows: Rows, fit: Command
) -> None:
    file = write_csv(tmp_path / "a.csv", [row for row in rows if row["run"] in ("r0", "r1")])
    code, told, _ = fit(file)
    assert code == 0 and "not identified: 2 runs are too few, 4 are needed" in told
    law = json.loads(fit(file, "--json")[1])["laws"][0]
    assert not law["identified"] and law["reasons"] and law["parameters"] == {}


def test_words_have_three_digits_intervals_covariance_and_the_error_of_the_largest(
    tmp_path: Path, rows: Rows, fit: Command
) -> None:
    file = write_csv(tmp_path / "a.csv", rows)
    code, told, _ = fit(file, "--form", "a*x^-b+c", "a*x^b", "--resamples", 200)
    assert code == 0
    assert "64 measurements of 8 runs" in told and "2.5 decades" in told
    for wanted in ("loss = a compute^-b + c: identified", "  b  0.", "covariance of ln c, ln a, b",
                   "predicted with an error of", "lack of fit"):  # fmt: skip
        assert wanted in told


def test_other_columns_and_lines_that_lack_one(tmp_path: Path, rows: Rows, fit: Command) -> None:
    for place, row in enumerate(rows):
        row["kinds"] = {"colour": 0.9 - float(row["loss"]) / 100} if place % 2 else {}  # type: ignore[arg-type]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("--y", "kinds.colour", "--maximum", 1, "--form", "a*x^b", "--run", "")
    code, told, error = fit(tmp_path / "a.jsonl", *words)
    assert code == 0, error
    assert (
        "32 measurements of 32 runs" in told and "left out, as a column is empty: 32 lines" in told
    )
    assert "1 - kinds.colour = a compute^b" in told


def test_the_front_is_fitted_alone(tmp_path: Path, rows: Rows, fit: Command) -> None:
    for row in rows[::3]:
        row["loss"] = 3 * float(row["loss"])  # type: ignore[arg-type]
    file = write_csv(tmp_path / "a.csv", rows)
    found = json.loads(fit(file, "--pareto", "--json", "--resamples", 100)[1])
    assert found["pareto"] and found["laws"][0]["points"] < 15
    assert 0.6 < found["laws"][0]["parameters"]["b"]["value"] < 0.8


def test_a_score_has_an_upper_front(tmp_path: Path, rows: Rows, fit: Command) -> None:
    rng = np.random.default_rng(0)
    for row in rows:
        row["loss"] = 0.2 * float(row["compute"]) ** 0.05 * (1 - 0.3 * rng.random())  # type: ignore[arg-type]
    file = write_csv(tmp_path / "a.csv", rows)
    words = ("--pareto", "--form", "a*x^b", "--json", "--resamples", 100)
    upper = json.loads(fit(file, "--higher-is-better", *words)[1])["laws"][0]
    lower = json.loads(fit(file, *words)[1])["laws"][0]
    assert upper["points"] != lower["points"]


def test_the_figure_is_the_same_twice(tmp_path: Path, rows: Rows, fit: Command) -> None:
    pytest.importorskip("matplotlib")
    file = write_csv(tmp_path / "a.csv", rows)
    for name in ("one.svg", "two.svg", "one.png"):
        code, _, error = fit(file, "--plot", tmp_path / name, "--resamples", 100)
        assert code == 0, error
    content = (tmp_path / "one.svg").read_bytes()
    assert b"<svg" in content and content == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_best_size_at_equal_compute(tmp_path: Path, fit: Command) -> None:
    rows: Rows = [
        {"run": f"{n:g}", "params": n, "compute": c,
         "loss": np.exp(0.2 * (np.log(n) - 0.5 * np.log(c) - 2) ** 2) * 50 * c**-0.1}
        for n in np.geomspace(1e6, 1e9, 9) for c in np.geomspace(1e10, 1e13, 13)
    ]  # fmt: skip
    file = write_csv(tmp_path / "a.csv", rows)
    words = ("--optimal-at", 1e11, 1e12, "--form", "a*x^b", "--json", "--resamples", 200)
    found = json.loads(fit(file, *words)[1])["optima"]
    for one in found:
        truth = np.exp(2) * one["compute"] ** 0.5
        assert one["identified"], one["reasons"]
        assert one["size"]["value"] == pytest.approx(truth, rel=1e-3)
        assert one["size"]["low"] <= truth * 1.001 and truth * 0.999 <= one["size"]["high"]


BAD = {
    "no column": ("run,compute,cost\na,1,2\n", (), "has no column 'loss'; it has run, compute, cost"),
    "empty": ("", (), "a.csv: has no measurements"),
    "header alone": ("run,compute,loss\n", (), "a.csv: has no measurements"),
    "a word": ("run,compute,loss\na,1,2\na,2,high\n", (), "a.csv, line 3: loss must be a positive number"),
    "nan": ("run,compute,loss\na,1,nan\n", (), "a.csv, line 2: loss must be a positive number"),
    "zero": ("run,compute,loss\na,0,1\n", (), "a.csv, line 2: compute must be a positive number"),
    "all empty": ("run,compute,loss\na,1,\n", (), "no line has a value in each of loss, compute, run"),
    "a short line": ("run,compute,loss\na,1\n", (), "a.csv, line 2: must have 3 columns, got 2"),
    "higher, of what falls": (
        "run,compute,loss\na,1,1\n", ("--maximum", "2", "--higher-is-better"), "must be left out with --maximum",
    ),
    "higher, for nothing": ("run,compute,loss\na,1,1\n", ("--higher-is-better",), "must come with --pareto"),
    "form": ("run,compute,loss\na,1,1\n", ("--form", "exp(x)"), "--form must be one of a*x^b, a*x^-b+c"),
    "maximum": ("run,compute,loss\na,1,1\n", ("--maximum", "1"), "--maximum must be above every loss"),
    "pareto": ("run,compute,loss\na,1,1\n", ("--form", "chinchilla", "--pareto"), "--pareto is of one x"),
    "plot": ("run,compute,loss\na,1,1\n", ("--plot", "a.pdf"), "--plot must be .svg or .png"),
    "an empty name twice": ("run,compute,loss,,\na,1,high,,\n", (), "a.csv, line 2: loss must be a positive"),
    "a column twice": ("run,compute,loss,loss\na,1,1,2\n", (), "a.csv: must have each column once, 'loss'"),
    "n of one x": ("run,compute,loss\na,1,1\n", ("--n", "size"), "--n is of --form chinchilla"),
    "d of one x": (
        "run,compute,loss\na,1,1\n", ("--d", "seen", "--optimal-at", "2"), "--d is of --form chinchilla",
    ),
    "x of chinchilla": (
        "run,compute,loss\na,1,1\n", ("--form", "chinchilla", "--x", "step"), "--x is not of chinchilla",
    ),
    "nan below a maximum": (
        "run,compute,loss\na,1,nan\n", ("--maximum", "1"), "line 2: loss must be a finite number",
    ),
    "plot of two x": (
        "run,compute,loss\na,1,1\n", ("--form", "chinchilla", "--plot", "a.svg"), "--plot draws laws of one x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_2(name: str, tmp_path: Path, fit: Command) -> None:
    text, words, message = BAD[name]
    (tmp_path / "a.csv").write_text(text)
    code, told, error = fit(tmp_path / "a.csv", *words)
    assert code == 2 and not told
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "1 2", "must be .csv, .jsonl, .json, got .txt"),
        ("a.json", "{}", "must have a list 'measurements'"),
        ("a.json", '{"measurements": [3]}', "measurements[0]: must be an object, got 3"),
        ("a.json", "[", "a.json"),
        ("a.jsonl", '{"run": "a"}\n[]\n', "a.jsonl, line 2: must be a JSON object"),
    ],
)
def test_other_files_are_refused(
    name: str, text: str, message: str, tmp_path: Path, fit: Command
) -> None:
    (tmp_path / name).write_text(text)
    code, _, error = fit(tmp_path / name)
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_file_that_is_not_there_and_none_at_all(tmp_path: Path, fit: Command) -> None:
    assert fit(tmp_path / "none.csv")[0] == 2
    code, _, error = fit()
    assert code == 2 and "FILE must be given, or --published" in error
    for words in (
        ("--x", "seen"),
        ("--pareto",),
        ("--optimal-at", 2),
        ("--plot", tmp_path / "a.svg"),
    ):
        code, _, error = fit("--published", *words)
        assert code == 2 and f"{words[0]} needs a FILE of measurements" in error


def test_a_score_of_nothing_lacks_all_of_its_maximum(tmp_path: Path, fit: Command) -> None:
    scores: Rows = [
        {"run": f"r{n}", "compute": 10.0**n, "score": 1 - 10.0 ** (-n / 2)} for n in range(8)
    ]
    words = ("--y", "score", "--form", "a*x^b", "--maximum", 1, "--json", "--resamples", 100)
    found = json.loads(fit(write_csv(tmp_path / "a.csv", scores), *words)[1])
    assert found["laws"][0]["parameters"]["b"]["value"] == pytest.approx(-0.5)


def test_copies_of_measurements_are_told(tmp_path: Path, rows: Rows, fit: Command) -> None:
    """Of another run: one that is twice in its own, or equal in what is fitted alone, is no copy."""
    words = ("--resamples", 100)
    again = [{**row, "step": n} for n, row in enumerate([*rows, *rows[:8]])]
    assert "of copies" not in fit(write_csv(tmp_path / "a.csv", again), *words)[1]
    assert "of copies" not in fit(write_csv(tmp_path / "a.csv", [*rows, *rows[:8]]), *words)[1]
    assert "of copies" not in fit(write_csv(tmp_path / "a.csv", rows), *words)[1]
    copied = [*rows, *({**row, "run": f"{row['run']}-again"} for row in rows[:8])]
    said = fit(write_csv(tmp_path / "a.csv", copied), *words)[1]
    assert "8 measurements with all values of another run's: of copies" in said


def test_the_papers_laws_need_no_file(fit: Command) -> None:
    code, told, _ = fit("--published")
    assert code == 0 and "cannot say" in told
    laws = {law["name"]: law for law in json.loads(fit("--published", "--json")[1])}
    assert set(laws) == {"C", "N", "D"}
    by_model = {point["model"]: point for law in laws.values() for point in law["points"]}
    # 600,000 steps x 2,048 pictures x 3 x 198 GMACs
    point = by_model["SDXL-C320, 600K steps"]
    assert point["x"] == pytest.approx(7.3e11, rel=1e-3)
    assert point["law"] == pytest.approx(0.812, abs=5e-4)
    assert point["over_exponent"] == pytest.approx([0.71, 0.93], abs=6e-3)


def test_size_is_counted_in_billions_or_scores_would_pass_1() -> None:
    (law,) = (law for law in LAWS if law.name == "N")
    sizes = [point.x for point in POINTS if point.law == "N"]
    assert all(law.at(size)[0] < 1 < law.at(1000 * size)[0] for size in sizes)


def test_every_published_score_is_within_what_both_digits_leave_open_for_compute() -> None:
    (law,) = (law for law in LAWS if law.name == "C")
    for point in POINTS:
        if point.law == "C" and point.tifa is not None:
            _, low, high = law.at(point.x)
            assert low < point.tifa < high
