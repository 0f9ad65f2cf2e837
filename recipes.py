"""Recipes: what connects a model to the training loop, every number of a protocol, its source.

The loop knows nothing of prompts, boxes or windows. A `Recipe` gives it five functions

    inputs(sample, train, rng) -> dict of tensors    made in the workers: pixels, tokens, the target
    forward(model, batch)      -> output             a training batch through the model
    loss(output, batch)        -> scalar, its parts  output is what the model gave for the batch
    predict(model, item)       -> probabilities (K,H,W) at the image's own size, output for `loss`
    groups(model, settings)    -> parameter groups for the optimiser

(a text model's also `read`, what makes tensors of a prompt; SAM's also how its prompts, of which
images have different numbers, become a batch, are made of a mask, and are scored one by one)

and a table of settings. `default` is what we recommend, `origin` the study that a model comes from
to the letter, quirks named. The command line overrides any setting of the same name.

protocol.py has what they are made of.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import extract_tb
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import beit
import biomedclipseg
import clipseg
import cris
import dpt
import fewshot3d
import sam_decoder
import segformer
import swin_unetr3d
import upernet
from data import Dataset
from engine.evaluate import EDITED, run_config
from engine.lora import merge_state_dict
from engine.report import is_out_of_memory
from imaging import boxes_and_points, volumes
from imaging.augment import Augment, GITractAugment
from imaging.layouts import moved, plain_name
from losses import (
    cldice_loss,
    dice_bce,
    dice_ce,
    dice_loss,
    gi_tract_dice_ce,
    oct_topological_loss,
    partial_dice_bce,
    sam_loss,
    topological_loss,
)
from protocol import (
    Recipe,
    Settings,
    at_mask_size,
    dice_bce_at_mask_size,
    for_scores,
    hub_id,
    image_recipe,
    one_view,
    parameter_groups,
    pixels,
    prompted_recipe,
    texts_per_batch,
)
from tokenizer import CHARACTERS, CLIPTokenizer, WordPieceTokenizer

# --- CRIS -----------------------------------------------------------------------------------------


def medvlsm_dice(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """What the study's loss computed.

    quirk: it asked for Dice + 0.2 cross entropy (monai 1.1.0 DiceCELoss on sigmoid outputs), but
    the log softmax over a single channel is 0, so that only soft Dice with smooth 1e-5 remained.
    """
    logits = F.interpolate(
        logits.float(), batch["mask"].shape[-2:], mode="bicubic", align_corners=True
    )
    keep = (batch["mask"] != 255).to(logits.dtype)  # the study's masks have no 255
    loss = dice_loss(logits.sigmoid(), batch["mask"], smooth=1e-5, keep=keep).mean()
    return loss, {"dice_loss": loss}


# What medvlsm's recipes have in common.
MEDVLSM = dict(
    loss=medvlsm_dice,
    weight_decay=1e-3,
    decay_all=True,
    epochs=1000,
    schedule="plateau",
    warmup=0.0,
    clip_grad=0.5,
    dtype="float16",
    patience=20,
    min_epochs=10,
    min_delta=1e-4,
)


def refcoco_bce(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """BCE at stride 4 with the mask brought there by nearest neighbour (model/segmenter.py)."""
    mask = F.interpolate(batch["mask"], logits.shape[-2:], mode="nearest")
    keep = (mask != 255).float()  # the official masks have no 255
    bce = F.binary_cross_entropy_with_logits(logits.float(), mask * keep, keep, reduction="sum")
    loss = bce / keep.sum().clamp(min=1)
    return loss, {"bce": loss}


def clip_towers(name: str) -> bool:
    """What comes from CLIP: all of `backbone` but the new branch in its attention pool."""
    return name.startswith("backbone.") and ".connect." not in name


def refcoco_backbone(name: str) -> bool:
    """What CRIS trains at the lower rate: `backbone` but its position tables (build_segmenter)."""
    return name.startswith("backbone.") and "positional_embedding" not in name


CLIP = {"rn50": "timm/resnet50_clip.openai", "rn101": "timm/resnet101_clip.openai"}

CRIS = {
    # What we recommend: one clear prompt type, pixels used whole, everything trained, CLIP gently.
    "default": Settings(
        weights=CLIP,
        config={"pixels": "stretch", "threshold": 0.5},
        augment=Augment(),
        loss=dice_bce_at_mask_size,
        backbone=clip_towers,
    ),
    # medvlsm (arXiv 2308.07706; github.com/naamiinepal/medvlsm, configs/experiment/cris.yaml),
    # which started from a CRIS trained on RefCOCO: give that file as --weights. Quirks: every
    # prompt is padded with 49407 to 77, so that the decoder attends to the padding too; masks are
    # stretched with nearest neighbour. Left out: JPEG masks served there as soft targets and
    # prompts were drawn anew in validation and test.
    "origin": Settings(
        weights=CLIP,
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
    # config/refcoco/cris_r50.yaml). Left out: its first epoch trained the backbone at the full
    # rate, because the groups named only `initial_lr`; the last, smaller batch was dropped.
    "refcoco": Settings(
        weights=CLIP,
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


# CLIP's own length, at which CRIS starts from CLIP or from scratch: long enough for nearly every
# prompt; short ones are trimmed.
FROM_CLIP = {"text_length": 77}


def clip_tokenizer(config) -> CLIPTokenizer:
    """Return the tokenizer of a model with a CLIP text tower."""
    return CLIPTokenizer(config.text_length, config.pad_token)


def load_cris(
    weights, variant, settings: Settings, overrides: dict, train_set: Dataset | None
) -> cris.CRIS:
    """CRIS from `weights`; from CLIP of the hub if None, and that is said; from scratch if "none".

    Its batch norm over the sentence vectors sees no variance where all texts of a batch are the
    same to the model, and ruins evaluation: it then stays in evaluation mode.
    """
    model = make_cris(weights, variant, settings, overrides, train_set)
    if train_set is None or "freeze_text_norm" in overrides:
        return model

    train_set.compare_prompts_by(clip_tokenizer(model.config))
    texts = texts_per_batch(train_set, settings.prompt, settings.batch_size)
    if texts < 2:
        print(
            f"a batch holds {texts:.1f} different texts on average: the batch norm over texts, "
            "neck.txt_proj.1, stays in evaluation mode"
        )
        model.config = replace(model.config, freeze_text_norm=True)
    return model


def make_cris(weights, variant, settings, overrides, train_set) -> cris.CRIS:
    """Return CRIS as `load_cris` starts from it."""
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


def cris_recipe(model: cris.CRIS, settings: Settings) -> Recipe:
    return prompted_recipe(cris, model, settings, clip_tokenizer(model.config))


# --- CLIPSeg and BiomedCLIPSeg --------------------------------------------------------------------

RD64 = "CIDAS/clipseg-rd64-refined"
BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"


def clipseg_towers(name: str) -> bool:
    return not name.startswith("decoder.")


CLIPSEG = {
    # What we recommend: gradients through both towers, the decoder at a hundred times their rate.
    "default": Settings(
        weights={f"rd{name}": f"CIDAS/clipseg-rd{name}" for name in ("64-refined", "64", "16")},
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
    "default": replace(CLIPSEG["default"], weights={"biomedclipseg": BIOMEDCLIP}, decoder=RD64),
    # As CLIPSeg's. Left out: BERT's dropout, active in the frozen text tower, moved the embeddings.
    "origin": replace(CLIPSEG["origin"], weights={"biomedclipseg": BIOMEDCLIP}),
    "origin-d": replace(CLIPSEG["origin"], weights={"biomedclipseg": BIOMEDCLIP}, decoder=RD64),
}


def load(kind, variants, weights, variant, settings: Settings, overrides: dict):
    """A model of class `kind` from `weights`; from the hub if None; from scratch if "none"."""
    variant = variant or next(iter(variants))
    if weights == "none":
        return kind(replace(variants[variant], **overrides))
    return kind.from_pretrained(weights or hub_id(settings, variant), **overrides)


def with_adapters(settings: Settings) -> dict:
    """Fields of Config."""
    return {"adapter_dim": settings.adapter_dim} if settings.train == "adapters" else {}


def load_clipseg(weights, variant, settings: Settings, overrides: dict, train_set):
    overrides = with_adapters(settings) | overrides
    return load(clipseg.CLIPSeg, clipseg.VARIANTS, weights, variant, settings, overrides)


def load_biomedclipseg(weights, variant, settings: Settings, overrides: dict, train_set):
    """Load BiomedCLIPSeg from `weights`; from scratch if "none", from the recipe's if None.

    Weights that are BiomedCLIP alone get the recipe's decoder, or a new one if it has none.
    Raises ValueError if that would be tested without training.
    """
    variant = variant or "biomedclipseg"
    overrides = with_adapters(settings) | overrides
    if weights == "none":
        return biomedclipseg.BiomedCLIPSeg(replace(biomedclipseg.VARIANTS[variant], **overrides))
    if weights is None:
        if train_set is None and not (settings.decoder or overrides.get("decoder")):
            raise ValueError("--weights is missing: BiomedCLIP, the default, has no decoder")
        weights = hub_id(settings, variant)

    kind = biomedclipseg.BiomedCLIPSeg
    model = kind.from_pretrained(weights, default_decoder=settings.decoder, **overrides)
    if model.decoder_source is None and train_set is None:
        raise ValueError(f"{weights}: BiomedCLIP alone has no decoder to test; --decoder names one")
    return model


def clipseg_recipe(model: clipseg.CLIPSeg, settings: Settings) -> Recipe:
    return prompted_recipe(clipseg, model, settings, clip_tokenizer(model.config))


def bert_vocabulary(config) -> Path | list[str]:
    """Return the vocab.txt that a config names, or the characters of a model without one."""
    return biomedclipseg.find_vocabulary(config.vocabulary) if config.vocabulary else CHARACTERS


def bert_tokenizer(config) -> WordPieceTokenizer:
    """Return the tokenizer of a model with a BERT text tower."""
    return WordPieceTokenizer(bert_vocabulary(config), config.text_length, config.pad_token)


def biomedclipseg_recipe(model: biomedclipseg.BiomedCLIPSeg, settings: Settings) -> Recipe:
    c = model.config
    tokenizer = bert_tokenizer(c)
    files = {"vocab.txt": bert_vocabulary(c)} if c.vocabulary else {}
    return replace(prompted_recipe(biomedclipseg, model, settings, tokenizer), files=files)


# --- class maps: SegFormer, UPerNet, DPT and BEiT -------------------------------------------------


def class_loss(logits: Tensor, batch: dict, of_several: Callable = dice_ce) -> tuple[Tensor, dict]:
    """Dice + cross entropy on logits brought to the size of the target; of one class Dice + BCE."""
    if logits.shape[1] == 1:
        return dice_bce_at_mask_size(logits, batch)
    return of_several(at_mask_size(logits, batch), batch["mask"][:, 0].long())


def class_forward(model: nn.Module, batch: dict) -> Tensor:
    """Logits (B,K,h,w)."""
    return model(batch["image"])


def class_recipe(model: nn.Module, settings: Settings, file) -> Recipe:
    return image_recipe(file, model, settings, class_forward)


def load_classes(weights, variant, settings: Settings, overrides, train_set, kind, variants):
    """A model of class `kind` with the classes of the training set; else with those of its file."""
    if train_set is not None:
        overrides = {"num_classes": len(train_set.classes)} | overrides
    return load(kind, variants, weights, variant, settings, overrides)


# github.com/JaeL17/Medical-Image-Segmentation (model.py, utils.py, trainer.py). Quirks: 288 pixels
# of the nearest neighbour and ImageNet's mean for every model; see losses.py and imaging/augment.py. Left
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

    default = Settings(
        weights=weights,
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


# --- SAM ------------------------------------------------------------------------------------------

TOPOLOGY = ("none", "persistence", "cldice", "oct")
NO_BOX = np.full(4, np.nan, np.float32)
NO_POINTS = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)


def sam_prompts(sample, source, settings, rng=None, given=None) -> list:
    """The prompts (imaging/boxes_and_points.py) of one sample, in training with rng.

    source: one of prompts.KINDS, made of the mask; "jittered boxes", as in training, but always the
    same; "given boxes", "given points", "given both": those of `given`, {image file as a path:
    [Prompt]}, which have no truth. Without a mask "image" is all else that can be asked.
    """
    names = sample["classes"]
    if source.startswith("given"):
        return given.get(sample["file"], [])
    if "mask" not in sample:
        return [boxes_and_points.Prompt(1, None, boxes_and_points.image_box(sample["size"]), *NO_POINTS)]
    kind, how = source.split()[-1], {"jitter": settings.jitter, "min_area": settings.min_area}
    first = 0 if rng is not None and settings.ask_background else 1
    if source == "jittered boxes":
        rng = np.random.default_rng(crc32(sample["name"].encode()))
    elif rng is not None:
        how["limit"] = settings.prompts_per_image or None
    classes = range(first, max(2, len(names)))
    return boxes_and_points.make_prompts(sample["mask"].numpy(), classes, kind, rng, **how)


def prompt_tensors(asked: list, size, config) -> dict:
    """boxes (Q,4), NaN where there is none, points (Q,P,2), labels (Q,P), all in SAM's frame;
    numbers (Q,), the prompts' classes; and `shown`, each one's box, points and labels to be drawn.
    Of the prompts of an image of `size` (H,W). Fewer points than P are followed by label -1."""
    frame = partial(sam_decoder.to_frame, size=size, config=config)
    boxes = [NO_BOX if p.box is None else frame(torch.from_numpy(p.box)).numpy() for p in asked]
    q = len(asked)
    n = max((len(p.labels) for p in asked), default=0)
    points = np.zeros((q, n, 2), np.float32)
    labels = np.full((q, n), -1)
    for k, p in enumerate(asked):
        points[k, : len(p.points)] = frame(torch.from_numpy(p.points)).numpy()
        labels[k, : len(p.labels)] = p.labels
    return {
        "boxes": torch.from_numpy(np.float32(boxes).reshape(q, 4)),
        "points": torch.from_numpy(points),
        "labels": torch.from_numpy(labels),
        "numbers": torch.tensor([p.label for p in asked], dtype=torch.int64),
        "shown": [(p.box, p.points, p.labels) for p in asked],
    }


def sam_ask(sample, source, config, settings, given=None) -> dict:
    """What an item of evaluation has of its prompts."""
    asked = sam_prompts(sample, source, settings, given=given)
    return prompt_tensors(asked, sample["size"], config)


def sam_inputs(sample, train, rng, config, settings, look) -> dict:
    """What `look` makes of the image, the tensors of its prompts, and mask (Q,1,s,s) float32, the
    target of each: at the logits' size or, if the recipe says so, the image's.

    In evaluation also what scoring needs: that of `for_scores`, the source of the prompts as
    prompt, classes, and parts (Q,H,W) uint8, the truth of each prompt.
    """
    sample = one_view(sample, settings.views, rng) if train else sample
    if train and settings.augment is not None:
        image, mask, _ = settings.augment(sample["image"], sample["mask"], "", None, rng)
        sample = sample | {"image": image, "mask": mask}
    item, source = look(sample), settings.sam_prompts
    if not train:
        item |= for_scores(sample) | {"prompt": source, "classes": sample["classes"]}
    if "mask" not in sample:
        return item
    asked = sam_prompts(sample, source, settings, rng if train else None)
    item |= prompt_tensors(asked, sample["size"], config)
    targets = [torch.from_numpy(p.mask) for p in asked] or [torch.zeros(sample["size"])]  # (H,W)
    small = replace(config, image_size=config.image_size // 4)
    if settings.full_size:
        masks = torch.stack([t[None].float() for t in targets])
    else:
        masks = torch.stack([sam_decoder.preprocess_mask(t, small) for t in targets])
        h, w = sam_decoder.frame_size(sample["size"], small)
        masks[..., h:, :] = masks[..., w:] = 255  # beyond the image nothing counts
    item["mask"] = masks[: len(asked)]
    if not train:
        item["parts"] = torch.stack(targets)[: len(asked)]
    return item


def collate_prompts(items: list[dict]) -> dict:
    """A batch: images stacked, the prompts of all images in a row, `of` tells whose each is.

    An image without an object is left out, unless there is no other.
    """
    items = [item for item in items if len(item["boxes"])] or items[:1]
    sizes = sorted({tuple(item["mask"].shape[2:]) for item in items})
    if len(sizes) > 1:
        (h, w), (H, W), *_ = sizes
        message = f"images of one size in a batch, not {w}x{h} and {W}x{H}; --batch-size 1"
        raise ValueError(f"this recipe's loss is taken at the images' own size and needs {message}")
    per_image = torch.tensor([len(item["boxes"]) for item in items])
    one = "features" if "features" in items[0] else "image"
    stacked = {one: torch.stack([item[one] for item in items])}
    names = ("boxes", "points", "labels", "mask")
    packed = {name: torch.cat([item[name] for item in items]) for name in names}
    return stacked | packed | {"of": torch.arange(len(items)).repeat_interleave(per_image)}


def count_points(labels: Tensor) -> Tensor:
    """Return (N,) int64: the points of each prompt, up to the last whose label (N,P) is not -1."""
    is_point = labels >= 0
    if labels.shape[1] == 0:
        return is_point.sum(1)
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return (places * is_point).amax(1)


def sam_forward(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """masks (N,1,1,s,s), logits, and their estimated IoU (N,1,1), for all N prompts of a batch.

    Prompts of one form (box, points, both) and number of points pass together: tokens for what a
    prompt does not have would change its answer.
    """
    if not len(batch["boxes"]):  # nothing asked: an empty answer, whose gradients are 0
        nothing = 0 * sum(p.sum() for p in model.mask_decoder.parameters())
        return nothing.expand(0, 1, 1, 1, 1), nothing.expand(0, 1, 1)
    if "features" in batch:
        features = batch["features"].float()
    else:
        features = model.encode_image(batch["image"])
    form = ~batch["boxes"].isnan().any(1) + 2 * count_points(batch["labels"])  # (N,)
    order, masks, iou = [], [], []
    for kind in form.unique().tolist():
        rows, asked = (form == kind).nonzero()[:, 0], {}
        if kind & 1:
            asked["boxes"] = batch["boxes"][rows, None]  # (n,1,4)
        p = kind // 2
        if p:
            asked |= {k: batch[k][rows, None, :p] for k in ("points", "labels")}  # (n,1,p,...)
        some, estimate = model.decode(features[batch["of"][rows]], **asked)
        order, masks, iou = [*order, rows], [*masks, some], [*iou, estimate]
    back = torch.cat(order).argsort()
    return torch.cat(masks)[back], torch.cat(iou)[back]


def sam_each(model, item: dict, output) -> Tensor:
    """Probabilities (Q,H,W) of every prompt's mask at the image's own size."""
    return model.postprocess(output[0].flatten(0, 2), item["size"])


def sam_predict(model, item: dict) -> tuple[Tensor, tuple | None]:
    """Probabilities (K,H,W), and the output for `loss`; None if nothing was asked.

    Of a class the largest of its prompts'. Of several classes the first is the background, as
    probable as the threshold: a pixel is of the most probable class above it.
    """
    n, (H, W), device = len(item["classes"]), item["size"], next(model.parameters()).device
    classes = torch.zeros(max(2, n), H, W, device=device)
    classes[0] = model.config.threshold
    features, outputs = item.get("features"), []
    if features is None and len(item["boxes"]):
        features = model.encode_image(item["image"][None].to(device))[0]
    for k in range(0, len(item["boxes"]), 16):  # 30 MB a prompt
        batch = {key: item[key][k : k + 16].to(device) for key in ("boxes", "points", "labels")}
        batch["of"] = torch.zeros(len(batch["boxes"]), dtype=torch.int64, device=device)
        outputs.append(sam_forward(model, batch | {"features": features[None].to(device)}))
        for number, p in zip(item["numbers"][k:].tolist(), sam_each(model, item, outputs[-1])):
            classes[number] = torch.maximum(classes[number], p)
    output = tuple(map(torch.cat, zip(*outputs))) if outputs else None
    return classes if n > 1 else classes[1:], output


def sam_terms(logits: Tensor, target: Tensor, settings) -> tuple[Tensor | float, dict]:
    """The topological term beside the loss of N masks: logits (N,1,h,w), target (N,1,h,w)."""
    if settings.topology == "none":
        return 0.0, {}
    p, keep = logits.sigmoid(), (target != 255).to(logits.dtype)
    if settings.topology == "persistence":
        term = topological_loss(p, target)
    elif settings.topology == "cldice":
        term = cldice_loss(p, target * keep, keep=keep).mean()
    else:
        term = oct_topological_loss(p * keep, target * keep)
    return settings.topology_weight * term, {settings.topology: term}


def sam_dice_bce(output, batch, settings, config) -> tuple[Tensor, dict]:
    """losses.sam_loss at the logits' size, and what is asked for beside."""
    masks, iou = (x.float().flatten(0, 2) for x in output)  # (N,s,s), (N,)
    target = batch["mask"].flatten(0, -3)  # (N,s,s)
    if not len(target):  # no image of the batch has an object: nothing to learn
        return masks.sum() + iou.sum(), {}
    loss, parts = sam_loss(masks, iou, target)
    term, more = sam_terms(masks[:, None], target[:, None], settings)
    return loss + term, parts | more


