"""Run a study: many runs of train.py as one command, which can be stopped and continued.

    python studies.py few-shot --data data/demo_volumes --new-class spleen --k 1 2 4 8 --draws 3
        --text-codes text_codes.safetensors --variant mini --weights none --out runs/few-shot

All other options are passed to train.py and hold for all runs of the study.
`python studies.py few-shot --help` explains the study.
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import argparse
import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import metrics
import options
import train
from engine import command_line, startup
from engine.ranges import POSITIVE, Number
from engine.runs import fits
from engine.tables import ABSENT, INTERVALS, write_csv, write_json
from imaging import atomic_files, files, layouts, nifti
from options import Options, flag
from recipes import universal

# --- the runs of any study -----------------------------------------------------------------------


@dataclass(frozen=True)
class StudyRun:
    """One run of a study. k: number of volumes of the new class, None for a base run."""

    method: str
    k: int | None
    draw: int | None
    options: Options

    def __str__(self) -> str:
        parts = [self.method, "base" if self.k is None else f"K {self.k}"]
        if self.draw is not None:
            parts.append(f"draw {self.draw}")
        return ", ".join(parts)

    @property
    def out(self) -> Path:
        """Return the run folder."""
        return Path(self.options.out)

    @property
    def test(self) -> Path:
        """Return the folder of the test."""
        return self.out / "test"

    def is_finished(self) -> bool:
        """Return True if the last file of the test is written."""
        return (self.test / "summary.json").is_file()


def run_one(run: StudyRun, threads: int) -> None:
    """Train and test. Its output goes only to its log.txt."""
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        train.run(run.options)
    (run.out / "last.pt").unlink(missing_ok=True)


def run_all(runs: list[StudyRun], jobs: int) -> None:
    """Do the unfinished runs in order, `jobs` at a time, each after the run that it starts from."""
    waiting = {}  # number -> run that is not finished
    for number, run in enumerate(runs, 1):
        if not run.is_finished():
            waiting[number] = run
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")

    bar = tqdm(desc="study", total=len(waiting), unit="run", disable=None)
    active = {}  # number -> future
    cores = torch.get_num_threads()
    if jobs > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(jobs, spawn, startup.begin_child)
    else:
        pool = InThisProcess()

    with pool, bar, children_end_with_us():
        while waiting:
            ready = ready_runs(waiting, active)
            # A run that is alone gets all cores.
            threads = max(1, cores // min(jobs, len(ready) + len(active)))
            for number in ready[: jobs - len(active)]:
                tqdm.write(f"run {number} of {len(runs)}: {waiting[number]}")
                active[number] = pool.submit(run_one, waiting[number], threads)

            wait(active.values(), return_when=FIRST_COMPLETED)
            for number in [number for number, future in active.items() if future.done()]:
                error = active.pop(number).exception()
                run = waiting.pop(number)
                if error:
                    print_failure(run)
                    pool.shutdown(cancel_futures=True)
                    raise failure(error)
                bar.update()


def ready_runs(waiting: dict[int, StudyRun], active: dict[int, Future]) -> list[int]:
    """Return the numbers of the runs that can start: the weights they need are finished."""
    unfinished = {run.options.out for run in waiting.values()}
    ready = []
    for number, run in waiting.items():
        if number not in active and run.options.weights not in unfinished:
            ready.append(number)
    return ready


def print_failure(run: StudyRun) -> None:
    """Print which run failed, and where its log is."""
    log = run.out / "log.txt"
    hint = f", its log is {log}" if log.exists() else ""
    tqdm.write(f"{run} failed{hint}", sys.stderr)


def failure(error: BaseException) -> BaseException:
    """Return the error of a run; OSError, one line, if its process was killed."""
    if isinstance(error, BrokenExecutor):
        return OSError(
            "the process of a run was killed, perhaps because memory ran out: use fewer --jobs; "
            "finished runs are kept"
        )
    return error


@contextlib.contextmanager
def children_end_with_us():
    """End the processes of runs if this one is interrupted, instead of waiting for them."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise


