"""Sets whose prompts have questions about their pictures, or what is to be found in them: TIFA, DPG-Bench,
GenEval and GenEval 2. The questions stand in meta["questions"], where judges/prompt_questions.py looks."""

from collections import Counter
from pathlib import Path
from typing import Any

from pixart.evaluation.prompt_sets.reading import (
    Read,
    as_object,
    json_lines,
    list_of,
    number_of,
    prompt_of,
    read_json_list,
    short,
    table_rows,
    text_of,
    texts_of,
)
from pixart.evaluation.store.entries import Prompt
from pixart.files import listed

_YES = ("yes", "no")
_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip
_COCO = "COCO_val2014_{:012d}.jpg"
_DPG = (
    "item_id", "text", "proposition_id", "dependency", "category_broad", "category_detailed",
    "question_natural_language",
)  # fmt: skip


def read_tifa(paths: list[Path], seed: int) -> Read:
    """tifa_v1.0_question_answers.json: a list of questions, each with its prompt. The category is where a
    prompt is from: coco, drawbench, partiprompt or paintskill."""
    (path,) = paths
    prompts: dict[str, Prompt] = {}
    lost = []
    for number, values in enumerate(read_json_list(path)):
        place = f"{path}, question {number}"
        one = as_object(values, place)
        name = text_of(one, "id", place)
        caption = prompt_of(text_of(one, "caption", place), place)
        known = prompts.setdefault(
            name,
            Prompt(
                name,
                caption,
                category=name.rpartition("_")[0],
                reference=_picture(one.get("coco_val_id")),
                meta={"questions": []},
            ),
        )
        if known.prompt != caption:
            raise ValueError(f"{place}: {name!r} must have one caption, got {short(caption)} too")
        questions = known.meta["questions"]
        choices = _different(texts_of(one, "choices", place))
        answer = text_of(one, "answer", place)
        if answer not in choices or len(choices) < 2:
            lost.append(f"{name}: {answer}")
            continue
        questions.append(
            {
                "id": f"{len(questions) + 1}",
                "question": text_of(one, "question", place),
                "choices": choices,
                "answer": answer,
                "type": text_of(one, "element_type", place),
            }
        )
    return _asked(
        list(prompts.values()), path, lost, "have an answer that is none of their choices"
    )


def read_dpg(paths: list[Path], seed: int) -> Read:
    """dpg_bench.csv: a question a row, the right answer always yes, with the questions that it depends on.
    The official script skips the first row; here it is a question as all others."""
    (path,) = paths
    prompts: dict[str, Prompt] = {}
    for place, row in table_rows(path, _DPG):
        name = row["item_id"].strip()
        text = prompt_of(row["text"], place)
        known = prompts.setdefault(name, Prompt(name, text, meta={"questions": []}))
        if known.prompt != text:
            raise ValueError(f"{place}: {name!r} must have one text, got {short(text)} too")
        broad, detailed = row["category_broad"].strip(), row["category_detailed"].strip()
        known.meta["questions"].append(
            {
                "id": row["proposition_id"].strip(),
                "question": row["question_natural_language"].strip(),
                "choices": list(_YES),
                "answer": "yes",
                "type": f"{broad} - {detailed}",
                "parents": _parents(row["dependency"], place),
            }
        )
    lost = [lost for one in prompts.values() for lost in _drop_unknown_parents(one)]
    notes = []
    if lost:
        notes.append(
            f"{path}: {len(lost)} questions depend on one that is not there, and on none here "
            f"({listed(lost)})"
        )
    for one in prompts.values():
        twice = [k for k, n in Counter(q["id"] for q in one.meta["questions"]).items() if n > 1]
        if twice:
            raise ValueError(f"{path}: {one.id!r} has question {twice[0]!r} twice")
    return Read(list(prompts.values()), notes)


