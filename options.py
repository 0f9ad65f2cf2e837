"""The command line of train.py: every option, and what a run makes of those that are left out."""

import argparse
import hashlib
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

from engine import command_line
from engine.ranges import Choice, Flag, Number, Text, Values
from engine.runs import patients_of, read_run
from imaging.augment import VIEWS
from imaging.boxes_and_points import SOURCES
from imaging.image_files import ORIENTATIONS, colour_table
from imaging.layouts import is_prompt_type, path_and_split, prompt_option
from recipes import FAMILIES, second_file
from recipes.base import Protocol, Settings
from recipes.sam import TOPOLOGY
from universal import CODES

LIMITS = ("at_least", "above", "at_most", "below", "word", "note")


def option(default, help: str, **more):
    """A field of Options, with what argparse needs to know of it.

    more: LIMITS of a number (ranges.Number), and arguments of argparse.
    """
    limits = {key: more.pop(key) for key in LIMITS if key in more}
    metadata = {"help": help, "limits": limits, "argparse": more}
    if isinstance(default, list):
        more.setdefault("nargs", "+")
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The option of this name as it is written on the command line."""
    return "--" + name.replace("_", "-")


SCHEDULES = ["cosine", "poly", "constant", "multistep", "plateau"]
DTYPES = ["float32", "bfloat16", "float16"]
TRAINED = ["all", "decoder", "adapters", "lora"]
SCORE_SIZES = ["image", "network"]


@dataclass
class Options:
    """The command line. None: the recipe's value or, where a recipe has no such setting, off."""

    model: str = option("cris", "which model", choices=sorted(FAMILIES))
    variant: str | None = option(None, "which size of it, a key of the model's VARIANTS")
    weights: str | None = option(None, "hub id (id@revision), file, run folder; none: from scratch")
    clip: str | None = option(
        None, "CLIP ViT-B/16 beside the original release's --weights rd64-uni-refined.pth (clipseg)"
    )
    decoder: str | None = option(
        None, "CLIPSeg whose decoder biomedclipseg starts from; else the recipe's"
    )
    recipe: str | None = option(None, "default, or a published protocol: see recipes/")
    data: list[str] = option([], "data sets to train and validate on; several are pooled")
    test: list[str] = option([], "data sets to test on, PATH[:split]; else --data's test splits")
    prompt: str | None = option(None, 'prompt types (p6; p6,p3; random), or a literal "text"')
    train: str | None = option(None, "all, or some parts: see recipes/base.py", choices=TRAINED)
    lora_rank: int | None = option(
        None, "of the updates that --train lora puts on linear layers", at_least=1
    )
    adapter_dim: int | None = option(None, "width of the adapters of --train adapters", at_least=1)
    keep_features: bool | None = option(None, "of a frozen encoder, on files; on where one is")
    feature_dtype: str | None = option(None, "of these files", choices=["float16", "float32"])
    views: list[str] | None = option(
        None, "all the augmentation there is; kept features: made of each", nargs="+", choices=VIEWS
    )
    mask_orientation: str | None = option(
        None,
        "how masks without an EXIF tag lie where the size cannot tell: stored like the image, "
        "or upright",
        choices=ORIENTATIONS,
    )
    mask_threshold: int | None = option(
        None,
        "of binary masks: values above it, 0 to 255, are foreground; else decided by their values",
        at_least=0,
        at_most=255,
    )
    pseudocolor: str | None = option(None, "a colour map of matplotlib for grey images: bone, jet")
    sam_prompts: str | None = option(None, "what SAM is asked by, of the truth", choices=SOURCES)
    jitter: int | None = option(
        None, "pixels by which a side of a box moves at most in training", at_least=0
    )
    min_area: int | None = option(None, "pixels that a component needs to be asked for", at_least=1)
    prompts_per_image: int | None = option(
        None, "in a training step, by lot; 0: all there are", at_least=0
    )
    boxes: str | None = option(None, "CSV or JSON of boxes to test SAM with, beside the truth's")
    points: str | None = option(None, "CSV or JSON of points to test SAM with, or with --boxes")
    topology: str | None = option(None, "a loss beside the others: see losses.py", choices=TOPOLOGY)
    topology_weight: float | None = option(None, "its factor", at_least=0)
    crops_per_volume: int | None = option(
        None, "random windows of a volume in a training step", at_least=1
    )
    crop_ratio: list[float] | None = option(
        None,
        "of crops around background and foreground, or around each class",
        nargs="+",
        at_least=0,
    )
    spacing: list[float] | None = option(
        None, "mm of a volume's voxels for the model", nargs=3, above=0
    )
    intensity: list[str] | None = option(
        None, "of volumes: the two HU that become 0 and 1; zscore", nargs="+"
    )
    overlap: float | None = option(
        None, "of neighbouring windows of a volume, as a share", at_least=0, below=1
    )
    window_batch: int | None = option(
        None, "windows of a volume at a time, in evaluation", at_least=1
    )
    checkpointing: bool = option(False, "less memory, more time in training on volumes")
    codes: str | None = option(None, "what stands for a class: see universal.py", choices=CODES)
    text_codes: str | None = option(None, "file of them, which `prepare.py text-codes` writes")
    overfit: int | None = option(
        None, "train, validate and test on the first so many cases", at_least=1
    )
    negatives: float | None = option(
        None, "share of samples that ask for another image's target", at_least=0, at_most=1
    )
    prompt_study: bool = option(False, "test every prompt type, in one table")
    out: str | None = option(
        None, "run folder; else runs/MODEL-DATA, followed by other options that were given"
    )
    resume: bool = option(False, "go on where the run in --out stopped")
    eval: bool = option(False, "no training: test --weights")
    epochs: int | None = option(None, "0 is the same as --eval", at_least=0)
    max_steps: int | None = option(None, "stop after so many optimiser steps", at_least=1)
    batch_size: int | None = option(None, "images a step", at_least=1)
    grad_accum_steps: int = option(1, "batches whose gradients make one step", at_least=1)
    lr: float | None = option(None, "learning rate of the new parts", above=0)
    backbone_lr: float | None = option(
        None, "of the pretrained ones; with --weights none: --lr", at_least=0
    )
    weight_decay: float | None = option(None, "of the optimiser", at_least=0)
    schedule: str | None = option(None, "learning rate over time", choices=SCHEDULES)
    warmup: float | None = option(
        None, "share of all steps in which the rate rises from 0", at_least=0, at_most=1
    )
    eval_every: int | None = option(None, "epochs between validations", at_least=1)
    clip_grad: float | None = option(None, "largest gradient norm; 0: not clipped", at_least=0)
    ema: float | None = option(
        None,
        "decay of an average of the weights, to be tested and kept; 0: none",
        at_least=0,
        below=1,
    )
    patience: int | None = option(
        None, "epochs without a better validation Dice before it stops; 0: never", at_least=0
    )
    size: list[int] | None = option(
        None, "side of the model's input in pixels; of volumes one or three", nargs="+", at_least=1
    )
    threshold: float | str | None = option(
        None,
        "probability above which a pixel is foreground; auto: each validation finds the best, and "
        "its Dice chooses the epoch",
        above=0,
        below=1,
        word="auto",
    )
    dtype: str | None = option(None, "of training on a GPU; all else is float32", choices=DTYPES)
    compile: bool = option(False, "torch.compile")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    workers: int = option(2, "data-loading processes", at_least=0)
    seed: int = option(
        0, "of the order, the augmentation, and new weights", at_least=0, at_most=2**63 - 1
    )
    deterministic: bool = option(False, "only deterministic operations, slower on a GPU")
    cache: str = option(".cache", "folder of the decoded images")
    fold: str | None = option(None, "k/n: validate on fold k (from 0) of n of train and val")
    group_regex: str | None = option(None, "what in an image's name names the patient")
    score_size: str = option("image", "score at its own or the network's size", choices=SCORE_SIZES)
    val_distances: bool = option(False, "HD95, ASSD and NSD also in validation, not only in tests")
    nsd_tolerance: float | None = option(
        None,
        "distance within which NSD counts a boundary as hit: mm (volumes) or pixels; else 1",
        above=0,
        note="(mm of volumes, pixels of images)",
    )
    overlays: int = option(3, "how many of the worst, median and best cases to draw", at_least=0)
    save_every: float = option(
        10.0, "minutes between saved states within an epoch; 0: after every step", at_least=0
    )


