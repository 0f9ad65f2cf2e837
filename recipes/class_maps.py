"""SegFormer, UPerNet, DPT and BEiT: images to class maps."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

import beit
import dpt
import segformer
import upernet
from imaging.augment import Augment, GITractAugment
from losses import dice_ce, gi_tract_dice_ce
from recipes.base import Family, Protocol, Recipe, class_forward, load_variant
from recipes.images import at_mask_size, dice_bce_at_mask_size, image_recipe


def class_loss(logits: Tensor, batch: dict, of_several: Callable = dice_ce) -> tuple[Tensor, dict]:
    """Dice + cross entropy on logits brought to the size of the target; of one class Dice + BCE."""
    if logits.shape[1] == 1:
        return dice_bce_at_mask_size(logits, batch)
    return of_several(at_mask_size(logits, batch), batch["mask"][:, 0].long())


def class_recipe(model: nn.Module, settings: Protocol, file) -> Recipe:
    return image_recipe(file, model, settings, class_forward)


def load_classes(weights, variant, settings: Protocol, overrides, train_set, kind, variants):
    """A model of class `kind` with the classes of the training set; else with those of its file."""
    if train_set is not None:
        overrides = {"num_classes": len(train_set.classes)} | overrides
    return load_variant(kind, variants, weights, variant, settings, overrides)


# github.com/JaeL17/Medical-Image-Segmentation (model.py, utils.py, trainer.py). Quirks: 288 pixels
# of the nearest neighbour and ImageNet's mean for every model; see losses.py and augment.py. Left
# out: the last, smaller batch was dropped.
GI_TRACT = dict(
    config={
        "image_size": 288,
        "resample": "cv2 nearest",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    },
    augment=GITractAugment(),
    loss=partial(class_loss, of_several=gi_tract_dice_ce),
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
    kind, file, weights: dict, backbone: str, backbone_lr: float, sides: tuple[int, int]
) -> "Family":
    """The model `kind` of `file`, whose pretrained part is called `backbone`."""

    def pretrained(name: str) -> bool:
        return name.startswith(backbone)

    default = Protocol(
        hub_ids=weights,
        prompt="",
        augment=Augment(rotate=15),
        loss=class_loss,
        lr=3e-4,
        backbone_lr=backbone_lr,
        backbone=pretrained,
    )
    return Family(
        {"default": default, "origin": replace(default, **GI_TRACT)},
        file.VARIANTS,
        partial(load_classes, kind=kind, variants=file.VARIANTS),
        partial(class_recipe, file=file),
        pretrained,
        sides,
    )


SEGFORMERS = {f"b{n}": f"nvidia/segformer-b{n}-finetuned-ade-512-512" for n in range(5)}
SEGFORMERS["b5"] = "nvidia/segformer-b5-finetuned-ade-640-640"
UPERNETS = {
    f"convnext-{size}": f"openmmlab/upernet-convnext-{size}"
    for size in ("tiny", "small", "base", "large", "xlarge")
}
DPTS = {"large-ade": "Intel/dpt-large-ade", "large": "Intel/dpt-large"}
BEITS = {size: f"microsoft/beit-{size}-finetuned-ade-640-640" for size in ("base", "large")}


FAMILIES = {
    "segformer": class_family(
        segformer.SegFormer, segformer, SEGFORMERS, "encoder.", 6e-5, sides=(29, 1)
    ),
    "upernet": class_family(upernet.UPerNet, upernet, UPERNETS, "backbone.", 1e-4, sides=(32, 1)),
    "dpt": class_family(dpt.DPT, dpt, DPTS, "vit.", 3e-5, sides=(16, 16)),
    "beit": class_family(beit.BEiT, beit, BEITS, "beit.", 3e-5, sides=(32, 16)),
}
