"""Curves and previews are written aside: what fails leaves the picture that was there."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from pixart.pipeline.decoding import NotFinitePicture
from pixart.training.plot import plot
from pixart.training.previews import draw_pictures
from pixart.training.stage import Stage, Validation


def test_curves_take_the_place_of_older_ones_when_they_are_whole(
    tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), ("", b"\x89PNG")):
        plot([tmp_path / "run"], tmp_path / f"loss{suffix}")
        assert (tmp_path / f"loss{suffix}").read_bytes().startswith(start)

    def full(figure: Any, place: Path, **_: Any) -> None:
        Path(place).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        plot([tmp_path / "run"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 4


def test_a_preview_takes_the_place_of_an_older_one_when_it_is_whole(
    tmp_path: Path, monkeypatch: Any
) -> None:
    stage = Stage("a", validation=Validation(every=1, prompts=("a cat",))).resolved(resolution=16)
    pipe: Any = SimpleNamespace(
        draw_many=lambda requests, pictures: [SimpleNamespace(image=Image.new("RGB", (16, 16)))]
    )
    draw_pictures(pipe, stage, tmp_path)
    before = (tmp_path / "00.png").read_bytes()

    def full(image: Any, place: Path, **_: Any) -> None:
        Path(place).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        draw_pictures(pipe, stage, tmp_path)
    assert (tmp_path / "00.png").read_bytes() == before and before.startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["00.png"]


def test_a_preview_of_nan_is_a_warning_and_no_end_of_training(tmp_path: Path, caplog: Any) -> None:
    def draw(requests: Any, pictures: Any) -> Iterator[Any]:
        yield SimpleNamespace(image=Image.new("RGB", (16, 16)))
        raise NotFinitePicture("latents must be finite")

    validation = Validation(every=1, prompts=("a cat", "a dog"))
    stage = Stage("a", validation=validation).resolved(resolution=16)
    draw_pictures(SimpleNamespace(draw_many=draw), stage, tmp_path)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["00.png"]
    assert caplog.messages == ["stage a: latents must be finite"]
