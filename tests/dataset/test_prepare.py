"""Preparing features: what is stored, what is computed once, what survives bad data and kills."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pictures
import published
import pytest
import torch
from pictures import write
from PIL import Image
from pipelines import CHANNELS, open_pipeline
from tiny_checkpoints import edit_json
from torch import Tensor
from torch.nn import functional as F

from pixart import data
from pixart.dataset import loading, prepare
from pixart.dataset.batches import FeatureDataset
from pixart.dataset.encoding import Encoders, open_encoders
from pixart.dataset.images import cover, decode
from pixart.dataset.loading import Settings
from pixart.dataset.prepare import Preparation
from pixart.dataset.samples import Item
from pixart.dataset.sources import open_source
from pixart.files import digest
from pixart.text.cache import Encoded

SETTINGS = Settings(resolution=64)


class FakeVAE:
    """Averages 8x8 px; counts, and can be slow or overflow."""

    downsample, scaling_factor = 8, 0.5

    def __init__(self, seconds: float = 0.0, overflows: bool = False) -> None:
        self.encoded, self.seconds, self.overflows = 0, seconds, overflows

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.seconds)
        self.encoded += len(images)
        mean = F.avg_pool2d(images, 8).repeat(1, 2, 1, 1)[:, :4]
        return mean, mean.abs() + (torch.inf if self.overflows else 0.1)


class FakeText:
    """One token a character, at most 30; counts."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode_each(self, prompts: list[str]) -> dict[str, Encoded]:
        self.encoded += prompts
        found = {}
        for text in prompts:
            codes = torch.tensor([ord(letter) for letter in text[:30]], dtype=torch.bfloat16)
            features = torch.cat([codes, torch.zeros(2, dtype=torch.bfloat16)])
            found[text] = Encoded(features[:, None].expand(-1, 6), len(codes), text[30:])
        return found

    def note_of(self, encoded: Encoded) -> str:
        return f"cut off: {encoded.cut!r}"


def encoders(**changes: Any) -> Encoders:
    return Encoders(**{"vae": FakeVAE(), "text": FakeText(), "family": "sigma",
                       "vae_identity": "v", "text_identity": "t"} | changes)  # fmt: skip


def run(
    source: Path, output: Path, with_: Encoders | None = None, settings: Settings = SETTINGS
) -> dict[str, Any]:
    preparation = Preparation(output, with_ or encoders(), settings, workers=2)
    return preparation.run(lambda: open_source(source))


def reported(output: Path) -> dict[str, Any]:
    """report.json."""
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def reasons(report: dict[str, Any]) -> dict[str, str]:
    return {Path(line["path"]).name: line["reason"] for line in report["rejected"]}


BAD = {
    "corrupt.png": pictures.corrupt_png(),
    "line.png": pictures.png(1, 5000),
    "blank.png": pictures.png(),
}


