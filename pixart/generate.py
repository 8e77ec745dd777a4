"""`python -m pixart.generate "a red circle left of a blue square"`: prompts to picture files.

Every picture carries the request that made it, so `--from-image` draws it again and a list of
prompts can be taken up where it stopped. Exit codes: 0 done, 2 bad input, 1 failure, 130 cancelled.
"""

# Nothing slow is imported here, where Ctrl-C would still end in a traceback.
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixart.generation.drawing import Report
    from pixart.generation.options import Options

BAD_INPUT, FAILURE, CANCELLED = 2, 1, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        import tyro

        from pixart.generation.options import Options

        return run(tyro.cli(Options, prog="python -m pixart.generate", args=arguments))
    except KeyboardInterrupt:
        return _complain("cancelled; finished pictures are kept", CANCELLED)


def run(options: "Options") -> int:
    from pixart.generation.drawing import Report

    report = Report()
    code, message = _attempt(options, report)
    if options.json and code != BAD_INPUT:
        import json

        said = report.to_dict() | ({"error": message} if message else {})
        print(json.dumps(said, indent=2))
    return _complain(message, code) if message else code


def _attempt(options: "Options", report: "Report") -> tuple[int, str]:
    """(exit code, what went wrong)."""
    try:
        from pixart.files import CheckpointWriteError
        from pixart.generation.drawing import generate

        generate(options, report)
    except KeyboardInterrupt:
        return CANCELLED, "cancelled; finished pictures are kept"
    except (CheckpointWriteError, MemoryError) as error:
        return FAILURE, str(error) or "out of memory"
    except (ValueError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError) as error:
        return BAD_INPUT, str(error)
    except (OSError, RuntimeError) as error:
        return FAILURE, str(error)
    return 0, ""


def _complain(message: str, code: int) -> int:
    print(f"pixart.generate: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
