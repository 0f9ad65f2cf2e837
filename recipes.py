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
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import beit
import biomedclipseg
import clipseg
import cris
import dpt
import prompts
import sam_decoder
import segformer
import upernet
from adapters import add_lora
from augment import MIRRORS, Augment, GITractAugment, mirror_prompt, view
from data import Dataset, Items, loader
from features import Rows, fingerprint, keep
from layouts import is_prompt_type
from losses import (
    cldice_loss,
    dice_bce,
    dice_ce,
    dice_loss,
    gi_tract_dice_ce,
    oct_topological_loss,
    sam_loss,
    topological_loss,
)
from tokenizer import CHARACTERS, CLIPTokenizer, WordPieceTokenizer


@dataclass(frozen=True)
class Settings:
    """Every number of a protocol."""

    weights: dict[str, str]  # variant -> hub id that training starts from
    config: dict = field(default_factory=dict)  # what the protocol sets of the model's Config
    decoder: str | None = None  # BiomedCLIPSeg: hub id of the CLIPSeg whose decoder it starts from
    prompt: str = "p6"  # prompt type
    negatives: float = 0.0  # share of training samples with another image's prompt, an empty mask
    train: str = "all"  # all | decoder | adapters | lora: see `choose_trained`
    lora_rank: int = 8
    adapter_dim: int = 64
    keep_features: bool | None = None  # of a frozen encoder, on files; None: wherever it is frozen
    feature_dtype: str = "float16"
    views: tuple[str, ...] = ("original",)  # of an image (augment.py), the augmentation then
    augment: Augment | None = None  # None: the model's own preprocessing
    pseudocolor: str | None = None  # colours of a map for grey levels: see data.py
    sam_prompts: str | None = None  # SAM: boxes | points | both | image, see prompts.py
    jitter: int | None = None  # largest move of a box's side in training, in pixels of the image
    min_area: int | None = None  # pixels that a component needs to be asked for
    prompts_per_image: int | None = None  # in training, by lot; 0: all
    ask_background: bool = False  # background is asked for in training, too
    topology: str | None = None  # SAM: none | persistence | cldice | oct, beside the other losses
    topology_weight: float | None = None
    full_size: bool = False  # SAM's loss is taken at the image's own size, else at the logits'
    loss: Callable = None  # (output, batch) -> scalar, parts
    optimizer: str = "adamw"  # adam | adamw
    amsgrad: bool = False
    lr: float = 1e-4
    backbone_lr: float = 1e-5  # of the pretrained towers,
    backbone: Callable = None  # which are the parameters for whose name this is true
    weight_decay: float = 1e-2
    decay_all: bool = False  # also of biases and norms
    batch_size: int = 16
    epochs: int = 50
    schedule: str = "cosine"  # cosine | poly | constant | multistep | plateau
    warmup: float = 0.05  # share of all steps in which the rate rises from 0
    milestones: tuple[float, ...] = ()  # shares of all steps at which `multistep` divides by ten
    clip_grad: float | None = 1.0  # largest norm of all gradients together
    dtype: str = "bfloat16"  # of the forward pass on a GPU in training; evaluation is float32
    patience: int | None = None  # epochs without a better validation Dice before training stops
    min_epochs: int = 0
    min_delta: float = 0.0  # what counts as better


def lr_factor(step: int, total: int, settings: Settings) -> float:
    """What every learning rate is multiplied by at this step of `total`."""
    warm = round(settings.warmup * total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)  # 0..1
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "poly":
        return (1 - done) ** 0.9
    if settings.schedule == "multistep":
        return 0.1 ** sum(step >= round(share * total) for share in settings.milestones)
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """What the loop needs of a model; see the top of the file."""

    inputs: Callable
    forward: Callable
    loss: Callable
    predict: Callable
    groups: Callable
    read: Callable | None = None  # prompt -> the tensors that `inputs` makes of it, of text models
    collate: Callable | None = None  # items -> a training batch; None: their tensors stacked
    ask: Callable | None = None  # (sample, source) -> SAM's prompts of a sample, see `sam_prompts`
    each: Callable | None = None  # (model, item, output) -> probabilities (Q,H,W) of each prompt
    files: dict[str, Path] = field(default_factory=dict)  # name -> what a run folder gets a copy of


# --- images, and what is asked of them in words ---------------------------------------------------


def pixels(sample, config, preprocess) -> dict:
    """image (3,S,S) float32."""
    return {"image": preprocess(Image.fromarray(sample["image"].permute(1, 2, 0).numpy()), config)}