class InThisProcess(Executor):
    """Executor that runs each function at once, in this process."""

    def submit(self, function, *arguments) -> Future:
        """Call a function. Return a future that is done."""
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def same_options(path: Path, new: dict, later: str) -> dict:
    """Return the options of a study to write to `path`, which may hold those of an earlier call.

    later: the option that may be None in one of the two calls. Raises ValueError, one line, if the
    study was started with different options, or if the file is damaged.
    """
    new = json.loads(json.dumps(new, default=str))
    old = files.read_json(path) if path.is_file() else new
    if not isinstance(old, dict) or later not in old:
        raise ValueError(
            f"{path}: is not the file of a study's options; restore it, or choose another --out"
        )
    new[later] = new[later] or old[later]
    options.check_same(path.parent, old | {later: old[later] or new[later]}, new)
    return new


# --- scores with intervals -----------------------------------------------------------------------


def class_means(values: np.ndarray, by_draw: np.ndarray, by_case: np.ndarray) -> np.ndarray:
    """Return the mean over the classes of each one's weighted mean: (R,).

    values: (D,N,C), NaN where a class does not count. by_draw (R,D), by_case (R,N): how often each
    draw and each case is taken in each of R resamples.
    """
    is_known = ~np.isnan(values)  # (D,N,C)
    product = "rd,rn,dnc->rc"
    count = np.einsum(product, by_draw, by_case, is_known.astype(float))  # (R,C)
    total = np.einsum(product, by_draw, by_case, np.where(is_known, values, 0))  # (R,C)
    with np.errstate(invalid="ignore"):  # 0/0: none of the cases has this class
        means = total / count
        return np.where(count > 0, means, 0).sum(1) / (count > 0).sum(1)  # (R,)


def estimate(values: np.ndarray, before=None, resamples: int = 2000) -> dict | None:
    """Return the mean of scores with its 95 % interval: {"mean", "low", "high", "n"}.

    values: (D,N,C) of D draws, N cases and C classes, NaN where unknown. before: (1,N,C); with it
    the mean change since then. n of the (D,N) scores are known; None if none is.

    Expanded percentile bootstrap (metrics.interval_percentiles) that resamples both draws and
    cases: neither the scores of a case in several draws are independent, nor those of the cases of
    a draw. It is expanded for the smaller of two numbers, the known cases and, if there are
    several, the known draws, which is the careful choice. Low and high are NaN if only one case is
    known.
    """
    is_known = ~np.isnan(values).all(2)  # (D,N)
    n = int(is_known.sum())
    if n == 0:
        return None

    # The first row takes each draw and each case once, the others are resamples.
    rng = np.random.default_rng(0)
    weights = []
    for size in values.shape[:2]:
        resampled = rng.multinomial(size, np.full(size, 1 / size), resamples)  # (R,size)
        weights.append(np.concatenate((np.ones((1, size)), resampled)))  # (1+R,size)
    by_draw, by_case = weights
    means = class_means(values, by_draw, by_case)  # (1+R,)
    if before is not None:
        means = means - class_means(before, np.ones((len(means), 1)), by_case)

    draws = int(is_known.any(1).sum())
    cases = int(is_known.any(0).sum())
    independent = min(draws, cases) if draws > 1 else cases
    low, high = metrics.interval(means[1:], independent)
    return {"mean": float(means[0]), "low": low, "high": high, "n": n}


def cell(score: dict | None, sign: str = "") -> str:
    """Return a score as a table shows it: mean [low, high]. sign: "+" shows the sign."""
    if score is None:
        return "–"
    mean = f"{score['mean']:{sign}.3f}"
    if np.isnan(score["low"]):
        return f"{mean} [no interval]"
    return f"{mean} [{score['low']:{sign}.3f}, {score['high']:{sign}.3f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for row in [head, rule, *rows]:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --- few-shot: its runs --------------------------------------------------------------------------

