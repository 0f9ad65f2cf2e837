"""Anatomy's rules for organs that were found one by one: what cannot be is taken away.

The Universal Model's way after its predictions: `organ_post_process` of utils/utils.py,
github.com/ljwztc/CLIP-Driven-Universal-Model at 43c1239. Neighbours are 26.

    an organ            one piece, the largest
    the lungs           the two largest pieces of both together; the left one lies further left
    portal and splenic  nothing below the lowest slice of the pancreas
    tumours             of liver and kidneys only in the organ grown by 3 mm: the liver in one
                        piece, both kidneys together in two
    all else            as it is

What differs from the official code, where it is plainly wrong or knows no other grid than its own:
- One piece of lungs, as where both touch: there both become empty. A large piece and a speck: there
  the speck becomes a lung. Here each lung keeps of the pieces what it was found to be.
- The left lung without the right one: empty there. No pancreas: there an error.
- The veins depend on the order of the classes there.
- Two voxels of 1.5 mm are millimetres here. There organs are closed before they are grown by the
  same box, which changes nothing but that what touches the volume's border may be lost.
"""

import numpy as np

from imaging.layouts import plain_name
from imaging.volumes import labelled_components, largest_components

ONE_PIECE = (
    "spleen", "right kidney", "left kidney", "gall bladder", "esophagus", "liver", "stomach",
    "aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum",
    "colon", "intestine", "rectum", "bladder", "prostate", "left head of femur",
    "right head of femur", "celiac trunk",
)  # fmt: skip
LUNGS = "right lung", "left lung"
VEINS, PANCREAS = "portal vein and splenic vein", "pancreas"
INSIDE = {"liver tumor": ("liver",), "kidney tumor": ("right kidney", "left kidney")}
REACH = 3.0  # mm, by which an organ is grown: two voxels of 1.5 mm there
ALIKE = 4  # how many times larger one lung may be; of the official code's checks that are disabled


def organ_rules(masks: dict[str, np.ndarray], spacing=(1.5, 1.5, 1.5)) -> dict[str, np.ndarray]:
    """{class: bool (X,Y,Z)} -> the same classes by the rules above; arrays are not written to.

    Axes grow to the right, front and top; spacing in mm. Names are those of the Universal Model,
    capitals and _ do not matter. A rule of several classes needs all of them.
    """
    names = {plain_name(name): name for name in masks}
    given, found = {plain: masks[name] for plain, name in names.items()}, {}
    for name, mask in given.items():
        found[name] = largest_components(mask, 1) if name in (*ONE_PIECE, *LUNGS) else mask
    if given.keys() >= {VEINS, PANCREAS}:
        found[VEINS] = not_below(given[VEINS], found[PANCREAS])
    if given.keys() >= {*LUNGS}:
        found |= zip(LUNGS, lungs(*(given[name] for name in LUNGS)), strict=True)
    for tumor, organs in INSIDE.items():
        if given.keys() >= {tumor, *organs}:
            whole = np.logical_or.reduce([given[name] for name in organs])
            found[tumor] = given[tumor] & grown(largest_components(whole, len(organs)), spacing)
    return {names[plain]: mask for plain, mask in found.items()}


def ruled(names) -> set[str]:
    """Which of these classes the rules are about."""
    about = {*ONE_PIECE, *LUNGS, VEINS, *INSIDE}
    return {name for name in names if plain_name(name) in about}


def unruled(names) -> dict[str, list[str]]:
    """Classes whose rule is not applied -> the classes that it needs and that are not there."""
    plain = {*map(plain_name, names)}
    needs = INSIDE | {VEINS: (PANCREAS,)}
    lost = {name: [need for need in needs[name] if need not in plain] for name in needs}
    return {name: lost[name] for name in lost if name in plain and lost[name]}


def not_below(mask: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bool (X,Y,Z) -> without what lies below the lowest voxel of another mask, if it has one."""
    result, there = mask.copy(), other.any((0, 1))  # (Z,)
    result[:, :, : there.argmax()] = False
    return result


def lungs(right: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bool (X,Y,Z) each -> the same."""
    both = right | left
    if (found := labelled_components(both)) is None:
        return right, left
    box, parts, sizes = found
    kept = np.zeros_like(both)
    kept[box] = np.isin(parts, sizes[:2, 0])
    if len(sizes) == 1 or sizes[0, 1] > ALIKE * sizes[1, 1]:
        return right & kept, left & kept
    columns = [(parts == number).sum((1, 2)) for number in sizes[:2, 0]]  # voxels at each x
    at = [np.average(np.arange(len(counts)), weights=counts) for counts in columns]
    leftmost = np.zeros_like(both)
    leftmost[box] = parts == sizes[np.argmin(at), 0]
    return kept & ~leftmost, leftmost


def grown(mask: np.ndarray, spacing) -> np.ndarray:
    """Bool (X,Y,Z) -> grown by REACH to all sides, as far as the volume goes."""
    from scipy import ndimage

    if not mask.any():
        return mask
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    reach = [round(REACH / mm) for mm in spacing]
    sides = zip(box, reach, mask.shape, strict=True)
    box = tuple(slice(max(at.start - n, 0), min(at.stop + n, end)) for at, n, end in sides)
    result, size = np.zeros_like(mask), [2 * n + 1 for n in reach]
    result[box] = ndimage.maximum_filter(mask[box].view(np.uint8), size, mode="constant")
    return result
