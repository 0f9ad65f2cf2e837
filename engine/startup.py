"""The first seconds of a program, and the signals that end it.

A program calls `guard_imports` before it imports torch, which takes seconds.
Then `command_line.command` calls `catch_signals`: Ctrl-C, SIGTERM and SIGHUP end it with one line.
"""

import os
import signal
import sys
import warnings

# Ctrl-C, what `kill` and cluster schedulers send, and the end of a terminal session.
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = [
    getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)
]  # fewer on Windows


class Interrupted(KeyboardInterrupt):
    """Raised where a signal of SIGNALS reached the program; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def set_handlers(handler) -> None:
    """Set the handler of all SIGNALS but those that are ignored, as nohup wants it for SIGHUP."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def guard_imports() -> None:
    """Let a signal end the process with one line until `catch_signals`, and hide warnings."""
    set_handlers(end_at_once)
    hide_warnings()


def end_at_once(number: int, frame) -> None:
    """Handle a signal during the imports of a program: nothing was begun yet."""
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
    """Ignore further signals: the program is ending, and its last line is to be whole.

    Data-loading processes end as well; torch would raise an error about each at any place.
    """
    set_handlers(signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def begin_child() -> None:
    """Prepare a process that does runs of a study: its parent says what ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hide_warnings()


def reset_in_child() -> None:
    """End silently at a signal, as data-loading processes do: the parent prints the line."""
    for number in SIGNALS:
        if signal.getsignal(number) == interrupt:
            # Ctrl-C reaches the children of a program as well.
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.SIG_IGN if is_ctrl_c else signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=reset_in_child)


def hide_warnings() -> None:
    """Hide the warnings of libraries, which are no lines for users; `python -W default` shows them.

    What matters in one is printed in our words where it arises.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
