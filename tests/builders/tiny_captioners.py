"""Vision-language models of transformers with random weights, and ten words."""

from pathlib import Path

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
        chat_template="{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}a",
    ).save_pretrained(directory)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16),
        text_config=LlamaConfig(**sizes, vocab_size=len(WORDS), eos_token_id=3, pad_token_id=0),
        image_token_id=5,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [5]  # no picture is in an answer
    model.save_pretrained(directory)
    return directory
