"""Read folders in which masks are image files: the formats folders, beside, class-folders, globs.

mask_names.py tells images from masks by their names. mask_values.py reads the pixels of masks. This
file finds the masks of every image and the classes that folders or file names state, and refuses
files without a counterpart.
"""

import re
import shlex
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from imaging import image_files, layouts
from imaging.files import read_text
from preparation import mask_values
from preparation.check_images import LEVELS_OF_MASKS, main_levels
from preparation.mask_names import (
    File,
    Place,
    addition,
    by_stem,
    exact_place,
    find_image,
    holds_no_data,
    is_named_by_words_alone,
    loose_place,
    may_name_class,
    names_a_mask,
    pair_by_pattern,
    without_outer_folders,
)
from preparation.mask_values import MaskFile, Pair
from preparation.readings import Case, Format, ImageReading, Reading, count

NAME_FILES = "name the files with --images 'GLOB' --masks 'GLOB'"
SAMPLE = 8  # files that are read to decide if a folder contains masks
MOST_CLASSES = 50  # in file names; more different names cannot be classes


@dataclass
class Match:
    """An image and one of its masks."""

    image: File
    mask: File
    class_name: str = ""  # from a folder
    addition: str = ""  # words that the mask's file name has and the image's lacks
    is_alone: bool = False  # the folder states the image, whatever the mask's name


@dataclass
class Pairing:
    """The images and masks of a folder."""

    images: list[File]
    matches: list[Match]
    left_masks: list[File] = field(default_factory=list)  # masks without an image
    notes: list[str] = field(default_factory=list)  # for the summary


# --- files of a folder ----------------------------------------------------------------------------


def list_files(folder: Path) -> list[File]:
    """Return the image files below a folder."""
    files = []
    for path in filter(layouts.is_image, layouts.files_below(folder, with_masks=True)):
        files.append(File(path, path.relative_to(folder).parts[:-1]))
    return files


def without_overlays(all_files: list[File]) -> tuple[list[File], list[str]]:
    """Return the files that may be data, and notes about the others."""
    files = []
    left_out = Counter()
    for file in all_files:
        name = name_of_no_data(file)
        if name:
            left_out[name] += 1
        else:
            files.append(file)

    notes = [f"not read: {count(n, 'image')}, {name}" for name, n in left_out.items()]
    return files, notes


def name_of_no_data(file: File) -> str:
    """Return the folder or the kind of a file that is no data, such as an overlay; else ""."""
    for folder in file.folders:
        if holds_no_data(folder):
            return f"{folder}/"
    return "overlays, previews or superpixels" if holds_no_data(file.stem) else ""


def describe_places(files: list[File]) -> str:
    """Return the folders of files: "masks/", or "3 folders (train/masks/, …)"."""
    folders = set()
    for file in files:
        folders.add("/".join((*file.outer, *file.folders, "")))

    names = sorted(folders)
    if len(names) > 2:
        return f"{len(names)} folders ({names[0]}, …)"
    return " and ".join(name or "the folder itself" for name in names)


# --- sister folders -------------------------------------------------------------------------------


def pair_folders(files: list[File]) -> Pairing | None:
    """Return the pairs of images and masks in folders of their own, None without such folders.

    Raises ValueError, one line, if the masks could be in several folders, or if no names fit.
    """
    images, masks, others = divide_by_role(files)
    if not images or not masks:
        return None

    matches = match_exactly(images, masks)
    if matches is None:
        matches = match_loosely(images, masks)
    have_own_stems = len({image.stem for image in images}) == len(images)
    if not matches and have_own_stems:  # ignore the folders
        matches = match_names(images, without_classes(masks))

    pairing = with_additions(Pairing(images, matches), masks)
    if not pairing.matches:
        example = f"such as {images[0].path.name} and {masks[0].path.name}"
        raise ValueError(
            f"{images[0].root}: {describe_numbers(images, masks)}, but no two names fit together, "
            f"{example}; give each mask the name of its image, or {NAME_FILES}"
        )
    if others:
        pairing.notes.append(
            f"not read: {count(len(others), 'image')} in {describe_places(others)}"
        )
    return pairing


