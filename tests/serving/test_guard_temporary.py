"""The private folder of a process: nobody else reads it, and nothing of it is left behind."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pixart.serving.temporary import private_folder, remove_stale

KILLED = (
    "import os, sys, tempfile\n"
    "from pixart.serving.temporary import private_folder\n"
    "with private_folder() as folder:\n"
    "    (folder / 'upload').write_text('secret')\n"
    "    print(folder, flush=True)\n"
    "    if sys.argv[1:]: os.kill(os.getpid(), 9)\n"
    "    sys.stdin.read()\n"
)


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_what_is_put_on_disk_goes_where_nobody_else_reads_and_goes_away(root: Path) -> None:
    with private_folder() as folder:
        assert folder.parent == root and stat.S_IMODE(folder.stat().st_mode) == 0o700
        with tempfile.NamedTemporaryFile() as file:
            assert Path(file.name).parent == folder
        assert Path(os.environ["GRADIO_TEMP_DIR"]).parent == folder
        (folder / "a").mkdir()
        (folder / "a" / "b").write_text("left")
    assert list(root.iterdir()) == []
    assert tempfile.gettempdir() == str(root) and "GRADIO_TEMP_DIR" not in os.environ


def test_it_goes_away_after_a_failure_too(root: Path) -> None:
    with pytest.raises(KeyError), private_folder():
        raise KeyError
    assert list(root.iterdir()) == []


def test_what_a_killed_process_has_left_goes_at_the_next_start(root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, "kill"], capture_output=True, text=True)
    left = Path(done.stdout.strip())
    assert done.returncode == -9 and (left / "upload").read_text() == "secret"
    with private_folder() as folder:
        assert list(root.iterdir()) == [folder]


def test_the_folder_of_one_that_lives_stays(root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    other = Path(process.stdout.readline().strip())
    with private_folder() as folder:
        assert {*root.iterdir()} == {folder, other} and (other / "upload").exists()
    process.communicate()
    assert list(root.iterdir()) == []


def test_a_link_of_that_name_is_not_followed(root: Path) -> None:
    victim = root / "victim"
    victim.mkdir()
    (victim / "lock").write_text("")
    (root / "pixart-serve-x").symlink_to(victim)
    remove_stale(root)
    assert (victim / "lock").exists()


def test_a_folder_that_is_being_made_stays(root: Path) -> None:
    (root / "pixart-serve-new").mkdir()
    remove_stale(root)
    assert (root / "pixart-serve-new").exists()
