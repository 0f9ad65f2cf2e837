"""Swin UNETR that reads a text: the few-shot study's variants on BTCV (fewshot3d.py).

The text lists the wanted organs. Training drops random organs from the labels of each crop, and the
text lists the others. Validation, tests and predictions use the text of all organs, which is stored
with the weights. `prepare.py text-codes --subsets` writes the texts of all subsets of a data set's
organs to one file.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.runs import read_run
from fewshot3d import TEXT_VARIANTS, TextSwinUNETR, WithText
from imaging.layouts import plain_name
from recipes.base import TEXT_CODE_OPTIONS, VOLUME_OPTIONS, Protocol, Recipe, hub_id
from recipes.swin_unetr3d import (
    SWIN,
    VolumeFamily,
    check_modality,
    name_classes,
    swin_encoder,
    volume_inputs,
    volume_overrides,
    volume_predict,
    volume_recipe,
)
from recipes.universal import read_codes

# --- texts ----------------------------------------------------------------------------------------


def read_texts(path: str) -> dict[frozenset[str], Tensor]:
    """Return the code (512,) of each set of organs in a file of `prepare.py text-codes --subsets`.

    Raises ValueError, one line, if it is no file of codes.
    """
    texts = {}
    for text, code in read_codes(path).items():
        organs = [] if text == "none" else text.split(",")
        key = frozenset(organ.strip() for organ in organs)
        texts[key] = code.float()
    return texts


def check_texts(texts: dict[frozenset[str], Tensor], names: list[str], path: str) -> None:
    """Raise ValueError, one line, if the text of a subset of the names is missing."""
    for count in range(len(names), -1, -1):
        for subset in combinations(names, count):
            if frozenset(subset) not in texts:
                text = ", ".join(subset) or "none"
                raise ValueError(
                    f"{path}: no code of the text {text!r}; prepare.py text-codes --subsets makes "
                    "all of them"
                )


def organs_of(classes: tuple[str, ...]) -> list[str]:
    """Return the names of the classes after the background, as texts write them."""
    return [plain_name(name) for name in classes[1:]]


# --- crops and losses -----------------------------------------------------------------------------


def text_inputs(sample, train, rng, config, settings, texts) -> dict:
    """Return the item of `volume_inputs`, with the texts (n,512) of training crops.

    Random organs are dropped from each crop: their voxels become background.
    """
    item = volume_inputs(sample, train, rng, config, settings)
    if not train:
        return item

    organs = organs_of(config.classes)
    codes = []
    for mask in item["mask"]:  # (1,D,H,W) of class indices, or (K,D,H,W) of overlapping classes
        present = present_organs(mask, config.overlapping, len(organs))
        dropped = drop_organs(mask, config.overlapping, len(organs), rng)
        listed = []
        for number, organ in enumerate(organs, 1):
            is_listed = settings.name_absent or number in present
            if is_listed and number not in dropped:
                listed.append(organ)
        codes.append(texts[frozenset(listed)])
    item["text"] = torch.stack(codes)  # (n,512)
    return item


def present_organs(mask: Tensor, overlapping: bool, count: int) -> set[int]:
    """Return the organs, numbered from 1 to `count`, that the mask of a crop holds."""
    if overlapping:
        return {number for number in range(1, count + 1) if (mask[number - 1] == 1).any()}
    return {*mask.unique().tolist()} - {0, 255}


def drop_organs(mask: Tensor, overlapping: bool, count: int, rng: np.random.Generator) -> set[int]:
    """Drop 0 to `count` random organs from the mask of a crop, in place; return their numbers."""
    dropped = rng.choice(count, rng.integers(count + 1), replace=False) + 1
    for number in dropped.tolist():
        if overlapping:
            organ_mask = mask[number - 1]
            organ_mask[organ_mask == 1] = 0
        else:
            mask[mask == number] = 0
    return {*dropped.tolist()}


def text_forward(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor | None]:
    """Return logits (B,K,D,H,W) and the contrastive loss (or None) of a training batch."""
    return model(batch["image"], batch["text"])


def text_loss(output: tuple, batch: dict, settings: Protocol) -> tuple[Tensor, dict]:
    """Return Swin UNETR's loss plus the weighted contrastive loss, and the parts by name."""
    logits, contrast = output
    loss, parts = settings.loss(logits, batch)
    if contrast is None:
        return loss, parts
    contrast = contrast.float()
    return loss + settings.contrast_weight * contrast, parts | {"contrast": contrast.detach()}


def text_predict(model: TextSwinUNETR, item: dict, settings) -> tuple[Tensor, None]:
    """Return probabilities (K,X,Y,Z) of all organs on the file's own grid."""
    return volume_predict(WithText(model), item, settings)


def text_recipe(model: TextSwinUNETR, settings: Protocol) -> Recipe:
    """Return the recipe of a model, whose config has the names of the classes."""
    texts = read_texts(settings.text_codes) if settings.text_codes else {}
    inputs = partial(text_inputs, config=model.config, settings=settings, texts=texts)
    return replace(
        volume_recipe(model, settings),
        inputs=inputs,
        forward=text_forward,
        loss=partial(text_loss, settings=settings),
        predict=partial(text_predict, settings=settings),
    )


