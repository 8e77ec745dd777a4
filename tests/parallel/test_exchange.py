"""Pictures whose tokens are shared among 2, 3 and 4 processes, against the same on one."""

from typing import Any

import pytest
from forked import lines_of

from pixart.config import KVCompression, PixArtConfig
from pixart.model.exchange import gathers, layer_bytes, rows_together, split_rows

PROCESSES = (2, 3, 4)


@pytest.fixture(scope="module")
def found() -> dict[tuple[int, str], dict[str, Any]]:
    """What each case found, by processes and name."""
    lines = lines_of("exchange_cases.py", *map(str, PROCESSES))
    return {(line["processes"], line["case"]): line for line in lines}


def _of(found: dict[tuple[int, str], dict[str, Any]], count: int, kind: str) -> list[Any]:
    lines = [line for (processes, _), line in found.items() if processes == count]
    is_kind = {
        "trained": lambda case: case.startswith("trained"),
        "broken": lambda case: case.startswith("broken"),
        "drawn": lambda case: not case.startswith(("trained", "broken")),
    }[kind]
    return [line for line in lines if is_kind(line["case"])]


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
def test_predictions_are_those_of_one_process(found: Any, count: int) -> None:
    lines = _of(found, count, "drawn")
    assert len(lines) > 20
    assert all(line["error"] <= 1e-5 for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
def test_losses_and_gradients_are_those_of_one_process(found: Any, count: int) -> None:
    lines = _of(found, count, "trained")
    assert len(lines) == 5 and all(line["tensors"] > 60 for line in lines)
    assert all(line["error"] <= 1e-5 for line in lines), lines


@pytest.mark.slow
@pytest.mark.parametrize("count", PROCESSES)
def test_an_exchange_that_loses_what_others_send_is_found_out(found: Any, count: int) -> None:
    lines = _of(found, count, "broken")
    assert {line["case"] for line in lines} == {"broken gather", "broken swap"}
    assert all(line["error"] > 1e-2 for line in lines), lines


@pytest.mark.slow
def test_each_layer_goes_the_cheaper_way(found: Any) -> None:
    ways = {
        (count, name): found[count, f"{name}, 32x32, batch 1"]["ways"]
        for count in PROCESSES
        for name in ("dense", "R2", "mixed", "dense of 2 heads")
    }
    for count in PROCESSES:
        assert ways[count, "dense"] == "hhh" and ways[count, "R2"] == "ggg"
        assert ways[count, "mixed"] == "hgh"
        # Where the processes do not divide the heads, no exchange of them is possible.
        assert ways[count, "dense of 2 heads"] == ("hhh" if count == 2 else "ggg")


@pytest.mark.parametrize(("ratio", "most"), [(2, 4), (3, 9), (4, 16)], ids=["R2", "R3", "R4"])
def test_merged_keys_are_gathered_up_to_as_many_processes_as_merged_tokens(
    ratio: int, most: int
) -> None:
    tokens = 144 * 144
    keys = tokens // ratio**2
    ways = [gathers(tokens, keys, heads=720720, processes=count) for count in range(2, 17)]
    assert ways == [count <= most for count in range(2, 17)]


@pytest.mark.parametrize("processes", range(2, 9))
@pytest.mark.parametrize("ratio", [1, 2, 3, 4])
def test_the_way_that_is_taken_receives_less(processes: int, ratio: int) -> None:
    compression = KVCompression((0,), ratio) if ratio > 1 else None
    config = PixArtConfig(hidden_size=840, num_heads=840, depth=1, kv_compression=compression)
    grid = (144, 144)
    gather, heads = layer_bytes(config, 0, grid, processes, itemsize=2)
    keys = 144 * 144 // ratio**2
    assert gathers(144 * 144, keys, heads=840, processes=processes) == (gather < heads)


def test_volumes_are_those_of_the_sizes() -> None:
    """XL/2 at 4096 px in bf16, dense, on two: 28 layers of 4 tensors of half the tokens, half of each."""
    gather, heads = layer_bytes(PixArtConfig(), 0, (256, 256), processes=2, itemsize=2)
    assert 28 * heads == 28 * 4 * (65536 / 2) / 2 * 1152 * 2 == pytest.approx(4.23e9, rel=1e-3)
    assert gather == heads


@pytest.mark.parametrize(
    ("rows", "processes", "multiple", "sizes"),
    [
        (256, 4, 4, [64, 64, 64, 64]),
        (135, 4, 2, [34, 34, 34, 33]),
        (9, 4, 1, [3, 2, 2, 2]),
        (13, 4, 4, [4, 4, 4, 1]),
        (5, 1, 4, [5]),
    ],
)
def test_rows_are_shared_in_whole_patches(
    rows: int, processes: int, multiple: int, sizes: list[int]
) -> None:
    parts = split_rows(rows, processes, multiple)
    assert [part.stop - part.start for part in parts] == sizes
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))


def test_a_process_without_rows_is_refused() -> None:
    with pytest.raises(
        ValueError, match="12 rows of tokens, 4 of them together.* at most 3 .* got 4"
    ):
        split_rows(12, 4, 4)


def test_rows_that_stay_together_suit_every_ratio() -> None:
    ratios = (KVCompression((0,), ratio) for ratio in (2, 3))
    assert rows_together([None, *ratios]) == 6
    assert rows_together([None]) == 1