FEW_SHOT = """Compare methods that learn one more organ from K volumes.

1. Train a base model of each method on all classes but the new one. Voxels of the new class are
   background there.
2. Fine-tune it on the new class alone, with K volumes of the training split in which nothing else
   is annotated. The number of steps is the same for every K.
3. Test its last weights on the new class. Test the other classes before and after step 2, which
   shows how much was forgotten.

The K volumes are drawn several times. The volumes of a smaller K are among those of a larger one,
and all methods get the same volumes. Methods:

    text         Universal Model, which knows classes by CLIP's embedding of their names; with K = 0
                 the base model predicts the new class from its embedding alone
    text+mlp     text, and the layers that the few-shot study called attention (fewshot3d.py)
    random       Universal Model with a random embedding for each class
    random+mlp   random, and the same layers as text+mlp
    plain        Swin UNETR with a sigmoid per class; the new class gets a new head, which replaces
                 those of the other classes, so that forgetting cannot be measured

Without --from-plain each base model is trained from --weights, at --base-lr for --base-epochs. With
--from-plain only the base model of plain is; the others start from it, which takes less time and
depends less on chance. --variant and --weights apply to runs that do not start from a base model;
--train, --lora-rank and --adapter-dim to those that do. All trained layers share one learning rate.
--weights must not know the new class: use none, or a Swin UNETR (such as its encoder) that was
trained without it.

The folder --out gets data/ (for each set of volumes a dataset.json and a link to --data), the runs
(METHOD/base, METHOD/k2-draw1; without last.pt, which is only needed to resume), results.csv (a row
for each method, K, draw, class and case), table.md and few_shot.png.

All options of train.py can be added; `python train.py --help` lists them. Defaults are in brackets:
[recipe] is the setting of the model's recipe.
"""

METHODS = {  # method -> options of train.py
    "text": {"model": "universal", "codes": "text"},
    "text+mlp": {"model": "fewshot3d", "codes": "text"},
    "random": {"model": "universal", "codes": "random"},
    "random+mlp": {"model": "fewshot3d", "codes": "random"},
    "plain": {"model": "swin_unetr3d"},
}
FIRST_OPTIONS = ("variant", "weights")  # only for runs that do not start from a base model
LATER_OPTIONS = ("train", "lora_rank", "adapter_dim")  # only for those that do
SET_BY_STUDY = (
    "model", "data", "test", "out", "resume", "eval", "epochs", "max_steps", "batch_size",
    "grad_accum_steps", "backbone_lr", "codes", "overfit", "fold",
)  # fmt: skip


LINK = "source"  # the link beside a dataset.json of a study, to the folder of the volumes


def name_by_link(file: Path, root: Path) -> str:
    """Return a file's name in a study's dataset.json. root: the data set with the file."""
    return f"{LINK}/{file.relative_to(root).as_posix()}"


def read_listing(path: Path, root: Path) -> dict:
    """Return a study's dataset.json. The absolute paths of older studies are made relative.

    Raises ValueError, one line, if it is damaged.
    """
    content = files.read_json(path)
    splits = ("training", "validation", "test")
    is_listing = isinstance(content, dict)
    if is_listing:
        is_listing = all(fits(content.get(key, []), list[dict[str, str]]) for key in splits)
    if not is_listing:
        raise ValueError(
            f"{path}: is not a list of volumes as the study writes it; restore it, or choose "
            "another --out"
        )

    for key in splits:
        for case in content.get(key, []):
            for kind, name in case.items():
                if Path(name).is_relative_to(root):
                    case[kind] = name_by_link(Path(name), root)
    return content


def reads_text(method: str) -> bool:
    """Return True if a method needs text embeddings."""
    return METHODS[method].get("codes") == "text"


