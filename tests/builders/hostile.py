"""What nobody sends with good intentions, and where it could be put."""

import base64
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADDRESSES = (
    "/etc/passwd", "../../../../etc/passwd", "..\\..\\windows\\win.ini", "file:///etc/passwd",
    "file://localhost/etc/hostname", "http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:1/a.png",
    "https://evil.example/a.png", "//evil.example/a.png", "ftp://evil.example/a.png", "gopher://127.0.0.1:1/_x",
    "\\\\evil.example\\share\\a.png", "/proc/self/environ", "picture.png", "~/.ssh/id_rsa", "a\x00b",
    "data:image/svg+xml;base64,PHN2Zy8+", "data:text/html,<script>", "javascript:alert(1)",
)  # fmt: skip
NAMES = (
    *ADDRESSES,
    "../style",
    "style/../../style",
    "style.safetensors",
    "",
    "style\n",
    "a" * 10_000,
)


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(width: int = 32, height: int = 32, *, more: bytes = b"", is_whole: bool = True) -> bytes:
    """A grey PNG; without its rows it is a head that announces so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)) if is_whole else b"", 9)
    return SIGNATURE + head + more + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def text_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def with_picture(sent: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every place of a call where a picture is sent as text: name, path and body."""
    good, draw = text_of(png(128, 128)), {"prompt": "a"}
    yield "job", "/v1/jobs", {**draw, "image": sent}
    yield "job-mask", "/v1/jobs", {**draw, "image": good, "mask": sent}
    yield "job-control", "/v1/jobs", {**draw, "control_image": [sent], "controls": ["edge"]}
    yield "edit", "/v1/images/edits", {**draw, "image": sent}
    yield "edit-mask", "/v1/images/edits", {**draw, "image": good, "mask": sent}
    yield "img2img", "/sdapi/v1/img2img", {**draw, "init_images": [sent]}
    yield "img2img-mask", "/sdapi/v1/img2img", {**draw, "init_images": [good], "mask": sent}
    units = {"controlnet": {"args": [{"image": sent, "model": "edge", "module": "none"}]}}
    yield "controlnet", "/sdapi/v1/txt2img", {**draw, "alwayson_scripts": units}
    yield "png-info", "/sdapi/v1/png-info", {"image": sent}


def with_name(name: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every place of a call where something of the server is chosen by name."""
    draw, control = {"prompt": "a"}, text_of(png(128, 128))
    yield "job-lora", "/v1/jobs", {**draw, "loras": {name: 1.0}}
    yield "job-control", "/v1/jobs", {**draw, "control_image": [control], "controls": [name]}
    yield "openai-model", "/v1/images/generations", {**draw, "model": name}
    yield "a1111-sampler", "/sdapi/v1/txt2img", {**draw, "sampler_name": name}
    override = {"sd_model_checkpoint": name}
    yield "a1111-checkpoint", "/sdapi/v1/txt2img", {**draw, "override_settings": override}
    yield "a1111-options", "/sdapi/v1/options", override
    units = {"controlnet": {"args": [{"image": control, "model": name, "module": "none"}]}}
    yield "a1111-controlnet", "/sdapi/v1/txt2img", {**draw, "alwayson_scripts": units}


def values_beyond() -> Iterator[dict[str, Any]]:
    """Settings that no order may have, in the names that all calls know."""
    for steps in (10**9, -1, 10**400, 1.5):
        yield {"steps": steps}
    for width, height in ((10**9, 10**9), (8192, 8192), (-128, 128)):
        yield {"width": width, "height": height}
    for seed in (10**100, "x", [1]):
        yield {"seed": seed}
    for prompt in ("a" * 1_000_000, None, ["a"], {"path": "/etc/passwd"}, "\ud800"):
        yield {"prompt": prompt}
    for name in ("nobody_knows", "__class__", "output", "save_path", "outdir_samples"):
        yield {name: "/tmp/x.png"}


def refused(answer: httpx.Response, *statuses: int) -> str:
    """What a refusal says: 4xx, one line of JSON, nothing of the inside."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:300])
    assert not statuses or answer.status_code in statuses, (answer.status_code, answer.text[:300])
    assert "\n" not in answer.text and answer.headers["content-type"] == "application/json"
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    assert len(answer.text) < 3000
    said = answer.json()
    error = said.get("error")
    return str(error["message"] if isinstance(error, dict) else said["detail"])
