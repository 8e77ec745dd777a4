"""The service's pictures are those of `Pipeline.draw` and of the command line, whoever else asks."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import eventually

from pixart.config import EMBEDDED_CONTROL
from pixart.few_step import FewStep
from pixart.files import CheckpointError
from pixart.generate import main as generate
from pixart.lora.adapters import add_lora, save_lora
from pixart.pipeline.fast import identity_of
from pixart.pipeline.metadata import Metadata
from pixart.pipeline.pictures import KEY, read_picture
from pixart.pipeline.request import Request
from pixart.pipeline.text_to_image import Pipeline
from pixart.plans.plan import Plan
from pixart.plans.schedule import KVSchedule
from pixart.sampler.loop import Cancelled
from pixart.serving.drawing import models, painter
from pixart.serving.drawing.painter import PipelinePainter
from pixart.serving.drawing.queue import Queue
from pixart.serving.options import Options
from pixart.serving.orders import Hooks, Order, Preview, Result

CIRCLE = Request("a small red circle", seed=3, steps=2)
SQUARE = Request("a large blue square", seed=4, steps=2)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs, of which the second changes more."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("loras")
    for name, deviation in (("soft", 0.05), ("hard", 0.2)):
        model = add_lora(Pipeline.from_pretrained().transformer, 2)
        generator = torch.Generator().manual_seed(5)
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=deviation, generator=generator)
        save_lora(model, folder / name)
    return {name: folder / name for name in ("soft", "hard")}


@pytest.fixture(scope="module")
def shared(places: dict[str, Path]) -> PipelinePainter:
    return PipelinePainter.open(Options(), places, {"edges": EMBEDDED_CONTROL})


@pytest.fixture
def own(places: dict[str, Path]) -> PipelinePainter:
    """One to be mistreated."""
    return PipelinePainter.open(Options(), places, {})


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained(cache_dir=None)


def hooks(**given: Callable[..., Any]) -> Hooks:
    silent: dict[str, Any] = {
        "stage": lambda _: None, "step": lambda *_: None, "cancel": lambda: False,
    }  # fmt: skip
    return Hooks(**(silent | given))


def drawn(painter: PipelinePainter, order: Order, number: int = 0) -> Result:
    painter.check(order)
    painter.prepare((order,), lambda: False)
    return painter.draw(order, number, hooks())


def pixels(result: Result) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(result.content)))


def test_a_picture_is_that_of_the_pipeline(shared: PipelinePainter, pipe: Pipeline) -> None:
    wanted = pipe.draw(CIRCLE)
    found = drawn(shared, Order((SQUARE, CIRCLE)), 1)
    assert np.array_equal(pixels(found), np.asarray(wanted.image))
    assert found.request == wanted.request
    assert (found.width, found.height) == wanted.image.size
    assert found.text_tokens == pipe.caption_tokens(CIRCLE.prompt)[0] > 0


@pytest.fixture
def queue(shared: PipelinePainter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    monkeypatch.setattr(shared, "close", lambda: None)
    queue = Queue(shared)
    yield queue
    queue.close()


def test_a_file_has_the_same_bytes_alone_and_amid_others(
    queue: Queue, places: dict[str, Path]
) -> None:
    def ended(*orders: Order) -> list[Result]:
        jobs = [queue.submit(one, f"client {number}") for number, one in enumerate(orders)]
        eventually(lambda: all(queue.get(job.id, job.owner).has_ended for job in jobs))
        return [queue.get(job.id, job.owner).results[-1] for job in jobs]

    like = Order((CIRCLE,))
    [alone] = ended(like)
    others = (Order((SQUARE,) * 2), Order((CIRCLE,), loras=(("hard", 1.0),)))
    *_, among = ended(*others, like)
    assert among.content == alone.content


@pytest.mark.parametrize("loras", [(("soft", 1.0),), (("soft", 0.5), ("hard", -0.5))])
def test_a_picture_with_loras_is_that_of_a_pipeline_opened_with_them(
    shared: PipelinePainter, places: dict[str, Path], loras: tuple[tuple[str, float], ...]
) -> None:
    adapters = [(places[name], weight) for name, weight in loras]
    wanted = Pipeline.from_pretrained(lora=adapters, cache_dir=None).draw(CIRCLE)
    found = drawn(shared, Order((CIRCLE,), loras=loras))
    assert np.array_equal(pixels(found), np.asarray(wanted.image))
    assert not np.array_equal(pixels(found), pixels(drawn(shared, Order((CIRCLE,)))))


def test_few_sets_of_loras_stay_open(own: PipelinePainter, pipe: Pipeline) -> None:
    for weight in (0.1, 0.2, 0.3, 0.4):
        drawn(own, Order((CIRCLE,), loras=(("soft", weight),)))
    assert len(own._models._others) == models.KEPT
    plain = drawn(own, Order((CIRCLE,)))
    assert np.array_equal(pixels(plain), np.asarray(pipe.draw(CIRCLE).image))


def picture(side: int = 128) -> Image.Image:
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    return Image.fromarray(np.stack([np.tile(ramp, (side, 1))] * 3, -1))


def test_a_picture_under_control_is_that_of_a_pipeline_opened_with_it(
    shared: PipelinePainter,
) -> None:
    request = Request("a small red circle", steps=2, control_image=("control-1",))
    sent = {"control-1": picture()}
    wanted = Pipeline.from_pretrained(control=[EMBEDDED_CONTROL], cache_dir=None)
    found = drawn(shared, Order((request,), sent, controls=("edges",)))
    assert np.array_equal(pixels(found), np.asarray(wanted.draw(request, pictures=sent).image))


@pytest.mark.parametrize("loras", [(), (("hard", 0.5),)])
def test_the_command_line_draws_a_downloaded_picture_again(
    shared: PipelinePainter,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loras: tuple[tuple[str, float], ...],
) -> None:
    """With LoRAs, in the folder in which they lie: their names are in the file, no folders."""
    found = drawn(shared, Order((CIRCLE,), loras=loras))
    assert str(places["hard"].parent).encode() not in found.content
    (tmp_path / "downloaded.png").write_bytes(found.content)
    monkeypatch.chdir(places["hard"].parent)
    assert generate(["--from-image", f"{tmp_path}/downloaded.png", "--no-cache", "--quiet"]) == 0
    again = Image.open(tmp_path / "downloaded-again.png")
    assert np.array_equal(np.asarray(again), pixels(found))


@pytest.mark.parametrize("format", ["png", "jpg", "webp"])
def test_a_file_names_no_place_of_a_picture_that_was_sent(
    shared: PipelinePainter, tmp_path: Path, format: Any
) -> None:
    request = Request("a small red circle", steps=2, image="image", mask="mask")
    sent = {"image": picture(), "mask": picture().convert("L")}
    found = drawn(shared, Order((request,), sent, format=format))
    (tmp_path / f"file.{format}").write_bytes(found.content)
    metadata = read_picture(tmp_path / f"file.{format}").metadata
    assert metadata.asked == request
    assert metadata.request == found.request and metadata.request.image == "image"
    assert metadata.inputs.keys() == sent.keys()
    assert found.media_type == Image.open(io.BytesIO(found.content)).get_format_mimetype()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"requests": (Request("x", image="/etc/passwd"),)}, "pictures must come with the order"),
        ({"requests": (Request("x", image="image", mask="other"),)}, "got the name 'other'"),
        ({"loras": (("../hard", 1.0),)}, "loras must be of this service, which has soft, hard"),
        ({"loras": (("hard", float("nan")),)}, "weights from -16 to 16, got nan"),
        ({"loras": (("hard", 1.0),) * 9}, "loras must be 8 at most, got 9"),
        ({"controls": ("depth",)}, "controls must be of this service, which has edges"),
        ({"controls": ("edges",)}, "a control_image each, got none for edges"),
        ({"requests": (Request("x", size="100x100"),)}, "must be"),
        ({"requests": (Request("x", scheduler="none"),)}, "scheduler must be one of"),
        ({"requests": (Request("x" * 60_001),), "format": "jpg"}, "prompt must fit into"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_is(
    shared: PipelinePainter, changes: dict[str, Any], said: str
) -> None:
    order = Order(**({"requests": (CIRCLE,), "pictures": {"image": picture()}} | changes))
    with pytest.raises(ValueError, match=said):
        shared.check(order)


@pytest.fixture(scope="module")
def plan(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the embedded model, of few steps."""
    path = tmp_path_factory.mktemp("plans") / "mine.json"
    schedule = KVSchedule.parse("0-2:2")
    Plan(identity_of(pipe), 9, (0.0, 0.5), 2.0, "dpm-solver++", schedule).write(path)
    return path


