"""Draws and scores: what `draw`, `score` and `run` do, and what they write into the folder of results."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart import process
from pixart.evaluation.metric import Metric
from pixart.evaluation.needs import MissingError
from pixart.evaluation.options import Model
from pixart.evaluation.prompt_sets.files import check_size, read_prompts
from pixart.evaluation.prompt_sets.making import make_prompts
from pixart.evaluation.prompt_sets.shapes import drawn_scenes
from pixart.evaluation.protocols.protocol import Protocol, Use
from pixart.evaluation.protocols.published import with_paper
from pixart.evaluation.running import results as kept
from pixart.evaluation.running.drawing import Drawing, Shard, is_whole, open_pipeline, shown_name
from pixart.evaluation.running.opening import (
    Given,
    check_needs,
    compares_sets,
    identities_of,
    open_metrics,
)
from pixart.evaluation.running.record import (
    LOCKS,
    note_run,
    prompts_digest,
    protocol_of,
    write_record,
    writing,
)
from pixart.evaluation.running.scoring import Reference, Scoring, identities
from pixart.evaluation.running.shape import check_results
from pixart.evaluation.store.entries import Prompt
from pixart.evaluation.store.folders import (
    Found,
    find_pictures,
    kinds_of,
    reference_pictures,
)
from pixart.files import check_writable, listed, read_json, sha256_of, write_json, written_aside
from pixart.progress import say

# Of protocol.json: what stands elsewhere in results.json.
_NOT_TWICE = ("model", "weights", "paper", "differs")


@dataclass(frozen=True)
class Asked:
    """A protocol with its prompts: what is drawn. set_file: the file or folder of the prompt set."""

    protocol: Protocol
    prompts: tuple[Prompt, ...]

    @classmethod
    def of(
        cls, protocol: Protocol, set_file: Path | None, metrics: Sequence[Metric] = ()
    ) -> "Asked":
        """MissingError with all that prompts and metrics lack."""
        try:
            made = make_prompts(protocol.set, set_file, protocol.count, protocol.prompt_seed)
        except MissingError as error:
            check_needs(metrics, error.needs, f"{protocol.name}, prompt set {protocol.set}")
            raise
        check_needs(metrics)
        for note in made.notes:
            say(note)
        return cls(protocol, made.prompts)


@dataclass(frozen=True)
class DrawnPictures:
    """What `draw` did. left: pictures that other processes have still to draw."""

    drawn: int
    left: int
    total: int


def draw(asked: Asked, model: Model, output: Path, shard: Shard) -> DrawnPictures:
    """Draw the pictures of a protocol into `output`. ValueError if the folder is about something else."""
    check_writable(output / kept.RESULTS)
    pipe = open_pipeline(model)
    drawing = Drawing(pipe, model, asked.protocol, asked.prompts, output / kept.IMAGES)
    record = asked.protocol.record(
        prompts=len(asked.prompts),
        prompts_sha256=prompts_digest(asked.prompts),
        model=shown_name(model),
        weights=dict(pipe.weights),
        **drawing.facts(),
    )
    process.at_work()
    write_record(output, asked.prompts, record, draws=True)
    note_run(output, drawn_on=pipe.device.type)
    drawn = drawing.run(shard, output / LOCKS)
    return DrawnPictures(drawn, drawing.missing(), len(drawing.entries))


@dataclass(frozen=True)
class Pictures:
    """What is scored. record: for protocol.json."""

    protocol: Protocol
    found: Found
    record: Mapping[str, Any]
    images: Path

    @classmethod
    def drawn(cls, output: Path) -> "Pictures":
        """What `draw` put there, or what was scored there before. ValueError where there is neither."""
        file = output / kept.PROTOCOL
        if not file.is_file():
            raise ValueError(
                f"{output}: must hold what `draw` or `run` drew, it has no {kept.PROTOCOL}; give --images"
            )
        record = kept.read_record(file)
        try:
            protocol = protocol_of(record)
            size = _size_of(record)
        except ValueError as error:
            raise ValueError(f"{file}: {error}; name another --output, and draw again") from error
        prompts = read_prompts(output / kept.PROMPTS)
        if prompts_digest(prompts) != record.get("prompts_sha256"):
            raise ValueError(
                f"{output / kept.PROMPTS}: must hold the prompts that were drawn, it was changed; name another "
                "--output, or give it as --prompts with --images"
            )
        images = output / kept.IMAGES
        if not images.is_dir() and (output / kept.RUN).is_file():
            images = Path(str(read_json(output / kept.RUN).get("images", images)))
        found = find_pictures(images, prompts, protocol.images_per_prompt)
        return cls(protocol, _with_size(found, size), record, images)

    @classmethod
    def others(
        cls,
        images: Path,
        prompts: Path | None,
        samples: int | None,
        uses: Sequence[Use],
        *,
        unread: bool = False,
    ) -> "Pictures":
        """Pictures of others, with their prompts. unread: no metric reads these, they may be unknown."""
        read = read_prompts(prompts) if prompts else None
        found = find_pictures(images, read, samples, unread=unread)
        sets = sorted({one.set for one in found.prompts if one.set})
        protocol = Protocol(
            "pictures",
            "Pictures of a folder",
            sets[0] if len(sets) == 1 else "jsonl",
            len(found.prompts),
            tuple(uses),
            images_per_prompt=found.samples,
        )
        record = protocol.record(
            prompts=len(found.prompts), prompts_sha256=prompts_digest(found.prompts)
        )
        return cls(protocol, found, record, images)


def _size_of(record: Mapping[str, Any]) -> str | None:
    """The size of pictures that were drawn, None of those of others. ValueError for what is none."""
    resolved = record.get("resolved")
    if resolved is None:
        return None
    size = resolved.get("size") if isinstance(resolved, dict) else None
    check_size("resolved", str(size))
    return str(size)


def _with_size(found: Found, size: str | None) -> Found:
    """Entries that know which size they must have."""
    entries = tuple(
        replace(one, prompt=replace(one.prompt, size=one.prompt.size or size))
        for one in found.entries
    )
    return replace(found, entries=entries)


def score(
    pictures: Pictures,
    metrics: Sequence[Metric],
    output: Path,
    *,
    reference: Path | None = None,
    name: str | None = None,
    allow_missing: bool = False,
) -> dict[str, Any]:
    """Score pictures and write results.json into `output`; returns what it says. Numbers of before, of
    metrics that are not asked for now, stay, if the pictures are the same."""
    check_needs(metrics)
    check_writable(output / kept.RESULTS)
    found = pictures.found
    if found.extra:
        say(
            f"{len(found.extra)} pictures belong to no prompt and are left aside ({listed(found.extra)})"
        )
    against = _reference(reference, pictures, metrics, output)
    process.at_work()
    write_record(output, found.prompts, pictures.record, draws=False)
    scoring = Scoring(output, found, metrics, against)
    blocks = scoring.run(allow_missing=allow_missing)
    digest = _pictures_digest(found)
    before = _before(output, digest)
    reference_digest = (
        against.digest if against else before.get("protocol", {}).get("reference_digest")
    )
    # In the order of before: a metric that is scored again makes no other protocol.
    stay = {**_kept_blocks(before, reference_digest, blocks), **blocks}
    blocks = {name: stay[name] for name in {**before.get("metrics", {}), **stay} if name in stay}
    protocol = pictures.protocol.changed(metrics=[*blocks])
    record = {**pictures.record, **protocol.record()}
    record["reference_digest"] = reference_digest
    if not record.get("resolved"):  # pictures of others: what was drawn has its size, in PNG
        record["files"] = kinds_of(found.entries)
    record["id"] = protocol.id(
        record["prompts_sha256"],
        identities_of(blocks),
        {name: record.get(name) for name in ("model_options", "resolved", "files")},
        reference_digest,
    )
    results = {
        "version": kept.VERSION,
        "protocol": {key: one for key, one in record.items() if key not in _NOT_TWICE},
        "model": name or record.get("model") or before.get("model"),
        "weights": record.get("weights", {}),
        "pictures": scoring.pictures,
        "errors": max(scoring.failed, *(one.get("left_out", 0) for one in blocks.values())),
        "metrics": blocks,
    }
    results = with_paper(protocol, results)
    note_run(output, images=str(pictures.images.resolve()), pictures=digest)
    with writing(output):
        write_json(output / kept.PROTOCOL, record, indent=2)
        write_json(output / kept.RESULTS, results, indent=2)
    return results


def check_reference(protocol: Protocol, metrics: Sequence[Metric], reference: Path | None) -> None:
    """ValueError where a metric compares sets and there is nothing to compare with."""
    sets = compares_sets(metrics)
    if reference is not None and not reference.exists():
        raise FileNotFoundError(f"--reference: no such file or folder: {reference}")
    if sets and reference is None and protocol.reference != "scenes":
        raise ValueError(
            f"{', '.join(sets)} must have pictures to compare with; give --reference, a folder or what "
            "`pixart evaluate statistics` wrote"
        )


def _reference(
    path: Path | None, pictures: Pictures, metrics: Sequence[Metric], output: Path
) -> Reference | None:
    if not compares_sets(metrics):
        return None
    check_reference(pictures.protocol, metrics, path)
    if path is None:
        own = pictures.protocol
        found = reference_pictures(_draw_scenes(own, output / "scenes"))
        categories = {one.id: one.id.rpartition("-")[0] for one in found.prompts}
        # What draws them, and not their files: PNG has other bytes with another zlib.
        digest = f"scenes {own.prompt_seed + 1}, {own.count} of {own.size}"
        return Reference(found, digest=digest, categories=categories)
    if path.is_file():
        return Reference(file=path, digest=sha256_of(path))
    prompts = pictures.found.prompts
    categories = {one.reference: one.category for one in prompts if one.reference is not None}
    named = all(one.reference is not None for one in prompts)
    found = reference_pictures(path, categories if named else None)
    return Reference(found, digest=_pictures_digest(found), categories=categories)


def _draw_scenes(protocol: Protocol, folder: Path) -> Path:
    """Scenes of the embedded world, of the kinds that the prompts are of, and not the same ones."""
    width, height = check_size("size", protocol.size or "128x128")
    if width != height:
        raise ValueError(f"size must be a square for scenes to compare with, got {protocol.size}")
    for name, image in drawn_scenes(protocol.count, width, protocol.prompt_seed + 1):
        path = folder / f"{name}.png"
        if not is_whole(path):
            with written_aside(path, durable=False) as aside:
                image.save(aside, format="PNG")
    return folder


def _pictures_digest(found: Found) -> str:
    """Tells pictures from others, wherever they lie."""
    lines = (f"{key} {one}\n" for key, one in sorted(identities(found.entries).items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _before(output: Path, digest: str) -> dict[str, Any]:
    """The results of before, if they are of the same pictures."""
    run, file = output / kept.RUN, output / kept.RESULTS
    if not (run.is_file() and file.is_file()) or read_json(run).get("pictures") != digest:
        return {}
    results = read_json(file)
    if results.get("version") != kept.VERSION:
        return {}
    check_results(str(file), results)
    return results


def _kept_blocks(
    before: Mapping[str, Any], reference_digest: str | None, now: Mapping[str, Any]
) -> dict[str, Any]:
    """Metrics of before that stay: of sets, only those of the same reference."""
    same = before.get("protocol", {}).get("reference_digest") == reference_digest
    blocks = before.get("metrics", {}).items()
    return {
        name: {key: one for key, one in block.items() if key != "paper"}
        for name, block in blocks
        if name not in now and (block.get("per_picture") or same)
    }


@dataclass(frozen=True)
class RunResult:
    """What `run` did. results: None while pictures are left to others."""

    pictures: DrawnPictures
    results: dict[str, Any] | None


def run_protocol(
    protocol: Protocol,
    model: Model,
    given: Given,
    output: Path,
    *,
    set_file: Path | None = None,
    reference: Path | None = None,
    name: str | None = None,
    shard: Shard,
    allow_missing: bool = False,
) -> RunResult:
    """Draw, score and report. With a shard that leaves pictures to others, whoever draws the last scores."""
    metrics = open_metrics(protocol.metrics, given)
    asked = Asked.of(protocol, set_file, metrics)
    check_reference(protocol, metrics, reference)
    drawn = draw(asked, model, output, shard)
    if drawn.left:
        return RunResult(drawn, None)
    results = score(
        Pictures.drawn(output),
        metrics,
        output,
        reference=reference,
        name=name,
        allow_missing=allow_missing,
    )
    return RunResult(drawn, results)
