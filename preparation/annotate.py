"""Write text prompts for a data set, from its masks and images: `prepare.py annotate`.

mask_words.py describes the masks. This file finds the entries, adds the prompts to them, and writes
annotation files (imaging/layouts.py):

- A data set with `anns/` gets prompts in its entries. All other fields stay.
- Folders `images/` and `masks/` alone get `anns/`, with the random split that they have without it.
- Of class maps and split folders `--out` makes a new data set. In class maps each class that an
  image shows becomes an entry with a `label`; such entries in the data set itself would hide its
  class maps from the models that read them.
"""

import argparse
import io
import shlex
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data
from engine.ranges import GREY_LEVEL
from imaging import atomic_files, image_files, layouts, pictures
from imaging.files import json_text, read_json
from preparation import mask_words
from preparation.check_images import MASK_THRESHOLD, split_order
from preparation.volume_sets import link

ALL_TYPES = tuple(f"p{k}" for k in range(10))
SHEET = "prompts.png"  # in anns/, where nothing reads images
MOST_PICTURES = 20  # of the sheet


@dataclass
class Draft:
    """An entry that gets prompts."""

    entry: layouts.Entry
    item: dict  # the object of the annotation file
    description: mask_words.Description | None = None  # None: the mask is empty
    threshold: int = -1  # of `data.read_truth`


# --- entries --------------------------------------------------------------------------------------


def read_drafts(
    root: Path, group_regex: str | None, mask_orientation: str | None
) -> dict[str, list[Draft]]:
    """Return {split: its entries} of a data set, train, val and test first.

    Raises FileNotFoundError or ValueError.
    """
    if layouts.has_volumes(root):
        raise ValueError(f"{root}: holds volumes; prompts are made for images and masks only")
    splits = layouts.find_splits(root)
    if not splits:
        layouts.read_entries(root, "train")  # raises: no data set
    has_annotations = (root / "anns").is_dir()
    if has_annotations and group_regex:
        raise ValueError(
            f"--group-regex: the entries in {root / 'anns'} name their patient, as group; remove "
            "--group-regex"
        )

    drafts = {}
    for split in sorted(splits, key=split_order):
        if has_annotations:
            with redirect_stdout(io.StringIO()):  # says that it skips repeated entries
                entries = layouts.read_entries(root, split)
            by_name = {entry.name: entry for entry in entries}
            drafts[split] = []
            for item in read_json(splits[split]):
                name = layouts.entry_name(item["mask_name"], item.get("label"))
                drafts[split].append(Draft(by_name[name], item))
        else:
            entries = layouts.read_entries(root, split, group_regex)
            drafts[split] = [Draft(entry, new_item(entry)) for entry in entries]
    for draft in chain(*drafts.values()):
        draft.entry = replace(draft.entry, mask_orientation=mask_orientation)

    entries = [draft.entry for draft in chain(*drafts.values())]
    if not entries:
        raise ValueError(f"{root}: has no entries")
    layouts.check_files_exist(entries)
    return drafts


def new_item(entry: layouts.Entry) -> dict:
    """Return the object of an annotation file for an entry, without prompts."""
    item = {
        "img_name": name_in_folder(entry.image, entry.root),
        "mask_name": name_in_folder(entry.mask, entry.root),
    }
    if entry.label is not None:
        item["label"] = entry.label
    if entry.group is not None:
        item["group"] = entry.group
    return item | {"prompts": {}}


def name_in_folder(file: Path, root: Path) -> str:
    """Return the path of an image or mask below images/ or masks/ of a new data set.

    images/a.png becomes a.png, and train/images/a.png becomes train/a.png.
    """
    parts = list(file.relative_to(root).parts)
    folders = layouts.IMAGE_FOLDERS + layouts.MASK_FOLDERS
    parts.remove(next(part for part in parts if part in folders))
    return "/".join(parts)


def is_class_map(entry: layouts.Entry) -> bool:
    """Return True if the mask of an entry shows several classes."""
    return entry.label is None and entry.has_class_indices and len(entry.classes) > 1


