"""What the page does for a client: submit, follow, cancel, and read settings back. No Gradio here."""

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Mapping
from typing import Any

from pixart.resolution import resolve_size
from pixart.serving.calls import events, schemas
from pixart.serving.orders import MEDIA_TYPES, Job
from pixart.serving.page.form import Asked, Read, asked_of
from pixart.serving.page.reading import read_settings
from pixart.serving.refusal import Refusal
from pixart.serving.service import Service

PAUSE = 0.1  # seconds between what a page is told of one job
PREVIEW_EVERY = 1  # steps


class Actions:
    """All of them raise Refusal, one line that names the field, and touch the jobs of `owner` alone."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def submit(self, asked: Asked | Mapping[str, Any], owner: str) -> Job:
        """Of what is asked, or of the fields of the page by their names."""
        return await asyncio.to_thread(self._submit, asked, owner)

    def _submit(self, asked: Asked | Mapping[str, Any], owner: str) -> Job:
        if not isinstance(asked, Asked):
            asked = asked_of(asked)
        if asked.format not in list(MEDIA_TYPES):  # whatever it is, a list even
            raise Refusal(400, f"format must be one of {', '.join(MEDIA_TYPES)}", field="format")
        most = self.service.limits.images
        if type(asked.count) is not int or not 1 <= asked.count <= most:
            reason = (
                f"count must be a whole number from 1 to {most}, got {str(asked.count)[:100]!r}"
            )
            raise Refusal(400, reason, field="count")
        order = schemas.order_of(
            asked.settings, self.service, loras=asked.loras, controls=asked.controls, n=asked.count,
            preview_every=PREVIEW_EVERY, format=asked.format, fast=asked.fast,
        )  # fmt: skip
        try:
            return self.service.queue.submit(order, owner)
        except ValueError as error:
            raise schemas.refusal_of(error) from error

    async def follow(self, job: Job) -> AsyncIterator[Job]:
        """The job as it stands, each time that it has changed, until it has ended."""
        async for now in events.follow(self.service.queue, job, job.owner):
            if now is not None:
                yield now
                await asyncio.sleep(0 if now.has_ended else PAUSE)

    async def draw(self, asked: Asked, owner: str) -> Job:
        """Once it is done. Refusal (400) for one that failed or was cancelled."""
        job = await self.submit(asked, owner)
        async for now in self.follow(job):
            job = now
        if job.state != "done":
            raise Refusal(400, job.error or f"the job was {job.state}", code=job.state)
        return job

    def cancel(self, id: str, owner: str) -> Job:
        return self.service.queue.cancel(id, owner)

    def jobs(self, owner: str) -> list[Job]:
        return self.service.queue.list(owner)

    def read_file(self, text: str) -> Read:
        """Settings out of the first bytes of a picture's file, as a data URL."""
        try:
            content = base64.b64decode(str(text).partition(",")[2], validate=True)
            return read_settings(content, self.service.offer)
        except (binascii.Error, ValueError) as error:
            raise Refusal(400, str(error), field="picture") from error

    def read_job(self, id: str, number: int, owner: str) -> Read:
        """Settings of a picture in the gallery."""
        results = self.service.queue.get(id, owner).results
        if not 0 <= number < len(results):
            raise Refusal(404, "the picture is not kept any longer", code="not_found")
        return read_settings(results[number].content, self.service.offer)

    def size_of(self, size: str, aspect: str | None, resolution: str | None) -> str:
        """What a size comes to, for people. Refusal for one that cannot be drawn."""
        offer = self.service.offer
        try:
            found = resolve_size(
                size or None, None if size else aspect or None, None if size else resolution or None,
                native=offer.native, multiple=offer.multiple,
            )  # fmt: skip
        except ValueError as error:
            raise Refusal(400, str(error), field="size") from error
        if found.width * found.height > self.service.limits.pixels:
            raise Refusal(
                400, f"size must be at most {self.service.limits.pixels} pixels, got "
                f"{found.width}x{found.height}; choose a smaller one", field="size",
            )  # fmt: skip
        return f"{found.width} × {found.height} pixels"
