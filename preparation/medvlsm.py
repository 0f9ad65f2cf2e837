"""Data sets of the medvlsm study in its layout: annotations, conversion of archives, writing.

The study (Poudel et al., MIDL 2024, arXiv 2308.07706, github.com/naamiinepal/medvlsm) published
annotation files, with splits and prompts, but no images. The commands for its eleven data sets
(polyps.py, isic.py, busi.py, camus.py, chexlocalize.py) take the images from the archives of each
data set's own site and write both in the layout of imaging/layouts.py:

    images/  masks/NAME.png (0 and 255)  anns/{train,val,test}.json  source.json  README.txt

Entries hold `img_name`, `mask_name` and `prompts`; the unused keys of the study are left out. The
boxes of the study tell whether masks belong to the annotations: several data sets name their files
1.png, 2.png, ….

The study's repository of 2023 has annotations of an older form: `testA.json` instead of
`test.json`, possibly keys such as `P0`, and files of some data sets renamed to running numbers in
the order of their names. These commands read this form as well.
"""

import http.client
import shutil
import urllib.request
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from imaging import atomic_files, image_files, layouts
from imaging.files import decode_text, json_text, parse_json
from preparation import archives, downloads, mask_words
from preparation.archives import Archive
from preparation.check_findings import count_and_names

RAW = "https://raw.githubusercontent.com/naamiinepal/medvlsm"
COMMIT = "dc36a3af83035efa344c8ce26397528ad173569e"
COMMIT_OF_2023 = "06dc997abe31c91ad0f69b7a13d2092437ae163e"
ANNOTATION_LICENCE = "MIT (github.com/naamiinepal/medvlsm)"
SECONDS = 30  # without an answer of the server
SPLITS = ("train", "val", "test")
MASK_RULE = "the largest of the colour channels above 127"
BOX_TOLERANCE = 2  # pixels between the corner of a mask and that of the study's box


@dataclass(frozen=True)
class DataSet:
    """The facts about a data set of the study; its site and licence are in downloads.SOURCES."""

    name: str  # of its folder in the study's repository, such as "kvasir_polyp"
    title: str  # for README.txt, such as "Kvasir-SEG: polyps in colonoscopy"
    archive: str  # file name that the site gives, for --help and messages
    counts: dict[str, int]  # split -> entries in the study's file
    split_source: str  # where the split is from; `check` reads it as "published_split"
    older_name: str  # of its folder in the repository of 2023
    is_older: bool = False  # only the file of 2023 is right
    may_lack: tuple[str, ...] = ()  # splits that another rule fills if their file is missing

    @property
    def command(self) -> str:
        """Return the name of the command."""
        return self.name.replace("_", "-")

    @property
    def source(self) -> downloads.Source:
        """Return the site of the images, and their licence."""
        return downloads.SOURCES[self.name]

    def addresses(self) -> dict[str, str]:
        """Return split -> address of its annotation file."""
        if self.is_older:
            folder = f"{RAW}/{COMMIT_OF_2023}/datasets/anns/{self.older_name}"
            return {"test": f"{folder}/testA.json"}
        folder = f"{RAW}/{COMMIT}/data/{self.name}/anns"
        return {split: f"{folder}/{split}.json" for split, n in self.counts.items() if n}


@dataclass(frozen=True)
class Annotation:
    """An entry of an annotation file."""

    image: str  # in images/
    mask: str  # in masks/
    prompts: dict[str, str | list[str]]
    # Column right of the study's box and row below it; (0, 0) for an empty mask, None if unknown.
    corner: tuple[int, int] | None = None
    group: str = ""  # the patient; "" if unknown


Splits = dict[str, list[Annotation]]


# --- annotation files -----------------------------------------------------------------------------


