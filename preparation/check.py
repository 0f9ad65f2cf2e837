"""Read whole data sets and report what is wrong with them.

data.py and imaging/ decide how a file is read; this file counts what they return. Functions add
what is wrong to `findings`: kind of finding -> lines. A line begins with the file or folder that it
is about.
"""

import hashlib
import io
import math
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

import data
from engine.ranges import GREY_LEVEL
from imaging import image_files, layouts, nifti, volumes

MASK_THRESHOLD = (
    "binary masks: pixels above this grey level, 0 to 255, are foreground (default: chosen from "
    "the grey levels of the masks)"
)
MOST_LINES = 10  # printed per kind of finding; the rest are counted
SPLIT_ORDER = ("train", "val", "valid", "test")
MOST_FOREGROUND = 0.6  # share of all pixels of a split; above it, masks are probably inverted

# How many grey levels 99 % of a file's pixels have. Measured on colonoscopy, skin, ultrasound and
# CT: masks, JPEG masks as well, have 1 to 5, images 87 to 245.
LEVELS_OF_MASKS = 24
LEVELS_OF_IMAGES = 40
SWAPPED_SAMPLE = 20  # masks of a split that are read to see if they are images

# Near-duplicates: the cosine similarity of the details of two small grey thumbnails. Measured on
# 1000 images of colonoscopy, 22 of ultrasound, 9 of skin and 104 CT slices: copies that were saved
# as JPEG of quality 30, resized by 0.5 to 1.5, stretched to a square or brightened by 1.1 reach
# 0.98 and more, copies brightened by 1.3 and clipped at white 0.93 and more. Different scenes reach
# at most 0.87, the next frame of a video or slice of a scan 0.90 to 0.99.
# Aligned images share their outline: 100 drawn fundus photographs reach 0.99. A second comparison
# therefore subtracts the mean of all images first: different eyes then reach at most 0.89, the CT
# slices above 0.90 and more. The mean is only known if there are enough images.
THUMBNAIL = 16  # pixels per side
NEAR = 0.95
NEAR_WITHOUT_MEAN = 0.90
ENOUGH_FOR_MEAN = 20  # images
NEAR_KIND = "nearly the same image in several splits: a copy, or the next frame of a video or scan"
MOST_NEAR = 3  # printed per data set of this kind
CHUNK = 1024  # images that are compared with all others at a time


@dataclass
class ImageFacts:
    size: tuple[int, int]  # H, W
    mode: str  # PIL's, as stored
    digest: bytes  # of the decoded pixels, the same for copies in other formats
    levels: int  # see `main_levels`
    thumbnail: np.ndarray  # see `thumbnail_details`
    has_non_finite: bool = False  # NaN or infinite pixels


@dataclass
class MaskFacts:
    size: tuple[int, int]  # H, W
    mode: str  # PIL's, as stored
    counts: np.ndarray  # (3,256), see data.count_values
    is_turned: bool = False  # like its image, although it may have been upright already

    @property
    def largest(self):
        return int(np.flatnonzero(self.counts[0]).max())


@dataclass
class VolumeFacts:
    grid: nifti.Grid
    channels: int
    digest: bytes  # of the voxels
    counts: np.ndarray  # (256,): voxels per class index; 255 are those to be ignored


# --- single image files ---------------------------------------------------------------------------


