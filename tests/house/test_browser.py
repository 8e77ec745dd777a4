"""What tests look at pages with: `.ci/browser` with stand-ins for apt-get, and the faults that are found."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from browser import Browser, browser

__all__ = ["browser"]

SCRIPT = Path(__file__).parent.parent.parent / ".ci" / "browser"
SOUND = """<!doctype html><html lang="en"><meta name="viewport" content="width=device-width">
<title>Page</title><main><h1>Page</h1><h2>Part</h2><p>Words. <a href="#more">More</a></p>
<table><caption>Numbers</caption><tr><th scope="col">n</th></tr><tr><td>1</td></tr></table>
<p id="more"><label>Name <input></label></p></main>"""
FAULTS = {
    "no language": ('lang="en"', ""),
    "cannot be zoomed": ("width=device-width", "user-scalable=no"),
    "0 of <main>": ("main>", "div>"),
    "h4 after h1": ("h2", "h4"),
    "table without caption": ("<caption>Numbers</caption>", ""),
    "header without scope": (' scope="col"', ""),
    "has no label": ("label>", "span>"),
    "leads to #more": ('id="more"', ""),
    "picture without alt": ("Words.", '<img src="data:,">'),
    "drawing without role": ("Words.", "<svg></svg>"),
    "contrast 2.85": ("<p>", '<p style="color: #999">'),
    "scrolls, but not with": ("<p>", '<pre style="overflow: auto; width: 9px">long</pre><p>'),
    "jumps the order": ("<input>", '<input tabindex="3">'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_page_without_faults_has_none_and_each_fault_is_found(
    fault: str, tmp_path: Path, browser: Browser
) -> None:
    page = tmp_path / "page.html"
    page.write_text(SOUND)
    browser.show(page)
    assert browser.faults() == []
    page.write_text(SOUND.replace(*FAULTS[fault]))
    browser.show(page)
    assert [one for one in browser.faults() if one.startswith(fault)]


def test_a_page_that_asks_another_machine_or_is_too_wide_is_noticed(
    tmp_path: Path, browser: Browser
) -> None:
    page = tmp_path / "page.html"
    page.write_text(SOUND.replace("Words.", '<img alt="" src="https://example.com/one.png">'))
    browser.show(page, width=390)
    assert "example.com" in "".join(browser.errors()) and browser.overflow() == 0
    page.write_text(SOUND.replace("<p>", '<p style="width: 500px">'))
    browser.show(page, width=390)
    assert browser.overflow() > 0 and browser.errors() == []


def test_scripts_of_a_page_run_only_where_they_may(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"{SOUND}<script>document.title = 'ran'</script>")
    for scripts in (True, False):
        browser.show(page, scripts=scripts, dark=scripts)
        assert (browser.driver.title == "ran") == scripts
        assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == scripts


def _install(folder: Path, apt: str, root: bool = True, **more: str) -> subprocess.CompletedProcess:
    """The script where nothing is installed but what it calls and an apt-get."""
    for name in (
        "bash",
        "sh",
        "mktemp",
        "rm",
        "tail",
        "timeout",
        "sleep",
        "touch",
        "chmod",
        "mkdir",
    ):
        (folder / name).symlink_to(str(shutil.which(name)))
    (folder / "id").write_text(f"#!/bin/sh\necho {0 if root else 1000}\n")
    if apt:
        (folder / "apt-get").write_text(f"#!/bin/sh\n{apt}\n")
    for program in ("id", "apt-get"):
        if (folder / program).exists():
            (folder / program).chmod(0o755)
    return subprocess.run(
        [SCRIPT],
        env={"PATH": str(folder), "HERE": str(folder), "TMPDIR": str(folder)} | more,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(os.name == "nt", reason="bash")
def test_the_browser_is_installed_once_and_in_silence(tmp_path: Path) -> None:
    apt = (
        'echo noise; echo "$@" >> "$HERE/calls"\n'
        'case "$*" in *install*) touch "$HERE/chromium" "$HERE/chromedriver"\n'
        'chmod 755 "$HERE/chromium" "$HERE/chromedriver";; esac'
    )
    done = _install(tmp_path, apt)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Installing Chromium ...\n", "")
    calls = (tmp_path / "calls").read_text()
    assert "chromium chromium-driver" in calls
    again = subprocess.run([SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")


@pytest.mark.skipif(os.name == "nt", reason="bash")
@pytest.mark.parametrize(
    ("apt", "root", "reason"),
    [
        ("", True, "apt-get is not here"),
        ("true", False, "only root installs it"),
        ("echo 'E: no network'; exit 100", True, "apt-get failed (E: no network)"),
        ("sleep 30", True, "apt-get took more than 1 seconds"),
    ],
)
def test_where_it_cannot_be_installed_a_word_is_said_and_all_goes_on(
    apt: str, root: bool, reason: str, tmp_path: Path
) -> None:
    done = _install(tmp_path, apt, root, BROWSER_SECONDS="1")
    assert done.returncode == 0
    assert reason in done.stdout and "will be skipped" in done.stdout
