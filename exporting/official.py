"""Write checkpoints for official programs: transformers, MONAI, the authors' code.

Names and shapes are those of `to_official` of the model files. The weights of a run are plain: its
LoRA was merged into them when they were saved.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import beit
import clipseg
import cris
import dpt
import sam_decoder
import segformer
import swin_unetr3d
import universal
import upernet
from engine.runs import num_classes
from exporting.output_files import default_path
from imaging import files
from imaging.atomic_files import atomic_folder, atomic_write, refuse_existing
from prediction.models import Weights, load_model

# --- what is written ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The content of an official checkpoint, and what a user has to know about it."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # of a folder of transformers
    config: dict = field(default_factory=dict)  # its config.json
    processor: dict = field(default_factory=dict)  # its preprocessor_config.json; {}: none
    content: dict = field(default_factory=dict)  # of a file, a pickle of torch
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class OfficialForm:
    """The official form of a model's checkpoint."""

    program: str  # that loads it
    make: Callable  # (model, names of its classes) -> Checkpoint
    ending: str = ""  # of the file; "": a folder


def write_official(weights: Weights, second: dict, args) -> int:
    """Write weights in the official form to --out. Return the exit status.

    Raises ValueError or OSError, one line, for models and settings that have no official form.
    """
    if weights.name in WITHOUT_FORM:
        raise ValueError(f"--to official: {WITHOUT_FORM[weights.name]}")
    form = FORMS[weights.name]
    out = Path(args.out or default_path(weights, f"-official{form.ending}"))
    refuse_existing(out)

    model = load_model(weights, "cpu", second).model
    if getattr(model.config, "adapter_dim", 0):
        raise ValueError(
            f"--to official: {weights.source} has adapters, which {form.program} does not have"
        )
    checkpoint = form.make(model, class_names(model, weights.run))
    if form.ending:
        with atomic_write(out) as part:
            torch.save(checkpoint.content, part)
    else:
        write_folder(out, checkpoint)

    print(f"{out}: for {form.program}")
    for note in checkpoint.notes:
        print(f"note: {note}")
    return 0


def write_folder(out: Path, checkpoint: Checkpoint) -> None:
    """Write a folder that `from_pretrained` of transformers loads."""
    with atomic_folder(out) as part:
        part.mkdir(parents=True)
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        save_file(tensors, part / "model.safetensors", {"format": "pt"})
        (part / "config.json").write_text(files.json_text(checkpoint.config), encoding="utf-8")
        if checkpoint.processor:
            text = files.json_text(checkpoint.processor)
            (part / "preprocessor_config.json").write_text(text, encoding="utf-8")


def class_names(model: nn.Module, run: dict) -> list[str]:
    """Return a name for each output channel of a model."""
    count = num_classes(model)
    names = run.get("classes") or []
    return names if len(names) == count else [f"class {index}" for index in range(count)]


# --- transformers: class maps ---------------------------------------------------------------------

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def square_processor(config, kind: str, resample: str) -> dict:
    """Return the preprocessor_config.json of square images, {} if transformers has no such."""
    if resample not in RESAMPLING:
        return {}
    return {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": RESAMPLING[resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def class_checkpoint(
    model: nn.Module, tensors: dict[str, Tensor], config: dict, classes: list[str]
) -> Checkpoint:
    """Return the folder of a model that assigns a class to each pixel.

    config: config.json without the names of the classes.
    """
    ours = model.config
    id2label = {str(index): name for index, name in enumerate(classes)}
    label2id = {name: index for index, name in enumerate(classes)}
    config = config | {"id2label": id2label, "label2id": label2id}

    processor = square_processor(ours, "SegformerImageProcessor", ours.resample)
    notes = []
    if processor:
        processor["do_reduce_labels"] = False  # labels do not start with a background to drop
    else:
        notes.append(
            f"no image processor of transformers resizes like `{ours.resample}`: prepare images "
            f"with `preprocess` of {type(model).__module__}.py"
        )
    if ours.num_classes == 1:
        notes.append(
            "one class: take the sigmoid of the logits, above "
            f"{ours.threshold:g} is foreground; post_process_semantic_segmentation of transformers "
            "takes the highest class, which is always 0"
        )
    return Checkpoint(tensors, config, processor, notes=notes)