def parse_annotations(content: bytes, path) -> list[Annotation]:
    """Return the entries of an annotation file. path: for messages.

    Raises ValueError, one line, for a file of another form.
    """
    items = parse_json(decode_text(content, path), path)
    expected = "expected a list of objects with img_name, mask_name, prompts"
    if not isinstance(items, list):
        raise ValueError(f"{path}: holds {layouts.json_type(items)}; {expected}")

    annotations = []
    for number, item in enumerate(items):
        try:
            annotations.append(parse_item(item))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, entry {number}: {reason}; {expected}") from None
    return annotations


def parse_item(item: dict) -> Annotation:
    """Return an entry. Raises KeyError, TypeError, ValueError or OverflowError for other forms."""
    if not isinstance(item, dict):
        raise TypeError(f"is {layouts.json_type(item)}")
    image = layouts.check_name(item["img_name"], "img_name")
    mask = layouts.check_name(item["mask_name"], "mask_name")

    if not isinstance(item["prompts"], dict):
        raise TypeError(f"prompts are {layouts.json_type(item['prompts'])}")
    prompts = {}
    for key, value in item["prompts"].items():
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"prompt {key} is neither a text nor a list of texts")
        prompts[key.lower()] = value

    corner = None
    if "bbox" in item:
        x0, _, x1, y1 = (int(value) for value in item["bbox"])
        corner = (x1, y1) if x1 > x0 else (0, 0)
    return Annotation(image, mask, prompts, corner)


def find_annotations(folder: Path, data_set: DataSet) -> tuple[Path, bool]:
    """Return the folder of a data set's annotation files, and True if they are of the older form.

    folder: the study's repository, its data/, the data set's folder or the anns/ in it; or that of
    2023, its datasets/anns/ or a folder in it. Raises FileNotFoundError.
    """
    name = data_set.name
    older = data_set.older_name
    candidates = [folder, folder / "anns"]
    for sub_folder in (f"{name}/anns", f"data/{name}/anns", older, f"datasets/anns/{older}"):
        candidates.append(folder / sub_folder)
    for candidate in candidates:
        if (candidate / "testA.json").is_file() and not (candidate / "test.json").is_file():
            return candidate, True
        if any((candidate / f"{split}.json").is_file() for split in SPLITS):
            return candidate, False

    address = next(iter(data_set.addresses().values()))
    raise FileNotFoundError(
        f"--annotations {folder}: holds no annotation files of {name}, such as "
        f"data/{name}/anns/test.json; they are at {address}"
    )


class NotPublished(FileNotFoundError):
    """The server answered that it does not have a file."""


def fetch(address: str, target: Path) -> bytes:
    """Return a file of the study, from the cache file `target` or else from its address.

    Raises FileNotFoundError, one line, if it cannot be downloaded: NotPublished if the server
    answers that it does not exist.
    """
    if target.is_file():
        return target.read_bytes()

    print(f"downloading {address}, licence {ANNOTATION_LICENCE}", flush=True)
    try:
        with urllib.request.urlopen(address, timeout=SECONDS) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        kind = NotPublished if getattr(error, "code", None) == 404 else FileNotFoundError
        raise kind(
            f"{address}: could not be downloaded ({error}); download this file, or the repository "
            "naamiinepal/medvlsm, with another computer and give its folder with --annotations"
        ) from None

    parse_annotations(content, address)  # so that no page about an error gets into the cache
    with atomic_files.atomic_write(target) as part:
        part.write_bytes(content)
    return content


def fetch_annotations(data_set: DataSet, cache: Path) -> Splits:
    """Return the annotations of a data set from the internet, or from earlier downloads."""
    atomic_files.remove_leftovers(cache / "medvlsm")
    splits = {}
    for split, address in data_set.addresses().items():
        commit = COMMIT_OF_2023 if data_set.is_older else COMMIT
        target = cache / "medvlsm" / commit / data_set.name / f"{split}.json"
        try:
            content = fetch(address, target)
        except NotPublished:
            if split not in data_set.may_lack:
                raise
            continue
        splits[split] = parse_annotations(content, target)
    return splits


