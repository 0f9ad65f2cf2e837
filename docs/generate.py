"""Fill the generated tables of README.md and docs/ from the code and from docs/parity.json.

    python docs/generate.py            # rewrite the tables that are stale
    python docs/generate.py --check    # list the files that have stale tables; status 1 if any has

A table stands between `<!-- generated: KIND NAME -->` and `<!-- end generated -->`. The kinds are
the keys of TABLES. docs/parity.json is what `make parity` measured.
"""

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import beit
import biomedclipseg
import clipseg
import cris
import dpt
import fewshot3d
import sam_decoder
import segformer
import swin_unetr3d
import universal
import upernet
from options import Options, default_words, flag
from recipes import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
GENERATED = re.compile(
    r"(?P<start><!-- generated: (?P<kind>\w+) ?(?P<name>[\w-]*) -->\n)"
    r"(?P<table>.*?)"
    r"(?P<end><!-- end generated -->)",
    re.DOTALL,
)
LOADING = "# Nothing under this line is needed to understand the"

# Model -> its class and variants.
MODELS = {
    "cris": (cris.CRIS, cris.VARIANTS),
    "clipseg": (clipseg.CLIPSeg, clipseg.VARIANTS),
    "biomedclipseg": (biomedclipseg.BiomedCLIPSeg, biomedclipseg.VARIANTS),
    "segformer": (segformer.SegFormer, segformer.VARIANTS),
    "upernet": (upernet.UPerNet, upernet.VARIANTS),
    "dpt": (dpt.DPT, dpt.VARIANTS),
    "beit": (beit.BEiT, beit.VARIANTS),
    "sam_decoder": (sam_decoder.SAM, sam_decoder.VARIANTS),
    "swin_unetr3d": (swin_unetr3d.SwinUNETR, swin_unetr3d.VARIANTS),
    "universal": (universal.UniversalSwinUNETR, universal.UNIVERSAL_VARIANTS),
    "fewshot3d": (fewshot3d.AttentionUniversal, fewshot3d.VARIANTS),
    "text_swin_unetr": (fewshot3d.TextSwinUNETR, fewshot3d.TEXT_VARIANTS),
}

# Model file -> what it maps to what, and the weights that it loads, for the table of the README.
SUMMARIES = {
    "cris": ("CRIS: image + phrase → mask", "OpenAI's CLIP, CRIS checkpoints"),
    "clipseg": ("CLIPSeg: image + phrase or example → mask", "`CIDAS/clipseg-*`, `rd64-uni*.pth`"),
    "biomedclipseg": (
        "CLIPSeg on BiomedCLIP: image + phrase → mask",
        "BiomedCLIP, CLIPSeg's decoder",
    ),
    "segformer": ("SegFormer b0–b5: image → class map", "`nvidia/segformer-*`, `nvidia/mit-*`"),
    "upernet": ("UPerNet on ConvNeXt: image → class map", "`openmmlab/upernet-convnext-*`"),
    "dpt": ("DPT-large: image → class map", "`Intel/dpt-large*`, isl-org's `.pt`"),
    "beit": ("BEiT + UPer head: image → class map", "`microsoft/beit-*-ade-640-640`"),
    "sam_decoder": ("SAM, MedSAM: image + boxes, points → masks", "`facebook/sam-vit-*`, MedSAM"),
    "swin_unetr3d": ("Swin UNETR: volume → organs", "MONAI's BTCV, BraTS21, `model_swinvit.pt`"),
    "universal": ("Universal Model: volume + class names → masks", "the authors' Swin UNETR"),
    "fewshot3d": ("few-shot text variants of the two above", "Swin UNETR's, the study's own"),
}


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown; pipes in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    text = ""
    for cells in lines:
        escaped = [cell.replace("|", "\\|") for cell in cells]
        text += "| " + " | ".join(escaped) + " |\n"
    return text


# --- variants ---


def parameter_count(model_class: type[nn.Module], config) -> int:
    arguments = {}
    if getattr(config, "codes", None) == "text":  # one text of CLIP for each class
        arguments["embedding"] = torch.empty(config.num_classes, universal.TEXT)
    with torch.device("meta"):
        model = model_class(config, **arguments)
    return sum(parameter.numel() for parameter in model.parameters())


def changed_fields(config, default) -> str:
    """Return the fields of a config that are not those of the first variant, as code."""
    changes = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value != getattr(default, field.name):
            changes.append(f"`{field.name}={value!r}`")
    return ", ".join(changes)


def variants_table(name: str) -> str:
    """Return the variants of a model with their parameter counts."""
    model_class, variants = MODELS[name]
    first = next(iter(variants.values()))
    rows = []
    for variant, config in variants.items():
        count = parameter_count(model_class, config)
        changes = changed_fields(config, first)
        rows.append([f"`{variant}`", f"{count:,}", changes])
    return markdown_table(["`--variant`", "parameters", "differs from the first by"], rows)


# --- parity ---


def read_parity() -> dict:
    return json.loads((ROOT / "docs/parity.json").read_text())


