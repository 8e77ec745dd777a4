"""What the document of all calls, /openapi.json, says of answers that they have in common."""

from typing import Any

from pydantic import BaseModel, Field


class Fault(BaseModel):
    message: str = Field(description="One line, which names the field and the way out.")
    type: str
    param: str | None = Field(description="The field of the request, null for the whole of it.")
    code: str | None = Field(description="A word for programs, such as queue_full.")


class Refused(BaseModel):
    error: Fault


_REFUSED = (
    "Refused: 400 for what cannot be drawn or is no request, 401 without a token, 403 from another site, "
    "404 for what is not there or another client's, 405, 408 and 413 for a body that takes too long or is "
    "too large, 415 for one of another kind, 421 under another name, 429 with Retry-After for too many."
)
# For `responses` of a route.
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Refused, "description": _REFUSED},
    "5XX": {
        "model": Refused,
        "description": "Failed; 503 with Retry-After where there is no room now.",
    },
}


def content(kind: str, description: str, **schema: Any) -> dict[str, Any]:
    """An answer of another kind than JSON. schema: of it, a text where nothing is said."""
    schema = schema or {"type": "string"}
    return {"description": description, "content": {kind: {"schema": schema}}}


def pictures(description: str, *kinds: str) -> dict[str, Any]:
    """An answer that is a picture's file."""
    schema = {"type": "string", "format": "binary"}
    return {"description": description, "content": {kind: {"schema": schema} for kind in kinds}}
