"""The operators in a diffusers pipeline: `python kernels/examples/accelerate_diffusers.py`.

The pipeline is tiny and random, so that nothing is downloaded and a CPU is enough. For a real one,
put this in the place of `tiny_pipeline()`, and a prompt in that of the embeddings:

    diffusers.PixArtSigmaPipeline.from_pretrained(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", torch_dtype=torch.bfloat16
    ).to("cuda")

Needs pixart-fast: `pip install .` in the repository's root.
"""

import diffusers
import torch
from torch import Tensor

from pixart import KVCompression
from pixart.patch import accelerate, restore


def tiny_pipeline() -> diffusers.PixArtSigmaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=72,
        num_attention_heads=2,
        cross_attention_dim=144,
        caption_channels=32,
        use_additional_conditions=False,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        norm_num_groups=4,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtSigmaPipeline(None, None, vae, transformer, scheduler)  # no T5


def draw(pipe: diffusers.PixArtSigmaPipeline) -> Tensor:
    """One picture (1, height, width, 3); the same start and the same caption each time."""
    caption = torch.randn(2, 1, 10, 32, generator=torch.Generator().manual_seed(1))
    kept = torch.ones(1, 10, dtype=torch.int64)
    return pipe(
        negative_prompt=None,
        prompt_embeds=caption[0],
        prompt_attention_mask=kept,
        negative_prompt_embeds=caption[1],
        negative_prompt_attention_mask=kept,
        height=128,
        width=128,
        num_inference_steps=3,
        use_resolution_binning=False,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images


def main() -> None:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe)
    accelerate(pipe)  # in place; without a GPU it changes nothing and warns
    print(f"accelerated: differs by {(draw(pipe) - before).abs().max():.1e} at most")
    restore(pipe)
    # Merged keys and values: on any device, and for weights that were trained with them.
    accelerate(pipe, kv_compression=KVCompression(layers=[1], ratio=2))
    print(f"merged 2×2, untrained: differs by {(draw(pipe) - before).abs().max():.1e}")
    restore(pipe)
    torch.testing.assert_close(draw(pipe), before, rtol=0, atol=0)
    print("restored: the picture of before, bit for bit")


if __name__ == "__main__":
    main()
