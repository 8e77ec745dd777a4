"""The CLIP of the embedded world that comes with the library: it opens as any other, and its card is true."""

import json
from pathlib import Path

import torch
from PIL import Image

from pixart.evaluation.in_memory import Pictures, measure, scores_of
from pixart.evaluation.metric import Context, PictureMetric
from pixart.evaluation.needs import SHIPPED, find_snapshot
from pixart.evaluation.networks import open_extractor
from pixart.evaluation.networks.clip import ClipImages
from pixart.evaluation.report.trust_page import tables
from pixart.evaluation.running import opening as opening
from pixart.evaluation.store.entries import Entry, Prompt
from pixart.evaluation.trust.against_checker import SHIPPED as MEASURED
from pixart.evaluation.trust.wrong_facts import pairs
from pixart.files import read_json
from pixart.training.recipe import load_recipe
from pixart.training.tasks.shapes_clip import build_clip, vocabulary

FOLDER = Path(__file__).parent.parent.parent / "pixart" / "assets" / "shapes-clip"


def test_it_is_found_by_its_name_and_needs_nothing() -> None:
    context = Context(torch.device("cpu"))
    assert SHIPPED == ("shapes-clip",) and find_snapshot("shapes-clip", context) == FOLDER
    extractor = open_extractor("shapes-clip", context)
    assert isinstance(extractor, ClipImages)
    assert not extractor.needs() and extractor.name == "shapes-clip" and extractor.width == 80
    for metric in opening.open_metrics(list(MEASURED), opening.Given("cpu")):
        assert not metric.needs()
        said = json.dumps(dict(metric.constants))
        assert "shapes-clip" in said and str(FOLDER.parent) not in said


def test_its_end_of_text_is_the_tokenizers_and_not_2() -> None:
    text = read_json(FOLDER / "config.json")["text_config"]
    assert text["eos_token_id"] == vocabulary()[0]["<|endoftext|>"] == text["vocab_size"] - 1
    (stage,) = load_recipe("shapes-clip")
    with torch.device("meta"):
        count = sum(one.numel() for one in build_clip(stage.size).parameters())
    weights = (FOLDER / "model.safetensors").stat().st_size
    assert 4 * count < weights < 4 * count + 20_000 < 2_000_000
    assert f"{count:,} parameters" in (FOLDER / "README.md").read_text()


def test_a_true_caption_scores_above_one_with_another_colour_or_background() -> None:
    (metric,) = opening.open_metrics([MEASURED[0]], opening.Given("cpu"))
    assert isinstance(metric, PictureMetric)
    right = 0
    for kind in ("background", "colour"):
        made = pairs(kind, 8, seed=1)  # not those of the card
        images = [Image.fromarray(pair.picture) for pair in made]
        texts = [[pair.caption for pair in made], [pair.other_caption for pair in made]]
        true, false = (
            scores_of(metric, Pictures([entry(k, text) for k, text in enumerate(some)], images))
            for some in texts
        )
        right += sum(a.value > b.value for a, b in zip(true, false, strict=True))
        value = measure(metric, Pictures([entry(k, t) for k, t in enumerate(texts[0])], images))
        assert value["clip"].low < value["clip"].value < value["clip"].high
    assert right >= 15  # of 16


def entry(number: int, text: str) -> Entry:
    return Entry(Prompt(f"{number:05d}", text), 0, Path("none.png"))


def test_the_card_has_the_tables_that_the_command_wrote() -> None:
    results = read_json(FOLDER / "trust.json")
    assert results["metrics"]["clip"]["constants"]["model"] == "shapes-clip"
    (metric,) = opening.open_metrics([MEASURED[0]], opening.Given("cpu"))
    # Of these weights: others have another digest.
    assert results["metrics"]["clip"]["constants"] == json.loads(json.dumps(metric.constants))
    card = (FOLDER / "README.md").read_text()
    assert tables(results) in card
    for block in results["metrics"].values():
        assert block["sentence"] in card.replace("\\", "")  # Markdown's brackets are escaped
