"""Pictures that steer a control: beside a source's pictures, or made of them."""

import json
import tarfile
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pictures
import pytest
import torch
from pictures import write
from PIL import Image, ImageOps
from safetensors.torch import save_file
from test_official import MULTI, info, layout, save_caption, save_latents
from test_prepare import SETTINGS, FakeVAE, encoders, reasons
from tiny_preprocessors import hed_tensors

from pixart import data
from pixart.dataset.batches import FeatureDataset
from pixart.dataset.controls import Controls, open_controls, with_controls
from pixart.dataset.encoding import Encoders
from pixart.dataset.images import as_image, as_pixels, cover, decode
from pixart.dataset.options import Prepare
from pixart.dataset.prepare import Preparation
from pixart.dataset.sources import open_source
from pixart.dataset.verify import settings_of
from pixart.preprocess import Preprocessor

INVERT = Controls(Preprocessor("invert", "invert 1", ImageOps.invert))


def run(
    source: Path, output: Path, control: str | Controls | None, with_: Encoders | None = None
) -> dict[str, Any]:
    """control: of `--control`, or what makes pictures."""
    controls = open_controls(control) if isinstance(control, str) else control
    asked = control if isinstance(control, str) else None
    preparation = Preparation(output, with_ or encoders(), SETTINGS, 2, controls)
    return preparation.run(
        lambda: (
            with_controls(open_source(source), asked)
            if controls is None or controls.preprocessor is None
            else open_source(source)
        )
    )


@pytest.fixture
def steered(tmp_path: Path) -> tuple[Path, Path]:
    """Three pictures in folders, and a picture of each name in another folder."""
    source = pictures.folder(tmp_path / "source" / "sub", 3, height=60, width=100).parent
    for number in range(3):
        content = pictures.png(60, 100, seed=10 + number)
        write(tmp_path / "edges" / "sub" / f"{number}.png", content)
    return source, tmp_path / "edges"


def test_pictures_of_a_folder_are_encoded_beside_those_that_they_steer(
    steered: tuple[Path, Path], tmp_path: Path
) -> None:
    source, edges = steered
    assert run(source, tmp_path / "out", str(edges))["prepared"] == 3
    found = FeatureDataset(tmp_path / "out")
    assert found.control == "pictures"
    found.check_controls()
    batch = found.batch([0, 2], Random(0), control=True)
    for place, number in enumerate((0, 2)):
        image = decode((edges / "sub" / f"{number}.png").read_bytes())
        # Scaled and cropped as the picture is, which has its size.
        mean, std = FakeVAE().posterior(cover(image, found.buckets[0], 64)[None])
        assert batch.control_mean is not None and batch.control_std is not None
        assert torch.equal(batch.control_mean[place], mean[0])
        assert torch.equal(batch.control_std[place], std[0])
    assert not torch.equal(batch.control_mean, batch.mean)
    assert batch.to("cpu").control_mean is not None
    # Nothing is read of them unless they are asked for.
    assert found.batch([0], Random(0)).control_mean is None


def test_samples_without_a_fitting_picture_are_rejected(
    steered: tuple[Path, Path], tmp_path: Path
) -> None:
    source, edges = steered
    (edges / "sub" / "0.png").unlink()
    write(edges / "sub" / "1.png", pictures.png(60, 99))
    write(edges / "sub" / "2.png", pictures.corrupt_png())
    report = run(source, tmp_path / "out", str(edges))
    found = reasons(report)
    assert report["prepared"] == 0
    assert found["0.png"] == f"missing file: no control picture {edges / 'sub' / '0.png'}"
    assert found["1.png"] == (
        f"control picture {edges / 'sub' / '1.png'}: must be of 100x60 as its picture, got 99x60"
    )
    assert found["2.png"].startswith(f"control picture {edges / 'sub' / '2.png'}: unreadable image")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(written["rejected"]) == 3


def test_a_picture_in_another_format_steers_too(steered: tuple[Path, Path], tmp_path: Path) -> None:
    source, edges = steered
    png = edges / "sub" / "0.png"
    jpeg = pictures.encoded(decode(png.read_bytes()), "JPEG")
    png.unlink()
    write(edges / "sub" / "0.jpg", jpeg)
    assert run(source, tmp_path / "out", str(edges))["prepared"] == 3


def test_a_picture_outside_of_its_source_finds_none(tmp_path: Path) -> None:
    pictures.folder(tmp_path, 1)
    for path in ("../0.png", str(tmp_path / "0.png")):
        index = write(tmp_path / "source" / "index.json", [{"path": path, "prompt": "text"}])
        found = reasons(run(index, tmp_path / "out", str(tmp_path)))["0.png"]
        assert found.startswith("must lie within its source to have a control picture")


