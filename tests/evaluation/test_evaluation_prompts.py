"""Prompt sets: each format in a file of a few invented rows, what is refused, and what is chosen."""

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pixart.evaluation.caption_accuracy import Task, captions
from pixart.evaluation.judges.prompt_questions import Questions
from pixart.evaluation.metric import Context
from pixart.evaluation.needs import MissingError
from pixart.evaluation.prompt_sets import SETS
from pixart.evaluation.prompt_sets.files import as_lines, read_prompts
from pixart.evaluation.prompt_sets.making import SOURCE_KEY, choose, make_prompts, save_prompts
from pixart.evaluation.prompt_sets.reading import MAX_BYTES
from pixart.evaluation.prompt_sets.shapes import CATEGORIES, drawn_scenes
from pixart.evaluation.store.entries import Prompt
from pixart.files import sha256_of
from pixart.shapes.caption import parse
from pixart.shapes.checker import check

COCO = {
    "annotations": [
        {"image_id": 9, "id": 3, "caption": "A heron\n on a roof. "},
        {"image_id": 9, "id": 1, "caption": "A bird on tiles."},
        {"image_id": 4, "id": 2, "caption": "Two mugs."},
    ]
}
MJHQ = {
    "0a1b": {"category": "food", "prompt": "a pie, steaming"},
    "2c3d": {"category": "art", "prompt": "a pie, painted"},
}
GENEVAL = [
    {"tag": "counting", "include": [{"class": "mug", "count": 2}], "prompt": "a photo of two mugs"},
    {
        "tag": "position",
        "include": [
            {"class": "mug", "count": 1},
            {"class": "cat", "count": 1, "position": ["left of", 0]},
        ],
        "exclude": [{"class": "dog", "count": 1}],
        "prompt": "a photo of a cat left of a mug",
    },
]
GENEVAL2 = [
    {
        "prompt": "two red mugs",
        "atom_count": 3,
        "vqa_list": [["How many mugs are there?", "two"], ["Are the mugs red?", "Yes"]],
        "skills": ["count", "attribute"],
    }
]
TIFA = [
    {
        "id": "coco_7", "caption": "a red mug", "question": "is it a mug?", "choices": ["yes", "no"],
        "answer": "yes", "element_type": "object", "coco_val_id": "12",
    },
    {
        "id": "coco_7", "caption": "a red mug", "question": "what colour?", "answer": "red",
        "choices": ["red", "blue", "Blue", "green"], "element_type": "color", "coco_val_id": "12",
    },
    {
        "id": "drawbench_1", "caption": "a cat", "question": "is it a cat?", "choices": ["yes", "no"],
        "answer": "yes", "element_type": "animal",
    },
]  # fmt: skip
DPG = """item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,\
question_natural_language
one,"a red mug, on a shelf",,1,0,entity,whole,entity - whole (mug),Is there a mug?
one,"a red mug, on a shelf",,2,1,attribute,color,"attribute - color (mug, red)",Is the mug red?
one,"a red mug, on a shelf",,3,"1, 2",relation,spatial,r,Is it on a shelf?
two,a cat,,1,0,entity,whole,entity - whole (cat),Is there a cat?
"""
PARTI = 'Prompt\tCategory\tChallenge\tNote\na "quoted mug\tArtifacts\tBasic\t\na cat\tAnimals\tBasic\tnote\n'
DRAWBENCH = 'Prompts,Category\n"a mug, red",Colors\na cat,Animals\n'
IMAGEREWARD = [{"id": "000001-0002", "prompt": "a mug"}, {"id": "000003-0004", "prompt": "a cat"}]


def compbench(folder: Path, lines: int = 2) -> None:
    for name in ("color", "shape", "texture", "spatial", "non_spatial", "complex"):
        text = "".join(f"a {name} mug {k}\n" for k in range(lines))
        (folder / f"{name}_val.txt").write_text(text)
    (folder / "complex_val_action.txt").write_text("a complex mug 0\n")
    (folder / "complex_val_spatial.txt").write_text("a complex mug 1\n")


