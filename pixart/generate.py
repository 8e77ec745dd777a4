"""`python -m pixart.generate "a red circle left of a blue square"`: prompts to picture files.

Every picture carries the request that made it, so `--from-image` draws it again and a list of
prompts can be taken up where it stopped. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

import sys

if __name__ == "__main__":  # Ctrl-C is one line from here on, also while the rest is imported
    from pixart.command import start

    start(["generate", *sys.argv[1:]])

import json
from typing import TYPE_CHECKING

from pixart import process
from pixart.command import BAD_INPUT, DONE, FAILURE, exit_code, message_of, run_command

if TYPE_CHECKING:
    from pixart.generation.options import Options
    from pixart.generation.report import Report

NAME, KEPT = "generate", "cancelled; finished pictures are kept"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Under torchrun it ends the process."""
    if not process.is_one_of_many():
        return run_command(NAME, lambda: _run(arguments), KEPT)
    code = run_command(NAME, lambda: _run_beside_others(arguments), KEPT)
    from pixart.distributed import leave

    leave(code)


def _run_beside_others(arguments: list[str] | None) -> int:
    """As one of torchrun's processes: of those that fail, the first one says why."""
    try:
        return _run(arguments)
    except BaseException as error:
        if _speaks(error):
            raise
        if isinstance(error, KeyboardInterrupt) or process.ENDING.asked is not None:
            return process.ENDING.code()
        if isinstance(error, SystemExit):
            return DONE if error.code is None else FAILURE
        return exit_code(error) or FAILURE


def _speaks(error: BaseException) -> bool:
    distributed = sys.modules.get("pixart.distributed")
    if distributed is None:  # nothing is imported for it: this may be an import that was cut off
        return process.place()[0] == 0
    return not isinstance(error, distributed.FailedElsewhere) and distributed.is_first_to_fail()


def _run(arguments: list[str] | None) -> int:
    from pixart.generation.report import Report

    report = Report()
    is_first = process.place()[0] == 0 or not process.is_one_of_many()
    if is_first and "--json" in (sys.argv if arguments is None else arguments):
        process.on_leaving(lambda: _as_json(report, error=process.ENDING.message()) + "\n")
    from dataclasses import replace

    from pixart.generation.options import parse_options

    options = parse_options(NAME, arguments)
    return run(replace(options, json=options.json and is_first), report)


def run(options: "Options", report: "Report") -> int:
    """Draw; with --json report what is finished, also where something failed on the way."""
    try:
        from pixart.generation.memory_plan import check_options, tell_memory
        from pixart.generation.shards.place import writes_shards

        check_options(options)

        if options.engine != "here" or options.address is not None or options.workers is not None:
            from pixart.generation.shards.on_ray import check_engine, without_cluster

            check_engine(options)
            options = without_cluster(options) if options.dry_run else options
        if options.plan:
            tell_memory(options, report)
        elif options.engine == "ray":
            from pixart.generation.shards.on_ray import generate_on_ray

            generate_on_ray(options, report)
        elif writes_shards(options):
            from pixart.generation.shards.running import generate_shards

            generate_shards(options, report)
        else:
            from pixart.generation.drawing import generate

            generate(options, report)
    except BaseException as error:
        if options.json:
            _report_failure(report, error)
        raise
    if options.json:
        print(_as_json(report))
    return DONE


def _report_failure(report: "Report", error: BaseException) -> None:
    """Imports nothing: memory may be at its end, and Ctrl-C may have come in the middle of an import."""
    process.on_leaving(None)
    is_cancelled = isinstance(error, KeyboardInterrupt) or process.ENDING.asked is not None
    if is_cancelled:
        print(_as_json(report, error=process.ENDING.message()))
    elif report.drawn or exit_code(error) not in (None, BAD_INPUT):
        print(_as_json(report, error=message_of(error)))


def _as_json(report: "Report", **more: str) -> str:
    return json.dumps({**report.to_dict(), **more}, indent=2)
