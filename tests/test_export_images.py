"""export.py --to onnx and torch-export for models of images: files that compute the same."""

import errno
import importlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, contents, randomised, write_run
from PIL import Image
from torch import nn

import export
from engine.runs import check_run, read_run
from exporting import comparison, networks, onnx_files, output_files, programs
from exporting.parts import Part
from prediction.models import Weights, find_weights, load_model

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.numeric
CLASSES = {
    "segformer": "SegFormer",
    "upernet": "UPerNet",
    "dpt": "DPT",
    "beit": "BEiT",
    "cris": "CRIS",
    "clipseg": "CLIPSeg",
    "biomedclipseg": "BiomedCLIPSeg",
}
# What differs from `mini`: the two models of the quick tests are still smaller, and have adapters.
CHANGES = {
    "segformer": {"depths": (1, 1, 1, 1), "image_size": 64, "num_classes": 3},
    "clipseg": {"adapter_dim": 8, "image_size": 64},
    "biomedclipseg": {"adapter_dim": 8},
}
QUICK = ("segformer", "clipseg")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]
PROMPTS = ["a polyp", "two large polyps on the left", ""]


def new_model(name: str, variant: str = "mini", **changes):
    """Return a model whose every weight has an effect."""
    file = importlib.import_module(name)
    config = replace(file.VARIANTS[variant], **changes)
    return randomised(getattr(file, CLASSES[name])(config))


def write_mini(folder: Path, name: str, **more) -> Path:
    """Write a run of a small model."""
    model = new_model(name, **CHANGES.get(name, {}))
    return write_run(folder, type(model), model.state_dict(), model.config, **more)


def run_export(*arguments) -> None:
    """Run export.py, which must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        assert export.main() == 0


@dataclass
class Exported:
    """The files of an export, and the model that they were made of."""

    model: nn.Module
    files: dict[str, Path]  # name of a part -> its file
    tokens: torch.Tensor | None  # of PROMPTS, (3,T)

    def run(self, **inputs):
        """Return the logits of the exported files: the parts one after the other."""
        for path in self.files.values():
            inputs |= run_file(path, inputs)
        return inputs["logits"]

    def inputs(self, batch: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return a batch of different images and prompts."""
        generator = torch.Generator().manual_seed(batch)
        inputs = {"image": torch.randn(batch, 3, *size, generator=generator)}
        if self.tokens is not None:
            inputs["tokens"] = self.tokens[:batch]
        return inputs


