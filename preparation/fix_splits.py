"""Remove from training what is also tested: `prepare.py check DATA --fix-splits`."""

from pathlib import Path

from engine import tables
from imaging import atomic_files, layouts
from imaging.files import read_json
from preparation.check_findings import ERROR, Findings
from preparation.check_images import read_images, read_splits
from preparation.check_leaks import same_stem
from preparation.check_volumes import read_cases

Removals = dict[str, dict[str, str]]  # split -> name of an entry -> why it is removed


def fix_splits(root: Path, group_regex: str | None) -> None:
    """Remove entries of train and val whose image or patient is in val or test, and print them.

    Only annotation files are rewritten: anns/train.json, and val. The former file stays as
    anns/train.json.before. Raises ValueError, one line, if a split cannot be read, if entries to
    remove are not listed in annotation files, if nothing to train on would remain, and if another
    process writes annotation files.
    """
    if not (root / "anns").is_dir():
        remove_shared(root, group_regex)
        return
    with atomic_files.claim_folder(root / "anns"):
        remove_shared(root, group_regex)


def remove_shared(root: Path, group_regex: str | None) -> None:
    """Do the work of `fix_splits`."""
    findings = Findings()
    splits = read_any_splits(root, group_regex, findings)
    unusable = findings["splits that cannot be used"]
    if unusable:
        raise ValueError(unusable[0])
    read = read_cases if layouts.has_volumes(root) else read_images
    facts = read(splits, findings)
    unreadable = findings.count(ERROR)
    if unreadable:
        print(f"{root}: {unreadable} files cannot be read and are compared by name and patient")

    removals = find_removals(splits, facts)
    if not removals:
        print(f"{root}: nothing to remove; train, val and test share no image and no patient")
        return
    if not (root / "anns").is_dir() or layouts.has_volumes(root):
        raise ValueError(describe_moves(root, splits, removals))
    refuse_empty_train(root, splits, removals)
    refuse_former_files(root, removals)

    for split, reasons in removals.items():
        path = root / "anns" / f"{split}.json"
        rewrite(path, set(reasons))
        print(f"{path}: removed {len(reasons)} entries; the former file is {former(path).name}")
        for name, reason in reasons.items():
            print(f"  {name}: {reason}")


def read_any_splits(root: Path, group_regex: str | None, findings: Findings) -> dict[str, list]:
    """Return {split: its entries} of images or volumes; raises ValueError for damaged volumes."""
    if layouts.has_volumes(root):
        return layouts.read_volumes(root, group_regex)
    return read_splits(root, group_regex, findings)


def keys_of(entry: layouts.Entry, facts: dict) -> dict[tuple, str]:
    """Return what two splits must not share of an entry, with the words for it."""
    keys = {("stem", same_stem(entry.image)): "its image"}
    if entry.image in facts:
        keys["pixels", facts[entry.image].digest] = "a copy of its image"
    if entry.group is not None:
        keys["patient", entry.group] = f"its patient {entry.group}"
    return keys


def find_removals(splits: dict[str, list], facts: dict) -> Removals:
    """Return the entries to remove, so that no image and no patient has two roles.

    facts: {image: its facts, with `digest`}. Test splits stay as they are. What remains of val
    stays, too, so that train loses what it shares with either.
    """
    taken = {}  # key of an entry that stays -> its split
    removals = {}
    for role in ("test", "val", "train"):
        staying = {}
        for split, entries in splits.items():
            if layouts.split_role(split) != role:
                continue
            for entry in entries:
                keys = keys_of(entry, facts)
                shared = [key for key in keys if key in taken]
                if shared:
                    reason = f"{keys[shared[0]]} is in {taken[shared[0]]}"
                    removals.setdefault(split, {})[entry.name] = reason
                else:
                    staying |= dict.fromkeys(keys, split)
        taken = staying | taken
    return removals


def describe_moves(root: Path, splits: dict[str, list], removals: Removals) -> str:
    """Return the message about files that must be moved by hand, as no annotation file lists them.

    It names all of their images, relative to the data set.
    """
    files = []
    for split, entries in splits.items():
        for entry in entries:
            if entry.name in removals.get(split, {}):
                file = entry.image.relative_to(entry.root).as_posix()
                files.append(f"{file} ({split})")
    place = "in folders"
    if layouts.has_volumes(root):
        place = "in dataset.json"
    elif layouts.is_undivided(root):
        place = "drawn at random"
    return (
        f"{root}: --fix-splits edits anns/*.json, but the splits of this data set are {place}; "
        f"move or remove these images with their masks: {', '.join(files)}"
    )


def refuse_empty_train(root: Path, splits: dict[str, list], removals: Removals) -> None:
    """Raise ValueError if all entries of train would be removed."""
    train = splits.get("train", [])
    if train and len(removals.get("train", {})) == len(train):
        raise ValueError(
            f"{root}: all {len(train)} entries of train share an image or a patient with val or "
            "test; make new splits"
        )


def former(path: Path) -> Path:
    """Return the name under which the former annotation file stays; it is not read as a split."""
    return path.with_name(f"{path.name}.before")


def refuse_former_files(root: Path, removals: Removals) -> None:
    """Raise ValueError if a former file of an earlier run would be overwritten.

    If it equals the present file, that run was stopped before it changed anything.
    """
    for split in removals:
        path = root / "anns" / f"{split}.json"
        before = former(path)
        if before.exists() and before.read_bytes() != path.read_bytes():
            raise ValueError(f"{before}: exists already; move it elsewhere, then run this again")


def rewrite(path: Path, removed: set[str]) -> None:
    """Write an annotation file without the entries of some names; keep the former file."""
    with atomic_files.atomic_write(former(path)) as part:
        part.write_bytes(path.read_bytes())

    staying = []
    for item in read_json(path):
        if layouts.entry_name(item["mask_name"], item.get("label")) not in removed:
            staying.append(item)
    tables.write_json(path, staying)
