"""Test-time flips (--tta): which of them keep texts and class names true, and how to undo them.

Each flip of the input is predicted; the predictions are flipped back and averaged. A flip that
would make the name of a class wrong ("left lung") is left out for all inputs. One that would make a
text wrong is left out for the image of this text.
"""

import re
from itertools import product

import numpy as np
from torch import Tensor

from imaging.augment import MIRRORS, mirror_prompt, names_a_side, view
from imaging.layouts import plain_name

# --- images --------------------------------------------------------------------------------------

# The views of an image: names of MIRRORS, one after another.
IMAGE_FLIPS = ((), ("hflip",), ("vflip",), ("hflip", "vflip"))
AXES = {"hflip": -1, "vflip": -2}  # of an array (...,H,W)


def image_flips(classes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the flips of IMAGE_FLIPS that make no class wrong, and print which are left out."""
    wrong = set()
    for name, axis in MIRRORS.items():
        sided = [text for text in classes if names_a_side((plain_name(text),), axis)]
        if sided:
            print(f"--tta: no {axis} flips, which would make the class {sided[0]} wrong")
            wrong.add(name)
    return [flip for flip in IMAGE_FLIPS if wrong.isdisjoint(flip)]


def flip_sample(sample: dict, flip: tuple[str, ...]) -> dict | None:
    """Return a sample with its image and its text flipped; None if the text cannot be mirrored.

    flip: one of IMAGE_FLIPS. The sample keeps it as "flips", so that boxes and points from files
    are mirrored too.
    """
    for name in flip:
        sample = view(sample, name)
        if sample["view"] != name:  # a side in the text may be anatomy
            return None
    return sample | {"flips": flip}


def flip_back(probabilities: Tensor, flip: tuple[str, ...]) -> np.ndarray:
    """Undo the flip of an image in its probabilities (K,H,W). Returns a view."""
    axes = [AXES[name] for name in flip]
    return np.flip(probabilities.numpy(), axes)


def count_views(prompt: str, flips: list[tuple[str, ...]]) -> int:
    """Return for how many of the flips the text of an image can be mirrored."""
    impossible = {name for name, axis in MIRRORS.items() if mirror_prompt(prompt, axis) is None}
    return sum(impossible.isdisjoint(flip) for flip in flips)


def say_views(counts: list[int], unit: str) -> None:
    """Print how many views are averaged. counts: the number of views of each image or volume.

    Raises ValueError, one line, if none has more than one view.
    """
    most = max(counts)
    if most == 1:
        raise ValueError("--tta: every flip would make a class or a text wrong; remove it")

    fewer = sum(count < most for count in counts)
    if fewer:
        print(
            f"--tta: {most} views of an {unit}, fewer for {fewer} of {len(counts)} {unit}s, as a "
            "side in their text may be anatomy"
        )
    else:
        print(f"--tta: {most} views of each {unit}")


# --- volumes -------------------------------------------------------------------------------------

# The axes of a volume in RAS, with the words that a flip along them makes wrong.
VOLUME_AXES = {
    "left-right": ("left", "right"),
    "front-back": ("anterior", "posterior", "ventral", "dorsal"),
    "head-foot": ("superior", "inferior", "upper", "lower", "cranial", "caudal"),
}


def volume_flips(classes: list[str]) -> list[tuple[int, ...]]:
    """Return the flips that make no class wrong, and print which are left out.

    Each is a tuple of the axes 1 to 3 of an array (K,X,Y,Z); the first is (), the volume itself.
    """
    choices = []  # for each axis, whether it may be flipped
    for axis, words in VOLUME_AXES.items():
        pattern = rf"\b({'|'.join(words)})\b"
        sided = [text for text in classes if re.search(pattern, plain_name(text))]
        if sided:
            print(f"--tta: no {axis} flips, which would make the class {sided[0]} wrong")
        choices.append((False,) if sided else (False, True))

    flips = []
    for is_flipped in product(*choices):
        axes = [axis for axis, flipped in enumerate(is_flipped, 1) if flipped]
        flips.append(tuple(axes))
    return flips
