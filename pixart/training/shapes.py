"""The embedded model's training data and losses: captioned scenes, a T5 encoder, a small PixArt-Σ.

What made it learn on a CPU: captions that nearly decide the scene, v-prediction with a plain
squared error, many small steps, and positions spanning the published 0…32 over an 8×8 token grid.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.config import KVCompression, PixArtConfig
from pixart.diffusion import NUM_TIMESTEPS, training_loss
from pixart.model import PixArt
from pixart.shapes.caption import describe
from pixart.shapes.scene import Scene, draw, sample_scene
from pixart.training.autoencoder import anchor_latents
from pixart.training.loop import Losses, Optimisation, Stage
from pixart.training.parallel import draw_number, share_of

TEXT_WIDTH = 128
MAX_TOKENS = 40
VOCABULARY = 320
KIND_WEIGHTS = {"one": 0.35, "pair": 0.5, "group": 0.15}
CAPTION_DROPOUT = 0.1


def shapes_config(size: int) -> PixArtConfig:
    """A 5 M parameter PixArt-Σ of head dimension 72, compressed in its deeper half, for pictures
    of `size` pixels. The position scale follows the published size / 512."""
    return PixArtConfig(
        input_size=size // 8,
        hidden_size=216,
        depth=6,
        num_heads=3,
        caption_channels=TEXT_WIDTH,
        model_max_length=MAX_TOKENS,
        pe_interpolation=size / 512,
        pred_sigma=False,
        class_dropout_prob=0.0,  # captions are dropped before the text encoder, which trains too
        kv_compression=KVCompression(layers=(3, 4, 5), ratio=2),
    )


def train_tokenizer(path: Path, captions: int = 20_000) -> None:
    """Learn a SentencePiece model of the caption grammar, with T5's special ids, into `path`."""
    import sentencepiece

    rng = random.Random(0)
    sentences = (_sample(rng)[1] for _ in range(captions))
    path.parent.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",  # merges every word of so small a language into one piece
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        required_chars="abcdefghijklmnopqrstuvwxyz0123456789,.'-",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.with_suffix(".vocab").unlink()
    path.with_suffix(".model").rename(path)


def build_text_encoder(vocabulary: int) -> Any:
    """A two-layer T5 encoder in the v1.1 form (gated GELU), from random weights."""
    from transformers import T5Config, T5EncoderModel

    options: dict[str, Any] = {"tie_word_embeddings": False}
    config = T5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **options,
    )
    return T5EncoderModel(config)


def build_transformer(size: int) -> PixArt:
    """The transformer at random weights. With no class-conditional model to start from, the
    cross-attention must not start at zero: it would learn to ignore the text."""
    model = PixArt(shapes_config(size))
    for name, weight in model.named_parameters():
        if name.endswith("cross_attn.proj.weight"):
            nn.init.xavier_uniform_(weight)
    return model


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, 4, size/8, size/8)
    ids: Tensor  # (B, L) int64, padded with 0
    mask: Tensor  # (B, L) bool


def _sample(rng: random.Random) -> tuple[Scene, str]:
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    scene = sample_scene(rng, kind)
    return scene, describe(scene, rng)


def sample_batch(rng: random.Random, tokenizer: Any, size: int, batch: int) -> Batch:
    """Draw scenes and captions; every tenth caption or so is empty, for guidance."""
    scenes, texts = zip(*(_sample(rng) for _ in range(batch)), strict=True)
    texts = tuple("" if rng.random() < CAPTION_DROPOUT else text for text in texts)
    pictures = torch.stack([torch.tensor(draw(scene, size, supersample=3)) for scene in scenes])
    latents = anchor_latents(pictures.permute(0, 3, 1, 2).float() / 127.5 - 1)
    ids, mask = pad_ids([tokenizer.encode(text) for text in texts])
    return Batch(latents, ids, mask)


def pad_ids(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) padded with T5's 0, and the mask of those that are not padding."""
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, mask


def denoising_loss(model: PixArt, text_encoder: nn.Module, batch: Batch) -> Losses:
    """The squared error of the velocity at random timesteps, in bf16 with fp32 weights.

    Timesteps are logit-normal around 400 (Stable Diffusion 3, section 3.1): what shape a thing has
    is decided there, and at the noisy end, where half of the uniform ones lie, only where it is.
    """
    noise = torch.randn_like(batch.latents)
    timesteps = (NUM_TIMESTEPS * torch.sigmoid(torch.randn(len(noise)) - 0.4)).long()
    timesteps = timesteps.clamp(max=NUM_TIMESTEPS - 1)
    with torch.autocast("cpu", torch.bfloat16):
        features = text_encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
        terms = training_loss(
            lambda x_t, t: model(x_t, t, features, batch.mask),
            batch.latents,
            timesteps,
            noise,
            prediction_type="v_prediction",
        )
    return {"loss": terms.loss.mean()}


def shapes_stage(
    model: PixArt,
    text_encoder: nn.Module,
    tokenizer: Any,
    settings: Optimisation,
    directory: Path,
    *,
    sizes: Sequence[int],
    pixels: int,
) -> Stage:
    """A stage that trains the transformer, and the text encoder with it, at each of the sizes in
    turn, on batches of that many pixels."""

    def loss(step: int) -> Losses:
        rng = random.Random(f"{settings.seed}/{directory.name}/{draw_number(step)}")
        size = sizes[step % len(sizes)]
        batch = sample_batch(rng, tokenizer, size, share_of(pixels // size**2))
        return denoising_loss(model, text_encoder, batch)

    both = nn.ModuleDict({"transformer": model, "text_encoder": text_encoder})
    return Stage(directory.name, both, loss, settings, directory)
