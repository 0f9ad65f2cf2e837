"""CAMUS: the left heart in ultrasound, three structures, for the medvlsm study.

CAMUS_public holds `database_nifti/patient0001/` with patient0001_2CH_ED.nii.gz (two- or
four-chamber view, end of diastole or systole), the label map patient0001_2CH_ED_gt.nii.gz (1 cavity
of the left ventricle, 2 myocardium, 3 left atrium) and Info_2CH.cfg with lines such as `Sex: F`,
`Age: 56` and `ImageQuality: Good`.

The study used the older release, whose folders training/ and testing/ both count from patient0001.
Its val split is patients 1 to 50 and its train split 51 to 450 of training/; its test split is
testing/. Files keep these names here, in images/train, masks/train/mask_1 and so on. The newer
release counts to patient0500. That its last 50 are those of testing/ is our assumption. The prompts
state sex and age, which must be those of the Info files: otherwise nothing is written.

The study's train.json is missing from some copies of its repository. Without it the train entries
are made here, with the words of the Info files in the study's sentences (p1 to p6). p7 names a
shape that a network saw, and is left out. The sentences are compared with the entries of val and
test.

What was compared with real files: the sentences, with all 2280 entries of 190 patients that were
available. No image or Info file of CAMUS was available here.
"""

import re
import zlib
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from imaging.files import decode_text
from preparation import medvlsm
from preparation.archives import Archive, contents
from preparation.check_findings import count_and_names
from preparation.medvlsm import Annotation, Conversion, DataSet, File, Files, Splits, stem_of

CAMUS = DataSet(
    name="camus",
    title="CAMUS, three structures of the heart in ultrasound",
    archive="CAMUS_public.zip",
    counts={"train": 4800, "val": 600, "test": 600},
    split_source="test: the test patients of CAMUS; val: patients 1 to 50, by medvlsm's authors",
    older_name="camus_80_10_10",
    may_lack=("train",),
)
STRUCTURES = ("Left ventricular cavity", "Myocardium", "Left atrium cavity")  # labels 1, 2, 3
VIEWS = {"2CH": "two", "4CH": "four"}
PHASES = {"ED": "diastole", "ES": "systole"}
LAST_OF_TRAINING = 450  # number of a patient; in CAMUS_public those of testing/ follow
VARIANTS = ("of the heart", "in the cardiac ultrasound")  # of each prompt
NAME = re.compile(r"(patient(\d+))_(2CH|4CH)_(ED|ES)(_gt)?\.nii(\.gz)?")
WITHOUT_TEST = "; --without-test leaves out the test split"
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Info:
    """What an Info file says of a patient and a view."""

    sex: str  # "female" or "male"
    age: int
    quality: str  # "good", "medium" or "poor"


# --- prompts --------------------------------------------------------------------------------------


