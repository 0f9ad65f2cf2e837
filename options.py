"""The command line of train.py: every option, and what a run makes of those that are left out."""

import argparse
import hashlib
import math
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import get_args

from engine import command_line
from engine.ranges import Choice, Flag, Number, Text, Values
from engine.runs import patients_of, run_config
from imaging.augment import VIEWS
from imaging.boxes_and_points import KINDS
from imaging.image_files import ORIENTATIONS, colour_table
from imaging.layouts import is_prompt_type, path_and_split, prompt_option
from recipes import FAMILIES, second_file
from recipes.base import Settings
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
SIZES = ["image", "network"]


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
    sam_prompts: str | None = option(None, "what SAM is asked by, of the truth", choices=KINDS)
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
    codes: str | None = option(None, "what stands for a class: see swin_unetr3d.py", choices=CODES)
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
    score_size: str = option("image", "score at its own or the network's size", choices=SIZES)
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

    @property
    def tolerance(self) -> float:
        """NSD tolerance in mm (volumes) or pixels (images); 1 unless --nsd-tolerance sets it."""
        return 1.0 if self.nsd_tolerance is None else self.nsd_tolerance

    @property
    def window(self) -> tuple[float, float] | None:
        """--intensity; None are z-scores. ValueError, one line, if it is neither."""
        if self.intensity == ["zscore"]:
            return None
        try:
            low, high = map(float, self.intensity)
        except ValueError:
            low = high = 0
        if not low < high:  # or one is nan
            told = " ".join(self.intensity)
            raise ValueError(f"--intensity {told}: two HU, the lower first, or zscore")
        return low, high


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
    own = FAMILIES[model].settings.get(recipe)
    values = {}
    for name, spec in specs.items():
        given = getattr(options, name)
        is_own = name == "warmup" and given is not None and given == getattr(own, name, None)
        values[name] = given if is_own else checked_value(spec, given)
    return Options(**values)


def with_views(settings: Settings, options: Options, family) -> Settings:
    """Whether features are kept, and what augmentation there then is. ValueError: none to be had"""
    keeps, can = settings.keep_features, settings.train == "decoder" and family.keeps
    if keeps is None:  # wherever nothing of the encoder learns
        keeps = can and not options.eval
    if keeps and not can:
        message = "needs --train decoder and a model that encodes images apart"
        raise ValueError(f"--keep-features {message}; --no-keep-features")
    if not keeps and not options.views:
        return replace(settings, keep_features=keeps, views=("original",))
    if "original" not in settings.views:
        raise ValueError("--views: original must be among them")
    return replace(settings, keep_features=keeps, augment=None)


def as_tested(options: Options) -> Options:
    """Without training: what --weights, if they are a run folder, say of themselves."""
    if not options.eval and options.epochs != 0:
        return options
    options, tested = replace(options, eval=True, epochs=0), run_config(options.weights)
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


FOR_VOLUMES = (
    "crops_per_volume", "crop_ratio", "spacing", "intensity", "overlap", "window_batch",
    "checkpointing",
)  # fmt: skip
FOR_SAM = ("sam_prompts", "jitter", "min_area", "prompts_per_image", "boxes", "points", "topology")


def check(options: Options, family, name: str) -> None:
    """ValueError, one line: what does not go together."""
    if name not in family.settings:
        raise ValueError(f"--recipe {name}: {options.model} has {', '.join(family.settings)}")
    if options.variant is not None and options.variant not in family.variants:
        have = ", ".join(family.variants)
        raise ValueError(f"--variant {options.variant}: {options.model} has {have}")
    adds_to_weights = getattr(family, "variant_with_weights", False)
    if (
        options.variant is not None
        and options.weights not in (None, "none")
        and not adds_to_weights
    ):
        raise ValueError("--variant: leave it out, --weights say themselves what they are")
    second = second_file(options.model, options.clip, options.decoder)
    if second and options.weights == "none":
        raise ValueError(f"--{[*second][0]}: with --weights none nothing is loaded; remove it")
    if options.clip and options.weights is None:
        raise ValueError("--clip: the default weights have CLIP in them; remove it")
    if not family.reads and (options.prompt or options.negatives):
        raise ValueError(f"--prompt, --negatives: {options.model} reads no text")
    if not options.data and (not options.test or not options.eval or options.threshold == "auto"):
        raise ValueError("--data is missing: which data set?")
    if family.asked and options.score_size == "network":
        raise ValueError("--score-size network: SAM is scored at the image's size, drop it")
    check_volumes(options, family)
    if options.text_codes and options.codes in ("random", "one-hot"):
        raise ValueError(f"--codes {options.codes}: takes no --text-codes, drop one")
    if options.pseudocolor is not None:
        colour_table(options.pseudocolor)
    for keys, fits, told in (
        (FOR_SAM, family.asked, "takes no boxes or points, only SAM does"),
        (["codes"], family.partial, "has no codes of classes, only universal and fewshot3d do"),
        (
            ["text_codes"],
            family.partial or getattr(family, "takes_text_codes", False),
            "has no codes of texts, only universal, fewshot3d and text_swin_unetr do",
        ),
    ):
        if given := [key for key in keys if not fits and getattr(options, key) is not None]:
            raise ValueError(f"{flag(given[0])}: {options.model} {told}")
    if options.prompt_study and not family.reads:
        raise ValueError(f"--prompt-study: {options.model} reads no text")
    if options.prompt_study and options.score_size == "network":
        raise ValueError("--score-size network: --prompt-study scores at the image's size, drop it")


