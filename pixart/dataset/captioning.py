"""`caption`: captions by a vision-language model, of transformers or behind an HTTP endpoint.

The step that PixArt-Σ does with Share-Captioner: long captions beside the raw ones, of which training
draws one by weights. A single caption is the likeliest one; several are sampled, so that they differ.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset.annotations import Tally, annotate
from pixart.dataset.images import ImageError
from pixart.dataset.samples import Item
from pixart.endpoint import Endpoint, Refused, data_url
from pixart.files import without_controls
from pixart.libraries import importing

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Captioner = Callable[["Image"], list[str]]


@dataclass(frozen=True)
class CaptionRequest:
    """prompt: what the model is asked. name: of the caption; several are NAME.1 ... NAME.count."""

    prompt: str
    max_tokens: int = 300
    name: str = "long"
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1 or self.max_tokens < 1:
            raise ValueError(
                f"count and max_tokens must be at least 1, got {self.count} and {self.max_tokens}"
            )
        if not self.name or "." in self.name or "/" in self.name:
            raise ValueError(f"name must be a word without . and /, got {self.name!r}")

    @property
    def names(self) -> list[str]:
        if self.count == 1:
            return [self.name]
        return [f"{self.name}.{number}" for number in range(1, self.count + 1)]


def caption_source(
    items: Iterable[Item], output: Path, captioner: Captioner, request: CaptionRequest, workers: int
) -> Tally:
    """Append {"path", "captions"} for every picture that has no captions of these names yet."""

    def annotate_one(image: "Image") -> dict[str, Any]:
        captions = [" ".join(without_controls(text).split()) for text in captioner(image)]
        if not all(captions):
            raise ImageError("the model gave an empty caption")
        return {"captions": dict(zip(request.names, captions, strict=True))}

    def is_known(line: Mapping[str, Any]) -> bool:
        return set(request.names) <= set(line.get("captions") or ())

    return annotate(items, output, annotate_one, is_known, workers)


def open_model(path: str, request: CaptionRequest, device: "torch.device | str") -> Captioner:
    """An image-text-to-text model of transformers, from a directory or the hub.

    Chat models are asked through their own template; models without one (BLIP) take the prompt as
    the beginning of the caption, so that "" is the one to give them.
    """
    import torch

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        with importing():  # opening imports what the model is of, too
            from transformers import AutoModelForImageTextToText, AutoProcessor

            # Not given, transformers would ask whether to run the code that came with a model.
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
            model = AutoModelForImageTextToText.from_pretrained(
                path, torch_dtype=dtype, trust_remote_code=False
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be a vision-language model, got {path} ({error})") from error
    model = model.eval().to(device)
    options = {"max_new_tokens": request.max_tokens, "do_sample": request.count > 1}

    @torch.no_grad()
    def captioner(image: "Image") -> list[str]:
        inputs = _inputs(processor, image, request.prompt).to(device, dtype)
        # What is generated begins with the question.
        asked = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        texts = []
        for number in range(request.count):
            torch.manual_seed(number)  # a picture's captions do not depend on those before it
            tokens = model.generate(**inputs, **options)[0, asked:]
            texts.append(processor.decode(tokens, skip_special_tokens=True).strip())
        return texts

    return captioner


def open_endpoint(address: str, model: str, request: CaptionRequest) -> Captioner:
    """A server that speaks OpenAI's chat completions at `address`/chat/completions. Its key is read
    from OPENAI_API_KEY, unless the address holds user:password. See pixart.endpoint."""
    endpoint = Endpoint(address, os.environ.get("OPENAI_API_KEY"))

    def captioner(image: "Image") -> list[str]:
        content = [
            {"type": "text", "text": request.prompt},
            {"type": "image_url", "image_url": {"url": data_url(image)}},
        ]
        question = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": request.max_tokens,
            "temperature": 0.0 if request.count == 1 else 1.0,
            "stream": False,
        }
        try:
            return [endpoint.text(question | {"seed": n}) for n in range(request.count)]
        except Refused as error:
            raise ImageError(str(error)) from error

    return captioner


def _inputs(processor: Any, image: "Image", prompt: str) -> Any:
    if not getattr(processor, "chat_template", None):
        words = {"text": prompt} if prompt else {}
        return processor(images=image, return_tensors="pt", **words)
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
