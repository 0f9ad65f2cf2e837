"""The command line of train.py: all options, and how they become the settings of a run."""

import argparse
import hashlib
import os
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

from engine import command_line
from engine.command_line import flag
from engine.ranges import Choice, Flag, Number, Text, Values
from engine.runs import patients_of, read_run, refuse_exports
from imaging.augment import VIEWS
from imaging.boxes_and_points import SOURCES
from imaging.image_files import ORIENTATIONS, colour_table
from imaging.layouts import is_prompt_type, path_and_split, prompt_option
from recipes import FAMILIES, second_file
from recipes.base import Protocol, Settings
from recipes.sam import TOPOLOGY
from universal import CODES

# --- all options ---------------------------------------------------------------------------------

# The groups of --help, in this order; within a group, options are listed as in Options.
GROUPS = (
    "common",
    "data",
    "model",
    "training",
    "prompts",
    "volumes",
    "evaluation",
    "run",
)
LIMITS = ("at_least", "above", "at_most", "below", "word", "note")


def option(group: str, default, help: str, unset: str = "", **details):
    """Return a field of Options with what --help and argparse need.

    group: one of GROUPS. unset: what --help shows as the default of an option that is None.
    details: LIMITS of a number (see ranges.Number), and arguments of argparse.
    """
    limits = {}
    for key in LIMITS:
        if key in details:
            limits[key] = details.pop(key)
    if isinstance(default, list):
        details.setdefault("nargs", "+")

    metadata = {"group": group, "help": help, "unset": unset}
    metadata |= {"limits": limits, "argparse": details}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


SCHEDULES = ["cosine", "poly", "constant", "multistep", "plateau"]
DTYPES = ["float32", "bfloat16", "float16"]
TRAINED = ["all", "decoder", "adapters", "lora"]
SCORE_SIZES = ["image", "network"]


