"""Forms in which checkpoints of CRIS are published or saved, and OpenAI's CLIP alone."""

import json
from dataclasses import replace

import numpy as np
import torch
from conftest import ROOT, write_run
from forms.base import Form, Place, saved
from safetensors.torch import save_file
from torch import nn

import cris

MINI = cris.VARIANTS["mini"]


def official(variant: str) -> tuple[dict, ...]:
    """Return the official state dict of a size, on meta."""
    file = np.load(ROOT / f"tests/golden/cris_{variant}.npz")
    names = json.loads(str(file["keys"]))
    return ({name: torch.empty(shape, device="meta") for name, shape, _ in names},)


def as_released(state, path):
    """What DataParallel training left: module. before every name, optimiser state beside it."""
    content = {
        "epoch": 3,
        "best_iou": 0.7,
        "state_dict": {f"module.{k}": v for k, v in state.items()},
    }
    torch.save(content | {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}}, path)
    return path


def half(name: str, x: torch.Tensor) -> torch.Tensor:
    """Halve what OpenAI's archives have in half precision: all but norms and embeddings."""
    norms = (".bn", "bn1", "bn2", "bn3", "ln_", "embedding", "downsample.1", "logit_scale")
    whole = any(part in name for part in norms) or not x.is_floating_point()
    return x if whole else x.half()


def save_archive(state, path):
    """A TorchScript archive with these names."""
    root = nn.Module()
    for name, x in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, x)
    root.register_buffer("input_resolution", torch.tensor(224))
    root.register_buffer("context_length", torch.tensor(77))
    root.register_buffer("vocab_size", torch.tensor(49408))
    torch.jit.save(torch.jit.script(root), path)


def run_folder(state, folder, **more):
    return write_run(folder, cris.CRIS, state, MINI, **more)


def clip_of(state):
    state = {k: v for k, v in state.items() if k.startswith("backbone.") and ".connect." not in k}
    return {k.removeprefix("backbone."): v for k, v in state.items()}


def released(state, folder):
    return as_released(state, folder / "best_model.pth")


def converted(state, folder):
    return saved(state, folder / "cris.pt")


def lightning(state, folder):
    content = {"state_dict": {f"net.{name}": t for name, t in state.items()}}
    return saved(content, folder / "lightning.ckpt")


def safetensors(state, folder):
    save_file(state, folder / "cris.safetensors")
    return folder / "cris.safetensors"


def clip_archive(state, folder):
    save_archive(state, folder / "RN50.pt")
    return folder / "RN50.pt"


def clip_hub(state, folder):
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


# Text length, padding and pixels, which no tensor tells.
ASSUMED = ("they are 17, 0 and letterbox, those of RefCOCO",)
REFCOCO = replace(MINI, text_length=17)
FORMS = (
    Form(released, MINI, says=ASSUMED, loaded_config=REFCOCO),
    Form(converted, MINI, says=ASSUMED, loaded_config=REFCOCO),
    Form(lightning, MINI, says=ASSUMED, loaded_config=REFCOCO),
    Form(safetensors, MINI, says=ASSUMED, loaded_config=REFCOCO),
    Form(run_folder, MINI),
    Form(clip_archive, MINI, clip_of, is_whole=False),
    Form(clip_hub, MINI, clip_of, is_whole=False),
)
NAME = "visual.layer3.0.conv2.weight"
PLACES = tuple(Place(form, f"backbone.{NAME}" if form.is_whole else NAME, NAME) for form in FORMS)
