"""PixArt's pipeline as the published model was trained to be drawn: remote code for diffusers.

Where diffusers' PixArtSigmaPipeline lowercases and cleans prompts, draws noise in the dtype of T5, asks for one
of four native sizes and knows no sizes as conditions, this one does what the reference code does.
"""

import inspect
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer


class PixArtKVPipeline(PixArtSigmaPipeline):
    """Text to pictures.

    family: "sigma", or "alpha", whose captions are in lower case. steps, guidance, guidance_start,
    guidance_end: what a picture is drawn with where a call leaves it open; the last two are the part of the
    trajectory that is guided, from 0 (noise) to 1 (image). few_step: of a distilled model, whose "timesteps" are
    taken where a call names no other number of steps, or those of "also" of as many steps as it names.
    """

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKL,
        transformer: PixArtTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
        family: str = "sigma",
        steps: int = 20,
        guidance: float = 4.5,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        few_step: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        if family not in ("sigma", "alpha"):
            raise ValueError(f'family must be "sigma" or "alpha", got {family!r}')
        if type(transformer).__name__ != "PixArtKVTransformer2DModel":
            raise ValueError(
                "transformer must be a PixArtKVTransformer2DModel, which has the weights of compression, "
                f"got {type(transformer).__name__}"
            )
        self.register_to_config(
            family=family,
            steps=steps,
            guidance=guidance,
            guidance_start=guidance_start,
            guidance_end=guidance_end,
            few_step=few_step,
        )

    def _text_preprocessing(self, text: Any, clean_caption: bool = False) -> list[str]:
        """As captions were in training: α's in lower case, Σ's as they are."""
        if clean_caption:
            raise ValueError(
                "clean_caption must be False, got True: captions are taken as they are"
            )
        texts = list(text) if isinstance(text, list | tuple) else [text]
        return [(one.lower() if self.config.family == "alpha" else one).strip() for one in texts]

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # fewer options than diffusers' own, each of which works
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str = "",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        guidance_interval: tuple[float, float] | None = None,
        max_sequence_length: int | None = None,
        callback_on_step_end: Any = None,
        timesteps: list[int] | None = None,
    ) -> Any:
        """Pictures of the prompts. None is what the model says of itself, or the native square.

        height, width: pixels. generator: one for all pictures, or one for each. latents: unit normal noise
        (B, C, h, w) to begin with. output_type: "pil", "np", "pt", or "latent". max_sequence_length: tokens
        of a prompt. callback_on_step_end: called with the pipeline, step, timestep and {"latents": ...}.
        timesteps: in the place of a number of steps, falling, for a scheduler that takes them.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
        if not prompts:
            raise ValueError("prompt must be a text or a list of texts, got none")
        height, width = self._size(height), self._size(width)
        scale = self.config.guidance if guidance_scale is None else guidance_scale
        interval = guidance_interval or (self.config.guidance_start, self.config.guidance_end)
        if not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval must be 0 <= start <= end <= 1, got {tuple(interval)}"
            )
        device = self._execution_device
        embeds = self._embed(
            prompts, negative_prompt, num_images_per_prompt, scale > 1, max_sequence_length, device
        )
        count = len(prompts) * num_images_per_prompt
        self._set_timesteps(num_inference_steps, timesteps, device)
        latents = self._noise(count, height, width, generator, latents, device)
        latents = self._denoise(
            latents, embeds, scale, interval, (height, width), generator, callback_on_step_end
        )
        image = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=image) if return_dict else (image,)

    def _set_timesteps(self, steps: int | None, timesteps: list[int] | None, device: Any) -> None:
        if timesteps is not None and steps not in (None, len(timesteps)):
            raise ValueError(
                f"timesteps must be as many as num_inference_steps, {steps}, got {len(timesteps)}"
            )
        few_step = self.config.few_step or {}
        walks = [few_step["timesteps"], *few_step.get("also", [])] if few_step else []
        own = next((walk for walk in walks if steps in (None, len(walk))), None)
        timesteps = own if timesteps is None else timesteps
        taken = inspect.signature(self.scheduler.set_timesteps).parameters
        if timesteps is not None and "timesteps" in taken:
            self.scheduler.set_timesteps(timesteps=list(timesteps), device=device)
        elif timesteps is not None and timesteps is not own:
            raise ValueError(
                f"timesteps must be left out for {type(self.scheduler).__name__}, which chooses them itself"
            )
        else:
            steps = self.config.steps if steps is None else steps
            self.scheduler.set_timesteps(steps, device=device)

    def _size(self, side: int | None) -> int:
        native = self.transformer.config.sample_size * self.vae_scale_factor
        multiple = self.vae_scale_factor * self.transformer.config.patch_size
        side = native if side is None else side
        if side <= 0 or side % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {side}")
        return side

    def _embed(
        self,
        prompts: list[str],
        negative: str,
        copies: int,
        is_guided: bool,
        length: int | None,
        device: Any,
    ) -> dict[bool, tuple[Tensor, Tensor]]:
        """Features (B, L, C) and mask (B, L) of the prompts, by whether the negative half is in front."""
        most = self.transformer.config.model_max_length
        if length is not None and not 1 <= length <= most:
            raise ValueError(f"max_sequence_length must be from 1 to {most}, got {length}")
        features, mask, others, other_mask = self.encode_prompt(
            prompts,
            do_classifier_free_guidance=is_guided,
            negative_prompt=negative,
            num_images_per_prompt=copies,
            device=device,
            max_sequence_length=length or most,
        )
        embeds = {False: (features, mask)}
        if is_guided:
            if self.transformer.config.has_null_caption and not negative.strip():
                # The reference code of α shows its stored table through the prompt's own mask.
                table = self.transformer.null_caption[None, : features.shape[1]]
                others, other_mask = table.to(features).expand_as(features), mask
            embeds[True] = (torch.cat([others, features]), torch.cat([other_mask, mask]))
        return embeds

    def _noise(
        self,
        count: int,
        height: int,
        width: int,
        generator: Any,
        latents: Tensor | None,
        device: Any,
    ) -> Tensor:
        """Of float32 whatever the model computes in: a seed is the same picture in any dtype."""
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator must be one, or {count}, got {len(generator)}")
        side = self.vae_scale_factor
        shape = (count, self.transformer.config.in_channels, height // side, width // side)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must be {shape}, got {tuple(latents.shape)}")
        return latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

    def _denoise(
        self,
        latents: Tensor,
        embeds: dict[bool, tuple[Tensor, Tensor]],
        scale: float,
        interval: tuple[float, float],
        size: tuple[int, int],
        generator: Any,
        callback: Any,
    ) -> Tensor:
        timesteps = self.scheduler.timesteps
        taken = inspect.signature(self.scheduler.step).parameters
        options = {"eta": 0.0} if "eta" in taken else {}
        if "generator" in taken:
            options["generator"] = generator
        with self.progress_bar(total=len(timesteps)) as bar:
            for number, timestep in enumerate(timesteps):
                is_guided = scale > 1 and interval[0] <= number / len(timesteps) < interval[1]
                inputs = self.scheduler.scale_model_input(latents, timestep)
                output = self._predict(inputs, timestep, *embeds[is_guided], size)
                if is_guided:
                    negative, positive = output.chunk(2)
                    output = negative + scale * (positive - negative)
                latents = self.scheduler.step(
                    output, timestep, latents, return_dict=False, **options
                )[0]
                if callback is not None:
                    changed = callback(self, number, timestep, {"latents": latents})
                    latents = (changed or {}).get("latents", latents)
                bar.update()
        return latents

    def _predict(
        self,
        inputs: Tensor,
        timestep: Tensor,
        features: Tensor,
        mask: Tensor,
        size: tuple[int, int],
    ) -> Tensor:
        """(B, C, h, w), float32, without learned variances; of twice the batch if the features are."""
        model = self.transformer
        batch = features.shape[0]
        inputs = inputs.repeat(batch // inputs.shape[0], 1, 1, 1)
        sizes: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if model.config.use_additional_conditions:
            pixels = torch.tensor([size], dtype=torch.float32, device=inputs.device)
            ratio = pixels[:, :1] / pixels[:, 1:]
            sizes = {
                "resolution": pixels.repeat(batch, 1),
                "aspect_ratio": ratio.repeat(batch, 1),
            }
        output = model(
            inputs.to(model.dtype),
            encoder_hidden_states=features.to(model.dtype),
            # Never in the dtype of the model: bfloat16 turns 999 into 1000.
            timestep=torch.full((batch,), float(timestep), device=inputs.device),
            added_cond_kwargs=sizes,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]
        return output.float()[:, : model.config.in_channels]

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """One picture at a time, for memory, and so that a picture is the same in any batch."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        latents = (latents / config.scaling_factor + shift).to(self.vae.dtype)
        decoded = [self.vae.decode(one, return_dict=False)[0].float() for one in latents.split(1)]
        return self.image_processor.postprocess(torch.cat(decoded), output_type=output_type)
