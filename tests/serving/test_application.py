"""The service under other people's servers: the application alone, and the guide's deployment for Ray Serve."""

import asyncio
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from documents import examples
from starlette.testclient import TestClient

from pixart.serving import running
from pixart.serving.app import make_app
from pixart.serving.options import Options, check_options

TOKEN = "a-token-of-sixteen"


@pytest.mark.slow
def test_the_application_serves_until_its_lifespan_ends(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"somebody:{TOKEN}\n")
    tokens.chmod(0o600)
    before = tempfile.gettempdir()
    app = running.application(
        Options(token_file=tokens, name=("draw.example.org",), ui=False, device="cpu")
    )
    with TestClient(app, base_url="http://draw.example.org") as client:
        folder = Path(tempfile.gettempdir())
        assert str(folder) != before and folder.is_dir()
        assert client.get("/healthz").json()["status"] == "ok"
        assert client.get("/v1/models").status_code == 401
        authorization = {"Authorization": f"Bearer {TOKEN}"}
        order = {"prompt": "a red circle", "steps": 1, "size": "64x64"}
        answer = client.post("/v1/images/generations", json=order, headers=authorization)
        assert answer.status_code == 200 and answer.json()["data"][0]["b64_json"]
        elsewhere = client.get("/healthz", headers={"Host": "evil.example"})
        assert elsewhere.status_code == 421
    assert tempfile.gettempdir() == before and not folder.exists()


def test_the_queue_ends_with_the_application_also_where_its_server_fails() -> None:
    service = MagicMock()
    app = make_app(service, ui=False, closes=True)

    async def fail() -> None:
        async with app.router.lifespan_context(app):
            assert not service.queue.close.called
            raise RuntimeError("the server")

    with pytest.raises(RuntimeError, match="the server"):
        asyncio.run(fail())
    service.queue.close.assert_called_once_with()


def test_the_application_refuses_what_the_command_does(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--max-steps must be 1 or more, got 0"):
        running.application(Options(max_steps=0, ui=False))
    with pytest.raises(ValueError, match="tokens"):
        running.application(Options(token_file=tmp_path / "tokens", ui=False))


def test_the_guide_deploys_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for Ray Serve, which our tests do not have; the real one was tried by hand."""
    [example] = [
        one for one in examples("pixart/serving/README.md") if one.file == "deploy/draw_on_ray.py"
    ]
    asked: dict[str, Any] = {}

    def deployment(**settings: Any) -> Any:
        asked.update(settings)
        return lambda kind: SimpleNamespace(bind=lambda: kind)

    def ingress(build: Any) -> Any:
        return lambda kind: type("Served", (kind,), {"build": staticmethod(build)})

    ray = ModuleType("ray")
    ray.serve = SimpleNamespace(deployment=deployment, ingress=ingress)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(running, "application", lambda options: options)
    names: dict[str, Any] = {}
    exec(compile(example.text, "draw_on_ray.py", "exec"), names)
    options = names["app"].build()
    check_options(options)
    assert options.token_file is not None and not options.ui
    assert asked["ray_actor_options"] == {"num_gpus": 1}
    assert asked["max_ongoing_requests"] == options.max_queue
