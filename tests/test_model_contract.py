"""The contract of a model file: tests that every model passes.

A model belongs to this repository if its row of the table `ROWS` passes the tests of this file:

- its file works without our other files and with no package but torch, except for the files that it
  names to be copied with it; alone it segments an image or a volume, with real tokens;
- every official tensor is used: names and shapes are converted to ours and back;
- every published format of its checkpoints loads to the same numbers and settings, and settings
  that are in no file are printed;
- a tensor that is missing, renamed, unexpected, not finite, integer or of another shape is refused
  by name, in one line; other floating-point types are accepted;
- its kind of file is recognised, and files of other models are refused;
- gradients reach every trainable parameter.

A new model adds a row here and a file in forms/ with its forms of a checkpoint. What is special
about a model, and that its numbers are the official ones, is tested in the model's own test file.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType

import pytest
import torch
from conftest import ROOT, randomised, shapes, write_run
from forms import base
from forms import beit as beit_forms
from forms import biomedclipseg as biomedclipseg_forms
from forms import clipseg as clipseg_forms
from forms import cris as cris_forms
from forms import dpt as dpt_forms
from forms import sam_decoder as sam_forms
from forms import segformer as segformer_forms
from forms import swin_unetr3d as swin_forms
from forms import universal as universal_forms
from forms import upernet as upernet_forms
from test_house import MODELS, our_imports, source

import beit
import biomedclipseg
import clipseg
import cris
import dpt
import fewshot3d
import sam_decoder
import segformer
import swin_unetr3d
import tokenizer
import universal
import upernet

pytestmark = pytest.mark.numeric

PHRASE = "a pink polyp"
CLIP_TOKENS = f"tokenizer.CLIPTokenizer(12)({PHRASE!r}).tolist()"
BERT_TOKENS = f"tokenizer.WordPieceTokenizer(tokenizer.CHARACTERS, 16)({PHRASE!r}).tolist()"
SEGMENT_IMAGE = """
from PIL import Image
pixels = numpy.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=numpy.uint8)
Image.fromarray(pixels).save("photo.png")
probabilities, mask = model.segment({arguments})
assert mask.shape == {shape} and mask.dtype == numpy.uint8, mask.shape
assert probabilities.shape[1:] == (50, 70) and probabilities.dtype == numpy.float32
assert numpy.isfinite(probabilities).all() and 0 <= probabilities.min() <= probabilities.max() <= 1
"""
SEGMENT_VOLUME = """
import nibabel
from imaging import volumes
voxels = numpy.random.default_rng(0).integers(-200, 300, (40, 28, 24)).astype(numpy.int16)
nibabel.save(nibabel.Nifti1Image(voxels, numpy.diag([4.0, 4, 5, 1])), "ct.nii.gz")
probabilities, labels, affine = volumes.segment(model, "ct.nii.gz")
assert labels.shape == (40, 28, 24) and probabilities.shape == (3, 40, 28, 24)
"""


def segment_image(arguments: str, shape=(50, 70)) -> str:
    """Return the code that segments photo.png."""
    return SEGMENT_IMAGE.format(arguments=arguments, shape=shape)


@dataclass(frozen=True, eq=False)
class Row:
    """What the tests need to know of one model."""

    file: ModuleType
    kind: type  # the class of the model
    forms: ModuleType | None = None  # FORMS, PLACES and, where `variants` are, official()
    # Calls of `model` with random numbers. All of them together reach every parameter that may
    # train; the first is also made where the file is alone. They are code, to be run elsewhere.
    calls: tuple[str, ...] = ()
    shapes: tuple[tuple, ...] = ()  # of the outputs of the first call
    untrained: str = ""  # pattern of the parameters that never train
    variants: tuple[str, ...] = ()  # sizes whose official names are compared
    unused: str = ""  # pattern of the official tensors that ours does without
    parameters: dict = field(default_factory=dict)  # {variant: number of parameters}
    known: dict | None = None  # {variant: config}; None: the file's VARIANTS
    # Official names of a model's state dict; None: as the file's to_official gives them.
    official_state: Callable | None = None
    recognised: str = ""  # what `recognise` calls the file
    names_lora: bool = False  # LoRA's weights of SAM are refused as such
    files: tuple[str, ...] = ()  # to copy with the model's
    segment: str = ""  # code that segments an image or a volume where these files are
    tokens: str = ""  # code that gives tokens of PHRASE there
    overrides: tuple[dict, ...] = ({},)  # arguments with which faults are no better

    @property
    def mini(self):
        """Return the config of the smallest variant."""
        return (self.known or self.file.VARIANTS)["mini"]

    def model(self, config=None) -> torch.nn.Module:
        """Return a model whose tensors all differ."""
        config = config or self.mini
        codes = {}
        if getattr(config, "codes", "") == "text":
            codes["embedding"] = torch.zeros(config.num_classes, 512)
        return randomised(self.kind(config, **codes))

    def official(self, model) -> dict[str, torch.Tensor]:
        """Return the state dict of a model under its official names."""
        if self.official_state is not None:
            return self.official_state(model)
        return self.to_official(model.state_dict())

    def to_official(self, state) -> dict[str, torch.Tensor]:
        return getattr(self.file, "to_official", swin_unetr3d.to_official)(state)

    def convert(self, state) -> dict[str, torch.Tensor]:
        return getattr(self.file, "convert", swin_unetr3d.convert)(state)

    def load(self, written, **overrides):
        """Load what a form has written."""
        files = written if isinstance(written, dict) else {"source": written}
        return self.kind.from_pretrained(**files, **overrides)


BOXES = "boxes=torch.tensor([[[9.0, 9, 99, 80]]] * 2)"
POINTS = "points=torch.full((2, 1, 3, 2), 50.0), labels=torch.tensor([[[1, 0, -1]]] * 2)"
MASKS = "masks=torch.randn(2, 1, 1, 64, 64)"
IMAGES = "model(torch.randn(2, 3, 64, 96){})"
SAM_IMAGES = "model(torch.randn(2, 3, 256, 256), {}, multimask={})"
CLIP_TEXTS = ", torch.tensor([[49406, 320, 49407, 0], [49406, 736, 17, 49407]])"
CLIP_FILES = ("tokenizer.py", "clip_merges.txt.xz")
# Layers behind the last tap: pictures as prompts need them, texts do not.
CLIPSEG_UNTRAINED = (
    r"clip\.logit_scale|clip\.visual_projection\..*"
    r"|clip\.vision_model\.(encoder\.layers\.3|post_layernorm)\..*"
)
BIOMED_UNTRAINED = (
    r"biomedclip\.logit_scale|biomedclip\.visual\.(trunk\.blocks\.3|trunk\.norm|head)\..*"
)
ROWS = {
    "cris": Row(
        cris,
        cris.CRIS,
        cris_forms,
        calls=(IMAGES.format(CLIP_TEXTS),),
        shapes=((2, 1, 16, 24),),
        untrained=r"backbone\.logit_scale",
        variants=("rn50", "rn101"),
        recognised="CRIS",
        names_lora=True,
        files=CLIP_FILES,
        segment=segment_image(f"'photo.png', {PHRASE!r}"),
        tokens=CLIP_TOKENS,
    ),
    "clipseg": Row(
        clipseg,
        clipseg.CLIPSeg,
        clipseg_forms,
        calls=(IMAGES.format(CLIP_TEXTS),),
        shapes=((2, 1, 64, 96),),
        untrained=CLIPSEG_UNTRAINED,
        variants=("rd64-refined", "rd64", "rd16"),
        parameters={"rd64-refined": 150_747_746, "rd64": 150_693_890, "rd16": 149_884_418},
        official_state=clipseg_forms.hub_state,
        recognised="CLIPSeg",
        names_lora=True,
        files=CLIP_FILES,
        segment=segment_image(f"'photo.png', {PHRASE!r}"),
        tokens=CLIP_TOKENS,
    ),
    "biomedclipseg": Row(
        biomedclipseg,
        biomedclipseg.BiomedCLIPSeg,
        biomedclipseg_forms,
        calls=(IMAGES.format(", torch.tensor([[2, 30, 3, 0], [2, 7, 31, 3]])"),),
        shapes=((2, 1, 64, 96),),
        untrained=BIOMED_UNTRAINED,
        variants=("biomedclipseg",),
        unused=r"biomedclip\.text\.transformer\.embeddings\.position_ids",
        parameters={"biomedclipseg": 197_029_730, "mini": 1_492_658},
        recognised="BiomedCLIP",
        names_lora=True,
        files=("tokenizer.py",),
        segment=segment_image(f"'photo.png', {PHRASE!r}"),
        tokens=BERT_TOKENS,
    ),
    "segformer": Row(
        segformer,
        segformer.SegFormer,
        segformer_forms,
        calls=(IMAGES.format(""),),
        shapes=((2, 150, 16, 24),),
        variants=("b0", "b1", "b2", "b3", "b4", "b5"),
        parameters=segformer_forms.PARAMETERS,
        recognised="a SegFormer",
        segment=segment_image("'photo.png'"),
    ),
    "upernet": Row(
        upernet,
        upernet.UPerNet,
        upernet_forms,
        calls=(IMAGES.format(""),),
        shapes=((2, 150, 64, 96),),
        variants=tuple(name for name in upernet.VARIANTS if name != "mini"),
        unused=r"auxiliary_head\..*",
        recognised="a UPerNet on ConvNeXt",
        segment=segment_image("'photo.png'"),
    ),
    "dpt": Row(
        dpt,
        dpt.DPT,
        dpt_forms,
        calls=(IMAGES.format(""),),
        shapes=((2, 4, 64, 96),),
        variants=("large-ade", "large"),
        unused=dpt_forms.UNUSED,
        recognised="a DPT",
        segment=segment_image("'photo.png'"),
        overrides=({}, {"num_classes": 4}),
    ),
    "beit": Row(
        beit,
        beit.BEiT,
        beit_forms,
        calls=(IMAGES.format(""),),
        shapes=((2, 150, 16, 24),),
        untrained=r"beit\.layers\.[45]\..*",
        variants=("base", "large"),
        unused=r"auxiliary_head\..*",
        recognised="a BEiT",
        segment=segment_image("'photo.png'"),
    ),
    "sam_decoder": Row(
        sam_decoder,
        sam_decoder.SAM,
        sam_forms,
        calls=(
            SAM_IMAGES.format(BOXES, False),
            SAM_IMAGES.format(f"{BOXES}, {POINTS}, {MASKS}", True),
            SAM_IMAGES.format(POINTS, True),
        ),
        shapes=((2, 1, 1, 64, 64), (2, 1, 1)),
        variants=("vit-base", "vit-large", "vit-huge"),
        parameters={
            "vit-base": 93_735_472,
            "vit-large": 312_342_832,
            "vit-huge": 641_090_608,
        },
        recognised="SAM",
        names_lora=True,
        segment=segment_image("'photo.png', boxes=[[5, 5, 60, 40]] * 2", (2, 50, 70)),
    ),
    "swin_unetr3d": Row(
        swin_unetr3d,
        swin_unetr3d.SwinUNETR,
        swin_forms,
        calls=("model(torch.randn(1, 1, 64, 32, 32))",),
        shapes=((1, 3, 64, 32, 32),),
        variants=tuple(swin_unetr3d.VARIANTS),
        recognised="a Swin UNETR",
        segment=SEGMENT_VOLUME,
    ),
}
# Models whose files import other models' files.
HEADS = {
    "universal": Row(
        universal,
        universal.UniversalSwinUNETR,
        universal_forms,
        calls=("model(torch.randn(1, 1, 64, 32, 32))",),
        shapes=((1, 14, 64, 32, 32),),
        known=universal.UNIVERSAL_VARIANTS,
    ),
    "fewshot3d": Row(fewshot3d, fewshot3d.AttentionUniversal),
    "fewshot3d-text": Row(fewshot3d, fewshot3d.TextSwinUNETR, known=fewshot3d.TEXT_VARIANTS),
}
EVERY = ROWS | HEADS


def cases(column: str, rows=EVERY) -> list:
    """Return a parameter set for each entry of a column: the row and the entry."""
    found = []
    for name, row in rows.items():
        table = row.forms if column in ("FORMS", "PLACES") else row
        for entry in getattr(table, column, ()):
            label = entry if isinstance(entry, str) else entry.name
            place = f" of {entry.form.name}" if isinstance(entry, base.Place) else ""
            found.append(pytest.param(row, entry, id=f"{name}: {label}{place}"))
    return found


def test_every_model_file_has_a_row():
    assert ROWS.keys() == {*MODELS}
    assert all(row.file.__name__ == name for name, row in ROWS.items())


# --- the file alone -------------------------------------------------------------------------------

# What a copied model file must do without, besides what it does not need.
ABSENT = [
    "torchvision",
    "safetensors",
    "huggingface_hub",
    "scipy",
    "matplotlib",
    "transformers",
    "monai",
]
ALONE = """
import sys
for name in {absent}:
    sys.modules[name] = None  # an import of it fails
