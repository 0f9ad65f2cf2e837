"""List the images and volumes to predict: files, folders, data sets."""

from pathlib import Path

from engine.runs import patients_of
from imaging import layouts, nifti
from prediction import dicom
from prediction.prompts import with_prompts
from preparation.dicom_files import is_dicom


def list_cases(args, run: dict, reads_text: bool) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of all images, and print how many each folder has.

    Raises FileNotFoundError or ValueError, one line, for inputs that do not exist or options that
    do not fit.
    """
    has_texts = args.prompts_csv is not None
    reads_text = reads_text and not has_texts
    cases = []
    for path in relevant_inputs(args, "image"):
        if layouts.find_splits(path):
            cases += cases_of_data_set(path, args, run, reads_text)
            continue
        if reads_text and (args.prompt is None or layouts.is_prompt_type(args.prompt)):
            check_exists(path, "image")
            raise ValueError(
                f'{path}: images need --prompt "a text"; prompt types belong to data sets'
            )
        for file, root in input_files(path, "image", args):
            cases.append((dicom.image_name(file, root), file, args.prompt or ""))
    return with_prompts(cases, args) if has_texts else cases


def cases_of_data_set(path: Path, args, run: dict, reads_text: bool) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of the images of a data set; arguments of `list_cases`."""
    prompt = args.prompt
    if prompt is None:
        prompt = run.get("options", {}).get("prompt") if reads_text else ""
    if prompt is None:
        raise ValueError(f"{path}: --prompt is missing: a prompt type (p0…p9) or a text")
    entries = entries_of(path, args, run)
    return [(entry.name, entry.image, entry.text(prompt)) for entry in entries]


def entries_of(path: Path, args, run: dict) -> list[layouts.Entry]:
    """Return the entries of a data set that are to be predicted, and print which these are.

    Without --split they are those of the test split, or all images if the data set has no splits.
    Raises as `layouts.read_entries` does.
    """
    if args.split is None and layouts.is_undivided(path):
        entries = layouts.list_all_images(path)
        print(f"{path}: all {len(entries)} images; --split test takes those of its test split")
        return entries

    split = args.split or "test"
    folder = layouts.split_folder(path, split)
    if folder is not None:  # its masks are not needed, and may not exist
        entries = layouts.list_all_images(path, folder)
    else:
        entries = layouts.read_entries(path, split, patients_of(run, args.inputs))
    print(f"{path}: {len(entries)} cases of its split {split}")
    return entries


