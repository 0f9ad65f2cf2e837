"""CLIPSeg and BiomedCLIPSeg: their recipes and how they are loaded."""

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
    return not name.startswith("decoder.")


CLIPSEG = {
    # What we recommend: gradients through both towers, the decoder at a hundred times their rate.
    "default": Protocol(
        hub_ids={f"rd{name}": f"CIDAS/clipseg-rd{name}" for name in ("64-refined", "64", "16")},
        config={"threshold": 0.5},
        augment=Augment(),
        loss=dice_bce_at_mask_size,
        lr=1e-3,
        backbone_lr=1e-5,
        backbone=clipseg_towers,
    ),
}
# medvlsm (arXiv 2308.07706; github.com/naamiinepal/medvlsm, scripts/default_configs.py). Quirks:
# "freeze_encoder: false" changed nothing, both towers ran without gradients; the loss was
# soft Dice alone. Left out: as for CRIS; the yaml files alone say 2e-4 and batch 16.
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
    # As CLIPSeg's. Left out: BERT's dropout, active in the frozen text tower, moved the embeddings.
    "origin": replace(CLIPSEG["origin"], hub_ids={"biomedclipseg": BIOMEDCLIP}),
    "origin-d": replace(
        CLIPSEG["origin"], hub_ids={"biomedclipseg": BIOMEDCLIP}, default_decoder=RD64
    ),
}


def with_adapters(settings: Protocol) -> dict:
    """Fields of Config."""
    return {"adapter_dim": settings.adapter_dim} if settings.train == "adapters" else {}


def load_clipseg(weights, variant, settings: Protocol, overrides: dict, train_set):
    overrides = with_adapters(settings) | overrides
    return load_variant(clipseg.CLIPSeg, clipseg.VARIANTS, weights, variant, settings, overrides)


def load_biomedclipseg(weights, variant, settings: Protocol, overrides: dict, train_set):
    """Load BiomedCLIPSeg from `weights`; from scratch if "none", from the recipe's if None.

    Weights that are BiomedCLIP alone get the recipe's decoder, or a new one if it has none.
    Raises ValueError if that would be tested without training.
    """
    variant = variant or "biomedclipseg"
    overrides = with_adapters(settings) | overrides
    if weights == "none":
        return biomedclipseg.BiomedCLIPSeg(replace(biomedclipseg.VARIANTS[variant], **overrides))
    if weights is None:
        if train_set is None and not (settings.default_decoder or overrides.get("decoder")):
            raise ValueError("--weights is missing: BiomedCLIP, the default, has no decoder")
        weights = hub_id(settings, variant)

    kind = biomedclipseg.BiomedCLIPSeg
    model = kind.from_pretrained(weights, default_decoder=settings.default_decoder, **overrides)
    if model.decoder_source is None and train_set is None:
        raise ValueError(f"{weights}: BiomedCLIP alone has no decoder to test; --decoder names one")
    return model


def clipseg_recipe(model: clipseg.CLIPSeg, settings: Protocol) -> Recipe:
    return prompted_recipe(clipseg, model, settings, clip_tokenizer(model.config))


def bert_vocabulary(config) -> Path | list[str]:
    """Return the vocab.txt that a config names, or the characters of a model without one."""
    return biomedclipseg.find_vocabulary(config.vocabulary) if config.vocabulary else CHARACTERS


def bert_tokenizer(config) -> WordPieceTokenizer:
    """Return the tokenizer of a model with a BERT text tower."""
    return WordPieceTokenizer(bert_vocabulary(config), config.text_length, config.pad_token)


def biomedclipseg_recipe(model: biomedclipseg.BiomedCLIPSeg, settings: Protocol) -> Recipe:
    c = model.config
    tokenizer = bert_tokenizer(c)
    files = {"vocab.txt": bert_vocabulary(c)} if c.vocabulary else {}
    about = {"decoder": model.decoder_source}  # None: it started untrained
    recipe = prompted_recipe(biomedclipseg, model, settings, tokenizer)
    return replace(recipe, files=files, about=about)


FAMILY = PromptedFamily(
    CLIPSEG,
    clipseg.VARIANTS,
    load_clipseg,
    clipseg_recipe,
    clipseg_towers,
    sides=(16, 16),
    keeps=True,
    tokenizer=clip_tokenizer,
    second_file="clip",
)
BIOMED_FAMILY = PromptedFamily(
    BIOMEDCLIPSEG,
    biomedclipseg.VARIANTS,
    load_biomedclipseg,
    biomedclipseg_recipe,
    clipseg_towers,
    sides=(16, 16),
    keeps=True,
    tokenizer=bert_tokenizer,
    second_file="decoder",
)