def refuse_in_place(root: Path, entries: list[layouts.Entry]) -> None:
    """Raise ValueError, one line, if anns/ within the data set cannot hold its prompts."""
    if any(map(is_class_map, entries)):
        raise ValueError(
            f"{root}: its masks are class maps, and prompts are for one class each; add --out "
            "FOLDER to write them as a data set of their own"
        )
    if (root / "anns").is_dir():
        return
    for entry in entries:
        image_folder = entry.image.parent
        mask_folder = entry.mask.parent
        if image_folder != root / "images" or mask_folder != root / "masks":
            raise ValueError(
                f"{root}: anns/ names files in images/ and masks/, but here they are in "
                f"{image_folder.relative_to(root)}/ and {mask_folder.relative_to(root)}/; add "
                "--out FOLDER for a data set of this form"
            )


# --- targets --------------------------------------------------------------------------------------


def read_targets(root: Path, target: str | None) -> dict[int | None, str]:
    """Return {label: name of the target}; the label of binary masks is None.

    The names are those of classes.json, or --target for all. Raises ValueError if neither or both
    are given.
    """
    file = root / "classes.json"
    classes = layouts.read_classes(file) if file.is_file() else ()
    if target is not None and len(classes) > 1:
        raise ValueError(f"--target: {file} names the targets; remove --target")
    if target is not None or not classes:
        return dict.fromkeys([None, *range(255)], target)

    names = [name.replace("_", " ") for name in classes]
    if len(names) == 1:
        return {None: names[0], 1: names[0]}
    return dict(enumerate(names))


def target_of(entry: layouts.Entry, targets: dict[int | None, str]) -> str | None:
    """Return what an entry's mask shows: its name in `targets`, else its prompt p1."""
    if targets.get(entry.label):
        return targets[entry.label]
    texts = entry.prompts.get("p1", [])
    if len(texts) == 1 and texts[0].strip():
        return texts[0].strip().removeprefix("no ")  # of an empty mask
    return None


def check_targets(drafts: list[Draft], targets: dict[int | None, str]) -> None:
    """Raise ValueError, one line, if the target of an entry has no name."""
    for draft in drafts:
        entry = draft.entry
        if is_class_map(entry) or target_of(entry, targets):
            continue
        if entry.label is None or not any(targets.values()):
            raise ValueError(
                f"{entry.root}: does not name what its masks show; add --target TEXT, such as "
                '--target "skin lesion"'
            )
        raise ValueError(
            f"{entry.root / 'classes.json'}: does not name the label {entry.label} of {entry.mask}"
        )


# --- descriptions ---------------------------------------------------------------------------------


def describe_draft(draft: Draft, threshold: int) -> tuple[list[Draft], int]:
    """Return a draft with its description; of a class map one draft for each class that it shows.

    Also returns how many classes of the image are left out as specks. threshold: of
    `data.read_truth`.
    """
    entry = draft.entry
    image, mask = data.read_image_and_truth(entry, threshold)
    if not is_class_map(entry):
        description = mask_words.describe(image, mask == 1)
        return [replace(draft, description=description, threshold=threshold)], 0

    described = []
    specks = 0
    for label in range(1, len(entry.classes)):
        pixels = np.count_nonzero(mask == label)
        if pixels > mask_words.SPECK * mask.size:
            labelled = replace(entry, label=label)
            description = mask_words.describe(image, mask == label)
            described.append(Draft(labelled, new_item(labelled), description))
        elif pixels:
            specks += 1
    return described, specks


