"""Judges of transformers from tiny configurations, with random weights: BLIP-VQA and LLaVA."""

from pathlib import Path

import torch

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "yes", "no", "Yes", "No", "is",
         "it", "red", "blue", "fire", "hydrant", "?", "Please", "answer", "or", "no."]  # fmt: skip
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip


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

    fast = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
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
        chat_template="{% for m in messages %}{% if m['role'] == 'assistant' %}it"
        + answer
        + "{{ m['content'][0]['text'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}it{% endif %}",
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES, image_size=32, patch_size=16),
        text_config=LlamaConfig(**SIZES, vocab_size=len(WORDS), eos_token_id=3, pad_token_id=0),
        image_token_id=5,
    )
    model = LlavaForConditionalGeneration(config)
    _spread(model)
    model.save_pretrained(directory)
    return directory


def _spread(model: torch.nn.Module) -> None:
    """Larger weights: at their usual size every answer of a random network is as likely as any."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(10)