def test_pictures_are_made_at_the_size_that_is_trained(
    steered: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = steered
    assert run(source, tmp_path / "out", INVERT)["prepared"] == 3
    found = FeatureDataset(tmp_path / "out")
    assert found.control == "invert 1"
    batch = found.batch([1], Random(0), control=True)
    image = as_image(cover(decode((source / "sub" / "1.png").read_bytes()), found.buckets[0], 64))
    assert image.size == (found.buckets[0][1], found.buckets[0][0])
    mean, _ = FakeVAE().posterior(as_pixels(ImageOps.invert(image))[None])
    assert batch.control_mean is not None and torch.equal(batch.control_mean, mean)


def test_what_cannot_be_made_is_rejected(steered: tuple[Path, Path], tmp_path: Path) -> None:
    def refuse(image: Image.Image) -> Image.Image:
        raise ValueError("image must have 512 pixels a side")

    source, _ = steered
    report = run(source, tmp_path / "out", Controls(Preprocessor("no", "no", refuse)))
    assert report["prepared"] == 0
    assert reasons(report)["0.png"] == (
        "no control picture can be made of it: image must have 512 pixels a side"
    )


def test_a_run_that_is_repeated_encodes_what_is_new(
    steered: tuple[Path, Path], tmp_path: Path
) -> None:
    source, edges = steered
    out, with_ = tmp_path / "out", encoders()
    run(source, out, None, with_)
    assert with_.vae.encoded == 3
    with pytest.raises(
        ValueError, match=r"out must have a control picture of every sample; prepare"
    ):
        FeatureDataset(out).check_controls()
    with pytest.raises(ValueError, match="prepare it with --control"):
        FeatureDataset(out).batch([0], Random(0), control=True)
    run(source, out, str(edges), with_)
    assert with_.vae.encoded == 6  # the pictures themselves are there
    run(source, out, str(edges), with_)
    assert with_.vae.encoded == 6
    write(edges / "sub" / "1.png", pictures.png(60, 100, seed=77))
    run(source, out, str(edges), with_)
    assert with_.vae.encoded == 7
    run(source, out, INVERT, with_)
    assert with_.vae.encoded == 10
    run(source, out, None, with_)
    assert with_.vae.encoded == 10 and FeatureDataset(out).control is None


def test_shards_bring_pictures_that_steer(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "source", 3)
    for number in range(2):
        write(source / f"{number}.control.png", pictures.png(seed=10 + number))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for file in sorted(source.iterdir()):
            tar.add(file, file.name)
    report = run(tmp_path / "s.tar", tmp_path / "out", "members")
    assert report["prepared"] == 2
    (line,) = report["rejected"]
    assert line["path"].endswith("s.tar#2")
    assert line["reason"] == "missing file: no member .control.png beside it in tar shards"
    batch = FeatureDataset(tmp_path / "out").batch([1], Random(0), control=True)
    expected = cover(decode(pictures.png(seed=11)), FeatureDataset(tmp_path / "out").buckets[1], 64)
    assert batch.control_mean is not None
    assert torch.equal(batch.control_mean, FakeVAE().posterior(expected[None])[0])
    # They are no pictures of their own, and of no concern otherwise; a folder may have them instead.
    assert run(tmp_path / "s.tar", tmp_path / "plain", None)["prepared"] == 3
    write(tmp_path / "edges" / "2.png", pictures.png(seed=12))
    report = run(tmp_path / "s.tar", tmp_path / "both", str(tmp_path / "edges"))
    assert report["prepared"] == 1
    assert run(source, tmp_path / "folder", "members")["prepared"] == 0


def command(source: Path, out: Path, *options: str) -> int:
    return data.main(
        ["prepare", str(source), str(out), "--resolution", "64", "--device", "cpu", *options]
    )


def test_damaged_pictures_that_steer_are_made_again(
    steered: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, edges = steered
    out = tmp_path / "out"
    assert command(source, out, "--control", str(edges)) == 0
    before = FeatureDataset(out).batch([0, 1, 2], Random(0), control=True)
    (shard,) = (out / "features").iterdir()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert data.main(["verify", str(out), "--json", "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["remade"] == [shard.name] and not said["remaining"]
    after = FeatureDataset(out).batch([0, 1, 2], Random(0), control=True)
    assert before.control_mean is not None and after.control_mean is not None
    assert torch.equal(before.control_mean, after.control_mean)


@pytest.mark.skipif(find_spec("cv2") is None, reason="needs pip install opencv-python-headless")
def test_canny_by_name(steered: tuple[Path, Path], tmp_path: Path) -> None:
    assert command(steered[0], tmp_path / "out", "--control", "canny") == 0
    found = FeatureDataset(tmp_path / "out")
    assert found.control == "canny 100 200"
    mean = found.batch([0], Random(0), control=True).control_mean
    assert mean is not None and mean.isfinite().all()
    assert data.main(["verify", str(tmp_path / "out"), "--device", "cpu"]) == 0


def test_soft_edges_by_name_and_file(steered: tuple[Path, Path], tmp_path: Path) -> None:
    save_file(hed_tensors(), tmp_path / "hed.safetensors")
    weights = f"hed={tmp_path / 'hed.safetensors'}"
    options = ("--control", "hed", "--preprocessor-weights", weights)
    assert command(steered[0], tmp_path / "out", *options) == 0
    found = FeatureDataset(tmp_path / "out")
    assert found.control is not None and found.control.startswith("hed ")
    # What makes them is kept, so that verify can make them again.
    with settings_of(tmp_path / "out", 64, None) as kept:
        assert (kept.control, kept.preprocessor_weights) == ("hed", (weights,))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--control", "scribble"], "--control must be a folder, members or one of canny, hed, "),
        (["--control", "none"], "--control must be a folder, members or one of canny, hed, "),
        (["--preprocessor-weights", "hed=x.pth"], "got hed with none"),
        (["--control", "canny", "--preprocessor-weights", "hed=x"], "got hed with --control canny"),
        (["--control", "hed", "--preprocessor-weights", "x.pth"], "must be hed=PLACE, depth=PLACE"),
        (["--control", "hed", "--preprocessor-weights", "hed=/x.pth"], "/x.pth: no such file"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    steered: tuple[Path, Path],
    tmp_path: Path,
    options: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(steered[0], tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_index_is_refused(steered: tuple[Path, Path], tmp_path: Path) -> None:
    source, edges = steered
    run(source, tmp_path / "out", str(edges))
    file = tmp_path / "out" / "index-64.json"
    index = json.loads(file.read_text())
    place = index["samples"][0].pop("control")
    write(file, index)
    with pytest.raises(ValueError, match="a control where all have"):
        FeatureDataset(tmp_path / "out")
    index["samples"][0]["control"] = ["../" + place[0], place[1]]
    write(file, index)
    with pytest.raises(ValueError, match="must be files of the folder features"):
        FeatureDataset(tmp_path / "out")


def test_the_official_edges_are_read_as_they_are(tmp_path: Path) -> None:
    root = layout(tmp_path, info("x/000.png"), info("001.png"))
    edges = root / "hed_feature_512"
    for name in ("x_000", "001"):
        save_latents(root / MULTI / f"{name}.npy")
        save_caption(root / "caption_features_new" / f"{name}.npz")
    for name, value in (("x/000", 2.0), ("001", 3.0)):
        (edges / name).parent.mkdir(parents=True, exist_ok=True)
        moments = np.concatenate([np.full((4, 8, 12), -value), np.full((4, 8, 12), value)])
        np.savez_compressed(edges / f"{name}.npz", moments.astype(np.float32))
    found = FeatureDataset(tmp_path)
    assert found.control == "hed"
    found.check_controls()
    batch = found.batch([0, 1], Random(0), {"prompt": 1}, control=True)
    assert batch.control_mean is not None and batch.control_std is not None
    assert batch.control_mean[:, 0, 0, 0].tolist() == [-2, -3]
    assert batch.control_std[:, 0, 0, 0].tolist() == [2, 3]
    np.savez_compressed(edges / "001.npz", np.ones((8, 4, 4), np.float32))
    with pytest.raises(ValueError, match="latents of their pictures' shape"):
        FeatureDataset(tmp_path).batch([1], Random(0), {"prompt": 1}, control=True)
    (edges / "001.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="001.npz cannot be read"):
        FeatureDataset(tmp_path).batch([1], Random(0), {"prompt": 1}, control=True)
    (edges / "001.npz").unlink()
    with pytest.raises(ValueError, match=r"of every sample, 001.png has none; prepare it with"):
        FeatureDataset(tmp_path).check_controls()


def test_what_a_preprocessor_makes_is_gone_on_with_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def origins(control: str) -> set[str]:
        found = set()
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / folder)
            found.add(data._origin(Prepare(str(tmp_path), tmp_path / "out", 64, control=control)))
        return found

    assert len(origins("canny") | origins("hed") | origins("members")) == 3
    assert len(origins("edges")) == 2, "a folder, in each of them"
