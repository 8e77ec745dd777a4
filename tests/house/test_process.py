"""pixart.process: how a command ends when it is told to, and where there is nobody to print to."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pixart import command, process

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
# A command whose work is a text.
HARNESS = """
import os, sys, types
sys.path.insert(0, ".")
from pixart import command, process
fake = types.ModuleType("pixart.convert")
sys.modules["pixart.convert"] = fake
def press(name="SIGINT"):
    import signal
    os.kill(os.getpid(), getattr(signal, name))
def rise(number):
    raise RuntimeError("a library's answer to KeyboardInterrupt")
def run(body):
    def main(arguments):
        exec(body, globals())
        return 0
    fake.main = lambda arguments: command.run_command("convert", lambda: main(arguments), "cancelled; kept")
    command.start(["convert"])
run(sys.argv[1])
"""


def ended(body: str, folder: Path, **settings: object) -> "subprocess.CompletedProcess[str]":
    """A command whose work is `body`."""
    usual = {"capture_output": True, "env": ENVIRONMENT}
    command_line = [sys.executable, "-S", "-c", HARNESS, body]  # -S: quicker, and nothing is needed
    return subprocess.run(command_line, text=True, timeout=60, cwd=folder, **usual | settings)


LINE = "pixart.convert: cancelled; kept\n"
# Raised in a destructor, it reaches nobody.
LOST = "class Lost:\n    def __del__(self): press()\nprocess.at_work()\nLost()\nimport time; time.sleep(5)"


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("press()", 130, LINE),
        ("process.at_work(); press()", 130, LINE),
        ("import pressed", 130, LINE),
        ("process.at_work()\nwith process.Whole(): press(); print('whole')\nos._exit(7)", 130, LINE),
        ("process.at_work(); import pressed; print('imported')\nwhile True: pass", 130, LINE),
        (LOST, 130, LINE),
        ("process.at_work()\ntry: press()\nexcept BaseException: rise(1)", 130, LINE),
        ("press('SIGTERM')", -signal.SIGTERM, LINE.replace("cancelled", "ended by SIGTERM")),
        ("process.at_work(); press('SIGHUP')", -signal.SIGHUP, LINE.replace("cancelled", "ended by SIGHUP")),
        ("process.on_leaving(lambda: '{}'); press()", 130, LINE),
        ("import threading, time; threading.Thread(target=press).start(); time.sleep(9)", 130, LINE),
    ],
)  # fmt: skip
def test_a_signal_is_one_line_wherever_it_comes(
    body: str, code: int, line: str, tmp_path: Path
) -> None:
    (tmp_path / "pressed.py").write_text(
        "import os\ntry: os.kill(os.getpid(), 2)\nexcept BaseException: raise ImportError('half')\n"
    )
    done = ended(body, tmp_path)
    assert (done.returncode, done.stderr) == (code, line)
    # An import is left at once, or, where something may be half done, when it has ended.
    assert ("imported" in done.stdout) == ("imported" in body)
    assert ("whole" in done.stdout) == ("whole" in body)
    assert ("{}" in done.stdout) == ("on_leaving" in body)


def test_a_signal_that_is_ignored_stays_so_and_work_that_is_done_cannot_be_cancelled(
    tmp_path: Path,
) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    assert ended("press()", tmp_path, preexec_fn=ignore).returncode == 0
    done = ended("import atexit; atexit.register(press)", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_half_written_is_removed_before_the_end(tmp_path: Path) -> None:
    body = (
        "process.at_work()\nfrom pathlib import Path; from pixart.files import written_aside\n"
        "with written_aside(Path('made')) as aside: aside.write_text('half'); press('SIGTERM')"
    )
    assert ended(body, tmp_path).returncode == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def shell(closed: str, body: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """The same with standard streams as a shell would have them."""
    return subprocess.run(
        ["sh", "-c", f'"$0" -S -c "$1" "$2" {closed}', sys.executable, HARNESS, body],
        capture_output=True, text=True, timeout=60, cwd=folder,
        env=ENVIRONMENT,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("streams", "code", "reason"),
    [
        (">&-", 1, "Bad file descriptor"),
        (">/dev/full", 1, "No space left on device"),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
        (">&- 2>&-", 1, ""),
        ("<&- >&- 2>&-", 1, ""),
    ],
)
def test_streams_that_take_nothing_are_one_line_and_no_file_takes_their_place(
    streams: str, code: int, reason: str, tmp_path: Path
) -> None:
    body = (
        "print('said'); command.complain('convert', 'noted', 0)\n"
        "file = open('kept', 'w'); assert file.fileno() > 2"
    )
    done = shell(streams, body, tmp_path)
    assert done.returncode == code
    lines = [] if "2>" in streams else ["pixart.convert: noted"]
    if reason:
        lines.append(f"pixart.convert: standard output cannot be written: {reason}")
    assert done.stderr.splitlines() == lines
    assert (tmp_path / "kept").read_text() == ""


def test_a_reader_that_is_gone_is_one_line(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = ended("print('said')", tmp_path, capture_output=False, stdout=writing, stderr=-1)
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr.endswith("standard output cannot be written: Broken pipe\n")
    assert done.stderr.count("\n") == 1


def test_what_a_stream_cannot_encode_is_spelt_out(tmp_path: Path) -> None:
    done = ended(
        "print('\\u00e9\\u2192')", tmp_path, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, "\\xe9\\u2192\n")


@pytest.mark.parametrize("columns", ["1", "0", "-3", "many"])
def test_a_narrow_terminal_hangs_nothing(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert command.main(["convert", "a", "b", "--no-such"]) == command.BAD_INPUT
    assert "unknown option --no-such" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["data", "--help"])
    assert os.environ["COLUMNS"] == columns


def test_what_unraisable_exceptions_are_not_of_a_signal_is_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[object] = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    process.Ending().swallowed(types.SimpleNamespace(exc_type=ValueError))
    assert len(shown) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--count", "0"],
        ["--count", "9" * 30],
        ["--json-file", "."],
        ["--seed", "-1"],
    ],
)
def test_evaluate_refuses_in_one_line_before_it_opens_a_model(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        command.main(["evaluate", "accuracy", *arguments, "--model", "no such"])
        == command.BAD_INPUT
    )
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and arguments[0][2:] in line and "no such" not in line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\n b", "a b"),
        ("x" * 5000, f"{'x' * 500} ... {'x' * 500}"),
        ("a\x1b[31m\ud800b", "a\\x1b[31m\\ud800b"),
        ("\u5706 é", "\u5706 é"),
    ],
)
def test_a_message_is_one_line_that_a_terminal_shows_as_it_is(message: str, line: str) -> None:
    assert command.one_line(message) == line


PRESSED = """
import os, signal, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("argparse", "tyro", "torch"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
"""
BENCHES = sorted(
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for path in (ROOT / "bench").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", BENCHES)
def test_ctrl_c_while_a_bench_is_imported_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PRESSED)
    path = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, "-m", name], capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, f"{name}: cancelled\n")


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_for_as_long_as_is_said(
    tmp_path: Path, given: dict[str, str], spins: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    kept = {name: value for name, value in ENVIRONMENT.items() if name not in names}
    done = ended('print(os.environ.get("GOMP_SPINCOUNT"))', tmp_path, env=kept | given)
    assert (done.stdout, done.returncode) == (f"{spins}\n", 0)