@dataclass
class FewShot:
    """The options of the few-shot study. `open` checks them, `plan` makes the runs."""

    data: Path
    new_class: str
    out: Path
    k: list[int]
    draws: int
    steps: int
    base_epochs: int | None
    base_lr: float | None
    from_plain: int | None  # epochs
    methods: list[str]
    text_codes: str | None
    jobs: int
    train_options: dict

    def open(self) -> None:
        """Check the options and read the data set. Raises ValueError, one line."""
        self.check_train_options()
        if not layouts.has_volumes(self.data):
            raise ValueError(f"{self.data}: no data set of volumes; see prepare.py demo-volumes")
        self.splits = layouts.read_volumes(self.data)
        self.known = {}  # label map -> does it contain the new class
        for split in ("train", "test"):
            if split not in self.splits:
                raise ValueError(f"{self.data}: has no split {split}, and the study needs it")

        # name -> values in label maps
        first = layouts.as_regions(self.splits["train"][0])
        self.classes = {}
        for name, region in zip(first.classes[1:], first.regions, strict=True):
            self.classes[name] = [first.labels[i] for i in region]
        self.choose_classes()
        self.k = sorted({*self.k})
        self.methods = [*dict.fromkeys(self.methods)]
        if "plain" in self.methods and len(self.seen) == 1:
            raise ValueError(
                f"--methods plain: would go on with its head for {self.seen[0]}, as one class is "
                "as many as one; name the others"
            )
        self.check_codes()

    def check_train_options(self) -> None:
        """Raise ValueError, one line, for options of train.py that do not fit the study."""
        for name in SET_BY_STUDY:
            if name in self.train_options:
                raise ValueError(
                    f"{flag(name)}: the study sets this itself, remove it; --base-epochs, "
                    "--from-plain and --steps set the length of the runs"
                )
        if "weights" not in self.train_options:
            raise ValueError(
                "--weights is missing: none, or those of a Swin UNETR that was trained without the "
                "new class"
            )

    def choose_classes(self) -> None:
        """Set `new_class` to its name in the data set and `seen` to the names of the others."""
        name = layouts.plain_name(self.new_class)
        if name not in self.classes or len(self.classes) == 1:
            raise ValueError(
                f"--new-class {self.new_class}: {self.data} has {', '.join(self.classes)}; choose "
                "one of them, and there must be others to learn first"
            )
        self.new_class = name
        self.seen = [other for other in self.classes if other != name]

    def check_codes(self) -> None:
        """Raise ValueError, one line, if a text embedding that a method needs is missing."""
        text_methods = [method for method in self.methods if reads_text(method)]
        if not text_methods:
            return
        if not self.text_codes:
            raise ValueError(
                f"--text-codes is missing, {' and '.join(text_methods)} need it; prepare.py "
                "text-codes makes it; or use --methods random plain"
            )
        codes = universal.read_codes(self.text_codes)
        for name in self.classes:
            if name not in codes:
                raise ValueError(
                    f"{self.text_codes}: has no code of {name}; prepare.py text-codes makes it"
                )

    def has_new_class(self, entry) -> bool:
        """Return True if the new class is anywhere in the label map of a volume."""
        if entry.mask not in self.known:
            grid = nifti.read_grid(entry.image)
            truth = nifti.read_labels(entry.mask, grid, entry.labels, entry.background_numbers)
            indices = [entry.labels.index(label) for label in self.classes[self.new_class]]
            self.known[entry.mask] = bool(np.isin(truth, indices).any())
        return self.known[entry.mask]

    @nifti.notices.grouped()
    def drawn(self, draw: int) -> list:
        """Return the volumes of a draw, of which a run uses the first K.

        Raises ValueError, one line, if too few volumes have the new class.
        """
        entries = self.splits["train"]
        most = max(self.k)
        seed = self.train_options.get("seed", 0)
        order = np.random.default_rng((seed, draw)).permutation(len(entries))

        volumes = []
        for i in order:
            if len(volumes) < most and self.has_new_class(entries[i]):
                volumes.append(entries[i])
        if len(volumes) < most:
            raise ValueError(
                f"--k {most}: too many for {self.data}, only {len(volumes)} volumes of its "
                f"training split have {self.new_class}"
            )
        return volumes

    def write_set(self, name: str, classes: list[str], **splits) -> str:
        """Write a dataset.json of some of the volumes with some of the classes. Return its folder.

        splits: lists of entries by the names train, val and test. File names go through a link to
        the data set.
        """
        root = self.splits["train"][0].root
        content = self.listing(classes, splits)
        path = self.out / "data" / name / "dataset.json"
        link = path.with_name(LINK)
        is_linked = link.is_symlink() and link.resolve() == root

        if path.is_file() and (self.out / "study.json").is_file():
            written = {"overlapping": True}  # older studies did not write it
            written |= read_listing(path, root)
            has_other_link = link.is_symlink() and not is_linked
            if written != content or has_other_link:
                raise ValueError(
                    f"{path.parent}: holds other volumes than {self.data} now gives; choose "
                    "another --out"
                )

        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_linked:
            link.unlink(missing_ok=True)
            link.symlink_to(root, target_is_directory=True)
        write_json(path, content)
        return str(path.parent)

    def listing(self, classes: list[str], splits: dict[str, list]) -> dict:
        """Return the dataset.json of some volumes, in which only `classes` are annotated."""
        first = self.splits["train"][0]
        labels = {name: self.classes[name] for name in classes}
        background = {*first.labels, *first.background_numbers}.difference(*labels.values())
        content = {
            "labels": {"background": sorted(background)} | labels,
            "overlapping": True,
            "modality": first.modality,
        }
        keys = {"train": "training", "val": "validation", "test": "test"}
        for split, key in keys.items():
            content[key] = []
            for entry in splits.get(split, ()):
                # An image of several files, CASE_0000 and so on, is listed as CASE.
                image = entry.image.parent / entry.mask.name if entry.more_channels else entry.image
                content[key].append(
                    {
                        "image": name_by_link(image, first.root),
                        "label": name_by_link(entry.mask, first.root),
                    }
                )
        return content

    def run(self, method: str, k: int | None = None, draw: int | None = None, **own) -> StudyRun:
        """Return a run. Its options are train.py's, then the method's, then its own."""
        name = "base" if k is None else f"k{k}"
        if draw is not None:
            name += f"-draw{draw}"

        unused = FIRST_OPTIONS if "weights" in own else LATER_OPTIONS
        chosen = {key: value for key, value in self.train_options.items() if key not in unused}
        chosen |= METHODS[method] | own
        chosen |= {"out": str(self.out / method / name), "resume": True, "batch_size": 1}
        chosen["backbone_lr"] = chosen.get("lr")
        if reads_text(method):
            chosen["text_codes"] = self.text_codes
        run = StudyRun(method, k, draw, Options(**chosen))
        options.resolve(run.options)  # raises for wrong options before anything is trained
        return run

    def bases(self) -> list[StudyRun]:
        """Return the runs that learn the seen classes."""
        data = [self.write_set("base", self.seen, **self.splits)]
        first = {
            "data": data,
            "epochs": self.base_epochs,
            "lr": self.base_lr or self.train_options.get("lr"),
        }
        if not self.from_plain:
            return [self.run(method, **first) for method in self.methods]

        plain = self.run("plain", **first)
        runs = [plain]
        for method in self.methods:
            if method != "plain":
                weights = plain.options.out
                runs.append(self.run(method, data=data, weights=weights, epochs=self.from_plain))
        return runs

    def plan(self) -> list[StudyRun]:
        """Return all runs, in an order in which a stopped study is already useful.

        Writes their data sets. Raises ValueError, one line, if the data do not allow the study.
        """
        drawn = {draw: self.drawn(draw) for draw in range(1, self.draws + 1)}
        if not any(map(self.has_new_class, self.splits["test"])):
            raise ValueError(f"{self.data}: no volume of its test split has {self.new_class}")

        runs = self.bases()
        weights = {run.method: run.options.out for run in runs}
        tests = {method: {"test": [str(self.data)]} for method in self.methods}
        tests["plain"] = {}  # it has lost its other classes, and is tested on its own data set
        for method in filter(reads_text, self.methods):
            runs.append(self.run(method, 0, weights=weights[method], eval=True, **tests[method]))

        for draw, volumes in drawn.items():
            seed = self.train_options.get("seed", 0) + draw
            for k in self.k:
                data = [self.write_few(k, draw, volumes[:k])]
                for method in self.methods:
                    own = {"weights": weights[method], "data": data, "epochs": 1, "seed": seed}
                    runs.append(self.run(method, k, draw, **own | tests[method]))
        return runs

    def write_few(self, k: int, draw: int, volumes: list) -> str:
        """Write the data set of K volumes of a draw. Return its folder.

        Its epoch has all steps of the run, as saving after every K steps would take most of the
        time.
        """
        return self.write_set(
            f"k{k}-draw{draw}",
            [self.new_class],
            train=(volumes * self.steps)[: self.steps],
            val=volumes[:1],
            test=self.splits["test"],
        )