# What may differ between a run and its resumption without changing its numbers.
FREE = {"resume", "out", "workers", "device", "cache", "save_every", "overlays", "checkpointing"}


def check_same(place: Path, theirs: dict, mine: dict) -> None:
    """ValueError, one line, if what a folder was begun with is not what it is to go on with."""
    keys = [k for k in theirs | mine if k not in FREE and theirs.get(k) != mine.get(k)]
    if keys:
        words = [f"{flag(key)} {theirs.get(key)} -> {mine.get(key)}" for key in keys]
        hint = "keep those, or choose another --out"
        raise ValueError(f"{place} was begun with other options ({', '.join(words)}); {hint}")


def values_of(spec) -> Values:
    """Return the values that an option takes. spec: its field of Options."""
    choices = spec.metadata["argparse"].get("choices")
    if choices:
        return Choice(tuple(choices))
    kind = spec.type
    while get_args(kind):  # of `int | None`, `list[str] | None` the first
        kind = get_args(kind)[0]
    if kind is bool:
        return Flag()
    if kind is str:
        return Text()
    return Number(whole=kind is int, **spec.metadata["limits"])


def parse(description: str, arguments: list[str] | None = None) -> dict:
    """The options that were given, by name."""
    parser = command_line.Parser(description)
    for spec in fields(Options):
        values = values_of(spec)
        how = {"type": values}
        if isinstance(values, Flag):
            how = {"action": argparse.BooleanOptionalAction}
        how |= {"help": spec.metadata["help"], **spec.metadata["argparse"]}
        parser.add_argument(flag(spec.name), default=argparse.SUPPRESS, **how)
    given = vars(parser.parse_args(arguments))
    if given.get("prompt"):  # here too: --resume compares it with the run's
        given["prompt"] = prompt_option(given["prompt"])
    return given