def number_words(number: int) -> str:
    """Return a number from 0 to 199 in words, "seventy-three"."""
    if number >= 100:
        rest = number - 100
        return "one hundred" + (f" and {number_words(rest)}" if rest else "")
    if number < 20:
        return ONES[number]
    tens = TENS[number // 10 - 2]
    return f"{tens}-{ONES[number % 10]}" if number % 10 else tens


def make_prompts(label: int, view: str, phase: str, info: Info) -> dict[str, str | list[str]]:
    """Return the prompts p0 to p6 of a structure, 1 to 3, in the study's sentences."""
    name = STRUCTURES[label - 1]
    chambers = f" in {VIEWS[view]}-chamber view"
    cycle = f" at end of the {PHASES[phase]} cycle"
    age = number_words(info.age)
    patient = f" of a {age}-year-old {info.sex}"
    endings = {
        "p1": ("", ""),
        "p2": (chambers, ""),
        "p3": (chambers, cycle),
        "p4": (chambers, f"{cycle} of a {info.sex}"),
        "p5": (chambers, f"{cycle}{patient}"),
        "p6": (chambers, f"{cycle}{patient} with {info.quality} image quality"),
    }
    prompts = {"p0": ""}
    for kind, (before, after) in endings.items():
        prompts[kind] = [f"{name}{before} {variant}{after}." for variant in VARIANTS]
    return prompts


# --- the archive ----------------------------------------------------------------------------------


def find_files(opened: list[Archive]) -> Files:
    """Return {file name without ending, such as patient0001_2CH_ED_gt: File} of the NIfTI files.

    Raises FileNotFoundError or ValueError, one line.
    """
    files = {}
    for archive in opened:
        for member in archive.names:
            if not NAME.fullmatch(PurePosixPath(member).name):
                continue
            name = PurePosixPath(member).name.split(".")[0]
            if name in files:
                raise ValueError(
                    f"{archive.path}: {member} and {files[name].member} have the same name; give "
                    "one release only"
                )
            files[name] = File(archive, member)
    if not files:
        raise FileNotFoundError(
            f"no database_nifti/patient0001/patient0001_2CH_ED.nii.gz: {contents(opened)}. Older "
            "releases in other formats (.mhd) are not read"
        )
    return files


def read_infos(files: Files) -> dict[tuple[int, str], Info]:
    """Return {(number of the patient, view): Info} of the Info files next to the images.

    Raises FileNotFoundError or ValueError, one line, for one that is missing or says too little.
    """
    infos = {}
    for name, file in files.items():
        _, number, view, *_ = NAME.fullmatch(f"{name}.nii").groups()
        key = (int(number), view)
        if key not in infos:
            member = PurePosixPath(file.member).with_name(f"Info_{view}.cfg").as_posix()
            place = f"{file.archive.path}: {member}"
            infos[key] = parse_info(decode_text(file.archive.read(member), place), place)
    return infos


def parse_info(text: str, place: str) -> Info:
    """Return what an Info file says. Raises ValueError, one line, if that is too little."""
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        values[key.strip()] = value.strip()
    sex = {"F": "female", "M": "male"}.get(values.get("Sex", ""))
    age = values.get("Age", "")
    quality = values.get("ImageQuality", "").lower()
    if sex is None or not age.isdecimal() or int(age) > 150 or not quality:
        raise ValueError(f"{place}: expected lines such as Sex: F, Age: 56 and ImageQuality: Good")
    return Info(sex, int(age), quality)


def parts_of(annotation: Annotation) -> tuple[int, int, str, str]:
    """Return the patient, label, view and phase of an entry of the study. Raises ValueError."""
    image = NAME.fullmatch(f"{stem_of(annotation.image)}.nii")
    mask = re.fullmatch(r"mask_([123])/(.+)_gt\.png", annotation.mask)
    if not image or not mask or mask[2] != stem_of(annotation.image):
        raise ValueError(
            f"anns: {annotation.image} with {annotation.mask}; expected names such as "
            "patient0001_2CH_ED.png with mask_1/patient0001_2CH_ED_gt.png"
        )
    return int(image[2]), int(mask[1]), image[3], image[4]


# --- entries --------------------------------------------------------------------------------------


def archive_patient(number: int, split: str) -> int:
    """Return the number in CAMUS_public of a patient of the study."""
    return number + LAST_OF_TRAINING if split == "test" else number


def compare_words(splits: Splits, infos: dict) -> list[str]:
    """Return notes of the entries whose image quality is not that of the Info files.

    Raises ValueError, one line, if a sex or an age differs (then the patients are other ones), or
    if a patient is missing.
    """
    missing = set()
    other_quality = set()
    for split, annotations in splits.items():
        for annotation in annotations:
            number, label, view, phase = parts_of(annotation)
            patient = archive_patient(number, split)
            info = infos.get((patient, view))
            if info is None:
                missing.add(f"patient{patient:04} {view}")
                continue
            words = make_prompts(label, view, phase, info)
            if annotation.prompts.get("p5") != words["p5"]:
                raise ValueError(
                    f"patient{patient:04} of the archive: its Info file would give "
                    f"{words['p5'][0]!r}, but {split} of the study has "
                    f"{first_text(annotation, 'p5')!r}: the patients of this release are others"
                    + (WITHOUT_TEST if split == "test" else "")
                )
            if annotation.prompts.get("p6") != words["p6"]:
                other_quality.add(f"patient{patient:04} {view}")

    if missing:
        raise ValueError(
            f"the archive lacks {count_and_names(sorted(missing))}; the study's test patients are "
            f"looked for after patient{LAST_OF_TRAINING:04}{WITHOUT_TEST}"
        )
    if other_quality:
        names = count_and_names(sorted(other_quality))
        return [f"image quality in the prompts differs from that of the Info files: {names}"]
    return []


def first_text(annotation: Annotation, kind: str) -> str:
    """Return the first text of a prompt type, "" if there is none."""
    texts = annotation.prompts.get(kind, [])
    return texts if isinstance(texts, str) else "".join(texts[:1])


def derived_train(splits: Splits, files: Files, infos: dict) -> list[Annotation]:
    """Return train entries for the patients up to LAST_OF_TRAINING that are not in val."""
    others = {parts_of(annotation)[0] for annotation in splits.get("val", [])}
    annotations = []
    for name in sorted(files):
        patient, number, view, phase, is_mask, _ = NAME.fullmatch(f"{name}.nii").groups()
        number = int(number)
        if is_mask or number in others or number > LAST_OF_TRAINING:
            continue
        for label in (1, 2, 3):
            image = f"{patient}_{view}_{phase}"
            prompts = make_prompts(label, view, phase, infos[number, view])
            mask = f"mask_{label}/{image}_gt.png"
            annotations.append(Annotation(f"{image}.png", mask, prompts))
    return annotations


# --- images and masks -----------------------------------------------------------------------------


def read_slice(path: Path) -> np.ndarray:
    """Return the pixels of a NIfTI file of one slice, uint8 (H,W).

    Raises ValueError, one line, for damaged files, other shapes and values outside 0 to 255.
    """
    import nibabel

    try:
        stored = nibabel.load(path)
        pixels = np.asarray(stored.dataobj).squeeze()  # (W,H)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, zlib.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: not readable as NIfTI ({reason}); download it again") from None

    if pixels.ndim != 2:
        raise ValueError(f"{path}: has the shape {stored.shape}; expected one slice")
    if not (pixels.min() >= 0 and pixels.max() <= 255):
        raise ValueError(f"{path}: values from {pixels.min()} to {pixels.max()}; expected 0 to 255")
    return np.ascontiguousarray(pixels.round().astype(np.uint8).T)


def write_image(sources: list[Path], target: Path) -> None:
    """Write the image of a NIfTI file; see medvlsm.Convert."""
    Image.fromarray(read_slice(sources[0])).save(target)


def write_mask(label: int, sources: list[Path], target: Path) -> tuple[int, int]:
    """Write the mask of a label of a label map; see medvlsm.Convert."""
    labels = read_slice(sources[0])
    if labels.max() > len(STRUCTURES):
        raise ValueError(f"{sources[0]}: holds label {labels.max()}; expected 0 to 3")
    mask = labels == label
    medvlsm.save_mask(mask, target)
    return medvlsm.corner_of(mask)


# --- command --------------------------------------------------------------------------------------


def plan(opened: list[Archive], splits: Splits, is_older: bool, args: Namespace) -> Conversion:
    """Return the conversion of CAMUS; see medvlsm.Plan."""
    files = find_files(opened)
    infos = read_infos(files)
    if args.without_test:
        splits.pop("test", None)
    notes = compare_words(splits, infos)
    if "train" not in splits:
        splits["train"] = derived_train(splits, files, infos)
        notes.append(
            f"train: {len(splits['train'])} entries of "
            f"{len({a.image.split('_')[0] for a in splits['train']})} patients were made from the "
            "Info files in the study's sentences, without p7; the study's file has 4800 of 400"
        )

    conversion = Conversion({}, notes, "the pixels of each label", CAMUS.split_source)
    for split, annotations in splits.items():
        folder = "test" if split == "test" else "train"
        named = []
        for annotation in annotations:
            number, label, view, phase = parts_of(annotation)
            patient = f"patient{archive_patient(number, split):04}"
            stored = f"{patient}_{view}_{phase}"
            medvlsm.refuse_missing([stored, f"{stored}_gt"], files, str(opened[0].path))
            moved = replace(
                annotation,
                image=f"{folder}/{annotation.image}",
                mask=f"{folder}/{annotation.mask}",
                group=patient,
            )
            conversion.add(f"images/{moved.image}", [files[stored]], write_image)
            source = files[f"{stored}_gt"]
            conversion.add(f"masks/{moved.mask}", [source], partial(write_mask, label))
            named.append(moved)
        conversion.splits[split] = named
    return conversion


def options(command) -> None:
    """Add the command `prepare.py camus`."""
    details = (
        "Each structure of an image becomes one mask. Without the study's train.json the train\n"
        "split is made from the Info files: p1 to p6, without p7."
    )
    add = medvlsm.add_command(command, CAMUS, plan, details)
    help = "leave out the test split, if its patients cannot be found in the archive"
    add("--without-test", action="store_true", help=help)