# --- few-shot: its results -----------------------------------------------------------------------


def read_scores(study: FewShot, run: StudyRun) -> list[dict]:
    """Return rows of results.csv: for each class the cases where truth or prediction has it."""
    cases = case_names(study, run)
    columns = {"class": "class", "case": "name", "patient": "group", "dice": "dice"}
    phase = "after" if run.k else "before"
    rows = []
    for row in read_table(run.test / "per_image.csv"):
        if "True" not in (row["in_truth"], row["in_pred"]):
            continue
        if row["name"] not in cases:
            raise damaged_table(run.test / "per_image.csv", f"no volume is called {row['name']}")
        row["name"] = cases[row["name"]]
        result = {"method": run.method, "k": run.k or 0, "draw": run.draw, "phase": phase}
        for column, name in columns.items():
            result[column] = row[name]
        rows.append(result)
    return rows


def case_names(study: FewShot, run: StudyRun) -> dict[str, str]:
    """Return {name of a case in the run's test: its name in the study's data set}."""
    (root,) = run.options.test or run.options.data
    tested = layouts.read_volumes(root)["test"]
    names = {}
    for entry, own in zip(tested, study.splits["test"], strict=True):
        names[entry.name] = own.name
    # Older runs named cases with repeated names by their full path.
    for own in study.splits["test"]:
        folder = own.mask.parent.relative_to(own.mask.anchor)
        full_name = (folder / layouts.without_ending(own.mask)).as_posix()
        names.setdefault(full_name, own.name)
    return names


