"""Recipes: what connects a model to the training loop, every number of a protocol, its source.

The loop knows nothing of prompts, boxes or windows. A `Recipe` gives it five functions

    inputs(sample, train, rng) -> dict of tensors    made in the workers: pixels, tokens, the target
    forward(model, batch)      -> output             a training batch through the model
    loss(output, batch)        -> scalar, its parts  output is what the model gave for the batch
    predict(model, item)       -> probabilities (K,H,W) at the image's own size, output for `loss`
    groups(model, settings)    -> parameter groups for the optimiser

(a text model's also `read`, what makes tensors of a prompt)

and a table of settings. `default` is what we recommend, `origin` the study that a model comes from
to the letter, quirks named. The command line overrides any setting of the same name.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import beit
import biomedclipseg
import clipseg
import cris
import dpt
import segformer
import upernet
from adapters import add_lora
from augment import Augment, GITractAugment
from data import Dataset, Items, loader
from features import Rows, fingerprint, keep
from layouts import is_prompt_type
from losses import dice_bce, dice_ce, dice_loss, gi_tract_dice_ce
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
    keep_features: bool = False  # of frozen towers: computed once, on files; no augmentation then
    augment: Augment | None = None  # None: the model's own preprocessing
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
    files: dict[str, Path] = field(default_factory=dict)  # name -> what a run folder gets a copy of


# --- images, and what is asked of them in words ---------------------------------------------------


def pixels(sample, config, preprocess) -> dict:
    """image (3,S,S) float32."""
    return {"image": preprocess(Image.fromarray(sample["image"].permute(1, 2, 0).numpy()), config)}


def tokens(prompt: str, tokenizer) -> dict:
    """tokens (T,) int64."""
    return {"tokens": tokenizer(prompt)[0]}


def image_inputs(sample, train, rng, config, look, read, augment, preprocess_mask) -> dict:
    """What `look` makes of the image and `read` of the prompt; mask (1,S,S) float32 of 0 and 1, or
    of class numbers (255: does not count).

    In evaluation also what scoring needs: truth (1,H,W) int64, size, name, prompt, group, dataset;
    a sample without a mask gives an item without mask and truth.
    """
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

    images: dict[tuple[str, str], tuple[Rows, int]]  # data set and name of an entry -> where
    texts: dict[str, tuple[Rows, int]]

    def look(self, sample) -> dict:
        rows, i = self.images[sample["dataset"], sample["name"]]
        return {"features": rows[i]}

    def read(self, prompt: str) -> dict:
        rows, i = self.texts[prompt]
        return {"condition": rows[i]}


def keep_features(recipe: Recipe, model, frozen: Callable, sets: list[Dataset], options) -> Recipe:
    """The recipe on kept features, hence without augmentation; computes what no file holds yet.
    frozen: tells by name which weights make them."""
    if options.train != "decoder" or not hasattr(model, "encode_image"):
        raise ValueError("--keep-features needs --train decoder and a CLIPSeg; --no-keep-features")
    plain, kept, device = recipe.inputs, Kept({}, {}), next(model.parameters()).device
    weights = {name: t for name, t in model.state_dict().items() if frozen(name)}
    config = replace(model.config, threshold=0.5)  # which comes after them

    @torch.no_grad()
    def rows(what: str, content: list, compute: Callable) -> Rows:
        path = Path(options.cache) / f"{fingerprint(weights, config, what, content)}.npy"
        keep(path, len(content), compute, f"{len(content)} {what}")
        return Rows(path)

    model.eval()
    for dataset in sets:
        first = {entry.image: i for i, entry in reversed(list(enumerate(dataset.entries)))}
        order = sorted(first.values())  # an entry of each image
        items = Items(dataset, options.prompt, plain, train=False, seed=0)

        def images(start, items=items, order=order):
            for item in loader(items, [[(0, i)] for i in order[start:]], options.workers, device):
                yield model.encode_image(item["image"][None].to(device))[0]

        found = rows("image features", [(dataset.path.stem, i) for i in order], images)
        for entry in dataset.entries:
            where = found, order.index(first[entry.image])
            if kept.images.setdefault((entry.root.name, entry.name), where) != where:
                raise ValueError(f"{entry.root.name}, {entry.name} is there twice; rename a folder")
    texts = sorted({t for d in sets for e in d.entries for t in e.texts(options.prompt)})

    def embeddings(start):
        for text in texts[start:]:
            yield model.encode_text(recipe.read(text)["tokens"][None].to(device))[0]

    found = rows("text embeddings", texts, embeddings)
    kept.texts |= {text: (found, i) for i, text in enumerate(texts)}
    return replace(recipe, inputs=partial(plain, look=kept.look, read=kept.read, augment=None))


def choose_trained(model: nn.Module, family: "Family", settings: Settings) -> None:
    """Freezes what `settings.train` leaves as it is.

    all: nothing is frozen; decoder: the towers are; lora: the towers are, with a low-rank update of
    `lora_rank` on each of their linear layers (adapters.py), which is trained with the decoder;
    adapters: everything but the adapters of `adapter_dim` in both towers.
    """
    adapters = [name for name, _ in model.named_parameters() if "adapter" in name]
    if settings.train == "adapters" and not adapters:
        raise ValueError(f"--train adapters: {type(model).__name__} has no place for them")
    for name, parameter in model.named_parameters():
        frozen = {"decoder": family.backbone(name), "adapters": name not in adapters}
        if frozen.get(settings.train):
            parameter.requires_grad_(False)
    if settings.train == "lora":
        add_lora(model, settings.lora_rank, family.backbone)


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


# --- every model by its name on the command line --------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What belongs to one --model."""

    settings: dict[str, Settings]  # --recipe -> its numbers
    variants: dict  # --variant -> Config
    load: Callable  # (weights, variant, settings, Config overrides, train set) -> model
    recipe: Callable  # (model, settings) -> Recipe
    backbone: Callable  # parameters, by name, that `--train decoder` leaves as they are

    @property
    def reads(self) -> bool:
        """Whether the model takes a text."""
        return self.settings["default"].prompt != ""


FAMILIES = {
    "cris": Family(CRIS, cris.VARIANTS, load_cris, cris_recipe, clip_towers),
    "clipseg": Family(CLIPSEG, clipseg.VARIANTS, load_clipseg, clipseg_recipe, clipseg_towers),
    "biomedclipseg": Family(
        BIOMEDCLIPSEG,
        biomedclipseg.VARIANTS,
        load_biomedclipseg,
        biomedclipseg_recipe,
        clipseg_towers,
    ),
    "segformer": class_family(segformer.SegFormer, segformer, SEGFORMERS, "encoder.", 6e-5),
    "upernet": class_family(upernet.UPerNet, upernet, UPERNETS, "backbone.", 1e-4),
    "dpt": class_family(dpt.DPT, dpt, DPTS, "vit.", 3e-5),
    "beit": class_family(beit.BEiT, beit, BEITS, "beit.", 3e-5),
}