def hps(folder: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{style}.json").write_text(
            json.dumps([f"{style} of a mug", f"{style} of a cat"])
        )


def source(folder: Path, name: str) -> Path:
    """A small file of the set's format, in a folder as it is published."""
    if name in ("t2i-compbench", "hps"):
        {"t2i-compbench": compbench, "hps": hps}[name](folder)
        return folder
    contents: dict[str, Any] = {
        "coco": COCO, "mjhq": MJHQ, "geneval": GENEVAL, "geneval2": GENEVAL2, "tifa": TIFA, "dpg": DPG,
        "parti": PARTI, "drawbench": DRAWBENCH, "imagereward": IMAGEREWARD,
    }  # fmt: skip
    values = contents[name]
    path = folder / SETS[name].files[0]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(one) + "\n" for one in values)
    else:
        text = values if isinstance(values, str) else json.dumps(values)
    path.write_text(text, encoding="utf-8")
    return path


FOUND = {
    "coco": [("000000000004", "Two mugs.", ""), ("000000000009", "A heron  on a roof.", "")],
    "mjhq": [("0a1b", "a pie, steaming", "food"), ("2c3d", "a pie, painted", "art")],
    "parti": [("00000", 'a "quoted mug', "Artifacts"), ("00001", "a cat", "Animals")],
    "geneval": [
        ("00000", "a photo of two mugs", "counting"),
        ("00001", "a photo of a cat left of a mug", "position"),
    ],
    "geneval2": [("00000", "two red mugs", "3 atoms")],
    "dpg": [("one", "a red mug, on a shelf", ""), ("two", "a cat", "")],
    "tifa": [("coco_7", "a red mug", "coco"), ("drawbench_1", "a cat", "drawbench")],
    "drawbench": [("00000", "a mug, red", "Colors"), ("00001", "a cat", "Animals")],
    "imagereward": [("000001-0002", "a mug", ""), ("000003-0004", "a cat", "")],
}


@pytest.mark.parametrize("name", FOUND)
def test_a_set_is_read_from_the_form_that_it_is_published_in(tmp_path: Path, name: str) -> None:
    made = make_prompts(name, source(tmp_path, name), seed=1)
    assert [(one.id, one.prompt, one.category) for one in made.prompts] == FOUND[name]
    assert {one.set for one in made.prompts} == {name}


@pytest.mark.parametrize("name", SETS)
def test_a_folder_stands_for_the_files_in_it_and_prompts_are_read_back(
    tmp_path: Path, name: str
) -> None:
    source(tmp_path, name)
    made = save_prompts(name, tmp_path / "out" / "prompts.jsonl", tmp_path)
    assert tuple(read_prompts(tmp_path / "out" / "prompts.jsonl")) == made.prompts


@pytest.mark.parametrize("name", SETS)
def test_fewer_prompts_than_are_published_are_told(tmp_path: Path, name: str) -> None:
    made = make_prompts(name, source(tmp_path, name))
    published = f"{SETS[name].count:,} are published"
    assert any(f"{len(made.prompts)} prompts, {published}" in note for note in made.notes)


def test_hps_has_a_category_for_each_style(tmp_path: Path) -> None:
    made = make_prompts("hps", source(tmp_path, "hps"))
    assert Counter(one.category for one in made.prompts) == dict.fromkeys(
        ("anime", "concept-art", "paintings", "photo"), 2
    )
    assert made.prompts[2].id == "concept-art-00000"


def test_drawbench_is_read_from_a_list_too(tmp_path: Path) -> None:
    (tmp_path / "drawbench.json").write_text('["a mug", "a cat"]')
    assert [one.prompt for one in make_prompts("drawbench", tmp_path).prompts] == ["a mug", "a cat"]


