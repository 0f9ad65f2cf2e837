"""SAM of transformers in any size, and the forms in which its checkpoints are published."""

from dataclasses import replace

import torch
from conftest import write_run
from forms.base import Form, Place
from safetensors.torch import save_file
from transformers import SamConfig, SamModel

import sam_decoder
from sam_decoder import FOURIER, SAM, TWIN

MINI = sam_decoder.VARIANTS["mini"]


def theirs(c: sam_decoder.Config) -> SamModel:
    """transformers' class in the sizes of `c`."""
    vision = {
        "hidden_size": c.dim,
        "output_channels": c.out_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "image_size": c.image_size,
        "mlp_dim": c.mlp_dim,
        "global_attn_indexes": list(c.global_blocks),
        "num_pos_feats": c.out_dim // 2,
    }
    decoder = {"hidden_size": c.out_dim, "mlp_dim": 8 * c.out_dim, "iou_head_hidden_dim": c.out_dim}
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": c.out_dim, "image_size": c.image_size},
        mask_decoder_config=decoder | {"layer_norm_eps": c.eps},
    )
    return SamModel(config).eval()


ORIGINAL = {  # the hub's names -> the authors', written down apart from the table in the file
    "vision_encoder.patch_embed.projection.": "image_encoder.patch_embed.proj.",
    "vision_encoder.layers.": "image_encoder.blocks.",
    "vision_encoder.neck.conv1.": "image_encoder.neck.0.",
    "vision_encoder.neck.layer_norm1.": "image_encoder.neck.1.",
    "vision_encoder.neck.conv2.": "image_encoder.neck.2.",
    "vision_encoder.neck.layer_norm2.": "image_encoder.neck.3.",
    "vision_encoder.pos_embed": "image_encoder.pos_embed",
    FOURIER: "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder.point_embed.": "prompt_encoder.point_embeddings.",
    "mask_embed.conv1": "mask_downscaling.0",
    "mask_embed.layer_norm1": "mask_downscaling.1",
    "mask_embed.conv2": "mask_downscaling.3",
    "mask_embed.layer_norm2": "mask_downscaling.4",
    "mask_embed.conv3": "mask_downscaling.6",
    "layer_norm_final_attn": "norm_final_attn",
    "upscale_conv1": "output_upscaling.0",
    "upscale_layer_norm": "output_upscaling.1",
    "upscale_conv2": "output_upscaling.3",
    ".layer_norm": ".norm",
}


def as_original(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, t in state.items():
        if name == TWIN:
            continue
        if "_mlps." in name or "_head." in name:
            name = name.replace("layers.0.", "layers.1.")
            name = name.replace("proj_in.", "layers.0.").replace("proj_out.", "layers.2.")
        for hub, old in ORIGINAL.items():
            name = name.replace(hub, old)
        renamed[name] = t
    return renamed


def hub_today(state, folder):
    """As `save_pretrained` writes it: one of the two names, config.json."""
    model = theirs(MINI)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return folder


def hub_2023(state, folder):
    """Both names in a pickle, nothing beside it."""
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def other_name_only(state, folder):
    save_file({n: t for n, t in state.items() if n != FOURIER}, folder / "model.safetensors")
    return folder


def original(state, folder, name="sam_vit_b_01ec64.pth"):
    pixels = {"pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save(state | pixels, folder / name)
    return folder / name


def medsam(state, folder):
    return original(state, folder, "medsam_vit_b.pth")


def medsam_training(state, folder):
    """MedSAM's train_multi_gpus.py."""
    model = {f"module.{name}": t for name, t in state.items()}
    file = {"model": model, "optimizer": {"state": {}, "param_groups": []}, "epoch": 3}
    torch.save(file, folder / "medsam_model_latest.pth")
    return folder / "medsam_model_latest.pth"


def run_folder(state, folder, **more):
    return write_run(folder, SAM, state, replace(MINI, eps=1e-5, letterbox=False), **more)


ORIGINAL_MINI = replace(MINI, eps=1e-5)


def official(variant: str) -> tuple[dict, ...]:
    """Return transformers' state dict of a size, then the authors'; all of them zeros.

    The table of frequencies has two names, and what they hold is compared: there is no meta.
    """
    with torch.device("meta"):
        state = theirs(sam_decoder.VARIANTS[variant]).state_dict()
    zeros = {name: torch.zeros(1).expand(t.shape) for name, t in state.items()}
    return zeros, as_original(zeros)


def without_fourier(state):
    return {name: t for name, t in state.items() if name != FOURIER}


UNKNOWN = ("preprocessing of SAM, as the name is unknown; for MedSAM pass **sam_decoder.MEDSAM",)
BY_NAME = ("preprocessing of SAM, by its name",)
MEDSAM_BY_NAME = ("preprocessing of MedSAM, by its name",)
MEDSAM_MINI = replace(ORIGINAL_MINI, **sam_decoder.MEDSAM)
FORMS = (
    Form(hub_today, MINI, says=UNKNOWN),
    Form(hub_2023, MINI, says=UNKNOWN),
    Form(other_name_only, MINI, without_fourier, UNKNOWN),
    Form(original, ORIGINAL_MINI, as_original, BY_NAME),
    Form(medsam, MEDSAM_MINI, as_original, MEDSAM_BY_NAME),
    Form(medsam_training, ORIGINAL_MINI, as_original, UNKNOWN),
    Form(run_folder, replace(ORIGINAL_MINI, letterbox=False), sam_decoder.convert),
)
_, OLD_HUB, OTHER_NAME, ORIGINAL_FILE, _, TRAINING, RUN = FORMS
ATTN = "vision_encoder.layers.{}.attn."
HEAD = "mask_decoder.iou_prediction_head.layers.0.weight"
PLACES = (
    Place(OLD_HUB, "vision_encoder.pos_embed"),
    Place(OLD_HUB, ATTN.format(1) + "rel_pos_h", axis=0),
    Place(OLD_HUB, ATTN.format(2) + "rel_pos_w", axis=0),
    Place(OLD_HUB, "vision_encoder.layers.0.layer_norm1.bias"),
    Place(OLD_HUB, "vision_encoder.layers.3.mlp.lin1.bias"),
    Place(OLD_HUB, HEAD),
    Place(OTHER_NAME, TWIN, FOURIER),
    Place(ORIGINAL_FILE, "image_encoder.pos_embed", "vision_encoder.pos_embed"),
    Place(ORIGINAL_FILE, HEAD, "head.proj_in.weight"),
    Place(
        ORIGINAL_FILE,
        "mask_decoder.transformer.layers.1.norm2.bias",
        "layers.1.layer_norm2.bias",
    ),
    Place(TRAINING, "prompt_encoder.mask_downscaling.4.weight", "mask_embed.layer_norm2.weight"),
    Place(RUN, "mask_decoder.mask_tokens.weight"),
)
