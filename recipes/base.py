"""What a recipe is: Settings, Recipe, Family, and the pieces that those of all models share."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from engine import evaluate, runs
from engine.lora import add_lora, is_lora
from engine.runs import DataSets
from imaging import layouts, volumes
from imaging.augment import Augment
from recipes import loading


@dataclass(frozen=True)
class Protocol:
    """What one --recipe of a model sets: every number of a study, or what we recommend."""

    hub_ids: dict[str, str]  # variant -> hub id that training starts from
    config: dict = field(default_factory=dict)  # what the protocol sets of the model's Config
    default_decoder: str | None = None  # BiomedCLIPSeg: hub id of the CLIPSeg it takes it from
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
    name_absent: bool = True  # text_swin_unetr: a text names wanted organs that a crop lacks, too
    contrast_weight: float = 0.1  # text_swin_unetr: of the contrast beside the other losses
    repeat_weights: bool = False  # text_swin_unetr, concat: decoder5's for the text are the image's
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


@dataclass(frozen=True, kw_only=True)
class Settings(Protocol):
    """All that a run goes by: its protocol, and what the command line says of the run itself.

    `options.resolve` makes it. Everything after that reads this and nothing else. options.py says
    what each option means; the fields here have the same names and values.
    """

    model: str  # a key of FAMILIES
    variant: str | None
    weights: str | None  # --weights, as it was given
    clip: str | None
    decoder: str | None  # --decoder, as it was given
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
    overlays: int
    save_every: float

    @property
    def tolerance(self) -> float:
        """NSD tolerance in mm (volumes) or pixels (images); 1 unless --nsd-tolerance sets it."""
        return 1.0 if self.nsd_tolerance is None else self.nsd_tolerance


def lr_factor(step: int, total: int, settings: Protocol) -> float:
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


def nothing(*arguments) -> dict:
    """Return {}: the default of functions of a Recipe that most models have no use for."""
    return {}


def name_of_case(item: dict) -> str:
    """Return what the caption of a picture calls a case: the name of its file."""
    return Path(item["name"]).name


@dataclass(frozen=True)
class Recipe:
    """What the training loop, tests and predictions need of a model.

    A sample is what a data set gives (data.py, imaging/volumes.py), an item what `inputs` makes of
    it, and a batch several items put together.
    """

    # (sample, train, rng) -> item, made in the workers: pixels, tokens, the target of training; in
    # evaluation also what scoring needs
    inputs: Callable
    # (model, batch) -> output
    forward: Callable
    # (output, batch) -> scalar, {name: part of it}
    loss: Callable
    # (model, item) -> probabilities (K,*size) at the image's own size, output for `loss` or None
    predict: Callable
    # (model, settings) -> parameter groups for the optimiser
    groups: Callable

    # sample -> what `inputs` makes of its image; kept features take its place
    look: Callable | None = None
    # prompt -> the tensors that `inputs` makes of it; text embeddings that are kept take its place
    read: Callable | None = None
    # texts -> ids (B,T), of a model that reads
    tokenizer: Callable | None = None
    # items -> batch; None: their tensors stacked
    collate: Callable | None = None
    # {name: path} of files that a run folder gets a copy of
    files: dict[str, Path] = field(default_factory=dict)
    # what config.json of a run says of the model beside the rest
    about: dict = field(default_factory=dict)

    # Tests.
    # (model, recipe, dataset, settings, name) -> rows, summary, {name: rows of a further table}
    test: Callable = evaluate.plain_test
    # item -> text of a caption
    caption: Callable = name_of_case
    # (dataset, settings) -> all that every entry can be asked by, such as types of prompts
    sources: Callable = nothing
    # (recipe, dataset, i, sources) -> {source: item of entry i that is asked by it}
    ask_each: Callable = nothing
    # (model, item) -> what `predict` takes from it for the same image and another question
    encode: Callable = nothing
    # (sample, source) -> the tensors of the prompts that are made of a sample or of files
    ask: Callable | None = None
    # (model, item, output) -> probabilities (Q,H,W) of each prompt of an item
    each: Callable | None = None


def parameter_groups(model: nn.Module, settings: Protocol) -> list[dict]:
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


def hub_id(settings: Protocol, variant: str) -> str:
    """Where training of a variant starts. ValueError if it has no pretrained weights."""
    if variant not in settings.hub_ids:
        message = "has no pretrained weights; pass --weights none or a file"
        raise ValueError(f"--variant {variant} {message}")
    return settings.hub_ids[variant]


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


def choose_trained(model: nn.Module, family, settings: Protocol) -> None:
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


def load_variant(kind, variants, weights, variant, settings: Protocol, overrides: dict):
    """A model of class `kind` from `weights`; from the hub if None; from scratch if "none"."""
    variant = variant or next(iter(variants))
    if weights == "none":
        return kind(replace(variants[variant], **overrides))
    return kind.from_pretrained(weights or hub_id(settings, variant), **overrides)


def class_forward(model: nn.Module, batch: dict) -> Tensor:
    """Logits (B,K,h,w)."""
    return model(batch["image"])


# --- what a --model is ---------------------------------------------------------------------------

# Options that only some models take, and what an error says where another is given them. train.py
# and predict.py check them alike.
TEXT_OPTIONS = ("prompt", "negatives")
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
IMAGE_OPTIONS = ("pseudocolor", "views", "mask_orientation", "mask_threshold")
VOLUME_OPTIONS = (
    "crops_per_volume", "crop_ratio", "spacing", "intensity", "overlap", "window_batch",
    "checkpointing", "largest_component", "organ_rules", "classes",
)  # fmt: skip
CODE_OPTIONS = ("codes",)
TEXT_CODE_OPTIONS = ("text_codes",)
REFUSED = {
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
    """What --model NAME means. All that differs between models is decided here and in Recipe.

    This class itself is of models that divide images into the classes of a data set. Those that
    read a text, that are asked by boxes and points, and that take volumes derive from it, and
    override methods; each says which.
    """

    protocols: dict[str, Protocol]  # --recipe -> its numbers
    variants: dict  # --variant -> Config
    load: Callable  # (weights, variant, settings, Config overrides, train set) -> model
    recipe: Callable  # (model, settings) -> Recipe
    backbone: Callable  # parameters, by name, that `--train decoder` leaves as they are
    sides: tuple[int, int] = (1, 1)  # least side of an image, and what sides are multiples of
    keeps: bool = False  # has encode_image: what it gives can be kept
    lora: dict = field(default_factory=dict)  # how add_lora updates it, if not all linear layers
    second_file: str | None = None  # the option (clip, decoder) that names a second file of weights

    takes: ClassVar[str] = "images"  # or "volumes": what data sets, and the inputs of predict.py
    options: ClassVar[tuple] = (IMAGE_OPTIONS,)  # groups of options that it takes, of REFUSED
    compiles: ClassVar[bool] = True  # its forward pass, not a part of it, is what trains
    variant_with_weights: ClassVar[bool] = False  # a variant says what is added to the weights

    # --- the command line ---

    def check_given(self, given: dict, model: str, refused: dict = REFUSED) -> None:
        """Raise ValueError, one line, if options are given that are for other models.

        given: {name of an option: value}. model: what the line calls the model. refused: {group of
        options: line}.
        """
        for group, refusal in refused.items():
            used = [key for key in group if self.is_given(key, given.get(key))]
            if used and group not in self.options:
                flag = "--" + used[0].replace("_", "-")
                raise ValueError(refusal.format(flag=flag, model=model))

    def is_given(self, option: str, value) -> bool:
        """Return True unless the value of an option is what it is where nobody gave it."""
        default = getattr(next(iter(self.protocols.values())), option, None)
        return value is not None and value is not False and value != [] and value != default

    def check_options(self, options) -> None:
        """Raise ValueError, one line, for values of options that this model does not take."""
        if not options.size:
            return
        if len(options.size) > 1:
            sides = " ".join(map(str, options.size))
            raise ValueError(f"--size {sides}: one number, of volumes three")
        (side,) = options.size
        least, step = self.sides
        if side < least or side % step:
            sides = f"of {least} pixels or more"
            if step > 1:
                sides = f"that are multiples of {step}, {least} or more"
            raise ValueError(f"--size {side}: {options.model} takes sides {sides}")

    # --- data and model ---

    def config_of(self, settings: Settings) -> dict:
        """Return the fields of Config that the command line sets, of the input's size and kind."""
        return {"image_size": settings.size[0]} if settings.size else {}

    def open_volumes(self, entries: list, run: dict):
        """Return the data set of entries with volumes. run: an earlier run's config.json, or {}."""
        if run.get("config", {}).get("overlapping"):
            entries = [layouts.as_overlapping(entry, run["classes"]) for entry in entries]
        return volumes.VolumeSet(entries)

    def check_classes(self, model: nn.Module, datasets: list, settings: Settings) -> None:
        """Raise ValueError, one line, if a data set has other classes than the model."""
        runs.check_classes(model, datasets, settings)

    def make_ready(
        self, model: nn.Module, recipe: Recipe, data_sets: DataSets, settings: Settings
    ) -> Recipe:
        """Do what is left between opening the data sets and training or testing on them.

        Changes `data_sets` where some are replaced. Returns the recipe, or one in its place. Raises
        ValueError, one line, if something about the data cannot be used.
        """
        return recipe

    def load_model(self, weights, variant, settings: Protocol, overrides: dict, train_set=None):
        """Return the model of `weights`, which may be a run that was stopped early."""
        return loading.load_model(self, weights, variant, settings, overrides, train_set)

    # --- predictions of images ---

    def reads_text(self) -> bool:
        """Return True if every image of a prediction needs a text."""
        return False

    def ask_in_prediction(self, recipe: Recipe, cases: list, classes: list | None, args) -> tuple:
        """Return what asks for the masks of a prediction, and the classes that these are of.

        cases: (name, image file, text) of each. classes: those of the run, None if none is known.
        The first is a function, sample -> tensors that an item gets besides those of `inputs`.
        """
        return nothing, classes

    # --- predictions of volumes ---

    def numbers_asked(self, model: nn.Module, classes: list[str], names: list[str] | None):
        """Return which classes predict.py asks for, from 0 without the background; None: all.

        classes: the model's. names: of --classes. Raises ValueError, one line, for a model that
        finds all classes at once, or that does not know one of them.
        """
        if names is not None:
            raise ValueError("--classes: this model finds all of its classes at once; drop it")
