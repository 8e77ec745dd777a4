"""The processes that torchrun started, which share the pictures of a run; most often one alone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pixart import process
from pixart.generation.drafts import Job
from pixart.generation.options import Options
from pixart.generation.report import Report

if TYPE_CHECKING:
    from torch import device

    from pixart.pipeline.parallel import Layout
    from pixart.pipeline.request import Request
    from pixart.pipeline.text_to_image import Pipeline

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)  # one that waits may wait for T5 or for all pictures of another


@dataclass
class Team:
    """This process and the others. layout: how they share pictures, None before it is chosen."""

    rank: int = 0
    count: int = 1
    layout: "Layout | None" = field(default=None, init=False)

    @classmethod
    def of(cls, options: Options) -> "Team":
        """ValueError where --parallel asks for others that are not there."""
        team = cls(*process.place())
        if team.count == 1 and options.parallel != "auto" and options.processes is None:
            raise ValueError(
                f"--parallel must be left out of a single process, got {options.parallel}; start "
                "several with torchrun --nproc-per-node N -m -- pixart.generate"
            )
        return team

    @property
    def is_alone(self) -> bool:
        return self.count == 1

    @property
    def writes(self) -> bool:
        """Whether what this process draws is written by it."""
        return self.rank == 0 or self.layout is None or not self.layout.is_together

    def options(self, options: Options) -> Options:
        """Those of this process: the first alone speaks and shows previews, and draws lots for all."""
        if self.rank == 0:
            return options
        return replace(options, quiet=True, json=False, preview=None, taesd=None)

    def meet(self, options: Options) -> None:
        """Join the others. ValueError for a device that is not each process's own."""
        if self.is_alone:
            return
        from pixart.device import choose_device
        from pixart.distributed import connect

        device = choose_device(options.device)
        _check_device(device)
        connect(device, PATIENCE)

    def agreed(self, work: Callable[[], Item]) -> Item:
        """What each does by itself, once all have done it: where one fails, all end."""
        if self.is_alone:
            return work()
        from pixart.distributed import together

        return together(work)

    def said(self, text: str) -> str:
        """What the first one says, to all."""
        if self.is_alone:
            return text
        from pixart.distributed import said_by_first

        return said_by_first(text)

    def choose(
        self,
        pipe: "Pipeline",
        jobs: Sequence[Job],
        requests: Sequence["Request"],
        options: Options,
    ) -> None:
        """Settle how these jobs are shared. ValueError for what cannot be, and where the processes do not
        see the same files."""
        if self.is_alone:
            return
        from pixart.pipeline.parallel import choose_layout
        from pixart.pipeline.request import passes

        count = sum(1 for _ in passes(list(requests), options.batch))
        self.layout = choose_layout(options.parallel, self.count, count, pipe, requests)
        if self.layout.is_together and options.cuda_graph == "on":
            raise ValueError(
                "--cuda-graph must be left out where processes draw a picture together, got on: a "
                "recording cannot hold what they exchange; or take --parallel pictures"
            )

    def own(self, passes: Iterable[list[Item]]) -> list[list[Item]]:
        """What this process draws of them: each its own, or all of them together."""
        passes = list(passes)
        if self.is_alone or (self.layout is not None and self.layout.is_together):
            return passes
        return passes[self.rank :: self.count]

    def share(self, pipe: "Pipeline") -> None:
        """Let the pipeline draw as was settled."""
        if self.layout is not None and self.layout.is_together:
            from pixart.sampler.mesh import Mesh

            pipe.share(Mesh(self.layout.guidance, self.layout.tokens, pipe.device))

    def collect(self, report: Report, drawn: dict[int, Any]) -> dict[int, Any]:
        """What all have drawn, by the index of its job, for the first, whose report then has it too."""
        if self.is_alone:
            return drawn
        from pixart.distributed import gathered

        own = (report.share(drawn), drawn) if self.writes else (report.share([]), {})
        for rank, (share, cells) in enumerate(gathered(own)):
            if rank != self.rank:
                report.merge(share)
                drawn = {**drawn, **cells}
        return drawn

    def collect_shards(self, report: Report) -> None:
        """The tars of all, for the first, whose report then has them too."""
        if self.is_alone:
            return
        from pixart.distributed import gathered

        for rank, share in enumerate(gathered(report.share_of_shards())):
            if rank != self.rank:
                report.merge(share)


def _check_device(device: "device") -> None:
    import os

    import torch

    if device.type not in ("cpu", "cuda") or device.index is not None:
        raise ValueError(
            f"device must be cuda or cpu for several processes, of which each takes its own, got {device}"
        )
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if device.type == "cuda" and here > there:
        raise ValueError(
            f"device must have a GPU for each of the {here} processes on this machine, got {there}; "
            f"start {there}, or take --device cpu"
        )