def read_annotations(data_set: DataSet, args: Namespace) -> tuple[Splits, bool, str]:
    """Return the annotations of --annotations or of the internet.

    Also returns True if they are of the older form, and where they are from. Raises ValueError or
    FileNotFoundError, one line.
    """
    if args.annotations is None:
        splits = fetch_annotations(data_set, args.cache)
        is_older = data_set.is_older
        origin = f"{RAW}/{COMMIT_OF_2023 if is_older else COMMIT}"
        return splits, is_older, origin

    folder, is_older = find_annotations(args.annotations, data_set)
    splits = {}
    for split in SPLITS:
        path = folder / (f"{split}A.json" if is_older and split == "test" else f"{split}.json")
        if path.is_file():
            splits[split] = parse_annotations(path.read_bytes(), path)
        elif split not in data_set.may_lack and data_set.counts.get(split):
            raise FileNotFoundError(f"{path}: no such annotation file, but others are there")
    if data_set.is_older and not is_older:
        refuse_other(splits, folder, data_set)
    origin = "github.com/naamiinepal/medvlsm, files of --annotations"
    return splits, is_older, f"{origin} in the form of 2023" if is_older else origin


def refuse_other(splits: Splits, folder: Path, data_set: DataSet) -> None:
    """Raise ValueError for the file of the study that is a copy of another data set's."""
    raise ValueError(
        f"{folder}: these {sum(map(len, splits.values()))} entries are not those of "
        f"{data_set.name}, the study's file is a copy of ColonDB's; the right file is "
        f"{data_set.addresses()['test']}: give its folder, or leave out --annotations"
    )


# --- splits ---------------------------------------------------------------------------------------


def without_repeats(splits: Splits, notes: list[str]) -> Splits:
    """Return the splits with repeated entries listed once. Raises ValueError for other prompts."""
    unique = {}
    for split, annotations in splits.items():
        by_mask = {}
        for annotation in annotations:
            first = by_mask.setdefault(annotation.mask, annotation)
            if first.prompts != annotation.prompts:
                raise ValueError(
                    f"anns/{split}.json: {annotation.mask} has two entries with other prompts; "
                    "remove one"
                )
        unique[split] = list(by_mask.values())
        if len(by_mask) < len(annotations):
            counts = Counter(annotation.mask for annotation in annotations)
            repeated = sorted(name for name, count in counts.items() if count > 1)
            notes.append(f"{split} listed {count_and_names(repeated)} twice; they are listed once")
    return unique


def without_overlap(splits: Splits, fix: bool, notes: list[str]) -> Splits:
    """Return the splits; with `fix` without images of train or val that a later split holds.

    The later split is val or test. Without `fix` such images are noted.
    """
    kept = dict(splits)
    for earlier, later in (("train", "val"), ("train", "test"), ("val", "test")):
        later_images = {annotation.image for annotation in kept.get(later, [])}
        annotations = kept.get(earlier, [])
        shared = sorted({a.image for a in annotations if a.image in later_images})
        if not shared:
            continue
        if fix:
            kept[earlier] = [a for a in annotations if a.image not in later_images]
            notes.append(f"{earlier}: left out {count_and_names(shared)}, which are in {later}")
        else:
            notes.append(
                f"{earlier} and {later} share {count_and_names(shared)}; --fix-splits leaves them "
                f"out of {earlier}"
            )
    return kept


def count_notes(splits: Splits, data_set: DataSet) -> list[str]:
    """Return a line for each split whose number of entries is not that of the study."""
    lines = []
    for split, count in data_set.counts.items():
        if split not in splits and split in data_set.may_lack:
            continue
        actual = len(splits.get(split, []))
        if actual != count:
            lines.append(f"{split}: {actual} annotations, but the study's file has {count}")
    return lines


# --- conversion -----------------------------------------------------------------------------------

# Makes the file `target` from the members of archives, which were written to files. Returns the
# corner of a mask as Annotation has it, in the pixels of the study's boxes, or None.
Convert = Callable[[list[Path], Path], tuple[int, int] | None]