def tokens(prompt: str, tokenizer) -> dict:
    """tokens (T,) int64."""
    return {"tokens": tokenizer(prompt)[0]}


def one_view(sample, views, rng) -> dict:
    """One of the views of a sample, by lot."""
    return view(sample, views[rng.integers(len(views))]) if len(views) > 1 else sample


def image_inputs(sample, train, rng, config, look, read, augment, views, preprocess_mask) -> dict:
    """What `look` makes of the image and `read` of the prompt; mask (1,S,S) float32 of 0 and 1, or
    of class numbers (255: does not count).

    In evaluation also what scoring needs: truth (1,H,W) int64, size, name, prompt, group, dataset;
    a sample without a mask gives an item without mask and truth.
    """
    sample = one_view(sample, views, rng) if train else sample
    prompt, mask = sample["prompt"], sample.get("mask")
    if train and augment is not None:
        image, mask, prompt = augment(sample["image"], mask, prompt, config.image_size, rng)
        mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))  # (3,1,1)
        item = {"image": (image / 255 - mean) / std, "mask": mask[None].float()}  # (3,S,S), (1,S,S)
    else:
        item = look(sample)
        if mask is not None:
            item["mask"] = preprocess_mask(mask, config)
    item |= read(prompt) if read else {}
    if not train:
        item |= {key: sample[key] for key in ("name", "prompt", "size", "group", "dataset")}
        if mask is not None:
            item["truth"] = mask[None]  # (1,H,W)
    return item


def prompted_forward(model: nn.Module, batch: dict) -> Tensor:
    """Logits (B,1,h,w) of a batch: of pixels or kept features, of tokens or kept embeddings."""
    if "features" not in batch:
        return model(batch["image"], batch["tokens"])
    condition = batch.get("condition")
    if condition is None:
        condition = model.encode_text(batch["tokens"])
    return model.decode(batch["features"].float(), condition=condition.float())


def image_predict(model: nn.Module, item: dict, forward: Callable) -> tuple[Tensor, Tensor]:
    """Probabilities (K,H,W) at the image's own size, and the logits (1,K,h,w)."""
    device = next(model.parameters()).device
    names = ("image", "features", "tokens", "condition")
    batch = {name: item[name][None].to(device) for name in names if name in item}
    logits = forward(model, batch)
    return model.postprocess(logits[0], item["size"]), logits


