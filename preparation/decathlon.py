"""Split a task of the Medical Segmentation Decathlon."""

import re
import shutil
import tarfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

from engine.ranges import SEED
from imaging import atomic_files, layouts
from imaging.files import decode_text, parse_json
from preparation import archives
from preparation.volume_sets import (
    CASES,
    DECATHLON_FOLDERS,
    LINKED,
    LISTS,
    link,
    relabelled,
    split_at_random,
    write_data_set,
)

# medicaldecathlon.com: ten tasks, each a .tar in the layout of volume_sets.py, with a list of
# labelled volumes, and a list of volumes whose labels are withheld for the challenge.

FILE = re.compile(r"(images|labels)T[rs]/[^/]+\.(?i:nii(\.gz)?)")


class Folder:
    """The files of an unpacked task, whose folders may be links to others."""

    def __init__(self, root):
        self.root = root
        self.names = {layouts.composed(path.name) for path in root.iterdir()}
        for folder in DECATHLON_FOLDERS:
            if (root / folder).is_dir():
                for path in (root / folder).iterdir():
                    self.names.add(layouts.composed(f"{folder}/{path.name}"))

    def read(self, name):
        """Return the content of a file."""
        return (self.root / name).read_bytes()

    def put(self, name, target):
        """Write a file to another path: as a hard link if possible."""
        link(layouts.find_file(self.root, name), target)


class Archive:
    """The files of a task in its open .tar, named without the archive's only folder."""

    def __init__(self, tar):
        self.tar = tar
        members = {}
        for member in tar:
            if member.isfile():
                members[layouts.composed(member.name).removeprefix("./")] = member

        lists = [name for name in members if re.fullmatch(r"([^/]+/)?dataset\.json", name)]
        folder = lists[0].removesuffix("dataset.json") if len(lists) == 1 else ""
        self.members = {}
        for name, member in members.items():
            if name.startswith(folder):
                self.members[name.removeprefix(folder)] = member
        self.names = set(self.members)

    def read(self, name):
        """Return the content of a file."""
        return self.tar.extractfile(self.members[name]).read()

    def put(self, name, target):
        """Unpack a file to another path."""
        with open(target, "wb") as file:
            shutil.copyfileobj(self.tar.extractfile(self.members[name]), file)


@contextmanager
def opened(raw):
    """Yield the Folder or Archive of a path.

    Raises FileNotFoundError or ValueError, one line, if the path does not exist or is no .tar.
    """
    if raw.is_dir():
        yield Folder(raw)
        return
    if not raw.exists():
        raise FileNotFoundError(f"{raw}: no such folder or .tar")
    try:
        with tarfile.open(raw, "r:") as tar:  # not .tar.gz: every file would need a search
            yield Archive(tar)
    except tarfile.TarError as error:
        raise ValueError(
            f"{raw}: not a whole .tar file ({error}); download it again, or give the unpacked "
            "folder"
        ) from None


# --- dataset.json ---------------------------------------------------------------------------------


def inside(name):
    """Return "imagesTr/a.nii.gz" for "./imagesTr/a.nii.gz", in the form of `layouts.composed`.

    Raises ValueError for any other name.
    """
    plain = layouts.composed(PurePosixPath(name).as_posix()) if isinstance(name, str) else ""
    if not FILE.fullmatch(plain):
        raise ValueError(f"{name!r} is no volume in imagesTr, labelsTr or imagesTs")
    return plain


def unlabelled(case):
    """Return the image of a test case, which is {"image": name} or the name itself.

    Raises ValueError if the case has a label: then the task is split already.
    """
    if not isinstance(case, dict):
        return inside(case)
    if case.get("label"):
        raise ValueError("the test has labels; train on the task as it is")
    return inside(case["image"])


def parse_cases(about):
    """Return {image: label} and the images without labels, as a task's dataset.json lists them.

    Raises ValueError, KeyError, TypeError or AttributeError if the lists or labels are not valid.
    """
    pairs = {}
    for case in about["training"]:
        image = inside(case["image"])
        if image in pairs:
            raise ValueError("an image is listed twice")
        pairs[image] = inside(case["label"])
    images = [unlabelled(case) for case in about.get("test") or []]
    if len(set(images)) < len(images):
        raise ValueError("an image is listed twice")

    labels = about["labels"]
    if {*labels} != {str(number) for number in range(len(labels))}:
        raise ValueError("the labels are not 0, 1, 2, … without a gap")
    if not all(isinstance(name, str) for name in labels.values()):
        raise ValueError("a label is no name")
    return pairs, images


