"""What is asked of processes that share the tokens of pictures, and what a dry run says of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixart.config import KVCompression, PixArtConfig
from pixart.train import main as train
from pixart.training import parallel, plan
from pixart.training.batch import part_problems
from pixart.training.parallel import groups, own, sequence_problems, sharing_problems
from pixart.training.plan import exchanged_bytes, memory_of
from pixart.training.stage import Batch, Stage

SHARED = Stage("a", parallel="fsdp+sequence", sequence=4)
XL = PixArtConfig(kv_compression=KVCompression(tuple(range(14, 28)), 2))


def among(monkeypatch: pytest.MonkeyPatch, world: int, rank: int = 0) -> None:
    for module in (parallel, plan):
        monkeypatch.setattr(module, "world_size", lambda: world)
    monkeypatch.setattr(parallel, "rank", lambda: rank)


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"parallel": "fsdp"},
            4,
            "sequence is for parallel fsdp+sequence only, got 4 with fsdp",
        ),
        (
            {"parallel": "ddp", "sequence": 2},
            1,
            "sequence is for parallel fsdp+sequence only, got 2 with ddp",
        ),
        ({"sequence": 1}, 4, "sequence must be at least 2 with parallel fsdp+sequence, got 1; "),
        ({}, 6, "sequence must divide the number of processes, 6, got 4; start 4, or "),
        ({}, 2, "sequence must divide the number of processes, 2, got 4; "),
        ({}, 1, "sequence must divide the number of processes, 1, got 4; "),
    ],
)
def test_processes_that_cannot_be_grouped_are_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], world: int, message: str
) -> None:
    among(monkeypatch, world)
    [line] = sequence_problems(replace(SHARED, **changes))
    assert line.startswith(message) and "\n" not in line


@pytest.mark.parametrize("sequence", [0, -2, 2**16 + 1])
def test_a_number_that_is_none_of_processes_is_refused(sequence: int) -> None:
    with pytest.raises(ValueError, match="sequence must be "):
        replace(SHARED, sequence=sequence)


def test_those_of_a_group_take_the_same_part(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for rank in range(8):
        among(monkeypatch, 8, rank)
        assert groups(SHARED) == 2 and not list(sequence_problems(SHARED))
        taken.append(own(list("abcdef"), SHARED))
    assert taken == [list("abc")] * 4 + [list("def")] * 4
    alone = replace(SHARED, parallel="fsdp", sequence=1)
    assert groups(alone) == 8 and own(list(range(16)), alone) == [14, 15]


@pytest.mark.parametrize(
    ("sequence", "sizes", "message"),
    [
        (17, [(4096, 4096)], "sequence must be at most the 16 heads of the model's attention, got"),
        (16, [(1024, 1024), (480, 2048)], "sequence must suit all pictures, got 16 and 480×2048: "),
        (
            5,
            [(128, 128)],
            "sequence must suit all pictures, got 5 and 128×128: a picture of 8 rows",
        ),
    ],
)
def test_more_than_heads_or_rows_are_refused(
    sequence: int, sizes: list[tuple[int, int]], message: str
) -> None:
    [line] = sharing_problems(replace(SHARED, sequence=sequence), XL, sizes)
    assert line.startswith(message) and "\n" not in line
    assert not list(sharing_problems(SHARED, XL, sizes))


@pytest.mark.parametrize("trains", ["autoencoder", "decoder", "text_encoder", "clip"])
def test_parts_without_tokens_of_a_picture_are_refused(trains: str) -> None:
    [line] = part_problems(replace(SHARED, trains=trains))
    assert line.startswith(f"parallel must be ddp or fsdp where trains is {trains}, got ")
    assert "only a transformer has tokens of a picture to share" in line
    assert not list(part_problems(replace(SHARED, trains=trains, parallel="fsdp")))


def test_a_batch_is_shared_by_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    among(monkeypatch, 8)
    assert Batch(images=6).of(65536, groups(SHARED)) == 6
    with pytest.raises(
        ValueError, match="multiple of processes / sequence × batch.acc.*, 2, got 5"
    ):
        Batch(images=5).unit(groups(SHARED))


def test_what_is_refused_is_refused_before_anything_is_written(tmp_path: Path, capsys: Any) -> None:
    command = ["shapes-kv", "--output", str(tmp_path / "run"), "--device", "cpu", "--parallel"]
    for dry in ([], ["--dry-run"]):
        assert train([*command, "fsdp+sequence", "--sequence", "3", *dry]) == 2
        line = capsys.readouterr().err.strip()
        assert line.endswith(
            "sequence must divide the number of processes, 1, got 3; start 3, or a multiple of it, by "
            "torchrun or launch.sh"
        )
    assert train([*command, "fsdp", "--sequence", "3"]) == 2
    assert "sequence is for parallel fsdp+sequence only" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_the_mesh_and_what_is_exchanged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    among(monkeypatch, 4)
    command = ["shapes-kv", "--output", str(tmp_path / "run"), "--device", "cpu", "--dry-run"]
    assert train([*command, "--parallel", "fsdp+sequence", "--sequence", "2"]) == 0
    told = capsys.readouterr().out
    assert "mesh: 2 × 2 processes" in told and "computed (forward and backward)" in told
    [head, row] = [line.split() for line in told.splitlines() if "exchanged" in line[-12:]] + [
        line.split() for line in told.splitlines() if line.strip().startswith("256×256")
    ]
    # Six blocks that gather 64 keys and values, and the prediction, there and back; four pictures of the
    # eight are this group's.
    width = 216
    expected = 4 * 2 * (6 * 2 * 64 / 2 * width + 256 / 2 * 16) * 2
    assert head[-1] == "exchanged" and float(row[-1]) == pytest.approx(expected / 2**30, rel=1e-2)


def test_shared_tokens_take_their_part_of_memory_and_of_the_wire() -> None:
    stage = replace(SHARED, resolution=4096).resolved()
    alone = replace(stage, parallel="fsdp", sequence=1)
    grid, weights = (256, 256), 611_000_000
    tokens = grid[0] * grid[1]
    shared = memory_of(stage, XL, weights, weights, tokens // 4, 8)
    assert shared < memory_of(alone, XL, weights, weights, tokens, 8)
    assert exchanged_bytes(alone, XL, grid) == 0
    # 2.38 GB a forward by the table of volumes; three passes where blocks are computed again.
    passes = (
        exchanged_bytes(stage, XL, grid),
        exchanged_bytes(replace(stage, checkpoint_blocks=0), XL, grid),
    )
    assert passes[0] == pytest.approx(3 * 2.38e9, rel=1e-2)
    assert passes[1] == pytest.approx(2 * 2.38e9, rel=1e-2)
