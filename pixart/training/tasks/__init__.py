"""What a stage can train: a module each, named in TASKS by what it trains and where its data come from.

Another one is a file here, a line in TASKS and a recipe. The file has

    check(stage)               what is wrong with the fields of a stage, a line each
    check_files(stage, run)    what is not there, or does not fit, a line each; reads, and writes nothing
    plan(stage, run)           what the stage will cost, in words
    build(stage, run)          the Task that the trainer advances, as the stage begins
"""

from collections.abc import Iterator
from typing import Protocol

from pixart.training.run import Run
from pixart.training.stage import (
    CLIP,
    CONTROLNET,
    DECODER,
    DRAWN,
    LCM,
    TDM,
    ResolvedStage,
    Stage,
)
from pixart.training.tasks import (
    autoencoder,
    controlnet,
    prepared_distilling,
    shapes,
    shapes_clip,
    shapes_control,
    shapes_distilling,
    text_encoder,
    transformer,
)
from pixart.training.trainer import Task

PREPARED = "prepared"


class TaskModule(Protocol):
    """What each of these modules has."""

    def check(self, stage: Stage) -> Iterator[str]: ...

    def check_files(self, stage: ResolvedStage, run: Run) -> Iterator[str]: ...

    def plan(self, stage: ResolvedStage, run: Run) -> str: ...

    def build(self, stage: ResolvedStage, run: Run) -> Task: ...


TASKS: dict[tuple[str, str], TaskModule] = {
    ("transformer", PREPARED): transformer,
    ("transformer", DRAWN): shapes,
    ("autoencoder", DRAWN): autoencoder,
    (DECODER, DRAWN): autoencoder,
    ("text_encoder", DRAWN): text_encoder,
    (CLIP, DRAWN): shapes_clip,
    (CONTROLNET, PREPARED): controlnet,
    (CONTROLNET, DRAWN): shapes_control,
    (TDM, PREPARED): prepared_distilling,
    (TDM, DRAWN): shapes_distilling,
    (LCM, PREPARED): prepared_distilling,
    (LCM, DRAWN): shapes_distilling,
}


def task_of(stage: Stage) -> TaskModule:
    """What trains a stage. Raises ValueError where nothing does."""
    source = DRAWN if stage.data.source == DRAWN else PREPARED
    if (stage.trains, source) in TASKS:
        return TASKS[stage.trains, source]
    names = sorted({trains for trains, _ in TASKS})
    if stage.trains not in names:
        raise ValueError(f"trains must be one of {', '.join(names)}, got {stage.trains!r}")
    wanted = f'"{DRAWN}"' if source == PREPARED else "prepared data"
    raise ValueError(
        f"data.source must be {wanted} where trains is {stage.trains}, got {stage.data.source!r}"
    )
