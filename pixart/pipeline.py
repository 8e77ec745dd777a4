"""From prompts to pictures: what the command line, training previews and other people's code share.

The stages run one after the other and hold memory one after the other: T5 encodes every prompt and
is released, the transformer denoises one image at a time, the VAE decodes. Image k of a call is
drawn alone, so it has the same bits whatever else was asked for.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from pixart.checkpoint import load_transformer, resolve
from pixart.config import MAX_LENGTH, KVCompression
from pixart.denoiser import CudaGraphs, PictureDenoiser
from pixart.model import PixArt
from pixart.pipeline_files import (
    EMBEDDED,
    check_fit,
    open_directory,
    read_json,
    reading,
    text_dtype,
)
from pixart.sampler import (
    Captions,
    Progress,
    check_sampling,
    initial_noise,
    make_scheduler,
    sample,
    seed_generators,
)
from pixart.text import PromptEmbeddings, Quantization, TextEncoder
from pixart.vae import VAE, free_memory, to_images

if TYPE_CHECKING:
    from PIL.Image import Image

NullCaption = Literal["own-mask", "prompt-mask"]


@dataclass(frozen=True)
class Drawn:
    """One finished picture. seconds: by stage ("text", "denoise", "decode")."""

    image: "Image"
    prompt: str
    seed: int
    seconds: dict[str, float]


@dataclass
class Pipeline:
    """A text encoder, a transformer, a VAE and a scheduler; see `from_pretrained`."""

    transformer: PixArt
    text_encoder: TextEncoder
    vae: VAE
    scheduler_config: dict[str, Any]
    device: torch.device
    source: str
    null_caption: NullCaption | None = None
    cuda_graph: bool = False
    _encoded: dict[str, PromptEmbeddings] = field(default_factory=dict, init=False, repr=False)
    _padded_null: PromptEmbeddings | None = field(default=None, init=False, repr=False)
    _graphs: CudaGraphs | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_cuda_graph(self.cuda_graph, self.device)
        self._graphs = CudaGraphs() if self.cuda_graph else None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = EMBEDDED,
        *,
        transformer: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        text_encoder_dtype: torch.dtype | Quantization | None = None,
        kv_compression: KVCompression | None = None,
        variant: str | None = None,
        null_caption: NullCaption | None = None,
        cuda_graph: bool = False,
        cache_dir: str | Path | None = "auto",
    ) -> "Pipeline":
        """Open a pipeline directory, a hub id or the embedded model ("shapes").

        transformer: another checkpoint in its place: an official .pth, ours, a diffusers directory.
        device: None takes CUDA when there is one. dtype: None is bf16 on CUDA, fp32 on a CPU.
        text_encoder_dtype: None is bf16 for an encoder of 2 GiB or more, else dtype; "8bit" and
        "4bit" need CUDA. kv_compression: opens a dense transformer as a compressed one.
        null_caption: how guidance sees the empty caption: through its own mask ("own-mask", as
        diffusers does), or as the reference code does through the prompt's mask ("prompt-mask").
        None takes the latter only for an α checkpoint that carries its null caption.
        cuda_graph: record a denoising step once per size and replay it, which spares small pictures
        the launches of its kernels; CUDA only.
        cache_dir: of prompt embeddings; None keeps none.
        Raises CheckpointError for what cannot be opened, ValueError for what cannot be honoured.
        """
        if null_caption not in (None, *get_args(NullCaption)):
            raise ValueError(f"null_caption must be own-mask or prompt-mask, got {null_caption!r}")
        device = choose_device(device)
        check_cuda_graph(cuda_graph, device)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        directory = open_directory(source, with_transformer=transformer is None)
        path = directory if transformer is None else resolve(transformer)
        model = load_transformer(path, kv_compression=kv_compression, dtype=dtype, variant=variant)
        encoder_dtype, quantization = text_dtype(directory, text_encoder_dtype, dtype)
        encoder = TextEncoder.from_pretrained(
            directory,
            dtype=encoder_dtype,
            device=device,
            max_length=model.config.model_max_length,
            quantization=quantization,
            cache_dir=cache_dir,
        )
        check_fit(model, path, directory)
        with reading(directory / "vae"):
            vae = VAE.from_pretrained(directory, dtype=dtype, device=device)
        scheduler_config = read_json(directory / "scheduler" / "scheduler_config.json")
        name = str(source) if transformer is None else f"{source} with {transformer}"
        return cls(model, encoder, vae, scheduler_config, device, name, null_caption, cuda_graph)

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return self.vae.downsample * self.transformer.config.patch_size

    @property
    def native(self) -> int:
        """The side in pixels of the square that the transformer was trained for."""
        return self.transformer.config.input_size * self.vae.downsample

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
        self.prepare([*prompts, negative])
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
        self, prompts: Sequence[str], progress: Callable[[str], object] | None = None
    ) -> None:
        """Encode prompts ahead of drawing, then let go of T5: what comes next needs the memory."""
        for text in dict.fromkeys(prompts):
            self._features(text)
            if not text.strip():
                self._whole_null()
            if progress is not None:
                progress(text)
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
    ) -> Drawn:
        """One picture; the arguments are those of a call."""
        height, width = self._check_size(height, width)
        solver = make_scheduler(scheduler, self.scheduler_config)
        generators = seed_generators([seed])
        seconds: dict[str, float] = {}
        with _timed(seconds, "text"):
            denoise = self._denoiser(prompt, negative, height, width)
        with _timed(seconds, "denoise"):
            self.transformer.to(self.device)
            side = self.vae.downsample
            shape = (self.transformer.config.in_channels, height // side, width // side)
            latents = sample(
                denoise,
                initial_noise(shape, generators, self.device),
                solver,
                steps,
                guidance=guidance,
                guidance_interval=guidance_interval,
                batched=self._fits_batched(height, width) if batched is None else batched,
                generators=generators,
                callback=callback,
                cancel=cancel,
            )
        with _timed(seconds, "decode"):
            image = to_images(self.vae.decode(latents, tile=tile))[0]
        return Drawn(image, prompt, seed, seconds)

    def _features(self, text: str) -> PromptEmbeddings:
        # α was trained on lower-case captions, Σ on captions as they are.
        text = (text.lower() if self._is_alpha else text).strip()
        if text not in self._encoded:  # kept in host memory: a file may hold 30,000 prompts
            with reading(self.text_encoder.directory / "text_encoder"):
                self._encoded[text] = self.text_encoder.encode([text]).to("cpu")
        return self._encoded[text]

    @property
    def _is_alpha(self) -> bool:
        return self.transformer.config.model_max_length == MAX_LENGTH["alpha"]

    def _null(self, prompt: PromptEmbeddings) -> PromptEmbeddings:
        """The empty caption as this family's guidance sees it (see from_pretrained)."""
        whole = self._whole_null()
        if whole is None:
            return self._features("")
        return whole.to(prompt.features.device, prompt.features.dtype).with_mask_of(prompt)

    def _whole_null(self) -> PromptEmbeddings | None:
        """The empty caption at full length where the prompt's mask decides what of it is seen."""
        has_table = self._is_alpha and getattr(self.transformer, "null_caption_stored", False)
        if (self.null_caption or ("prompt-mask" if has_table else "own-mask")) == "own-mask":
            return None
        if has_table:
            table = self.transformer.y_embedder.y_embedding[None]
            return PromptEmbeddings(table, torch.ones(table.shape[:2], dtype=torch.bool))
        if self._padded_null is None:
            with reading(self.text_encoder.directory / "text_encoder"):
                null = self.text_encoder.encode([""], keep_padding=True)
            self._padded_null = null.to("cpu")
        return self._padded_null

    def _denoiser(self, prompt: str, negative: str, height: int, width: int) -> PictureDenoiser:
        conditional = self._features(prompt)
        unconditional = self._features(negative) if negative.strip() else self._null(conditional)
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
        config = self.transformer.config
        tokens = height * width // self.multiple**2
        size = self.transformer.dtype.itemsize
        return 2 * tokens * config.hidden_size * 16 * size < free_memory(self.device) / 2


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def check_cuda_graph(wanted: bool, device: torch.device) -> None:
    if wanted and device.type != "cuda":
        raise ValueError(
            f"cuda_graph must be False on {device}, got True: only a CUDA device records its "
            "launches; leave it out"
        )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the best there is. ValueError when it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {str(device)!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device must be there, got {str(device)!r}, but PyTorch finds no CUDA device; "
            "use --device cpu, or install a CUDA build of torch"
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device must be below cuda:{count}, got {str(device)!r}")
    return chosen
