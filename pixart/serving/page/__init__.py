"""The page for people: Gradio in front of the same queue that programs ask."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pixart.serving.service import Service


def mount(app: "FastAPI", service: "Service") -> None:
    """Put the page at "/", behind the routes that `app` has already. ImportError without Gradio.

    Nothing is told to anybody: Gradio reads its environment when it is imported, so it is told here.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from pixart.serving.page import blocks

    blocks.mount(app, service)
