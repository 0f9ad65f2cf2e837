"""Forms in which checkpoints of BiomedCLIPSeg are published or saved."""

import json
from dataclasses import replace

import numpy as np
import torch
from conftest import ROOT, write_run
from forms.base import Form, Place, saved
from safetensors.torch import save_file

from biomedclipseg import VARIANTS, BiomedCLIPSeg


def official(variant: str) -> tuple[dict, ...]:
    """Return the study's state dict, on meta, with the legacy table of positions."""
    names = json.loads(str(np.load(ROOT / "tests/golden/biomedclipseg.npz")["keys"]))
    return ({name: torch.empty(shape, device="meta") for name, shape, _ in names},)


MINI = VARIANTS["mini"]


def write_hub_files(state, folder) -> dict:
    """The study's state dict as the two files of the hub -> arguments of from_pretrained."""
    towers = {n.removeprefix("biomedclip."): t for n, t in state.items() if "decoder." not in n}
    towers["text.transformer.embeddings.position_ids"] = torch.arange(512)[None]  # as on the hub
    decoder = {n: t for n, t in state.items() if n.startswith("decoder.")}
    for name in ("biomedclip", "clipseg"):
        (folder / name).mkdir(parents=True)
    torch.save(towers, folder / "biomedclip/open_clip_pytorch_model.bin")
    clip = {"clip.logit_scale": torch.ones(())}  # and its towers, which are not wanted
    torch.save(clip | decoder, folder / "clipseg/pytorch_model.bin")
    return {"source": folder / "biomedclip", "decoder": folder / "clipseg"}


def run_folder(state, folder, **more):
    return {"source": write_run(folder, BiomedCLIPSeg, state, MINI, **more)}


def two_files(state, folder):
    return write_hub_files(state, folder / "two")


def whole(state, folder):
    return saved(state, folder / "x.pth")


def lightning(state, folder):
    content = {"state_dict": {f"net.{name}": t for name, t in state.items()}, "epoch": 3}
    return saved(content, folder / "x.ckpt")


def safetensors(state, folder):
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


TAPS = {"taps": (1, 2, 3)}  # which no tensor tells
OTHER = replace(MINI, **TAPS)
FORMS = (
    Form(two_files, OTHER, arguments=TAPS),
    Form(whole, OTHER, arguments=TAPS),
    Form(lightning, OTHER, arguments=TAPS),
    Form(safetensors, OTHER, arguments=TAPS),
    Form(run_folder, MINI),
)
NAMES = (
    "biomedclip.visual.trunk.blocks.2.attn.qkv.weight",
    "biomedclip.text.transformer.encoder.layer.1.attention.self.key.weight",
    "decoder.layers.1.self_attn.k_proj.weight",
)
PLACES = tuple(
    Place(
        form,
        name,
        argument="decoder" if form.write is two_files and "decoder" in name else "source",
    )
    for form in FORMS
    for name in NAMES
)