@dataclass(frozen=True)
class File:
    """A member of an archive."""

    archive: Archive
    member: str


Files = dict[str, File]  # by stem, or by another name


@dataclass(frozen=True)
class Job:
    """A file to be made from members of archives."""

    target: str  # in the new data set, such as "images/a.jpg"
    sources: tuple[File, ...]
    convert: Convert


@dataclass
class Conversion:
    """What a command writes."""

    splits: Splits
    notes: list[str]
    mask_rule: str  # for README.txt
    split_source: str
    is_published: bool = True  # the split; False for one that was made here
    jobs: dict[str, Job] = field(default_factory=dict)  # target -> job
    wrong_prompts: set[str] = field(default_factory=set)  # masks that mask_words.py describes
    target: str = ""  # for these words, such as "polyp"
    general: list[str] = field(default_factory=list)  # descriptions for p7 to p9

    def add(self, target: str, sources: Iterable[File], convert: Convert) -> None:
        """Add a file to be made; a target that is there already stays as it is."""
        self.jobs.setdefault(target, Job(target, tuple(sources), convert))

    def add_image(self, annotation: Annotation, source: File) -> None:
        """Add the image of an annotation, to be copied."""
        self.add(f"images/{annotation.image}", [source], copy_image)

    def add_mask(self, annotation: Annotation, sources: list[File]) -> None:
        """Add the mask of an annotation: the union of the sources."""
        self.add(f"masks/{annotation.mask}", sources, convert_masks)

    def use_png_masks(self) -> list[Annotation]:
        """Give all masks the ending .png, in which they are written. Return all annotations."""
        for split, annotations in self.splits.items():
            renamed = []
            for annotation in annotations:
                mask = PurePosixPath(annotation.mask).with_suffix(".png").as_posix()
                renamed.append(replace(annotation, mask=mask))
            self.splits[split] = renamed
        return all_annotations(self.splits)


def copy_image(sources: list[Path], target: Path) -> None:
    """Move an image file to its target, byte for byte, after decoding it to see that it is whole.

    An image of another format than the target's ending says becomes a PNG file.
    """
    (source,) = sources
    if source.suffix.lower() == target.suffix.lower():
        image_files.open_image(source)
        shutil.move(source, target)
    elif target.suffix == ".png":
        Image.fromarray(image_files.read_image(source)).save(target)
    else:
        raise ValueError(f"{source}: expected an image {target.name}")


def binary_mask(path: Path) -> np.ndarray:
    """Return the foreground of a mask file, bool (H,W): the maximum of the channels above 127.

    Raises ValueError for masks that hold values, but none above 127.
    """
    values = image_files.read_mask(path)
    mask = values > 127
    if values.any() and not mask.any():
        raise ValueError(f"{path}: holds values up to {values.max()}; expected a mask of 0 and 255")
    return mask


def save_mask(mask: np.ndarray, target: Path) -> None:
    """Write a mask, bool (H,W), as PNG with 0 and 255."""
    Image.fromarray(np.uint8(255) * mask).save(target)


def convert_masks(sources: list[Path], target: Path) -> tuple[int, int]:
    """Write the union of mask files as one mask, and return its corner."""
    mask = binary_mask(sources[0])
    for source in sources[1:]:
        other = binary_mask(source)
        if other.shape != mask.shape:
            raise ValueError(f"{source}: has another size than the first mask of this image")
        mask |= other
    save_mask(mask, target)
    return corner_of(mask)


