"""`caption`: captions by a vision-language model, of transformers or behind an HTTP endpoint.

The step that PixArt-Σ does with Share-Captioner: long captions beside the raw ones, of which training
draws one by weights. A single caption is the likeliest one; several are sampled, so that they differ.
"""

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset.annotations import Tally, annotate
from pixart.dataset.images import ImageError
from pixart.dataset.samples import Item

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Captioner = Callable[["Image"], list[str]]
WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
TIMEOUT = 300.0  # seconds for an answer
MAX_SIDE = 1536  # px of what is sent: models see no more


@dataclass(frozen=True)
class Wish:
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


class EndpointError(RuntimeError):
    """The endpoint gives no captions to anybody; there is no use in going on."""


def caption_source(
    items: Iterable[Item], output: Path, captioner: Captioner, wish: Wish, workers: int
) -> Tally:
    """Append {"path", "captions"} for every picture that has no captions of these names yet."""

    def annotate_one(image: "Image") -> dict[str, Any]:
        captions = [" ".join(text.split()) for text in captioner(image)]
        if not all(captions):
            raise ImageError("the model gave an empty caption")
        return {"captions": dict(zip(wish.names, captions, strict=True))}

    def is_known(line: Mapping[str, Any]) -> bool:
        return set(wish.names) <= set(line.get("captions") or ())

    return annotate(items, output, annotate_one, is_known, workers)


def open_model(path: str, wish: Wish, device: "torch.device | str") -> Captioner:
    """An image-text-to-text model of transformers, from a directory or the hub.

    Chat models are asked through their own template; models without one (BLIP) take the prompt as
    the beginning of the caption, so that "" is the one to give them.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be a vision-language model, got {path} ({error})") from error
    model = model.eval().to(device)
    options = {"max_new_tokens": wish.max_tokens, "do_sample": wish.count > 1}

    @torch.no_grad()
    def captioner(image: "Image") -> list[str]:
        inputs = _inputs(processor, image, wish.prompt).to(device, dtype)
        asked = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        texts = []
        for number in range(wish.count):
            torch.manual_seed(number)  # a picture's captions do not depend on those before it
            tokens = model.generate(**inputs, **options)[0, asked:]
            texts.append(processor.decode(tokens, skip_special_tokens=True).strip())
        return texts

    return captioner


def open_endpoint(address: str, model: str, wish: Wish) -> Captioner:
    """A server that speaks OpenAI's chat completions at `address`/chat/completions."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"endpoint must begin with http:// or https://, got {address!r}")
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{address.rstrip('/')}/chat/completions"

    def captioner(image: "Image") -> list[str]:
        content = [
            {"type": "text", "text": wish.prompt},
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
        ]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": wish.max_tokens,
            "temperature": 0.0 if wish.count == 1 else 1.0,
        }
        return [_text_of(_post(url, {**body, "seed": n}, headers)) for n in range(wish.count)]

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


def _data_url(image: "Image") -> str:
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _post(url: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
    """The answer. Tries again while the server is busy or away; ImageError if it refuses this
    request, EndpointError if it refuses all."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )
    reason = ""
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            reason = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
            if error.code in (400, 413, 415, 422):
                raise ImageError(f"the endpoint refuses this picture: {reason}") from error
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = str(error)
        if wait is not None:
            time.sleep(wait)
    raise EndpointError(f"{url} must answer, it does not ({reason}); captions so far are kept")


def _text_of(answer: Any) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise EndpointError(
            f"endpoint must answer with choices[0].message.content, got {str(answer)[:200]}"
        ) from error
    return text if isinstance(text, str) else ""
