"""Describe the objects of a mask in words, and put the words into text prompts.

The words are those of the medvlsm study (Poudel et al., MIDL 2024, arXiv 2308.07706): number, size,
location, shape and colour. The study computed the first three from the masks, as here, and asked a
network about shape and colour. Here all five are measured:

- An object is a connected component; diagonal neighbours connect. Components of at most SPECK of
  the image are specks and are ignored, unless the mask holds nothing else.
- Size is the share of the image that an object fills (SMALL, MEDIUM, LARGE).
- Location is a cell of a 3x3 grid: the only cell that holds at least IN_CELL of the object, or else
  the cell of the centre of its box.
- Shape is that of the largest object. It is irregular if the object fills little of its convex
  hull (SOLID), else round, oval or elongated by the axes of the ellipse with the same second
  moments (ROUND, OVAL).
- Colour is the name in PALETTE nearest to the median colour of all objects, in CIELAB. Highlights
  hardly change a median.
"""

import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull

from imaging import pictures
from imaging.files import read_json

SPECK = 0.0001  # largest share of the image that is ignored
SMALL = 0.001  # smallest share of a small object; below it objects are tiny
MEDIUM = 0.08  # a larger share is medium
LARGE = 0.30  # a larger share is large
IN_CELL = 0.1  # share of an object above which it counts as being in a cell of the grid
SOLID = 0.9  # smallest share of its convex hull that a regular object fills
ROUND = 1.3  # largest ratio of the axes of a round object
OVAL = 2.2  # largest ratio of the axes of an oval one; longer objects are elongated

