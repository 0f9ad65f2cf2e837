"""The interface between a model and the training loop, and helpers that several recipes share.

Protocol   the numbers of one --recipe of a model
Settings   a Protocol completed by the command line: everything that a run depends on
Recipe     the functions that the training loop calls: inputs, forward, loss, predict, groups
Family     what --model NAME means: its protocols, variants and options, and how it is loaded
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from engine import evaluate, runs
from engine.command_line import flag
from engine.lora import add_lora, is_lora
from engine.runs import DataSets
from imaging import layouts, volumes
from imaging.augment import Augment
from recipes import loading


@dataclass(frozen=True)
class Protocol:
    """The numbers of one --recipe of a model: a published study's, or those that we recommend."""

    # The model.
    hub_ids: dict[str, str]  # variant -> hub id of the weights that training starts from
    config: dict = field(default_factory=dict)  # fields of the model's Config
    default_decoder: str | None = None  # BiomedCLIPSeg: hub id of the CLIPSeg with its decoder
    train: str = "all"  # all | decoder | adapters | lora, see `choose_trained`
    lora_rank: int = 8
    adapter_dim: int = 64
    backbone: Callable = None  # (name of a parameter) -> True if it is a pretrained layer

    # Cached features of a frozen encoder, and augmentation.
    keep_features: bool | None = None  # cache them in files; None: if the encoder is frozen
    feature_dtype: str = "float16"
    # The views of an image (imaging/augment.py) that features are cached of. Where there is a
    # cache, or --views, they are the only augmentation.
    views: tuple[str, ...] = ("original",)
    augment: Augment | dict | None = None  # None: only the model's own preprocessing
    pseudocolor: str | None = None  # matplotlib colour map for grey images, see data.py

    # Text prompts.
    prompt: str = "p6"  # prompt type
    negatives: float = 0.0  # share of training samples with another image's text, an empty mask

    # SAM's prompts and losses.
    sam_prompts: str | None = None  # boxes | points | both | image, see boxes_and_points.py
    jitter: int | None = None  # largest shift of a box's sides in training, in pixels of the image
    min_area: int | None = None  # pixels of the smallest component that gets a prompt
    prompts_per_image: int | None = None  # random prompts of an image in a training step; 0: all
    ask_background: bool = False  # the background gets a prompt in training, too
    topology: str | None = None  # additional loss: none | persistence | cldice | oct
    topology_weight: float | None = None
    full_size: bool = False  # the loss is computed at the image's own size, else at the logits'

    # Volumes.
    crops_per_volume: int | None = None  # random windows of a volume in a training step
    # Relative frequency of windows around background and foreground, or around each class.
    crop_ratio: tuple[float, ...] | None = None
    overlap: float | None = None  # share of a side that neighbouring windows have in common
    window_batch: int | None = None  # windows that are predicted at once
    codes: str | None = None  # Universal Model: embeddings of the classes: text | random | one-hot
    text_codes: str | None = None  # file of text embeddings, see `read_codes` of universal.py
    name_absent: bool = True  # text_swin_unetr: texts also name wanted organs that a crop lacks
    contrast_weight: float = 0.1  # text_swin_unetr: factor of the contrastive loss
    repeat_weights: bool = False  # text_swin_unetr, concat: the text's copy of decoder5's weights

    # Training.
    loss: Callable = None  # (output, batch) -> scalar, {name: part of it}
    optimizer: str = "adamw"  # adam | adamw
    amsgrad: bool = False
    lr: float = 1e-4  # of new layers
    backbone_lr: float = 1e-5  # of pretrained layers
    weight_decay: float = 1e-2
    decay_all: bool = False  # also decay biases and norms
    batch_size: int = 16
    epochs: int = 50
    schedule: str = "cosine"  # cosine | poly | constant | multistep | plateau
    warmup: float = 0.05  # share of all steps in which the rate rises from 0
    milestones: tuple[float, ...] = ()  # shares of all steps at which `multistep` divides by ten
    clip_grad: float | None = 1.0  # largest norm of all gradients together
    dtype: str = "bfloat16"  # of the forward pass in training on a GPU; evaluation is float32
    eval_every: int = 1  # epochs between validations
    patience: int | None = None  # epochs without a better validation Dice before training stops
    min_epochs: int = 0  # epochs before patience may stop it
    min_delta: float = 0.0  # a higher Dice counts as better only above this difference


