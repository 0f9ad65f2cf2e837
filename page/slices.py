"""Slices of a volume as radiologists look at them, with masks drawn on.

Volumes are (X,Y,Z) in RAS: axes grow to the patient's right, front and top. `pictures.plane` turns
a slice: the patient's left is on the right of the picture, the front at the top of an axial slice
and at the left of a sagittal one, and the head at the top of the others. Letters at the edges name
the sides.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from imaging import pictures

# --- planes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plane:
    """The plane across an axis of a volume, and the sides of the patient in its picture."""

    axis: int  # the one that the slider moves along
    edges: str  # letters at the left, right, upper and lower edge


PLANES = {
    "axial": Plane(2, "RLAP"),
    "coronal": Plane(1, "RLSI"),
    "sagittal": Plane(0, "APSI"),
}


def picture_size(plane: Plane, size, spacing, longest: int = 512) -> tuple[int, int]:
    """Return height and width in pixels of a plane of a volume.

    size: voxels (X,Y,Z); spacing: mm. All planes have the same scale, and the longest side of the
    volume has `longest` pixels.
    """
    lengths = np.multiply(size, spacing)  # mm
    width, height = pictures.drawn_size(lengths, plane.axis, longest / lengths.max())
    return height, width


def voxel_at(plane: Plane, x: float, y: float, size) -> dict[int, int]:
    """Return {axis: index} of the voxel at a pixel of a slice, whose axes the picture shows.

    x, y: of the pixel, as shares of the picture's width and height. size: voxels (X,Y,Z).
    """
    indices = {}
    for axis, share in zip(pictures.PLANE_AXES[plane.axis], (x, y), strict=True):
        n = size[axis]
        place = min(max(int(share * n), 0), n - 1)  # from the right or the top
        indices[axis] = n - 1 - place
    return indices


# --- grey levels ----------------------------------------------------------------------------------

CT_WINDOWS = {  # level and width in Hounsfield units
    "Soft tissue": (40, 400),
    "Lung": (-600, 1500),
    "Bone": (400, 1800),
}


def window_limits(level: float, width: float) -> tuple[float, float]:
    """Return the values that become black and white."""
    return level - width / 2, level + width / 2


def percentile_limits(image: np.ndarray, share: float) -> tuple[float, float]:
    """Return the values between which all but a share of the voxels lie, half of it on each side.

    Percentiles are taken of every second voxel along each axis. share: in percent.
    """
    sample = image[::2, ::2, ::2]
    low, high = np.percentile(sample, (share / 2, 100 - share / 2))
    return float(low), float(high)


def grey_levels(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Return values as uint8: 0 at and below the lower limit, 255 at and above the upper one."""
    low, high = limits
    scaled = (values.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
    return scaled.clip(0, 255).round().astype(np.uint8)


def axial_order(x: np.ndarray) -> np.ndarray:
    """Return a volume (X,Y,Z) whose axial slices, those that people scroll through, are contiguous.

    A slice across the order of the memory takes ten times as long.
    """
    return np.asfortranarray(x)


def whole_hu(image: np.ndarray) -> np.ndarray:
    """Return Hounsfield units, float32 (X,Y,Z), rounded to whole numbers in half of the memory."""
    limits = np.iinfo(np.int16)
    return axial_order(image.round().clip(limits.min, limits.max).astype(np.int16))


def sixteen_bits(image: np.ndarray) -> np.ndarray:
    """Return float32 (X,Y,Z) as uint16, with the smallest value as 0 and the largest as 65535."""
    low = float(image.min())
    high = float(image.max())
    scaled = (image - low) * (65535 / max(high - low, 1e-12))
    return axial_order(scaled.round().astype(np.uint16))


# --- masks ----------------------------------------------------------------------------------------


class LabelMasks:
    """The masks of classes that do not overlap."""

    def __init__(self, labels: np.ndarray, values: list[int]):
        """Count the voxels. labels: uint8 (X,Y,Z). values: of the n classes in it."""
        self.labels = axial_order(labels)
        self.values = values
        self.sums = np.bincount(labels.ravel("K"), minlength=256)  # (256,)

    def counts(self, threshold: float) -> list[int]:
        """Return the voxels of each class. threshold: has no effect."""
        return [int(self.sums[value]) for value in self.values]

    def slices(self, plane: Plane, index: int, threshold: float, shown: list[int]) -> np.ndarray:
        """Return the masks of a slice, bool (n,H,W).

        threshold: has no effect. shown: indices of the n classes, from 0.
        """
        part = pictures.plane(self.labels, plane.axis, index)  # (H,W)
        values = np.uint8([self.values[k] for k in shown])
        return np.equal.outer(values, part)

    def volumes(self, threshold: float):
        """Yield the mask of each class, bool (X,Y,Z). threshold: has no effect."""
        for value in self.values:
            yield self.labels == value


def threshold_steps(model_threshold: float) -> np.ndarray:
    """Return the thresholds that a user can choose, float32: 0.01 to 0.99, and the model's own."""
    steps = np.arange(1, 100) / 100
    return np.unique(np.float32([*steps, model_threshold]))


class ThresholdMasks:
    """The masks of a single class or of overlapping classes, at any of the `steps`.

    A voxel is stored as the number of steps below its probability: one byte instead of four, and
    comparing this number gives the same mask as comparing the probability.
    """

    def __init__(self, probabilities: np.ndarray, steps: np.ndarray):
        """Store probabilities, float32 (n,X,Y,Z). steps: of `threshold_steps`."""
        self.steps = steps
        self.levels = []  # n volumes, uint8 (X,Y,Z)
        sums = []
        for class_probabilities in probabilities:
            levels = np.empty(class_probabilities.shape, np.uint8)
            for x, part in enumerate(class_probabilities):  # (Y,Z), as searchsorted needs 8 bytes
                levels[x] = np.searchsorted(steps, part)
            self.levels.append(axial_order(levels))
            sums.append(np.bincount(levels.ravel("K"), minlength=256))
        self.sums = np.stack(sums)  # (n,256)

    def step(self, threshold: float) -> int:
        """Return the index of the step that is nearest to a threshold."""
        return int(np.abs(self.steps - np.float32(threshold)).argmin())

    def counts(self, threshold: float) -> list[int]:
        """Return the voxels of each class above a threshold."""
        return self.sums[:, self.step(threshold) + 1 :].sum(1).tolist()

    def slices(self, plane: Plane, index: int, threshold: float, shown: list[int]) -> np.ndarray:
        """Return the masks of a slice above a threshold, bool (n,H,W).

        shown: indices of the n classes, from 0.
        """
        step = self.step(threshold)
        H, W = pictures.plane(self.levels[0], plane.axis, index).shape
        masks = np.zeros((len(shown), H, W), bool)
        for mask, k in zip(masks, shown, strict=True):
            mask[:] = pictures.plane(self.levels[k], plane.axis, index) > step
        return masks

    def volumes(self, threshold: float):
        """Yield the mask of each class above a threshold, bool (X,Y,Z)."""
        for levels in self.levels:
            yield levels > self.step(threshold)


# --- pictures -------------------------------------------------------------------------------------


def draw_slice(
    grey: np.ndarray, masks: np.ndarray, colours: list[tuple], opacity: float, size: tuple[int, int]
) -> np.ndarray:
    """Return a slice with masks drawn on, uint8 (*size,3).

    grey: uint8 (H,W). masks: bool (n,H,W), with n colours; later ones lie on top. opacity: 0..1.
    size: height and width of the picture. Grey levels are interpolated, masks are not.
    """
    height, width = size
    picture = Image.fromarray(np.ascontiguousarray(grey)).resize((width, height))
    canvas = np.repeat(np.asarray(picture, np.float32)[..., None], 3, 2)  # (h,w,3)

    masks = pictures.resize_nearest(masks, width, height)  # (n,h,w)
    for inside, colour in zip(masks, colours, strict=True):
        canvas[inside] = (1 - opacity) * canvas[inside] + opacity * np.float32(colour)
    return canvas.round().astype(np.uint8)


def write_edges(picture: np.ndarray, edges: str) -> np.ndarray:
    """Write the letters of a plane at the left, right, upper and lower edge, uint8 (h,w,3)."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=16)
    w, h = image.size
    positions = ((5, h / 2, "lm"), (w - 5, h / 2, "rm"), (w / 2, 5, "mt"), (w / 2, h - 5, "mb"))
    for letter, (x, y, anchor) in zip(edges, positions, strict=True):
        draw.text((x, y), letter, "white", font, anchor=anchor, stroke_width=2, stroke_fill="black")
    return np.asarray(image)


def side_by_side(planes: list[np.ndarray], gap: int = 6) -> np.ndarray:
    """Return pictures of planes, uint8 (h,w,3), in a row on black: uint8 (H,W,3)."""
    tallest = max(len(plane) for plane in planes)
    parts = []
    for plane in planes:
        below = tallest - len(plane)
        parts.append(np.pad(plane, ((0, below), (0, gap), (0, 0))))
    return np.concatenate(parts, 1)[:, :-gap]
