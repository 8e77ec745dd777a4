"""The study of few steps: its captions are short, its record goes on, and no gate is reached for nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.reporting import few_steps as reporting
from bench.reporting import pages
from bench.studies.few_steps.__main__ import main as command
from bench.studies.few_steps.cases import SEEDS, caption, requests
from bench.studies.few_steps.record import Record, Verdict, records
from bench.studies.few_steps.summary import rows
from pixart.checkpoint.save import save_transformer
from pixart.few_step import FewStep
from pixart.lora.adapters import add_lora, save_lora
from pixart.pipeline.text_to_image import Pipeline
from pixart.shapes.caption import parse

RUN: dict[str, Any] = {"command": "c", "date": "2031-02-03T04:05:06Z", "seconds": 0.0}
TWO = "ddim at 999,499"
STATEMENTS = {"one": 4, "pair": 5}


def test_captions_are_short_and_the_same_for_the_same_number() -> None:
    for kind, shapes in (("one", 1), ("pair", 2)):
        asked = requests(kind, range(50))
        assert [one.prompt for one in asked] == [caption(kind, number) for number in range(50)]
        assert len({one.seed for one in asked}) == 50 and len({one.prompt for one in asked}) > 25
        for one in asked:
            stated = [statement.kind for statement in parse(one.prompt)]
            assert stated.count("shape") == stated.count("colour") == shapes
            assert not {"size", "background", "position"} & set(stated)


def about(part: str, evaluations: int = 2, **changes: Any) -> dict[str, Any]:
    settings = {"scheduler": "ddim", "timesteps": [999, 499], "guidance": 1.0}
    made: Any = {"part": part, "control": None, "settings": settings, "weights": {"t": "a"}}
    return made | {"evaluations": evaluations, "flops": 10**9, **changes}


def record(
    folder: Path, name: str, part: str, held: float, purity: float, count: int = 10, **changes: Any
) -> Record:
    """Of as many cases of each kind, with that share of the statements of each held."""
    made = Record.open(folder, name, about(part, **changes), RUN)
    for kind, of in STATEMENTS.items():
        told = [round(held * of * (n + 1)) - round(held * of * n) for n in range(count)]
        made.add(kind, [Verdict(min(one, of), of, purity) for one in told], 1.0)
    return made


def test_a_record_goes_on_and_refuses_pictures_of_another_model_or_other_captions(
    tmp_path: Path,
) -> None:
    made = record(tmp_path, TWO, "undistilled", 1.0, 0.5)
    again = Record.open(tmp_path, TWO, about("undistilled"), {**RUN, "command": "second"})
    assert again.count("one") == again.count("pair") == 10 and again.run["seconds"] == 2.0
    assert again.verdicts == made.verdicts and again.run["command"] == "second"
    with pytest.raises(
        ValueError, match=r"--out must .*ddim-at-999-499.json was drawn with other weights"
    ):
        Record.open(tmp_path, TWO, about("undistilled", weights={"t": "b"}), RUN)
    kept = json.loads(made.file.read_text())
    kept["captions"]["pair"] = "another world's"
    made.file.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="was drawn with other captions; choose another --out"):
        Record.open(tmp_path, TWO, about("undistilled"), RUN)
    made.file.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="must hold verdicts of this study, got no 'about'"):
        records(tmp_path)


def test_rows_are_held_against_the_guided_teacher_on_the_cases_that_both_have(
    tmp_path: Path,
) -> None:
    guided = about("teacher")["settings"] | {"guidance": 2.0}
    record(tmp_path, "20 steps", "teacher", 0.75, 0.99, evaluations=40, settings=guided)
    record(tmp_path, "20 steps, guidance 1", "teacher", 0.5, 0.99, evaluations=20)
    few = record(tmp_path, TWO, "undistilled", 0.5, 0.80, count=4)
    few.add("one", [Verdict(4, 4, 0.9)] * 2, 1.0)
    made = {(row["variant"], row["kind"]): row for row in rows(records(tmp_path))}
    assert list(made)[:3] == [("20 steps, guidance 1", kind) for kind in ("one", "pair", "both")]
    one = made[TWO, "one"]
    assert one["cases"] == 6 and made[TWO, "both"]["cases"] == 10
    assert one["figures"]["statements"]["mean"] == pytest.approx((4 * 0.5 + 2) / 6, abs=1e-4)
    assert one["figures"]["right"]["mean"] == pytest.approx(2 / 6, abs=1e-4)
    assert one["figures"]["purity"]["mean"] == pytest.approx((4 * 0.8 + 2 * 0.9) / 6, abs=1e-4)
    assert one["to_teacher"]["statements"]["mean"] == pytest.approx(
        (4 * -0.25 + 2 * 0.25) / 6, abs=1e-4
    )
    for figure in (*one["figures"].values(), *one["to_teacher"].values()):
        assert figure["low"] <= figure["mean"] <= figure["high"] and figure["low"] < figure["high"]
    assert "to_teacher" not in made["20 steps", "one"]
    assert made["20 steps, guidance 1", "one"]["to_teacher"]["statements"]["mean"] == -0.25


def gates(
    folder: Path,
    held: float,
    purity: float,
    control: float,
    other: float = 0.5,
    unguided: float = 0.75,
) -> str:
    """What is said of a model that was distilled, where the two rows without have such purities."""
    guided = about("teacher")["settings"] | {"guidance": 2.0}
    record(folder, "20 steps", "teacher", 0.75, 0.99, evaluations=40, settings=guided)
    record(folder, "20 steps, guidance 1", "teacher", unguided, 0.99, evaluations=20)
    record(folder, TWO, "undistilled", 0.75, control)
    record(folder, "dpm-solver++, 2 steps", "undistilled", 0.75, other)
    record(folder, f"tdm: {TWO}", "distilled", held, purity, control=TWO)
    return reporting.gates(rows(records(folder)))


@pytest.mark.parametrize(
    ("held", "purity", "control", "other", "verdict"),
    [
        (0.75, 0.97, 0.9699, 0.5, "reached"),
        (0.75, 0.9699, 0.5, 0.5, "**missed**"),
        (0.5, 0.99, 0.5, 0.5, "**missed**"),
        (0.75, 0.99, 0.97, 0.5, f"**missed**: {TWO} reaches it too"),
        (0.75, 0.99, 0.5, 0.98, "**missed**: dpm-solver++, 2 steps reaches it too"),
    ],
)
def test_a_gate_is_reached_only_where_nothing_undistilled_reaches_it(
    held: float, purity: float, control: float, other: float, verdict: str, tmp_path: Path
) -> None:
    text = gates(tmp_path, held, purity, control, other)
    lines = [line for line in text.splitlines() if "| tdm: " in line]
    assert [line.split(" | ")[1] for line in lines] == [*reporting.KINDS.values()] * 2
    assert all(line.endswith(f" | {verdict} |") for line in lines), text
    first = lines[0].split(" | ")[4]
    assert first.startswith(f"{TWO}: purity {100 * control:.1f} %, statements +0.0 (")
    assert text.count("not measured") == 1, "one step"


def test_a_teacher_with_guidance_and_one_without_are_each_a_gate(tmp_path: Path) -> None:
    lines = [
        line
        for line in gates(tmp_path, 0.5, 0.98, 0.5, unguided=0.5).splitlines()
        if "| tdm: " in line
    ]
    assert [line.rpartition(" | ")[2] for line in lines] == ["**missed** |"] * 3 + ["reached |"] * 3
    assert "≥ teacher − 3" in lines[0] and "≥ teacher without guidance − 3" in lines[3]


def test_three_points_below_the_teacher_are_allowed_and_no_more() -> None:
    row: Any = {"figures": {"purity": {"mean": 0.98}}, "to_unguided": {"statements": {"mean": 0.0}}}
    row["to_teacher"] = {"statements": {"mean": -0.03}}
    assert all(gate.is_met(row) for gate in reporting.GATES)
    row["to_teacher"]["statements"]["mean"] = -0.0301
    assert [gate.is_met(row) for gate in reporting.GATES] == [False, True, True]
    assert reporting.gates([]).count("not measured") == len(reporting.GATES)


def test_a_page_is_made_of_a_result(tmp_path: Path) -> None:
    gates(tmp_path, 0.75, 0.98, 0.8)
    run: Any = RUN | {"complete": True, "dry_run": False, "machine": None, "peaks": None}
    run |= {"unfinished": [], "rows": rows(records(tmp_path))}
    run |= {"source": {"commit": "c0", "modified": False, "kernels_sha256": ""}}
    page = pages.page({"kind": reporting.KIND, "runs": [run]})
    assert (
        "| tdm: ddim at 999,499 | 2 | 1 G | 75.0 % (75.0 to 75.0) | 0.0 % (0.0 to 27.8) |" in page
    )
    assert "## Both, 20 captions" in page and "| reached |" in page
    text = reporting.overview([("few-steps", {"kind": reporting.KIND, "runs": [run]})])
    assert "| both | tdm: " in text and "| pairs | tdm: " not in text
    assert text.index("| 20 steps | 40") < text.index(f"| {TWO} | 2") < text.index("\n| tdm: ddim")


def study(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Verdicts by row."""
    assert command(["--out", str(folder), "--count", "1", *arguments]) == 0
    return {one.name: one.verdicts for one in records(folder)}


