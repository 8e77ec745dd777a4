"""What a request over the network is answered with when it is not done."""

from collections.abc import Mapping


class Refusal(Exception):
    """status: of HTTP, 400 to 599. reason: one line for people, which names the field and the way out.
    code: a word for programs, such as "queue_full". field: of the request, None for the whole of it.
    retry_after: seconds after which the same request may be taken.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        *,
        code: str = "invalid_request",
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(reason)
        self.status, self.reason, self.code, self.field = status, reason, code, field
        self.retry_after = retry_after

    @property
    def headers(self) -> Mapping[str, str]:
        """That belong to the answer."""
        if self.retry_after is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after)))}
