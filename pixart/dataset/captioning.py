"""`caption`: captions by a vision-language model, of transformers or behind an HTTP endpoint.

The step that PixArt-Σ does with Share-Captioner: long captions beside the raw ones, of which training
draws one by weights. A single caption is the likeliest one. Several are sampled, by seeds 0, 1, 2 ... for every
picture: a caption that was there already is passed over, so that they differ. They may be ordered by the
mean log-likelihood of their tokens, as arXiv:2404.02883 sorts its five by confidence.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset.annotations import Tally, Work, annotating, write_lines
from pixart.dataset.images import ImageError
from pixart.dataset.samples import Item
from pixart.endpoint import Endpoint, Refused, data_url
from pixart.files import without_controls
from pixart.libraries import importing

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

NO_LIKELIHOODS = (
    "must answer with log-likelihoods (logprobs) for --rank, it does not; leave --rank out"
)
DRAWS = 4  # seeds that are tried for each of several captions, until so many differ


@dataclass(frozen=True)
class Written:
    """A caption. likelihood: the mean natural logarithm of the probability that the model gave to each of its
    tokens, its end among them, without sampling's limits; None where that was not asked for."""

    text: str
    likelihood: float | None = None


# From a picture to what writes a caption of it by a seed.
Captioner = Callable[["Image"], Callable[[int], Written]]


@dataclass(frozen=True)
class CaptionRequest:
    """prompt: what the model is asked. name: of the caption; several are NAME.1 ... NAME.count. is_ranked:
    the likeliest first."""

    prompt: str
    max_tokens: int = 300
    name: str = "long"
    count: int = 1
    is_ranked: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.max_tokens < 1:
            raise ValueError(
                f"count and max_tokens must be at least 1, got {self.count} and {self.max_tokens}"
            )
        if not self.name or "." in self.name or "/" in self.name:
            raise ValueError(f"name must be a word without . and /, got {self.name!r}")
        if self.is_ranked and self.count == 1:
            raise ValueError("--rank must have captions to order, got --count 1; give --count 5")

    @property
    def names(self) -> list[str]:
        if self.count == 1:
            return [self.name]
        return [f"{self.name}.{number}" for number in range(1, self.count + 1)]


def caption_source(
    items: Iterable[Item], output: Path, captioner: Captioner, request: CaptionRequest, workers: int
) -> Tally:
    """`write_captions` with a captioner in this process; workers: pictures at a time."""
    return write_captions(items, output, captioning(captioner, request, workers), request)


def write_captions(
    items: Iterable[Item], output: Path, work: Work, request: CaptionRequest
) -> Tally:
    """Append {"path", "captions"} for every picture that has no captions of these names yet; where they are
    ranked, "likelihoods" by name beside them; where fewer differ than were asked for, "asked", the count.
    work: as `captioning` makes it.
    """
    return write_lines(items, output, work, is_captioned(request, output))


@dataclass(frozen=True)
class Model:
    """What writes captions: a model of transformers on a device (None chooses), or an endpoint's, with its
    key. place: a path, hub id or the endpoint's name for it. workers: pictures at a time."""

    place: str
    endpoint: str | None = None
    key: str | None = field(default=None, repr=False)
    device: str | None = None
    workers: int = 1

    def open(self, request: CaptionRequest) -> Work:
        """Raises what open_endpoint and open_model raise."""
        if self.endpoint is not None:
            captioner = open_endpoint(self.endpoint, self.place, request, self.key)
        else:
            from pixart.device import choose_device

            captioner = open_model(self.place, request, choose_device(self.device))
        return captioning(captioner, request, self.workers)


def captioning(captioner: Captioner, request: CaptionRequest, workers: int) -> Work:
    """From items to lines with captions. workers: pictures at a time."""
    names = request.names

    def annotate_one(image: "Image") -> dict[str, Any]:
        written = several(captioner(image), request)
        values: dict[str, Any] = {
            "captions": {name: one.text for name, one in zip(names, written, strict=False)}
        }
        if request.is_ranked:
            values["likelihoods"] = {
                name: one.likelihood for name, one in zip(names, written, strict=False)
            }
        return values if len(written) == len(names) else {**values, "asked": request.count}

    return annotating(annotate_one, workers)


