"""What a run leaves for people: overlays, curves, tables; files written whole or not at all."""

import argparse
import colorsys
import csv
import errno
import json
import os
import re
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGINT

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from engine import startup
from imaging.atomic_files import (
    full_disk_errors,
    is_full_disk,
    open_locked,
    release,
    remove_leftovers,
    whole_file,
)

# green and magenta: apart on tissue, also for the colour-blind
TRUTH, PREDICTION = (0, 230, 90), (255, 0, 200)


# --- files and errors -----------------------------------------------------------------------------


def refuse_existing(out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out, or remove it")


@contextmanager
def whole_folder(out: Path):
    """Yield a name beside `out` for a folder, which takes the place of `out` if all went well.

    Raises ValueError if `out` has content, or if another process is making it at this moment.
    """
    with locked(out.with_name(f".{out.name}.lock"), out) as is_locked:
        if out.exists() and any(out.iterdir()):  # made since the program looked
            refuse_existing(out)

        # Without locks two processes may be here: each then needs a name of its own.
        ending = "part" if is_locked else secrets.token_hex(4)
        part = out.with_name(f".{out.name}.{ending}")
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process
        try:
            with full_disk_errors(out):
                yield part
            os.replace(part, out)
        finally:
            shutil.rmtree(part, ignore_errors=True)


# --- one process a folder -------------------------------------------------------------------------

@contextmanager
def claim(folder: Path):
    """Keep every other process out of an output folder for as long as this one works in it.

    The folder is made if it is missing, and removed again if nothing was written to it. Temporary
    files that killed processes left in it are removed. Raises ValueError if another process has
    claimed the folder, if this is one of several processes, or if there is a file of this name.
    """
    refuse_several_processes()
    if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
        raise ValueError(f"{folder}: is a file, or lies below one; choose another --out")
    with locked(folder / ".lock", folder):
        remove_leftovers(folder)
        yield


@contextmanager
def locked(path: Path, folder: Path):
    """Hold an operating-system lock on the file `path`, so that only one process writes `folder`.

    The system releases the lock when the process ends, even after kill -9: a leftover file locks
    nothing. Folders around `path` that are missing are made, and removed again if they stay empty.
    Yields True, or False, after saying so, where the file system has no locks. Raises ValueError if
    another process holds the lock.
    """
    missing = [place for place in path.parents if not place.exists()]  # the innermost first
    try:
        descriptor = open_locked(path)
    except BlockingIOError:
        message = "another process is writing to this folder; wait until it ends, or choose "
        raise ValueError(f"{folder}: {message}another --out") from None

    if descriptor is None:
        path.unlink(missing_ok=True)
        print(f"{folder}: the file system has no locks; start no second process on this folder")
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)  # before the lock is released, see `open_locked`
            release(descriptor)
        for place in missing:
            with suppress(OSError):  # it is not empty
                place.rmdir()


def refuse_several_processes() -> None:
    """Raise ValueError if torchrun, or a launcher like it, started this as one of several."""
    size = os.environ.get("WORLD_SIZE", "")
    has_rank = "RANK" in os.environ or "LOCAL_RANK" in os.environ
    if has_rank and size.isdecimal() and int(size) > 1:
        message = "several processes are not supported yet; start a single one, without torchrun"
        raise ValueError(f"WORLD_SIZE is {size}: {message}")


# --- tables, errors and the log -------------------------------------------------------------------


