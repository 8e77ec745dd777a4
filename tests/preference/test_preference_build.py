"""What `preference build` makes: pairs by design, and nothing by which the models could be told apart."""

import hashlib
import io
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageCms, PngImagePlugin
from preference_study import build_study, write_pictures

from pixart.evaluation.preference.build import alike, build, plan, tournament
from pixart.evaluation.preference.options import Build
from pixart.evaluation.preference.study import KEY, STUDY, read_key, read_study
from pixart.evaluation.store.entries import Prompt
from pixart.preference import main

PROMPTS = [Prompt(f"{k:05d}", f"prompt {k}") for k in range(20)]


@pytest.mark.parametrize(
    ("design", "models", "meetings"),
    [
        ("against-first", 4, 20),
        ("round-robin", 4, 20),
        ("balanced", 4, 20 / 3),
        ("balanced", 3, 20 / 3),
    ],
)
def test_every_two_models_of_a_design_meet_as_often(
    design: str, models: int, meetings: float
) -> None:
    pairs = plan(PROMPTS, models, design, random.Random(1))
    met = Counter(tuple(sorted((pair.left[0], pair.right[0]))) for pair in pairs)
    assert all(abs(count - meetings) < 1 for count in met.values())
    wanted = models - 1 if design == "against-first" else models * (models - 1) // 2
    assert len(met) == wanted and all(0 in two for two in met if design == "against-first")


def test_each_model_is_on_the_left_in_half_of_its_pairs() -> None:
    pairs = plan(PROMPTS, 3, "against-first", random.Random(1))
    for other in (1, 2):
        lefts = [pair.left[0] for pair in pairs if other in (pair.left[0], pair.right[0])]
        assert lefts.count(0) == 10
    # And by no rule that a voter could guess.
    assert [p.left for p in pairs] != [
        p.left for p in plan(PROMPTS, 3, "against-first", random.Random(2))
    ]


@pytest.mark.parametrize("models", [2, 3, 6, 7])
def test_in_a_round_each_model_plays_once_and_in_all_rounds_against_everybody(models: int) -> None:
    rounds = tournament(models)
    for one in rounds:
        assert len({k for two in one for k in two}) == 2 * len(one)
    every = Counter(two for one in rounds for two in one)
    assert set(every.values()) == {1} and len(every) == models * (models - 1) // 2


def test_of_a_balanced_design_no_picture_comes_twice() -> None:
    pairs = plan(PROMPTS, 4, "balanced", random.Random(1))
    shown = [picture for pair in pairs for picture in (pair.left, pair.right)]
    assert len({(k, prompt.id) for k, prompt in shown}) == len(shown)


def test_a_study_says_nothing_about_models_and_its_key_everything(tmp_path: Path) -> None:
    study, key = build_study(tmp_path, 10, ("ours", "theirs"), checks=0.2)
    text = (study.folder / STUDY).read_text()
    for word in ("ours", "theirs", "check", "secret", *(f"{k:05d}" for k in range(10))):
        assert word not in text
    assert len(study.pairs) == 12 and len(study.pictures) == 24
    assert [pair.id for pair in study.pairs] == sorted(study.by_id)
    checks = [answer for answer in key.answers.values() if answer.check]
    assert len(checks) == 2 and all(one.left == one.right for one in checks)
    assert (study.folder / KEY).stat().st_mode & 0o077 == 0
    assert {path.name for path in (study.folder / "pictures").iterdir()} == study.pictures


def test_the_times_of_files_say_no_more_than_their_names(tmp_path: Path) -> None:
    study, _ = build_study(tmp_path, 6, ("ours", "a", "b"), checks=0.5)
    times = [study.picture(pair.left).stat().st_mtime_ns for pair in study.pairs]
    assert times == sorted(times)  # not those of one opponent first, and checks last


def test_names_are_other_ones_in_every_study_and_no_digest_of_the_picture(tmp_path: Path) -> None:
    first, _ = build_study(tmp_path / "a", 3)
    second, _ = build_study(tmp_path / "b", 3)
    assert not first.pictures & second.pictures
    for name in first.pictures:
        content = first.picture(name).read_bytes()
        pixels = Image.open(io.BytesIO(content)).tobytes()
        for digest in (hashlib.md5, hashlib.sha1, hashlib.sha256):
            assert all(name[:8] not in digest(one).hexdigest() for one in (content, pixels))