def describe_all(
    drafts: dict[str, list[Draft]], mask_threshold: int | None
) -> tuple[dict[str, list[Draft]], int]:
    """Return the drafts with descriptions, and the number of classes left out as specks.

    Raises ValueError for masks that cannot be read, and if all are empty.
    """
    entries = [draft.entry for draft in chain(*drafts.values())]
    counts = data.count_masks(entries)
    reading = data.MaskReading(mask_threshold)
    rule, thresholds = data.decide_thresholds(entries, counts, reading)

    described = {split: [] for split in drafts}
    specks = 0
    pairs = [(split, draft) for split, of_split in drafts.items() for draft in of_split]
    with ThreadPoolExecutor() as pool:
        results = pool.map(describe_draft, [draft for _, draft in pairs], thresholds)
        bar = tqdm(results, "annotate", total=len(pairs), unit="mask", disable=None, leave=False)
        for (split, _), (of_mask, specks_of_mask) in zip(pairs, bar, strict=True):
            described[split] += of_mask
            specks += specks_of_mask

    if all(draft.description is None for draft in chain(*described.values())):
        raise ValueError(f"{entries[0].root}: all {len(entries)} masks are empty (read {rule})")
    return described, specks


# --- annotation files -----------------------------------------------------------------------------


def same_prompt(first: str | list[str], second: str | list[str]) -> bool:
    """Return True if two prompts are equal; a text equals a list of this one text."""
    texts = [[prompt] if isinstance(prompt, str) else prompt for prompt in (first, second)]
    return texts[0] == texts[1]


def add_prompts(draft: Draft, prompts: dict, overwrite: bool) -> dict:
    """Return the object of an annotation file with further prompts.

    Raises ValueError for a prompt of the same type that differs, unless `overwrite`.
    """
    merged = dict(draft.item["prompts"])
    for kind, prompt in prompts.items():
        present = merged.get(kind)
        if present is not None and same_prompt(present, prompt):
            continue
        if present and not overwrite:
            raise ValueError(
                f"{draft.entry.name} has another {kind}, {present!r}, now {prompt!r}; --overwrite "
                "replaces it, --types chooses other types"
            )
        merged[kind] = prompt
    return draft.item | {"prompts": merged}


def annotate_splits(
    drafts: dict[str, list[Draft]], targets: dict[int | None, str], language: dict, args
) -> dict[str, list[dict]]:
    """Return {split: objects of its annotation file}, with prompts. Raises ValueError."""
    annotations = {}
    for split, of_split in drafts.items():
        annotations[split] = []
        for draft in of_split:
            target = target_of(draft.entry, targets)
            prompts = mask_words.make_prompts(draft.description, target, args.describe, language)
            prompts = {kind: prompts[kind] for kind in args.types}
            try:
                annotations[split].append(add_prompts(draft, prompts, args.overwrite))
            except ValueError as error:
                raise ValueError(f"{args.folder}, {split}: {error}") from None
    return annotations


def file_content(path: Path, items: list[dict]) -> bytes:
    """Return the content of an annotation file; that of `path` itself if it lists the same."""
    if path.is_file() and read_json(path) == items:
        return path.read_bytes()
    return json_text(items).encode()


