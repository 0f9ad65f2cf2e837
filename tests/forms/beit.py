"""BEiT of transformers in any size, and the forms in which its checkpoints are published."""

import json

import torch
from conftest import write_run
from forms.base import Form, Place
from transformers import BeitConfig, BeitForSemanticSegmentation, logging

import beit
from beit import BEiT

logging.set_verbosity_error()  # it tells that the auxiliary head is missing; so do the tests
logging.disable_progress_bar()


MINI = beit.VARIANTS["mini"]


def settings(c: beit.Config, **more) -> BeitConfig:
    """transformers' config in the sizes of `c`."""
    official = BeitConfig(
        hidden_size=c.dim,
        num_hidden_layers=c.layers,
        num_attention_heads=c.dim // 64,
        intermediate_size=4 * c.dim,
        image_size=16 * c.window,
        use_relative_position_bias=True,
        drop_path_rate=c.drop_path,
        num_labels=c.num_classes,
        **more,
    )
    official._out_indices = [i + 2 for i in c.taps]  # past its check, so that all blocks may be
    return official


def theirs(c: beit.Config, state: dict | None = None) -> BeitForSemanticSegmentation:
    """transformers' class, with weights in the hub's names through its own loading code."""
    if state is None:
        return BeitForSemanticSegmentation(settings(c)).eval()
    model, told = BeitForSemanticSegmentation.from_pretrained(
        None, config=settings(c), state_dict=dict(state), output_loading_info=True
    )
    missing = {name for name in told["missing_keys"] if not name.startswith("auxiliary_head.")}
    assert not missing and not told["unexpected_keys"] and not told["mismatched_keys"]
    return model.eval().to(next(iter(state.values())).dtype)


def with_auxiliary(state) -> dict[str, torch.Tensor]:
    """Add the auxiliary head, which the hub's files have."""
    state = dict(state)
    state["auxiliary_head.convs.0.conv.weight"] = torch.randn(256, 128, 3, 3)
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"auxiliary_head.convs.0.bn.{name}"] = torch.rand(256)
    state["auxiliary_head.convs.0.bn.num_batches_tracked"] = torch.tensor(7)
    state["auxiliary_head.classifier.weight"] = torch.randn(150, 256, 1, 1)
    return state | {"auxiliary_head.classifier.bias": torch.randn(150)}


def hub_state(model) -> dict[str, torch.Tensor]:
    """As the hub has it: with the auxiliary head."""
    return with_auxiliary(beit.to_official(model.state_dict()))


AUTHORS_NAMES = {
    "beit.embeddings.cls_token": "backbone.cls_token",
    "beit.embeddings.patch_embeddings.projection": "backbone.patch_embed.proj",
    "beit.encoder.layer.": "backbone.blocks.",
    "attention.attention.relative_position_bias.": "attn.",
    "attention.attention.query.bias": "attn.q_bias",
    "attention.attention.value.bias": "attn.v_bias",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_": "gamma_",
    "fpn1.": "backbone.fpn1.",
    "fpn2.": "backbone.fpn2.",
    "head.classifier": "head.conv_seg",
}


def as_original(state):
    """The hub's names -> those of the authors."""
    original = {}
    for name, t in state.items():
        if name.endswith(("key.weight", "value.weight")):
            continue
        if name.endswith("query.weight"):
            t = torch.cat([state[name.replace("query", x)] for x in ("query", "key", "value")])
            name = name.replace("attention.attention.query", "attn.qkv")
        for old, new in AUTHORS_NAMES.items():
            name = name.replace(old, new)
        original[name] = t
    return original


def as_inside(state):
    """The hub's names -> those within transformers 5."""
    state = {name: t for name, t in state.items() if not name.startswith("auxiliary_head.")}
    return theirs(MINI, state).state_dict()


def with_indices(state):
    """Each table has beside it the constant that old versions saved."""
    tables = [name for name in state if name.endswith("bias_table")]
    return state | {name.replace("bias_table", "index"): torch.zeros(17, 17) for name in tables}


def hub_2021(state, folder):
    torch.save(with_indices(state), folder / "pytorch_model.bin")
    told = {"out_indices": [2, 3, 4, 5], "image_size": 64, "model_type": "beit"}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


def hub_today(state, folder):
    """As `save_pretrained` writes it."""
    theirs(MINI, beit.to_official(state)).save_pretrained(folder)
    return folder


def inside(state, folder):
    torch.save(state, folder / "model.pth")
    return folder / "model.pth"


def original(state, folder):
    state = {"meta": {"epoch": 1, "CLASSES": ("wall",)}, "state_dict": with_indices(state)}
    torch.save(state, folder / "beit_base_patch16_640_pt22k_ft22ktoade20k.pth")
    return folder / "beit_base_patch16_640_pt22k_ft22ktoade20k.pth"


def run_folder(state, folder, **more):
    return write_run(folder, BEiT, state, MINI, **more)


def official(variant: str) -> tuple[dict, ...]:
    """Return transformers' state dict of a size, on meta: in the hub's names and in memory."""
    with torch.device("meta"):
        in_memory = theirs(beit.VARIANTS[variant]).state_dict()
    return beit.to_official(in_memory), in_memory


NO_CONFIG = ("using transformers' taps (0, 1, 2, 3); the authors' taps are (2, 3, 4, 5)",)
FORMS = (
    Form(hub_2021, MINI, with_auxiliary),
    Form(hub_today, MINI, with_auxiliary),
    Form(inside, MINI, as_inside, NO_CONFIG),
    Form(original, MINI, lambda state: as_original(with_auxiliary(state)), NO_CONFIG),
    Form(run_folder, MINI, lambda state: beit.convert(with_auxiliary(state))),
)
OLD_HUB, _, INSIDE, ORIGINAL, RUN = FORMS
KEY = "beit.encoder.layer.1.attention.attention.key.weight"
TABLE = "attention.attention.relative_position_bias.relative_position_bias_table"
PLACES = (
    Place(OLD_HUB, KEY),
    Place(OLD_HUB, "decode_head.fpn_bottleneck.bn.running_var"),
    Place(OLD_HUB, "decode_head.classifier.weight"),
    Place(INSIDE, "fpn.fpn1.normalization.weight", "fpn1.1.weight"),
    Place(ORIGINAL, "backbone.blocks.1.attn.qkv.weight", KEY),
    Place(ORIGINAL, "backbone.blocks.2.attn.relative_position_bias_table", f"layer.2.{TABLE}"),
    Place(ORIGINAL, "backbone.fpn2.0.weight", "fpn2.0.weight"),
    Place(RUN, "beit.layers.4.mlp.fc1.bias", "beit.encoder.layer.4.intermediate.dense.bias"),
)
