"""Sets that are lists of prompts, in whatever form: Parti, HPSv2, DrawBench, ImageReward, T2I-CompBench."""

from pathlib import Path

from pixart.evaluation.prompt_sets.reading import (
    Read,
    as_object,
    prompt_of,
    read_json_list,
    table_rows,
    text_lines,
    text_of,
)
from pixart.evaluation.store.entries import Prompt

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
COMPBENCH = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
# What of a complex prompt is judged: its statements of place, of actions, or both.
COMPLEX = ("spatial", "action", "spatialaction")


def read_parti(paths: list[Path], seed: int) -> Read:
    """PartiPrompts.tsv: Prompt, Category, Challenge, Note, with nothing quoted."""
    (path,) = paths
    prompts: list[Prompt] = []
    for place, row in table_rows(path, ("Prompt", "Category", "Challenge"), "\t", quoted=False):
        prompts.append(
            Prompt(
                f"{len(prompts):05d}",
                prompt_of(row["Prompt"], place),
                category=row["Category"],
                meta={"challenge": row["Challenge"]},
            )
        )
    return Read(prompts)


def read_hps(paths: list[Path], seed: int) -> Read:
    """A JSON list of prompts for each style, by the names of the files."""
    prompts: list[Prompt] = []
    for path in paths:
        for number, text in enumerate(read_json_list(path)):
            words = prompt_of(text, f"{path}, prompt {number}")
            prompts.append(Prompt(f"{path.stem}-{number:05d}", words, category=path.stem))
    return Read(prompts)


def read_drawbench(paths: list[Path], seed: int) -> Read:
    """A CSV of Prompts and Category, or HPSv2's JSON list, which has no categories."""
    (path,) = paths
    if path.suffix.lower() == ".json":
        texts = [(text, "") for text in read_json_list(path)]
    else:
        rows = table_rows(path, ("Prompts", "Category"))
        texts = [(row["Prompts"], row["Category"].strip()) for _, row in rows]
    return Read(
        [
            Prompt(f"{number:05d}", prompt_of(text, f"{path}, prompt {number}"), category=category)
            for number, (text, category) in enumerate(texts)
        ]
    )


def read_imagereward(paths: list[Path], seed: int) -> Read:
    """benchmark-prompts.json: a list of {"id", "prompt"}."""
    (path,) = paths
    prompts: list[Prompt] = []
    for number, values in enumerate(read_json_list(path)):
        place = f"{path}, prompt {number}"
        one = as_object(values, place)
        text = prompt_of(text_of(one, "prompt", place), place)
        prompts.append(Prompt(text_of(one, "id", place), text))
    return Read(prompts)


def read_compbench(paths: list[Path], seed: int) -> Read:
    """CATEGORY_val.txt, a prompt a line. Of complex prompts, `meta["complex"]` says which file of their
    folder has them: they are scored by what they state."""
    prompts: list[Prompt] = []
    notes: list[str] = []
    for path in paths:
        name = path.stem.removesuffix("_val")
        if name not in COMPBENCH:
            names = ", ".join(f"{one}_val.txt" for one in COMPBENCH)
            raise ValueError(f"{path}: must be one of {names}")
        category = name.replace("_", "-")
        kinds = _complex_kinds(path) if name == "complex" else {}
        for number, line in enumerate(text_lines(path)):
            text = prompt_of(line, f"{path}, prompt {number}")
            meta = {"complex": kinds[text]} if text in kinds else {}
            prompts.append(Prompt(f"{category}-{number:05d}", text, category=category, meta=meta))
        if name == "complex" and (lost := _without_kind(prompts)):
            notes.append(
                f"{path}: {lost} prompts stand in none of complex_val_KIND.txt beside it "
                f"({', '.join(COMPLEX)}); scored by all that they may state"
            )
    return Read(prompts, notes)


def _complex_kinds(path: Path) -> dict[str, str]:
    files = {kind: path.with_name(f"complex_val_{kind}.txt") for kind in COMPLEX}
    return {
        prompt_of(line, str(file)): kind
        for kind, file in files.items()
        if file.is_file()
        for line in text_lines(file)
    }


def _without_kind(prompts: list[Prompt]) -> int:
    return sum(one.category == "complex" and not one.meta for one in prompts)
