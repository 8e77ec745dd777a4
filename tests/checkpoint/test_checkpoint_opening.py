"""Opening a checkpoint before its weights are needed, and for a pipeline that knows more than it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import SIGMA, assert_same, build, official, save_official

from pixart.checkpoint.config import Surroundings
from pixart.checkpoint.load import load_transformer, open_transformer
from pixart.config import PixArtConfig
from pixart.files import CheckpointError


def test_an_empty_tensor_tells_no_configuration(tmp_path: Path) -> None:
    state = official() | {"x_embedder.proj.weight": torch.zeros(72, 4, 0, 0)}
    path = save_official(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError, match=r"proj.weight must not be empty, got .*\(72, 4, 0"):
        load_transformer(path)


def test_what_is_wrong_with_a_checkpoint_is_found_before_its_weights_are_read(
    tmp_path: Path,
) -> None:
    state = official()
    opened = open_transformer(save_official(tmp_path / "m.pth", state))
    assert not opened.is_loaded and opened.null_caption_stored
    assert_same(opened.load(), build())
    assert opened.load() is opened.load() and opened.is_loaded
    del state["t_block.1.bias"]
    with pytest.raises(CheckpointError, match="missing t_block.1.bias"):
        open_transformer(save_official(tmp_path / "m.pth", state))


UNUSUAL = {
    "heads of 24": replace(SIGMA, num_heads=3),
    "width 64": replace(SIGMA, hidden_size=64, num_heads=4),
}


@pytest.mark.parametrize("config", UNUSUAL.values(), ids=UNUSUAL)
def test_a_pipelines_own_transformer_tells_what_an_official_file_does_not(
    tmp_path: Path, config: PixArtConfig
) -> None:
    path = save_official(tmp_path / "m.pth", official(config, positions=False))
    opened = open_transformer(path, around=Surroundings(300, config))
    assert opened.config == config
    deeper = replace(config, depth=4, num_heads=1 if config.hidden_size == 72 else 4)
    if config.hidden_size == 72:  # of another depth it is another model, and tells nothing
        assert open_transformer(path, around=Surroundings(300, deeper)).config.num_heads == 1
    else:
        with pytest.raises(CheckpointError, match=r"\(width 64\).*--config FILE.json"):
            open_transformer(path, around=Surroundings(300, deeper))


def test_the_pipelines_family_tells_how_long_captions_are(tmp_path: Path) -> None:
    state = official()
    del state["y_embedder.y_embedding"]
    path = save_official(tmp_path / "m.pth", state)
    assert open_transformer(path).config.model_max_length == 300
    assert open_transformer(path, around=Surroundings(120)).config.model_max_length == 120


def test_weights_beyond_the_range_of_fp16_are_named(tmp_path: Path) -> None:
    state = official()
    state["t_block.1.bias"][3] = 70_000
    path = save_official(tmp_path / "m.pth", state)
    with pytest.raises(CheckpointError, match=r"t_block.1.bias must fit into float16, .* use bf16"):
        load_transformer(path, dtype=torch.float16)
    assert load_transformer(path, dtype=torch.bfloat16).t_block[1].bias[3] == 70_144