def read_table(path: Path) -> list[dict]:
    """Return the rows of a run's per_image.csv.

    Raises ValueError, one line, if it is missing or damaged.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(files.read_text(path), newline="")))
    except (csv.Error, FileNotFoundError) as error:
        raise damaged_table(path, error) from None
    for row in rows:
        for column in ("name", "class", "group", "in_truth", "in_pred", "dice"):
            if row.get(column) is None:
                raise damaged_table(path, f"a row has no {column}")
        try:
            float(row["dice"] or 0)
        except ValueError as error:
            raise damaged_table(path, error) from None
    return rows


def damaged_table(path: Path, reason) -> ValueError:
    """Return the error about a run's table that cannot be used."""
    return ValueError(
        f"{path}: is damaged ({reason}); remove {path.parent}; the same command then repeats this "
        "run"
    )


def dice_array(
    study: FewShot, rows: list[dict], method: str, k: int, classes: list[str]
) -> np.ndarray:
    """Return Dice (D,N,C) of D draws, N cases and C classes; NaN does not count.

    Cases are patients where these are known. K = 0 is the base model, with D = 1.
    """
    cases = sorted({row["patient"] or row["case"] for row in rows})
    shape = (study.draws if k else 1, len(cases), len(classes))
    total = np.zeros(shape)
    count = np.zeros(shape)
    for row in rows:
        if (row["method"], row["k"]) != (method, k) or row["class"] not in classes:
            continue
        index = (
            (row["draw"] or 1) - 1,
            cases.index(row["patient"] or row["case"]),
            classes.index(row["class"]),
        )
        total[index] += float(row["dice"])
        count[index] += 1
    return np.where(count, total / np.maximum(count, 1), np.nan)  # (D,N,C)


def summarise_study(study: FewShot, rows: list[dict]) -> dict[str, dict]:
    """Return the results of each method, each number an `estimate`.

    {method: {"new": {K: Dice of the new class}, "seen": {K: of the others}, "change": {K: …}}}
    """
    summary = {}
    for method in study.methods:
        scores = {"new": {}, "seen": {}, "change": {}}
        before = dice_array(study, rows, method, 0, study.seen)
        for k in (0, *study.k):
            scores["new"][k] = estimate(dice_array(study, rows, method, k, [study.new_class]))
            seen = dice_array(study, rows, method, k, study.seen)
            scores["seen"][k] = estimate(seen)
            if k:
                scores["change"][k] = estimate(seen, before)
        summary[method] = scores
    return summary


