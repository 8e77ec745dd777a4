"""How well a model of the embedded world follows captions.

Every figure in the model card is measured by this, with `python -m pixart.evaluate accuracy`. Captions
are drawn from their own seed; each picture is read by the exact checker.
"""

import random
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.evaluation.metrics.shapes import check_caption
from pixart.evaluation.options import Settings
from pixart.files import read_json
from pixart.pipeline.request import Request
from pixart.progress import counted
from pixart.shapes.caption import KINDS, describe
from pixart.shapes.edges import measure as edges_of
from pixart.shapes.scene import HELD_OUT, sample_scene

if TYPE_CHECKING:
    from pixart.pipeline.text_to_image import Pipeline

BATCH = 25  # pictures denoised in one pass


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
    """Captions of which every statement held, and by kind of statement (right, of).

    clean: pictures with as many things as stated, all of clean outlines, and nothing lying about.
    overlap: median over all things of the overlap with the ideal shape; see pixart.shapes.edges. None
    in reports from before it was measured.
    """

    task: Task
    right: int = 0
    of: int = 0
    by_kind: dict[str, tuple[int, int]] = field(default_factory=dict)
    clean: int | None = None
    overlap: float | None = None

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


def requests(task: Task, like: Request) -> list[Request]:
    """What to draw for a task: the captions of `like.seed` at its size, otherwise as `like`; picture k
    has the seed `like.seed` + k."""
    like = replace(like, height=task.size, width=task.size, batched=True, tile=False)
    texts = captions(task, like.seed)
    return [replace(like, prompt=text, seed=like.seed + k) for k, text in enumerate(texts)]


def measure(pipe: "Pipeline", task: Task, like: Request, *, batch: int = BATCH) -> Accuracy:
    """Draw a task's captions, as `requests` has them, and check every statement."""
    import numpy as np

    result = Accuracy(task)
    right: Counter[str] = Counter()
    of: Counter[str] = Counter()
    overlaps: list[float] = []
    result.clean = 0
    asked = requests(task, like)
    pictures = pipe.draw_many(asked, batch=batch)
    for drawn in counted(pictures, task.name, len(asked)):
        picture = np.asarray(drawn.image)
        checked = check_caption(picture, drawn.request.prompt)
        edges = edges_of(picture)
        overlaps += edges.overlaps
        result.clean += edges.are_clean and checked.has_count
        result.right += checked.is_right
        result.of += 1
        for kind in KINDS:
            right[kind] += sum(checked.of_kind(kind))
            of[kind] += len(checked.of_kind(kind))
    result.overlap = float(np.median(overlaps)) if overlaps else 0.0
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
    """The results as a Markdown table, percentages; the overlap of outlines is from 0 to 1."""
    kinds = [kind for kind in KINDS if any(kind in r.by_kind for r in results)]
    edges = ["clean", "overlap"] if any(r.overlap is not None for r in results) else []
    columns = ["captions", "all right", *kinds, *edges]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for r in results:
        counts = [r.by_kind.get(kind) for kind in kinds]
        cells = [f"{100 * c[0] / c[1]:.1f}" if c else "" for c in counts]
        if edges:
            cells.append("" if r.clean is None else f"{100 * r.clean / max(1, r.of):.1f}")
            cells.append("" if r.overlap is None else f"{r.overlap:.3f}")
        cells = [f"{r.of} × {r.task.name}", f"**{100 * r.share:.1f} %**", *cells]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def evaluate(pipe: "Pipeline", settings: Settings) -> tuple[str, dict[str, Any]]:
    """What `pixart evaluate accuracy` tells: the table, and the results for `read_report`."""
    chosen = [Task("one", size, count=settings.count) for size in settings.sizes]
    results = [
        measure(pipe, task, settings.like) for task in chosen or tasks(pipe.native, settings.count)
    ]
    unseen = ", ".join(f"{colour} {shape}" for shape, colour in sorted(HELD_OUT))
    text = f"{table(results)}\nunseen combinations: {unseen}"
    return text, {"results": [asdict(result) for result in results]}


def read_report(file: Path) -> tuple[dict[str, Any], list[Accuracy]]:
    """The settings and the results that `pixart evaluate accuracy --json-file` wrote."""
    report = read_json(file)
    results = [
        Accuracy(
            Task(**r["task"]),
            r["right"],
            r["of"],
            {k: (v[0], v[1]) for k, v in r["by_kind"].items()},
            r.get("clean"),
            r.get("overlap"),
        )
        for r in report.pop("results")
    ]
    return report, results
