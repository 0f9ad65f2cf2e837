"""Read whole data sets and report what is wrong with them: `prepare.py check`."""

import shlex
from pathlib import Path

from engine.command_line import flag
from engine.ranges import GREY_LEVEL
from imaging import image_files, layouts
from preparation import check_findings, check_report, import_folder
from preparation.check_classes import DataSet, check_training_splits, is_too_small
from preparation.check_findings import ERROR, KINDS, WARNING, Findings
from preparation.check_images import MASK_THRESHOLD, check_images
from preparation.check_leaks import check_near, check_overlap, check_patients, published_split
from preparation.check_prompts import default_prompt, tokenizers_of
from preparation.check_volumes import check_volumes
from preparation.fix_splits import fix_splits

MODEL_OF_TEXTS = "clipseg"  # recommended for data sets with prompts
OPTIONS_OF_IMAGES = ("model", "mask_orientation", "mask_threshold")
OPTIONS_OF_REPORTS = ("model", "mask_orientation", "mask_threshold", "strict", "report", "html")

# --- before anything is read ----------------------------------------------------------------------


def describe_foreign_folder(root: Path) -> str:
    """Return the error about a folder that is no data set: what it holds, and what to do."""
    if not root.exists():
        return f"{root}: no such folder"
    if not root.is_dir():
        return f"{root}: is a file; give the folder of a data set"

    content = sorted(path for path in root.iterdir() if not layouts.is_hidden(path))
    for folder in content:
        if folder.is_dir() and (layouts.has_volumes(folder) or layouts.find_splits(folder)):
            return f"{root}: no data set here, but {folder} is one; give that folder"

    advice = import_folder.advice(root)
    if advice:
        return f"{root}: not in our layout yet; {advice}"
    holds = layouts.count_kinds(content) if content else "nothing"
    need = "images/ and masks/ with files of the same names, and optionally anns/*.json"
    return f"{root}: no data set here (it holds {holds}); expected {need}; see docs/own_data.md"


def refuse_misuse(args) -> None:
    """Raise FileNotFoundError or ValueError, one line, before any data set is read."""
    for root in args.data:
        if not layouts.has_volumes(root) and not layouts.find_splits(root):
            raise FileNotFoundError(describe_foreign_folder(root))
        published_split(root)

    if all(layouts.has_volumes(root) for root in args.data):
        for name in OPTIONS_OF_IMAGES:
            if getattr(args, name) is not None:
                raise ValueError(f"{flag(name)}: has no effect on volumes; remove it")
    if args.fix_splits:
        for name in OPTIONS_OF_REPORTS:
            value = getattr(args, name)
            if value is not None and value is not False:  # 0 is a threshold
                raise ValueError(f"{flag(name)}: has no effect with --fix-splits; remove it")
    for name in ("report", "html"):
        path = getattr(args, name)
        if path is None:
            continue
        if path.exists() or path.is_symlink():
            raise ValueError(f"{flag(name)} {path}: exists already; choose another name")
        if any(parent.exists() and not parent.is_dir() for parent in path.parents):
            raise ValueError(f"{flag(name)} {path}: lies below a file; choose another name")
    if args.html is not None and args.html == args.report:
        raise ValueError(f"--html {args.html}: is also the folder of --report; choose another name")


# --- what to do next ------------------------------------------------------------------------------


def describe_next_step(args, data_sets: list[DataSet], findings: Findings) -> str:
    """Return what to do about the first kind of errors, or the command that trains."""
    kinds = [*findings.of_level(ERROR)]
    if args.strict:
        kinds += findings.of_level(WARNING)
    if not kinds:
        return train_command(args, data_sets)

    first = kinds[0]
    if first in check_findings.FIXABLE:
        words = ["python", "prepare.py", "check", *map(str, args.data)]
        return shlex.join([*words, *group_option(args), "--fix-splits"])
    return f"{KINDS[first].advice}; then run check again"


def group_option(args) -> list[str]:
    """Return --group-regex as it was given."""
    return ["--group-regex", args.group_regex] if args.group_regex else []


def train_command(args, data_sets: list[DataSet]) -> str:
    """Return the command that trains a model on the data sets that have the classes of the first.

    Those without a training split are tested.
    """
    trained = {}  # path as it was typed -> data set
    tested = []
    for path, data_set in zip(args.data, data_sets, strict=True):
        if data_set.classes() != data_sets[0].classes():
            continue
        if "train" in data_set.splits:
            trained[str(path)] = data_set
        else:
            tested.append(str(path))

    model = args.model or default_model(data_sets[0])
    words = ["python", "train.py", "--model", model, "--data", *(trained or ["TRAINING_SET"])]
    if any(map(is_too_small, trained.values())):
        words += ["--overfit", "1"]
    elif tested:
        words += ["--test", *tested]

    # A model that --model names reads prompts: `tokenizers_of` refuses others.
    reads_prompts = args.model or model == MODEL_OF_TEXTS
    prompt = default_prompt(data_sets[0].splits)
    if reads_prompts and prompt:
        words += ["--prompt", prompt]
    for name in ("mask_orientation", "mask_threshold"):
        if getattr(args, name) is not None:
            words += [flag(name), str(getattr(args, name))]
    return shlex.join([*words, *group_option(args)])