def run_file(path: Path, inputs: dict) -> dict:
    """Return the outputs of one file, by name."""
    if path.suffix == ".onnx":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        wanted = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, map(torch.from_numpy, session.run(names, wanted)), strict=True))

    program = torch.export.load(path)
    names = program.graph_signature.user_inputs
    output = program.module()(*[inputs[name] for name in names])
    parts = {".vision": "features", ".text": "condition"}
    return {parts.get(Path(path.stem).suffix, "logits"): output.detach()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function that exports a small model once for all tests."""
    done = {}

    def export_once(name: str, kind: str) -> Exported:
        if (name, kind) not in done:
            folder = tmp_path_factory.mktemp(f"{name}-{kind}")
            run = write_mini(folder / "run", name, classes=["target"] if name in QUICK[1:] else [])
            options = {
                "onnx": ["--to", "onnx"],
                "half": ["--to", "onnx", "--half"],
                "pt2": ["--to", "torch-export"],
            }[kind]
            ending = "pt2" if kind == "pt2" else "onnx"
            run_export("--weights", run, *options, "--out", folder / f"x.{ending}")
            done[name, kind] = opened(run, folder, ending)
        return done[name, kind]

    return export_once


def opened(run: Path, folder: Path, ending: str) -> Exported:
    """Return the files of an export in the order in which they run."""
    files = {}
    for part in ("vision", "text", "decoder"):
        if (folder / f"x.{part}.{ending}").exists():
            files[part] = folder / f"x.{part}.{ending}"
    files = files or {"network": folder / f"x.{ending}"}
    assert len([*folder.glob(f"*.{ending}")]) == len(files)
    assert not [*folder.glob(".*")]  # nothing temporary is left

    loaded = load_model(find_weights(str(run)), "cpu")
    tokenizer = loaded.recipe.tokenizer
    return Exported(loaded.model, files, tokenizer(PROMPTS) if tokenizer else None)


def check_equal(export: Exported, limit: float, name: str) -> None:
    """Compare with the whole model on two batches, and on other sizes where these are free."""
    side = export.model.config.image_size
    cases = [(1, (side, side)), (3, (side, side))]
    if name == "segformer":
        cases += [(1, (93, 64)), (3, (128, 160))]
    for batch, size in cases:
        inputs = export.inputs(batch, size)
        with torch.no_grad():
            expected = export.model(**inputs)
        actual = export.run(**inputs)
        assert actual.dtype == torch.float32
        assert actual.shape == expected.shape
        difference = (actual - expected).abs().max() / expected.abs().max()
        assert difference <= limit, (batch, size)


# --- the same results ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_onnx_runtime_computes_what_pytorch_does(name, exported):
    check_equal(exported(name, "onnx"), 1e-4, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_a_program_of_torch_export_computes_what_pytorch_does(name, exported):
    check_equal(exported(name, "pt2"), 1e-4, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_weights_in_half_precision_take_half_the_space(name, exported):
    half = exported(name, "half")
    check_equal(half, 1e-2, name)
    full_size = sum(path.stat().st_size for path in exported(name, "onnx").files.values())
    half_size = sum(path.stat().st_size for path in half.files.values())
    assert half_size < 0.65 * full_size  # the graph and the vectors stay as they are


def test_one_image_serves_many_prompts(exported):
    """Encode an image once; decode it with each of three prompts."""
    clipseg = exported("clipseg", "onnx")
    image = clipseg.inputs(1, (64, 64))["image"]
    features = run_file(clipseg.files["vision"], {"image": image})["features"]
    condition = run_file(clipseg.files["text"], {"tokens": clipseg.tokens})["condition"]
    for i in range(3):
        one = {"features": features, "condition": condition[i : i + 1]}
        logits = run_file(clipseg.files["decoder"], one)["logits"]
        with torch.no_grad():
            expected = clipseg.model(image, clipseg.tokens[i : i + 1])
        assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


# --- what a file says about itself ---------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_metadata_describe_the_model(name, exported):
    export = exported(name, "onnx")
    for part, path in export.files.items():
        metadata = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
        run = json.loads(metadata["run"])
        check_run(path, run)
        assert run["model"] == name
        assert run["config"] == json.loads(json.dumps(asdict(export.model.config)))
        keys = {"format", "model", "class", "config", "classes", "labels", "options", "masks"}
        assert set(run) == keys | {"versions"}
        assert metadata["part"] == part
        assert json.loads(metadata["parts"]) == [*export.files]
        assert ("vocabulary" in metadata) == (name == "biomedclipseg")
        if name == "biomedclipseg":
            assert metadata["vocabulary"].splitlines()[:2] == ["[PAD]", "[UNK]"]


SHAPES = {
    "segformer": ["batch", 3, "height", "width"],
    "clipseg": ["batch", 3, 64, 64],
    "cris": ["batch", 3, 128, 128],
}


@pytest.mark.parametrize("name", [*QUICK, pytest.param("cris", marks=pytest.mark.slow)])
def test_inputs_and_outputs_have_their_names_and_free_sizes(name, exported):
    session = onnxruntime.InferenceSession(next(iter(exported(name, "onnx").files.values())))
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert inputs["image"] == SHAPES[name]
    assert set(inputs) == ({"image", "tokens"} if name == "cris" else {"image"})
    (output,) = session.get_outputs()
    assert output.name == ("features" if name == "clipseg" else "logits")
    assert output.shape[0] == "batch"


def test_a_program_carries_the_same_metadata(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "x.pt2"
    arguments = [*tiny, "--to", "torch-export", "--out", out]
    code, said, err = command(monkeypatch, capsys, export, *arguments)
    assert code == 0, err
    assert "torch.export" in said
    extra = {"run": "", "part": "", "parts": ""}
    program = torch.export.load(out, extra_files=extra)
    assert json.loads(extra["run"])["model"] == "segformer"
    assert (extra["part"], extra["parts"]) == ("network", '["network"]')
    assert program.module()(torch.ones(1, 40)).shape == (1, 30)


@pytest.mark.parametrize("kind", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_files_hold_no_paths_of_this_machine(kind, exported):
    here = str(Path(export.__file__).parent).encode()
    for path in exported("segformer", kind).files.values():
        assert here not in path.read_bytes()


def test_paths_of_data_stay_on_this_machine(tmp_path):
    options = {"data": ["/home/me/secret/kvasir:train"], "out": "/home/me/run", "prompt": "p6"}
    run = write_mini(tmp_path / "run", "segformer", options=options, masks={"kvasir": "> 127"})
    loaded = load_model(find_weights(str(run)), "cpu")
    description = output_files.run_description(loaded)
    assert description["options"] == {"data": ["kvasir:train"], "prompt": "p6"}
    assert description["masks"] == {"kvasir": "> 127"}


def test_the_example_of_the_docs_computes_what_the_model_does(exported, tmp_path, monkeypatch):
    page = (Path(export.__file__).parent / "docs/export.md").read_text()
    (example,) = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    segformer = exported("segformer", "onnx")
    (tmp_path / "exports").mkdir()
    shutil.copy(segformer.files["network"], tmp_path / "exports/segformer-mine.onnx")
    pixels = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")

    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example, names)
    image = segformer.model.preprocess(Image.open("photo.jpg").convert("RGB"))[None]
    with torch.no_grad():
        expected = segformer.model(image)[0]
    actual = torch.from_numpy(names["logits"])
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert names["mask"].shape == expected.shape[1:]


def test_the_vocabulary_of_a_run_is_in_the_metadata(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "polyp", "größe"]
    model = new_model("biomedclipseg", vocab_size=len(words))
    run = write_run(tmp_path / "run", type(model), model.state_dict(), model.config)
    (run / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    metadata = output_files.describe(load_model(find_weights(str(run)), "cpu"), [], "float32")
    assert metadata["vocabulary"].splitlines() == words
    assert json.loads(metadata["run"])["config"]["vocabulary"] == "vocab.txt"


# --- small networks: what is written, and what is refused ----------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Return the arguments of an export whose only network is one small layer."""
    run = write_mini(tmp_path / "run", "segformer")
    layer = nn.Linear(40, 30).eval()
    x = torch.randn(2, 40)
    parts = [Part("network", layer, {"x": x}, ("y",), {"x": {0: "batch"}})]
    monkeypatch.setattr(networks, "parts_of", lambda loaded: parts)
    return ["--weights", run, "--to", "onnx", "--out", tmp_path / "new" / "x.onnx"]


def names_in(folder: Path) -> list[str]:
    """Return the names of everything in a folder, [] if there is no such folder."""
    return sorted(path.name for path in folder.glob("*")) + sorted(folder.glob(".*"))


def test_a_file_is_compared_and_timed(tiny, tmp_path, monkeypatch, capsys):
    code, said, err = command(monkeypatch, capsys, export, *tiny)
    assert code == 0, err
    assert names_in(tmp_path / "new") == ["x.onnx"]
    assert "random numbers" in said and "batches of 1 and 3" in said and "times as fast" in said
    assert said.count("\n") == 3 and not err


@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_a_file_that_differs_is_not_left_behind(kind, tiny, tmp_path, monkeypatch, capsys):
    writer = networks.FORMATS[kind]
    save = writer.save

    def save_wrong(part, *arguments):
        weight = part.module.weight
        weight.data[3, 5] += 0.01
        save(part, *arguments)
        weight.data[3, 5] -= 0.01

    monkeypatch.setattr(writer, "save", save_wrong)
    tiny[3] = kind
    tiny[5] = tmp_path / "new" / ("x.onnx" if kind == "onnx" else "x.pt2")
    code, _, err = command(monkeypatch, capsys, export, *tiny)
    assert code == 2 and err.count("\n") == 1
    assert "was not written: the exported network differs from PyTorch by" in err
    assert not (tmp_path / "new").exists()


def test_large_weights_lie_beside_the_file(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_files, "MOST_BYTES", 1000)
    code, said, err = command(monkeypatch, capsys, export, *tiny)
    assert code == 0, err
    assert names_in(tmp_path / "new") == ["x.onnx", "x.onnx.data"]
    assert "its weights are in x.onnx.data, keep both" in said
    assert (tmp_path / "new" / "x.onnx.data").stat().st_size >= 4 * 30 * 40

    part = networks.parts_of(None)[0]
    x = torch.randn(5, 40)
    actual = run_file(tmp_path / "new" / "x.onnx", {"x": x})["y"]
    torch.testing.assert_close(actual, part.module(x).detach(), rtol=0, atol=1e-5)


def test_half_precision_stores_matrices_only(tiny, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    code, said, err = command(monkeypatch, capsys, export, *tiny, "--half")
    assert code == 0, err
    assert "half the size, the same speed" in said
    stored = onnx.load(tmp_path / "new" / "x.onnx").graph.initializer
    kinds = {
        tuple(tensor.dims): onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in stored
    }
    assert kinds == {(30, 40): "FLOAT16", (30,): "FLOAT"} or kinds == {
        (40, 30): "FLOAT16",
        (30,): "FLOAT",
    }


def test_a_weight_beyond_float16_stays_float32(tiny, tmp_path, monkeypatch, capsys):
    onnx = pytest.importorskip("onnx")
    networks.parts_of(None)[0].module.weight.data[0, 0] = 1e5
    code, _, err = command(monkeypatch, capsys, export, *tiny, "--half")
    assert code == 0, err
    stored = onnx.load(tmp_path / "new" / "x.onnx").graph.initializer
    assert {tensor.data_type for tensor in stored} == {onnx.TensorProto.FLOAT}


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    import onnx_ir

    def fail(model, path, **details):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(onnx_ir, "save", fail)
    code, _, err = command(monkeypatch, capsys, export, *tiny)
    assert code == 2 and err.count("\n") == 1 and "x.onnx could not be written" in err
    assert not (tmp_path / "new").exists()


REFUSED = {
    "another ending": (["--out", "{new}/x.pt"], "must end with .onnx"),
    "an existing file": (["--out", "{new}/there.onnx"], "there.onnx: exists already"),
    "existing weights": (["--out", "{new}/x.onnx"], "x.onnx.data: exists already"),
    "half of a program": (
        ["--to", "torch-export", "--half", "--out", "{new}/x.pt2"],
        "--half: has no effect with --to torch-export",
    ),
    "an image of the official form": (
        ["--to", "official", "--image", "a.png"],
        "--image: has no effect with --to official",
    ),
    "a private file": (["--private"], "--private: has no effect with --to onnx"),
    "no such image": (["--image", "{new}/no.png", "--out", "{new}/y.onnx"], "no.png: no such"),
    "two tasks": (["--push-to-hub", "me/it"], "choose one of --to and --push-to-hub"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_mistakes_are_one_line(kind, tiny, tmp_path, monkeypatch, capsys):
    new = tmp_path / "new"
    new.mkdir()
    for name in ("there.onnx", "x.onnx.data"):
        (new / name).write_text("mine")
    words, message = REFUSED[kind]
    arguments = [*tiny, *(word.format(new=new) for word in words)]
    code, _, err = command(monkeypatch, capsys, export, *arguments)
    assert code == 2 and err.count("\n") == 1 and message in err, err
    assert names_in(new) == ["there.onnx", "x.onnx.data"]
    assert (new / "there.onnx").read_text() == (new / "x.onnx.data").read_text() == "mine"


WRITE_PROGRAM = """
import resource, sys
from pathlib import Path

import torch
from exporting import programs
from exporting.parts import Part
from imaging.atomic_files import is_full_disk

part = Part("network", torch.nn.Linear(100, 100), {"image": torch.ones(2, 100)}, ("logits",))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    programs.save(part, Path(sys.argv[1]), {}, half=False)
except Exception as error:
    assert is_full_disk(error), repr(error)
    print("full")
"""


@pytest.mark.slow
def test_a_program_that_does_not_fit_on_the_disk_is_an_error_and_no_abort(tmp_path):
    command_line = [sys.executable, "-c", WRITE_PROGRAM, str(tmp_path / "x.pt2")]
    done = subprocess.run(command_line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "full\n"), done.stderr


def test_torch_writes_no_program_to_a_file_itself(tmp_path, monkeypatch):
    save = torch.export.save
    targets = []

    def note_target(program, target, **more):
        targets.append(target)
        save(program, target, **more)

    monkeypatch.setattr(torch.export, "save", note_target)
    part = Part("network", nn.Linear(3, 2), {"image": torch.ones(2, 3)}, ("logits",))
    programs.save(part, tmp_path / "x.pt2", {"run": "{}"}, half=False)
    assert not isinstance(targets[0], str | Path)  # it would abort where the disk is full
    run = programs.load(tmp_path / "x.pt2", part)
    torch.testing.assert_close(run(part.inputs)["logits"], part.module(torch.ones(2, 3)))


def test_no_file_of_an_export_appears_if_one_was_written_meanwhile(tmp_path):
    refused = pytest.raises(ValueError, match="exists already")
    with refused, output_files.new_files(tmp_path / "x.onnx") as folder:
        for name in ("x.decoder.onnx", "x.text.onnx"):
            (folder / name).write_text("new")
        (tmp_path / "x.decoder.onnx").write_text("old")
    assert contents(tmp_path) == {"x.decoder.onnx": b"old"}


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_packages_are_named(package, tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = command(monkeypatch, capsys, export, *tiny)
    assert code == 2 and err.count("\n") == 1
    assert f"--to onnx needs {package}; run pip install -r requirements-extra.txt" in err


def test_the_file_is_named_after_the_run_or_the_weights(tmp_path):
    run = write_mini(tmp_path / "my.run", "segformer")
    plain = tmp_path / "cris_best.pth"
    plain.touch()
    sources = {
        str(run): "my.run",
        str(run / "best.safetensors"): "my.run",
        str(plain): "cris_best",
        "nvidia/segformer-b0@main": "segformer-b0",
    }
    for source, expected in sources.items():
        weights = Weights(source, "segformer", read_run(source) if "@" not in source else {})
        assert output_files.output_path(weights, None, ".onnx") == Path(f"exports/{expected}.onnx")


# --- what is compared ----------------------------------------------------------------------------


def test_the_first_image_of_the_run_s_data_is_compared(demo, tmp_path):
    options = {"data": [str(tmp_path / "gone"), str(demo)], "prompt": "p0"}
    run = write_mini(tmp_path / "run", "clipseg", options=options)
    loaded = load_model(find_weights(str(run)), "cpu")
    case = comparison.find_case(loaded, [], None)

    first = json.loads((demo / "anns/test.json").read_text())[0]
    image = Image.open(demo / "images" / first["img_name"]).convert("RGB")
    assert first["img_name"] in case.description and "with the prompt" in case.description
    torch.testing.assert_close(case.tensors["image"], loaded.model.preprocess(image)[None])
    assert case.tensors["tokens"].shape == (1, 77)


def test_image_is_compared_with_the_run_s_prompt(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    run = write_mini(tmp_path / "run", "clipseg", options={"prompt": "one polyp"})
    loaded = load_model(find_weights(str(run)), "cpu")
    case = comparison.find_case(loaded, [], str(tmp_path / "a.png"))
    assert case.description.endswith("a.png with the prompt “one polyp”")
    assert torch.equal(case.tensors["tokens"], loaded.recipe.tokenizer("one polyp"))


def test_a_window_of_a_volume_is_compared(tmp_path):
    import nibabel

    import swin_unetr3d

    voxels = np.random.default_rng(0).normal(size=(100, 40, 64)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    config = replace(swin_unetr3d.VARIANTS["mini"], spacing=(1.0, 1.0, 1.0))
    model = swin_unetr3d.SwinUNETR(config)
    run = write_run(tmp_path / "run", type(model), model.state_dict(), config)
    loaded = load_model(find_weights(str(run)), "cpu")
    example = torch.zeros(1, config.in_channels, 64, 64, 64)
    part = Part("network", loaded.model, {"image": example}, ("logits",))
    case = comparison.find_case(loaded, [part], str(tmp_path / "a.nii.gz"))

    window = case.tensors["image"]
    assert window.shape == example.shape
    assert (window[..., 40:, :] == 0).all()  # padding
    expected = loaded.model.preprocess(torch.from_numpy(voxels)[None])
    if expected.shape[1:] == voxels.shape:
        torch.testing.assert_close(window[0, :, :, :40], expected[:, 18:82])


def test_a_difference_that_is_not_a_number_is_infinite():
    one = torch.ones(2)
    assert comparison.relative_difference(torch.tensor([1.0, float("nan")]), one) == float("inf")
    assert comparison.relative_difference(torch.ones(1), one) == float("inf")
    assert comparison.relative_difference(torch.tensor([1.0, 1.5]), 2 * one) == 0.5


# --- official sizes ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "variant"), [("segformer", "b0"), ("clipseg", "rd64-refined")])
def test_official_sizes(name, variant, tmp_path, capsys):
    model = new_model(name, variant)
    run = write_run(tmp_path / "run", type(model), model.state_dict(), model.config)
    for ending, kind in (("onnx", "onnx"), ("pt2", "torch-export")):
        run_export("--weights", run, "--to", kind, "--out", tmp_path / f"x.{ending}")
        with capsys.disabled():
            print(capsys.readouterr().out)
