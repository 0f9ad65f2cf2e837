"""Augmentation moves the mask with the image and keeps the prompt correct."""

import numpy as np
import pytest
import torch

from imaging import augment
from recipes import images

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize(
    "prompt, horizontal, vertical",
    [
        ("polyp, located in top left of the image", "polyp, located in top right of the image",
         "polyp, located in bottom left of the image"),
        ("located in right, bottom left of the image", "located in left, bottom right of the image",
         "located in right, top left of the image"),
        ("tumor at the Right in the breast", "tumor at the left in the breast",
         "tumor at the Right in the breast"),
        ("Left ventricular cavity", None, "Left ventricular cavity"),
        ("left kidney at the left", None, "left kidney at the left"),
        ("lower lobe", "lower lobe", None),
        ("", "", ""),
    ],
)  # fmt: skip
def test_a_mirror_keeps_the_prompt_true(prompt, horizontal, vertical):
    assert augment.mirror_prompt(prompt, "horizontal") == horizontal
    assert augment.mirror_prompt(prompt, "vertical") == vertical


def test_augmentation_moves_image_and_mask_together_and_tells_the_prompt():
    image, mask = torch.zeros(3, 64, 96, dtype=torch.uint8), torch.zeros(64, 96, dtype=torch.int64)
    image[:, 8:24, 10:30], mask[8:24, 10:30] = 200, 1
    prompt, still = (
        "blob, located in top left of the image",
        augment.Augment(brightness=0, contrast=0),
    )
    seen = set()
    for seed in range(24):
        x, y, text = still(image, mask, prompt, 64, np.random.default_rng(seed))
        assert x.shape == (3, 64, 64) and y.shape == (64, 64) and set(y.unique().tolist()) == {0, 1}
        bright = x[0] > 100
        assert (bright & (y == 1)).sum() / (bright | (y == 1)).sum() > 0.85
        row, column = (y.nonzero().float().mean(0) / 64).tolist()
        assert ("left" in text) == (column < 0.5) and ("top" in text) == (row < 0.5)
        seen.add(text)
    assert len(seen) == 4
    before = torch.get_rng_state()
    again = [still(image, mask, prompt, 64, np.random.default_rng(5))[0] for _ in range(2)]
    assert torch.equal(*again) and torch.equal(before, torch.get_rng_state())


def test_nothing_is_mirrored_whose_class_tells_a_side():
    image = torch.arange(64, dtype=torch.uint8).repeat(3, 64, 1)  # brighter to the right
    image += 2 * torch.arange(64, dtype=torch.uint8)[:, None]  # and downwards
    mask, still = torch.zeros(64, 64, dtype=torch.int64), augment.Augment(0.5, 0, 0, 0, 0, 0)
    ways = {}
    for classes in ("stomach", "liver"), ("left lung", "right lung"), ("upper lobe",):
        for seed in range(24):
            x = still(image, mask, "", 64, np.random.default_rng(seed), classes)[0][0].int()
            way = x[0, 63] > x[0, 0], x[63, 0] > x[0, 0]
            ways.setdefault(classes[0], set()).add(tuple(map(bool, way)))
    every = {(True, True), (True, False), (False, True), (False, False)}
    assert ways["stomach"] == every
    assert ways["left lung"] == {(True, True), (True, False)}
    assert ways["upper lobe"] == {(True, True), (False, True)}


def test_no_view_is_mirrored_whose_class_tells_a_side():
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    picture[:, :, 6:] = 200
    how = dict(config=None, load_image=lambda s: {"image": s["image"]}, tokenize=None, augment=None)
    how |= dict(views=("original", "hflip"), preprocess_mask=lambda mask, _: mask)
    found = {}
    for classes in ("stomach", "liver"), ("left lung", "right lung"):
        sample = {"image": picture, "mask": picture[0].long(), "prompt": "", "classes": classes}
        items = [
            images.image_inputs(sample, True, np.random.default_rng(k), **how) for k in range(9)
        ]
        found[classes[0]] = {bool(item["image"][0, 0, 0]) for item in items}
    assert found == {"stomach": {False, True}, "left lung": {False}}
