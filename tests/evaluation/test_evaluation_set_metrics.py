"""Metrics that compare sets: numbers, intervals and notes, with a network of no weights."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from features import MeanColours, context, features, registered
from PIL import Image

from pixart.evaluation.api import evaluate
from pixart.evaluation.distances import (
    frechet_distance_of,
    kernel_distance,
    kernel_distance_of_subsets,
    maximum_mean_discrepancy,
    moments_of,
    neighbourhoods,
)
from pixart.evaluation.distances.reference import (
    StatisticsError,
    read_statistics,
    statistics_for,
    write_statistics,
)
from pixart.evaluation.metric import Features, Moments, SetMetric
from pixart.evaluation.metrics import open_metric
from pixart.evaluation.networks import EXTRACTORS

NAMES = ("fid-clean", "fid-pytorch", "fid-tf", "fd-dinov2", "kid", "cmmd", "precision-recall")


@pytest.fixture(autouse=True)
def network() -> Iterator[str]:
    with registered() as name:
        yield name


def metric(name: str, **options: str) -> SetMetric:
    opened = open_metric(name, context(features="mean-colours", **options))
    assert isinstance(opened, SetMetric)
    return opened


def sets(n: int, m: int, shift: float = 0.3, samples: int = 1) -> tuple[Features, Features]:
    rng = np.random.default_rng(0)
    ours = features(rng.normal(size=(n, 10)) + shift, samples)
    return ours, features(rng.normal(size=(m, 10)))


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_compares_by_any_network(name: str) -> None:
    opened = metric(name)
    ours, real = sets(60, 50)
    values = opened.compare(ours, real)
    assert values and all(math.isfinite(one.value) for one in values.values())
    assert all(one.low <= one.value <= one.high for one in values.values())
    assert opened.constants["features"] == "mean-colours" and opened.category_pictures >= 100
    assert any("By features of mean-colours" in note for note in next(iter(values.values())).notes)
    assert opened.compare(ours, real) == values
    opened.release()


def test_other_weights_are_another_constant_and_so_another_protocol(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (*NAMES, "patch-fd"):
        before = open_metric(name, context(features="mean-colours")).constants
        with monkeypatch.context() as patch:
            patch.setitem(EXTRACTORS, "mean-colours", partial(MeanColours, salt="other weights"))
            after = open_metric(name, context(features="mean-colours")).constants
        assert {key for key in before if before[key] != after[key]} == {"weights"}, name


def test_frechet_is_told_with_kid_before_it_where_pictures_are_few() -> None:
    ours, real = sets(60, 50)
    values = metric("fid-clean").compare(ours, real)
    assert list(values) == ["kid-x1000", "fid-clean", "fid-infinity"]
    found = values["fid-clean"]
    assert found.value == pytest.approx(frechet_distance_of(ours.values, real.values))
    assert found.method == "jackknife over 50 blocks" and found.n == 60 and found.low >= 0
    assert found.notes[0].startswith("Biased: below 10,000 pictures (the reference has 50), about")
    assert values["kid-x1000"] == metric("kid").compare(ours, real)["kid"]


def test_many_pictures_are_not_called_biased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.evaluation.metrics.frechet.ENOUGH", 40)
    values = metric("fid-tf").compare(*sets(60, 50))
    assert list(values) == ["fid-tf", "fid-infinity"]
    assert not any("Biased" in note for note in values["fid-tf"].notes)


def test_moments_are_enough_for_frechet_and_for_nothing_else() -> None:
    ours, real = sets(60, 200)
    moments = moments_of(real.values)
    values = metric("fd-dinov2").compare(ours, moments)
    assert list(values) == ["fd-dinov2", "fd-infinity"]
    assert values["fd-dinov2"].value == pytest.approx(frechet_distance_of(ours.values, real.values))
    for name in ("kid", "cmmd", "precision-recall"):
        with pytest.raises(ValueError, match=f"{name} needs features of single reference pictures"):
            metric(name).compare(ours, moments)


def test_the_jackknife_can_be_left_out() -> None:
    ours, real = sets(60, 50)
    found = metric("fid-clean", interval="none").compare(ours, real)
    for name in ("fid-clean", "fid-infinity"):
        assert (found[name].low, found[name].high) == (-math.inf, math.inf)
    assert found["fid-clean"].method == "none"
    with pytest.raises(ValueError, match="option interval must be one of jackknife, none, got 'x'"):
        metric("fid-clean", interval="x")


def test_two_pictures_have_a_distance_and_no_interval() -> None:
    found = metric("fid-clean").compare(*sets(2, 50))
    assert list(found) == ["fid-clean"] and found["fid-clean"].high == math.inf


@pytest.mark.parametrize("name", ["fid-clean", "kid", "cmmd", "precision-recall"])
def test_pictures_of_a_prompt_make_intervals_wider_than_as_many_prompts(name: str) -> None:
    """Eight copies of a picture say no more than one."""
    rng = np.random.default_rng(1)
    once = rng.normal(size=(15, 10)) + 0.3
    real = features(rng.normal(size=(60, 10)))
    copies = np.repeat(once, 8, axis=0) + 0.01 * rng.normal(size=(120, 10))
    alike = metric(name).compare(features(copies, samples=8), real)
    apart = metric(name).compare(features(copies), real)
    key = "precision" if name == "precision-recall" else name
    width = [one[key].high - one[key].low for one in (alike, apart)]
    assert width[0] > 1.5 * width[1]


def test_kid_is_of_all_pairs_and_of_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, real = sets(60, 50)
    values = metric("kid").compare(ours, real)
    assert list(values) == ["kid"]
    found = kernel_distance(ours.values, real.values)
    assert values["kid"].value == pytest.approx(1000 * found.value)
    assert values["kid"].high - values["kid"].value == pytest.approx(1960 * found.error, rel=1e-4)
    monkeypatch.setattr("pixart.evaluation.metrics.kernels.SUBSET_SIZE", 20)
    values = metric("kid").compare(ours, real)
    expected = kernel_distance_of_subsets(ours.values, real.values, size=20)
    assert values["kid-subsets"].value == pytest.approx(1000 * expected.mean)
    assert values["kid-subsets"].n == 60 and metric("kid").constants["subset_size"] == 20
    half = [one.high - one.value for one in values.values()]
    assert half[1] > half[0]  # which subsets were drawn adds to it


def test_cmmd_is_told_in_both_ways() -> None:
    ours, real = sets(30, 40)
    values = metric("cmmd").compare(ours, real)
    found = maximum_mean_discrepancy(ours.values, real.values)
    assert values["cmmd"].value == pytest.approx(found.value)
    assert values["cmmd-with-diagonal"].value == pytest.approx(found.with_diagonal)


def test_precision_and_recall_have_four_numbers() -> None:
    ours, real = sets(60, 50)
    values = metric("precision-recall").compare(ours, real)
    found = neighbourhoods(ours.values, real.values)
    expected = [found.precise, found.recalled, found.density, found.covered]
    assert [one.value for one in values.values()] == pytest.approx([e.mean() for e in expected])
    assert [one.n for one in values.values()] == [60, 50, 60, 50]
    assert values["precision"].method == "Wilson"


def test_neighbours_are_looked_for_among_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixart.evaluation.metrics.neighbours.MOST", 40)
    ours, real = sets(60, 50)
    first = metric("precision-recall").compare(ours, real)
    assert first["precision"].n == first["recall"].n == 40
    order = np.random.default_rng(3).permutation(60)
    shuffled = Features([ours.keys[row] for row in order], ours.values[order])
    assert metric("precision-recall").compare(shuffled, real) == first


# Files of statistics


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "real"
    (folder / "in").mkdir(parents=True)
    rng = np.random.default_rng(5)
    for k in range(40):
        levels = rng.integers(0, 256, size=(16, 12, 3)).astype(np.uint8)
        Image.fromarray(levels).save(folder / ("in" if k % 2 else ".") / f"{k:02d}.png")
    return folder


def extractor(name: str = "mean-colours", salt: str = "") -> MeanColours:
    return MeanColours(name, context(), salt=salt)


def rows_of(folder: Path) -> np.ndarray:
    network = extractor()
    paths = sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())
    return network([network.prepare(Image.open(path), None) for path in paths])  # type: ignore[arg-type]


def test_statistics_are_kept_and_found_again(pictures: Path, tmp_path: Path) -> None:
    network, file = extractor(), tmp_path / "real.npz"
    assert write_statistics(pictures, [network], file) == 40 and network.released
    expected = moments_of(rows_of(pictures))
    (identity,) = read_statistics(file)
    assert identity == f"mean-colours-{network.digest}"
    found = statistics_for(file, network)
    assert isinstance(found, Moments) and (found.n, found.extractor) == (40, identity)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-15)
    with np.load(file) as stored:  # as pytorch-fid reads it
        assert stored["mu"].shape == (10,) and stored["sigma"].shape == (10, 10)
    before = file.read_bytes()
    write_statistics(pictures, [network], file)
    assert file.read_bytes() == before


def test_features_of_several_networks_are_kept_in_a_file(pictures: Path, tmp_path: Path) -> None:
    networks, file = [extractor(), extractor("other")], tmp_path / "real.npz"
    write_statistics(pictures, networks, file, keep_features=True)
    assert set(read_statistics(file)) == {f"{one.name}-{one.digest}" for one in networks}
    found = statistics_for(file, networks[1])
    assert isinstance(found, Features) and found.keys[0] == "00.png/0000"
    np.testing.assert_array_equal(found.values, rows_of(pictures))
    values = metric("kid").compare(features(rows_of(pictures)), found)
    # The same pictures: less than 0, as a picture's pair with itself counts between the sets only.
    assert values["kid"].value < 0


def test_statistics_of_another_network_are_refused(pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "real.npz"
    write_statistics(pictures, [extractor()], file)
    with pytest.raises(StatisticsError, match="other weights or another way of preparing"):
        statistics_for(file, extractor(salt="1"))
    with pytest.raises(StatisticsError, match="different networks or resizes cannot be compared"):
        statistics_for(file, extractor("inception-clean"))


def test_files_of_others_are_read_and_say_nothing_of_their_network(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 10))
    np.savez(tmp_path / "a.npz", mu=rows.mean(axis=0), sigma=np.cov(rows.T).astype(np.float32))
    found = statistics_for(tmp_path / "a.npz", extractor())
    assert isinstance(found, Moments) and found.n is None and found.extractor is None
    np.testing.assert_allclose(found.covariance, np.cov(rows.T), rtol=1e-6, atol=1e-7)
    np.savez_compressed(tmp_path / "b.npz", feats=rows.astype(np.float32))
    kept = statistics_for(tmp_path / "b.npz", extractor())
    assert isinstance(kept, Features) and kept.values.shape == (50, 10)
    assert read_statistics(tmp_path / "b.npz")[""].n == 50
    np.savez(tmp_path / "c.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(StatisticsError, match="must be 10 wide for mean-colours, got 3"):
        statistics_for(tmp_path / "c.npz", extractor())


HOSTILE = {
    "shapes": ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma \(d, d\).*got \(3,\) and \(4, 4\)"),
    "nan": ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "mu must be finite"),
    "integers": ({"mu": np.zeros(2, int), "sigma": np.eye(2)}, "mu must be of kind 'f'"),
    "no covariance": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 5], [5, 1]])}, "covariance"),
    "lop-sided": ({"mu": np.zeros(2), "sigma": np.array([[1.0, 0.5], [0, 1]])}, "covariance"),
    "half": ({"mu": np.zeros(2)}, "must have sigma beside mu"),
    "other": ({"arr_0": np.zeros(2)}, "must have mu and sigma, or feats, it has arr_0"),
    "objects": ({"mu": np.array([{}]), "sigma": np.eye(1)}, "mu must be of kind 'f', got object"),
    "count": ({"mu": np.zeros(2), "sigma": np.eye(2), "n": np.array([3])}, "n must be a number"),
    "few": ({"feats": np.zeros((1, 4), np.float32)}, r"feats must be \(n, d\)"),
    "keys": (
        {"features": np.zeros((3, 4), np.float32), "keys": np.array(["a"])},
        r"keys must be \(3,\), got \(1,\)",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    arrays, message = HOSTILE[name]
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(StatisticsError, match=message) as error:
        read_statistics(tmp_path / "x.npz")
    assert str(error.value).startswith(str(tmp_path / "x.npz")) and "\n" not in str(error.value)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """32 MB of nothing in 32 kB."""
    np.savez_compressed(tmp_path / "x.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    assert (tmp_path / "x.npz").stat().st_size < 2**16
    with pytest.raises(StatisticsError, match="sigma claims 33,554,432 bytes from"):
        read_statistics(tmp_path / "x.npz")


def test_what_is_no_archive_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\3\4 nonsense")
    with pytest.raises(StatisticsError, match=r"cannot be read as an .npz"):
        read_statistics(tmp_path / "x.npz")
    np.save(tmp_path / "y.npy", np.zeros(3))
    with pytest.raises(StatisticsError, match=r"cannot be read as an .npz"):
        read_statistics(tmp_path / "y.npy")
    with pytest.raises(StatisticsError, match="no such file"):
        read_statistics(tmp_path / "z.npz")


def test_statistics_need_pictures_that_can_be_read(pictures: Path, tmp_path: Path) -> None:
    (pictures / "00.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00\.png"):
        write_statistics(pictures, [extractor()], tmp_path / "real.npz")
    assert not (tmp_path / "real.npz").exists()
    with pytest.raises(ValueError, match="extractors must be at least one"):
        write_statistics(pictures, [], tmp_path / "real.npz")


# From a folder of pictures to numbers


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, Path]:
    """(Pictures of 40 prompts in two categories, prompts.jsonl), each with a real one in `pictures`."""
    rng = np.random.default_rng(6)
    lines = []
    for k in range(40):
        (tmp_path / "drawn" / f"{k:02d}").mkdir(parents=True)
        levels = rng.integers(0, 200, size=(16, 12, 3)).astype(np.uint8)
        Image.fromarray(levels).save(tmp_path / "drawn" / f"{k:02d}" / "0000.png")
        real = f"in/{k:02d}.png" if k % 2 else f"{k:02d}.png"
        line = {"id": f"{k:02d}", "prompt": "x", "category": "ab"[k % 2], "reference": real}
        lines.append(json.dumps(line))
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "drawn", tmp_path / "prompts.jsonl"


def test_sets_are_compared_from_folders_and_from_files(
    drawn: tuple[Path, Path], pictures: Path, tmp_path: Path
) -> None:
    images, prompts = drawn
    names = [name for name in NAMES if name != "fid-tf"]
    given = {"prompts": prompts, "options": {"features": "mean-colours"}}
    by_folder = evaluate(images, metrics=names, reference=pictures, **given)  # type: ignore[arg-type]
    write_statistics(pictures, [extractor()], tmp_path / "real.npz", keep_features=True)
    by_file = evaluate(images, metrics=names, reference=tmp_path / "real.npz", **given)  # type: ignore[arg-type]
    assert {name: one.mean for name, one in by_folder.values.items()} == {
        name: one.mean for name, one in by_file.values.items()
    }
    assert {"fid-clean", "kid", "precision", "cmmd", "fd-dinov2"} <= set(by_folder.values)
    assert by_folder.values["kid"].low > 0  # darker than the real ones
    # Every Fréchet distance has one of its own: none stands for another.
    for name in ("fid-clean", "fid-pytorch"):
        told = by_folder.results["metrics"][name]["values"]
        for number in ("fid-infinity", "kid-x1000"):
            assert by_folder.values[f"{number} of {name}"].mean == told[number]["value"]
    assert not {"fid-infinity", "kid-x1000"} & set(by_folder.values)


def test_categories_with_pictures_enough_are_compared_by_themselves(
    drawn: tuple[Path, Path], pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixart.evaluation.metrics.kernels.Kid.category_pictures", 20)
    options = {"features": "mean-colours"}
    found = evaluate(
        drawn[0], metrics=["kid", "cmmd"], prompts=drawn[1], reference=pictures, options=options
    )
    blocks = found.results["metrics"]
    assert set(blocks["kid"]["categories"]) == {"a", "b"}
    assert blocks["kid"]["categories"]["a"]["kid"]["n"] == 20
    assert blocks["kid"]["constants"]["category_pictures"] == 20
    assert "categories" not in blocks["cmmd"]  # 100 are wanted
