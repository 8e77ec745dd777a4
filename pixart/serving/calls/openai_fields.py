"""What OpenAI's calls for pictures take and answer, and what of it means nothing here."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from pixart.serving.calls.schemas import ordering, other_names, sent_picture, settings_model
from pixart.serving.orders import Format

OutputFormat = Literal["png", "jpeg", "webp"]
FORMATS: Mapping[OutputFormat, Format] = {"png": "png", "jpeg": "jpg", "webp": "webp"}
# Taken and without effect, as their descriptions say; an answer names those that were given.
IGNORED = (
    "quality",
    "style",
    "moderation",
    "user",
    "safety_identifier",
    "input_fidelity",
    "complexity",
)


def _one_of(*words: str, refused: Mapping[str, str] | None = None, help: str) -> Any:
    """A field of these words. refused: further words of OpenAI's, with what to do instead."""

    def check(value: Any) -> Any:
        if value is None or value in words:
            return value
        way_out = (refused or {}).get(value if isinstance(value, str) else "", "")
        listed = " or ".join(words)
        raise ValueError(f"must be {listed}, got {value!r}{way_out and '; ' + way_out}")

    kind = Annotated[Literal[words] | None, BeforeValidator(check)]  # type: ignore[valid-type]
    return kind, Field(None, description=help)


def _no_effect(kind: Any, why: str) -> Any:
    return kind | None, Field(None, description=f"No effect: {why}")


_OF_BOTH: dict[str, Any] = {
    **ordering(),
    **other_names(),
    "image": sent_picture("A picture to begin with; one, of which a list may be made.", several=True),
    "mask": sent_picture(
        "What of image is drawn anew: where the mask is transparent, or, where nothing in it can be, white. "
        "alpha: where image itself is transparent."
    ),
    "model": (str | None, Field(None, description="The name of /v1/models, which is taken without one.")),
    "size": (
        str | int | None,
        Field(None, description="WIDTHxHEIGHT, one number for a square, or auto: the model's own."),
    ),
    "output_format": _one_of(
        *FORMATS, refused={"gif": "one picture stands still", "svg": "pictures are made of pixels"},
        help="Of the picture's file. Default png.",
    ),
    "output_compression": (
        int | None,
        Field(None, ge=0, le=100, description="Quality of jpeg and webp; 0 is taken as 1. Default 95."),
    ),
    "response_format": _one_of(
        "b64_json",
        refused={"url": "a picture that is to be fetched by its address is ordered from /v1/jobs"},
        help="How the picture is answered.",
    ),
    "background": _one_of(
        "auto", "opaque",
        refused={"transparent": "this model draws all of a picture"},
        help="Pictures are opaque.",
    ),
    "stream": (bool | None, Field(None, description="Answer by events, as the pictures are finished.")),
    "partial_images": (
        int | None,
        Field(None, ge=0, le=3, description="With stream: how often a picture is shown before its end."),
    ),
    "quality": _one_of(
        "auto", "standard", "hd", "low", "medium", "high", "xhigh", "max",
        help="No effect: steps decide.",
    ),
    "user": _no_effect(str, "nobody is told who asks."),
    "safety_identifier": _no_effect(str, "nobody is told who asks."),
}  # fmt: skip
Generation = settings_model(
    "Generation",
    **_OF_BOTH,
    style=_one_of("vivid", "natural", help="No effect: say it in the prompt."),
    moderation=_one_of("low", "auto", help="No effect: nothing is moderated."),
    complexity=_one_of("low", "medium", "high", help="No effect: nothing is planned."),
)
Edit = settings_model(
    "Edit",
    **_OF_BOTH | {"image": sent_picture("The picture to edit.", several=True, required=True)},
    input_fidelity=_one_of("high", "low", help="No effect: strength decides."),
    complexity=_one_of("low", "medium", "high", help="No effect: nothing is planned."),
)
# The smallest picture that can be sent in a line: 16 pixels of one colour, a side.
_DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAIAAACQkWg2AAAAFklEQVR42mP8z0AaYGIY1TCqYdhqAABALgEfFO4+Ag"
    "AAAABJRU5ErkJggg=="
)
EXAMPLES: Mapping[type[BaseModel], Mapping[str, Any]] = {
    Generation: {"prompt": "a red circle on black", "n": 1, "size": "auto", "seed": 1, "steps": 4},
    Edit: {"prompt": "a red circle on black", "image": _DOT, "strength": 0.5, "steps": 4},
}
# Of the fields above, those that are no settings of a picture.
BESIDE = frozenset((
    "model", "output_format", "output_compression", "response_format", "background", "stream",
    "partial_images", *IGNORED,
))  # fmt: skip


class InputTokens(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens that the transformer has seen: of the prompts, of the pictures that they began with, and of
    those that were drawn."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class Drawn(BaseModel):
    """settings: with which it is drawn again, its pictures sent along. seconds: that it took, by stage."""

    b64_json: str
    seed: int
    settings: dict[str, Any]
    seconds: dict[str, float]


class Pictures(BaseModel):
    """ignored: fields of the request that have no effect here. remarks: sentences on pictures that are hardly
    what was meant."""

    created: int
    model: str
    data: list[Drawn]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    usage: Usage
    ignored: list[str]
    remarks: list[str]


class Model(BaseModel):
    """native: the side in pixels of the model's own square. multiple: of which sides must be. loras,
    controls: names that may be chosen beside it. fast: the plan that pictures are drawn by unless a request says
    fast off, null for none."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pixart"
    native: int
    multiple: int
    loras: list[str]
    controls: list[str]
    fast: str | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