def oct_study_loss(output, batch, settings, config) -> tuple[Tensor, dict]:
    """Dice + BCE + topological loss at the image's own size; the IoU head learns nothing.

    quirk of the study, not built: for several prompts an image its cross entropy was a softmax
    across them (monai's DiceCELoss), so that a mask's loss hung on what else was asked.
    """
    target = batch["mask"].flatten(0, -4)  # (N,1,H,W)
    logits, S = output[0].float().flatten(0, 1), config.image_size  # (N,1,s,s)
    if not len(target):
        return logits.sum(), {}
    h, w = sam_decoder.frame_size(target.shape[2:], config)
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    logits = resize(resize(logits, (S, S))[..., :h, :w], target.shape[2:])
    loss, parts = dice_bce(logits, target, smooth=1e-5)
    term, more = sam_terms(logits, target, settings)
    return loss + term, parts | more


def not_mask_decoder(name: str) -> bool:
    return not name.startswith("mask_decoder.")


def qkv_weight(name: str) -> bool:
    return name.endswith(".attn.qkv.weight")


SAM = {
    # What we recommend: the decoder alone, on kept features; boxes as a user draws them.
    "default": Settings(
        weights={f"vit-{size}": f"facebook/sam-vit-{size}" for size in ("base", "large", "huge")},
        prompt="",
        train="decoder",
        lora_rank=4,
        views=("original", "hflip"),
        augment=Augment(rotate=15),
        sam_prompts="boxes",
        jitter=10,
        min_area=20,
        prompts_per_image=8,
        topology="none",
        topology_weight=0.1,
        loss=sam_dice_bce,
        lr=1e-4,
        backbone_lr=1e-5,
        backbone=not_mask_decoder,
        batch_size=4,
    ),
}
# github.com/philippendres/DILabHelmholtzOCT (octsam/models/training.py) with its topological loss.
# Quirks: the background and every speck are asked for; no augmentation, though it is free here.
# Left out, as they are slips: the first batch of each epoch was not trained on, prompts that filled
# up batches were trained on as boxes at 0, jitter could invert boxes, the softmax across prompts,
# and roots over sums of masks in the topological loss of a batch.
SAM["origin"] = replace(
    SAM["default"],
    views=("original",),
    augment=None,
    min_area=1,
    prompts_per_image=0,
    ask_background=True,
    topology="oct",
    topology_weight=1.0,  # the loss has the study's 0.1 in it
    full_size=True,
    loss=oct_study_loss,
    optimizer="adam",
    lr=1e-3,
    weight_decay=0.0,
    batch_size=2,
    epochs=10,
    schedule="constant",
    warmup=0.0,
    clip_grad=None,
    dtype="float32",
)


