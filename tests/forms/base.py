"""Forms of a checkpoint, and places in its files: what the model contract test's rows are made of.

A form is one way in which weights of a model are published or saved. The other files of this folder
hold the forms of one model each, and the official class in any size where a package has it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass(frozen=True, eq=False)
class Form:
    """One form of a checkpoint."""

    # Write a state dict into an empty folder; return the source, or a dict of arguments, for
    # `from_pretrained`.
    write: Callable
    config: object  # of the model that is written and loaded
    names: Callable = dict  # official names -> those of the file, further tensors included
    says: tuple[str, ...] = ()  # what loading prints, and nothing of what other forms print
    arguments: dict = field(default_factory=dict)  # of `from_pretrained`, besides the source
    is_whole: bool = True  # False: a part of a model, which serves to test faults alone
    loaded_config: object = None  # of the loaded model, where it is not `config`

    @property
    def name(self) -> str:
        return self.write.__name__


@dataclass(frozen=True, eq=False)
class Place:
    """A tensor in a form's file: it will be renamed, dropped, doubled and cut."""

    form: Form
    name: str  # in the file
    told: str = ""  # how an error calls it, if not as the file does
    axis: int | None = None  # along which it is cut; None: the last that is longer than 1
    argument: str = "source"  # the argument of `from_pretrained` whose file the error names


def saved(content, path: Path) -> Path:
    """Write a pickle of torch; return its path."""
    torch.save(content, path)
    return path


def cut(t: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Return a tensor without its last entry along an axis."""
    if axis is None:
        axis = max(i for i in range(t.ndim) if t.shape[i] > 1)
    return t.narrow(axis, 0, t.shape[axis] - 1).contiguous()
