"""The files of an export: their names, what is written into them, and how they appear together."""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from engine.feature_cache import fingerprint
from engine.runs import RUN_OPTIONS
from exporting.parts import Part
from exporting.paths import without_paths
from imaging.atomic_files import full_disk_errors, refuse_existing, temporary_folder
from prediction.models import LoadedModel, Weights
from prediction.onnx_networks import DATA
from recipes.clipseg import bert_vocabulary

FOLDER = Path("exports")  # of --out


def check_packages(format_name: str, names: tuple[str, ...]) -> None:
    """Raise ValueError, one line, if packages that --to `format_name` needs are missing."""
    missing = []
    for name in names:
        try:
            import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ValueError(
            f"--to {format_name} needs {', '.join(missing)}; run "
            "pip install -r requirements-extra.txt"
        )


# --- names ---------------------------------------------------------------------------------------


def source_name(weights: Weights) -> str:
    """Return the name of a run, of a file without its ending, or of a hub repository."""
    path = Path(weights.source)
    if path.is_file() and weights.run:
        path = path.parent  # RUN/best.safetensors
    name = Path(os.path.abspath(path)).name.partition("@")[0]
    return re.sub(r"\.(pth|pt|bin|safetensors)$", "", name)


def default_path(weights: Weights, ending: str) -> Path:
    """Return the file or folder of an export without --out: exports/NAME and an ending."""
    return FOLDER / f"{source_name(weights)}{ending}"


def output_path(weights: Weights, out: str | None, ending: str) -> Path:
    """Return the file of --out. Raises ValueError, one line, if it has another ending."""
    if out is None:
        return default_path(weights, ending)
    path = Path(out)
    if path.suffix != ending:
        raise ValueError(f"--out {out}: must end with {ending}")
    return path


def part_path(out: Path, part: Part, parts: list[Part]) -> Path:
    """Return the file of a part: STEM.PART.onnx for --out STEM.onnx, or --out for a single part."""
    if len(parts) == 1:
        return out
    return out.with_name(f"{out.stem}.{part.name}{out.suffix}")


def refuse_existing_files(out: Path, parts: list[Part]) -> None:
    """Raise ValueError, one line, if a file of the export exists already."""
    for part in parts:
        path = part_path(out, part, parts)
        refuse_existing(path)
        refuse_existing(path.with_name(path.name + DATA))


# --- what the files say about themselves ---------------------------------------------------------


def describe(loaded: LoadedModel, parts: list[Part], precision: str) -> dict[str, str]:
    """Return the metadata of all files of an export, {key: text}.

    run: JSON like config.json of a run, from which the model can be used. parts: JSON list of the
    names of all parts. weights: a hash, which tells exports of two runs apart. vocabulary:
    vocab.txt of BiomedCLIPSeg. precision: that of the weights.
    """
    names = [part.name for part in parts]
    metadata = {
        "run": json.dumps(run_description(loaded)),
        "parts": json.dumps(names),
        "weights": fingerprint(loaded.model.state_dict()),
        "tool": f"export.py, torch {torch.__version__}",
        "precision": precision,
    }
    if loaded.weights.name == "biomedclipseg":
        metadata["vocabulary"] = vocabulary(loaded.config)
    return metadata


def run_description(loaded: LoadedModel) -> dict:
    """Return what config.json of a run says about its model, without paths of this machine.

    Weights without a run get the same keys.
    """
    run = loaded.weights.run
    options = {}
    for name, value in without_paths(loaded.weights.options).items():
        if name in RUN_OPTIONS:  # those that predictions take over
            options[name] = value

    config = asdict(loaded.config)
    if Path(config.get("vocabulary", "")).is_file():
        config["vocabulary"] = "vocab.txt"  # its content is metadata, too
    return {
        "format": 1,
        "model": loaded.weights.name,
        "class": type(loaded.model).__name__,
        "config": config,
        "classes": run.get("classes") or [*getattr(loaded.config, "classes", ())],
        "labels": run.get("labels"),
        "options": options,
        "masks": run.get("masks", {}),
        "versions": run.get("versions") or {"torch": version("torch")},
    }


def vocabulary(config) -> str:
    """Return the vocabulary of a BiomedCLIPSeg, one token a line, as in vocab.txt."""
    tokens = bert_vocabulary(config)
    if isinstance(tokens, Path):
        return tokens.read_text(encoding="utf-8")
    return "\n".join(tokens)


# --- all files or none ---------------------------------------------------------------------------


@contextmanager
def new_files(out: Path):
    """Yield a temporary folder; at the end of the block its files move to the folder of `out`.

    After an error, or if the process is killed, none of them appears there. Raises OSError with
    errno ENOSPC if the disk is full, ValueError if another process is writing the same export.
    """
    with temporary_folder(out, out.parent) as part:
        with full_disk_errors(out):
            part.mkdir()
            yield part

        # In reverse order, so that weights beside an ONNX file appear before the file itself.
        written = sorted(part.iterdir(), reverse=True)
        for file in written:
            refuse_existing(out.with_name(file.name))  # since the program checked
        for file in written:
            os.replace(file, out.with_name(file.name))
