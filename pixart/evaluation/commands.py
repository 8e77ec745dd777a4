"""What the commands of `python -m pixart.evaluate` do: each returns what is printed, in words and as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart import process
from pixart.evaluation.needs import MissingError
from pixart.evaluation.options import (
    SAMPLING,
    Accuracy,
    Changes,
    CheckWeights,
    Compare,
    Detect,
    Draw,
    List,
    Networks,
    Prompts,
    Report,
    Run,
    Score,
    Statistics,
    Trust,
)
from pixart.files import listed

if TYPE_CHECKING:
    from pixart.evaluation.protocols.protocol import Protocol
    from pixart.evaluation.running.opening import Given
    from pixart.evaluation.running.run import DrawnPictures

MOST = 1_000_000  # captions; all are made before the first picture


@dataclass(frozen=True)
class Said:
    """What a command prints: text, or values as JSON with --json."""

    text: str
    values: Mapping[str, Any]
    failed: str = ""  # what went wrong all the same, for the exit code


def list_(options: List) -> Said:
    """What there is, what it needs, and whether it runs now."""
    from pixart.device import choose_device
    from pixart.evaluation.listing import listing, listing_json, listing_text
    from pixart.evaluation.metric import Context

    found = listing(Context(choose_device("cpu"), options.weights), options.protocols)
    return Said(listing_text(found), listing_json(found))


def prompts(options: Prompts) -> Said:
    """Write prompts.jsonl."""
    from pixart.evaluation.prompt_sets.making import save_prompts

    made = save_prompts(options.set, options.output, options.source, options.count, options.seed)
    count = len(made.prompts)
    lines = [f"{count:,} prompts of {options.set}: see {options.output}", *made.notes]
    values = {"file": str(options.output), "prompts": count, "notes": made.notes}
    return Said("\n".join(lines), {**values, "source_sha256": made.source_sha256})


def draw(options: Draw) -> Said:
    """Draw pictures."""
    from pixart.evaluation.running.drawing import Shard
    from pixart.evaluation.running.run import Asked
    from pixart.evaluation.running.run import draw as draw_pictures

    shard = Shard.parse(options.shard)
    asked = Asked.of(_protocol(options), options.set)
    done = draw_pictures(asked, options, options.output, shard)
    return Said(_drawn(done, options.output), asdict(done))


def _drawn(done: "DrawnPictures", output: Path) -> str:
    left = f", {done.left:,} are left to others" if done.left else ""
    there = f"{done.total - done.left:,} of {done.total:,} are there"
    return f"{done.drawn:,} pictures drawn, {there}{left}: see {output}"


def _protocol(options: Changes, metrics: str | None = None) -> "Protocol":
    from pixart.evaluation.protocols.protocol import load_protocol

    return load_protocol(options.protocol).changed(  # type: ignore[attr-defined]
        count=options.count,
        size=options.size,
        steps=options.steps,
        guidance=options.guidance,
        scheduler=options.scheduler,
        images_per_prompt=options.images_per_prompt,
        metrics=names(metrics) if metrics is not None else None,
    )


def score(options: Score) -> Said:
    """Score pictures that are there; the numbers go to results.json."""
    from pixart.evaluation.protocols.protocol import Use
    from pixart.evaluation.running.opening import check_needs, open_metrics
    from pixart.evaluation.running.results import IMAGES, PROTOCOL
    from pixart.evaluation.running.run import Pictures, check_reference
    from pixart.evaluation.running.run import score as score_pictures

    uses = [Use(name) for name in names(options.metrics)]
    images = options.images
    own = options.output / PROTOCOL, options.output / IMAGES
    if images is not None and options.prompts is None and own[0].is_file():
        images = None if images.resolve() == own[1].resolve() else images  # what `draw` drew there
    if images is None:
        if options.prompts is not None:
            raise ValueError("--prompts goes with --images, got it alone")
        pictures = Pictures.drawn(options.output)
        uses = list(pictures.protocol.changed(metrics=[use.name for use in uses]).metrics)
    metrics = open_metrics(uses, _given(options, options.device))
    check_needs(metrics)
    if images is not None:
        check_apart(images, options.output)
        unread = not any(metric.reads_prompts for metric in metrics)
        pictures = Pictures.others(images, options.prompts, options.samples, uses, unread=unread)
    check_reference(pictures.protocol, metrics, options.reference)
    results = score_pictures(
        pictures,
        metrics,
        options.output,
        reference=options.reference,
        name=options.name or (images.resolve().name if images else None),
        allow_missing=options.allow_missing,
    )
    return said_of(results, options.output)


def check_apart(images: Path, output: Path) -> None:
    """ValueError if results would lie among pictures."""
    if images.resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"--output must not lie in --images, got {output} in {images}")


def _given(options: Networks, device: str | None) -> "Given":
    from pixart.evaluation.running.opening import Given

    files = {name: Path(value) for name, value in pairs("--file", options.file).items()}
    return Given(device, options.weights, options.judge, files, pairs("--option", options.option))


def run(options: Run) -> Said:
    """Draw, score and report; of one model, or of all variants."""
    if options.variants is not None:
        from pixart.evaluation.running.several import run_variants

        return Said(*run_variants(options, lambda own: _told(run(own))))
    from pixart.evaluation.report import write_report
    from pixart.evaluation.running.drawing import Shard
    from pixart.evaluation.running.record import writing
    from pixart.evaluation.running.run import run_protocol

    shard = Shard.parse(options.shard)
    done = run_protocol(
        _protocol(options, options.metrics),
        options,
        _given(options, options.device),
        options.output,
        set_file=options.set,
        reference=options.reference,
        name=options.name,
        shard=shard,
        allow_missing=options.allow_missing,
    )
    if done.results is None:
        return Said(_drawn(done.pictures, options.output), asdict(done.pictures))
    with writing(options.output):
        page = write_report([options.output])
    said = said_of(done.results, options.output)
    return Said(f"{said.text}\nreport: {page}", said.values)


def report(options: Report) -> Said:
    """Write pages of results."""
    from pixart.evaluation.report import write_report

    page = write_report(options.folders, options.output)
    return Said(f"report: {page}", {"report": str(page)})


def compare(options: Compare) -> Said:
    """Compare two folders of results."""
    from pixart.evaluation.comparing.compare import (
        PAGE,
        compare_folders,
        comparison_folder,
        comparison_text,
    )

    found = compare_folders(options.a, options.b, options.output, pair_sets=options.pair_sets)
    page = (options.output or comparison_folder(options.a, options.b)) / PAGE
    return Said(f"{comparison_text(found)}\nreport: {page}", found.values())


def statistics(options: Statistics) -> Said:
    """Write a file of statistics of real pictures."""
    from pixart.device import choose_device
    from pixart.evaluation.distances.reference import write_statistics
    from pixart.evaluation.metric import Context
    from pixart.evaluation.networks import open_extractor
    from pixart.files import check_writable

    context = Context(choose_device(options.device), options.weights)
    extractors = [open_extractor(name, context) for name in names(options.features)]
    if needs := {str(need): need for one in extractors for need in one.needs()}:
        raise MissingError(options.features, needs.values())
    check_writable(options.output)
    process.at_work()
    kept = options.keep_features
    count = write_statistics(options.reference, extractors, options.output, keep_features=kept)
    values = {"file": str(options.output), "pictures": count, "features": names(options.features)}
    return Said(f"statistics of {count:,} pictures: see {options.output}", values)


def trust(options: Trust) -> Said:
    """Measure metrics against the exact checker."""
    from pixart.evaluation.report.writing import PAGE
    from pixart.evaluation.trust.against_checker import trust as measure

    results = measure(
        options.output,
        names(options.metrics) if options.metrics else (),
        count=options.count,
        seed=options.seed,
        given=_given(options, options.device),
        model=options.with_model,
        model_count=options.model_count,
    )
    sentences = [block["sentence"] for block in results["metrics"].values()]
    return Said("\n".join([*sentences, f"report: {options.output / PAGE}"]), results)


def _told(said: Said) -> tuple[str, Mapping[str, Any]]:
    return said.text, said.values


def check_weights(options: CheckWeights) -> Said:
    """Check the weights in a folder; a failure if one of them is not what was published."""
    from pixart.device import choose_device
    from pixart.evaluation.metric import Context
    from pixart.evaluation.networks.check_weights import FAIL, as_text
    from pixart.evaluation.networks.check_weights import check_weights as check

    rows = check(options.folder, Context(choose_device(options.device)))
    wrong = [row.what for row in rows if row.verdict == FAIL]
    failed = f"{options.folder}: is not what was published: {listed(wrong)}" if wrong else ""
    return Said(as_text(rows), {"checks": [asdict(row) for row in rows]}, failed)


def said_of(results: Mapping[str, Any], output: Path) -> Said:
    """The numbers, a line each with its interval, the id of how they were made, and the paper's table."""
    from pixart.evaluation.protocols.published import table_text
    from pixart.evaluation.running.results import distinct_names

    blocks = {metric: block["values"] for metric, block in results["metrics"].items()}
    lines = [
        f"{called}: {_number(blocks[metric][name])} {results['metrics'][metric]['unit']}".rstrip()
        for (metric, name), called in distinct_names(blocks).items()
    ]
    told = f"protocol {results['protocol']['id']}, {results['pictures']} pictures"
    errors = f", {results['errors']} left out" if results["errors"] else ""
    paper = ["", table_text(results["paper"]), ""] if results.get("paper") else []
    return Said("\n".join([*lines, *paper, f"{told}{errors}: see {output}"]), results)