def divide_by_role(files: list[File]) -> tuple[list[File], list[File], list[File]]:
    """Return the images, the masks and the other files, by their folders."""
    by_role = {"image": [], "mask": [], "": []}
    for file in files:
        by_role[file.role].append(file)
    images = by_role["image"]
    masks = by_role["mask"]
    others = by_role[""]

    if masks and not images:  # x/ and x_mask/
        return others, masks, []
    if masks or not images:
        return images, masks, others

    # The folders beside images/ may be classes.
    in_folders = []
    outside = []
    for file in others:
        group = in_folders if file.folders else outside
        group.append(file)
    if in_folders and look_like_masks(in_folders):
        return images, in_folders, outside
    return images, [], others


def without_classes(masks: list[File]) -> list[tuple[File, str]]:
    """Return [(mask, "")] for masks in folders that do not state a class."""
    return [(mask, "") for mask in masks]


def describe_numbers(images: list[File], masks: list[File]) -> str:
    """Return how many images and masks there are and where."""
    return (
        f"{count(len(images), 'image')} in {describe_places(images)}, "
        f"{count(len(masks), 'mask')} in {describe_places(masks)}"
    )


def by_place(files: list[File], place_of: Place) -> dict[tuple, list[File]]:
    """Return {place: its files}."""
    groups = {}
    for file in files:
        groups.setdefault(place_of(file), []).append(file)
    return groups


def match_exactly(images: list[File], masks: list[File]) -> list[Match] | None:
    """Return the matches if every folder of images has one folder of masks, else None."""
    images_of = by_place(images, exact_place)
    masks_of = by_place(masks, exact_place)
    if images_of.keys() != masks_of.keys():
        return None
    for group in (*images_of.values(), *masks_of.values()):
        if len({file.folders for file in group}) > 1:
            return None

    may_be_alone = all(len(group) == 1 for group in images_of.values())
    matches = []
    for place, group in images_of.items():
        matches += match_names(group, without_classes(masks_of[place]), may_be_alone)
    return matches


def match_loosely(images: list[File], masks: list[File]) -> list[Match]:
    """Return the matches of folders of images and masks that are not named alike.

    A folder within a folder of masks names a class or an image. Raises ValueError, one line, if
    images have several folders of masks.
    """
    place_of = loose_place
    if not any(image.role for image in images):
        place_of = place_of_parent
    images_of = by_place(images, place_of)

    located = {}  # place -> [(mask, class)]
    for mask in masks:
        place, class_name = locate(loose_place(mask), images_of)
        located.setdefault(place, []).append((mask, class_name))

    matches = []
    for place, group in images_of.items():
        masks_here = name_series(located.get(place, []))
        matches += match_names(group, masks_here)
    return matches


def place_of_parent(file: File) -> tuple[str, ...]:
    """Return the place of the parent folder, for an image in a folder without a role."""
    if not file.folders:
        return ()
    parent = loose_place(File(file.path, file.folders[:-1]))
    split = File(file.path, file.folders[-1:]).split
    return (*parent, split) if split else parent


def locate(place: tuple, images_of: dict) -> tuple[tuple | None, str]:
    """Return the place of a mask's images, and the folder that only the mask's place has: a class.

    Return None and "" if there are no such images.
    """
    if place in images_of:
        return place, ""
    for i in reversed(range(len(place))):
        shorter = place[:i] + place[i + 1 :]
        if shorter in images_of:
            return shorter, place[i]
    return None, ""


def name_series(masks: list[tuple[File, str]]) -> list[tuple[File, str]]:
    """Return the masks of a folder of images with their classes.

    Folders such as liver_masks/ and kidney_masks/ name classes. Raises ValueError, one line, for
    several folders that do not, such as masks/ and masks_refined/.
    """
    series = {}
    for mask, class_name in masks:
        series.setdefault(mask.series, []).append((mask, class_name))
    if len(series) < 2:
        return masks

    kinds = []
    places = []
    for items in series.values():
        masks_of_series = [mask for mask, _ in items]
        kinds.append(masks_of_series[0].kind)
        places.append(describe_places(masks_of_series))

    are_classes = all(map(may_name_class, kinds)) and len({*kinds}) == len(kinds)
    if not are_classes:
        example, _ = masks[0]
        pattern = example.path.relative_to(example.root).with_name(f"*{example.path.suffix}")
        raise ValueError(
            f"{example.root}: the masks could be those in {' or in '.join(places)}; choose with "
            f"--images 'GLOB' --masks '{pattern.as_posix()}'"
        )

    named = []
    for mask, class_name in masks:
        named.append((mask, class_name or mask.kind))
    return named


# --- masks beside images --------------------------------------------------------------------------


