"""`python -m bench.studies.few_steps [--distilled NAME=RUN ...]`: does distillation draw better in few steps?

Short captions, which many scenes fit, judged by the exact checker of the embedded world: statements that hold,
pictures in which all do, and palette purity. Beside every distilled model stands the model that it was made of,
undistilled, by the same sampler, by DPM-Solver++ and by LCM without guidance, and as the 20-step teacher; all
draw the same captions from the same noise. --out keeps every verdict, and what is there is not drawn again. It
is kept/ unless another folder is named: another machine, or another model, goes on with what is committed there.
--write puts the figures into bench/results/, of which `python -m bench.report` makes the page.
"""

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start_module

    start_module("bench.studies.few_steps.__main__")

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.measure import results
from bench.measure.machine import ROOT
from bench.reporting import few_steps as reporting
from bench.studies.few_steps import ways
from bench.studies.few_steps.cases import SEEDS
from bench.studies.few_steps.record import Record, Verdict, records
from bench.studies.few_steps.summary import rows
from bench.studies.few_steps.ways import Way
from pixart.config import EMBEDDED
from pixart.evaluation.metrics.shapes import check_caption
from pixart.files import write_json
from pixart.pipeline.text_to_image import Pipeline
from pixart.progress import Bar
from pixart.shapes.purity import purity

KIND = reporting.KIND
RESULTS = ROOT / "bench" / "results" / "few-steps.json"
KEPT = Path(__file__).parent / "kept"
COUNT = reporting.COUNT
AT_ONCE = 60  # captions of a kind, before the next row's


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    teacher = Pipeline.from_pretrained(options.model, device="cpu", cache_dir=None)
    found = [*ways.of_teacher(teacher), *ways.undistilled(teacher)]
    for name, place in options.distilled:
        found += ways.distilled(name, place, teacher, options.model, options.also)
    typed = list(sys.argv[1:] if arguments is None else arguments)
    run = results.started(KIND, typed, torch.device("cpu"))
    by_name = {way.name: way for way in found}
    opened = [Record.open(options.out, way.name, way.about, run) for way in by_name.values()]
    missing = sum(max(0, options.count - one.count(kind)) for one in opened for kind in SEEDS)
    with Bar("pictures", missing) as bar:
        # Some of every row in turn: what is there when it is stopped can be compared.
        for end in [*range(AT_ONCE, options.count, AT_ONCE), options.count]:
            for way, record in zip(by_name.values(), opened, strict=True):
                for kind in SEEDS:
                    for done in _measure(way, record, kind, end, options.batch):
                        bar.advance(done, note=way.name)
    kept = records(options.out)
    print("\n\n".join(reporting.page([{**row, "run": ""} for row in rows(kept)])))
    if options.write:
        _write(kept)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{KIND}", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=KEPT, help="folder for verdicts (kept/ beside this file)")
    add("--count", type=int, default=COUNT, help=f"captions of one thing, and of pairs ({COUNT})")
    add(
        "--distilled",
        type=_named,
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="a run of training, a pipeline, a transformer or the folder of a LoRA, distilled for few steps",
    )
    add("--also", type=_counts, default=(), help="steps that it is drawn in beside its own: 1,2,4")
    add("--model", default=EMBEDDED, help="the teacher (shapes)")
    add("--batch", type=int, default=20, help="pictures denoised in one pass (20)")
    add("--threads", type=int, default=1, help="of PyTorch (1)")
    add("--write", action="store_true", help=f"what --out holds into {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    for name in ("count", "batch", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    names = [name for name, _ in options.distilled]
    if len(set(names)) < len(names):
        raise ValueError(f"--distilled must have each name once, got {', '.join(names)}")
    return options


def _named(text: str) -> tuple[str, str]:
    name, sign, place = text.partition("=")
    if not (name and sign and place):
        raise argparse.ArgumentTypeError(f"must be NAME=RUN, got {text!r}")
    return name, place


def _counts(text: str) -> tuple[int, ...]:
    counts = [int(word) if word.isdecimal() else 0 for word in text.split(",")]
    if not all(1 <= count <= 50 for count in counts):
        raise argparse.ArgumentTypeError(f"must be numbers of steps such as 1,2,4, got {text!r}")
    return tuple(counts)


def _measure(way: Way, record: Record, kind: str, count: int, batch: int) -> Iterator[int]:
    """The cases that are missing, pass by pass; how many each was."""
    for begin in range(record.count(kind), count, batch):
        numbers = range(begin, min(begin + batch, count))
        began, verdicts = time.monotonic(), []
        for drawn in way.pipe.draw_many(way.requests(kind, numbers), batch=batch):
            picture = np.asarray(drawn.image)
            holds = check_caption(picture, drawn.request.prompt).holds
            verdicts.append(Verdict(sum(holds), len(holds), purity(picture)))
        record.add(kind, verdicts, time.monotonic() - began)
        yield len(numbers)


def _write(kept: Sequence[Record]) -> None:
    """A run for each command that drew some of the rows."""
    made, content = rows(kept), None
    for key in dict.fromkeys(one.key for one in kept):
        own = [one for one in kept if one.key == key]
        names = {one.name for one in own}
        whole = all(one.count(kind) >= COUNT for one in own for kind in SEEDS)
        run = {**own[0].run, "seconds": round(sum(one.run["seconds"] for one in own), 1)}
        run |= {"rows": [row for row in made if row["variant"] in names], "complete": whole}
        content = results.merged(content, KIND, results.plain(run), one_machine=False)
    write_json(RESULTS, content, indent=1)
    print(f"\n{RESULTS}\nrun python -m bench.report")