def write_json(path: Path, content) -> None:
    """NaN and infinities, which JSON does not know, become null."""
    content = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """One column for every key that occurs, in the order of first occurrence."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


class Parser(argparse.ArgumentParser):
    """argparse with whole option names only, whose complaints are one line."""

    def __init__(self, description: str, **more):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False, **more)

    def error(self, message: str):
        value = re.fullmatch(r"argument (\S+): (.+: must be .+)", message)
        if value:  # what engine/ranges.py refuses reads as it does from Python: --lr -1: must be …
            self.exit(2, f"error: {value[1]} {value[2]}\n")
        self.exit(2, f"error: {message}; --help lists the options\n")


def command(main) -> None:
    """Run a program's `main`, then exit: with its status, or with one line on stderr.

    The status is 2 for what the user can mend, and 128 more than the number of a signal: 130 for
    Ctrl-C, 143 for SIGTERM. Any other error is a mistake of ours and keeps its traceback.
    """
    startup.catch_signals()
    startup.hide_warnings()
    try:
        status = main()
    except (KeyboardInterrupt, MemoryError, RuntimeError, ValueError, OSError) as error:
        startup.ignore_signals()  # the line below comes whole, and no second one
        message = describe_error(error)
        if message is None:
            raise
        if os.environ.get("TRACEBACK"):  # for whoever looks for the place in the code
            traceback.print_exc()
        # Close the progress bars and end the data-loading processes of the functions that failed.
        traceback.clear_frames(error.__traceback__)
        number = interruption(error)
        status = 2 if number is None else 128 + number
        with suppress(OSError):  # the terminal is gone
            print(message, file=sys.stderr, flush=True)
    leave(status)


def leave(status: int | None) -> None:
    """Exit, without a traceback if what still waits to be printed cannot be."""
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, or a pipe that nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or 2
    sys.exit(status)


@contextmanager
def way_on(describe: Callable[[], str], override: bool = False):
    """Let the line about an interruption, a full disk or memory end with what `describe` returns.

    It says what is safe and how to go on. The innermost block decides, or one with `override`.
    """
    try:
        yield
    except (KeyboardInterrupt, MemoryError, RuntimeError, OSError) as error:
        if override or not hasattr(error, "way_on"):
            error.way_on = describe()
        raise


def chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that it followed from."""
    errors = []
    while error is not None:
        errors.append(error)
        error = error.__cause__ or error.__context__
    return errors


def interruption(error: BaseException) -> int | None:
    """Return the number of the signal that an error followed from, None if it was none."""
    for cause in chain(error):
        if isinstance(cause, KeyboardInterrupt):
            return getattr(cause, "number", SIGINT)
    return None


# What torch says of a data-loading process that died.
DEAD_WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (\w+)|exited)")
# What says that there is no memory: torch of a CPU and of a GPU, numpy within a data-loading
# process, and C++ at large.
FULL_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    r"|MemoryError|Unable to allocate|bad_alloc"
)
SHARED_MEMORY = re.compile(r"shared memory object|shared memory\(shm\)|to file </torch_")
SMALLER = (
    "take a smaller --batch-size or --size, of volumes also fewer --classes, --crops-per-volume or "
    "--window-batch, or --checkpointing"
)


