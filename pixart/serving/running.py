"""From options to a server that runs: libraries, port, model, application, and a clean end."""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pixart import process
from pixart.generation.console import Console
from pixart.serving.choices import find_loras, parse_controls
from pixart.serving.listening import bound
from pixart.serving.options import Options, check_options, limits_of, model_name

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pixart.serving.guarding.clients import Clients
    from pixart.serving.guarding.hosts import Hosts
    from pixart.serving.service import Service

# By extra, what of it is imported, as its packages are called.
_LIBRARIES = {
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "ui": ("gradio",),
}


def serve(options: Options) -> None:
    """Serve until a signal; all is closed then. ValueError, one line, for options that cannot be, a port
    that cannot be had or a model that cannot be opened; ModuleNotFoundError without the extra."""
    opening = _checked(options)
    from pixart.serving.app import make_app
    from pixart.serving.server import Server
    from pixart.serving.temporary import private_folder

    console = Console(options.quiet)
    with bound(options.host, options.port, options.token_file) as port:
        with console.with_libraries():
            console.remark(f"opening {model_name(options)}")
            service = opening()
        try:
            process.at_work()
            with private_folder():
                app = make_app(service, ui=options.ui)
                Server(app, port, service.queue.close).serve_forever()
        finally:
            service.queue.close()


def application(options: Options) -> "FastAPI":
    """The application for other servers of ASGI, with the model open, as `serve` has it; they listen, and their
    lifespan ends it. host, port and quiet of the options say nothing here but by which name requests come.
    ValueError as of `serve`."""
    opening = _checked(options)
    from pixart.serving.app import make_app

    return make_app(opening(), ui=options.ui, closes=True)


def _checked(options: Options) -> "Callable[[], Service]":
    """What opens the service, once all is checked that needs no model."""
    check_options(options)
    check_libraries(ui=options.ui)
    from pixart.serving.guarding.clients import Clients
    from pixart.serving.guarding.hosts import Hosts

    loras = find_loras(options.lora_folder) if options.lora_folder is not None else {}
    controls, clients = parse_controls(options.control), Clients.read(options.token_file)
    hosts = Hosts(options.host, options.name, options.https)
    return lambda: open_service(options, loras, controls, clients, hosts)


def check_libraries(*, ui: bool) -> None:
    """ModuleNotFoundError, with the way to get them, for a library of the extra that is not there."""
    if missing := [name for name in _LIBRARIES["serve"] if find_spec(name) is None]:
        raise ModuleNotFoundError(
            f"pixart serve needs {', '.join(missing)}: pip install 'pixart-fast[serve]'"
        )
    if ui and find_spec("gradio") is None:
        raise ModuleNotFoundError(
            "the page needs gradio: pip install 'pixart-fast[ui]', or serve without it (--no-ui)"
        )


def open_service(
    options: Options,
    loras: Mapping[str, Path],
    controls: Mapping[str, str],
    clients: "Clients",
    hosts: "Hosts",
) -> "Service":
    """Open the model, and put a queue before it, which is to be closed."""
    from pixart.serving.drawing.painter import PipelinePainter
    from pixart.serving.drawing.queue import Queue
    from pixart.serving.service import Offer, Service

    painter = PipelinePainter.open(options, loras, controls)
    name, limits = model_name(options), limits_of(options)
    names = tuple(loras), tuple(controls)
    offer = Offer(name, painter.native, painter.multiple, *names, painter.fast)
    return Service(Queue(painter, limits), offer, clients, limits, hosts)
