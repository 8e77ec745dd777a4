"""What all commands share: exit codes, and one line on standard error for whatever goes wrong.

    pixart generate "a red circle"            python -m pixart.generate "a red circle"

The module of a command hands over to `start` before it imports anything, so that Ctrl-C is answered
the same way from then on. For the same reason nothing is imported here, `typing` included.
"""

import sys

from pixart import process

TYPE_CHECKING = False  # type checkers take it for typing's
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from re import Match
    from typing import Any, NoReturn, TypeVar

    Parsed = TypeVar("Parsed")

DONE, FAILURE, BAD_INPUT, MISSING, CANCELLED = 0, 1, 2, 3, process.CANCELLED
LEAST_COLUMNS, LONGEST = 60, 1000

COMMANDS = {
    "generate": "draw pictures from text",
    "convert": "write a transformer in another format",
    "data": "prepare, caption, clean and count pictures for training",
    "train": "train the stages of a recipe, and plot what they did",
    "calibrate": "find out how much less work a picture needs",
    "evaluate": "measure how good a model is",
    "preference": "find out which of two pictures people prefer",
    "scaling": "count denoisers, fit scaling laws, and study them in a small world",
    "publish": "write a model as a repository that diffusers opens",
    "serve": "draw pictures for programs, over HTTP, and for people, in a page",
}


def start(arguments: "Sequence[str] | None" = None) -> "NoReturn":
    """Run `main` and end the process with its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    named = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    if named == "generate" and "--json" in arguments:  # until it has a report of its own
        process.on_leaving(lambda: '{"images": [], "drawn": 0, "error": "cancelled"}\n')
    _start(f"pixart.{named}" if named else "pixart", lambda: main(arguments))


def start_module(module: str, function: str = "main") -> "NoReturn":
    """Run a function of a module that is a command of its own, such as bench.cpu, in the same way."""
    name = module.removesuffix(".__main__")

    def run() -> int:
        work = getattr(_import(module), function)
        process.at_work()
        return run_command(name, work)

    _start(name, run)


def _start(name: str, work: "Callable[[], int]") -> "NoReturn":
    process.begin(name)
    try:
        code = work()
    except SystemExit as stop:  # of --help
        code = stop.code if isinstance(stop.code, int) else DONE if stop.code is None else FAILURE
    except KeyboardInterrupt:
        code = complain(name, process.ENDING.message(), process.ENDING.code())
    process.finish(code)


def main(arguments: "Sequence[str] | None" = None) -> int:
    """`pixart COMMAND ...`: run one of COMMANDS; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        return run_command(name, lambda: _import(f"pixart.{name}").main(arguments[1:]))
    return run_command("pixart", lambda: _tell(name))


def _tell(name: str) -> int:
    """What `pixart` itself says."""
    listing = "\n".join(f"  {command:<10} {what}" for command, what in COMMANDS.items())
    usage = f"usage: pixart COMMAND ...\n\n{listing}\n\npixart COMMAND --help tells its options"
    if name in ("-h", "--help"):
        print(usage)
        return DONE
    if name in ("-V", "--version"):
        from pixart import __version__

        print(f"pixart {__version__}")
        return DONE
    if not name:
        process.write_line(usage)
        return BAD_INPUT
    return complain("pixart", f"knows {', '.join(COMMANDS)}, got {name!r}", BAD_INPUT)


def _import(module: str) -> "Any":
    from importlib import import_module

    return import_module(module)


def run_command(name: str, work: "Callable[[], int | None]", cancelled: str = "cancelled") -> int:
    """Do a command's work and return its exit code, after a line on what went wrong.

    Bad input (2): ValueError, what is not there, what is not installed. Failure (1): the disk, the
    memory, the device. cancelled: what Ctrl-C leaves behind, in words. A command calls
    `process.at_work` before it writes.
    """
    ending = process.ENDING
    ending.words = cancelled
    try:
        _check_folder()
        return work() or DONE
    except KeyboardInterrupt:
        return complain(name, ending.message(), ending.code())
    except (Exception, MemoryError) as error:
        if ending.asked is not None:  # a library made another exception of the signal's
            return complain(name, ending.message(), ending.code())
        code = exit_code(error)
        if code is None:  # a fault of ours: its traceback is wanted
            raise
        return complain(name, message_of(error), code)