@pytest.mark.parametrize("kind", ["json", "jsonl", "folder"])
def test_bad_samples_are_reported_and_the_good_ones_prepared(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "source"
    for name, content in BAD.items():
        write(source / name, content)
    names = [*BAD, "absent.png"]
    if kind == "folder":
        for name in names:
            write(source / Path(name).with_suffix(".txt"), "" if "blank" in name else "some")
    else:
        lines = [{"path": n, "prompt": "" if "blank" in n else "some"} for n in names]
        content = lines if kind == "json" else "\n".join(map(json.dumps, lines))
        write(source / f"index.{kind}", content)
    report = run(source, tmp_path / "out")
    found = {Path(name).stem: reason for name, reason in reasons(report).items()}
    assert found.pop("corrupt").startswith("unreadable image")
    assert found.pop("line").startswith("ratio 5000:1")
    assert found.pop("blank") == "empty caption"
    assert found.pop("absent").startswith("missing file")
    assert not found and report["prepared"] == 0
    written = reported(tmp_path / "out")
    assert written["rejected"] == [{"resolution": 64, **line} for line in report["rejected"]]
    assert written["prepared"] == {"64": 0} and written["notes"] == []
    if kind == "folder":  # the same with good ones among them
        report = run(pictures.folder(source, 3), tmp_path / "out")
        assert report["prepared"] == 3 and len(report["rejected"]) == 4
        assert len(FeatureDataset(tmp_path / "out")) == 3


def test_a_wide_picture_passes_up_to_the_limit(tmp_path: Path) -> None:
    write(tmp_path / "s" / "a.png", pictures.png(20, 90))
    write(tmp_path / "s" / "a.txt", "wide")
    assert run(tmp_path / "s", tmp_path / "out")["prepared"] == 1
    strict = replace(SETTINGS, max_ratio=4.0)
    assert reasons(run(tmp_path / "s", tmp_path / "out", settings=strict))["a.png"] == (
        "ratio 4.5:1 of 90x20 is over 4:1"
    )


def test_features_are_those_of_the_vae_and_the_text_encoder(tmp_path: Path) -> None:
    """With a real VAE and T5: the same numbers as by hand, and only the tokens that count."""
    pipeline = published.build_sigma(tmp_path / "p", with_transformer=False, vae_channels=CHANNELS)
    real = open_encoders(pipeline, max_length=20)
    source = pictures.folder(tmp_path / "s", 1, height=100, width=150)
    run(source, tmp_path / "out", real)
    data = FeatureDataset(tmp_path / "out")
    batch = data.batch([0], Random(0))
    image = decode((source / "0.png").read_bytes())
    mean, std = real.vae.posterior(cover(image, data.buckets[0], 64)[None])
    assert torch.equal(batch.mean, mean) and torch.equal(batch.std, std)
    text = real.text.encode(["caption of picture 0"])
    assert torch.equal(batch.features, text.features) and batch.mask.all()
    assert batch.size.tolist() == [[100, 150]]
    assert batch.aspect_ratio.item() == pytest.approx(data.buckets[0][0] / data.buckets[0][1])
    assert data.scaling_factor == 0.13025


@pytest.mark.parametrize("family", ["sigma", "alpha"])
def test_captions_are_encoded_as_the_pipeline_encodes_prompts(tmp_path: Path, family: str) -> None:
    build = getattr(published, f"build_{family}")
    pipeline = build(tmp_path / "p", sample_size=16, vae_channels=CHANNELS)
    text = "A Small CACTUS in the Desert."
    source = pictures.folder(tmp_path / "s", 1)
    write(source / "0.txt", text)
    real = open_encoders(pipeline)
    run(source, tmp_path / "out", real)
    batch = FeatureDataset(tmp_path / "out").batch([0], Random(0))
    prompt, _ = open_pipeline(pipeline).captions.pair(text, "")
    assert torch.equal(batch.features, prompt.features)
    assert torch.equal(batch.features, real.text.encode([text]).features) == (family == "sigma")


def test_features_of_captions_as_they_are_do_not_serve_alpha(tmp_path: Path) -> None:
    """α's T5 is Σ's: the folder below is first the one, then the other, with the same weights."""
    pipeline = published.build_alpha(tmp_path / "p", vae_channels=CHANNELS)
    source, out = pictures.folder(tmp_path / "s", 1), tmp_path / "out"
    write(source / "0.txt", "A Small CACTUS")
    edit_json(pipeline / "model_index.json", _class_name="PixArtSigmaPipeline")
    sigma = open_encoders(pipeline)
    run(source, out, sigma)
    edit_json(pipeline / "model_index.json", _class_name="PixArtAlphaPipeline")
    alpha = open_encoders(pipeline)
    assert sigma.text_identity != alpha.text_identity and sigma.vae_identity == alpha.vae_identity
    assert (sigma.text.max_length, alpha.text.max_length) == (300, 120)
    run(source, out, alpha)
    features = FeatureDataset(out).batch([0], Random(0)).features
    assert torch.equal(features, alpha.text.encode(["a small cactus"]).features)


def test_half_and_square_are_as_they_say(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 1, height=60, width=120)
    fake = encoders()
    run(source, tmp_path / "out", fake)
    exact = FeatureDataset(tmp_path / "out").batch([0], Random(0))
    assert exact.mean.shape[2:] == (6, 12)  # the bucket of 1:2 at 64 px
    run(source, tmp_path / "out", fake, replace(SETTINGS, half=True))
    half = FeatureDataset(tmp_path / "out").batch([0], Random(0))
    assert torch.equal(half.mean, exact.mean.half().float())
    assert not torch.equal(half.mean, exact.mean)
    run(source, tmp_path / "out", fake, replace(SETTINGS, square=True))
    assert FeatureDataset(tmp_path / "out").batch([0], Random(0)).mean.shape[2:] == (8, 8)


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 3), tmp_path / "out"
    write(source / "copy.png", pictures.png(seed=0))
    write(source / "copy.txt", "caption of picture 1")
    first = encoders()
    run(source, out, first)
    assert first.text.encoded == [f"caption of picture {n}" for n in range(3)]
    files = {file: file.stat().st_mtime_ns for file in (out / "features").iterdir()}
    again = encoders()
    write(source / "a.png", pictures.png(seed=9))  # comes first: every chunk is another one now
    write(source / "a.txt", "new")
    write(source / "0.long.txt", "a longer caption")
    run(source, out, again)
    assert again.vae.encoded == 1 and sorted(again.text.encoded) == ["a longer caption", "new"]
    assert files.items() <= {f: f.stat().st_mtime_ns for f in (out / "features").iterdir()}.items()
    other_size = encoders()
    run(source, out, other_size, Settings(128))
    assert other_size.vae.encoded == 5 - 1 + 1 and other_size.text.encoded == []
    assert len(FeatureDataset(out, 64)) == len(FeatureDataset(out, 128)) == 5