def test_the_command_draws_a_distilled_model_as_it_says_beside_its_control(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = Pipeline.from_pretrained("shapes", device="cpu", cache_dir=None)
    own = FewStep("ddim", (999, 599))
    model, adapter = tmp_path / "model.safetensors", tmp_path / "lora"
    pipe.transformer.config = replace(pipe.transformer.config, few_step=own)
    save_transformer(pipe.transformer, model)
    add_lora(pipe.transformer, 2)
    save_lora(pipe.transformer, adapter, few_step=FewStep("lcm", (999, 499)))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"--distilled must be of models that say .*, got shapes"):
        study(out, "--distilled", "base=shapes")
    found = study(
        out, "--distilled", f"same={model}", "--also", "1", "--distilled", f"lora={adapter}"
    )
    expected = {"same: ddim at 999,599", "ddim at 999,599", "same: ddim at 999", "ddim at 999"}
    expected |= {"lora: lcm at 999,499", "lora: lcm at 999", "lcm at 999,499", "lcm at 999"}
    assert expected <= set(found) and len(found) == 2 + 9 + 1 + 4
    for name in expected:
        assert found[name] == found[name.rpartition(": ")[2]], "the same weights draw the same"
    told = capsys.readouterr().out
    assert told.count("| same: ddim at 999,599 |") >= 3 and "**missed**" in told
    written = {file: file.stat().st_mtime_ns for file in out.glob("*.json")}
    assert study(out) == found, "what is not named any more is still told"
    assert all(file.stat().st_mtime_ns == at for file, at in written.items())
    assert all(len(one[kind]["held"]) == 1 for one in found.values() for kind in SEEDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--count", "0"), "--count must be at least 1, got 0"),
        (("--distilled", "a=x", "--distilled", "a=y"), "--distilled must have each name once"),
        (("--distilled", "a b=x"), "--distilled must have a name of letters"),
    ],
)
def test_bad_options_are_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        command(["--out", str(tmp_path), *arguments])
    assert not list(tmp_path.iterdir())