@pytest.fixture(scope="module")
def planned(places: dict[str, Path], plan: Path) -> PipelinePainter:
    return PipelinePainter.open(Options(fast=str(plan)), places, {})


OPEN = Request("a small red circle", seed=3)


def test_orders_are_drawn_by_the_plan_of_the_service(planned: PipelinePainter, plan: Path) -> None:
    [checked] = planned.check(Order((OPEN,)))
    assert (checked.steps, checked.guidance_interval, checked.kv_schedule) == (9, (0, 0.5), "0-2:2")
    found = drawn(planned, Order((OPEN,)))
    wanted = Pipeline.from_pretrained(plan=plan, cache_dir=None).draw(OPEN)
    assert found.request == replace(checked, batched=True, tile=False) and not found.remarks
    assert np.array_equal(pixels(found), np.asarray(wanted.image))
    said = f"mine.json (plan {Plan.read(plan).digest()[:12]})"
    assert planned.fast == said and str(plan.parent).encode() not in found.content
    metadata = Metadata.from_text(Image.open(io.BytesIO(found.content)).info[KEY])
    assert metadata.asked_model["fast"] == said and metadata.model["fast"] is None


@pytest.mark.parametrize(
    ("asked", "how", "said"),
    [
        (OPEN, {"fast": False}, ""),
        (CIRCLE, {}, " (fast must be off with 8 steps or fewer, got 2: there is nothing left to leave out)"),
        (replace(OPEN, scheduler="euler"), {}, " (scheduler must be left out with this plan"),
        (OPEN, {"loras": (("hard", 0.5),)}, ", which was measured without LoRAs"),
    ],
)  # fmt: skip
def test_what_no_plan_goes_with_is_drawn_without_and_that_is_said(
    planned: PipelinePainter, shared: PipelinePainter, asked: Request, how: Any, said: str
) -> None:
    order, model = Order((asked,), **how), planned._models
    assert planned.check(order) == shared.check(order)
    pipe = model.checker(order.loras, ())
    found = model.settle_plan(pipe, order.loras, asked, order.fast)
    assert pipe.plan is None and len(found) == bool(said)
    assert not said or found[0].startswith(f"{models._WITHOUT}{said}")
    assert model.settle_plan(pipe, (), OPEN, True) == [] and pipe.plan is not None