def run_job(job: Job, part: Path) -> tuple[int, int] | None:
    """Make a file in the folder `part`. Return the corner of a mask, see Convert.

    Raises ValueError or OSError, one line, that names the archive and the member.
    """
    scratch = part / ".members"
    target = part / job.target
    scratch.mkdir(exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    paths = []
    for number, source in enumerate(job.sources):
        # Endings of two parts, such as .nii.gz, say what kind of file it is.
        endings = "".join(PurePosixPath(source.member).suffixes[-2:])
        path = scratch / f"{number}{endings}"
        source.archive.extract(source.member, path)
        paths.append(path)

    try:
        return job.convert(paths, target)
    except (ValueError, OSError) as error:
        if atomic_files.is_full_disk(error):
            raise
        message = str(error)
        for path, source in zip(paths, job.sources, strict=True):
            message = message.replace(str(path), f"{source.archive.path}: {source.member}")
        raise ValueError(message) from None


def corner_of(mask: np.ndarray) -> tuple[int, int]:
    """Return the column right of a mask's box and the row below it; (0, 0) if it is empty."""
    if not mask.any():
        return 0, 0
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[-1]) + 1, int(rows[-1]) + 1


def compare_corners(splits: Splits, corners: dict[str, tuple[int, int]]) -> list[str]:
    """Return a note of the masks whose boxes differ from those of the study.

    corners: name of a mask -> corner of what was written. Raises ValueError if most differ.
    """
    compared = 0
    different = []
    for annotation in all_annotations(splits):
        corner = corners.get(annotation.mask)
        if corner is None or annotation.corner is None:
            continue
        compared += 1
        distance = np.abs(np.subtract(corner, annotation.corner)).max()
        if distance > BOX_TOLERANCE:
            different.append(annotation)

    if 2 * len(different) > compared:
        first = different[0]
        raise ValueError(
            f"{first.mask}: its mask ends at column and row {corners[first.mask]}, but in the "
            f"annotations at {first.corner}, and {len(different)} of {compared} masks differ: this "
            "is the archive or the annotations of another data set"
        )
    if different:
        names = count_and_names([annotation.mask for annotation in different])
        return [f"masks with another box than in the annotations: {names}"]
    return []