def digest_of(pixels):
    """Return a hash of an array's shape and content."""
    digest = hashlib.blake2b(str(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.digest()


def main_levels(grey):
    """Return how many grey levels 99 % of an image's pixels have, the most frequent ones first."""
    counts = np.sort(grey.histogram())[::-1]
    return int(np.searchsorted(counts.cumsum(), 0.99 * counts.sum())) + 1


def thumbnail_details(grey):
    """Return the details of a grey image, (256,) float32 of length 1; zeros if it has none.

    Details are differences from the surroundings, so brightness and contrast have no effect.
    """
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    small = np.asarray(small, np.float32)
    details = small - ndimage.uniform_filter(small, 5, mode="nearest")
    details = details.ravel() - details.mean()
    if details.std() < 1:  # less than a grey level is noise
        return np.zeros_like(details)
    return details / np.linalg.norm(details)


def image_facts(path):
    """Return the ImageFacts of a file, or the error that says why it cannot be read."""
    try:
        pixels, has_non_finite = image_files.load_image(path)
        mode = image_files.open_image(path, decode=False).mode
        grey = Image.fromarray(pixels).convert("L")
        return ImageFacts(
            size=pixels.shape[:2],
            mode=mode,
            digest=digest_of(pixels),
            levels=main_levels(grey),
            thumbnail=thumbnail_details(grey),
            has_non_finite=has_non_finite,
        )
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{path}: does not fit into memory")


def mask_facts(entry, image):
    """Return the MaskFacts of an entry's mask, or the error that says why it cannot be read.

    image: the ImageFacts of the entry's image, None if it cannot be read.
    """
    try:
        upright_as = entry.image if isinstance(image, ImageFacts) else None
        mask, is_turned = data.entry_mask(entry, upright_as)
        data.refuse_colours(entry)
        counts = data.count_values(entry, mask)
        mode = image_files.open_image(entry.mask, decode=False).mode
        return MaskFacts(mask.shape, mode, counts, is_turned)
    except (ValueError, OSError) as error:
        return error
    except MemoryError:
        return ValueError(f"{entry.mask}: does not fit into memory")


# --- reading a data set of images -----------------------------------------------------------------


def add_error(error, findings):
    """Add a finding for a file that is missing or cannot be read."""
    is_missing = isinstance(error, FileNotFoundError)
    kind = "missing files" if is_missing else "files that cannot be used"
    findings[kind].append(str(error))


def split_order(split):
    """Return a sort key: train, val and test come first, other splits follow by name."""
    position = SPLIT_ORDER.index(split) if split in SPLIT_ORDER else len(SPLIT_ORDER)
    return position, split


def read_splits(root, group_regex, findings):
    """Return {split: its entries} of a data set; splits that cannot be used are findings."""
    paths = layouts.find_splits(root)
    splits = {}
    for split in sorted(paths, key=split_order):
        try:
            with redirect_stdout(io.StringIO()) as printed:
                splits[split] = layouts.read_entries(root, split, group_regex)
        except (ValueError, OSError) as error:
            unusable = findings["splits that cannot be used"]
            if str(error) not in unusable:  # a bad classes.json gives one error for all splits
                unusable.append(str(error))
            continue

        for line in printed.getvalue().splitlines():
            is_repeated = "repeated entries" in line
            kind = "entries listed twice" if is_repeated else "files that are no images"
            findings[kind].append(line)
        if not splits[split]:
            findings["splits without entries"].append(f"{paths[split]}: has no entries")
    return splits


def read_files(read, jobs, title, findings):
    """Call read(*arguments) for each path of jobs, {path: arguments}, in threads.

    Return {path: facts}; a path for which `read` returns an error is a finding instead. title: of
    the progress bar.
    """
    facts_by_path = {}
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda arguments: read(*arguments), jobs.values())
        pairs = zip(jobs, results, strict=True)
        for path, facts in tqdm(pairs, title, total=len(jobs), disable=None, leave=False):
            if isinstance(facts, Exception):
                add_error(facts, findings)
            else:
                facts_by_path[path] = facts
    return facts_by_path


def read_images(splits, findings):
    """Return {path: ImageFacts} of the images that can be read; the others are findings."""
    jobs = {entry.image: (entry.image,) for entry in chain(*splits.values())}
    return read_files(image_facts, jobs, "images", findings)


def read_masks(splits, images, findings):
    """Return {path: MaskFacts} of the masks that can be read; the others are findings."""
    jobs = {}
    for entry in chain(*splits.values()):
        jobs[entry.mask] = (entry, images.get(entry.image))
    return read_files(mask_facts, jobs, "masks", findings)


def are_names_swapped(entries):
    """Return True if most images lie in the folder of masks, by their names, and masks in theirs.

    Their endings differ, so the files seem to be missing where they are expected.
    """
    swapped = 0
    for entry in entries:
        image = entry.mask.parent / entry.image.name
        mask = entry.image.parent / entry.mask.name
        if not entry.image.is_file() and image.is_file() and mask.is_file():
            swapped += 1
    return swapped > len(entries) / 2


def are_contents_swapped(entries, images):
    """Return True if images have as few grey levels as masks, and their masks as many as images."""
    levels = [images[entry.image].levels for entry in entries if entry.image in images]
    if not levels or np.median(levels) > LEVELS_OF_MASKS:
        return False

    levels = []
    for entry in entries[:SWAPPED_SAMPLE]:
        facts = image_facts(entry.mask)
        if isinstance(facts, ImageFacts):
            levels.append(facts.levels)
    return bool(levels) and np.median(levels) >= LEVELS_OF_IMAGES


def read_pictures(root, splits, findings):
    """Return the splits whose images and masks are not swapped, and {path: ImageFacts}.

    A swap is the only finding about the masks of a split: all others would follow from it.
    """
    swapped = []
    readable = {}
    for split, entries in splits.items():
        if are_names_swapped(entries):
            swapped.append(split)
        else:
            readable[split] = entries

    images = read_images(readable, findings)
    for split, entries in readable.items():
        if are_contents_swapped(entries, images):
            swapped.append(split)

    if swapped:
        line = (
            f"{root}: images/ holds the masks, and masks/ the images ({', '.join(swapped)}); "
            "exchange the names of the two folders"
        )
        findings["swapped folders"].append(line)
    correct = {split: entries for split, entries in splits.items() if split not in swapped}
    return correct, images


# --- images and masks -----------------------------------------------------------------------------


def check_sizes(splits, images, masks, findings):
    """Add a finding for each mask that does not have the size of its image."""
    for split, entries in splits.items():
        for entry in entries:
            image = images.get(entry.image)
            mask = masks.get(entry.mask)
            if image and mask and image.size != mask.size:
                sizes = f"{width_by_height(mask.size)}, its image {width_by_height(image.size)}"
                line = f"{entry.mask}: {sizes} ({split})"
                findings["masks and images of different sizes"].append(line)


def check_pixels(images, masks, findings):
    """Add findings for images with NaN or damaged EXIF data, and for masks turned on a guess."""
    for path, facts in images.items():
        if facts.has_non_finite:
            line = f"{path}: holds NaN or infinite pixels, read as 0"
            findings["images with NaN or infinite pixels"].append(line)
        if image_files.has_damaged_exif(path):
            line = f"{path}: its EXIF data is damaged, so that it is read as stored, not turned"
            findings["images with damaged EXIF data"].append(line)

    kind = "masks turned like their images, though they may be upright (see --mask-orientation)"
    for path, facts in masks.items():
        if facts.is_turned:
            line = f"{path}: has no EXIF tag and its image's orientation does not change the size"
            findings[kind].append(line)


def check_masks(root, splits, masks, findings, threshold=None):
    """Check what masks hold. Return foreground shares {(split, name): share} and the rule's words.

    The rule by which masks are read is that of training, data.mask_rule, over all splits together;
    the shares are {} if there is none. threshold: value of --mask-threshold. Raise ValueError if
    it has no effect.
    """
    readable = []  # (split, entry)
    for split, entries in splits.items():
        readable += [(split, entry) for entry in entries if entry.mask in masks]
    if not readable:
        return {}, data.BY_NUMBER

    entries = [entry for _, entry in readable]
    counts = np.stack([masks[entry.mask].counts for entry in entries])  # (n,3,256)
    decision = data.mask_rule(entries, counts, threshold)
    if threshold is not None and decision.rule == data.BY_NUMBER:
        raise ValueError(f"--mask-threshold: the masks of {root} hold class numbers; remove it")
    for kind, line in decision.errors + decision.notes:
        findings[kind].append(line)
    if decision.errors and decision.rule != data.BY_NUMBER:
        return {}, "by no rule"

    values = counts[:, 0]  # (n,256)
    limits = data.mask_thresholds(entries, values, decision.rule).tolist()
    shares = {}
    presence = defaultdict(list)  # split -> for each of its masks, which classes it holds
    for (split, entry), row, limit in zip(readable, values, limits, strict=True):
        foreground = data.foreground_pixels(entry, row, limit)
        shares[split, entry.name] = foreground / row.sum()
        classes = len(entry.classes)
        presence[split].append(row[1:classes] > 0 if classes > 1 else [foreground > 0])

        if entry.label is not None or classes == 1:
            largest = masks[entry.mask].largest
            contradiction = compare_with_prompts(entry, foreground, largest, limit)
            if contradiction:
                kind, line = contradiction
                findings[kind].append(f"{line} ({split})")

    check_classes(root, layouts.foreground(entries[0].classes), presence, findings)
    check_foreground(root, shares, findings)
    return shares, decision.rule


def texts_of_entry(entry):
    """Return all texts of an entry that are not empty, as p0 is."""
    texts = chain(*entry.prompts.values())
    return [text for text in texts if text.strip()]


def compare_with_prompts(entry, foreground, largest, limit):
    """Return a finding (kind, line) if a binary mask contradicts its prompts, else None.

    An empty mask contradicts prompts that ask for something, a mask with foreground contradicts a
    prompt such as "no polyp". An empty mask without prompts is that of a healthy patient.

    foreground: pixels; largest: largest value of the mask; limit: value that foreground exceeds, -1
    where masks hold class numbers.
    """
    texts = texts_of_entry(entry)
    denial = next((text for text in texts if text.lower().startswith("no ")), None)
    if foreground and denial:
        kind = "prompts that deny what the mask shows"
        return kind, f"{entry.mask}: {foreground} pixels, yet {denial!r}"
    if foreground or denial or not texts:
        return None

    if entry.label is not None:
        wanted = f"== {entry.label}"
    elif limit >= 0:
        wanted = f"> {limit}"
    else:
        wanted = "of class 1"
    kind = "empty masks whose prompts ask for something"
    return kind, f"{entry.mask}: no pixel {wanted}, the largest is {largest}"


def check_classes(root, names, presence, findings):
    """Add a finding for each class that no mask holds, or none of the training masks.

    names: of the K classes. presence: {split: for each mask, K booleans: does it hold the class?}.
    """
    by_split = {split: np.any(rows, axis=0) for split, rows in presence.items()}  # (K,) each
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
    """Add a finding for each split that is mostly foreground. shares: {(split, name): share}."""
    by_split = defaultdict(list)
    for (split, _), share in shares.items():
        by_split[split].append(share)

    for split, values in by_split.items():
        mean = np.mean(values)
        if mean > MOST_FOREGROUND:
            line = (
                f"{root}: {mean:.0%} of {split} is foreground; are the masks inverted, or is the "
                "background another number than 0?"
            )
            findings[f"foreground above {MOST_FOREGROUND:.0%}"].append(line)


def check_prompt_types(root, splits, shares, findings):
    """Return {prompt type: Counter of its texts} over all splits, p0 first.

    Add findings for types that entries lack and for unknown types. shares: of foreground, {(split,
    name): share}; healthy images need no prompts.
    """
    texts = defaultdict(Counter)
    for entry in chain(*splits.values()):
        for prompt_type, listed in entry.prompts.items():
            texts[prompt_type].update(listed)
    known = [prompt_type for prompt_type in texts if layouts.is_prompt_type(prompt_type)]
    known.sort(key=lambda prompt_type: (len(prompt_type), prompt_type))

    for split, entries in splits.items():
        prompted = []
        for entry in entries:
            if texts_of_entry(entry) or shares.get((split, entry.name)) != 0:
                prompted.append(entry)

        file = f"{root}/anns/{split}.json"
        for prompt_type in texts:
            if prompt_type in known:
                lacking = [entry.name for entry in prompted if not entry.prompts.get(prompt_type)]
                is_elsewhere = layouts.is_named_type(prompt_type) and len(lacking) == len(prompted)
                if lacking and not is_elsewhere:  # some types are those of test splits alone
                    line = f"{file}: {prompt_type} is missing in {count_and_names(lacking)}"
                    findings["prompt types that entries lack"].append(line)
            else:
                users = [entry.name for entry in entries if prompt_type in entry.prompts]
                if users:
                    occurrence = f"{file}: {prompt_type!r} in {count_and_names(users)}"
                    findings["unknown prompt types"].append(
                        f"{occurrence}; the types are p0, p1, ... and m_NAME"
                    )
    return {prompt_type: texts[prompt_type] for prompt_type in known}


# --- leaks between training, validation and test --------------------------------------------------


def role_of(split):
    """Return the role of a split: train, val or, for all others, test."""
    return layouts.split_role(split)


def check_patients(splits, findings):
    """Add a finding for each patient (`group`) in more than one of train, val and test."""
    first = {}  # patient -> split and image of its first entry
    reported = set()
    for split, entries in splits.items():
        for entry in entries:
            if entry.group is None:
                continue
            patient = (entry.root, entry.group)
            first_split, first_image = first.setdefault(patient, (split, entry.image))
            is_leak = role_of(first_split) != role_of(split)
            if is_leak and (patient, split) not in reported:
                reported.add((patient, split))
                line = f"{entry.image} ({split}): patient {entry.group} is also in {first_split}"
                findings["patients in several splits"].append(f"{line}, {first_image.name}")


def unique_images(splits, facts):
    """Return (path, split, facts) of each image of each split that has facts."""
    seen = []
    for split, entries in splits.items():
        paths = dict.fromkeys(entry.image for entry in entries if entry.image in facts)
        seen += [(path, split, facts[path]) for path in paths]
    return seen


def check_overlap(seen, findings):
    """Add findings for images in more than one of train, val and test; return their paths.

    seen: (path, split, facts) of each image. Test splits may share images with each other: they ask
    the same images for different things.
    """
    by_digest = {}  # digest of the pixels -> role, split and path of the first image that has it
    by_stem = {}  # path without its ending -> the same
    reported = set()
    for path, split, facts in seen:
        role = role_of(split)
        copy_role, copy_split, copy = by_digest.setdefault(facts.digest, (role, split, path))
        stem = str(path.with_suffix("")).lower()  # a.png and A.jpg may be one picture
        alike_role, alike_split, alike = by_stem.setdefault(stem, (role, split, path))

        if copy_role != role:
            line = f"{path} ({split}): also in {copy_split}"
            if copy != path:
                line += f" as {copy}"
            findings["images in several splits"].append(line)
            reported.add(path)
        elif alike_role != role:
            line = f"{path} ({split}): named like {alike} ({alike_split})"
            findings["images named alike in several splits"].append(line)
            reported.add(path)
    return reported


def check_near(seen, reported, findings):
    """Add a finding for each image of test that is nearly one of train or val, or of val, of train.

    seen: (path, split, facts) of each image. reported: paths that `check_overlap` has reported.
    """
    by_path_and_role = {}
    for path, split, facts in seen:
        if isinstance(facts, ImageFacts) and facts.thumbnail.any():
            by_path_and_role[path, role_of(split)] = (path, split, facts)
    seen = list(by_path_and_role.values())
    if not seen:
        return

    details = np.stack([facts.thumbnail for _, _, facts in seen])  # (n,256)
    roles = np.array([role_of(split) for _, split, _ in seen])
    is_reported = np.array([path in reported for path, _, _ in seen])
    for role, earlier_roles in (("val", ["train"]), ("test", ["train", "val"])):
        later = np.flatnonzero((roles == role) & ~is_reported)
        earlier = np.flatnonzero(np.isin(roles, earlier_roles))
        for i, j in near_pairs(details, later, earlier):
            path, split, _ = seen[i]
            earlier_path, earlier_split, _ = seen[j]
            line = f"{path} ({split}): nearly {earlier_path} ({earlier_split})"
            findings[NEAR_KIND].append(line)


def near_pairs(details, later, earlier):
    """Yield (i, j) for each image i of `later` that is nearly the image j of `earlier`.

    details (n,256): `thumbnail_details` of all images; later, earlier: indices into them. j is the
    most similar one. All pairs are compared by matrix products: 10,000 against 10,000 images take a
    second.
    """
    if len(earlier) == 0:
        return

    mean = np.zeros_like(details[0])
    if len(details) >= ENOUGH_FOR_MEAN:
        mean = details.mean(axis=0)
    differences = details - mean
    differences /= np.maximum(np.linalg.norm(differences, axis=1, keepdims=True), 1e-6)

    for start in range(0, len(later), CHUNK):
        chunk = later[start : start + CHUNK]
        similarity = details[chunk] @ details[earlier].T  # (chunk,earlier)
        if similarity.max() < NEAR:
            continue
        similarity[differences[chunk] @ differences[earlier].T < NEAR_WITHOUT_MEAN] = 0
        for row, best in enumerate(similarity.argmax(axis=1)):
            if similarity[row, best] >= NEAR:
                yield chunk[row], earlier[best]


# --- description of a data set --------------------------------------------------------------------


def show(line):
    """Print a line; characters that cannot be printed, as in damaged file names, are escaped."""
    print(line.encode("utf-8", "backslashreplace").decode())


def width_by_height(size):
    """Return a size (H, W) as "WxH"."""
    return f"{size[1]}x{size[0]}"


def count_and_names(names):
    """Return how many names there are and the first five of them, "7 (a, b, c, d, e, ...)"."""
    ending = ", ..." if len(names) > 5 else ""
    return f"{len(names)} ({', '.join(names[:5])}{ending})"


def modes(facts):
    """Return the modes of images or masks and their counts: "RGB", or "RGB 12, L 3" if several."""
    counts = Counter(fact.mode for fact in facts).most_common()
    if len(counts) == 1:
        return counts[0][0]
    return ", ".join(f"{mode} {n}" for mode, n in counts)


def describe_splits(splits, noun="images"):
    """Yield (split, text) with the number of its entries and images."""
    earlier = {}  # split -> its images
    for split, entries in splits.items():
        paths = {entry.image for entry in entries}
        text = f"{len(entries)} entries, {len(paths)} {noun}"
        container = next((name for name in earlier if paths <= earlier[name]), None)
        if container and entries:
            text += f", all of them in {container}"
        yield split, text
        earlier[split] = paths


def describe_shares(splits, shares, noun="an image"):
    """Yield (heading, text) about the foreground shares {(split, name): share}."""
    if not shares:
        return
    values = np.array(list(shares.values()))
    ends = f"{values.min():.1%} to {values.max():.1%}"
    yield "foreground", f"{values.mean():.1%} of {noun} in the mean, {ends}"

    empty = [name for (_, name), share in shares.items() if share == 0]
    healthy = 0
    has_prompts = False
    for split, entries in splits.items():
        for entry in entries:
            texts = texts_of_entry(entry)
            has_prompts = has_prompts or bool(texts)
            healthy += shares.get((split, entry.name)) == 0 and not texts

    text = count_and_names(empty) if empty else "none"
    if healthy and has_prompts:
        text += f", {healthy} of them without prompts"
    yield "empty masks", text


def describe_pictures(splits, images, masks, shares, rule, texts):
    """Yield (heading, text) about a data set of images.

    images, masks: {path: facts}; shares and rule: see `check_masks`; texts: see
    `check_prompt_types`.
    """
    yield from describe_splits(splits)
    if images:
        sizes = sorted((facts.size for facts in images.values()), key=math.prod)
        ends = f"{width_by_height(sizes[0])} to {width_by_height(sizes[-1])}"
        median = width_by_height(sizes[len(sizes) // 2])
        yield "images", f"{len(images)}, {modes(images.values())}; {ends}, median {median}"

    if masks:
        counts = sum(facts.counts[0] for facts in masks.values())
        values = np.flatnonzero(counts)
        listed = ", ".join(map(str, values))
        if len(values) > 8:
            listed = f"{len(values)} values from {values[0]} to {values[-1]}"
        words = rule.replace(data.GIVEN, "> ")
        yield "masks", f"{len(masks)}, {modes(masks.values())}; {listed}; read {words}"

    yield from describe_shares(splits, shares)
    for prompt_type, counter in texts.items():
        example = textwrap.shorten(next(iter(counter), ""), 70)
        noun = "texts" if len(counter) > 1 else "text"
        yield prompt_type, f'{len(counter)} {noun}: "{example}"'


# --- prompts as a model sees them -----------------------------------------------------------------


def tokenizers_of(model):
    """Return {recipes: tokenizer} of a model, one for each text length; {} if `model` is None.

    Also {} if the model's vocabulary is not available; a line says so. Raise ValueError if the
    model reads no prompts.
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
    """Yield (heading, text) about prompts that a model cuts, or that are equal to it.

    texts: see `check_prompt_types`. Prompts that the default recipe cuts are findings as well.
    """
    if not tokenizers:
        return
    from recipes.images import describe_cuts  # here, as importing every model takes a second

    for recipes, tokenizer in tokenizers.items():
        lines = []
        for prompt_type, counter in texts.items():
            different = {tuple(tokenizer(text)[0].tolist()) for text in counter}
            if len(different) < len(counter):
                text = f"{len(counter)} texts, only {len(different)} to the model"
                lines.append((prompt_type, text))
            cuts = describe_cuts(counter, tokenizer)
            if cuts:
                lines.append((prompt_type, cuts))
            if cuts and "default" in recipes.split(", "):
                findings[f"prompts that {model} cuts"].append(f"{root}: {prompt_type}, {cuts}")

        text = f"takes {tokenizer.length} tokens of a prompt (--recipe {recipes})"
        if not lines:
            text += "; no text is cut"
        yield model, text
        yield from lines


def check_images(root, args, tokenizers, findings):
    """Check a data set of images, print what it holds and return `unique_images` of it."""
    splits = read_splits(root, args.group_regex, findings)
    for split, entries in splits.items():
        splits[split] = data.with_mask_orientation(entries, args.mask_orientation)
    correct, images = read_pictures(root, splits, findings)
    masks = read_masks(correct, images, findings)

    check_sizes(correct, images, masks, findings)
    check_pixels(images, masks, findings)
    shares, rule = check_masks(root, correct, masks, findings, args.mask_threshold)
    texts = check_prompt_types(root, splits, shares, findings)
    check_patients(splits, findings)

    show(str(root))
    for heading, text in describe_pictures(splits, images, masks, shares, rule, texts):
        show(f"  {heading:13} {text}")
    for heading, text in check_tokens(root, args.model, tokenizers, texts, findings):
        show(f"  {heading:13} {text}")
    return unique_images(splits, images)


# --- volumes --------------------------------------------------------------------------------------


def volume_facts(entry, findings):
    """Return the VolumeFacts of an entry, or None if one of its files cannot be used: a finding."""
    image = None
    try:
        image, grid = nifti.read_volume((entry.image, *entry.more_channels))
        if "CT" in (entry.modality or "").upper():
            volumes.notice_if_not_hu(entry.image, volumes.hu_facts(image))
    except (ValueError, OSError) as error:
        add_error(error, findings)

    try:
        if image is None:  # the label map cannot be compared with it, but it may be damaged too
            nifti.check_whole(entry.mask)
            return None
        labels = nifti.read_labels(entry.mask, grid, entry.labels, entry.background_numbers)
    except (ValueError, OSError) as error:
        add_error(error, findings)
        return None

    counts = np.bincount(labels.ravel(), minlength=256)
    return VolumeFacts(grid, len(image), digest_of(image), counts)


def read_cases(splits, findings):
    """Return {image: VolumeFacts} of the cases whose files can be used; the others are findings.

    What is printed about files that can be used is a finding as well.
    """
    by_files = {}
    for entry in chain(*splits.values()):
        by_files[entry.image, entry.mask] = entry

    facts_by_image = {}
    for entry in tqdm(by_files.values(), desc="volumes", disable=None, leave=False):
        try:
            with redirect_stdout(io.StringIO()) as printed:
                facts = volume_facts(entry, findings)
        except MemoryError:
            add_error(ValueError(f"{entry.image}: does not fit into memory"), findings)
            continue
        if facts:
            facts_by_image[entry.image] = facts
        for line in printed.getvalue().splitlines():
            findings["remarks about volumes that can be used"].append(line)
    return facts_by_image


def check_labels(root, splits, facts, findings):
    """Check what label maps hold.

    facts: {image: VolumeFacts}. Return foreground shares {(split, name): share} and {class: number
    of label maps that hold it}.
    """
    first = next(chain(*splits.values()))
    names = layouts.foreground(first.classes)
    regions = first.regions or [(k,) for k in range(1, len(first.labels))]  # labels of each class
    shares = {}
    presence = defaultdict(list)  # split -> for each of its label maps, which classes it holds
    for split, entries in splits.items():
        for entry in entries:
            if entry.image not in facts:
                continue
            counts = facts[entry.image].counts
            foreground = counts[1:255].sum()
            shares[split, entry.name] = foreground / counts.sum()
            presence[split].append([counts[list(labels)].any() for labels in regions])
            if counts[255] and not foreground:
                line = f"{entry.mask}: holds 0 and 255 alone, and 255 does not count ({split})"
                findings["label maps of 0 and 255 alone"].append(line)

    if presence:
        check_classes(root, names, presence, findings)
        check_foreground(root, shares, findings)

    maps_with_class = dict.fromkeys(names, 0)
    for row in chain(*presence.values()):
        for name, has_class in zip(names, row, strict=True):
            maps_with_class[name] += int(has_class)
    return shares, maps_with_class


def describe_cases(splits, facts, shares, maps_with_class):
    """Yield (heading, text) about a data set of volumes. Arguments are as of `check_labels`."""
    yield from describe_splits(splits, "volumes")
    by_image = {}
    for entry in chain(*splits.values()):
        if entry.image in facts:
            by_image[entry.image] = entry
    if not by_image:
        return

    grids = [facts[image].grid for image in by_image]
    yield "volumes", volumes.VolumeSet(list(by_image.values()), grids).describe()
    channels = sorted({fact.channels for fact in facts.values()})
    yield "channels", " or ".join(map(str, channels))
    listed = ", ".join(f"{name} in {n}" for name, n in maps_with_class.items())
    yield "classes", f"{listed}, of {len(shares)} label maps"
    yield from describe_shares(splits, shares, "a volume")


def check_channels(facts, findings):
    """Add a finding for each volume with another number of channels than most. {path: facts}."""
    channels = Counter(fact.channels for fact in facts.values())
    for path, fact in facts.items():
        usual = channels.most_common(1)[0][0]
        if fact.channels != usual:
            line = f"{path}: {fact.channels} channels, most volumes have {usual}"
            findings["volumes with other channels"].append(line)


def check_volumes(root, args, findings):
    """Check a data set of volumes, print what it holds and return `unique_images` of it."""
    try:
        splits = layouts.read_volumes(root, args.group_regex)
    except (ValueError, OSError) as error:
        findings["splits that cannot be used"].append(str(error))
        show(str(root))
        return []

    facts = read_cases(splits, findings)
    shares, maps_with_class = check_labels(root, splits, facts, findings)
    check_patients(splits, findings)
    check_channels(facts, findings)

    show(str(root))
    for heading, text in describe_cases(splits, facts, shares, maps_with_class):
        show(f"  {heading:13} {text}")
    return unique_images(splits, facts)


# --- command line ---------------------------------------------------------------------------------


def refuse_misuse(args):
    """Raise FileNotFoundError or ValueError, one line, before any data set is read."""
    for root in args.data:
        if not layouts.has_volumes(root) and not layouts.find_splits(root):
            need = "images/ and masks/, with anns/*.json or within train/, val/, test/"
            raise FileNotFoundError(f"{root}: no data set here; expected {need}")
    if all(layouts.has_volumes(root) for root in args.data):
        for name in ("model", "mask_orientation", "mask_threshold"):
            if getattr(args, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag}: has no effect on volumes; remove it")


def show_findings(findings):
    """Print all kinds of findings and the first lines of each."""
    total = sum(map(len, findings.values()))
    show(f"findings: {total or 'none'}")
    for kind, lines in findings.items():
        most = MOST_NEAR if kind == NEAR_KIND else MOST_LINES
        show(f"  {kind}: {len(lines)}")
        for line in lines[:most]:
            show(f"    {line}")
        if len(lines) > most:
            show(f"    and {len(lines) - most} more")


def check(args):
    """Read whole data sets of images or volumes and report what is wrong with them.

    Nothing is written. The exit status is 1 if problems were found.
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

    show_findings(findings)
    return 1 if any(findings.values()) else 0


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
        "also count the prompts that are too long for this model and are cut: cris, clipseg, "
        "biomedclipseg (default: do not count them)"
    )
    add("--model", metavar="NAME", help=help)
    add("--mask-threshold", type=GREY_LEVEL, metavar="N", help=MASK_THRESHOLD)
    help = (
        "regular expression that finds the patient in an image's name: its first group, or the "
        "whole match; reports patients that are in two splits (default: the field `group` of "
        "annotation files)"
    )
    add("--group-regex", metavar="REGEX", help=help)
