"""CLIPSeg of transformers in any size, and the forms in which its checkpoints are published."""

import torch
from conftest import write_run
from forms.base import Form, Place
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

import clipseg
from clipseg import CLIPSeg

MINI = clipseg.VARIANTS["mini"]


def theirs(c: clipseg.Config, **more) -> CLIPSegForImageSegmentation:
    """transformers' class in the sizes of `c`."""
    text = {"hidden_size": c.text_dim, "num_hidden_layers": c.text_layers}
    vision = {"hidden_size": c.vision_dim, "num_hidden_layers": c.vision_layers, "patch_size": 16}
    for tower in (text, vision):
        tower["num_attention_heads"] = tower["hidden_size"] // 64
        tower["intermediate_size"] = 4 * tower["hidden_size"]
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=c.embed_dim,
        extract_layers=list(c.taps),
        reduce_dim=c.reduce_dim,
        decoder_num_attention_heads=c.heads,
        decoder_intermediate_size=c.ffn_dim,
        use_complex_transposed_convolution=c.refined,
        **more,
    )
    return CLIPSegForImageSegmentation(config).eval()


def hub_state(model) -> dict[str, torch.Tensor]:
    """In numbers of which OpenAI's half precision loses nothing."""
    state = clipseg.to_official(model.state_dict())
    return {name: t.half().float() for name, t in state.items()}


OPENAI = {
    "clip.visual_projection.weight": "visual.proj",
    "clip.text_projection.weight": "text_projection",
    "clip.vision_model.": "visual.",
    "clip.text_model.": "",
    "clip.": "",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "",
    "encoder.layers": "transformer.resblocks",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "self_attn": "attn",
    "layer_norm": "ln_",
    "fc1": "c_fc",
    "fc2": "c_proj",
}


DECODER = {
    "decoder.": "",
    "transposed_convolution": "trans_conv",
    "layers": "blocks",
    "layer_norm": "norm",
    "mlp.fc": "linear",
}


def as_original(state):
    """The hub's names -> the original release: its decoder and OpenAI's CLIP."""
    decoder, clip = {"reduce.weight": torch.ones(32, 128), "reduce.bias": torch.ones(32)}, {}
    for name, t in state.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            t = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
            name = name.replace("q_proj.", "in_proj_")
        if name.endswith("_projection.weight"):
            t = t.T.contiguous()
        into, table = (decoder, DECODER) if name.startswith("decoder.") else (clip, OPENAI)
        for old, new in table.items():
            name = name.replace(old, new)
        into[name] = t
    return decoder | {f"clip_model.{name}": t for name, t in clip.items()}


def save_archive(state, path):
    """A TorchScript archive like OpenAI's: half precision, three numbers more."""
    root = nn.Module()
    numbers = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    for name, x in ({k: torch.tensor(v) for k, v in numbers.items()} | state).items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, x.half() if x.is_floating_point() else x)
    torch.jit.save(torch.jit.script(root), path)


def hub_2022(state, folder):
    for tower, n in (("text", 77), ("vision", 197)):
        name = f"clip.{tower}_model.embeddings.position_ids"
        state = state | {name: torch.arange(n)[None]}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"extract_layers": [0, 1, 2], "reduce_dim": 32}')
    return {"source": folder}


def hub_today(state, folder):
    """As `save_pretrained` writes it."""
    model = theirs(MINI)
    model.load_state_dict(state)
    model.save_pretrained(folder)
    return {"source": folder}


def original(state, folder, save_clip=save_archive, clip="ViT-B-16.pt"):
    parts = {"decoder": {}, "clip": {}}
    for name, t in state.items():
        part = "clip" if name.startswith("clip_model.") else "decoder"
        parts[part][name.removeprefix("clip_model.")] = t
    torch.save(parts["decoder"], folder / "rd64-uni-refined.pth")
    save_clip(parts["clip"], folder / clip)
    return {"source": folder / "rd64-uni-refined.pth", "clip": folder / clip}


def original_beside_open_clip(state, folder):
    arguments = original(state, folder, save_file, "open_clip_model.safetensors")
    return arguments | {"clip": folder}  # as a repository of the hub


def original_module(state, folder):
    """`state_dict()` of the original class, which holds the vision tower twice."""
    old = "clip_model.visual."
    twice = {n.replace(old, "model."): t for n, t in state.items() if n.startswith(old)}
    torch.save(twice | state, folder / "module.pth")
    return {"source": folder / "module.pth"}


def medvlsm(state, folder):
    state = {f"net.clipseg.{name}": t for name, t in state.items()}
    torch.save({"epoch": 3, "state_dict": state}, folder / "last.ckpt")
    return {"source": folder / "last.ckpt"}


def run_folder(state, folder, **more):
    return {"source": write_run(folder, CLIPSeg, state, MINI, **more)}


def official(variant: str) -> tuple[dict, ...]:
    """Return transformers' state dict of a size, on meta."""
    with torch.device("meta"):
        return (theirs(clipseg.VARIANTS[variant]).state_dict(),)


NO_CONFIG = ("no config.json lists the taps",)
FORMS = (
    Form(hub_2022, MINI),
    Form(hub_today, MINI),
    Form(original, MINI, as_original, NO_CONFIG),
    Form(original_beside_open_clip, MINI, as_original, NO_CONFIG),
    Form(original_module, MINI, as_original, NO_CONFIG),
    Form(medvlsm, MINI, says=NO_CONFIG),
    Form(run_folder, MINI, clipseg.convert),
)
OLD_HUB, _, RELEASE, _, MODULE, MEDVLSM, RUN = FORMS
VISION = "clip.vision_model.encoder.layers.2.self_attn.k_proj.weight"
TEXT = "clip.text_model.encoder.layers.1.self_attn.k_proj.weight"
FILM = "decoder.film_mul.weight"
PLACES = (
    Place(OLD_HUB, VISION),
    Place(OLD_HUB, TEXT),
    Place(RELEASE, "film_mul.weight", FILM),
    Place(RELEASE, "blocks.1.linear1.weight", "decoder.layers.1.mlp.fc1.weight"),
    Place(RELEASE, "clip_model.visual.ln_pre.bias", "clip.vision_model.pre_layrnorm.bias"),
    Place(MODULE, "clip_model.transformer.resblocks.1.attn.in_proj_weight", TEXT),
    Place(MEDVLSM, FILM),
    Place(RUN, VISION.replace("self_attn.k_proj.", "attn.in_proj_"), VISION),
    Place(RUN, FILM),
)
