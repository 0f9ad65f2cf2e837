"""Damaged files through check, train and predict: no traceback, no hang, no file passed over.

Seeded mutants are made of each kind of file: bits flipped, ranges cut, zeroed or repeated, values
of JSON replaced. Every program that reads the file must

- end in time, with the exit status 0, 1 (check: errors) or 2 (refused);
- print one line on stderr, "error: …", if the status is 2, else nothing;
- name the file, or the data set or run that it belongs to, if the status is not 0;
- not end with 0 without naming it if another reader cannot read the file (REFERENCE).

A separate process (this file as a script) imports the programs once and is forked for each command,
so that commands share no memory. A failure prints the number of the mutant and the command.
FUZZ="png 17" in the environment runs that mutant alone and keeps its files; FUZZ_SEED chooses other
mutants.
"""

import csv
import gzip
import importlib
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SEED = int(os.environ.get("FUZZ_SEED", 0))
MUTANTS = 39  # of each of the 13 kinds: 507
LIMIT = 180  # seconds for a command, many times what it takes


# --- the process that runs the programs ----------------------------------------------------------


def run_program(name: str, arguments: list[str]) -> int:
    """Return the exit status of a program; a traceback is printed as Python prints it."""
    from engine import command_line

    sys.argv = [f"{name}.py", *arguments]
    try:
        command_line.command(sys.modules[name].main)
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1