# --- loading --------------------------------------------------------------------------------------


def load_text_model(weights, variant, settings: Protocol, overrides: dict, train_set):
    """Return a TextSwinUNETR with the classes of the training set, if any, else of its weights.

    weights: of Swin UNETR, to which the text layers of the variant are added, or a run of this
    model. Raises ValueError, one line, for a missing text, and for a variant if weights are a run.
    """
    if train_set is None:
        return load_trained(weights, variant, settings, overrides)
    if settings.text_codes is None:
        raise ValueError(
            "--text-codes is missing: the model reads texts; prepare.py text-codes --data DATA "
            "--subsets makes the file"
        )

    organs = organs_of(train_set.entries[0].classes)
    texts = read_texts(settings.text_codes)
    check_texts(texts, organs, settings.text_codes)
    text = texts[frozenset(organs)]  # (512,)
    overrides = volume_overrides(train_set, weights, overrides)

    if weights == "none":
        config = replace(TEXT_VARIANTS[variant or first_variant()], **overrides)
        check_windows(config.attention, config.image_size)
        model = TextSwinUNETR(config, text)
    else:
        if not is_own_run(weights):
            overrides = text_options(variant or first_variant()) | overrides
            check_windows(overrides["attention"], overrides["image_size"])
        elif variant is not None:
            raise ValueError(f"--variant: remove the option, {weights} has its own variant")
        source = weights or hub_id(settings, variant or first_variant())
        model = TextSwinUNETR.from_pretrained(
            source, repeat=settings.repeat_weights, text=text, **overrides
        )
    name_classes(model, train_set, weights)
    check_modality(model, train_set)
    return model


def load_trained(weights, variant, settings: Protocol, overrides: dict) -> TextSwinUNETR:
    """Return a model for a test or a prediction, with the text that its weights hold."""
    if settings.text_codes:
        raise ValueError(
            "--text-codes: has no effect without training, as the weights hold their text; remove "
            "the option"
        )
    source = weights or hub_id(settings, variant or first_variant())
    if not is_own_run(source):
        raise ValueError(
            f"{source}: no run of text_swin_unetr, has no texts; train.py --model text_swin_unetr "
            "makes one"
        )
    return TextSwinUNETR.from_pretrained(source, **overrides)


def is_own_run(weights) -> bool:
    """Return True for a run of this model, or a file in one."""
    return bool(weights) and read_run(weights).get("class") == TextSwinUNETR.__name__


def first_variant() -> str:
    """Return the default variant."""
    return next(iter(TEXT_VARIANTS))


def text_options(variant: str) -> dict:
    """Return the fields of a variant's config that weights of Swin UNETR do not have."""
    config = TEXT_VARIANTS[variant]
    names = ("attention", "concat", "contrast", "image_size")
    return {name: getattr(config, name) for name in names}


def check_windows(attention: bool, size: tuple[int, ...]) -> None:
    """Raise ValueError, one line, if the three heads of attention cannot divide the lowest map."""
    voxels = math.prod(side // 32 for side in size)
    if attention and voxels % 3:
        sides = " ".join(map(str, size))
        raise ValueError(
            f"--size {sides}: attention has three heads for the voxels of the lowest map; one side "
            "must be a multiple of 96"
        )


# --- settings -------------------------------------------------------------------------------------

RELEASED_VARIANTS = ("attention", "concat", "contrast", "all")
PROTOCOLS = {
    "default": replace(
        SWIN["default"],
        hub_ids=dict.fromkeys(RELEASED_VARIANTS, "MONAI/swin_unetr_btcv_segmentation"),
    ),
}
# The few-shot study, BTCV/{main,trainer}.py of github.com/CMPT983-Winter2023/
# Few-Shot-3D-Medical-Segmentation at 0973c44, from Swin UNETR's BTCV file: --weights.
# Quirks: a warm-up over 50 epochs, of which it trained 10; the learning rate ended at 1.8e-5. Texts
# do not list organs that a crop lacks. If no organ is left, although fewer than 13 were dropped,
# the study's code fails; here that text is "none". With attention and contrast, the study's code
# crashed in its first validation.
# Differences: its texts are MedCLIP's, ours are CLIP's. Its validations drop random organs and list
# those of the ground truth, its tests list those, too; ours list all organs, as users do not have
# the ground truth.
PROTOCOLS["origin"] = replace(
    SWIN["origin"],
    name_absent=False,
    repeat_weights=True,
    batch_size=2,
    epochs=10,
    eval_every=1,
    warmup=50 / 10,
)


@dataclass(frozen=True)
class TextFamily(VolumeFamily):
    """A model of volumes that reads texts; --variant names the layers added to the weights."""

    options: ClassVar[tuple] = (VOLUME_OPTIONS, TEXT_CODE_OPTIONS)
    variant_with_weights: ClassVar[bool] = True


FAMILY = TextFamily(PROTOCOLS, TEXT_VARIANTS, load_text_model, text_recipe, swin_encoder)
