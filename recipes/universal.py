"""The CLIP-Driven Universal Model and the few-shot study's variant of it: classes have codes."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import fewshot3d
import swin_unetr3d
import universal
from imaging import layouts, volumes
from imaging.layouts import plain_name
from losses import partial_dice_bce
from recipes.base import (
    CODE_OPTIONS,
    TEXT_CODE_OPTIONS,
    VOLUME_OPTIONS,
    Protocol,
    Recipe,
    Settings,
    hub_id,
)
from recipes.swin_unetr3d import (
    SWIN,
    VolumeFamily,
    check_modality,
    swin_encoder,
    volume_inputs,
    volume_recipe,
)

# --- crops and losses -----------------------------------------------------------------------------


def universal_inputs(sample, train, rng, config, settings) -> dict:
    """Return the item of a sample, as `volume_inputs` does, for classes that overlap.

    In training: mask (n,1,D,H,W) of the labels in the file, and `table` int16 (n,K,256), which maps
    each label to 1 if it belongs to class k, else to 0, 255 (does not count) to 255, and all labels
    to -1 if class k is not annotated. Else: `asked`, the indices of the annotated classes.
    """
    annotated_classes = [config.classes.index(name) - 1 for name in sample["classes"][1:]]
    if not train:
        item = volume_inputs(sample, train, rng, config, settings)
        return item | {"asked": annotated_classes}

    item = volume_inputs(sample | {"regions": None}, train, rng, config, settings)
    table = torch.full((config.num_classes, 256), -1, dtype=torch.int16)  # (K,256)
    for k, labels in zip(annotated_classes, sample["regions"], strict=True):
        table[k] = torch.isin(torch.arange(256), torch.tensor(labels))
        table[k, 255] = 255
    crops = len(item["mask"])
    return item | {"table": table.expand(crops, -1, -1)}  # (n,K,256)


def annotated(batch: dict) -> Tensor:
    """Return the indices (k,) of the classes that are annotated in any crop of a batch."""
    return (batch["table"][:, :, 0] >= 0).any(0).nonzero().flatten()


def universal_forward(model: nn.Module, batch: dict) -> Tensor:
    """Return logits (B,k,D,H,W) of the annotated classes; the others have no loss."""
    return model(batch["image"], annotated(batch).tolist())


def universal_loss(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """Return Dice + BCE of each class in each crop in which it is annotated, and both parts.

    logits (B,k,D,H,W) of the classes of `annotated`.
    """
    tables = batch["table"][:, annotated(batch)]  # (B,k,256)
    masks = batch["mask"][:, 0]  # (B,D,H,W)
    targets = []
    for table, mask in zip(tables, masks, strict=True):
        targets.append(table[:, mask.long()])  # (k,D,H,W)
    return partial_dice_bce(logits.float(), torch.stack(targets))


# --- text codes -----------------------------------------------------------------------------------


def read_codes(path: str | None) -> dict[str, Tensor]:
    """Return the code (512,) of each class in a file of `prepare.py text-codes`; {} without a file.

    Raises ValueError, one line, if the file holds anything else.
    """
    if path is None:
        return {}

    codes = swin_unetr3d.read_file(Path(path))
    for name, code in codes.items():
        if not isinstance(name, str):
            raise ValueError(
                f"{path}: {name!r:.80} is not the name of a class; prepare.py text-codes makes "
                "codes"
            )
        kind = "no tensor"
        if isinstance(code, Tensor):
            kind = "a nested tensor" if code.is_nested else tuple(code.shape)
        if kind != (universal.TEXT,):
            raise ValueError(
                f"{path}: {name} is {kind}, a code (512,); prepare.py text-codes makes codes"
            )

    expected = dict.fromkeys(codes, torch.empty(universal.TEXT))
    swin_unetr3d.check_complete(codes, expected, path)  # finite floating-point numbers
    return {plain_name(name): code for name, code in codes.items()}


def code_of(name: str, texts: dict[str, Tensor], settings: Protocol) -> Tensor | None:
    """Return the text code (512,) of a class; None with --codes random or one-hot.

    Raises ValueError, one line, if the file of codes does not have it.
    """
    if settings.codes != "text":
        return None
    if name not in texts:
        file = settings.text_codes or "--text-codes"
        raise ValueError(
            f"{file}: no code of {name}; prepare.py text-codes makes it; or take --codes random"
        )
    return texts[name]


# --- loading --------------------------------------------------------------------------------------


def load_universal(
    kind, variants, weights, variant, settings: Protocol, overrides: dict, train_set
):
    """Return a Universal Model with the classes of the training set.

    kind: its class. Without a training set, the classes are those of the file of codes. Classes
    that the weights do not have are added. Raises ValueError, one line, for a missing code, or if
    the weights have another kind of codes.
    """
    texts = read_codes(settings.text_codes)
    names = list(texts) if train_set is None else list(train_set.classes[1:])
    variant = variant or next(iter(variants))
    if weights == "none":
        if train_set is None:
            raise ValueError("--weights none: nothing was trained; give a run or a file of weights")
        config = replace(variants[variant], **overrides)
        model = new_model(kind, config, names, texts, settings, train_set.channels)
    else:
        source = weights or hub_id(settings, variant)
        if train_set is not None:
            overrides = overrides | {"codes": settings.codes}
        model = pretrained_model(kind, source, names, texts, settings, overrides)
    check_modality(model, train_set)
    return model


def new_model(kind, config, names: list[str], texts: dict, settings: Protocol, channels: int):
    """Return an untrained model of these classes and channels."""
    config = replace(
        config,
        num_classes=len(names),
        classes=("background", *names),
        codes=settings.codes,
        in_channels=channels,
    )
    embedding = None
    if settings.codes == "text":
        embedding = torch.stack([code_of(name, texts, settings) for name in names])  # (K,512)
    return kind(config, embedding)


def pretrained_model(
    kind, source, names: list[str], texts: dict, settings: Protocol, overrides: dict
):
    """Return the model of a file, to which the classes it does not have are added.

    If the file is of Swin UNETR, its new head has the classes `names`.
    """
    embedding = None
    if settings.codes == "text" and names and {*names} <= {*texts}:
        embedding = torch.stack([texts[name] for name in names])  # (K,512)
    model = kind.from_pretrained(source, names or None, embedding, **overrides)
    if texts and model.config.codes != "text":
        raise ValueError(
            f"--text-codes: the codes of {source} are {model.config.codes}; remove the option"
        )

    new = [name for name in names if name not in model.config.classes]
    if new:
        print(f"{source}: new classes: {', '.join(new)}")
    for name in new:
        model.add_class(name, code_of(name, texts, settings))
    return model


def universal_recipe(model: universal.UniversalSwinUNETR, settings: Protocol) -> Recipe:
    """Return the recipe of a Universal Model, whose config has the names of the classes."""
    inputs = partial(universal_inputs, config=model.config, settings=settings)
    return replace(volume_recipe(model, settings), inputs=inputs, forward=universal_forward)


# --- settings -------------------------------------------------------------------------------------

UNIVERSAL = {
    "default": replace(  # the backbone is Swin UNETR's, so --train decoder freezes the same
        SWIN["default"],
        hub_ids={"universal": "ljwztc/CLIP-Driven-Universal-Model"},
        codes="text",
        loss=universal_loss,
    ),
}
# train.py of ljwztc/CLIP-Driven-Universal-Model at 43c1239. It does not run as published: its Dice
# sums over an axis that does not exist. It starts from Swin UNETR's BTCV file: --weights.
# Left out: the zoom of Decathlon volumes, eight GPUs, sampling the data set before the volume,
# crops by class in some data sets (--crop-ratio).
UNIVERSAL["origin"] = replace(
    UNIVERSAL["default"],
    hub_ids={},
    augment={"rotate90": 0.1, "shift": (0.1, 0.2)},
    crop_ratio=(1.0, 2.0),
    decay_all=True,
    epochs=2000,
    eval_every=50,
    warmup=0.05,
    clip_grad=None,
    dtype="float32",
)


# The few-shot study, CLIP-Driven-Universal-Model/train.py of github.com/CMPT983-Winter2023/
# Few-Shot-3D-Medical-Segmentation at 0973c44, with the attention controller, from the BTCV file.
# Quirk: a warm-up over 100 epochs to 1e-4, of which it trained 11, and then 2 more on 4 volumes of
# the new organ; the learning rate ended at 1.1e-5.
# Left out: its Dice of each slice; its mix-up of the four crops of a step (ATTEND's "chain").
FEWSHOT = {
    "default": replace(UNIVERSAL["default"], hub_ids={}),
    "origin": replace(UNIVERSAL["origin"], epochs=11, warmup=100 / 11, eval_every=1),
}


@dataclass(frozen=True)
class UniversalFamily(VolumeFamily):
    """A model whose classes have codes, so that each volume may annotate other classes."""

    options: ClassVar[tuple] = (VOLUME_OPTIONS, CODE_OPTIONS, TEXT_CODE_OPTIONS)

    def check_options(self, options) -> None:
        """Raise ValueError, one line, for values of options that the model does not take."""
        super().check_options(options)
        if options.text_codes and options.codes in ("random", "one-hot"):
            raise ValueError(f"--codes {options.codes}: takes no --text-codes; remove one of them")

    def open_volumes(self, entries: list, run: dict) -> volumes.VolumeSet:
        """Return volumes, each of which may annotate other classes."""
        regions = [layouts.as_regions(entry) for entry in entries]
        return volumes.VolumeSet(regions, has_partial_labels=True)

    def check_classes(self, model: nn.Module, datasets: list, settings: Settings) -> None:
        """Raise ValueError, one line, if a data set annotates a class without a code."""
        if settings.threshold == "auto":
            raise ValueError("--threshold auto: is for a single class; remove the option")

        known = model.config.classes
        for dataset in datasets:
            unknown = [name for name in dataset.classes if name not in known]
            if unknown:
                root = dataset.entries[0].root
                hint = "nothing trains it"
                if settings.eval:
                    hint = "--text-codes FILE with its code adds it"
                raise ValueError(
                    f"{root}: {unknown[0]} is no class of the model ({', '.join(known[1:])}); "
                    f"{hint}"
                )

    def chosen_classes(self, model: nn.Module, classes: list[str], names: list[str] | None):
        """Return the indices of --classes, from 0 without the background; None without the option.

        Raises ValueError, one line, for a class that the model does not have.
        """
        if names is None:
            return None
        index_of = {plain_name(name): k for k, name in enumerate(classes[1:])}
        indices = {}  # a dict, to keep each class once and in order
        for name in map(plain_name, names):
            if name not in index_of:
                raise ValueError(f"--classes: the model has no {name}, only {', '.join(index_of)}")
            indices[name] = index_of[name]
        return list(indices.values())


def universal_family(protocols: dict[str, Protocol], kind, variants: dict) -> UniversalFamily:
    """Return the family of a model of class `kind` whose classes have codes."""
    load = partial(load_universal, kind, variants)
    return UniversalFamily(protocols, variants, load, universal_recipe, swin_encoder)


FAMILY = universal_family(UNIVERSAL, universal.UniversalSwinUNETR, universal.UNIVERSAL_VARIANTS)
FEWSHOT_FAMILY = universal_family(FEWSHOT, fewshot3d.AttentionUniversal, fewshot3d.VARIANTS)
