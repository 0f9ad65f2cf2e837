"""The values that options take, checked in one way for the command line and for Python.

parser.add_argument("--lr", type=Number(above=0))    # error: --lr -1: must be a number above 0
lr = Number(above=0).check(lr)                       # ValueError: -1: must be a number above 0
"""

import argparse
import os
import sys
from dataclasses import dataclass
from numbers import Integral, Real

LARGEST = 10**9  # the limit of whole numbers without an upper limit of their own


class Values:
    """The values that an option takes. str() describes them, and each kind has `check`."""

    def read(self, text: str):
        """Return the Python value of a word of the command line."""
        return text

    def refuse(self, value):
        """Raise ValueError, one line: the value, and what it must be."""
        text = value if isinstance(value, str) else repr(value)
        if isinstance(value, Real):
            text = str(value).removesuffix(".0")  # 2 rather than 2.0

        if not text.strip() or not text.isprintable():
            text = repr(text)
        text = text if len(text) <= 60 else f"{text[:60]}…"
        raise ValueError(f"{text}: must be {self}")

    def __call__(self, text: str):
        """Parse a word of the command line, as `type` of argparse."""
        try:
            return self.check(self.read(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None


@dataclass(frozen=True)
class Number(Values):
    """Numbers within limits, never NaN or infinity.

    whole: whole numbers only. word: a word that is allowed instead of a number. note: an addition
    to the limits in messages.
    """

    whole: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    word: str | None = None
    note: str | None = None

    def __str__(self) -> str:
        words = ["a whole number" if self.whole else "a number"]

        if self.at_least is not None and self.at_most is not None:
            words.append(f"from {self.at_least} to {self.at_most}")
        elif self.at_least is not None:
            words.append(f"of at least {self.at_least}")
        if self.above is not None:
            words.append(f"above {self.above}")
        if self.below is not None:
            words.append(f"and below {self.below}")
        if self.note:
            words.append(self.note)

        text = " ".join(words)
        return f"{text}, or {self.word}" if self.word else text

    def read(self, text: str):
        """Return the number in a text, or the text itself if it is no number."""
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            return text

    def check(self, value) -> int | float | str:
        """Return the value as an int or float of Python. Raises ValueError, one line."""
        if self.word is not None and isinstance(value, str) and value == self.word:
            return value
        if isinstance(value, str) and self.read(value) != value:
            self.refuse(repr(value))  # "1" in Python: the quotes are the mistake
        kind = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind):
            self.refuse(value)

        is_low = self.at_least is not None and value < self.at_least
        is_low |= self.above is not None and value <= self.above
        is_high = self.at_most is not None and value > self.at_most
        is_high |= self.below is not None and value >= self.below
        is_finite = abs(value) <= sys.float_info.max  # False for NaN
        if is_low or is_high or not is_finite:
            self.refuse(value)
        if self.whole and self.at_most is None and value > LARGEST:
            raise ValueError(f"{value}: must be a whole number of at most {LARGEST}")
        return int(value) if self.whole else float(value)


@dataclass(frozen=True)
class Choice(Values):
    """One of several words."""

    choices: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def check(self, value) -> str:
        """Return the value if it is one of the choices. Raises ValueError, one line."""
        if not isinstance(value, str) or value not in self.choices:
            self.refuse(value)
        return value


class Text(Values):
    """A text or a path."""

    def __str__(self) -> str:
        return "a text"

    def check(self, value) -> str:
        """Return the value as text. Raises ValueError, one line."""
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            self.refuse(value)
        return text


class Flag(Values):
    """True or False."""

    def __str__(self) -> str:
        return "True or False"

    def check(self, value) -> bool:
        """Return the value if it is True or False. Raises ValueError, one line."""
        if not isinstance(value, bool):
            self.refuse(value)
        return value


POSITIVE = Number(whole=True, at_least=1)
SEED = Number(whole=True, at_least=0, at_most=2**63 - 1)  # torch takes no larger one
LENGTH = Number(above=0)
GREY_LEVEL = Number(whole=True, at_least=0, at_most=255)
