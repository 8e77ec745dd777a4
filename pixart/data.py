"""`python -m pixart.data prepare|caption|filter|clean|verify|statistics`: data, before training.

prepare encodes pictures and captions once; caption lets a vision-language model write captions;
filter scores pictures; clean measures them and finds duplicates; verify finds what is damaged of what
was prepared; statistics counts captions and their nouns. All go on where they were stopped, and list
what they could not use instead of stopping over it. Exit codes: 0 done, 2 bad input, 1 failure, 130
cancelled.
"""

import os
import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["data", *sys.argv[1:]])

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pixart import process
from pixart.command import DONE, one_line, parse, run_command
from pixart.dataset.options import Caption, Clean, Command, Filter, Prepare, Statistics, Verify

if TYPE_CHECKING:
    from pixart.dataset.prepare import Preparation
    from pixart.dataset.samples import Item

NAME = "data"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(
        NAME,
        lambda: run(parse(Command, NAME, arguments)),  # type: ignore[arg-type]
        "cancelled; the same command goes on",
    )


def run(options: Prepare | Caption | Filter | Clean | Verify | Statistics) -> int:
    commands = {
        Prepare: prepare,
        Caption: caption,
        Filter: filter_,
        Clean: clean,
        Verify: verify,
        Statistics: statistics,
    }
    print(commands[type(options)](options))  # type: ignore[operator]
    return DONE


def prepare(options: Prepare) -> str:
    """Returns a sentence on what was prepared and what was not."""
    from pixart.dataset.samples import writable
    from pixart.dataset.verify import write_settings
    from pixart.files import check_writable

    items = _items(options)
    first = [items()]  # refuses what it can before models are loaded
    check_writable(options.output / "report.json")
    preparation = _preparation(options)
    process.at_work()
    report = preparation.run(lambda: first.pop() if first else items(), _origin(options))
    write_settings(options)
    rejected, where = report["rejected"], writable(str(preparation.report))
    if rejected:
        example, more = rejected[0], len(rejected) - 1
        line = one_line(f"pixart.data: rejected {example['path']} ({example['reason']})")
        process.write_line(line + (f", and {more} more" if more else ""))
    return f"{report['prepared']} samples prepared, {len(rejected)} rejected: see {where}"


def _items(options: Prepare) -> "Callable[[], Iterable[Item]]":
    """What lists the samples, from the start each time."""
    from pixart.dataset.annotations import annotated
    from pixart.dataset.controls import with_controls
    from pixart.dataset.funnel import kept
    from pixart.dataset.sources import open_source

    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")

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
    import torch

    from pixart.dataset.controls import open_controls
    from pixart.dataset.prepare import Preparation, Settings, open_encoders
    from pixart.device import choose_device

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    device = choose_device(options.device)
    controls = open_controls(options.control, options.preprocessor_weights, device)
    encoders = open_encoders(
        options.model,
        device=device,
        vae_dtype=dtypes[options.vae_dtype],
        text_dtype=dtypes[options.text_dtype] if options.text_dtype else None,
        max_length=options.max_length,
    )
    settings = Settings(
        options.resolution, options.square, options.max_ratio, options.half, options.min_side
    )
    return Preparation(options.output, encoders, settings, options.workers, controls)


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
    """Returns a sentence on what was captioned."""
    from pixart.dataset.annotations import check_output
    from pixart.dataset.captioning import CaptionRequest, caption_source, open_endpoint, open_model
    from pixart.dataset.sources import open_source
    from pixart.device import choose_device

    check_output(options.output, options.source)
    items = open_source(options.source)
    request = CaptionRequest(
        options.prompt, options.max_tokens, options.name, options.count, options.rank
    )
    if options.endpoint:
        captioner = open_endpoint(options.endpoint, options.model, request)
        process.at_work()
        tally = caption_source(items, options.output, captioner, request, options.workers)
    else:
        captioner = open_model(options.model, request, choose_device(options.device))
        process.at_work()
        tally = caption_source(items, options.output, captioner, request, 1)
    return tally.summary("captioned", options.output)


def filter_(options: Filter) -> str:
    """Returns a sentence on what was scored, with the scores that quantiles of it reach."""
    from pixart.dataset.annotations import check_output
    from pixart.dataset.scoring import load_scorer, quantiles, score_source
    from pixart.dataset.sources import open_source

    check_output(options.output, options.source)
    items = open_source(options.source)
    scorer = load_scorer(options.scorer)
    process.at_work()
    tally = score_source(items, options.output, scorer)
    return f"{tally.summary('scored', options.output)}\n{quantiles(options.output)}"


def clean(options: Clean) -> str:
    """Returns a sentence on what was measured, after the funnel where there are rules."""
    from pixart.dataset import cleaning
    from pixart.dataset.annotations import check_output
    from pixart.dataset.sources import open_source
    from pixart.files import check_writable

    check_output(options.output, options.source)
    if options.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {options.workers}")
    cleaning.check_folder(options.output, options.source)
    scorers = cleaning.open_scorers(options.scorer)
    rules = cleaning.rules_of(options.keep, scorers)
    first = [open_source(options.source)]  # refuses what it can before anything is written
    check_writable(options.output)
    process.at_work()

    def items() -> "Iterable[Item]":
        return first.pop() if first else open_source(options.source)

    return cleaning.clean(items, options.output, scorers, rules, options.workers)


def verify(options: Verify) -> str:
    """Returns what was found and done, in words or as JSON. RuntimeError if something stays damaged."""
    import json

    from pixart.dataset.features import indices_of
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
    raise RuntimeError(found.complaint())


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
