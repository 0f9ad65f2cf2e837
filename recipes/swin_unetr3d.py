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
from imaging.layouts import moved
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

FOR_VOLUME_SCORES = (
    "name", "prompt", "size", "group", "dataset", "spacing", "classes", "regions", "place",
)  # fmt: skip


def volume_inputs(sample, train, rng, config, settings) -> dict:
    """Of training random crops, image (n,C,D,H,W), mask (n,1,D,H,W) of class numbers, or where
    classes overlap (n,K,D,H,W) of 0 and 1; else the prepared volume and what scoring needs."""
    if not train:
        item = {"image": sample["image"], "truth": sample["truth"][None]}
        return item | {key: sample[key] for key in FOR_VOLUME_SCORES}
    where = (sample[key] for key in ("image", "mask", "voxels"))
    how = {"n": settings.crops_per_volume, "size": config.image_size, "rng": rng}
    crops = zip(*volumes.random_crops(*where, **how, ratios=settings.crop_ratio), strict=True)
    images, masks = zip(
        *(volumes.augment(*crop, rng, **settings.augment) for crop in crops), strict=True
    )
    image, mask = torch.stack(images), torch.stack(masks)[:, None]
    if sample["regions"]:
        each = [torch.isin(mask, torch.tensor(numbers)) for numbers in sample["regions"]]
        mask = torch.cat(each, 1).byte().masked_fill(mask == 255, 255)  # (n,K,D,H,W)
    return {"image": image, "mask": mask}


def collate_crops(items: list[dict]) -> dict:
    """Crops of several volumes -> one batch."""
    return {key: torch.cat([item[key] for item in items]) for key in items[0]}


def volume_loss(logits: Tensor, batch: dict, of_several: Callable = dice_ce) -> tuple[Tensor, dict]:
    """Dice + cross entropy; of one class, or classes that overlap, Dice + BCE of each."""
    logits, mask = logits.float(), batch["mask"]
    if mask.shape[1] == logits.shape[1]:
        return dice_bce(logits, mask)
    return of_several(logits, mask[:, 0].long())


def volume_predict(model: nn.Module, item: dict, settings) -> tuple[Tensor, None]:
    """Probabilities (K,X,Y,Z) on the file's own grid, axes to right, front and top.

    Of a Universal Model of the classes item["asked"] alone, if that is there.
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
    """Return volumes on the grid that a model sees, kept in the folder `cache`."""
    c = model.config
    ready = dataset.prepared(c.spacing, model.preprocess, c.in_channels, cache)
    if c.intensity:
        ready.check_hu()
    return ready


def volume_recipe(model: swin_unetr3d.SwinUNETR, settings: Protocol) -> Recipe:
    """Return the recipe of a Swin UNETR, or of a model on its backbone."""
    return Recipe(
        partial(volume_inputs, config=model.config, settings=settings),
        class_forward,
        settings.loss,
        partial(volume_predict, settings=settings),
        parameter_groups,
        collate=collate_crops,
    )


def check_modality(model: nn.Module, train_set) -> None:
    """ValueError, one line: HU expected of volumes that are no CT."""
    for entry in train_set.entries if train_set else ():
        if model.config.intensity and "CT" not in (entry.modality or "CT").upper():
            told = f"holds {entry.modality}, the model takes HU of {model.config.intensity}"
            raise ValueError(f"{entry.root} {told}; --intensity zscore")


def volume_overrides(train_set, weights, overrides: dict) -> dict:
    """Return overrides with the classes of the training set and, without weights, its channels."""
    first = train_set.entries[0]
    overlapping = first.regions is not None
    overrides = {"num_classes": len(first.classes) - overlapping} | overrides
    overrides |= {"overlapping": overlapping}
    if weights == "none":
        overrides = {"in_channels": train_set.channels} | overrides
    return overrides


def name_classes(model: nn.Module, train_set, weights) -> None:
    """Give a model the names of the training set's classes; say which of its own they replace."""
    classes = train_set.entries[0].classes
    had = model.config.classes
    if weights != "none" and moved(classes, had):
        print(f"the head of {', '.join(had)} learns {', '.join(classes)}")
    model.config = replace(model.config, classes=classes)