def check_volumes(options: Options, family) -> None:
    """ValueError, one line: what is of volumes for a model of images, or the other way round."""
    for key in () if family.volumes else FOR_VOLUMES:
        if getattr(options, key):
            raise ValueError(f"{flag(key)}: {options.model} takes images; this is for volumes")
    for key in ("pseudocolor", "views", "mask_orientation") if family.volumes else ():
        if getattr(options, key):
            raise ValueError(f"{flag(key)}: {options.model} takes volumes; this is for images")
    if family.volumes and options.mask_threshold is not None:
        raise ValueError(f"--mask-threshold: {options.model} takes volumes; this is for images")
    if family.volumes and options.score_size == "network":
        raise ValueError("--score-size network: volumes are scored on their own grid, drop it")
    if options.size and len(options.size) not in ((1, 3) if family.volumes else (1,)):
        raise ValueError(f"--size {' '.join(map(str, options.size))}: one number, of volumes three")
    if options.size and not family.volumes:
        check_side(options.size[0], options.model, family)
    sides = options.size or [64]
    if family.volumes and (any(n % 32 or n < 32 for n in sides) or max(sides) < 64):
        raise ValueError("--size: sides of volumes are multiples of 32, one of them 64 or more")
    if family.volumes and options.schedule == "plateau":
        raise ValueError("--schedule plateau: goes by a validation loss, which volumes have not")
    if options.overfit and (options.test or options.eval or options.fold):
        raise ValueError("--overfit: trains and tests on --data alone; drop --test, --eval, --fold")
    if options.intensity:
        options.window  # raises
    ratio = options.crop_ratio
    if ratio and (len(ratio) < 2 or not 0 < sum(ratio) < math.inf):
        raise ValueError("--crop-ratio: two numbers or one a class, from 0 up and not all 0")


def check_side(side: int, model: str, family) -> None:
    """Raise ValueError, one line, if a model cannot take images of side x side pixels."""
    least, step = family.sides
    if side < least or side % step:
        sides = f"of {least} pixels or more"
        if step > 1:
            sides = f"that are multiples of {step}, {least} or more"
        raise ValueError(f"--size {side}: {model} takes sides {sides}")


def check_used(options: Options, settings: Settings) -> None:
    """ValueError, one line: what would do nothing, or nothing that means anything, beside the
    others."""
    keeps, topology = settings.keep_features, settings.topology not in (None, "none")
    idle = {
        "compile": keeps or settings.sam_prompts is not None,  # which encode and decode apart
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
    if path.is_file() and run_config(path):  # RUN/best.safetensors is the same as RUN
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


def resolve(options: Options) -> tuple[Options, Settings]:
    """Fills what is open from the tested run folder and from the recipe; checks the rest."""
    options = checked(options)
    if options.prompt and not options.resume:  # a run's own prompt stays as it was trained
        options = replace(options, prompt=prompt_option(options.prompt))
    typed = options
    options = as_tested(options)
    family, name = FAMILIES[options.model], options.recipe or "default"
    check(options, family, name)
    settings = family.settings[name]
    if options.out is None:
        options = replace(options, out=run_folder(typed, options.model))
    shared = {spec.name for spec in fields(Settings)} & {spec.name for spec in fields(Options)}
    shared -= {"weights", "decoder"}  # --decoder replaces the recipe's when the model is loaded
    given = {key: getattr(options, key) for key in shared if getattr(options, key) is not None}
    if options.weights == "none" and options.backbone_lr is None:  # nothing is pretrained
        given["backbone_lr"] = given.get("lr", settings.lr)
    settings = with_views(replace(settings, **given), options, family)
    if not options.resume:  # which brings all options of the run, used or not
        check_used(options, settings)
    options = replace(options, **{key: getattr(settings, key) for key in shared})
    if settings.augment is not None:  # the views then are no choice, which a resumed run would see
        options = replace(options, views=None)
    return options, settings
