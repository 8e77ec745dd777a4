"""Features as batches: which caption is drawn, how a batch is padded, what is refused."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from pixart.dataset.batches import FeatureDataset
from pixart.dataset.features import FORMAT, ShardStore
from pixart.files import write_bytes
from pixart.locks import claimed

CAPTIONS = {"prompt": 3, "long": 7, "synthetic.1": 2, "synthetic.2": 4}  # name: tokens
WIDE, TALL = (64, 128), (128, 64)


def prepared(directory: Path, lacking: tuple[str, ...] = (), resolution: int = 96) -> Path:
    """Three wide samples and a tall one; the first lacks some captions."""
    tensors, samples = {}, []
    for number, bucket in enumerate([WIDE, WIDE, WIDE, TALL]):
        latent = (4, bucket[0] // 8, bucket[1] // 8)
        tensors[f"{number}.mean"] = torch.full(latent, float(number))
        tensors[f"{number}.std"] = torch.full(latent, 0.5, dtype=torch.float16)
        names = [name for name in CAPTIONS if number or name not in lacking]
        for name in names:
            tensors[f"{number}-{name}"] = torch.full((CAPTIONS[name], 6), 10.0 * number + 1)
        captions = {name: ["s", f"{number}-{name}"] for name in names}
        samples.append(
            {"path": f"{number}.png", "size": [70, 140], "bucket": bucket,
             "image": ["s", str(number)], "captions": captions}
        )  # fmt: skip
    store = ShardStore(directory / "features")
    store.add(tensors)
    text = json.dumps(samples).replace('"s"', f'"{store.shard_of("0.mean")}"')
    index = {"format": FORMAT, "vae": {"scaling_factor": 0.5}, "samples": json.loads(text)}
    write_bytes(directory / f"index-{resolution}.json", json.dumps(index).encode())
    return directory


def lengths(data: FeatureDataset, weights: dict[str, float] | None, draws: int = 2000) -> Counter:
    rng = Random(0)
    return Counter(int(data.batch([0], rng, weights).mask.sum()) for _ in range(draws))


def test_a_batch_holds_what_was_stored_padded_behind(tmp_path: Path) -> None:
    data = FeatureDataset(prepared(tmp_path))
    assert len(data) == 4 and data.buckets == [WIDE, WIDE, WIDE, TALL]
    assert data.caption_names == sorted(CAPTIONS) and data.scaling_factor == 0.5
    batch = data.batch([2, 0, 1], Random(3))
    assert len(batch) == 3 and batch.mean.shape == (3, 4, 8, 16) == batch.std.shape
    assert batch.mean[:, 0, 0, 0].tolist() == [2, 0, 1]
    assert batch.std.dtype == torch.float32 and batch.std.eq(0.5).all()
    counts = batch.mask.sum(1)
    assert set(counts.tolist()) <= set(CAPTIONS.values()) and batch.mask.shape[1] == counts.max()
    for features, mask, number in zip(batch.features, batch.mask, (2, 0, 1), strict=True):
        assert features[mask].eq(10 * number + 1).all() and features[~mask].eq(0).all()
        assert mask[: mask.sum()].all()
    assert batch.size.tolist() == [[70, 140]] * 3 and batch.aspect_ratio.tolist() == [[0.5]] * 3
    assert batch.to("cpu").mask.dtype == torch.bool


def test_captions_are_drawn_by_their_weights(tmp_path: Path) -> None:
    data = FeatureDataset(prepared(tmp_path))
    drawn = lengths(data, {"long": 60, "prompt": 40})
    assert set(drawn) == {7, 3} and 0.57 < drawn[7] / 2000 < 0.63
    drawn = lengths(data, {"prompt": 0.5, "synthetic": 0.5})  # shared by synthetic.1 and .2
    assert set(drawn) == {3, 2, 4}
    assert 0.47 < drawn[3] / 2000 < 0.53 and 0.22 < drawn[2] / 2000 < 0.28
    assert set(lengths(data, {"synthetic": 1, "synthetic.2": 0})) == {2}
    assert set(lengths(data, None)) == {2, 3, 4, 7}


def test_the_same_numbers_draw_the_same_captions(tmp_path: Path) -> None:
    data = FeatureDataset(prepared(tmp_path))
    one, two = (data.batch([0, 1, 2], Random("5/6")) for _ in range(2))
    assert torch.equal(one.features, two.features)


def test_a_missing_caption_leaves_its_weight_to_the_others(tmp_path: Path) -> None:
    data = FeatureDataset(prepared(tmp_path, lacking=("long", "synthetic.1")))
    assert set(lengths(data, {"long": 60, "prompt": 40}, 50)) == {3}
    assert set(lengths(data, {"synthetic": 1}, 50)) == {4}
    with pytest.raises(ValueError, match=r"caption of every sample, got .*for 0.png, which has"):
        data.batch([0], Random(0), {"long": 1})
    with pytest.raises(ValueError, match="caption of every sample"):
        data.check_captions({"long": 1})
    with pytest.raises(ValueError, match="got lnog"):
        data.check_captions({"prompt": 1, "lnog": 1})
    data.check_captions({"long": 60, "prompt": 40})


def test_what_cannot_be_a_batch_is_refused(tmp_path: Path) -> None:
    data = FeatureDataset(prepared(tmp_path))
    with pytest.raises(ValueError, match="indices must be of one bucket"):
        data.batch([0, 3], Random(0))
    with pytest.raises(ValueError, match="must name captions of the data .*got lnog"):
        data.batch([0], Random(0), {"lnog": 1})
    with pytest.raises(ValueError, match="must not be negative"):
        data.batch([0], Random(0), {"long": -1})


def test_a_resolution_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    prepared(tmp_path)
    prepared(tmp_path, resolution=512)
    with pytest.raises(ValueError, match="index-512.json, index-96.json; name a resolution"):
        FeatureDataset(tmp_path)
    assert len(FeatureDataset(tmp_path, 512)) == 4
    with pytest.raises(ValueError, match="must be prepared at 1024 px"):
        FeatureDataset(tmp_path, 1024)


def test_a_directory_without_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run prepare to its end"):
        FeatureDataset(tmp_path)
    empty = {"format": FORMAT, "vae": {"scaling_factor": 1}, "samples": []}
    (tmp_path / "index-64.json").write_text(json.dumps(empty))
    with pytest.raises(ValueError, match="at least one sample"):
        FeatureDataset(tmp_path)
    (tmp_path / "index-64.json").write_text(json.dumps(empty | {"format": 0}))
    with pytest.raises(ValueError, match="must have format"):
        FeatureDataset(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (shard,) = (prepared(tmp_path) / "features").iterdir()
    shard.write_bytes(b"nonsense")
    data = FeatureDataset(tmp_path)
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        data.batch([0], Random(0))
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        ShardStore(tmp_path / "features").refresh()


def test_stores_learn_of_each_others_files(tmp_path: Path) -> None:
    one, two = ShardStore(tmp_path), ShardStore(tmp_path)
    one.add({"a": torch.zeros(2)})
    assert two.shard_of("a") is None
    two.refresh()
    assert two.shard_of("a") == one.shard_of("a") is not None


def test_a_claim_is_held_by_one_and_waited_for(tmp_path: Path) -> None:
    with claimed(tmp_path / "c.lock", wait=False) as first:
        with claimed(tmp_path / "c.lock", wait=False) as second:
            assert first and not second
        assert (tmp_path / "c.lock").exists()
    with claimed(tmp_path / "c.lock", wait=True) as third:
        assert third
