"""Swin UNETR on volumes: crops, windows, its recipes and how it is loaded."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

import swin_unetr3d
from engine import runs
from engine.runs import DataSets
from imaging import volumes
from imaging.layouts import same_name_different_index
from losses import dice_bce, dice_ce, gi_tract_dice_ce
from recipes.base import (
    VOLUME_OPTIONS,
    Family,
    Protocol,
    Recipe,
    Settings,
    class_forward,
    load_variant,
    parameter_groups,
)

# Keys of a sample that scoring and pictures need.
FOR_VOLUME_SCORES = (
    "name",
    "prompt",
    "size",
    "group",
    "dataset",
    "spacing",
    "classes",
    "regions",
    "place",
)


# --- crops and losses -----------------------------------------------------------------------------


def volume_inputs(sample, train, rng, config, settings) -> dict:
    """Return the item of a sample: random crops in training, else the whole prepared volume.

    In training, n crops: image (n,C,D,H,W) and mask (n,1,D,H,W) of class indices, or (n,K,D,H,W) of
    0 and 1 where classes overlap; 255 is ignored. Else: image (C,x,y,z) and `truth` (1,X,Y,Z), with
    the keys that scoring needs.
    """
    if not train:
        item = {"image": sample["image"], "truth": sample["truth"][None]}
        return item | {key: sample[key] for key in FOR_VOLUME_SCORES}

    crops, crop_masks = volumes.random_crops(
        sample["image"],
        sample["mask"],
        sample["voxels"],
        settings.crops_per_volume,
        config.image_size,
        rng,
        settings.crop_ratio,
    )
    images = []
    masks = []
    for crop, crop_mask in zip(crops, crop_masks, strict=True):
        image, mask = volumes.augment(crop, crop_mask, rng, **settings.augment)
        images.append(image)
        masks.append(mask)

    mask = torch.stack(masks)[:, None]  # (n,1,D,H,W)
    if sample["regions"]:
        mask = masks_of_regions(mask, sample["regions"])  # (n,K,D,H,W)
    return {"image": torch.stack(images), "mask": mask}


def masks_of_regions(labels: Tensor, regions: tuple[tuple[int, ...], ...]) -> Tensor:
    """Return a mask of each region: labels uint8 (n,1,D,H,W) -> uint8 (n,K,D,H,W) of 0, 1 and 255.

    regions: the labels that belong to each of the K overlapping classes.
    """
    masks = []
    for numbers in regions:
        masks.append(torch.isin(labels, torch.tensor(numbers)))  # (n,1,D,H,W)
    return torch.cat(masks, 1).byte().masked_fill(labels == 255, 255)  # (n,K,D,H,W)


def collate_crops(items: list[dict]) -> dict:
    """Return the crops of several volumes as one batch."""
    return {key: torch.cat([item[key] for item in items]) for key in items[0]}


def volume_loss(
    logits: Tensor, batch: dict, loss_of_classes: Callable = dice_ce
) -> tuple[Tensor, dict]:
    """Return Dice + BCE for a single class or overlapping classes, else `loss_of_classes`.

    logits (B,K,D,H,W). Returns a scalar, and its parts by name.
    """
    logits = logits.float()
    mask = batch["mask"]
    if mask.shape[1] == logits.shape[1]:
        return dice_bce(logits, mask)
    return loss_of_classes(logits, mask[:, 0].long())


def volume_predict(model: nn.Module, item: dict, settings) -> tuple[Tensor, None]:
    """Return probabilities (K,X,Y,Z) on the file's own grid, in RAS orientation.

    item["asked"], if given, lists the classes that a Universal Model computes; None: all.
    """
    probabilities = volumes.window_probabilities(
        model,
        item["image"],
        item["place"],
        settings.overlap,
        settings.window_batch,
        item.get("asked"),
        progress=True,
    )
    return probabilities, None


def prepared(dataset: volumes.VolumeSet, model: nn.Module, cache) -> volumes.VolumeSet:
    """Return volumes on the grid that a model sees; their files are in the folder `cache`."""
    c = model.config
    result = dataset.prepared(c.spacing, model.preprocess, c.in_channels, cache)
    if c.intensity:
        result.check_hu()
    return result


def volume_recipe(model: swin_unetr3d.SwinUNETR, settings: Protocol) -> Recipe:
    """Return the recipe of a Swin UNETR, or of a model on its backbone."""
    return Recipe(
        inputs=partial(volume_inputs, config=model.config, settings=settings),
        forward=class_forward,
        loss=settings.loss,
        predict=partial(volume_predict, settings=settings),
        groups=parameter_groups,
        collate=collate_crops,
    )


# --- loading --------------------------------------------------------------------------------------


def check_modality(model: nn.Module, train_set) -> None:
    """Raise ValueError, one line, if a model takes Hounsfield units and a volume is not CT."""
    window = model.config.intensity
    if window is None or not train_set:
        return
    for entry in train_set.entries:
        if "CT" not in (entry.modality or "CT").upper():
            raise ValueError(
                f"{entry.root} holds {entry.modality}, the model takes HU of {window}; use "
                "--intensity zscore"
            )


def volume_overrides(train_set, weights, overrides: dict) -> dict:
    """Return overrides with the classes of the training set and, without weights, its channels."""
    first = train_set.entries[0]
    is_overlapping = first.regions is not None
    num_classes = len(first.classes)
    if is_overlapping:
        num_classes -= 1  # without the background
    overrides = {"num_classes": num_classes} | overrides
    overrides |= {"overlapping": is_overlapping}
    if weights == "none":
        overrides = {"in_channels": train_set.channels} | overrides
    return overrides


def name_classes(model: nn.Module, train_set, weights) -> None:
    """Give a model the training set's class names; print which of its own names they replace."""
    classes = train_set.entries[0].classes
    known = model.config.classes
    if weights != "none" and same_name_different_index(classes, known):
        print(f"the head of {', '.join(known)} learns {', '.join(classes)}")
    model.config = replace(model.config, classes=classes)


