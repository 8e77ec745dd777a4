"""Questions, and the metrics that count their answers, on answers made by hand and by the exact checker."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pixart.evaluation.judges import Judge
from pixart.evaluation.judges.prompt_questions import Questions, read_questions
from pixart.evaluation.judges.question import Question
from pixart.evaluation.judges.shapes_questions import shapes_questions
from pixart.evaluation.metric import Context, Score
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.metrics.dpg import quarters, zeroed_mean
from pixart.evaluation.metrics.judged import JudgedMetric
from pixart.evaluation.needs import MissingError
from pixart.evaluation.statistics.pooled import mean_of_means, pooled_mean
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import read_json
from pixart.shapes.caption import describe, parse
from pixart.shapes.checker import check
from pixart.shapes.scene import draw, sample_scene

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent.parent / "golden" / "evaluation"
WHITE = Image.new("RGB", (8, 8), "white")


class Stub(Judge):
    """Answers as a table of question to probabilities says."""

    id, digest = "stub", "0"

    def __init__(self, table: Mapping[str, Mapping[str, float]]) -> None:
        self.table = table
        self.asked: list[str] = []

    def answer(self, image: Any, question: str, choices: Sequence[str]) -> Mapping[str, float]:
        self.asked.append(question)
        return self.table[question]


def yes(probability: float) -> dict[str, float]:
    return {"yes": probability, "no": 1 - probability}


def entry(prompt: str, questions: Sequence[Mapping[str, Any]] = (), sample: int = 0) -> Entry:
    meta = {"questions": list(questions)} if questions else {}
    return Entry(Prompt(prompt, f"words of {prompt}", meta=meta), sample, Path("none"))


def opened(name: str, judge: Judge, **context: Any) -> Any:
    metric = open_metric(name, Context(CPU, judge="checker", **context))
    assert isinstance(metric, JudgedMetric)
    metric._judge = judge
    return metric


A = {"id": "1", "question": "a?", "type": "entity - whole"}
B = {"id": "2", "question": "b?", "type": "attribute - color", "parents": ["1"]}
C = {"id": "3", "question": "c?", "type": "attribute - color", "choices": ["red", "blue", "grey"],
     "answer": "blue", "parents": ["2"]}  # fmt: skip


def test_tifa_is_the_mean_over_prompts_of_the_mean_over_questions() -> None:
    table = {"a?": yes(0.9), "b?": yes(0.4), "c?": {"red": 0.1, "blue": 0.2, "grey": 0.05}}
    metric = opened("tifa", Stub(table))
    entries = [entry("x", [A, B, C]), entry("y", [B | {"parents": []}])]
    scores = metric.score(entries, [WHITE, WHITE], None)
    assert [one.value for one in scores] == [pytest.approx(2 / 3), 0.0]
    assert scores[0].parts == {"1": 1.0, "2": 0.0, "3": 1.0}
    found = metric.reduce(entries, scores)
    assert found["tifa"].value == pytest.approx(1 / 3) and found["tifa"].n == 2
    # Of types all questions together, as theirs: 1 of 3, not the mean of 1/2 and 0.
    assert found["tifa/attribute - color"].value == pytest.approx(1 / 3)
    assert found["tifa/entity - whole"].value == 1.0 and found["tifa/entity - whole"].n == 1


def test_soft_tifa_is_the_mean_of_probabilities_and_their_geometric_mean() -> None:
    table = {"a?": yes(0.9), "b?": yes(0.4), "c?": {"red": 0.1, "blue": 0.2, "grey": 0.05}}
    metric = opened("soft-tifa", Stub(table))
    entries = [entry("x", [A, B, C]), entry("y", [A])]
    scores = metric.score(entries, [WHITE, WHITE], None)
    found = metric.reduce(entries, scores)
    assert scores[0].value == pytest.approx((0.9 + 0.4 + 0.2) / 3)
    expected = ((0.9 * 0.4 * 0.2) ** (1 / 3) + 0.9) / 2
    assert found["soft-tifa-geometric"].value == pytest.approx(expected, abs=1e-12)


def test_dpg_zeroes_what_depends_on_a_no() -> None:
    table = {"a?": yes(0.1), "b?": yes(0.9), "c?": {"red": 0.1, "blue": 0.2, "grey": 0.05}}
    metric = opened("dpg", Stub(table))
    entries = [entry("x", [A, B, C])]
    scores = metric.score(entries, [WHITE], None)
    assert scores[0].value == 0.0  # a is no, so b is 0, so c is
    found = metric.reduce(entries, scores)
    assert found["dpg/attribute"].value == found["dpg/attribute - color"].value == 1.0  # as given
    assert found["dpg/entity"].value == 0.0


def test_a_grid_is_four_pictures() -> None:
    grid = Image.new("RGB", (8, 8))
    for k, level in enumerate((0, 50, 100, 150)):
        grid.paste((level,) * 3, (4 * (k % 2), 4 * (k // 2), 4 * (k % 2) + 4, 4 * (k // 2) + 4))

    class Bright(Stub):
        def answer(self, image: Any, question: str, choices: Sequence[str]) -> Mapping[str, float]:
            return yes(float(np.asarray(image).mean() > 60 if question == "a?" else 1))

    metric = opened("dpg", Bright({}), options={"dpg-grid": "yes"})
    entries = [entry("x", [A, B])]
    scores = metric.score(entries, [grid], None)
    assert scores[0].value == 0.5  # two of four
    assert metric.reduce(entries, scores)["dpg/attribute"].value == 1.0
    with pytest.raises(ValueError, match=r"x/0000: a grid of 2 x 2 must have even sides, got 7x8"):
        quarters(Image.new("RGB", (7, 8)), "x/0000")


def lines(path: Path, *questions: Mapping[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in questions))
    return path


def test_the_official_script_drops_the_first_question_and_so_can_we(tmp_path: Path) -> None:
    file = lines(tmp_path / "q.jsonl", *({"prompt": "x"} | one for one in (A, B, C)),
                 {"prompt": "y"} | A)  # fmt: skip
    table = {"a?": yes(0.1), "b?": yes(0.9), "c?": {"red": 0.1, "blue": 0.2, "grey": 0.05}}
    context = {"files": {"questions": file}}
    entries = [entry("x"), entry("y")]
    metric = opened("dpg", Stub(table), **context)
    assert [one.value for one in metric.score(entries, [WHITE] * 2, None)] == [0, 0]
    quirky = opened("dpg", Stub(table), **context, options={"official-quirks": "yes"})
    assert [one.value for one in quirky.score(entries, [WHITE] * 2, None)] == [1, 0]
    assert quirky.constants != metric.constants
    with pytest.raises(ValueError, match="official-quirks=yes needs --file questions=FILE"):
        opened("dpg", Stub(table), options={"official-quirks": "yes"})
    with pytest.raises(ValueError, match="official-quirks must be yes or no, got 'maybe'"):
        opened("dpg", Stub(table), **context, options={"official-quirks": "maybe"})


def test_vqascore_is_the_judges_own_probability_of_yes() -> None:
    question = "Does this figure show 'words of x'?"
    metric = opened("vqascore", Stub({question: {"Yes": 0.3, "No": 0.1}}))
    entries = [entry("x")]
    scores = metric.score(entries, [WHITE], None)
    assert scores[0].value == 0.3
    assert metric.reduce(entries, scores)["vqascore-yes-no"].value == pytest.approx(0.75)


def test_a_prompt_with_braces_is_a_prompt() -> None:
    odd = Entry(Prompt("x", "{0} {}\n'quoted'"), 0, Path("none"))
    stub = Stub({"Does this figure show '{0} {} 'quoted''?": {"Yes": 1.0, "No": 0.0}})
    opened("vqascore", stub).score([odd], [WHITE], None)


@pytest.mark.parametrize(
    "answer", [yes(float("nan")), {"yes": 0.0, "no": 0.0}, {"yes": 0.9, "no": 0.9}, yes(-0.5)]
)
def test_answers_that_are_no_probabilities_are_errors(answer: Mapping[str, float]) -> None:
    for name in ("tifa", "soft-tifa", "dpg"):
        with pytest.raises(ValueError, match=r"x/0000, question '1': answer must give a choice"):
            opened(name, Stub({"a?": answer})).score([entry("x", [A])], [WHITE], None)


def test_a_missing_picture_is_an_error() -> None:
    for name in ("tifa", "vqascore"):
        with pytest.raises(ValueError, match="images must be one for each of 1 entries, got none"):
            opened(name, Stub({})).score([entry("x", [A])], None, None)


def test_without_a_judge_it_is_said_what_is_missing() -> None:
    for name in ("tifa", "soft-tifa", "dpg", "vqascore"):
        metric = open_metric(name, Context(CPU))
        assert "--judge" in str(metric.needs()[0]) and metric.constants["judge"] is None
        with pytest.raises(ValueError, match="judge must be named"):
            metric.score([entry("x", [A])], [WHITE], None)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([A, A], "ids of questions must differ, got 1 twice"),
        ([B], "parents of question '2' must be questions of the same prompt, got 1"),
        ([A | {"parents": ["2"]}, B], "must not depend on themselves, got"),
        ([C | {"parents": [], "answer": "green"}], "answer must be one of .*got 'green'"),
        ([A | {"choices": ["yes"]}], "choices must be 2 at least"),
        ([A | {"choices": ["Yes", "yes "], "answer": "Yes"}], "differ in more than case"),
        ([A | {"question": "  "}], "question must have from 1 to 10,000 characters"),
        ([A | {"question": None}], "must have question as text, got None"),
        ([A | {"parents": "1"}], "must have parents as a list of texts, got '1'"),
        ([A | {"weight": 2}], "question must have .* only, got weight"),
        (["a?"], "question must be a JSON object, got str"),
        ([A | {"id": 1}], "must have id as text, got 1"),
    ],
)
def test_wrong_questions_are_one_clear_error(
    tmp_path: Path, questions: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"prompt 'x': .*{message}"):
        Questions(Context(CPU)).of(Prompt("x", "x", meta={"questions": questions}))
    if all(isinstance(one, dict) for one in questions):
        file = lines(tmp_path / "q.jsonl", *({"prompt": "x"} | one for one in questions))
        with pytest.raises(ValueError, match=rf"q\.jsonl.*{message}"):
            read_questions(file)


def test_a_prompt_without_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt 'x': must have questions in meta\.questions"):
        Questions(Context(CPU)).of(Prompt("x", "a cat"))
    file = lines(tmp_path / "q.jsonl", {"prompt": "x"} | A)
    questions = Questions(Context(CPU, files={"questions": file}))
    assert questions.of(Prompt("x", ""))[0] == Question("1", "a?", type="entity - whole")
    with pytest.raises(ValueError, match=r"q\.jsonl: must have questions for prompt 'y'"):
        questions.of(Prompt("y", ""))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "prompt": "y"}')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: is not JSON .*twice"):
        read_questions(tmp_path / "bad.jsonl")
    missing = Context(CPU, files={"questions": tmp_path / "none"}, judge="checker")
    assert "--file questions=FILE" in str(open_metric("tifa", missing).needs()[0])
    with pytest.raises(MissingError, match="questions needs"):
        Questions(missing).of(Prompt("x", ""))


def pictures(count: int) -> tuple[list[Entry], list[Image.Image]]:
    """Captions, each with its own scene or, of every second, another."""
    rng = random.Random(0)
    entries, images = [], []
    for n in range(count):
        kind = rng.choice(("one", "pair", "group"))
        scene = sample_scene(rng, kind)
        caption = describe(scene, rng)
        entries.append(Entry(Prompt(f"{n:05d}", caption, "shapes", kind), 0, Path("none")))
        images.append(Image.fromarray(draw(sample_scene(rng, kind) if n % 2 else scene, 64)))
    return entries, images


def test_tifa_of_the_embedded_world_is_the_accuracy_by_statement() -> None:
    entries, images = pictures(40)
    metric: Any = open_metric("tifa", Context(CPU, judge="checker"))
    scores = metric.score(entries, images, None)
    kinds: dict[str, list[bool]] = {}
    for one, image, score in zip(entries, images, scores, strict=True):
        statements = parse(one.prompt.prompt)
        held = check(np.asarray(image), statements) or [False] * len(statements)
        assert score.value == sum(held) / len(held)
        for statement, holds in zip(statements, held, strict=True):
            kinds.setdefault(statement.kind, []).append(holds)
    found = metric.reduce(entries, scores)
    by_kind = {name.rpartition(" - ")[2]: each.value for name, each in found.items() if "/" in name}
    by_kind["relation"] = by_kind.pop("spatial")
    assert by_kind == {kind: pytest.approx(sum(all_) / len(all_)) for kind, all_ in kinds.items()}
    assert 0.4 < found["tifa"].value < 0.95  # right pictures and wrong ones
    vqa: Any = open_metric("vqascore", Context(CPU, judge="checker"))
    shown = vqa.score(entries, images, None)
    assert [one.value == 1 for one in shown] == [one.value == 1 for one in scores]
    dpg: Any = open_metric("dpg", Context(CPU, judge="checker"))
    zeroed = dpg.score(entries, images, None)
    assert all(a.value <= b.value for a, b in zip(zeroed, scores, strict=True))
    assert any(a.value < b.value for a, b in zip(zeroed, scores, strict=True))


def test_a_caption_that_states_nothing_has_no_questions() -> None:
    with pytest.raises(ValueError, match="must be of the embedded world's grammar, got 'a cat'"):
        shapes_questions("a cat")


def test_zeroing_does_not_depend_on_the_order_unless_theirs_is_asked_for() -> None:
    child, parent, root = (Question(i, f"{i}?", parents=p) for i, p in
                           (("c", ("p",)), ("p", ("r",)), ("r", ())))  # fmt: skip
    worth = {"c": 1.0, "p": 1.0, "r": 0.0}
    assert zeroed_mean([child, parent, root], worth) == 0.0
    assert zeroed_mean([child, parent, root], worth, in_file_order=True) == pytest.approx(1 / 3)


def test_pooled_means_have_intervals_over_prompts() -> None:
    entries = [entry(f"{n}") for n in range(200)]
    rng = np.random.default_rng(0)
    values = [list((rng.random(rng.integers(0, 5)) < 0.3).astype(float)) for _ in entries]
    found = pooled_mean(entries, values)
    flat = [one for some in values for one in some]
    assert found.value == pytest.approx(np.mean(flat))
    # Values are independent here, so the interval is about that of a binomial.
    half = 1.96 * (0.3 * 0.7 / len(flat)) ** 0.5
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.2)
    both = mean_of_means(entries, {"a": values, "b": [[1.0]] * 200})
    assert both.value == pytest.approx((np.mean(flat) + 1) / 2)
    assert pooled_mean(entries[:12], [[1.0]] * 12).low == pytest.approx(0.757, abs=1e-3)  # Wilson
    assert pooled_mean(entries[:1], [[0.5, 1]]).high == float("inf")
    with pytest.raises(ValueError, match="group 'a' has none"):
        mean_of_means(entries, {"a": [[]] * 200})


def test_scores_of_one_picture_alone_can_be_reduced() -> None:
    one = entry("x", [A])
    metric = opened("tifa", Stub({}))
    assert metric.reduce([one], [Score(1.0, {"1": 1.0})])["tifa"].value == 1.0


def dpg_file(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    """The golden's questions as ours."""
    return lines(path, *(
        {
            "prompt": row["item_id"], "id": row["proposition_id"],
            "question": row["question_natural_language"], "type": row["tuple"].split("(")[0].strip(),
            "parents": [one.strip() for one in row["dependency"].split(",") if one.strip() != "0"],
        }
        for row in rows
    ))  # fmt: skip