def test_compbench_says_what_a_complex_prompt_is_judged_by(tmp_path: Path) -> None:
    made = make_prompts("t2i-compbench", source(tmp_path, "t2i-compbench"))
    complex_ones = [one for one in made.prompts if one.category == "complex"]
    assert [one.meta["complex"] for one in complex_ones] == ["action", "spatial"]
    assert {one.category for one in made.prompts} == {
        "color", "shape", "texture", "spatial", "non-spatial", "complex",
    }  # fmt: skip


def test_all_thousand_prompts_of_compbench_are_told_to_be_the_wrong_ones(tmp_path: Path) -> None:
    (tmp_path / "color.txt").write_text("".join(f"a mug {k}\n" for k in range(1000)))
    (note,) = make_prompts("t2i-compbench", tmp_path / "color.txt").notes
    assert "1,000 of color (300 are published)" in note and "3 points off" in note


def test_complex_prompts_of_no_kind_are_told(tmp_path: Path) -> None:
    compbench(tmp_path, lines=3)
    notes = make_prompts("t2i-compbench", tmp_path).notes
    assert "1 prompts stand in none of complex_val_KIND.txt" in notes[0]


def test_pictures_of_coco_and_mjhq_are_named_as_they_are_published(tmp_path: Path) -> None:
    coco = make_prompts("coco", source(tmp_path, "coco")).prompts
    mjhq = make_prompts("mjhq", source(tmp_path, "mjhq")).prompts
    assert [one.reference for one in coco] == [
        "COCO_val2014_000000000004.jpg",
        "COCO_val2014_000000000009.jpg",
    ]
    assert [one.reference for one in mjhq] == ["food/0a1b.jpg", "art/2c3d.jpg"]


def test_one_caption_of_a_picture_is_chosen_by_the_seed(tmp_path: Path) -> None:
    path = source(tmp_path, "coco")
    found = {make_prompts("coco", path, seed=seed).prompts[1].prompt for seed in range(20)}
    assert found == {"A heron  on a roof.", "A bird on tiles."}
    assert make_prompts("coco", path, seed=3) == make_prompts("coco", path, seed=3)


def test_questions_of_dpg_depend_on_each_other_and_the_first_row_is_there(tmp_path: Path) -> None:
    one = make_prompts("dpg", source(tmp_path, "dpg")).prompts[0]
    assert [(q["id"], q["parents"], q["type"]) for q in one.meta["questions"]] == [
        ("1", [], "entity - whole"),
        ("2", ["1"], "attribute - color"),
        ("3", ["1", "2"], "relation - spatial"),
    ]


def test_a_dependency_on_no_question_of_dpg_is_dropped_and_told(tmp_path: Path) -> None:
    path = tmp_path / "dpg_bench.csv"
    path.write_text(DPG.replace(",,2,1,", ",,2,7,"))
    made = make_prompts("dpg", path)
    assert made.prompts[0].meta["questions"][1]["parents"] == []
    assert "1 questions depend on one that is not there" in made.notes[0]
    assert "one: 2" in made.notes[0]


def test_questions_of_tifa_have_choices_that_differ(tmp_path: Path) -> None:
    made = make_prompts("tifa", source(tmp_path, "tifa"))
    first = made.prompts[0]
    assert [q["choices"] for q in first.meta["questions"]] == [
        ["yes", "no"],
        ["red", "blue", "green"],
    ]
    assert [q["answer"] for q in first.meta["questions"]] == ["yes", "red"]
    assert first.reference == "COCO_val2014_000000000012.jpg"
    assert made.prompts[1].reference is None


def test_a_question_of_tifa_without_its_answer_is_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "tifa.json"
    path.write_text(json.dumps([*TIFA, {**TIFA[0], "answer": "perhaps"}]))
    made = make_prompts("tifa", path)
    assert len(made.prompts[0].meta["questions"]) == 2
    assert "1 questions have an answer that is none of their choices" in made.notes[0]


