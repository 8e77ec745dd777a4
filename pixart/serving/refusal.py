"""What a request over the network is answered with when it is not done."""

import json
from collections.abc import Mapping
from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          429: "rate_limit_error"}  # fmt: skip
_OTHER_TOOLS = "/sdapi/"  # where A1111's clients look for a text under `detail`


class Refusal(Exception):
    """status: of HTTP, 400 to 599. reason: one line for people, which names the field and the way out.
    code: a word for programs, such as "queue_full". field: of the request, None for the whole of it.
    retry_after: seconds after which the same request may be taken. further: headers of the answer.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        code: str = "invalid_request",
        field: str | None = None,
        retry_after: float | None = None,
        further: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(reason)
        self.status, self.reason, self.code, self.field = status, reason, code, field
        self.retry_after, self.further = retry_after, further or {}

    @property
    def headers(self) -> Mapping[str, str]:
        """That belong to the answer."""
        if self.retry_after is None:
            return self.further
        return {**self.further, "Retry-After": str(max(1, round(self.retry_after)))}

    def content(self, path: str) -> Mapping[str, Any]:
        """Of the answer, in the shape that clients of this path know: OpenAI's, or A1111's."""
        # What it quotes may hold anything; the answer stays a line that a terminal can show.
        reason = "".join(c if c.isprintable() else " " for c in " ".join(self.reason.split()))
        if path.startswith(_OTHER_TOOLS):
            return {"error": self.code, "detail": reason, "body": "", "errors": reason}
        kind = _TYPES.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": reason, "type": kind, "param": self.field, "code": self.code}}

    def body(self, path: str) -> bytes:
        """`content` as JSON, one line."""
        return json.dumps(self.content(path), ensure_ascii=True).encode()
