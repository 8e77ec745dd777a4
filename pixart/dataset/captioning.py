"""`caption`: captions by a vision-language model, of transformers or behind an HTTP endpoint.

The step that PixArt-Σ does with Share-Captioner: long captions beside the raw ones, of which training
draws one by weights. A single caption is the likeliest one; several are sampled, so that they differ.
"""

import base64
import http.client
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
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


class EndpointError(RuntimeError):
    """The endpoint gives no captions to anybody; there is no use in going on."""


def caption_source(
    items: Iterable[Item], output: Path, captioner: Captioner, request: CaptionRequest, workers: int
) -> Tally:
    """Append {"path", "captions"} for every picture that has no captions of these names yet."""

    def annotate_one(image: "Image") -> dict[str, Any]:
        captions = [" ".join(text.split()) for text in captioner(image)]
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
    from transformers import AutoModelForImageTextToText, AutoProcessor

    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, torch_dtype=dtype)
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
    """A server that speaks OpenAI's chat completions at `address`/chat/completions."""
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"endpoint must begin with http:// or https://, got {address!r}")
    from huggingface_hub import InferenceClient

    url = f"{address.rstrip('/')}/chat/completions"
    key = os.environ.get("OPENAI_API_KEY")
    # Given even without a key, and in small letters as the client writes it: in the place of the
    # user's token for the hub, which it would send to any server.
    headers = {"authorization": f"Bearer {key}" if key else ""}
    client = InferenceClient(base_url=url, headers=headers, timeout=TIMEOUT)

    def captioner(image: "Image") -> list[str]:
        content = [
            {"type": "text", "text": request.prompt},
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
        ]
        ask = partial(
            client.chat_completion,
            [{"role": "user", "content": content}],
            model=model,
            max_tokens=request.max_tokens,
            temperature=0.0 if request.count == 1 else 1.0,
        )
        return [_text_of(_answer(partial(ask, seed=n), url)) for n in range(request.count)]

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
    # thumbnail works in place, and the picture is the caller's.
    image = image.copy()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def _answer(ask: Callable[[], Any], url: str) -> Any:
    """The answer. Tries again while the server is busy or away; ImageError if it refuses this
    request, EndpointError if it refuses all."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client's own, and its bases: of httpx's errors, not all are OSErrors. AttributeError is
    # what it makes of a refusal that is JSON and no object.
    failures: Any = (*HfHubHTTPError.__bases__, OSError, ValueError, AttributeError)
    reason = ""
    for wait in (*WAITS, None):
        try:
            return ask()
        except failures as error:
            status, reason = _refusal(error)
            # These are about what was sent: the next picture may pass.
            if status in (400, 413, 415, 422):
                raise ImageError(f"the endpoint refuses this picture: {reason}") from error
            # A wrong address or key stays wrong; too slow (408) and too often (429) pass.
            if 300 <= status < 500 and status not in (408, 429):
                break
        if wait is not None:
            time.sleep(wait)
    raise EndpointError(f"{url} must answer, it does not ({reason}); captions so far are kept")


def _refusal(error: Exception) -> tuple[int, str]:
    """The HTTP status of a refusal, 0 where no answer came, and the reason in words."""
    for cause in (error, error.__context__):
        response: Any = getattr(cause, "response", None)
        if response is not None:
            status: int = response.status_code
            words = http.client.responses.get(status, "")
            return status, f"{status} {words}: {response.text[:300]}"
    return 0, str(error)


def _text_of(answer: Any) -> str:
    try:
        text = answer.choices[0].message.content
    except (AttributeError, LookupError, TypeError) as error:
        raise EndpointError(
            f"endpoint must answer with choices[0].message.content, got {str(answer)[:200]}"
        ) from error
    # The protocol allows null. It counts as an empty caption, which is refused.
    return text if isinstance(text, str) else ""
