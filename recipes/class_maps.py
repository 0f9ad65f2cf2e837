"""SegFormer, UPerNet, DPT and BEiT: models that assign a class to each pixel of an image."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType

from torch import Tensor, nn

import beit
import dpt
import segformer
import upernet
from imaging.augment import Augment, GITractAugment
from losses import dice_ce, gi_tract_dice_ce
from recipes.base import Family, Protocol, Recipe, class_forward, load_variant
from recipes.images import at_mask_size, dice_bce_at_mask_size, image_recipe


def class_loss(
    logits: Tensor, batch: dict, multiclass_loss: Callable = dice_ce
) -> tuple[Tensor, dict]:
    """Return the loss of logits (B,K,h,w), upsampled to the target, and its parts by name.

    batch: "mask" is the target, float32 (B,1,H,W) of class indices, 255 ignored. With one class the
    loss is Dice + BCE, otherwise `multiclass_loss`, Dice + cross entropy.
    """
    if logits.shape[1] == 1:
        return dice_bce_at_mask_size(logits, batch)
    target = batch["mask"][:, 0].long()  # (B,H,W)
    return multiclass_loss(at_mask_size(logits, batch), target)


def class_recipe(model: nn.Module, settings: Protocol, file: ModuleType) -> Recipe:
    """Return the recipe of a model; file: the module that defines it."""
    return image_recipe(file, model, settings, class_forward)


def load_classes(weights, variant, settings: Protocol, overrides, train_set, kind, variants):
    """Load a model of class `kind`, as `Family.load` does.

    It gets the classes of the training set, or those of its file if train_set is None.
    """
    if train_set is not None:
        overrides = {"num_classes": len(train_set.classes)} | overrides
    return load_variant(kind, variants, weights, variant, settings, overrides)


# The GI-tract study: github.com/JaeL17/Medical-Image-Segmentation, model.py, utils.py, trainer.py.
# quirks: every model gets 288 pixels, resized by nearest neighbour, and ImageNet's mean and std;
# see also `gi_tract_dice_ce` and `GITractAugment`. Left out: the study drops a last batch that is
# smaller than the others.
GI_TRACT = dict(
    config={
        "image_size": 288,
        "resample": "cv2 nearest",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
    augment=GITractAugment(),
    loss=partial(class_loss, multiclass_loss=gi_tract_dice_ce),
    amsgrad=True,
    lr=2e-4,
    backbone_lr=2e-4,
    weight_decay=1e-4,
    decay_all=True,
    batch_size=32,
    epochs=100,
    schedule="multistep",
    milestones=(0.5,),
    warmup=0.0,
    clip_grad=None,
    dtype="float32",
)


def class_family(
    file: ModuleType,
    kind: type[nn.Module],
    hub_ids: dict[str, str],
    backbone: str,
    backbone_lr: float,
    sides: tuple[int, int],
) -> Family:
    """Return what --model means for a model of class maps.

    file, kind: the module and the class of the model. hub_ids: variant -> weights that training
    starts from. backbone: how names of pretrained parameters begin; they get `backbone_lr` in the
    recipe `default`. sides: the smallest image side, and what sides must be multiples of.
    """

    def is_pretrained(name: str) -> bool:
        return name.startswith(backbone)

    default = Protocol(
        hub_ids=hub_ids,
        prompt="",
        augment=Augment(rotate=15),
        loss=class_loss,
        lr=3e-4,
        backbone_lr=backbone_lr,
        backbone=is_pretrained,
    )
    return Family(
        {"default": default, "origin": replace(default, **GI_TRACT)},
        file.VARIANTS,
        partial(load_classes, kind=kind, variants=file.VARIANTS),
        partial(class_recipe, file=file),
        is_pretrained,
        sides,
    )


SEGFORMERS = {
    "b0": "nvidia/segformer-b0-finetuned-ade-512-512",
    "b1": "nvidia/segformer-b1-finetuned-ade-512-512",
    "b2": "nvidia/segformer-b2-finetuned-ade-512-512",
    "b3": "nvidia/segformer-b3-finetuned-ade-512-512",
    "b4": "nvidia/segformer-b4-finetuned-ade-512-512",
    "b5": "nvidia/segformer-b5-finetuned-ade-640-640",
}
UPERNETS = {
    "convnext-tiny": "openmmlab/upernet-convnext-tiny",
    "convnext-small": "openmmlab/upernet-convnext-small",
    "convnext-base": "openmmlab/upernet-convnext-base",
    "convnext-large": "openmmlab/upernet-convnext-large",
    "convnext-xlarge": "openmmlab/upernet-convnext-xlarge",
}
DPTS = {
    "large-ade": "Intel/dpt-large-ade",
    "large": "Intel/dpt-large",
}
BEITS = {
    "base": "microsoft/beit-base-finetuned-ade-640-640",
    "large": "microsoft/beit-large-finetuned-ade-640-640",
}

FAMILIES = {
    "segformer": class_family(
        segformer,
        segformer.SegFormer,
        SEGFORMERS,
        backbone="encoder.",
        backbone_lr=6e-5,
        sides=(29, 1),
    ),
    "upernet": class_family(
        upernet,
        upernet.UPerNet,
        UPERNETS,
        backbone="backbone.",
        backbone_lr=1e-4,
        sides=(32, 1),
    ),
    "dpt": class_family(
        dpt,
        dpt.DPT,
        DPTS,
        backbone="vit.",
        backbone_lr=3e-5,
        sides=(16, 16),
    ),
    "beit": class_family(
        beit,
        beit.BEiT,
        BEITS,
        backbone="beit.",
        backbone_lr=3e-5,
        sides=(32, 16),
    ),
}