def read_dataset_json(source, where):
    """Return a task's dataset.json, {image: label}, and the images without labels.

    Images without labels whose file is missing are left out, which is printed. Raises
    FileNotFoundError or ValueError, one line, if the list is not valid, or if a labelled image or
    its label is missing.
    """
    if "dataset.json" not in source.names:
        raise FileNotFoundError(
            f"{where}: no dataset.json in it; DOWNLOAD is one task, Task09_Spleen.tar or what it "
            "unpacks to"
        )
    list_name = f"{where}, dataset.json"
    about = parse_json(decode_text(source.read("dataset.json"), list_name), list_name)
    try:
        pairs, images = parse_cases(about)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else error
        form = '"labels": {"0": name, …}, "training": [{"image", "label"}, …], "test"'
        raise ValueError(f"{list_name}: {reason}; expected {form}") from None
    if about.get("validation"):
        raise ValueError(f"{list_name}: lists a validation split; train on it as it is")

    check_files_present((*pairs, *pairs.values()), source, where)
    present = []
    missing = []
    for name in images:
        if name in source.names:
            present.append(name)
        else:
            missing.append(name)
    if missing:
        count = f"{len(missing)} of {len(images)} images without labels"
        examples = ", ".join(missing[:3])
        print(f"{where}: {count} are missing and are left out, {examples} among them")
    return about, pairs, present


def check_files_present(names, source, where):
    """Raise FileNotFoundError, one line, if one of these files is missing."""
    missing = [name for name in names if name not in source.names]
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(
            f"{where}: no {missing[0]}{rest}, which dataset.json lists; unpack or download it again"
        )


# --- splits ---------------------------------------------------------------------------------------


def in_test(name):
    """Return the name of a file in the test split: "imagesTr/a.nii.gz" -> "imagesTs/a.nii.gz"."""
    return name.replace("Tr/", "Ts/", 1)


def split_cases(pairs, split_of, unlabelled_images):
    """Return the splits, {split: [(image, label)]}, and the name of each file in the download.

    pairs: {image: label}; split_of: {image: split}. The test split moves to imagesTs and labelsTs:
    programs that read the Tr folders whole, as nnU-Net does, must not train on it. Raises
    ValueError if two files would get the same name there.
    """
    splits = {split: [] for split in LISTS}
    origin = {name: name for name in unlabelled_images}
    for image in sorted(pairs):
        label = pairs[image]
        split = split_of[image]
        is_test = split == "test"
        new_image = in_test(image) if is_test else image
        new_label = in_test(label) if is_test else label
        taken = origin.keys() & {new_image, new_label}
        if taken:
            raise ValueError(f"{min(taken)}: two volumes of this name; rename one")
        splits[split].append((new_image, new_label))
        origin[new_image] = image
        origin[new_label] = label

    splits["test"] += [(image, None) for image in sorted(unlabelled_images)]
    return splits, origin


def split_cases_at_random(pairs, seed, where):
    """Return the split of each labelled image, drawn at random.

    Raises ValueError if a split would be empty: there must be four volumes.
    """
    split_of = split_at_random(sorted(pairs), CASES, np.random.default_rng(seed))
    empty = [split for split in LISTS if split not in split_of.values()]
    if empty:
        raise ValueError(f"{where}: {len(pairs)} labelled volumes, {empty[0]} would be empty")
    return split_of


# --- the command ----------------------------------------------------------------------------------


def msd(args):
    """Split a task of the Medical Segmentation Decathlon: 70 % train, 15 % val, 15 % test.

    DOWNLOAD is one task, such as Task09_Spleen.tar or its unpacked folder. The challenge withholds
    the labels of its test images, so all three splits are drawn at random from the labelled
    volumes. The images without labels are kept for `predict.py DIR/imagesTs`.

    Volumes are not changed: files of an unpacked folder are hard-linked, or copied where that is
    impossible. With --labels universal_labels.json the labels become the classes of the Universal
    Model, in which an organ includes its tumors.
    """
    atomic_files.refuse_existing(args.out)
    args.raw = archives.given_download(args)
    with opened(args.raw) as source:
        about, pairs, images = read_dataset_json(source, args.raw)
        about = relabelled(about, args.labels)
        split_of = split_cases_at_random(pairs, args.seed, args.raw)
        splits, origin = split_cases(pairs, split_of, images)

        def put(part, *names):  # image and label; a label may be None
            for name in filter(None, names):
                source.put(origin[name], part / name)

        task = about.get("name", args.raw.stem)
        title = [f"{task}, Medical Segmentation Decathlon, seed {args.seed}"]
        if args.raw.is_dir():
            title.append(LINKED)
        return write_data_set(args.out, about, splits, put, title)


def options(command):
    """Describe `prepare.py msd`."""
    add = command(msd, "split a task of the Medical Segmentation Decathlon")
    help = "archive of a task, such as Task09_Spleen.tar, or the unpacked folder"
    archives.add_download(add, help)
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the new data set")
    help = "random seed of the split (default: %(default)s)"
    add("--seed", type=SEED, default=0, metavar="N", help=help)
    help = (
        "JSON file that maps this data set's labels to other classes, such as "
        "universal_labels.json (default: keep the labels)"
    )
    add("--labels", type=Path, metavar="FILE", help=help)
