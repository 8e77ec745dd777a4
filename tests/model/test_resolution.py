import math

import pytest
import torch

from pixart.resolution import (
    ASPECT_RATIOS,
    RESOLUTIONS,
    aspect_ratios,
    nearest_bucket,
    position_embedding,
    position_scale,
    resolve_size,
)

# Lines of the table that the official implementation computes for a 88 x 92 grid at 2048 px: the
# values at channels 0, 1, 100, 288, 400, 576, 577, 700, 864 and 1151 of full-width rows.
OFFICIAL_CHANNELS = [0, 1, 100, 288, 400, 576, 577, 700, 864, 1151]
# fmt: off
OFFICIAL = {
    (1, 34): [-0.6744973, -0.8968086, 0.4644431, 0.7382773, 0.946344,
              0.3556752, 0.3449553, 0.00689353, 0.9346097, 1],
    (43, 76): [0.9641021, 0.4529062, 0.8817973, 0.2655318, 0.7414528,
               0.07153813, 0.5343548, 0.2921022, -0.9974379, 0.9999987],
    (87, 60): [0.9007888, 0.9785195, 0.7528378, -0.4342574, 0.8360744,
               0.2186565, -0.6999287, 0.5644294, 0.9758019, 0.9999946],
}
# fmt: on


def angle(index: int, length: int, base_size: int, scale: float, k: int, dim: int) -> float:
    return index / (length / base_size) / scale * 10000.0 ** (-4 * k / dim)


def test_position_table_holds_sines_then_cosines_of_the_column_then_of_the_row():
    table = position_embedding(16, (3, 5), 4, 0.5).reshape(3, 5, 16)
    for row, col, k in [(0, 0, 0), (2, 1, 0), (1, 4, 3), (2, 3, 2)]:
        x, y = angle(col, 5, 4, 0.5, k, 16), angle(row, 3, 4, 0.5, k, 16)
        expected = torch.tensor([math.sin(x), math.cos(x), math.sin(y), math.cos(y)])
        torch.testing.assert_close(table[row, col, [k, 4 + k, 8 + k, 12 + k]], expected)


def test_position_table_equals_the_official_one_at_full_width():
    table = position_embedding(1152, (88, 92), 128, 4.0).reshape(88, 92, 1152)
    for (row, col), values in OFFICIAL.items():
        line = table[row, col, OFFICIAL_CHANNELS]
        torch.testing.assert_close(line, torch.tensor(values), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("grid", [(64, 64), (48, 84), (16, 16), (135, 240), (256, 256)])
def test_coordinates_span_the_trained_range_whatever_the_grid(grid):
    # Channels 0 and 2 are the sine and cosine of the column coordinate, 4 and 6 those of the row.
    for resolution, family, span in [(1024, "sigma", 32), (256, "sigma", 32), (256, "alpha", 16)]:
        scale = position_scale(resolution, family)
        table = position_embedding(8, grid, resolution // 16, scale).reshape(*grid, 8)
        for channel, line in [(0, table[0]), (4, table[:, 0])]:
            steps = torch.atan2(line[:, channel], line[:, channel + 2]).diff() % (2 * math.pi)
            # The coordinate that would come after the last one closes the range.
            assert (steps.sum() * len(line) / (len(line) - 1)).item() == pytest.approx(
                span, rel=1e-3
            )


def test_position_scale_follows_the_released_models():
    assert [position_scale(side) for side in (256, 512, 1024, 2048)] == [0.5, 1.0, 2.0, 4.0]
    assert [position_scale(side, "alpha") for side in (256, 512, 1024)] == [1.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="family must be"):
        position_scale(512, "delta")


def test_position_table_ignores_the_default_device_and_dtype():
    with torch.device("meta"):
        table = position_embedding(8, (2, 2), 2, 1.0)
    assert table.device.type == "cpu" and table.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, (2, 2), 2, 1.0), "dim must be a positive multiple of 4, got 10"),
        ((8, (0, 2), 2, 1.0), r"grid must have at least one row .* got \(0, 2\)"),
        ((8, (2, 2), 0, 1.0), "base_size and pe_interpolation must be positive"),
        ((8, (2, 2), 2, 0.0), "base_size and pe_interpolation must be positive"),
    ],
)
def test_position_table_refuses_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        position_embedding(*arguments)


