"""What all programs share: their parser, errors as one line, signals, and the log of a run."""

import argparse
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT

import torch

from engine import startup
from imaging.atomic_files import is_full_disk


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Formats --help so that most options fit on one line with their explanation."""

    def __init__(self, prog: str, **details):
        super().__init__(prog, max_help_position=29, **details)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Return an option and its value as --help shows them; a switch without its --no- form."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]
        return super()._format_action_invocation(action)


class Parser(argparse.ArgumentParser):
    """argparse that takes only whole option names and reports a mistake in one line."""

    def __init__(self, description: str, **details):
        super().__init__(
            description=description, formatter_class=HelpFormatter, allow_abbrev=False, **details
        )

    def error(self, message: str):
        value = re.fullmatch(r"argument (\S+): (.+: must be .+)", message)
        if value:  # what engine/ranges.py refuses reads as it does from Python: --lr -1: must be …
            self.exit(2, f"error: {value[1]} {value[2]}\n")
        self.exit(2, f"error: {message}; --help lists the options\n")


def command(main) -> None:
    """Run a program's `main`, then exit: with its status, or with one line on stderr.

    The status is 2 for what the user can mend, and 128 more than the number of a signal: 130 for
    Ctrl-C, 143 for SIGTERM. Any other error is a mistake of ours and keeps its traceback.
    """
    startup.catch_signals()
    startup.hide_warnings()
    try:
        status = main()
    except (KeyboardInterrupt, MemoryError, RuntimeError, ValueError, OSError) as error:
        startup.ignore_signals()  # the line below comes whole, and no second one
        message = describe_error(error)
        if message is None:
            raise
        if os.environ.get("TRACEBACK"):  # for whoever looks for the place in the code
            traceback.print_exc()
        # Close the progress bars and end the data-loading processes of the functions that failed.
        traceback.clear_frames(error.__traceback__)
        number = interruption(error)
        status = 2 if number is None else 128 + number
        with suppress(OSError):  # the terminal is gone
            print(message, file=sys.stderr, flush=True)
    leave(status)


def leave(status: int | None) -> None:
    """Exit, without a traceback if what still waits to be printed cannot be."""
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or a pipe that nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 2
    sys.exit(status)


@contextmanager
def way_on(describe: Callable[[], str], override: bool = False):
    """Let the line about an interruption, a full disk or memory end with what `describe` returns.

    It says what is safe and how to go on. The innermost block decides, or one with `override`.
    """
    try:
        yield
    except (KeyboardInterrupt, MemoryError, RuntimeError, OSError) as error:
        if override or not hasattr(error, "way_on"):
            error.way_on = describe()
        raise


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that it followed from."""
    errors = []
    while error is not None:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def interruption(error: BaseException) -> int | None:
    """Return the number of the signal that an error followed from, None if it was none."""
    for cause in chain(error):
        if isinstance(cause, KeyboardInterrupt):
            return getattr(cause, "number", SIGINT)
    return None


# What torch says of a data-loading process that died.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (\w+)|exited)")
# What says that there is no memory: torch of a CPU and of a GPU, numpy within a data-loading
# process, and C++ at large.
FULL_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|MemoryError|Unable to allocate|bad_alloc"
)
SHARED_MEMORY = re.compile(r"shared memory object|shared memory\(shm\)|to file </torch_")
SMALLER = (
    "take a smaller --batch-size or --size, of volumes also fewer --classes, --crops-per-volume or "
    "--window-batch, or --checkpointing"
)


def describe_error(error: BaseException) -> str | None:
    """Return the line that a user reads about an error, None if it is a mistake of ours."""
    more = next((cause.way_on for cause in chain(error) if hasattr(cause, "way_on")), "")
    more = more or "nothing is left half written; run the same command again"
    number = interruption(error)
    if number is not None:
        how = {2: "by Ctrl-C", 15: "by SIGTERM", 1: "because the terminal was closed"}[number]
        return f"stopped {how}: {more}"
    if is_dead_worker(error):
        return f"error: {describe_dead_worker(error)}; {more}"
    if is_out_of_memory(error):
        return f"error: out of memory: {SMALLER}; {more}"
    if is_full_disk(error):
        return f"error: {describe_full_disk(error)}; {more}"
    if isinstance(error, BrokenPipeError):
        return f"error: the program that reads the output has ended; {more}"
    if isinstance(error, ValueError | OSError):
        return f"error: {last_line(error)}"
    return None


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message.

    The message of a data-loading process is a traceback, which ends with the kind of the error.
    """
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0] if len(lines) == 1 else re.sub(r"^\w+Error: ", "", lines[-1])


def is_dead_worker(error: BaseException) -> bool:
    """Return True if a data-loading process was killed, or its connection broke as it was."""
    for cause in chain(error):
        is_named = DEAD_WORKER.search(str(cause)) or SHARED_MEMORY.search(str(cause))
        if isinstance(cause, RuntimeError) and is_named:
            return True
        if isinstance(cause, ConnectionError | EOFError):
            frames = traceback.extract_tb(cause.__traceback__)
            if any(Path(frame.filename).name == "dataloader.py" for frame in frames):
                return True
    return False


def describe_dead_worker(error: BaseException) -> str:
    """Return what happened to a data-loading process, and what helps."""
    texts = " ".join(str(cause) for cause in chain(error))
    if SHARED_MEMORY.search(texts) or "signal: Bus" in texts:
        return "the memory that processes share (/dev/shm) is full: use --workers 0, or enlarge it"
    killed = DEAD_WORKER.search(texts)
    how = f" (signal {killed[1]})" if killed and killed[1] else ""
    hint = "most often because memory ran out: use fewer --workers"
    return f"a data-loading process was killed{how}, {hint}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out, on the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(FULL_MEMORY.search(str(error)))


def describe_full_disk(error: BaseException) -> str:
    """Return which file could not be written, and why."""
    numbered = [cause for cause in chain(error) if getattr(cause, "errno", None)]
    if not numbered:
        return f"the disk is full ({last_line(error):.150}): free some space"
    name = numbered[0].filename or "a file, or what is printed,"
    return f"{name} could not be written ({numbered[0].strerror}): free some space"


class Log:
    """Standard output that is kept, with the time, in log.txt."""

    def __init__(self, screen, file):
        self.screen, self.file = screen, file

    def write(self, text: str) -> None:
        self.screen.write(text)
        self.file.write(text.replace("\n", time.strftime("    %Y-%m-%d %H:%M:%S\n")))

    def flush(self) -> None:
        self.screen.flush()
        self.file.flush()
