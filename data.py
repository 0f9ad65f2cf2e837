"""Images and masks -> samples, decoded once into one memory-mapped file, and batches of them.

How files are read
- Images: grey becomes three equal channels, alpha is dropped, 16-bit, 32-bit and float images are
  stretched from their own minimum..maximum to 0..255. The EXIF orientation is applied.
- Masks: colours (and palettes, by the colours they show) become one channel by their maximum.
  Foreground is > 127 where the largest value of the split's masks exceeds 1, else > 0, so that 0/1,
  0/255, 1-bit, palette and JPEG masks all work. With `label` or classes.json the file's own numbers
  count, but where it names one class alone, masks of any other values than 0, 1 and 255, or without
  a 1, are binary all the same. A mask without an orientation tag, of the size of the image as
  stored, is turned as its image is.

A sample is a dict: `image` uint8 (3,H,W), `mask` int64 (H,W) of class numbers (0 and 1 of binary
masks; 255: does not count), `prompt` str, `name` (the mask's stem), `file` (the image's path),
`size` (H,W), `classes` (of binary masks one, else with the background), `group` (a patient, or
None), `dataset`.
"""

import functools
import hashlib
import os
import secrets
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


@functools.cache
def colour_table(name: str) -> np.ndarray:
    """What colour, RGB, a map gives each grey level, uint8 (256,3).

    name: one of matplotlib's, or OpenCV's name (COLORMAP_BONE is bone; its rainbow and ocean are
    other colours). ValueError: unknown.
    """
    import matplotlib

    known = {known.lower(): known for known in matplotlib.colormaps}
    found = known.get(name.lower().removeprefix("colormap_"))
    if found is None:
        hint = "bone, viridis, turbo, … of matplotlib.colormaps"
        raise ValueError(f"--pseudocolor {name}: unknown; take one of {hint}")
    return matplotlib.colormaps[found](np.arange(256) / 255, bytes=True)[:, :3]


def pseudocolor(image: np.ndarray, name: str | None) -> np.ndarray:
    """Image uint8 (H,W,3) -> its grey levels in the colours of a map, or as it is without one."""
    if name is None:
        return image
    return colour_table(name)[np.asarray(Image.fromarray(image).convert("L"))]


def foreground_above(maximum: int) -> int:
    """What the foreground of binary masks exceeds, where `maximum` is the split's largest value."""
    return 127 if maximum > 1 else 0


# --- the cache: every image and mask decoded once ------------------------------------------------


def _read_pair(entry) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 (H,W,3), raw mask uint8 (H,W) of one entry; ValueError if their sizes differ."""
    image = read_image(entry.image)
    mask = read_mask(entry.mask, entry.image, entry.label is not None or entry.numbers)
    if image.shape[:2] != mask.shape:
        (h, w), (H, W) = mask.shape, image.shape[:2]
        raise ValueError(f"{entry.mask}: {w}x{h}, but its image {entry.image} is {W}x{H}")
    return image, mask


def _content_key(entries: list) -> str:
    """A hash of what the entries' files hold and of how they are read."""
    key = hashlib.sha256(b"rules 2")  # raise the number when the reading rules above change
    with ThreadPoolExecutor() as pool:
        files = [path for entry in entries for path in (entry.image, entry.mask)]
        for digest in pool.map(lambda path: hashlib.sha256(path.read_bytes()).digest(), files):
            key.update(digest)
    how = [(entry.label, entry.classes, entry.numbers, str(entry.root)) for entry in entries]
    key.update(repr(how).encode())
    return key.hexdigest()[:24]


def _rules(entries: list, values: np.ndarray) -> np.ndarray:
    """How many pixels of each entry have which value, (n,256) -> the last columns of `_cache`."""
    rules = np.full((len(entries), 2), -1)
    for i, entry in enumerate(entries):
        if entry.label is not None:
            rules[i, 1] = values[i, entry.label]
    for root in {entry.root for entry in entries}:
        ours = [i for i, e in enumerate(entries) if e.root == root and e.label is None]
        if not ours:
            continue
        first, have = entries[ours[0]], values[ours].any(axis=0)  # (256,)
        one = len(first.classes) == 1
        if first.numbers and not (one and (have[2:255].any() or not have[1])):
            rules[ours, 1] = values[ours, 1:255].sum(axis=1)
            for i in ours:
                if not one and values[i, len(first.classes) : 255].any():
                    value = np.flatnonzero(values[i, :255])[-1]
                    where = f"{root / 'classes.json'} ends at {len(first.classes) - 1}"
                    raise ValueError(f"{entries[i].mask}: holds class number {value}, but {where}")
            continue
        top = np.flatnonzero(have)[-1]
        threshold = foreground_above(top)
        rules[ours, 0], rules[ours, 1] = threshold, values[ours, threshold + 1 :].sum(axis=1)
        if 1 < top <= threshold:
            hint = "class numbers need a classes.json or labels"
            raise ValueError(f"{root}: the masks hold 0 to {top}, none above 127; {hint}")
    return rules