def segformer_form(model: segformer.SegFormer, classes: list[str]) -> Checkpoint:
    """Return the folder of a SegFormer."""
    ours = model.config
    config = {
        "architectures": ["SegformerForSemanticSegmentation"],
        "dtype": "float32",
        "model_type": "segformer",
        "num_encoder_blocks": 4,
        "hidden_sizes": list(ours.widths),
        "depths": list(ours.depths),
        "num_attention_heads": list(ours.heads),
        "sr_ratios": list(ours.reductions),
        "mlp_ratios": [4, 4, 4, 4],
        "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2],
        "decoder_hidden_size": ours.decoder_dim,
        "drop_path_rate": ours.drop_path,
        "classifier_dropout_prob": ours.dropout,
    }
    return class_checkpoint(model, segformer.to_official(model.state_dict()), config, classes)


def upernet_form(model: upernet.UPerNet, classes: list[str]) -> Checkpoint:
    """Return the folder of a UPerNet."""
    ours = model.config
    backbone = {
        "model_type": "convnext",
        "hidden_sizes": list(ours.widths),
        "depths": list(ours.depths),
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    config = {
        "architectures": ["UperNetForSemanticSegmentation"],
        "dtype": "float32",
        "model_type": "upernet",
        "backbone_config": backbone,
        "hidden_size": ours.channels,
        "use_auxiliary_head": False,
    }
    return class_checkpoint(model, upernet.to_official(model.state_dict()), config, classes)


def dpt_form(model: dpt.DPT, classes: list[str]) -> Checkpoint:
    """Return the folder of a DPT, including tensors that transformers expects but never uses."""
    ours = model.config
    config = {
        "architectures": ["DPTForSemanticSegmentation"],
        "dtype": "float32",
        "model_type": "dpt",
        "hidden_size": ours.dim,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": ours.heads,
        "intermediate_size": ours.mlp_dim,
        "image_size": 16 * ours.grid,
        "patch_size": 16,
        "layer_norm_eps": ours.eps,
        "backbone_out_indices": list(ours.taps),
        "neck_hidden_sizes": list(ours.neck_dims),
        "fusion_hidden_size": ours.fusion_dim,
        "use_batch_norm_in_fusion_residual": ours.fusion_norm,
        "use_auxiliary_head": False,
    }

    tensors = dpt.to_official(model.state_dict())
    tensors["dpt.layernorm.weight"] = torch.ones(ours.dim)
    tensors["dpt.layernorm.bias"] = torch.zeros(ours.dim)
    deepest = "neck.fusion_stage.layers.0.residual_layer"
    for name, tensor in dict(tensors).items():
        if name.startswith(f"{deepest}2."):
            tensors[name.replace(f"{deepest}2.", f"{deepest}1.")] = tensor.clone()
    return class_checkpoint(model, tensors, config, classes)


def beit_form(model: beit.BEiT, classes: list[str]) -> Checkpoint:
    """Return the folder of a BEiT.

    Raises ValueError, one line, for taps that transformers does not reach.
    """
    ours = model.config
    if max(ours.taps) > ours.layers - 2:
        raise ValueError(
            f"--to official: taps {ours.taps} include the last block of {ours.layers}, which "
            "transformers cannot read (see `taps` in Config of beit.py)"
        )
    config = {
        "architectures": ["BeitForSemanticSegmentation"],
        "dtype": "float32",
        "model_type": "beit",
        "hidden_size": ours.dim,
        "num_hidden_layers": ours.layers,
        "num_attention_heads": ours.dim // beit.HEAD_WIDTH,
        "intermediate_size": 4 * ours.dim,
        "image_size": beit.PATCH * ours.window,
        "patch_size": beit.PATCH,
        "use_relative_position_bias": True,
        "drop_path_rate": ours.drop_path,
        "out_indices": [tap + 2 for tap in ours.taps],  # the quirk in Config of beit.py
        "use_auxiliary_head": False,
    }
    return class_checkpoint(model, beit.to_official(model.state_dict()), config, classes)


# --- transformers: prompts ------------------------------------------------------------------------


def clipseg_form(model: clipseg.CLIPSeg, classes: list[str]) -> Checkpoint:
    """Return the folder of a CLIPSeg."""
    ours = model.config
    tensors = clipseg.to_official(model.state_dict())
    positions = tensors["clip.vision_model.embeddings.position_embedding.weight"]  # (1+n*n,C)
    text = {"hidden_size": ours.text_dim, "num_hidden_layers": ours.text_layers}
    vision = {"hidden_size": ours.vision_dim, "num_hidden_layers": ours.vision_layers}
    vision |= {"patch_size": 16, "image_size": 16 * math.isqrt(len(positions) - 1)}
    for tower in (text, vision):
        tower["num_attention_heads"] = tower["hidden_size"] // clipseg.HEAD_WIDTH
        tower["intermediate_size"] = 4 * tower["hidden_size"]
    config = {
        "architectures": ["CLIPSegForImageSegmentation"],
        "dtype": "float32",
        "model_type": "clipseg",
        "text_config": text,
        "vision_config": vision,
        "projection_dim": ours.embed_dim,
        "extract_layers": list(ours.taps),
        "reduce_dim": ours.reduce_dim,
        "decoder_num_attention_heads": ours.heads,
        "decoder_intermediate_size": ours.ffn_dim,
        "use_complex_transposed_convolution": ours.refined,
    }

    notes = [
        "texts: use the tokenizer of openai/clip-vit-base-patch16, which is not in the folder",
        f"sigmoids of the logits above {ours.threshold:g} are foreground",
    ]
    processor = square_processor(ours, "ViTImageProcessor", "bilinear")
    return Checkpoint(tensors, config, processor, notes=notes)


def sam_form(model: sam_decoder.SAM, classes: list[str]) -> Checkpoint:
    """Return the folder of a SAM."""
    ours = model.config
    vision = {
        "hidden_size": ours.dim,
        "output_channels": ours.out_dim,
        "num_hidden_layers": ours.depth,
        "num_attention_heads": ours.heads,
        "image_size": ours.image_size,
        "mlp_dim": ours.mlp_dim,
        "global_attn_indexes": list(ours.global_blocks),
        "num_pos_feats": ours.out_dim // 2,
    }
    decoder = {
        "hidden_size": ours.out_dim,
        "mlp_dim": 8 * ours.out_dim,
        "iou_head_hidden_dim": ours.out_dim,
        "layer_norm_eps": ours.eps,
    }
    config = {
        "architectures": ["SamModel"],
        "dtype": "float32",
        "model_type": "sam",
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": ours.out_dim, "image_size": ours.image_size},
        "mask_decoder_config": decoder,
    }

    logit = math.log(ours.threshold / (1 - ours.threshold))
    notes = [f"masks: pass mask_threshold={logit:g} to post_process_masks of transformers"]
    processor = sam_processor(ours)
    if not processor:
        notes = [
            "no image processor of transformers prepares images for these weights (stretched, or "
            "each rescaled to 0..1): use `preprocess` and `postprocess` of sam_decoder.py"
        ]
    tensors = sam_decoder.to_official(model.state_dict())
    return Checkpoint(tensors, config, processor, notes=notes)


def sam_processor(ours: sam_decoder.Config) -> dict:
    """Return the preprocessor_config.json of SAM, {} if transformers has no such preprocessing."""
    if not ours.letterbox or ours.min_max:
        return {}
    side = ours.image_size
    return square_processor(ours, "SamImageProcessor", ours.resample) | {
        "processor_class": "SamProcessor",
        "size": {"longest_edge": side},
        "mask_size": {"longest_edge": side // 4},
        "do_pad": True,
        "pad_size": {"height": side, "width": side},
        "mask_pad_size": {"height": side // 4, "width": side // 4},
        "do_convert_rgb": True,
    }


# --- pickles of torch -----------------------------------------------------------------------------


def cris_form(model: cris.CRIS, classes: list[str]) -> Checkpoint:
    """Return the file of a CRIS: the names that DistributedDataParallel gives."""
    ours = model.config
    tensors = cris.to_official(model.state_dict())
    content = {"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}
    notes = [
        f"set input_size {ours.image_size} and word_len {ours.text_length} in its yaml file",
        f"probabilities above {ours.threshold:g} are foreground, 0.35 in test.py",
    ]
    if ours.pixels != "letterbox":
        notes.append(
            "these weights expect images stretched to a square; CRIS.pytorch keeps their aspect "
            "ratio, which gives other results"
        )
    if ours.pad_token != 0:
        notes.append(
            f"these weights expect texts padded with {ours.pad_token}; CRIS.pytorch pads with 0, "
            "which gives other results"
        )
    return Checkpoint(content=content, notes=notes)


MERGING = {  # Config.merging -> which MONAI computes it
    "legacy": (
        "these weights need MONAI 0.9 to 1.4: MONAI 1.5 and later load them without an error and "
        "give other results, as merging changed"
    ),
    "merging": (
        "these weights need MONAI 1.5 or later: earlier versions load them without an error and "
        "give other results, as merging changed"
    ),
    "mergingv2": "these weights need downsample='mergingv2'",
}


def volume_notes(ours: swin_unetr3d.Config) -> list[str]:
    """Return the notes about merging and the input of a model for volumes."""
    intensities = "z-scores of each channel's voxels other than 0"
    if ours.intensity is not None:
        low, high = ours.intensity
        intensities = f"{low:g} to {high:g} HU scaled to 0..1 and clipped"
    outputs = "softmax over the classes"
    if ours.overlapping or ours.num_classes == 1:
        outputs = f"sigmoids, above {ours.threshold:g} is foreground"
    spacing = " x ".join(f"{side:g}" for side in ours.spacing)
    return [
        MERGING[ours.merging],
        f"input: axes in RAS, {spacing} mm, {intensities}; outputs: {outputs}",
    ]


def swin_form(model: swin_unetr3d.SwinUNETR, classes: list[str]) -> Checkpoint:
    """Return the file of a Swin UNETR: a state dict of MONAI's class."""
    ours = model.config
    downsample = "mergingv2" if ours.merging == "mergingv2" else "merging"
    constructor = (
        f"SwinUNETR(in_channels={ours.in_channels}, out_channels={ours.num_classes}, "
        f"feature_size={ours.feature_size}, use_v2={ours.v2}, downsample='{downsample}')"
    )
    notes = [f"{constructor}.load_state_dict(torch.load(FILE)) loads it", *volume_notes(ours)]
    return Checkpoint(content=swin_unetr3d.to_official(model.state_dict()), notes=notes)


def universal_form(model: universal.UniversalSwinUNETR, classes: list[str]) -> Checkpoint:
    """Return the file of a Universal Model: the names of the authors' released file.

    Raises ValueError, one line, for codes that the authors' class does not have.
    """
    ours = model.config
    encodings = {"text": "word_embedding", "random": "rand_embedding"}
    if ours.codes not in encodings:
        raise ValueError(f"--to official: the Universal Model has no codes that are {ours.codes}")
    tensors = {}
    for name, tensor in universal.to_official(model.state_dict()).items():
        tensors[f"module.{name.removeprefix('backbone.')}"] = tensor  # test.py adds `backbone.`
    notes = [
        f"create the authors' class with out_channels={ours.num_classes} and "
        f"encoding='{encodings[ours.codes]}'; their classes are these: "
        f"{', '.join(ours.classes[1:])}",
        *volume_notes(ours),
    ]
    return Checkpoint(content={"net": tensors}, notes=notes)


# --- models ---------------------------------------------------------------------------------------

TRANSFORMERS = "from_pretrained of transformers"
FORMS = {
    "segformer": OfficialForm(TRANSFORMERS, segformer_form),
    "upernet": OfficialForm(TRANSFORMERS, upernet_form),
    "dpt": OfficialForm(TRANSFORMERS, dpt_form),
    "beit": OfficialForm(TRANSFORMERS, beit_form),
    "clipseg": OfficialForm(TRANSFORMERS, clipseg_form),
    "sam_decoder": OfficialForm(TRANSFORMERS, sam_form),
    "cris": OfficialForm("test.py of CRIS.pytorch", cris_form, ".pth"),
    "swin_unetr3d": OfficialForm("SwinUNETR of MONAI", swin_form, ".pt"),
    "universal": OfficialForm("test.py of CLIP-Driven-Universal-Model", universal_form, ".pth"),
}
WITHOUT_FORM = {
    "biomedclipseg": (
        "no program loads a whole BiomedCLIPSeg; open_clip has its towers alone, and the study "
        "released no weights"
    ),
    "fewshot3d": "no program loads fewshot3d; the study released no weights",
    "text_swin_unetr": "no program loads text_swin_unetr; the study released no weights",
}