def deviation(row: dict, precision: str) -> str:
    value = row.get(precision)
    return "" if value is None else f"{value:.1e}"


def parity_table(name: str) -> str:
    """Return the measured deviations of a model from its official implementation."""
    rows = []
    for what, row in read_parity()[name].items():
        rows.append([what, row["against"], deviation(row, "float64"), deviation(row, "float32")])
    return markdown_table(["compared", "official implementation", "float64", "float32"], rows)


# --- recipes ---

# A field of a protocol -> how the table calls it. Rows without any value are left out.
PROTOCOL_ROWS = {
    "train": "trained parts",
    "prompt": "prompt",
    "negatives": "negative prompts",
    "sam_prompts": "box or point prompts",
    "codes": "class codes",
    "loss": "loss",
    "optimizer": "optimizer",
    "lr": "learning rate",
    "backbone_lr": "learning rate of pretrained parts",
    "weight_decay": "weight decay",
    "schedule": "schedule",
    "warmup": "warm-up (share of steps)",
    "batch_size": "batch size",
    "epochs": "epochs",
    "clip_grad": "gradient clipping",
    "dtype": "precision on a GPU",
    "augment": "augmentation",
    "config": "model settings",
}


def show_setting(name: str, value) -> str:
    """Return the value of a protocol's field as text."""
    if value in (None, "", {}, 0.0) and name not in ("warmup", "weight_decay"):
        return "–"
    if name == "config":
        return ", ".join(f"{key} {setting}" for key, setting in value.items())
    if name == "loss":
        function = value.func if isinstance(value, partial) else value
        return f"`{function.__name__}`"
    if name == "augment":
        return "the model's own" if isinstance(value, dict) else f"`{type(value).__name__}`"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def recipes_table(name: str) -> str:
    """Return the numbers of each `--recipe` of a model, a column for each."""
    protocols = FAMILIES[name].protocols
    rows = []
    for field, label in PROTOCOL_ROWS.items():
        values = [show_setting(field, getattr(p, field)) for p in protocols.values()]
        if set(values) != {"–"}:
            rows.append([label, *values])
    return markdown_table(["", *(f"`{recipe}`" for recipe in protocols)], rows)


# --- options ---


def options_table(name: str) -> str:
    """Return the options of train.py with their defaults, a section for each group."""
    groups = {}
    for spec in fields(Options):
        row = [f"`{flag(spec.name)}`", default_words(spec), spec.metadata["help"]]
        groups.setdefault(spec.metadata["group"], []).append(row)

    sections = []
    for group, rows in groups.items():
        table = markdown_table(["option", "default", "meaning"], rows)
        sections.append(f"**{group[0].upper()}{group[1:]}**\n\n{table}")
    return "\n".join(sections)


# --- the table of models ---


def code_lines(text: str) -> int:
    """Return the number of lines that hold code: not blank, no comment, no docstring."""
    lines = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines.update(range(token.start[0], token.end[0] + 1))

    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if ast.get_docstring(node) is not None:
                lines -= set(range(first.lineno, first.end_lineno + 1))
    return len(lines)


def parity_in_short(name: str) -> str:
    """Return the largest deviation of a model's outputs: in float64, else in float32."""
    rows = read_parity()[name].values()
    for precision in ("float64", "float32"):
        values = [row[precision] for row in rows if precision in row]
        if values:
            return f"{max(values):.0e} ({precision})"
    raise ValueError(f"docs/parity.json has no number for {name}: run `make parity`")


def models_table(name: str) -> str:
    """Return the model files: what they do, lines of code, weights, parity, page."""
    rows = []
    for file, (summary, weights) in SUMMARIES.items():
        text = (ROOT / f"{file}.py").read_text()
        architecture = text.partition(LOADING)[0]
        lines = f"{code_lines(architecture)} + {code_lines(text) - code_lines(architecture)}"
        page = f"[page](docs/models/{file}.md)"
        link = f"[`{file}.py`]({file}.py)"
        rows.append([link, summary, lines, weights, parity_in_short(file), page])
    header = ["file", "model", "lines of code: model + loading", "weights", "deviation", "docs"]
    return markdown_table(header, rows)


TABLES = {
    "models": models_table,
    "options": options_table,
    "parity": parity_table,
    "recipes": recipes_table,
    "variants": variants_table,
}


# --- files ---


def generated(text: str) -> str:
    """Return a page with all of its generated tables up to date."""

    def fill(match: re.Match) -> str:
        table = TABLES[match["kind"]](match["name"])
        return f"{match['start']}\n{table}\n{match['end']}"

    return GENERATED.sub(fill, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description="Fill the generated tables of README.md and docs/")
    parser.add_argument("--check", action="store_true", help="change nothing; list stale files")
    arguments = parser.parse_args()

    stale = 0
    for page in pages():
        text = page.read_text()
        new = generated(text)
        if new == text:
            continue
        stale += 1
        if arguments.check:
            print(f"{page.relative_to(ROOT)} is stale: run python docs/generate.py")
        else:
            page.write_text(new)
            print(f"wrote {page.relative_to(ROOT)}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