import dataclasses, pathlib, shutil, torch, {file}
torch.manual_seed(0)
model = {file}.{kind}({file}.VARIANTS["mini"]).eval()
outputs = {call}
outputs = outputs if isinstance(outputs, tuple) else (outputs,)
assert [tuple(x.shape) for x in outputs] == {shapes}, [x.shape for x in outputs]
assert all(x.isfinite().all() for x in outputs)
ours = {{path.stem for path in pathlib.Path({root!r}).iterdir() if path.suffix in ("", ".py")}}
assert ours & {{*sys.modules}} == {{"{file}"}}

shutil.copytree("others", ".", dirs_exist_ok=True)
import numpy
{segment}
"""


def files_to_copy(row: Row) -> list[str]:
    """Return the files that a model's docstring says to copy; for volumes those of imaging/."""
    if "volumes" not in row.segment:
        return [*row.files]
    needed = with_imports("imaging.volumes")
    assert {name.split(".")[0] for name in needed} == {"imaging"}
    return [f"{name.replace('.', '/')}.py" for name in sorted(needed | {"imaging.__init__"})]


def with_imports(name: str) -> set[str]:
    """Return the names of a file of ours and of all of ours that it imports."""
    names = {name}
    for other in our_imports(name):
        names |= with_imports(other)
    return names