def test_geneval_keeps_what_is_to_be_found(tmp_path: Path) -> None:
    made = make_prompts("geneval", source(tmp_path, "geneval"))
    for one, line in zip(made.prompts, GENEVAL, strict=True):
        assert {**one.meta, "prompt": one.prompt} == {**line, SOURCE_KEY: made.source_sha256}


def test_counts_of_geneval2_are_asked_with_all_numbers(tmp_path: Path) -> None:
    (one,) = make_prompts("geneval2", source(tmp_path, "geneval2")).prompts
    count, colour = one.meta["questions"]
    assert count["answer"] in count["choices"] and len(count["choices"]) == 11
    assert colour["choices"] == ["Yes", "No"]


@pytest.mark.parametrize("name", ["tifa", "dpg", "geneval2"])
def test_questions_are_such_as_metrics_read(tmp_path: Path, name: str) -> None:
    questions = Questions(Context(torch.device("cpu")))
    for one in make_prompts(name, source(tmp_path, name)).prompts:
        assert len(questions.of(one)) == len(one.meta["questions"])


# --- what travels into the protocol's id


@pytest.mark.parametrize("name", SETS)
def test_the_digest_of_the_files_is_in_every_line(tmp_path: Path, name: str) -> None:
    made = make_prompts(name, source(tmp_path, name))
    assert {one.meta[SOURCE_KEY] for one in made.prompts} == {made.source_sha256}
    if len(SETS[name].files) == 1:
        assert made.source_sha256 == sha256_of(tmp_path / SETS[name].files[0])


def test_another_file_with_the_same_prompts_makes_other_lines(tmp_path: Path) -> None:
    path = source(tmp_path, "imagereward")
    before = make_prompts("imagereward", path)
    path.write_text(path.read_text() + "\n")
    after = make_prompts("imagereward", path)
    assert [one.prompt for one in before.prompts] == [one.prompt for one in after.prompts]
    assert as_lines(before.prompts) != as_lines(after.prompts)


def test_every_file_of_a_folder_counts(tmp_path: Path) -> None:
    before = make_prompts("hps", source(tmp_path, "hps")).source_sha256
    (tmp_path / "photo.json").write_text('["another"]')
    assert make_prompts("hps", tmp_path).source_sha256 != before


@pytest.mark.parametrize("name", SETS)
def test_what_was_made_of_a_set_stands_for_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "made.jsonl"
    made = save_prompts(name, path, source(tmp_path, name))
    again = make_prompts(name, path)
    assert (again.prompts, again.source_sha256) == (made.prompts, made.source_sha256)
    assert len(make_prompts(name, path, count=1).prompts) == 1


def test_what_was_made_of_another_set_does_not(tmp_path: Path) -> None:
    save_prompts("parti", tmp_path / "made.jsonl", source(tmp_path, "parti"))
    with pytest.raises(ValueError, match="must be prompts of dpg, it has some of parti"):
        make_prompts("dpg", tmp_path / "made.jsonl")


# --- choosing


def test_of_every_category_its_share_is_chosen_in_the_files_order() -> None:
    prompts = [Prompt(f"{k:03d}", "a", category="ab"[k % 3 == 0]) for k in range(90)]
    chosen = choose(prompts, 10, "0")
    assert Counter(one.category for one in chosen) == {"a": 7, "b": 3}
    assert [one.id for one in chosen] == sorted(one.id for one in chosen)
    assert chosen == choose(prompts, 10, "0") != choose(prompts, 10, "1")


@pytest.mark.parametrize("count", [1, 2, 7, 89])
def test_as_many_are_chosen_as_are_asked_for(count: int) -> None:
    prompts = [Prompt(f"{k}", "a", category=str(k % 7)) for k in range(90)]
    assert len(choose(prompts, count, "0")) == count


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="--count must be at most the 1 prompts, got 2"):
        choose([Prompt("a", "a")], 2, "0")