def default_model(data_set: DataSet) -> str:
    """Return a model that suits a data set: for volumes, texts or class maps."""
    if data_set.has_volumes:
        return "swin_unetr3d"
    has_texts = any(any(counter) for counter in data_set.texts.values())
    is_binary = len(data_set.classes()) == 1
    return MODEL_OF_TEXTS if has_texts and is_binary else "segformer"


# --- the command ----------------------------------------------------------------------------------


def check_data_set(root: Path, args, tokenizers: dict, findings: Findings) -> DataSet:
    """Check one data set and print what it holds."""
    if layouts.has_volumes(root):
        data_set = check_volumes(root, args, findings)
    else:
        data_set = check_images(root, args, tokenizers, findings)

    source = published_split(root)
    data_set.has_published_split = source is not None
    check_patients(data_set.splits, data_set.has_published_split, findings)
    if data_set.has_published_split:
        data_set.rows.insert(len(data_set.splits), ("split from", " ".join(source.split())))
    for line in check_report.describe_data_set(data_set):
        print(check_findings.printable(line))
    return data_set


def check_between(data_sets: list[DataSet], findings: Findings) -> None:
    """Add findings about images that two splits share, in one data set or in two."""
    images = []
    published = set()
    for data_set in data_sets:
        images += data_set.images
        if data_set.has_published_split:
            published.add(data_set.root.resolve())
    reported = check_overlap(images, published, findings)
    check_near(images, reported, findings)


def check(args):
    """Read whole data sets of images or volumes and report what is wrong with them.

    Errors make training fail or its scores dishonest; warnings are worth a look. The exit status is
    1 if there are errors. Only --report, --html and --fix-splits write anything.
    """
    refuse_misuse(args)
    if args.fix_splits:
        for root in args.data:
            fix_splits(root, args.group_regex)
        return 0

    findings = Findings()
    tokenizers = tokenizers_of(args.model)
    data_sets = []
    for root in args.data:
        data_sets.append(check_data_set(root, args, tokenizers, findings))
    check_between(data_sets, findings)
    check_training_splits(data_sets, findings)
    for line in check_findings.describe_findings(findings):
        print(check_findings.printable(line))

    next_step = describe_next_step(args, data_sets, findings)
    if args.report or args.html:
        report = check_report.make_report(data_sets, findings, next_step)
        if args.report:
            check_report.write_folder(args.report, report)
            print(f"wrote {args.report}")
        if args.html:
            check_report.write_page(args.html, report)
            print(f"wrote {args.html}")
    print(f"next: {check_findings.printable(next_step)}")
    has_errors = findings.count(ERROR) or (args.strict and findings.count(WARNING))
    return 1 if has_errors else 0


def options(command):
    """Describe `prepare.py check`."""
    add = command(check, "read data sets and report problems")
    help = "folder of a data set, with images/ and masks/ or with dataset.json"
    add("data", type=Path, nargs="+", metavar="DATA", help=help)
    help = (
        "how masks of EXIF-rotated images lie, where their size does not show it: stored (not yet "
        "rotated, like the image file) or upright (default: stored, and such masks are listed)"
    )
    add("--mask-orientation", choices=image_files.ORIENTATIONS, help=help)
    help = (
        "also show how many tokens this model makes of the prompts, and which it cuts: cris, "
        "clipseg, biomedclipseg (default: do not count them)"
    )
    add("--model", metavar="NAME", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
    help = (
        "regular expression that finds the patient in an image's name: its first group, or the "
        "whole match; reports patients that are in two splits (default: the field `group` of "
        "annotation files)"
    )
    add("--group-regex", metavar="REGEX", help=help)
    add("--strict", action="store_true", help="exit with status 1 for warnings, too")
    help = "also write a folder with overlays, a histogram of the targets' sizes and all findings"
    add("--report", type=Path, metavar="FOLDER", help=help)
    help = "also write the same as one page in HTML, with its pictures inside"
    add("--html", type=Path, metavar="FILE", help=help)
    help = (
        "instead of checking, remove from anns/train.json (and val) the entries whose image or "
        "patient is in test or val; the former file stays as train.json.before"
    )
    add("--fix-splits", action="store_true", help=help)
