"""The rules of the house, for every file there is: floors, lone files, shared blocks, size of functions."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

CLASSES = """
model = {0}.{1}(dataclasses.replace({0}.VARIANTS["mini"], num_classes=3)).eval()
out = model(torch.randn(2, 3, 64, 96))
assert out.shape == (2, 3, {2}, {3}) and out.isfinite().all(), out.shape
"""
# Files by floor; a file imports only from floors below its own.
MODELS = {
    # file: code that runs a random forward of the smallest variant
    "cris": (
        "model = cris.CRIS(cris.VARIANTS['mini']).eval()\n"
        "out = model(torch.randn(2, 3, 64, 96), torch.tensor([[49406, 320, 49407, 0]] * 2))\n"
        "assert out.shape == (2, 1, 16, 24) and out.isfinite().all(), out.shape"
    ),
    "biomedclipseg": (
        "model = biomedclipseg.BiomedCLIPSeg(biomedclipseg.VARIANTS['mini']).eval()\n"
        "out = model(torch.randn(2, 3, 64, 96), torch.tensor([[2, 30, 3, 0]] * 2))\n"
        "assert out.shape == (2, 1, 64, 96) and out.isfinite().all(), out.shape"
    ),
    "clipseg": (
        "model = clipseg.CLIPSeg(clipseg.VARIANTS['mini']).eval()\n"
        "out = model(torch.randn(2, 3, 64, 96), torch.tensor([[49406, 320, 49407, 0]] * 2))\n"
        "assert out.shape == (2, 1, 64, 96) and out.isfinite().all(), out.shape"
    ),
    "segformer": CLASSES.format("segformer", "SegFormer", 16, 24),
    "upernet": CLASSES.format("upernet", "UPerNet", 64, 96),
    "dpt": CLASSES.format("dpt", "DPT", 64, 96),
    "beit": CLASSES.format("beit", "BEiT", 16, 24),
    "sam_decoder": (
        "model = sam_decoder.SAM(sam_decoder.VARIANTS['mini']).eval()\n"
        "boxes = torch.tensor([[[9.0, 9, 99, 80]]] * 2)\n"
        "masks, iou = model(torch.randn(2, 3, 256, 256), boxes=boxes)\n"
        "assert masks.shape == (2, 1, 1, 64, 64) and iou.shape == (2, 1, 1), masks.shape\n"
        "assert masks.isfinite().all()"
    ),
    "swin_unetr3d": (
        "model = swin_unetr3d.SwinUNETR(swin_unetr3d.VARIANTS['mini']).eval()\n"
        "out = model(torch.randn(1, 1, 64, 32, 32))\n"
        "assert out.shape == (1, 3, 64, 32, 32) and out.isfinite().all(), out.shape"
    ),
}
FLOORS = [
    ["files", "atomic_files", "ranges", "startup", "tokenizer"],
    ["layouts"],
    [
        *MODELS,
        *"losses metrics data volumes prompts augment features adapters report".split(),
    ],
    ["protocol", "fewshot3d", "organs", "evaluate", "prepare_volumes", "textcodes"],
    ["recipes"],
    ["options"],
    ["train", "predict", "prepare"],
    ["studies"],
]
OURS = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def source(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imports(tree) -> set[str]:
    """Top-level module names imported anywhere below `tree`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or ".").split(".")[0])
    return names


def shared_blocks(text: str) -> dict[str, str]:
    return dict(re.findall(r"^# shared: (\w+)\n(.*?)^# end shared", text, re.M | re.S))