@pytest.mark.parametrize("name", ROWS)
def test_a_copied_model_file_works_alone_and_segments(name, tmp_path):
    """In one process: a forward pass of the file alone, then the files that belong to it."""
    row = ROWS[name]
    others = tmp_path / "others"
    for file in files_to_copy(row):
        (others / file).parent.mkdir(parents=True, exist_ok=True)
        (others / file).write_bytes((ROOT / file).read_bytes())
    others.mkdir(exist_ok=True)
    (tmp_path / f"{name}.py").write_text(source(name))

    absent = [*ABSENT, "PIL"] if "volumes" in row.segment else [*ABSENT, "nibabel", "tqdm"]
    if not row.tokens:
        absent.append("tokenizers")
    segment = row.segment
    if row.tokens:
        expected = eval(row.tokens, {"tokenizer": tokenizer})
        segment += f"import tokenizer\nassert {row.tokens} == {expected}\n"
    code = ALONE.format(
        absent=absent,
        file=name,
        kind=row.kind.__name__,
        call=row.calls[0],
        shapes=[*row.shapes],
        root=str(ROOT),
        segment=segment,
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program = [sys.executable, "-c", code]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # no warning


@pytest.mark.parametrize("name", ROWS)
def test_the_docstring_says_what_to_copy_and_call(name):
    docstring = ast.get_docstring(ast.parse(source(name)))
    row = ROWS[name]
    if "volumes" in row.segment:
        assert "volumes.segment(" in docstring and "`imaging/`" in docstring
    assert "segment(" in docstring
    assert all(file in docstring for file in row.files)
    assert not row.files or "`tokenizers`" in docstring


# --- names and shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("row, variant", cases("variants"))
def test_every_official_name_and_shape(row, variant):
    """There and back, in every naming that the official code has in memory."""
    with torch.device("meta"):
        ours = row.kind(row.file.VARIANTS[variant]).state_dict()
    official, *others = row.forms.official(variant)
    if not next(iter(official.values())).is_meta:  # where tensors' contents count
        ours = {n: torch.zeros(1).expand(t.shape) for n, t in ours.items()}
    used = {n: t for n, t in official.items() if not re.fullmatch(row.unused or "$", n)}
    assert shapes(row.to_official(ours)) == shapes(used)
    for state in (official, *others, row.to_official(ours), ours):
        assert shapes(row.convert(state)) == shapes(ours)
    assert [*row.to_official(row.convert(ours))] == [*row.to_official(ours)]


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_the_table_of_variants_has_their_numbers_of_parameters(row):
    text = source(row.file.__name__)
    for variant, config in row.file.VARIANTS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in row.kind(config).parameters())
        assert row.parameters.get(variant, count) == count
        assert re.search(rf'^    "{variant}": .*# {count:,}\b', text, re.M), (variant, f"{count:,}")


