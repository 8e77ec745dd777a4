"""Work in processes of its own, which end with the one that began them."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from threading import Thread


@contextmanager
def pool(
    processes: int | None = None, prepare: Callable[[], object] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """So many processes (None: one for each core), of which each calls `prepare` first. An exception,
    Ctrl-C too, ends them at once instead of waiting for what they do."""
    # A fork would inherit locks of threads that it does not have.
    spawn = get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _begin, (prepare,)) as workers:
        try:
            yield workers
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            for child in active_children():
                child.terminate()
            raise


def _begin(prepare: Callable[[], object] | None) -> None:
    """Ctrl-C, which a terminal sends to all, is answered by the first process alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare()


def _end_with_parent() -> None:
    """A first process that was killed ends nobody; its children would work on for none, or wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