def write_data_set(conversion: Conversion, data_set: DataSet, source: dict, out: Path) -> list[str]:
    """Write a data set, whole or not at all. Return the lines of its README.txt.

    source: content of source.json.
    """

    def place(job: Job) -> tuple[str, int]:
        first = job.sources[0]
        return str(first.archive.path), first.archive.position(first.member)

    with atomic_files.atomic_folder(out) as part:
        part.mkdir()
        corners = {}
        jobs = sorted(conversion.jobs.values(), key=place)  # a compressed tar is read once
        for job in tqdm(jobs, desc=out.name, unit="file", disable=None, leave=False):
            corner = run_job(job, part)
            if corner is not None:
                corners[job.target.removeprefix("masks/")] = corner
        shutil.rmtree(part / ".members", ignore_errors=True)

        conversion.notes += compare_corners(conversion.splits, corners)
        rewrite_prompts(conversion, part)
        write_json(part / "source.json", source)
        for split, annotations in conversion.splits.items():
            if annotations:
                items = [as_item(annotation) for annotation in annotations]
                write_json(part / "anns" / f"{split}.json", items)
        lines = describe(conversion, data_set, source)
        (part / "README.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def rewrite_prompts(conversion: Conversion, part: Path) -> None:
    """Describe the masks with wrong prompts from their files in the folder `part`."""
    for split, annotations in conversion.splits.items():
        rewritten = []
        for annotation in annotations:
            if annotation.mask in conversion.wrong_prompts:
                image = image_files.read_image(part / "images" / annotation.image)
                mask = binary_mask(part / "masks" / annotation.mask)
                words = mask_words.describe(image, mask)
                prompts = mask_words.make_prompts(
                    words, conversion.target, conversion.general, mask_words.ENGLISH
                )
                annotation = replace(annotation, prompts=prompts)
            rewritten.append(annotation)
        conversion.splits[split] = rewritten


def write_json(path: Path, content) -> None:
    """Write a JSON file and its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json_text(content), encoding="utf-8")


def as_item(annotation: Annotation) -> dict:
    """Return an entry of our annotation files."""
    item = {"img_name": annotation.image, "mask_name": annotation.mask}
    if annotation.group:
        item["group"] = annotation.group
    return item | {"prompts": annotation.prompts}


def describe(conversion: Conversion, data_set: DataSet, source: dict) -> list[str]:
    """Return the lines of README.txt."""
    lines = [data_set.title]
    for split in SPLITS:
        annotations = conversion.splits.get(split)
        if annotations:
            images = len({annotation.image for annotation in annotations})
            lines.append(f"{split}: {images} images, {len(annotations)} masks")
    lines.append(f"images: {source['source']}; licence: {source['licence']}")
    lines.append(f"prompts: {source['annotations']}; licence: {source['annotations_licence']}")
    lines.append(f"split: {conversion.split_source}")
    lines.append(f"masks: {conversion.mask_rule}; written as PNG with 0 and 255")
    return lines + conversion.notes


# --- files that annotations name ------------------------------------------------------------------


def stem_of(name: str) -> str:
    """Return the file name of a path without its ending."""
    return PurePosixPath(name).stem


def files_by_stem(opened: list[Archive], tails: tuple[str, ...]) -> tuple[Files, str]:
    """Return {stem: File} of the only folder that a tail names, and its place for messages.

    Raises FileNotFoundError or ValueError, one line, as `archives.find_folder` does and for two
    files of one stem.
    """
    archive, folder = archives.find_folder(opened, *tails)
    files = {}
    for file_name, member in archive.files_in(folder).items():
        stem = stem_of(file_name)
        if stem in files:
            raise ValueError(
                f"{archive.path}: {member} and {files[stem].member} have the same stem; remove one"
            )
        files[stem] = File(archive, member)
    return files, f"{archive.path}: {folder}"


def with_names_of_archive(
    splits: Splits, names: dict[int, tuple[str, str]], available: str
) -> Splits:
    """Return annotations of 2023, which have running numbers, with the names of the archive.

    names: number -> name of the image, name of the mask. available: says where these images are
    and how many. Raises ValueError, one line, for names that are no such numbers.
    """
    renamed = {}
    for split, annotations in splits.items():
        renamed[split] = []
        for annotation in annotations:
            number = stem_of(annotation.image)
            if not number.isdecimal() or int(number) not in names:
                raise ValueError(
                    f"{available}, but the annotations of 2023 name {annotation.image} in {split}; "
                    "expected running numbers from 0"
                )
            image, mask = names[int(number)]
            renamed[split].append(replace(annotation, image=image, mask=mask))
    return renamed


def all_annotations(splits: Splits) -> list[Annotation]:
    """Return the annotations of all splits."""
    return [annotation for annotations in splits.values() for annotation in annotations]


def refuse_missing(names, available, where: str) -> None:
    """Raise FileNotFoundError, one line, if names are not among the available ones.

    where: the archive, and the folder in it.
    """
    missing = sorted({name for name in names if name not in available})
    if missing:
        raise FileNotFoundError(
            f"{where}: lacks {count_and_names(missing)} of {len(set(names))} files that the "
            f"annotations name; it has {len(available)} files. Download it again, or give the "
            "archive of this data set"
        )


def unused_note(available, used, noun: str) -> list[str]:
    """Return a note of the files of an archive that no annotation names; [] if there are none."""
    unused = sorted(set(available) - set(used))
    if not unused:
        return []
    return [f"{noun} without annotations, left out: {count_and_names(unused)}"]


def plan_pairs(
    data_set: DataSet, splits: Splits, images: tuple[Files, str], masks: tuple[Files, str]
) -> Conversion:
    """Return the conversion of a data set whose masks have the stems of their images.

    images, masks: files by the stem of the image, and their place for messages. Raises
    FileNotFoundError, one line, for missing files.
    """
    images_by_stem, image_place = images
    masks_by_stem, mask_place = masks
    stems = [stem_of(annotation.image) for annotation in all_annotations(splits)]
    refuse_missing(stems, images_by_stem, image_place)
    refuse_missing(stems, masks_by_stem, mask_place)

    notes = unused_note(images_by_stem, stems, "images")
    conversion = Conversion(splits, notes, MASK_RULE, data_set.split_source)
    for annotation in conversion.use_png_masks():
        stem = stem_of(annotation.image)
        conversion.add_image(annotation, images_by_stem[stem])
        conversion.add_mask(annotation, [masks_by_stem[stem]])
    return conversion


# --- command line ---------------------------------------------------------------------------------

# Makes a Conversion from the open archives, the annotations, True if these are of the older form,
# and the options.
Plan = Callable[[list[Archive], Splits, bool, Namespace], Conversion]


def make_data_set(data_set: DataSet, plan: Plan, args: Namespace) -> int:
    """Run the command of a data set. Return 0."""
    args.out = args.out or Path("data") / data_set.name
    atomic_files.refuse_existing(args.out)
    args.raw = downloads.raw_or_download(args, data_set.name)
    with archives.open_archives(args.raw) as opened:
        for archive in opened:
            if args.out.resolve().is_relative_to(archive.path.resolve()):
                raise ValueError(f"--out {args.out}: lies within {archive.path}; choose another")
        splits, is_older, origin = read_annotations(data_set, args)
        if not any(splits.values()):
            raise ValueError(f"--annotations {args.annotations}: the files list no images")
        notes = count_notes(splits, data_set)
        splits = without_repeats(splits, notes)
        conversion = plan(opened, splits, is_older, args)
        conversion.notes[:0] = notes
        conversion.splits = without_overlap(conversion.splits, args.fix_splits, conversion.notes)

        source = {
            "name": data_set.name,
            "source": data_set.source.page,
            "licence": data_set.source.licence,
            "archives": [archive.path.resolve().name for archive in opened],
            "annotations": origin,
            "annotations_licence": ANNOTATION_LICENCE,
        }
        key = "published_split" if conversion.is_published else "split"
        source[key] = conversion.split_source
        lines = write_data_set(conversion, data_set, source, args.out)
    print(f"{args.out}: " + "\n".join(lines))
    print(f"next: python prepare.py check {args.out}")
    return 0


DESCRIPTION = """Make the data set {name} of the medvlsm study from the archive of its site.

{title}. The archive is {archive}, from {source.page}.

Images are copied. Masks become PNG files with 0 and 255. Splits and prompts are those of the
study; its annotation files are downloaded unless --annotations names them.{details}
"""


def add_command(command, data_set: DataSet, plan: Plan, details: str = ""):
    """Add the command of a data set; return the function that adds further options.

    details: sentences for --help.
    """

    def run(args: Namespace) -> int:
        return make_data_set(data_set, plan, args)

    details = f"\n\n{details}" if details else ""
    run.__doc__ = DESCRIPTION.format(**vars(data_set), source=data_set.source, details=details)
    help = f"make {data_set.title}, with the prompts of medvlsm"
    add = command(run, help, name=data_set.command)
    add(
        "--raw",
        type=Path,
        nargs="+",
        metavar="DOWNLOAD",
        help="archive as the site gives it (zip or tar), or its unpacked folder",
    )
    if data_set.source.files:
        downloads.add_option(add)
    help = f"folder of the new data set (default: data/{data_set.name})"
    add("--out", type=Path, metavar="DIR", help=help)
    help = (
        "folder of the study's repository naamiinepal/medvlsm, or of the annotation files "
        f"{data_set.name}/anns (default: download them)"
    )
    add("--annotations", type=Path, metavar="FOLDER", help=help)
    help = "leave images out of train that val or test holds as well (default: only say it)"
    add("--fix-splits", action="store_true", help=help)
    help = "folder for downloaded annotations (default: %(default)s)"
    add("--cache", type=Path, default=".cache", metavar="DIR", help=help)
    return add
