"""A folder in which the examples of README.md and docs/ run within seconds.

It has small data sets, photos and volumes under the names that the examples use, run folders of
small models, and a cache of the hub in which official ids are small models in the official format.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import test_model_contract as contract
import torch
from conftest import ROOT, write_run
from forms import biomedclipseg as biomedclipseg_forms
from forms import clipseg as clipseg_forms
from forms import cris as cris_forms
from forms import swin_unetr3d as swin_forms
from forms import universal as universal_forms
from PIL import Image

import swin_unetr3d
import universal
from engine.lora import add_lora, save_adapter
from recipes import FAMILIES

COMMIT = "0" * 40
PROMPTED = ("kvasir_polyp", "bkai_polyp", "cvc300_polyp", "etis_polyp", "busi")
# Names of class map sets, and how the names of their images tell the patient.
CLASS_MAPS = {"uw_madison": "case{}_day0_slice_{:04}", "duke_dme": "subject{}_{:04}"}
VOLUMES = ("spleen", "liver", "btcv", "thyroid", "hippocampus")


def official_mini(name: str) -> dict[str, torch.Tensor]:
    """Return a small model's tensors under their official names."""
    row = contract.ROWS[name]
    return row.official(row.model())


def write_form(name: str, form_name: str, folder: Path) -> None:
    """Write a small model into a folder in one of the forms that its contract test knows."""
    row = contract.ROWS[name]
    for form in row.forms.FORMS:
        if form.name == form_name:
            form.write({**contract.state_in_file(row, form)}, folder)
            return
    raise ValueError(f"{name} has no form {form_name}")


# --- the hub ---

# Model -> the form in which its hub repositories are written today.
HUB_FORMS = {
    "clipseg": "hub_today",
    "segformer": "hub_5",
    "upernet": "hub_today",
    "beit": "hub_today",
    "sam_decoder": "hub_today",
}