def _decode(entries: list, file) -> np.ndarray:
    """Writes the pixels of all entries to an open file; returns the rows of `_cache`."""
    places, image_at, end = [], {}, 0
    values = np.zeros((len(entries), 256), np.int32)
    bar = tqdm(total=len(entries), desc="decode", unit="image", disable=None, leave=False)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), 64):  # in chunks, so that memory stays small
            chunk = entries[start : start + 64]
            for entry, (image, mask) in zip(chunk, pool.map(_read_pair, chunk)):
                if entry.image not in image_at:
                    image_at[entry.image], end = end, end + file.write(image.tobytes())
                values[len(places)] = np.bincount(mask.ravel(), minlength=256)
                places.append([image_at[entry.image], end, *mask.shape])
                end += file.write(mask.tobytes())
                bar.update()
    return np.hstack([np.array(places, dtype=np.int64), _rules(entries, values)])


def _cache(entries: list, folder: Path) -> tuple[Path, np.ndarray]:
    """Decodes all pixels into `folder/KEY.bin`, unless that is there already.

    Returns the file and int64 rows (n,6): where the image begins, where the mask begins, height,
    width, the mask's threshold (-1: its numbers count), its number of foreground pixels.
    """
    pixels, index = (folder / f"{_content_key(entries)}{end}" for end in (".bin", ".npy"))
    if index.is_file() and pixels.is_file():  # it is written last: the pixels then are whole
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
    part = pixels.with_suffix(f".{secrets.token_hex(4)}")  # containers share process ids
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

    def __init__(self, entries: list, rows: np.ndarray, path: Path, colours: str | None = None):
        self.entries, self.rows, self.path, self.colours = entries, rows, path, colours
        self.classes = entries[0].classes
        self.tokenizer = None  # see `compare_prompts_by`
        self._bytes = None  # mapped on first use, in each process

    def __getstate__(self):
        return self.__dict__ | {"_bytes": None}  # pickling a memory map would copy all pixels

    def __len__(self) -> int:
        return len(self.entries)

    def subset(self, indices) -> "Dataset":
        """The same pixels, fewer entries."""
        entries = [self.entries[i] for i in indices]
        part = Dataset(entries, self.rows[indices], self.path, self.colours)
        part.tokenizer = self.tokenizer
        return part

    def pixels(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (H,W,3), a view of the file, and mask uint8 (H,W) of entry i."""
        if self._bytes is None:
            self._bytes = np.memmap(self.path, dtype=np.uint8, mode="r")
        image_at, mask_at, h, w, threshold, _ = self.rows[i]
        image = self._bytes[image_at : image_at + h * w * 3].reshape(h, w, 3)
        mask = self._bytes[mask_at : mask_at + h * w].reshape(h, w)
        if self.entries[i].label is not None:
            mask = mask == self.entries[i].label
        elif threshold >= 0:
            mask = mask > threshold
        return image, np.asarray(mask, np.uint8)

    def sample(self, i: int, kind: str, rng: np.random.Generator | None = None) -> dict:
        """The sample dict of the module's docstring; kind and rng as for `Entry.text`."""
        entry, (image, mask) = self.entries[i], self.pixels(i)
        image = pseudocolor(image, self.colours)
        sample = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}  # (3,H,W)
        sample |= {"mask": torch.from_numpy(mask.astype(np.int64)), "size": mask.shape}  # (H,W)
        sample |= {"prompt": entry.text(kind, rng), "classes": self.classes}
        sample |= {"name": entry.name, "file": entry.image}
        return sample | {"group": entry.group, "dataset": entry.root.name}

    def compare_prompts_by(self, tokenizer) -> None:
        """Compare prompts by the token ids that a model's tokenizer, text -> (1,T), gives them."""
        self.tokenizer = tokenizer
        for cached in ("_keys", "_prompts"):
            self.__dict__.pop(cached, None)

    def prompt_key(self, text: str) -> tuple:
        """Return what a model sees of a prompt: texts with equal keys are the same prompt.

        These are the token ids of `tokenizer`. Without one, texts that differ only in case and
        blanks are the same, as they are to CLIP's and BERT's tokenizers.
        """
        if self.tokenizer is None:
            return tuple(text.lower().split())
        if text not in self._keys:
            self._keys[text] = tuple(self.tokenizer(text)[0].tolist())
        return self._keys[text]

    @functools.cached_property
    def _keys(self) -> dict[str, tuple]:
        """Text -> its token ids."""
        return {}

    @functools.cached_property
    def _prompts(self) -> dict[Path, set[tuple]]:
        """Image -> the keys of the prompts of all its entries."""
        keys = {}
        for entry in self.entries:
            for texts in entry.prompts.values():
                keys.setdefault(entry.image, set()).update(map(self.prompt_key, texts))
        return keys

    def check_negatives(self, kind: str) -> None:
        """Raise ValueError if an image has no `absent_prompt`."""
        asked = {}  # data set -> the keys of its prompts of this kind
        for entry in self.entries:
            asked.setdefault(entry.root, set()).update(map(self.prompt_key, entry.texts(kind)))

        for entry in self.entries:
            if asked[entry.root] <= self._prompts.get(entry.image, set()):
                raise self._no_absent_prompt(entry, kind)

    def _no_absent_prompt(self, entry, kind: str) -> ValueError:
        root, image = entry.root.name, entry.image.name
        return ValueError(
            f"{root}: --negatives needs prompts that differ to the model; all {kind} prompts of "
            f"other images are also prompts of {image}"
        )

    def absent_prompt(self, i: int, kind: str, rng: np.random.Generator) -> str:
        """Return a prompt of another image of the same data set that no entry of image i has.

        To the model, see `prompt_key`. This is all that tells that its target is not in image i.
        Raises ValueError if all prompts are alike.
        """
        mine = self.entries[i]
        present = self._prompts.get(mine.image, set())
        others = []
        for j in rng.permutation(len(self)):
            other = self.entries[j]
            if other.root == mine.root and other.image != mine.image:
                prompt = other.text(kind, rng)
                if self.prompt_key(prompt) not in present:
                    return prompt
                others.append(other)

        # The draw from several texts of an entry may have missed the one that is absent.
        for other in others:
            for prompt in other.texts(kind):
                if self.prompt_key(prompt) not in present:
                    return prompt
        raise self._no_absent_prompt(mine, kind)

    def describe(self) -> str:
        """What was found, in a line."""
        rules = {127: "> 127", 0: "> 0", -1: "by number"}
        read = " and ".join(rules[threshold] for threshold in sorted({*self.rows[:, 4].tolist()}))
        order = (self.rows[:, 2] * self.rows[:, 3]).argsort()
        (h, w), (H, W) = self.rows[order[0], 2:4], self.rows[order[-1], 2:4]
        images, empty = len({entry.image for entry in self.entries}), (self.rows[:, 5] == 0).sum()
        sizes = f"{images} images from {w}x{h} to {W}x{H}"
        return f"{len(self)} entries, {sizes}, masks read {read}, {empty} of them empty"