def read_geneval(paths: list[Path], seed: int) -> Read:
    """evaluation_metadata.jsonl: {"tag", "include", "exclude", "prompt"}; all but the prompt is meta."""
    (path,) = paths
    prompts: list[Prompt] = []
    for place, one in json_lines(path):
        tag = text_of(one, "tag", place)
        for name in ("include", "exclude"):
            for wanted in list_of({"exclude": [], **one}, name, place):
                text_of(as_object(wanted, place), "class", f"{place}, {name}")
                number_of(wanted, "count", f"{place}, {name}")
        meta = {name: value for name, value in one.items() if name != "prompt"}
        text = prompt_of(text_of(one, "prompt", place), place)
        prompts.append(Prompt(f"{len(prompts):05d}", text, category=tag, meta=meta))
    return Read(prompts)


def read_geneval2(paths: list[Path], seed: int) -> Read:
    """geneval2_data.jsonl: {"prompt", "atom_count", "vqa_list": [[question, answer], ...], "skills"}. The
    answers are Yes or a number in words; the category is how many atoms a prompt has."""
    (path,) = paths
    prompts: list[Prompt] = []
    for place, one in json_lines(path):
        text = prompt_of(text_of(one, "prompt", place), place)
        pairs = list_of(one, "vqa_list", place)
        skills = texts_of(one, "skills", place)
        atoms = number_of(one, "atom_count", place)
        if len(pairs) != len(skills) or not pairs:
            raise ValueError(f"{place}: must have a skill for each of {len(pairs)} questions")
        questions = [
            _atom(pair, skill, number, place)
            for number, (pair, skill) in enumerate(zip(pairs, skills, strict=True), 1)
        ]
        meta = {"atoms": atoms, "questions": questions}
        prompts.append(Prompt(f"{len(prompts):05d}", text, category=f"{atoms} atoms", meta=meta))
    return Read(prompts)


def _atom(pair: Any, skill: str, number: int, place: str) -> dict[str, Any]:
    if (
        not isinstance(pair, list)
        or len(pair) != 2
        or not all(isinstance(one, str) for one in pair)
    ):
        raise ValueError(f"{place}: vqa_list must be of [question, answer], got {short(pair)}")
    question, answer = pair
    choices = ["Yes", "No"] if answer in ("Yes", "No") else list(_NUMBERS)
    if answer not in choices:
        raise ValueError(f"{place}: an answer must be Yes, No or zero to ten, got {short(answer)}")
    return {
        "id": f"{number}", "question": question, "choices": choices, "answer": answer, "type": skill,
    }  # fmt: skip


def _asked(prompts: list[Prompt], path: Path, lost: list[str], why: str) -> Read:
    silent = [one.id for one in prompts if not one.meta["questions"]]
    if silent:
        raise ValueError(f"{path}: {listed(silent)} must have a question that can be answered")
    notes = (
        [f"{path}: {len(lost)} questions {why}, and are left out ({listed(lost)})"] if lost else []
    )
    return Read(prompts, notes)


def _different(choices: list[str]) -> list[str]:
    """Without those that differ in case alone: no judge can tell them apart."""
    found: dict[str, str] = {}
    for one in choices:
        if one.strip():
            found.setdefault(one.strip().lower(), one)
    return list(found.values())


def _is_number(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 12


def _picture(number: Any) -> str | None:
    return _COCO.format(int(number)) if _is_number(number) else None


def _parents(text: str, place: str) -> list[str]:
    """ "0" is none, "1,2" are two."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(_is_number(part) for part in parts):
        raise ValueError(f"{place}: dependency must be numbers with commas, got {short(text)}")
    return [part for part in parts if part != "0"]


def _drop_unknown_parents(prompt: Prompt) -> list[str]:
    known = {one["id"] for one in prompt.meta["questions"]}
    lost = []
    for one in prompt.meta["questions"]:
        if any(parent not in known for parent in one["parents"]):
            lost.append(f"{prompt.id}: {one['id']}")
        one["parents"] = [parent for parent in one["parents"] if parent in known]
    return lost
