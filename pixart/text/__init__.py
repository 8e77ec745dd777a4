"""From prompts to the features of T5. transformers runs it, and is imported inside functions."""

from pixart.text.encoder import PromptEmbeddings, Quantization, TextEncoder

__all__ = ["PromptEmbeddings", "Quantization", "TextEncoder"]