def draw_sheet(drafts: list[Draft], annotations: list[dict], kind: str) -> Image.Image:
    """Return a page of some images, chosen at random, with outlines and prompts of a type."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(drafts))[:MOST_PICTURES]
    cards = []
    for i in sorted(chosen):
        entry = drafts[i].entry
        image, mask = data.read_image_and_truth(entry, drafts[i].threshold)
        truth = mask[None] == 1  # (1,H,W)
        picture = pictures.overlay(image, truth, np.zeros_like(truth))

        prompt = annotations[i]["prompts"][kind]
        caption = prompt if isinstance(prompt, str) else prompt[0]
        cards.append(pictures.captioned(picture, caption))
    return pictures.sheet(cards, columns=4)


# --- writing --------------------------------------------------------------------------------------


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write files into anns/, each completely or not at all; those that are equal stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = folder / name
        if path.is_file() and path.read_bytes() == content:
            continue
        with atomic_files.atomic_write(path) as part:
            part.write_bytes(content)


def write_in_place(root: Path, contents: dict[str, bytes]) -> None:
    """Write the files of anns/ in the data set itself. Raises ValueError or OSError."""
    folder = root / "anns"
    if folder.is_dir():
        write_files(folder, contents)
    else:  # all at once: with some of its files the folder would be a data set of fewer splits
        with atomic_files.atomic_folder(folder) as part:
            write_files(part, contents)


def write_new(out: Path, entries: list[layouts.Entry], contents: dict[str, bytes]) -> None:
    """Write a new data set; its images and masks are second names of the same files (hard links).

    Raises ValueError if `out` has other content, or OSError.
    """
    if out.is_dir() and any(out.iterdir()):
        for name, content in contents.items():
            path = out / "anns" / name
            is_same = path.is_file() and path.read_bytes() == content
            if name != SHEET and not is_same:  # other versions of Pillow write other pictures
                raise ValueError(
                    f"{out}: exists already, and anns/{name} is missing or differs; choose "
                    "another --out, or remove it"
                )
        return

    if not out.is_dir():
        atomic_files.refuse_existing(out)
    with atomic_files.atomic_folder(out) as part:
        root = entries[0].root
        files = {}  # new file: file
        for entry in entries:
            files[part / "images" / name_in_folder(entry.image, root)] = entry.image
            files[part / "masks" / name_in_folder(entry.mask, root)] = entry.mask
        if (root / "classes.json").is_file():
            files[part / "classes.json"] = root / "classes.json"

        for target, source in tqdm(files.items(), "link", unit="file", disable=None, leave=False):
            target.parent.mkdir(parents=True, exist_ok=True)
            link(source, target)
        write_files(part / "anns", contents)


def count_words(drafts: list[Draft]) -> dict[str, Counter]:
    """Return for each attribute how many masks have which word."""
    words = {name: Counter() for name in ("number", "size", "location", "shape", "colour")}
    for draft in drafts:
        description = draft.description
        if description is None:
            words["number"]["0"] += 1
            continue
        words["number"][str(description.number)] += 1
        words["size"].update(description.sizes)
        words["location"].update(description.locations)
        words["shape"][description.shape] += 1
        words["colour"][description.colour] += 1
    return words


def print_summary(anns: Path, described: dict[str, list[Draft]], args, specks: int) -> None:
    """Print what was written, and how often each word occurs."""
    sizes = ", ".join(f"{split} {len(drafts)}" for split, drafts in described.items())
    print(f"{anns}: {', '.join(args.types)} for {sizes}")
    for name, counter in count_words([*chain(*described.values())]).items():
        listed = ", ".join(f"{word} {n}" for word, n in counter.most_common())
        print(f"  {name:9} {listed}")
    if specks:
        share = f"{mask_words.SPECK:.2%}"
        print(f"  left out: {specks} times a class that fills at most {share} of an image")
    print(f"  {anns / SHEET} shows up to {MOST_PICTURES} of them")
    print(f"next: python prepare.py check {shlex.quote(str(anns.parent))}")


# --- command --------------------------------------------------------------------------------------


def refuse_misuse(args) -> None:
    """Complete --types; raise ValueError, one line, for options that do not go together."""
    available = ALL_TYPES if args.describe else ALL_TYPES[:7]
    if args.types is None:
        args.types = available
    for kind in args.types:
        if kind not in available:
            raise ValueError(f"--types {kind}: needs a general description; add --describe TEXT")
    if args.out and args.overwrite:
        raise ValueError("--overwrite: has no effect on a new data set; remove it, or --out")


def annotate(args) -> int:
    """Write text prompts for a data set of your own, computed from its masks and images.

    The prompts are worded like those of the medvlsm study: p1 "polyp", p2 "round polyp", p3 "pink
    round polyp", p4 "small pink round polyp", p5 "one small pink round polyp", p6 "one small pink
    round polyp, located in center of the image". Masks without an object get "no polyp". In class
    maps each class gets prompts of its own.

    They are written to anns/ of the data set, or of a new one (--out), with a picture of some of
    them, prompts.png. Nothing is written if one of them would replace another prompt.
    """
    refuse_misuse(args)
    anns = args.folder / "anns"
    if args.out is not None or not anns.is_dir():
        return write_prompts(args)
    with atomic_files.claim_folder(anns):  # from reading to writing, so that no prompt gets lost
        return write_prompts(args)


def write_prompts(args) -> int:
    """Do the work of `annotate`."""
    language = mask_words.read_language(args.language)
    root = args.folder.resolve()
    if args.out and root in args.out.resolve().parents:
        raise ValueError(f"--out {args.out}: lies within {args.folder}; choose another folder")
    drafts = read_drafts(root, args.group_regex, args.mask_orientation)
    all_drafts = [*chain(*drafts.values())]
    entries = [draft.entry for draft in all_drafts]
    if args.out is None:
        refuse_in_place(root, entries)
    targets = read_targets(root, args.target)
    check_targets(all_drafts, targets)

    described, specks = describe_all(drafts, args.mask_threshold)
    annotations = annotate_splits(described, targets, language, args)
    contents = {}
    for split, items in annotations.items():
        contents[f"{split}.json"] = file_content(root / "anns" / f"{split}.json", items)
    all_described = [*chain(*described.values())]
    all_items = [*chain(*annotations.values())]
    page = draw_sheet(all_described, all_items, args.types[-1])
    contents[SHEET] = pictures.png(np.asarray(page))

    if args.out is None:
        write_in_place(root, contents)
    else:
        write_new(args.out, entries, contents)
    print_summary((args.out or args.folder) / "anns", described, args, specks)
    return 0


def prompt_types(text: str) -> tuple[str, ...]:
    """Parse --types: "P6, p1" -> ("p1", "p6")."""
    kinds = {piece.strip().lower() for piece in text.split(",")}
    if not kinds <= {*ALL_TYPES}:
        raise argparse.ArgumentTypeError(f"{text}: must be some of p0 to p9, such as p1,p6")
    return tuple(kind for kind in ALL_TYPES if kind in kinds)


def one_line(text: str) -> str:
    """Parse a text that becomes a part of prompts; refuse an empty one and several lines."""
    if not text.strip() or text.strip().splitlines() != [text.strip()]:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a text of one line")
    return text.strip()


def options(command) -> None:
    """Describe `prepare.py annotate`."""
    add = command(annotate, "write text prompts for a data set from its masks and images")
    help = "data set of images: images/ and masks/, with or without anns/, or split folders"
    add("folder", type=Path, metavar="FOLDER", help=help)
    add(
        "--target",
        type=one_line,
        metavar="TEXT",
        help='what the masks show, such as "skin lesion" (default: the names in classes.json, else '
        "the prompts p1 that the data set has)",
    )
    add(
        "--describe",
        type=one_line,
        nargs="+",
        default=[],
        metavar="TEXT",
        help="general descriptions for p7 to p9, such as "
        '"which is a growth of tissue" (default: none, only p0 to p6)',
    )
    add(
        "--types",
        type=prompt_types,
        metavar="P1,P6",
        help="prompt types to write (default: p0 to p6, with --describe p0 to p9)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of a new data set of the same images; class maps and split folders need it "
        "(default: add anns/ to FOLDER)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace prompts of the same types that differ (default: refuse)",
    )
    add(
        "--language",
        type=Path,
        metavar="FILE",
        help="JSON file with the words and sentences of another language, with the keys of ENGLISH "
        "in preparation/mask_words.py (default: English)",
    )
    add(
        "--group-regex",
        metavar="REGEX",
        help="regular expression that finds the patient in an image's name: its first group, or "
        "the whole match; the random split keeps patients together (default: split by image)",
    )
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
    help = (
        "how masks of EXIF-rotated images lie, where their size does not show it: stored (not yet "
        "rotated, like the image file) or upright (default: stored)"
    )
    add("--mask-orientation", choices=image_files.ORIENTATIONS, help=help)