LOCATIONS = (  # cells of the 3x3 grid, row by row
    "top left", "top", "top right", "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip

# Names of colours and the sRGB colours that they stand for. Names of wide ranges have several.
# Chosen by eye on the median colours of 1000 polyps (Kvasir-SEG) and of nine skin lesions (ISIC).
PALETTE = (
    ("black", (20, 18, 18)),
    ("gray", (75, 75, 75)),
    ("gray", (128, 128, 128)),
    ("gray", (180, 180, 180)),
    ("white", (240, 238, 230)),
    ("red", (200, 30, 30)),
    ("red", (150, 40, 35)),
    ("red", (195, 75, 55)),
    ("orange", (235, 130, 50)),
    ("orange", (205, 110, 60)),
    ("orange", (235, 155, 95)),
    ("brown", (70, 45, 35)),
    ("brown", (110, 70, 45)),
    ("brown", (140, 90, 60)),
    ("brown", (150, 85, 30)),
    ("brown", (180, 105, 60)),
    ("brown", (180, 130, 90)),
    ("yellow", (235, 205, 60)),
    ("yellow", (225, 190, 100)),
    ("tan", (205, 165, 125)),
    ("pink", (250, 190, 200)),
    ("pink", (235, 150, 140)),
    ("pink", (220, 125, 105)),
    ("pink", (240, 145, 120)),
    ("pink", (175, 135, 130)),
    ("pink", (255, 110, 180)),
    ("purple", (120, 50, 140)),
    ("purple", (165, 125, 190)),
    ("blue", (40, 70, 190)),
    ("blue", (110, 160, 220)),
    ("green", (40, 140, 60)),
    ("green", (140, 180, 90)),
)

# What --language replaces: a JSON file with the same keys. The templates p1 to p9 and `absent` (an
# empty mask) take the words in braces; p7 to p9 also take {description}. Larger numbers than those
# listed are written in digits. The English of the study has no plural.
ENGLISH = {
    "absent": "no {target}",
    "p1": "{target}",
    "p2": "{shape} {target}",
    "p3": "{colour} {shape} {target}",
    "p4": "{size} {colour} {shape} {target}",
    "p5": "{number} {size} {colour} {shape} {target}",
    "p6": "{number} {size} {colour} {shape} {target}, located in {location} of the image",
    "p7": "{target} {description}",
    "p8": "{number} {size} {colour} {shape} {target} {description}",
    "p9": "{number} {size} {colour} {shape} {target} {description} located in {location} of the "
    "image",
    "numbers": [
        "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
        "twelve",
    ],
    "sizes": {"tiny": "tiny", "small": "small", "medium": "medium", "large": "large"},
    "locations": {name: name for name in LOCATIONS},
    "shapes": {
        "round": "round",
        "oval": "oval",
        "elongated": "elongated",
        "irregular": "irregular",
    },
    "colours": {name: name for name, _ in PALETTE},
}  # fmt: skip
WORDS = ("target", "number", "size", "location", "shape", "colour")
WITH_DESCRIPTION = ("p7", "p8", "p9")
HERE = "preparation/mask_words.py"  # for messages


# --- objects --------------------------------------------------------------------------------------


@dataclass
class MaskObject:
    """One connected component of a mask."""

    window: tuple[slice, slice]  # rows and columns of its box in the image
    mask: np.ndarray  # bool (h,w), within the window
    share: float  # of the image


def find_objects(mask: np.ndarray) -> list[MaskObject]:
    """Return the components of a mask, bool (H,W), without specks; [] for an empty mask.

    If the mask holds nothing but specks, its largest one is returned.
    """
    if not mask.any():
        return []

    numbered, _ = ndimage.label(mask, np.ones((3, 3)))  # 1, 2, … for each component
    areas = np.bincount(numbered.ravel())
    areas[0] = 0  # the background
    shares = areas / mask.size
    is_object = shares > SPECK
    if not is_object.any():
        is_object[shares.argmax()] = True

    objects = []
    for k, window in enumerate(ndimage.find_objects(numbered), 1):
        if is_object[k]:
            objects.append(MaskObject(window, numbered[window] == k, float(shares[k])))
    return objects


def size_name(share: float) -> str:
    """Return the size class of an object that fills a share of its image."""
    if share > LARGE:
        return "large"
    if share > MEDIUM:
        return "medium"
    return "tiny" if share < SMALL else "small"


def location_name(thing: MaskObject, size: tuple[int, int]) -> str:
    """Return the cell of the 3x3 grid over an image of size (H,W) that an object lies in."""
    H, W = size
    rows, columns = thing.window
    y, x = np.nonzero(thing.mask)
    cell_rows = 3 * (y + rows.start) // H  # 0, 1, 2 from the top
    cell_columns = 3 * (x + columns.start) // W  # 0, 1, 2 from the left
    counts = np.bincount(3 * cell_rows + cell_columns, minlength=9)

    (cells,) = np.nonzero(counts >= IN_CELL * len(y))
    if len(cells) == 1:
        return LOCATIONS[cells[0]]
    row = int(1.5 * (rows.start + rows.stop) / H)  # of the centre of the box
    column = int(1.5 * (columns.start + columns.stop) / W)
    return LOCATIONS[3 * row + column]


# --- shape ----------------------------------------------------------------------------------------


def solidity(mask: np.ndarray) -> float:
    """Return the share of its convex hull that an object, bool (h,w), fills; at most 1.

    The hull goes through the middles of the pixels' outer edges: through their corners it would be
    too large for small objects.
    """
    y, x = np.nonzero(pictures.outline(mask, 1))
    edges = []
    for dx, dy in ((0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)):
        edges.append(np.stack([x + dx, y + dy], axis=1))
    hull = ConvexHull(np.concatenate(edges))
    return min(1.0, mask.sum() / hull.volume)  # in two dimensions the volume is the area


def axis_ratio(mask: np.ndarray) -> float:
    """Return long by short axis of the ellipse with the second moments of an object, bool (h,w)."""
    coordinates = np.stack(np.nonzero(mask))  # (2,N)
    moments = np.cov(coordinates, ddof=0) + np.eye(2) / 12  # pixels are squares, not points
    shortest, longest = np.linalg.eigvalsh(moments)
    return float(np.sqrt(longest / shortest))


def shape_name(mask: np.ndarray) -> str:
    """Return the shape of an object, bool (h,w)."""
    if solidity(mask) < SOLID:
        return "irregular"
    ratio = axis_ratio(mask)
    if ratio <= ROUND:
        return "round"
    return "oval" if ratio <= OVAL else "elongated"


# --- colour ---------------------------------------------------------------------------------------


def srgb_to_lab(colours: np.ndarray) -> np.ndarray:
    """Convert sRGB colours, 0..255 (N,3), to CIELAB (N,3) with the white point D65.

    The formulas and constants are those of IEC 61966-2-1 and CIE 15.
    """
    values = np.asarray(colours, np.float64) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)

    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    white = to_xyz.sum(axis=1)
    x, y, z = (linear @ to_xyz.T / white).T  # (N,) each, 0..1

    def compress(t: np.ndarray) -> np.ndarray:
        return np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)

    lightness = 116 * compress(y) - 16
    a = 500 * (compress(x) - compress(y))
    b = 200 * (compress(y) - compress(z))
    return np.stack([lightness, a, b], axis=1)


PALETTE_LAB = srgb_to_lab(np.array([colour for _, colour in PALETTE]))


def colour_name(pixels: np.ndarray) -> str:
    """Return the name of the median colour of pixels, uint8 (N,3)."""
    lab = srgb_to_lab(np.median(pixels, axis=0)[None])  # (1,3)
    distances = np.linalg.norm(PALETTE_LAB - lab, axis=1)
    return PALETTE[distances.argmin()][0]


