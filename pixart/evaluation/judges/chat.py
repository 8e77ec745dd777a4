"""An image-text-to-text chat model of transformers as a judge, from a folder or the hub's cache.

It is asked through its own chat template, and a choice has the likelihood that the model gives to its words
as the beginning of the answer. A choice may begin with a capital letter: a model that says "Yes" has said
"yes". The words of a question are put in as text of one line, and what the tokenizer takes for one of its
signs ("<|im_end|>", "<image>") is taken apart, so that no question can end its own turn.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pixart.evaluation.judges.judge import check_question, one_line
from pixart.evaluation.judges.likelihood import needs_end, sequence_likelihood
from pixart.evaluation.judges.network import NetworkJudge
from pixart.evaluation.metric import Context
from pixart.evaluation.needs import open_snapshot
from pixart.libraries import importing, silenced
from pixart.weights import open_pretrained

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

VERSION = "1"
_ANSWER = "ANSWER"


class ChatJudge(NetworkJudge):
    """A chat model that is shown pictures."""

    kind = f"chat-{VERSION}"

    def __init__(self, name: str, context: Context) -> None:
        super().__init__(name, context)
        self.precision = "bf16" if context.device.type == "cuda" else "fp32"

    def answer(self, image: "Image", question: str, choices: Sequence[str]) -> Mapping[str, float]:
        return self.answer_about([{"type": "image", "image": image}], question, choices)

    def answer_about(
        self, parts: Sequence[Mapping[str, Any]], question: str, choices: Sequence[str]
    ) -> Mapping[str, float]:
        """As `answer`, of what stands before the question in the user's turn: parts of a chat message,
        several pictures and the words between them."""
        check_question(question, choices)
        import torch

        processor, model = self._open()
        text = {"type": "text", "text": asked(processor, question, choices)}
        messages = [{"role": "user", "content": [*parts, text]}]
        spelt = {choice: spellings(choice) for choice in choices}
        words = [one for each in spelt.values() for one in each]
        cut, rows = continuations(processor, messages, words)
        ends = _ends(model, processor) if needs_end(rows) else []
        inputs = _inputs(processor, messages, cut).to(self.context.device, model.dtype)
        with torch.no_grad():
            values = _likelihoods(model, inputs, rows, ends)
        found = dict(zip(words, values, strict=True))
        return {choice: sum(found[one] for one in each) for choice, each in spelt.items()}

    def _open(self) -> tuple[Any, Any]:
        if self._opened is None:
            import torch

            folder = open_snapshot("judge", self.name, self.context)
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            with importing():  # opening imports what the model is of, too
                from transformers import AutoModelForImageTextToText, AutoProcessor

                try:
                    with silenced():
                        processor = AutoProcessor.from_pretrained(
                            folder, local_files_only=True, trust_remote_code=False
                        )
                    kind = AutoModelForImageTextToText
                    model = open_pretrained(kind, folder, dtype, may_hold_more=True)
                except (OSError, ValueError) as error:
                    raise ValueError(
                        f"judge must be an image-text-to-text model that is whole, got {self.name} ({error})"
                    ) from error
            if not getattr(processor, "chat_template", None):
                raise ValueError(
                    f"judge must have a chat template, {self.name} has none; BLIP-VQA is one that needs none"
                )
            self._opened = processor, model.to(self.context.device)
        return self._opened


def asked(processor: Any, question: str, choices: Sequence[str]) -> str:
    """The user's words: question and choices, in one line."""
    question, *choices = (_harmless(processor, one_line(one)) for one in (question, *choices))
    if {one.lower() for one in choices} == {"yes", "no"}:
        return f"{question} Please answer yes or no."
    return f"{question} Please answer with one of: {', '.join(choices)}."


def spellings(choice: str) -> list[str]:
    """How a model may write a choice, as given first."""
    choice = choice.strip()
    return list(dict.fromkeys((choice, choice[0].upper() + choice[1:], choice.lower())))