@pytest.mark.parametrize("resolution", ASPECT_RATIOS)
def test_published_tables_have_forty_buckets_of_about_the_same_area(resolution):
    table = ASPECT_RATIOS[resolution]
    # Measured on the published tables: 231 to 256 of 256 tokens, and 22 x 90 for the label 4.0.
    largest_gap = 0.1 if resolution == 2880 else 0.006
    assert len(table) == 40 and table[1.0] == (resolution, resolution)
    assert list(table) == sorted(table)
    for label, (height, width) in table.items():
        assert 0.87 <= height * width / resolution**2 <= 1
        assert height % 16 == width % 16 == 0
        assert abs(label - height / width) < largest_gap


@pytest.mark.parametrize(
    ("resolution", "label", "size"),
    [
        (256, 0.94, (240, 256)),
        (512, 0.57, (384, 672)),
        (1024, 0.25, (512, 2048)),
        (1024, 0.52, (704, 1344)),
        (2048, 4.0, (4096, 1024)),
        (2880, 0.55, (2112, 3840)),
        (2880, 4.0, (5760, 1408)),
        (4096, 1.67, (5120, 3072)),
    ],
)
def test_published_buckets(resolution, label, size):
    assert ASPECT_RATIOS[resolution][label] == size


def test_nearest_bucket_goes_by_the_published_label_on_a_linear_scale():
    assert nearest_bucket(9, 16, 1024) == (768, 1344)
    assert nearest_bucket(1, 1, 512) == (512, 512)
    # 4.02 is nearer to 87:22 = 3.955 than to 90:22 = 4.091, but the label of 90:22 is 4.0.
    assert nearest_bucket(4.02, 1, 2880) == (5760, 1408)
    # 0.30 is the linear middle of 0.28 and 0.32; 0.2995 is nearer to 0.32 on a logarithmic scale.
    assert nearest_bucket(0.2995, 1, 1024) == (512, 1856)
    # Far outside the tables, the ends.
    assert nearest_bucket(1, 100, 256) == (128, 512)


@pytest.mark.parametrize(("resolution", "multiple"), [(128, 16), (768, 16), (256, 32), (1000, 8)])
def test_resolutions_without_a_table_get_a_scaled_one_of_valid_sizes(resolution, multiple):
    table = aspect_ratios(resolution, multiple)
    assert len(set(table.values())) == len(table) > 20
    for ratio, (height, width) in table.items():
        assert height % multiple == width % multiple == 0 and min(height, width) > 0
        assert ratio == height / width
        assert 0.8 < height * width / resolution**2 < 1.25


def test_tables_that_fit_the_multiple_are_the_published_ones():
    assert aspect_ratios(1024) is ASPECT_RATIOS[1024]
    assert aspect_ratios(1024, 64) is ASPECT_RATIOS[1024]


@pytest.mark.parametrize(
    ("request_", "height", "width", "note"),
    [
        ({}, 1024, 1024, "1024x1024, the model's own size"),
        ({"size": "1024"}, 1024, 1024, "1024x1024, exactly as asked"),
        ({"size": 768}, 768, 768, "768x768, exactly as asked"),
        ({"size": "1344x768"}, 768, 1344, "1344x768, exactly as asked"),
        ({"size": " 768 X 1344 "}, 1344, 768, "768x1344, exactly as asked"),
        ({"size": "3840×2160"}, 2160, 3840, "3840x2160, exactly as asked (7.9 times"),
        ({"aspect": "16:9"}, 768, 1344, "nearest 1024-px bucket to 16:9: 1344x768"),
        ({"aspect": "9:16"}, 1344, 768, "nearest 1024-px bucket to 9:16: 768x1344"),
        ({"aspect": "2.35:1"}, 640, 1536, "nearest 1024-px bucket to 2.35:1: 1536x640"),
        ({"aspect": "4:1", "resolution": "256"}, 128, 512, "nearest 256-px bucket to 4:1"),
        ({"aspect": "16:9", "resolution": "4K"}, 3072, 5376, "nearest 4096-px bucket"),
        ({"aspect": "16:9", "resolution": 2880}, 2112, 3840, "nearest 2880-px bucket"),
        (
            {"resolution": "2k"},
            2048,
            2048,
            "2048x2048, the square bucket (4 times the pixels of this model's",
        ),
        ({"resolution": "512"}, 512, 512, "512x512, the square bucket (0.25 times"),
        ({"resolution": "768"}, 768, 768, "768x768, the square bucket"),
    ],
)
def test_sizes_that_people_type(request_, height, width, note):
    resolved = resolve_size(**request_, native=1024)
    assert (resolved.height, resolved.width) == (height, width)
    assert resolved.note.startswith(note)
    assert f"{width}x{height}" in resolved.note