# --- forms of a checkpoint ------------------------------------------------------------------------


@cache
def official_state(row: Row, config) -> dict[str, torch.Tensor]:
    """Return a state dict under its official names, whose tensors all differ."""
    return row.official(row.model(config))


@cache
def state_in_file(row: Row, form: base.Form) -> dict[str, torch.Tensor]:
    """Return the same state dict under the names of a form's file."""
    return form.names(official_state(row, form.config))


@pytest.mark.parametrize("row, form", [case for case in cases("FORMS") if case.values[1].is_whole])
def test_all_forms_of_a_checkpoint_are_the_same_model(row, form, tmp_path, capsys):
    state = official_state(row, form.config)
    written = form.write({**state_in_file(row, form)}, tmp_path)
    capsys.readouterr()
    model = row.load(written, **form.arguments)
    assert model.config == (form.loaded_config or form.config) and not model.training

    printed = capsys.readouterr().out
    every = {line for other in row.forms.FORMS for line in other.says}
    for words in every | {"new and untrained", "to be trained"}:
        assert (words in printed) == (words in form.says), words
    assert printed.count("\n") <= len(form.says)

    loaded = row.official(model)
    assert loaded.keys() == state.keys()
    for name, t in loaded.items():
        assert t.dtype == state[name].dtype and torch.equal(t, state[name]), name
    again = row.convert(row.to_official(model.state_dict()))
    assert again.keys() == model.state_dict().keys()
    for name, t in model.state_dict().items():
        assert torch.equal(t, again[name]), name


