"""The command line of all programs: parser, errors in one line, signals, and the log of a run."""

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
        """Print a mistake in one line, and exit with status 2."""
        # Values that engine/ranges.py refuses read as in Python: "--lr -1: must be …".
        value = re.fullmatch(r"argument (\S+): (.+: must be .+)", message)
        if value:
            self.exit(2, f"error: {value[1]} {value[2]}\n")
        self.exit(2, f"error: {message}; --help lists the options\n")


def flag(name: str) -> str:
    """Return an option as it is written on the command line: "batch_size" is --batch-size."""
    return "--" + name.replace("_", "-")


def command(main) -> None:
    """Run a program's `main`, then exit: with its status, or with one line on stderr.

    The status is 2 for a mistake that the user can correct, and 128 plus its number for a signal:
    130 for Ctrl-C, 143 for SIGTERM. Any other error is a bug and keeps its traceback.
    """
    startup.catch_signals()
    startup.hide_warnings()
    try:
        status = main()
    except (KeyboardInterrupt, MemoryError, RuntimeError, ValueError, OSError) as error:
        startup.ignore_signals()  # so that the line below is printed once and in full
        message = describe_error(error)
        if message is None:
            raise
        if os.environ.get("TRACEBACK"):  # for debugging
            traceback.print_exc()

        # Close the progress bars and end the data-loading processes of the functions that failed.
        traceback.clear_frames(error.__traceback__)
        number = interruption(error)
        status = 2 if number is None else 128 + number
        with suppress(OSError):  # the terminal is gone
            print(message, file=sys.stderr, flush=True)
    leave(status)


def leave(status: int | None) -> None:
    """Exit with a status, without a traceback if the last output cannot be printed."""
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or a pipe whose reader has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 2
    sys.exit(status)


@contextmanager
def recovery_advice(describe: Callable[[], str], override: bool = False):
    """End the line about an interruption, a full disk or memory with what `describe` returns.

    It should say what was saved and how to continue. Of nested blocks the innermost decides, unless
    an outer one sets `override`.
    """
    try:
        yield
    except (KeyboardInterrupt, MemoryError, RuntimeError, OSError) as error:
        if override or not hasattr(error, "recovery_advice"):
            error.recovery_advice = describe()
        raise


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and all errors that led to it."""
    errors = []
    while error is not None:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def interruption(error: BaseException) -> int | None:
    """Return the number of the signal that led to an error, None if there was none."""
    for cause in chain(error):
        if isinstance(cause, KeyboardInterrupt):
            return getattr(cause, "number", SIGINT)
    return None


# torch's message about a data-loading process that died.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (\w+)|exited)")
# Messages about missing memory: from torch on a CPU and a GPU, from numpy within a data-loading
# process, and from C++.
FULL_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|Cannot allocate memory|MemoryError|Unable to allocate|bad_alloc"
)
SHARED_MEMORY = re.compile(r"shared memory object|shared memory\(shm\)|to file </torch_")
SMALLER = (
    "use a smaller --batch-size or --size; for volumes also fewer --classes, --crops-per-volume or "
    "--window-batch, or --checkpointing"
)


def describe_error(error: BaseException) -> str | None:
    """Return the line for the user about an error, None if it is a bug."""
    advice = "nothing is left half written; run the same command again"
    for cause in chain(error):
        if getattr(cause, "recovery_advice", ""):
            advice = cause.recovery_advice
            break

    number = interruption(error)
    if number is not None:
        reason = {2: "by Ctrl-C", 15: "by SIGTERM", 1: "because the terminal was closed"}[number]
        return f"stopped {reason}: {advice}"
    if is_dead_worker(error):
        return f"error: {describe_dead_worker(error)}; {advice}"
    if is_out_of_memory(error):
        return f"error: out of memory: {SMALLER}; {advice}"
    if is_full_disk(error):
        return f"error: {describe_full_disk(error)}; {advice}"
    if isinstance(error, BrokenPipeError):
        return f"error: the program that reads the output has ended; {advice}"
    if isinstance(error, ValueError | OSError):
        return f"error: {last_line(error)}"
    return None


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message.

    For an error in a data-loading process that message is a traceback; the kind of error that its
    last line starts with is removed.
    """
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0] if len(lines) == 1 else re.sub(r"^\w+Error: ", "", lines[-1])


def is_dead_worker(error: BaseException) -> bool:
    """Return True if a data-loading process was killed, or the connection to it broke."""
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
    """Return what happened to a data-loading process, and what to do."""
    texts = " ".join(str(cause) for cause in chain(error))
    if SHARED_MEMORY.search(texts) or "signal: Bus" in texts:
        return "the memory that processes share (/dev/shm) is full: use --workers 0, or enlarge it"
    killed = DEAD_WORKER.search(texts)
    cause = f" (signal {killed[1]})" if killed and killed[1] else ""
    return (
        f"a data-loading process was killed{cause}, most often because memory ran out: use fewer "
        "--workers"
    )


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
    name = numbered[0].filename or "a file, or the printed text,"
    return f"{name} could not be written ({numbered[0].strerror}): free some space"


class Log:
    """Standard output that is also written to log.txt, each line with its time."""

    def __init__(self, screen, file):
        self.screen = screen
        self.file = file

    def write(self, text: str) -> None:
        """Write text to both."""
        self.screen.write(text)
        self.file.write(text.replace("\n", time.strftime("    %Y-%m-%d %H:%M:%S\n")))

    def flush(self) -> None:
        """Flush both."""
        self.screen.flush()
        self.file.flush()