def test_remarks_come_with_the_picture(planned: PipelinePainter) -> None:
    found = drawn(planned, Order((replace(CIRCLE, guidance=1.0, negative="blue"),)))
    without, idle = found.remarks
    assert without.startswith(models._WITHOUT) and "a negative prompt changes nothing" in idle


def test_a_plan_that_is_not_of_the_model_opens_no_service(plan: Path, places: Any) -> None:
    broken = plan.with_name("other.json")
    content = json.loads(plan.read_text())
    content["model"]["weights"]["transformer"] = "0" * 64
    broken.write_text(json.dumps(content))
    for fast, said in ((str(broken), "another model"), ("quick", "fast must be off, balanced")):
        with pytest.raises(ValueError, match=said):
            PipelinePainter.open(Options(fast=fast), {}, {})


def test_a_check_fills_in_what_the_model_takes(shared: PipelinePainter) -> None:
    request = Request("a circle", control_image=("one",), control_preprocessor=("canny",))
    [found] = shared.check(Order((request,), {"one": picture()}, controls=("edges",)))
    assert (found.width, found.height, found.steps) == (128, 128, 20)
    assert found.control_preprocessor == ("canny",) and found.prompt == "a circle"


def test_previews_come_every_so_many_steps_and_at_the_last(shared: PipelinePainter) -> None:
    found: list[Preview | None] = []
    stages: list[str] = []
    order = Order((Request("a small red circle", steps=5),), preview_every=2)
    given = hooks(step=lambda *told: found.append(told[-1]), stage=stages.append)
    shared.draw(order, 0, given)
    assert [one.step if one else None for one in found] == [None, 2, None, 4, 5]
    assert stages == ["load", "denoise", "decode", "write"]
    assert found[1] is not None
    image = Image.open(io.BytesIO(found[1].content))
    assert image.format == "JPEG" and image.size == (found[1].width, found[1].height) == (128, 128)


def test_a_picture_is_cancelled_within_a_step(shared: PipelinePainter) -> None:
    steps: list[int] = []
    order = Order((Request("a small red circle", steps=5),))
    stopping = hooks(step=lambda step, *_: steps.append(step), cancel=lambda: len(steps) == 2)
    with pytest.raises(Cancelled):
        shared.draw(order, 0, stopping)
    assert steps == [1, 2]


