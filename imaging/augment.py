"""Joint augmentation of an image, its mask and its prompt, with torchvision.transforms.v2."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

# A side in a prompt is a position in the picture only if one of these follows. Elsewhere it may be
# anatomy ("left ventricle"), which would be wrong after mirroring.
AFTER_A_POSITION = r"(?=\s*(?:[,.;]|$|(?:of|in) the\b|and\b|left\b|right\b))"
MIRRORED = {
    "horizontal": {"left": "right", "right": "left"},
    "vertical": {"top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"},
}


def mirror_prompt(prompt: str, axis: str) -> str | None:
    """Return the prompt of the mirrored image, or None if a side in it may be anatomy.

    axis: "horizontal" exchanges left and right, "vertical" top and bottom.
    """
    words = MIRRORED[axis]
    side = rf"\b({'|'.join(words)})\b"
    all_sides = re.findall(side, prompt, re.I)
    positions = re.findall(side + AFTER_A_POSITION, prompt, re.I)
    if len(all_sides) != len(positions):
        return None
    return re.sub(side, lambda match: words[match[0].lower()], prompt, flags=re.I)


def names_a_side(classes: tuple[str, ...], axis: str) -> bool:
    """Return True if the name of a class holds a side that mirroring along `axis` makes wrong."""
    return any(mirror_prompt(name, axis) != name for name in classes)


MIRRORS = {"hflip": "horizontal", "vflip": "vertical"}
LIGHTS = {"bright": 1.25, "dark": 0.8}  # factors of the brightness
VIEWS = ("original", *MIRRORS, *LIGHTS)


def view(sample: dict, name: str) -> dict:
    """Return one of VIEWS of a sample (data.py), with its name under "view".

    Features of a frozen encoder are cached for each view, so that views replace random
    augmentation. A sample with a prompt that cannot be mirrored stays the "original".
    """
    if name in MIRRORS:
        prompt = mirror_prompt(sample["prompt"], MIRRORS[name])
        if prompt is None:
            return sample | {"view": "original"}
        mirrored = {"prompt": prompt, "view": name}
        side = -1 if name == "hflip" else -2
        for key in ("image", "mask"):
            if key in sample:
                mirrored[key] = sample[key].flip(side)
        return sample | mirrored

    if name in LIGHTS:
        image = sample["image"] * LIGHTS[name]
        image = image.round().clamp(max=255).to(torch.uint8)
        return sample | {"image": image, "view": name}
    return sample | {"view": name}


@dataclass(frozen=True)
class Augment:
    """Joint augmentation of image, mask and prompt, mild enough that the prompt stays true."""

    flip: float = 0.5  # probability along each axis; sides in the prompt are exchanged
    rotate: float = 10  # largest angle in degrees, in both directions
    shift: float = 0.05  # largest shift as a share of the side
    scale: float = 0.1  # largest relative change of size
    brightness: float = 0.2  # relative change; hue and saturation stay, since prompts name colours
    contrast: float = 0.2  # relative change

    def __call__(self, image, mask, prompt: str, size: int | None, rng, classes=()):
        """Return an augmented image, its mask and its prompt.

        image uint8 (3,H,W), mask int64 (H,W) -> uint8 (3,size,size), int64 (size,size). size None
        keeps the size of the image. rng: a generator of numpy. classes: names of the mask's
        classes; no flip makes one of them wrong.
        """
        image = tv_tensors.Image(image)
        mask = tv_tensors.Mask(mask[None].to(torch.uint8))  # (1,H,W)
        steps = []
        if size:
            steps.append(v2.Resize((size, size), antialias=True))

        flips = {"horizontal": v2.RandomHorizontalFlip, "vertical": v2.RandomVerticalFlip}
        for axis, flip in flips.items():
            mirrored_prompt = mirror_prompt(prompt, axis)
            is_chosen = rng.random() < self.flip
            if is_chosen and mirrored_prompt is not None and not names_a_side(classes, axis):
                steps.append(flip(1.0))
                prompt = mirrored_prompt

        affine = v2.RandomAffine(
            self.rotate,
            translate=(self.shift, self.shift),
            scale=(1 - self.scale, 1 + self.scale),
            interpolation=v2.InterpolationMode.BILINEAR,
        )
        steps.append(affine)
        steps.append(v2.ColorJitter(self.brightness, self.contrast))

        image, mask = apply(v2.Compose(steps), image, mask, rng)
        return image, mask, prompt


def apply(transform, image, mask, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Apply a transform of torchvision with randomness from rng: uint8 (3,S,S), int64 (S,S).

    torchvision draws from torch's global generator, which is restored afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # only the CPU's generator
        image, mask = transform(image, mask)
    return image.as_subclass(Tensor), mask[0].as_subclass(Tensor).long()


@dataclass(frozen=True)
class GITractAugment:
    """Augmentation of the GI-tract study. Each step is applied with probability one half.

    github.com/JaeL17/Medical-Image-Segmentation, utils.py, with albumentations 1.3.1.
    """

    rotate: float = 0.15  # quirk: degrees; the study probably meant a share of the half turn
    shift: float = 0.12  # largest shift as a share of the side
    scale: float = 0.12  # largest relative change of size
    light: float = 0.2  # largest change of contrast (relative) and brightness (share of 255)
    holes: tuple[int, int] = (5, 8)  # number of squares of size // 20 pixels that become 0

    def __call__(self, image, mask, prompt: str, size: int, rng, classes=()):
        """Return an augmented image, its mask and the prompt as it is.

        image uint8 (3,H,W), mask int64 (H,W) -> uint8 (3,size,size), int64 (size,size). quirk:
        flips whatever the classes are called. Where nearest neighbour falls exactly between two
        source pixels, the result may differ by one source pixel from OpenCV's.
        """
        # Nearest neighbour as in OpenCV.
        image = F.interpolate(image[None], (size, size))[0]  # (3,S,S)
        mask = F.interpolate(mask[None, None].to(torch.uint8), (size, size))[0]  # (1,S,S)

        for axis in (2, 1):
            if rng.random() < 0.5:
                image = image.flip(axis)
                mask = mask.flip(axis)
        if rng.random() < 0.5:
            image, mask = self.move(image, mask, size, rng)
        if rng.random() < 0.5:
            contrast, brightness = rng.uniform(-self.light, self.light, 2)
            image = (image * (1 + contrast) + 255 * brightness).clamp(0, 255).to(torch.uint8)
        if rng.random() < 0.5:
            self.cut_holes(image, mask, size, rng)
        return image, mask[0].long(), prompt

    def move(self, image, mask, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Shift, scale and rotate image (3,S,S) and mask (1,S,S), mirrored beyond the border."""
        angle = rng.uniform(-self.rotate, self.rotate)
        dx, dy = rng.uniform(-1, 1, 2) * self.shift
        scale = 1 + rng.uniform(-self.scale, self.scale)
        margin = min(size - 1, math.ceil(size * (self.shift + self.scale)))  # covers any move

        moved = []
        for x, mode in ((image, "bilinear"), (mask, "nearest")):
            x = v2.functional.pad(x, [margin], padding_mode="reflect")
            x = v2.functional.affine(
                x,
                angle=angle,
                translate=[dx * size, dy * size],
                scale=scale,
                shear=[0.0, 0.0],
                interpolation=v2.InterpolationMode(mode),
            )
            moved.append(x[:, margin : margin + size, margin : margin + size])  # (C,S,S)
        return moved[0], moved[1]

    def cut_holes(self, image, mask, size: int, rng: np.random.Generator) -> None:
        """Set random squares of image (3,S,S) and mask (1,S,S) to 0, in place."""
        side = size // 20
        count = rng.integers(*self.holes, endpoint=True)
        corners = rng.integers(0, size - side + 1, (count, 2))
        for y, x in corners:
            image[:, y : y + side, x : x + side] = 0
            mask[:, y : y + side, x : x + side] = 0