def _number(value: Mapping[str, Any]) -> str:
    ends = ("?" if value[end] is None else f"{value[end]:.4g}" for end in ("low", "high"))
    return f"{value['value']:.4g} [{', '.join(ends)}]"


def names(text: str) -> list[str]:
    """Of metrics, with commas between them. ValueError for none, and for one that is there twice."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ValueError(f"metrics must be named, such as shapes,clip, got {text!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"each metric must be named once, got {text}")
    return found


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE of each. ValueError for what has no name, and for a name that is there twice."""
    found: dict[str, str] = {}
    for one in given:
        name, between, value = one.partition("=")
        if not (name and between) or name in found:
            raise ValueError(f"{option} must be NAME=VALUE, each name once, got {one!r}")
        found[name] = value
    return found


def detect(options: Detect) -> Said:
    """Write detections.jsonl."""
    from pixart.evaluation.detecting.detectors import detect_folder

    count, detector = detect_folder(
        options.detector,
        options.images,
        options.prompts,
        options.output,
        colours=options.colours,
        weights=options.weights,
        device=options.device,
    )
    text = f"{count:,} pictures, by {detector}: see {options.output}"
    return Said(text, {"file": str(options.output), "pictures": count, "detector": detector})


def accuracy(options: Accuracy) -> Said:
    """Draw and check captions of the embedded world, and write the results if a file is named."""
    import torch

    from pixart.evaluation.caption_accuracy import evaluate
    from pixart.files import check_writable, write_json
    from pixart.pipeline.text_to_image import Pipeline

    file = options.json_file
    if not 1 <= options.count <= MOST:
        raise ValueError(f"--count must be from 1 to {MOST:,}, got {options.count}")
    if file is not None and file.is_dir():
        raise ValueError(f"--json-file must be a file, got the folder {file}")
    if file is not None:
        check_writable(file)
    like = options.like  # refused before a model is opened
    pipe = Pipeline.from_pretrained(
        options.model,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype],
        device=options.device,
        attention=options.attention,
        cache_dir=None,
    )
    text, values = evaluate(pipe, options)
    used = pipe.resolve(like)
    settings = {name: getattr(used, name) for name in ("seed", *SAMPLING)}
    values = {**settings, "dtype": options.dtype, "attention": options.attention, **values}
    if file is not None:
        process.at_work()
        write_json(file, values, indent=2)
    return Said(text, values)


COMMANDS: dict[type, Callable[[Any], Said]] = {
    List: list_,
    Prompts: prompts,
    Draw: draw,
    Score: score,
    Run: run,
    Report: report,
    Compare: compare,
    Statistics: statistics,
    Detect: detect,
    Trust: trust,
    Accuracy: accuracy,
    CheckWeights: check_weights,
}
