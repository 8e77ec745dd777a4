"""The layout of the page, and which action follows which event."""

import re
import sys
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import gradio as gr
from fastapi import FastAPI, Response
from gradio import queueing

from pixart.command import one_line
from pixart.process import write_line
from pixart.serving.orders import Job
from pixart.serving.page import calls, fields, show
from pixart.serving.page.actions import Actions
from pixart.serving.page.doors import Doors
from pixart.serving.page.editor import file_reader, script
from pixart.serving.page.form import Read
from pixart.serving.page.reading import HEAD
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

TITLE = "PixArt"
_SCRIPT = "/page/page.js"
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"]
_MONO = ["ui-monospace", "Consolas", "Liberation Mono", "monospace"]
_AGAIN = """element.addEventListener('click', event => {
  const button = event.target.closest('.again');
  if (button) trigger('select', `${button.dataset.job}/${button.dataset.number}`);
});"""
# Of every event: Gradio puts no queue and no bar of its own before ours, and tells no program of it.
_EVENT: dict[str, Any] = {
    "concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private",
}  # fmt: skip


def mount(app: FastAPI, service: Service) -> None:
    """Put the page at "/" of an application; behind its other routes, as it answers for all paths."""
    app.get(_SCRIPT, include_in_schema=False)(_page_script)
    blocks = make_page(service)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=False,
        max_file_size=service.limits.body,
        theme=gr.themes.Base(font=_FONTS, font_mono=_MONO, primary_hue="blue", radius_size="sm"),
        css=script("page.css"),
        head=f'<script src="{_SCRIPT}"></script>',
    )
    mounted = app.router.routes[-1]
    events = {id: len(event.inputs) for id, event in blocks.fns.items() if event.fn is not None}
    doors = Doors(mounted.app, service.clients, events, partial(_session_of, blocks._queue))  # type: ignore[attr-defined]
    mounted.app = doors  # type: ignore[attr-defined]
    queueing.traceback = _Lines()  # type: ignore[assignment]


def _session_of(queue: queueing.Queue, event: str) -> str:
    """Of an event that is called, or has ended and not been heard of yet."""
    if (found := queue.event_ids_to_events.get(event)) is not None:
        return str(found.session_hash)
    sessions = queue.pending_event_ids_session.items()
    return next((session for session, events in sessions if event in events), "")


class _Lines:
    """In the place of the module `traceback` for Gradio's queue: what it says of an event that fails holds
    what a client sent, line ends and all."""

    @staticmethod
    def print_exc() -> None:
        error = sys.exc_info()[1]
        write_line(one_line(f"pixart.serve: the page: {type(error).__name__}: {error}"))


def _page_script() -> Response:
    return Response(script("page.js"), media_type="text/javascript")


def make_page(service: Service) -> gr.Blocks:
    return _Page(service).blocks


