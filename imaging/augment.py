"""Joint augmentation of an image, its mask and its prompt, on torchvision.transforms.v2."""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

# A side in a prompt names a place in the picture if nothing but one of these follows. Elsewhere it
# may be anatomy ("left ventricle"), whose name a mirror would make wrong.
AFTER_A_PLACE = r"(?=\s*(?:[,.;]|$|(?:of|in) the\b|and\b|left\b|right\b))"
MIRRORED = {
    "horizontal": {"left": "right", "right": "left"},
    "vertical": {"top": "bottom", "bottom": "top", "upper": "lower", "lower": "upper"},
}


def mirror_prompt(prompt: str, axis: str) -> str | None:
    """The prompt of the mirrored image ("left" -> "right"), or None if a side may be anatomy.

    axis: "horizontal" exchanges left and right, "vertical" top and bottom.
    """
    words = MIRRORED[axis]
    side = rf"\b({'|'.join(words)})\b"
    if len(re.findall(side, prompt, re.I)) != len(re.findall(side + AFTER_A_PLACE, prompt, re.I)):
        return None
    return re.sub(side, lambda match: words[match[0].lower()], prompt, flags=re.I)


def sided(classes: tuple[str, ...], axis: str) -> bool:
    """Whether the name of a class tells a side, which a mirrored image would make false."""
    return any(mirror_prompt(name, axis) != name for name in classes)


MIRRORS = {"hflip": "horizontal", "vflip": "vertical"}
LIGHTS = {"bright": 1.25, "dark": 0.8}  # what brightness is multiplied by
VIEWS = ("original", *MIRRORS, *LIGHTS)


def view(sample: dict, name: str) -> dict:
    """A sample (data.py) as one of VIEWS shows it, and `view`, its name.

    These are the augmentation of kept features, which are made for each of them once. A sample
    whose prompt holds a side that may be anatomy is not mirrored: it stays the "original".
    """
    mirrored = name in MIRRORS
    prompt = mirror_prompt(sample["prompt"], MIRRORS[name]) if mirrored else sample["prompt"]
    if prompt is None:
        return sample | {"view": "original"}
    pixels = {key: sample[key] for key in ("image", "mask") if key in sample}
    if mirrored:
        pixels = {key: x.flip(-1 if name == "hflip" else -2) for key, x in pixels.items()}
    if name in LIGHTS:
        pixels["image"] = (pixels["image"] * LIGHTS[name]).round().clamp(max=255).to(torch.uint8)
    return sample | pixels | {"prompt": prompt, "view": name}


@dataclass(frozen=True)
class Augment:
    """Joint augmentation of image, mask and prompt, mild enough that the prompt stays true."""

    flip: float = 0.5  # probability along each axis; sides in the prompt are exchanged
    rotate: float = 10  # degrees either way
    shift: float = 0.05  # share of the side, either way
    scale: float = 0.1  # the size changes by up to this share
    brightness: float = 0.2  # relative change; hue and saturation stay, since prompts name colours
    contrast: float = 0.2

    def __call__(self, image, mask, prompt: str, size: int | None, rng, classes=()):
        """uint8 (3,H,W), int64 (H,W), str -> uint8 (3,size,size), int64 (size,size), str.

        size None: the image keeps its own. rng: numpy's Generator. classes: names of the mask's;
        no flip where one of them tells a side.
        """
        image, mask = (
            tv_tensors.Image(image),
            tv_tensors.Mask(mask[None].to(torch.uint8)),
        )  # (1,H,W)
        steps = [v2.Resize((size, size), antialias=True)] if size else []
        for axis, flip in (
            ("horizontal", v2.RandomHorizontalFlip),
            ("vertical", v2.RandomVerticalFlip),
        ):
            mirrored = mirror_prompt(prompt, axis)
            if rng.random() < self.flip and mirrored is not None and not sided(classes, axis):
                steps, prompt = [*steps, flip(1.0)], mirrored
        shift, scale = (self.shift, self.shift), (1 - self.scale, 1 + self.scale)
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(self.rotate, shift, scale, interpolation=bilinear))
        steps.append(v2.ColorJitter(self.brightness, self.contrast))
        return *apply(v2.Compose(steps), image, mask, rng), prompt


def apply(transform, image, mask, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A transform of torchvision, whose chance comes from rng -> (3,S,S) uint8, (S,S) int64."""
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
        torch.default_generator.manual_seed(int(rng.integers(2**63)))  # the CPU's alone
        image, mask = transform(image, mask)
    return image.as_subclass(torch.Tensor), mask[0].as_subclass(torch.Tensor).long()


@dataclass(frozen=True)
class GITractAugment:
    """That of the GI-tract study (github.com/JaeL17/Medical-Image-Segmentation, utils.py), whose
    library was albumentations 1.3.1. Each step has a chance of one half."""

    rotate: float = 0.15  # quirk: degrees, where a share of the half turn was probably meant
    shift: float = 0.12  # share of the side
    scale: float = 0.12
    light: float = 0.2  # contrast, and brightness as a share of 255
    holes: tuple[int, int] = (5, 8)  # of side // 20 pixels, where image and mask become 0

    def __call__(self, image, mask, prompt: str, size: int, rng, classes=()):
        """uint8 (3,H,W), int64 (H,W), str -> uint8 (3,size,size), int64 (size,size), str.

        quirk: flips whatever the classes are called. Where nearest neighbour falls exactly between
        two source pixels, the result may differ by one source pixel from OpenCV's.
        """
        both = image, mask[None].to(torch.uint8)
        both = [F.interpolate(x[None], (size, size))[0] for x in both]  # nearest, as cv2 finds it
        for axis in (2, 1):
            if rng.random() < 0.5:
                both = [x.flip(axis) for x in both]
        if rng.random() < 0.5:
            both = self.move(*both, size, rng)
        image, mask = both
        if rng.random() < 0.5:
            contrast, brightness = rng.uniform(-self.light, self.light, 2)
            image = (image * (1 + contrast) + 255 * brightness).clamp(0, 255).to(torch.uint8)
        if rng.random() < 0.5:
            hole = size // 20
            count = rng.integers(*self.holes, endpoint=True)
            for y, x in rng.integers(0, size - hole + 1, (count, 2)):
                image[:, y : y + hole, x : x + hole] = mask[:, y : y + hole, x : x + hole] = 0
        return image, mask[0].long(), prompt

    def move(self, image, mask, size: int, rng: np.random.Generator) -> list[torch.Tensor]:
        """Shifted, scaled and turned, mirrored beyond the border."""
        angle, (dx, dy) = rng.uniform(-self.rotate, self.rotate), rng.uniform(-1, 1, 2) * self.shift
        margin = min(size - 1, math.ceil(size * (self.shift + self.scale)))  # enough for all of it
        how = dict(
            angle=angle,
            translate=[dx * size, dy * size],
            scale=1 + rng.uniform(-self.scale, self.scale),
            shear=[0.0, 0.0],
        )
        moved = []
        for x, mode in ((image, "bilinear"), (mask, "nearest")):
            x = v2.functional.pad(x, [margin], padding_mode="reflect")
            x = v2.functional.affine(x, **how, interpolation=v2.InterpolationMode(mode))
            moved.append(x[:, margin : margin + size, margin : margin + size])
        return moved
