"""Judges of transformers from tiny configurations, with random weights: BLIP-VQA and LLaVA."""

from pathlib import Path

import tiny_llava
import torch
from tiny_llava import SIZES

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "yes", "no", "Yes", "No", "is",
         "it", "red", "blue", "fire", "hydrant", "?", "Please", "answer", "or", "no."]  # fmt: skip


def build_blip(directory: Path) -> Path:
    """The vocabulary has [DEC] and [ENC] behind the tokenizer's words, as the published one."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForQuestionAnswering,
        BlipImageProcessor,
        BlipProcessor,
    )

    directory.mkdir(parents=True)
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    text = SIZES | {"vocab_size": len(WORDS) + 2, "encoder_hidden_size": 16, "bos_token_id": len(WORDS),
                    "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}  # fmt: skip
    vision = SIZES | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision)
    model = BlipForQuestionAnswering(config)
    _spread(model)
    model.save_pretrained(directory)
    tokenizer = BertTokenizer(str(directory / "vocab.txt"))
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(directory)
    return directory


def build_llava(directory: Path, answer: str = " ") -> Path:
    """answer: what its chat template writes before an answer."""
    chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}it"
        + answer
        + "{{ m['content'][0]['text'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}it{% endif %}"
    )
    return tiny_llava.build(directory, WORDS, chat_template, _spread)


def _spread(model: torch.nn.Module) -> None:
    """Larger weights: at their usual size every answer of a random network is as likely as any."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
