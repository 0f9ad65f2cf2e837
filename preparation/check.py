"""Read whole data sets and report what is wrong with them."""

import hashlib
import io
import math
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

import data
from engine.ranges import GREY_LEVEL
from imaging import image_files, layouts, nifti, volumes

# How a file is read is decided in data.py and imaging/; here is only counted what came out.
# `findings` maps a kind of finding to its lines, each of which begins with the file it is about.

MASK_THRESHOLD = "values of binary masks above it, 0 to 255, are foreground; else their values tell"
MOST_LINES = 10  # printed of one kind; the rest are counted
SPLIT_ORDER = ("train", "val", "valid", "test")
MOST_FOREGROUND = 0.6  # of all pixels of a split; more are rather inverted masks

# How many grey levels 99 % of a file's pixels have. Measured on colonoscopy, skin, ultrasound and
# CT: masks, JPEG ones as well, have 1 to 5, images 87 to 245.
LEVELS_OF_MASKS = 24
LEVELS_OF_IMAGES = 40
SWAPPED_SAMPLE = 20  # masks of a split that are looked at, where its images look like masks

# Near-duplicates: two images are compared by the details of small grey thumbnails, as a cosine.
# Measured on 1000 images of colonoscopy, 22 of ultrasound, 9 of skin and 104 CT slices: copies
# that were saved as JPEG of quality 30, resized by 0.5 to 1.5, stretched to a square or brightened
# by 1.1 have 0.98 and more, brightened by 1.3 with white cut off 0.93 and more. Different scenes
# have at most 0.87, the next frame of a video or slice of a scan 0.90 to 0.99.
# Aligned images share their outline: 100 drawn fundus photographs reach 0.99. So the mean of all
# images is taken away before a second comparison: then different eyes have at most 0.89, the slices
# above 0.90 and more. The mean is known where there are enough images.
THUMBNAIL = 16  # pixels a side
NEAR = 0.95
NEAR_WITHOUT_MEAN = 0.90
ENOUGH_FOR_MEAN = 20  # images
NEAR_KIND = "nearly the same image in several splits: a copy, or the next frame of a video or scan"
MOST_NEAR = 3  # printed of them


@dataclass
class ImageFacts:
    size: tuple[int, int]  # H, W
    mode: str  # PIL's, as stored
    digest: bytes  # of the decoded pixels, so that a copy saved in another format is found
    levels: int  # see LEVELS_OF_MASKS
    thumbnail: np.ndarray  # see `thumbnail`
    non_finite: bool = False  # holds NaN or infinite pixels


@dataclass
class MaskFacts:
    size: tuple[int, int]
    mode: str
    counts: np.ndarray  # (3,256), of data.count_values
    turned: bool = False  # like its image, though nothing tells whether it had to be

    @property
    def largest(self):
        return int(np.flatnonzero(self.counts[0]).max())


@dataclass
class VolumeFacts:
    grid: nifti.Grid
    channels: int
    digest: bytes  # of the voxels
    counts: np.ndarray  # (256,): voxels of each class number, 255 of those that do not count


