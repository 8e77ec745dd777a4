"""A hundred thousand pictures are planned in memory that does not grow with what is known of them."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pixart.dataset import cleaning, measurement_store
from pixart.dataset.duplicates import SIDE, THUMBNAIL, find_groups
from pixart.dataset.expression import parse_rules
from pixart.dataset.samples import Item, Sample

LINE = {
    "width": 640, "height": 480, "megapixels": 0.3, "aspect": 1.3, "bytes": 9, "format": "PNG",
    "jpeg_quality": None, "entropy": 7.0, "sharpness": 50.0, "border": 0.0, "captions": 1,
    "words": 4, "letters": 0.9, "url": False, "html": False, "boilerplate": False,
    "phash": "0" * 16,
}  # fmt: skip


def listed(count: int) -> Iterator[Item]:
    def unread() -> bytes:
        raise OSError("only a sheet asks for it, and does without")

    for n in range(count):
        yield Sample(f"{n:06d}.png", f"/{n}.png", "1", unread, {"prompt": f"picture {n}"})


def thumbnails(count: int) -> Iterator[np.ndarray]:
    """Different ones; of the last tenth each is one of the first, saved again."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE)))
    falls = np.maximum(frequency, 1 / SIDE) ** -1.3
    first: list[np.ndarray] = []
    for n in range(count):
        if n >= count - count // 10:
            noise = rng.integers(-1, 2, THUMBNAIL)
            yield (first[n - (count - count // 10)] + noise).clip(0, 255).astype(np.uint8)
            continue
        waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) * falls).real
        light = (128 + 45 * waves / waves.std()).clip(0, 255).ravel()
        colours = rng.integers(100, 156, 2).repeat((THUMBNAIL - SIDE**2) // 2)
        made = np.concatenate([light, colours]).astype(np.uint8)
        if n < count // 10:
            first.append(made)
        yield made


def plan(folder: Path, count: int) -> tuple[str, int]:
    """What clean says of `count` pictures that are measured, and the most bytes of Python and NumPy."""
    rules = parse_rules("width >= 512 and not duplicate")
    with measurement_store.opened(folder / "clean", THUMBNAIL, lambda line: True) as known:
        for item, thumbnail in zip(listed(count), thumbnails(count), strict=True):
            assert isinstance(item, Sample)
            of = measurement_store.identity_of(item)
            known.add({"id": of, "path": item.key, **LINE}, thumbnail.tobytes())
    tracemalloc.start()
    said = cleaning.clean(lambda: listed(count), folder / "clean.jsonl", (), rules, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return said, peak


@pytest.mark.exhaustive
def test_a_hundred_thousand_pictures_are_planned_in_little_memory(tmp_path: Path) -> None:
    count = 100_000
    said, peak = plan(tmp_path, count)
    assert f"0 pictures measured, {count} before, 0 rejected, 10000 duplicates" in said
    assert "| not duplicate |  100,000 |".replace("  ", " ") in said.replace("  ", " ")
    # 500 MB of lines and thumbnails lie in files.
    assert peak < 256 * 2**20


def test_planning_measures_no_picture_that_is_known(tmp_path: Path) -> None:
    said, _ = plan(tmp_path, 300)
    assert "0 pictures measured, 300 before, 0 rejected, 30 duplicates" in said


def test_thousands_of_one_colour_are_one_group_and_others_are_not() -> None:
    plain = np.zeros((3000, THUMBNAIL), np.uint8)
    plain[:, : SIDE**2] = 255
    plain[:, SIDE**2 :] = 128
    plain[2000:, : SIDE**2] = (np.arange(1000) % 60 * 4)[:, None]
    assert len(set(find_groups(plain))) == 61
