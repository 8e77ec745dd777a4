"""Transformers of several sizes under one name each, as the scalability paper compares them.

"On the Scalability of Diffusion-based Text-to-Image Generation" (arXiv 2404.02883), table 2: widths and
depths around XL/2, 256 px, 16 heads. `pixart.scaling table` counts them, and `size: NAME` in a recipe, or
`--size NAME`, trains one from random weights.
"""

from pixart.config import MAX_LENGTH, PixArtConfig

HEADS, LATENT = 16, 32  # head dimensions of 64, 72 and 96; 256 px
WIDTHS, DEPTHS = (1024, 1152, 1536), (28, 56)
CLIP_H = (1024, 77)  # channels and tokens of OpenCLIP-H's text
T5_XXL = (4096, MAX_LENGTH["alpha"])


def _variants() -> dict[str, PixArtConfig]:
    """Plain names are of OpenCLIP-H's text, and embed it where the paper does: not at its own width."""
    found = {}
    for width in WIDTHS:
        for depth in DEPTHS:
            name, same = f"pixart-h{width}-d{depth}", width == CLIP_H[0]
            found[name] = _variant(width, depth, CLIP_H, caption_embedding=not same)
            if same:
                found[f"{name}-mlp"] = _variant(width, depth, CLIP_H)
            found[f"{name}-t5"] = _variant(width, depth, T5_XXL)
    return found


def _variant(
    width: int, depth: int, text: tuple[int, int], *, caption_embedding: bool = True
) -> PixArtConfig:
    channels, tokens = text
    return PixArtConfig(
        input_size=LATENT,
        hidden_size=width,
        depth=depth,
        num_heads=HEADS,
        caption_channels=channels,
        model_max_length=tokens,
        caption_embedding=caption_embedding,
    )


VARIANTS = _variants()
