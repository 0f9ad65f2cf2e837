"""The CLIP-Driven Universal Model and its few-shot variants: classes that have codes."""

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


def universal_inputs(sample, train, rng, config, settings) -> dict:
    """As `volume_inputs`; of training mask (n,1,D,H,W) of label numbers, and what these are:
    table int16 (n,K,256), of each class 1 for its numbers and else 0, 255 for what does not count,
    all -1 if it is not annotated."""
    numbers = [config.classes.index(name) - 1 for name in sample["classes"][1:]]
    if not train:
        return volume_inputs(sample, train, rng, config, settings) | {"asked": numbers}
    item = volume_inputs(sample | {"regions": None}, train, rng, config, settings)
    table = torch.full((config.num_classes, 256), -1, dtype=torch.int16)
    for k, region in zip(numbers, sample["regions"], strict=True):
        table[k] = torch.isin(torch.arange(256), torch.tensor(region))
        table[k, 255] = 255
    return item | {"table": table.expand(len(item["mask"]), -1, -1)}


def annotated(batch: dict) -> Tensor:
    """Numbers (k,) of the classes that are annotated in any of a batch."""
    return (batch["table"][:, :, 0] >= 0).any(0).nonzero().flatten()


def universal_forward(model: nn.Module, batch: dict) -> Tensor:
    """Logits (B,k,D,H,W) of the annotated classes: nothing is to be learned of the others."""
    return model(batch["image"], annotated(batch).tolist())