def open_dataset(entries: list, cache: Path = ".cache", colours: str | None = None) -> Dataset:
    """Decodes the entries of one or several data sets; each data set keeps its own rule for masks.

    colours: of `pseudocolor`, in which samples come. Raises FileNotFoundError, ValueError or
    OSError, one line with the file's name, for anything missing, truncated or of another size, for
    a data set whose masks are all empty, and for a full disk.
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
        if len({entries[0].classes, *(entries[i].classes for i in ours)}) > 1:
            raise ValueError(f"{root}: other classes than {entries[0].root}'s; pool like with like")
        if not rows[ours, 5].any():
            one = entries[ours[0]].mask
            raise ValueError(f"{root}: all {len(ours)} masks are empty, {one} for one")
    return Dataset(entries, rows, path, colours)


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
    batch normalisation has nothing to normalise one vector by. n is 1 or more."""
    return max(1, n // size + (n % size > (1 if size > 1 else 0)))


def train_batches(n: int, size: int, epochs: int, seed: int, start: int):
    """Yields batches of (epoch, i), every epoch in its own seeded order, from number `start` on."""
    per_epoch = batches_per_epoch(n, size)
    for number in range(start, epochs * per_epoch):
        epoch, k = divmod(number, per_epoch)
        if k == 0 or number == start:
            order = np.random.default_rng((seed, epoch)).permutation(n)
        yield [(epoch, int(i)) for i in order[k * size : (k + 1) * size]]


def loader(items: Items, batches, workers: int, device: torch.device, collate=None):
    """A DataLoader over batches of (epoch, i): in training stacked, or by `collate`; in evaluation
    single items."""
    return torch.utils.data.DataLoader(
        items,
        batch_sampler=batches,
        collate_fn=collate if items.train else itemgetter(0),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: opening a loader must not move torch's random state
    )