def serve() -> None:
    """Run the programs that lines of stdin ask for, in JSON; answer each with its exit status.

    Standard output and error of a program go to the files that the line names. The status is
    negative if a signal has ended the program.
    """
    answers = os.fdopen(os.dup(1), "w")
    warnings.simplefilter("always")  # as if each program had just been started
    for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", hidden)
    sys.path.insert(0, str(ROOT))
    later = ("matplotlib.pyplot", "nibabel", "scipy.io", "safetensors.torch")  # they take a second
    for name in ("prepare", "train", "predict", *later):
        importlib.import_module(name)

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def work(job: dict) -> None:
    """Run a program and end this process with its exit status."""
    for descriptor in (1, 2):
        file = os.open(job["streams"][descriptor - 1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    status = run_program(job["program"], job["arguments"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Programs:
    """The serving process, started when it is needed and again after a hang."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = None

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            env=environment,
            cwd=self.folder,
            text=True,
            start_new_session=True,
        )

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # the program that hangs, too
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None

    def run(self, program: str, *arguments) -> tuple[int | str, str, str]:
        """Return exit status ("hangs" if there is none), stdout and stderr."""
        if self.process is None:
            self.start()
        streams = [str(self.folder / name) for name in ("stdout", "stderr")]
        job = {"program": program, "arguments": [*map(str, arguments)], "streams": streams}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        readable, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        status = "hangs"
        if readable:
            status = int(self.process.stdout.readline())
        else:
            self.stop()
        texts = [Path(file).read_text(errors="replace") for file in streams]
        return status, *texts


# --- mutants -------------------------------------------------------------------------------------


def mutate_bytes(content: bytes, rng) -> tuple[bytes, str]:
    """Return damaged content and what was done to it."""
    data = bytearray(content)
    n = len(data)
    at = int(rng.integers(n))
    if rng.random() < 0.4:  # headers are small, and more depends on them
        at = int(rng.integers(min(n, 400)))
    length = int(min(n - at, 2 ** rng.integers(1, 10)))
    kind = rng.choice(["flip", "cut", "zero", "repeat", "remove", "random", "full", "append"])
    if kind == "flip":
        for place in rng.integers(0, n, rng.integers(1, 4)).tolist() + [at]:
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        del data[at:]
    elif kind == "zero":
        data[at : at + length] = bytes(length)
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "remove":
        del data[at : at + length]
    elif kind == "random":
        data[at : at + length] = rng.bytes(length)
    elif kind == "full":
        data[at : at + 4] = b"\xff" * len(data[at : at + 4])
    else:
        data += rng.bytes(length)
    return bytes(data), f"{kind} at {at}, {length} bytes of {n}"


ODD_VALUES = [
    *(None, True, False, -1, 0, 1, 2, 255, 1e308, 10**30, 0.5, float("nan"), float("inf"), ""),
    *("x", "..", "/etc/hostname", "a\0b", "é" * 300, "\ud800", "1", "none", "\n", [], {}, [[]]),
    *([None], {"a": 1}, [1, 2, 3], ["a", "a"], "segformer", "cpu"),
]


def places_in(content, path=()) -> list[tuple]:
    """Return the path of every value within JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    places = []
    for key, value in items:
        places.append((*path, key))
        if isinstance(value, dict | list):
            places += places_in(value, (*path, key))
    return places


def mutate_json(content: bytes, rng) -> tuple[bytes, str]:
    """Return JSON of which a value is another one, missing, named anew or listed twice."""
    whole = json.loads(content)
    places = places_in(whole)
    if not places or rng.random() < 0.05:
        value = ODD_VALUES[rng.integers(len(ODD_VALUES))]
        return json.dumps(value).encode(), f"all is {value!r}"

    # Long lists would else get most of the changes.
    keys = sorted({tuple("*" if isinstance(key, int) else key for key in path) for path in places})
    key = keys[rng.integers(len(keys))]
    alike = [p for p in places if tuple("*" if isinstance(k, int) else k for k in p) == key]
    *way, last = alike[rng.integers(len(alike))]
    inside = whole
    for step in way:
        inside = inside[step]

    kind = rng.choice(["value", "value", "value", "delete", "rename", "twice", "deep"])
    if kind == "delete":
        del inside[last]
    elif kind == "rename" and isinstance(inside, dict):
        inside[f"{last}2"] = inside.pop(last)
    elif kind == "twice" and isinstance(inside, list):
        inside.append(inside[last])
    elif kind == "twice":
        text = json.dumps(whole)
        pair = f"{json.dumps(last)}: "
        return text.replace(pair, f"{pair}1, {pair}", 1).encode(), f"two {last} in one object"
    elif kind == "deep":
        inside[last] = "DEEP"
        deep = "[" * 5000 + "]" * 5000
        return json.dumps(whole).replace('"DEEP"', deep).encode(), f"{(*way, last)} is 5000 deep"
    else:
        kind = f"value {ODD_VALUES[rng.integers(len(ODD_VALUES))]!r}"
        value = next(value for value in ODD_VALUES if kind == f"value {value!r}")
        inside[last] = value
    return json.dumps(whole).encode(), f"{kind} at {(*way, last)}"


def mutate_text(content: bytes, rng) -> tuple[bytes, str]:
    """Return JSON or CSV that is damaged as text."""
    if rng.random() < 0.2:
        encoding = ["utf-16", "utf-8-sig", "utf-32", "latin-1"][rng.integers(4)]
        return content.decode().encode(encoding, "replace"), f"as {encoding}"
    return mutate_bytes(content, rng)


def mutate_cells(content: bytes, rng) -> tuple[bytes, str]:
    """Return CSV of which a cell is another one."""
    rows = list(csv.reader(io.StringIO(content.decode())))
    row = int(rng.integers(len(rows)))
    column = int(rng.integers(len(rows[0])))
    value = ["", "-5", "1e9", "nan", "inf", "x", "0", "30", "a.png", "1;2", '"', "image"]
    value = value[rng.integers(len(value))]
    if rng.random() < 0.2:
        del rows[row][column]
        value = "missing"
    else:
        rows[row][column] = value
    written = io.StringIO()
    csv.writer(written).writerows(rows)
    return written.getvalue().encode(), f"row {row}, column {column} is {value!r}"


def mutate_inside_gzip(content: bytes, rng) -> tuple[bytes, str]:
    """Return a .nii.gz that is whole as gzip, and whose content is damaged."""
    damaged, done = mutate_bytes(gzip.decompress(content), rng)
    return gzip.compress(damaged, 1, mtime=0), f"inside, {done}"


MUTATIONS = {
    "annotations": [mutate_json, mutate_json, mutate_text],
    "classes": [mutate_json, mutate_json, mutate_text],
    "dataset": [mutate_json, mutate_json, mutate_text],
    "config": [mutate_json, mutate_json, mutate_text],
    "boxes": [mutate_cells, mutate_text],
    "nii.gz": [mutate_bytes, mutate_inside_gzip],
}


# --- what is mutated -----------------------------------------------------------------------------

FINE_TUNE = [
    "--model",
    "segformer",
    "--size",
    "64",
    "--epochs",
    "1",
    "--max-steps",
    "2",
    "--batch-size",
    "2",
]
FINE_TUNE += ["--workers", "0", "--device", "cpu", "--overlays", "0"]
TRAIN_IMAGES = [*FINE_TUNE, "--variant", "mini", "--weights", "none"]
TRAIN_VOLUMES = [
    "--model",
    "swin_unetr3d",
    "--variant",
    "mini",
    "--weights",
    "none",
    "--size",
    "64",
    "32",
    "32",
]
TRAIN_VOLUMES += [
    "--spacing",
    "4",
    "4",
    "4",
    "--crops-per-volume",
    "1",
    "--workers",
    "0",
    "--overlap",
    "0",
    "--overlays",
    "0",
]
TRAIN_VOLUMES += ["--epochs", "1", "--max-steps", "1", "--device", "cpu"]
TRAIN_BOXES = [
    "--model",
    "sam_decoder",
    "--variant",
    "mini",
    "--weights",
    "none",
    "--epochs",
    "1",
    "--max-steps",
    "1",
]
TRAIN_BOXES += ["--batch-size", "2", "--workers", "0", "--device", "cpu", "--overlays", "0"]
ENDINGS = {"png": ".png", "jpeg": ".jpg", "tiff": ".tif"}
COUNTS = {"train": 4, "val": 2, "test": 2}


def write_images(root: Path, ending: str) -> Path:
    """Write a data set with annotation files; its images and masks have the ending."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks", "anns"):
        (root / folder).mkdir(parents=True)
    for split, count in COUNTS.items():
        entries = []
        for k in range(count):
            name = f"{split}{k}{ending}"
            coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)
            mask = np.zeros((48, 64), np.uint8)
            mask[8 + k : 30, 10:40] = 255
            compression = {"compression": "tiff_lzw"} if ending == ".tif" and k % 2 else {}
            picture.save(root / "images" / name, **compression)
            Image.fromarray(mask).save(root / "masks" / name, **compression)
            prompts = {"p0": "", "p1": "polyp"}
            entries.append({"img_name": name, "mask_name": name, "prompts": prompts})
        (root / "anns" / f"{split}.json").write_text(json.dumps(entries))
    return root


def write_class_maps(root: Path) -> Path:
    """Write the same images, with masks of the numbers 0 to 2 and classes.json."""
    write_images(root, ".png")
    for path in (root / "masks").iterdir():
        mask = np.asarray(Image.open(path)) // 255
        mask[20:] *= 2
        Image.fromarray(mask).save(path)
    names = {"0": "background", "1": "liver", "2": "spleen"}
    (root / "classes.json").write_text(json.dumps(names))
    return root


def write_volumes(root: Path, ending: str) -> Path:
    """Write a data set of four volumes."""
    import nibabel

    rng = np.random.default_rng(0)
    affine = np.diag([4.0, 4.2, 5.0, 1])
    lists = {"training": [], "validation": [], "test": []}
    for k, split in enumerate(("training", "training", "validation", "test")):
        image = np.full((40, 28, 24), -1000, np.int16)
        image[4:36, 4:24, 2:22] = rng.integers(-20, 20, (32, 20, 20))
        labels = np.zeros(image.shape, np.uint8)
        labels[8 + k : 14 + k, 8:16, 6:16] = 1
        labels[20:32, 10:22, 6 + k : 18] = 2
        image[labels > 0] += 100
        item = {}
        for kind, array in (("image", image), ("label", labels)):
            item[kind] = f"{kind}sTr/case{k}{ending}"
            (root / item[kind]).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, affine), root / item[kind])
        lists[split].append(item)
    labels = {"0": "background", "1": "left kidney", "2": "liver"}
    about = {"name": "phantom", "modality": {"0": "CT"}, "labels": labels, **lists}
    (root / "dataset.json").write_text(json.dumps(about))
    return root


def write_mat_files(root: Path) -> Path:
    """Write the ten files of Duke's OCT with macular edema, tiny."""
    from scipy.io import savemat

    root.mkdir(parents=True)
    for k in range(1, 11):
        rng = np.random.default_rng(k)
        layers = np.full((8, 5, 4), np.nan)
        layers[:, :, (1, 3)] = np.arange(2.0, 10)[:, None, None]
        fluid = np.zeros((12, 5, 4))
        held = {"images": rng.integers(0, 256, (12, 5, 4)).astype(np.uint8)}
        held |= {"manualLayers1": layers, "manualFluid1": fluid}
        savemat(root / f"Subject_{k:02}.mat", held, do_compression=k % 2 == 0)
    return root


class Workshop:
    """Whole data sets and runs, from which copies with one damaged file are made."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.programs = Programs(folder)
        self.cache = folder / "cache"

    def succeed(self, program: str, *arguments) -> None:
        """Run a program on whole files; it must not complain."""
        status, out, err = self.programs.run(program, *arguments)
        assert (status, err) == (0, ""), (program, arguments, status, out, err)

    def make(self, name: str) -> Path:
        """Return a whole data set or run by its name, made on first use."""
        path = self.folder / name
        if path.exists():
            return path
        if name.startswith("volumes"):
            write_volumes(path, name.removeprefix("volumes"))
        elif name == "maps":
            write_class_maps(path)
        elif name == "mat":
            write_mat_files(path)
        elif name.startswith("run-"):
            data = self.make(name.removeprefix("run-"))
            options = TRAIN_VOLUMES if "volumes" in name else TRAIN_IMAGES
            self.succeed("train", *options, "--data", data, "--out", path, "--cache", self.cache)
        elif name == "sam":
            data = self.make("set.png")
            given = ["--data", data, "--out", path, "--cache", self.cache]
            self.succeed("train", *TRAIN_BOXES, *given)
        else:
            write_images(path, name.removeprefix("set"))
        return path

    def copy(self, name: str, place: Path) -> Path:
        return Path(shutil.copytree(self.make(name), place / name.replace(".", "_")))


def commands_on_images(workshop, root: Path, run: str, split: str, place: Path) -> list[list]:
    """Return commands that read a data set of images, of which a file of one split is damaged."""
    train = ["train", *TRAIN_IMAGES, "--data", root, "--cache", workshop.cache]
    predict = ["predict", "--weights", workshop.make(run), "--device", "cpu", "--overlays"]
    return [
        ["prepare", "check", root],
        [*train, "--out", place / "trained"],
        [*predict, "--out", place / "predicted", "--split", split, root],
    ]


def image_case(workshop, kind: str, rng, place: Path):
    ending = ENDINGS[kind]
    root = workshop.copy(f"set{ending}", place)
    files = sorted(root.glob(f"*/*{ending}"))
    file = files[rng.integers(len(files))]
    split = file.stem.rstrip("0123456789")
    return file, root, commands_on_images(workshop, root, "run-set.png", split, place)


def json_case(workshop, kind: str, rng, place: Path):
    split = str(rng.choice([*COUNTS]))
    if kind == "classes":
        root = workshop.copy("maps", place)
        commands = commands_on_images(workshop, root, "run-maps", split, place)
        return root / "classes.json", root, commands
    root = workshop.copy("set.png", place)
    file = root / "anns" / f"{split}.json"
    return file, root, commands_on_images(workshop, root, "run-set.png", split, place)


def volume_case(workshop, kind: str, rng, place: Path):
    ending = ".nii" if kind == "nii" else ".nii.gz"
    root = workshop.copy(f"volumes{ending}", place)
    file = root / "dataset.json"
    commands = [
        ["prepare", "check", root],
        ["train", *TRAIN_VOLUMES, "--data", root, "--out", place / "trained"],
    ]
    commands[1] += ["--cache", workshop.cache]
    if kind != "dataset":
        files = sorted(root.glob(f"*/*{ending}"))
        file = files[rng.integers(len(files))]
        if file.parent.name == "imagesTr":
            weights = workshop.make("run-volumes.nii.gz")
            predict = ["predict", "--weights", weights, "--device", "cpu", "--overlap", "0"]
            commands.append([*predict, "--out", place / "one", file])
    return file, root, commands


def box_case(workshop, kind: str, rng, place: Path):
    file = place / "boxes.csv"
    lines = ["image,class,x0,y0,x1,y1"]
    for k in range(COUNTS["test"]):
        lines += [f"test{k}.png,,{9 + k},8,40,30", f"test{k}.png,,2,3,20,22"]
    file.write_text("\n".join(lines) + "\n")
    root = workshop.make("set.png")
    given = ["--boxes", file, "--device", "cpu", "--weights", workshop.make("sam")]
    test = ["--eval", "--model", "sam_decoder", "--data", root, "--workers", "0", "--overlays", "0"]
    test += ["--cache", workshop.cache, "--out", place / "tested"]
    commands = [["predict", *given, "--out", place / "o", root], ["train", *given, *test]]
    return file, None, commands


def mat_case(workshop, kind: str, rng, place: Path):
    root = workshop.copy("mat", place)
    files = sorted(root.glob("*.mat"))
    file = files[rng.integers(len(files))]
    return file, root, [["prepare", "duke-dme", root, "--out", place / "o"]]


def run_case(workshop, kind: str, rng, place: Path):
    """A run folder with a damaged file: to predict with, to train from and to resume."""
    run = workshop.copy("run-set.png", place)
    file = run / {"safetensors": "best.safetensors", "pt": "last.pt", "config": "config.json"}[kind]
    root = workshop.make("set.png")
    predict = ["predict", "--weights", run, "--device", "cpu", "--out", place / "o", root]
    resume = ["train", "--resume", "--out", run]
    start = ["train", *FINE_TUNE, "--data", root, "--cache", workshop.cache]
    start += ["--out", place / "next", "--weights"]
    commands = {
        "safetensors": [predict, [*start, run]],
        "pt": [resume],
        "config": [predict, resume, [*start, run]],
    }[kind]
    if kind == "pt" and rng.random() < 0.4:  # a checkpoint that is no run
        import torch
        from safetensors.torch import load_file

        file = place / "model.pt"
        torch.save(load_file(run / "best.safetensors"), file)
        predict[2] = file
        commands = [[*predict, "--model", "segformer"], [*start, file]]
        return file, None, commands
    return file, run, commands


CASES = {
    "png": image_case,
    "jpeg": image_case,
    "tiff": image_case,
    "nii": volume_case,
    "nii.gz": volume_case,
    "annotations": json_case,
    "classes": json_case,
    "dataset": volume_case,
    "boxes": box_case,
    "mat": mat_case,
    "safetensors": run_case,
    "pt": run_case,
    "config": run_case,
}


# --- what must be true ---------------------------------------------------------------------------


def decode_image(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def decode_nifti(path: Path) -> None:
    import nibabel

    if path.name.endswith(".gz"):
        with gzip.open(path) as file:
            while file.read(2**20):
                pass
    np.asanyarray(nibabel.load(path).dataobj)


def decode_mat(path: Path) -> None:
    from scipy.io import loadmat

    loadmat(path, variable_names=["images", "manualLayers1", "manualFluid1"])


def decode_safetensors(path: Path) -> None:
    from safetensors.numpy import load_file

    load_file(path)


def decode_json(path: Path) -> None:
    content = path.read_bytes()
    is_utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    json.loads(content.decode("utf-16" if is_utf16 else "utf-8-sig"))


# How others read a file. Where they fail, a program must not end with 0 and no word about the file.
REFERENCE = {
    **dict.fromkeys(("png", "jpeg", "tiff"), decode_image),
    **dict.fromkeys(("nii", "nii.gz"), decode_nifti),
    **dict.fromkeys(("annotations", "classes", "dataset", "config"), decode_json),
    "mat": decode_mat,
    "safetensors": decode_safetensors,
}


def is_readable(kind: str, path: Path) -> bool:
    """Return True if another reader can read a file, or if there is none for this kind."""
    if kind not in REFERENCE:
        return True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            REFERENCE[kind](path)
        except Exception:  # whatever it raises
            return False
    return True


def complaint(file: Path, whole, readable: bool, command: list, result: tuple) -> str | None:
    """Return what is wrong with the result of a command, None if nothing is.

    whole: the folder of the data set or run that the file belongs to, None without one.
    """
    status, out, err = result
    if status not in (0, 1, 2):
        return f"ends with {status}"
    if "Traceback" in err or (status == 1 and command[:2] != ["prepare", "check"]):
        # predict.py lists the files that it could not read and ends with 1
        listed = command[0] == "predict" and "Traceback" not in err and file.name in out + err
        if not listed:
            return "a traceback"
    if status == 2 and not re.fullmatch(r"error: [^\n]+\n", err):
        return "no single line on stderr"
    if status != 2 and command[0] != "predict" and err:
        return "lines on stderr"
    if status == 0 and not readable and file.name not in out:
        return "ends with 0 and no word about a file that other readers cannot read"
    named = err if status == 2 else out[out.rfind("\nerrors: ") :] + err
    if status and file.name not in named and (whole is None or str(whole) not in named):
        return "does not name the file"
    return None


def check_whole_files(workshop: Workshop, kind: str, place: Path) -> None:
    """Assert that the commands succeed on files that are not damaged."""
    place.mkdir(parents=True)
    _, _, commands = CASES[kind](workshop, kind, np.random.default_rng(0), place)
    for program, *arguments in commands:
        workshop.succeed(program, *arguments)


def try_mutant(workshop: Workshop, kind: str, number: int, place: Path) -> list[str]:
    """Make a mutant and run all commands on it. Return what is wrong, with all to see it again."""
    rng = np.random.default_rng((SEED, zlib.crc32(kind.encode()), number))
    place.mkdir()
    file, whole, commands = CASES[kind](workshop, kind, rng, place)
    mutations = MUTATIONS.get(kind, [mutate_bytes])
    mutate = mutations[rng.integers(len(mutations))]
    content, done = mutate(file.read_bytes(), rng)
    file.write_bytes(content)

    readable = is_readable(kind, file)
    failures = []
    for command in commands:
        result = workshop.programs.run(*command)
        wrong = complaint(file, whole, readable, command, result)
        if wrong:
            words = " ".join(map(str, command))
            lines = f"{result[2] or result[1]}".strip().splitlines()[-6:]
            shown = "\n    ".join(line[:300] for line in lines)
            title = f"{kind} {number} (FUZZ_SEED={SEED}): {wrong} [{result[0]}]"
            failures.append(f"{title}\n  {file.name}: {done}\n  {words}\n    {shown}")
    return failures


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    made = Workshop(tmp_path_factory.mktemp("fuzz"))
    yield made
    if made.programs.process:
        made.programs.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_damaged_files(workshop, tmp_path, kind):
    chosen = os.environ.get("FUZZ", "").split()
    if chosen and chosen[0] != kind:
        pytest.skip("FUZZ names another kind")
    check_whole_files(workshop, kind, tmp_path / "whole")
    numbers = [int(number) for number in chosen[1:]] or range(MUTANTS)
    failures = []
    for number in numbers:
        place = tmp_path / str(number)
        failures += try_mutant(workshop, kind, number, place)
        if not chosen:
            shutil.rmtree(place)
    assert not failures, f"{len(failures)} failures\n" + "\n".join(failures)


if __name__ == "__main__":
    serve()
