"""Whether the service lives, and its numbers as Prometheus reads them."""

from collections.abc import Iterator
from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel

from pixart import __version__
from pixart.serving.calls.documents import REFUSALS, content
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service


class Health(BaseModel):
    """waiting: orders that wait, of all clients."""

    status: Literal["ok"] = "ok"
    model: str
    version: str = __version__
    waiting: int
    drawing: bool


def router(service: Service) -> APIRouter:
    """`/healthz` and `/metrics`."""
    routes = APIRouter(tags=["health"], responses=REFUSALS)
    registry = CollectorRegistry()
    registry.register(_Numbers(service))

    @routes.get("/healthz", summary="Whether orders are taken and drawn")
    def healthz() -> Health:
        figures = service.queue.figures()
        if not figures.is_alive:
            raise Refusal(503, "nothing is drawn any longer: start the service again", code="dead")
        return Health(
            model=service.offer.model, waiting=figures.waiting, drawing=figures.is_drawing
        )

    kind, _, _ = CONTENT_TYPE_LATEST.partition(";")

    @routes.get(
        "/metrics",
        summary="Numbers for Prometheus, of all clients together",
        response_class=Response,
        responses={200: content(kind, "Prometheus' text format.")},
    )
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes


class _Numbers(Collector):
    """What the queue counts, at the moment of asking. Nothing by client: names of clients are theirs."""

    def __init__(self, service: Service) -> None:
        self._queue = service.queue

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        now = self._queue.figures()
        orders = CounterMetricFamily("pixart_orders", "Orders that have ended.", labels=["outcome"])
        for outcome, count in now.ended.items():
            orders.add_metric([outcome], count)
        orders.add_metric(["refused"], now.refused)
        yield orders
        yield CounterMetricFamily("pixart_pictures", "Pictures drawn.", value=now.pictures)
        seconds = CounterMetricFamily(
            "pixart_seconds", "Seconds that these took, by stage.", labels=["stage"]
        )
        for stage, taken in sorted(now.seconds.items()):
            seconds.add_metric([stage], taken)
        yield seconds
        yield _gauge("pixart_alive", "1 while orders are drawn.", now.is_alive)
        yield _gauge("pixart_waiting_orders", "Orders that wait.", now.waiting)
        yield _gauge("pixart_drawing", "1 while a picture is drawn.", now.is_drawing)
        yield _gauge("pixart_kept_orders", "Ended orders that are kept.", now.kept_jobs)
        yield _gauge("pixart_kept_bytes", "Bytes of their pictures.", now.kept_bytes)


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=float(value))