@pytest.mark.parametrize("row, place", cases("PLACES"))
@pytest.mark.parametrize("fault", ["renamed", "dropped", "added", "reshaped"])
def test_one_tensor_that_does_not_fit_is_named(row, place, fault, tmp_path, monkeypatch):
    if hasattr(row.file, "VARIANTS"):  # each load builds all of them, to find the closest one
        first = next(iter(row.file.VARIANTS))
        two = {name: row.file.VARIANTS[name] for name in (first, "mini")}
        monkeypatch.setattr(row.file, "VARIANTS", two)
    form = place.form
    state = {**state_in_file(row, form)}
    t = state[place.name] if fault in ("added", "reshaped") else state.pop(place.name)
    if fault == "reshaped":
        state[place.name] = base.cut(t, place.axis)
    elif fault in ("renamed", "added"):
        state[f"{place.name}_extra"] = t.clone()
    written = form.write(state, tmp_path)
    files = written if isinstance(written, dict) else {"source": written}
    for arguments in row.overrides:
        with pytest.raises(ValueError) as caught:
            row.load(written, **arguments)
        message = str(caught.value)
        assert message.startswith(str(files[place.argument])) and "\n" not in message
        assert "do not fit" in message
        assert fault == "added" or f"{place.told or place.name} is " in message
        assert ("_extra is " in message) == (fault in ("renamed", "added"))


@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
def test_a_run_folder_of_another_class_is_refused(row, tmp_path):
    state = row.model().state_dict()
    write_run(tmp_path, row.kind, state, row.mini, **{"class": "Other"})
    with pytest.raises(ValueError, match=f"holds Other in format 1, not {row.kind.__name__}"):
        row.kind.from_pretrained(tmp_path)


# --- numbers that are none ------------------------------------------------------------------------


