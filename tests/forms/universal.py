"""Forms in which checkpoints of the Universal Model are published or saved."""

from dataclasses import replace

import torch
from conftest import randomised, write_run
from forms.base import Form, Place

import swin_unetr3d
import universal
from universal import CODES, UniversalConfig, UniversalSwinUNETR

MINI = UniversalConfig(12, num_classes=3, classes=("background", "liver", "spleen", "aorta"))


def model_of(codes: str, dtype=torch.float32, **more) -> UniversalSwinUNETR:
    embedding = torch.zeros(3, universal.TEXT) if codes == "text" else None
    return randomised(UniversalSwinUNETR(replace(MINI, codes=codes, **more), embedding)).to(dtype)


def released(state: dict[str, torch.Tensor], folder):
    """The form of the released file, which DataParallel trained before the backbone was one."""
    path = folder / "clip_driven_universal_swin_unetr.pth"
    net = {f"module.{n.removeprefix('backbone.')}": t for n, t in state.items()}
    torch.save({"net": net, "epoch": 3, "optimizer": {"state": {}}, "scheduler": {"t": 1}}, path)
    return path


def todays(state, folder):
    path = folder / "epoch_1.pth"
    torch.save({"net": {f"module.{n}": t for n, t in state.items()}, "epoch": 1}, path)
    return path


def one_device(state, folder):
    """Trained without DataParallel: `organ_embedding` has no first part to take away."""
    torch.save({"net": state, "epoch": 1}, folder / "epoch_1.pth")
    return folder / "epoch_1.pth"


def run_folder(state, folder, codes):
    """Write a run in names of ours, whose config tells everything."""
    config = replace(MINI, codes=codes)
    return write_run(folder, UniversalSwinUNETR, swin_unetr3d.convert(state), config)


def form(writer, codes: str) -> Form:
    """Return the form for one kind of codes; no file but a run's tells the names of classes."""
    config = replace(MINI, codes=codes)
    arguments = {"codes": codes} if writer is run_folder else {}
    names = ("background", "class 1", "class 2", "class 3")
    loaded = config if writer is run_folder else replace(config, classes=names)
    says = () if writer is run_folder else ("merging legacy, ",)

    def write(state, folder):
        return writer(state, folder, **arguments)

    write.__name__ = f"{writer.__name__} {codes}"
    return Form(write, config, says=says, loaded_config=loaded)


WRITERS = (released, todays, one_device, run_folder)
FORMS = tuple(form(writer, codes) for codes in CODES for writer in WRITERS)
RELEASED, TODAYS, _, RUN = FORMS[: len(WRITERS)]
PLACES = (
    Place(RELEASED, "controller.bias"),
    Place(RELEASED, "backbone.decoder3.conv_block.conv3.conv.weight"),
    Place(TODAYS, "controller.weight"),
    Place(RUN, "backbone.decoder3.conv_block.conv3.conv.weight"),
)
