"""/sdapi/v1: what A1111's clients send, and what they are answered."""

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from serving import REMARK, Running, StubPainter, eventually, running_service

from pixart.serving.a1111.fields import Picture, Text
from pixart.serving.a1111.infotext import parse_parameters
from pixart.serving.a1111.reading import order_from
from pixart.serving.guarding.clients import Clients
from pixart.serving.limits import Limits
from pixart.serving.service import Offer

OFFER = Offer(
    "shapes", native=128, multiple=16, loras=("marker", "ink wash"), controls=("edges", "depth-map")
)
TOKENS = {"ann": "a" * 20, "bob": "b" * 20}
# What each sends for a picture with nothing of its own switched on.
SILLY_TAVERN = {
    "prompt": "a red circle", "negative_prompt": "blurry", "sampler_name": "DDIM", "scheduler": "Automatic",
    "steps": 5, "cfg_scale": 4, "width": 128, "height": 128, "restore_faces": False, "enable_hr": False,
    "hr_upscaler": "Latent", "hr_scale": 2.0, "hr_additional_modules": [], "denoising_strength": 0.7,
    "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 1},
    "override_settings_restore_afterwards": True, "clip_skip": 1, "save_images": True, "send_images": True,
    "do_not_save_grid": False, "do_not_save_samples": False, "url": "http://localhost:7860", "auth": "",
}  # fmt: skip
OPEN_WEBUI = {"prompt": "a red circle", "batch_size": 1, "width": 128, "height": 128}
WEBUIAPI = {
    "enable_hr": False, "hr_scale": 2, "hr_upscaler": "Latent", "hr_second_pass_steps": 0, "hr_resize_x": 0,
    "hr_resize_y": 0, "denoising_strength": 0.7, "firstphase_width": 0, "firstphase_height": 0,
    "prompt": "a red circle", "styles": [], "seed": -1, "subseed": -1, "subseed_strength": 0.0,
    "seed_resize_from_h": 0, "seed_resize_from_w": 0, "batch_size": 1, "n_iter": 1, "steps": 20,
    "cfg_scale": 7.0, "width": 128, "height": 128, "restore_faces": False, "tiling": False,
    "do_not_save_samples": False, "do_not_save_grid": False, "negative_prompt": "", "eta": 1.0, "s_churn": 0,
    "s_tmax": 0, "s_tmin": 0, "s_noise": 1, "override_settings": {},
    "override_settings_restore_afterwards": True, "sampler_name": "Euler a", "sampler_index": "Euler a",
    "script_name": None, "script_args": [], "send_images": True, "save_images": False,
    "alwayson_scripts": {"ADetailer": {"args": [False]}, "ControlNet": {"args": []}},
}  # fmt: skip
# What A1111's own document gives as the body of img2img.
IMG2IMG = {
    **WEBUIAPI, "resize_mode": 0, "image_cfg_scale": 0, "mask_blur": 4, "inpainting_fill": 0,
    "inpaint_full_res": True, "inpaint_full_res_padding": 0, "inpainting_mask_invert": 0,
    "initial_noise_multiplier": 0, "include_init_images": False, "latent_mask": None, "mask_round": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with running_service(offer=OFFER, limits=Limits(rate=100_000)) as service:
        yield service


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{running.url}/sdapi/v1", timeout=60) as client:
        yield client


@pytest.fixture
def post(client: httpx.Client) -> Callable[..., httpx.Response]:
    def send(call: str, **body: Any) -> httpx.Response:
        return client.post(call, json=body)

    return send


def _picture(content: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(content)))


def _encoded(width: int = 128, height: int = 128, **save: Any) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG", **save)
    return base64.b64encode(file.getvalue()).decode()


def _drawn(running: Running) -> Any:
    """The order that was taken last."""
    jobs = running.service.queue.list("local")
    return jobs[-1].order


@pytest.mark.parametrize(
    "body", [SILLY_TAVERN, OPEN_WEBUI, WEBUIAPI], ids=["tavern", "open", "api"]
)
def test_what_clients_send_for_a_plain_picture_is_drawn(
    body: dict[str, Any], post: Callable[..., httpx.Response]
) -> None:
    answer = post("txt2img", **body)
    assert answer.status_code == 200, answer.text
    [content] = answer.json()["images"]
    assert _picture(content).size == (128, 128)


