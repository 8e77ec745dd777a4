"""pixart.command: exit codes and the one line of every command, however it ends."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pixart import __version__, command
from pixart.files import CheckpointWriteError

ROOT = Path(__file__).parent.parent.parent
NAMES = sorted(command.COMMANDS)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("bad"), 2),
        (FileNotFoundError("bad"), 2),
        (ModuleNotFoundError("bad"), 2),
        (CheckpointWriteError("bad"), 1),
        (OSError("bad"), 1),
        (RuntimeError("bad"), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_an_exception_is_one_line_and_an_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert command.run_command("x", work, "cancelled; nothing") == code
    out, err = capsys.readouterr()
    expected = {130: "cancelled; nothing"}.get(code, str(error) or "out of memory")
    assert out == "" and err == f"pixart.x: {expected}\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "Full", "a"), "a: Full; make room there, or name another place"),
        (OSError(errno.EROFS, "No"), "No; name another place, or get the right to use this one"),
        (OSError(errno.EXDEV, "No", "a", None, "b"), "a -> b: No"),
        (OSError(errno.EMFILE, "Many"), "Many; raise the limit (ulimit -n)"),
        (OSError("said by a library"), "said by a library"),
    ],
)
def test_what_the_system_refuses_names_the_place_and_the_way_out(error: OSError, line: str) -> None:
    assert command.message_of(error) == line


def test_a_name_that_no_disk_can_have_is_bad_input() -> None:
    codes = {number: command.exit_code(OSError(number, "No", "a")) for number in errno.errorcode}
    assert [errno.errorcode[n] for n in (errno.ENAMETOOLONG, errno.ELOOP) if codes[n] == 2] == [
        "ENAMETOOLONG", "ELOOP",
    ]  # fmt: skip
    assert codes[errno.ENOSPC] == codes[errno.EIO] == 1


def test_a_current_folder_that_is_deleted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for name in NAMES:
        assert command.main([name, "x"]) == command.BAD_INPUT
        line = capsys.readouterr().err
        assert "current folder is not there any more" in line and line.count("\n") == 1


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(TypeError):
        command.run_command("x", lambda: len(5))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arguments", [["--no-such-option"], ["--help"]])
def test_no_command_draws_a_box_around_an_error(
    name: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as stop:
            command.main([name, *arguments])
        assert not stop.value.code and "usage" in capsys.readouterr().out.lower()
        return
    assert command.main([name, *arguments]) == command.BAD_INPUT
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"pixart.{name}: ") and err.count("\n") == 1
    assert not re.search("[│╭╰]", err)


@pytest.mark.parametrize(
    "arguments, rule",
    [
        (["--seed", "any"], "--seed must be a whole number or random, got 'any'"),
        (["--tile", "big"], "--tile must be a whole number or True or False, got 'big'"),
        (["--guidance-interval", "0", "x"], "--guidance-interval must be 2 numbers, got '0', 'x'"),
    ],
)
def test_an_option_of_several_kinds_is_refused_in_words(
    arguments: list[str], rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["generate", "a cat", *arguments]) == command.BAD_INPUT
    assert rule in capsys.readouterr().err


# Asks for `module` as if the key were pressed then, inside an exec() as in a dataclass: CPython
# remembers that, and would end a process that was started by -m with SIGINT, though it was caught.
SITECUSTOMIZE = """
import sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            exec("raise KeyboardInterrupt")
sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize("how", ["pixart {}", "pixart.{}"])
@pytest.mark.parametrize("module", ["tyro", "typing"])
@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_while_a_command_is_imported_is_one_line(
    tmp_path: Path, how: str, module: str, name: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE.format(module=module))
    path = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    done = subprocess.run(
        [sys.executable, "-m", *how.format(name).split(), "--help"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )  # fmt: skip
    assert done.returncode == command.CANCELLED, done.stderr
    assert done.stderr.startswith(f"pixart.{name}: cancelled"), done.stderr
    assert done.stderr.count("\n") == 1


def test_pixart_lists_its_commands_and_refuses_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pixart {__version__}\n"
    assert command.main(["draw"]) == 2
    assert capsys.readouterr().err.startswith("pixart: knows ")
    assert command.main([]) == 2
