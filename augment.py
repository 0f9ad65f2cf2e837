"""Joint augmentation of an image, its mask and its prompt, on torchvision.transforms.v2."""

import re
from dataclasses import dataclass

import numpy as np
import torch
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


@dataclass(frozen=True)
class Augment:
    """Joint augmentation of image, mask and prompt, mild enough that the prompt stays true."""

    flip: float = 0.5  # probability along each axis; sides in the prompt are exchanged
    rotate: float = 10  # degrees either way
    shift: float = 0.05  # share of the side, either way
    scale: float = 0.1  # the size changes by up to this share
    brightness: float = 0.2  # relative change; hue and saturation stay, since prompts name colours
    contrast: float = 0.2

    def __call__(self, image, mask, prompt: str, size: int, rng: np.random.Generator):
        """uint8 (3,H,W), int64 (H,W), str -> uint8 (3,size,size), int64 (size,size), str."""
        image, mask = (
            tv_tensors.Image(image),
            tv_tensors.Mask(mask[None].to(torch.uint8)),
        )  # (1,H,W)
        steps = [v2.Resize((size, size), antialias=True)]
        for axis, flip in (
            ("horizontal", v2.RandomHorizontalFlip),
            ("vertical", v2.RandomVerticalFlip),
        ):
            mirrored = mirror_prompt(prompt, axis)
            if rng.random() < self.flip and mirrored is not None:
                steps, prompt = [*steps, flip(1.0)], mirrored
        shift, scale = (self.shift, self.shift), (1 - self.scale, 1 + self.scale)
        bilinear = v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(self.rotate, shift, scale, interpolation=bilinear))
        steps.append(v2.ColorJitter(self.brightness, self.contrast))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            torch.default_generator.manual_seed(int(rng.integers(2**63)))  # the CPU's alone
            image, mask = v2.Compose(steps)(image, mask)
        return image.as_subclass(torch.Tensor), mask[0].as_subclass(torch.Tensor).long(), prompt
