"""Divide a task of the Medical Segmentation Decathlon."""

import re
import shutil
import tarfile
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

from engine.ranges import SEED
from imaging import atomic_files, layouts
from imaging.files import decode_text, parse_json
from preparation.volume_sets import (
    CASES,
    DECATHLON_FOLDERS,
    LINKED,
    LISTS,
    deal,
    link,
    relabelled,
    write_data_set,
)

# medicaldecathlon.com: ten tasks, each a .tar of the layout above, a list of labelled volumes and
# one of volumes whose labels are kept back for the challenge.

FILE = re.compile(r"(images|labels)T[rs]/[^/]+\.(?i:nii(\.gz)?)")


class Folder:
    """The files of an unpacked task, whose folders may be links to others."""

    def __init__(self, root):
        self.root = root
        self.names = {path.name for path in root.iterdir()}
        for folder in DECATHLON_FOLDERS:
            if (root / folder).is_dir():
                self.names |= {f"{folder}/{path.name}" for path in (root / folder).iterdir()}
        self.names = {layouts.composed(name) for name in self.names}

    def read(self, name):
        return (self.root / name).read_bytes()

    def put(self, name, target):
        link(layouts.find_file(self.root, name), target)


class Archive:
    """The files of a task in its open .tar, whose one folder is passed over."""

    def __init__(self, tar):
        self.tar = tar
        files = [item for item in tar if item.isfile()]
        found = {layouts.composed(item.name).removeprefix("./"): item for item in files}
        tops = [name[:-12] for name in found if re.fullmatch(r"([^/]+/)?dataset\.json", name)]
        top = tops[0] if len(tops) == 1 else ""
        self.items = {n.removeprefix(top): item for n, item in found.items() if n.startswith(top)}
        self.names = set(self.items)

    def read(self, name):
        return self.tar.extractfile(self.items[name]).read()

    def put(self, name, target):
        with open(target, "wb") as file:
            shutil.copyfileobj(self.tar.extractfile(self.items[name]), file)


@contextmanager
def opened(raw):
    """Yields the Folder or the Archive. FileNotFoundError, ValueError: one line."""
    if raw.is_dir():
        yield Folder(raw)
    elif not raw.exists():
        raise FileNotFoundError(f"{raw}: no such folder or .tar")
    else:
        try:
            with tarfile.open(raw, "r:") as tar:  # not a .tar.gz: each file would be searched for
                yield Archive(tar)
        except tarfile.TarError as error:
            hint = "download it again, or give the unpacked folder"
            raise ValueError(f"{raw}: not a whole .tar file ({error}); {hint}") from None


def inside(name):
    """Return "imagesTr/a.nii.gz" for "./imagesTr/a.nii.gz", in the form of `layouts.composed`.

    Raises ValueError for any other name.
    """
    plain = layouts.composed(PurePosixPath(name).as_posix()) if isinstance(name, str) else ""
    if not FILE.fullmatch(plain):
        raise ValueError(f"{name!r} is no volume in imagesTr, labelsTr or imagesTs")
    return plain


def unlabelled(case):
    """Return the image of a test case, {"image": name} or the name itself, as `inside` does.

    Raises ValueError if it has a label: then the task has splits already.
    """
    if not isinstance(case, dict):
        return inside(case)
    if case.get("label"):
        raise ValueError("the test has labels; train on the task as it is")
    return inside(case["image"])


