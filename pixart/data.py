"""`python -m pixart.data prepare|prompts|caption|filter|clean|verify|statistics`: data, before training.

prepare encodes pictures and captions once, prompts what has no pictures; caption lets a vision-language model
write captions; filter scores pictures; clean measures them and finds duplicates; verify finds what is damaged
of what was prepared; statistics counts captions and their nouns. All go on where they were stopped, and list
what they could not use instead of stopping over it. Exit codes: 0 done, 2 bad input, 1 failure, 130
cancelled.
"""

import os
import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["data", *sys.argv[1:]])

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart import process
from pixart.command import DONE, one_line, parse, run_command
from pixart.config import EMBEDDED
from pixart.dataset.options import (
    Caption,
    Clean,
    Command,
    Filter,
    Prepare,
    Prompts,
    Statistics,
    Verify,
    Work,
)

if TYPE_CHECKING:
    from pixart.cluster import Cluster
    from pixart.dataset.forecast import Forecast
    from pixart.dataset.prepare import Preparation
    from pixart.dataset.samples import Item

NAME = "data"
REQUESTS = 8  # that an endpoint gets at a time
FEW_CAPTIONS = 2  # that --dry-run measures: one takes seconds


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME,
        lambda: run(parse(Command, NAME, arguments)),  # type: ignore[arg-type]
        "cancelled; the same command goes on",
    )


def run(options: Prepare | Prompts | Caption | Filter | Clean | Verify | Statistics) -> int:
    commands = {
        Prepare: prepare,
        Prompts: prompts,
        Caption: caption,
        Filter: filter_,
        Clean: clean,
        Verify: verify,
        Statistics: statistics,
    }
    print(commands[type(options)](options))  # type: ignore[operator]
    return DONE


def prepare(options: Prepare) -> str:
    """Returns a sentence on what was prepared and what was not, or on what is to be done."""
    from pixart.dataset.features import refuse_prompts
    from pixart.dataset.prepare import open_worker
    from pixart.dataset.remote import on_ray, sights_of
    from pixart.dataset.samples import writable
    from pixart.dataset.verify import write_settings
    from pixart.files import check_writable

    refuse_prompts(options.output, "name another output")
    cluster = _cluster(options)
    items = _items(options)
    first = [items()]  # refuses what it can before models are loaded
    check_writable(options.output / "report.json")
    # What lists the chunks has no need of a GPU, and never reads the weights of its text encoder.
    is_remote = cluster is not None and not options.dry_run
    preparation = _preparation(replace(options, device="cpu") if is_remote else options)
    process.at_work()
    if options.dry_run:
        from pixart.dataset.forecast import of_preparing

        return _told(of_preparing(preparation, items(), _device(options)), options)

    def workers(claim: Path) -> "Callable[[Iterable[Any]], Iterator[Any]]":
        assert cluster is not None
        opening = partial(open_worker, _lasting(options), preparation.made_by(), claim.absolute())
        return on_ray(opening, cluster, sights_of(items()), batch=1)

    report = preparation.run(
        lambda: first.pop() if first else items(), _origin(options), workers if cluster else None
    )
    write_settings(options)
    rejected, where = report["rejected"], writable(str(preparation.report))
    _tell_rejected(rejected)
    return f"{report['prepared']} samples prepared, {len(rejected)} rejected: see {where}"


def _tell_rejected(rejected: Sequence[Mapping[str, str]], place: str = "") -> None:
    """One of them. place: before what it says where it is."""
    if rejected:
        example, more = rejected[0], len(rejected) - 1
        line = f"pixart.data: rejected {place}{example['path']} ({example['reason']})"
        process.write_line(one_line(line) + (f", and {more} more" if more else ""))