def load_sam(weights, variant, settings: Settings, overrides: dict, train_set) -> sam_decoder.SAM:
    return load(sam_decoder.SAM, sam_decoder.VARIANTS, weights, variant, settings, overrides)


def sam_recipe(model: sam_decoder.SAM, settings: Settings) -> Recipe:
    config = model.config
    look = partial(pixels, config=config, preprocess=sam_decoder.preprocess)
    how = {"config": config, "settings": settings}
    return Recipe(
        partial(sam_inputs, look=look, **how),
        sam_forward,
        partial(settings.loss, **how),
        sam_predict,
        parameter_groups,
        collate=collate_prompts,
        ask=partial(sam_ask, **how),
        each=sam_each,
        look=look,
    )


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


def load_volumes(weights, variant, settings: Settings, overrides: dict, train_set):
    """A Swin UNETR with the classes of the training set; else with those of its file."""
    if train_set is not None:
        first = train_set.entries[0]
        overlapping = first.regions is not None
        overrides = {"num_classes": len(first.classes) - overlapping} | overrides
        overrides |= {"overlapping": overlapping}
        if weights == "none":
            overrides = {"in_channels": train_set.channels} | overrides
    kind, variants = swin_unetr3d.SwinUNETR, swin_unetr3d.VARIANTS
    model = load(kind, variants, weights, variant, settings, overrides)
    if train_set is not None:
        if weights != "none" and moved(first.classes, had := model.config.classes):
            print(f"the head of {', '.join(had)} learns {', '.join(first.classes)}")
        model.config = replace(model.config, classes=first.classes)
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


