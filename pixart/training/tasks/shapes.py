"""The embedded model's training data and losses: captioned scenes, a T5 encoder, a small PixArt-Σ.

What made it learn on a CPU: captions that nearly decide the scene, v-prediction with a plain
squared error, many small steps, and positions spanning the published 0…32 over an 8×8 token grid.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixart.checkpoint.load import load_transformer, open_transformer
from pixart.config import PixArtConfig
from pixart.cost import forward_flops
from pixart.diffusion import add_noise
from pixart.distributed import barrier, rank, share
from pixart.files import read_json, written_aside
from pixart.libraries import importing, silenced
from pixart.model.exchange import TokenExchange
from pixart.model.transformer import PixArt
from pixart.pipeline.defaults import Sampling
from pixart.pipeline.directory import open_directory
from pixart.pipeline.export import export_pipeline
from pixart.pipeline.text_to_image import Pipeline
from pixart.shapes.scene import (
    COLOURS,
    RADII,
    SHAPES,
)
from pixart.text.networks import check_complete
from pixart.training.batch import (
    TrainingSample,
    diffusion_losses,
    drawn_data_problems,
    stack,
    whole_state,
)
from pixart.training.measuring import Measuring
from pixart.training.outlines import outline_errors
from pixart.training.parallel import groups, own, sharing_problems
from pixart.training.plan import transformer_plan
from pixart.training.previews import draw_pictures
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.scenes import (
    draw_sample,
    draw_scene,
    drawing_problems,
    drawn_sizes,
    picture_of,
    token_conditions,
)
from pixart.training.stage import DISTILLED, PREVIOUS, RANDOM, Data, ResolvedStage, Stage
from pixart.training.starts import (
    adapt,
    add_compression,
    check_prediction,
    pipeline_is_here,
    start_is_here,
    transformer_config,
)
from pixart.training.state import load_average
from pixart.training.tasks.autoencoder import load_vae

VOCABULARY = 320
SPIECE = Path("tokenizer", "spiece.model")  # of a pipeline
# Twice guided, the outlines of so small a model fray: 4.5, right for XL/2, triples the error of x0 on
# them. Found by the sweep in the model card.
SAMPLING = Sampling(steps=20, guidance=2.0)
ANY_SCENE = dict(Data().scenes)
CLASSES = (SHAPES, tuple(COLOURS), tuple(RADII))  # what a noun and its adjectives tell


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that trains the embedded model's transformer."""
    if stage.lora.rank:
        yield f"data.source must be prepared data with lora.rank {stage.lora.rank}"
        return  # what else there is to say would be about that data
    yield from drawn_data_problems(stage, "scenes", "sizes")
    yield from drawing_problems(stage)
    if not stage.pipeline:
        yield "pipeline must be the stage that trains the VAE, or a pipeline that has one, got none"


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield what a stage needs and is not there, or does not fit it."""
    if stage.start == PREVIOUS:
        yield from problems_of(lambda: run.expect_previous(stage))
    elif stage.start != RANDOM and start_is_here(stage):
        yield from problems_of(lambda: start_folder(stage))
    model, lines = attempt(lambda: run.known_model(stage))
    yield from lines
    if model is not None:
        yield from sharing_problems(stage, model.config, drawn_sizes(stage))
    yield from problems_of(lambda: _vae_folder(stage, run))


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words and a table what a stage will cost."""
    return transformer_plan(stage, run)


def build(stage: ResolvedStage, run: Run) -> "ShapesTask":
    """Make the task as the stage begins."""
    pair, spiece = begin_pair(stage, run)
    folder = _vae_folder(stage, run)
    assert folder is not None  # training comes after what it needs
    task = ShapesTask(pair, stage, spiece, load_vae(folder))
    add_compression(stage, task)
    return task


def begin_pair(stage: ResolvedStage, run: Run) -> tuple["Pair", Path]:
    """Transformer and text encoder as a stage begins, and the tokenizer that goes with them."""
    origin = run.origin(stage)
    if origin.start not in (PREVIOUS, RANDOM):
        return open_pair(replace(stage, start=origin.start))
    after_text = origin.start == PREVIOUS and run.before(origin).trains == "text_encoder"
    if after_text or origin.start == RANDOM:
        pair = build_pair(transformer_config(stage))
        if after_text:
            load_average(run.previous(origin), TextEncoderWithReadout(pair.text_encoder))
        return pair, run_tokenizer(run)
    previous = run.previous(origin)
    if run.before(origin).trains in DISTILLED:  # a whole pipeline, whose T5 is that of its start
        return open_pair(replace(stage, start=str(previous)))
    folder = previous / "pipeline"
    pair = build_pair(open_transformer(folder / "transformer").config)
    load_average(previous, pair)
    adapt(pair.transformer, stage)
    return pair, folder / SPIECE