def test_the_plan_is_left_out_by_an_override_and_info_has_the_remarks(
    post: Callable[..., httpx.Response],
) -> None:
    for value, remarks in (("off", [REMARK]), (None, []), ("", [])):
        answer = post("txt2img", prompt="x", override_settings={"fast": value})
        assert json.loads(answer.json()["info"])["remarks"] == remarks
    refused = post("txt2img", prompt="x", override_settings={"fast": "balanced"})
    assert refused.status_code == 400 and "fast must be off or left out" in refused.json()["detail"]
    assert post("options", fast="off").status_code == 400  # for everybody


def test_a_picture_is_what_was_asked_for_and_says_so(
    running: Running, post: Callable[..., httpx.Response]
) -> None:
    answer = post(
        "txt2img", prompt="a red circle", negative_prompt="blue", seed=7, steps=3, cfg_scale=2.5,
        width=160, height=96, sampler_name="DPM++ 2M", scheduler="Karras", batch_size=2, n_iter=2,
    ).json()  # fmt: skip
    first = _drawn(running).requests[0]
    assert (first.prompt, first.negative, first.seed, first.steps) == ("a red circle", "blue", 7, 3)
    assert (first.guidance, first.scheduler) == (2.5, "dpm-solver++-karras")
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [7, 8, 9, 10] and len(answer["images"]) == 4
    assert (info["width"], info["height"], info["sampler_name"]) == (160, 96, "DPM++ 2M Karras")
    assert info["infotexts"][1].startswith("a red circle\nNegative prompt: blue\nSteps: 3")
    assert _picture(answer["images"][1]).info["parameters"] == info["infotexts"][1]
    assert answer["parameters"]["cfg_scale"] == 2.5


def test_a_seed_of_minus_one_is_another_each_time(post: Callable[..., httpx.Response]) -> None:
    seeds = {
        json.loads(post("txt2img", prompt="x", seed=-1).json()["info"])["seed"] for _ in range(3)
    }
    assert len(seeds) == 3


def test_a_client_that_wants_no_pictures_back_gets_none(
    post: Callable[..., httpx.Response],
) -> None:
    answer = post("txt2img", prompt="x", send_images=False).json()
    assert answer["images"] == [] and json.loads(answer["info"])["infotexts"]


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
def test_a_client_chooses_the_format(
    name: str, kind: str, post: Callable[..., httpx.Response]
) -> None:
    answer = post("txt2img", prompt="x", override_settings={"samples_format": name}).json()
    assert _picture(answer["images"][0]).format == kind


def test_loras_of_a_prompt_are_drawn_with_and_leave_it(
    running: Running, post: Callable[..., httpx.Response]
) -> None:
    post("txt2img", prompt="a circle <lora:marker:0.5> in <lora:ink wash> red")
    order = _drawn(running)
    assert order.loras == (("marker", 0.5), ("ink wash", 1.0))
    assert order.requests[0].prompt == "a circle  in  red"


def test_extra_networks_can_be_left_out(
    running: Running, post: Callable[..., httpx.Response]
) -> None:
    post("txt2img", prompt="a circle <lora:marker:0.5>", disable_extra_networks=True)
    assert (_drawn(running).loras, _drawn(running).requests[0].prompt) == ((), "a circle")


@pytest.mark.parametrize(
    ("body", "upscale"),
    [
        ({"hr_scale": 1.5}, "1.5x"),
        ({}, "2x"),
        ({"hr_resize_x": 256, "hr_resize_y": 192}, "256x192"),
    ],
)
def test_hires_fix_is_our_enlarging(body: dict[str, Any], upscale: str, running: Running) -> None:
    usual = {"prompt": "x", "enable_hr": True, "hr_upscaler": "Latent", "denoising_strength": 0.4}
    [request] = order_from(Text(**usual, **body, hr_cfg=2), running.service).requests
    assert (request.upscale, request.upscale_strength) == (upscale, 0.4)
    assert request.upscale_guidance == 2


def test_a_picture_that_lies_on_its_side_keeps_the_size_it_is_seen_in(running: Running) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    sent = _encoded(200, 100, exif=exif)
    body = Picture(prompt="x", init_images=[sent], width=100, height=200)
    assert order_from(body, running.service).requests[0].fit == "exact"


def test_img2img_begins_with_the_picture(
    running: Running, post: Callable[..., httpx.Response]
) -> None:
    answer = post("img2img", **IMG2IMG, init_images=[f"data:image/png;base64,{_encoded()}"])
    assert answer.status_code == 200, answer.text
    request = _drawn(running).requests[0]
    assert (request.strength, request.fit, request.width) == (0.7, "exact", None)
    post("img2img", prompt="x", init_images=[_encoded(200, 100)], width=128, height=96)
    request = _drawn(running).requests[0]
    assert (request.strength, request.fit, request.width, request.height) == (0.75, "crop", 128, 96)