def check_exists(path: Path, noun: str) -> None:
    """Raise FileNotFoundError or ValueError, one line, unless an input is a file or a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {noun} or folder")
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: is neither a file nor a folder")


def relevant_inputs(args, noun: str) -> list[Path]:
    """Return the inputs without files of other kinds that only a pattern names, such as notes.txt.

    noun: "image" or "volume". How many such files were skipped is printed. Raises ValueError, one
    line, if nothing is left.
    """
    inputs = []
    skipped = []
    for path in map(Path, args.inputs):
        is_match = path in args.roots and not path.is_dir()
        if is_match and not layouts.is_kind(path, noun) and not is_dicom(path):
            skipped.append(path)
        else:
            inputs.append(path)

    if skipped and not inputs:
        raise ValueError(layouts.nothing_usable(args.roots[skipped[0]], noun, skipped))
    if skipped:
        layouts.print_skipped(args.roots[skipped[0]], noun, skipped)
    return inputs


def input_files(path: Path, noun: str, args) -> list[tuple[Path, Path]]:
    """Return (file, folder that its name is relative to) of an input, a file or a folder.

    noun: "image" or "volume". For a folder these are the images or volumes in it and its
    sub-folders, without --out, and their number is printed; if it has none, its DICOM files. Raises
    FileNotFoundError or ValueError, one line.
    """
    root = args.roots.get(path)
    if root is None:
        check_exists(path, noun)
    if not path.is_dir():
        if noun == "image" and is_dicom(path):
            dicom.list_images([path], path)
        return [(path, root or path.parent)]

    out = Path(args.out)
    if out.resolve() == path.resolve():
        raise ValueError(f"{path}: is an input and --out; choose another --out")
    listed = dicom.files_in(path, noun, out)
    kind = "DICOM" if listed else noun
    if not listed:
        listed = layouts.list_files(path, noun, without=out)
    elif noun == "image":
        listed = dicom.list_images(listed, path)
    print(f"{path}: {len(listed)} {kind} files")
    return [(file, root or path) for file in listed]


def list_volumes(args, run: dict, channels: int) -> dict[str, list | dicom.Series]:
    """Return {name: case} of all cases.

    A case is the list of its channels' files, which lie in one folder, or what `dicom.list_series`
    returns. Raises FileNotFoundError or ValueError, one line.
    """
    cases = []
    typed_files = []
    files_by_root = {}
    for path in sorted(relevant_inputs(args, "volume")):
        path = unlabelled_test(path, args)
        if layouts.find_splits(path):
            for entry in entries_of(path, args, run):
                cases.append((entry.name, [entry.image, *entry.more_channels]))
            continue
        for file, root in input_files(path, "volume", args):
            is_typed = file == path and path not in args.roots
            if is_typed and not is_dicom(file):
                typed_files.append(file)
            else:
                files_by_root.setdefault(root, []).append(file)

    for root, files in files_by_root.items():
        slices = [file for file in files if is_dicom(file)]
        cases += dicom.list_series(slices, root)
        volumes = sorted({*files} - {*slices})
        cases += cases_by_folder(volumes, root, channels)
    cases += group_channels(typed_files, channels)

    by_name = {}
    for name, case in cases:
        if name in by_name:
            raise ValueError(f"{name}: two inputs have this name; predict them to two folders")
        by_name[name] = case
    return by_name


def cases_by_folder(files: list[Path], root: Path, channels: int) -> list[tuple[str, list[Path]]]:
    """Return (name, files of its channels) of the cases among files below the folder `root`."""
    files_by_folder = {}
    for file in files:
        files_by_folder.setdefault(file.parent, []).append(file)

    cases = []
    for folder, folder_files in files_by_folder.items():
        for name, case_files in group_channels(folder_files, channels):
            cases.append(((folder.relative_to(root) / name).as_posix(), case_files))
    return cases


def unlabelled_test(path: Path, args) -> Path:
    """Return imagesTs/ of a data set whose test split has no labels; any other input as it is."""
    images = path / "imagesTs"
    splits = layouts.find_splits(path)
    wants_test = args.split in (None, "test")
    has_unlabelled_test = bool(splits) and "test" not in splits and images.is_dir()
    return images if wants_test and has_unlabelled_test else path


def group_channels(listed: list[Path], channels: int) -> list[tuple[str, list[Path]]]:
    """Return (name, files of its channels) of the cases among the files of a folder.

    channels: the model's. Raises ValueError, one line, if two cases have the same name.
    """
    complete = []  # files with all channels
    for file in listed:
        count = channels_in(file)
        if count == channels or (count is None and channels == 1):
            complete.append(file)

    # patient_0001 and patient_0002 are two cases. _0000 is nnU-Net's ending if all files have it.
    stems = [layouts.without_ending(file) for file in complete]
    ending = "_0000" if all(stem.endswith("_0000") for stem in stems) else ""
    cases = []
    for stem, file in zip(stems, complete, strict=True):
        cases.append((stem.removesuffix(ending), [file]))
    single_channels = sorted({*listed} - {*complete})
    return cases + [*layouts.channels_of(single_channels).items()]


def channels_in(file: Path) -> int | None:
    """Return how many channels a file has; None if it cannot be read, which fails later."""
    try:
        return nifti.read_grid(file).channels
    except (ValueError, OSError):
        return None
