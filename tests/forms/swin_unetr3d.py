"""Swin UNETR of MONAI in any size, and the forms in which its checkpoints are published."""

from unittest import mock

import torch
from conftest import write_run
from forms.base import Form, Place
from monai.networks.nets import SwinUNETR as Official
from monai.networks.nets.swin_unetr import PatchMergingV2

import swin_unetr3d
from swin_unetr3d import SwinUNETR

MINI = swin_unetr3d.VARIANTS["mini"]


class Legacy(PatchMergingV2):
    """The merger of MONAI 0.9.0 to 1.4.0, octant by octant."""

    def forward(self, x):
        a, b = slice(0, None, 2), slice(1, None, 2)
        order = [(a, a, a), (b, a, a), (a, b, a), (a, a, b), (b, a, b), (a, b, a), (a, a, b)]
        octants = [x[(slice(None), *octant)] for octant in (*order, (b, b, b))]
        return self.reduction(self.norm(torch.cat(octants, -1)))


def theirs(c: swin_unetr3d.Config) -> Official:
    """MONAI's class in the sizes of `c`."""
    return Official(
        in_channels=c.in_channels,
        out_channels=c.num_classes,
        feature_size=c.feature_size,
        use_v2=c.v2,
        downsample=Legacy if c.merging == "legacy" else c.merging,
    )


def official_state(model) -> dict[str, torch.Tensor]:
    return swin_unetr3d.to_official(model.state_dict())


def release(state, folder):
    path = folder / "swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt"
    torch.save({"epoch": 4999, "state_dict": state}, path)
    return path


def bundle(state, folder):
    (folder / "models").mkdir()
    torch.save(state, folder / "models/model.pt")
    return folder


def hub(state, folder):
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"feature_size": 12, "img_size": [96, 96, 96]}')
    return folder


def training_program(state, folder):
    torch.save({"model": {f"module.{n}": t for n, t in state.items()}}, folder / "last.pth")
    return folder / "last.pth"


def run_folder(state, folder, **more):
    return write_run(folder, SwinUNETR, swin_unetr3d.convert(state), MINI, **more)


def official(variant: str) -> tuple[dict, ...]:
    """Return MONAI's state dict of a size, on meta.

    MONAI reads its rates of stochastic depth, all 0, from a tensor, which would be on meta.
    """
    rates = torch.zeros(8)
    with mock.patch.object(torch, "linspace", lambda *_: rates), torch.device("meta"):
        return (theirs(swin_unetr3d.VARIANTS[variant]).state_dict(),)


PLAIN = swin_unetr3d.Config(12, num_classes=3)  # the tensors of MINI and no settings
FORMS = (
    Form(release, PLAIN, says=("merging legacy, by its name",)),
    Form(bundle, PLAIN, says=("merging legacy, the default for unknown names",)),
    Form(hub, PLAIN, says=("merging legacy, the default for unknown names",)),
    Form(training_program, PLAIN, says=("merging legacy, the default for unknown names",)),
    Form(run_folder, MINI),
)
RELEASE, BUNDLE, HUB, TRAINING, RUN = FORMS
PLACES = (
    Place(RELEASE, "swinViT.layers2.0.blocks.1.attn.relative_position_bias_table"),
    Place(BUNDLE, "decoder3.conv_block.conv3.conv.weight"),
    Place(HUB, "out.conv.conv.weight"),
    Place(TRAINING, "encoder10.layer.conv2.conv.weight"),
    Place(TRAINING, "swinViT.layers4.0.downsample.norm.bias"),
    Place(RUN, "decoder1.transp_conv.conv.weight"),
)
