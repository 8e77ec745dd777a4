"""TensorBoard, Weights & Biases and trackio, where they are asked for."""

from pathlib import Path
from types import ModuleType
from typing import Any, Literal

TrackerName = Literal["tensorboard", "wandb", "trackio"]


def check_installed(name: TrackerName) -> None:
    """Raise ValueError for a tracker whose library is not there."""
    _import_tensorboard() if name == "tensorboard" else _import(name)


class Tracker:
    """TensorBoard, Weights & Biases or trackio. Raises ValueError when it is not installed."""

    def __init__(self, name: TrackerName, directory: Path, stage: str) -> None:
        self._writer, self._run = None, None
        if name == "tensorboard":
            self._writer = _import_tensorboard().SummaryWriter(str(directory))
            return
        library: Any = _import(name)
        self._run = library.init(project="pixart", name=f"{directory.parent.name}-{stage}")

    def log(self, line: dict[str, float]) -> None:
        values = {key: value for key, value in line.items() if key != "step"}
        if self._writer is None:
            assert self._run is not None
            self._run.log(values, step=int(line["step"]))
            return
        for key, value in values.items():
            self._writer.add_scalar(key, value, int(line["step"]))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def _import_tensorboard() -> Any:
    try:
        from torch.utils import tensorboard
    except ImportError as error:
        raise _absent("tensorboard") from error
    return tensorboard


def _import(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _absent(name) from error


def _absent(name: str) -> ValueError:
    return ValueError(f"track must name installed libraries, got {name}; pip install {name}")