def pair_beside(files: list[File]) -> Pairing | None:
    """Return the pairs of a folder with masks beside their images, None if there are none."""
    groups = by_place(files, lambda file: file.folders)
    ordered = masks_beside(files, groups)
    if not ordered:
        return None

    masks = set(ordered)
    images_of = {}
    masks_of = {}
    for place, group in groups.items():
        images_of[place] = [file for file in group if file not in masks]
        masks_of[place] = [file for file in group if file in masks]
    may_be_alone = all(len(images) == 1 for images in images_of.values())

    pairing = Pairing([], [])
    for place, images in images_of.items():
        pairing.images += images
        pairing.matches += match_names(images, without_classes(masks_of[place]), may_be_alone)
    pairing = with_additions(pairing, ordered)
    return pairing if pairing.matches else None


def masks_beside(files: list[File], groups: dict[tuple, list[File]]) -> list[File]:
    """Return the files that are masks of images in the same folder. groups: folder -> files."""
    for masks_in in (masks_by_word, masks_by_ending, masks_by_addition):
        masks = set()
        for group in groups.values():
            masks |= masks_in(group)
        if masks:
            break

    # A name such as x_liver.png beside x.png is no proof, so the pixels decide.
    ordered = [file for file in files if file in masks]
    needs_proof = masks_in is masks_by_addition
    if ordered and needs_proof and not look_like_masks(ordered):
        return []
    return ordered


def masks_by_word(files: list[File]) -> set[File]:
    """Return the files of a folder that have a word for masks, such as x_mask.png beside x.png."""
    marked = [file for file in files if names_a_mask(file.stem)]
    named = by_stem(files)
    masks = set()
    for file in marked:
        is_of_folder = is_named_by_words_alone(file.stem) and len(marked) < len(files)
        if is_of_folder or find_image(file, named):
            masks.add(file)
    return masks


def masks_by_addition(files: list[File]) -> set[File]:
    """Return the files of a folder with the name of another file and a class: x_liver.png."""
    named = by_stem(files)
    masks = set()
    for file in files:
        image_and_class = find_image(file, named)
        if image_and_class and image_and_class[1]:
            masks.add(file)
    return masks


def masks_by_ending(files: list[File]) -> set[File]:
    """Return the masks of a folder that differ from their image only in the ending.

    Of x.png and x.jpg, the masks are the files with few grey levels.
    """
    groups = {}
    for file in files:
        groups.setdefault(file.path.suffix.lower(), []).append(file)
    if len(groups) != 2:
        return set()

    first, second = groups.values()
    if {file.stem for file in first}.isdisjoint({file.stem for file in second}):
        return set()

    are_masks = [look_like_masks(first), look_like_masks(second)]
    if are_masks[0] == are_masks[1]:
        return set()
    return {*first} if are_masks[0] else {*second}