def prompts(options: Prompts) -> str:
    """Returns a sentence on what was encoded and what was not, or on what is to be done."""
    from pixart.dataset.prompts import PromptFile, open_prompt_worker, open_prompts, summary
    from pixart.dataset.remote import on_ray
    from pixart.dataset.samples import writable
    from pixart.files import check_writable

    cluster = _cluster(options)
    if cluster is None and options.workers is not None:
        raise ValueError("--workers must be given with --engine ray, got it without")
    PromptFile(options.file).check()  # refuses what it can before a model is loaded
    check_writable(options.output / "report.json")
    is_remote = cluster is not None and not options.dry_run
    preparation = open_prompts(replace(options, device="cpu") if is_remote else options)
    process.at_work()
    if options.dry_run:
        from pixart.dataset.forecast import of_preparing

        return _told(
            of_preparing(preparation, preparation.file, _device(options), "prompt"), options
        )

    def workers(claim: Path) -> "Callable[[Iterable[Any]], Iterator[Any]]":
        assert cluster is not None
        lasting = replace(
            options,
            file=options.file.absolute(),
            output=options.output.absolute(),
            model=_absolute(options.model),
            text_encoder=options.text_encoder and _absolute(options.text_encoder),
        )
        opening = partial(open_prompt_worker, lasting, preparation.made_by(), claim.absolute())
        return on_ray(opening, cluster, batch=1)

    origin = os.path.abspath(options.file)
    report = preparation.run(lambda: preparation.file, origin, workers if cluster else None)
    _tell_rejected(report["rejected"], f"{options.file}, ")
    return summary(report, writable(str(preparation.report)))


def _cluster(options: Work, gpus: float | None = None) -> "Cluster | None":
    """Where to work, None for this process. gpus: of each worker, None for what the device asks for."""
    workers = options.workers
    device = options.device if isinstance(options, Prepare | Prompts | Caption) else None
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    if options.json and not options.dry_run:
        raise ValueError("--json must be given with --dry-run, got it without")
    if options.engine != "ray":
        if options.address is not None:
            raise ValueError("--address must be given with --engine ray, got it without")
        return None
    if find_spec("ray") is None:
        raise ModuleNotFoundError('--engine ray needs: pip install "pixart-fast[ray]"')
    if device not in (None, "cpu", "cuda"):
        raise ValueError(
            f"--device must be cpu or cuda with --engine ray, which gives each worker its own, got {device}"
        )
    if gpus is None and device is not None:
        gpus = 1.0 if device == "cuda" else 0.0
    from pixart.cluster import Cluster

    return Cluster(options.address, workers, gpus)


def _device(options: Prepare | Prompts | Caption) -> str:
    from pixart.device import choose_device

    return str(choose_device(options.device))


def _told(found: "Forecast", options: Work) -> str:
    import json

    if options.engine == "ray":
        found.workers = options.workers
    return json.dumps(found.to_dict(), indent=2) if options.json else found.summary()


def _absolute(place: str) -> str:
    """A path as it is in any folder; what is none, such as a hub id, stays."""
    return os.path.abspath(place) if place != EMBEDDED and os.path.exists(place) else place


def _lasting(options: Prepare) -> Prepare:
    """The same in any folder of another machine."""
    weights = (given.partition("=") for given in options.preprocessor_weights)
    return replace(
        options,
        output=options.output.absolute(),
        model=_absolute(options.model),
        text_encoder=options.text_encoder and _absolute(options.text_encoder),
        preprocessor_weights=tuple(f"{a}{b}{_absolute(c)}" for a, b, c in weights),
        workers=None,
    )


def _items(options: Prepare) -> "Callable[[], Iterable[Item]]":
    """What lists the samples, from the start each time."""
    from pixart.dataset.annotations import annotated
    from pixart.dataset.controls import with_controls
    from pixart.dataset.funnel import kept
    from pixart.dataset.sources import open_source

    def items() -> "Iterable[Item]":
        found = annotated(
            open_source(options.source),
            prompt=options.prompt,
            captions=options.captions,
            scores=options.scores,
            min_score=options.min_score,
        )
        return with_controls(kept(found, options.keep, options.measurements), options.control)

    return items


