"""Folders of images and masks -> samples, decoded once into one memory-mapped file.

Prompted layout (that of medvlsm, github.com/naamiinepal/medvlsm): `images/`, `masks/`,
`anns/SPLIT.json`, each a list of entries

    {"img_name": "a.jpg", "mask_name": "a.png", "prompts": {"p1": "polyp", "p7": ["…", "…"]}}

with an optional `"label": k` where the mask is a class map and `mask == k` is meant. Any further
annotation file, say `anns/testA.json`, is a split of that name.

How files are read
- Images: grey becomes three equal channels, alpha is dropped, 16-bit, 32-bit and float images are
  stretched from their own minimum..maximum to 0..255. The EXIF orientation is applied.
- Masks: colours (and palettes, by the colours they show) become one channel by their maximum.
  Foreground is > 127 where the largest value of the split's masks exceeds 1, else > 0, so that 0/1,
  0/255, 1-bit, palette and JPEG masks all work. With `label` the file's own numbers count. A mask
  without an orientation tag, of the size of the image as stored, is turned as its image is.

A sample is a dict: `image` uint8 (3,H,W), `mask` int64 (H,W) of 0 and 1, `prompt` str, `name` (the
mask's stem), `size` (H,W), `classes`, `group` (a patient, or None), `dataset`.
"""

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

# --- files ---------------------------------------------------------------------------------------


def open_image(path: Path, decode: bool = True) -> Image.Image:
    """An image file, decoded or only its head. FileNotFoundError, ValueError: one line."""
    try:
        image = Image.open(path)
        if decode:
            image.load()
        return image
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not readable as an image ({error}); replace the file") from None


def read_image(path: Path) -> np.ndarray:
    """An image file -> uint8 (H,W,3), upright. Raises as `open_image` does."""
    image = ImageOps.exif_transpose(open_image(path))
    if image.mode == "F" or image.mode.startswith("I"):  # floats, 16- and 32-bit integers
        x = np.asarray(image, dtype=np.float64)
        x = (x - x.min()) * (255 / max(x.max() - x.min(), 1e-12))
        return np.repeat(x.round().astype(np.uint8)[..., None], 3, axis=2)  # (H,W,3)
    if image.mode == "P":  # a palette may hold transparency, which only RGBA can take
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


def read_mask(path: Path, image: Path | None = None, numbers: bool = False) -> np.ndarray:
    """A mask file -> uint8 (H,W), values as stored (larger than 255: 255), upright.

    `image`: the file whose mask this is, for its orientation. `numbers`: the values are class
    numbers, so that a palette image gives its indices instead of its colours. Raises as
    `open_image` does.
    """
    mask, tag = open_image(path), ExifTags.Base.Orientation
    if image is not None and tag not in mask.getexif():
        stored = open_image(image, decode=False)
        if stored.size == mask.size and tag in stored.getexif():
            mask.getexif()[tag] = stored.getexif()[tag]
    mask = ImageOps.exif_transpose(mask)
    if mask.mode[0] not in "LIF" and not (mask.mode == "P" and numbers) or mask.mode == "LA":
        mask = mask.convert("RGB")  # 1-bit, palette and every kind of colour
    x = np.asarray(mask)
    x = x if x.ndim == 2 else x[..., :3].max(axis=2)  # (H,W)
    return x.clip(0, 255).astype(np.uint8)


def binarise(mask: np.ndarray, maximum: int) -> np.ndarray:
    """uint8 (H,W) -> bool (H,W): > 127 where the split's largest value exceeds 1, else > 0."""
    return mask > (127 if maximum > 1 else 0)


# --- annotations ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One image with one binary mask and the texts that ask for it."""

    name: str  # the mask's path in masks/ without its ending (with a label: -k); unique in a split
    image: Path
    mask: Path
    prompts: dict[str, list[str]]  # prompt type -> its texts
    root: Path  # the data set's folder
    label: int | None = None  # the mask is a class map and this number is meant
    group: str | None = None  # patient


