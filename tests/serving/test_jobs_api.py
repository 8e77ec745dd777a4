"""/v1/jobs: orders, events, pictures and their ends, of one client and of another."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from serving import REMARK, Running, StubPainter, eventually, running_service

from pixart.pipeline.pictures import KEY
from pixart.serving.limits import Limits
from pixart.serving.service import Offer

OFFER = Offer("shapes", native=128, multiple=16, loras=("ink",), controls=("edges",))


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_service(offer=OFFER, limits=Limits(rate=100_000)) as service:
        yield service


@pytest.fixture
def client(running: Running) -> Iterator[httpx.Client]:
    running.painter.release()
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture
def held(running: Running, client: httpx.Client) -> Iterator[StubPainter]:
    running.painter.hold()
    yield running.painter
    running.painter.release()
    for job in client.get("/v1/jobs").json()["data"]:
        client.delete(f"/v1/jobs/{job['id']}")


def png(side: int = 32, **save: Any) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(content, "PNG", **save)
    return content.getvalue()


def ordered(client: httpx.Client, **body: Any) -> str:
    answer = client.post("/v1/jobs", json={"prompt": "x", **body})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
    return str(answer.headers["location"])


def ended(client: httpx.Client, place: str) -> Any:
    client.get(f"{place}/events")  # ends with the job
    return client.get(place).json()


def events_of(text: str) -> list[tuple[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines["event"], {**json.loads(lines["data"]), "event_id": lines["id"]}))
    return found


def test_an_order_is_drawn_and_its_pictures_are_fetched(client: httpx.Client) -> None:
    place = ordered(client, n=2, seed=7, steps=3, format="webp", quality=80)
    job = ended(client, place)
    assert (job["state"], job["progress"], job["error"]) == ("done", 1.0, None)
    assert [one["seed"] for one in job["pictures"]] == [7, 8]
    for picture in job["pictures"]:
        answer = client.get(picture["url"])
        assert answer.headers["content-type"] == picture["media_type"] == "image/webp"
        assert len(answer.content) == picture["bytes"]
        image = Image.open(io.BytesIO(answer.content))
        assert image.size == (picture["width"], picture["height"]) == (128, 128)


def test_settings_that_are_answered_draw_the_same_picture_again(client: httpx.Client) -> None:
    first = ended(client, ordered(client))["pictures"][0]
    again = ended(client, ordered(client, **first["settings"]))["pictures"][0]
    assert again["settings"] == first["settings"]
    one, other = (Image.open(io.BytesIO(client.get(p["url"]).content)) for p in (first, again))
    assert one.tobytes() == other.tobytes()
    assert json.loads(one.info[KEY])["request"] == json.loads(other.info[KEY])["request"]


def test_a_form_has_its_pictures_as_files_and_its_values_as_texts(
    client: httpx.Client, running: Running
) -> None:
    form = {
        "prompt": "5", "steps": "3", "guidance_interval": "[0, 0.5]", "apg": "true", "seed": "11",
        "strength": "0.25", "controls": "edges", "loras[ink]": "0.5", "negative": "", "guidance": "",
    }  # fmt: skip
    files = {"image": png(), "control_image": png(64)}
    answer = client.post("/v1/jobs", data=form, files=files)
    assert answer.status_code == 202, answer.text
    [settings] = answer.json()["settings"]
    assert (settings["prompt"], settings["steps"], settings["seed"]) == ("5", 3, 11)
    assert (settings["guidance_interval"], settings["apg"]) == ([0, 0.5], True)
    assert "guidance" not in settings
    assert (answer.json()["loras"], answer.json()["controls"]) == ({"ink": 0.5}, ["edges"])


def test_json_has_its_pictures_as_base64(client: httpx.Client) -> None:
    sent = base64.b64encode(png()).decode()
    place = ordered(client, image=f"data:image/png;base64,{sent}", mask="alpha", strength=0.5)
    assert client.get(place).json()["settings"][0]["mask"] == "alpha"


def test_a_job_tells_how_far_it_is_and_shows_previews(
    client: httpx.Client, held: StubPainter
) -> None:
    place = ordered(client, steps=4, preview_every=2)
    held.let_step(2)
    eventually(lambda: client.get(place).json()["preview"] is not None)
    job = client.get(place).json()
    assert (job["state"], job["steps"]) == ("drawing", 4) and job["progress"] == job["step"] / 4
    preview = client.get(job["preview"])
    assert preview.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(preview.content)).format == "JPEG"


def test_those_that_wait_are_told_their_position(client: httpx.Client, held: StubPainter) -> None:
    places = [ordered(client) for _ in range(3)]
    eventually(lambda: client.get(places[0]).json()["state"] == "drawing")
    jobs = [client.get(place).json() for place in places]
    assert [job["state"] for job in jobs] == ["drawing", "waiting", "waiting"]
    assert jobs[1]["position"] < jobs[2]["position"]


def test_events_come_at_each_change_and_end_with_the_job(
    client: httpx.Client, held: StubPainter
) -> None:
    place, names, steps = ordered(client, steps=3), [], set()
    with client.stream("GET", f"{place}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            name, _, text = line.partition(": ")
            if name == "event":
                names.append(text)
            if name == "data" and (job := json.loads(text))["stage"] == "denoise":
                if job["step"] not in steps:  # the next one waits for this
                    held.let_step()
                steps.add(job["step"])
    assert names[-1] == "end" and {*names[:-1]} == {"job"} and steps >= {0, 1, 2}
    [*_, (_, last)] = events_of(client.get(f"{place}/events").text)
    assert last["state"] == "done" and len(last["pictures"]) == 1


def test_who_comes_back_is_told_what_is_new_alone(client: httpx.Client, held: StubPainter) -> None:
    place = ordered(client, steps=4)
    held.let_step()
    eventually(lambda: client.get(place).json()["step"] >= 1)
    seen = client.get(place).json()["version"]
    held.release()
    told = events_of(client.get(f"{place}/events", headers={"Last-Event-ID": str(seen)}).text)
    assert told and all(int(one["event_id"]) > seen for _, one in told)
    last = told[-1][1]["event_id"]
    answer = client.get(f"{place}/events", headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.content) == (204, b"")


def test_a_job_that_is_deleted_ends_its_events(
    running: Running, client: httpx.Client, held: StubPainter
) -> None:
    place = ordered(client)
    with client.stream("GET", f"{place}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines).startswith("id: ")
        client.delete(place)
        names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names[-1] in ("end", "error")  # by whether it was heard of before it was forgotten


@pytest.mark.parametrize("last", ["x", "-1", "9" * 40, "²"])
def test_an_event_id_of_somebody_elses_is_none(client: httpx.Client, last: str) -> None:
    place = ordered(client)
    ended(client, place)
    answer = client.get(f"{place}/events", headers={"Last-Event-ID": last.encode()})  # type: ignore[dict-item]
    assert events_of(answer.text)[-1][0] == "end"


def test_a_cancelled_job_stops_and_stays(client: httpx.Client, held: StubPainter) -> None:
    place = ordered(client)
    eventually(lambda: client.get(place).json()["state"] == "drawing")
    assert client.post(f"{place}/cancel").json()["state"] == "cancelled"
    assert client.get(place).json()["state"] == "cancelled"
    assert events_of(client.get(f"{place}/events").text)[-1][0] == "end"


def test_a_deleted_job_is_forgotten(client: httpx.Client) -> None:
    place = ordered(client)
    ended(client, place)
    assert client.delete(place).status_code == 204
    for further in ("", "/events", "/images/0", "/preview"):
        assert client.get(place + further).status_code == 404
    assert client.delete(place).status_code == 404


def test_a_failed_job_says_why(client: httpx.Client, running: Running) -> None:
    running.painter.faults["broken"] = ValueError("latents must be finite")
    job = ended(client, ordered(client, prompt="broken"))
    assert (job["state"], job["error"]) == ("failed", "latents must be finite")


def test_a_picture_that_is_not_there_is_refused(client: httpx.Client, held: StubPainter) -> None:
    place = ordered(client)
    answer = client.get(f"{place}/images/0")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "picture 0 is not there: 0 of 1 are finished"
    assert client.get(f"{place}/preview").status_code == 404


def test_a_picture_that_is_not_kept_any_longer_is_gone() -> None:
    with (
        running_service(limits=Limits(keep_bytes=0)) as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        first, second = ordered(client), ordered(client)
        ended(client, second)
        job = client.get(first).json()
        assert (job["state"], job["is_kept"], job["pictures"]) == ("done", False, [])
        assert client.get(f"{first}/images/0").status_code == 410
        assert client.get(f"{second}/images/0").status_code == 200


def test_a_picture_is_shown_or_saved_under_a_name(client: httpx.Client) -> None:
    place = ordered(client, seed=3)
    ended(client, place)
    shown, saved = (client.get(f"{place}/images/0", params={"download": d}) for d in (False, True))
    name = f"{place[-32:][:8]}-0-3.png"
    assert shown.headers["content-disposition"] == f'inline; filename="{name}"'
    assert saved.headers["content-disposition"] == f'attachment; filename="{name}"'


def test_clients_see_their_own_jobs_alone(client: httpx.Client) -> None:
    place = ordered(client)
    ended(client, place)
    other = {"Authorization": "Bearer somebody-else"}
    assert client.get("/v1/jobs", headers=other).json()["data"] == []
    for method, further in [
        ("GET", ""), ("GET", "/events"), ("GET", "/images/0"), ("GET", "/preview"), ("POST", "/cancel"),
        ("DELETE", ""),
    ]:  # fmt: skip
        answer = client.request(method, place + further, headers=other)
        assert answer.status_code == 404, (method, further)
    assert client.get(f"{place}/images/0").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"prompt": "\xff"}', b'{"prompt": "a", "prompt": "b"}', b"[" * 100_000, b"[1]", b"null",
        b'{"prompt": "x", "steps": ' + b"9" * 5000 + b"}", b'{"prompt": "x", "guidance": NaN}',
        b'{"prompt": "x", "guidance": 1e999}', b'{"prompt": "\\ud800"}', b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "x", "n": 1.5}', b'{"prompt": "x", "format": "../x"}', b'{"prompt": "x", "loras": [1]}',
        b'{"prompt": "x", "stepz": 1}', b'{"prompt": "x", "image": "/etc/passwd"}', b'{"stepz": 1}',
        b'{"prompt": "x", "' + b"k" * 9000 + b'": 1}', b'{"prompt": "x", "preview_every": null}',
    ],
)  # fmt: skip
def test_hostile_bodies_are_refused_in_one_line(client: httpx.Client, body: bytes) -> None:
    kind = {"Content-Type": "application/json"}
    answer = client.post("/v1/jobs", content=body, headers=kind)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and 0 < len(error["message"]) < 2500


@pytest.mark.parametrize(
    "form",
    [
        b"", b"--x", b"--x\r\n\r\n\r\n--x--",
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n'
        b'--x\r\nContent-Disposition: form-data; name="steps"\r\n\r\nmany\r\n--x--\r\n',
    ],
)  # fmt: skip
def test_broken_forms_are_refused_in_one_line(client: httpx.Client, form: bytes) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = client.post("/v1/jobs", content=form, headers=kind)
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]


def test_a_form_with_too_many_parts_is_refused(client: httpx.Client) -> None:
    files = [("image", png())] * 25
    answer = client.post("/v1/jobs", data={"prompt": "x"}, files=files)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "invalid_form"


def test_an_order_may_leave_the_plan_out_and_hears_remarks(client: httpx.Client) -> None:
    assert ended(client, ordered(client))["remarks"] == []
    assert ended(client, ordered(client, fast="off", n=2))["remarks"] == [REMARK]
    form = client.post("/v1/jobs", files={"prompt": (None, "x"), "fast": (None, "off")})
    assert ended(client, form.headers["location"])["remarks"] == [REMARK]
    refused = client.post("/v1/jobs", json={"prompt": "x", "fast": "balanced"})
    assert refused.status_code == 400 and "fast should be 'off'" in refused.text
