"""Several processes of torch.distributed from one: what they run is imported once for all of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent.parent


def lines_of(script: str, *words: str | Path) -> list[dict[str, Any]]:
    """What a script of tests/parallel prints, a line of JSON for each case, in a process without threads."""
    paths = (ROOT, ROOT / "kernels", ROOT / "tests" / "builders")
    env = {**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "parallel" / script), *map(str, words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def among(count: int, work: Callable[[], object]) -> None:
    """Run `work` in so many forks that know each other through Gloo. RuntimeError if one fails.

    For processes without threads: call it in one of its own, with OMP_NUM_THREADS=1, before any backward
    pass."""

    def connected() -> int:
        from torch import device

        from pixart.distributed import connect

        connect(device("cpu"))
        work()
        return 0

    codes = codes_among(count, connected, is_together=True)
    if any(codes):
        raise RuntimeError(f"{count} processes ended with {codes}")


def codes_among(
    count: int, work: Callable[[], int], said: Path | None = None, *, is_together: bool = False
) -> list[int]:
    """Exit codes of so many forks that run `work` as torchrun would have started them. said: a folder for
    what each of them says, as 0.out, 0.err and so on. is_together: end all when one fails, for which the
    others would wait."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(128)
        port = listening.getsockname()[1]
        place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        # Before the store, whose threads may hold a lock that a fork would never see released.
        children = [_fork({**place, "RANK": k, "LOCAL_RANK": k}, work, said) for k in range(count)]
        # It lives here, as with torchrun: whichever of them ends first, the others can still count.
        store = TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )  # fmt: skip
    codes: dict[int, int] = {}
    while len(codes) < count:
        for child in [one for one in children if one not in codes]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if is_together and any(codes.values()):
            for child in [one for one in children if one not in codes]:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    del store
    return [codes[child] for child in children]


def _fork(place: dict[str, int], work: Callable[[], int], said: Path | None) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            if said is not None:
                file = said / f"{place['RANK']}.{name}"
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