class _Page:
    """The components, and the functions that their events call. A file of Gradio's is made by none of them."""

    def __init__(self, service: Service) -> None:
        self.service, self.actions = service, Actions(service)
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as self.blocks:
            self.blocks.queue(default_concurrency_limit=None, api_open=False)
            self._lay_out()
            self._connect()
            gr.api(
                calls.draw(self.actions), api_name="draw", concurrency_limit=None,
                api_description=calls.DESCRIPTION,
            )  # fmt: skip

    def _lay_out(self) -> None:
        service = self.service
        form: fields.Fields = {}
        with gr.Row(elem_id="top"):
            gr.HTML(_heading(service), apply_default_css=False, elem_id="heading", scale=1)
            self.reader = file_reader("reader")
        with gr.Row(elem_id="columns"):
            with gr.Column(elem_id="settings", min_width=300):
                form |= fields.prompts()
                with gr.Row(elem_id="buttons"):
                    self.draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                    self.cancel = gr.Button(
                        "Cancel", variant="stop", elem_id="cancel", min_width=120, interactive=False
                    )
                self.told = gr.HTML(_told(""), apply_default_css=False, elem_id="told")
                form |= fields.sizes(service)
                self.size_note = gr.HTML("", apply_default_css=False, elem_id="size-note")
                form |= fields.sampling(service)
                with gr.Accordion("Begin with a picture", open=False, elem_id="begin-group"):
                    form |= fields.beginning()
                if service.offer.controls:
                    with gr.Accordion("Follow a picture (control)", open=False):
                        form |= fields.control(service)
                if service.offer.loras:
                    form |= fields.loras(service)
                with gr.Accordion("Advanced", open=False, elem_id="advanced"):
                    form |= fields.advanced()
            with gr.Column(elem_id="pictures", min_width=300):
                again: dict[str, Any] = {"js_on_load": _AGAIN, "apply_default_css": False}
                self.now = gr.HTML(show.now(None), elem_id="now", **again)
                gr.HTML("<h2>Your pictures</h2>", apply_default_css=False)
                self.gallery = gr.HTML(show.gallery([]), elem_id="gallery", **again)
        self.followed = gr.Textbox(visible=False)
        self.form = form

    def _connect(self) -> None:
        shown = [self.now, self.gallery, self.told, self.followed, self.draw, self.cancel]
        inputs = [*self.form.values()]
        opened = self.blocks.load(self.on_open, None, shown, **_EVENT)
        self.draw.click(self.on_draw, inputs, shown, cancels=[opened], **_EVENT)
        self.cancel.click(self.on_cancel, [self.followed], [self.told], **_EVENT)
        size = [self.form[name] for name in ("size", "aspect", "resolution")]
        gr.on(
            [self.blocks.load, *(one.change for one in size)],  # type: ignore[attr-defined]
            self.on_size, size, [self.size_note], trigger_mode="always_last", **_EVENT,
        )  # fmt: skip
        read = [*inputs, self.told]
        self.reader.submit(self.on_file, [self.reader], [*read, self.reader], **_EVENT)
        for pictures in (self.now, self.gallery):
            pictures.select(self.on_again, None, read, **_EVENT)

    async def on_draw(self, request: gr.Request, *values: Any) -> AsyncIterator[Any]:
        try:
            job = await self.actions.submit(
                dict(zip(self.form, values, strict=True)), _owner(request)
            )
        except Refusal as refusal:
            yield (
                gr.skip(),
                gr.skip(),
                _told(refusal.reason, "bad"),
                gr.skip(),
                gr.skip(),
                gr.skip(),
            )
            return
        async for update in self._follow(job):
            yield update

    async def on_open(self, request: gr.Request) -> AsyncIterator[Any]:
        """The pictures of this browser, and the job that it left running."""
        jobs = self.actions.jobs(_owner(request))
        running = [job for job in jobs if not job.has_ended]
        if running:
            async for update in self._follow(running[0]):
                yield update
        else:
            drawn = next((job for job in reversed(jobs) if job.results), None)
            yield self._shown(drawn, jobs, "")

    async def _follow(self, job: Job) -> AsyncIterator[Any]:
        finished = -1
        try:
            async for now in self.actions.follow(job):
                jobs = self.actions.jobs(job.owner) if len(now.results) != finished else None
                finished = len(now.results)
                yield self._shown(now, jobs, now.error or "")
        except Refusal as refusal:  # not kept any longer, or the service ends
            yield self._shown(None, None, refusal.reason)

    def _shown(self, job: Job | None, jobs: list[Job] | None, told: str) -> tuple[Any, ...]:
        """For all that tells of a job. jobs: None where the gallery is as it was."""
        is_on = job is not None and not job.has_ended
        return (
            show.now(job),
            gr.skip() if jobs is None else show.gallery(jobs),
            _told(told, "bad"),
            job.id if job else "",
            gr.update(interactive=not is_on, value="Drawing …" if is_on else "Draw"),
            gr.update(interactive=is_on),
        )

    def on_cancel(self, id: str, request: gr.Request) -> str:
        try:
            self.actions.cancel(str(id), _owner(request))
        except Refusal as refusal:
            return _told(refusal.reason, "bad")
        return _told("")

    def on_size(self, size: str, aspect: str, resolution: str) -> str:
        try:
            return f'<p class="hint">{self.actions.size_of(size, aspect, resolution)}</p>'
        except Refusal as refusal:
            return _told(refusal.reason, "bad")

    def on_file(self, text: str) -> list[Any]:
        return [*self._filled(partial(self.actions.read_file, text)), ""]

    def on_again(self, event: gr.EventData, request: gr.Request) -> list[Any]:
        owner = _owner(request)
        id, _, number = str(event._data).rpartition("/")
        if not re.fullmatch("[0-9]{1,4}", number):
            return [*[gr.skip()] * len(self.form), _told("there is no such picture", "bad")]
        return self._filled(partial(self.actions.read_job, id, int(number), owner))

    def _filled(self, read: partial[Read]) -> list[Any]:
        """For the fields and the line: the settings that were read; the rest is emptied."""
        try:
            found = read()
        except Refusal as refusal:
            return [*[gr.skip()] * len(self.form), _told(refusal.reason, "bad")]
        empty = {name: field.value for name, field in self.form.items()}
        values = [*{**empty, **{k: v for k, v in found.values.items() if k in empty}}.values()]
        return [*values, _told(" ".join(["Settings taken from the picture.", *found.left]))]


def _owner(request: gr.Request) -> str:
    return str(request.state.owner)


def _told(text: str, kind: str = "good") -> str:
    """The line below the button. kind: good, or bad."""
    return f'<p class="{kind}" role="alert">{show.escape(text)}</p>'


def _heading(service: Service) -> str:
    largest = (
        int(service.limits.body * 0.7) - HEAD
    )  # a mask goes with it, and base64 is longer by a third
    leave = '<a href="/logout">Log out</a>' if service.clients.has_tokens else ""
    return (
        f'<div class="head"><h1>{TITLE}</h1><p>{show.escape(service.offer.model)}</p>{leave}</div>'
        f'<span id="limits" data-picture="{largest}" hidden></span>'
    )
