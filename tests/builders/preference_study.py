"""Studies of the shapes world: models that draw what a prompt says, or something else."""

import random
from pathlib import Path

from PIL import Image

from pixart.evaluation.preference.build import build
from pixart.evaluation.preference.options import Build
from pixart.evaluation.preference.study import Key, Study, read_key, read_study
from pixart.shapes.caption import describe
from pixart.shapes.scene import draw, sample_scene

SIDE = 64


def write_pictures(folder: Path, count: int, wrong: dict[str, float], kind: str = "one") -> Path:
    """count prompts, and a folder of pictures for each model. wrong: name -> the share of its pictures that
    show another scene. Returns the file of the prompts."""
    rng = random.Random(0)
    lines = []
    for number in range(count):
        scene = sample_scene(rng, kind)
        lines.append(describe(scene, rng, omit=0.0, apart=0.0))
        for model, share in wrong.items():
            shown = sample_scene(rng, "pair") if rng.random() < share else scene
            place = folder / model / f"{number:05d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(shown, SIDE)).save(place)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return prompts


def build_study(
    folder: Path,
    count: int = 6,
    models: tuple[str, ...] = ("ours", "theirs"),
    used: int | None = None,
    **settings: object,
) -> tuple[Study, Key]:
    """A study in folder/study, of `used` of count prompts. All pictures are right but for the last
    model's, which are wrong."""
    wrong = {name: float(name == models[-1]) for name in models}
    prompts = write_pictures(folder, count, wrong)
    pictures = tuple(str(folder / name) for name in models)
    build(Build(pictures, prompts, folder / "study", **{"seed": 3, "count": used, **settings}))  # type: ignore[arg-type]
    study = read_study(folder / "study")
    return study, read_key(study)
