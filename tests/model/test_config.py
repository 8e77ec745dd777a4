import json

import pytest

from pixart.config import KVCompression, PixArtConfig
from pixart.releases import RELEASED

COMPRESS = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [27, 14]}


def test_layers_may_be_any_iterable_and_are_kept_sorted_and_once() -> None:
    assert KVCompression(range(2, 5)) == KVCompression([4, 3, 2, 3]) == KVCompression((2, 3, 4))
    assert KVCompression([1, 0]).layers == (0, 1)


@pytest.mark.parametrize(
    ("sampling", "norm"),
    [("conv", "layer"), ("average", "none"), ("uniform", "none"), ("uniform_every", "none")],
)
def test_the_norm_is_the_published_one_unless_given(sampling: str, norm: str) -> None:
    assert KVCompression((0,), sampling=sampling).norm == norm
    other = "none" if norm == "layer" else "layer"
    assert KVCompression((0,), sampling=sampling, norm=other).norm == other


def test_a_ratio_of_one_compresses_no_layer() -> None:
    assert not KVCompression((0, 1), ratio=1).applies_to(0)
    assert KVCompression((0, 1), ratio=2).applies_to(1)
    assert not KVCompression((0, 1), ratio=2).applies_to(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": (0,), "ratio": 5}, "ratio must be 1, 2, 3 or 4, got 5"),
        ({"layers": (0,), "ratio": 0}, "ratio must be"),
        ({"layers": (0,), "ratio": True}, "ratio must be"),
        ({"layers": (0,), "sampling": "ave"}, "sampling must be one of conv, .*got 'ave'"),
        ({"layers": (0,), "norm": "batch"}, "norm must be"),
        ({"layers": (-1,)}, "layers must be non-negative integers, got -1"),
        ({"layers": ("a",)}, "layers must be non-negative integers, got 'a'"),
        ({"layers": 3}, "layers must be an iterable"),
    ],
)
def test_a_compression_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCompression(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"depth": 10**9}, "depth must be at most 1000, got 1000000000"),
        ({"in_channels": 10**400}, "in_channels must be at most 4096, got 1000"),
        ({"mlp_ratio": 10**400}, "mlp_ratio must be from 0.015625 to 64, got 1000"),
        ({"pe_interpolation": 1e-300}, "pe_interpolation must be from 1e-06 to .*, got 1e-300"),
        ({"depth": 2.5}, "depth must be a positive integer, got 2.5"),
        ({"input_size": 1}, "input_size must be at least patch_size 2, got 1"),
        ({"num_heads": 7}, "hidden_size must be divisible by num_heads 7, got 1152"),
        ({"num_heads": 8}, "head_dim must be at most 128, got 144"),
        (
            {"hidden_size": 128, "num_heads": 2, "micro_condition": True},
            "divisible by 3 to micro-condition, got 128",
        ),
        ({"mlp_ratio": 0}, "mlp_ratio must be a positive number, got 0"),
        ({"pe_interpolation": -1.0}, "pe_interpolation must be a positive number, got -1.0"),
        ({"pe_interpolation": "1"}, "pe_interpolation must be a positive number, got '1'"),
        ({"mlp_ratio": None}, "mlp_ratio must be a positive number, got None"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be a positive number, got inf"),
        ({"class_dropout_prob": "0.1"}, "class_dropout_prob must be in .0, 1., got '0.1'"),
        ({"micro_condition": "no"}, "micro_condition must be true or false, got 'no'"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob must be in"),
        ({"kv_compression": KVCompression((27, 28))}, "layers must be below depth 28, got 28"),
        ({"kv_compression": {"layers": [1]}}, "kv_compression must be a KVCompression"),
    ],
)
def test_a_model_that_cannot_be_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixArtConfig(**arguments)


def test_sizes_follow_from_the_configuration() -> None:
    config = PixArtConfig(input_size=64)
    assert (config.head_dim, config.mlp_hidden_size, config.base_size) == (72, 4608, 32)
    assert (config.out_channels, PixArtConfig(pred_sigma=False).out_channels) == (8, 4)


def test_the_official_constructors_defaults_hold() -> None:
    config = PixArtConfig.from_official()
    assert config == PixArtConfig(input_size=32, model_max_length=120)


def test_official_compression_is_translated() -> None:
    config = PixArtConfig.from_official(kv_compress_config=COMPRESS)
    assert config.kv_compression == KVCompression((14, 27), 2, "conv")


def test_the_official_average_is_the_uniform_sampling_that_it_computes() -> None:
    config = PixArtConfig.from_official(kv_compress_config=COMPRESS | {"sampling": "ave"})
    assert config.kv_compression == KVCompression((14, 27), 2, "uniform")


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        {},
        {"sampling": None, "scale_factor": 1, "kv_compress_layer": []},
        COMPRESS | {"scale_factor": 1},
        COMPRESS | {"kv_compress_layer": []},
    ],
)
def test_official_compression_of_nothing_is_none(nothing: dict | None) -> None:
    assert PixArtConfig.from_official(kv_compress_config=nothing).kv_compression is None


