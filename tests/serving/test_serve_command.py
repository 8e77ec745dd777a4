"""`pixart serve`: what it refuses before it opens a model, and one that is started for real."""

import base64
import io
import signal
import socket
import sys
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serve_process import SECONDS, served
from serving import eventually

from pixart import command
from pixart.serving import running
from pixart.serving.choices import find_loras, parse_controls
from pixart.serving.listening import bound
from pixart.serving.options import Options, limits_of, model_name

PROMPT = "a large red circle on white"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends at once."""
    assert command.main(["serve", *arguments, "--model", "no such model"]) == command.BAD_INPUT
    out, line = capsys.readouterr()
    assert out == "" and line.count("\n") == 1 and "no such model" not in line
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--port", "-1"], "--port"),
        (["--max-pixels", "0"], "--max-pixels must be 1 or more, got 0"),
        (["--max-steps", "-5"], "--max-steps"),
        (["--max-images", "0"], "--max-images"),
        (["--max-queue", "0"], "--max-queue"),
        (["--rate", "-1"], "--rate"),
        (["--keep-minutes", "0"], "--keep-minutes must be above 0"),
        (["--keep-minutes", "nan"], "--keep-minutes"),
        (["--keep-megabytes", "0"], "--keep-megabytes"),
        (["--host", "0.0.0.0"], "give --token-file"),
        (["--host", "::"], "give --token-file"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--name", "http://here"], "--name"),
        (["--token-file", "no-such"], "--token-file no-such"),
        (["--lora-folder", "no-such"], "--lora-folder must be a folder, got no-such"),
        (["--control", "edges"], "--control must be NAME=PLACE, got 'edges'"),
        (["--control", "a=b", "--control", "a=c"], "--control a must be given once"),
        (["--control", "../a=b"], "--control: names must be"),
        (["--ui", "maybe"], "unknown argument maybe"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_one_line_before_a_model_is_opened(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *arguments)


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        line = refused(capsys, "--port", port)
    assert f"port {port} of 127.0.0.1 cannot be listened at: it is taken" in line


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["serve", "--port", "0", "--quiet", "--model", "./no-such-model"]) in (2, 3)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("library", "extra", "options"),
    [("uvicorn", "serve", ["--no-ui"]), ("gradio", "ui", []), ("fastapi", "serve", [])],
)
def test_a_library_that_is_missing_is_one_line_with_its_extra(
    library: str,
    extra: str,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = running.find_spec
    monkeypatch.setattr(running, "find_spec", lambda name: None if name == library else find(name))
    line = refused(capsys, *options)
    assert library in line and f"pip install 'pixart-fast[{extra}]'" in line


def test_without_the_page_nothing_of_gradio_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    find = running.find_spec
    monkeypatch.setattr(running, "find_spec", lambda name: None if name == "gradio" else find(name))
    running.check_libraries(ui=False)


def test_loras_have_the_names_of_their_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "marker.safetensors").touch()
    (tmp_path / "ink wash").mkdir()
    (tmp_path / "ink wash" / "adapter_model.safetensors").touch()
    (tmp_path / "README.md").touch()
    (tmp_path / "._marker.safetensors").touch()  # as macOS leaves it
    (tmp_path / "empty").mkdir()
    assert [*find_loras(tmp_path)] == ["ink wash", "marker"]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "got none in"),
        (["a:b.safetensors"], "names must be"),
        (["a,b.safetensors"], "names must be"),
        (["a.safetensors", "a/adapter_model.safetensors"], "must have each name once"),
    ],
)
def test_a_folder_of_loras_that_no_prompt_could_name_is_refused(
    names: list[str], said: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=said):
        find_loras(tmp_path)


def test_controls_have_the_names_that_they_are_given() -> None:
    assert parse_controls(["edges=a/b.pth", "d=x=y"]) == {"edges": "a/b.pth", "d": "x=y"}


def test_limits_are_those_of_the_options() -> None:
    options = Options(max_queue=9, keep_minutes=2, keep_megabytes=3, max_pixels=5, rate=7)
    limits = limits_of(options)
    assert (limits.queue, limits.queue_of_client, limits.keep_seconds) == (9, 4, 120)
    assert (limits.keep_bytes, limits.pixels, limits.rate) == (3 * 2**20, 5, 7)
    assert limits_of(Options(max_queue=1)).queue_of_client == 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(), "shapes"),
        (Options(model="sigma-1024"), "sigma-1024"),
        (Options(model="/home/ann/models/mine/"), "mine"),
        (Options(model="sigma-1024", transformer="/home/ann/x.pth"), "x"),
    ],
)
def test_a_model_is_called_by_no_path(options: Options, name: str) -> None:
    assert model_name(options) == name


def test_an_address_is_one_that_a_browser_opens() -> None:
    with bound("localhost", 0, None) as port:
        assert port.address == f"http://127.0.0.1:{port.number}/"
    with bound("0.0.0.0", 0, Path("tokens")) as port:
        assert port.address == f"http://localhost:{port.number}/"


def test_nothing_of_the_service_is_imported_by_other_commands() -> None:
    code = (
        "import sys, pixart, pixart.command\n"
        "import pixart.generate, pixart.serve\n"
        "bad = {'fastapi', 'uvicorn', 'gradio', 'starlette', 'prometheus_client'} & {*sys.modules}\n"
        "assert not bad, bad"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)


@pytest.mark.slow
def test_a_picture_comes_from_one_that_is_started_for_real(tmp_path: Path) -> None:
    with served(tmp_path, "--no-ui") as one:
        assert httpx.get(f"{one.url}healthz", timeout=60).json()["status"] == "ok"
        body = {"prompt": PROMPT, "seed": 1}
        answer = httpx.post(f"{one.url}sdapi/v1/txt2img", json=body, timeout=SECONDS)
        content = base64.b64decode(answer.json()["images"][0])
        assert Image.open(io.BytesIO(content)).size == (128, 128)
        assert answer.headers.get("server") is None
        assert len(one.leftovers()) == 1
        assert one.end(signal.SIGINT) == command.CANCELLED
    assert one.errors == ["opening shapes", "pixart.serve: cancelled; nothing is served any more"]
    assert one.leftovers() == []


@pytest.mark.slow
def test_ctrl_c_ends_what_is_drawn_and_streams_that_are_open(tmp_path: Path) -> None:
    lines: list[str] = []
    with served(tmp_path, "--no-ui", "--quiet") as one:
        body = {"prompt": PROMPT, "steps": 200}
        job = httpx.post(f"{one.url}v1/jobs", json=body, timeout=SECONDS).json()

        def follow() -> None:
            with httpx.stream(
                "GET", f"{one.url}v1/jobs/{job['id']}/events", timeout=SECONDS
            ) as stream:
                lines.extend(stream.iter_lines())

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        eventually(lambda: _state(one.url, job["id"]) == "drawing")
        assert one.end(signal.SIGTERM) == -signal.SIGTERM
        thread.join(SECONDS)
        assert not thread.is_alive()
    assert one.errors == ["pixart.serve: ended by SIGTERM; nothing is served any more"]
    assert any("cancelled" in line for line in lines)


def _state(url: str, id: str) -> str:
    return str(httpx.get(f"{url}v1/jobs/{id}", timeout=SECONDS).json()["state"])
