"""A LLaVA of transformers with random weights, for the vocabulary and the chat of whoever builds it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


def build(
    directory: Path, words: Sequence[str], chat_template: str, change: Callable[[Any], object]
) -> Path:
    """words: of which [PAD] is the first, [SEP] ends and <image> is number 5. change: of the model, before it
    is saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", eos_token="[SEP]", unk_token="[UNK]",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=32, patch_size=16),
        text_config=LlamaConfig(**SIZES, vocab_size=len(words), eos_token_id=3, pad_token_id=0),
        image_token_id=5,
    )
    model = LlavaForConditionalGeneration(config)
    change(model)
    model.save_pretrained(directory)
    return directory