def checked_value(spec, given):
    """Return the value of an option as the command line gives it. spec: its field of Options.

    Raises ValueError, one line, if the option does not take what is given.
    """
    if given is None and spec.default is None:
        return None
    values = values_of(spec)
    count = spec.metadata["argparse"].get("nargs")
    several = list(given) if isinstance(given, list | tuple) else [given]
    try:
        if count is None:
            return values.check(given)
        several = [values.check(one) for one in several]
    except ValueError as error:
        raise ValueError(f"{flag(spec.name)} {error}") from None
    if isinstance(count, int) and len(several) != count:
        raise ValueError(f"{flag(spec.name)}: takes {count} values, not {len(several)}")
    return several


def checked(options: Options) -> Options:
    """Return options with all values as the command line gives them.

    A single value of an option that takes several is a list of one. Raises ValueError, one line, if
    an option does not take its value. What a recipe itself sets is not checked: fewshot3d's origin
    has a warm-up that is longer than the training, which its runs hand on when they are resumed.
    """
    specs = {spec.name: spec for spec in fields(Options)}
    model = checked_value(specs["model"], options.model)
    recipe = checked_value(specs["recipe"], options.recipe) or "default"
    own = FAMILIES[model].protocols.get(recipe)
    values = {}
    for name, spec in specs.items():
        given = getattr(options, name)
        is_own = name == "warmup" and given is not None and given == getattr(own, name, None)
        values[name] = given if is_own else checked_value(spec, given)
    return Options(**values)


def with_views(protocol: Protocol, options: Options, family) -> Protocol:
    """Return a protocol with what `keep_features`, `views` and `augment` then are.

    Raises ValueError, one line, if features are to be kept that cannot be.
    """
    keeps = protocol.keep_features
    can = protocol.train == "decoder" and family.keeps
    if keeps is None:  # wherever nothing of the encoder learns
        keeps = can and not options.eval
    if keeps and not can:
        message = "needs --train decoder and a model that encodes images apart"
        raise ValueError(f"--keep-features {message}; --no-keep-features")
    if not keeps and not options.views:
        return replace(protocol, keep_features=keeps, views=("original",))
    if "original" not in protocol.views:
        raise ValueError("--views: original must be among them")
    return replace(protocol, keep_features=keeps, augment=None)


