"""What a recipe is: Settings, Recipe, Family, and the pieces that those of all models share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn

from engine.lora import add_lora, is_lora
from imaging.augment import Augment


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
    views: tuple[str, ...] = (
        "original",
    )  # of an image (imaging/augment.py), the augmentation then
    augment: Augment | dict | None = None  # None: the model's own preprocessing
    crops_per_volume: int | None = None  # random windows that a volume gives in a training step
    crop_ratio: tuple[float, ...] | None = None  # of those around background and foreground, or
    # around each class
    codes: str | None = None  # what stands for a class of the Universal Model
    text_codes: str | None = None  # file of them, see `read_codes` of universal.py
    overlap: float | None = None  # share of a side that neighbouring windows have in common
    window_batch: int | None = None  # windows at a time
    eval_every: int = 1  # epochs between validations
    pseudocolor: str | None = None  # colours of a map for grey levels: see data.py
    sam_prompts: str | None = None  # SAM: boxes | points | both | image (boxes_and_points.py)
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
    """What the loop needs of a model; see recipes/__init__.py."""

    inputs: Callable
    forward: Callable
    loss: Callable
    predict: Callable
    groups: Callable
    look: Callable | None = None  # sample -> what `inputs` makes of its image, or kept features
    read: Callable | None = None  # prompt -> the tensors that `inputs` makes of it, of text models
    tokenizer: Callable | None = None  # of text models: texts -> ids (B,T)
    collate: Callable | None = None  # items -> a training batch; None: their tensors stacked
    ask: Callable | None = None  # (sample, source) -> SAM's prompts of a sample, see `sam_prompts`
    each: Callable | None = None  # (model, item, output) -> probabilities (Q,H,W) of each prompt
    prepare: Callable | None = None  # (volumes, cache) -> the same, on the grid that the model sees
    files: dict[str, Path] = field(default_factory=dict)  # name -> what a run folder gets a copy of


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict]:
    """Up to four groups: backbone or not, decayed or not (biases and norms, unless `decay_all`)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = settings.decay_all or p.ndim > 1
            backbone = settings.backbone(name) and not is_lora(name)  # updates are new parts
            groups.setdefault((backbone, decayed), []).append(p)
    return [
        {
            "params": params,
            "lr": settings.backbone_lr if backbone else settings.lr,
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), params in groups.items()
    ]


def hub_id(settings: Settings, variant: str) -> str:
    """Where training of a variant starts. ValueError if it has no pretrained weights."""
    if variant not in settings.weights:
        message = "has no pretrained weights; pass --weights none or a file"
        raise ValueError(f"--variant {variant} {message}")
    return settings.weights[variant]


# --- batch norms of a single value ---------------------------------------------------------------


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Return batch norm's forward of x (B,C) or (B,C,H,W) -> the same shape.

    A single value a channel is normalised by the running statistics, which stay as they are: it has
    no variance, and its own mean would leave nothing of it.
    """
    if norm.training and x.numel() == x.shape[1]:
        weights = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return F.batch_norm(x, *weights, training=False, eps=norm.eps)
    return type(norm).forward(norm, x)


def allow_single_values(model: nn.Module) -> None:
    """Let a model with batch norm learn from batches of one image.

    The pooled branches of UPerNet and BEiT, and the last maps of CRIS and DPT for small images,
    have a single value an image and channel, which torch refuses in training. All other batches are
    normalised as ever.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.forward = MethodType(normalise, module)


def choose_trained(model: nn.Module, family, settings: Settings) -> None:
    """Freezes what `settings.train` leaves as it is; family: the model's in recipes.FAMILIES.

    all: nothing is frozen; decoder: the towers are; lora: the towers are, with a low-rank update of
    `lora_rank` on their linear layers (lora.py; see `Family.lora`), which is trained with the
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
        add_lora(model, settings.lora_rank, family.backbone, **family.lora)


def load(kind, variants, weights, variant, settings: Settings, overrides: dict):
    """A model of class `kind` from `weights`; from the hub if None; from scratch if "none"."""
    variant = variant or next(iter(variants))
    if weights == "none":
        return kind(replace(variants[variant], **overrides))
    return kind.from_pretrained(weights or hub_id(settings, variant), **overrides)


def class_forward(model: nn.Module, batch: dict) -> Tensor:
    """Logits (B,K,h,w)."""
    return model(batch["image"])


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