@dataclass(frozen=True, kw_only=True)
class Settings(Protocol):
    """Everything that a run depends on: its protocol, completed by the command line.

    `options.resolve` makes it, and everything after that reads nothing else. The fields have the
    names and values of the options that options.py explains.
    """

    model: str  # a key of FAMILIES
    variant: str | None
    weights: str | None  # as it was typed
    clip: str | None
    decoder: str | None  # as it was typed
    recipe: str | None
    data: list[str]
    test: list[str]
    mask_orientation: str | None
    mask_threshold: int | None
    boxes: str | None
    points: str | None
    spacing: list[float] | None
    intensity: list[str] | None
    checkpointing: bool
    overfit: int | None
    prompt_study: bool
    out: str
    resume: bool
    eval: bool
    max_steps: int | None
    grad_accum_steps: int
    ema: float | None
    size: list[int] | None
    threshold: float | str | None
    compile: bool
    device: str
    workers: int
    seed: int
    deterministic: bool
    cache: str
    fold: str | None
    group_regex: str | None
    score_size: str
    val_distances: bool
    nsd_tolerance: float | None
    pixel_size: list[float] | None
    overlays: int
    save_every: float

    @property
    def tolerance(self) -> float:
        """Return the NSD tolerance in mm (volumes) or pixels (images); 1 by default."""
        return 1.0 if self.nsd_tolerance is None else self.nsd_tolerance


