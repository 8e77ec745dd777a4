"""What a user opens of a stage: whole pipelines, and the command that draws with them."""

import logging
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pixart.checkpoint.control import CONTROL
from pixart.config import EMBEDDED, PixArtConfig
from pixart.files import read_json
from pixart.pipeline.directory import INDEX, PARTS, choose_variants, open_directory
from pixart.pipeline.export import add_parts
from pixart.training.best import LINK, best_said
from pixart.training.problems import attempt, problems_of
from pixart.training.run import Run
from pixart.training.stage import DIT, DRAWN, PREVIOUS, RANDOM, ResolvedStage, Stage
from pixart.training.starts import pipeline_problems
from pixart.training.state import read_progress
from pixart.weights import without_downloads

logger = logging.getLogger("pixart")


def other_parts(stage: ResolvedStage, run: Run, config: PixArtConfig) -> Path | None:
    """The pipeline whose other parts make one of a stage's transformer: stage.pipeline, or else what it
    starts from. None, and a remark, where there is none, or its VAE, T5 or scheduler are for another."""
    reasons: list[str] = []
    for source in _sources(stage, run):
        with without_downloads():
            problems = list(_misfits(replace(stage, pipeline=source), config))
            if not problems:
                return open_directory(source, with_transformer=False)
        reasons += [f"{source}: {problem}" for problem in problems]
    why = f" ({reasons[0]})" if reasons else ""
    logger.info("stage %s: its checkpoints are transformers, no whole pipelines%s", stage.name, why)
    return None


def _sources(stage: Stage, run: Run) -> Iterator[str]:
    if stage.pipeline:
        yield stage.pipeline
    if stage.start == PREVIOUS:
        state, _ = attempt(lambda: run.previous(stage))
        if state is not None and (state / INDEX).is_file():
            yield str(state)
    elif stage.start != RANDOM and not stage.start.startswith(DIT):
        yield stage.start


def _misfits(stage: ResolvedStage, config: PixArtConfig) -> Iterator[str]:
    """Why the other parts of stage.pipeline cannot draw what the stage trains."""
    problems = list(pipeline_problems(stage, config))
    yield from problems
    if problems:
        return
    folder = open_directory(stage.pipeline, with_transformer=False)
    yield from problems_of(lambda: choose_variants(folder, None, with_transformer=False))
    scale = read_json(folder / "vae" / "config.json").get("scaling_factor", stage.vae_scale)
    if scale != stage.vae_scale:
        yield f"its VAE has the scale {scale}, the data {stage.vae_scale}"


def complete(folder: Path, parts: Path, config: PixArtConfig) -> None:
    """Make a whole pipeline of a checkpoint's folder. The training of days does not end because somebody
    has taken the other parts away."""
    if all((parts / name).is_dir() for name in PARTS):
        add_parts(folder, parts, config)
    else:
        logger.warning("%s: is gone; from here on checkpoints are transformers alone", parts)


def last_words(state: Path, stage: Stage) -> list[str]:
    """Where a checkpoint is, and the command that draws with it."""
    lines = [f"checkpoint: {state}"]
    if (opened := _pipeline_in(state)) is not None:
        lines.append(f"draw with it: {_command(stage, '--model', str(opened))}")
    elif (state / "model.safetensors").is_file():
        lines.append(
            f"transformer: {state / 'model.safetensors'}, for pixart generate --transformer"
        )
    if (state / CONTROL).is_dir():
        base = () if stage.start in (EMBEDDED, PREVIOUS) else ("--model", stage.start)
        words = _command(stage, *base, "--control", str(state), "--control-image", "PICTURE")
        lines.append(f"draw with it: {words}")
    if (state / "lora").is_dir():
        lines.append(f"adapters: {state / 'lora'}, for pixart generate --lora")
    best = best_said(read_progress(state)) if stage.validation.best else None
    if best is not None and best.metric == stage.validation.best:
        place = state.parent / LINK
        opened = _pipeline_in(place)
        draw = "" if opened is None else f"; {_command(stage, '--model', str(opened))}"
        lines.append(f"best by {best.metric}, {best.value:.4g} at step {best.step}: {place}{draw}")
    return lines


def _pipeline_in(state: Path) -> Path | None:
    places = (state / "pipeline", state)
    return next((place for place in places if (place / INDEX).is_file()), None)


def _command(stage: Stage, *arguments: str) -> str:
    """arguments: options, each before its value."""
    if stage.validation.prompts:
        prompt = stage.validation.prompts[0]
    elif DRAWN in (stage.data.source, stage.pipeline) or stage.start == EMBEDDED:
        prompt = "a large red circle on a white background"
    else:
        prompt = "a cactus with a happy face"
    # A value that begins with a dash would be taken for an option.
    given = [
        f"./{word}" if place % 2 and word.startswith("-") else word
        for place, word in enumerate(arguments)
    ]
    asked = [] if prompt.startswith("-") else [prompt]
    words = [*asked, *given]
    return " ".join([*_program("generate"), *map(shlex.quote, words)])


def _program(name: str) -> list[str]:
    """How a shell of the user's calls another command of the library: as this one was."""
    called = Path(sys.argv[0])
    if called.stem == "pixart":
        return [_short("pixart", str(called)), name]
    return [_short("python", sys.executable), "-m", f"pixart.{name}"]


def _short(name: str, path: str) -> str:
    """A program's bare name, where the shell finds this one by it."""
    found = shutil.which(name)
    same = found is not None and Path(found).absolute().parent == Path(path).absolute().parent
    return name if same or not path else shlex.quote(path)