def test_another_vae_or_text_encoder_makes_other_features(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 2), tmp_path / "out"
    run(source, out)
    other = encoders(vae_identity="w")
    run(source, out, other)
    assert other.vae.encoded == 2 and other.text.encoded == []
    other = encoders(text_identity="u")
    run(source, out, other)
    assert other.vae.encoded == 0 and len(other.text.encoded) == 2


def test_a_changed_picture_is_noticed_and_deleted_features_are_made_again(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 2), tmp_path / "out"
    run(source, out)
    write(source / "1.png", pictures.png(61, 80, seed=5))
    fake = encoders()
    run(source, out, fake)
    assert fake.vae.encoded == 1
    shutil.rmtree(out / "features")
    fake = encoders()
    run(source, out, fake)
    assert fake.vae.encoded == 2
    FeatureDataset(out).batch([0], Random(0))


def test_captions_that_are_cut_are_noted(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 1)
    write(source / "0.txt", "x" * 33)
    (note,) = run(source, tmp_path / "out")["notes"]
    assert note["path"].endswith("0.png") and note["note"] == "cut off: 'xxx'"


def test_latents_that_overflow_are_rejected(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 1)
    report = run(source, tmp_path / "out", encoders(vae=FakeVAE(overflows=True)))
    assert "not finite" in reasons(report)["0.png"]


def test_the_report_lists_what_every_resolution_could_not_use(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 2, width=260), tmp_path / "out"
    write(source / "1.txt", "x" * 33)
    strict = replace(SETTINGS, max_ratio=4.0)
    run(source, out, settings=replace(strict, resolution=128))
    run(source, out, settings=SETTINGS)
    assert reported(out)["prepared"] == {"64": 2, "128": 0}
    assert [line["resolution"] for line in reported(out)["rejected"]] == [128, 128]
    (note,) = reported(out)["notes"]
    assert note["resolution"] == 64 and note["note"] == "cut off: 'xxx'"
    run(source, out, settings=strict)  # in the place of what 64 px had before
    assert reported(out)["prepared"] == {"64": 0, "128": 0} and reported(out)["notes"] == []
    assert [line["resolution"] for line in reported(out)["rejected"]] == [64, 64, 128, 128]