def read_dataset_json(source, where):
    """A task's dataset.json -> all of it, {image: label} and the images without labels.

    Images without labels that are not there are left out, which is printed.
    FileNotFoundError, ValueError: one line, also if a labelled image or its label is not there.
    """
    if "dataset.json" not in source.names:
        hint = "RAW is one task, Task09_Spleen.tar or what it unpacks to"
        raise FileNotFoundError(f"{where}: no dataset.json in it; {hint}")
    place = f"{where}, dataset.json"
    about = parse_json(decode_text(source.read("dataset.json"), place), place)
    try:
        cases = [(inside(case["image"]), inside(case["label"])) for case in about["training"]]
        pairs = dict(cases)
        bare = [unlabelled(case) for case in about.get("test") or []]
        if {*about["labels"]} != {str(number) for number in range(len(about["labels"]))}:
            raise ValueError("the labels are not 0, 1, 2, … without a gap")
        if not all(isinstance(name, str) for name in about["labels"].values()):
            raise ValueError("a label is no name")
        if len(pairs) + len(set(bare)) < len(cases) + len(bare):
            raise ValueError("an image is listed twice")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        need = 'expected "labels": {"0": name, …}, "training": [{"image", "label"}, …], "test"'
        why = f"has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{place}: {why}; {need}") from None
    if about.get("validation"):
        raise ValueError(f"{place}: lists a validation split; train on it as it is")
    missing = [name for name in (*pairs, *pairs.values()) if name not in source.names]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = "which dataset.json lists; unpack or download it again"
        raise FileNotFoundError(f"{where}: no {missing[0]}{more}, {hint}")
    present = [name for name in bare if name in source.names]
    if len(present) < len(bare):
        missing = [name for name in bare if name not in source.names]
        count = f"{len(missing)} of {len(bare)} images without labels"
        names = ", ".join(missing[:3])
        print(f"{where}: {count} are not there and are left out, {names} among them")
    return about, pairs, present


def in_test(name):
    """The test split's name of a file: "imagesTr/a.nii.gz" -> "imagesTs/a.nii.gz"."""
    return name.replace("Tr/", "Ts/", 1)


def split_cases(pairs, dealt, bare):
    """{image: label}, {image: split} and images without labels -> the splits, and where from.

    The former is {split: [(image, label), ...]}, the latter {name: name in the download}. The test
    split moves to imagesTs and labelsTs: whoever reads the Tr folders whole, as nnU-Net does,
    shall not train on it. ValueError if names meet there.
    """
    splits, origin = {split: [] for split in LISTS}, {name: name for name in bare}
    for image in sorted(pairs):
        case = image, pairs[image]
        names = tuple(map(in_test, case)) if dealt[image] == "test" else case
        if taken := origin.keys() & names:
            raise ValueError(f"{min(taken)}: two volumes of this name; rename one")
        splits[dealt[image]].append(names)
        origin |= zip(names, case, strict=True)
    splits["test"] += [(image, None) for image in sorted(bare)]
    return splits, origin


def deal_cases(pairs, seed, where):
    """{image: split} of the labelled volumes, at random. ValueError if there are less than four."""
    dealt = deal(sorted(pairs), CASES, np.random.default_rng(seed))
    if lost := [split for split in LISTS if split not in dealt.values()]:
        raise ValueError(f"{where}: {len(pairs)} labelled volumes, {lost[0]} would be empty")
    return dealt


def msd(args):
    """Divides a task of the Medical Segmentation Decathlon: 70 % train, 15 % val, 15 % test.

    RAW is one task, Task09_Spleen.tar or what it unpacks to. The labels of its test images are kept
    back, so the test split is dealt at random from the labelled volumes, like the others; the
    images without labels are listed beside, for predict.py OUT/imagesTs. No volume is changed or
    encoded anew: of a folder the files get a second name (a hard link), or a copy where that is
    impossible. With --labels a file such as universal_labels.json says, by the task's name, what
    classes are made of its numbers: those of the Universal Model, whose organs have their tumours
    in them.
    """
    atomic_files.refuse_existing(args.out)
    with opened(args.raw) as source:
        about, pairs, bare = read_dataset_json(source, args.raw)
        about = relabelled(about, args.labels)
        splits, origin = split_cases(pairs, deal_cases(pairs, args.seed, args.raw), bare)

        def put(part, *names):
            for name in filter(None, names):
                source.put(origin[name], part / name)

        title = f"{about.get('name', args.raw.stem)}, Medical Segmentation Decathlon"
        title = [f"{title}, seed {args.seed}", *[LINKED] * args.raw.is_dir()]
        return write_data_set(args.out, about, splits, put, title)


def options(command):
    """Describe `prepare.py msd`."""
    add = command(msd, "divide a task of the Medical Segmentation Decathlon")
    add("raw", type=Path, metavar="RAW", help="Task09_Spleen.tar, or the folder it unpacks to")
    add("--out", type=Path, required=True, help="folder to make")
    add("--seed", type=SEED, default=0, metavar="N", help="of the split (%(default)s)")
    help = "of classes, say universal_labels.json"
    add("--labels", type=Path, metavar="FILE", help=help)
