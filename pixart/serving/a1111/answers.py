"""What A1111's clients are answered with, from a job."""

import json
import time
from base64 import b64encode
from typing import Any

from pydantic import BaseModel

from pixart import __version__
from pixart.pipeline.metadata import SAMPLERS
from pixart.serving.a1111.fields import Text
from pixart.serving.orders import Job

_NOT_ECHOED = {"init_images", "mask", "alwayson_scripts", "override_settings"}


class Refused(BaseModel):
    """detail: one line, which names the field and the way out. error: a word for programs."""

    error: str
    detail: str
    body: str
    errors: str


class Images(BaseModel):
    """images: base64 of files. parameters: what was asked for. info: JSON, as text."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class Progress(BaseModel):
    """progress: from 0 to 1. current_image: base64 of a JPEG."""

    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None
    textinfo: str | None


class PngInfo(BaseModel):
    info: str
    items: dict[str, str]
    parameters: dict[str, str]


def images_of(job: Job, body: Text, model: str) -> Images:
    """The finished pictures of a job that has ended."""
    files = [b64encode(result.content).decode() for result in job.results]
    return Images(
        images=[] if body.send_images is False else files,
        parameters=body.model_dump(include={*type(body).model_fields} - _NOT_ECHOED),
        info=json.dumps(_info(job, model)),
    )


def _info(job: Job, model: str) -> dict[str, Any]:
    requests = [result.request for result in job.results] or [*job.order.requests]
    first = requests[0]
    return {
        "prompt": first.prompt,
        "all_prompts": [one.prompt for one in requests],
        "negative_prompt": first.negative,
        "all_negative_prompts": [one.negative for one in requests],
        "seed": first.seed,
        "all_seeds": [one.seed for one in requests],
        "subseed": -1,
        "all_subseeds": [-1 for _ in requests],
        "subseed_strength": 0,
        "width": job.results[0].width if job.results else first.width,
        "height": job.results[0].height if job.results else first.height,
        "sampler_name": SAMPLERS.get(first.scheduler or "", ""),
        "cfg_scale": first.guidance,
        "steps": first.steps,
        "batch_size": len(requests),
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": "",
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength,
        "extra_generation_params": {},
        "remarks": job.remarks,
        "index_of_first_image": 0,
        "infotexts": [result.parameters for result in job.results],
        "styles": [],
        "job_timestamp": _timestamp(job.created),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"pixart {__version__}",
    }


def progress_of(job: Job | None, count: int, with_image: bool) -> Progress:
    """count: of all that the client waits for."""
    if job is None:
        return Progress(
            progress=0.0, eta_relative=0.0, state=_state(None, 0), current_image=None, textinfo=None
        )
    done, since = job.progress, job.started or time.time()
    left = (time.time() - since) * (1 - done) / done if done else 0.0
    preview = job.preview if with_image else None
    return Progress(
        progress=done,
        eta_relative=max(left, 0.0),
        state=_state(job, count),
        current_image=None if preview is None else b64encode(preview.content).decode(),
        textinfo=f"{job.position} before it" if job.state == "waiting" else job.stage,
    )


def _state(job: Job | None, count: int) -> dict[str, Any]:
    return {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": "" if job is None else job.id,
        "job_count": count,
        "job_timestamp": "0" if job is None else _timestamp(job.created),
        "job_no": 0 if job is None else job.picture,
        "sampling_step": 0 if job is None else job.step,
        "sampling_steps": 0 if job is None else job.steps,
    }


def _timestamp(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.localtime(seconds))