def test_two_resolutions_that_end_together_are_both_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one ends while this one is about to write what it has read."""
    source, out = pictures.folder(tmp_path / "s", 1), tmp_path / "out"
    write_json, others = prepare.write_json, [replace(SETTINGS, resolution=128)]

    def overtaken(path: Path, *arguments: Any, **options: Any) -> None:
        if path.name == "report.json" and others:
            run(source, out, settings=others.pop())
            assert reported(out)["prepared"] == {"64": 1, "128": 1}
        write_json(path, *arguments, **options)

    monkeypatch.setattr(prepare, "write_json", overtaken)
    run(source, out)
    assert not others and reported(out)["prepared"] == {"64": 1, "128": 1}


def _process(source: Path, output: Path, seconds: float, counts: Any, resolution: int = 64) -> None:
    torch.set_num_threads(1)
    prepare.CHUNK = 4
    fake = encoders(vae=FakeVAE(seconds))
    run(source, output, fake, Settings(resolution))
    counts.put(fake.vae.encoded)


def test_several_processes_share_the_work_and_each_ends_when_all_is_done(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 24), tmp_path / "out"
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    workers = [context.Process(target=_process, args=(source, out, 0.05, counts)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    done = [counts.get() for _ in workers]
    assert sum(done) == 24 and max(done) < 24
    assert len(FeatureDataset(out)) == 24
    assert reported(out)["prepared"] == {"64": 24}
    assert not list(out.rglob("*.lock")) and not list(out.rglob(".*"))


def test_several_resolutions_may_be_prepared_at_the_same_time(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 3, height=150, width=200), tmp_path / "out"
    write(source / "bad.png", pictures.corrupt_png())
    write(source / "bad.txt", "bad")
    sizes = [64, 128, 192, 256]
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    workers = [
        context.Process(target=_process, args=(source, out, 0.0, counts, size)) for size in sizes
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert reported(out)["prepared"] == {str(size): 3 for size in sizes}
    assert [line["resolution"] for line in reported(out)["rejected"]] == sizes
    assert not list(out.rglob("*.lock")) and not list(out.rglob(".*"))


def test_two_that_would_write_one_index_differently_refuse_each_other(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 1), tmp_path / "out"
    tried = []

    def meanwhile() -> Iterator[Item]:
        preparing = Preparation(out, encoders(), SETTINGS)
        preparing.run(lambda: open_source(source), "this")  # the same: both may go on
        for other, origin in (
            (Preparation(out, encoders(), replace(SETTINGS, square=True)), "this"),
            (Preparation(out, encoders(text_identity="u"), SETTINGS), "this"),
            (preparing, "that"),
        ):
            with pytest.raises(
                ValueError, match=f"held by pid {os.getpid()} on .*at 64 px"
            ) as error:
                other.run(lambda: open_source(source), origin)
            tried.append(str(error.value))
        yield from open_source(source)

    report = Preparation(out, encoders(), SETTINGS).run(meanwhile, "this")
    assert len(tried) >= 3 and report["prepared"] == 1
    run(source, out, settings=replace(SETTINGS, square=True))  # and nothing is left behind
    assert not list(out.rglob(".*"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"samples": 3}', b"\xff" * 99, "flip"])
def test_damaged_files_of_work_are_made_again(tmp_path: Path, damage: bytes | str) -> None:
    source, out = pictures.folder(tmp_path / "s", 2), tmp_path / "out"
    write(source / "bad.png", pictures.corrupt_png())
    write(source / "bad.txt", "bad")
    report, texts = run(source, out), {}
    for file in (out / "work").glob("*.json"):
        texts[file] = file.read_bytes()
        flipped = texts[file].replace(b"bad.png", b"bed.png")
        file.write_bytes(flipped if isinstance(damage, str) else damage)
    fake = encoders()
    assert len(texts) == 2 and run(source, out, fake) == report
    assert {file: file.read_bytes() for file in texts} == texts
    assert fake.vae.encoded == 0  # the features are there still
    (out / "work" / "report-64.json").write_bytes(b"{")
    run(source, out, settings=Settings(128))
    (note,) = reported(out)["notes"]
    assert note["path"].endswith("report-64.json") and "prepare at this resolution" in note["note"]


def test_tiny_pictures_are_rejected(tmp_path: Path) -> None:
    for name, height, width in (("a", 32, 32), ("b", 31, 32), ("c", 23, 90), ("d", 7, 20)):
        write(tmp_path / "s" / f"{name}.png", pictures.png(height, width))
        write(tmp_path / "s" / f"{name}.txt", "text")
    # At 64 px the buckets of c and d are 32 and 48 px high.
    report = run(tmp_path / "s", tmp_path / "out")
    assert report["prepared"] == 2 and reasons(report) == {
        "b.png": "32x31 is too small, its shorter side must be at least 32 px",
        "d.png": "20x7 is too small, its shorter side must be at least 16 px",
    }
    low, high = (replace(SETTINGS, min_side=side) for side in (1, 32))
    assert run(tmp_path / "s", tmp_path / "out", settings=low)["prepared"] == 4
    assert run(tmp_path / "s", tmp_path / "out", settings=high)["prepared"] == 1
    with pytest.raises(ValueError, match="min_side must be at least 1, got 0"):
        Preparation(tmp_path, encoders(), replace(SETTINGS, min_side=0))


def test_pictures_with_a_profile_have_features_of_their_own(tmp_path: Path) -> None:
    """Not those that were made of the same file when its profile was ignored."""
    image, source, out = (
        Image.new("RGB", (64, 64), (60, 200, 120)),
        tmp_path / "s",
        tmp_path / "out",
    )
    for name, profile in (("a", b""), ("b", pictures.wide_profile()), ("c", b"damaged")):
        write(source / f"{name}.png", pictures.encoded(image, icc_profile=profile))
        write(source / f"{name}.txt", "text")
    report = run(source, out)
    assert report["prepared"] == 3 and report["rejected"] == []
    (note,) = report["notes"]
    assert note["path"].endswith("c.png") and "the embedded profile cannot be used" in note["note"]
    data = FeatureDataset(out)
    a, b, c = (data.batch([k], Random(0)).mean for k in range(3))
    assert torch.equal(a, c) and not torch.equal(a, b)
    stored = json.dumps([digest((source / "b.png").read_bytes()), "v", [64, 64], "bicubic", "fp32"])
    assert digest(stored.encode()) not in {entry.image[1] for entry in data.entries}
    run(source, out)
    assert reported(out)["notes"] == [{"resolution": 64, **note}]


HOSTILE = {
    # DDS with an unknown pixel format, AVIF without a picture, a PNG without pixels.
    "dds": b"DDS |\0\0\0\x0f\x10\0\0" + (30).to_bytes(4, "little") * 2 + bytes(120),
    "avif": pictures.encoded(Image.new("RGB", (64, 64)), "AVIF").replace(b"pitm", b"free"),
    "empty": pictures.png().replace((80).to_bytes(4, "big") + (60).to_bytes(4, "big"), bytes(8), 1),
}


def test_nothing_that_pillow_raises_stops_the_others(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / "s", 1)
    for name, content in HOSTILE.items():
        write(source / f"{name}.png", content)
        write(source / f"{name}.txt", "text")
    (source / os.fsdecode(b"caf\xe9.png")).write_bytes(pictures.png())
    (source / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"text")
    report = run(source, tmp_path / "out")
    assert report["prepared"] == 1
    assert sorted(reasons(report)) == ["avif.png", "caf\\xe9.png", "dds.png", "empty.png"]
    assert reported(tmp_path / "out")["prepared"] == {"64": 1}


def test_a_picture_of_another_size_than_its_head_says_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features would carry the wrong size, of which the model learns."""
    monkeypatch.setattr(loading, "decode", lambda content: decode(content).rotate(90, expand=True))
    report = run(pictures.folder(tmp_path / "s", 1), tmp_path / "out")
    assert reasons(report) == {"0.png": "unreadable image: its head says 80x60, it is 60x80"}


