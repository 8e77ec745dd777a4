"""BLIP-VQA as a judge (`Salesforce/blip-vqa-capfilt-large`, arXiv:2201.12086): the likelihood of each answer.

The question goes into its text encoder, which looks at the picture; its decoder says how likely each answer is.
T2I-CompBench's script asks it as well, with the base network at 480 pixels where this one sees 384.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixart.evaluation.judges.judge import check_question, one_line
from pixart.evaluation.judges.likelihood import needs_end, sequence_likelihood
from pixart.evaluation.judges.network import NetworkJudge
from pixart.evaluation.needs import open_snapshot
from pixart.libraries import importing, silenced
from pixart.weights import open_pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

VERSION = "1"
MOST_TOKENS = 512  # of a question; theirs were cut at 35, which is more than most have


class BlipJudge(NetworkJudge):
    """BLIP-VQA; a question has at most MOST_TOKENS tokens."""

    precision = "fp32"
    kind = f"blip-vqa-{VERSION}"

    def answer(self, image: "Image", question: str, choices: Sequence[str]) -> Mapping[str, float]:
        check_question(question, choices)
        import torch

        processor, model = self._open()
        pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        asked = processor.tokenizer(clean(question), return_tensors="pt")
        if (length := asked["input_ids"].shape[1]) > MOST_TOKENS:
            raise ValueError(
                f"question must be at most {MOST_TOKENS} tokens for BLIP-VQA, got {length}; "
                "a chat model as --judge reads more"
            )
        tokens = [
            processor.tokenizer(clean(one), add_special_tokens=False)["input_ids"]
            for one in choices
        ]
        if not all(tokens):
            raise ValueError(
                f"choices must be words that BLIP's vocabulary has, got {list(choices)!r}"
            )
        end = model.config.text_config.sep_token_id
        if needs_end(tokens):
            tokens = [[*one, end] for one in tokens]
        with torch.no_grad():
            states = _read(model, pixels, asked, self.context.device)
            return {
                choice: self._likelihood(model, states, row)
                for choice, row in zip(choices, tokens, strict=True)
            }

    def _likelihood(self, model: Any, states: Any, tokens: Sequence[int]) -> float:
        """Of an answer's tokens, each given those before it."""
        import torch

        begin = model.decoder_start_token_id
        rows = torch.tensor([[begin, *tokens[:-1]]], device=states.device)
        heard = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        logits = model.text_decoder(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            encoder_hidden_states=states,
            encoder_attention_mask=heard,
            return_dict=True,
        ).logits
        return sequence_likelihood(logits[0], tokens)

    def _open(self) -> tuple[Any, Any]:
        if self._opened is None:
            folder = open_snapshot("judge", self.name, self.context)
            with importing():
                from transformers import BlipForQuestionAnswering, BlipProcessor
            model = open_pretrained(BlipForQuestionAnswering, folder, may_hold_more=True)
            with silenced():
                processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
            self._opened = processor, model.to(self.context.device)
        return self._opened


def clean(question: str) -> str:
    """As BLIP's questions were in training: small letters, without some signs."""
    return re.sub(r'[.!"()*#:;~]', "", one_line(question).lower()).strip()


def _read(model: Any, pixels: Any, asked: Any, device: Any) -> Any:
    """What the text encoder makes of picture and question: (1, words, channels)."""
    import torch

    seen = model.vision_model(pixel_values=pixels.to(device)).last_hidden_state
    rows = asked["input_ids"].to(device).clone()
    begin = model.decoder_start_token_id
    # BLIP's encoder was trained with [ENC], the token behind [DEC], in the place of [CLS]; neither is in
    # the tokenizer of the hub's files (transformers issue 22732).
    if begin + 1 < model.config.text_config.vocab_size:
        rows[:, 0] = begin + 1
    return model.text_encoder(
        input_ids=rows,
        attention_mask=asked["attention_mask"].to(device),
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
    ).last_hidden_state
