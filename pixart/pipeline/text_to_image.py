"""From prompts to pictures: what the command line, training previews and other people's code share.

The stages run one after the other and hold memory one after the other: T5 encodes every prompt and
is released, the transformer denoises one image at a time, the VAE decodes. Image k of a call is
drawn alone, so it has the same bits whatever else was asked for. The transformer's names and shapes
are checked at once, its weights are read when T5 is done.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from pixart.checkpoint.config import NO_PIPELINE
from pixart.checkpoint.load import OpenedTransformer, empty_model, open_transformer
from pixart.config import EMBEDDED, Family, KVCompression, PixArtConfig
from pixart.device import check_cuda_graph, choose_device, free_memory, return_cached
from pixart.lora.adapters import load_lora, merge_lora
from pixart.model.transformer import PixArt
from pixart.pipeline.captions import CaptionStore, NullCaption
from pixart.pipeline.directory import (
    check_fit,
    choose_family,
    choose_variants,
    family_of,
    open_directory,
    read_scheduler,
    reading,
    surroundings,
    text_dtype,
)
from pixart.sampler.cuda_graphs import CudaGraphs
from pixart.sampler.denoiser import PictureDenoiser
from pixart.sampler.loop import (
    Cancelled,
    Captions,
    Progress,
    check_sampling,
    initial_noise,
    sample,
    seed_generators,
)
from pixart.sampler.schedulers import make_scheduler
from pixart.text.encoder import PromptEmbeddings, Quantization, TextEncoder
from pixart.vae.autoencoder import VAE, Tiled, to_images
from pixart.weights import resolve

if TYPE_CHECKING:
    from PIL.Image import Image

OPENING = 3  # parts that from_pretrained opens: the checkpoint, the VAE, the scheduler


@dataclass(frozen=True)
class Drawn:
    """One finished picture. seconds: by stage ("text", "load", "denoise", "decode"). batched, tile:
    what was chosen; given to `draw` again, they make the same bits whatever memory is free then."""

    image: "Image"
    prompt: str
    seed: int
    seconds: dict[str, float]
    batched: bool
    tile: int | bool


@dataclass
class Pipeline:
    """A text encoder, a transformer, a VAE and a scheduler; see `from_pretrained`."""

    opened: OpenedTransformer
    text_encoder: TextEncoder
    vae: VAE
    scheduler_config: dict[str, Any]
    device: torch.device
    source: str
    family: Family
    null_caption: NullCaption | None = None
    cuda_graph: bool = False
    _captions: CaptionStore = field(init=False, repr=False)
    _graphs: CudaGraphs | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_cuda_graph(self.cuda_graph, self.device)
        self._graphs = CudaGraphs() if self.cuda_graph else None
        self._captions = CaptionStore(
            self.text_encoder, self.opened, self.family, self.null_caption, self._make_room
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = EMBEDDED,
        *,
        transformer: str | Path | PixArt | None = None,
        lora: Sequence[tuple[str | Path, float]] = (),
        config: PixArtConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        text_encoder_dtype: torch.dtype | Quantization | None = None,
        kv_compression: KVCompression | None = None,
        variant: str | None = None,
        ema: bool = False,
        null_caption: NullCaption | None = None,
        cuda_graph: bool = False,
        cache_dir: str | Path | None = "auto",
        progress: Callable[[], object] | None = None,
    ) -> "Pipeline":
        """Open a pipeline directory, a hub id or the embedded model ("shapes").

        transformer: another checkpoint in its place: an official .pth, ours, a diffusers directory.
        What it does not say about itself (an official .pth: heads, positions) is taken from the
        pipeline's own transformer, if width and depth agree. Or a model, which keeps its dtype and
        mode and takes none of the options of checkpoints. config: replaces what one says. ema: its
        averaged weights. lora: adapters (path or hub id, weight) to merge into the weights.
        device: None takes CUDA when there is one. dtype: None is bf16 on CUDA, fp32 on a CPU.
        text_encoder_dtype: None is bf16 for an encoder of 2 GiB or more, else dtype; "8bit" and
        "4bit" need CUDA. kv_compression: opens a dense transformer as a compressed one. variant: "fp16"
        or another of the weights, in the folders that have it.
        null_caption: how guidance sees the empty caption: through its own mask ("own-mask", as
        diffusers does), or as the reference code does through the prompt's mask ("prompt-mask").
        None takes the latter only for an α checkpoint that carries its null caption.
        cuda_graph: record a denoising step once per size and replay it, which spares small pictures
        the launches of its kernels; CUDA only.
        cache_dir: of prompt embeddings; None keeps none. progress: called OPENING times.
        Raises CheckpointError for what cannot be opened, ValueError for what cannot be honoured.
        """
        if null_caption not in (None, *get_args(NullCaption)):
            raise ValueError(f"null_caption must be own-mask or prompt-mask, got {null_caption!r}")
        device = choose_device(device)
        check_cuda_graph(cuda_graph, device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        advance = progress or (lambda: None)
        directory = open_directory(source, with_transformer=transformer is None)
        variants = choose_variants(directory, variant, with_transformer=transformer is None)
        is_guest = isinstance(transformer, str | Path)
        path = resolve(transformer) if isinstance(transformer, str | Path) else directory
        if isinstance(transformer, PixArt):
            read = {"config": config, "kv_compression": kv_compression, "ema": ema, "lora": lora}
            if idle := [name for name, value in read.items() if value]:
                raise ValueError(
                    f"{idle[0]} must be left out beside a model, got {read[idle[0]]!r}; change the "
                    "model itself"
                )
            opened, path = OpenedTransformer.of(transformer), Path("the model")
        else:
            opened = open_transformer(
                path,
                config=config,
                kv_compression=kv_compression,
                dtype=dtype,
                ema=ema,
                variant=variant if is_guest and path.is_dir() else variants.get("transformer"),
                around=surroundings(directory) if is_guest else NO_PIPELINE,
            )
        if lora:
            load_lora(empty_model(opened.config), lora)  # refused now, not when T5 has run
            opened.changes.append(lambda model: merge_lora(load_lora(model, lora)))
        advance()
        encoder_dtype, quantization = text_dtype(
            directory, text_encoder_dtype, dtype, variants["text_encoder"]
        )
        encoder = TextEncoder.from_pretrained(
            directory,
            dtype=encoder_dtype,
            device=device,
            max_length=opened.config.model_max_length,
            quantization=quantization,
            cache_dir=cache_dir,
            variant=variants["text_encoder"],
        )
        check_fit(opened.config, path, directory)
        with reading(directory / "vae"):
            vae = VAE.from_pretrained(
                directory, dtype=dtype, device=device, variant=variants["vae"]
            )
        advance()
        scheduler_config = read_scheduler(directory)
        advance()
        name = f"{source} with {transformer}" if is_guest else str(source)
        family = choose_family(opened.config, family_of(directory), is_guest=is_guest)
        return cls(
            opened, encoder, vae, scheduler_config, device, name, family, null_caption, cuda_graph
        )

    @property
    def transformer(self) -> PixArt:
        """The model, read into the device's memory when it is first asked for."""
        return self.opened.load(self.device)

    @transformer.setter
    def transformer(self, model: PixArt) -> None:
        self.opened.replace(model)

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return self.vae.downsample * self.opened.config.patch_size

    @property
    def native(self) -> int:
        """The side in pixels of the square that the transformer was trained for."""
        return self.opened.config.input_size * self.vae.downsample

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        num_images: int = 1,
        scheduler: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batched: bool | None = None,
        tile: bool | int | None = None,
        callback: Callable[[Progress], object] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> "list[Image]":
        """The pictures, prompt by prompt; image k of a prompt has the seed `seed` + k.

        height, width: pixels, None for the native square. steps, guidance: None for the scheduler's
        default (20 and 4.5). scheduler: a name of pixart.sampler.SCHEDULERS, None for the
        pipeline's own. batched: both halves of guidance in one call; None decides by free memory.
        tile: of the VAE, None decides by free memory. cancel: asked before each step; when it
        returns True, pixart.sampler.Cancelled is raised.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._check_size(height, width)
        check_sampling(
            make_scheduler(scheduler, self.scheduler_config), steps, guidance, guidance_interval
        )
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.prepare([*prompts, negative], cancel=cancel)
        drawn = (
            self.draw(
                text,
                negative=negative,
                height=height,
                width=width,
                steps=steps,
                guidance=guidance,
                seed=seed + k,
                scheduler=scheduler,
                guidance_interval=guidance_interval,
                batched=batched,
                tile=tile,
                callback=callback,
                cancel=cancel,
            )
            for text in prompts
            for k in range(num_images)
        )
        return [one.image for one in drawn]

    def prepare(
        self,
        prompts: Sequence[str],
        progress: Callable[[str], object] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        """Encode prompts ahead of drawing, then let go of T5: what comes next needs the memory.

        cancel: asked before each prompt. What is encoded by then is not encoded again.
        """
        try:
            for text in dict.fromkeys(prompts):
                if cancel is not None and cancel():
                    raise Cancelled("cancelled while prompts were encoded")
                self._captions.ensure(text)
                if progress is not None:
                    progress(text)
        finally:
            self.text_encoder.release()

    def draw(
        self,
        prompt: str,
        *,
        negative: str = "",
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        scheduler: str | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        batched: bool | None = None,
        tile: bool | int | None = None,
        callback: Callable[[Progress], object] | None = None,
        cancel: Callable[[], bool] | None = None,
        decoding: Tiled | None = None,
    ) -> Drawn:
        """One picture; the arguments are those of a call. decoding: called with the VAE's tiles
        done and in all."""
        height, width = self._check_size(height, width)
        solver = make_scheduler(scheduler, self.scheduler_config)
        generators = seed_generators([seed])
        seconds: dict[str, float] = {}
        with _timed(seconds, "text"):
            self.prepare([prompt, negative], cancel=cancel)
        with _timed(seconds, "load"):
            self.transformer.to(self.device)
        batched = self._fits_batched(height, width) if batched is None else batched
        with _timed(seconds, "denoise"):
            side = self.vae.downsample
            shape = (self.opened.config.in_channels, height // side, width // side)
            latents = sample(
                self._denoiser(prompt, negative, height, width),
                initial_noise(shape, generators, self.device),
                solver,
                steps,
                guidance=guidance,
                guidance_interval=guidance_interval,
                batched=batched,
                generators=generators,
                callback=callback,
                cancel=cancel,
            )
        with _timed(seconds, "decode"):
            self.vae.to(self.device)
            tile = self.vae.choose_tile(height, width, tile)
            image = to_images(self.vae.decode(latents, tile=tile, progress=decoding))[0]
        return Drawn(image, prompt, seed, seconds, batched, tile)

    def _make_room(self) -> None:
        """T5 and the transformer need not fit together: on a GPU, the others wait on the host."""
        if self.device.type == "cpu":
            return
        if self.opened.is_loaded:
            self.transformer.to("cpu")
        self.vae.to("cpu")
        if self._graphs is not None:  # recordings hold memory, and read weights that have moved
            self._graphs = CudaGraphs()
        return_cached(self.device)

    def _denoiser(self, prompt: str, negative: str, height: int, width: int) -> PictureDenoiser:
        conditional, unconditional = self._captions.pair(prompt, negative)
        both = PromptEmbeddings.concatenate([unconditional, conditional])
        prompts: dict[Captions, PromptEmbeddings] = {
            "conditional": conditional,
            "unconditional": unconditional,
            "both": both,
        }
        return PictureDenoiser(self.transformer, prompts, height, width, self.device, self._graphs)

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        height = self.native if height is None else height
        width = self.native if width is None else width
        for name, side in (("height", height), ("width", width)):
            if side % self.multiple or side < self.multiple:
                raise ValueError(f"{name} must be a multiple of {self.multiple} pixels, got {side}")
        return height, width

    def _fits_batched(self, height: int, width: int) -> bool:
        """Whether both halves of guidance fit into free memory at once: a block holds about 16
        tensors of its width per token (qkv, the MLP's hidden layer, fp32 temporaries)."""
        config = self.opened.config
        tokens = height * width // self.multiple**2
        size = self.transformer.dtype.itemsize
        return 2 * tokens * config.hidden_size * 16 * size < free_memory(self.device) / 2


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started