def is_prompt_type(text: str) -> bool:
    """Whether a prompt option names types (p6, "p6,p3", random) rather than being a text itself."""
    return re.fullmatch(r"random|p\d+(,p\d+)*", text) is not None


def prompt_types(entry: Entry, kind: str) -> list[str]:
    """The types that an option draws from: those it lists, or for `random` all but the empty p0."""
    return [k for k in entry.prompts if k != "p0"] if kind == "random" else kind.split(",")


def all_texts(entry: Entry, kind: str) -> list[str]:
    """Every text that `choose_prompt` can give."""
    if not is_prompt_type(kind):
        return [kind]
    return [text for k in prompt_types(entry, kind) for text in entry.prompts.get(k, [])]


def choose_prompt(entry: Entry, kind: str, rng: np.random.Generator | None = None) -> str:
    """A text of one of the types of `kind`, or `kind` itself if it is a text.

    Where there are several, `rng` draws type and text; without it the first is taken. ValueError if
    the entry has none of that type.
    """
    if not is_prompt_type(kind):
        return kind
    kinds = prompt_types(entry, kind)
    kind = kinds[rng.integers(len(kinds))] if rng is not None else kinds[0]
    texts = entry.prompts.get(kind)
    if not texts:
        where, have = f"{entry.root.name}, {entry.name}", ", ".join(entry.prompts)
        raise ValueError(f"{where}: no prompt of type {kind}, only {have}; choose another --prompt")
    return texts[rng.integers(len(texts))] if rng is not None else texts[0]


def splits(root: Path) -> list[str]:
    """Names of the annotation files of a data set."""
    return sorted(path.stem for path in (Path(root) / "anns").glob("*.json"))


