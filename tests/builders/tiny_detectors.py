"""Detectors of transformers from tiny configurations, with random weights: Mask2Former and OWLv2."""

import json
from pathlib import Path

import torch

CLASSES = ("dog", "mouse", "bench")
WORDS = ("a", "photo", "of", "dog", "cat", "red", "blue")


def build_mask2former(directory: Path) -> Path:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=5, id2label=dict(enumerate(CLASSES)),
        label2id={name: k for k, name in enumerate(CLASSES)},
    )  # fmt: skip
    torch.manual_seed(0)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(directory)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(directory)
    return directory


def build_owl(directory: Path) -> Path:
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
        Owlv2TextConfig,
        Owlv2VisionConfig,
    )

    directory.mkdir(parents=True)
    tokens = ["!", "<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS)]
    letters = sorted({letter for word in WORDS for letter in word})
    tokens += letters + [f"{letter}</w>" for letter in letters if f"{letter}</w>" not in tokens]
    merges, parts = [], set(tokens)
    for word in WORDS:  # each word grows from its beginning
        grown = word[0]
        for place, letter in enumerate(word[1:], 1):
            last = "</w>" if place == len(word) - 1 else ""
            merges.append(f"{grown} {letter}{last}")
            grown += letter + last
            parts.add(grown)
    tokens += sorted(parts - set(tokens))
    (directory / "vocab.json").write_text(json.dumps({one: k for k, one in enumerate(tokens)}))
    rows = list(dict.fromkeys(merges))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(rows) + "\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2}  # fmt: skip
    text = Owlv2TextConfig(**sizes, vocab_size=len(tokens), bos_token_id=1, eos_token_id=2,
                           pad_token_id=0)  # fmt: skip
    vision = Owlv2VisionConfig(**sizes, image_size=32, patch_size=8)
    config = Owlv2Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    torch.manual_seed(0)
    Owlv2ForObjectDetection(config).save_pretrained(directory)
    files = (str(directory / "vocab.json"), str(directory / "merges.txt"))
    tokenizer = CLIPTokenizer(*files, model_max_length=16, pad_token="!")
    image = Owlv2ImageProcessor(size={"height": 32, "width": 32})
    Owlv2Processor(image, tokenizer).save_pretrained(directory)
    return directory
