"""pixart.locks: what a process holds is its own until it ends, however it ends."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixart import locks


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    program = (
        "import os, sys; from pathlib import Path; from pixart.locks import claimed\n"
        "with claimed(Path(sys.argv[1]), wait=False) as mine:\n"
        "    print(mine, flush=True); os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(lock)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "True\n" and done.returncode == -9
    with locks.claimed(lock, wait=False) as mine:
        assert mine


def claims(folder: Path) -> list[Path]:
    return sorted((folder / locks.HELD).glob("*.json"))


def test_a_folder_is_held_by_one_who_is_named(tmp_path: Path) -> None:
    with locks.occupied(tmp_path, "training"):
        (claim,) = claims(tmp_path)
        who = f"pid {os.getpid()} on {re.escape(socket.gethostname())}, training since .*"
        with (
            pytest.raises(locks.Occupied, match=f"^{tmp_path}: is held by {who}{claim}") as refused,
            locks.occupied(tmp_path, "training"),
        ):
            pass
        assert "\n" not in str(refused.value)
        assert claims(tmp_path) == [claim]
    assert list(tmp_path.iterdir()) == []
    with locks.occupied(tmp_path, "training"):
        pass


def test_those_who_do_the_same_hold_a_folder_together(tmp_path: Path) -> None:
    with locks.occupied(tmp_path, "preparing", shared="a"):
        with locks.occupied(tmp_path, "preparing", shared="a"):
            assert len(claims(tmp_path)) == 2
        for other in ("b", None):
            with pytest.raises(locks.Occupied), locks.occupied(tmp_path, "", shared=other):
                pass
        assert len(claims(tmp_path)) == 1


def test_what_a_killed_process_held_is_taken_over(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from pixart.locks import occupied\n"
        "with occupied(Path(sys.argv[1]), 'training'):\n"
        "    print(len(list(Path(sys.argv[1], '.held').glob('*.json'))), flush=True)\n"
        "    os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "1\n" and done.returncode == -9
    (dead,) = claims(tmp_path)
    with locks.occupied(tmp_path, "training"):
        assert not dead.exists() and len(claims(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_was_held_before_a_boot_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_machine", lambda: "m")
    holder = {"host": socket.gethostname(), "pid": 7, "boot": "earlier", "machine": "m"}
    (tmp_path / locks.HELD).mkdir()
    for machine, is_free in (("m", True), ("other", False), ("", False)):
        claim = tmp_path / locks.HELD / "a.json"
        claim.write_text(json.dumps(holder | {"machine": machine}))
        if is_free:
            with locks.occupied(tmp_path, "training"):
                assert not claim.exists()
        else:
            (tmp_path / locks.HELD).mkdir(exist_ok=True)
            with pytest.raises(locks.Occupied), locks.occupied(tmp_path, "training"):
                pass
        (tmp_path / locks.HELD).mkdir(exist_ok=True)


def test_another_machine_is_believed_as_long_as_it_shows_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / locks.HELD).mkdir()
    claim = tmp_path / locks.HELD / "0123456789abcdef.json"
    claim.write_text(json.dumps({"host": "other", "pid": 7, "boot": "x", "work": "training"}))
    match = f"pid 7 on other, training .* delete {claim} if that process is dead"
    with pytest.raises(locks.Occupied, match=match), locks.occupied(tmp_path, "training"):
        pass
    os.utime(claim, (time.time() - 301, time.time() - 301))
    monkeypatch.setattr(locks, "RENEWED", 0.001)
    with locks.occupied(tmp_path, "training"):
        assert not claim.exists()
        (own,) = claims(tmp_path)
        os.utime(own, (0, 0))
        while own.stat().st_mtime == 0:  # for ever, if nobody renewed it
            time.sleep(0.001)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"host": 3}', "[" * 99_999])
def test_a_damaged_claim_holds_while_its_process_lives(tmp_path: Path, content: str) -> None:
    with locks.occupied(tmp_path, "training"):
        (claim,) = claims(tmp_path)
        claim.write_text(content)
        with (
            pytest.raises(locks.Occupied, match="pid unknown on"),
            locks.occupied(tmp_path, "training"),
        ):
            pass