def look_like_masks(files: list[File]) -> bool:
    """Return True if each file of a sample has few grey levels, as masks have.

    A file that cannot be read is not a mask here. The reading that follows reports its error.
    """
    step = -(-len(files) // SAMPLE)
    for file in files[::step]:
        try:
            pixels = image_files.read_image(file.path)
        except (ValueError, OSError):
            return False
        if main_levels(Image.fromarray(pixels).convert("L")) > LEVELS_OF_MASKS:
            return False
    return True


# --- names ----------------------------------------------------------------------------------------


def match_names(
    images: list[File], masks: list[tuple[File, str]], may_be_alone: bool = False
) -> list[Match]:
    """Return the matches of the images and masks of one place.

    masks: [(mask, class)]. may_be_alone: the masks of a single image may have any name.
    """
    named = by_stem(images)
    matches = []
    for mask, class_name in masks:
        folder = class_name.lower()
        names_image = folder != "" and folder in named
        if names_image and (mask.stem == folder or mask.stem not in named):  # masks/x/1.png
            image = named[folder]
            matches.append(Match(image, mask, addition=addition(mask.stem), is_alone=True))
            continue

        image_and_rest = find_image(mask, named)
        if image_and_rest:
            image, rest = image_and_rest
            rest = "" if rest == folder else rest
            matches.append(Match(image, mask, class_name, rest))

    if not matches and may_be_alone:  # ID/images/ID.png, ID/masks/*.png
        for mask, class_name in masks:
            matches.append(Match(images[0], mask, class_name, addition(mask.stem), is_alone=True))
    if not matches:
        image_of = pair_by_pattern(images, [mask for mask, _ in masks])
        for mask, image in image_of.items():
            matches.append(Match(image, mask))
    return matches


def with_additions(pairing: Pairing, masks: list[File]) -> Pairing:
    """Interpret the additions to the file names of masks, and return the new pairing.

    An addition that all masks have, such as _L, has no meaning. Several additions are classes if
    each of them occurs with several images, as in x_liver.png and x_kidney.png. A mask with any
    other addition belongs to no image, unless its folder states the image.
    """
    matches = pairing.matches
    images_of = {}  # addition -> images
    for match in matches:
        images_of.setdefault(match.addition, set()).add(match.image)

    are_frequent = all(len(images) > 1 for images in images_of.values())
    is_common = are_frequent and len(images_of) == 1
    are_classes = are_frequent and 1 < len(images_of) <= MOST_CLASSES
    are_classes = are_classes and all(map(may_name_class, images_of))

    accepted = []
    alone = set()  # images
    for match in matches:
        if are_classes and not match.class_name:
            match.class_name = match.addition
        if is_common or are_classes or not match.addition or match.is_alone:
            accepted.append(match)
            if match.is_alone:
                alone.add(match.image)

    if len(alone) == 1 and len(pairing.images) == 1:  # names that have nothing in common
        accepted = []

    matched = {match.mask for match in accepted}
    left = [mask for mask in masks if mask not in matched]
    return Pairing(pairing.images, accepted, left, pairing.notes)


# --- patterns on the command line -----------------------------------------------------------------


def pattern_of(glob: str, option: str) -> re.Pattern:
    """Return the regular expression of a pattern. Its groups are s0, s1, … and class.

    `*` matches any text without /, `**/` any folders, `?` one character. {class} and {object} match
    any text without /, too.
    """
    stars = 0
    parts = []
    for piece in re.split(r"(\*\*/|\*|\?|\{class\}|\{object\})", glob):
        if piece in ("*", "**/"):
            content = "[^/]*" if piece == "*" else "(?:[^/]+/)*"
            parts.append(f"(?P<s{stars}>{content})")
            stars += 1
        elif piece == "{class}":
            parts.append("(?P<class>[^/]+?)")
        elif piece == "{object}":
            parts.append("[^/]*?")
        else:
            parts.append("[^/]" if piece == "?" else re.escape(piece))

    if glob.count("{class}") > 1 or (option == "--images" and "{" in glob):
        raise ValueError(f"{option} {glob}: {{class}} may be in --masks, once")
    return re.compile("".join(parts))


def matches_of(files: list[File], pattern: re.Pattern) -> dict[File, tuple[tuple, str]]:
    """Return {file: (texts that the stars match, class)} of the files that match a pattern."""
    fitting = {}
    for file in files:
        match = pattern.fullmatch(file.name)
        if match:
            texts = match.groupdict()
            class_name = texts.pop("class", "")
            fitting[file] = (tuple(map(layouts.composed, texts.values())), class_name)
    return fitting


def pair_globs(files: list[File], args: Namespace) -> Pairing:
    """Return the pairs of --images and --masks, in which the stars match the same texts.

    Files that match --masks are not images. Raises ValueError, one line, for patterns that match no
    file, that have unequal numbers of stars, or that give an image two masks.
    """
    image_pattern = pattern_of(args.images, "--images")
    mask_pattern = pattern_of(args.masks, "--masks")
    refuse_unequal_stars(image_pattern, mask_pattern, args)

    masks = matches_of(files, mask_pattern)
    images = matches_of([file for file in files if file not in masks], image_pattern)
    for name, pattern, fitting in (("images", args.images, images), ("masks", args.masks, masks)):
        if not fitting:
            first = files[0].name if files else "none"
            raise ValueError(
                f"--{name} {pattern}: fits none of {count(len(files), 'image file')}, such as "
                f"{first}"
            )

    image_of = {}  # texts -> image
    for image, (texts, _) in images.items():
        first = image_of.setdefault(texts, image)
        if first is not image:
            raise ValueError(
                f"{image.path} and {first.path}: --images {args.images} has the same text for both"
            )

    pairing = Pairing([*images], [])
    for mask, (texts, class_name) in masks.items():
        if texts in image_of:
            pairing.matches.append(Match(image_of[texts], mask, class_name))
        else:
            pairing.left_masks.append(mask)
    if "{object}" not in args.masks:
        refuse_second_masks(pairing.matches)
    return pairing


def refuse_unequal_stars(images: re.Pattern, masks: re.Pattern, args: Namespace) -> None:
    """Raise ValueError, one line, if --images and --masks have different numbers of stars."""
    n_image = images.groups
    n_mask = masks.groups - ("class" in masks.groupindex)
    if n_image != n_mask:
        raise ValueError(
            f"--images {args.images}: {n_image} stars, but --masks {args.masks} has {n_mask}; they "
            "stand for the same texts, so both need the same number ({object} and {class} stand "
            "for other texts)"
        )


def refuse_second_masks(matches: list[Match]) -> None:
    """Raise ValueError, one line, if an image has two masks that are not numbered objects."""
    seen = {}  # (image, class) -> {stem: mask}
    for match in matches:
        if match.is_alone and not match.class_name:
            continue

        masks = seen.setdefault((match.image, match.class_name), {})
        first = masks.get(match.mask.stem) or next(iter(masks.values()), match.mask)
        is_repeated = match.mask.stem in masks
        masks[match.mask.stem] = match.mask

        is_numbered = without_numbers(first.path) == without_numbers(match.mask.path)
        if is_repeated or not is_numbered:
            raise ValueError(
                f"{match.image.path}: its mask could be {first.name} or {match.mask.name}; choose "
                "with --images 'GLOB' --masks 'GLOB'"
            )


def without_numbers(path: Path) -> str:
    """Return a file name without the number at its end: x_mask.png for x_mask_2.png."""
    return re.sub(r"[\W_]*\d+[\W_]*$", "", path.stem.lower()) + path.suffix.lower()


# --- readings -------------------------------------------------------------------------------------


def pairing_of(name: str, folder: Path, args: Namespace) -> Pairing | None:
    """Return the pairs of a folder in a format, None if it has another one."""
    files = list_files(folder)
    if name == "globs":
        return pair_globs(files, args) if args.images else None
    if args.images:
        return None

    files, notes = without_overlays(files)
    files = without_outer_folders(files)
    pairing = pair_folders(files)
    format_name = "folders"
    if pairing is None:
        pairing = pair_beside(files)
        format_name = "beside"
    if pairing is None:
        return None

    refuse_second_masks(pairing.matches)
    if any(match.class_name for match in pairing.matches):
        format_name = "class-folders"
    pairing.notes += notes
    return pairing if format_name == name else None


def complete_pairs(pairing: Pairing, skip_unpaired: bool) -> list[Pair]:
    """Return the images that have masks, and note in the pairing how many have none.

    Raises ValueError, one line, for images without a mask and masks without an image, unless
    skip_unpaired.
    """
    masks_of = {}  # image -> [MaskFile]
    for match in pairing.matches:
        masks_of.setdefault(match.image, []).append(MaskFile(match.mask.path, match.class_name))

    without = [image for image in pairing.images if image not in masks_of]
    if not masks_of:
        skip_unpaired = False  # nothing would be left
    if not skip_unpaired:
        refuse_unpaired(without, pairing)
    if without:
        pairing.notes.append(f"left out: {count(len(without), 'image')} without a mask")
    if pairing.left_masks:
        pairing.notes.append(f"left out: {count(len(pairing.left_masks), 'mask')} without an image")

    names = case_names([*masks_of])
    pairs = []
    for image, masks in masks_of.items():
        masks.sort(key=lambda mask: (mask.class_name, mask.path))
        pairs.append(Pair(names[image], image.path, tuple(masks), image.split))
    return pairs


def refuse_unpaired(without: list[File], pairing: Pairing) -> None:
    """Raise ValueError, one line, for images without a mask and masks without an image."""
    advice = f"add or rename files, leave them out with --skip-unpaired, or {NAME_FILES}"
    if without:
        raise ValueError(
            f"{without[0].path}: no mask belongs to this image ({len(without)} such of "
            f"{count(len(pairing.images), 'image')}); {advice}"
        )
    if pairing.left_masks:
        n = len(pairing.left_masks) + len(pairing.matches)
        raise ValueError(
            f"{pairing.left_masks[0].path}: no image belongs to this mask "
            f"({len(pairing.left_masks)} such of {n} masks); {advice}"
        )


def case_names(images: list[File]) -> dict[File, str]:
    """Return {image: its path without an ending}, without folders such as images/ if possible."""
    for place_of in (loose_place, exact_place, lambda file: file.folders):
        names = {}
        for image in images:
            names[image] = "/".join((*place_of(image), image.path.stem))
        if len({*names.values()}) == len(names):
            break
    return names


def first_line(pairing: Pairing, pairs: list[Pair]) -> str:
    """Return the line of the summary about the numbers, places and names of images and masks."""
    images = {}  # a dictionary keeps the order of its keys
    masks = []
    are_alike = True
    for match in pairing.matches:
        images[match.image] = True
        masks.append(match.mask)
        are_alike &= match.image.stem == match.mask.stem

    names = "named alike"
    if not are_alike:
        example = pairing.matches[0]
        names = f"named like {example.image.path.name} and {example.mask.path.name}"

    objects = max(len(pair.masks) for pair in pairs)
    several = f", up to {objects} of an image" if objects > 1 else ""
    return f"{describe_numbers([*images], masks)}{several}, {names}"


def recognise(name: str, folder: Path, args: Namespace) -> list[Reading]:
    """Return the reading of a folder in one of the formats here, [] if it has another one."""
    pairing = pairing_of(name, folder, args)
    if pairing is None:
        return []

    pairs = complete_pairs(pairing, args.skip_unpaired)
    values = mask_values.read_values(pairs, folder, args)
    is_known = not values.is_map or (folder / "classes.json").is_file()
    if name == "folders" and is_known and is_read_already(folder, args):
        raise ValueError(
            f"{folder}: needs no import, it is a data set already: python prepare.py check "
            f"{shlex.quote(str(folder))}; --format folders imports it all the same"
        )

    splits, source = stated_splits(folder, pairs)
    if splits:
        pairing.notes.append(f"splits are those of {source}")

    cases = []
    for pair in pairs:
        split, group = splits.get(pair.image, (pair.split, ""))
        cases.append(Case(pair.name, pair.image, values.reader_of(pair), split, group))

    summary = [first_line(pairing, pairs), *values.lines, *pairing.notes]
    return [ImageReading(name, summary, cases, values.classes, values.tables)]


def is_read_already(folder: Path, args: Namespace) -> bool:
    """Return True if train.py reads a folder as it is, and no option asks for anything else."""
    options = [args.format, args.groups, args.group_regex, args.prompt, args.each]
    options += [args.classes, args.mask_threshold]
    if any(option is not None for option in options) or args.skip_unpaired:
        return False

    try:
        splits = layouts.find_splits(folder)
        for split in splits:
            layouts.check_files_exist(layouts.read_entries(folder, split))
    except (ValueError, OSError):
        return False
    return bool(splits)


def stated_splits(folder: Path, pairs: list[Pair]) -> tuple[dict[Path, tuple[str, str]], str]:
    """Return {image: (split, patient)}, {} if no file states splits, and the folder of such files.

    These are the annotation files of a data set in our layout, or VOC's ImageSets/Segmentation.
    Only train, val and test count: the images of other splits are also in one of these.
    """
    splits = {}
    if (folder / "anns").is_dir():
        image_of = {pair.image.resolve(): pair.image for pair in pairs}
        for split in ("train", "val", "test"):
            if split not in layouts.find_splits(folder):
                continue
            for entry in layouts.read_entries(folder, split):
                splits[image_of.get(entry.image.resolve())] = (split, entry.group or "")
        return splits, "anns/"

    image_of = {layouts.composed(pair.image.stem): pair.image for pair in pairs}
    for path in layouts.files_below(folder, with_masks=True):
        is_list = path.suffix == ".txt" and path.stem in ("train", "val", "test")
        if is_list and path.parts[-3:-1] == ("ImageSets", "Segmentation"):
            for line in read_text(path).split():
                splits[image_of.get(layouts.composed(line))] = (path.stem, "")
    splits.pop(None, None)  # images without a mask
    return splits, "ImageSets/Segmentation/"


def format_of(name: str, about: str) -> Format:
    """Return the description of a format."""
    return Format(name, about, lambda folder, args: recognise(name, folder, args))


FORMATS = (
    format_of("folders", "images and masks in sister folders, such as images/ and masks/"),
    format_of("beside", "masks beside their images, such as x.png and x_mask.png"),
    format_of("class-folders", "a mask for each class: masks/liver/x.png, or x_liver.png"),
    format_of("globs", "the files that --images and --masks name"),
)