def continuations(
    processor: Any, messages: list[dict[str, Any]], answers: Sequence[str]
) -> tuple[int, list[list[int]]]:
    """How many tokens to cut from the end of the prompt, and behind that the tokens of each answer, as they
    come out of the chat template. ValueError where two answers are the same tokens."""
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    between = _between(processor, messages, prompt)
    tokenizer = processor.tokenizer
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = [
        tokenizer(prompt + between + one, add_special_tokens=False)["input_ids"] for one in answers
    ]
    # The last word of a prompt and the first of an answer may be one token together.
    start = min(_shared(before, row) for row in whole)
    return len(before) - start, [row[start:] for row in whole]


def _between(processor: Any, messages: list[dict[str, Any]], prompt: str) -> str:
    """What the template writes between the prompt and an answer: a space, or nothing."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    whole = processor.apply_chat_template([*messages, answer], tokenize=False)
    between, found, _ = whole.removeprefix(prompt).partition(_ANSWER)
    # A template that writes more there (an empty thought) does so after the fact only.
    return between if found and whole.startswith(prompt) and not between.strip() else ""


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with; one is left of b."""
    most = min(len(a), len(b) - 1)
    return next((k for k in range(most) if a[k] != b[k]), most)


def _inputs(processor: Any, messages: list[dict[str, Any]], cut: int) -> Any:
    """What goes into the model, without the last `cut` tokens."""
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    if cut:
        for name in _of_tokens(inputs):
            inputs[name] = inputs[name][:, :-cut]
    return inputs


def _of_tokens(inputs: Any) -> list[str]:
    """The names of what has a value for every token: input_ids, masks and kinds of tokens."""
    size = inputs["input_ids"].shape
    return [name for name, value in inputs.items() if getattr(value, "shape", None) == size]


def _likelihoods(
    model: Any, inputs: Any, rows: Sequence[Sequence[int]], ends: Sequence[int]
) -> list[float]:
    """Of each row of tokens behind the inputs, the probability. Rows of one token share a pass."""
    first = _logits(model, inputs, [])[0]
    values = []
    for row in rows:
        given = row if ends else row[:-1]
        logits = _logits(model, inputs, given) if given else first[None]
        values.append(sequence_likelihood(logits, row, ends))
    return values


def _logits(model: Any, inputs: Any, more: Sequence[int]) -> "torch.Tensor":
    """The numbers for the token behind the inputs, and for those behind each of `more`: (1 + more, words)."""
    import torch

    given = dict(inputs)
    for name in _of_tokens(inputs):
        # Kinds of tokens are 0 for text; what is added is seen.
        values = list(more) if name == "input_ids" else [int("mask" in name)] * len(more)
        rows = torch.tensor([values], dtype=given[name].dtype, device=given[name].device)
        given[name] = torch.cat([given[name], rows], 1)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = len(more) + 1
    return model(**given, use_cache=False, return_dict=True).logits[0, -len(more) - 1 :]


def _ends(model: Any, processor: Any) -> list[int]:
    """The tokens that end an answer. ValueError where the model names none."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = processor.tokenizer.eos_token_id
    if ends is None:
        raise ValueError("judge must name a token that ends an answer, it names none")
    return [ends] if isinstance(ends, int) else list(ends)


def _harmless(processor: Any, words: str) -> str:
    """Words without signs of the tokenizer: a space stands behind the first letter of each."""
    tokenizer = processor.tokenizer
    signs = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    signs |= {getattr(processor, f"{one}_token", None) or "" for one in ("image", "video", "audio")}
    # Words may be added to a vocabulary too; they are no signs.
    signs = {one.strip() for one in signs if isinstance(one, str)}
    signs = {one for one in signs if len(one) > 1 and not one.isalnum()}
    while found := [one for one in signs if one in words]:
        longest = max(found, key=len)
        words = words.replace(longest, f"{longest[0]} {longest[1:]}")
    return words
