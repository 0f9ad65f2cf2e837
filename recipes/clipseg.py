"""The recipes of CLIPSeg and BiomedCLIPSeg, and how the two models are loaded for them."""

from dataclasses import replace
from pathlib import Path

import biomedclipseg
import clipseg
from imaging.augment import Augment
from recipes.base import Protocol, Recipe, hub_id, load_variant
from recipes.images import (
    MEDVLSM,
    PromptedFamily,
    clip_tokenizer,
    dice_bce_at_mask_size,
    prompted_recipe,
)
from tokenizer import CHARACTERS, WordPieceTokenizer

RD64 = "CIDAS/clipseg-rd64-refined"
BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


def clipseg_towers(name: str) -> bool:
    """Return True if a parameter of this name belongs to the pretrained towers."""
    return not name.startswith("decoder.")


CLIPSEG = {
    # What we recommend: train everything, the towers at a hundredth of the decoder's learning rate.
    "default": Protocol(
        hub_ids={
            "rd64-refined": RD64,
            "rd64": "CIDAS/clipseg-rd64",
            "rd16": "CIDAS/clipseg-rd16",
        },
        config={"threshold": 0.5},
        augment=Augment(),
        loss=dice_bce_at_mask_size,
        lr=1e-3,
        backbone_lr=1e-5,
        backbone=clipseg_towers,
    ),
}
# medvlsm (arXiv 2308.07706; github.com/naamiinepal/medvlsm, scripts/default_configs.py).
# quirk: "freeze_encoder: false" had no effect, because transformers runs both towers without
# gradients. quirk: the loss was soft Dice alone, see `medvlsm_dice`.
# Left out: the same as for CRIS. The study's yaml files have a learning rate of 2e-4 and batches of
# 16, which its script replaced.
CLIPSEG["origin"] = replace(
    CLIPSEG["default"],
    augment=None,
    lr=2e-3,
    batch_size=128,
    train="decoder",
    keep_features=True,
    **MEDVLSM,
)
BIOMEDCLIPSEG = {
    "default": replace(
        CLIPSEG["default"], hub_ids={"biomedclipseg": BIOMEDCLIP}, default_decoder=RD64
    ),
    # Like CLIPSeg's. Left out: BERT's dropout, which the study left active in the frozen text
    # tower, so that the embedding of a text varied.
    "origin": replace(CLIPSEG["origin"], hub_ids={"biomedclipseg": BIOMEDCLIP}),
    "origin-d": replace(
        CLIPSEG["origin"], hub_ids={"biomedclipseg": BIOMEDCLIP}, default_decoder=RD64
    ),
}


def adapter_fields(settings: Protocol) -> dict:
    """Return the fields of Config that --train adapters sets."""
    if settings.train != "adapters":
        return {}
    return {"adapter_dim": settings.adapter_dim}


def load_clipseg(weights, variant, settings: Protocol, overrides: dict, train_set):
    """Return a CLIPSeg with these weights: untrained if "none", the recipe's if None."""
    overrides = adapter_fields(settings) | overrides
    return load_variant(clipseg.CLIPSeg, clipseg.VARIANTS, weights, variant, settings, overrides)


def load_biomedclipseg(weights, variant, settings: Protocol, overrides: dict, train_set):
    """Return a BiomedCLIPSeg with these weights: untrained if "none", the recipe's if None.

    If the weights are BiomedCLIP's, which has no decoder, the recipe's decoder is used, or an
    untrained one if the recipe names none. Raise ValueError if an untrained decoder would be tested
    without training.
    """
    variant = variant or "biomedclipseg"
    overrides = adapter_fields(settings) | overrides
    if weights == "none":
        config = replace(biomedclipseg.VARIANTS[variant], **overrides)
        return biomedclipseg.BiomedCLIPSeg(config)

    will_train = train_set is not None
    if weights is None:
        has_decoder = settings.default_decoder or overrides.get("decoder")
        if not will_train and not has_decoder:
            raise ValueError("--weights is missing: BiomedCLIP, the default, has no decoder")
        weights = hub_id(settings, variant)
    model = biomedclipseg.BiomedCLIPSeg.from_pretrained(
        weights, default_decoder=settings.default_decoder, **overrides
    )
    if model.decoder_source is None and not will_train:
        raise ValueError(
            f"{weights}: BiomedCLIP alone has no decoder to test; add one with --decoder"
        )
    return model


def clipseg_recipe(model: clipseg.CLIPSeg, settings: Protocol) -> Recipe:
    """Return the recipe of a CLIPSeg."""
    return prompted_recipe(clipseg, model, settings, clip_tokenizer(model.config))


def bert_vocabulary(config) -> Path | list[str]:
    """Return the vocab.txt that a config names, or single characters if it names none."""
    if not config.vocabulary:
        return CHARACTERS
    return biomedclipseg.find_vocabulary(config.vocabulary)


def bert_tokenizer(config) -> WordPieceTokenizer:
    """Return the tokenizer of a model with a BERT text tower."""
    return WordPieceTokenizer(bert_vocabulary(config), config.text_length, config.pad_token)


def biomedclipseg_recipe(model: biomedclipseg.BiomedCLIPSeg, settings: Protocol) -> Recipe:
    """Return the recipe of a BiomedCLIPSeg. A run saves its vocab.txt and the decoder's source."""
    config = model.config
    recipe = prompted_recipe(biomedclipseg, model, settings, bert_tokenizer(config))
    files = {}
    if config.vocabulary:
        files["vocab.txt"] = bert_vocabulary(config)
    config_entries = {"decoder": model.decoder_source}  # None: it started untrained
    return replace(recipe, files=files, config_entries=config_entries)


FAMILY = PromptedFamily(
    protocols=CLIPSEG,
    variants=clipseg.VARIANTS,
    load=load_clipseg,
    recipe=clipseg_recipe,
    backbone=clipseg_towers,
    sides=(16, 16),
    can_cache=True,
    tokenizer=clip_tokenizer,
    second_file="clip",
)
BIOMED_FAMILY = PromptedFamily(
    protocols=BIOMEDCLIPSEG,
    variants=biomedclipseg.VARIANTS,
    load=load_biomedclipseg,
    recipe=biomedclipseg_recipe,
    backbone=clipseg_towers,
    sides=(16, 16),
    can_cache=True,
    tokenizer=bert_tokenizer,
    second_file="decoder",
)