def test_every_file_has_its_floor():
    assert {path.stem for path in ROOT.glob("*.py")} == set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_imports_go_down_only(name):
    ours = imports(ast.parse(source(name))) & set(OURS)
    allowed = {other for other in OURS if OURS[other] < OURS[name]}
    assert ours <= allowed, f"{name}.py must not import {ours - allowed}"


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_starts_from_torch_and_the_standard_library(name):
    top = ast.Module(
        [
            n
            for n in ast.parse(source(name)).body
            if not isinstance(n, ast.FunctionDef | ast.ClassDef)
        ],
        [],
    )
    assert imports(top) <= set(sys.stdlib_module_names) | {"torch"}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_works_alone(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(source(name))
    code = f"import dataclasses, torch, {name}\ntorch.manual_seed(0)\n{MODELS[name]}"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_shared_blocks_are_the_same_code_everywhere():
    blocks = {}
    for name in OURS:
        for block, text in shared_blocks(source(name)).items():
            assert text.count("\n") <= 80, f"{name}.py, shared {block}: {text.count(chr(10))} lines"
            blocks.setdefault(block, {})[name] = ast.dump(ast.parse(text))
    assert blocks
    for block, copies in blocks.items():
        assert len(set(copies.values())) == 1, (
            f"shared block {block} differs between {list(copies)}"
        )


def count_statements(function: ast.FunctionDef) -> int:
    """Return the number of statements in a function's body; its docstring does not count."""
    statements = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    has_docstring = ast.get_docstring(function) is not None
    return len(statements) - 1 - has_docstring  # without the `def` itself


@pytest.mark.parametrize("name", OURS)
def test_functions_have_at_most_40_statements(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            count = count_statements(node)
            assert count <= 40, f"{name}.py: {node.name} has {count} statements, more than 40"


@pytest.mark.parametrize("name", OURS)
def test_lines_are_at_most_100_wide(name):
    wide = [i + 1 for i, line in enumerate(source(name).splitlines()) if len(line) > 100]
    assert not wide, f"{name}.py: lines {wide}"


# Copied model files: class, other files to copy, arguments of `segment`, shape of its mask.
TEXT = "'photo.png', 'a polyp'"
CLIP = ["tokenizer.py", "clip_merges.txt.xz"]
COPIED = {
    "cris": ("CRIS", CLIP, TEXT, (50, 70)),
    "clipseg": ("CLIPSeg", CLIP, TEXT, (50, 70)),
    "biomedclipseg": ("BiomedCLIPSeg", ["tokenizer.py"], TEXT, (50, 70)),
    "segformer": ("SegFormer", [], "'photo.png'", (50, 70)),
    "upernet": ("UPerNet", [], "'photo.png'", (50, 70)),
    "dpt": ("DPT", [], "'photo.png'", (50, 70)),
    "beit": ("BEiT", [], "'photo.png'", (50, 70)),
    "sam_decoder": ("SAM", [], "'photo.png', boxes=[[5, 5, 60, 40]] * 2", (2, 50, 70)),
}
# What a copied model file must do without, beside what it does not need.
ABSENT = "torchvision safetensors huggingface_hub scipy matplotlib transformers monai".split()
SEGMENT = """
import sys
for name in {absent}:
    sys.modules[name] = None  # an import of it fails
import numpy, pathlib, torch, {file}
from PIL import Image
pixels = numpy.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=numpy.uint8)
Image.fromarray(pixels).save("photo.png")
model = {file}.{kind}({file}.VARIANTS["mini"])
probabilities, mask = model.segment({arguments})
assert mask.shape == {shape} and mask.dtype == numpy.uint8, mask.shape
assert probabilities.shape[1:] == (50, 70) and probabilities.dtype == numpy.float32
assert numpy.isfinite(probabilities).all() and 0 <= probabilities.min() <= probabilities.max() <= 1
"""
SEGMENT_VOLUME = """
import sys
for name in {absent}:
    sys.modules[name] = None
import nibabel, numpy, swin_unetr3d, volumes
voxels = numpy.random.default_rng(0).integers(-200, 300, (40, 28, 24)).astype(numpy.int16)
nibabel.save(nibabel.Nifti1Image(voxels, numpy.diag([4.0, 4, 5, 1])), "ct.nii.gz")
model = swin_unetr3d.SwinUNETR(swin_unetr3d.VARIANTS["mini"])
probabilities, labels, affine = volumes.segment(model, "ct.nii.gz")
assert labels.shape == (40, 28, 24) and probabilities.shape == (3, 40, 28, 24)
"""


def run_copied(folder, files, code):
    """Run code in a folder that holds these files of ours and from which no other is seen."""
    for name in files:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no warning


@pytest.mark.parametrize("name", COPIED)
def test_a_copied_model_file_segments_a_picture(name, tmp_path):
    kind, others, arguments, shape = COPIED[name]
    absent = [*ABSENT, "nibabel", "tqdm"]
    if not others:
        absent.append("tokenizers")
    names = {"file": name, "kind": kind, "arguments": arguments, "shape": shape}
    run_copied(tmp_path, [f"{name}.py", *others], SEGMENT.format(absent=absent, **names))
    docstring = ast.get_docstring(ast.parse(source(name)))
    assert "segment(" in docstring
    assert all(other in docstring for other in others)
    assert not others or "`tokenizers`" in docstring


def with_imports(name: str) -> set[str]:
    """Return the names of a file of ours and of all of ours that it imports."""
    names = {name}
    for other in imports(ast.parse(source(name))) & set(OURS):
        names |= with_imports(other)
    return names


def test_a_copied_swin_unetr_segments_a_volume(tmp_path):
    """With imaging/volumes.py and what it imports, which the model's docstring names."""
    docstring = ast.get_docstring(ast.parse(source("swin_unetr3d")))
    files = [f"{name}.py" for name in sorted(with_imports("volumes"))]
    assert "volumes.segment(" in docstring
    assert all(f"`{file}`" in docstring for file in files), files
    code = SEGMENT_VOLUME.format(absent=[*ABSENT, "PIL"])
    run_copied(tmp_path, ["swin_unetr3d.py", *files], code)
