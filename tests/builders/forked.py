"""Several processes of torch.distributed from one: what they run is imported once for all of them."""

import os
import socket
import sys
import traceback
from collections.abc import Callable


def among(count: int, work: Callable[[], object]) -> None:
    """Run `work` in so many forks that know each other through Gloo. RuntimeError if one fails.

    For processes without threads: call it in one of its own, with OMP_NUM_THREADS=1, before any backward
    pass."""
    port = _free_port()
    children = [_fork(rank, count, port, work) for rank in range(count)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"{count} processes ended with {codes}")


def _fork(rank: int, count: int, port: int, work: Callable[[], object]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    code = 1
    try:
        from torch import device

        from pixart.distributed import connect

        connect(device("cpu"))
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
