"""Samples of the readers of the evaluation: protocols, prompt sets, and what metrics ask judges and detectors
for. name -> (make, read) of a Target."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Pair = tuple[Callable[[Path], Path], Callable[[Path], object]]

SAMPLES = {
    "coco": json.dumps(
        {"annotations": [{"image_id": k, "id": 9 - k, "caption": f"mug {k}"} for k in range(4)]}
    ),
    "mjhq": json.dumps({f"0a{k}": {"category": "food", "prompt": f"pie {k}"} for k in range(4)}),
    "parti": "Prompt\tCategory\tChallenge\tNote\na mug\tArtifacts\tBasic\t\na cat\tAnimals\tBasic\tx\n",
    "geneval": '{"tag": "counting", "include": [{"class": "mug", "count": 2}], "prompt": "two mugs"}\n' * 2,
    "geneval2": '{"prompt": "two mugs", "atom_count": 2, "vqa_list": [["How many?", "two"]], '
    '"skills": ["count"]}\n' * 2,
    "dpg": "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
    'a,"a mug, red",,1,0,entity,whole,x,Is it a mug?\na,"a mug, red",,2,1,attribute,color,x,Red?\n',
    "tifa": json.dumps(
        [
            {
                "id": f"coco_{k}", "caption": "a mug", "question": "is it?", "choices": ["yes", "no"],
                "answer": "yes", "element_type": "object", "coco_val_id": "12",
            }
            for k in range(3)
        ]
    ),
    "drawbench": 'Prompts,Category\n"a mug, red",Colors\na cat,Animals\n',
    "imagereward": json.dumps([{"id": f"0{k}-1", "prompt": f"mug {k}"} for k in range(3)]),
}  # fmt: skip


def _of_set(name: str) -> Pair:
    from pixart.evaluation.prompt_sets import SETS

    def make(folder: Path) -> Path:
        path = folder / SETS[name].files[0]
        path.write_text(SAMPLES[name], encoding="utf-8")
        return path

    def read(place: Path) -> object:
        from pixart.evaluation.prompt_sets.making import make_prompts

        return make_prompts(name, place)

    return make, read


def _make_protocol(folder: Path) -> Path:
    from pixart.evaluation.protocols.protocol import PROTOCOLS

    path = folder / "mine.yaml"
    path.write_bytes((PROTOCOLS / "geneval.yaml").read_bytes())
    return path


def _read_protocol(place: Path) -> object:
    from pixart.evaluation.protocols.protocol import load_protocol

    protocol = load_protocol(place)
    return protocol.id("", {})  # what was read can be written


def _make_prompt_lines(folder: Path) -> Path:
    from pixart.evaluation.prompt_sets.files import write_prompts
    from pixart.evaluation.store.entries import Prompt

    meta = {"questions": [1, 2.5, "x"]}
    prompts = [Prompt(f"{k}", f"mug {k}", "s", "c", f"{k}.jpg", meta, "64x32") for k in range(3)]
    write_prompts(folder / "prompts.jsonl", prompts)
    return folder / "prompts.jsonl"


def _read_prompt_lines(place: Path) -> object:
    from pixart.evaluation.prompt_sets.files import as_lines, read_prompts

    return as_lines(read_prompts(place))


def _make_drawn(folder: Path) -> Path:
    """protocol.json of a folder that was drawn; the pictures and prompts are whole."""
    from PIL import Image

    from pixart.evaluation.prompt_sets.files import write_prompts
    from pixart.evaluation.prompt_sets.making import make_prompts
    from pixart.evaluation.protocols.protocol import load_protocol
    from pixart.evaluation.running.record import prompts_digest
    from pixart.files import write_json

    made = make_prompts("shapes", count=2).prompts
    write_prompts(folder / "prompts.jsonl", made)
    for prompt in made:
        (folder / "images" / prompt.id).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / prompt.id / "0000.png")
    protocol = load_protocol("shapes").changed(count=2, size="8x8")
    facts = {"prompts_sha256": prompts_digest(made), "resolved": {"size": "8x8"}}
    write_json(folder / "protocol.json", protocol.record(prompts=2, **facts))
    return folder / "protocol.json"


def _read_drawn(place: Path) -> object:
    from pixart.evaluation.running.run import Pictures

    return Pictures.drawn(place.parent)


QUESTIONS = [
    {"prompt": "a", "id": "1", "question": "Is it a mug?", "type": "entity"},
    {"prompt": "a", "id": "2", "question": "Which colour?", "choices": ["red", "blue"], "answer": "red",
     "type": "attribute", "parents": ["1"]},
]  # fmt: skip
DETECTIONS = [
    {"key": "a/0000", "width": 4, "height": 2, "detector": "x", "detections": [
        {"class": "mug", "score": 0.9, "box": [0, 0, 2.5, 2], "color": "red",
         "mask": {"size": [2, 4], "counts": [1, 3, 4]}}]},
    {"key": "a/0001", "width": 4, "height": 2, "detector": "x", "detections": []},
]  # fmt: skip
PHRASES = [
    {"prompt": "a", "phrases": ["a red mug", "a cat"]},
    {
        "prompt": "b",
        "phrases": ["the hat"],
        "objects": ["hat", "rack"],
        "action": "the hat was there",
    },
]


def _of_lines(name: str, lines: list[Any], read: Callable[[Path], object]) -> Pair:
    def make(folder: Path) -> Path:
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        return path

    return make, read


def _read_questions(place: Path) -> object:
    from pixart.evaluation.judges.prompt_questions import read_questions

    return read_questions(place)


def _read_detections(place: Path) -> object:
    from pixart.evaluation.detecting.detections import read_detections

    found = read_detections(place)
    masks = [one.mask for picture in found.values() for one in picture.detections]
    return found, [mask.pixels() for mask in masks if mask is not None]


def _read_phrases(place: Path) -> object:
    from pixart.evaluation.metrics.compbench import read_phrases

    return read_phrases(place)


PAIRS: dict[str, Pair] = {
    "detections": _of_lines("detections", DETECTIONS, _read_detections),
    "phrases": _of_lines("phrases", PHRASES, _read_phrases),
    "questions": _of_lines("questions", QUESTIONS, _read_questions),
    "protocol": (_make_protocol, _read_protocol),
    "evaluation-prompts": (_make_prompt_lines, _read_prompt_lines),
    "evaluation-drawn": (_make_drawn, _read_drawn),
    **{f"set-{name}": _of_set(name) for name in SAMPLES},
}
