"""pixart.progress: a bar where somebody watches, a line now and then elsewhere, and never a failure."""

import io
import sys

import pytest

from pixart import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.Bar("draw", 12, done=2) as bar:
        for step in range(100):
            clock[0] += 1
            bar.reach(2 + step / 10, "denoise")
    lines = capsys.readouterr().err.splitlines()
    # After 5 s, and 10, 20 and 40 s after the one before.
    assert len(lines) == 4
    assert lines[0] == "draw: 2 of 12, 2 min left, denoise"
    assert lines[3] == "draw: 9 of 12, 26 s left, denoise"


def test_a_terminal_gets_a_bar_and_remarks_stand_above_it(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.Bar("draw", 4) as bar:
        clock[0] += 1
        bar.reach(1)
        progress.say("a\nremark")
        clock[0] += 1
        bar.advance()
    shown = screen.getvalue()
    assert "draw: 1 of 4, 3 s left |" in shown and "draw: 2 of 4, 2 s left |" in shown
    assert "a remark\n" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("stream", [None, Broken(), "closed"])
def test_standard_error_that_takes_nothing_stops_nothing(
    stream: "io.StringIO | str | None", clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(stream, str):
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    seen = []
    for entry in progress.counted("abc", "read"):
        clock[0] += 30
        progress.say("remark")
        seen.append(entry)
    assert seen == ["a", "b", "c"]


def test_quiet_is_quiet(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in progress.counted(range(3), "read", 3, quiet=True):
        clock[0] += 30
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (41.4, "41 s"), (720, "12 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words
