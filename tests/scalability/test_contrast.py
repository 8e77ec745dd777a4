"""MobileDiffusion beside PixArt-Σ: counted by formula, and nothing claimed that was not measured."""

import json
from dataclasses import astuple
from typing import Any

import pytest

from pixart.scalability import contrast as room
from pixart.scalability.contrast import Line, as_text, counted_lines, measured_lines
from pixart.scalability.parts import (
    CLIP_L,
    SDXL_VAE,
    T5_XXL,
    count_clip,
    count_decoder,
    count_t5,
)
from pixart.scaling import main


@pytest.fixture(scope="module")
def lines() -> dict[str, Line]:
    return {line.what: line for line in counted_lines()}


def test_t5_is_its_formula() -> None:
    """Embedding, 24 layers of four projections, a gated MLP and two norms, one table of 32 biases a head."""
    width, inner, hidden, tokens = 4096, 4096, 10240, 300
    layer = 4 * width * inner + 3 * width * hidden
    found = count_t5(T5_XXL, tokens)
    assert found.parameters == 32128 * width + 24 * (layer + 2 * width) + 32 * 64 + width
    assert found.parameters == pytest.approx(4.76e9, rel=1e-3)
    assert found.layers == 24 * tokens * layer
    assert found.attention == 24 * 2 * tokens**2 * inner


def test_clips_text_half_is_its_formula() -> None:
    width, tokens = 768, 77
    weights = 4 * width**2 + 2 * 4 * width**2
    biases = 4 * width + 4 * width + width
    found = count_clip(CLIP_L, tokens)
    norms = (2 * 12 + 1) * 2 * width
    assert found.parameters == (49408 + tokens) * width + 12 * (weights + biases) + norms
    assert found.layers == 12 * tokens * weights
    assert found.attention == 12 * 2 * tokens**2 * width


def test_the_decoder_is_the_published_one_and_grows_with_the_picture() -> None:
    small, large = (count_decoder(SDXL_VAE, size) for size in (64, 128))
    assert small.parameters == large.parameters == pytest.approx(49.5e6, rel=1e-3)
    assert 3.9 < large.layers / small.layers <= 4
    assert large.attention == 16 * small.attention > 0


def _sigma(side: int, ratio: int) -> float:
    """1e9 MACs of XL/2 on side × side tokens of an image and 300 of text, written out; the last 14 of 28
    blocks attend to keys merged ratio × ratio by a depthwise convolution."""
    width, tokens, text = 1152, side**2, 300
    keys = tokens // ratio**2
    layers = 28 * (14 * width**2 * tokens + 2 * width**2 * text)
    attention = 2 * tokens * width * (28 * text + 14 * tokens + 14 * keys)
    merging = 0 if ratio == 1 else 14 * 2 * keys * width * ratio**2
    captions = text * width * (4096 + width)
    ends = tokens * width * 4 * (4 + 8) + (256 + width) * width + 6 * width**2
    return (layers + attention + merging + captions + ends) / 1e9


@pytest.mark.parametrize("size", [256, 512, 1024, 2048, 4096])
def test_a_pass_of_sigma_costs_what_its_formula_says(lines: dict[str, Line], size: int) -> None:
    cell = lines[f"GMACs a pass, {room.SIZES[size]}"].here
    assert cell.startswith(f"{_sigma(size // 16, 1):,.0f} (layers ")
    if size >= 1024:
        assert cell.endswith(f"; compressed {_sigma(size // 16, 2):,.0f}")


def test_the_text_encoder_in_fewer_bits_keeps_its_vectors_in_sixteen(
    lines: dict[str, Line],
) -> None:
    linear, rest = (
        24 * (4 * 4096**2 + 3 * 4096 * 10240),
        32128 * 4096 + 24 * 2 * 4096 + 32 * 64 + 4096,
    )
    said = [f"{(linear * bits / 8 + 2 * rest) / 1e6:,.0f}" for bits in (16, 8, 4)]
    assert "T5-XXL {} MB in bf16, {} in 8 bits, {} in 4;".format(*said) in (
        lines["text encoder's weights"].here
    )


def test_no_cell_is_empty_and_none_claims_what_nobody_measured(lines: dict[str, Line]) -> None:
    for line in (*lines.values(), *measured_lines(None)):
        assert all(astuple(line)), line
    assert {line.embedded for line in measured_lines(None)[:3]} == {room.NEEDS_MEASURE}
    assert all("needs weights" in line.here for line in measured_lines(None))


def test_it_says_that_this_is_no_phone_and_that_the_scores_are_of_different_sets() -> None:
    text = " ".join(" ".join(as_text(measured_lines(None))).split())
    assert "Not a phone" in text and "not comparable" in text and "2311.16567" in text


FOUND: dict[str, Any] = {
    "size": [256, 256],
    "steps": 20,
    "guidance": 2.0,
    "pictures": 3,
    "seconds": {"text": 0.004, "denoise": 1.5, "decode": 0.25},
    "peak_bytes": 100 * 2**20,
}


def test_what_was_measured_stands_in_its_cells_and_names_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "ask", lambda worker, question: FOUND)
    monkeypatch.setattr(room, "counted_lines", list)
    assert main(["contrast", "--measure", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    cells = {row["what"]: row["embedded"] for row in values["rows"]}
    assert cells["time of a picture"].startswith("1.75 s, 256 x 256 px, 20 steps, guidance 2")
    assert cells["time of a prompt's text"] == "4 ms"
    assert cells["memory at the peak"] == "100 MiB"
    assert values["measured"]["machine"]["name"] and values["measured"]["model"] == "shapes"


def test_a_process_that_was_killed_leaves_its_cells_with_the_reason() -> None:
    lines = measured_lines({"left_out": "its process was killed by signal 9: out of memory?"})
    assert lines[0].embedded == "not measured: its process was killed by signal 9: out of memory?"


@pytest.mark.slow
def test_the_embedded_model_is_measured_in_a_process_of_its_own() -> None:
    found = room.ask(room.WORKER, {"model": "shapes"})
    assert found["size"] == [128, 128] and found["seconds"]["denoise"] > 0
    assert found["peak_bytes"] is None or 20 < found["peak_bytes"] / 2**20 < 5000