def lr_factor(step: int, total: int, settings: Protocol) -> float:
    """Return the factor of all learning rates at a step (from 0) of `total` steps."""
    warmup_steps = round(settings.warmup * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps

    progress = (step - warmup_steps) / max(1, total - warmup_steps)  # 0..1
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    if settings.schedule == "poly":
        return (1 - progress) ** 0.9
    if settings.schedule == "multistep":
        passed = [share for share in settings.milestones if step >= round(share * total)]
        return 0.1 ** len(passed)
    return 1.0


def nothing(*arguments) -> dict:
    """Return {}: the default of functions that only some recipes need."""
    return {}


def name_of_case(item: dict) -> str:
    """Return the caption of a case in a picture: the name of its file."""
    return Path(item["name"]).name


@dataclass(frozen=True)
class Recipe:
    """The functions that connect a model to training, tests and predictions.

    A sample is what a data set returns (data.py, imaging/volumes.py): pixels, mask, prompt, name.
    An item is what `inputs` makes of a sample. A batch is several items put together.
    """

    # (sample, train, rng) -> item. Runs in the data-loading processes. An item holds pixels, tokens
    # and the training target, in evaluation also the ground truth for scoring.
    inputs: Callable
    # (model, batch) -> output
    forward: Callable
    # (output, batch) -> scalar, {name: part of it}
    loss: Callable
    # (model, item) -> probabilities (K,*size) at the image's own size, output for `loss` or None
    predict: Callable
    # (model, settings) -> parameter groups of the optimizer
    groups: Callable

    # Loading an image: sample -> the tensors of its image. Cached features can replace it.
    load_image: Callable | None = None
    # Tokenizing: prompt -> its tensors. Cached text embeddings can replace it.
    tokenize: Callable | None = None
    # texts -> token ids (B,T); None for models without text
    tokenizer: Callable | None = None
    # items -> batch; None: stack their tensors
    collate: Callable | None = None
    # {name: path} of files that are copied into the run folder
    files: dict[str, Path] = field(default_factory=dict)
    # further entries of a run's config.json
    config_entries: dict = field(default_factory=dict)

    # Tests.
    # (model, recipe, dataset, settings, name) -> rows, summary, {name: rows of a further table}
    test: Callable = evaluate.plain_test
    # item -> caption of its picture
    caption: Callable = name_of_case
    # (dataset, settings) -> names of all prompts that every entry has, such as p6 or boxes
    sources: Callable = nothing
    # (recipe, dataset, i, sources) -> {source: item of entry i with the prompts of this source}
    items_by_source: Callable = nothing
    # (model, item) -> tensors that `predict` can reuse for other prompts of the same image
    encode: Callable = nothing
    # (sample, source) -> tensors of prompts made from the ground truth, or read from files
    make_prompts: Callable | None = None
    # (model, item, output) -> probabilities (Q,H,W) of the mask of each prompt
    predict_each: Callable | None = None


def parameter_groups(model: nn.Module, settings: Protocol) -> list[dict]:
    """Return the optimizer's parameter groups: pretrained or new, with or without weight decay.

    Biases and norms are not decayed, unless `decay_all` is set.
    """
    members = {}  # (is pretrained, is decayed) -> parameters
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = settings.decay_all or parameter.ndim > 1
        is_pretrained = settings.backbone(name) and not is_lora(name)
        members.setdefault((is_pretrained, is_decayed), []).append(parameter)

    groups = []
    for (is_pretrained, is_decayed), parameters in members.items():
        groups.append(
            {
                "params": parameters,
                "lr": settings.backbone_lr if is_pretrained else settings.lr,
                "weight_decay": settings.weight_decay if is_decayed else 0.0,
            }
        )
    return groups


def hub_id(settings: Protocol, variant: str) -> str:
    """Return the hub id of the weights that a variant starts from.

    Raises ValueError, one line, if it has no pretrained weights.
    """
    if variant not in settings.hub_ids:
        raise ValueError(
            f"--variant {variant} has no pretrained weights; pass --weights none or a file"
        )
    return settings.hub_ids[variant]


# --- batch norms of a single value ---------------------------------------------------------------


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a batch norm to x (B,C) or (B,C,H,W); return the same shape.

    Where each channel has a single value, the running statistics are used, and not updated: one
    value has no variance, and subtracting its own mean would leave nothing of it.
    """
    if norm.training and x.numel() == x.shape[1]:
        return F.batch_norm(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training=False,
            eps=norm.eps,
        )
    return type(norm).forward(norm, x)


def allow_single_values(model: nn.Module) -> None:
    """Let a model with batch norms be trained on batches of one image.

    The pooled branches of UPerNet and BEiT, and the last feature maps of CRIS and DPT for small
    images, have a single value per image and channel. torch refuses these in training. All other
    batches are normalised as usual.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.forward = MethodType(normalise, module)


def choose_trained(model: nn.Module, family, settings: Protocol) -> None:
    """Freeze the parameters that --train leaves unchanged.

    all       nothing is frozen
    decoder   the encoders are frozen
    lora      the encoders are frozen; their linear layers get updates of rank `lora_rank`, which
              are trained together with the decoder (engine/lora.py, `Family.lora`)
    adapters  everything is frozen but the adapters of width `adapter_dim` in both encoders

    Raises ValueError, one line, if the model has no adapters.
    """
    adapters = [name for name, _ in model.named_parameters() if "adapter" in name]
    if settings.train == "adapters" and not adapters:
        raise ValueError(f"--train adapters: {type(model).__name__} has no place for them")

    for name, parameter in model.named_parameters():
        is_frozen = False
        if settings.train == "decoder":
            is_frozen = family.backbone(name)
        elif settings.train == "adapters":
            is_frozen = name not in adapters
        if is_frozen:
            parameter.requires_grad_(False)
    if settings.train == "lora":
        add_lora(model, settings.lora_rank, family.backbone, **family.lora)


def load_variant(kind, variants, weights, variant, settings: Protocol, overrides: dict):
    """Return a model of class `kind` with these weights.

    weights: a hub id, file or run folder; None: the recipe's hub id of the variant; "none": new
    weights. overrides: fields of the model's Config.
    """
    variant = variant or next(iter(variants))
    if weights == "none":
        return kind(replace(variants[variant], **overrides))
    return kind.from_pretrained(weights or hub_id(settings, variant), **overrides)


def class_forward(model: nn.Module, batch: dict) -> Tensor:
    """Return logits (B,K,h,w)."""
    return model(batch["image"])  # (B,K,h,w)


# --- what a --model is ---------------------------------------------------------------------------

# Groups of options that only some models take. train.py and predict.py refuse them for the others.
TEXT_OPTIONS = ("prompt", "negatives", "prompts_csv")
STUDY_OPTIONS = ("prompt_study",)
BOX_OPTIONS = (
    "sam_prompts",
    "jitter",
    "min_area",
    "prompts_per_image",
    "boxes",
    "points",
    "topology",
)
IMAGE_OPTIONS = (
    "pseudocolor",
    "views",
    "mask_orientation",
    "mask_threshold",
    "pixel_size",
    "window_size",
)
VOLUME_OPTIONS = (
    "crops_per_volume", "crop_ratio", "spacing", "intensity", "overlap", "window_batch",
    "checkpointing", "largest_component", "organ_rules", "classes",
)  # fmt: skip
CODE_OPTIONS = ("codes",)
TEXT_CODE_OPTIONS = ("text_codes",)
REFUSED = {  # group -> the error if one of its options is used with a model that does not take it
    TEXT_OPTIONS: "--prompt, --negatives: {model} reads no text",
    VOLUME_OPTIONS: "{flag}: {model} takes images; this is for volumes",
    IMAGE_OPTIONS: "{flag}: {model} takes volumes; this is for images",
    BOX_OPTIONS: "{flag}: {model} takes no boxes or points, only SAM does",
    CODE_OPTIONS: "{flag}: {model} has no codes of classes, only universal and fewshot3d do",
    TEXT_CODE_OPTIONS: (
        "{flag}: {model} has no codes of texts, only universal, fewshot3d and text_swin_unetr do"
    ),
    STUDY_OPTIONS: "--prompt-study: {model} reads no text",
}


@dataclass(frozen=True)
class Family:
    """The meaning of --model NAME. Everything that differs between models is here or in Recipe.

    This class serves models that map images to the classes of a data set. Families of models with
    texts, with boxes and points, and with volumes derive from it and override some of its methods.
    """

    protocols: dict[str, Protocol]  # --recipe -> its numbers
    variants: dict  # --variant -> Config
    load: Callable  # (weights, variant, settings, Config overrides, train set) -> model
    recipe: Callable  # (model, settings) -> Recipe
    backbone: Callable  # (name of a parameter) -> True if `--train decoder` freezes it
    sides: tuple[int, int] = (1, 1)  # smallest side of an image, and the factor of all sides
    can_cache: bool = False  # has encode_image, so its features can be cached
    lora: dict = field(default_factory=dict)  # arguments of add_lora; {}: all linear layers
    second_file: str | None = None  # option (clip, decoder) for a second file of weights

    takes: ClassVar[str] = "images"  # images | volumes
    options: ClassVar[tuple] = (IMAGE_OPTIONS,)  # the groups of REFUSED that this model takes
    compiles: ClassVar[bool] = True  # training calls its forward, so torch.compile has an effect
    variant_with_weights: ClassVar[bool] = False  # --variant adds layers to --weights

    # --- the command line ---

    def refuse_foreign(self, values: dict, model: str, refused: dict = REFUSED) -> None:
        """Raise ValueError, one line, if options are used that only other models take.

        values: {name of an option: value}. model: the model's name in the message. refused: {group
        of options: message}.
        """
        for group, refusal in refused.items():
            used = [name for name in group if self.is_set(name, values.get(name))]
            if used and group not in self.options:
                raise ValueError(refusal.format(flag=flag(used[0]), model=model))

    def is_set(self, option: str, value) -> bool:
        """Return True if the value of an option is not its default."""
        is_off = value is None or value is False or value == []
        first_protocol = next(iter(self.protocols.values()))
        return not is_off and value != getattr(first_protocol, option, None)

    def check_options(self, options) -> None:
        """Raise ValueError, one line, for values of options that this model does not take."""
        if not options.size:
            return
        if len(options.size) > 1:
            sides = " ".join(map(str, options.size))
            raise ValueError(f"--size {sides}: images take one number, only volumes take three")

        side = options.size[0]
        smallest, factor = self.sides
        if side >= smallest and side % factor == 0:
            return
        if factor > 1:
            raise ValueError(
                f"--size {side}: {options.model} takes sides that are multiples of {factor}, "
                f"{smallest} or more"
            )
        raise ValueError(f"--size {side}: {options.model} takes sides of {smallest} pixels or more")

    # --- data and model ---

    def config_of(self, settings: Settings) -> dict:
        """Return the fields of the model's Config that the command line sets."""
        return {"image_size": settings.size[0]} if settings.size else {}

    def open_volumes(self, entries: list, run: dict):
        """Return the data set of these volumes. run: config.json of an earlier run, or {}."""
        if run.get("config", {}).get("overlapping"):
            entries = [layouts.as_overlapping(entry, run["classes"]) for entry in entries]
        return volumes.VolumeSet(entries)

    def check_classes(self, model: nn.Module, datasets: list, settings: Settings) -> None:
        """Raise ValueError, one line, if a data set has other classes than the model."""
        runs.check_classes(model, datasets, settings)

    def make_ready(
        self, model: nn.Module, recipe: Recipe, data_sets: DataSets, settings: Settings
    ) -> Recipe:
        """Prepare the opened data sets and the recipe for training or testing. Return the recipe.

        May replace data sets in `data_sets`. Raises ValueError, one line, if the data cannot be
        used.
        """
        return recipe

    def load_model(self, weights, variant, settings: Protocol, overrides: dict, train_set=None):
        """Return the model with these weights, which may be those of a run stopped early."""
        return loading.load_model(self, weights, variant, settings, overrides, train_set)

    # --- predictions of images ---

    def reads_text(self) -> bool:
        """Return True if every image of a prediction needs a text."""
        return False

    def prompts_for_prediction(
        self, recipe: Recipe, cases: list, classes: list | None, args
    ) -> tuple:
        """Return how images are prompted in a prediction, and the classes of the masks.

        The first is a function, sample -> tensors that are added to those of `inputs`. cases:
        (name, image file, text) of each image. classes: those of the run, None if unknown.
        """
        return nothing, classes

    # --- predictions of volumes ---

    def chosen_classes(self, model: nn.Module, classes: list[str], names: list[str] | None):
        """Return the indices of the classes to predict, from 0 without background; None: all.

        classes: the model's. names: of --classes. Raises ValueError, one line, if the model always
        predicts all classes, or if it does not know one of the names.
        """
        if names is not None:
            raise ValueError("--classes: this model predicts all of its classes at once; remove it")
