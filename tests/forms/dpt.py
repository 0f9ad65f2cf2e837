"""DPT of transformers in any size, and the forms in which its checkpoints are published."""

import json
import re
from dataclasses import replace

import torch
from conftest import write_run
from forms.base import Form, Place
from recipe import fill
from safetensors.torch import save_file
from torch import nn
from transformers import DPTConfig, DPTForDepthEstimation, DPTForSemanticSegmentation

import dpt
from dpt import DPT

MINI = dpt.VARIANTS["mini"]


# What transformers' class has and ours has not: a loss in training alone needs the auxiliary head,
# nothing reads the last norm, and the deepest fusion has nothing to join.
UNUSED = r"auxiliary_head\..*|dpt\.layernorm\..*|neck\.fusion_stage\.layers\.0\.residual_layer1\..*"


def theirs(c: dpt.Config, kind=DPTForSemanticSegmentation, **more):
    """transformers' class in the sizes of `c`."""
    config = DPTConfig(
        hidden_size=c.dim,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        intermediate_size=c.mlp_dim,
        image_size=16 * c.grid,
        backbone_out_indices=list(c.taps),
        neck_hidden_sizes=list(c.neck_dims),
        fusion_hidden_size=c.fusion_dim,
        use_batch_norm_in_fusion_residual=c.fusion_norm,
        num_labels=c.num_classes,
        **more,
    )
    return kind(config).eval()


def filled(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict in which everything does something: norms, biases and running statistics too."""
    return {
        name: torch.from_numpy(fill(name, tuple(t.shape))) if t.is_floating_point() else t.clone()
        for name, t in model.state_dict().items()
    }


LARGE = replace(MINI, fusion_norm=False, image_size=384)  # as the checkpoint for depth is


def without_unused(state):
    return {n: t for n, t in state.items() if not re.fullmatch(UNUSED, n)}


def as_original(state):
    """The hub's names -> those of the original release, of either head."""
    weights, prefix = {}, "pretrained.model"
    for name, t in state.items():
        if ".attention.key." in name or ".attention.value." in name:
            continue
        if ".attention.query." in name:
            t = torch.cat([state[name.replace("query", x)] for x in ("query", "key", "value")])
        for old, new in (
            ("dpt.embeddings.cls_token", f"{prefix}.cls_token"),
            ("dpt.embeddings.position_embeddings", f"{prefix}.pos_embed"),
            ("dpt.embeddings.patch_embeddings.projection", f"{prefix}.patch_embed.proj"),
            ("dpt.encoder.layer", f"{prefix}.blocks"),
            ("dpt.layernorm", f"{prefix}.norm"),
            ("attention.attention.query", "attn.qkv"),
            ("attention.output.dense", "attn.proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("auxiliary_head.head", "auxlayer"),
            ("head.head", "scratch.output_conv"),
        ):
            name = name.replace(old, new)
        for i in range(4):
            act = f"pretrained.act_postprocess{i + 1}"
            for old, new in (
                (f"neck.reassemble_stage.readout_projects.{i}.0", f"{act}.0.project.0"),
                (f"neck.reassemble_stage.layers.{i}.projection", f"{act}.3"),
                (f"neck.reassemble_stage.layers.{i}.resize", f"{act}.4"),
                (f"neck.convs.{i}", f"scratch.layer{i + 1}_rn"),
                (f"neck.fusion_stage.layers.{i}", f"scratch.refinenet{4 - i}"),
            ):
                name = name.replace(old, new)
        if "refinenet" in name:
            for old, new in (
                ("projection", "out_conv"),
                ("residual_layer", "resConfUnit"),
                ("convolution", "conv"),
                ("batch_norm", "bn"),
            ):
                name = name.replace(old, new)
        weights[name] = t
    return weights | {"pretrained.model.head.weight": torch.ones(3, 64)}  # ImageNet's classes


def config_json(config, folder, **more):
    settings = theirs(config).config.to_dict()
    (folder / "config.json").write_text(json.dumps(settings | more))


def hub_2022(state, config, folder):
    torch.save(state, folder / "pytorch_model.bin")
    config_json(config, folder)
    return folder


def hub_without_unused(state, config, folder):
    """As Intel/dpt-large is: what the deepest fusion does not use was never written."""
    save_file(state, folder / "model.safetensors")
    config_json(config, folder)
    return folder


def hub_today(state, config, folder):
    """As `save_pretrained` writes it."""
    model = theirs(config, DEPTH if "head.head.2.weight" in state else DPTForSemanticSegmentation)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def original(state, config, folder):
    torch.save(state, folder / "dpt_large-1234abcd.pt")
    return folder / "dpt_large-1234abcd.pt"


def original_in_training(state, config, folder):
    saved = {"optimizer": {"step": 1}, "model": state}
    torch.save(saved, folder / "training.pt")
    return folder / "training.pt"


def run_folder(state, config, folder, **more):
    return write_run(folder, DPT, state, config, **more)


DEPTH = DPTForDepthEstimation


def official(variant: str) -> tuple[dict, ...]:
    """Return transformers' state dict of a size, on meta."""
    with torch.device("meta"):
        return (theirs(dpt.VARIANTS[variant]).state_dict(),)


NAMES = {  # of the hub, all of them -> those in a form's file
    hub_2022: dict,
    hub_without_unused: without_unused,
    hub_today: dict,
    original: as_original,
    original_in_training: lambda state: as_original(without_unused(state)),
    run_folder: dpt.convert,
}


def form(writer, config) -> Form:
    """Return the form with or without a norm in its fusion, as `config` says."""

    def write(state, folder):
        return writer(state, config, folder)

    def names(state):
        return NAMES[writer](filled(theirs(config)) | state)

    write.__name__ = writer.__name__ + ("" if config.fusion_norm else " without norm")
    says = ("using the usual taps (1, 3, 5, 7), heads 2",) if "orig" in writer.__name__ else ()
    return Form(write, config, names, says, {"image_size": config.image_size})


FORMS = tuple(form(writer, config) for config in (MINI, LARGE) for writer in NAMES)
OLD_HUB, _, _, ORIGINAL, _, RUN = FORMS[: len(NAMES)]
QUERY = "dpt.encoder.layer.2.attention.attention.query.weight"
UNIT = "neck.fusion_stage.layers.1.residual_layer1.convolution2.weight"
PLACES = (
    Place(OLD_HUB, QUERY),
    Place(OLD_HUB, UNIT),
    Place(OLD_HUB, "head.head.1.running_var"),
    Place(ORIGINAL, "pretrained.model.blocks.2.attn.qkv.weight", QUERY),
    Place(ORIGINAL, "scratch.refinenet3.resConfUnit1.conv2.weight", UNIT),
    Place(
        ORIGINAL,
        "pretrained.act_postprocess4.4.bias",
        "neck.reassemble_stage.layers.3.resize.bias",
    ),
    Place(RUN, "vit.blocks.2.qkv.weight", QUERY),
    Place(RUN, "fusion.1.residual_layer1.convolution2.weight", UNIT),
    Place(RUN, "head.4.bias", "head.head.4.bias"),
)
