"""From requests to pictures: what the command line, previews, evaluation and other people's code share.

The stages run one after the other and hold memory one after the other: T5 encodes every prompt and
is released, the transformer denoises, the VAE decodes. A picture is drawn alone unless a larger batch
is asked for, so it has the same bits whatever else was asked for. The transformer's names and shapes
are checked at once, its weights are read when T5 is done.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pixart.checkpoint.load import OpenedTransformer
from pixart.config import EMBEDDED, Family, KVCompression, PixArtConfig
from pixart.device import check_attention, check_cuda_graph, return_cached
from pixart.few_step import FewStep
from pixart.files import fingerprint_files
from pixart.model.transformer import PixArt
from pixart.pipeline import defaults, editing, fast, load
from pixart.pipeline.captions import CaptionStore, NullCaption
from pixart.pipeline.controls import Controls
from pixart.pipeline.defaults import Sampling
from pixart.pipeline.directory import choose_family, family_of, read_sampling, read_scheduler
from pixart.pipeline.drawing import Hooks, draw_all
from pixart.pipeline.graphs import CudaGraphChoice, PictureGraphs
from pixart.pipeline.inputs import Inputs, name_pictures
from pixart.pipeline.request import SETTINGS, Drawn, Request, check_keys
from pixart.pipeline.stages import check_stages, shares_of, with_stages
from pixart.pipeline.upscale import UPSCALE_GUIDANCE
from pixart.plans.plan import Plan
from pixart.plans.schedule import KVSchedule
from pixart.quantize import Quantized, check_quantize
from pixart.resolution import Resolved
from pixart.sampler.loop import Cancelled, Progress
from pixart.sampler.mesh import Mesh
from pixart.sampler.schedulers import Scheduler, make_scheduler
from pixart.text.encoder import Quantization, TextEncoder, TextMemory
from pixart.vae.autoencoder import VAE, Tiled
from pixart.vae.preview import Preview

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger("pixart")
_BESIDE = ("text_encoder", "vae", "control")  # parts that are not the transformer's
OPENING = 3  # parts that from_pretrained opens: the checkpoint, the VAE, the scheduler


@dataclass
class Pipeline:
    """A text encoder, a transformer, a VAE and a scheduler; see `from_pretrained`.

    sampling: what is drawn with where a request leaves it open, before the scheduler's own numbers, and after
    what the model was distilled for (`few_step`).
    attention: the precision of self-attention's products, "int8" or "fp8", None for that of the model.
    quantize: the numbers that the transformer's linear weights were quantised to when they were read.
    plan: what requests take where they leave it open, before `sampling`.
    is_silent: whoever draws with it tells remarks itself; else they are logged, each sentence once.
    weight_files: what the parts were read from, for `weights`. lora_weights: what each LoRA that was merged is
    times. resident: all parts stay where they are once
    they are loaded, for whoever draws again and again and has memory for all of them.
    """

    opened: OpenedTransformer
    text_encoder: TextEncoder
    vae: VAE
    scheduler_config: dict[str, Any]
    device: torch.device
    source: str
    family: Family
    null_caption: NullCaption | None = None
    cuda_graph: CudaGraphChoice = "auto"
    sampling: Sampling = Sampling()
    weight_files: Mapping[str, Sequence[Path]] = field(default_factory=dict, repr=False)
    attention: str | None = None
    plan: Plan | None = None
    controls: Controls = field(default_factory=Controls, repr=False)
    lora_weights: tuple[float, ...] = ()
    resident: bool = False
    is_silent: bool = False
    quantize: Quantized | None = None
    mesh: Mesh | None = field(init=False, default=None, repr=False)
    captions: CaptionStore = field(init=False, repr=False)
    graphs: PictureGraphs = field(init=False, repr=False)
    _preview: Preview | None = field(init=False, default=None, repr=False)
    _said: set[str] = field(init=False, default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.graphs = PictureGraphs(self.cuda_graph, self.device)
        check_attention(self.attention, self.device)
        self.captions = CaptionStore(
            self.text_encoder, self.opened, self.family, self.null_caption, self.make_room
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
        text_encoder: str | Path | None = None,
        text_encoder_dtype: torch.dtype | Quantization | None = None,
        text_encoder_memory: TextMemory = "auto",
        kv_compression: KVCompression | None = None,
        variant: str | None = None,
        ema: bool = False,
        null_caption: NullCaption | None = None,
        cuda_graph: CudaGraphChoice = "auto",
        attention: str | None = None,
        quantize: Quantized | None = None,
        plan: str | Path | None = None,
        control: Sequence[str | Path] = (),
        preprocessors: Mapping[str, str | Path] | None = None,
        cache_dir: str | Path | None = "auto",
        progress: Callable[[], object] | None = None,
        sizes_only: bool = False,
    ) -> "Pipeline":
        """Open a pipeline directory, a hub id, a release ("sigma-1024") or the embedded model ("shapes").

        transformer: another checkpoint in its place: an official .pth, ours, a diffusers directory; what
        it leaves out (heads, positions) is that of the release it is named after or of the pipeline's
        own transformer, if width and depth agree. Or a model, which keeps its dtype and mode and takes
        no option of checkpoints. config: replaces what one says. ema: its averaged weights. lora:
        adapters (path or hub id, weight) to merge. variant: "fp16" or another, where a folder has it.
        kv_compression: opens a dense transformer as a compressed one. device: None takes CUDA when there is
        one. dtype: None is bf16 on CUDA, fp32 on a CPU. text_encoder_dtype: None is bf16 for an encoder of
        2 GiB or more, else dtype; "8bit" and "4bit" need CUDA. text_encoder: a file of T5 in the place of the
        pipeline's weights, in fp8 or GGUF too (pixart.text.stored). text_encoder_memory: "resident" keeps T5 on
        the device while prompts are read, "stream" reads it from the disk block by block, "auto" does that
        where it does not fit; features have the same bits. null_caption: how guidance sees the empty
        caption: through its own mask ("own-mask", as diffusers does) or the prompt's ("prompt-mask", as the
        reference code does; None takes it for an α checkpoint with a stored null caption). cuda_graph: replay
        recorded steps, for the CPU launches those of small pictures too slowly: "auto" on CUDA and up to
        1024×1024 pixels; where a step cannot be recorded, True raises GraphError, "auto" warns and draws
        the picture without, from its first step. attention: "int8" or "fp8" multiplies 8-bit numbers in
        self-attention, see PixArt.set_attention. quantize: "int8" or "fp8" keeps linear weights in 8 bits, once
        adapters are merged (pixart.quantize; needs torchao). plan: "balanced", "fast" or a file of
        pixart.calibrate, to do less work a picture, None or "off" for all of it. control: ControlNets, each a
        path, a hub id, id/file or a
        short name ("controlnet-512"), of which requests name the pictures. preprocessors: where the networks
        of pixart.preprocess are. cache_dir: of prompt embeddings. progress: called OPENING times.
        sizes_only: reads no weights, for a device that need not be here: what pixart.pipeline.memory plans for.
        CheckpointError for what cannot be opened, ValueError for other options.
        """
        load.check_null_caption(null_caption)
        device, dtype = load.choose_numbers(device, dtype, sizes_only)
        check_cuda_graph(cuda_graph, device)
        check_attention(attention, device)
        check_quantize(quantize, dtype, device, sizes_only)
        fast.check_word(plan)
        advance = progress or (lambda: None)
        found = load.find_source(source, transformer, variant, text_encoder)
        opened = load.open_denoiser(
            found,
            transformer,
            dtype,
            config=config,
            kv_compression=kv_compression,
            ema=ema,
            lora=lora,
            quantize=quantize,
            sizes_only=sizes_only,
        )
        controls = load.open_controls(control, opened, opened.dtype or dtype, variant)
        advance()
        numbers = text_encoder_dtype, dtype, device
        encoder = load.open_text_encoder(
            found, opened.config, *numbers, cache_dir=cache_dir, memory=text_encoder_memory
        )
        vae = load.open_vae(found, dtype, device, sizes_only)
        advance()
        scheduler_config = read_scheduler(found.directory)
        sampling = read_sampling(found.directory)
        advance()
        family = choose_family(opened.config, family_of(found.directory), is_guest=found.is_guest)
        pipe = cls(
            opened, encoder, vae, scheduler_config, device, found.name, family, null_caption,
            cuda_graph, sampling, load.weight_files(found, lora, controls),
            attention, None, Controls(controls, device, preprocessors), tuple(one for _, one in lora),
            quantize=quantize,
        )  # fmt: skip
        pipe.plan = fast.find_plan(plan, pipe, found.directory)
        return pipe

    @property
    def transformer(self) -> PixArt:
        """The model, read into the device's memory when it is first asked for."""
        model = self.opened.load(self.device)
        model.set_attention(self.attention)
        return model

    @transformer.setter
    def transformer(self, model: PixArt) -> None:
        if self.plan is not None and self.plan.model is not None:
            raise ValueError("plan must be None before another transformer takes its model's place")
        self.opened.replace(model)
        self.quantize = None
        self.graphs.clear()
        beside = self.weight_files.items()
        self.weight_files = {part: files for part, files in beside if part in _BESIDE}
        self.__dict__.pop("weights", None)

    def share(self, mesh: Mesh | None) -> None:
        """Draw each picture together with other processes, None for alone. All must ask for the same
        pictures, which all are given. ValueError where CUDA graphs are asked for."""
        self.graphs.clear()
        self.mesh, self.graphs = mesh, PictureGraphs(self.cuda_graph, self.device, mesh is not None)

    @property
    def few_step(self) -> FewStep | None:
        """How the model is drawn, if it or an adapter in it was distilled."""
        return self.opened.config.few_step

    @property
    def scheduler(self) -> str | None:
        """The name of the one to draw with by default; None for that of scheduler_config."""
        return None if self.few_step is None else self.few_step.scheduler

    @property
    def multiple(self) -> int:
        """Heights and widths must be multiples of this many pixels."""
        return self.vae.downsample * self.opened.config.patch_size

    @property
    def native(self) -> int:
        """The side in pixels of the square that the transformer was trained for."""
        return self.opened.config.input_size * self.vae.downsample

    @property
    def memory(self) -> int | None:
        """Bytes by which batched and tile are chosen where a request leaves them open, so that a picture's
        bits do not depend on what else takes memory; None, the default, asks what is free before each."""
        return self.vae.memory

    @memory.setter
    def memory(self, count: int | None) -> None:
        self.vae.memory = count

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
        guidance_interval: tuple[float, float] | None = None,
        batched: bool | None = None,
        tile: bool | int | None = None,
        image: "Image | str | Path | None" = None,
        mask: "Image | str | Path | None" = None,
        control_image: "Image | str | Path | Sequence[Image | str | Path] | None" = None,
        callback: Callable[[Progress], object] | None = None,
        cancel: Callable[[], bool] | None = None,
        **settings: Any,
    ) -> "list[Image]":
        """The pictures, prompt by prompt; image k of a prompt has the seed `seed` + k.

        height, width: pixels, None for the native square. steps, guidance, guidance_interval: None for
        the pipeline's own, or else the scheduler's (20, 4.5, all of the trajectory). scheduler: a name
        of pixart.sampler.SCHEDULERS, None for the pipeline's own. batched: both halves of guidance in
        one call; None decides by free memory. tile: of the VAE, None decides by free memory. cancel:
        asked before each step; when it returns True, pixart.sampler.Cancelled is raised.
        image, mask, control_image: pictures or their files. settings: the other fields of `Request`, such
        as strength, outpaint, upscale or pag.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        check_keys(settings, SETTINGS)
        pictures, names = name_pictures(image, mask, control_image)
        first = Request(
            "", negative, seed, height=height, width=width, steps=steps, guidance=guidance,
            guidance_interval=guidance_interval, scheduler=scheduler, batched=batched, tile=tile,
            **names, **settings,
        )  # fmt: skip
        requests = (
            replace(first, prompt=text, seed=seed + k)
            for text in prompts
            for k in range(num_images)
        )
        drawn = self.draw_many(requests, pictures=pictures, callback=callback, cancel=cancel)
        return [one.image for one in drawn]

    def size_of(
        self, request: Request, *, pictures: "Mapping[str, Image] | None" = None
    ) -> Resolved:
        """The size in pixels that a request asks for here, with a note for people; before --upscale.
        pictures are those of `draw_many`. ValueError if the tokens do not tile it."""
        return editing.size_of(
            request, Inputs(pictures), native=self.native, multiple=self.multiple
        )

    def resolve(
        self, request: Request, *, pictures: "Mapping[str, Image] | None" = None
    ) -> Request:
        """The request with what this model takes where it leaves something open: sizes in pixels,
        scheduler, steps, guidance and its interval, and the numbers of all that it asks for beside.
        ValueError for what this model cannot draw, or for a picture that it cannot be drawn from.

        batched and tile stay open until free memory decides, and a scheduler of its own that has no name
        here stays None. pictures are those of `draw_many`."""
        return self._resolve(request, Inputs(pictures))

    def _resolve(self, request: Request, inputs: Inputs) -> Request:
        if request.kv_schedule is not None:
            KVSchedule.parse(request.kv_schedule).check(self.opened.config)
        request = fast.with_plan(request, self)
        name = request.scheduler or self.scheduler or self.own_scheduler
        solver, multiple = self.solver(request.scheduler), self.multiple
        is_guest = bool(request.scheduler or self.scheduler)
        size = editing.size_of(request, inputs, native=self.native, multiple=multiple)
        editing.check_inputs(request, size, inputs)
        if request.only_enlarges and request.guidance is None:
            request = replace(request, guidance=UPSCALE_GUIDANCE)
        asked = request
        request = defaults.with_defaults(
            request, size, solver, name, self.sampling, is_guest, self.few_step
        )
        request = with_stages(request, multiple)
        shares = shares_of(request, multiple, solver)
        defaults.check_intervals(asked, request, solver)
        request = defaults.with_guidance(request, self.opened.config.depth, shares)
        request = self.controls.resolve(request, inputs)
        check_stages(request, multiple, solver)
        fast.check_reuse(request, self.opened.config, solver)
        return request

    def remarks(self, request: Request) -> list[str]:
        """What to tell people of a resolved request that can be drawn, but hardly as it is meant."""
        shares = shares_of(request, self.multiple, self.solver(request.scheduler))
        return defaults.remarks_on(request, self.few_step, shares)

    def _log_remarks(self, requests: Iterable[Request]) -> None:
        kinds = {replace(one, prompt="", negative=one.negative[:1], seed=0) for one in requests}
        for remark in sorted({text for one in kinds for text in self.remarks(one)} - self._said):
            self._said.add(remark)
            logger.warning("%s", remark)

    def prepare(
        self,
        prompts: Sequence[str],
        progress: Callable[[str], object] | None = None,
        cancel: Callable[[], bool] | None = None,
    ) -> None:
        """Encode prompts ahead of drawing, then let go of T5: what comes next needs the memory, unless the
        pipeline is `resident`.

        cancel: asked before each prompt, or before each pass of several where T5 is streamed. What is encoded
        by then is not encoded again.
        """

        def ask() -> None:
            if cancel is not None and cancel():
                raise Cancelled("cancelled while prompts were encoded")

        try:
            for text in self.captions.ensure_all(prompts, ask):
                if progress is not None:
                    progress(text)
        finally:
            if not self.resident:
                self.text_encoder.release()

    def forget_prompts(self) -> None:
        """Let go of what `prepare` keeps in host memory: 2.4 MB a prompt of T5-XXL."""
        self.captions.held.clear()

    def draw(
        self,
        request: Request,
        *,
        pictures: "Mapping[str, Image] | None" = None,
        callback: Callable[[Progress], object] | None = None,
        cancel: Callable[[], bool] | None = None,
        decoding: Tiled | None = None,
    ) -> Drawn:
        """One picture; the options are those of `draw_many`."""
        hooks: dict[str, Any] = {"callback": callback, "cancel": cancel, "decoding": decoding}
        [drawn] = self.draw_many([request], pictures=pictures, **hooks)
        return drawn

    def draw_many(
        self,
        requests: Iterable[Request],
        *,
        batch: int = 1,
        pictures: "Mapping[str, Image] | None" = None,
        callback: Callable[[Progress], object] | None = None,
        cancel: Callable[[], bool] | None = None,
        encoding: Callable[[str], object] | None = None,
        decoding: Tiled | None = None,
    ) -> Iterator[Drawn]:
        """The pictures in the order of the requests, each as soon as it is drawn.

        All requests are checked before anything runs, and all prompts encoded before the first
        picture. batch: so many pictures at most are denoised in one pass, if they follow each other
        and agree in everything but prompts and seed: their bits may differ by rounding from those of the
        picture drawn alone. NotFinitePicture is raised for one of NaN or infinity, after those before.
        pictures: what requests name as image, mask or control_image; a name that is not there is a file.

        callback: called after every step of a pass. cancel: asked before each prompt, pass and step; when it
        returns True, pixart.sampler.Cancelled is raised. encoding: called with each prompt when it is
        encoded. decoding: called with the VAE's tiles done and in all.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        inputs = Inputs(pictures)
        resolved = [self._resolve(request, inputs) for request in requests]
        if not self.is_silent:
            self._log_remarks(resolved)
        hooks = Hooks(callback, cancel, encoding, decoding)
        return draw_all(self, resolved, batch, hooks, inputs)

    def preview(self, latents: torch.Tensor) -> "list[Image]":
        """What a callback's Progress.predicted, (B, C, h, w), is a picture of: RGB, one pixel for each
        latent. pixart.vae.Preview(pipe.vae, taesd) decodes at full size instead."""
        self._preview = self._preview or Preview(self.vae)
        return self._preview(latents)

    def solver(self, name: str | None) -> Scheduler:
        return make_scheduler(name or self.scheduler, self.scheduler_config)

    @property
    def shown_null_caption(self) -> NullCaption:
        """How guidance sees the empty caption, where `null_caption` is None too."""
        return self.captions.mask

    def caption_tokens(self, prompt: str, negative: str = "") -> tuple[int, int]:
        """How many tokens of a prompt, and of what guidance compares it with, are seen."""
        conditional, unconditional = self.captions.pair(prompt, negative)
        return int(conditional.mask.sum()), int(unconditional.mask.sum())

    @cached_property
    def own_scheduler(self) -> str | None:
        """The name of scheduler_config's, None where it has none here."""
        return defaults.name_of_scheduler(self.solver(None), self.scheduler_config)

    @cached_property
    def weights(self) -> dict[str, str]:
        """A sha256 of each part's weight files ("transformer", "text_encoder", "vae", "lora", "control"), as
        `files.fingerprint` reads them, whatever their names. A model of the caller's has none."""
        return {
            part: fingerprint_files({str(number): file for number, file in enumerate(files)})
            for part, files in sorted(self.weight_files.items())
        }

    def weights_of(self, request: Request) -> dict[str, str]:
        """`weights`, and a digest of the networks of each preprocessor of a resolved request."""
        return self.weights | self.controls.digests(request)

    def make_room(self) -> None:
        """T5 and the transformer need not fit together: on a GPU, all but T5 waits on the host."""
        if self.device.type == "cpu" or self.resident:
            return
        if self.opened.is_loaded:
            self.transformer.to("cpu")
        self.controls.move("cpu")
        self.vae.to("cpu")
        self.graphs.clear()  # recordings hold memory, and read weights that have moved
        return_cached(self.device)
