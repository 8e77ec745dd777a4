"""A small CLIP of the embedded world: pictures of drawn scenes and their captions, told apart.

It stands for the networks that judge pictures by their prompts, so that all that is built on one runs without
a download. The loss is the published one (arXiv:2103.00020, figure 3) but for one thing: of many
pictures in a batch more than one caption is true ("a red star" is true of every red star), and the grammar
says exactly which. Such pairs are left out of the loss instead of being pushed apart.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pixart.distributed import rank, world_size
from pixart.files import write_bytes, write_json
from pixart.libraries import importing, silenced
from pixart.shapes.caption import WORDS, parse
from pixart.shapes.checker import is_true, reading_of
from pixart.shapes.scene import Scene, draw
from pixart.training.batch import drawn_data_problems, part_problems, whole_state
from pixart.training.plan import weights_plan
from pixart.training.run import Run
from pixart.training.scenes import draw_scene, scene_problems
from pixart.training.stage import CLIP, RANDOM, ResolvedStage, Size, Stage

SIDE, PATCH = 64, 8  # pixels
DRAWN_SIDE = 128  # of the embedded model's pictures: made smaller as what is judged will be
LENGTH = 40  # tokens; the longest caption of the grammar has 24
MEAN = STD = 0.5
MAX_LOGIT_SCALE = math.log(100)  # as published
START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def check(stage: Stage) -> Iterator[str]:
    """Yield what is wrong with the fields of a stage that trains a CLIP."""
    yield from part_problems(stage)
    yield from drawn_data_problems(stage, "scenes")
    yield from scene_problems(stage)
    if stage.start != RANDOM:
        yield f"start of a {CLIP} must be random, got {stage.start!r}"
    if stage.size.hidden_size % stage.size.num_heads:
        size = f"{stage.size.hidden_size} and {stage.size.num_heads}"
        yield f"size.hidden_size must be a multiple of size.num_heads, got {size}"
    # Each picture is compared with all captions of its batch: with fewer it would be another loss.
    if stage.batch.accumulate != 1:
        yield f"batch.accumulate must be 1 where trains is {CLIP}, got {stage.batch.accumulate}"
    if world_size() != 1:
        yield f"processes must be 1 where trains is {CLIP}, got {world_size()}; leave out torchrun"


def check_files(stage: ResolvedStage, run: Run) -> Iterator[str]:
    """Yield nothing: such a stage needs no files."""
    yield from ()


def plan(stage: ResolvedStage, run: Run) -> str:
    """Say in words what a stage will cost."""
    return weights_plan(stage, lambda: build_clip(stage.size))


def build(stage: ResolvedStage, run: Run) -> "ClipTask":
    """Make the task as the stage begins."""
    return ClipTask(stage)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level BPE in CLIP's own form, in which every word of the captions is one
    token, and any other text falls into bytes. The two special tokens are the last, as in CLIP's."""
    letters = _byte_letters()
    merges = _merges(sorted(WORDS))
    tokens = [*letters, *(one + END_OF_WORD for one in letters)]
    tokens += ["".join(pair) for pair in merges]
    return {token: number for number, token in enumerate([*tokens, START, END])}, merges


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE (GPT-2's table): itself where
    Latin-1 can print it, else one from 256 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges, the first first, until each word is one token: always the most frequent pair, of equal ones
    the first of the alphabet."""
    parts = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges = []
    while pairs := Counter(pair for word in parts for pair in zip(word, word[1:], strict=False)):
        chosen = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(chosen)
        parts = [_merged(word, chosen) for word in parts]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    found: list[str] = []
    for part in word:
        if found and (found[-1], part) == pair:
            found[-1] += part
        else:
            found.append(part)
    return found


def write_processor(folder: Path) -> None:
    """Files of CLIP's tokenizer and of its image processor, as transformers 4 and 5 read them."""
    tokens, merges = vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    write_json(folder / "vocab.json", tokens)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_bytes(folder / "merges.txt", ("\n".join(lines) + "\n").encode())
    write_json(folder / "special_tokens_map.json", special, indent=2)
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special}
    write_json(folder / "tokenizer_config.json", tokenizer, indent=2)
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    write_json(folder / "preprocessor_config.json", image, indent=2)


@silenced()
def load_processor_tokens() -> Any:
    """The tokenizer, opened from its files as who scores with them does."""
    with importing():
        from transformers import AutoTokenizer

    with TemporaryDirectory() as place:
        write_processor(Path(place))
        write_json(Path(place) / "config.json", {"model_type": "clip"})
        return AutoTokenizer.from_pretrained(place)


