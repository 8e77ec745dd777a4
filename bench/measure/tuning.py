"""Triton's autotuners in our kernels: which ran, what they chose, and one configuration at a time."""

import gc
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

PACKAGE = "pixart_kernels"


def autotuners() -> list[Any]:
    """Those of our kernels that are loaded: a kernel's module loads with its first launch."""
    ours = [module for name, module in sys.modules.items() if name.startswith(PACKAGE)]
    if not any("triton" in vars(module) for module in ours):
        return []
    from triton.runtime.autotuner import Autotuner

    found = [value for value in gc.get_objects() if issubclass(type(value), Autotuner)]
    found = [tuner for tuner in found if tuner.base_fn.__module__.startswith(PACKAGE)]
    return sorted(found, key=kernel_name)


def kernel_name(tuner: Any) -> str:
    return tuner.base_fn.__name__


def forget() -> None:
    """So that `used` tells of the launches from here on."""
    for tuner in autotuners():
        tuner.best_config = None


def used() -> list[Any]:
    """The autotuners that launched since `forget`."""
    return [tuner for tuner in autotuners() if getattr(tuner, "best_config", None) is not None]


def chosen() -> dict[str, str]:
    """By kernel, the configuration that was launched last since `forget`."""
    return {kernel_name(tuner): describe(tuner.best_config) for tuner in used()}


def winners() -> list[dict[str, Any]]:
    """What every autotuner has decided so far; with the last decision, the times it was made on."""
    rows = []
    for tuner in autotuners():
        timings = getattr(tuner, "configs_timings", None) or {}
        for key, config in tuner.cache.items():
            row = {"kernel": kernel_name(tuner), "key": [str(part) for part in key]}
            rows.append(row | {"config": describe(config), "candidates": len(tuner.configs)})
        if timings and tuner.cache:
            rows[-1]["milliseconds"] = {describe(c): _median(times) for c, times in timings.items()}
    return rows


def describe(config: Any) -> str:
    values = dict(config.all_kwargs())
    if values.get("num_ctas") == 1:
        del values["num_ctas"]
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _median(times: Any) -> float:
    return float(times[0] if isinstance(times, list | tuple) else times)


@contextmanager
def pinned(choice: Mapping[Any, Any]) -> Iterator[None]:
    """Launch with these configurations, {autotuner: configuration}, and no tuning."""
    saved = [(tuner, tuner.configs) for tuner in choice]
    for tuner, config in choice.items():
        tuner.configs = [config]
    try:
        yield
    finally:
        for tuner, configs in saved:
            tuner.configs = configs


@contextmanager
def parallel_compilation(threads: int) -> Iterator[None]:
    """Compile an autotuner's candidates side by side before it times them one after the other.

    One after the other they take a second or two each, most of it outside of Python.
    """
    from triton import AsyncCompileMode
    from triton.runtime.autotuner import Autotuner

    plain = Autotuner.prune_configs

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = plain(self, kwargs)
        # What fails here fails again, and is told, when the autotuner comes to it.
        with (
            suppress(Exception),
            ThreadPoolExecutor(threads) as pool,
            AsyncCompileMode(pool, ignore_errors=True),
        ):
            for config in configs:
                if config.pre_hook is not None:
                    config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
                arguments = {**self.nargs, **kwargs, **config.all_kwargs(), "warmup": True}
                self.fn.run(**arguments)
        return configs

    Autotuner.prune_configs = prune_configs
    try:
        yield
    finally:
        Autotuner.prune_configs = plain
