"""Studies: many runs of train.py as one command, which goes on where it was stopped.

    python studies.py few-shot --data data/demo_volumes --new-class spleen --k 1 2 4 8 --draws 3
        --text-codes text_codes.safetensors --variant mini --weights none --out runs/few-shot

Options that are not a study's own are train.py's, for all its runs.

few-shot: what helps a model to learn a further organ from K volumes? Each method first is trained
on all classes but the new one (`base`; of the new one it is told nothing, its voxels are background
of the others). Then it learns the new class alone from K volumes of the training split in which
nothing else is annotated, with the same number of steps for every K; its last weights are tested.
The volumes are drawn several times, those of a smaller K among those of a larger one, the same for
all methods. The test split is scored for the new class and, before and after, for the others: what
is forgotten. Methods:

    text         the Universal Model, whose classes are known by CLIP's code of their names;
                 with K = 0 the base model is asked for the new class by its code alone
    text+mlp     the same with the layers that the few-shot study called attention (fewshot3d.py)
    random       the Universal Model with a random code for each class, which says nothing of it
    random+mlp   these layers, without the text
    plain        Swin UNETR with a sigmoid a class; the new class gets a head of its own in place of
                 the others, which are lost, not forgotten

Without --from-plain every base is trained by itself, at --base-lr for --base-epochs; with it only
plain's, from which the others then start, for so many epochs: less time, and less luck. --variant
and --weights are of runs that do not start from a base, --train, --lora-rank and --adapter-dim of
those that do. All parts that a model trains learn at one rate. --weights that know the new class
make all of this void: none, or a Swin UNETR (its encoder, say) that was trained without it.

--out holds data/ (of each set of volumes a dataset.json, and a link to --data), runs (METHOD/base,
METHOD/k2-draw1; without last.pt, which only going on needs), results.csv (a row a method, K, draw,
class and case), table.md and few_shot.png.
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
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    wait,
)  # fmt: skip
from dataclasses import dataclass
from itertools import islice
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

# --- what all studies share ----------------------------------------------------------------------


@dataclass(frozen=True)
class StudyRun:
    """One run of a study. k: volumes of the new class, None of the base run."""

    method: str
    k: int | None
    draw: int | None
    options: Options

    def __str__(self) -> str:
        parts = [self.method, "base" if self.k is None else f"K {self.k}"]
        return ", ".join(parts + [f"draw {self.draw}"] * (self.draw is not None))

    @property
    def test(self) -> Path:
        return Path(self.options.out) / "test"


def do_one(run: StudyRun, threads: int) -> None:
    """What a run prints is in its log.txt alone."""
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        train.run(run.options)
    (run.test.parent / "last.pt").unlink(missing_ok=True)


def do(runs: list[StudyRun], jobs: int) -> None:
    """Does what is left of the runs in order, so many at a time, none before that whose weights it
    needs."""
    todo = {n: run for n, run in enumerate(runs, 1) if not (run.test / "summary.json").is_file()}
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already")
    bar, doing = tqdm(None, "study", len(todo), unit="run", disable=None), {}
    spawn, cores = multiprocessing.get_context("spawn"), torch.get_num_threads()
    pool = ProcessPoolExecutor(jobs, spawn, startup.begin_child) if jobs > 1 else Here()
    with pool, bar, children_end_with_us():
        while todo:
            open_now = {run.options.out for run in todo.values()}
            free = [n for n in todo if n not in doing and todo[n].options.weights not in open_now]
            threads = max(1, cores // min(jobs, len(free) + len(doing)))  # all where one waits
            for n in free[: jobs - len(doing)]:
                tqdm.write(f"run {n} of {len(runs)}: {todo[n]}")
                doing[n] = pool.submit(do_one, todo[n], threads)
            wait(doing.values(), return_when=FIRST_COMPLETED)
            for n in [n for n, future in doing.items() if future.done()]:
                run = todo.pop(n)
                if error := doing.pop(n).exception():
                    log = run.test.parent / "log.txt"
                    where = f", its log is {log}" if log.exists() else ""
                    tqdm.write(f"{run} failed{where}", sys.stderr)
                    pool.shutdown(cancel_futures=True)
                    if isinstance(error, BrokenExecutor):
                        hint = "for want of memory? Fewer --jobs take less; what is done is kept"
                        raise OSError(f"the process of a run was killed, {hint}")
                    raise error
                bar.update()


@contextlib.contextmanager
def children_end_with_us():
    """End the processes of runs if this one is interrupted, instead of waiting until they end."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise


class Here(Executor):
    """Does at once, in this process, what it is given."""

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def same_options(path: Path, mine: dict, later: str) -> dict:
    """Return what is to be kept of a study's options; the one called `later` may be None once.

    Raises ValueError, one line, if the study was begun with others or its file is damaged.
    """
    mine = json.loads(json.dumps(mine, default=str))
    theirs = files.read_json(path) if path.is_file() else mine
    if not isinstance(theirs, dict) or later not in theirs:
        hint = "restore it, or choose another --out"
        raise ValueError(f"{path}: is not the file of a study's options; {hint}")
    mine[later] = mine[later] or theirs[later]
    options.check_same(path.parent, theirs | {later: theirs[later] or mine[later]}, mine)
    return mine


def class_means(values, by_draw, by_case) -> np.ndarray:
    """Values (D,N,C), nan where a class does not count, and how often each draw, (R,D), and each
    case, (R,N), is taken -> (R,): the mean over the classes of each one's weighted mean."""
    known, how = ~np.isnan(values), ("rd,rn,dnc->rc", by_draw, by_case)
    count = np.einsum(*how, known.astype(float))  # (R,C)
    with np.errstate(invalid="ignore"):  # 0/0: none of the cases has this class
        means = np.einsum(*how, np.where(known, values, 0)) / count
        return np.where(count > 0, means, 0).sum(1) / (count > 0).sum(1)


def estimate(values, before=None, resamples: int = 2000) -> dict | None:
    """Mean of scores (D,N,C) of D draws, N cases, C classes, or what it is above that of `before`,
    (1,N,C), with its 95 % interval: {"mean", "low", "high", "n"}; n of the (D,N) are known. None if
    none is.

    Expanded percentile bootstrap (metrics.interval_percentiles) that takes draws and cases anew:
    scores of a case in several draws are not independent, nor are those of the cases of a draw. It
    is expanded for the smaller of both numbers, that of known cases and, where there are several,
    that of known draws, which is the careful choice. Low and high are nan if one case is known.
    """
    known = ~np.isnan(values).all(2)  # (D,N)
    n = int(known.sum())
    if n == 0:
        return None
    rng, taken = np.random.default_rng(0), []
    for size in values.shape[:2]:
        some = rng.multinomial(size, np.full(size, 1 / size), resamples)
        taken.append(np.concatenate((np.ones((1, size)), some)))  # the first: each once
    means = class_means(values, *taken)
    if before is not None:
        means = means - class_means(before, np.ones((len(means), 1)), taken[1])
    draws = int(known.any(1).sum())
    cases = int(known.any(0).sum())
    independent = min(draws, cases) if draws > 1 else cases
    low, high = metrics.interval(means[1:], independent)
    return {"mean": float(means[0]), "low": low, "high": high, "n": n}


def cell(score: dict | None, sign: str = "") -> str:
    """A score in a table: mean [95 % interval], with its sign if that is "+"."""
    if score is None:
        return "–"
    mean, low, high = (f"{score[key]:{sign}.3f}" for key in ("mean", "low", "high"))
    if np.isnan(score["low"]):
        return f"{mean} [no interval]"
    return f"{mean} [{low}, {high}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, its columns aligned for whoever reads it as it is."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)


# --- few-shot: its runs --------------------------------------------------------------------------

METHODS = {  # options of train.py
    "text": {"model": "universal", "codes": "text"},
    "text+mlp": {"model": "fewshot3d", "codes": "text"},
    "random": {"model": "universal", "codes": "random"},
    "random+mlp": {"model": "fewshot3d", "codes": "random"},
    "plain": {"model": "swin_unetr3d"},
}
FIRST = ("variant", "weights")  # of runs that do not start from a base
LATER = ("train", "lora_rank", "adapter_dim")  # of those that do
SET = (
    "model", "data", "test", "out", "resume", "eval", "epochs", "max_steps", "batch_size",
    "grad_accum_steps", "backbone_lr", "codes", "overfit", "fold",
)  # fmt: skip


LINK = "source"  # in a data set of a study, beside dataset.json: the folder of the volumes


def name_by_link(file: Path, root: Path) -> str:
    """Return the name that a study's dataset.json has for a file of the data set `root`."""
    return f"{LINK}/{file.relative_to(root).as_posix()}"