def as_tested(options: Options) -> Options:
    """Without training: what --weights, if they are a run folder, say of themselves."""
    if not options.eval and options.epochs != 0:
        return options
    options, tested = replace(options, eval=True, epochs=0), read_run(options.weights)
    if not tested:
        return options
    if tested.get("model") not in FAMILIES:
        raise ValueError(f"{options.weights}: config.json names no model that this version has")
    keys = ("prompt", "pseudocolor", "sam_prompts", "min_area", "jitter", "overlap", "fold")
    if not options.prompt_study:  # which computes no distances
        keys += ("nsd_tolerance",)
    keys = (*keys, "mask_orientation")
    known = tested.get("options", {})
    same = {k: known.get(k) for k in keys if getattr(options, k) is None}
    same["seed"] = options.seed or known.get("seed", 0)  # which also divides data sets
    if options.group_regex is None:
        same["group_regex"] = patients_of(tested, options.data + options.test)
    return replace(options, model=tested["model"], **same)


def check_together(options: Options, family, name: str) -> None:
    """Raise ValueError, one line, for options that do not go together. name: of the recipe."""
    model = options.model
    if name not in family.protocols:
        raise ValueError(f"--recipe {name}: {model} has {', '.join(family.protocols)}")
    if options.variant is not None and options.variant not in family.variants:
        have = ", ".join(family.variants)
        raise ValueError(f"--variant {options.variant}: {model} has {have}")
    has_weights = options.weights not in (None, "none")
    if options.variant is not None and has_weights and not family.variant_with_weights:
        raise ValueError("--variant: leave it out, --weights say themselves what they are")
    second = second_file(model, options.clip, options.decoder)
    if second and options.weights == "none":
        raise ValueError(f"--{[*second][0]}: with --weights none nothing is loaded; remove it")
    if options.clip and options.weights is None:
        raise ValueError("--clip: the default weights have CLIP in them; remove it")
    if not options.data and (not options.test or not options.eval or options.threshold == "auto"):
        raise ValueError("--data is missing: which data set?")
    if options.overfit and (options.test or options.eval or options.fold):
        raise ValueError("--overfit: trains and tests on --data alone; drop --test, --eval, --fold")
    family.check_given(vars(options), model)
    family.check_options(options)
    if options.pseudocolor is not None:
        colour_table(options.pseudocolor)


def check_used(options: Options, settings: Protocol, family) -> None:
    """Raise ValueError, one line, for options that have no effect beside the others."""
    keeps = settings.keep_features
    topology = settings.topology not in (None, "none")
    idle = {
        "compile": keeps or not family.compiles,
        "feature_dtype": not keeps,
        "topology_weight": not topology,
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
        "nsd_tolerance": options.prompt_study and (options.eval or not options.val_distances),
    }
    for key, nothing in idle.items():
        if nothing and getattr(options, key):
            raise ValueError(f"{flag(key)}: does nothing here, drop it")
    if options.eval and options.weights == "none":
        raise ValueError("--weights none: nothing was trained; give those of a run or a file")
    if settings.schedule == "multistep" and not settings.milestones:
        raise ValueError("--schedule multistep: this recipe has no milestones; take another")
    if options.negatives and not is_prompt_type(settings.prompt):
        raise ValueError("--negatives: of prompt types; a text for all images is absent in none")


# What the name of a run folder leaves out: what it has elsewhere, what says how long to train (a
# resumed run may be given more epochs), and how a data set is divided.
UNNAMED = FREE | {"model", "data", "test", "recipe", "eval", "epochs", "group_regex", "clip"}
ALONE = ("variant", "prompt", "train", "sam_prompts", "topology")  # the value says enough
PATHS = {"weights": "from", "decoder": "decoder", "boxes": "boxes", "points": "points"}
PATHS["text_codes"] = "codes"


def shortened(name: str, longest: int, meaning: str) -> str:
    """Return a name, of one with more bytes than `longest` the start and a hash of its meaning."""
    content = name.encode()
    if len(content) <= longest:
        return name
    start = content[: longest - 9].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(meaning.encode()).hexdigest()[:8]}"