def describe_error(error: BaseException) -> str | None:
    """Return the line that a user reads about an error, None if it is a mistake of ours."""
    more = next((cause.way_on for cause in chain(error) if hasattr(cause, "way_on")), "")
    more = more or "nothing is left half written; run the same command again"
    number = interruption(error)
    if number is not None:
        how = {2: "by Ctrl-C", 15: "by SIGTERM", 1: "because the terminal was closed"}[number]
        return f"stopped {how}: {more}"
    if is_dead_worker(error):
        return f"error: {describe_dead_worker(error)}; {more}"
    if is_out_of_memory(error):
        return f"error: out of memory: {SMALLER}; {more}"
    if is_full_disk(error):
        return f"error: {describe_full_disk(error)}; {more}"
    if isinstance(error, BrokenPipeError):
        return f"error: the program that reads the output has ended; {more}"
    if isinstance(error, ValueError | OSError):
        return f"error: {last_line(error)}"
    return None


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message.

    The message of a data-loading process is a traceback, which ends with the kind of the error.
    """
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[0] if len(lines) == 1 else re.sub(r"^\w+Error: ", "", lines[-1])


def is_dead_worker(error: BaseException) -> bool:
    """Return True if a data-loading process was killed, or its connection broke as it was."""
    for cause in chain(error):
        if isinstance(cause, RuntimeError):
            if DEAD_WORKER.search(str(cause)) or SHARED_MEMORY.search(str(cause)):
                return True
        if isinstance(cause, ConnectionError | EOFError):
            frames = traceback.extract_tb(cause.__traceback__)
            if any(Path(frame.filename).name == "dataloader.py" for frame in frames):
                return True
    return False


def describe_dead_worker(error: BaseException) -> str:
    """Return what happened to a data-loading process, and what helps."""
    texts = " ".join(str(cause) for cause in chain(error))
    if SHARED_MEMORY.search(texts) or "signal: Bus" in texts:
        return "the memory that processes share (/dev/shm) is full: use --workers 0, or enlarge it"
    killed = DEAD_WORKER.search(texts)
    how = f" (signal {killed[1]})" if killed and killed[1] else ""
    hint = "most often because memory ran out: use fewer --workers"
    return f"a data-loading process was killed{how}, {hint}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if memory ran out, on the CPU or a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and bool(FULL_MEMORY.search(str(error)))


def describe_full_disk(error: BaseException) -> str:
    """Return which file could not be written, and why."""
    numbered = [cause for cause in chain(error) if getattr(cause, "errno", None)]
    if not numbered:
        return f"the disk is full ({last_line(error):.150}): free some space"
    name = numbered[0].filename or "a file, or what is printed,"
    return f"{name} could not be written ({numbered[0].strerror}): free some space"


class Log:
    """Standard output that is kept, with the time, in log.txt."""

    def __init__(self, screen, file):
        self.screen, self.file = screen, file

    def write(self, text: str) -> None:
        self.screen.write(text)
        self.file.write(text.replace("\n", time.strftime("    %Y-%m-%d %H:%M:%S\n")))

    def flush(self) -> None:
        self.screen.flush()
        self.file.flush()


# --- pictures -------------------------------------------------------------------------------------


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Bool (H,W) -> the rim of its foreground, `width` pixels wide and inside of it."""
    return mask & ~ndimage.binary_erosion(mask, iterations=width)


def colours(n: int) -> list[tuple[int, int, int]]:
    """n colours, RGB, to tell classes apart: hues a golden angle apart."""
    hues = [(0.33 + 0.618034 * k) % 1 for k in range(n)]
    return [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(hue, 0.8, 1)) for hue in hues]


