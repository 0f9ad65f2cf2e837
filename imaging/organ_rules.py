"""Anatomical rules for organs that a model predicts one by one: remove what cannot be.

They follow `organ_post_process` of the Universal Model, utils/utils.py of
github.com/ljwztc/CLIP-Driven-Universal-Model at 43c1239. Components have 26 neighbours.

    organs                    keep the largest component
    lungs                     keep the two largest components of both together; the one that lies
                              further left is the left lung
    portal and splenic veins  keep nothing below the lowest slice of the pancreas
    tumors of liver, kidneys  keep what lies in the organ dilated by 3 mm: the largest component of
                              the liver, the two largest of both kidneys together
    all other classes         stay as they are

Differences from the official code, where that is plainly wrong or assumes its own grid:
- If both lungs touch and are one component, both become empty there; if one of the two components
  is a speck, the speck becomes a lung. Here each lung keeps its own part of the two components.
- The left lung without the right lung becomes empty there; veins without the pancreas are an error.
- The result for the veins depends on the order of the classes there.
- Dilation there is two voxels of 1.5 mm, here 3 mm on any grid. There, organs are closed with the
  same box before they are dilated, which changes nothing, except that voxels at the border of the
  volume may be lost.
"""

import numpy as np

from imaging.layouts import plain_name
from imaging.volumes import labelled_components, largest_components

ONE_PIECE = (
    "spleen",
    "right kidney",
    "left kidney",
    "gall bladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "postcava",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
    "duodenum",
    "colon",
    "intestine",
    "rectum",
    "bladder",
    "prostate",
    "left head of femur",
    "right head of femur",
    "celiac trunk",
)
LUNGS = ("right lung", "left lung")
VEINS = "portal vein and splenic vein"
PANCREAS = "pancreas"
INSIDE = {"liver tumor": ("liver",), "kidney tumor": ("right kidney", "left kidney")}
NEEDED = INSIDE | {VEINS: (PANCREAS,)}  # class -> the classes without which its rule is not applied
MARGIN = 3.0  # mm around an organ: two voxels of 1.5 mm in the official code
MOST_UNEQUAL = 4  # largest ratio of the lungs' sizes; from a check that is disabled there


def organ_rules(masks: dict[str, np.ndarray], spacing=(1.5, 1.5, 1.5)) -> dict[str, np.ndarray]:
    """Return the masks of all classes after the rules above; the given arrays are not changed.

    masks: class -> bool (X,Y,Z), axes to the right, front and top; spacing in mm. Names are those
    of the Universal Model, in capitals or with _, too. A rule that involves several classes is
    applied if all of them are given.
    """
    names = {}
    before = {}
    for name, mask in masks.items():
        names[plain_name(name)] = name
        before[plain_name(name)] = mask

    after = {}
    for name, mask in before.items():
        is_one_piece = name in ONE_PIECE or name in LUNGS
        after[name] = largest_components(mask, 1) if is_one_piece else mask
    if before.keys() >= {VEINS, PANCREAS}:
        after[VEINS] = remove_below(before[VEINS], after[PANCREAS])
    if before.keys() >= {*LUNGS}:
        lungs = separate_lungs(before["right lung"], before["left lung"])
        after |= zip(LUNGS, lungs, strict=True)
    for tumor, organs in INSIDE.items():
        if before.keys() >= {tumor, *organs}:
            organ = np.logical_or.reduce([before[name] for name in organs])
            organ = largest_components(organ, len(organs))
            after[tumor] = before[tumor] & dilate(organ, spacing)
    return {names[name]: mask for name, mask in after.items()}


def classes_with_rules(names) -> set[str]:
    """Return the classes that a rule concerns."""
    concerned = {*ONE_PIECE, *LUNGS, VEINS, *INSIDE}
    return {name for name in names if plain_name(name) in concerned}


def classes_missing_for_rules(names) -> dict[str, list[str]]:
    """Return the classes whose rule cannot be applied, each with the missing classes it needs."""
    present = {plain_name(name) for name in names}
    result = {}
    for name, needed in NEEDED.items():
        missing = [other for other in needed if other not in present]
        if name in present and missing:
            result[name] = missing
    return result


def remove_below(mask: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return a bool mask (X,Y,Z) without the slices below the lowest voxel of another mask."""
    is_occupied = other.any((0, 1))  # (Z,)
    lowest = is_occupied.argmax()  # 0 if the other mask is empty
    result = mask.copy()
    result[:, :, :lowest] = False
    return result


def separate_lungs(right: np.ndarray, left: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the masks of the right and the left lung, bool (X,Y,Z) each, after their rule."""
    both = right | left
    components = labelled_components(both)
    if components is None:
        return right, left
    box, numbers, sizes = components
    kept = np.zeros_like(both)
    kept[box] = np.isin(numbers, sizes[:2, 0])

    # One component, or a lung and a speck, does not show which voxels belong to which lung.
    if len(sizes) == 1 or sizes[0, 1] > MOST_UNEQUAL * sizes[1, 1]:
        return right & kept, left & kept

    mean_x = []
    for number in sizes[:2, 0]:
        counts = (numbers == number).sum((1, 2))  # voxels at each x
        mean_x.append(np.average(np.arange(len(counts)), weights=counts))
    leftmost = np.zeros_like(both)
    leftmost[box] = numbers == sizes[np.argmin(mean_x), 0]
    return kept & ~leftmost, leftmost


def dilate(mask: np.ndarray, spacing) -> np.ndarray:
    """Return a bool mask (X,Y,Z) dilated by a box that reaches MARGIN mm to each side."""
    from scipy import ndimage

    if not mask.any():
        return mask

    # Only the box that the result can reach is computed.
    (box,) = ndimage.find_objects(mask.view(np.uint8))
    sides = []
    size = []
    for side, mm, length in zip(box, spacing, mask.shape, strict=True):
        reach = round(MARGIN / mm)
        sides.append(slice(max(side.start - reach, 0), min(side.stop + reach, length)))
        size.append(2 * reach + 1)
    box = tuple(sides)

    result = np.zeros_like(mask)
    result[box] = ndimage.maximum_filter(mask[box].view(np.uint8), size, mode="constant")
    return result
