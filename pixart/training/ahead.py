"""The data of coming steps, loaded while the current one is computed."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Ahead:
    """Loads the data of the next steps while the current one is computed."""

    def __init__(self, load: Callable[[int], list[Any]], depth: int = 2) -> None:
        self.load, self.depth = load, depth
        self._pool = ThreadPoolExecutor(max_workers=depth, thread_name_prefix="pixart-data")
        self._futures: dict[int, Future[list[Any]]] = {}

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __call__(self, step: int) -> list[Any]:
        for number in range(step, step + 1 + self.depth):
            if number not in self._futures:
                self._futures[number] = self._pool.submit(self.load, number)
        return self._futures.pop(step).result()