def test_pictures_keep_their_pixels_and_nothing_else(tmp_path: Path) -> None:
    prompts = write_pictures(tmp_path, 2, {"ours": 0, "theirs": 0})
    for path in (tmp_path / "ours").iterdir():
        told = PngImagePlugin.PngInfo()
        told.add_text("parameters", "drawn by ours")
        image = Image.open(path)
        exif = Image.Exif()
        exif[0x010E] = "ours"
        image.save(path, pnginfo=told, exif=exif, dpi=(300, 300))
    # Pillow writes the profile and the comment of a file that it has read again, unasked.
    path = tmp_path / "ours" / "00001.png"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.open(path).save(path.with_suffix(".jpg"), comment="drawn by ours", icc_profile=profile)
    path.unlink()
    build(
        Build((str(tmp_path / "ours"), str(tmp_path / "theirs")), prompts, tmp_path / "s", seed=1)
    )
    study = read_study(tmp_path / "s")
    for name in study.pictures:
        image = Image.open(study.picture(name))
        assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert image.info["jfif_density"] == (1, 1) and not image.getexif()
        assert b"ours" not in study.picture(name).read_bytes()


def test_pictures_of_a_pair_have_one_size_and_none_is_enlarged() -> None:
    wide, small = Image.new("RGB", (200, 100), "red"), Image.new("RGB", (60, 60), "blue")
    first, second = alike([wide, small], 2048)
    assert first.size == second.size == (60, 60)
    assert first.getpixel((0, 0)) == (128, 128, 128) and first.getpixel((30, 30)) == (255, 0, 0)
    assert second.getpixel((0, 0)) == (0, 0, 255)
    assert alike([wide, wide], 50)[0].size == (50, 25)


def test_a_missing_picture_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_pictures(tmp_path, 3, {"ours": 0, "theirs": 0})
    (tmp_path / "theirs" / "00001.png").unlink()
    arguments = ["build", "--pictures", str(tmp_path / "ours"), "--pictures", str(tmp_path / "theirs"),
                 "--prompts", str(prompts), "--output", str(tmp_path / "s")]  # fmt: skip
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert "00001" in err and "theirs" in err and err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_study_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    study, _ = build_study(tmp_path, 2)
    before = (study.folder / STUDY).read_bytes()
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        build_study(tmp_path, 2)
    assert (study.folder / STUDY).read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"used": 7}, "--count must be at most the 6 prompts there are, got 7"),
        ({"checks": 1.5}, "--checks must be a share from 0 to 1"),
        ({"side": 2}, "--side must be from 16"),
        ({"side": 10**12}, "--side must be from 16 to 65,500 pixels, got 1,000,000,000,000"),
    ],
)
def test_what_cannot_be_built_is_refused(
    tmp_path: Path, settings: dict[str, object], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        build_study(tmp_path, 6, **settings)


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (["a"], "two models at least, got 1"),
        (["a", "a"], "'a' twice"),
        (["x=a", "x=b"], "'x' twice"),
        (["a", "c"], "there is no folder"),
    ],
)
def test_models_are_two_folders_of_different_names(
    tmp_path: Path, given: list[str], rule: str
) -> None:
    prompts = write_pictures(tmp_path, 1, {"a": 0, "b": 0})
    places = [
        one.replace("=", f"={tmp_path}/") if "=" in one else f"{tmp_path}/{one}" for one in given
    ]
    with pytest.raises(ValueError, match=rule):
        build(Build(tuple(places), prompts, tmp_path / "s"))


def test_the_layout_of_an_evaluated_folder_is_read_and_models_can_be_named(tmp_path: Path) -> None:
    prompts = write_pictures(tmp_path, 2, {"a": 0, "b": 0})
    for path in list((tmp_path / "a").iterdir()):
        place = tmp_path / "a" / "images" / path.stem / "0000.png"
        place.parent.mkdir(parents=True)
        path.rename(place)
    build(Build((f"20 steps={tmp_path / 'a'}", str(tmp_path / "b")), prompts, tmp_path / "s"))
    assert read_key(read_study(tmp_path / "s")).models == ("20 steps", "b")


def test_the_checker_knows_checks_of_its_world(tmp_path: Path) -> None:
    study, key = build_study(tmp_path, 10, checks=0.6, check_kind="checker")
    known = {pair: one for pair, one in key.answers.items() if set(one.check) == {"alignment"}}
    assert len(known) == 3
    from pixart.evaluation.preference.judges import CheckerOfPairs

    for pair, answer in known.items():
        images = [
            Image.open(study.picture(n)) for n in (study.by_id[pair].left, study.by_id[pair].right)
        ]
        verdict = CheckerOfPairs().compare(study.by_id[pair].prompt, *images)
        assert {"first": "left", "second": "right"}[verdict["alignment"]] == answer.check[
            "alignment"
        ]
