"""How the process of a command begins and ends: standard streams that are there, Ctrl-C, SIGTERM.

Until `at_work`, a signal ends the process from within its handler, after one line: nothing is half
done by then, and an exception out of a handler does not survive imports, which take it for another,
recur without end or crash over a library that is half there. From `at_work` on it is a
KeyboardInterrupt, so that what is half written is removed; while something is imported, it waits.

Nothing that takes time is imported here, `typing` included: Ctrl-C is answered from `begin` on.
"""

import _thread
import os
import sys

TYPE_CHECKING = False  # type checkers take it for typing's
if TYPE_CHECKING:
    from collections.abc import Callable
    from signal import Signals
    from types import FrameType
    from typing import Any, NoReturn

CANCELLED = 130
POLL_SECONDS = 0.02  # between two looks at whether an import has ended
TWICE_SECONDS = 0.5  # `timeout` and others send a signal twice; a person is slower


class Ending:
    """What is to happen when the process is told to end."""

    def __init__(self) -> None:
        self.has_begun = self.is_at_work = False
        self.name, self.words = "", "cancelled"
        self.last_words: Callable[[], str] | None = None
        self.asked: Signals | None = None  # the signal that came
        self.error_output = 2  # where standard error is, while its number leads to nowhere
        self._raised, self._main = 0.0, _thread.get_ident()
        self.waits = False  # a signal: two things are being done of which none may be done alone

    def note(self, number: int) -> None:
        """A signal came, and whoever has the work in hand is about to end it."""
        from signal import Signals

        self.asked = Signals(number)

    def code(self) -> int:
        return CANCELLED if self.asked is None else 128 + self.asked

    def message(self) -> str:
        """What is said: `cancelled; ...`, or what else the signal means."""
        import signal

        if self.asked is None or self.asked == signal.SIGINT:
            return self.words
        return self.words.replace("cancelled", f"ended by {self.asked.name}", 1)

    def handle(self, number: int, frame: "FrameType | None") -> None:
        """The handler of signals; runs in the main thread."""
        from time import monotonic

        if self._raised:  # unwinding; whoever asks again has waited long enough
            if monotonic() - self._raised > TWICE_SECONDS:
                self.leave()
            return
        first = self.asked is None
        self.note(number)
        if not self.is_at_work:
            self.leave()
        if self.waits:
            return
        if _imports(frame):
            if first:
                _thread.start_new_thread(self._ask_again, ())
            return
        self._raised = monotonic()
        raise KeyboardInterrupt

    def catch_up(self) -> None:
        """Nothing is to wait for any more: a signal that came meanwhile is heard now."""
        self.waits = False
        if self.asked is not None and self.is_at_work and not self._raised:
            self.handle(self.asked, None)

    def _ask_again(self) -> None:
        import signal
        from time import sleep

        while not self._raised and self.asked is not None:
            sleep(POLL_SECONDS)
            if not self._raised and hasattr(signal, "pthread_kill"):
                signal.pthread_kill(self._main, self.asked)  # wakes it from a system call too
            elif not self._raised:
                _thread.interrupt_main(self.asked)

    def swallowed(self, unraisable: "Any") -> None:
        """For sys.unraisablehook: an exception in a destructor reaches nobody; it comes once more."""
        if issubclass(unraisable.exc_type, KeyboardInterrupt) and self.asked is not None:
            self._raised = 0.0
            _thread.start_new_thread(
                self._ask_again, ()
            )  # not now: nothing leaves this hook either
        else:
            sys.__unraisablehook__(unraisable)

    def leave(self) -> "NoReturn":
        """End the process now: last words on standard output, a line on standard error, the code."""
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes of a run the first
        if speaks and self.last_words is not None:
            _write(1, sys.stdout, self.last_words())
        if speaks:
            _write(self.error_output, sys.stderr, f"{self.name}: {self.message()}\n")
        self.end()

    def end(self) -> "NoReturn":
        """End as the signal that came would have, but for Ctrl-C, whose code is 130 everywhere."""
        import signal

        if self.asked is not None and self.asked != signal.SIGINT:
            signal.signal(self.asked, signal.SIG_DFL)
            os.kill(os.getpid(), self.asked)
        os._exit(self.code())


ENDING = Ending()


class Whole:
    """A block that a signal does not cut in two: from `at_work` on it comes after its end. For a moment's
    work, as Ctrl-C is not answered meanwhile."""

    def __enter__(self) -> None:
        ENDING.waits = True

    def __exit__(self, *_: object) -> None:
        ENDING.catch_up()


