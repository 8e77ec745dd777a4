"""From prompts to the features of T5; transformers is imported here and nowhere else."""

from pixart.text.encoder import PromptEmbeddings, Quantization, TextEncoder

__all__ = ["PromptEmbeddings", "Quantization", "TextEncoder"]
