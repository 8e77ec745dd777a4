"""Somebody in front of the service's page, in a real Chromium.

visitor = Visitor(browser, running.url)   # the page is open, and its fields are there
visitor.write("prompt", "a red circle")
visitor.draw()
assert visitor.state() == "done"
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from browser import Browser

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
# The file is put where a hand would let go of it.
_DROP = """
const [name, type, base64] = arguments;
const bytes = Uint8Array.from(atob(base64), one => one.charCodeAt(0));
const carried = new DataTransfer();
carried.items.add(new File([bytes], name, {type}));
const target = document.querySelector('#pictures');
for (const kind of ['dragover', 'drop'])
  target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: carried}));
"""


class Visitor:
    def __init__(self, browser: Browser, url: str, **look: Any) -> None:
        self.browser, self.url = browser, url
        self.open(**look)

    def open(self, **look: Any) -> None:
        self.browser.show(self.url, **look)
        self.wait(lambda: self.browser.evaluate("!!document.querySelector('#size-note p')"))

    def find(self, what: str) -> "WebElement":
        return self.browser.driver.find_element("css selector", what)

    def text(self, what: str) -> str:
        return str(self.browser.evaluate(f"document.querySelector({what!r})?.textContent || ''"))

    def wait(self, until: Callable[[], object]) -> None:
        self.browser.wait(until)

    def field(self, name: str) -> "WebElement":
        return self.find(f"#{name} textarea, #{name} input")

    def value(self, name: str) -> str:
        return str(self.field(name).get_property("value"))

    def write(self, name: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.field(name)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE)
        field.send_keys(text)

    def click(self, what: str) -> None:
        self.find(what).click()

    def state(self) -> str:
        return str(self.browser.evaluate("document.querySelector('.now')?.dataset.state || ''"))

    def job(self) -> str:
        return str(self.browser.evaluate("document.querySelector('.now')?.dataset.job || ''"))

    def told(self) -> str:
        return self.text("#told p")

    def draw(self) -> None:
        """Until it has ended, and the button is there for the next one."""
        before = self.job()
        self.click("#draw")
        ended = ("done", "failed", "cancelled")
        self.wait(lambda: self.job() != before and self.state() in ended)
        self.wait(lambda: self.find("#draw").is_enabled())

    def pictures(self) -> int:
        return int(self.browser.evaluate("document.querySelectorAll('ul.gallery li').length"))

    def download(self, folder: Path) -> Path:
        """The file of the picture that is shown, as the browser saves it."""
        self.browser.driver.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
        )
        before = {*folder.iterdir()}
        self.click("#now a.download")

        def saved() -> list[Path]:
            return [one for one in folder.iterdir() if one not in before and one.suffix in _KINDS]

        self.wait(saved)
        return saved()[0]

    def drop(self, path: Path) -> None:
        from base64 import b64encode

        kind = _KINDS[path.suffix]
        content = b64encode(path.read_bytes()).decode("ascii")
        self.browser.driver.execute_script(_DROP, path.name, kind, content)

    def open_all(self) -> None:
        """Every group of fields that is folded."""
        for one in self.browser.driver.find_elements("css selector", ".gr-accordion > button"):
            one.click()
        self.wait(lambda: self.find("#format input").is_displayed())
