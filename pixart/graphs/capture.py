"""Recording one call as a CUDA graph, and saying in one line why that cannot be done."""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_BENEATH = (str(Path(torch.__file__).parent),)  # files that no caller can do something about
_ONE_AT_A_TIME = threading.Lock()  # of the process: PyTorch can make but one recording at once
_WAY_OUT = "use cuda_graph=False"
FULL = "the GPU's memory is full, and a recording keeps what it computes with"


class GraphError(RuntimeError):
    """A call cannot be recorded as a CUDA graph. One line: the reason and the way out."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the denoising step cannot be a CUDA graph: {reason}; {_WAY_OUT}")
        self.reason = reason


def capture(
    step: Callable[[], Any], pool: Any, stream: Any, check: Callable[[], object]
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run the step once, then record it: the graph, and the output that its replays write.

    pool: of torch.cuda.graph_pool_handle(), which graphs may share that never run at the same time.
    stream: to record on, which nothing else uses.
    check: called between, to raise where recording would do harm. Raises GraphError for what a recording
    cannot hold.
    """
    failed: BaseException | None = None
    with _ONE_AT_A_TIME, _without_cached_casts():
        stream.wait_stream(torch.cuda.current_stream())
        # Once more than torch.cuda.graph does it: where a recording fails, that leaves its stream current.
        with torch.cuda.stream(stream):
            step()  # libraries take their workspaces on this stream
            check()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may allocate meanwhile: they decode pictures, or use another GPU.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool, stream, capture_error_mode=mode):
                    try:
                        output = step()
                    except BaseException as error:
                        failed = (
                            error  # the end of a spoilt recording is an error too, and hides it
                        )
                        raise
            except Exception as error:
                if failed is not None and not isinstance(failed, Exception):  # Ctrl-C
                    raise failed from None
                raise GraphError(_reason(failed or error)) from error
            finally:
                failed = None  # its frames hold this one, and all tensors of the step
        torch.cuda.current_stream().wait_stream(stream)
    return graph, output


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast forgets its copies of the weights at its end, while replays would go on reading them."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return FULL
    place = _place(error)
    if "captur" in text.lower():
        return (
            f"{place} waits for the GPU or allocates past PyTorch, as .item(), .cpu() and print do"
        )
    return f"{place} fails while it is recorded ({text[:200] or type(error).__name__})"


def _place(error: Exception) -> str:
    """The innermost line outside of PyTorch."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_BENEATH)]
    frame = (own or frames)[-1]
    return f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})"