def cache_folder(home: Path, repository: str) -> Path:
    """Make and return the folder in which the client keeps the files of a repository."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(COMMIT)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def write_hub(home: Path) -> None:
    """Fill the cache of the hub with every repository that training starts from."""
    clip = cris_forms.clip_of(official_mini("cris"))
    for repository in ("timm/resnet50_clip.openai", "timm/resnet101_clip.openai"):
        cris_forms.clip_hub(clip, cache_folder(home, repository))

    for name, form in HUB_FORMS.items():
        for repository in FAMILIES[name].protocols["default"].hub_ids.values():
            write_form(name, form, cache_folder(home, repository))
    medsam = cache_folder(home, "wanglab/medsam-vit-base")
    write_form("sam_decoder", "hub_today", medsam)

    dpt_ids = FAMILIES["dpt"].protocols["default"].hub_ids
    write_form("dpt", "hub_today", cache_folder(home, dpt_ids["large-ade"]))
    write_form("dpt", "hub_today without norm", cache_folder(home, dpt_ids["large"]))

    biomedclip = FAMILIES["biomedclipseg"].protocols["default"].hub_ids["biomedclipseg"]
    parts = biomedclipseg_forms.write_hub_files(official_mini("biomedclipseg"), home / "parts")
    shutil.copytree(parts["source"], cache_folder(home, biomedclip), dirs_exist_ok=True)

    swin = official_mini("swin_unetr3d")
    for repository in FAMILIES["swin_unetr3d"].protocols["default"].hub_ids.values():
        swin_forms.hub(swin, cache_folder(home, repository))

    released = universal.UniversalConfig(12)  # its 32 classes, but a small network
    model = universal.UniversalSwinUNETR(released, torch.zeros(32, universal.TEXT))
    state = swin_unetr3d.to_official(model.state_dict())
    repository = FAMILIES["universal"].protocols["default"].hub_ids["universal"]
    universal_forms.released(state, cache_folder(home, repository))


# --- data ---


def prepare(world: Path, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "prepare.py"), *arguments]
    subprocess.run(command, cwd=world, check=True, capture_output=True)


def write_class_maps(folder: Path, source: Path, pattern: str) -> None:
    """Make class maps of the demo images: class 1 and 2 left and right of the middle."""
    classes = '{"0": "background", "1": "stomach", "2": "small bowel"}'
    for split, patients in {"train": (1, 2, 3, 4), "val": (5, 6), "test": (7, 8)}.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True)

        images = sorted((source / "images").iterdir())
        for number, patient in enumerate(patients * 2):
            image = images[number]
            mask = np.asarray(Image.open(source / "masks" / image.name)) > 0
            numbers = mask.astype(np.uint8)
            numbers[:, mask.shape[1] // 2 :] *= 2
            name = pattern.format(patient, number) + ".png"
            shutil.copyfile(image, folder / split / "images" / name)
            Image.fromarray(numbers).save(folder / split / "masks" / name)
    (folder / "classes.json").write_text(classes)


def write_data(world: Path) -> None:
    """Make the data sets, photos and the volume that the examples name."""
    prepare(world, "demo", "--out", "data/demo", "--images", "40", "--size", "64")
    for name in PROMPTED:
        shutil.copytree(world / "data/demo", world / "data" / name)
    for name, pattern in CLASS_MAPS.items():
        write_class_maps(world / "data" / name, world / "data/demo", pattern)

    prepare(world, "demo-volumes", "--out", "data/demo_volumes", "--volumes", "6")
    for name in VOLUMES:
        shutil.copytree(world / "data/demo_volumes", world / "data" / name)
    scan = sorted((world / "data/demo_volumes/imagesTr").iterdir())[0]
    shutil.copyfile(scan, world / "ct.nii.gz")
    (world / "scans").mkdir()
    shutil.copyfile(scan, world / "scans/a.nii.gz")

    (world / "photos").mkdir()
    for image in sorted((world / "data/demo/images").iterdir())[:3]:
        Image.open(image).convert("RGB").save(world / "photos" / f"{image.stem}.jpg")
    shutil.copyfile(next((world / "photos").iterdir()), world / "photo.jpg")
    rows = [f"{photo.name},foreground,10,12,40,44" for photo in (world / "photos").iterdir()]
    (world / "photos.csv").write_text("\n".join(["image,class,x0,y0,x1,y1", *rows]) + "\n")

    for folder in ("images", "masks"):  # a user's own data: two folders and nothing else
        (world / "data/mine" / folder).mkdir(parents=True)
        for image in (world / "data/demo/images").iterdir():
            source = world / "data/demo" / folder / image.name
            shutil.copyfile(source, world / "data/mine" / folder / image.name)


def write_files(world: Path) -> None:
    """Write the checkpoints that the examples name as files."""
    cris_forms.as_released(official_mini("cris"), world / "cris_best.pth")
    clipseg_state = clipseg_forms.as_original(official_mini("clipseg"))
    clipseg_forms.original(clipseg_state, world)  # rd64-uni-refined.pth and ViT-B-16.pt


def write_runs(world: Path) -> None:
    """Write run folders of untrained small models, as examples in Python load them."""
    names = {
        "cris": ("cris-kvasir_polyp",),
        "clipseg": ("clipseg-kvasir_polyp", "clipseg-busi"),
        "biomedclipseg": ("biomedclipseg-kvasir_polyp",),
        "segformer": ("segformer-uw_madison", "segformer-uw_madison-b2"),
        "upernet": ("upernet-uw_madison",),
        "dpt": ("dpt-uw_madison",),
        "beit": ("beit-uw_madison",),
        "sam_decoder": ("sam_decoder-kvasir_polyp",),
        "swin_unetr3d": ("swin_unetr3d-spleen",),
        "universal": ("universal-spleen",),
        "fewshot3d": ("fewshot3d-spleen",),
    }
    (world / "runs").mkdir()
    for name, folders in names.items():
        row = contract.EVERY[name]
        for folder in folders:
            path = world / "runs" / folder
            write_run(path, row.kind, row.model().state_dict(), row.mini)
    write_adapter(world / "runs/clipseg-busi-lora-lora_rank8")


def write_adapter(folder: Path) -> None:
    """Write the adapter of a run with `--train lora`."""
    folder.mkdir()
    model = contract.ROWS["clipseg"].model()
    add_lora(model, 8, frozen=lambda name: name.startswith("clip."))
    save_adapter(model, folder / "adapter.safetensors")


def build(world: Path) -> None:
    """Fill a folder with all that the examples need."""
    write_data(world)
    write_files(world)
    write_hub(world / "home")


def environment(world: Path) -> dict[str, str]:
    """Return the environment of an example: the programs of this house and the cache above."""
    return os.environ | {
        "HF_HOME": str(world / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
