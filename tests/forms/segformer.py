"""SegFormer of transformers in any size, and the forms in which its checkpoints are published."""

import re
from dataclasses import replace

import torch
import transformers
from conftest import write_run
from forms.base import Form, Place
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import segformer
from segformer import SegFormer

transformers.logging.set_verbosity_error()


MINI = replace(segformer.VARIANTS["mini"], num_classes=5)


def official_config(c: segformer.Config) -> SegformerConfig:
    """transformers' settings for the sizes of `c`."""
    return SegformerConfig(
        hidden_sizes=list(c.widths),
        depths=list(c.depths),
        num_attention_heads=list(c.heads),
        sr_ratios=list(c.reductions),
        decoder_hidden_size=c.decoder_dim,
        drop_path_rate=c.drop_path,
        classifier_dropout_prob=c.dropout,
        num_labels=c.num_classes,
    )


def theirs(model: SegFormer) -> SegformerForSemanticSegmentation:
    """transformers' class with the weights of `model`, every one of them."""
    official, told = SegformerForSemanticSegmentation.from_pretrained(
        None,
        config=official_config(model.config),
        state_dict=segformer.to_official(model.state_dict()),
        output_loading_info=True,
    )
    assert not any(told.values()), told
    return official.train(model.training).to(next(model.parameters()).dtype)


PARAMETERS = {  # of transformers' classes with 150 labels
    "b0": 3_752_694, "b1": 13_715_798, "b2": 27_461_974, "b3": 47_337_814, "b4": 64_108_374,
    "b5": 84_708_694,
}  # fmt: skip


# The authors' names of the hub's; stages, blocks and what is between as in the hub's.
AUTHORS = (
    (r"^segformer\.encoder\.(patch_embed|block|layer_norm)(?:dings)?\.(\d)", r"backbone.\1#\2"),
    (r"^segformer\.encoder\.patch_embeddings\.(\d)", r"backbone.patch_embed#\1"),
    (r"^backbone\.layer_norm#", "backbone.norm#"),
    (r"^decode_head\.linear_c\.(\d)", r"decode_head.linear_c#\1"),
    (r"layer_norm_(\d)", r"norm\1"),
    (r"attention\.self\.query", "attn.q"),
    (r"attention\.self\.key", "attn.kv"),
    (r"attention\.self\.", "attn."),
    (r"attention\.output\.dense", "attn.proj"),
    (r"layer_norm", "norm"),
    (r"mlp\.dense", "mlp.fc"),
    (r"linear_fuse\.", "linear_fuse.conv."),
    (r"batch_norm\.", "linear_fuse.bn."),
    (r"classifier\.", "linear_pred."),
)


def as_authors(state) -> dict[str, torch.Tensor]:
    """The hub's names -> NVlabs'."""
    names = {}
    for name, t in state.items():
        if ".self.value." in name:
            continue
        if ".self.key." in name:
            t = torch.cat([t, state[name.replace(".key.", ".value.")]])
        for pattern, new in AUTHORS:
            name = re.sub(pattern, new, name)
        names[re.sub(r"#(\d)", lambda m: str(int(m[1]) + 1), name)] = t
    unused = {"decode_head.conv_seg.weight": torch.ones(5, 128, 1, 1)}
    return names | unused | {"decode_head.conv_seg.bias": torch.ones(5)}


def as_in_memory(state) -> dict[str, torch.Tensor]:
    """The hub's names -> those that transformers 5 has in memory, by itself."""
    official = SegformerForSemanticSegmentation.from_pretrained(
        None, config=official_config(MINI), state_dict=state
    )
    return official.state_dict()


def without_count(state) -> dict[str, torch.Tensor]:
    return {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}


def hub_4(state, folder):
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "segformer", "drop_path_rate": 0.1}')
    return folder


def hub_5(state, folder):
    """As `save_pretrained` writes it."""
    model = SegformerForSemanticSegmentation.from_pretrained(
        None, config=official_config(MINI), state_dict=state
    )
    model.save_pretrained(folder)
    return folder


def in_memory(state, folder):
    torch.save(state, folder / "trained.pt")
    return folder / "trained.pt"


def authors(state, folder):
    torch.save({"meta": {"iter": 3}, "state_dict": state}, folder / "segformer.b0.pth")
    return folder / "segformer.b0.pth"


def run_folder(state, folder, **more):
    return write_run(folder, SegFormer, state, MINI, **more)


def official(variant: str) -> tuple[dict, ...]:
    """Return transformers' state dict of a size, on meta: in the hub's names and in memory."""
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(official_config(segformer.VARIANTS[variant]))
    in_memory = model.state_dict()
    return segformer.to_official(in_memory), in_memory


SIZE = ("image_size is not stored in the file, using 128",)
FORMS = (
    Form(hub_4, MINI, without_count, SIZE),
    Form(hub_5, MINI, says=SIZE),
    Form(in_memory, MINI, as_in_memory, SIZE),
    Form(authors, MINI, as_authors, SIZE),
    Form(run_folder, MINI, segformer.convert),
)
OLD_HUB, _, IN_MEMORY, AUTHORS_FILE, RUN = FORMS
PLACES = (
    Place(OLD_HUB, "decode_head.linear_fuse.weight"),
    Place(OLD_HUB, "decode_head.classifier.weight"),
    Place(OLD_HUB, "decode_head.classifier.bias"),
    Place(OLD_HUB, "segformer.encoder.block.1.0.attention.self.sr.weight"),
    Place(
        IN_MEMORY,
        "segformer.stages.3.layer_norm.weight",
        "segformer.encoder.layer_norm.3.weight",
    ),
    Place(
        AUTHORS_FILE,
        "backbone.block3.0.attn.kv.weight",
        "segformer.encoder.block.2.0.attention.self.key.weight",
    ),
    Place(AUTHORS_FILE, "decode_head.linear_c4.proj.bias", "decode_head.linear_c.3.proj.bias"),
    Place(
        RUN,
        "encoder.block.0.0.mlp.dwconv.weight",
        "segformer.encoder.block.0.0.mlp.dwconv.dwconv.weight",
    ),
)