def test_a_mask_is_what_is_drawn_anew(
    running: Running, post: Callable[..., httpx.Response]
) -> None:
    body = {"prompt": "x", "init_images": [_encoded()], "mask": _encoded(), "denoising_strength": 1}
    assert post("img2img", **body, inpainting_mask_invert=1).status_code == 200
    request = _drawn(running).requests[0]
    assert (request.mask, request.mask_blur, request.invert_mask) == ("mask", 4, True)
    post("img2img", **body, mask_blur_x=9, mask_blur_y=9)
    assert (_drawn(running).requests[0].mask_blur, _drawn(running).requests[0].invert_mask) == (
        9,
        False,
    )


def test_units_of_controlnet_are_our_controls(
    running: Running, post: Callable[..., httpx.Response]
) -> None:
    units = [
        {"image": _encoded(), "model": "edges [d14c016b]", "module": "canny", "weight": 0.8,
         "guidance_start": 0.1, "guidance_end": 0.6, "control_mode": 0, "resize_mode": 1,
         "processor_res": 512, "threshold_a": 64, "pixel_perfect": False},
        {"enabled": False, "model": "no such"},
        {"input_image": _encoded(), "model": "depth-map", "module": "depth_midas"},
    ]  # fmt: skip
    answer = post("txt2img", prompt="x", alwayson_scripts={"controlnet": {"args": units}})
    assert answer.status_code == 200, answer.text
    order = _drawn(running)
    request = order.requests[0]
    assert order.controls == ("edges", "depth-map")
    assert request.control_preprocessor == ("canny", "depth")
    assert request.control_scale == (0.8, 1.0)
    assert request.control_interval == ((0.1, 0.6), (0.0, 1.0))


