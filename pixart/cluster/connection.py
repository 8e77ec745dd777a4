"""Where a cluster is, and to be connected with it: one that runs, or one for the run alone."""

import importlib.util
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart import process
from pixart.files import printable, short

ANSWER = 10.0  # seconds in which a cluster must answer, twice
STORE = 100 * 2**20  # bytes for objects of a Ray that we start: items and results are small


@dataclass(frozen=True)
class Cluster:
    """Where to work, and in how many workers.

    address: "auto" for the Ray that runs here or that RAY_ADDRESS names, HOST:PORT, ray://HOST:PORT; None
    starts one on this machine for the run. workers: None for one on each GPU, or, without any, on each
    machine. gpus, cpus: of each worker; None for one GPU if the cluster has any, and for the CPUs that
    are there for each (one beside a GPU). Raises ValueError for what cannot be.
    """

    address: str | None = None
    workers: int | None = None
    gpus: float | None = None
    cpus: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.cpus is not None and not self.cpus > 0:
            raise ValueError(f"cpus of a worker must be above 0, got {self.cpus}")
        if self.gpus is not None and not self.gpus >= 0:
            raise ValueError(f"gpus of a worker must be at least 0, got {self.gpus}")
        if self.address not in (None, "auto"):
            _host_and_port(self.address)


@contextmanager
def joined(cluster: Cluster) -> Iterator[Any]:
    """Ray, connected: to the cluster that is named, or to one that ends with the block."""
    ray = _imported()
    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as stack:
        stack.enter_context(_silenced(ray))
        try:
            with _kept_handlers(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Ray, about its own future
                if cluster.address is None:
                    own = tempfile.TemporaryDirectory(prefix="pixart-", ignore_cleanup_errors=True)
                    _start(ray, cluster, stack.enter_context(own))
                else:
                    _connect(ray, cluster.address)
            yield ray
        finally:
            ray.shutdown()


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # else 15, and beside other work they starve
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ModuleNotFoundError(
            f'Ray is needed, and cannot be imported ({error}); pip install "pixart-fast[ray]"'
        ) from None
    return ray


@contextmanager
def _silenced(ray: Any) -> Iterator[None]:
    """Ray says nothing by itself. Its messages of lost workers would go to standard output, where reports
    are; its C++ says on standard error what it tries again, line after line. What Python writes there is shown."""
    printer, worker = "print_to_stdstream", ray._private.worker
    before = getattr(worker, printer, None)
    setattr(worker, printer, lambda *_, **__: None)
    try:
        with _python_alone_on_standard_error():
            yield
    finally:
        setattr(worker, printer, before)


@contextmanager
def _python_alone_on_standard_error() -> Iterator[None]:
    stream = sys.stderr
    try:
        is_plain = stream.fileno() == 2
        kept = os.dup(2)
    except (AttributeError, OSError, ValueError):  # closed, or nobody's
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        stream.flush()
        os.dup2(nowhere, 2)
        if is_plain:
            sys.stderr = open(kept, "w", 1, stream.encoding, "backslashreplace", closefd=False)  # noqa: SIM115
            process.ENDING.error_output = kept
        yield
    finally:
        if is_plain:
            sys.stderr.flush()
            sys.stderr, process.ENDING.error_output = stream, 2
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Ray puts its own in the place of ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    kept = {
        getattr(signal, n): signal.getsignal(getattr(signal, n))
        for n in names
        if hasattr(signal, n)
    }
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _settings(ray: Any) -> dict[str, Any]:
    """Of every connection: silent, and with the folders that this library is imported from, for workers that
    see them too."""
    specs = [importlib.util.find_spec(name) for name in ("pixart", "pixart_kernels")]
    files = [Path(spec.origin).resolve() for spec in specs if spec and spec.origin]
    roots = list(dict.fromkeys(str(file.parent.parent) for file in files))
    job = ray.job_config.JobConfig(_py_driver_sys_path=roots)
    return {"log_to_driver": False, "logging_level": logging.CRITICAL, "job_config": job}


def _start(ray: Any, cluster: Cluster, folder: str) -> None:
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    needed = (cluster.workers or 1) * (cluster.cpus or 1)
    try:
        ray.init(
            address="local",
            num_cpus=max(count, math.ceil(needed)),  # they may be more than there are cores
            include_dashboard=False,
            object_store_memory=STORE,
            _node_ip_address="127.0.0.1",
            # Of its own, where another Ray's address is not overwritten; sockets have short names.
            _temp_dir=folder if len(folder) < 40 else None,
            **_settings(ray),
        )
    except Exception as error:
        raise RuntimeError(f"Ray cannot be started here: {_first_line(error)}") from error


def _connect(ray: Any, address: str) -> None:
    """ValueError, soon, for a cluster that does not answer: Ray itself waits for minutes, and may end the
    process."""
    known = address
    if address == "auto":
        known = os.environ.get("RAY_ADDRESS") or _address_here()
    host, port = _host_and_port(known)
    shown = address if known == address else f"{address}, that is {known},"
    if known.startswith("ray://") and importlib.util.find_spec("grpc") is None:
        raise ModuleNotFoundError(
            f'{shown}: ray:// needs gRPC for Python; pip install "ray[client]"'
        )
    try:
        socket.create_connection((host, port), ANSWER).close()
    except OSError as error:
        raise ValueError(
            f"the Ray cluster at {shown} does not answer ({error.strerror or error}); look at the address, and "
            "whether it runs (ray start --head)"
        ) from None
    if not known.startswith("ray://") and not _is_head(ray, f"{host}:{port}"):
        raise ValueError(
            f"at {shown} something answers that is not the head of a Ray cluster of this version"
        )
    try:
        ray.init(address=known, **_settings(ray))
    except Exception as error:
        raise ValueError(
            f"the Ray cluster at {shown} cannot be joined: {_first_line(error)}"
        ) from error


def _address_here() -> str:
    """Of the Ray that runs on this machine."""
    from ray._private import services

    found = None
    with suppress(ConnectionError):  # it found none
        found = services.get_ray_address_from_environment("auto", None)
    if not found or found == "auto":
        raise ValueError(
            "no Ray runs on this machine, and RAY_ADDRESS names none: give --address HOST:PORT, start one (ray "
            "start --head), or leave --address out"
        )
    return str(found)


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    is_port = port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536
    if not (colon and host and is_port) or re.search(r"[\s/@?#]", host):
        raise ValueError(
            f"the address of a Ray cluster must be auto, HOST:PORT or ray://HOST:PORT, got {short(address)}"
        )
    return host.strip("[]"), int(port)


def _is_head(ray: Any, address: str) -> bool:
    """Whether a head of Ray answers there. In a thread: it may wait longer than we do."""
    answered: list[bool] = []

    def ask() -> None:
        with suppress(Exception):
            ray._raylet.GcsClient(address=address).internal_kv_keys(b"", namespace=None)
            answered.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER)
    return bool(answered)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0] if lines else type(error).__name__, 300)
