"""CRIS: its recipes and how it is loaded for training."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

import cris
from data import Dataset
from imaging.augment import Augment
from recipes.base import Protocol, Recipe, hub_id
from recipes.images import (
    MEDVLSM,
    PromptedFamily,
    clip_tokenizer,
    dice_bce_at_mask_size,
    prompted_recipe,
    texts_per_batch,
)


def refcoco_bce(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """Return the official loss and its parts: binary cross entropy at stride 4.

    The mask (B,1,S,S) is resized to the logits (B,1,S/4,S/4) by nearest neighbour, as in
    model/segmenter.py. Pixels of 255 are ignored; the official masks have none.
    """
    mask = F.interpolate(batch["mask"], logits.shape[-2:], mode="nearest")  # (B,1,S/4,S/4)
    keep = (mask != 255).float()
    total = F.binary_cross_entropy_with_logits(logits.float(), mask * keep, keep, reduction="sum")
    loss = total / keep.sum().clamp(min=1)
    return loss, {"bce": loss}


def clip_towers(name: str) -> bool:
    """Return True for parameters that CLIP checkpoints have: the backbone except `connect`."""
    return name.startswith("backbone.") and ".connect." not in name


def refcoco_backbone(name: str) -> bool:
    """Return True for parameters that CRIS trains at the lower learning rate (build_segmenter)."""
    return name.startswith("backbone.") and "positional_embedding" not in name


HUB_IDS = {"rn50": "timm/resnet50_clip.openai", "rn101": "timm/resnet101_clip.openai"}

PROTOCOLS = {
    # What we recommend. The image fills the whole square; all parameters are trained, those of CLIP
    # at a lower rate.
    "default": Protocol(
        hub_ids=HUB_IDS,
        config={"pixels": "stretch", "threshold": 0.5},
        augment=Augment(),
        loss=dice_bce_at_mask_size,
        backbone=clip_towers,
    ),
    # medvlsm (arXiv 2308.07706; github.com/naamiinepal/medvlsm, configs/experiment/cris.yaml).
    # It started from a CRIS trained on RefCOCO: pass that file as --weights. Quirks: every prompt
    # is padded to 77 tokens with 49407, so the decoder attends to the padding too; masks are
    # stretched by nearest neighbour. Left out: soft targets from JPEG masks, and random prompts in
    # validation and test.
    "origin": Protocol(
        hub_ids=HUB_IDS,
        config={
            "pixels": "medvlsm",
            "text_length": 77,
            "pad_token": 49407,
            "threshold": 0.35,
            "dropout": 0.2,
        },
        lr=2e-5,
        backbone_lr=2e-5,
        backbone=clip_towers,
        batch_size=32,
        **MEDVLSM,
    ),
    # CRIS itself (arXiv 2111.15174; github.com/DerrickWang005/CRIS.pytorch,
    # config/refcoco/cris_r50.yaml). Left out: the backbone's full rate in the first epoch, because
    # the official parameter groups set only `initial_lr`; dropping the last, smaller batch.
    "refcoco": Protocol(
        hub_ids=HUB_IDS,
        config={
            "pixels": "letterbox",
            "text_length": 17,
            "pad_token": 0,
            "threshold": 0.35,
            "dropout": 0.1,
        },
        loss=refcoco_bce,
        backbone=refcoco_backbone,
        optimizer="adam",
        lr=1e-4,
        backbone_lr=1e-5,
        weight_decay=0.0,
        batch_size=64,
        epochs=50,
        schedule="multistep",
        milestones=(0.7,),  # after 35 epochs
        warmup=0.0,
        clip_grad=None,
        dtype="float16",
    ),
}


# CLIP's own text length, used when CRIS starts from CLIP or from scratch. It is long enough for
# nearly every prompt, and costs nothing for short ones, whose padding is trimmed.
FROM_CLIP = {"text_length": 77}


def load_cris(
    weights: str | None,
    variant: str | None,
    settings: Protocol,
    overrides: dict,
    train_set: Dataset | None,
) -> cris.CRIS:
    """Load CRIS for training or evaluation.

    weights: a file, folder or hub id; None for CLIP from the hub, which is printed; "none" for
    random weights. If nearly all texts of a batch are the same, the batch norm over sentence
    vectors stays in evaluation mode (see `freeze_text_norm` in cris.py), which is printed.
    """
    model = make_cris(weights, variant, settings, overrides, train_set)
    if train_set is None or "freeze_text_norm" in overrides:
        return model

    train_set.compare_prompts_by(clip_tokenizer(model.config))
    texts = texts_per_batch(train_set, settings.prompt, settings.batch_size)
    if texts < 2:
        print(
            f"a batch contains {texts:.1f} different texts on average: the batch norm over texts, "
            "neck.txt_proj.1, stays in evaluation mode"
        )
        model.config = replace(model.config, freeze_text_norm=True)
    return model


def make_cris(
    weights: str | None,
    variant: str | None,
    settings: Protocol,
    overrides: dict,
    train_set: Dataset | None,
) -> cris.CRIS:
    """Return CRIS with the weights that `load_cris` describes.

    Raise ValueError if an evaluation names no weights.
    """
    if weights == "none":
        config = FROM_CLIP | overrides
        return cris.CRIS(replace(cris.VARIANTS[variant or "rn50"], **config))
    if weights is None and train_set is None:
        raise ValueError("--weights is missing: CLIP alone, which is the default, segments nothing")

    if weights is None:
        weights = hub_id(settings, variant or "rn50")
        print(
            f"starting from CLIP ({weights}): no CRIS checkpoint is on the hub. The known one, "
            "trained on RefCOCO, is linked in the README of github.com/naamiinepal/medvlsm and in "
            "issue 3 of github.com/DerrickWang005/CRIS.pytorch; pass it as --weights cris_best.pth"
        )
    return cris.CRIS.from_pretrained(weights, **overrides)


def cris_recipe(model: cris.CRIS, settings: Protocol) -> Recipe:
    """Return what connects CRIS to the training loop."""
    return prompted_recipe(cris, model, settings, clip_tokenizer(model.config))


FAMILY = PromptedFamily(
    PROTOCOLS,
    cris.VARIANTS,
    load_cris,
    cris_recipe,
    clip_towers,
    sides=(32, 32),
    tokenizer=clip_tokenizer,
    text_config=FROM_CLIP,
)