def sentences(summary: dict, cases: int) -> str:
    """Return what the numbers of the largest K show, and what they cannot show."""
    last = {method: list(scores["new"].values())[-1] for method, scores in summary.items()}
    best = max(last, key=lambda method: last[method]["mean"])
    below = []
    level = []
    for method, score in last.items():
        if method == best:
            continue
        # A comparison with NaN is False: without intervals no method is below the best one.
        is_below = score["high"] < last[best]["low"]
        (below if is_below else level).append(method)

    largest_k = list(summary[best]["new"])[-1]
    text = [f"At K = {largest_k} {best} has the highest mean."]
    if level and np.isnan(last[best]["low"]):
        text.append("One case has no interval: no difference between methods is shown.")
    elif level:
        text.append(
            f"Intervals that overlap with its own, no difference shown: {', '.join(level)}."
        )
    if below:
        text.append(f"Intervals below its own: {', '.join(below)}.")
    text.append("Each method has one base model, whose luck is in all its numbers.")
    if cases < 50:
        text.append(f"{cases} test cases tell little: below 50 intervals tend to be too narrow.")
    text.append(f"{INTERVALS}; {ABSENT}.")
    return " ".join(text)


def result_tables(study: FewShot, summary: dict, cases: int) -> str:
    """Return all results in words and Markdown tables."""
    head = [f"K = {k}" for k in study.k]
    new_rows = []
    seen_rows = []
    for method, scores in summary.items():
        new_rows.append([method, *map(cell, scores["new"].values())])
        row = [method, cell(scores["seen"][0])]
        for k, change in scores["change"].items():
            if change is None:
                row.append("–")
            else:
                row.append(f"{scores['seen'][k]['mean']:.3f} ({cell(change, '+')})")
        seen_rows.append(row)

    new_title = (
        f"Dice of {study.new_class} after {study.steps} steps on K volumes: mean over "
        f"{study.draws} draws and {cases} test cases [95 % interval]. A miss or a false alarm is "
        "0; where truth and prediction are empty, a case does not count."
    )
    seen_title = (
        f"Mean Dice of {', '.join(study.seen)}: before, and after (change [95 % interval])."
    )
    parts = [
        new_title,
        markdown(["method", "K = 0", *head], new_rows),
        seen_title,
        markdown(["method", "before", *head], seen_rows),
        sentences(summary, cases),
    ]
    return "\n\n".join(parts)


def plot(path: Path, study: FewShot, summary: dict) -> None:
    """Plot the Dice of the new class, and the change of that of the others, over K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    positions = {0: np.log2(study.k[0]) - 1}
    for k in study.k:
        positions[k] = np.log2(k)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    panels = {
        "new": (left, f"Dice of {study.new_class}"),
        "change": (right, "change of the Dice of the others"),
    }

    for key, (axes, title) in panels.items():
        for i, (method, scores) in enumerate(summary.items()):
            shift = 0.05 * (i - (len(summary) - 1) / 2)  # draw the intervals side by side
            plot_scores(axes, scores[key], positions, shift, method)
        axes.set_xticks([*positions.values()], [*map(str, positions)])
        axes.set_xlabel("K, volumes of the new class")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    left.set_ylim(0, 1)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    with atomic_files.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def plot_scores(axes, scores: dict, positions: dict, shift: float, label: str) -> None:
    """Plot one method's means with their intervals. scores: {K: estimate or None}."""
    known = {k: score for k, score in scores.items() if score}
    x = [positions[k] + shift for k in known]
    mean = [score["mean"] for score in known.values()]
    low = [score["low"] for score in known.values()]
    high = [score["high"] for score in known.values()]
    errors = (np.subtract(mean, low).clip(0), np.subtract(high, mean).clip(0))
    axes.errorbar(x, mean, errors, fmt=".-", capsize=2, label=label)


