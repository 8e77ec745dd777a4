"""A tokenizer of BERT's kind with a few dozen words, and texts for it."""

import json
from pathlib import Path

TEXTS = ["a red star", "a blue circle on white", "a red star above a blue circle " * 6]
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "red",
    "star",
    "blue",
    "circle",
    "on",
    "white",
    "above",
    "##s",
]


def write_bert_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    values = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
