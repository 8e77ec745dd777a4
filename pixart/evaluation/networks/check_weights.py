"""Weights that the user has, against what was published of them: digests, shapes, and numbers for known
pictures. What this project maps by name was never run with the published weights until this passes.

The pictures are the user's too: ImageReward's `assets/images/1.webp` to `4.webp`, and `CLIP.png` of
openai/CLIP, in the folder of the weights or in `images` below it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pixart.evaluation.metric import Context, Extractor
from pixart.evaluation.metrics.aesthetic import WEIGHTS as AESTHETIC
from pixart.evaluation.metrics.aesthetic import head_in
from pixart.evaluation.metrics.image_reward import ImageReward
from pixart.evaluation.metrics.pickscore import PickScore
from pixart.evaluation.needs import Need, check_digest, find_file
from pixart.evaluation.networks.clip import ClipImages, extractor_of, normalised_rows
from pixart.evaluation.networks.dinov2 import Dinov2
from pixart.evaluation.networks.hps import WEIGHTS as HPS
from pixart.evaluation.networks.hps import HpsImages
from pixart.evaluation.networks.inception import WEIGHTS as INCEPTION
from pixart.evaluation.networks.inception import Inception
from pixart.evaluation.networks.weighing import read_state
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.files import CheckpointError
from pixart.pictures import PictureError, open_picture

if TYPE_CHECKING:
    from PIL.Image import Image

PASS, FAIL, UNCHECKED = "pass", "fail", "not checked"
# README of THUDM/ImageReward at c1392c6.
REWARD_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
REWARDS = {
    "1.webp": 0.5811622738838196,
    "2.webp": 0.2745276093482971,
    "3.webp": -1.4131819009780884,
    "4.webp": -2.029569625854492,
}
REWARD_ERROR = 0.01  # "may be slightly different depending on the compute device"
# README of openai/CLIP at 10f92d3: the probabilities of three texts, in half precision on a GPU.
DIAGRAM_MODEL, DIAGRAM = "openai/clip-vit-base-patch32", "CLIP.png"
DIAGRAM_PROBABILITIES = {"a diagram": 0.9927937, "a dog": 0.00421068, "a cat": 0.00299572}
DIAGRAM_ERROR = 0.002  # logits of fp16 near 25 are rounded to 1/64, and to as much before
CLASSES = (1008, 2048)  # of Inception's own classifier, which the file has beside


@dataclass(frozen=True)
class Row:
    """What was compared, the verdict (PASS, FAIL or UNCHECKED), and the numbers, or why there are none."""

    what: str
    verdict: str
    said: str


def check_weights(folder: Path, context: Context) -> list[Row]:
    """A row for each thing that is published. folder: of weights, hub snapshots and the pictures. Missing
    ones, and what is published without a number, are UNCHECKED; a file that cannot be used is a FAIL."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder of weights, it is none")
    given = replace(context, weights=folder)
    checks: list[tuple[str, Callable[[], Row]]] = [
        ("Inception: SHA-256", lambda: _inception_digest(given)),
        ("Inception: shapes", lambda: _inception_shapes(given)),
        ("CLIP ViT-B/32: CLIP.png", lambda: _diagram(folder, given)),
        ("ImageReward: four pictures", lambda: _rewards(folder, given)),
        *((f"{name}: shapes", _opener(HpsImages(f"{name}-pictures", given))) for name in HPS),
        ("PickScore: shapes", _opener(_pictures_of_pickscore(given))),
        ("DINOv2 ViT-L/14: shapes", _opener(Dinov2("dinov2", given))),
        *((f"{name}: shapes", _header(name, given)) for name in AESTHETIC),
    ]
    return [_judged(what, check) for what, check in checks]


def as_text(rows: Sequence[Row]) -> str:
    """A line for each row."""
    longest = max(len(row.what) for row in rows)
    return "\n".join(f"{row.verdict:<11}  {row.what:<{longest}}  {row.said}" for row in rows)


def _judged(what: str, check: Callable[[], Row]) -> Row:
    try:
        return replace(check(), what=what)
    except (CheckpointError, PictureError) as error:
        return Row(what, FAIL, str(error))


def _unchecked(because: str) -> Row:
    return Row("", UNCHECKED, because)


def _missing(needs: Sequence[Need]) -> Row:
    return _unchecked(f"because {' and '.join(need.name for need in needs)} is not here")


