"""The report and the comparison as readers meet them: in a window of 1280 and of 390 pixels, light and dark,
without JavaScript, with a keyboard."""

from pathlib import Path

import evaluated
import pytest
from browser import Browser, browser

from pixart.evaluation.comparing.compare import compare_folders
from pixart.evaluation.protocols.protocol import load_protocol
from pixart.evaluation.protocols.published import with_paper
from pixart.evaluation.report import write_report

__all__ = ["browser"]
pytestmark = pytest.mark.slow
PAGES = ("report", "several", "compare", "strange")
STRANGE = {"00003": evaluated.HOSTILE, "00005": evaluated.ARABIC}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("pages")
    errors = [{"key": "00009/0000", "error": "cannot be read (truncated)"}]
    a = evaluated.build(place / "shapes-20", prompts=STRANGE, errors=errors)
    evaluated.write(a, with_paper(load_protocol("shapes"), evaluated.results_of(a)))
    sampling = {"sampling": {"scheduler": "dpm-solver++", "steps": 3}}
    b = evaluated.build(
        place / "shapes-3", prompts=STRANGE, seed=1, better=-0.02, protocol=sampling
    )
    compare_folders(a, b, place / "compare")
    return {
        "report": write_report([a]),
        "several": write_report([a, b]),
        "compare": place / "compare" / "compare.html",
        "strange": write_report([evaluated.hostile(place / "<b>x")]),
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_readable_without_scripts_in_every_window(
    page: str, width: int, dark: bool, pages: dict[str, Path], browser: Browser
) -> None:
    browser.show(pages[page], width=width, dark=dark, scripts=False)
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.overflow() <= 0
    assert browser.faults() == []
    assert browser.errors() == []
    assert browser.driver.title != "broken"
    browser.look(width=width, dark=dark)
    browser.screenshot(f"{page}-{width}-{'dark' if dark else 'light'}")


@pytest.mark.parametrize("page", PAGES)
def test_a_keyboard_leads_through_the_page_and_its_focus_is_seen(
    page: str, pages: dict[str, Path], browser: Browser
) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.show(pages[page], scripts=False)
    active = "document.activeElement"
    browser.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.evaluate(f"{active}.textContent") == "To the contents"
    assert browser.evaluate(f"{active}.getBoundingClientRect().left >= 0")
    seen = set()
    for _ in range(12):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(browser.evaluate(f"{active}.tagName"))
        assert browser.evaluate(f"getComputedStyle({active}).outlineStyle") == "solid"
        assert browser.evaluate(f"parseFloat(getComputedStyle({active}).outlineWidth) >= 2")
    assert "A" in seen
    closed = "document.querySelector('details:not([open])')"
    browser.driver.execute_script(f"window.one = {closed}; one.querySelector('summary').focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.evaluate("window.one.open") is True


def test_nothing_moves_for_who_wants_it_still(pages: dict[str, Path], browser: Browser) -> None:
    smooth = "getComputedStyle(document.documentElement).scrollBehavior"
    for still, behaviour in ((True, "auto"), (False, "smooth")):
        browser.show(pages["report"], still=still)
        assert browser.evaluate(smooth) == behaviour


def test_letters_twice_as_large_need_no_scrolling_sideways(
    pages: dict[str, Path], browser: Browser
) -> None:
    """WCAG 1.4.10: at 320 px, which is 1280 px at 400 %."""
    for page in PAGES:
        browser.show(pages[page], width=320, scripts=False)
        assert browser.overflow() <= 0, page


def test_a_narrow_table_still_is_one_to_a_screen_reader(
    pages: dict[str, Path], browser: Browser
) -> None:
    browser.show(pages["report"], width=390)
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = [node["role"]["value"] for node in nodes if not node.get("ignored")]
    for role in ("table", "rowheader", "columnheader", "main", "navigation", "banner"):
        assert role in roles, role
    assert sum(role in ("cell", "gridcell") for role in roles) > 20


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_plot_by_itself_is_readable(dark: bool, pages: dict[str, Path], browser: Browser) -> None:
    plot = pages["report"].parent / "plots" / "shapes-by-category.svg"
    browser.show(plot, dark=dark)
    colours = browser.evaluate(
        "[getComputedStyle(document.querySelector('text')).fill, "
        "getComputedStyle(document.querySelector('.ground')).fill]"
    )
    light = [
        sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) for colour in colours
    ]
    assert (light[0] > 600 > 150 > light[1]) if dark else (light[0] < 150 < 600 < light[1])
    assert browser.errors() == []
