"""List the images and volumes to predict: files, folders, data sets."""

from pathlib import Path

from engine.runs import patients_of
from imaging import layouts, nifti


def list_cases(args, run: dict, reads_text: bool) -> list[tuple[str, Path, str]]:
    """Return (name, image file, text) of all images, and print how many each folder has.

    Raises FileNotFoundError or ValueError, one line, for inputs that do not exist or options that
    do not fit.
    """
    cases = []
    for path in map(Path, args.inputs):
        if layouts.find_splits(path):
            cases += cases_of_data_set(path, args, run, reads_text)
            continue
        if reads_text and (args.prompt is None or layouts.is_prompt_type(args.prompt)):
            check_exists(path, "image")
            raise ValueError(
                f'{path}: images need --prompt "a text"; prompt types belong to data sets'
            )
        for file, folder in input_files(path, "image", args):
            name = file.relative_to(folder).with_suffix("")
            cases.append((name.as_posix(), file, args.prompt or ""))
    return cases


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


def input_files(path: Path, noun: str, args) -> list[tuple[Path, Path]]:
    """Return (file, folder that its name is relative to) of an input, a file or a folder.

    noun: "image" or "volume". For a folder these are the images or volumes in it and its
    sub-folders, without --out, and their number is printed. Raises FileNotFoundError or ValueError,
    one line.
    """
    check_exists(path, noun)
    if path.is_file():
        return [(path, path.parent)]

    out = Path(args.out)
    if out.resolve() == path.resolve():
        raise ValueError(f"{path}: is an input and --out; choose another --out")
    listed = layouts.list_files(path, noun, without=out)
    print(f"{path}: {len(listed)} {noun} files")
    return [(file, path) for file in listed]


def list_volumes(args, run: dict, channels: int) -> dict[str, list[Path]]:
    """Return {name: files of its channels} of all cases. A case's files lie in one folder.

    Raises FileNotFoundError or ValueError, one line.
    """
    cases = []
    single_files = []
    for path in map(Path, sorted(args.inputs)):
        path = unlabelled_test(path, args)
        if layouts.find_splits(path):
            for entry in entries_of(path, args, run):
                cases.append((entry.name, [entry.image, *entry.more_channels]))
        elif path.is_file():
            single_files.append(path)
        else:
            cases += volumes_in_folder(path, args, channels)
    cases += group_channels(single_files, channels)

    by_name = {}
    for name, case_files in cases:
        if name in by_name:
            raise ValueError(f"{name}: two inputs have this name; predict them to two folders")
        by_name[name] = case_files
    return by_name


def volumes_in_folder(root: Path, args, channels: int) -> list[tuple[str, list[Path]]]:
    """Return (name, files of its channels) of the cases in a folder and its sub-folders."""
    files_by_folder = {}
    for file, _ in input_files(root, "volume", args):
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