def is_captioned(request: CaptionRequest, output: Path) -> Callable[[Mapping[str, Any]], bool]:
    """What tells whether a line of `output` has all that is asked for. It raises ValueError over captions
    that are not ranked where those that are asked for are."""
    names = request.names

    def is_known(line: Mapping[str, Any]) -> bool:
        captions = line.get("captions") or {}
        if not isinstance(captions, dict) or names[0] not in captions:
            return False
        likelihoods = line.get("likelihoods")
        if request.is_ranked and not (isinstance(likelihoods, dict) and names[0] in likelihoods):
            # Beside the new ones, those that were not replaced would stay.
            raise ValueError(
                f"{output} must hold ranked captions with --rank, {names[0]} of {line['path']} is not; "
                "give another OUTPUT or --name"
            )
        return set(names) <= captions.keys() or line.get("asked") == request.count

    return is_known


def several(write: Callable[[int], Written], request: CaptionRequest) -> list[Written]:
    """Captions that differ, as many as are asked for unless the model gives fewer in DRAWS times as many tries;
    the likeliest first if they are ranked. Raises ImageError where all are empty."""
    found: dict[str, Written] = {}
    for seed in range(1 if request.count == 1 else DRAWS * request.count):
        one = write(seed)
        text = " ".join(without_controls(one.text).split())
        if text:
            # The same words may have come of other tokens: what was met first stays.
            found.setdefault(text, replace(one, text=text))
        if len(found) == request.count:
            break
    if not found:
        raise ImageError("the model gave an empty caption")
    written = list(found.values())
    if request.is_ranked:
        written.sort(key=lambda one: -(one.likelihood or 0.0))
    return written


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
    options: dict[str, Any] = {
        "max_new_tokens": request.max_tokens,
        "do_sample": request.count > 1,
        "return_dict_in_generate": True,
    }
    if request.is_ranked:  # with beams, logits are of other tokens than those that are left
        options |= {"output_logits": True, "num_beams": 1}

    def captioner(image: "Image") -> Callable[[int], Written]:
        inputs = _inputs(processor, image, request.prompt).to(device, dtype)
        # What is generated begins with the question.
        asked = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0

        @torch.no_grad()
        def write(seed: int) -> Written:
            torch.manual_seed(seed)  # a picture's captions do not depend on those before it
            given = model.generate(**inputs, **options)
            tokens = getattr(given, "sequences", given)[0, asked:]
            text = processor.decode(tokens, skip_special_tokens=True).strip()
            return Written(text, _likelihood(given, path) if request.is_ranked else None)

        return write

    return captioner


def _likelihood(given: Any, path: str) -> float:
    """Of what `generate` gave: the mean log-likelihood of the tokens that it drew."""
    import torch

    logits = getattr(given, "logits", None)
    if not logits:
        raise ValueError(
            f"model must give likelihoods for --rank, {path} gives none; leave --rank out, or take another"
        )
    drawn = given.sequences[0, -len(logits) :]
    each = torch.stack([one[0] for one in logits]).float().log_softmax(1)
    mean = float(each.gather(1, drawn.to(each.device)[:, None]).double().mean())
    if not math.isfinite(mean):  # which JSON cannot hold, and nothing orders
        raise ImageError(f"the model gives a likelihood of {mean}")
    return mean


def open_endpoint(
    address: str, model: str, request: CaptionRequest, key: str | None = None
) -> Captioner:
    """A server that speaks OpenAI's chat completions at `address`/chat/completions. Its key, where none is
    given, is read from OPENAI_API_KEY, unless the address holds user:password. See pixart.endpoint."""
    endpoint = Endpoint(address, key or os.environ.get("OPENAI_API_KEY"))

    def captioner(image: "Image") -> Callable[[int], Written]:
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
            **({"logprobs": True} if request.is_ranked else {}),
        }

        def write(seed: int) -> Written:
            try:
                answer = endpoint.ask(question | {"seed": seed})
            except Refused as error:
                if request.is_ranked and "logprob" in str(error):  # it refuses all pictures
                    raise endpoint.failure(f"{NO_LIKELIHOODS} ({error})") from error
                raise ImageError(str(error)) from error
            text = endpoint.text_of(answer)
            return Written(text, _answered(answer, endpoint) if request.is_ranked else None)

        return write

    return captioner


def _answered(answer: Any, endpoint: Endpoint) -> float:
    """The mean log-likelihood of the tokens of an answer. EndpointError where it holds none."""
    try:
        each = [float(token["logprob"]) for token in answer["choices"][0]["logprobs"]["content"]]
        mean = sum(each) / len(each)
    except (LookupError, TypeError, ValueError, ZeroDivisionError):
        mean = math.nan
    if not math.isfinite(mean):
        raise endpoint.failure(NO_LIKELIHOODS)
    return mean


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
