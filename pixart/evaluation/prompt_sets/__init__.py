"""The prompt sets that are known: SETS, by name. Their files are the user's; nothing is downloaded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pixart.evaluation.prompt_sets.captions import read_coco, read_mjhq
from pixart.evaluation.prompt_sets.lists import (
    COMPBENCH,
    HPS_STYLES,
    read_compbench,
    read_drawbench,
    read_hps,
    read_imagereward,
    read_parti,
)
from pixart.evaluation.prompt_sets.questions import (
    read_dpg,
    read_geneval,
    read_geneval2,
    read_tifa,
)
from pixart.evaluation.prompt_sets.reading import Read


@dataclass(frozen=True)
class PromptSet:
    """title: what it is. files: names that are looked for in a folder, all of them. source: where they are
    published. count: prompts that are published, None where nobody says; counts: by category. read:
    from paths and a seed. reference: what folder of real pictures goes with it. trap: what a file of
    another count usually is."""

    title: str
    files: tuple[str, ...]
    source: str
    read: Callable[[list[Path], int], Read]
    count: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    reference: str = ""
    trap: str = ""


_COMPBENCH = {name.replace("_", "-"): 300 for name in COMPBENCH}
_GENEVAL = {
    "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100,
    "color_attr": 100,
}  # fmt: skip

SETS: dict[str, PromptSet] = {
    "coco": PromptSet(
        "COCO 2014 validation: a caption of each picture",
        ("captions_val2014.json",),
        "https://cocodataset.org, 2014 Train/Val annotations",
        read_coco,
        40_504,
        reference="val2014/, its pictures",
    ),
    "mjhq": PromptSet(
        "MJHQ-30K: pictures of Midjourney in ten categories",
        ("meta_data.json",),
        "https://huggingface.co/datasets/playgroundai/MJHQ-30K",
        read_mjhq,
        30_000,
        reference="mjhq30k_imgs/, unpacked",
    ),
    "parti": PromptSet(
        "PartiPrompts: twelve categories",
        ("PartiPrompts.tsv",),
        "https://github.com/google-research/parti",
        read_parti,
        1_632,
    ),
    "geneval": PromptSet(
        "GenEval: objects, counts, colours, places",
        ("evaluation_metadata.jsonl",),
        "https://github.com/djghosh13/geneval, prompts/",
        read_geneval,
        553,
        _GENEVAL,
    ),
    "geneval2": PromptSet(
        "GenEval 2: prompts of 3 to 10 atoms, with questions",
        ("geneval2_data.jsonl",),
        "https://github.com/facebookresearch/GenEval2",
        read_geneval2,
        800,
    ),
    "t2i-compbench": PromptSet(
        "T2I-CompBench: attributes, places, actions",
        tuple(f"{name}_val.txt" for name in COMPBENCH),
        "https://github.com/Karine-Huang/T2I-CompBench, examples/dataset/",
        read_compbench,
        1_800,
        _COMPBENCH,
        trap="published numbers are of the 300 of each CATEGORY_val.txt; all 1,000 of CATEGORY.txt "
        "score some 3 points off",
    ),
    "dpg": PromptSet(
        "DPG-Bench: long prompts, with questions that depend on others",
        ("dpg_bench.csv",),
        "https://github.com/TencentQQGYLab/ELLA, dpg_bench/",
        read_dpg,
        1_065,
    ),
    "tifa": PromptSet(
        "TIFA v1.0: prompts of four sets, with questions",
        ("tifa_v1.0_question_answers.json",),
        "https://github.com/Yushi-Hu/tifa, tifa_v1.0/",
        read_tifa,
        4_081,
    ),
    "hps": PromptSet(
        "HPSv2's benchmark: four styles",
        tuple(f"{style}.json" for style in HPS_STYLES),
        "https://huggingface.co/datasets/zhwang/HPDv2, benchmark/",
        read_hps,
        3_200,
        dict.fromkeys(HPS_STYLES, 800),
    ),
    "drawbench": PromptSet(
        "DrawBench: eleven categories",
        ("drawbench.csv",),
        "https://imagen.research.google, or https://huggingface.co/datasets/zhwang/HPDv2, benchmark/",
        read_drawbench,
        200,
    ),
    "imagereward": PromptSet(
        "ImageReward's benchmark: prompts of users",
        ("benchmark-prompts.json",),
        "https://github.com/THUDM/ImageReward, benchmark/",
        read_imagereward,
        100,
    ),
}
GENERATED = {"shapes": "the embedded world: five categories of captions; needs no file"}
OWN = {
    "lines": "your own .txt, a prompt a line",
    "jsonl": 'your own .jsonl, lines of {"id", "prompt", ...}',
}
NAMES = (*SETS, *GENERATED, *OWN)
