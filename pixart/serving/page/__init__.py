"""The page for people: Gradio in front of the same queue that programs ask."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pixart.serving.service import Service

_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    # Numbers of its own on every event, in memory: the fewest that it keeps, and never added up.
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": str(10**12),
}


def mount(app: "FastAPI", service: "Service") -> None:
    """Put the page at "/", behind the routes that `app` has already. ImportError without Gradio.

    Nothing is told to anybody, and nothing of any event is kept: Gradio reads its environment when it is
    imported, so it is told here.
    """
    os.environ.update(_ENVIRONMENT)
    from pixart.serving.page import blocks

    blocks.mount(app, service)