@pytest.mark.parametrize("count", ["1", "4"])
def test_dpg_is_the_official_scripts(tmp_path: Path, count: str) -> None:
    """With its quirks; without them what it drops counts too."""
    golden = read_json(GOLDEN / "dpg.json")
    answers = dict(golden["answers"])
    expected = golden["results"][count]

    class ByCrop(Stub):
        def answer(self, image: Any, question: str, choices: Sequence[str]) -> Mapping[str, float]:
            crop = round(float(np.asarray(image)[0, 0, 0]))
            return yes(float(answers[question][crop] == "yes"))

    grid = Image.new("RGB", (16, 16))
    for k, corner in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        grid.paste((k, k, k), (*corner, corner[0] + 8, corner[1] + 8))
    options = {"official-quirks": "yes", "dpg-grid": "yes" if count == "4" else "no"}
    context = {"files": {"questions": dpg_file(tmp_path / "q.jsonl", golden["rows"])}}
    metric = opened("dpg", ByCrop({}), **context, options=options)
    entries = [entry(prompt) for prompt in expected["prompts"]]
    scores = metric.score(entries, [grid if count == "4" else grid.crop((0, 0, 8, 8))] * 40, None)
    assert [one.value for one in scores] == pytest.approx(list(expected["prompts"].values()))
    found = metric.reduce(entries, scores)
    assert found["dpg"].value == pytest.approx(expected["score"])
    for name, value in expected["categories"].items():
        assert found[f"dpg/{name}"].value == pytest.approx(value), name
    plain = opened("dpg", ByCrop({}), **context).score(entries[:1], [grid], None)
    assert len(plain[0].parts) == 1 + len(scores[0].parts) / int(count)