def read_listing(path: Path, root: Path) -> dict:
    """Return a study's dataset.json. Absolute paths, as in older studies, go by the link."""
    content = files.read_json(path)
    kinds = dict.fromkeys(("training", "validation", "test"), list[dict[str, str]])
    if not isinstance(content, dict) or not all(
        fits(content.get(key, []), kind) for key, kind in kinds.items()
    ):
        hint = "restore it, or choose another --out"
        raise ValueError(f"{path}: is not a list of volumes as the study writes it; {hint}")
    for key in kinds:
        for case in content.get(key, []):
            for kind, name in case.items():
                if Path(name).is_relative_to(root):
                    case[kind] = name_by_link(Path(name), root)
    return content


def reads(method: str) -> bool:
    return METHODS[method].get("codes") == "text"


@dataclass
class FewShot:
    """The study's options. `plan` makes runs of them."""

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
    given: dict  # options of train.py

    def open(self) -> None:
        """Looks at options and data. ValueError, one line: what can't be."""
        if odd := [key for key in SET if key in self.given]:
            hint = "--base-epochs, --from-plain, --steps say how long"
            raise ValueError(f"{flag(odd[0])}: the study sets this itself, drop it; {hint}")
        if "weights" not in self.given:
            hint = "none, or those of a Swin UNETR that was trained without the new class"
            raise ValueError(f"--weights is missing: {hint}")
        if not layouts.has_volumes(self.data):
            raise ValueError(f"{self.data}: no data set of volumes; see prepare.py demo-volumes")
        self.splits, self.known = layouts.read_volumes(self.data), {}
        if lost := [split for split in ("train", "test") if split not in self.splits]:
            raise ValueError(f"{self.data}: has no split {lost[0]}, and the study needs it")
        first = layouts.as_regions(self.splits["train"][0])
        numbers = [[first.labels[i] for i in region] for region in first.regions]
        self.classes = dict(zip(first.classes[1:], numbers, strict=True))  # name -> in label maps
        name, have = layouts.plain_name(self.new_class), ", ".join(self.classes)
        if name not in self.classes or len(self.classes) == 1:
            told = f"{self.data} has {have}; one of them, and others to be seen before"
            raise ValueError(f"--new-class {self.new_class}: {told}")
        self.new_class, self.k = name, sorted({*self.k})
        self.methods = [*dict.fromkeys(self.methods)]
        self.seen = [other for other in self.classes if other != name]
        if "plain" in self.methods and len(self.seen) == 1:
            told = f"would go on with its head for {self.seen[0]}, as one class is as many as one"
            raise ValueError(f"--methods plain: {told}; name the others")
        self.check_codes()

    def check_codes(self) -> None:
        """ValueError, one line: a code that a method needs is not there."""
        texts = [method for method in self.methods if reads(method)]
        if texts and not self.text_codes:
            hint = "prepare.py text-codes makes it; or --methods random plain"
            raise ValueError(f"--text-codes is missing, {' and '.join(texts)} need it; {hint}")
        have = universal.read_codes(self.text_codes) if texts else self.classes
        if lost := [name for name in self.classes if name not in have]:
            hint = "prepare.py text-codes makes it"
            raise ValueError(f"{self.text_codes}: has no code of {lost[0]}; {hint}")

    def holds(self, entry) -> bool:
        """Whether the new class is anywhere in a volume's label map."""
        if entry.mask not in self.known:
            grid = nifti.read_grid(entry.image)
            truth = nifti.read_labels(entry.mask, grid, entry.labels, entry.unnamed)
            places = [entry.labels.index(n) for n in self.classes[self.new_class]]
            self.known[entry.mask] = bool(np.isin(truth, places).any())
        return self.known[entry.mask]

    @nifti.notices.together()
    def drawn(self, draw: int) -> list:
        """The volumes of a draw, of which the first K serve. ValueError, one line: too few."""
        entries, most, seed = self.splits["train"], max(self.k), self.given.get("seed", 0)
        order = np.random.default_rng((seed, draw)).permutation(len(entries))
        found = list(islice((entries[i] for i in order if self.holds(entries[i])), most))
        if len(found) < most:
            told = f"only {len(found)} volumes of its training split have {self.new_class}"
            raise ValueError(f"--k {most}: too many for {self.data}, {told}")
        return found

    def write_set(self, name: str, classes: list[str], **splits) -> str:
        """Write a dataset.json of some of the volumes, in which only these classes are annotated.

        Its file names go through a link to the data set beside it.
        """
        first, labels = self.splits["train"][0], {k: self.classes[k] for k in classes}
        rest = {*first.labels, *first.unnamed}.difference(*labels.values())
        content = {"labels": {"background": sorted(rest)} | labels, "overlapping": True}
        content["modality"] = first.modality
        for split, key in ("train", "training"), ("val", "validation"), ("test", "test"):
            content[key] = []
            for entry in splits.get(split, ()):
                # An image of several files, CASE_0000 and so on, is listed as CASE.
                image = entry.image.parent / entry.mask.name if entry.more else entry.image
                files = {"image": image, "label": entry.mask}
                content[key].append({k: name_by_link(f, first.root) for k, f in files.items()})

        path = self.out / "data" / name / "dataset.json"
        link = path.with_name(LINK)
        is_linked = link.is_symlink() and link.resolve() == first.root
        if path.is_file() and (self.out / "study.json").is_file():
            listing = {"overlapping": True}  # which older studies did not write
            listing |= read_listing(path, first.root)
            same = listing == content
            if not same or (link.is_symlink() and not is_linked):
                told = f"holds other volumes than {self.data} now gives"
                raise ValueError(f"{path.parent}: {told}; choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        if not is_linked:
            link.unlink(missing_ok=True)
            link.symlink_to(first.root, target_is_directory=True)
        write_json(path, content)
        return str(path.parent)

    def run(self, method: str, k: int | None = None, draw: int | None = None, **own) -> StudyRun:
        """One of the runs. Its options are train.py's, the method's, and its own."""
        name = "base" if k is None else f"k{k}" + f"-draw{draw}" * (draw is not None)
        drop = FIRST if "weights" in own else LATER
        own = {key: v for key, v in self.given.items() if key not in drop} | METHODS[method] | own
        own |= {"out": str(self.out / method / name), "resume": True, "batch_size": 1}
        own |= {"backbone_lr": own.get("lr")}
        own |= {"text_codes": self.text_codes} if reads(method) else {}
        run = StudyRun(method, k, draw, Options(**own))
        options.resolve(run.options)  # what this refuses is told before anything is trained
        return run

    def bases(self) -> list[StudyRun]:
        """Those that learn the seen classes."""
        own = {"data": [self.write_set("base", self.seen, **self.splits)]}
        first = own | {"epochs": self.base_epochs, "lr": self.base_lr or self.given.get("lr")}
        if not self.from_plain:
            return [self.run(method, **first) for method in self.methods]
        plain, others = self.run("plain", **first), [m for m in self.methods if m != "plain"]
        own |= {"weights": plain.options.out, "epochs": self.from_plain}
        return [plain, *(self.run(method, **own) for method in others)]

    def plan(self) -> list[StudyRun]:
        """All runs in order, so that those before a kill are of use; writes their data sets."""
        drawn = {draw: self.drawn(draw) for draw in range(1, self.draws + 1)}
        if not any(map(self.holds, self.splits["test"])):
            raise ValueError(f"{self.data}: no volume of its test split has {self.new_class}")
        runs, test = self.bases(), self.splits["test"]
        weights = {run.method: run.options.out for run in runs}
        whole = {method: {"test": [str(self.data)]} for method in self.methods}
        whole["plain"] = {}  # it has no other classes left: tested on its own data set
        for method in filter(reads, self.methods):
            runs.append(self.run(method, 0, weights=weights[method], eval=True, **whole[method]))
        for draw, k in ((draw, k) for draw in drawn for k in self.k):
            some, seed = drawn[draw][:k], self.given.get("seed", 0) + draw
            # An epoch of all steps: else saving after every K steps would take the most time.
            lists = {"train": (some * self.steps)[: self.steps], "val": some[:1], "test": test}
            data = self.write_set(f"k{k}-draw{draw}", [self.new_class], **lists)
            for method in self.methods:
                own = {"weights": weights[method], "data": [data], "epochs": 1, "seed": seed}
                runs.append(self.run(method, k, draw, **own | whole[method]))
        return runs


# --- few-shot: its results -----------------------------------------------------------------------


def read_scores(study: FewShot, run: StudyRun) -> list[dict]:
    """Rows of results.csv: of each class the cases in which truth or prediction has it."""
    (root,) = run.options.test or run.options.data
    tested = layouts.read_volumes(root)["test"]  # whose names are not the same in each data set
    cases = {e.name: own.name for e, own in zip(tested, study.splits["test"], strict=True)}
    for own in study.splits["test"]:  # older runs named cases of repeated names by their full path
        folder = own.mask.parent.relative_to(own.mask.anchor)
        cases.setdefault((folder / layouts.without_ending(own.mask)).as_posix(), own.name)
    table = read_table(run.test / "per_image.csv")
    found = [row for row in table if "True" in (row["in_truth"], row["in_pred"])]
    who = {"method": run.method, "k": run.k or 0, "draw": run.draw}
    who |= {"phase": "after" if run.k else "before"}
    names = {"class": "class", "case": "name", "patient": "group", "dice": "dice"}
    for row in found:
        if row["name"] not in cases:
            raise damaged_table(run.test / "per_image.csv", f"no volume is called {row['name']}")
        row["name"] = cases[row["name"]]
    return [who | {new: row[name] for new, name in names.items()} for row in found]


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
    """Return the error of a run's table that cannot be used."""
    hint = f"remove {path.parent}; the same command then repeats this run"
    return ValueError(f"{path}: is damaged ({reason}); {hint}")


def values(study: FewShot, rows: list[dict], method: str, k: int, classes: list[str]) -> np.ndarray:
    """Dice (D,N,C) of D draws, N cases (patients, where known) and C classes; nan does not count.
    Those of K = 0 are the base model's, D is 1."""
    cases = sorted({row["patient"] or row["case"] for row in rows})
    x, n = np.zeros((2, study.draws if k else 1, len(cases), len(classes)))
    for row in rows:
        if (row["method"], row["k"]) == (method, k) and row["class"] in classes:
            place = (row["draw"] or 1) - 1, cases.index(row["patient"] or row["case"])
            x[(*place, classes.index(row["class"]))] += float(row["dice"])
            n[(*place, classes.index(row["class"]))] += 1
    return np.where(n, x / np.maximum(n, 1), np.nan)


def summarise_study(study: FewShot, rows: list[dict]) -> dict[str, dict]:
    """Method -> {"new": {K: Dice of the new class}, "seen": {K: of the others}, "change": {K: …}},
    each an `estimate`."""
    summary = {}
    for method in study.methods:
        new, seen = ({k: values(study, rows, method, k, some) for k in (0, *study.k)}
                     for some in ([study.new_class], study.seen))  # fmt: skip
        summary[method] = {
            "new": {k: estimate(x) for k, x in new.items()},
            "seen": {k: estimate(x) for k, x in seen.items()},
            "change": {k: estimate(x, seen[0]) for k, x in seen.items() if k},
        }
    return summary


def sentences(summary: dict, cases: int) -> str:
    """What the numbers say of the largest K, and what they can't say."""
    last = {method: list(scores["new"].values())[-1] for method, scores in summary.items()}
    best = max(last, key=lambda method: last[method]["mean"])
    # A comparison with nan is false: without intervals no method is below the best one.
    below = [m for m, score in last.items() if m != best and score["high"] < last[best]["low"]]
    level = [m for m in last if m != best and m not in below]
    no_intervals = np.isnan(last[best]["low"])
    k = list(summary[best]["new"])[-1]
    said = [f"At K = {k} {best} has the highest mean."]
    if level and no_intervals:
        said += ["One case has no interval: no difference between methods is shown."]
    elif level:
        said += [f"Intervals that overlap with its own, no difference shown: {', '.join(level)}."]
    if below:
        said += [f"Intervals below its own: {', '.join(below)}."]
    said += ["Each method has one base model, whose luck is in all its numbers."]
    if cases < 50:
        said += [f"{cases} test cases tell little: below 50 intervals tend to be too narrow."]
    said += [f"{INTERVALS}; {ABSENT}."]
    return " ".join(said)


def tables(study: FewShot, summary: dict, cases: int) -> str:
    """All results in words and markdown."""
    head, new, seen = [f"K = {k}" for k in study.k], [], []
    for method, scores in summary.items():
        new.append([method, *map(cell, scores["new"].values())])
        changes = [
            "–" if change is None else f"{scores['seen'][k]['mean']:.3f} ({cell(change, '+')})"
            for k, change in scores["change"].items()
        ]
        seen.append([method, cell(scores["seen"][0]), *changes])
    title = f"Dice of {study.new_class} after {study.steps} steps on K volumes: mean over "
    title += f"{study.draws} draws and {cases} test cases [95 % interval]. A miss or a false alarm "
    title += "is 0; where truth and prediction are empty, a case does not count."
    also = f"Mean Dice of {', '.join(study.seen)}: before, and after (change [95 % interval])."
    parts = title, markdown(["method", "K = 0", *head], new), also
    parts += markdown(["method", "before", *head], seen), sentences(summary, cases)
    return "\n\n".join(parts)


def plot(path: Path, study: FewShot, summary: dict) -> None:
    """Dice of the new class, and what that of the others changed by, over K."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    places = {0: np.log2(study.k[0]) - 1} | {k: np.log2(k) for k in study.k}
    titles = f"Dice of {study.new_class}", "change of the Dice of the others"
    for axes, key, title in zip(both, ("new", "change"), titles, strict=True):
        for i, (method, scores) in enumerate(summary.items()):
            found = {k: score for k, score in scores[key].items() if score}
            shift = 0.05 * (i - (len(summary) - 1) / 2)  # intervals side by side
            x = [places[k] + shift for k in found]
            mean, low, high = ([s[end] for s in found.values()] for end in ("mean", "low", "high"))
            ends = np.subtract(mean, low).clip(0), np.subtract(high, mean).clip(0)
            axes.errorbar(x, mean, ends, fmt=".-", capsize=2, label=method)
        axes.set_xticks([*places.values()], [*map(str, places)])
        axes.set_xlabel("K, volumes of the new class")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    both[0].set_ylim(0, 1)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    with atomic_files.whole_file(path) as part:
        figure.savefig(part, format="png", dpi=110)
    plt.close(figure)


def few_shot(args: argparse.Namespace, given: dict) -> None:
    """The whole study."""
    study = FewShot(**{k: v for k, v in vars(args).items() if k != "command"}, given=given)
    safe = "finished runs are kept and others go on where they were saved: give the same command"
    with atomic_files.claim(study.out), command_line.way_on(lambda: safe, override=True):
        do_few_shot(study, given)


def do_few_shot(study: FewShot, given: dict) -> None:
    """`few_shot` in a folder that no other process writes to."""
    study.open()
    keys = "new_class", "steps", "base_epochs", "base_lr", "from_plain", "text_codes"
    told = {"data": study.data.resolve()} | {key: getattr(study, key) for key in keys} | given
    if study.text_codes:
        digest = hashlib.sha256(Path(study.text_codes).read_bytes()).hexdigest()
        told["text_codes"] += f" ({digest[:8]})"
    told = same_options(study.out / "study.json", told, "text_codes")
    runs = study.plan()
    write_json(study.out / "study.json", told)
    do(runs, study.jobs)
    rows = [row for run in runs for row in read_scores(study, run)]
    write_csv(study.out / "results.csv", rows)
    summary = summarise_study(study, rows)
    text = tables(study, summary, len({row["patient"] or row["case"] for row in rows}))
    with atomic_files.whole_file(study.out / "table.md") as part:
        part.write_text(text + "\n", encoding="utf-8")
    plot(study.out / "few_shot.png", study, summary)
    print(f"\n{text}\n\n{study.out}: results.csv, table.md, few_shot.png")


# --- command line --------------------------------------------------------------------------------


def parse() -> tuple[argparse.Namespace, dict]:
    """The study's options, and those of train.py that were given."""
    parser = command_line.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    help = "a further class from K volumes: methods compared, forgetting measured"
    add = commands.add_parser("few-shot", help=help, description=__doc__).add_argument
    add("--data", type=Path, required=True, help="data set of volumes with a test split")
    add("--new-class", required=True, help="one of its classes")
    add("--out", type=Path, default=Path("runs/few-shot"), help="folder (%(default)s)")
    help = "numbers of volumes (1 2 4 8); 0 is always tested, too"
    add("--k", type=POSITIVE, nargs="+", default=[1, 2, 4, 8], help=help)
    add("--draws", type=POSITIVE, default=3, help="of the volumes (%(default)s)")
    add("--steps", type=POSITIVE, default=200, help="of each few-shot run (%(default)s)")
    add("--base-epochs", type=POSITIVE, help="of a base run; else the recipe's")
    add("--base-lr", type=Number(above=0), help="of a base run; else --lr")
    help = "of the other bases, on that of plain"
    add("--from-plain", type=POSITIVE, metavar="EPOCHS", help=help)
    add("--methods", nargs="+", choices=METHODS, default=[*METHODS], help="all, or some")
    add("--jobs", type=POSITIVE, default=1, help="runs at a time (%(default)s)")
    add("--text-codes", help="file of `prepare.py text-codes` with every class")
    args, rest = parser.parse_known_args()
    return args, options.parse("options of train.py", rest)


def main() -> int:
    args, given = parse()
    {"few-shot": few_shot}[args.command](args, given)
    return 0


if __name__ == "__main__":
    command_line.command(main)