def overlay(image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray) -> Image.Image:
    """Image uint8 (H,W,3), masks bool (n,H,W), one a class -> the prediction filled, the rim of the
    truth: in magenta and green, or of several classes both in the colour of the class."""
    width, several = max(1, min(image.shape[:2]) // 150), len(prediction) > 1
    inks = colours(len(prediction)) if several else [PREDICTION]
    fill = 0.45 if several else 0.15
    shown = image.astype(np.float32)
    for mask, ink in zip(prediction, inks):
        shown[mask] = (1 - fill) * shown[mask] + fill * np.array(ink)
        if not several:
            shown[outline(mask, width)] = ink
    for mask, ink in zip(() if truth is None else truth, inks if several else [TRUTH]):
        shown[outline(mask, width)] = ink
    return Image.fromarray(shown.astype(np.uint8))


def three_planes(x: np.ndarray, at: tuple[int, ...], spacing) -> np.ndarray:
    """(…,X,Y,Z), axes to right, front and top -> (…,H,W): an axial, a coronal and a sagittal plane
    through voxel `at` side by side, in true proportions.

    As radiologists look: from the feet, from the front, and with the nose to the left.
    """
    planes, finest = [], min(spacing)
    for axis in (2, 1, 0):
        plane = np.take(x, at[axis], axis - 3).swapaxes(-1, -2)[..., ::-1, ::-1]  # (…,h,w)
        for place, other in zip((-1, -2), (a for a in range(3) if a != axis)):
            n = plane.shape[place]
            size = round(n * spacing[other] / finest)
            plane = np.take(plane, np.arange(size) * n // size, place)
        planes.append(plane)
    tallest = max(plane.shape[-2] for plane in planes)
    none = [(0, 0)] * (x.ndim - 3)
    sides = [[*none, (0, tallest - plane.shape[-2]), (0, 0)] for plane in planes]
    return np.concatenate([np.pad(*pair) for pair in zip(planes, sides)], -1)


def volume_overlay(
    image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray, spacing
) -> Image.Image:
    """`overlay` of `three_planes`: uint8 (X,Y,Z), bool (n,X,Y,Z), mm -> a picture.

    The planes are those with most of the truth (without one, of the prediction), small classes
    counting as much as large ones.
    """
    shown = prediction if truth is None or not truth.any() else truth
    at = []
    for axis in range(3):
        areas = shown.sum(tuple(1 + a for a in range(3) if a != axis))  # (n,side)
        at.append(int((areas / np.maximum(1, areas.sum(1, keepdims=True))).sum(0).argmax()))
    masks = [None if x is None else three_planes(x, at, spacing) for x in (truth, prediction)]
    grey = three_planes(image, at, spacing)
    return overlay(np.repeat(grey[..., None], 3, 2), *masks)


def draw_prompts(picture: Image.Image, prompts: list[tuple]) -> None:
    """Draw SAM's prompts into a picture, in its pixels: boxes and points yellow, outside ones cyan.

    Each prompt is a box or None, its points (P,2), and their labels (P,): 1 inside, 0 outside, -1
    no point.
    """
    draw, r = ImageDraw.Draw(picture), max(2, min(picture.size) // 80)
    for box, points, labels in prompts:
        if box is not None:
            draw.rectangle([float(x) for x in box], outline="yellow", width=max(1, r // 3))
        for (x, y), inside in zip(points, labels):
            if inside >= 0:
                ink = "yellow" if inside else "cyan"
                draw.ellipse((x - r, y - r, x + r, y + r), ink, "black")


def legend(names: tuple[str, ...], width: int = 320) -> Image.Image:
    """The names of the classes without the background, each beside its colour."""
    page = Image.new("RGB", (width, 20 * len(names) + 4), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for k, (name, ink) in enumerate(zip(names, colours(len(names)))):
        draw.rectangle((4, 20 * k + 4, 20, 20 * k + 20), ink, "black")
        draw.text((28, 20 * k + 4), name, "black", font)
    return page


def class_map(numbers: np.ndarray, classes: int) -> Image.Image:
    """Class numbers uint8 (H,W) -> a palette image of the same numbers in the classes' colours.

    All 256 have one, grey beyond the classes: of a short palette Pillow keeps few bits of a pixel,
    and 255, which does not count, would be 15.
    """
    picture, inks = Image.fromarray(numbers), [(0, 0, 0), *colours(classes - 1)]
    picture.putpalette([x for ink in inks + [(128,) * 3] * (256 - classes) for x in ink])
    return picture


def captioned(picture: Image.Image, caption: str, width: int = 320) -> Image.Image:
    """The picture at a common width, with its caption below in as many lines as it needs.

    A picture more than three times as tall as wide keeps its shape and becomes narrower.
    """
    scale = min(width / picture.width, 3 * width / picture.height)
    sides = [max(1, round(scale * side)) for side in picture.size]  # one row of pixels stays one
    picture = picture.resize(sides)
    font, lines = ImageFont.load_default(size=13), []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") < width - 8:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    card = Image.new("RGB", (width, picture.height + 17 * len(lines) + 8), "white")
    card.paste(picture)
    draw = ImageDraw.Draw(card)
    for i, line in enumerate(lines):
        draw.text((4, picture.height + 3 + 17 * i), line, "black", font)
    return card


def sheet(cards: list[Image.Image], columns: int = 3, gap: int = 6) -> Image.Image:
    """Cards of one width, row by row, on white."""
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) + gap for row in rows]
    width = min(columns, len(cards)) * (cards[0].width + gap) - gap
    page = Image.new("RGB", (width, sum(heights) - gap), "white")
    for i, row in enumerate(rows):
        for k, card in enumerate(row):
            page.paste(card, (k * (card.width + gap), sum(heights[:i])))
    return page


def save_picture(path: Path, picture: Image.Image) -> None:
    with whole_file(path) as part:
        picture.save(part, format="PNG")


def curves(path: Path, history: list[dict]) -> None:
    """Losses, and validation scores, over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axes, names in (left, ("train_loss", "val_loss")), (right, ("val_dice", "val_iou")):
        for name in names:
            rows = [row for row in history if name in row]  # not every epoch validates
            if rows:
                x, y = ([row[key] for row in rows] for key in ("epoch", name))
                axes.plot(x, y, ".-", label=name.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1)
    with whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


# --- words ----------------------------------------------------------------------------------------


# Said once a test: what the intervals are, and what no interval of this kind can hold.
INTERVALS = "95 % intervals: expanded percentile bootstrap"
ABSENT = "failures that the test cases do not contain are in no interval"


def interval(score: dict) -> str:
    """Return "[low, high]  n=cases" of a mean; one case has no interval."""
    ends = "[no interval]   "
    if not np.isnan(score["low"]):
        ends = f"[{score['low']:.4f}, {score['high']:.4f}]"
    return f"{ends}  n={score['n']}"


def score_label(name: str, summary: dict) -> str:
    """Return the name of a score as a table shows it: distances with their unit, NSD with its
    tolerance, where the summary has them."""
    unit = summary.get("distance_unit")
    if unit is None or name not in ("hd95", "assd", "nsd"):
        return name
    if name == "nsd":
        return f"nsd ({summary['nsd_tolerance']:g} {unit})"
    return f"{name} ({unit})"


def table(summary: dict) -> str:
    """A summary of scores (metrics.summarise) as lines of text: mean [95 % interval]."""
    scores = {
        name: score
        for name, score in summary.items()
        if isinstance(score, dict) and "mean" in score
    }
    lines = []
    for name, score in scores.items():
        label = score_label(name, summary)
        lines.append(f"  {label:12} {score['mean']:8.4f}  {interval(score)}")
    classes = summary.get("classes", {})
    width = max([12, *map(len, classes)])
    for name, of in classes.items():
        unit = summary.get("distance_unit", "")
        more = f"  HD95 {of['hd95']['mean']:.2f} {unit}".rstrip() if "hd95" in of else ""
        dice = f"Dice {of['dice']['mean']:.4f}  {interval(of['dice'])}"
        lines.append(f"  {name:{width}} {dice}  IoU {of['iou']['mean']:.4f}{more}")
    if "macro_f1_pooled" in summary:
        lines.append(f"  macro F1 of all pixels, with background: {summary['macro_f1_pooled']:.4f}")
    cases = sum(of["images"] for of in classes.values()) if classes else summary["images"]
    what = "classes in images" if classes else "images"
    lines.append(f"  misses and false alarms: {summary['misses']} of {cases} {what}")
    if "image_specificity" in summary:
        alarms = summary["false_alarms"]
        images = f"{summary['empty_images']} images without foreground"
        specificity = f"specificity of images {summary['image_specificity']:.4f}"
        lines.append(f"  false alarms: {alarms} of {images}, {specificity}")
    if "warning" in summary:
        for warning in summary["warning"].split("; "):
            lines.append(f"  {warning}")
    return "\n".join(lines)


def study_table(summaries: dict[str, dict], examples: dict[str, str] | None = None) -> str:
    """Dice and IoU by what was asked, as lines of text, perhaps with an example."""
    lines, width = [], max(4, *map(len, summaries))
    for kind, summary in summaries.items():
        dice, iou = summary["dice"], summary["iou"]
        score = f"Dice {dice['mean']:.4f} {interval(dice)}  IoU {iou['mean']:.4f}"
        lines.append(f"  {kind:{width}} {score}" + (f"  “{examples[kind]}”" if examples else ""))
    return "\n".join(lines)