def load_volumes(weights, variant, settings: Protocol, overrides: dict, train_set):
    """Return a Swin UNETR with the classes of the training set, if any, else those of its file."""
    if train_set is not None:
        overrides = volume_overrides(train_set, weights, overrides)
    model = load_variant(
        swin_unetr3d.SwinUNETR, swin_unetr3d.VARIANTS, weights, variant, settings, overrides
    )
    if train_set is not None:
        name_classes(model, train_set, weights)
    check_modality(model, train_set)
    return model


def swin_encoder(name: str) -> bool:
    """Return True for the name of a parameter of the pretrained encoder."""
    return name.startswith("swinViT.")


# --- settings -------------------------------------------------------------------------------------

SWIN = {
    "default": Protocol(
        hub_ids={
            "base": "MONAI/swin_unetr_btcv_segmentation",
            "small": "darragh/swinunetr-btcv-small",
            "tiny": "darragh/swinunetr-btcv-tiny",
        },
        prompt="",
        # No flips: all volumes have one orientation, and the position of an organ identifies it.
        augment={"rotate": (15.0, 0.2), "scale": (0.1, 0.5), "shift": (0.1, 0.5)},
        crops_per_volume=4,
        crop_ratio=(1.0, 1.0),
        overlap=0.5,
        window_batch=4,
        eval_every=10,
        loss=volume_loss,
        lr=1e-4,
        backbone_lr=1e-4,
        backbone=swin_encoder,
        weight_decay=1e-5,
        batch_size=1,
        epochs=300,
    ),
}
# BTCV fine-tuning of Project-MONAI/research-contributions at 21ed8e5, SwinUNETR/BTCV, on one GPU.
# It starts from the self-supervised encoder: --weights model_swinvit.pt.
# Quirks: it flips left and right although classes have a side; class 0 and classes that a crop
# lacks have a Dice term.
# Differences: its learning rate changes by epoch and is 0 in the first epoch, ours changes by step
# and is above 0. Its validation blends windows by the mean and its test by a Gaussian; ours always
# use a Gaussian.
SWIN["origin"] = replace(
    SWIN["default"],
    hub_ids={},
    config={"image_size": (96, 96, 96), "spacing": (1.5, 1.5, 2.0), "intensity": (-175.0, 250.0)},
    augment={"flip": (0.2, 0.2, 0.2), "rotate90": 0.2, "scale": (0.1, 0.1), "shift": (0.1, 0.1)},
    loss=partial(volume_loss, loss_of_classes=partial(gi_tract_dice_ce, smooth=1e-5)),
    decay_all=True,
    epochs=5000,
    eval_every=100,
    warmup=0.01,
    clip_grad=None,
    dtype="float16",
)


def hu_window(texts: list[str]) -> tuple[float, float] | None:
    """Return the two HU of --intensity that become 0 and 1; None for z-scores.

    Raises ValueError, one line, for anything else.
    """
    if texts == ["zscore"]:
        return None
    try:
        low, high = map(float, texts)
    except ValueError:
        low = high = math.nan
    if not low < high:
        words = " ".join(texts)
        raise ValueError(f"--intensity {words}: give two HU, the lower first, or zscore")
    return low, high


@dataclass(frozen=True)
class VolumeFamily(Family):
    """A model that segments volumes, window by window."""

    takes: ClassVar[str] = "volumes"
    options: ClassVar[tuple] = (VOLUME_OPTIONS,)

    def check_options(self, options) -> None:
        """Raise ValueError, one line, for values of options that models of volumes do not take."""
        if options.score_size == "network":
            raise ValueError(
                "--score-size network: volumes are scored on their own grid; remove the option"
            )
        if options.schedule == "plateau":
            raise ValueError(
                "--schedule plateau: needs a validation loss, which volumes do not have"
            )
        if options.size:
            self.check_sides(options.size)
        if options.intensity:
            hu_window(options.intensity)
        ratio = options.crop_ratio
        if ratio and (len(ratio) < 2 or not 0 < sum(ratio) < math.inf):
            raise ValueError(
                "--crop-ratio: give two numbers, or one for each class, from 0 up and not all 0"
            )

    def check_sides(self, sides: list[int]) -> None:
        """Raise ValueError, one line, unless --size fits the model."""
        if len(sides) not in (1, 3):
            words = " ".join(map(str, sides))
            raise ValueError(f"--size {words}: give one number, or of volumes three")
        if any(side % 32 or side < 32 for side in sides) or max(sides) < 64:
            raise ValueError(
                "--size: sides of volumes must be multiples of 32, one of them 64 or more"
            )

    def config_of(self, settings: Settings) -> dict:
        """Return the fields of Config that the command line sets: sides, spacing and intensity."""
        config = {}
        if settings.size:
            config["image_size"] = tuple(settings.size * (3 // len(settings.size)))
        if settings.spacing:
            config["spacing"] = tuple(settings.spacing)
        if settings.intensity:
            config["intensity"] = hu_window(settings.intensity)
        return config

    def make_ready(
        self, model: nn.Module, recipe: Recipe, data_sets: DataSets, settings: Settings
    ) -> Recipe:
        """Prepare all volumes for the model, and check their labels."""
        for sets in (data_sets.parts, data_sets.tests):
            for name, dataset in sets.items():
                sets[name] = prepared(dataset, model, settings.cache)
        runs.check_prepared(data_sets, settings)
        return recipe


FAMILY = VolumeFamily(SWIN, swin_unetr3d.VARIANTS, load_volumes, volume_recipe, swin_encoder)
