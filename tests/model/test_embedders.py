import copy
import pickle
from typing import Any

import pytest
import torch
from small_model import KEPT, build, inputs, mask_of, relative_error
from torch import Tensor

from pixart.model.embedders import pack_captions

PARITY_TOLERANCE = 1e-5  # of the norm, in fp32


def test_masked_caption_tokens_do_not_matter_wherever_they_are() -> None:
    model = build()
    latents, timesteps, caption = inputs(batch=4)
    mask = mask_of(KEPT)
    expected = model(latents, timesteps, caption, mask)
    spoiled = caption.masked_fill(mask.unsqueeze(2) == 0, 1e3)
    assert torch.equal(model(latents, timesteps, spoiled, mask), expected)
    for index, tokens in enumerate(KEPT):
        one = slice(index, index + 1)
        alone = model(latents[one], timesteps[one], caption[one, tokens])
        assert relative_error(alone, expected[one]) < PARITY_TOLERANCE


def test_packing_keeps_order_and_cuts_to_the_longest_caption() -> None:
    caption = torch.arange(24.0).view(2, 12, 1)
    packed, lengths = pack_captions(caption, mask_of([[1, 3, 9], [11]]).bool())
    assert packed.squeeze(2)[0].tolist() == [1, 3, 9]
    assert packed[1, 0].item() == 23
    assert lengths is not None and lengths.tolist() == [3, 1]
    packed, lengths = pack_captions(caption, mask_of([[4, 5], [0, 7]]).bool())
    assert packed.squeeze(2).tolist() == [[4, 5], [12, 19]]
    assert lengths is None  # nothing is left to mask
    packed, lengths = pack_captions(caption, mask_of([[], []]).bool())
    assert packed.shape == (2, 1, 1)
    assert lengths is not None and lengths.tolist() == [0, 0]


def test_masks_of_every_accepted_form_mean_the_same() -> None:
    model = build()
    latents, timesteps, caption = inputs()
    mask = mask_of(KEPT[:2])
    expected = model(latents, timesteps, caption, mask)
    for form in (mask.bool(), mask.float(), mask[:, None, None], mask[:, None].to(torch.int16)):
        assert torch.equal(model(latents, timesteps, caption, form), expected)
    assert torch.equal(model(latents, timesteps, caption.unsqueeze(1), mask), expected)
    every = model(latents, timesteps, caption, torch.ones(2, 12))
    assert torch.equal(every, model(latents, timesteps, caption))


def test_a_caption_without_tokens_adds_only_a_bias() -> None:
    model = build()
    latents, timesteps, caption = inputs()
    nothing = torch.zeros(2, 12)
    expected = model(latents, timesteps, caption, nothing)
    assert expected.isfinite().all()
    assert torch.equal(model(latents, timesteps, caption + 1, nothing), expected)
    one_of_two = model(latents, timesteps, caption, mask_of([[], [0, 1]]))
    assert relative_error(one_of_two[:1], expected[:1]) < PARITY_TOLERANCE


def test_a_mask_with_fewer_rows_is_repeated_in_turn() -> None:
    model = build()
    arguments = inputs(batch=4)
    mask = mask_of(KEPT[:2])
    assert torch.equal(model(*arguments, mask), model(*arguments, mask.repeat(2, 1)))


def test_one_timestep_serves_the_whole_batch() -> None:
    model = build()
    latents, _, caption = inputs()
    expected = model(latents, torch.tensor([500.0, 500.0]), caption)
    for timestep in (torch.tensor(500), torch.tensor([500.0]), torch.tensor([500, 500])):
        assert torch.equal(model(latents, timestep, caption), expected)


def test_timesteps_are_not_rounded_to_the_models_dtype() -> None:
    model = build().bfloat16()
    latents, _, caption = inputs(batch=1)
    seen = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, waves: seen.append(waves[0]))
    for timestep in (999.0, 1000.0, 949.05, 949.0):
        model(latents, torch.tensor([timestep]), caption)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[2], seen[3])
    assert seen[0].dtype == torch.bfloat16


def test_caption_dropout_gives_the_null_caption_under_the_same_mask() -> None:
    model = build(class_dropout_prob=1.0)
    latents, timesteps, caption = inputs(length=9)
    mask = mask_of(KEPT[:2])[:, :9]
    null = model.y_embedder.y_embedding[:9].expand(2, -1, -1)
    expected = model(latents, timesteps, null, mask)
    assert not torch.equal(model(latents, timesteps, caption, mask), expected)
    assert torch.equal(model.train()(latents, timesteps, caption, mask), expected)


def test_caption_dropout_is_drawn_for_each_sample() -> None:
    model = build(class_dropout_prob=0.5)
    latents, timesteps, caption = (x[:1].expand(64, *x.shape[1:]) for x in inputs(batch=1))
    torch.manual_seed(0)
    outputs = model.train()(latents[..., :2, :2], timesteps, caption)
    dropped = (outputs - outputs[0]).flatten(1).norm(dim=1) > 1e-3
    assert 10 < dropped.sum() < 54
    model = build(class_dropout_prob=0.0).train()
    assert torch.equal(model(*inputs()), model.eval()(*inputs()))


def test_position_tables_are_built_once_per_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    import pixart.model.embedders

    built = []
    table = pixart.model.embedders.position_embedding

    def spy(dim: int, grid: tuple[int, int], *rest: Any, **options: Any) -> Tensor:
        built.append(grid)
        return table(dim, grid, *rest, **options)

    monkeypatch.setattr(pixart.model.embedders, "position_embedding", spy)
    model = build()
    for _ in range(2):
        model(*inputs())
        model(*inputs(height=14, width=10))
    assert built == [(5, 7), (7, 5)]
    for width in range(2, 40, 2):
        model(*inputs(height=4, width=width))
    assert len(model.position_tables.tables) == 8


def test_copies_and_files_carry_no_position_table() -> None:
    model = build()
    expected = model(*inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.position_tables.tables
        assert torch.equal(other(*inputs()), expected)
    assert not any("pos" in name for name in model.state_dict())


def test_a_training_caption_longer_than_the_null_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="caption must have at most 12 tokens to train, got 13"):
        build().train()(*inputs(length=13))
    assert build()(*inputs(length=13)).isfinite().all()