def _vae_folder(stage: ResolvedStage, run: Run) -> Path | None:
    """Where the VAE is that the stage's pipeline names; None where it is still to come. Raises
    ValueError for one with another scale."""
    if run.has(stage.pipeline):
        if stage.pipeline in run.to_come:
            return None
        folder = run.newest(stage.pipeline) / "vae"
    elif pipeline_is_here(stage):
        folder = open_directory(stage.pipeline, with_transformer=False) / "vae"
    else:
        return None
    scale = read_json(folder / "config.json").get("scaling_factor")
    if stage.vae_scale != scale:
        raise ValueError(f"vae_scale must be that of the VAE, {scale}, got {stage.vae_scale}")
    return folder


def run_tokenizer(run: Run) -> Path:
    """The run's own, learned from the captions once."""
    spiece = run.directory / "tokenizer" / "spiece.model"
    if rank() == 0 and not spiece.exists():
        train_tokenizer(spiece)
    barrier()
    return spiece


def train_tokenizer(path: Path, captions: int = 20_000) -> None:
    """Learn a SentencePiece model of the caption grammar, with T5's special ids, into `path`."""
    import sentencepiece

    rng = random.Random(0)
    sentences = (draw_scene(rng, ANY_SCENE)[1] for _ in range(captions))
    with written_aside(path) as aside:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_prefix=str(aside),
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
        aside.with_suffix(".model").rename(aside)


def build_text_encoder(width: int) -> Any:
    """A two-layer T5 encoder in the v1.1 form (gated GELU), from random weights."""
    with importing():
        from transformers import T5Config, T5EncoderModel

    options: dict[str, Any] = {"tie_word_embeddings": False}
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=2,
        num_heads=width // 32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        **options,
    )
    return T5EncoderModel(config)


def build_pair(config: PixArtConfig) -> "Pair":
    """Transformer and text encoder at random weights. With no class-conditional model to start
    from, the cross-attention must not start at zero: it would learn to ignore the text."""
    model = PixArt(config)
    for name, weight in model.named_parameters():
        if name.endswith("cross_attn.proj.weight"):
            nn.init.xavier_uniform_(weight)
    return Pair(model, build_text_encoder(config.caption_channels))


def start_folder(stage: ResolvedStage) -> Path:
    """The pipeline that stage.start names. Raises ValueError for one that is trained otherwise."""
    folder = open_directory(stage.start, True)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    check_prediction(stage, stage.start, scheduler)
    return folder


def open_pair(stage: ResolvedStage) -> tuple["Pair", Path]:
    """Transformer and text encoder of the pipeline that stage.start names, and its tokenizer."""
    folder = start_folder(stage)
    transformer = load_transformer(folder / "transformer", dtype=torch.float32)
    pair = Pair(adapt(transformer, stage), open_text_encoder(folder))
    return pair, folder / SPIECE


@silenced()
def open_text_encoder(folder: Path) -> Any:
    """The T5 of a pipeline's folder, in fp32."""
    with importing():
        from transformers import T5EncoderModel

    opened: Any = T5EncoderModel.from_pretrained(
        folder / "text_encoder", dtype=torch.float32, output_loading_info=True
    )
    text_encoder, info = opened
    check_complete(folder / "text_encoder", info, None)
    return text_encoder


