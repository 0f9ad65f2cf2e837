"""Values that options take: one check and one wording for the command line and for Python.

parser.add_argument("--lr", type=Number(above=0))    # error: --lr -1: must be a number above 0
lr = Number(above=0).check(lr)                       # ValueError: -1: must be a number above 0
"""

import argparse
import os
import sys
from dataclasses import dataclass
from numbers import Integral, Real

LARGEST = 10**9  # of whole numbers that have no upper limit of their own


class Values:
    """What an option takes; str() says it. Each kind has `check`."""

    def read(self, text: str):
        """Return what a word of the command line is in Python."""
        return text

    def refuse(self, given):
        """Raise ValueError, one line: what is given, and what must be."""
        text = given if isinstance(given, str) else repr(given)
        if isinstance(given, Real):
            text = str(given).removesuffix(".0")
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

    whole: whole numbers only. word: what may stand in place of a number. note: what a message says
    beside the limits.
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
        """Return the number that a text is, the text itself if it is none."""
        try:
            return int(text) if self.whole else float(text)
        except ValueError:
            return text

    def check(self, given) -> int | float | str:
        """Return what is given as Python's own number. Raises ValueError, one line."""
        if self.word is not None and isinstance(given, str) and given == self.word:
            return given
        if isinstance(given, str) and self.read(given) != given:
            self.refuse(repr(given))  # Python's "1": the quotes are what is wrong
        if isinstance(given, bool) or not isinstance(given, Integral if self.whole else Real):
            self.refuse(given)

        is_low = self.at_least is not None and given < self.at_least
        is_low |= self.above is not None and given <= self.above
        is_high = self.at_most is not None and given > self.at_most
        is_high |= self.below is not None and given >= self.below
        is_finite = abs(given) <= sys.float_info.max  # false of NaN
        if is_low or is_high or not is_finite:
            self.refuse(given)
        if self.whole and self.at_most is None and given > LARGEST:
            raise ValueError(f"{given}: must be a whole number of at most {LARGEST}")
        return int(given) if self.whole else float(given)


@dataclass(frozen=True)
class Choice(Values):
    """One of some words."""

    choices: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def check(self, given) -> str:
        """Return a word that is one of the choices. Raises ValueError, one line."""
        if not isinstance(given, str) or given not in self.choices:
            self.refuse(given)
        return given


class Text(Values):
    """A text, or a path."""

    def __str__(self) -> str:
        return "a text"

    def check(self, given) -> str:
        """Return a text, or a path as text. Raises ValueError, one line."""
        text = os.fspath(given) if isinstance(given, os.PathLike) else given
        if not isinstance(text, str):
            self.refuse(given)
        return text


class Flag(Values):
    """True or False."""

    def __str__(self) -> str:
        return "True or False"

    def check(self, given) -> bool:
        """Return True or False. Raises ValueError, one line."""
        if not isinstance(given, bool):
            self.refuse(given)
        return given


POSITIVE = Number(whole=True, at_least=1)
SEED = Number(whole=True, at_least=0, at_most=2**63 - 1)  # torch takes no larger one
GREY_LEVEL = Number(whole=True, at_least=0, at_most=255)
