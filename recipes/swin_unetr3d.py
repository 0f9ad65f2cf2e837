"""Swin UNETR on volumes: crops, windows, its recipes and how it is loaded."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import swin_unetr3d
from imaging import volumes
from imaging.layouts import moved
from losses import dice_bce, dice_ce, gi_tract_dice_ce
from recipes.base import Family, Recipe, Settings, class_forward, load, parameter_groups

# --- volumes: Swin UNETR --------------------------------------------------------------------------


FOR_VOLUME_SCORES = "name prompt size group dataset spacing classes regions place".split()


def volume_inputs(sample, train, rng, config, settings) -> dict:
    """Of training random crops, image (n,C,D,H,W), mask (n,1,D,H,W) of class numbers, or where
    classes overlap (n,K,D,H,W) of 0 and 1; else the prepared volume and what scoring needs."""
    if not train:
        item = {"image": sample["image"], "truth": sample["truth"][None]}
        return item | {key: sample[key] for key in FOR_VOLUME_SCORES}
    where = (sample[key] for key in ("image", "mask", "voxels"))
    how = {"n": settings.crops_per_volume, "size": config.image_size, "rng": rng}
    crops = zip(*volumes.random_crops(*where, **how, ratios=settings.crop_ratio))
    images, masks = zip(*(volumes.augment(*crop, rng, **settings.augment) for crop in crops))
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


def volume_recipe(model: swin_unetr3d.SwinUNETR, settings: Settings) -> Recipe:
    c = model.config

    def prepare(dataset, cache):
        prepared = dataset.prepared(c.spacing, model.preprocess, c.in_channels, cache)
        if c.intensity:
            prepared.check_hu()
        return prepared

    return Recipe(
        partial(volume_inputs, config=c, settings=settings),
        class_forward,
        settings.loss,
        partial(volume_predict, settings=settings),
        parameter_groups,
        collate=collate_crops,
        prepare=prepare,
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


def load_volumes(weights, variant, settings: Settings, overrides: dict, train_set):
    """A Swin UNETR with the classes of the training set; else with those of its file."""
    if train_set is not None:
        overrides = volume_overrides(train_set, weights, overrides)
    kind, variants = swin_unetr3d.SwinUNETR, swin_unetr3d.VARIANTS
    model = load(kind, variants, weights, variant, settings, overrides)
    if train_set is not None:
        name_classes(model, train_set, weights)
    check_modality(model, train_set)
    return model


def swin_encoder(name: str) -> bool:
    return name.startswith("swinViT.")


SWIN = {
    "default": Settings(
        weights={
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
    weights={},
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


FAMILY = Family(SWIN, swin_unetr3d.VARIANTS, load_volumes, volume_recipe, swin_encoder)