def write_weights(folder, row: Row, state):
    """Write weights of a mini model beside its config.json; return the path of the weights."""
    write_run(folder, row.kind, {"x": torch.zeros(1)}, row.mini)
    (folder / "best.safetensors").unlink()
    return base.saved(state, folder / "weights.pth")


def with_last(t: torch.Tensor, value: float) -> torch.Tensor:
    """Return a copy of a tensor with another last number."""
    t = t.clone()
    t.view(-1)[-1] = value
    return t


@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
def test_weights_that_are_no_numbers_are_refused_by_name(row, tmp_path):
    """A different fault in the first and the last parameter and in a floating-point buffer."""
    model = row.model()
    state, parameters = model.state_dict(), dict(model.named_parameters())
    buffers = [n for n, t in state.items() if t.is_floating_point() and n not in parameters]
    names = [n for n in parameters if state[n].ndim > 0]
    first, last = state[names[0]], state[names[-1]]
    faults = [
        (names[0], with_last(first, float("nan")), "holds NaN, infinity"),
        (names[-1], last.to(torch.int8), "holds int8 numbers"),
    ]
    for name in buffers[-1:]:
        infinite = with_last(state[name].bfloat16(), -float("inf"))
        faults.append((name, infinite, "holds NaN, infinity"))
    for name, t, words in faults:
        path = write_weights(tmp_path, row, state | {name: t})
        with pytest.raises(ValueError) as caught:
            row.kind.from_pretrained(path)
        message = str(caught.value)
        leaf = name.split(".")[-1].removeprefix("in_proj_")  # names may be the hub's
        assert words in message and leaf in message and "\n" not in message
        assert message.startswith(f"{path}: ") and message.count(" holds ") <= 3


@pytest.mark.parametrize("row", EVERY.values(), ids=EVERY)
def test_other_floating_point_numbers_are_fine(row, tmp_path):
    """Tensors of float16, bfloat16 and float64 by turns."""
    state = row.model().state_dict()
    for i, (name, t) in enumerate(state.items()):
        dtype = (torch.float16, torch.bfloat16, torch.float64)[i % 3]
        state[name] = t.to(dtype) if t.is_floating_point() else t
    path = write_weights(tmp_path, row, state)
    for name, t in row.kind.from_pretrained(path).state_dict().items():
        expected = state[name].float() if state[name].is_floating_point() else state[name]
        assert t.dtype == expected.dtype and torch.equal(t, expected), name


# --- kinds of files -------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_known_kind_of_file_is_recognised_under_all_its_names(row):
    with torch.device("meta"):
        state = row.kind(row.mini).state_dict()
    assert row.recognised
    assert row.file.recognise(state) == row.recognised
    assert row.file.recognise(row.to_official(state)) == row.recognised
    assert row.file.recognise({"weight": torch.zeros(1)}) == ""


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_another_model_s_file_is_named_or_refused_in_a_line(row, tmp_path):
    """A LoRA's weights. Models that ask for their classes first say that instead."""
    lora = {f"w_{x}_{i:03}": torch.zeros(4, 8) for i in range(4) for x in "ab"}
    path = base.saved(lora, tmp_path / "lora.pth")
    with pytest.raises(ValueError) as caught:
        row.kind.from_pretrained(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message, message
    assert "a LoRA of SAM" in message or not row.names_lora, message


# --- training -------------------------------------------------------------------------------------

TRAINED = {name: row for name, row in EVERY.items() if row.calls}


@pytest.mark.parametrize("row", TRAINED.values(), ids=TRAINED)
def test_gradients_reach_every_parameter(row):
    torch.manual_seed(0)
    config = row.mini
    if hasattr(config, "drop_path"):
        config = replace(config, drop_path=0.0)  # it would leave out whole layers by chance
    model = row.model(config).train()
    for call in row.calls:
        outputs = eval(call, {"model": model, "torch": torch})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum((x * torch.randn_like(x)).sum() for x in outputs).backward()
    for name, p in model.named_parameters():
        if re.fullmatch(row.untrained or "$", name):
            assert not p.requires_grad and p.grad is None, name
        else:
            assert p.requires_grad and p.grad is not None, name
            assert p.grad.isfinite().all() and p.grad.any(), name