def test_alphas_name_of_the_position_scale_is_understood() -> None:
    assert PixArtConfig.from_official(lewei_scale=2.0).pe_interpolation == 2.0
    with pytest.raises(ValueError, match="lewei_scale must equal pe_interpolation 1.0, got 2.0"):
        PixArtConfig.from_official(lewei_scale=2.0, pe_interpolation=1.0)


def test_official_arguments_that_are_unknown_or_unsupported_are_refused() -> None:
    with pytest.raises(TypeError, match="window_size"):
        PixArtConfig.from_official(window_size=4)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="drop_path must be 0, got 0.1"):
        PixArtConfig.from_official(drop_path=0.1)
    with pytest.raises(ValueError, match="kv_compress_config must have keys among .* got ratio"):
        PixArtConfig.from_official(kv_compress_config=COMPRESS | {"ratio": 2})
    with pytest.raises(ValueError, match="sampling must be one of .* got None"):
        PixArtConfig.from_official(kv_compress_config=COMPRESS | {"sampling": None})


CONFIGS = [
    PixArtConfig(),
    PixArtConfig(micro_condition=True, qk_norm=True, pred_sigma=False, pe_interpolation=0.5),
    PixArtConfig(kv_compression=KVCompression(range(14, 28), 3, "uniform_every")),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_configuration_survives_the_official_form(config: PixArtConfig) -> None:
    assert PixArtConfig.from_official(**config.to_official()) == config


def test_what_the_official_model_cannot_do_has_no_official_form() -> None:
    for compression in (KVCompression((0,), 2, "average"), KVCompression((0,), norm="none")):
        with pytest.raises(ValueError, match="kv_compression must be one that the official model"):
            PixArtConfig(kv_compression=compression).to_official()
    with pytest.raises(ValueError, match="caption_embedding must be true for the official model"):
        PixArtConfig(caption_channels=1152, caption_embedding=False).to_official()


@pytest.mark.parametrize(
    "config",
    [
        *CONFIGS,
        PixArtConfig(kv_compression=KVCompression((3,), 4, "average", "layer")),
        PixArtConfig(caption_channels=1152, caption_embedding=False),
    ],
)
def test_a_configuration_survives_json(config: PixArtConfig) -> None:
    assert PixArtConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_and_missing_keys_of_a_dict_are_refused() -> None:
    with pytest.raises(ValueError, match="PixArtConfig must have keys among .* got width"):
        PixArtConfig.from_dict({"width": 3})
    with pytest.raises(ValueError, match="kv_compression must have keys among .* got scale"):
        PixArtConfig.from_dict({"kv_compression": {"layers": [0], "scale": 2}})
    with pytest.raises(ValueError, match="kv_compression must have layers"):
        PixArtConfig.from_dict({"kv_compression": {"ratio": 2}})


def test_released_models_span_the_coordinates_they_were_trained_on() -> None:
    sigma = {name: r for name, r in RELEASED.items() if r.family == "sigma"}
    assert {r.pixels: r.config.pe_interpolation for r in sigma.values()} == {
        256: 0.5,
        512: 1.0,
        1024: 2.0,
        2048: 4.0,
    }
    for release in sigma.values():
        assert release.config.base_size / release.config.pe_interpolation == 32
        assert release.config.model_max_length == 300
    assert RELEASED["PixArt-XL-2-256x256"].config.pe_interpolation == 1.0


def test_only_alphas_1024_models_are_micro_conditioned_and_none_is_compressed() -> None:
    conditioned = [name for name, r in RELEASED.items() if r.config.micro_condition]
    assert conditioned == ["PixArt-XL-2-1024-MS", "PixArt-LCM-XL-2-1024-MS"]
    assert all(release.config.kv_compression is None for release in RELEASED.values())


def test_heads_may_have_any_size_up_to_that_of_the_kernels() -> None:
    assert PixArtConfig(hidden_size=144, num_heads=4).head_dim == 36
    assert PixArtConfig(hidden_size=192, num_heads=16).head_dim == 12


def test_compression_is_layers_ratio_and_sampling() -> None:
    assert KVCompression.parse("14-16:2") == KVCompression([14, 15, 16], 2)
    assert KVCompression.parse("3,5,7-8:4:average") == KVCompression([3, 5, 7, 8], 4, "average")


@pytest.mark.parametrize(
    "text, rule",
    [
        ("", "must be LAYERS:RATIO"),
        ("14-27", "must be LAYERS:RATIO"),
        ("a:2", "must be LAYERS:RATIO"),
        ("-5:2", "layers must be like 14-27 or 3,5, got '-5'"),
        ("5-:2", "got '5-'"),
        ("1-2-3:2", "got '1-2-3'"),
        ("3,,4:2", "got ''"),
        ("5-3:2", "got '5-3'"),
        ("0-9999999999:2", "got '0-9999999999'"),  # not a list of ten billion numbers
        ("3:9", "ratio must be 1, 2, 3 or 4, got 9"),
        ("3:2:max", "sampling must be one of"),
    ],
)
def test_a_compression_that_cannot_be_meant_is_refused(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        KVCompression.parse(text)