def _locate(root: Path, kind: str, name: str, split: str) -> Path:
    """`KIND/NAME`, or `KIND/SPLIT/NAME` (CAMUS keeps what it validates on in the folder train)."""
    folders = ["", split, "train"] if split == "val" else ["", split]
    paths = [root / kind / folder / name for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def _entry(root: Path, split: str, item: dict, group_regex: str | None) -> Entry:
    image, mask, label = item["img_name"], item["mask_name"], item.get("label")
    prompts = {k: [v] if isinstance(v, str) else list(v) for k, v in item["prompts"].items()}
    if not all(isinstance(text, str) for texts in prompts.values() for text in texts):
        raise TypeError("prompts must be strings or lists of strings")
    name = os.path.splitext(mask)[0] + (f"-{int(label)}" if label is not None else "")
    match = re.search(group_regex, image) if group_regex else None
    if group_regex and not match:
        raise ValueError(f"--group-regex {group_regex} finds nothing in {image}")
    group = match[match.re.groups and 1] if match else None  # its first group, or all that matched
    paths = _locate(root, "images", image, split), _locate(root, "masks", mask, split)
    return Entry(name, *paths, prompts, root, label, group)


def read_annotations(root: Path, split: str, group_regex: str | None = None) -> list[Entry]:
    """The entries of `root/anns/SPLIT.json`, whether or not their files exist.

    Entries repeated word for word are listed once, and that is printed. Raises FileNotFoundError or
    ValueError, one line, if the file is missing or no such list, or if two entries share a name.
    """
    root = Path(root).resolve()
    path, entries, number = root / "anns" / f"{split}.json", {}, None
    if not path.is_file():
        have = ", ".join(splits(root)) or "none"
        raise FileNotFoundError(f"{path}: no such annotation file; splits here: {have}")
    try:
        for number, item in enumerate(json.loads(path.read_text(encoding="utf-8"))):
            entry = _entry(root, split, item, group_regex)
            if entries.setdefault(entry.name, entry) == entry:
                continue
            hint = "rename it, or join the prompts in a list"
            raise ValueError(f"a second mask named {entry.name}; {hint}")
    except (KeyError, TypeError, AttributeError) as error:
        hint = "expected a list of objects with img_name, mask_name, prompts"
        raise ValueError(f"{path}, entry {number}: {error!r}; {hint}") from None
    except ValueError as error:  # JSONDecodeError is one
        where = "" if number is None else f", entry {number}"
        raise ValueError(f"{path}{where}: {error}") from None
    if number is not None and number + 1 > len(entries):
        print(f"{path}: {number + 1 - len(entries)} repeated entries are left out")
    return list(entries.values())


# --- the cache: every image and mask decoded once ------------------------------------------------


def _read_pair(entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (H,W,3), raw mask uint8 (H,W) of one entry; ValueError if their sizes differ."""
    image = read_image(entry.image)
    mask = read_mask(entry.mask, entry.image, numbers=entry.label is not None)
    if image.shape[:2] != mask.shape:
        (h, w), (H, W) = mask.shape, image.shape[:2]
        raise ValueError(f"{entry.mask}: {w}x{h}, but its image {entry.image} is {W}x{H}")
    return image, mask


def _content_key(entries: list[Entry]) -> str:
    """A hash of what the entries' files hold and of how they are read."""
    key = hashlib.sha256(b"rules 1")  # raise the number when the reading rules above change
    with ThreadPoolExecutor() as pool:
        files = [path for entry in entries for path in (entry.image, entry.mask)]
        for digest in pool.map(lambda path: hashlib.sha256(path.read_bytes()).digest(), files):
            key.update(digest)
    key.update(repr([(entry.label, str(entry.root)) for entry in entries]).encode())
    return key.hexdigest()[:24]


def _decode(entries: list[Entry], file) -> np.ndarray:
    """Writes the pixels of all entries to an open file; returns the rows of `_cache`."""
    rows, counts, image_at, end = [], [], {}, 0
    bar = tqdm(total=len(entries), desc="decode", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), 64):  # in chunks, so that memory stays small
            chunk = entries[start : start + 64]
            for entry, (image, mask) in zip(chunk, pool.map(_read_pair, chunk)):
                if entry.image not in image_at:
                    image_at[entry.image], end = end, end + file.write(image.tobytes())
                rows.append([image_at[entry.image], end, *mask.shape, -1, 0])
                end += file.write(mask.tobytes())
                values = np.bincount(mask.ravel(), minlength=256)
                at_label = 0 if entry.label is None else values[entry.label]
                counts.append((mask.max(), values[1:].sum(), values[128:].sum(), at_label))
                bar.update()
    rows, counts = np.array(rows, dtype=np.int64), np.array(counts, dtype=np.int64)
    rows[:, 5] = counts[:, 3]
    for root in {entry.root for entry in entries}:
        ours = [i for i, e in enumerate(entries) if e.root == root and e.label is None]
        if ours:
            wide = counts[ours, 0].max() > 1  # the rule of `binarise`
            rows[ours, 4], rows[ours, 5] = 127 if wide else 0, counts[ours, 2 if wide else 1]
    return rows


def _cache(entries: list[Entry], folder: Path) -> tuple[Path, np.ndarray]:
    """Decodes all pixels into `folder/KEY.bin`, unless that is there already.

    Returns the file and int64 rows (n,6): where the image begins, where the mask begins, height,
    width, the mask's threshold (-1 with a label), its number of foreground pixels.
    """
    pixels, index = (folder / f"{_content_key(entries)}{end}" for end in (".bin", ".npy"))
    if index.is_file():  # it is written last: where it is, the pixels are whole
        return pixels, np.load(index)
    folder.mkdir(parents=True, exist_ok=True)
    images = {entry.image for entry in entries}
    areas = {path: np.prod(open_image(path, decode=False).size) for path in images}
    need = 3 * sum(areas.values()) + sum(areas[entry.image] for entry in entries)
    free = shutil.disk_usage(folder).free
    print(f"decoding {len(areas)} images once into {pixels} ({need / 1e6:,.0f} MB)", flush=True)
    if need > free:
        short = f"{need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise OSError(f"{folder}: {short}; choose another folder with --cache")
    part = pixels.with_suffix(f".{os.getpid()}")
    try:
        with open(part, "wb") as file:
            rows = _decode(entries, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, pixels)
        with open(part, "wb") as file:
            np.save(file, rows)
        os.replace(part, index)
    finally:
        part.unlink(missing_ok=True)
    return pixels, rows


# --- data sets -----------------------------------------------------------------------------------


class Dataset:
    """Entries of one or several data sets; their pixels lie in one file that all workers map."""

    classes = ("target",)  # one class: what the prompt asks for

    def __init__(self, entries: list[Entry], rows: np.ndarray, path: Path):
        self.entries, self.rows, self.path = entries, rows, path
        self._bytes = None  # mapped on first use, in each process

    def __getstate__(self):
        return self.__dict__ | {"_bytes": None}  # pickling a memory map would copy all pixels

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices) -> "Dataset":
        """The same pixels, fewer entries."""
        return Dataset([self.entries[i] for i in indices], self.rows[indices], self.path)

    def pixels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H,W,3), a view of the file, and mask bool (H,W) of entry i."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        image_at, mask_at, h, w, threshold, _ = self.rows[i]
        image = self._bytes[image_at : image_at + h * w * 3].reshape(h, w, 3)
        mask = self._bytes[mask_at : mask_at + h * w].reshape(h, w)
        label = self.entries[i].label
        return image, np.asarray(mask > threshold if label is None else mask == label)

    def sample(self, i: int, kind: str, rng: np.random.Generator | None = None) -> dict:
        """The sample dict of the module's docstring; kind and rng as for `choose_prompt`."""
        entry, (image, mask) = self.entries[i], self.pixels(i)
        sample = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}  # (3,H,W)
        sample |= {"mask": torch.from_numpy(mask.astype(np.int64)), "size": mask.shape}  # (H,W)
        sample |= {"prompt": choose_prompt(entry, kind, rng), "classes": self.classes}
        return sample | {"name": entry.name, "group": entry.group, "dataset": entry.root.name}

    def absent_prompt(self, i: int, kind: str, rng: np.random.Generator) -> str:
        """A prompt of another image of the same data set, whose text entry i does not have: all
        that tells that its target is not in image i. ValueError if all are alike."""
        mine = self.entries[i]
        texts = {text for texts in mine.prompts.values() for text in texts}
        for j in rng.permutation(len(self)):
            other = self.entries[j]
            if other.root == mine.root and other.image != mine.image:
                prompt = choose_prompt(other, kind, rng)
                if prompt not in texts:
                    return prompt
        raise ValueError(f"{mine.root.name}: --negatives needs prompts that differ; {kind} do not")

    def describe(self) -> str:
        """What was found, in a line."""
        rules = {127: "> 127", 0: "> 0", -1: "by label"}
        read = " and ".join(rules[threshold] for threshold in sorted({*self.rows[:, 4].tolist()}))
        order = (self.rows[:, 2] * self.rows[:, 3]).argsort()
        (h, w), (H, W) = self.rows[order[0], 2:4], self.rows[order[-1], 2:4]
        images, empty = len({entry.image for entry in self.entries}), (self.rows[:, 5] == 0).sum()
        sizes = f"{images} images from {w}x{h} to {W}x{H}"
        return f"{len(self)} entries, {sizes}, masks read {read}, {empty} of them empty"


