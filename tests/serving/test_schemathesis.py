"""The document of all calls against the service: whatever it allows is answered, and as it says."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import running_service

from pixart.serving.app import make_app
from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits
from pixart.serving.service import Offer, Service

pytestmark = pytest.mark.slow
EXAMPLES = 10  # of each call, that the document allows and that it does not
OFFER = Offer("shapes", native=128, multiple=16, loras=("ink",), controls=("edges",))
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    response_headers_conformance, negative_data_rejection, unsupported_method,
]  # fmt: skip


LIMITS = Limits(rate=10**9, pixels=256 * 256, images=2, steps=8)  # drawn at once, and small
FACTS = Service(None, OFFER, Clients(), LIMITS)  # type: ignore[arg-type]  # nothing is asked of the queue
DOCUMENT = make_app(FACTS, ui=False).openapi()
CALLS = [(path, method) for path, calls in DOCUMENT["paths"].items() for method in calls]


# Of a call without a body there is nothing that the document does not allow.
SENT = [
    (path, method, mode)
    for path, method in CALLS
    for mode in GenerationMode
    if mode.is_positive or "requestBody" in DOCUMENT["paths"][path][method]
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_service(offer=OFFER, limits=LIMITS) as running:
        yield running.url


@pytest.fixture(scope="module")
def document() -> Any:
    return schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.parametrize(("path", "method", "mode"), SENT)
def test_whatever_is_sent_is_answered_as_the_document_says(
    url: str, document: Any, path: str, method: str, mode: GenerationMode
) -> None:
    operation = document[path][method]

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
        phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=60)

    check()


def test_every_call_tells_of_refusals() -> None:
    for path, method in CALLS:
        answers = DOCUMENT["paths"][path][method]["responses"]
        assert {"4XX", "5XX"} <= answers.keys() and "422" not in answers, (method, path)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits", "/v1/jobs"])
def test_the_example_of_a_body_is_taken(url: str, path: str) -> None:
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    answer = httpx.post(url + path, json=body, timeout=60)
    assert answer.status_code in (200, 202), answer.text
