"""The pages of a study in a real Chromium: keys, no JavaScript, coming back, and what they look like."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import Browser, browser
from preference_study import build_study
from voting import served

from pixart.evaluation.preference.adding import add
from pixart.evaluation.preference.options import Add, Page
from pixart.evaluation.preference.page import write_page
from pixart.evaluation.preference.server import Server
from pixart.evaluation.preference.study import STUDY, Key, Study, read_study
from pixart.evaluation.preference.votes import Vote, read_votes

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

__all__ = ["browser"]
pytestmark = pytest.mark.slow
SHOWN = "[...document.images].every(i => i.naturalWidth && getComputedStyle(i).visibility === 'visible')"
LOOKS = [(1280, 900, False), (1280, 900, True), (390, 844, False), (390, 844, True)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Key]:
    return build_study(tmp_path_factory.mktemp("built"), 4, ("ours", "theirs"))


@pytest.fixture
def server(built: tuple[Study, Key], browser: Browser) -> Iterator[Server]:
    (built[0].folder / "votes.jsonl").unlink(missing_ok=True)
    with served(*built) as server:
        browser.show(server.address)
        browser.driver.delete_all_cookies()
        yield server


def find(browser: Browser, what: str) -> "WebElement":
    return browser.driver.find_element("css selector", what)


def where(browser: Browser) -> str:
    return str(browser.evaluate("document.getElementById('where')?.textContent"))


def ready(browser: Browser, number: int) -> None:
    """The pair of that number is shown, with its pictures."""
    at = f"Pair {number} of"
    shown = "document.documentElement.classList.contains('ready')"
    browser.wait(lambda: where(browser).startswith(at) and browser.evaluate(shown))


def press(browser: Browser, keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser.driver).send_keys(keys).perform()


def votes(server: Server) -> list[Vote]:
    return list(read_votes(server.booth.study)[0].values())


def test_keys_vote_and_undo(server: Server, browser: Browser) -> None:
    browser.show(server.address)
    browser.follow("a.button")
    ready(browser, 1)
    press(browser, "1")
    assert "Quality: First" in str(browser.evaluate("document.getElementById('said').textContent"))
    assert votes(server) == []
    press(browser, "3")
    ready(browser, 2)
    press(browser, "2")
    press(browser, "2")
    ready(browser, 3)
    kept = votes(server)
    assert [(v.quality, v.alignment) for v in kept] == [("left", "tie"), ("right", "right")]
    assert {v.agent for v in kept} == {"server desk keys"}
    browser.wait(
        lambda: "Pair 3" in str(browser.evaluate("document.getElementById('said').textContent")),
    )
    press(browser, "u")
    browser.wait(lambda: len(votes(server)) == 1)
    ready(browser, 2)
    assert kept[1].pair in browser.driver.current_url
    # Whoever needs the keys for something else turns them off, and they stay so.
    find(browser, "#keys").click()
    browser.show(f"{server.address}vote")
    ready(browser, 2)
    press(browser, "1")
    assert browser.evaluate("document.querySelector(':checked:not(#keys)')") is None
    browser.evaluate("localStorage.clear()")
    assert browser.errors() == []


def test_mouse_and_zoom(server: Server, browser: Browser) -> None:
    browser.show(server.address)
    browser.follow("a.button")
    ready(browser, 1)
    width = browser.evaluate("document.getElementById('left').clientWidth")
    find(browser, "#left").click()
    assert browser.evaluate("document.getElementById('left').clientWidth") > 2 * width
    browser.evaluate("document.querySelectorAll('figure a')[0].scrollTo(10, 20)")
    same = "document.querySelectorAll('figure a')[1].scrollTop === 20"
    browser.wait(lambda: browser.evaluate(same))
    press(browser, "z")
    assert browser.evaluate("document.getElementById('left').clientWidth") == width
    for question in ("quality", "alignment"):
        find(browser, f"input[name={question}][value=right]").click()
    assert votes(server) == []
    find(browser, "#ballot button[type=submit]").click()
    ready(browser, 2)
    assert [vote.agent for vote in votes(server)] == ["server desk form"]


def test_all_of_it_works_without_scripts(server: Server, browser: Browser) -> None:
    browser.show(server.address, scripts=False)
    browser.follow("a.button")
    total = len(server.booth.study.pairs)
    for number in range(1, total + 1):
        browser.wait(lambda at=f"Pair {number} of {total}": at in browser.driver.page_source)
        browser.wait(lambda: browser.evaluate(SHOWN))
        assert not find(browser, "#zoom").is_displayed()
        find(browser, "input[name=quality][value=tie]").click()
        find(browser, "input[name=alignment][value=left]").click()
        browser.follow("#ballot button[type=submit]")
    browser.wait(lambda: "All done" in browser.driver.page_source)
    assert len(votes(server)) == total
    browser.follow("#undo button")
    browser.wait(lambda: f"Pair {total} of" in browser.driver.page_source)
    assert len(votes(server)) == total - 1


def test_a_voter_comes_back_after_a_restart(built: tuple[Study, Key], browser: Browser) -> None:
    (built[0].folder / "votes.jsonl").unlink(missing_ok=True)
    with served(*built) as server:
        browser.show(server.address)
        browser.driver.delete_all_cookies()
        browser.show(server.address)
        browser.follow("a.button")
        ready(browser, 1)
        press(browser, "11")
        ready(browser, 2)
    # Cookies know no ports: the address is the same to the browser.
    with served(*built) as server:
        browser.show(server.address)
        assert f"You: 1 of {len(built[0].pairs)}" in browser.driver.page_source
        assert "Go on" in browser.driver.page_source
        browser.follow("a.button")
        ready(browser, 2)


@pytest.mark.parametrize(("width", "height", "dark"), LOOKS)
def test_the_pages_are_for_every_reader(
    server: Server, browser: Browser, width: int, height: int, dark: bool
) -> None:
    name = f"preference-{{}}-{width}-{'dark' if dark else 'light'}"
    for place, path in (
        ("welcome", ""),
        ("vote", "vote"),
        ("progress", "progress"),
        ("error", "no"),
    ):
        browser.show(f"{server.address}{path}", width=width, height=height, dark=dark)
        if place == "vote":
            ready(browser, 1)
        assert browser.faults() == [] and browser.overflow() <= 0
        browser.screenshot(name.format(place))
        if place == "vote":
            left, right = (find(browser, f"#{side}").rect for side in ("left", "right"))
            if width < 600:
                assert right["y"] > left["y"] + left["height"] and left["width"] > 0.9 * width
            else:
                # Side by side, as large as fit, and the questions in sight.
                assert left["y"] == right["y"] and left["height"] > 0.6 * height
                button = find(browser, "#ballot button[type=submit]").rect
                assert button["y"] + button["height"] <= height
    assert all("404" in line for line in browser.errors())


@pytest.mark.parametrize("beside", [False, True])
def test_the_page_without_a_server_keeps_votes_and_gives_them(
    built: tuple[Study, Key], browser: Browser, tmp_path: Path, beside: bool
) -> None:
    study, _ = built
    (study.folder / "votes.jsonl").unlink(missing_ok=True)
    output = tmp_path / ("folder" if beside else "page.html")
    write_page(Page(study.folder, output, beside))
    page = output / "index.html" if beside else output
    text = page.read_text()
    assert "theirs" not in text and "check" not in text.replace("checked", "").replace(
        "checkbox", ""
    )
    browser.show(page)
    browser.evaluate("localStorage.clear()")
    browser.show(page, width=1280)
    ready(browser, 1)
    press(browser, "12")
    ready(browser, 2)
    press(browser, "33")
    ready(browser, 3)
    press(browser, "u")
    ready(browser, 2)
    press(browser, "31")
    browser.show(page)
    ready(browser, 3)
    assert browser.faults() == [] and browser.errors() == []
    browser.screenshot(f"preference-page-{'beside' if beside else 'inlined'}-1280-light")
    browser.show(page, width=390, dark=True)
    assert browser.faults() == [] and browser.overflow() <= 0
    browser.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    find(browser, "#save").click()
    saved = tmp_path / "votes.json"
    browser.wait(saved.is_file)
    assert len(json.loads(saved.read_text())["votes"]) == 2
    assert add(Add(study.folder, (saved,))).startswith("2 votes added")
    assert add(Add(study.folder, (saved,))).startswith("0 votes added")
    kept = read_votes(study)[0].values()
    assert [(v.quality, v.alignment) for v in kept] == [("left", "right"), ("tie", "left")]
    assert all(v.agent.startswith("page ") and v.voter.startswith("p") for v in kept)
    for number in range(3, len(study.pairs) + 1):
        ready(browser, number)
        press(browser, "11")
    browser.wait(lambda: not find(browser, "#done").get_attribute("hidden"))
    assert find(browser, "#done h1").is_displayed()
    browser.show(page, scripts=False)
    assert find(browser, "noscript h1").is_displayed() and not find(browser, "#save").is_displayed()


def test_a_long_prompt_leaves_the_questions_in_sight(browser: Browser, tmp_path: Path) -> None:
    study, key = build_study(tmp_path, 1, ("ours", "theirs"), checks=0)
    values = json.loads((study.folder / STUDY).read_text())
    values["pairs"][0]["prompt"] = "a very detailed picture of many things " * 30
    (study.folder / STUDY).write_text(json.dumps(values))
    with served(read_study(study.folder), key) as server:
        browser.show(server.address)
        browser.driver.delete_all_cookies()
        browser.show(server.address)
        browser.follow("a.button")
        ready(browser, 1)
        button = find(browser, "#ballot button[type=submit]").rect
        assert button["y"] + button["height"] <= 900
        assert browser.faults() == [] and browser.overflow() <= 0
        browser.screenshot("preference-vote-long-prompt-1280-light")
