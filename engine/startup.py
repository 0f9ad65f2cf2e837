"""Signals that end a program, from its first second on.

A program calls `guard_imports` before it imports torch, which takes seconds. Later,
`command_line.command` calls `catch_signals`. Ctrl-C, SIGTERM and SIGHUP then end it with one line.
"""

import os
import signal
import sys
import warnings

# Ctrl-C, the signal of `kill` and cluster schedulers, and the end of a terminal session.
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Raised when one of SIGNALS reaches the program; `number` is that of the signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def set_handlers(handler) -> None:
    """Set the handler of all SIGNALS, except those that are ignored (nohup ignores SIGHUP)."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def guard_imports() -> None:
    """Hide warnings, and until `catch_signals` let a signal end the process with one line."""
    set_handlers(end_at_once)
    hide_warnings()


def end_at_once(number: int, frame) -> None:
    """Handle a signal during the imports of a program, before any work was started."""
    os.write(2, b"stopped: nothing was done yet; the same command starts again\n")
    os._exit(128 + number)


def catch_signals() -> None:
    """Raise Interrupted at the first signal from now on, and ignore further ones."""
    set_handlers(interrupt)


def interrupt(number: int, frame) -> None:
    """Handle a signal: raise Interrupted, once."""
    ignore_signals()
    raise Interrupted(number)


def ignore_signals() -> None:
    """Ignore further signals, so that the program can print its last line.

    Data-loading processes end at the same time. torch would raise an error about each of them, at
    an arbitrary line, so the signal about ended children gets its default again.
    """
    set_handlers(signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def begin_child() -> None:
    """Prepare a process for the runs of a study; only its parent handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hide_warnings()


def reset_in_child() -> None:
    """Let data-loading processes end silently at a signal: their parent prints the line."""
    for number in SIGNALS:
        if signal.getsignal(number) == interrupt:
            # The terminal sends Ctrl-C to the children of a program, too.
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_ctrl_c else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset_in_child)


def hide_warnings() -> None:
    """Hide the warnings of libraries; `python -W default` shows them.

    Warnings that matter to users are printed in our own words where they arise.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when huggingface_hub is imported