def at_mask_size(logits: Tensor, batch: dict) -> Tensor:
    """Logits brought bilinearly to the size of the target."""
    size = batch["mask"].shape[-2:]
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def dice_bce_at_mask_size(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    return dice_bce(at_mask_size(logits, batch), batch["mask"])


def texts_per_batch(dataset: Dataset, kind: str, batch_size: int) -> float:
    """How many different texts a training batch holds on average."""
    share = {}  # text -> its share of all draws
    for entry in dataset.entries:
        kinds = entry.types(kind) if is_prompt_type(kind) else [kind]
        for k in kinds:
            texts = entry.prompts.get(k, [kind])  # a literal text stands for itself
            for text in texts:
                share[text] = share.get(text, 0) + 1 / (len(dataset) * len(kinds) * len(texts))
    return sum(1 - (1 - p) ** batch_size for p in share.values())


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict]:
    """Up to four groups: backbone or not, decayed or not (biases and norms, unless `decay_all`)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = settings.decay_all or p.ndim > 1
            groups.setdefault((settings.backbone(name), decayed), []).append(p)
    return [
        {
            "params": params,
            "lr": settings.backbone_lr if backbone else settings.lr,
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), params in groups.items()
    ]


def image_recipe(file, model, settings: Settings, forward: Callable, read=None) -> Recipe:
    """For the model of `file`, which has preprocess and preprocess_mask."""
    inputs = partial(
        image_inputs,
        config=model.config,
        look=partial(pixels, config=model.config, preprocess=file.preprocess),
        read=read,
        augment=settings.augment,
        views=settings.views,
        preprocess_mask=file.preprocess_mask,
    )
    predict = partial(image_predict, forward=forward)
    return Recipe(inputs, forward, settings.loss, predict, parameter_groups, read)


def prompted_recipe(file, model: nn.Module, settings: Settings, tokenizer) -> Recipe:
    read = partial(tokens, tokenizer=tokenizer)
    return image_recipe(file, model, settings, prompted_forward, read)


def hub_id(settings: Settings, variant: str) -> str:
    """Where training of a variant starts. ValueError if it has no pretrained weights."""
    if variant not in settings.weights:
        message = "has no pretrained weights; pass --weights none or a file"
        raise ValueError(f"--variant {variant} {message}")
    return settings.weights[variant]


# --- kept features of frozen towers ---------------------------------------------------------------


@dataclass
class Kept:
    """What frozen towers gave for images and texts, in files of features.py."""

    images: dict[tuple[Path, str], tuple[Rows, int]]  # image file and view -> where
    texts: dict[str, tuple[Rows, int]]

    def look(self, sample) -> dict:
        rows, i = self.images[sample["file"], sample.get("view", "original")]
        return {"features": rows[i]}

    def read(self, prompt: str) -> dict:
        rows, i = self.texts[prompt]
        return {"condition": rows[i]}


def shown(sample, train, rng, inputs, name) -> dict:
    """The inputs of one view of an image, whatever is asked of it."""
    return inputs(view(sample | {"prompt": ""}, name), train, rng)


def texts_of(sets: list[Dataset], kind: str, views) -> list[str]:
    """Every text that the loop may ask for."""
    texts = {text for dataset in sets for entry in dataset.entries for text in entry.texts(kind)}
    for name in MIRRORS.keys() & set(views):
        texts |= {mirror_prompt(text, MIRRORS[name]) for text in texts} - {None}
    return sorted(texts)


def view_features(model, dataset: Dataset, name: str, inputs, rows: Callable, options) -> dict:
    """Image file and name of the view -> where the features are, of every image."""
    first = {entry.image: i for i, entry in reversed(list(enumerate(dataset.entries)))}
    order = sorted(first.values())  # an entry of each image
    device = next(model.parameters()).device
    items = Items(dataset, options.prompt, partial(shown, inputs=inputs, name=name), False, seed=0)

    def encode(start):
        for item in loader(items, [[(0, i)] for i in order[start:]], options.workers, device):
            yield model.encode_image(item["image"][None].to(device))[0]

    content = [(dataset.path.stem, dataset.colours, i) for i in order]
    found = rows(f"image features, {name}", content, encode)
    return {(dataset.entries[i].image, name): (found, row) for row, i in enumerate(order)}


def keep_features(recipe: Recipe, model, frozen: Callable, sets: list[Dataset], options) -> Recipe:
    """The recipe on kept features; computes what no file holds yet, of the first of `sets`, which
    trains, for all views. frozen: tells by name which weights make them."""
    if options.train != "decoder" or not hasattr(model, "encode_image"):
        message = "needs --train decoder and a model that encodes images apart"
        raise ValueError(f"--keep-features {message}; --no-keep-features")
    weights = {name: t for name, t in model.state_dict().items() if frozen(name)}
    config = replace(model.config, threshold=0.5)  # which comes after them

    @torch.no_grad()
    def rows(what: str, content: list, compute: Callable) -> Rows:
        key = fingerprint(weights, config, what, content, options.feature_dtype)
        path = Path(options.cache) / f"{key}.npy"
        keep(path, len(content), compute, f"{len(content)} {what}", options.feature_dtype)
        return Rows(path)

    kept = Kept({}, {})
    model.eval()
    for dataset in sets:
        for name in options.views if dataset is sets[0] else ["original"]:
            kept.images |= view_features(model, dataset, name, recipe.inputs, rows, options)
    if recipe.read is None:
        return replace(recipe, inputs=partial(recipe.inputs, look=kept.look))
    texts, device = texts_of(sets, options.prompt, options.views), next(model.parameters()).device

    def embeddings(start):
        for text in texts[start:]:
            yield model.encode_text(recipe.read(text)["tokens"][None].to(device))[0]

    found = rows("text embeddings", texts, embeddings)
    kept.texts |= {text: (found, i) for i, text in enumerate(texts)}
    return replace(recipe, inputs=partial(recipe.inputs, look=kept.look, read=kept.read))


def choose_trained(model: nn.Module, family: "Family", settings: Settings) -> None:
    """Freezes what `settings.train` leaves as it is.

    all: nothing is frozen; decoder: the towers are; lora: the towers are, with a low-rank update of
    `lora_rank` on their linear layers (adapters.py; see `Family.lora`), which is trained with the
    decoder; adapters: everything but the adapters of `adapter_dim` in both towers.
    """
    adapters = [name for name, _ in model.named_parameters() if "adapter" in name]
    if settings.train == "adapters" and not adapters:
        raise ValueError(f"--train adapters: {type(model).__name__} has no place for them")
    for name, parameter in model.named_parameters():
        frozen = {"decoder": family.backbone(name), "adapters": name not in adapters}
        if frozen.get(settings.train):
            parameter.requires_grad_(False)
    if settings.train == "lora":
        add_lora(model, settings.lora_rank, **{"frozen": family.backbone} | family.lora)


# --- CRIS -----------------------------------------------------------------------------------------


def medvlsm_dice(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """What the study's loss computed.

    quirk: it asked for Dice + 0.2 cross entropy (monai 1.1.0 DiceCELoss on sigmoid outputs), but
    the log softmax over a single channel is 0, so that only soft Dice with smooth 1e-5 remained.
    """
    logits = F.interpolate(
        logits.float(), batch["mask"].shape[-2:], mode="bicubic", align_corners=True
    )
    loss = dice_loss(logits.sigmoid(), batch["mask"], smooth=1e-5).mean()
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
    loss = F.binary_cross_entropy_with_logits(logits.float(), mask)
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


def load_cris(
    weights, variant, settings: Settings, overrides: dict, train_set: Dataset | None
) -> cris.CRIS:
    """CRIS from `weights`; from CLIP of the hub if None, and that is said; from scratch if "none".

    Its batch norm over the sentence vectors sees no variance where all texts of a batch are the
    same, and ruins evaluation: it then stays in evaluation mode.
    """
    if train_set is not None:
        texts = texts_per_batch(train_set, settings.prompt, settings.batch_size)
        if texts < 2:
            print(
                f"a batch holds {texts:.1f} different texts on average: the batch norm over texts, "
                "neck.txt_proj.1, stays in evaluation mode"
            )
            overrides = {"freeze_text_norm": True} | overrides
    if weights == "none":
        config = {
            "text_length": 77
        } | overrides  # long enough for every prompt; short ones are trimmed
        return cris.CRIS(replace(cris.VARIANTS[variant or "rn50"], **config))
    if weights is None:
        weights = hub_id(settings, variant or "rn50")
        print(
            f"starting from CLIP ({weights}): no CRIS checkpoint is on the hub. The known one, "
            "trained on RefCOCO, is linked in the README of github.com/naamiinepal/medvlsm and in "
            "issue 3 of github.com/DerrickWang005/CRIS.pytorch; pass it as --weights cris_best.pth"
        )
    return cris.CRIS.from_pretrained(weights, **overrides)


def cris_recipe(model: cris.CRIS, settings: Settings) -> Recipe:
    tokenizer = CLIPTokenizer(model.config.text_length, model.config.pad_token)
    return prompted_recipe(cris, model, settings, tokenizer)


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


def with_adapters(settings: Settings) -> dict:
    """Fields of Config."""
    return {"adapter_dim": settings.adapter_dim} if settings.train == "adapters" else {}


def load_clipseg(weights, variant, settings: Settings, overrides: dict, train_set):
    """CLIPSeg from `weights`; from the hub if None; from scratch if "none"."""
    overrides = with_adapters(settings) | overrides
    if weights == "none":
        return clipseg.CLIPSeg(replace(clipseg.VARIANTS[variant or "rd64-refined"], **overrides))
    weights = weights or hub_id(settings, variant or "rd64-refined")
    return clipseg.CLIPSeg.from_pretrained(weights, **overrides)


def load_biomedclipseg(weights, variant, settings: Settings, overrides: dict, train_set):
    """BiomedCLIPSeg from `weights`; from scratch if "none"; if None from BiomedCLIP of the hub and,
    where the recipe has one, a CLIPSeg's decoder.
    """
    variant, decoder = variant or "biomedclipseg", None
    overrides = with_adapters(settings) | overrides
    if weights == "none":
        return biomedclipseg.BiomedCLIPSeg(replace(biomedclipseg.VARIANTS[variant], **overrides))
    if weights is None:
        weights, decoder = hub_id(settings, variant), settings.decoder
    return biomedclipseg.BiomedCLIPSeg.from_pretrained(weights, decoder, **overrides)


def clipseg_recipe(model: clipseg.CLIPSeg, settings: Settings) -> Recipe:
    tokenizer = CLIPTokenizer(model.config.text_length, model.config.pad_token)
    return prompted_recipe(clipseg, model, settings, tokenizer)


def biomedclipseg_recipe(model: biomedclipseg.BiomedCLIPSeg, settings: Settings) -> Recipe:
    c = model.config
    vocabulary = biomedclipseg.find_vocabulary(c.vocabulary) if c.vocabulary else CHARACTERS
    tokenizer = WordPieceTokenizer(vocabulary, c.text_length, c.pad_token)
    files = {"vocab.txt": vocabulary} if c.vocabulary else {}
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
    variant = variant or next(iter(variants))
    if weights == "none":
        return kind(replace(variants[variant], **overrides))
    return kind.from_pretrained(weights or hub_id(settings, variant), **overrides)


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


def class_family(kind, file, weights: dict, backbone: str, backbone_lr: float) -> "Family":
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


def sam_prompts(sample, source, settings, rng=None, boxes=None) -> list:
    """The prompts (prompts.py) of one sample, in training with rng.

    source: one of prompts.KINDS, made of the mask; "jittered boxes", as in training, but always the
    same; "given boxes": those of `boxes`, {image file: [(class, box)]},
    which have no truth. Without a mask "image" is all that can be asked.
    """
    names = sample["classes"]
    if source == "given boxes":
        given = boxes.get(sample["file"].name, [])
        numbers = [names.index(name) if len(names) > 1 else 1 for name, _ in given]
        return [prompts.Prompt(k, None, box, *NO_POINTS) for k, (_, box) in zip(numbers, given)]
    if "mask" not in sample:
        return [prompts.Prompt(1, None, prompts.image_box(sample["size"]), *NO_POINTS)]
    kind, how = source.split()[-1], {"jitter": settings.jitter, "min_area": settings.min_area}
    first = 0 if rng is not None and settings.ask_background else 1
    if source == "jittered boxes":
        rng = np.random.default_rng(crc32(sample["name"].encode()))
    elif rng is not None:
        how["limit"] = settings.prompts_per_image or None
    classes = range(first, max(2, len(names)))
    return prompts.make_prompts(sample["mask"].numpy(), classes, kind, rng, **how)


def prompt_tensors(asked: list, size, config) -> dict:
    """boxes (Q,4), NaN where there is none, points (Q,P,2), labels (Q,P), all in SAM's frame, and
    numbers (Q,), the prompts' classes; of the prompts of an image of `size` (H,W)."""
    frame = partial(sam_decoder.to_frame, size=size, config=config)
    boxes = [NO_BOX if p.box is None else frame(torch.from_numpy(p.box)).numpy() for p in asked]
    points = [frame(torch.from_numpy(p.points)).numpy() for p in asked]
    q, n = len(asked), len(asked[0].labels) if asked else 0
    return {
        "boxes": torch.from_numpy(np.float32(boxes).reshape(q, 4)),
        "points": torch.from_numpy(np.float32(points).reshape(q, n, 2)),
        "labels": torch.from_numpy(np.int64([p.labels for p in asked]).reshape(q, n)),
        "numbers": torch.tensor([p.label for p in asked], dtype=torch.int64),
    }