# --- shapes


@pytest.mark.parametrize("category", CATEGORIES)
def test_shapes_prompts_are_the_first_captions_of_the_model_card(category: str) -> None:
    kind, held_out = CATEGORIES[category]
    made = make_prompts("shapes", count=300)
    own = [one.prompt for one in made.prompts if one.category == category]
    assert own == captions(Task(kind, 128, held_out), 1_000_000)[:60]


def test_fewer_shapes_prompts_are_the_first_of_more() -> None:
    few = {one.id: one.prompt for one in make_prompts("shapes", count=7).prompts}
    many = {one.id: one.prompt for one in make_prompts("shapes", count=50).prompts}
    assert few.items() <= many.items() and len(few) == 7


def test_drawn_scenes_show_what_their_captions_state() -> None:
    import numpy as np

    prompts = {one.id: one.prompt for one in make_prompts("shapes", count=10, seed=5).prompts}
    for name, picture in drawn_scenes(10, 128, 5):
        assert picture.size == (128, 128)
        assert all(check(np.asarray(picture), parse(prompts[name])))


def test_shapes_take_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shapes is generated and needs no file"):
        make_prompts("shapes", tmp_path)


# --- your own


def test_lines_and_jsonl_of_ones_own_are_sets_too(tmp_path: Path) -> None:
    lines, own = tmp_path / "mine.txt", tmp_path / "mine.jsonl"
    lines.write_text("a mug\n\na cat\n")
    own.write_text('{"id": "x", "prompt": "a mug", "category": "b"}\n')
    first, second = make_prompts("lines", lines), make_prompts("jsonl", own)
    assert [(one.id, one.prompt, one.set) for one in first.prompts] == [
        ("00000", "a mug", "mine"),
        ("00001", "a cat", "mine"),
    ]
    assert [(one.id, one.category, one.set) for one in second.prompts] == [("x", "b", "mine")]
    with pytest.raises(ValueError, match="jsonl is your own .jsonl"):
        make_prompts("jsonl", lines)


# --- what is missing or wrong


@pytest.mark.parametrize("name", SETS)
def test_without_a_file_the_error_says_where_it_is_published(name: str) -> None:
    with pytest.raises(MissingError) as error:
        make_prompts(name)
    assert error.value.exit_code == 3
    assert SETS[name].source in str(error.value) and SETS[name].files[0] in str(error.value)
    assert "--from" in str(error.value)


def test_a_folder_that_lacks_a_file_is_told_which(tmp_path: Path) -> None:
    hps(tmp_path)
    (tmp_path / "photo.json").unlink()
    with pytest.raises(MissingError, match="photo.json") as error:
        make_prompts("hps", tmp_path)
    assert "anime.json" not in str(error.value)


def test_an_unknown_set_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'geneval'"):
        make_prompts("genevall")


def changed(values: Any, *, index: int = 0, **other: Any) -> str:
    rows = [dict(one) for one in values]
    rows[index] = {k: v for k, v in {**rows[index], **other}.items() if v is not ...}
    return json.dumps(rows)


def lines_of(values: Any, **other: Any) -> str:
    return "\n".join(json.dumps(one) for one in json.loads(changed(values, **other)))