def file_name(text: str) -> str:
    """Return a text of at most 40 bytes with only characters that are safe in a file name."""
    safe = re.sub(r"[^\w.+-]+", "_", text)
    return shortened(safe.strip("_."), 40, text)


def path_name(place: str) -> str:
    """Return the name of a file without its ending, of a folder or hub id.

    A file of a run folder has the name of the run.
    """
    path = Path(place)
    if path.is_file() and read_run(path):  # RUN/best.safetensors is the same as RUN
        path = path.parent
    name = Path(os.path.abspath(path)).name
    return file_name(re.sub(r"\.(pth|pt|bin|safetensors|csv|json)$", "", name))


def option_word(key: str, value) -> str:
    """Return what the name of a run folder says of an option that was given."""
    if key in PATHS:
        return f"{PATHS[key]}-{path_name(value)}"
    if isinstance(value, bool):
        return key if value else f"no-{key}"

    values = value if isinstance(value, list) else [value]
    texts = [f"{one:g}" if isinstance(one, float) else str(one) for one in values]
    if key in ALONE:
        return file_name("+".join(texts))
    if isinstance(values[0], str):
        return f"{key}-{file_name('+'.join(texts))}"
    return key + "x".join(texts)


def named_set(place: str) -> str:
    """Return the name of a data set, of PATH:SPLIT with the split."""
    path, split = path_and_split(place)
    name = Path(os.path.abspath(path)).name
    return name if split == "test" else f"{name}_{split}"


def run_folder(given: Options, model: str) -> str:
    """Return the run folder of options without --out: runs/MODEL-DATA, and what else was given.

    given: the options before a tested run and the recipe fill them. Two calls that differ in more
    than UNNAMED get two folders.
    """
    sets = [named_set(place) for place in given.data or given.test]
    words = [model, "+".join(sets)]
    words += [given.recipe] if given.recipe else []
    words += ["eval"] if given.eval or given.epochs == 0 else []
    if given.data and given.test:
        words.append("test-" + "+".join(named_set(place) for place in given.test))

    plain = Options()
    for spec in fields(Options):
        key = spec.name
        value = getattr(given, key)
        if key not in UNNAMED and value != getattr(plain, key):
            words.append(option_word(key, value))

    name = "-".join(words)
    return str(Path("runs") / shortened(name, 120, name))


def resolve(options: Options) -> Settings:
    """Return all that a run goes by: the options, the tested run, and the recipe for the rest.

    Raises ValueError, one line, for options that make no sense, or not together.
    """
    options = checked(options)
    if options.prompt and not options.resume:  # a run's own prompt stays as it was trained
        options = replace(options, prompt=prompt_option(options.prompt))
    typed = options
    options = as_tested(options)
    family = FAMILIES[options.model]
    name = options.recipe or "default"
    check_together(options, family, name)
    if options.out is None:
        options = replace(options, out=run_folder(typed, options.model))

    protocol = protocol_of(options, family, name)
    if not options.resume:  # which brings all options of the run, used or not
        check_used(options, protocol, family)
    numbers = {spec.name: getattr(protocol, spec.name) for spec in fields(Protocol)}
    of_the_run = {key: value for key, value in vars(options).items() if key not in numbers}
    return Settings(**numbers, **of_the_run)


def protocol_of(options: Options, family, name: str) -> Protocol:
    """Return a recipe of a family, with the values that the command line gives in its place."""
    protocol = family.protocols[name]
    numbers = {spec.name for spec in fields(Protocol)} & {spec.name for spec in fields(Options)}
    given = {key: getattr(options, key) for key in numbers if getattr(options, key) is not None}
    if options.weights == "none" and options.backbone_lr is None:  # nothing is pretrained
        given["backbone_lr"] = given.get("lr", protocol.lr)
    return with_views(replace(protocol, **given), options, family)


def as_options(settings: Settings) -> dict:
    """Return settings as the options of config.json, with which a run is resumed."""
    options = {spec.name: getattr(settings, spec.name) for spec in fields(Options)}
    if settings.augment is not None:  # the views then are no choice, which a resumed run would see
        options["views"] = None
    return options