# --- volumes: the CLIP-Driven Universal Model -----------------------------------------------------


def universal_inputs(sample, train, rng, config, settings) -> dict:
    """As `volume_inputs`; of training mask (n,1,D,H,W) of label numbers, and what these are:
    table int16 (n,K,256), of each class 1 for its numbers and else 0, 255 for what does not count,
    all -1 if it is not annotated."""
    numbers = [config.classes.index(name) - 1 for name in sample["classes"][1:]]
    if not train:
        return volume_inputs(sample, train, rng, config, settings) | {"asked": numbers}
    item = volume_inputs(sample | {"regions": None}, train, rng, config, settings)
    table = torch.full((config.num_classes, 256), -1, dtype=torch.int16)
    for k, region in zip(numbers, sample["regions"]):
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
    target = [table[:, mask.long()] for table, mask in zip(tables, batch["mask"][:, 0])]
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
        if what != (swin_unetr3d.TEXT,):
            told = f"{name} is {what}"
            raise ValueError(f"{path}: {told}, a code (512,); prepare.py text-codes makes codes")
    expected = torch.empty(swin_unetr3d.TEXT)
    swin_unetr3d.check_complete(codes, dict.fromkeys(codes, expected), path)  # finite floats
    return {plain_name(name): code for name, code in codes.items()}