# --- descriptions and prompts ---------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """The words for a mask that is not empty; they are keys of ENGLISH."""

    number: int
    sizes: tuple[str, ...]  # each once, tiny to large
    locations: tuple[str, ...]  # of each object, from the top
    shape: str
    colour: str


def describe(image: np.ndarray, mask: np.ndarray) -> Description | None:
    """Describe the objects of a mask, bool (H,W), of an image, uint8 (H,W,3); None if empty."""
    objects = find_objects(mask)
    if not objects:
        return None

    sizes = {size_name(thing.share) for thing in objects}
    largest = max(objects, key=lambda thing: thing.share)
    pixels = np.concatenate([image[thing.window][thing.mask] for thing in objects])
    return Description(
        number=len(objects),
        sizes=tuple(size for size in ENGLISH["sizes"] if size in sizes),
        locations=tuple(location_name(thing, mask.shape) for thing in objects),
        shape=shape_name(largest.mask),
        colour=colour_name(pixels),
    )


def number_word(number: int, language: dict) -> str:
    """Return a number in words, or in digits if the language does not list it."""
    numbers = language["numbers"]
    return numbers[number - 1] if number <= len(numbers) else str(number)


def make_prompts(
    description: Description | None, target: str, general: list[str], language: dict
) -> dict[str, str | list[str]]:
    """Return the prompts p0 to p6 of a mask, and p7 to p9 if there are `general` descriptions.

    description: None for an empty mask. general: texts such as "which is a growth of tissue"; p7
    to p9 list a prompt for each.
    """
    types = [f"p{k}" for k in range(1, 10 if general else 7)]
    if description is None:
        absent = language["absent"].format(target=target)
        return {"p0": ""} | dict.fromkeys(types, absent)

    words = {
        "target": target,
        "number": number_word(description.number, language),
        "size": ", ".join(language["sizes"][size] for size in description.sizes),
        "location": ", ".join(language["locations"][name] for name in description.locations),
        "shape": language["shapes"][description.shape],
        "colour": language["colours"][description.colour],
    }
    prompts = {"p0": ""}
    for kind in types:
        if kind in WITH_DESCRIPTION:
            prompts[kind] = [language[kind].format(**words, description=text) for text in general]
        else:
            prompts[kind] = language[kind].format(**words)
    return prompts


# --- other languages ------------------------------------------------------------------------------


def read_language(path: Path | None) -> dict:
    """Return the words and templates of a JSON file with the keys of ENGLISH; ENGLISH without one.

    Raises ValueError, one line, for a missing or unknown key, a value of another type, and a
    template with unknown words in braces.
    """
    if path is None:
        return ENGLISH
    language = read_json(path)
    check_keys(language, ENGLISH, str(path))

    for key, english in ENGLISH.items():
        value = language[key]
        if isinstance(english, dict):
            check_keys(value, english, f"{path}, {key}")
            texts = list(value.values())
        elif isinstance(english, list) and isinstance(value, list) and value:
            texts = value
        elif isinstance(english, str):
            texts = [value]
        else:
            raise ValueError(f'{path}, {key}: expected a list of words, ["one", "two", …]')

        for text in texts:
            if not isinstance(text, str) or not text.strip() or text.splitlines() != [text]:
                raise ValueError(f"{path}, {key}: {text!r} is not a text of one line")
        if isinstance(english, str):
            check_template(value, key, path)
    return language


def check_keys(content, expected: dict, where: str) -> None:
    """Raise ValueError, one line, unless a JSON value is an object with exactly these keys."""
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object with the keys {', '.join(expected)}")
    missing = [key for key in expected if key not in content]
    if missing:
        raise ValueError(f"{where}: has no {', '.join(missing)}; see ENGLISH in {HERE}")
    unknown = [key for key in content if key not in expected]
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; keys are {', '.join(expected)}")


def check_template(template: str, kind: str, path: Path) -> None:
    """Raise ValueError, one line, if a template of a language file cannot be filled."""
    words = WORDS
    if kind == "absent":
        words = ("target",)
    elif kind in WITH_DESCRIPTION:
        words = (*WORDS, "description")

    try:
        fields = [piece[1:] for piece in string.Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"{path}, {kind}: {template!r} is not a template ({error})") from None
    for name, form, conversion in fields:
        if name is not None and (name not in words or form or conversion):
            known = ", ".join(f"{{{word}}}" for word in words)
            raise ValueError(f"{path}, {kind}: {{{name}}} is unknown; write {known}")