def digest_of(pixels):
    """Return a hash of an array's shape and content."""
    digest = hashlib.blake2b(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def main_levels(grey):
    """Return how many grey levels 99 % of an image's pixels have, the most frequent ones first."""
    counts = np.sort(grey.histogram())[::-1]
    return int(np.searchsorted(counts.cumsum(), 0.99 * counts.sum())) + 1


def thumbnail(grey):
    """Return the details of a grey image, (256,) float32 of length 1; zeros if it has none.

    Details are what differs from the surroundings, so that brightness and contrast do not count.
    """
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    small = np.asarray(small, np.float32)
    details = small - ndimage.uniform_filter(small, 5, mode="nearest")
    details = details.ravel() - details.mean()
    if details.std() < 1:  # less than a grey level is noise
        return np.zeros_like(details)
    return details / np.linalg.norm(details)


def image_facts(path):
    """Return what an image file holds, or the error that says why it cannot be read."""
    try:
        pixels, non_finite = image_files.load_image(path)
        mode = image_files.open_image(path, decode=False).mode
        grey = Image.fromarray(pixels).convert("L")
        levels = main_levels(grey)
        size = pixels.shape[:2]
        return ImageFacts(size, mode, digest_of(pixels), levels, thumbnail(grey), non_finite)
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{path}: does not fit into memory")


def mask_facts(entry, image):
    """Return the same of an entry's mask; `image` is what image_facts found for its image."""
    try:
        upright_as = entry.image if isinstance(image, ImageFacts) else None
        mask, turned = data.entry_mask(entry, upright_as)
        data.refuse_colours(entry)
        counts = data.count_values(entry, mask)
        mode = image_files.open_image(entry.mask, decode=False).mode
        return MaskFacts(mask.shape, mode, counts, turned)
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{entry.mask}: does not fit into memory")


def add_error(error, findings):
    """Add the finding that a file is missing or cannot be read."""
    missing = isinstance(error, FileNotFoundError)
    findings["missing files" if missing else "files that cannot be used"].append(str(error))


def read_splits(root, group_regex, findings):
    """Return {split: its entries} of a data set; a split that cannot be used is a finding."""
    places = layouts.splits(root)
    order = {name: k for k, name in enumerate(SPLIT_ORDER)}
    splits = {}
    for name in sorted(places, key=lambda name: (order.get(name, len(order)), name)):
        try:
            with redirect_stdout(io.StringIO()) as said:  # notes about files are only said
                splits[name] = layouts.annotations(root, name, group_regex)
        except (ValueError, OSError) as error:
            unusable = findings["splits that cannot be used"]
            if str(error) not in unusable:  # one classes.json spoils all splits
                unusable.append(str(error))
            continue

        for line in said.getvalue().splitlines():
            is_repeated = "repeated entries" in line
            kind = "entries listed twice" if is_repeated else "files that are no images"
            findings[kind].append(line)
        if not splits[name]:
            findings["splits without entries"].append(f"{places[name]}: has no entries")
    return splits


def read_images(splits, findings):
    """Return {path: ImageFacts} of the images that can be read; the rest are findings."""
    paths = [*dict.fromkeys(entry.image for entry in chain(*splits.values()))]
    images = {}
    bar = partial(tqdm, total=len(paths), desc="images", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for path, fact in bar(zip(paths, pool.map(image_facts, paths), strict=True)):
            if isinstance(fact, Exception):
                add_error(fact, findings)
            else:
                images[path] = fact
    return images


def read_masks(splits, images, findings):
    """Return {path: MaskFacts} of the masks that can be read; the rest are findings."""
    by_mask = {entry.mask: entry for entry in chain(*splits.values())}
    facts_of_images = [images.get(entry.image) for entry in by_mask.values()]
    masks = {}
    bar = partial(tqdm, total=len(by_mask), desc="masks", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        facts = pool.map(mask_facts, by_mask.values(), facts_of_images)
        for path, fact in bar(zip(by_mask, facts, strict=True)):
            if isinstance(fact, Exception):
                add_error(fact, findings)
            else:
                masks[path] = fact
    return masks


def are_exchanged(entries):
    """Return True if most images lie, by their names, in the folder of masks, and masks in theirs.

    Their endings differ, so that the files seem to be missing.
    """
    exchanged = 0
    for entry in entries:
        image = entry.mask.parent / entry.image.name
        mask = entry.image.parent / entry.mask.name
        exchanged += not entry.image.is_file() and image.is_file() and mask.is_file()
    return exchanged > len(entries) / 2


def look_exchanged(entries, images):
    """Return True if images have as few grey levels as masks, and their masks as many as images."""
    levels = [images[entry.image].levels for entry in entries if entry.image in images]
    if not levels or np.median(levels) > LEVELS_OF_MASKS:
        return False
    facts = [image_facts(entry.mask) for entry in entries[:SWAPPED_SAMPLE]]
    of_masks = [fact.levels for fact in facts if isinstance(fact, ImageFacts)]
    return bool(of_masks) and np.median(of_masks) >= LEVELS_OF_IMAGES


def read_pictures(root, splits, findings):
    """Return the splits whose images and masks are not exchanged, and {path: ImageFacts}.

    Of the others that is the one finding, as everything else that could be said of their masks
    follows from it.
    """
    swapped = [split for split, entries in splits.items() if are_exchanged(entries)]
    named_well = {split: entries for split, entries in splits.items() if split not in swapped}
    images = read_images(named_well, findings)
    for split, entries in named_well.items():
        if look_exchanged(entries, images):
            swapped.append(split)
    if swapped:
        line = f"{root}: images/ holds the masks, and masks/ the images ({', '.join(swapped)}); "
        findings["swapped folders"].append(f"{line}exchange the names of the two folders")
    checked = {split: entries for split, entries in splits.items() if split not in swapped}
    return checked, images


def check_sizes(splits, images, masks, findings):
    for split, entries in splits.items():
        for entry in entries:
            image, mask = images.get(entry.image), masks.get(entry.mask)
            if image and mask and image.size != mask.size:
                line = f"{entry.mask}: {wide(mask.size)}, its image {wide(image.size)} ({split})"
                findings["masks and images of different sizes"].append(line)


def check_pixels(images, masks, findings):
    """Add findings for images with non-finite pixels and for masks whose orientation is a guess."""
    for path, fact in images.items():
        if fact.non_finite:
            line = f"{path}: holds NaN or infinite pixels, read as 0"
            findings["images with NaN or infinite pixels"].append(line)
        if image_files.has_damaged_exif(path):
            line = f"{path}: its EXIF data is damaged, so that it is read as stored, not turned"
            findings["images with damaged EXIF data"].append(line)

    kind = "masks turned like their images, though they may be upright (see --mask-orientation)"
    for path, fact in masks.items():
        if fact.turned:
            line = f"{path}: has no EXIF tag and its image's orientation does not change the size"
            findings[kind].append(line)


def check_masks(root, splits, masks, findings, threshold=None):
    """Return foreground shares {(split, name): share}, {} without a rule, and the rule's words.

    threshold: of --mask-threshold. How masks are read is decided as in training, by
    data.mask_rule, here over all splits.
    """
    entries = []
    where = []
    for split, listed in splits.items():
        readable = [entry for entry in listed if entry.mask in masks]
        entries += readable
        where += [split] * len(readable)
    if not entries:
        return {}, data.BY_NUMBER

    counts = np.stack([masks[entry.mask].counts for entry in entries])  # (n,3,256)
    decision = data.mask_rule(entries, counts, threshold)
    if threshold is not None and decision.rule == data.BY_NUMBER:
        raise ValueError(f"--mask-threshold: the masks of {root} hold class numbers; remove it")
    for heading, line in decision.errors + decision.notes:
        findings[heading].append(line)
    if decision.errors and decision.rule != data.BY_NUMBER:
        return {}, "by no rule"

    shares = {}
    held = {}  # split -> of each of its masks, which classes it holds
    thresholds = data.mask_thresholds(entries, counts[:, 0], decision.rule)
    for split, entry, values, cut in zip(
        where, entries, counts[:, 0], thresholds.tolist(), strict=True
    ):
        inside = data.foreground_pixels(entry, values, cut)
        shares[split, entry.name] = inside / values.sum()
        n = len(entry.classes)
        held.setdefault(split, []).append(values[1:n] > 0 if n > 1 else [inside > 0])
        if entry.label is not None or n == 1:
            check_denial(entry, split, inside, masks[entry.mask].largest, cut, findings)
    check_held_classes(root, layouts.foreground(entries[0].classes), held, findings)
    check_foreground(root, shares, findings)
    return shares, decision.rule


def texts_of_entry(entry):
    """Return all texts of an entry that ask for something; p0 is empty."""
    return [text for texts in entry.prompts.values() for text in texts if text.strip()]


def check_denial(entry, split, inside, largest, cut, findings):
    """Compare the foreground of a binary mask with its prompts: "no polyp" or a polyp.

    An empty mask without prompts is that of a healthy patient.
    """
    wanted = f"> {cut}" if cut >= 0 else "of class 1"
    if entry.label is not None:
        wanted = f"== {entry.label}"
    texts = texts_of_entry(entry)
    denial = next((text for text in texts if text.lower().startswith("no ")), None)
    if not inside and texts and not denial:
        line = f"{entry.mask}: no pixel {wanted}, the largest is {largest} ({split})"
        findings["empty masks whose prompts ask for something"].append(line)
    if inside and denial:
        line = f"{entry.mask}: {inside} pixels, yet {denial!r} ({split})"
        findings["prompts that deny what the mask shows"].append(line)


def check_held_classes(root, names, held, findings):
    """Add a finding for each class that no mask holds, or none of those that are trained on.

    held: {split: [of a mask, for each of the K names, whether it holds that class]}.
    """
    by_split = {split: np.any(rows, axis=0) for split, rows in held.items()}
    in_any = np.any([*by_split.values()], axis=0)
    in_train = by_split.get("train", in_any)
    for k, name in enumerate(names):
        if not in_any[k]:
            findings["classes that no mask holds"].append(f"{root}: no mask holds {name!r}")
        elif not in_train[k]:
            splits = ", ".join(split for split, row in by_split.items() if row[k])
            line = f"{root}: no mask of train holds {name!r}, only {splits}"
            findings["classes that no mask holds"].append(line)


def check_foreground(root, shares, findings):
    """Add a finding for each split most of which is foreground, {(split, name): share}."""
    by_split = defaultdict(list)
    for (split, _), share in shares.items():
        by_split[split].append(share)
    for split, values in by_split.items():
        mean = np.mean(values)
        if mean > MOST_FOREGROUND:
            line = f"{root}: {mean:.0%} of {split} is foreground; are the masks inverted, or is "
            line += "the background another number than 0?"
            findings[f"foreground above {MOST_FOREGROUND:.0%}"].append(line)


def check_prompt_types(root, splits, shares, findings):
    """Return {prompt type: how often each of its texts occurs} over all splits, p0 first.

    shares: of foreground, {(split, name): share}. Healthy images need no prompts.
    """
    texts = defaultdict(Counter)
    for entry in chain(*splits.values()):
        for kind, listed in entry.prompts.items():
            texts[kind].update(listed)
    known = sorted(filter(layouts.is_prompt_type, texts), key=lambda kind: (len(kind), kind))
    for split, entries in splits.items():
        asked = [e for e in entries if texts_of_entry(e) or shares.get((split, e.name)) != 0]
        for kind in texts:
            lacking = [entry.name for entry in asked if not entry.prompts.get(kind)]
            having = [entry.name for entry in entries if kind in entry.prompts]
            if kind in known and lacking:
                line = f"{split}.json: {kind} is missing in {some(lacking)}"
                findings["prompt types that entries lack"].append(f"{root}/anns/{line}")
            if kind not in known and having:
                line = f"{split}.json: {kind!r} in {some(having)}; the types are p0, p1, ..."
                findings["unknown prompt types"].append(f"{root}/anns/{line}")
    return {kind: texts[kind] for kind in known}


def show(line):
    """Print a line. Characters that nothing can print, of damaged file names, are escaped."""
    print(line.encode("utf-8", "backslashreplace").decode())


def role_of(split):
    """Return what a split is for: train, val or, of all others, test."""
    return {"train": "train", "val": "val", "valid": "val"}.get(split, "test")


def check_patients(splits, findings):
    """Add a finding for each patient (`group`) in more than one of train, val and test."""
    first = {}  # patient -> split and image where it comes first
    reported = set()
    for split, entries in splits.items():
        for entry in entries:
            if entry.group is None:
                continue
            key = entry.root, entry.group
            other, image = first.setdefault(key, (split, entry.image))
            if role_of(other) != role_of(split) and (key, split) not in reported:
                reported.add((key, split))
                line = f"{entry.image} ({split}): patient {entry.group} is also in {other}"
                findings["patients in several splits"].append(f"{line}, {image.name}")


def check_overlap(seen, findings):
    """Return the images that are in more than one of training, validation and test: findings.

    seen: (path, split, facts) of each. Test files may share images with each other: they ask the
    same images for other things.
    """
    by_digest = {}
    by_stem = {}
    reported = set()
    for path, split, fact in seen:
        role = role_of(split)
        stem = str(path.with_suffix("")).lower()  # a.png and A.jpg: one picture, saved again?
        same_role, same_split, same = by_digest.setdefault(fact.digest, (role, split, path))
        near_role, near_split, near = by_stem.setdefault(stem, (role, split, path))
        if same_role != role:
            line = f"{path} ({split}): also in {same_split}" + f" as {same}" * (same != path)
            findings["images in several splits"].append(line)
            reported.add(path)
        elif near_role != role:
            line = f"{path} ({split}): named like {near} ({near_split})"
            findings["images named alike in several splits"].append(line)
            reported.add(path)
    return reported


def check_near(seen, reported, findings):
    """Add a finding for each image of val or test that is nearly one of train, or of val.

    seen: as of `check_overlap`, which has reported the images in `reported`. All pairs are compared
    by matrix products: 10,000 against 10,000 images take a second.
    """
    seen = [row for row in seen if isinstance(row[2], ImageFacts) and row[2].thumbnail.any()]
    seen = [*{(path, role_of(split)): (path, split, fact) for path, split, fact in seen}.values()]
    if not seen:
        return

    details = np.stack([fact.thumbnail for _, _, fact in seen])  # (n,256)
    mean = details.mean(axis=0) if len(seen) >= ENOUGH_FOR_MEAN else np.zeros_like(details[0])
    unlike = details - mean  # what others do not share
    unlike /= np.maximum(np.linalg.norm(unlike, axis=1, keepdims=True), 1e-6)
    roles = np.array([role_of(split) for _, split, _ in seen])
    reported = set(reported)
    for role, earlier in ("val", ["train"]), ("test", ["train", "val"]):
        others = np.flatnonzero(np.isin(roles, earlier))
        later = [i for i in np.flatnonzero(roles == role) if seen[i][0] not in reported]
        for start in range(0, len(later) if len(others) else 0, 1024):
            chunk = later[start : start + 1024]
            alike = details[chunk] @ details[others].T  # (chunk,others)
            if alike.max() < NEAR:
                continue
            alike[unlike[chunk] @ unlike[others].T < NEAR_WITHOUT_MEAN] = 0
            for row, best in enumerate(alike.argmax(axis=1)):
                if alike[row, best] >= NEAR:
                    path, split, _ = seen[chunk[row]]
                    other, other_split, _ = seen[others[best]]
                    line = f"{path} ({split}): nearly {other} ({other_split})"
                    findings[NEAR_KIND].append(line)


def wide(size):
    """(H, W) -> "WxH"."""
    return f"{size[1]}x{size[0]}"


def some(names):
    """How many names there are and the first of them."""
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def modes(facts):
    """ "RGB" or "RGB 12, L 3"."""
    counts = Counter(fact.mode for fact in facts).most_common()
    return counts[0][0] if len(counts) == 1 else ", ".join(f"{mode} {n}" for mode, n in counts)


def describe_splits(splits, noun="images"):
    """Yield (split, how many entries and images it has)."""
    paths = {split: {entry.image for entry in entries} for split, entries in splits.items()}
    earlier = {}
    for split, entries in splits.items():
        within = next((name for name in earlier if paths[split] <= earlier[name]), None)
        text = f"{len(entries)} entries, {len(paths[split])} {noun}"
        yield split, text + (f", all of them in {within}" if within and entries else "")
        earlier[split] = paths[split]


def describe_shares(splits, shares, noun="an image"):
    """Yield (heading, text) about the foreground shares {(split, name): share}."""
    if not shares:
        return
    share = np.array(list(shares.values()))
    ends = f"{share.min():.1%} to {share.max():.1%}"
    yield "foreground", f"{share.mean():.1%} of {noun} in the mean, {ends}"

    empty = [name for (_, name), value in shares.items() if value == 0]
    text = some(empty) if empty else "none"
    healthy = 0
    for split, entries in splits.items():
        for entry in entries:
            healthy += shares.get((split, entry.name)) == 0 and not texts_of_entry(entry)
    if healthy and any(map(texts_of_entry, chain(*splits.values()))):
        text += f", {healthy} of them without prompts"
    yield "empty masks", text


def describe_pictures(splits, images, masks, shares, rule, texts):
    """Yield what a data set of images holds, (heading, text)."""
    yield from describe_splits(splits)
    if images:
        sizes = sorted((fact.size for fact in images.values()), key=math.prod)
        low, middle, high = wide(sizes[0]), wide(sizes[len(sizes) // 2]), wide(sizes[-1])
        yield "images", f"{len(images)}, {modes(images.values())}; {low} to {high}, median {middle}"
    if masks:
        values = np.flatnonzero(sum(fact.counts[0] for fact in masks.values()))
        found = ", ".join(map(str, values))
        if len(values) > 8:
            found = f"{len(values)} values from {values[0]} to {values[-1]}"
        read = rule.replace(data.GIVEN, "> ")
        yield "masks", f"{len(masks)}, {modes(masks.values())}; {found}; read {read}"
    yield from describe_shares(splits, shares)
    for kind, counter in texts.items():
        example = f'"{textwrap.shorten(next(iter(counter), ""), 70)}"'
        yield kind, f"{len(counter)} text{'s' * (len(counter) > 1)}: {example}"


def tokenizers_of(model):
    """Return {recipes: tokenizer} of a model that reads, for each text length; {} without a model.

    Also {} if the model's vocabulary cannot be had, which is printed.
    """
    if model is None:
        return {}
    from recipes import FAMILIES  # here, as importing every model takes a second

    readers = [name for name, family in FAMILIES.items() if family.reads_text()]
    if model not in readers:
        raise ValueError(f"--model {model}: reads no prompts; take one of {', '.join(readers)}")
    try:
        return FAMILIES[model].tokenizers()
    except (ValueError, OSError) as error:
        print(f"--model {model}: prompts that are cut are not counted ({error})")
        return {}


def check_tokens(root, model, tokenizers, texts, findings):
    """Yield what a model sees of the prompts, as (heading, text): equal ones, and those it cuts.

    Those that the default recipe cuts are findings, too.
    """
    if not tokenizers:
        return
    from recipes.images import describe_cuts  # here, for the same reason

    for recipes, tokenizer in tokenizers.items():
        lines = []
        for kind, counter in texts.items():
            different = {tuple(tokenizer(text)[0].tolist()) for text in counter}
            if len(different) < len(counter):
                lines.append((kind, f"{len(counter)} texts, only {len(different)} to the model"))
            cuts = describe_cuts(counter, tokenizer)
            if cuts:
                lines.append((kind, cuts))
            if cuts and "default" in recipes.split(", "):
                findings[f"prompts that {model} cuts"].append(f"{root}: {kind}, {cuts}")
        cut = "" if lines else "; no text is cut"
        yield model, f"takes {tokenizer.length} tokens of a prompt (--recipe {recipes}){cut}"
        yield from lines


def check_images(root, args, tokenizers, findings):
    """Check a data set of images and print what it holds. Return (path, split, facts) of each."""
    splits = read_splits(root, args.group_regex, findings)
    for split, entries in splits.items():
        splits[split] = data.with_mask_orientation(entries, args.mask_orientation)
    checked, images = read_pictures(root, splits, findings)
    masks = read_masks(checked, images, findings)

    check_sizes(checked, images, masks, findings)
    check_pixels(images, masks, findings)
    shares, rule = check_masks(root, checked, masks, findings, args.mask_threshold)
    texts = check_prompt_types(root, splits, shares, findings)
    check_patients(splits, findings)

    show(str(root))
    for heading, text in describe_pictures(splits, images, masks, shares, rule, texts):
        show(f"  {heading:13} {text}")
    for heading, text in check_tokens(root, args.model, tokenizers, texts, findings):
        show(f"  {heading:13} {text}")
    return seen_once(splits, images)


def seen_once(splits, facts):
    """Return (path, split, facts) of each image of each split, for which there are facts."""
    seen = []
    for split, entries in splits.items():
        paths = dict.fromkeys(entry.image for entry in entries if entry.image in facts)
        seen += [(path, split, facts[path]) for path in paths]
    return seen


def volume_facts(entry, findings):
    """Return the VolumeFacts of an entry, None if a file cannot be used, which is a finding."""
    image = None
    try:
        image, grid = nifti.read_volume((entry.image, *entry.more))
        if "CT" in (entry.modality or "").upper():
            volumes.say_if_not_hu(entry.image, volumes.hu_facts(image))
    except (ValueError, OSError) as error:
        add_error(error, findings)
    try:
        if image is None:
            nifti.check_whole(entry.mask)
            return None
        labels = nifti.read_labels(entry.mask, grid, entry.labels, entry.unnamed)
    except (ValueError, OSError) as error:
        add_error(error, findings)
        return None
    counts = np.bincount(labels.ravel(), minlength=256)
    return VolumeFacts(grid, len(image), digest_of(image), counts)


def read_cases(splits, findings):
    """Return {image: VolumeFacts} of the cases whose files can be used; the rest are findings.

    What training says of files that it reads all the same are findings as well.
    """
    by_files = {}
    for entry in chain(*splits.values()):
        by_files[entry.image, entry.mask] = entry
    facts = {}
    for entry in tqdm(by_files.values(), desc="volumes", disable=None, leave=False):
        try:
            with redirect_stdout(io.StringIO()) as said:
                fact = volume_facts(entry, findings)
        except MemoryError:
            add_error(ValueError(f"{entry.image}: does not fit into memory"), findings)
            continue
        if fact:
            facts[entry.image] = fact
        for line in said.getvalue().splitlines():
            findings["remarks about volumes that can be used"].append(line)
    return facts


def check_labels(root, splits, facts, findings):
    """Return foreground shares {(split, name): share}, and {class: label maps that hold it}."""
    shares = {}
    held = {}
    first = next(chain(*splits.values()))
    names = layouts.foreground(first.classes)
    regions = first.regions or [(k,) for k in range(1, len(first.labels))]
    for split, entries in splits.items():
        for entry in entries:
            if entry.image not in facts:
                continue
            counts = facts[entry.image].counts
            inside = counts[1:255].sum()
            shares[split, entry.name] = inside / counts.sum()
            held.setdefault(split, []).append([counts[[*own]].any() for own in regions])
            if counts[255] and not inside:
                line = f"{entry.mask}: holds 0 and 255 alone, and 255 does not count ({split})"
                findings["label maps of 0 and 255 alone"].append(line)

    if held:
        check_held_classes(root, names, held, findings)
        check_foreground(root, shares, findings)
    rows = [*chain(*held.values())]
    return shares, {name: sum(row[k] for row in rows) for k, name in enumerate(names)}


def describe_cases(splits, facts, shares, held):
    """Yield what a data set of volumes holds, (heading, text)."""
    yield from describe_splits(splits, "volumes")
    by_image = {entry.image: entry for entry in chain(*splits.values()) if entry.image in facts}
    if not by_image:
        return
    entries = [*by_image.values()]
    grids = [facts[entry.image].grid for entry in entries]
    yield "volumes", volumes.VolumeSet(entries, grids).describe()
    yield "channels", " or ".join(map(str, sorted({fact.channels for fact in facts.values()})))
    shown = ", ".join(f"{name} in {n}" for name, n in held.items())
    yield "classes", f"{shown}, of {len(shares)} label maps"
    yield from describe_shares(splits, shares, "a volume")


def check_volumes(root, args, findings):
    """Check a data set of volumes and print what it holds. Return (path, split, facts) of each."""
    try:
        splits = layouts.read_volumes(root, args.group_regex)
    except (ValueError, OSError) as error:
        findings["splits that cannot be used"].append(str(error))
        show(str(root))
        return []

    facts = read_cases(splits, findings)
    shares, held = check_labels(root, splits, facts, findings)
    check_patients(splits, findings)
    channels = Counter(fact.channels for fact in facts.values())
    for path, fact in facts.items():
        usual = channels.most_common(1)[0][0]
        if fact.channels != usual:
            line = f"{path}: {fact.channels} channels, most volumes have {usual}"
            findings["volumes with other channels"].append(line)

    show(str(root))
    for heading, text in describe_cases(splits, facts, shares, held):
        show(f"  {heading:13} {text}")
    return seen_once(splits, facts)


def refuse_misuse(args):
    """Raise FileNotFoundError or ValueError, one line, before anything is read."""
    for root in args.data:
        if not layouts.has_volumes(root) and not layouts.splits(root):
            need = "images/ and masks/, with anns/*.json or within train/, val/, test/"
            raise FileNotFoundError(f"{root}: no data set here; expected {need}")
    if all(layouts.has_volumes(root) for root in args.data):
        for name in ("model", "mask_orientation", "mask_threshold"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: has no effect on volumes; remove it")


def check(args):
    """Read whole data sets of images or volumes and report what is wrong with them.

    The exit status is 1 if there are findings.
    """
    refuse_misuse(args)
    findings = defaultdict(list)
    seen = []
    tokenizers = tokenizers_of(args.model)
    for root in args.data:
        if layouts.has_volumes(root):
            seen += check_volumes(root, args, findings)
        else:
            seen += check_images(root, args, tokenizers, findings)
    reported = check_overlap(seen, findings)
    check_near(seen, reported, findings)

    total = sum(map(len, findings.values()))
    show(f"findings: {total or 'none'}")
    for kind, lines in findings.items():
        most = MOST_NEAR if kind == NEAR_KIND else MOST_LINES
        show(f"  {kind}: {len(lines)}")
        for line in lines[:most]:
            show(f"    {line}")
        if len(lines) > most:
            show(f"    and {len(lines) - most} more")
    return 1 if total else 0


def options(command):
    """Describe `prepare.py check`."""
    add = command(check, "read data sets and report what is wrong")
    help = "folder with images/ and masks/, or with dataset.json"
    add("data", type=Path, nargs="+", metavar="DATA", help=help)
    help = "how masks without an EXIF tag lie where the size cannot tell: stored like the image, "
    help += "or upright; without it they are turned and listed"
    add("--mask-orientation", choices=image_files.ORIENTATIONS, help=help)
    help = "count the prompts that this model cuts at its text length: cris, clipseg, biomedclipseg"
    add("--model", metavar="NAME", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
    help = "the patient in an image's name: the expression, or its first group; one patient in two "
    help += "splits is a finding; else the key `group` of entries counts"
    add("--group-regex", metavar="REGEX", help=help)
