"""Kernels compiled side by side before they are launched: one after the other they take seconds each."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import torch

from pixart.device import usable_cores

SECONDS = 300.0  # that it may be silent for, on few cores


def ahead(calls: Iterable[Callable[[], Any]]) -> None:
    """Compile what these calls launch, and launch nothing: their results hold whatever memory held.

    What fails to compile fails again, and is told, when it is launched.
    """
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    plain = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        plain(self, *arguments, grid=grid, warmup=True, **named)

    with (
        patch.object(JITFunction, "run", compile_only),
        ThreadPoolExecutor(usable_cores()) as pool,
        torch.autograd.set_multithreading_enabled(False),  # the mode is that of this thread
        suppress(Exception),
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        for call in calls:
            with suppress(Exception):
                call()
