"""The page in a real Chromium, before a real server: what people do, and what it looks like."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser, start
from page_visitor import Visitor
from PIL import Image
from serving import Running, order, running_service

from pixart.config import EMBEDDED_CONTROL
from pixart.serving.guarding.clients import Clients
from pixart.serving.service import Offer

__all__ = ["browser"]
pytestmark = pytest.mark.slow
PROMPT = "a large red circle on the left and a small blue star on the right on white"
LOOKS = [
    (1280, 900, False),
    (390, 844, True),
    *(
        pytest.param(*look, marks=pytest.mark.exhaustive)
        for look in ((1280, 900, True), (390, 844, False))
    ),
]
SHOWN = "document.querySelector('#now img.picture').naturalWidth"
TOKENS = {"ann": "ann's token is long", "bob": "bob's token is long too"}


@pytest.fixture(scope="module")
def embedded() -> Iterator[Running]:
    """With the embedded model, which draws in a second or two."""
    pytest.importorskip("gradio")
    from pixart.serving.drawing.painter import PipelinePainter
    from pixart.serving.options import Options

    painter = PipelinePainter.open(Options(), {}, {"edges": EMBEDDED_CONTROL})
    offer = Offer("shapes", painter.native, painter.multiple, controls=("edges",))
    with running_service(painter, offer=offer, ui=True) as running:
        yield running


@pytest.fixture(scope="module")
def flat() -> Iterator[Running]:
    """With flat colours, and everything offered."""
    pytest.importorskip("gradio")
    offer = Offer("shapes", 128, 16, ("sketch", "ink"), ("edges",))
    with running_service(offer=offer, ui=True) as running:
        yield running


@pytest.fixture
def visitor(flat: Running, browser: Browser) -> Iterator[Visitor]:
    """A new browser, as far as the server knows."""
    browser.show(f"{flat.url}/healthz")  # a page that is left while it opens tells of errors
    browser.driver.delete_all_cookies()
    yield Visitor(browser, flat.url)
    flat.painter.release()


def test_a_picture_is_drawn_saved_dropped_in_and_drawn_again(
    embedded: Running, browser: Browser, tmp_path: Path
) -> None:
    visitor = Visitor(browser, embedded.url)
    visitor.write("prompt", PROMPT)
    visitor.write("steps", "6")
    visitor.click("#die")
    seed = visitor.value("seed")
    assert seed.isdecimal()
    visitor.draw()
    assert visitor.state() == "done", visitor.text("#now")
    first = visitor.download(tmp_path)
    image = Image.open(first)
    assert image.size == (128, 128) and PROMPT in image.info["parameters"]

    visitor.open()  # a reload shows it again, and has empty fields
    assert visitor.pictures() == 1 and visitor.value("prompt") == ""
    visitor.drop(first)
    visitor.wait(lambda: visitor.value("prompt") == PROMPT)
    assert visitor.value("seed") == seed and visitor.value("steps") == "6"
    assert visitor.told() == "Settings taken from the picture."
    visitor.draw()
    again = visitor.download(tmp_path)
    assert again != first and again.read_bytes() == first.read_bytes()
    assert browser.errors() == []


def test_progress_and_preview_are_shown_while_it_is_drawn(flat: Running, visitor: Visitor) -> None:
    flat.painter.hold()
    visitor.write("prompt", "a red circle")
    visitor.write("count", "2")
    visitor.click("#draw")
    flat.painter.let_step(2)
    visitor.wait(lambda: "Drawing: picture 1 of 2, step 2 of 4" in visitor.text("#now"))
    bar = visitor.find("#now progress")
    assert bar.get_attribute("value") == "0.25"
    loaded = "document.querySelector('#now img.preview')?.naturalWidth"
    visitor.wait(lambda: visitor.browser.evaluate(loaded) == 128)
    assert not visitor.find("#draw").is_enabled()
    flat.painter.release()
    visitor.wait(lambda: visitor.state() == "done")
    assert visitor.pictures() == 2
    assert visitor.browser.errors() == []


def test_cancel_stops_this_job_within_a_step(flat: Running, visitor: Visitor) -> None:
    other = flat.service.queue.submit
    flat.painter.hold()
    visitor.write("prompt", "a red circle")
    visitor.click("#draw")
    visitor.wait(lambda: visitor.state() == "drawing")
    waiting = other(order("of somebody else"), "else")
    flat.painter.let_step()
    visitor.wait(lambda: "step 1 of 4" in visitor.text("#now"))
    visitor.click("#cancel")
    visitor.wait(lambda: visitor.state() == "cancelled")
    visitor.wait(lambda: visitor.find("#draw").is_enabled())
    assert flat.service.queue.get(waiting.id, "else").state in ("waiting", "drawing")
    flat.painter.release()
    visitor.wait(lambda: flat.service.queue.get(waiting.id, "else").state == "done")
    visitor.draw()
    assert visitor.state() == "done" and visitor.pictures() == 1


def test_a_page_that_is_opened_again_follows_what_is_drawn(flat: Running, visitor: Visitor) -> None:
    flat.painter.hold()
    visitor.write("prompt", "a red circle")
    visitor.click("#draw")
    visitor.wait(lambda: visitor.state() == "drawing")
    job = visitor.job()
    visitor.open()
    visitor.wait(lambda: visitor.state() == "drawing")
    assert visitor.job() == job
    flat.painter.release()
    visitor.wait(lambda: visitor.state() == "done")
    assert visitor.pictures() == 1


def test_two_browsers_with_two_tokens_see_their_own_alone(browser: Browser) -> None:
    pytest.importorskip("gradio")
    second = start()
    try:
        with running_service(clients=Clients(TOKENS), ui=True) as running:
            visitors = []
            for one, (name, token) in zip((browser, second), TOKENS.items(), strict=True):
                one.show(running.url)
                assert one.driver.current_url.endswith("/login")
                one.driver.find_element("css selector", "input").send_keys(token)
                one.follow("button")
                visitors.append(Visitor(one, running.url))
                visitors[-1].write("prompt", f"a picture of {name}")
                visitors[-1].draw()
            ann, bob = visitors
            for mine, other in ((ann, bob), (bob, ann)):
                mine.open()
                assert mine.pictures() == 1
                address = other.find("#now a.download").get_attribute("href")
                got = "return fetch(arguments[0]).then(answer => answer.status)"
                assert mine.browser.driver.execute_script(got, address) == 404
            assert "ann" in ann.text("#gallery") and "bob" not in ann.text("#gallery")
            assert "bob" in bob.text("#gallery") and "ann" not in bob.text("#gallery")
            assert ann.find(".head a").text == "Log out"
    finally:
        second.driver.quit()


def test_what_cannot_be_drawn_is_told_beside_the_button(visitor: Visitor) -> None:
    visitor.write("prompt", "a red circle")
    visitor.write("steps", "many")
    visitor.click("#draw")
    visitor.wait(lambda: "steps must be a whole number, got 'many'" in visitor.told())
    visitor.write("steps", "100000")
    visitor.click("#draw")
    visitor.wait(lambda: "steps must be" in visitor.told() and "100,000" in visitor.told())
    visitor.write("steps", "")
    visitor.draw()
    assert visitor.told() == "" and visitor.state() == "done"


def test_keys_draw(visitor: Visitor) -> None:
    from selenium.webdriver.common.keys import Keys

    visitor.field("prompt").send_keys("a red circle", Keys.CONTROL, Keys.ENTER)
    visitor.wait(lambda: visitor.state() == "done")
    assert "a red circle" in visitor.text("#gallery")


def test_a_picture_with_a_painted_mask_is_sent(
    flat: Running, visitor: Visitor, tmp_path: Path
) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    seen = []
    submit = flat.service.queue.submit
    flat.service.queue.submit = lambda order, owner: (seen.append(order), submit(order, owner))[1]  # type: ignore[method-assign]
    try:
        Image.new("RGB", (200, 120), (200, 220, 250)).save(tmp_path / "sent.png")
        visitor.open_all()
        visitor.find("#begin-file").send_keys(str(tmp_path / "sent.png"))
        visitor.wait(lambda: "200 × 120 pixels" in visitor.text("#begin .note"))
        visitor.click("#begin .paint")
        canvas = visitor.find("#begin canvas")
        hand = ActionChains(visitor.browser.driver).move_to_element_with_offset(canvas, -30, 0)
        hand.click_and_hold().move_by_offset(60, 0).release().perform()
        visitor.write("strength", "0.5")
        visitor.write("prompt", "a red circle")
        visitor.draw()
    finally:
        del flat.service.queue.submit
    [order] = seen
    request = order.requests[0]
    assert (request.image, request.mask, request.strength) == ("image", "mask", 0.5)
    assert order.pictures["image"].size == order.pictures["mask"].size == (200, 120)
    mask = order.pictures["mask"].convert("L")
    assert mask.getpixel((100, 60)) == 255 and mask.getpixel((100, 5)) == 0
    assert 0.02 < sum(mask.tobytes()) / 255 / (200 * 120) < 0.3


def test_a_picture_of_the_gallery_gives_settings_command_and_a_beginning(
    visitor: Visitor,
) -> None:
    visitor.write("prompt", "it's a red circle")
    visitor.write("seed", "77")
    visitor.draw()
    visitor.open()
    visitor.click("ul.gallery .again")
    visitor.wait(lambda: visitor.value("prompt") == "it's a red circle")
    assert visitor.value("seed") == "77"
    visitor.click("ul.gallery .begin")
    visitor.wait(lambda: "128 × 128 pixels" in visitor.text("#begin .note"))
    command = str(visitor.find("ul.gallery .copy").get_attribute("data-command"))
    assert command.startswith("python -m pixart.generate --seed=77 ")
    visitor.click("ul.gallery .copy")
    visitor.wait(lambda: visitor.told() == "The command line is copied.")
    visitor.write("negative", "")
    from selenium.webdriver.common.keys import Keys

    visitor.field("negative").send_keys(Keys.CONTROL, "v")
    assert visitor.value("negative") == command


@pytest.mark.parametrize(("width", "height", "dark"), LOOKS)
def test_the_page_is_for_every_reader(
    embedded: Running, browser: Browser, width: int, height: int, dark: bool
) -> None:
    name = f"page-{{}}-{width}-{'dark' if dark else 'light'}"
    browser.show(f"{embedded.url}/healthz")
    browser.driver.delete_all_cookies()
    visitor = Visitor(browser, embedded.url, width=width, height=height, dark=dark)
    for place in ("empty", "drawn", "open"):
        if place == "drawn":
            visitor.write("prompt", PROMPT)
            visitor.write("seed", "4")
            visitor.draw()
            visitor.wait(lambda: browser.evaluate(SHOWN) == 128)
        if place == "open":
            visitor.open_all()
        assert browser.faults() == [] and browser.overflow() <= 0
        browser.screenshot(name.format(place))
    picture, prompt = (visitor.find(what).rect for what in ("#now img", "#prompt"))
    if width < 600:
        assert picture["y"] + picture["height"] <= prompt["y"] and picture["width"] > 0.9 * width
        assert all(visitor.find(one).rect["height"] >= 44 for one in ("#draw", "#die"))
    else:
        assert picture["x"] > prompt["x"] + prompt["width"] and picture["y"] < prompt["y"] + 60
    assert browser.errors() == []


def test_nothing_is_asked_of_anybody_else(flat: Running, browser: Browser) -> None:
    visitor = Visitor(browser, flat.url)
    visitor.open_all()
    asked = browser.evaluate("performance.getEntriesByType('resource').map(one => one.name)")
    assert len(asked) > 10
    assert [one for one in asked if not one.startswith((flat.url, "data:", "blob:"))] == []
    links = browser.evaluate("[...document.links].map(one => one.href)")
    assert [one for one in links if not one.startswith(flat.url)] == []
    assert browser.errors() == []


def test_a_file_that_is_no_picture_is_told(visitor: Visitor, tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    visitor.drop(tmp_path / "no.png")
    visitor.wait(lambda: "the file" in visitor.told())
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    (tmp_path / "plain.png").write_bytes(out.getvalue())
    visitor.drop(tmp_path / "plain.png")
    visitor.wait(lambda: "carries no settings" in visitor.told())
    assert visitor.value("prompt") == ""