def _compared(ours: dict[str, float], published: dict[str, float], error: float) -> Row:
    pairs = [f"{name} {ours[name]:.4f} (published {published[name]:.4f})" for name in published]
    worst = max(abs(ours[name] - published[name]) for name in published)
    verdict = PASS if worst <= error else FAIL
    return Row("", verdict, f"{', '.join(pairs)}; at most {worst:.4f} apart, {error} are allowed")


def _inception_digest(context: Context) -> Row:
    path = find_file(INCEPTION, context)
    if path is None:
        return _missing([INCEPTION])
    if path.suffix == ".safetensors":
        return _unchecked(f"because {path.name} is another format than the file that was published")
    check_digest(path, str(INCEPTION.sha256))
    return Row("", PASS, f"{path.name} begins with {INCEPTION.sha256}")


def _inception_shapes(context: Context) -> Row:
    path = find_file(INCEPTION, context)
    if path is None:
        return _missing([INCEPTION])
    state = read_state(path)
    Inception("inception-clean", context).fitted(state, path)
    head = tuple(state["fc.weight"].shape) if "fc.weight" in state else None
    if head not in (None, CLASSES):
        return Row("", FAIL, f"fc.weight must be {CLASSES}, got {head}")
    return Row("", PASS, f"{len(state)} tensors fit; no feature of a picture is published")


def _diagram(folder: Path, context: Context) -> Row:
    extractor = extractor_of(DIAGRAM_MODEL, context)
    if needs := extractor.needs():
        return _missing(needs)
    image = _picture(folder, DIAGRAM)
    if image is None:
        return _unchecked(f"because {DIAGRAM} (of github.com/openai/CLIP) is not here")
    network = extractor.opened()
    texts = list(DIAGRAM_PROBABILITIES)
    picture = extractor([extractor.prepare(image, _entry(DIAGRAM, ""))])
    cosines = normalised_rows(picture, "pictures") @ network.texts(texts).features.T
    logits = network.scale * cosines[0].astype(np.float64)
    shares = np.exp(logits - logits.max())
    ours = dict(zip(texts, (shares / shares.sum()).tolist(), strict=True))
    extractor.release()
    return _compared(ours, DIAGRAM_PROBABILITIES, DIAGRAM_ERROR)


def _rewards(folder: Path, context: Context) -> Row:
    metric = ImageReward("image-reward", context)
    if needs := metric.needs():
        return _missing(needs)
    images = {name: _picture(folder, name) for name in REWARDS}
    there = {name: image for name, image in images.items() if image is not None}
    if len(there) < len(REWARDS):
        gone = ", ".join(name for name in REWARDS if name not in there)
        return _unchecked(
            f"because {gone} (assets/images of github.com/THUDM/ImageReward) is not here"
        )
    entries = [_entry(name, REWARD_PROMPT) for name in REWARDS]
    scores = metric.score(entries, [there[name] for name in REWARDS], None)
    metric.release()
    ours = {name: one.value for name, one in zip(REWARDS, scores, strict=True)}
    return _compared(ours, REWARDS, REWARD_ERROR)


def _pictures_of_pickscore(context: Context) -> ClipImages:
    extractor = PickScore("pickscore", context).extractor
    assert isinstance(extractor, ClipImages)
    return extractor


def _opener(extractor: Extractor) -> Callable[[], Row]:
    def check() -> Row:
        if needs := extractor.needs():
            return _missing(needs)
        from PIL import Image

        grey = Image.new("RGB", (64, 64), (128, 128, 128))
        features = extractor([extractor.prepare(grey, _entry("grey", ""))])
        extractor.release()
        said = f"opens, {features.shape[1]} features; no number of a picture is published"
        return Row("", PASS, said)

    return check


def _header(name: str, context: Context) -> Callable[[], Row]:
    def check() -> Row:
        path = find_file(AESTHETIC[name], context)
        if path is None:
            return _missing([AESTHETIC[name]])
        layers = len(head_in(name, path))
        return Row("", PASS, f"{layers} layers open; no number of a picture is published")

    return check


def _entry(name: str, prompt: str) -> Entry:
    return Entry(Prompt(Path(name).stem, prompt), 0, Path(name))


def _picture(folder: Path, name: str) -> "Image | None":
    """As it is stored, as the references take it: what is transparent keeps the colour it hides."""
    found = (place / name for place in (folder, folder / "images", folder / "assets" / "images"))
    path = next((path for path in found if path.is_file()), None)
    return None if path is None else open_picture(path, str(path))