def build_clip(size: Size) -> Any:
    """A CLIPModel whose two towers are of this size, from random weights."""
    with importing():
        from transformers import CLIPConfig, CLIPModel

    tokens, _ = vocabulary()
    tower = {
        "hidden_size": size.hidden_size,
        "intermediate_size": 4 * size.hidden_size,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "projection_dim": size.hidden_size,
    }
    # The end must not have the id 2: transformers would take that for a mark of old files, and read a text
    # up to its highest id instead of its end.
    special = {"bos_token_id": tokens[START], "eos_token_id": tokens[END]}
    special["pad_token_id"] = tokens[END]
    text = {"vocab_size": len(tokens), "max_position_embeddings": LENGTH, **special}
    config = CLIPConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=size.hidden_size,
    )
    return CLIPModel(config)


@dataclass(frozen=True)
class Pairs:
    """B pictures and their captions. pictures: (B, 3, SIDE, SIDE), prepared. ids, mask: (B, L). is_true:
    (B, B), of which picture (row) which caption (column) is true."""

    pictures: Tensor
    ids: Tensor
    mask: Tensor
    is_true: Tensor

    def __len__(self) -> int:
        return len(self.ids)


class ClipTask:
    """A Task of pixart.training.trainer: a CLIP of stage.size on scenes that are drawn as they are
    needed."""

    def __init__(self, stage: ResolvedStage) -> None:
        self.stage = stage
        self.model: nn.Module = build_clip(stage.size)

    @cached_property
    def tokenizer(self) -> Any:
        return load_processor_tokens()

    def load(self, step: int, parts: int) -> list[Pairs]:
        assert parts == 1  # a rule of `check`
        return [self._pairs(self.stage.rngs(step, self.stage.batch.of(1, world_size())))]

    def _pairs(self, rngs: Sequence[random.Random]) -> Pairs:
        drawn = [draw_scene(rng, dict(self.stage.data.scenes)) for rng in rngs]
        scenes, texts = [scene for scene, _ in drawn], [text for _, text in drawn]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        pictures = torch.stack([prepared(draw(scene, DRAWN_SIDE)) for scene in scenes])
        return Pairs(pictures, tokens.input_ids, tokens.attention_mask, truths(scenes, texts))

    def losses(self, model: nn.Module, part: Pairs) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        with self.stage.autocast(device):
            told = model(
                input_ids=part.ids.to(device),
                attention_mask=part.mask.to(device),
                pixel_values=part.pictures.to(device),
            )
        logit_scale: Any = model.logit_scale
        scale = logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        cosines = told.image_embeds.float() @ told.text_embeds.float().T
        is_own = torch.eye(len(part), dtype=torch.bool, device=device)
        logits = (scale * cosines).masked_fill(part.is_true.to(device) & ~is_own, -math.inf)
        targets = torch.arange(len(part), device=device)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        right = (logits.argmax(dim=1) == targets).float().mean()
        return {"loss": loss, "right": right, "scale": scale.detach()}

    def images(self, part: Pairs) -> int:
        return len(part)

    def tokens(self, part: Pairs) -> int:
        return len(part) * (SIDE // PATCH) ** 2 + int(part.mask.sum())

    def flops(self, part: Pairs) -> float:
        return 0.0  # not counted

    @silenced()
    def export(self, folder: Path) -> None:
        """FOLDER/clip as transformers has it, fp32, with its tokenizer and image processor."""
        state = whole_state(self.model)
        if rank() == 0:
            whole = build_clip(self.stage.size)
            whole.load_state_dict(state)
            whole.save_pretrained(folder / "clip")
            write_processor(folder / "clip")

    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """The losses on pictures and captions that are the same every time."""
        places = range(self.stage.validation.images)
        part = self._pairs([random.Random(f"validation/{place}") for place in places])
        return {name: float(value) for name, value in self.losses(self.model, part).items()}


def prepared(picture: np.ndarray) -> Tensor:
    """(3, SIDE, SIDE) of an 8-bit picture, as the image processor makes it."""
    small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
    return (levels - MEAN) / STD


def truths(scenes: Sequence[Scene], texts: Sequence[str]) -> Tensor:
    """(scenes, texts) bool: of which scene which text is true."""
    readings, stated = [reading_of(scene) for scene in scenes], [parse(text) for text in texts]
    return torch.tensor([[is_true(reading, text) for text in stated] for reading in readings])
