"""Which pictures show the same: copies are found, others are not, and hashing changes nothing of it."""

import io

import numpy as np
from pictures import encoded
from PIL import Image
from scenery import cut, scenery

from pixart.dataset.duplicates import find_groups, hashes, same, thumbnail


def test_different_pictures_are_not_duplicates_however_plain() -> None:
    """Colours, gradients, one thing on a ground at other places, and scenery."""
    plain = [Image.new("RGB", (64, 64), (40 * n, 255 - 40 * n, 128)) for n in range(6)]
    ramp = np.linspace(0, 255, 64).astype(np.uint8)[:, None].repeat(64, 1)
    plain += [Image.fromarray(np.rot90(ramp, turns)).convert("RGB") for turns in range(4)]
    for place in range(4, 50, 9):
        image = Image.new("RGB", (64, 64), "white")
        image.paste("black", (place, 20, place + 8, 28))
        plain.append(image)
    plain += [scenery(n) for n in range(20)]
    groups = find_groups(np.stack([thumbnail(image) for image in plain]))
    assert groups.tolist() == list(range(len(plain)))


def test_recompressed_plain_pictures_are_duplicates() -> None:
    for colour in ("white", "black", "red", "#808080"):
        image = Image.new("RGB", (100, 80), colour)
        file = Image.open(io.BytesIO(encoded(image, "JPEG", quality=30)))
        both = np.stack([thumbnail(image), thumbnail(file.resize((40, 30)))])
        assert find_groups(both).tolist() == [0, 0]


def test_groups_are_those_of_comparing_all_with_all() -> None:
    """The bands lose none whose hashes are near, and add none."""
    rng = np.random.default_rng(0)
    images = [scenery(n, 64, 48) for n in range(40)]
    images += [cut(images[n], *rng.uniform(0, 0.02, 4)) for n in range(40)]
    table = np.stack([thumbnail(image) for image in images])
    found = find_groups(table, at_once=7)
    every = hashes(table)
    ones, others = np.triu_indices(len(table), 1)
    near = [
        any(int(a ^ every[j, 0]).bit_count() <= 4 for a in every[i])
        or any(int(a ^ every[i, 0]).bit_count() <= 4 for a in every[j])
        for i, j in zip(ones, others, strict=True)
    ]
    expected = np.arange(len(table))
    alike = same(table[ones], table[others]) & np.array(near)
    for i, j in zip(ones[alike], others[alike], strict=True):
        expected[expected == max(expected[i], expected[j])] = min(expected[i], expected[j])
    assert found.tolist() == expected.tolist()
    assert (found[40:] == np.arange(40)).mean() >= 0.95
