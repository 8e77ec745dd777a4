"""What is drawn beside what is kept: in its tone, so that no line shows where they meet."""

import numpy as np

from pixart.pipeline.masks import TONE, matched


def plain(*levels: int, side: int = 160) -> np.ndarray:
    return np.full((side, side, 3), levels, np.uint8)


def half(side: int = 160) -> np.ndarray:
    kept = np.zeros((side, side), bool)
    kept[:, : side // 2] = True
    return kept


def test_a_drawn_ground_takes_the_tone_of_the_kept_one_at_the_border_and_its_own_far_away() -> None:
    toned = matched(plain(198, 101, 50), plain(200, 100, 50), half())
    np.testing.assert_allclose(toned[:, 80], np.broadcast_to([200, 100, 50], (160, 3)), atol=1e-3)
    np.testing.assert_array_equal(
        toned[:, 80 + 2 * TONE :], plain(198, 101, 50)[:, 80 + 2 * TONE :]
    )
    between = toned[80, 80 : 80 + 2 * TONE, 0]
    assert (np.diff(between) <= 1e-4).all() and (np.abs(np.diff(between)) < 0.2).all()


def test_something_else_than_what_is_kept_lends_it_no_tone() -> None:
    drawn, own = plain(200, 200, 200), plain(200, 200, 200)
    own[40:120, 60:80] = (40, 75, 215)  # a thing that was drawn over
    np.testing.assert_array_equal(matched(drawn, own, half()), drawn)
    np.testing.assert_array_equal(matched(drawn, plain(0, 0, 0), half()), drawn)


def test_what_is_drawn_does_not_matter_to_its_own_tone() -> None:
    drawn, own = plain(198, 198, 198), plain(200, 200, 200)
    own[:, 80:] = 90  # what a mask covers, or the border of an outpainting
    np.testing.assert_allclose(matched(drawn, own, half())[:, 80], 200, atol=1e-3)
    nothing = np.zeros((160, 160), bool)
    np.testing.assert_array_equal(matched(drawn, own, nothing), drawn)


def test_tones_stay_within_8_bits_and_small_pictures_have_one() -> None:
    toned = matched(plain(250, 1, 250, side=16), plain(255, 0, 255, side=16), half(16))
    assert toned.min() >= 0 and toned.max() <= 255
    np.testing.assert_allclose(toned[:, 8], np.broadcast_to([255, 0, 255], (16, 3)), atol=1e-3)