def test_a_source_whose_own_path_is_no_utf8_is_prepared(tmp_path: Path) -> None:
    source = pictures.folder(tmp_path / os.fsdecode(b"caf\xe9"), 1)
    write(source / "1.png", pictures.corrupt_png())
    write(source / "1.txt", "text")
    out = tmp_path / os.fsdecode(b"out\xe9")
    assert run(source, out)["prepared"] == 1
    (line,) = reported(out)["rejected"]
    assert line["path"].endswith("caf\\xe9/1.png") and len(FeatureDataset(out)) == 1


def test_a_killed_run_is_taken_up_and_another_process_does_its_work(tmp_path: Path) -> None:
    source, out = pictures.folder(tmp_path / "s", 24), tmp_path / "out"
    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    killed = context.Process(target=_process, args=(source, out, 0.05, counts))
    killed.start()
    while len(list((out / "work").glob("*.json"))) < 2:
        time.sleep(0.01)
    survivor = context.Process(target=_process, args=(source, out, 0.0, counts))
    survivor.start()
    time.sleep(0.1)
    os.kill(killed.pid, signal.SIGKILL)  # type: ignore[arg-type]
    survivor.join(60)
    assert survivor.exitcode == 0 and counts.get() <= 24 - 8
    data = FeatureDataset(out)
    assert sorted(Path(entry.path).stem for entry in data.entries) == sorted(map(str, range(24)))
    alone = tmp_path / "alone"
    run(source, alone)
    for index in range(24):
        one, two = (FeatureDataset(d).batch([index], Random(0)) for d in (out, alone))
        assert torch.equal(one.mean, two.mean) and torch.equal(one.features, two.features)


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pictures.folder(tmp_path / "s", 1), tmp_path / "out"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", full)
        run(source, out)
    assert not [file for file in out.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert run(source, out)["prepared"] == 1


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resolution must be a multiple of 16, got 100"):
        Preparation(tmp_path, encoders(), Settings(100))
    with pytest.raises(ValueError, match="max_ratio must be at least 1, got 0.5"):
        Preparation(tmp_path, encoders(), Settings(64, max_ratio=0.5))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at least one picture"):
        run(tmp_path / "empty", tmp_path / "out")


def test_a_name_cannot_write_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures.folder(tmp_path / "source", 1)
    write(tmp_path / "source" / "a\n\x1b[31mb.jxl", b"x")
    preparation = Preparation(tmp_path / "out", encoders(), Settings(64))
    monkeypatch.setattr(data, "_preparation", lambda _: preparation)
    command = ["prepare", str(tmp_path / "source"), str(tmp_path / "out"), "--resolution", "64"]
    assert data.main(command) == 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "rejected" in line)
    assert line.isprintable() and "\\x1b[31mb.jxl (pictures in .jxl" in line