class TextEncoderWithReadout(nn.Module):
    """A text encoder, and a layer that predicts from its features what words speak of. The layer is
    thrown away afterwards."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        # Saved states know the layer by this name.
        self.told = nn.Linear(text_encoder.config.d_model, sum(map(len, CLASSES)) + 2)

    def forward(self, ids: Tensor, mask: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        """Scores of shapes, colours and sizes, and places, (W, …) each. words: (W, 2), row and column."""
        features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        predicted = self.told(features[words[:, 0], words[:, 1]])
        return predicted.split((*map(len, CLASSES), 2), dim=1)


class Pair(nn.Module):
    """The transformer and the text encoder that is trained with it."""

    def __init__(self, transformer: PixArt, text_encoder: nn.Module) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        ids: Tensor,
        mask: Tensor,
        exchange: TokenExchange | None = None,
    ) -> Tensor:
        features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.transformer(x_t, timesteps, features, mask, exchange=exchange)


class ShapesTask:
    """A Task of pixart.training.trainer: transformer and text encoder on drawn scenes.

    Batches have as many pixels as stage.batch.images squares of stage.resolution; where
    stage.data.sizes names other sides, they take turns. vae: goes into the exported pipeline; None where
    none is exported. exported: the folder of the pipeline in what `export` writes.
    """

    exported = "pipeline"

    def __init__(
        self, model: Pair, stage: ResolvedStage, spiece: Path, vae: nn.Module | None
    ) -> None:
        from pixart.text.tokenizer import load_tokenizer

        self.model: nn.Module = model
        self.transformer, self.text_encoder = model.transformer, model.text_encoder
        self.stage, self.spiece, self.vae = stage, spiece, vae
        model.transformer.gradient_checkpointing = stage.checkpoint_blocks
        # Captions are dropped where they are drawn: the model's own lots are nobody's seed.
        model.transformer.y_embedder.dropout_prob = 0.0
        self.tokenizer: Any = load_tokenizer(spiece.parent)

    def load(self, step: int, parts: int) -> list[TrainingSample]:
        sizes = self.stage.data.sizes or (self.stage.resolution,)
        size = sizes[step % len(sizes)]
        images = self.stage.drawn_images(size, groups(self.stage) * parts)
        rngs = own(self.stage.rngs(step, images), self.stage)
        samples = [draw_sample(rng, self.tokenizer, size, self.stage) for rng in rngs]
        return [stack(share(samples, part, parts)) for part in range(parts)]

    @torch.no_grad()
    def noised_batches(self, count: int, images: int = 32) -> Iterator[tuple[Tensor, ...]]:
        """Arguments of the transformer's forward as it meets them in training."""
        device, side = next(self.model.parameters()).device, self.stage.resolution
        for number in range(count):
            rngs = (random.Random(f"calibration/{number}/{place}") for place in range(images))
            samples = [draw_sample(rng, self.tokenizer, side, self.stage) for rng in rngs]
            part = stack(samples).to(device)
            x_t = add_noise(part.latents, part.noise, part.timesteps)
            ids = part.features[..., 0].long()
            features = self.text_encoder(input_ids=ids, attention_mask=part.mask)
            yield x_t, part.timesteps, features.last_hidden_state, part.mask

    def losses(self, model: nn.Module, part: TrainingSample) -> dict[str, Tensor]:
        part = part.to(next(model.parameters()).device)
        terms = diffusion_losses(self.bind(model, part), part, self.stage)
        return {"loss": terms.loss.mean()}

    def bind(self, model: nn.Module, part: TrainingSample) -> Callable[[Tensor, Tensor], Tensor]:
        """The model with all that it takes beside noised latents and timesteps; the part is on its device."""
        conditions = token_conditions(part)
        return lambda x_t, timesteps: model(x_t, timesteps, *conditions)

    def images(self, part: TrainingSample) -> int:
        return len(part)

    def tokens(self, part: TrainingSample) -> int:
        return len(part) * part.latents.shape[2] * part.latents.shape[3] // 4

    def flops(self, part: TrainingSample) -> float:
        """Those of the transformer alone; the text encoder has few beside it."""
        return len(part) * forward_flops(self.transformer.config, self.tokens(part) // len(part))

    def export(self, folder: Path) -> None:
        """FOLDER/pipeline, which generate opens, with weights in fp16."""
        state = whole_state(self.model)
        if rank() != 0:
            return
        pair = build_pair(self.transformer.config)
        pair.load_state_dict(state)
        assert self.vae is not None
        export_pipeline(
            folder / "pipeline",
            transformer=pair.transformer,
            text_encoder=pair.text_encoder,
            vae=self.vae,
            spiece=self.spiece,
            prediction_type=self.stage.prediction,
            sampling=SAMPLING,
        )

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The loss on scenes that are the same every time, pictures, and what metrics say of others."""
        measured = self._draw_pictures(folder / f"step-{step:08d}")
        side = self.stage.resolution
        rngs = (random.Random(f"validation/{k}") for k in range(self.stage.validation.images))
        samples = [draw_sample(rng, self.tokenizer, side, self.stage) for rng in rngs]
        values = {"loss": float(self.losses(self.model, stack(samples))["loss"])}
        for size in sorted({side, *self.stage.data.sizes}):
            errors = self._outline_errors(size)
            values |= {f"outline_error_{size}@{t}": error for t, error in errors.items()}
        return values | measured

    def _outline_errors(self, size: int) -> dict[int, float]:
        """Of the scenes that the loss is measured on, with whole captions."""
        stage = replace(self.stage, data=replace(self.stage.data, caption_dropout=0.0))
        samples, pictures = [], []
        for seed in [f"validation/{k}" for k in range(stage.validation.images)]:
            samples.append(draw_sample(random.Random(seed), self.tokenizer, size, stage))
            kinds = dict(stage.data.scenes)
            scene, _ = draw_scene(random.Random(seed), kinds, stage.data.nameless)
            pictures.append(picture_of(scene, size))
        part = stack(samples).to(next(self.model.parameters()).device)
        called = self.bind(self.model, part)

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            with stage.autocast(x_t.device):
                return called(x_t, timesteps)

        return outline_errors(denoise, part, pictures, stage.prediction)

    @cached_property
    def _measuring(self) -> Measuring:
        return Measuring(self.stage, next(self.model.parameters()).device)

    def _draw_pictures(self, folder: Path) -> dict[str, float]:
        """By what a user would open now: those of the prompts, and in a folder of their own those that
        metrics score, whose numbers are given back."""
        captions = self._measuring.captions
        if not self.stage.validation.prompts and not captions:
            return {}
        with tempfile.TemporaryDirectory() as place:
            self.export(Path(place))
            if rank() != 0:
                return {}
            device = next(self.model.parameters()).device
            pipe = Pipeline.from_pretrained(
                Path(place) / self.exported, device=device, cache_dir=None
            )
            draw_pictures(pipe, self.stage, folder)
            drawn = draw_pictures(pipe, self.stage, folder / "metrics", captions)
        return self._measuring(captions, drawn)