def load_universal(
    kind, variants, weights, variant, settings: Settings, overrides: dict, train_set
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


def universal_recipe(model: swin_unetr3d.UniversalSwinUNETR, settings: Settings) -> Recipe:
    inputs = partial(universal_inputs, config=model.config, settings=settings)
    return replace(volume_recipe(model, settings), inputs=inputs, forward=universal_forward)


UNIVERSAL = {
    "default": replace(
        SWIN["default"],
        weights={"universal": "ljwztc/CLIP-Driven-Universal-Model"},
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
    weights={},
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
    "default": replace(UNIVERSAL["default"], weights={}),
    "origin": replace(UNIVERSAL["origin"], epochs=11, warmup=100 / 11, eval_every=1),
}


# --- every model by its name on the command line --------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What belongs to one --model."""

    settings: dict[str, Settings]  # --recipe -> its numbers
    variants: dict  # --variant -> Config
    load: Callable  # (weights, variant, settings, Config overrides, train set) -> model
    recipe: Callable  # (model, settings) -> Recipe
    backbone: Callable  # parameters, by name, that `--train decoder` leaves as they are
    sides: tuple[int, int] = (1, 1)  # least side of an image, and what sides are multiples of
    keeps: bool = False  # has encode_image: what it gives can be kept
    lora: dict = field(default_factory=dict)  # how add_lora updates it, if not all linear layers
    tokenizer: Callable | None = None  # (Config) -> tokenizer, of a model that reads
    text_config: dict = field(default_factory=dict)  # Config fields that training starts with
    second_file: str | None = None  # the option (clip, decoder) that names a second file of weights

    def tokenizers(self) -> dict[str, Callable]:
        """Return {names of recipes: tokenizer} for each text length at which training starts.

        Needs no weights, but BiomedCLIPSeg needs its vocabulary.
        """
        variant = next(iter(self.variants.values()))
        configs = {}
        recipes = {}
        for name, settings in self.settings.items():
            config = replace(variant, **self.text_config | settings.config)
            configs.setdefault(config.text_length, config)
            recipes.setdefault(config.text_length, []).append(name)
        return {", ".join(recipes[n]): self.tokenizer(config) for n, config in configs.items()}

    @property
    def reads(self) -> bool:
        """Whether the model takes a text."""
        return self.settings["default"].prompt != ""

    @property
    def asked(self) -> bool:
        """Whether the model is asked by boxes and points."""
        return self.settings["default"].sam_prompts is not None

    @property
    def partial(self) -> bool:
        """Whether classes have codes, so that each volume may annotate other ones."""
        return self.settings["default"].codes is not None

    @property
    def volumes(self) -> bool:
        """Whether the model takes volumes instead of images."""
        return self.settings["default"].crops_per_volume is not None


FAMILIES = {
    "cris": Family(
        CRIS,
        cris.VARIANTS,
        load_cris,
        cris_recipe,
        clip_towers,
        sides=(32, 32),
        tokenizer=clip_tokenizer,
        text_config=FROM_CLIP,
    ),
    "clipseg": Family(
        CLIPSEG,
        clipseg.VARIANTS,
        load_clipseg,
        clipseg_recipe,
        clipseg_towers,
        sides=(16, 16),
        keeps=True,
        tokenizer=clip_tokenizer,
        second_file="clip",
    ),
    "biomedclipseg": Family(
        BIOMEDCLIPSEG,
        biomedclipseg.VARIANTS,
        load_biomedclipseg,
        biomedclipseg_recipe,
        clipseg_towers,
        sides=(16, 16),
        keeps=True,
        tokenizer=bert_tokenizer,
        second_file="decoder",
    ),
    "sam_decoder": Family(
        SAM,
        sam_decoder.VARIANTS,
        load_sam,
        sam_recipe,
        not_mask_decoder,
        sides=(16, 16),
        keeps=True,
        lora={"chosen": qkv_weight, "thirds": (0, 2)},  # queries and values, as SAMed
    ),
    "segformer": class_family(
        segformer.SegFormer, segformer, SEGFORMERS, "encoder.", 6e-5, (29, 1)
    ),
    "upernet": class_family(upernet.UPerNet, upernet, UPERNETS, "backbone.", 1e-4, (32, 1)),
    "dpt": class_family(dpt.DPT, dpt, DPTS, "vit.", 3e-5, (16, 16)),
    "beit": class_family(beit.BEiT, beit, BEITS, "beit.", 3e-5, (32, 16)),
    "swin_unetr3d": Family(SWIN, swin_unetr3d.VARIANTS, load_volumes, volume_recipe, swin_encoder),
    "universal": Family(
        UNIVERSAL,
        swin_unetr3d.UNIVERSAL_VARIANTS,
        partial(load_universal, swin_unetr3d.UniversalSwinUNETR, swin_unetr3d.UNIVERSAL_VARIANTS),
        universal_recipe,
        swin_encoder,
    ),
    "fewshot3d": Family(
        FEWSHOT,
        fewshot3d.VARIANTS,
        partial(load_universal, fewshot3d.AttentionUniversal, fewshot3d.VARIANTS),
        universal_recipe,
        swin_encoder,
    ),
}


def second_file(name: str, clip: str | None, decoder: str | None) -> dict:
    """Return the argument of from_pretrained that --clip or --decoder is, {} without them.

    Raises ValueError, one line, if the model `name` has no use for it.
    """
    given = {key: value for key, value in (("clip", clip), ("decoder", decoder)) if value}
    for key in given:
        if FAMILIES[name].second_file != key:
            users = [other for other, family in FAMILIES.items() if family.second_file == key]
            raise ValueError(f"--{key}: {name} has no use for it, only {users[0]} has; remove it")
    return given


# --- runs that were stopped before their first validation ----------------------------------------


def load_model(family: Family, weights, variant, settings: Settings, overrides: dict, train_set):
    """Return `family.load` of these arguments; the last weights of a run that never validated.

    Such a run folder has last.pt, but no best.safetensors yet. That they are used is printed.
    Raises ValueError, one line, for a run folder without either, or with a config.json that does
    not describe a model.
    """
    if not weights or not run_config(weights):
        return family.load(weights, variant, settings, overrides, train_set)
    run = Path(weights)
    if not run.is_dir() or (run / "best.safetensors").exists():
        folder = run if run.is_dir() else run.parent
        with model_described_by(folder / "config.json"):
            return family.load(weights, variant, settings, overrides, train_set)
    if not (run / "last.pt").is_file():
        hint = f"train.py --resume --out {run} starts it again"
        raise ValueError(f"{run}: this run was stopped before it saved any weights; {hint}")

    with TemporaryDirectory() as folder:  # a run folder with the last weights as its best
        for name in ("config.json", "vocab.txt"):
            if (run / name).is_file():
                (Path(folder) / name).symlink_to((run / name).resolve())
        save_file(last_weights(run, family), Path(folder) / "best.safetensors")
        try:
            with model_described_by(run / "config.json"):
                return family.load(folder, variant, settings, overrides, train_set)
        except ValueError as error:
            raise ValueError(str(error).replace(folder, str(run))) from None


@contextmanager
def model_described_by(config: Path):
    """Raise ValueError, one line that names the config.json of a run, if it describes no model.

    It does not if a constructor fails, or anything in a way that our own lines do not explain. A
    lack of memory and files that cannot be read stay what they are.
    """
    try:
        yield
    except Exception as error:
        steps = [step.name for step in extract_tb(error.__traceback__)]
        is_explained = isinstance(error, ValueError) and "__init__" not in steps
        if is_explained or isinstance(error, OSError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or repr(error)
        raise ValueError(f"{config}: does not describe a model ({reason:.150}); {EDITED}") from None


def last_weights(run: Path, family: Family) -> dict[str, Tensor]:
    """Return the state dict of a run's model as it was saved last, with --ema the average.

    What it is, is printed. Raises ValueError, one line, if last.pt cannot be read.
    """
    path = run / "last.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = saved["model"]
        kind = "weights"
        if "ema" in saved:  # of torch.optim.swa_utils.AveragedModel
            kind = "averaged weights"
            names = [name for name in saved["ema"] if name.startswith("module.")]
            state = {name.removeprefix("module."): saved["ema"][name] for name in names}
        merged = merge_state_dict(state, family.lora.get("thirds", ()))
        step = saved["step"]
    except Exception as error:  # cut off, or something else
        reason = " ".join(repr(error).split())
        hint = "resume the run or start it again"
        raise ValueError(f"{path}: cannot be read ({reason:.150}); {hint}") from None
    print(f"{run}: stopped before its first validation; its last {kind} are used (step {step})")
    return {name: tensor.contiguous() for name, tensor in merged.items()}