@pytest.mark.parametrize(
    ("request_", "rule", "way_out"),
    [
        ({"size": "0"}, "size must be 64 to 8192 px a side, got 0", "try 64x64"),
        ({"size": "16x1024"}, "size must be 64 to 8192 px a side, got 16x1024", "try 64x1024"),
        ({"size": "100000"}, "size must be 64 to 8192 px a side, got 100000", "try 8192x8192"),
        ({"size": "9000x1000"}, "64 to 8192 px a side, got 9000x1000", "try 8192x992"),
        ({"size": "1000x1001"}, "multiple of 16 on both sides, got 1000x1001", "992x992 or 1008"),
        ({"size": "1024x1000"}, "multiple of 16 on both sides", "1024x992 or 1024x1008"),
        ({"size": "abc"}, "size must be a side", "1344x768"),
        ({"size": ""}, "size must be a side", "1344x768"),
        ({"size": "-512"}, "size must be a side", "got '-512'"),
        ({"size": "1024.5"}, "size must be a side", "got '1024.5'"),
        ({"size": "1024x768x3"}, "size must be a side", "got '1024x768x3'"),
        ({"size": "9" * 5000}, "size must be a side", "1344x768"),
        ({"aspect": "16:0"}, "aspect must be WIDTH:HEIGHT", "such as 16:9, got '16:0'"),
        ({"aspect": "0:9"}, "aspect must be WIDTH:HEIGHT", "got '0:9'"),
        ({"aspect": "16x9"}, "aspect must be WIDTH:HEIGHT", "got '16x9'"),
        ({"aspect": "1.5"}, "aspect must be WIDTH:HEIGHT", "got '1.5'"),
        ({"aspect": "10:1"}, "aspect must be between 4:1 and 1:4", "WIDTHxHEIGHT instead"),
        ({"resolution": "8k"}, "resolution must be 256, 512, 1k, 2k, 2880, 4k", "got '8k'"),
        ({"resolution": "0"}, "resolution must be 64 to 4096 px, got 0", "a size may"),
        ({"resolution": 8192}, "resolution must be 64 to 4096 px, got 8192", "up to 8192"),
        ({"resolution": "1000"}, "resolution must be a multiple of 16, got 1000", "992 or 1008"),
        ({"size": "512", "aspect": "1:1"}, "size must be given without aspect", "got 512 and an a"),
        ({"size": "512", "resolution": "1k"}, "size must be given without", "512 and a resolution"),
    ],
)
def test_sizes_that_cannot_be_honoured_name_the_rule_and_a_way_out(request_, rule, way_out):
    with pytest.raises(ValueError) as error:
        resolve_size(**request_, native=1024)
    assert rule in str(error.value) and way_out in str(error.value)


def test_way_out_of_every_refused_size_is_accepted():
    for size in ["0", "9000x1000", "1000x1001", "63x8193", "100000x72"]:
        with pytest.raises(ValueError) as error:
            resolve_size(size, native=1024)
        for offer in str(error.value).split("; try ")[1].split(" or "):
            resolve_size(offer, native=1024)


def test_size_follows_the_native_resolution_and_the_multiple_of_the_model():
    assert resolve_size(native=128).height == 128
    assert resolve_size("32", native=32).height == 32
    wide = resolve_size(aspect="2:1", native=128)
    assert (wide.height, wide.width) == (96, 192)
    assert resolve_size("1000x1008", native=1024, multiple=8).width == 1000
    with pytest.raises(ValueError, match="multiple of 32 on both sides, got 1008"):
        resolve_size("1008", native=1024, multiple=32)


@pytest.mark.parametrize("resolution", RESOLUTIONS)
@pytest.mark.parametrize("aspect", ["4:1", "16:9", "1:1", "2:3", "1:4"])
def test_every_named_resolution_and_aspect_gives_a_size_that_is_accepted_as_size(
    resolution, aspect
):
    bucket = resolve_size(aspect=aspect, resolution=resolution, native=1024)
    again = resolve_size(f"{bucket.width}x{bucket.height}", native=1024)
    assert (again.height, again.width) == (bucket.height, bucket.width)