def few_shot(args: argparse.Namespace, train_options: dict) -> None:
    """Run the few-shot study."""
    own = {name: value for name, value in vars(args).items() if name != "command"}
    study = FewShot(**own, train_options=train_options)
    advice = "finished runs are kept, others continue where they were saved: give the same command"
    with (
        atomic_files.claim_folder(study.out),
        command_line.recovery_advice(lambda: advice, override=True),
    ):
        few_shot_in_folder(study)


def few_shot_in_folder(study: FewShot) -> None:
    """Run the few-shot study in a folder that no other process writes to."""
    study.open()
    saved = same_options(study.out / "study.json", study_options(study), "text_codes")
    runs = study.plan()
    write_json(study.out / "study.json", saved)
    run_all(runs, study.jobs)

    rows = []
    for run in runs:
        rows += read_scores(study, run)
    write_csv(study.out / "results.csv", rows)
    summary = summarise_study(study, rows)
    cases = {row["patient"] or row["case"] for row in rows}
    text = result_tables(study, summary, len(cases))
    with atomic_files.atomic_write(study.out / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    plot(study.out / "few_shot.png", study, summary)
    print(f"\n{text}\n\n{study.out}: results.csv, table.md, few_shot.png")


def study_options(study: FewShot) -> dict:
    """Return the options in study.json that a continued study must repeat."""
    saved = {"data": study.data.resolve()}
    for name in ("new_class", "steps", "base_epochs", "base_lr", "from_plain", "text_codes"):
        saved[name] = getattr(study, name)
    saved |= study.train_options
    if study.text_codes:
        digest = hashlib.sha256(Path(study.text_codes).read_bytes()).hexdigest()
        saved["text_codes"] += f" ({digest[:8]})"
    return saved


# --- command line --------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, dict]:
    """Return the options of the study, and those of train.py that were typed."""
    parser = command_line.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    few_shot_parser = commands.add_parser(
        "few-shot",
        help="compare methods that learn one more organ from K volumes",
        description=FEW_SHOT,
        usage="python studies.py few-shot --data DIR --new-class NAME --weights SOURCE [options]",
    )
    add_few_shot_options(few_shot_parser.add_argument)
    args, rest = parser.parse_known_args()
    return args, options.parse("options of train.py", rest)


def add_few_shot_options(add: Callable) -> None:
    """Add the options of the few-shot study."""
    add(
        "--data",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder of a data set of volumes that has a test split",
    )
    add(
        "--new-class", metavar="NAME", required=True, help="class of --data to learn from K volumes"
    )
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/few-shot"),
        help="folder for the runs and results of the study [%(default)s]",
    )
    add(
        "--k",
        metavar="K",
        type=POSITIVE,
        nargs="+",
        default=[1, 2, 4, 8],
        help="numbers of volumes of the new class; 0 is always tested [1 2 4 8]",
    )
    add(
        "--draws",
        metavar="N",
        type=POSITIVE,
        default=3,
        help="number of times that the K volumes are drawn at random [%(default)s]",
    )
    add(
        "--steps",
        metavar="N",
        type=POSITIVE,
        default=200,
        help="optimizer steps that each run on K volumes takes [%(default)s]",
    )
    add(
        "--base-epochs",
        metavar="N",
        type=POSITIVE,
        help="epochs that a base model is trained for [recipe]",
    )
    add(
        "--base-lr",
        metavar="X",
        type=Number(above=0),
        help="learning rate of base models [value of --lr]",
    )
    add(
        "--from-plain",
        metavar="EPOCHS",
        type=POSITIVE,
        help="start the other base models from plain's, and train them for this many epochs [off]",
    )
    add(
        "--methods",
        metavar="NAME",
        nargs="+",
        choices=METHODS,
        default=[*METHODS],
        help=f"methods to compare [{' '.join(METHODS)}]",
    )
    add(
        "--jobs",
        metavar="N",
        type=POSITIVE,
        default=1,
        help="number of runs that train at the same time [%(default)s]",
    )
    add(
        "--text-codes",
        metavar="FILE",
        help="file of `prepare.py text-codes` with all classes, for the methods with text",
    )


def main() -> int:
    """Run the command line. Return the exit status."""
    args, train_options = parse()
    few_shot(args, train_options)
    return 0


if __name__ == "__main__":
    command_line.command(main)