def load_volumes(weights, variant, settings: Protocol, overrides: dict, train_set):
    """A Swin UNETR with the classes of the training set; else with those of its file."""
    if train_set is not None:
        overrides = volume_overrides(train_set, weights, overrides)
    kind, variants = swin_unetr3d.SwinUNETR, swin_unetr3d.VARIANTS
    model = load_variant(kind, variants, weights, variant, settings, overrides)
    if train_set is not None:
        name_classes(model, train_set, weights)
    check_modality(model, train_set)
    return model


def swin_encoder(name: str) -> bool:
    return name.startswith("swinViT.")


SWIN = {
    "default": Protocol(
        hub_ids={
            "base": "MONAI/swin_unetr_btcv_segmentation",
            "small": "darragh/swinunetr-btcv-small",
            "tiny": "darragh/swinunetr-btcv-tiny",
        },
        prompt="",
        # No flips: where an organ lies tells much of what it is, and all volumes lie alike.
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
# BTCV fine-tuning of Project-MONAI/research-contributions at 21ed8e5, SwinUNETR/BTCV, on one GPU;
# it starts from the self-supervised encoder: --weights model_swinvit.pt. Quirks: flips from left
# to right with classes that have a side; class 0 has a Dice term, and so has what a crop lacks.
# Its rate changes by epoch and is 0 in the first, ours by step and is above 0; its validation
# blends windows by the mean, its test by a Gaussian, as ours do.
SWIN["origin"] = replace(
    SWIN["default"],
    hub_ids={},
    config={"image_size": (96, 96, 96), "spacing": (1.5, 1.5, 2.0), "intensity": (-175.0, 250.0)},
    augment={"flip": (0.2, 0.2, 0.2), "rotate90": 0.2, "scale": (0.1, 0.1), "shift": (0.1, 0.1)},
    loss=partial(volume_loss, of_several=partial(gi_tract_dice_ce, smooth=1e-5)),
    decay_all=True,
    epochs=5000,
    eval_every=100,
    warmup=0.01,
    clip_grad=None,
    dtype="float16",
)


def hu_window(texts: list[str]) -> tuple[float, float] | None:
    """Return the two HU of --intensity that become 0 and 1; None: z-scores.

    Raises ValueError, one line, if it is neither.
    """
    if texts == ["zscore"]:
        return None
    try:
        low, high = map(float, texts)
    except ValueError:
        low = high = 0
    if not low < high:  # or one is nan
        raise ValueError(f"--intensity {' '.join(texts)}: two HU, the lower first, or zscore")
    return low, high


@dataclass(frozen=True)
class VolumeFamily(Family):
    """A model that divides volumes into classes, window by window."""

    takes: ClassVar[str] = "volumes"
    options: ClassVar[tuple] = (VOLUME_OPTIONS,)

    def check_options(self, options) -> None:
        """As for images, but a volume has one side or three."""
        if options.score_size == "network":
            raise ValueError("--score-size network: volumes are scored on their own grid, drop it")
        sides = options.size or [64]
        if len(sides) not in (1, 3):
            shown = " ".join(map(str, sides))
            raise ValueError(f"--size {shown}: one number, of volumes three")
        if any(side % 32 or side < 32 for side in sides) or max(sides) < 64:
            raise ValueError("--size: sides of volumes are multiples of 32, one of them 64 or more")
        if options.schedule == "plateau":
            raise ValueError(
                "--schedule plateau: goes by a validation loss, which volumes have not"
            )
        if options.intensity:
            hu_window(options.intensity)
        ratio = options.crop_ratio
        if ratio and (len(ratio) < 2 or not 0 < sum(ratio) < math.inf):
            message = "two numbers or one a class, from 0 up and not all 0"
            raise ValueError(f"--crop-ratio: {message}")

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
        """Bring all volumes to the grid that the model sees, in files, and look them over."""
        for sets in (data_sets.parts, data_sets.tests):
            for name, dataset in sets.items():
                sets[name] = prepared(dataset, model, settings.cache)
        runs.check_prepared(data_sets, settings)
        return recipe


FAMILY = VolumeFamily(SWIN, swin_unetr3d.VARIANTS, load_volumes, volume_recipe, swin_encoder)