HOSTILE = [
    ("coco", "{", "is not JSON"),
    ("coco", "[]", "must hold a JSON object, got a list"),
    ("coco", '{"annotations": 3}', "must have annotations as a list, got 3"),
    ("coco", '{"annotations": [3]}', "annotation 0: must be a JSON object"),
    ("coco", '{"annotations": [{"caption": "a", "id": 1}]}', "must have image_id as a whole number"),
    ("coco", '{"annotations": [{"caption": " ", "id": 1, "image_id": 1}]}', "from 1 to 20,000 characters"),
    ("coco", '{"annotations": []}', "must hold prompts, it holds none"),
    ("coco", "[" * 10_000, "nested at most 64 deep|is not JSON"),
    ("mjhq", '{"a/b": {"category": "food", "prompt": "x"}}', "id must be a word for a folder's name"),
    ("mjhq", '{"..": {"category": "food", "prompt": "x"}}', "id must be a word for a folder's name"),
    ("mjhq", '{"a": {"category": "../x", "prompt": "x"}}', "category must be a folder's name"),
    ("mjhq", '{"a": {"category": "food"}}', "must have prompt as text, it has category"),
    ("mjhq", '{"a": {"category": "f", "prompt": "x"}, "a": {}}', "has 'a' twice"),
    ("mjhq", '{"a": {"category": "f", "prompt": "x"}, "A": {"category": "f", "prompt": "x"}}', "unique"),
    ("parti", "Prompt\tKind\n", "it lacks Category, Challenge"),
    ("parti", "Prompt\tCategory\tChallenge\na\tb\n", "must have 3 columns, got 2"),
    ("parti", "", "must have the columns"),
    ("drawbench", "Prompts,Category\n" + "a" * 200_000 + ",b\n", "is no table|20,000 characters"),
    ("drawbench", b"\xff\xfe", "must be UTF-8 text"),
    ("imagereward", changed(IMAGEREWARD, index=1, id="000001-0002"), "'000001-0002' twice"),
    ("imagereward", changed(IMAGEREWARD, id=3), "must have id as text, got 3"),
    ("imagereward", "{}", "must hold a JSON list, got a dict"),
    ("geneval", lines_of(GENEVAL, tag=...), "must have tag as text, it has include, prompt"),
    ("geneval", lines_of(GENEVAL, include=[{"class": "mug"}]), "must have count as a whole number"),
    ("geneval", lines_of(GENEVAL, include="mug"), "must have include as a list"),
    ("geneval2", lines_of(GENEVAL2, skills=["count"]), "must have a skill for each of 2 questions"),
    ("geneval2", lines_of(GENEVAL2, vqa_list=[["a"], ["b"]]), r"must be of \[question, answer\]"),
    ("geneval2", lines_of(GENEVAL2, vqa_list=[["a?", "red"], ["b?", "Yes"]]), "Yes, No or zero to ten"),
    ("tifa", changed(TIFA, caption="another"), "must have one caption"),
    ("tifa", changed(TIFA, index=2, answer="x"), "drawbench_1 must have a question that can be"),
    ("tifa", changed(TIFA, choices="yes"), "must have choices as a list of texts"),
    ("dpg", DPG.replace(",,2,1,", ",,1,0,"), "has question '1' twice"),
    ("dpg", DPG.replace(",,2,1,", ",,2,x,"), "dependency must be numbers with commas"),
    ("dpg", DPG.replace("two,a cat", 'one,"a dog"'), "must have one text"),
    ("dpg", DPG.replace("\none", "\nc/d"), "id must be a word for a folder's name"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "rule"), HOSTILE)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(
    tmp_path: Path, name: str, content: str | bytes, rule: str
) -> None:
    path = tmp_path / SETS[name].files[0]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    with pytest.raises(ValueError, match=rule) as error:
        make_prompts(name, path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000 + len(str(path))
    assert time.process_time() - started < 5


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2014.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: it takes no room
    with pytest.raises(ValueError, match="must be at most 268,435,456 bytes"):
        make_prompts("coco", path)


def test_a_file_that_is_none_of_compbench_is_refused(tmp_path: Path) -> None:
    (tmp_path / "colours.txt").write_text("a mug\n")
    with pytest.raises(ValueError, match="must be one of color_val.txt"):
        make_prompts("t2i-compbench", tmp_path / "colours.txt")


@pytest.mark.parametrize("count", [0, -1, 10**9])
def test_a_count_out_of_bounds_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="--count must be from 1 to 1,000,000"):
        make_prompts("shapes", count=count)
