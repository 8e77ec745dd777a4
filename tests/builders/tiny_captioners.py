"""Vision-language models of transformers with random weights, and ten words."""

from pathlib import Path
from typing import Any

import tiny_llava
import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "a", "red", "circle", "blue"]


def build_blip(directory: Path) -> Path:
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    (directory / "vocab.txt").parent.mkdir(parents=True)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    text = sizes | {"vocab_size": len(WORDS), "encoder_hidden_size": 16, "bos_token_id": 2,
                    "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}  # fmt: skip
    vision = sizes | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision)
    BlipForConditionalGeneration(config).save_pretrained(directory)
    tokenizer = BertTokenizer(str(directory / "vocab.txt"))
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(directory)
    return directory


def build_llava(directory: Path) -> Path:
    chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}a"
    )
    return tiny_llava.build(directory, WORDS, chat_template, _without_pictures)


def _without_pictures(model: Any) -> None:
    model.generation_config.suppress_tokens = [5]  # no picture is in an answer
