"""What is drawn beside what is kept: in its tone, so that no line shows where they meet."""

import numpy as np
import torch

from pixart.pipeline.editing import Canvas, to_unit
from pixart.pipeline.masks import SAME, faded, matched, spread


def plain(*levels: int, side: int = 160) -> np.ndarray:
    return np.full((side, side, 3), levels, np.uint8)


def half(side: int = 160) -> np.ndarray:
    kept = np.zeros((side, side), bool)
    kept[:, : side // 2] = True
    return kept


def toned(drawn: np.ndarray, own: np.ndarray, kept: np.ndarray) -> np.ndarray:
    result = matched(to_unit(drawn), to_unit(own), torch.from_numpy(kept)[None, None])
    return ((result[0].permute(1, 2, 0) + 1) * 127.5).numpy()


def test_a_drawn_ground_takes_the_tone_of_the_kept_one() -> None:
    found = toned(plain(198, 101, 50), plain(200, 100, 50), half())
    np.testing.assert_allclose(found, plain(200, 100, 50), atol=1e-3)


def test_a_tone_that_changes_along_the_border_is_taken_place_by_place_and_far_off_as_a_mean() -> (
    None
):
    own = plain(200, 200, 200)
    own[:80] = 196
    found = toned(plain(198, 198, 198), own, half())[..., 0]
    np.testing.assert_allclose(found[20, 80:84], 196, atol=0.2)
    np.testing.assert_allclose(found[140, 80:84], 200, atol=0.2)
    assert abs(found[20, -1] - found[140, -1]) < 3
    assert np.abs(np.diff(found[:, 80:], axis=1)).max() < 1, "no line where it changes"


def test_something_else_than_what_is_kept_lends_it_no_tone() -> None:
    drawn, own = plain(200, 200, 200), plain(200, 200, 200)
    own[40:120, 60:80] = (40, 75, 215)  # a thing that was drawn over
    np.testing.assert_allclose(toned(drawn, own, half()), drawn, atol=1e-3)
    np.testing.assert_allclose(toned(drawn, plain(199 - SAME, 0, 0), half()), drawn, atol=1e-3)


def test_what_is_drawn_does_not_matter_to_its_own_tone() -> None:
    drawn, own = plain(198, 198, 198), plain(200, 200, 200)
    own[:, 80:] = 90  # what a mask covers, or the border of an outpainting
    np.testing.assert_allclose(toned(drawn, own, half()), plain(200, 200, 200), atol=1e-3)
    nothing = np.zeros((160, 160), bool)
    np.testing.assert_allclose(toned(drawn, own, nothing), drawn, atol=1e-3)


def test_what_is_kept_is_the_files_own_to_the_bit_and_what_is_drawn_stays_within_8_bits() -> None:
    rng = np.random.default_rng(1)
    own = rng.integers(0, 256, (37, 51, 3), np.uint8)
    mask = rng.choice([0, 0, 128, 255], (37, 51)).astype(np.uint8)
    drawn = torch.from_numpy(rng.normal(0, 2, (1, 3, 48, 64)).astype(np.float32))
    found = np.asarray(Canvas(own, mask).compose(drawn))
    assert found.shape == own.shape
    np.testing.assert_array_equal(found[mask == 0], own[mask == 0])


def test_what_is_spread_goes_on_from_what_is_known() -> None:
    values, known = torch.zeros(1, 1, 33, 41), torch.zeros(1, 1, 33, 41)
    values[..., :10], values[..., 10:] = 5.0, torch.nan
    known[..., :10] = 1
    found = spread(values.nan_to_num(1e6), known)
    torch.testing.assert_close(found, torch.full_like(found, 5.0))


def test_a_fade_is_as_wide_as_asked_and_never_leaves_a_mask_of_which_nothing_is_seen() -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[:, 20:] = 255
    ramp = faded(mask, 8)[0]
    np.testing.assert_array_equal(ramp[:20], 0)
    np.testing.assert_array_equal(ramp[20:29], np.ceil(np.arange(1, 10) / 9 * 255))
    np.testing.assert_array_equal(ramp[28:], 255)
    np.testing.assert_array_equal(faded(mask, 1024)[0, 20:], np.ceil(np.arange(1, 41) / 40 * 255))
    one = np.zeros((40, 60), np.uint8)
    one[7, 9] = 200  # of which a fade of 1024 pixels would leave a level of 1
    np.testing.assert_array_equal(faded(one, 1024), one)
    assert (faded(255 - mask, 1024) > 0).sum() == (mask == 0).sum()