@dataclass
class Options:
    """The command line. None stands for the recipe's value, or for off if recipes have none."""

    # The options that most people need.
    model: str = option("common", "cris", ", ".join(sorted(FAMILIES)), choices=sorted(FAMILIES))
    data: list[str] = option(
        "common",
        [],
        "data sets to train and validate on, DIR or DIR:SPLIT; several are pooled",
        metavar="DIR",
    )
    weights: str | None = option(
        "common",
        None,
        "weights to start from: hub id, file, run folder, or none",
        unset="recipe",
        metavar="SOURCE",
    )
    out: str | None = option(
        "common",
        None,
        "folder of the run",
        unset="runs/MODEL-DATA-OPTIONS",
        metavar="DIR",
    )
    epochs: int | None = option(
        "common", None, "passes over the training set; 0: only test, like --eval", at_least=0
    )
    batch_size: int | None = option(
        "common", None, "images or volumes in a training batch", at_least=1
    )
    lr: float | None = option("common", None, "learning rate of the new layers", above=0)
    size: list[int] | None = option(
        "common",
        None,
        "side of the input in pixels; volumes: 1 or 3 sides in voxels",
        unset="weights",
        nargs="+",
        at_least=1,
    )
    prompt: str | None = option(
        "common", None, 'text prompt: p6, or p6,p3, or random, or "a text"', metavar="TYPE"
    )
    resume: bool = option("common", False, "continue the run in --out where it stopped")

    fold: str | None = option(
        "data", None, "k/n: validate on fold k (from 0) of n of train and val", metavar="K/N"
    )
    group_regex: str | None = option(
        "data", None, "regular expression for the patient in an image's name", metavar="REGEX"
    )
    overfit: int | None = option(
        "data", None, "train, validate and test on the first N cases alone", at_least=1
    )
    mask_threshold: int | None = option(
        "data",
        None,
        "binary masks: foreground is above this value, 0 to 255",
        unset="by counting",
        at_least=0,
        at_most=255,
    )
    mask_orientation: str | None = option(
        "data",
        None,
        "how masks of EXIF-rotated images lie: stored, upright",
        choices=ORIENTATIONS,
        unset="by size",
    )
    pseudocolor: str | None = option(
        "data", None, "matplotlib colour map for grey images, such as bone", metavar="MAP"
    )
    views: list[str] | None = option(
        "data",
        None,
        f"the only augmentation: {' '.join(VIEWS)}",
        nargs="+",
        choices=VIEWS,
        metavar="VIEW",
    )

    variant: str | None = option(
        "model", None, "model size, a key of VARIANTS in the model's file", unset="the first"
    )
    recipe: str | None = option(
        "model", None, "default, or a published protocol such as origin", unset="default"
    )
    train: str | None = option(
        "model", None, f"parts that are trained: {', '.join(TRAINED)}", choices=TRAINED
    )
    lora_rank: int | None = option("model", None, "LoRA rank (with --train lora)", at_least=1)
    adapter_dim: int | None = option(
        "model", None, "width of the adapters (with --train adapters)", at_least=1
    )
    keep_features: bool | None = option(
        "model",
        None,
        "cache a frozen encoder's features; --no-keep-features: off",
        unset="if frozen",
    )
    feature_dtype: str | None = option(
        "model", None, "precision of cached features: float16, float32",
        choices=["float16", "float32"],
    )  # fmt: skip
    clip: str | None = option(
        "model", None, "CLIP ViT-B/16 for CLIPSeg's --weights rd64-uni-refined.pth", metavar="FILE"
    )
    decoder: str | None = option(
        "model",
        None,
        "CLIPSeg that biomedclipseg takes its decoder from",
        unset="recipe",
        metavar="SOURCE",
    )

    backbone_lr: float | None = option(
        "training", None, "learning rate of the pretrained layers", at_least=0
    )
    weight_decay: float | None = option(
        "training", None, "weight decay of the optimizer", at_least=0
    )
    schedule: str | None = option(
        "training", None, f"rate schedule: {', '.join(SCHEDULES)}", choices=SCHEDULES
    )
    warmup: float | None = option(
        "training", None, "share of all steps in which the rate rises from 0", at_least=0, at_most=1
    )
    clip_grad: float | None = option(
        "training", None, "largest gradient norm; 0: no clipping", at_least=0
    )
    grad_accum_steps: int = option(
        "training", 1, "batches whose gradients are averaged for one step", at_least=1
    )
    max_steps: int | None = option("training", None, "stop after N optimizer steps", at_least=1)
    eval_every: int | None = option("training", None, "epochs between validations", at_least=1)
    patience: int | None = option(
        "training", None, "stop after N epochs without a better Dice; 0: never", at_least=0
    )
    ema: float | None = option(
        "training",
        None,
        "decay of the averaged weights that are validated; 0: off",
        unset="0",
        at_least=0,
        below=1,
    )
    topology: str | None = option(
        "training", None, f"SAM: topological loss term: {', '.join(TOPOLOGY)}", choices=TOPOLOGY
    )
    topology_weight: float | None = option(
        "training", None, "SAM: factor of the topological loss", at_least=0
    )

    negatives: float | None = option(
        "prompts",
        None,
        "share of images with another image's text and an empty mask",
        at_least=0,
        at_most=1,
    )
    prompt_study: bool = option("prompts", False, "test every text prompt type, in one table")
    sam_prompts: str | None = option(
        "prompts",
        None,
        f"SAM: prompts from the ground truth: {', '.join(SOURCES)}",
        choices=SOURCES,
    )
    jitter: int | None = option(
        "prompts", None, "SAM: largest shift of a box's sides in training, in pixels", at_least=0
    )
    min_area: int | None = option(
        "prompts", None, "SAM: smallest component that gets a prompt, in pixels", at_least=1
    )
    prompts_per_image: int | None = option(
        "prompts", None, "SAM: random prompts per image in a training step; 0: all", at_least=0
    )
    boxes: str | None = option(
        "prompts", None, "SAM: CSV or JSON file of boxes for an additional test", metavar="FILE"
    )
    points: str | None = option(
        "prompts", None, "SAM: CSV or JSON file of points for an additional test", metavar="FILE"
    )

    spacing: list[float] | None = option(
        "volumes", None, "voxel size in mm that volumes are resampled to", unset="weights",
        nargs=3, above=0,
    )  # fmt: skip
    intensity: list[str] | None = option(
        "volumes",
        None,
        "the two HU that become 0 and 1, or zscore (all but CT)",
        unset="weights",
        nargs="+",
        metavar="V",
    )
    crops_per_volume: int | None = option(
        "volumes", None, "random windows per volume in a training step", at_least=1
    )
    crop_ratio: list[float] | None = option(
        "volumes",
        None,
        "share of crops on background and foreground, or on each class",
        nargs="+",
        at_least=0,
    )
    overlap: float | None = option(
        "volumes",
        None,
        "overlap of neighbouring windows in predictions, as a share",
        at_least=0,
        below=1,
    )
    window_batch: int | None = option(
        "volumes", None, "windows that are predicted at once in validation and tests", at_least=1
    )
    checkpointing: bool = option(
        "volumes", False, "recompute activations: less memory, slower training"
    )
    codes: str | None = option(
        "volumes", None, f"universal: embeddings of classes: {', '.join(CODES)}", choices=CODES
    )
    text_codes: str | None = option(
        "volumes", None, "file of text embeddings from `prepare.py text-codes`", metavar="FILE"
    )

    test: list[str] = option(
        "evaluation",
        [],
        "data sets to test on, DIR or DIR:SPLIT",
        unset="tests in --data",
        metavar="DIR",
    )
    eval: bool = option("evaluation", False, "test --weights without training")
    threshold: float | str | None = option(
        "evaluation",
        None,
        "foreground is above this probability; auto: validation's best",
        unset="weights",
        above=0,
        below=1,
        word="auto",
    )
    score_size: str = option(
        "evaluation", "image", "size at which masks are scored: image, network", choices=SCORE_SIZES
    )
    val_distances: bool = option("evaluation", False, "also HD95, ASSD and NSD in validations")
    nsd_tolerance: float | None = option(
        "evaluation",
        None,
        "NSD: tolerated distance in mm (volumes) or pixels",
        unset="1",
        above=0,
        note="(mm of volumes, pixels of images)",
    )
    pixel_size: list[float] | None = option(
        "evaluation",
        None,
        "width and height of an image's pixel in mm, to measure masks",
        unset="of spacing.csv, if any",
        nargs=2,
        metavar=("X", "Y"),
        above=0,
    )
    overlays: int = option(
        "evaluation", 3, "worst, median and best cases to draw, N of each", at_least=0
    )

    device: str = option("run", "auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = option("run", 2, "processes that load data", at_least=0, at_most=256)
    dtype: str | None = option(
        "run", None, f"precision of training on a GPU: {', '.join(DTYPES)}", choices=DTYPES
    )
    compile: bool = option("run", False, "use torch.compile")
    seed: int = option(
        "run",
        0,
        "seed of new weights, order and augmentation",
        at_least=0,
        at_most=2**63 - 1,
    )
    deterministic: bool = option("run", False, "deterministic operations only, slower on a GPU")
    cache: str = option("run", ".cache", "folder of decoded images and features", metavar="DIR")
    save_every: float = option(
        "run", 10.0, "minutes between saved states in an epoch; 0: each step", at_least=0
    )


# --- reading the command line --------------------------------------------------------------------


def values_of(spec) -> Values:
    """Return the values that an option takes. spec: its field of Options."""
    choices = spec.metadata["argparse"].get("choices")
    if choices:
        return Choice(tuple(choices))

    kind = spec.type
    while get_args(kind):  # the first type of `int | None` and of `list[str] | None`
        kind = get_args(kind)[0]
    if kind is bool:
        return Flag()
    if kind is str:
        return Text()
    return Number(whole=kind is int, **spec.metadata["limits"])


RECIPE_FIELDS = {spec.name for spec in fields(Protocol)}


def default_words(spec) -> str:
    """Return what --help shows as the default of an option, "" if it is simply off."""
    if spec.metadata["unset"]:
        return spec.metadata["unset"]
    if spec.name in RECIPE_FIELDS:
        return "recipe"
    is_off = spec.default is None or spec.default is False
    if is_off or spec.default is MISSING:  # MISSING: the default is an empty list
        return ""
    return f"{spec.default:g}" if isinstance(spec.default, float) else str(spec.default)


def help_line(spec) -> str:
    """Return the line of --help about an option, with its default."""
    default = default_words(spec)
    suffix = f" [{default}]" if default else ""
    return spec.metadata["help"] + suffix


def metavar(values: Values) -> str:
    """Return what stands for a value in --help."""
    if isinstance(values, Number):
        return "N" if values.whole else "X"
    return "NAME"


def parse(description: str, arguments: list[str] | None = None, usage: str | None = None) -> dict:
    """Return the options on the command line by name: only those that were typed."""
    parser = command_line.Parser(description, usage=usage, add_help=False)
    groups = {name: parser.add_argument_group(f"{name} options") for name in GROUPS}
    for spec in fields(Options):
        values = values_of(spec)
        if isinstance(values, Flag):
            details = {"action": argparse.BooleanOptionalAction}
        else:
            details = {"type": values, "metavar": metavar(values)}
        details |= spec.metadata["argparse"]
        groups[spec.metadata["group"]].add_argument(
            flag(spec.name), default=argparse.SUPPRESS, help=help_line(spec), **details
        )
    groups["run"].add_argument("-h", "--help", action="help", help="show this help and exit")

    typed = vars(parser.parse_args(arguments))
    if typed.get("prompt"):  # --resume compares it with the run's
        typed["prompt"] = prompt_option(typed["prompt"])
    return typed


def checked_value(spec, value):
    """Return the value of an option in the form that the command line gives it.

    spec: the option's field of Options. Raises ValueError, one line, if the option does not take
    the value.
    """
    if value is None and spec.default is None:
        return None
    values = values_of(spec)
    count = spec.metadata["argparse"].get("nargs")

    try:
        if count is None:
            return values.check(value)
        several = list(value) if isinstance(value, list | tuple) else [value]
        several = [values.check(item) for item in several]
    except ValueError as error:
        raise ValueError(f"{flag(spec.name)} {error}") from None
    if isinstance(count, int) and len(several) != count:
        raise ValueError(f"{flag(spec.name)}: takes {count} values, not {len(several)}")
    return several


def checked(options: Options) -> Options:
    """Return options with all values in the form that the command line gives them.

    An option that takes several values may hold a single one; it becomes a list. A recipe's own
    values are not checked: fewshot3d's origin has a warm-up longer than its training, and its runs
    hand that on when they are resumed. Raises ValueError, one line, if an option does not take its
    value.
    """
    specs = {spec.name: spec for spec in fields(Options)}
    model = checked_value(specs["model"], options.model)
    recipe = checked_value(specs["recipe"], options.recipe) or "default"
    protocol = FAMILIES[model].protocols.get(recipe)

    values = {}
    for name, spec in specs.items():
        value = getattr(options, name)
        is_recipes_own = name == "warmup" and value is not None
        is_recipes_own = is_recipes_own and value == getattr(protocol, name, None)
        values[name] = value if is_recipes_own else checked_value(spec, value)
    return Options(**values)


# --- from options to settings --------------------------------------------------------------------


def resolve(options: Options) -> Settings:
    """Return the settings of a run: options first, then the tested run, then the recipe.

    Raises ValueError, one line, for values that are wrong or do not go together.
    """
    options = checked(options)
    if options.prompt and not options.resume:  # a run's own prompt stays as it was trained
        options = replace(options, prompt=prompt_option(options.prompt))

    typed = options
    options = as_tested(options)
    family = FAMILIES[options.model]
    recipe = options.recipe or "default"
    check_together(options, family, recipe)
    if options.out is None:
        options = replace(options, out=run_folder(typed, options.model))

    protocol = protocol_of(options, family, recipe)
    if not options.resume:  # a resumed run repeats all of its options, used or not
        check_used(options, protocol, family)

    values = {name: getattr(protocol, name) for name in RECIPE_FIELDS}
    for name, value in vars(options).items():
        if name not in RECIPE_FIELDS:
            values[name] = value
    return Settings(**values)


def as_options(settings: Settings) -> dict:
    """Return settings as the options in config.json, with which a run is resumed."""
    options = {spec.name: getattr(settings, spec.name) for spec in fields(Options)}
    if settings.augment is not None:  # the views were not chosen, so a resumed run must not see any
        options["views"] = None
    return options


# The options that a test takes over from the run that it tests, unless they are typed.
KEPT_IN_TESTS = (
    "prompt", "pseudocolor", "sam_prompts", "min_area", "jitter", "overlap", "fold",
    "nsd_tolerance", "mask_orientation",
)  # fmt: skip


def as_tested(options: Options) -> Options:
    """Return the options of a test with those of the run in --weights; of a training as they are.

    Raises ValueError, one line, if this version has no such model.
    """
    if not options.eval and options.epochs != 0:
        return options
    options = replace(options, eval=True, epochs=0)
    run = read_run(options.weights)
    if not run:
        return options
    if run.get("model") not in FAMILIES:
        raise ValueError(f"{options.weights}: config.json names no model that this version has")

    trained_with = run.get("options", {})
    kept = {}
    for name in KEPT_IN_TESTS:
        if name == "nsd_tolerance" and options.prompt_study:  # which computes no distances
            continue
        if getattr(options, name) is None:
            kept[name] = trained_with.get(name)
    kept["seed"] = options.seed or trained_with.get("seed", 0)  # it also splits data sets
    if options.group_regex is None:
        kept["group_regex"] = patients_of(run, options.data + options.test)
    return replace(options, model=run["model"], **kept)


def protocol_of(options: Options, family, recipe: str) -> Protocol:
    """Return a recipe of a family, its values replaced by those on the command line."""
    protocol = family.protocols[recipe]
    replaced = {}
    for name, value in vars(options).items():
        if name in RECIPE_FIELDS and value is not None:
            replaced[name] = value
    if options.weights == "none" and options.backbone_lr is None:  # nothing is pretrained
        replaced["backbone_lr"] = replaced.get("lr", protocol.lr)
    return with_views(replace(protocol, **replaced), options, family)


def with_views(protocol: Protocol, options: Options, family) -> Protocol:
    """Return a protocol with its final `keep_features`, `views` and `augment`.

    Cached features allow no augmentation but the views that were cached. Raises ValueError, one
    line, if features are to be cached that cannot be, or if the views lack the image itself.
    """
    caches = protocol.keep_features
    can_cache = protocol.train == "decoder" and family.can_cache
    if caches is None:  # wherever no layer of the encoder is trained
        caches = can_cache and not options.eval
    if caches and not can_cache:
        raise ValueError(
            "--keep-features needs --train decoder and a model that encodes images apart; "
            "--no-keep-features"
        )

    if not caches and not options.views:
        return replace(protocol, keep_features=caches, views=("original",))
    if "original" not in protocol.views:
        raise ValueError("--views: original must be among them")
    return replace(protocol, keep_features=caches, augment=None)


# --- options that do not go together -------------------------------------------------------------


def check_together(options: Options, family, recipe: str) -> None:
    """Raise ValueError, one line, for options that do not go together."""
    model = options.model
    if recipe not in family.protocols:
        raise ValueError(f"--recipe {recipe}: {model} has {', '.join(family.protocols)}")
    if options.variant is not None and options.variant not in family.variants:
        names = ", ".join(family.variants)
        raise ValueError(f"--variant {options.variant}: {model} has {names}")

    has_weights = options.weights not in (None, "none")
    if has_weights:
        refuse_exports(options.weights)
    if options.variant is not None and has_weights and not family.variant_with_weights:
        raise ValueError("--variant: remove it; --weights say themselves what they are")
    second = second_file(model, options.clip, options.decoder)
    if second and options.weights == "none":
        name = next(iter(second))
        raise ValueError(f"--{name}: with --weights none nothing is loaded; remove it")
    if options.clip and options.weights is None:
        raise ValueError("--clip: the default weights have CLIP in them; remove it")

    needs_data = not options.test or not options.eval or options.threshold == "auto"
    if not options.data and needs_data:
        raise ValueError("--data is missing: which data set?")
    if options.overfit and (options.test or options.eval or options.fold):
        raise ValueError(
            "--overfit: trains and tests on --data alone; remove --test, --eval, --fold"
        )
    family.refuse_foreign(vars(options), model)
    family.check_options(options)
    if options.pseudocolor is not None:
        colour_table(options.pseudocolor)


def check_used(options: Options, settings: Protocol, family) -> None:
    """Raise ValueError, one line, for options that have no effect together with the others."""
    has_cache = settings.keep_features
    has_topology = settings.topology not in (None, "none")
    computes_no_distances = options.prompt_study and (options.eval or not options.val_distances)
    has_no_effect = {
        "compile": has_cache or not family.compiles,
        "feature_dtype": not has_cache,
        "topology_weight": not has_topology,
        "prompts_per_image": settings.sam_prompts == "image",
        "views": options.eval,
        "keep_features": options.eval,
        "checkpointing": options.eval,
        "crops_per_volume": options.eval,
        "crop_ratio": options.eval,
        "eval_every": options.eval,
        "lora_rank": settings.train != "lora",
        "adapter_dim": settings.train != "adapters",
        "warmup": settings.schedule == "plateau",
        "nsd_tolerance": computes_no_distances,
        "pixel_size": options.prompt_study or options.score_size == "network",
    }
    for name, is_idle in has_no_effect.items():
        if is_idle and getattr(options, name):
            raise ValueError(f"{flag(name)}: has no effect with these options; remove it")

    if options.eval and options.weights == "none":
        raise ValueError(
            "--weights none: untrained weights are not tested; name a run, a file or a hub id"
        )
    if settings.schedule == "multistep" and not settings.milestones:
        raise ValueError("--schedule multistep: this recipe has no milestones; choose another")
    if options.negatives and not is_prompt_type(settings.prompt):
        raise ValueError(
            "--negatives: needs a prompt type such as p6; a text that is the same for all images "
            "is absent in none"
        )


# Options that may differ between a run and its continuation without changing any number.
FREE = {
    "resume", "out", "workers", "device", "cache", "save_every", "overlays", "checkpointing",
    "pixel_size",
}  # fmt: skip


def check_same(folder: Path, old: dict, new: dict) -> None:
    """Raise ValueError, one line, if a folder was started with other options than the new ones."""
    changes = []
    for name in old | new:
        if name not in FREE and old.get(name) != new.get(name):
            changes.append(f"{flag(name)} {old.get(name)} -> {new.get(name)}")
    if changes:
        raise ValueError(
            f"{folder} was started with different options ({', '.join(changes)}); use the same "
            "ones, or choose another --out"
        )


# --- the name of a run folder --------------------------------------------------------------------

# The options that a run folder is named after, in the order of their words. The model and the data
# sets come before them. The length of the training is not among them, since a resumed run may get
# more epochs, nor is how data sets are split.
NAMED = (
    "variant", "weights", "decoder", "prompt", "train", "lora_rank", "adapter_dim",
    "keep_features", "feature_dtype", "views", "mask_orientation", "mask_threshold", "pseudocolor",
    "sam_prompts", "jitter", "min_area", "prompts_per_image", "boxes", "points", "topology",
    "topology_weight", "crops_per_volume", "crop_ratio", "spacing", "intensity", "overlap",
    "window_batch", "codes", "text_codes", "overfit", "negatives", "prompt_study", "max_steps",
    "batch_size", "grad_accum_steps", "lr", "backbone_lr", "weight_decay", "schedule", "warmup",
    "eval_every", "clip_grad", "ema", "patience", "size", "threshold", "dtype", "compile", "seed",
    "deterministic", "fold", "score_size", "val_distances", "nsd_tolerance",
)  # fmt: skip
VALUE_ALONE = ("variant", "prompt", "train", "sam_prompts", "topology")  # the value says enough
PATH_WORDS = {  # options that are paths, and the word before the name of the file
    "weights": "from",
    "decoder": "decoder",
    "boxes": "boxes",
    "points": "points",
    "text_codes": "codes",
}


def run_folder(typed: Options, model: str) -> str:
    """Return the folder of a run without --out: runs/MODEL-DATA, then the other typed options.

    typed: the options before a tested run and the recipe complete them. Two command lines that
    differ in one of NAMED get two folders.
    """
    sets = [data_set_name(folder) for folder in typed.data or typed.test]
    words = [model, "+".join(sets)]
    if typed.recipe:
        words.append(typed.recipe)
    if typed.eval or typed.epochs == 0:
        words.append("eval")
    if typed.data and typed.test:
        words.append("test-" + "+".join(data_set_name(folder) for folder in typed.test))

    defaults = Options()
    for name in NAMED:
        value = getattr(typed, name)
        if value != getattr(defaults, name):
            words.append(option_word(name, value))

    folder = "-".join(words)
    return str(Path("runs") / shortened(folder, 120, folder))


def data_set_name(data_set: str) -> str:
    """Return the name of a data set; of PATH:SPLIT it includes the split."""
    path, split = path_and_split(data_set)
    name = Path(os.path.abspath(path)).name
    return name if split == "test" else f"{name}_{split}"


def option_word(name: str, value) -> str:
    """Return the part of a run folder's name that stands for an option."""
    if name in PATH_WORDS:
        return f"{PATH_WORDS[name]}-{path_name(value)}"
    if isinstance(value, bool):
        return name if value else f"no-{name}"

    values = value if isinstance(value, list) else [value]
    texts = [f"{item:g}" if isinstance(item, float) else str(item) for item in values]
    if name in VALUE_ALONE:
        return file_name("+".join(texts))
    if isinstance(values[0], str):
        return f"{name}-{file_name('+'.join(texts))}"
    return name + "x".join(texts)


def path_name(source: str) -> str:
    """Return the name of a file without its ending, of a folder or of a hub id.

    A file in a run folder has the name of the run.
    """
    path = Path(source)
    if path.is_file() and read_run(path):  # RUN/best.safetensors is the same as RUN
        path = path.parent
    name = Path(os.path.abspath(path)).name
    return file_name(re.sub(r"\.(pth|pt|bin|safetensors|csv|json)$", "", name))


def file_name(text: str) -> str:
    """Return at most 40 bytes of a text, with only characters that are safe in a file name."""
    safe = re.sub(r"[^\w.+-]+", "_", text)
    return shortened(safe.strip("_."), 40, text)


def shortened(name: str, longest: int, meaning: str) -> str:
    """Return a name; if it has more than `longest` bytes, its start and a hash of its meaning."""
    content = name.encode()
    if len(content) <= longest:
        return name
    start = content[: longest - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(meaning.encode()).hexdigest()[:8]}"