def _preparation(options: Prepare) -> "Preparation":
    from pixart.dataset.prepare import open_preparation

    return open_preparation(options)


def _origin(options: Prepare) -> str:
    """What a prepare reads and how, for telling it from others."""
    from pixart.dataset.controls import MADE, MEMBERS

    def lasting(place: str) -> str:
        return os.path.abspath(os.path.expanduser(place))

    source = options.source if "://" in options.source else lasting(options.source)
    files = [os.path.abspath(file) for file in (*options.captions, options.scores) if file]
    control = [options.control] if options.control else []
    if options.control not in (None, MEMBERS, *MADE):
        control = [lasting(folder) for folder in control]
    rules = [options.keep, os.path.abspath(options.measurements)] if options.measurements else []
    return repr([source, options.prompt, options.min_score, files, *control, *rules])


def caption(options: Caption) -> str:
    """Returns a sentence on what was captioned, or on what is to be done."""
    from pixart.addresses import without_secrets
    from pixart.dataset.annotations import check_output, read_lines
    from pixart.dataset.captioning import CaptionRequest, Model, is_captioned, write_captions
    from pixart.dataset.remote import on_ray, sights_of
    from pixart.dataset.sources import open_source

    cluster = _cluster(options, 0.0 if options.endpoint else None)
    check_output(options.output, options.source)
    items = open_source(options.source)
    request = CaptionRequest(
        options.prompt, options.max_tokens, options.name, options.count, options.rank
    )
    is_local = cluster is None or options.dry_run
    at_a_time = (is_local and options.workers) or REQUESTS
    model = Model(
        options.model,
        options.endpoint,
        os.environ.get("OPENAI_API_KEY"),
        options.device,
        at_a_time if options.endpoint else 1,
    )
    if is_local or options.endpoint:
        work = model.open(request)  # of an endpoint, refuses what it can before anything is sent
    process.at_work()
    if options.dry_run:
        from pixart.dataset.forecast import of_pictures

        is_known = is_captioned(request, options.output)
        lines = read_lines(options.output) if options.output.exists() else []
        known = {line["path"] for line in lines if is_known(line)}
        place = without_secrets(options.endpoint) if options.endpoint else _device(options)
        found = of_pictures(items, lambda one: one.key in known, work, place, FEW_CAPTIONS)
        return _told(found, options)
    if cluster is not None:
        model = replace(model, place=_absolute(model.place))
        work = on_ray(partial(model.open, request), cluster, sights_of(open_source(options.source)))
    tally = write_captions(items, options.output, work, request)
    return tally.summary("captioned", options.output)


def filter_(options: Filter) -> str:
    """Returns a sentence on what was scored, with the scores that quantiles of it reach; or on what is to
    be done."""
    from pixart.dataset.annotations import check_output, read_lines
    from pixart.dataset.remote import on_ray, sights_of
    from pixart.dataset.scoring import is_scored, open_scoring, quantiles, write_scores
    from pixart.dataset.sources import open_source

    cluster = _cluster(options)
    if cluster is None and options.workers is not None:
        raise ValueError("--workers must be given with --engine ray, got it without")
    check_output(options.output, options.source)
    items = open_source(options.source)
    if cluster is None or options.dry_run:
        work = open_scoring(options.scorer)
    process.at_work()
    if options.dry_run:
        from pixart.dataset.forecast import of_pictures

        lines = read_lines(options.output) if options.output.exists() else []
        known = {line["path"] for line in lines if is_scored(line)}
        return _told(
            of_pictures(items, lambda one: one.key in known, work, "this machine"), options
        )
    if cluster is not None:
        opening = partial(open_scoring, options.scorer)
        work = on_ray(opening, cluster, sights_of(open_source(options.source)))
    tally = write_scores(items, options.output, work)
    return f"{tally.summary('scored', options.output)}\n{quantiles(options.output)}"


