"""UPerNet of transformers in any size, and the forms in which its checkpoints are published."""

import re
from dataclasses import replace

import torch
from conftest import write_run
from forms.base import Form, Place
from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

import upernet
from upernet import UPerNet

MINI = replace(upernet.VARIANTS["mini"], num_classes=5)


def encoder_config(c: upernet.Config) -> ConvNextConfig:
    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    sizes = {"hidden_sizes": list(c.widths), "depths": list(c.depths)}
    return ConvNextConfig(**sizes, out_features=stages, num_labels=7)


def theirs(c: upernet.Config, **more) -> UperNetForSemanticSegmentation:
    """transformers' class in the sizes of `c`."""
    config = UperNetConfig(
        backbone_config=encoder_config(c),
        hidden_size=c.channels,
        num_labels=c.num_classes,
        auxiliary_in_channels=c.widths[2],
        **more,
    )
    return UperNetForSemanticSegmentation(config).eval()


# The hub's names -> mmsegmentation's, in this order.
MMSEG = (
    (r"backbone\.embeddings\.patch_embeddings\.", "backbone.downsample_layers.0.0."),
    (r"backbone\.embeddings\.layernorm\.", "backbone.downsample_layers.0.1."),
    (r"encoder\.stages\.(\d)\.downsampling_layer\.", r"downsample_layers.\1."),
    (r"encoder\.stages\.(\d)\.layers\.(\d+)\.", r"stages.\1.\2."),
    (r"dwconv", "depthwise_conv"),
    (r"layernorm", "norm"),
    (r"pwconv", "pointwise_conv"),
    (r"layer_scale_parameter", "gamma"),
    (r"batch_norm", "bn"),
    (r"classifier", "conv_seg"),
)


def with_auxiliary(state):
    return theirs(MINI).state_dict() | state


def as_mmseg(state):
    named = {}
    for name, t in with_auxiliary(state).items():
        for pattern, new in MMSEG:
            name = re.sub(pattern, new, name)
        stage = r"hidden_states_norms\.stage(\d)"
        named[re.sub(stage, lambda m: f"norm{int(m[1]) - 1}", name)] = t
    return named


def hub_2023(state, folder):
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"hidden_size": 32, "model_type": "upernet"}')
    return folder


def hub_today(state, folder):
    """As `save_pretrained` writes it."""
    model = theirs(MINI)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def hub_today_without_auxiliary(state, folder):
    model = theirs(MINI, use_auxiliary_head=False)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def mmseg(state, folder):
    path = folder / "upernet_convnext_small_fp16_512x512_160k_ade20k_20220227-1b1e394f.pth"
    torch.save({"meta": {"epoch": 127, "CLASSES": ["wall"]}, "state_dict": state}, path)
    return path


def training_program(state, folder):
    state = {f"module.{name}": t for name, t in state.items()}
    torch.save({"epoch": 3, "model": state}, folder / "last.pt")
    return folder / "last.pt"


def run_folder(state, folder, **more):
    return write_run(folder, UPerNet, state, MINI, **more)


def official(variant: str) -> tuple[dict, ...]:
    """Return transformers' state dict of a size, on meta."""
    with torch.device("meta"):
        return (theirs(upernet.VARIANTS[variant]).state_dict(),)


SIZE = ("image_size is not stored in the file, using ",)
FORMS = (
    Form(hub_2023, MINI, with_auxiliary, SIZE),
    Form(hub_today, MINI, with_auxiliary, SIZE),
    Form(hub_today_without_auxiliary, MINI, says=SIZE),
    Form(mmseg, MINI, as_mmseg, SIZE),
    Form(training_program, MINI, with_auxiliary, SIZE),
    Form(run_folder, MINI),
)
OLD_HUB, _, _, MMSEG_FILE, TRAINING, RUN = FORMS
PWCONV = "backbone.encoder.stages.2.layers.1.pwconv1.weight"
FUSE = "decode_head.fpn_bottleneck.conv.weight"
CLASSIFIER = "decode_head.classifier.weight"
PLACES = (
    Place(OLD_HUB, PWCONV),
    Place(OLD_HUB, "decode_head.psp_modules.1.1.batch_norm.running_mean"),
    Place(OLD_HUB, CLASSIFIER),
    Place(TRAINING, FUSE),
    Place(MMSEG_FILE, "backbone.stages.2.1.pointwise_conv1.weight", PWCONV),
    Place(MMSEG_FILE, "backbone.norm3.bias", "backbone.hidden_states_norms.stage4.bias"),
    Place(MMSEG_FILE, "decode_head.conv_seg.weight", CLASSIFIER),
    Place(RUN, FUSE),
)
