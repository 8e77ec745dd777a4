"""How well a model of the embedded world follows captions: `python -m pixart.evaluation.caption_accuracy`.

Every figure in the model card is printed by this command. Captions are drawn from their own seed;
each picture is read by the exact checker.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from pixart.pipeline.text_to_image import Pipeline
from pixart.sampler.loop import Captions, initial_noise, sample, seed_generators
from pixart.sampler.schedulers import make_scheduler
from pixart.shapes.caption import KINDS, Statement, describe, parse
from pixart.shapes.checker import check
from pixart.shapes.scene import HELD_OUT, sample_scene
from pixart.text.encoder import PromptEmbeddings
from pixart.vae.autoencoder import to_images


@dataclass(frozen=True)
class Task:
    """A set of captions: `kind` of scene at `size` pixels. held_out: the first thing is one of
    the combinations of shape and colour that training never showed."""

    kind: str
    size: int
    held_out: bool = False
    count: int = 300

    @property
    def name(self) -> str:
        return f"{self.kind}{', unseen combination' if self.held_out else ''}, {self.size} px"


@dataclass
class Accuracy:
    """Captions of which every statement held, and by kind of statement (right, of)."""

    task: Task
    right: int = 0
    of: int = 0
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def share(self) -> float:
        return self.right / max(1, self.of)


def captions(task: Task, seed: int) -> list[str]:
    """Full captions (no clause left out; a pair states its relation), the same for the same seed."""
    rng = random.Random(f"{seed}/{task.kind}/{task.held_out}")
    texts = [
        describe(sample_scene(rng, task.kind, task.held_out), rng, omit=0.0, apart=0.0)
        for _ in range(task.count)
    ]
    return texts


def draw_captions(
    pipe: Pipeline,
    texts: list[str],
    size: int,
    *,
    seed: int,
    steps: int,
    guidance: float,
    batch: int,
) -> Iterator[torch.Tensor]:
    """Pictures (height, width, 3) uint8 of the captions, several at a time."""
    pipe.transformer.to(pipe.device)
    null = pipe.text_encoder.encode([""])
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        given = pipe.text_encoder.encode(part)
        unconditional = null[[0] * len(part)]
        embeddings = {
            "conditional": given,
            "unconditional": unconditional,
            "both": PromptEmbeddings.concatenate([unconditional, given]),
        }

        def denoise(
            latents: torch.Tensor,
            timesteps: torch.Tensor,
            which: Captions,
            /,
            given: dict = embeddings,
        ) -> torch.Tensor:
            return pipe.transformer(latents, timesteps, given[which].features, given[which].mask)

        generators = seed_generators(range(seed + start, seed + start + len(part)))
        side = size // pipe.vae.downsample
        noise = initial_noise(
            (pipe.transformer.config.in_channels, side, side), generators, pipe.device
        )
        scheduler = make_scheduler(None, pipe.scheduler_config)
        latents = sample(denoise, noise, scheduler, steps, guidance=guidance, generators=generators)
        yield from pipe.vae.decode(latents, tile=False)


def measure(
    pipe: Pipeline, task: Task, *, seed: int, steps: int, guidance: float, batch: int = 25
) -> Accuracy:
    """Draw a task's captions and check every statement."""
    import numpy as np

    result = Accuracy(task)
    right: Counter[str] = Counter()
    of: Counter[str] = Counter()
    texts = captions(task, seed)
    drawn = draw_captions(
        pipe, texts, task.size, seed=seed, steps=steps, guidance=guidance, batch=batch
    )
    for text, picture in tqdm(
        zip(texts, drawn, strict=True), total=len(texts), desc=task.name, leave=False
    ):
        statements: list[Statement] = parse(text)
        holds = check(np.asarray(to_images(picture[None])[0]), statements)
        holds = holds or [False] * len(statements)
        result.right += all(holds)
        result.of += 1
        for statement, held in zip(statements, holds, strict=True):
            right[statement.kind] += held
            of[statement.kind] += 1
    result.by_kind = {kind: (right[kind], of[kind]) for kind in KINDS if of[kind]}
    return result


def tasks(native: int, count: int) -> list[Task]:
    """The model card's table: each kind of scene at the native size, unseen combinations, and one
    thing at double the size (fewer: each takes four times as long)."""
    known = [Task(kind, native, count=count) for kind in ("one", "pair", "group")]
    unseen = [Task(kind, native, held_out=True, count=count) for kind in ("one", "pair")]
    return [
        *known,
        *unseen,
        Task("one", native * 2, count=max(1, count // 3)),
    ]


def table(results: list[Accuracy]) -> str:
    """The results as a Markdown table, percentages."""
    kinds = [kind for kind in KINDS if any(kind in r.by_kind for r in results)]
    lines = [
        "| captions | all right | " + " | ".join(kinds) + " |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for r in results:
        cells = [
            f"{100 * r.by_kind[k][0] / r.by_kind[k][1]:.1f}" if k in r.by_kind else ""
            for k in kinds
        ]
        lines.append(
            f"| {r.of} × {r.task.name} | **{100 * r.share:.1f} %** | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def main(
    model: str = "shapes",
    count: int = 300,
    seed: int = 1_000_000,
    steps: int = 20,
    guidance: float = 4.5,
    sizes: tuple[int, ...] = (),
    dtype: Literal["fp32", "bf16"] = "fp32",
    json_file: Path | None = None,
) -> None:
    """Measure caption accuracy of the embedded model or of another of its kind.

    sizes: sides in pixels of further one-object tasks; default the card's table.
    """
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    pipe = Pipeline.from_pretrained(model, dtype=precision, cache_dir=None)
    chosen = [Task("one", size, count=count) for size in sizes] or tasks(pipe.native, count)
    results = [measure(pipe, t, seed=seed, steps=steps, guidance=guidance) for t in chosen]
    print(table(results))
    print(f"unseen combinations: {', '.join(f'{c} {s}' for s, c in sorted(HELD_OUT))}")
    if json_file is not None:
        settings = {"seed": seed, "steps": steps, "guidance": guidance, "dtype": dtype}
        report = {**settings, "results": [asdict(result) for result in results]}
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def read_report(file: Path) -> tuple[dict[str, Any], list[Accuracy]]:
    """The settings and the results that `--json-file` wrote."""
    report = json.loads(file.read_text())
    results = [
        Accuracy(
            Task(**r["task"]),
            r["right"],
            r["of"],
            {k: (v[0], v[1]) for k, v in r["by_kind"].items()},
        )
        for r in report.pop("results")
    ]
    return report, results


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m pixart.evaluation.caption_accuracy"))
