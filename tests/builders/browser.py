"""Pages as a reader meets them: Debian's Chromium, headless, driven by selenium.

    from browser import Browser, browser   # in a test file; `browser` is a fixture

    browser.show(path_or_url, width=390, dark=True, scripts=False)
    browser.follow("a.next")               # a click that leads to another page, and that page is there
    browser.wait(lambda: browser.driver.title == "done")
    browser.screenshot("report-390-dark")  # the whole page, kept in tests/artefacts/
    assert browser.faults() == []          # what a reader with other eyes, or a keyboard, would miss

Nothing is downloaded: the driver's path is given, since Selenium Manager would fetch one, and names are not
looked up, so that a page which asks anybody but this machine shows an error in its console.
"""

import shutil
from base64 import b64decode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_faults import SCRIPT

if TYPE_CHECKING:
    from selenium.webdriver.chrome.webdriver import WebDriver

ARTEFACTS = Path(__file__).parent.parent / "artefacts"
MISSING = "chromium and chromedriver are not on the path; .ci/browser installs Debian's"
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # root has none, and CI is root
    "--disable-dev-shm-usage",  # containers have little
    "--disable-gpu",
    "--no-proxy-server",
    "--hide-scrollbars",  # in screenshots; a page that is too wide is measured, not seen
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
)


class Browser:
    """One window. driver: selenium's, for whatever is not here (`find_element`, keys, clicks)."""

    def __init__(self, driver: "WebDriver") -> None:
        self.driver = driver

    def show(
        self,
        page: Path | str,
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        still: bool = True,
        scripts: bool = True,
    ) -> None:
        """Open a file or an address. dark: the colour scheme that is asked for. still: whether reduced
        motion is. scripts: whether JavaScript of the page runs; `execute_script` does in either case."""
        self.look(width=width, height=height, dark=dark, still=still)
        self._tell("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.driver.get_log("browser")  # of the page before
        address = page.resolve().as_uri() if isinstance(page, Path) else page
        self._arrive(lambda: self.driver.get(address))

    def look(
        self, *, width: int = 1280, height: int = 900, dark: bool = False, still: bool = True
    ) -> None:
        """The same page in another window. Narrower than a desktop's windows can be."""
        self._tell(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        wanted = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self._tell("Emulation.setEmulatedMedia", features=features)

    def wait(self, until: Callable[[], object], *, seconds: float = 60) -> None:
        """Ask until the answer is true. A page that is being replaced answers with any error of the
        driver's, so that those are no answer."""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.support.wait import WebDriverWait

        waiting = WebDriverWait(
            self.driver, seconds, poll_frequency=0.05, ignored_exceptions=[WebDriverException]
        )
        waiting.until(lambda _: until())

    def follow(self, selector: str) -> None:
        """Click what leads to another page, and wait for that page."""
        self._arrive(self.driver.find_element("css selector", selector).click)

    def _arrive(self, leave: Callable[[], object]) -> None:
        """At another page: Chromium's driver does not always wait for it, neither after a click nor where
        the page before was still loading."""
        before = self.driver.find_element("css selector", ":root")
        leave()
        # The element of the page before is only compared by its name: asked, it answers with an error
        # that differs between versions of Chromium.
        self.wait(lambda: self.driver.find_element("css selector", ":root") != before)
        self.wait(lambda: self.evaluate("document.readyState") == "complete")

    def screenshot(self, name: str) -> Path:
        """The whole page as tests/artefacts/NAME.png, which git ignores."""
        size = self._tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self._tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        ARTEFACTS.mkdir(exist_ok=True)
        path = ARTEFACTS / f"{name}.png"
        path.write_bytes(b64decode(shot["data"]))
        return path

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression is on the page."""
        return self.driver.execute_script(f"return {expression}")

    def errors(self) -> list[str]:
        """What the console has said since it was asked last: errors and warnings."""
        return [f"{one['level']}: {one['message']}" for one in self.driver.get_log("browser")]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window: what would have to be scrolled sideways."""
        return int(self.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def faults(self) -> list[str]:
        """What is wrong with the page for readers with other eyes or without a mouse, a line each; see
        page_faults."""
        return list(self.driver.execute_script(SCRIPT))

    def _tell(self, command: str, **values: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, values)


def start() -> Browser:
    """A browser of its own, to be left by `driver.quit()`. Skips the test where there is none."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip(MISSING)
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=chromedriver)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)
    return Browser(driver)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for a file of tests: each shows its own page."""
    one = start()
    yield one
    one.driver.quit()