@pytest.fixture
def encoded(own: PipelinePainter, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is encoded from now on."""
    found: list[str] = []
    captions = own._models.plain.captions
    ensure_all = captions.ensure_all

    def noted(texts: Sequence[str], before: Callable[[], object]) -> Iterator[str]:
        for text in ensure_all(texts, before):
            found.append(text)
            yield text

    monkeypatch.setattr(captions, "ensure_all", noted)
    return found


def waiting(*prompts: str) -> tuple[Order, ...]:
    return tuple(Order((Request(prompt),)) for prompt in prompts)


def test_prompts_of_those_who_wait_are_encoded_with_the_first_ones(
    own: PipelinePainter, encoded: list[str]
) -> None:
    own.prepare(waiting("a", "b", "c"), lambda: False)
    assert encoded == ["a", "", "b", "c"]
    own.prepare(waiting("b", "d"), lambda: False)
    assert len(encoded) == 4  # the first one needs none: T5 stays where it is


def test_so_many_prompts_are_encoded_at_once_and_so_many_kept(
    own: PipelinePainter, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(painter, "AT_ONCE", 3)
    monkeypatch.setattr(painter, "MOST_HELD", 5)
    own.prepare(waiting("a", "b", "c"), lambda: False)
    assert encoded == ["a", "", "b"]
    for text in "cdefgh":
        own.prepare(waiting(text), lambda: False)
        assert len(own._models.plain.captions.held) <= 5


def test_encoding_stops_when_it_is_cancelled(own: PipelinePainter, encoded: list[str]) -> None:
    with pytest.raises(Cancelled):
        own.prepare(waiting("a", "b", "c"), lambda: len(encoded) == 2)
    assert len(encoded) == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_the_next_picture_is_drawn_when_memory_has_run_out(
    own: PipelinePainter, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    order = Order((CIRCLE,), loras=(("soft", 1.0),))
    before = drawn(own, order)
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "draw", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(MemoryError):
            own.draw(order, 0, hooks())
    assert not own._models._others
    assert drawn(own, order).content == before.content


def test_other_errors_pass_as_they_are(
    own: PipelinePainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = RuntimeError("something else")
    monkeypatch.setattr(Pipeline, "draw", lambda *_, **__: (_ for _ in ()).throw(fault))
    with pytest.raises(RuntimeError, match="something else"):
        own.draw(Order((CIRCLE,)), 0, hooks())


def test_what_others_take_of_memory_changes_no_picture(
    shared: PipelinePainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = drawn(shared, Order((CIRCLE,)))
    assert before.request.batched is True and before.request.tile is False
    for place in ("pixart.pipeline.drawing", "pixart.vae.autoencoder"):
        monkeypatch.setattr(f"{place}.free_memory", lambda _: 0)
    assert drawn(shared, Order((CIRCLE,))).content == before.content


def test_the_text_encoder_stays_where_it_has_room(
    own: PipelinePainter, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = own._models.plain.text_encoder
    own.prepare(waiting("a"), lambda: False)
    assert encoder.is_loaded
    monkeypatch.setattr(models, "free_memory", lambda _: 0)
    tight = PipelinePainter.open(Options(), {}, {})
    tight.prepare(waiting("a"), lambda: False)
    assert not tight._models.plain.text_encoder.is_loaded
    own.close()
    assert not encoder.is_loaded


def test_a_prompt_that_is_too_long_is_not_shown_to_whoever_serves(
    own: PipelinePainter, recwarn: pytest.WarningsRecorder
) -> None:
    own.prepare(waiting("a small red circle " * 100), lambda: False)
    assert not recwarn.list


def test_a_lora_for_another_model_is_refused_when_the_service_opens(
    places: dict[str, Path], tmp_path: Path
) -> None:
    from small_model import build

    save_lora(add_lora(build(), 2), tmp_path / "small")
    with pytest.raises(CheckpointError, match="small"):
        PipelinePainter.open(Options(), {"small": tmp_path / "small"}, {})


def test_a_distilled_lora_makes_its_orders_drawn_in_few_steps(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    of_two, of_one = FewStep("ddim", (999, 499)), FewStep("dmd", (400,))
    for name, few_step in (("two", of_two), ("one", of_one)):
        model = add_lora(Pipeline.from_pretrained().transformer, 2)
        save_lora(model, tmp_path / name, few_step=few_step)
    painter = PipelinePainter.open(Options(), {n: tmp_path / n for n in ("two", "one")}, {})
    circle = Request("a small red circle", seed=3)
    [asked] = painter.check(Order((circle,), loras=(("two", 0.5),)))
    [plain] = painter.check(Order((circle,), loras=(("two", 0.0),)))
    assert (asked.timesteps, asked.guidance) == ((999, 499), 1.0) and plain.timesteps is None
    found = drawn(painter, Order((circle,), loras=(("two", 0.5),)))
    assert found.request.timesteps == (999, 499)
    with pytest.raises(ValueError, match="they do not go together; leave one out"):
        painter.check(Order((circle,), loras=(("two", 1.0), ("one", 1.0))))
