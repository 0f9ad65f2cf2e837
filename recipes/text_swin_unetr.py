"""Swin UNETR that reads a text: the few-shot study's variants on BTCV (fewshot3d.py).

A text names the organs that are wanted. In training a random part of a crop's organs is dropped
from its labels, and the text names the others; a text of all organs, which the weights hold, serves
validation, tests and predictions. The texts of all subsets of a data set's organs come from a file
of `prepare.py text-codes --subsets`.
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
    """Return {names of organs: code (512,)} of a file of `prepare.py text-codes --subsets`.

    Raises ValueError, one line, if it is no file of codes.
    """
    texts = {}
    for text, code in read_codes(path).items():
        names = [] if text == "none" else text.split(",")
        texts[frozenset(name.strip() for name in names)] = code.float()
    return texts


def check_texts(texts: dict[frozenset[str], Tensor], names: list[str], path: str) -> None:
    """Raise ValueError, one line, if the text of any subset of the names is missing."""
    for count in range(len(names), -1, -1):
        for subset in combinations(names, count):
            if frozenset(subset) not in texts:
                text = ", ".join(subset) or "none"
                hint = "prepare.py text-codes --subsets makes all of them"
                raise ValueError(f"{path}: no code of the text {text!r}; {hint}")


def organs_of(classes: tuple[str, ...]) -> list[str]:
    """Return the names of the classes behind the background as texts write them."""
    return [plain_name(name) for name in classes[1:]]


# --- crops and losses -----------------------------------------------------------------------------


def text_inputs(sample, train, rng, config, settings, texts) -> dict:
    """Return what `volume_inputs` does, and of training crops the texts (n,512).

    A random part of the organs is dropped from each crop: its voxels become background.
    """
    item = volume_inputs(sample, train, rng, config, settings)
    if not train:
        return item

    organs = organs_of(config.classes)
    chosen = []
    for mask in item["mask"]:  # (1,D,H,W) of class numbers, or (K,D,H,W) of overlapping classes
        present = present_organs(mask, config.overlapping, len(organs))
        dropped = drop_organs(mask, config.overlapping, len(organs), rng)
        named = []
        for number, organ in enumerate(organs, 1):
            is_named = settings.name_absent or number in present
            if is_named and number not in dropped:
                named.append(organ)
        chosen.append(texts[frozenset(named)])
    item["text"] = torch.stack(chosen)  # (n,512)
    return item


def present_organs(mask: Tensor, overlapping: bool, count: int) -> set[int]:
    """Return which of `count` organs, from 1, a crop's mask shows. 255 is void."""
    if overlapping:
        return {number for number in range(1, count + 1) if (mask[number - 1] == 1).any()}
    return {*mask.unique().tolist()} - {0, 255}


def drop_organs(mask: Tensor, overlapping: bool, count: int, rng: np.random.Generator) -> set[int]:
    """Drop 0 to `count` random organs from a crop's mask, in place; return which, from 1."""
    dropped = rng.choice(count, rng.integers(count + 1), replace=False) + 1
    for number in dropped.tolist():
        if overlapping:
            of_organ = mask[number - 1]
            of_organ[of_organ == 1] = 0
        else:
            mask[mask == number] = 0
    return {*dropped.tolist()}


def text_forward(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor | None]:
    """Return logits (B,K,D,H,W) and the contrast of a training batch."""
    return model(batch["image"], batch["text"])


def text_loss(output: tuple, batch: dict, settings: Protocol) -> tuple[Tensor, dict]:
    """Return Swin UNETR's loss and, of variants with contrast, a part of that, and both apart."""
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
    """Return a TextSwinUNETR with the classes of the training set, else with those of its weights.

    weights: of Swin UNETR, which get the text options of the variant, or a run of this model.
    Raises ValueError, one line, for a text that is missing, and a variant where a run has its own.
    """
    if train_set is None:
        return load_trained(weights, variant, settings, overrides)
    if settings.text_codes is None:
        hint = "prepare.py text-codes --data DATA --subsets makes the file"
        raise ValueError(f"--text-codes is missing: the model reads texts; {hint}")

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
            raise ValueError(f"--variant: leave it out, {weights} says itself what it is")
        source = weights or hub_id(settings, variant or first_variant())
        model = TextSwinUNETR.from_pretrained(
            source, repeat=settings.repeat_weights, text=text, **overrides
        )
    name_classes(model, train_set, weights)
    check_modality(model, train_set)
    return model


def load_trained(weights, variant, settings: Protocol, overrides: dict) -> TextSwinUNETR:
    """Return a model as its weights are, to be tested or to predict. They hold a text."""
    if settings.text_codes:
        hint = "only training reads it, as the weights hold their text; drop it"
        raise ValueError(f"--text-codes: does nothing here, {hint}")
    source = weights or hub_id(settings, variant or first_variant())
    if not is_own_run(source):
        hint = "train.py --model text_swin_unetr makes a run that has them"
        raise ValueError(f"{source}: no run of text_swin_unetr, has no texts; {hint}")
    return TextSwinUNETR.from_pretrained(source, **overrides)


def is_own_run(weights) -> bool:
    """Return True for a run of this model, or a file of one."""
    return bool(weights) and read_run(weights).get("class") == TextSwinUNETR.__name__


def first_variant() -> str:
    """Return the variant that is trained where none is named."""
    return next(iter(TEXT_VARIANTS))


def text_options(variant: str) -> dict:
    """Return the fields of a variant's config that weights of Swin UNETR do not bring."""
    config = TEXT_VARIANTS[variant]
    names = ("attention", "concat", "contrast", "image_size")
    return {name: getattr(config, name) for name in names}


def check_windows(attention: bool, size: tuple[int, ...]) -> None:
    """Raise ValueError, one line, if attention cannot share out the lowest map of a window."""
    voxels = math.prod(side // 32 for side in size)
    if attention and voxels % 3:
        sides = " ".join(map(str, size))
        hint = "of the three sides / 32, one must be a multiple of 3, such as 96"
        raise ValueError(f"--size {sides}: attention has three heads for the lowest map; {hint}")


# --- settings -------------------------------------------------------------------------------------

RELEASED_VARIANTS = ("attention", "concat", "contrast", "all")
PROTOCOLS = {
    "default": replace(
        SWIN["default"],
        hub_ids=dict.fromkeys(RELEASED_VARIANTS, "MONAI/swin_unetr_btcv_segmentation"),
    ),
}
# The few-shot study, BTCV/{main,trainer}.py of github.com/CMPT983-Winter2023/
# Few-Shot-3D-Medical-Segmentation at 0973c44, on Swin UNETR's BTCV file: --weights. Quirks: the
# rate was to rise over 50 epochs, of which there were 10: it ended at 1.8e-5. Organs that a crop
# lacks are not named in its text, and if none is left, but fewer than 13 were dropped, the code
# fails; here that text is "none". Left out: its texts by MedCLIP (ours are of CLIP); validations
# that drop organs at random and name those that the truth has, and tests that name those (ours name
# all, as no user has the truth). Attention and contrast crashed in its first validation.
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
    """A model of volumes that reads texts; its --variant says what is added to the weights."""

    options: ClassVar[tuple] = (VOLUME_OPTIONS, TEXT_CODE_OPTIONS)
    variant_with_weights: ClassVar[bool] = True


FAMILY = TextFamily(PROTOCOLS, TEXT_VARIANTS, load_text_model, text_recipe, swin_encoder)
