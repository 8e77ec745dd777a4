"""The model that ships: it is small, whole, in the published layout, and draws what the card says."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart.config import EMBEDDED
from pixart.evaluation.caption_accuracy import Accuracy, Task, measure, read_report, table
from pixart.generate import main
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.shapes.caption import describe, parse
from pixart.shapes.checker import check
from pixart.shapes.scene import draw, sample_scene
from pixart.vae.autoencoder import to_images

MODEL = Path(__file__).parent.parent.parent / "pixart" / "assets" / EMBEDDED
MEGABYTES = 16


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(cache_dir=None, device="cpu")


def _card_results() -> list[Accuracy]:
    return read_report(MODEL / "accuracy.json")[1]


def test_the_embedded_model_stays_small() -> None:
    size = sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file())
    assert size <= MEGABYTES * 10**6


def test_the_embedded_model_has_the_published_layout() -> None:
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtSigmaPipeline"
    folders = {name for name in index if not name.startswith("_")}
    assert folders == {"scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    assert all((MODEL / name).is_dir() for name in folders)


def test_the_embedded_transformer_is_compressed_in_its_deeper_half(pipe: Pipeline) -> None:
    compression = pipe.transformer.config.kv_compression
    assert compression is not None
    assert compression.layers == (3, 4, 5) and compression.ratio == 2


def test_the_card_prints_the_committed_results() -> None:
    assert table(_card_results()) in (MODEL / "README.md").read_text()


def test_drawn_scenes_survive_the_vae(pipe: Pipeline) -> None:
    rng = random.Random(0)
    right = total = 0
    for kind in ("one", "pair", "group") * 6:
        scene = sample_scene(rng, kind)
        picture = torch.from_numpy(draw(scene, 256).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        decoded = to_images(pipe.vae.decode(pipe.vae.encode(picture, sample=False)))[0]
        holds = check(np.asarray(decoded), parse(describe(scene, rng, omit=0.0)))
        right += all(holds)
        total += 1
    assert right >= total - 1


def test_the_embedded_model_draws_as_well_as_its_card_says(pipe: Pipeline) -> None:
    stated = next(r for r in _card_results() if r.task.kind == "one" and not r.task.held_out)
    count = 24
    task = Task("one", stated.task.size, count=count)
    seen = measure(pipe, task, Request("", seed=1_000_000))
    # Three standard deviations of a share among so few: chance cannot fail it, broken weights do.
    margin = 3 * (stated.share * (1 - stated.share) / count) ** 0.5 + 1 / count
    assert seen.share >= stated.share - margin
    assert seen.by_kind["background"][0] == count


def test_the_command_line_draws_with_the_embedded_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.png"
    code = main(
        ["a red circle on a unicorn", "--steps", "2", "--no-cache", "--output", str(target)]
    )
    assert code == 0 and target.is_file()
    assert "does not know: unicorn" in capsys.readouterr().err
