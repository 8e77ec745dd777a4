"""Steps at which blocks are not computed, as text, and how often they are."""

import pytest

from pixart.config import PixArtConfig
from pixart.plans.reuse import BlockReuse

CONFIG = PixArtConfig(hidden_size=16, num_heads=2, depth=4, caption_channels=8, model_max_length=4)


@pytest.mark.parametrize(
    "text, first, steps, said",
    [
        ("1:3", 1, (3,), "1:3"),
        (" 2 : 9, 3,5-7 ", 2, (3, 5, 6, 7, 9), "2:3,5-7,9"),
        ("1:3-9/2,4", 1, (3, 4, 5, 7, 9), "1:3-5,7,9"),
        ("1:3-10/2", 1, (3, 5, 7, 9), "1:3,5,7,9"),
        ("3:5,5,5-5", 3, (5,), "3:5"),
    ],
)
def test_text_is_read_and_written_in_one_form(text, first, steps, said):
    found = BlockReuse.parse(text)
    assert (found.first, found.steps, str(found)) == (first, steps, said)
    assert BlockReuse.parse(said) == found


@pytest.mark.parametrize(
    "text",
    [
        "", "3", ":3", "1:", "1:,", "0:3", "1:1", "1:0", "1:1-5", "1:5-3", "1:3-9/0", "1:1001", "-1:3",
        "1:3;5", "1:3.5", "1:3/2", "a:b", "1:²", "1:3\n\n:", "1:" + "3," * 6000,
    ],
)  # fmt: skip
def test_what_says_no_steps_is_refused_in_a_line(text):
    with pytest.raises(ValueError, match="^reuse_blocks must") as caught:
        BlockReuse.parse(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_more_blocks_or_steps_than_there_are_is_refused():
    BlockReuse.parse("3:20").check(CONFIG, 20)
    with pytest.raises(ValueError, match="fewer than the 4 blocks of this model, got 4"):
        BlockReuse.parse("4:5").check(CONFIG, 20)
    with pytest.raises(ValueError, match="of steps from 2 to 19, got 20"):
        BlockReuse.parse("1:20").check(CONFIG, 19)


def test_a_half_of_guidance_that_was_not_evaluated_before_is_computed_whole():
    blocks = BlockReuse.parse("1:2,4,5").counter(4)
    one, both = ("conditional",), ("conditional", "unconditional")
    calls = [(1, one), (2, one), (3, one), (4, both), (5, both), (6, one)]
    assert [blocks(*call) for call in calls] == [4, 1, 4, 4, 1, 4]