def annotations(root: Path, split: str, group_regex: str | None = None) -> list[Entry]:
    """Recognises what a folder is and lists a split. FileNotFoundError, ValueError: one line."""
    if not Path(root).is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    if not (Path(root) / "anns").is_dir():
        need = "images/, masks/, anns/{train,val,test}.json"
        raise ValueError(f"{root}: no data set; it needs {need}")
    return read_annotations(root, split, group_regex)


def train_and_val(roots, seed: int, group_regex=None) -> tuple[list[Entry], list[Entry]]:
    """Entries to train and to validate on, of one or several data sets.

    A missing or empty `val` is replaced by a seeded tenth of train, by patient if known, else by
    image, and that is printed.
    """
    train, val = [], []
    for root in roots:
        ours, theirs = annotations(root, "train", group_regex), []
        if "val" in splits(root):
            theirs = annotations(root, "val", group_regex)
        if not theirs:
            group = [entry.group or str(entry.image) for entry in ours]
            groups = np.random.default_rng(seed).permutation(sorted({*group}))
            tenth = groups[: max(1, round(len(groups) / 10))]
            theirs = [entry for entry, g in zip(ours, group) if g in tenth]
            ours = [entry for entry, g in zip(ours, group) if g not in tenth]
            print(f"{root}: no validation split; {len(theirs)} of train serve (seed {seed})")
        train, val = train + ours, val + theirs
    return train, val