def test_a_unit_without_a_picture_goes_by_that_of_img2img(
    running: Running, post: Callable[..., httpx.Response]
) -> None:
    scripts = {"ControlNet": {"args": [{"model": "edges"}]}}
    body = {"prompt": "x", "init_images": [_encoded()], "alwayson_scripts": scripts}
    assert post("img2img", **body).status_code == 200
    assert _drawn(running).requests[0].control_image == ("control-1",)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"restore_faces": True}, "restore_faces"),
        ({"tiling": True}, "tiling"),
        ({"styles": ["photo"]}, "styles"),
        ({"subseed_strength": 0.3}, "subseed_strength"),
        ({"seed_resize_from_h": 64}, "seed_resize_from_h"),
        ({"refiner_checkpoint": "sdxl"}, "refiner_checkpoint"),
        ({"script_name": "x/y plot"}, "script_name"),
        ({"eta": 0.67}, "eta"),
        ({"s_churn": 4}, "s_churn"),
        ({"hr_second_pass_steps": 8}, "hr_second_pass_steps"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler must be PixArt or Latent"),
        ({"enable_hr": True, "hr_scale": 0.5}, "hr_scale must be from 1 to 16"),
        ({"clip_skip": 2}, "clip_skip"),
        ({"sampler_name": "Euler A2"}, "such as Euler a"),
        ({"sampler_name": "LCM", "scheduler": "Karras"}, "scheduler must be Automatic with LCM"),
        ({"sampler_name": "Euler", "scheduler": "Exponential"}, "scheduler must be one of Automatic, Karras"),
        ({"promt": "x"}, "did you mean 'prompt'"),
        ({"override_settings": {"sd_model_checkpoint": "/etc/passwd"}}, "sd_model_checkpoint must be shapes"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 2}}, "CLIP_stop_at_last_layers"),
        ({"override_settings": {"sd_vae": "../x.pt"}}, "sd_vae"),
        ({"override_settings": {"outdir_samples": "/tmp"}}, "outdir_samples"),
        ({"alwayson_scripts": {"ADetailer": {"args": [True, {}]}}}, "ADetailer"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"model": "edgy"}]}}}, "image of a ControlNet unit"),
        ({"alwayson_scripts": {"controlnet": {"args": [{"model": "edgy", "image": "eA=="}]}}}, "edges"),
        ({"batch_size": 9, "n_iter": 9}, "batch_size times n_iter"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -7}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**9}, "steps"),
        ({"cfg_scale": "high"}, "cfg_scale"),
        ({"width": 10**6, "height": 16}, "width"),
        ({"prompt": "<lora:marke:1>"}, "such as marker"),
        ({"prompt": "<lora:../../x:1>"}, "must name LoRAs"),
        ({"prompt": "<lora:marker:much>"}, "weight"),
        ({"prompt": "<lora:marker:99>"}, "loras"),
        ({"prompt": "<lora:marker:nan>"}, "loras"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused_in_one_line_by_its_name(
    body: dict[str, Any], said: str, post: Callable[..., httpx.Response]
) -> None:
    answer = post("txt2img", **{"prompt": "x", **body})
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["detail"]
    assert "\n" not in answer.text


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"init_images": []}, "init_images"),
        ({}, "init_images"),
        ({"init_images": ["/etc/passwd"]}, "init_images"),
        ({"init_images": ["http://169.254.169.254/x.png"]}, "paths and URLs are not followed"),
        ({"init_images": ["", ""]}, "init_images must be one picture"),
        ({"mask": "file:///etc/passwd"}, "mask"),
        ({"denoising_strength": 0}, "strength"),
        ({"inpainting_fill": 2}, "inpainting_fill"),
        ({"resize_mode": 3}, "resize_mode"),
        ({"mask": "PNG", "mask_blur_x": 1, "mask_blur_y": 2}, "mask_blur_x"),
    ],
)
def test_what_img2img_cannot_do_is_refused(
    body: dict[str, Any], said: str, post: Callable[..., httpx.Response]
) -> None:
    usual = {} if "init_images" in body or not body else {"init_images": [_encoded()]}
    answer = post("img2img", prompt="x", **usual, **body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["detail"]


def test_what_clients_ask_for_at_their_start_is_there(
    running: Running, client: httpx.Client
) -> None:
    [model] = client.get("/sd-models").json()
    assert (model["title"], model["model_name"], model["filename"]) == ("shapes",) * 3
    assert client.get("/options").json()["sd_model_checkpoint"] == model["title"]
    samplers = [one["name"] for one in client.get("/samplers").json()]
    assert {"Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DDIM"} <= {*samplers}
    schedules = [one["label"] for one in client.get("/schedulers").json()]
    assert schedules == ["Automatic", "Karras"]
    assert [one["name"] for one in client.get("/loras").json()] == ["marker", "ink wash"]
    for name in (
        "upscalers",
        "latent-upscale-modes",
        "sd-vae",
        "prompt-styles",
        "face-restorers",
    ):
        assert isinstance(client.get(f"/{name}").json(), list), name
    for name in ("memory", "cmd-flags", "embeddings", "scripts"):
        assert isinstance(client.get(f"/{name}").json(), dict), name
    assert client.post("/refresh-checkpoints").json() is None
    models = httpx.get(f"{running.url}/controlnet/model_list", timeout=60).json()
    assert models == {"model_list": ["edges", "depth-map"]}


def test_every_sampler_of_the_list_is_taken(running: Running, client: httpx.Client) -> None:
    for one in client.get("samplers").json():
        [request] = order_from(Text(prompt="x", sampler_name=one["name"]), running.service).requests
        assert request.scheduler == one["aliases"][0]


def test_options_are_taken_where_they_change_nothing(post: Callable[..., httpx.Response]) -> None:
    assert post("options", sd_model_checkpoint="shapes", sd_vae="Automatic").json() is None
    assert post("options", sd_model_checkpoint="sd-xl").status_code == 400
    assert post("options", show_progress_every_n_steps=3).status_code == 400


def test_png_info_reads_what_our_pictures_say(post: Callable[..., httpx.Response]) -> None:
    for name in ("png", "jpg", "webp"):
        drawn = post(
            "txt2img", prompt="a red circle, large", seed=5, steps=2,
            override_settings={"samples_format": name},
        ).json()  # fmt: skip
        answer = post("png-info", image=drawn["images"][0]).json()
        assert answer["info"] == json.loads(drawn["info"])["infotexts"][0]
        said = answer["parameters"]
        assert (said["Prompt"], said["Seed"], said["Steps"]) == ("a red circle, large", "5", "2")
    assert post("png-info", image=_encoded()).json() == {"info": "", "items": {}, "parameters": {}}
    assert post("png-info", image="not base64").status_code == 400


def test_parameters_of_other_programs_are_told_apart() -> None:
    text = (
        'a cat: on a, mat\nsecond line\nNegative prompt: dog, "x": y\n'
        'Steps: 20, Sampler: DPM++ 2M, CFG scale: 7, Lora hashes: "a: 1, b: 2", Version: v1.10'
    )
    assert parse_parameters(text) == {
        "Prompt": "a cat: on a, mat\nsecond line", "Negative prompt": 'dog, "x": y', "Steps": "20",
        "Sampler": "DPM++ 2M", "CFG scale": "7", "Lora hashes": "a: 1, b: 2", "Version": "v1.10",
    }  # fmt: skip
    assert (
        parse_parameters("only: a prompt, no settings")["Prompt"] == "only: a prompt, no settings"
    )


class _Held:
    """A service whose painter is held, and clients that wait for pictures in threads."""

    def __init__(self, running: Running) -> None:
        self.running, self.answers = running, dict[str, httpx.Response]()
        self.threads: list[threading.Thread] = []

    def ask(self, name: str, **body: Any) -> None:
        def send() -> None:
            self.answers[name] = httpx.post(
                f"{self.running.url}/sdapi/v1/txt2img", json={"prompt": name, **body},
                auth=("user", TOKENS[name]), timeout=60,
            )  # fmt: skip

        self.threads.append(threading.Thread(target=send))
        self.threads[-1].start()

    def call(self, name: str, method: str, call: str) -> Any:
        answer = httpx.request(
            method, f"{self.running.url}/sdapi/v1/{call}", auth=("user", TOKENS[name]), timeout=60
        )
        return answer.json() if answer.status_code == 200 else answer

    def progress(self, name: str) -> Any:
        return self.call(name, "GET", "progress")

    def finish(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture
def held() -> Iterator[_Held]:
    painter = StubPainter()
    painter.hold()
    with running_service(painter, offer=OFFER, clients=Clients(TOKENS)) as running:
        yield _Held(running)


def test_progress_and_interrupt_are_about_the_callers_own_picture(held: _Held) -> None:
    held.ask("ann", steps=20)
    eventually(
        lambda: (
            held.progress("ann")["state"]["sampling_steps"] == 0
            and bool(held.running.painter.drawn)
        )
    )
    held.ask("bob", steps=20)
    held.running.painter.let_step(10)
    eventually(lambda: held.progress("ann")["state"]["sampling_step"] == 10)
    ann = held.progress("ann")
    assert ann["progress"] == 0.5 and ann["state"]["sampling_steps"] == 20
    assert _picture(ann["current_image"]).size == (128, 128)
    assert ann["state"]["job_count"] == 1 and ann["eta_relative"] > 0
    eventually(lambda: held.progress("bob")["state"]["job_count"] == 1)
    bob = held.progress("bob")
    assert (bob["progress"], bob["current_image"]) == (0, None)

    held.call("bob", "POST", "interrupt")
    eventually(lambda: "bob" in held.answers)
    assert held.answers["bob"].json()["images"] == [] and "ann" not in held.answers

    held.running.painter.release()
    held.finish()
    assert len(held.answers["ann"].json()["images"]) == 1
    assert held.progress("ann")["state"]["job_count"] == 0


def test_what_is_finished_of_an_interrupted_batch_is_answered(held: _Held) -> None:
    held.ask("ann", steps=2, batch_size=3)
    held.running.painter.let_step(3)
    eventually(lambda: held.progress("ann")["state"]["job_no"] == 1)
    refused = held.call("ann", "POST", "skip")
    assert refused.status_code == 409
    held.call("ann", "POST", "interrupt")
    held.finish()
    assert len(held.answers["ann"].json()["images"]) == 1


def test_skip_ends_a_single_picture(held: _Held) -> None:
    held.ask("ann", steps=2)
    eventually(lambda: held.progress("ann")["state"]["job_count"] == 1)
    held.call("ann", "POST", "skip")
    held.finish()
    assert held.answers["ann"].json()["images"] == []


def test_a_client_that_goes_away_wants_no_picture(held: _Held) -> None:
    queue = held.running.service.queue
    with contextlib.closing(HTTPConnection(urlsplit(held.running.url).netloc)) as connection:
        headers = {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {TOKENS['ann']}",
        }
        connection.request("POST", "/sdapi/v1/txt2img", '{"prompt": "x"}', headers)
        eventually(lambda: bool(queue.list("ann")))
    eventually(lambda: [job.state for job in queue.list("ann")] == ["cancelled"])


def test_interrupt_leaves_pictures_that_were_not_asked_for_this_way(held: _Held) -> None:
    from serving import order

    job = held.running.service.queue.submit(order("of the page"), "ann")
    held.call("ann", "POST", "interrupt")
    assert not held.running.service.queue.get(job.id, "ann").has_ended


def test_a_picture_that_fails_is_an_error_in_one_line() -> None:
    painter = StubPainter(faults={"broken": RuntimeError("no memory\nat all")})
    with running_service(painter) as running:
        answer = httpx.post(
            f"{running.url}/sdapi/v1/txt2img", json={"prompt": "broken"}, timeout=60
        )
        assert answer.status_code == 500 and "RuntimeError" in answer.json()["detail"]