def exit_code(error: BaseException) -> int | None:
    """What an exception means for whoever called the command; None if it is a fault of ours. An
    exception class may say so itself, by an attribute `exit_code`."""
    stated = getattr(error, "exit_code", None)
    if isinstance(stated, int):
        return stated
    bad = (ValueError, FileNotFoundError, NotADirectoryError, ModuleNotFoundError)
    if isinstance(error, bad) or _is_of_name(error):
        return BAD_INPUT
    return FAILURE if isinstance(error, OSError | RuntimeError | MemoryError) else None


def _is_of_name(error: BaseException) -> bool:
    """Whether no disk could have a file of that name: it is too long, or a link that leads to itself."""
    import errno

    return isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


def message_of(error: BaseException) -> str:
    """What an exception says, or what it is if it says nothing; of the system's own, the place, the
    reason, and the way out."""
    if isinstance(error, OSError) and error.strerror and str(error).startswith("[Errno"):
        places = [str(place) for place in (error.filename, error.filename2) if place]
        reason = f"{error.strerror}{_way_out(error.errno)}"
        return ": ".join([" -> ".join(places), reason] if places else [reason])
    unnamed = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    return str(error) or unnamed


def _way_out(number: "int | None") -> str:
    """What helps against an error of the system, "" if that is clear."""
    import errno

    if number in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return "; make room there, or name another place"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "; name another place, or get the right to use this one"
    if number in (errno.EMFILE, errno.ENFILE):
        return "; raise the limit (ulimit -n)"
    return ""


def _check_folder() -> None:
    """Without the current folder no relative path leads anywhere, and libraries fail in many ways."""
    from os import getcwd

    try:
        getcwd()
    except FileNotFoundError:
        raise FileNotFoundError(
            "the current folder is not there any more; change to one that is (cd)"
        ) from None


def complain(name: str, message: str, code: int) -> int:
    """Print `pixart.NAME: message` on one line; returns the code."""
    name = name if name.startswith(("pixart", "bench")) else f"pixart.{name}"
    process.write_line(f"{name}: {one_line(message)}")
    return code