def universal_loss(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """Dice + BCE of each class in each crop for which it is annotated."""
    tables = batch["table"][:, annotated(batch)]  # (B,k,256)
    target = [
        table[:, mask.long()] for table, mask in zip(tables, batch["mask"][:, 0], strict=True)
    ]
    return partial_dice_bce(logits.float(), torch.stack(target))


def read_codes(path: str | None) -> dict[str, Tensor]:
    """A file of `prepare.py text-codes`: class -> its code (512,). ValueError, one line."""
    if path is None:
        return {}
    codes = swin_unetr3d.read_file(Path(path))
    for name, code in codes.items():
        if not isinstance(name, str):
            told = f"{name!r:.80} is not the name of a class"
            raise ValueError(f"{path}: {told}; prepare.py text-codes makes codes")
        what = "no tensor"
        if isinstance(code, Tensor):
            what = "a nested tensor" if code.is_nested else tuple(code.shape)
        if what != (universal.TEXT,):
            told = f"{name} is {what}"
            raise ValueError(f"{path}: {told}, a code (512,); prepare.py text-codes makes codes")
    expected = torch.empty(universal.TEXT)
    swin_unetr3d.check_complete(codes, dict.fromkeys(codes, expected), path)  # finite floats
    return {plain_name(name): code for name, code in codes.items()}


def load_universal(
    kind, variants, weights, variant, settings: Protocol, overrides: dict, train_set
):
    """A Universal Model that knows the classes of the training set; without one those of the file
    of codes. What its weights do not know becomes a new class.

    ValueError: a code that is needed and not there, other codes than those of the weights.
    """
    texts, names = read_codes(settings.text_codes), train_set and train_set.classes[1:]
    codes, names = settings.codes, list(texts if names is None else names)
    variant = variant or next(iter(variants))

    def code(name: str) -> Tensor | None:
        if codes == "text" and name not in texts:
            hint = "prepare.py text-codes makes it; or take --codes random"
            raise ValueError(f"{settings.text_codes or '--text-codes'}: no code of {name}; {hint}")
        return texts[name] if codes == "text" else None

    if weights == "none":
        if train_set is None:
            raise ValueError("--weights none: nothing was trained; give those of a run or a file")
        overrides |= {"num_classes": len(names), "classes": ("background", *names), "codes": codes}
        overrides |= {"in_channels": train_set.channels}
        config = replace(variants[variant], **overrides)
        model = kind(config, torch.stack([code(n) for n in names]) if codes == "text" else None)
    else:
        source = weights or hub_id(settings, variant)
        known = codes == "text" and names and {*names} <= {*texts}
        embedding = torch.stack([texts[name] for name in names]) if known else None
        overrides |= {"codes": codes} if train_set else {}  # else what the weights have
        model = kind.from_pretrained(source, names or None, embedding, **overrides)
        if texts and model.config.codes != "text":
            told = f"the codes of {source} are {model.config.codes}"
            raise ValueError(f"--text-codes: {told}, drop it")
        if new := [name for name in names if name not in model.config.classes]:
            print(f"{source}: new classes: {', '.join(new)}")
        for name in new:
            model.add_class(name, code(name))
    check_modality(model, train_set)
    return model


def universal_recipe(model: universal.UniversalSwinUNETR, settings: Protocol) -> Recipe:
    inputs = partial(universal_inputs, config=model.config, settings=settings)
    return replace(volume_recipe(model, settings), inputs=inputs, forward=universal_forward)


UNIVERSAL = {
    "default": replace(
        SWIN["default"],
        hub_ids={"universal": "ljwztc/CLIP-Driven-Universal-Model"},
        codes="text",
        loss=universal_loss,
    ),  # backbone as of Swin UNETR, so that --train decoder leaves the same alone
}
# train.py of ljwztc/CLIP-Driven-Universal-Model at 43c1239, which does not run as it is (its Dice
# sums over an axis that is not there). It starts from the BTCV file: --weights. Left out: the zoom
# of Decathlon volumes, eight GPUs, the lottery between data sets, crops by class in some of them
# (--crop-ratio).
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
# Quirk: the rate was to rise to 1e-4 over 100 epochs, of which there were 11 (and then 2 of 4
# volumes of the new organ): it ended at 1.1e-5. Left out: its Dice of each slice apart; what three
# of its four crops learned from the first one's image (--recipe origin is not "chain" of ATTEND).
FEWSHOT = {
    "default": replace(UNIVERSAL["default"], hub_ids={}),
    "origin": replace(UNIVERSAL["origin"], epochs=11, warmup=100 / 11, eval_every=1),
}


@dataclass(frozen=True)
class UniversalFamily(VolumeFamily):
    """A model whose classes have codes, so that each volume may annotate other ones."""

    options: ClassVar[tuple] = (VOLUME_OPTIONS, CODE_OPTIONS, TEXT_CODE_OPTIONS)

    def check_options(self, options) -> None:
        super().check_options(options)
        if options.text_codes and options.codes in ("random", "one-hot"):
            raise ValueError(f"--codes {options.codes}: takes no --text-codes, drop one")

    def open_volumes(self, entries: list, run: dict) -> volumes.VolumeSet:
        """Return volumes of which each may annotate other classes."""
        return volumes.VolumeSet([*map(layouts.as_regions, entries)], has_partial_labels=True)

    def check_classes(self, model: nn.Module, datasets: list, settings: Settings) -> None:
        """Raise ValueError, one line, if data sets annotate what the model has no code of."""
        if settings.threshold == "auto":
            raise ValueError("--threshold auto: of one class alone; drop it")
        known = model.config.classes
        for dataset in datasets:
            unknown = [name for name in dataset.classes if name not in known]
            if unknown:
                told = f"{unknown[0]} is no class of the model ({', '.join(known[1:])})"
                hint = "nothing trains it"
                if settings.eval:
                    hint = "--text-codes FILE with its code adds it"
                raise ValueError(f"{dataset.entries[0].root}: {told}; {hint}")

    def numbers_asked(self, model: nn.Module, classes: list[str], names: list[str] | None):
        """Return the numbers of --classes, None without them."""
        if names is None:
            return None
        known = {plain_name(name): number for number, name in enumerate(classes[1:])}
        names = [plain_name(name) for name in names]
        for name in names:
            if name not in known:
                raise ValueError(f"--classes: the model has no {name}, only {', '.join(known)}")
        return [known[name] for name in dict.fromkeys(names)]


def universal_family(protocols: dict[str, Protocol], kind, variants: dict) -> UniversalFamily:
    """Return the family of a model of class `kind` whose classes have codes."""
    load = partial(load_universal, kind, variants)
    return UniversalFamily(protocols, variants, load, universal_recipe, swin_encoder)


FAMILY = universal_family(UNIVERSAL, universal.UniversalSwinUNETR, universal.UNIVERSAL_VARIANTS)
FEWSHOT_FAMILY = universal_family(FEWSHOT, fewshot3d.AttentionUniversal, fewshot3d.VARIANTS)