def clean(options: Clean) -> str:
    """Returns a sentence on what was measured, after the funnel where there are rules; or on what is to be
    done."""
    from pixart.dataset import cleaning
    from pixart.dataset.annotations import check_output
    from pixart.dataset.remote import on_ray, sights_of
    from pixart.dataset.sources import open_source
    from pixart.files import check_writable

    cluster = _cluster(options, None if options.scorer else 0.0)
    check_output(options.output, options.source)
    cleaning.check_folder(options.output, options.source)
    scorers = cleaning.name_scorers(options.scorer)
    rules = cleaning.rules_of(options.keep, scorers, options.output)
    first = [open_source(options.source)]  # refuses what it can before anything is written
    workers = cleaning.THREADS if cluster or not options.workers else options.workers
    if cluster is None or options.dry_run:
        work = cleaning.open_measuring(scorers, workers)
    check_writable(options.output)
    process.at_work()
    if options.dry_run:
        from pixart.dataset.forecast import of_pictures

        is_known, measure = cleaning.known_in(options.output, scorers), cleaning.measured_by(work)
        return _told(of_pictures(first.pop(), is_known, measure, "this machine"), options)
    if cluster is not None:
        opening = partial(cleaning.open_measuring, scorers, workers)
        work = on_ray(opening, cluster, sights_of(open_source(options.source)))

    def items() -> "Iterable[Item]":
        return first.pop() if first else open_source(options.source)

    return cleaning.clean(items, options.output, scorers, rules, work=work)


def verify(options: Verify) -> str:
    """Returns what was found and done, in words or as JSON. RuntimeError if something stays damaged."""
    import json

    from pixart.dataset.features import holds_prompts, indices_of
    from pixart.dataset.verify import check_shards, check_source, settings_of

    directory = options.directory.absolute()

    def remake(resolution: int) -> None:
        with settings_of(directory, resolution, options.device) as made_by:
            items = _items(made_by)
            preparation = _preparation(made_by)
            index = indices_of(directory)[resolution]
            check_source(preparation.parts(items()), index, made_by.source)
            preparation.run(items, _origin(made_by))

    process.at_work()
    found = check_shards(directory, remake)
    told = json.dumps(found.to_dict(), indent=2) if options.json else found.summary()
    if found.is_whole:
        return told
    print(told)
    # What was encoded of prompts is made again by the command that encoded it, once it is gone.
    way_out = "; delete them and run `pixart data prompts` again" * holds_prompts(directory)
    raise RuntimeError(found.complaint() + way_out)


def statistics(options: Statistics) -> str:
    """Returns what data sets hold, as a table or as JSON."""
    import json

    from pixart.dataset.data_sets import names_of, open_data_set
    from pixart.dataset.nouns import open_nouns
    from pixart.dataset.statistics import Statistician, report, table, tokens_of

    if not options.data:
        raise ValueError("data must be one or more sources, got none")
    statistician = Statistician(
        options.captions,
        open_nouns(options.nouns) if options.nouns else None,
        tokens_of(options.tokenizer) if options.tokenizer else None,
    )
    process.at_work()
    counts = []
    for name, place in zip(names_of(options.data), options.data, strict=True):
        data = open_data_set(place, options.score, lambda made_by: _items(made_by)())
        counts.append(statistician.count(name, data.items, data.scores))
    found = report(counts, statistician, options.nouns)
    if options.json:
        return json.dumps(found, indent=2)
    for each in counts:
        if each.example:
            line = f"pixart.data: rejected {each.example.path} ({each.example.reason})"
            more = f", and {each.rejected - 1} more" if each.rejected > 1 else ""
            process.write_line(one_line(line) + more)
    hint = "" if options.nouns else "\nnouns are counted with --nouns spacy:en_core_web_sm"
    return table(found["data"]) + hint