def begin(name: str) -> None:
    """Take over this process for the command `name`: its streams and its signals.

    A signal that is ignored from outside, as nohup does, stays ignored.
    """
    ENDING.has_begun, ENDING.name = True, name
    try:
        import signal

        for known in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, known, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, ENDING.handle)
        sys.unraisablehook = ENDING.swallowed
    except KeyboardInterrupt:
        ENDING.leave()
    _fill_streams()
    _spin_less()


def _spin_less() -> None:
    """Let PyTorch's threads, where they are GNU OpenMP's, spin for a thirtieth of the usual time (of some
    3 ms) until others are done, before they sleep. It is read as PyTorch is imported. Where other
    processes have the cores, spinning was most of what a small picture took."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def at_work() -> None:
    """From here on something may be half done when a signal comes, and there is no end without
    removing it. To be called after everything heavy is imported."""
    ENDING.is_at_work = True


def on_leaving(last_words: "Callable[[], str] | None") -> None:
    """What goes to standard output when a signal ends the process before `at_work`. It must import
    nothing, and is called between any two instructions."""
    ENDING.last_words = last_words


def finish(code: int) -> "NoReturn":
    """End the process: flush what was printed. What cannot be written is a failure."""
    ENDING.is_at_work = False  # a signal from here on comes too late to undo anything
    if ENDING.asked is not None and code == ENDING.code():
        _flush(sys.stdout)
        _flush(sys.stderr)
        ENDING.end()
    if (reason := _flush(sys.stdout)) and not code:
        write_line(f"{ENDING.name}: standard output cannot be written: {reason}")
        code = 1
    _flush(sys.stderr)
    if code == CANCELLED:
        # Where KeyboardInterrupt fell into an exec(), which dataclasses and others do, CPython
        # remembers it, though it was caught, and would end the process by SIGINT instead.
        os._exit(code)
    _ignore_interrupts()
    sys.exit(code)


def _ignore_interrupts() -> None:
    """The work is done: nothing is cancelled by a key that is pressed while Python shuts down."""
    import signal

    if ENDING.has_begun and signal.getsignal(signal.SIGINT) == ENDING.handle:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _imports(frame: "FrameType | None") -> bool:
    """Whether something is being imported where the signal came."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _fill_streams() -> None:
    """Something for every standard stream that is closed, so that no file that is opened later takes
    its number and is written into. What is printed is then an error, as it is for other programs;
    what goes to standard error is lost."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the encoding cannot say is spelt out
            stream.reconfigure(errors="backslashreplace")


def _flush(stream: "Any") -> str:
    """Flush a stream; returns what went wrong. A stream that refuses is not written to again, as
    Python would say so once more when it ends."""
    try:
        stream.flush()
    except (OSError, ValueError) as error:
        _give_up(stream)
        return getattr(error, "strerror", None) or str(error)
    return ""


def _give_up(stream: "Any") -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        stream.flush()
    except (OSError, ValueError):  # closed, or not a file: nothing will be written
        return


def is_one_of_many() -> bool:
    """Whether torchrun started this process beside others, whom it can meet."""
    named = {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    return named and os.environ.get("WORLD_SIZE", "1") != "1"


def place() -> "tuple[int, int]":
    """Number of this process among those that torchrun started, and how many they are; 0 of 1 without it.
    ValueError for variables that cannot be."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    are_numbers = all(text.isascii() and text.isdigit() and len(text) < 9 for text in (rank, world))
    if not are_numbers or int(rank) >= int(world):
        raise ValueError(
            f"RANK must be a number below WORLD_SIZE, got {rank[:20]!r} and {world[:20]!r}; "
            "torchrun sets both"
        )
    return int(rank), int(world)


def write_line(line: str) -> None:
    """A line on standard error, if it can be written."""
    stream = sys.stderr
    if stream is None or stream.closed:
        return
    try:
        print(line, file=stream, flush=True)
    except OSError:
        return


def _write(number: int, stream: "Any", text: str) -> None:
    """Write past Python's buffer, which may be in use at this moment."""
    content = text.encode("utf-8", "backslashreplace")
    try:
        stream.flush()
    except (OSError, ValueError, RuntimeError):
        stream = None
    try:
        while content:
            content = content[os.write(number, content) :]
    except OSError:
        return