def one_line(message: str) -> str:
    """A message as one line that a terminal shows as it is, the middle of a very long one left out:
    messages quote what files say."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    return line


def program(name: str) -> str:
    """How the running command was called, for its help."""
    from pathlib import Path

    return f"pixart {name}" if Path(sys.argv[0]).stem == "pixart" else f"python -m pixart.{name}"


def parse(
    kind: "Callable[..., Parsed]", name: str, arguments: "Sequence[str] | None", **settings: "Any"
) -> "Parsed":
    """The command line as a `kind` (a dataclass or a union of them). Raises ValueError with one
    sentence for what cannot be read; --help prints and exits."""
    import contextlib
    import io

    import tyro

    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return _wide_enough(
                lambda: tyro.cli(kind, prog=program(name), args=arguments, **settings)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    raise ValueError(f"{_reason(printed.getvalue())}; {program(name)} --help tells the options")


def _wide_enough(call: "Callable[[], Parsed]") -> "Parsed":
    """The call, with LEAST_COLUMNS at least to print in: in fewer than six tyro never ends, and in few
    it cuts the names in its errors."""
    import os
    import shutil

    before, columns = os.environ.get("COLUMNS"), shutil.get_terminal_size().columns
    os.environ["COLUMNS"] = str(max(columns, LEAST_COLUMNS))
    try:
        return call()
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _reason(box: str) -> str:
    """The sentence inside the box that tyro draws around an error. What tyro knows about it reaches
    nobody but its own printer: hooks are private there, and younger than the versions that we take."""
    import re

    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    # Where stdout is not UTF-8 there is no box, but a title, a rule, and spaces for the edges.
    rows = plain.splitlines() if plain.startswith(("╭", "+")) else plain.splitlines()[2:]
    rows = [row[:1].strip("│| ") + row[1:].rstrip(" │|").removeprefix(" ") for row in rows]
    parts: list[list[str]] = [[]]
    for row in rows:
        if row.startswith(("╭", "╰", "+")):
            continue
        if row.strip() and not row.strip("─- "):  # a rule: help follows
            parts.append([])
        else:
            parts[-1].append(row)
    what = " ".join(" ".join(parts[0]).split())
    for pattern, sentence in _SENTENCES:
        if match := re.match(pattern, what):
            return sentence(match, parts)
    return (what[:1].lower() + what[1:]).rstrip(".")


def _unknown(match: "Match[str]", parts: list[list[str]]) -> str:
    from difflib import SequenceMatcher

    word = match[1].split(", ")[0]
    near = [row.split()[0] for part in parts[1:] for row in part if row.startswith("    --")]
    known = [row.partition(": ")[2] for part in parts[1:] for row in part if "subcommands: " in row]
    near.sort(key=lambda name: SequenceMatcher(None, word, name).ratio(), reverse=True)
    hint = f"; did you mean {' or '.join(near[:2])}" if near else ""
    hint = f"; there are {known[0]}" if known else hint
    return f"unknown {'option' if word.startswith('-') else 'argument'} {word}{hint}"


def _missing(match: "Match[str]", parts: list[list[str]]) -> str:
    names = [row.split()[0] for row in parts[0] if row[:4].isspace() and not row[4:5].isspace()]
    return f"{', '.join(filter(None, names))} must be given"


def _choices(match: "Match[str]", parts: list[list[str]]) -> str:
    names = sorted({name.strip("' ") for name in match[3].split(",")} - {"None"})
    return f"{match[2]} must be one of {', '.join(names)}, got {match[1]!r}"


def _untyped(match: "Match[str]", parts: list[list[str]]) -> str:
    options = [option.strip("{}") for option in match[2].replace("{None}|", "").split("|")]
    wanted = " or ".join(map(_in_words, options))
    return f"{match[1]} must be {wanted}, got {match[3]}"


def _in_words(option: str) -> str:
    """What tyro calls INT, `FLOAT FLOAT` or `True,False`."""
    words = {"INT": "whole number", "FLOAT": "number"}
    kinds = option.split()
    if set(kinds) - set(words) or len(set(kinds)) > 1:
        return option.replace(",", " or ")
    return f"a {words[kinds[0]]}" if len(kinds) == 1 else f"{len(kinds)} {words[kinds[0]]}s"


def _unnumbered(match: "Match[str]", parts: list[list[str]]) -> str:
    return f"{match[1]} must be {'a whole number' if match[2] else 'a number'}, got {match[4]}"


_SENTENCES: "list[tuple[str, Callable[[Match[str], list[list[str]]], str]]]" = [
    (r"Unrecognized options: (.*)", _unknown),
    (r"Missing from [^:]*: ", _missing),
    (r"Missing value for argument '(\S+)'", lambda match, _: f"{match[1]} needs a value"),
    (r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)", _choices),
    (r"Error parsing (\S+): no type matching (.*?) could be instantiated from \[(.*?)\]", _untyped),
    (
        r"Error parsing (\S+): (?:invalid literal for (int)|could not .* to (float)).*: (.*)",
        _unnumbered,
    ),
    (
        r"Error parsing (\S+): Could not parse arguments (\[.*\]) into tuple type tuple\[(.*)\]",
        lambda match, _: f"{match[1]} must be {match[3].count(',') + 1} numbers, got {match[2]}",
    ),
    (r"Error parsing (\S+): (.*)", lambda match, _: f"{match[1]}: {match[2]}"),
]