def sam_ask(sample, source, config, settings, boxes=None) -> dict:
    """What an item of evaluation has of its prompts; `shown`: box and points of each, to draw."""
    asked = sam_prompts(sample, source, settings, boxes=boxes)
    item = prompt_tensors(asked, sample["size"], config)
    return item | {"shown": [(p.box, p.points) for p in asked], "classes": sample["classes"]}


def sam_inputs(sample, train, rng, config, settings, look) -> dict:
    """What `look` makes of the image, the tensors of its prompts, and mask (Q,1,s,s) float32, the
    target of each: at the logits' size or, if the recipe says so, the image's.

    In evaluation also what scoring needs: truth (1,H,W) int64, parts (Q,H,W) uint8, the truth of
    each prompt, size, name, prompt, group, dataset.
    """
    sample = one_view(sample, settings.views, rng) if train else sample
    if train and settings.augment is not None:
        image, mask, _ = settings.augment(sample["image"], sample["mask"], "", None, rng)
        sample = sample | {"image": image, "mask": mask}
    item, source = look(sample), settings.sam_prompts
    if not train:
        keys = ("name", "size", "group", "dataset", "classes")
        item |= {key: sample[key] for key in keys} | {"prompt": source}
    if "mask" not in sample:
        return item
    asked = sam_prompts(sample, source, settings, rng if train else None)
    item |= prompt_tensors(asked, sample["size"], config)
    targets = [torch.from_numpy(p.mask) for p in asked] or [torch.zeros(sample["size"])]  # (H,W)
    small = replace(config, image_size=config.image_size // 4)
    if settings.full_size:
        masks = [t[None].float() for t in targets]
    else:
        masks = [sam_decoder.preprocess_mask(t, small) for t in targets]
    item["mask"] = torch.stack(masks)[: len(asked)]
    if not train:
        item |= {"truth": sample["mask"][None], "parts": torch.stack(targets)[: len(asked)]}
        item["shown"] = [(p.box, p.points) for p in asked]
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


def sam_forward(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """masks (N,1,1,s,s), logits, and their estimated IoU (N,1,1), for all N prompts of a batch.

    Prompts of one form (box, points, both) pass together: tokens for what a prompt does not have
    would change its answer.
    """
    features = batch["features"].float() if "features" in batch else None
    features = model.encode_image(batch["image"]) if features is None else features
    form = ~batch["boxes"].isnan().any(1) + 2 * (batch["labels"] >= 0).any(1)  # (N,) 1, 2 or 3
    order, masks, iou = [], [], []
    for kind in form.unique().tolist() or [1]:  # without any prompt an empty answer, with a graph
        rows, asked = (form == kind).nonzero()[:, 0], {}
        if kind & 1:
            asked["boxes"] = batch["boxes"][rows, None]  # (n,1,4)
        if kind & 2:
            asked |= {k: batch[k][rows, None] for k in ("points", "labels")}  # (n,1,P,2), (n,1,P)
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
    names = ("image", "features", "boxes", "points", "labels")
    batch = {name: item[name].to(device) for name in names if name in item}
    batch |= {name: batch[name][None] for name in ("image", "features") if name in batch}
    batch["of"] = torch.zeros(len(item["boxes"]), dtype=torch.int64, device=device)
    classes = torch.zeros(max(2, n), H, W, device=device)
    classes[0] = model.config.threshold
    output = sam_forward(model, batch) if len(item["boxes"]) else None
    if output is not None:
        for number, p in zip(item["numbers"].tolist(), sam_each(model, item, output)):
            classes[number] = torch.maximum(classes[number], p)
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
    """SAM from `weights`; from the hub if None; from scratch if "none"."""
    variant = variant or "vit-base"
    if weights == "none":
        return sam_decoder.SAM(replace(sam_decoder.VARIANTS[variant], **overrides))
    return sam_decoder.SAM.from_pretrained(weights or hub_id(settings, variant), **overrides)


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
    )


# --- every model by its name on the command line --------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What belongs to one --model."""

    settings: dict[str, Settings]  # --recipe -> its numbers
    variants: dict  # --variant -> Config
    load: Callable  # (weights, variant, settings, Config overrides, train set) -> model
    recipe: Callable  # (model, settings) -> Recipe
    backbone: Callable  # parameters, by name, that `--train decoder` leaves as they are
    keeps: bool = False  # has encode_image: what it gives can be kept
    lora: dict = field(default_factory=dict)  # how add_lora updates it, if not all linear layers

    @property
    def reads(self) -> bool:
        """Whether the model takes a text."""
        return self.settings["default"].prompt != ""


FAMILIES = {
    "cris": Family(CRIS, cris.VARIANTS, load_cris, cris_recipe, clip_towers),
    "clipseg": Family(
        CLIPSEG, clipseg.VARIANTS, load_clipseg, clipseg_recipe, clipseg_towers, keeps=True
    ),
    "biomedclipseg": Family(
        BIOMEDCLIPSEG,
        biomedclipseg.VARIANTS,
        load_biomedclipseg,
        biomedclipseg_recipe,
        clipseg_towers,
        keeps=True,
    ),
    "sam_decoder": Family(
        SAM,
        sam_decoder.VARIANTS,
        load_sam,
        sam_recipe,
        not_mask_decoder,
        keeps=True,
        lora={"chosen": qkv_weight, "thirds": (0, 2)},  # queries and values, as SAMed
    ),
    "segformer": class_family(segformer.SegFormer, segformer, SEGFORMERS, "encoder.", 6e-5),
    "upernet": class_family(upernet.UPerNet, upernet, UPERNETS, "backbone.", 1e-4),
    "dpt": class_family(dpt.DPT, dpt, DPTS, "vit.", 3e-5),
    "beit": class_family(beit.BEiT, beit, BEITS, "beit.", 3e-5),
}