def open_dataset(entries: list[Entry], cache: Path = ".cache") -> Dataset:
    """Decodes the entries of one or several data sets; each data set keeps its own rule for masks.

    Raises FileNotFoundError, ValueError or OSError, one line with the file's name, for anything
    missing, truncated or of another size, for a data set whose masks are all empty, and for a full
    disk.
    """
    if not entries:
        raise ValueError("the annotation file has no entries")
    lost = [path for entry in entries for path in (entry.image, entry.mask) if not path.is_file()]
    if lost:
        names = ", ".join(map(str, lost[:5])) + (" …" if len(lost) > 5 else "")
        raise FileNotFoundError(f"{len(lost)} files are missing: {names}")
    path, rows = _cache(entries, Path(cache))
    for root in {entry.root for entry in entries}:
        ours = [i for i, entry in enumerate(entries) if entry.root == root]
        if not rows[ours, 5].any():
            one = entries[ours[0]].mask
            raise ValueError(f"{root}: all {len(ours)} masks are empty, {one} for one")
    return Dataset(entries, rows, path)


# --- loaders -------------------------------------------------------------------------------------


@dataclass
class Items(torch.utils.data.Dataset):
    """What a worker makes of (epoch, i): a recipe's inputs for entry i, with a seed of its own."""

    dataset: Dataset
    prompt: str
    inputs: callable  # (sample, train, rng) -> dict
    train: bool
    seed: int
    negatives: float = 0.0  # share of training items that ask for what is not there

    def __getitem__(self, where: tuple[int, int]) -> dict:
        epoch, i = where
        rng = np.random.default_rng((self.seed, epoch, i))
        sample = self.dataset.sample(i, self.prompt, rng if self.train else None)
        if self.train and self.negatives and rng.random() < self.negatives:
            sample["prompt"] = self.dataset.absent_prompt(i, self.prompt, rng)
            sample["mask"] = torch.zeros_like(sample["mask"])
        return self.inputs(sample, self.train, rng)


def batches_per_epoch(n: int, size: int) -> int:
    """Batches of `size` in n items. A last one of a single item is left out, unless all are such:
    batch normalisation has nothing to normalise one vector by."""
    return n // size + (n % size > (1 if size > 1 else 0))


def train_batches(n: int, size: int, epochs: int, seed: int, start: int):
    """Yields batches of (epoch, i), every epoch in its own seeded order, from number `start` on."""
    per_epoch = batches_per_epoch(n, size)
    for number in range(start, epochs * per_epoch):
        epoch, k = divmod(number, per_epoch)
        if k == 0 or number == start:
            order = np.random.default_rng((seed, epoch)).permutation(n)
        yield [(epoch, int(i)) for i in order[k * size : (k + 1) * size]]


def loader(items: Items, batches, workers: int, device: torch.device):
    """A DataLoader over batches of (epoch, i): stacked in training, single items in evaluation."""
    return torch.utils.data.DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=None if items.train else itemgetter(0),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: opening a loader must not move torch's random state
    )
