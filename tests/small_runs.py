"""Runs of small models with random weights, images and calls of predict.py, for several tests."""

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import torch
from conftest import command, write_run
from PIL import Image

import clipseg
import cris
import predict
import sam_decoder
import segformer
import swin_unetr3d
import upernet

CLASSES = {
    "cris": (cris, "CRIS"),
    "clipseg": (clipseg, "CLIPSeg"),
    "segformer": (segformer, "SegFormer"),
    "upernet": (upernet, "UPerNet"),
    "sam": (sam_decoder, "SAM"),
    "swin": (swin_unetr3d, "SwinUNETR"),
}


def run_of(name: str, folder: Path, seed: int = 0, run: dict | None = None, **config):
    """Write a run of a small model, larger weights than new ones, so that outputs differ.

    Returns the folder and the model. run: entries of its config.json. config: fields of Config.
    """
    module, kind = CLASSES[name]
    kind = getattr(module, kind)
    torch.manual_seed(seed)
    config = replace(module.VARIANTS["mini"], **config)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 / parameter[0].numel() ** 0.5)
    return write_run(folder, kind, model.state_dict(), config, **(run or {})), model


def photo(path: Path, size=(90, 60), seed: int = 0) -> Image.Image:
    """Write an image of large coloured squares, of (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


def scan(path: Path, voxels: np.ndarray) -> None:
    """Write a volume of voxels of 3 mm, whose axes are those of RAS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([3.0, 3, 3, 1])), path)


def called(monkeypatch, capsys, *arguments, status: int = 0) -> tuple[str, str]:
    """Call predict.py on the CPU and return what it prints, to stdout and stderr.

    Status 2, for a mistake of the user, comes with one line.
    """
    code, said, error = command(monkeypatch, capsys, predict, *arguments, "--device", "cpu")
    assert code == status, said + error
    assert status != 2 or error.count("\n") == 1, error
    return said, error


def refused(monkeypatch, capsys, *arguments) -> str:
    """Return the one line with which predict.py refuses its arguments."""
    return called(monkeypatch, capsys, *arguments, status=2)[1]


def probability(folder: Path, name: str) -> np.ndarray:
    """Return the probabilities (H,W) that predict.py has written for an image."""
    return np.asarray(Image.open(folder / f"{name}_probability.png")) / 65535


def volume_probability(folder: Path, name: str) -> np.ndarray:
    """Return the probabilities (X,Y,Z) that predict.py has written for a volume."""
    return nibabel.load(folder / f"{name}_probability.nii.gz").get_fdata()
