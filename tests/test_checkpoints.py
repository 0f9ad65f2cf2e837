"""Weights of all models: no code is run, no number is lost, errors are explained in one line."""

import ast
import errno
import pickle
import re
import warnings
import zipfile
from dataclasses import replace
from typing import Optional

import numpy as np
import pytest
import torch
from conftest import ROOT, command, randomised, write_run
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import beit
import biomedclipseg
import clipseg
import cris
import dpt
import fewshot3d
import predict
import sam_decoder
import segformer
import swin_unetr3d
import train
import universal as universal_recipes
import upernet
from engine import lora
from engine.lora import add_lora, load_adapter, save_adapter
from preparation import text_embeddings
from recipes import FAMILIES, universal

FILES = (beit, biomedclipseg, clipseg, cris, dpt, sam_decoder, segformer, swin_unetr3d, upernet)
MODELS = {
    "beit": (beit.BEiT, beit.VARIANTS),
    "biomedclipseg": (biomedclipseg.BiomedCLIPSeg, biomedclipseg.VARIANTS),
    "clipseg": (clipseg.CLIPSeg, clipseg.VARIANTS),
    "cris": (cris.CRIS, cris.VARIANTS),
    "dpt": (dpt.DPT, dpt.VARIANTS),
    "sam_decoder": (sam_decoder.SAM, sam_decoder.VARIANTS),
    "segformer": (segformer.SegFormer, segformer.VARIANTS),
    "swin_unetr3d": (swin_unetr3d.SwinUNETR, swin_unetr3d.VARIANTS),
    "upernet": (upernet.UPerNet, upernet.VARIANTS),
    "universal": (universal_recipes.UniversalSwinUNETR, universal_recipes.UNIVERSAL_VARIANTS),
    "fewshot3d": (fewshot3d.AttentionUniversal, fewshot3d.VARIANTS),
    "fewshot3d-text": (fewshot3d.TextSwinUNETR, fewshot3d.TEXT_VARIANTS),
}
ids = {"ids": lambda file: getattr(file, "__name__", str(file))}


def quiet(function, *arguments):
    """Call a function of torch.jit, whose deprecation is no news."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)


def mini_model(name: str) -> nn.Module:
    """Return the smallest model of a kind with weights that all differ."""
    kind, variants = MODELS[name]
    return randomised(kind(variants["mini"]))


def save(path, content):
    torch.save(content, path)
    return path


# --- TorchScript archives hold what torch.jit.load finds in them ----------------------------------


class Inner(nn.Module):
    maybe: Optional[torch.Tensor]  # noqa: UP045 (TorchScript's spelling)

    def __init__(self):
        super().__init__()
        self.plain = torch.ones(3)  # an attribute, neither parameter nor buffer
        self.numbers, self.tensors, self.table = [1, 2], [torch.ones(2)], {"a": 1.5}
        self.maybe = torch.ones(2)
        self.z, self.size = 2 + 1j, (1, 2.5, "x")
        self.register_buffer("transient", torch.arange(3), persistent=False)
        self.register_buffer("nothing", None)

    def forward(self, x):
        return x + self.plain.sum() + self.transient.sum()


class Outer(nn.Module):
    """Storages shared by views, odd strides and dtypes, names that are no identifiers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), Inner())
        self.twice = self.layers[0]
        self.table = nn.ModuleDict({"one": nn.LayerNorm(4), "two": nn.GRU(4, 4)})
        self.list = nn.ParameterList([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))])
        self.weight = nn.Parameter(torch.randn(4, 6).T[1:, ::2])
        self.register_buffer("view", self.weight.data[2])
        self.register_buffer("expanded", torch.randn(3, 1).expand(3, 5))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("none_deep", torch.tensor(3))
        for dtype in ("bfloat16", "half", "double", "cfloat", "bool", "uint8", "int8", "int16"):
            self.register_buffer(f"{dtype}_x", torch.tensor([0, 1, 1]).to(getattr(torch, dtype)))

    def forward(self, x):
        return self.layers(x) @ self.weight[:4, :2] + self.list[0] + self.none_deep


def scripted(module, path):
    quiet(torch.jit.save, quiet(torch.jit.script, module), str(path))
    return path


def traced(module, path):
    quiet(torch.jit.save, quiet(torch.jit.trace, module, torch.randn(2, 4)), str(path))
    return path


def assert_same_tensors(path, file=cris):
    theirs, ours = quiet(torch.jit.load, str(path)).state_dict(), file.read_file(path)
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        found = ours[name]
        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride()), name
        assert torch.equal(found, expected), name
    return ours


@pytest.mark.parametrize("make", [scripted, traced])
def test_an_archive_holds_what_torch_finds_in_it(make, tmp_path):
    torch.manual_seed(0)
    ours = assert_same_tensors(make(Outer().eval(), tmp_path / "any name.pt"))
    assert "layers.2.plain" not in ours and "layers.2.transient" in ours and len(ours) > 20
    assert ours["view"].untyped_storage().data_ptr() == ours["weight"].untyped_storage().data_ptr()


def test_archives_in_the_form_of_openai(tmp_path):
    from forms.clipseg import as_original, hub_state, save_archive

    model = randomised(clipseg.CLIPSeg(clipseg.VARIANTS["mini"]))
    state = as_original(hub_state(model))
    towers = {n.removeprefix("clip_model."): t for n, t in state.items() if "clip_model" in n}
    quiet(save_archive, towers, tmp_path / "ViT-B-16.pt")
    ours = assert_same_tensors(tmp_path / "ViT-B-16.pt")
    assert ours["visual.conv1.weight"].dtype == torch.float16
    assert ours["input_resolution"] == 224 and ours["input_resolution"].ndim == 0


def rewritten(path, change: dict):
    """Rewrite records of an archive: what `change` has of their last name is called on them."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change.get(name.split("/")[-1], bytes)(content))
    return path


def test_damaged_and_foreign_archives_are_one_line(tmp_path):
    plain = nn.Linear(3, 2)
    for change, said in (
        ({"byteorder": lambda _: b"big"}, "big-endian"),
        ({"data.pkl": lambda data: data[:40]}, "cannot be read"),
        ({"0": lambda data: data[:-4]}, "cannot be read"),  # a storage that is too short
        ({"data.pkl": lambda d: d.replace(b"torch._utils", b"os.path.join")}, "os.path.join"),
        ({"data.pkl": lambda d: d.replace(b"FloatStorage", b"QInt8Storage")}, "QInt8Storage"),
        ({"data.pkl": lambda _: pickle.dumps(["a list"])}, "cannot be read"),
    ):
        path = rewritten(scripted(plain, tmp_path / "x.pt"), change)
        for file in FILES:
            with pytest.raises(ValueError) as caught:
                file.read_file(path)
            message = str(caught.value)
            assert message.startswith(f"{path}: ") and "\n" not in message and said in message


FULL_MEMORY = {
    "python": MemoryError(),
    "torch": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8"),
    "mmap": RuntimeError("unable to mmap 8 bytes from file <a>: Cannot allocate memory (12)"),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("error", FULL_MEMORY.values(), ids=FULL_MEMORY)
def test_full_memory_is_not_blamed_on_the_file(error, tmp_path, monkeypatch, capsys):
    def fail(_):
        raise error

    for file in FILES:
        monkeypatch.setattr(file, "parse_file", fail)
        with pytest.raises(type(error)) as caught:
            file.read_file(tmp_path / "weights.pt")
        assert caught.value is error

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    weights = save(tmp_path / "weights.pt", {})
    arguments = ("--model", "segformer", "--weights", weights, "--out", tmp_path / "masks")
    code, _, told = command(monkeypatch, capsys, predict, *arguments, tmp_path / "a.png")
    assert code == 2 and told.count("\n") == 1
    assert told.startswith("error: out of memory: ") and "weights.pt" not in told


@pytest.mark.parametrize("error", [RuntimeError("PytorchStreamReader failed"), OSError("gone")])
def test_other_errors_are_blamed_on_the_file(error, tmp_path, monkeypatch):
    def fail(_):
        raise error

    for file in FILES:
        monkeypatch.setattr(file, "parse_file", fail)
        with pytest.raises(ValueError, match="weights.pt: cannot be read .*; get the whole file$"):
            file.read_file(tmp_path / "weights.pt")


# --- no code in a file is run ---------------------------------------------------------------------


class Payload(nn.Module):
    """Writes a file when torch.jit.load restores it."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = bool(torch.from_file(state[0], True, 4).sum() > 0)


class Loop(Payload):
    """Never ends when torch.jit.load restores it."""

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        n = 0
        while n < 1:
            n = n * 1
        self.training = state[1]


class Packed(nn.Module):
    """Makes its tensor when it is restored, as quantised modules do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.weight = 2 * state[0]
        self.training = state[1]


class Call:
    """A pickle that writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class Holder(nn.Module):
    """A module with weights beside another one."""

    def __init__(self, module):
        super().__init__()
        self.linear, self.other = nn.Linear(2, 2), module

    def forward(self, x):
        return self.other(self.linear(x))


PAYLOADS = {
    "script": lambda path, mark: scripted(Holder(Payload(mark)), path),
    "loop": lambda path, mark: scripted(Holder(Loop(mark)), path),
    "zip": lambda path, mark: save(path, {"a": Call(mark)}),
    "old": lambda path, mark: torch.save(
        {"a": Call(mark)}, path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda path, mark: path.write_bytes(pickle.dumps({"a": Call(mark)})),
}
ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".torchscript")


def test_the_payloads_of_these_tests_are_live(tmp_path):
    mark = tmp_path / "written"
    quiet(torch.jit.load, str(PAYLOADS["script"](tmp_path / "a.pt", str(mark))))
    assert mark.exists()
    mark.unlink()
    PAYLOADS["zip"](tmp_path / "b.pt", str(mark))
    torch.load(tmp_path / "b.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("file", FILES, **ids)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_model_runs_the_code_of_a_file(file, payload, tmp_path):
    mark = tmp_path / "written"
    PAYLOADS[payload](tmp_path / "made", str(mark))
    content = (tmp_path / "made").read_bytes()
    for ending in ENDINGS:
        path = tmp_path / f"weights{ending}"
        path.write_bytes(content)
        try:
            found = file.read_file(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            assert payload not in ("script", "loop") or ending == ".safetensors"
        else:
            assert found.keys() == {"linear.weight", "linear.bias"}  # what holds no code
    assert not mark.exists()


@pytest.mark.parametrize("file", FILES, **ids)
def test_modules_that_never_end_are_refused(file, tmp_path):
    """Each of 40 modules holds the next one twice: 2^40 paths in a small file."""
    with zipfile.ZipFile(tmp_path / "deep.pt", "w") as archive:
        code = "class M(Module):\n  __parameters__ = []\n  __buffers__ = []\n"
        archive.writestr("deep/code/__torch__.py", code)
    kind = type("M", (file.ScriptObject,), {"qualified_name": "__torch__.M"})
    module = kind()
    module.state = {}
    for _ in range(40):
        outer = kind()
        outer.state = {"left": module, "right": module}
        module = outer
    with (
        zipfile.ZipFile(tmp_path / "deep.pt") as archive,
        pytest.raises(ValueError, match="it holds more than 100,000 modules"),
    ):
        file.script_tensors(module, archive, "deep")


def test_a_pickle_that_calls_a_function_is_named_as_one(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"cposix\nsystem\n(Vtrue\ntR.")  # os.system("true")
    for file in FILES:
        with pytest.raises(
            ValueError, match=r"it contains code\); where it was made, save it with torch.save"
        ):
            file.read_file(path)


@pytest.mark.parametrize("file", FILES, **ids)
def test_a_nested_tensor_is_refused(file):
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="x: 1 tensors do not fit: a is a nested tensor"):
        file.check_complete({"a": nested}, {"a": torch.zeros(2)}, "x")


def test_tensors_that_code_makes_are_refused(tmp_path):
    path = scripted(Holder(Packed()), tmp_path / "packed.pt")
    for file in FILES:
        with pytest.raises(ValueError, match=r"Packed builds tensors in __setstate__"):
            file.read_file(path)


@pytest.mark.parametrize("payload", ["script", "zip"])
def test_no_way_in_runs_the_code_of_a_file(payload, demo, tmp_path, monkeypatch, capsys):
    mark, path = tmp_path / "written", tmp_path / "weights.pt"
    PAYLOADS[payload](path, str(mark))

    def refused(program, *arguments):
        code, _, error = command(monkeypatch, capsys, program, *arguments)
        assert code == 2 and error.count("\n") == 1, error
        assert not mark.exists()

    demo_set = ("--data", demo, "--cache", tmp_path / "cache", "--workers", 0)
    image = next((demo / "images").iterdir())
    for model in MODELS:
        if model in FAMILIES and FAMILIES[model].takes == "images":
            out = ("--out", tmp_path / model)
            prompt = ("--prompt", "p") if FAMILIES[model].reads_text() else ()
            refused(predict, image, "--model", model, "--weights", path, *out, *prompt)
    volume = tmp_path / "a.nii.gz"
    refused(predict, volume, "--model", "universal", "--weights", path, "--out", tmp_path / "v")

    both = write_mini(tmp_path, "biomedclipseg"), write_mini(tmp_path, "clipseg")
    for model, option, weights in zip(
        ("biomedclipseg", "clipseg"), ("decoder", "clip"), both, strict=True
    ):
        words = ("--model", model, "--weights", weights, f"--{option}", path)
        refused(train, *words, *demo_set, "--out", tmp_path / f"{option}-run")
        refused(predict, image, *words, "--prompt", "x", "--out", tmp_path / "masks")

    with pytest.raises(ValueError):
        universal.read_codes(str(path))
    with pytest.raises(ValueError):
        text_embeddings.TextTower.from_pretrained(path)
    with pytest.raises(ValueError):
        load_adapter(mini_model("sam_decoder"), path)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_a_state_to_resume_from_runs_no_code(options, tmp_path, monkeypatch, capsys):
    train.run(replace(options, model="clipseg", epochs=1, max_steps=1))
    out, mark = train.Path(options.out), tmp_path / "written"
    for payload in PAYLOADS.values():
        payload(out / "last.pt", str(mark))
        capsys.readouterr()
        code, _, error = command(monkeypatch, capsys, train, "--resume", "--out", out)
        assert code == 2 and error.count("\n") == 1 and f"{out}/last.pt: cannot be read" in error
        assert not mark.exists()


def calls(tree) -> list[tuple[str, ast.Call]]:
    """Return every call below a tree, with what is called as it is written."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in nodes]


def test_no_program_unpickles_freely():
    seen = 0
    folders = [ROOT, *(ROOT / name for name in ("engine", "imaging", "preparation", "recipes"))]
    for path in [path for folder in folders for path in folder.glob("*.py")]:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            how = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name == "torch.load":
                assert how.get("weights_only") == "True", path.name
                seen += 1
            assert name not in ("torch.jit.load", "pickle.load", "pickle.loads"), path.name
            assert "allow_pickle" not in how, path.name
    assert seen == len(FILES) + 2  # and last.pt, to resume and to predict


# --- numbers that are none ------------------------------------------------------------------------


def write_mini(folder, name: str, change=dict):
    """Write a run folder with the weights of a mini model as `change` makes them; its .pth."""
    kind, variants = MODELS[name]
    folder = folder / f"mini-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    state = mini_model(name).state_dict()
    write_run(folder, kind, {"x": torch.zeros(1)}, variants["mini"])
    (folder / "best.safetensors").unlink()
    return save(folder / "weights.pth", change(state))


def with_value(value, dtype=None):
    """Return a function that puts a value into the last place of a tensor."""

    def change(t):
        t = t.clone() if dtype is None else t.to(dtype)
        t.view(-1)[-1] = value
        return t

    return change


FAULTS = {
    "nan": (with_value(float("nan")), "holds NaN, infinity"),
    "inf": (with_value(-float("inf"), torch.bfloat16), "holds NaN, infinity"),
    "huge": (with_value(1e300, torch.float64), "holds NaN, infinity or values beyond float32"),
    "int8": (lambda t: t.to(torch.int8), "holds int8 numbers"),
    "bool": (lambda t: t.to(torch.bool), "holds bool numbers"),
    "complex64": (lambda t: t.to(torch.complex64), "holds complex64 numbers"),
    "float8_e4m3fn": (lambda t: t.to(torch.float8_e4m3fn), "holds float8_e4m3fn numbers"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_number_is_told(fault):
    change, said = FAULTS[fault]
    good = torch.randn(3, 4)
    for file in (*FILES, lora):
        assert said in file.tensor_fault(change(good), good)
        assert file.tensor_fault(change(good), torch.zeros(3, 4, dtype=torch.int64)) == ""
    for t in (torch.zeros(0, 2), torch.tensor(2.0), good.t(), good.half(), good.double()):
        assert cris.tensor_fault(t, torch.zeros(t.shape)) == ""
    assert "expected a dense" in cris.tensor_fault(good.to_sparse(), good)
    assert "expected a dense" in cris.tensor_fault(good.to("meta"), good)


def test_counters_and_ignored_tensors_may_be_of_any_type(tmp_path):
    path = write_mini(tmp_path, "segformer")
    state = torch.load(path)
    counter = next(name for name in state if name.endswith("num_batches_tracked"))
    save(path, state | {counter: torch.tensor(3.0)})
    model = segformer.SegFormer.from_pretrained(path)
    assert model.state_dict()[counter] == 3

    path = write_mini(tmp_path, "cris")
    save(path, torch.load(path) | {"input_resolution": torch.tensor(float("nan"))})
    cris.CRIS.from_pretrained(path)


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_and_codes_that_are_no_numbers_are_refused(fault, tmp_path):
    change, said = FAULTS[fault]
    model = mini_model("sam_decoder")
    add_lora(model, 2, lambda name: name.startswith("vision_encoder."))
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith(".down"))
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path, about)
    with pytest.raises(ValueError, match=f"{re.escape(name)} {said}"):
        load_adapter(mini_model("sam_decoder"), path)

    codes = {"liver": torch.randn(512), "spleen": change(torch.randn(512))}
    save_file(codes, tmp_path / "codes.safetensors")
    with pytest.raises(ValueError, match=f"codes.safetensors: .*spleen {said}"):
        universal.read_codes(str(tmp_path / "codes.safetensors"))


# --- files that hold something else ---------------------------------------------------------------

CONTENTS = {
    "tensor": (torch.zeros(32, 512).half(), "a single tensor, float16 of shape (32, 512)"),
    "list": ([torch.zeros(2)], "holds a list"),
    "pairs": ([("a", torch.zeros(2))], "holds a list"),
    "number": (3, "holds a int"),
    "keys": ({3: torch.zeros(2)}, "the key 3 is of type int"),
    "tuples": ({"state_dict": {("a", 1): torch.zeros(2)}}, "the key ('a', 1) is of type tuple"),
    "values": ({"a": torch.zeros(2), "b": [1]}, "'b' is not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, **ids)
@pytest.mark.parametrize("what", CONTENTS)
def test_a_file_without_named_tensors_says_what_it_holds(file, what, tmp_path):
    content, said = CONTENTS[what]
    path = save(tmp_path / "x.pth", content)
    with pytest.raises(ValueError) as caught:
        file.read_checkpoint(path, ())
    assert str(caught.value).startswith(f"{path}: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_without_names(tmp_path):
    path = save(tmp_path / "txt_encoding.pth", torch.zeros(32, 512))
    with pytest.raises(ValueError, match="a single tensor"):
        universal.read_codes(str(path))
    save(path, {1: torch.zeros(512)})
    with pytest.raises(ValueError, match="1 is not the name of a class"):
        universal.read_codes(str(path))


# --- pixels ---------------------------------------------------------------------------------------

SEEING = [file for file in FILES if file is not swin_unetr3d]


@pytest.mark.parametrize("file", SEEING, **ids)
def test_images_that_pillow_would_clip_are_refused(file):
    config = file.VARIANTS["mini"]
    grey = np.linspace(0, 60000, 64 * 48).reshape(48, 64)
    for mode, array in (
        ("I;16", grey.astype("<u2")),
        ("I;16B", grey.astype(">u2")),
        ("I", grey.astype(np.int32)),
        ("F", (grey / 60000).astype(np.float32)),
    ):
        image = Image.frombytes(mode, (64, 48), array.tobytes())
        with pytest.raises(ValueError, match=rf"mode {mode} .* scale its values to 0\.\.255"):
            file.preprocess(image, config)

    # All others are what Pillow makes of them.
    colours = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"):
        image = Image.fromarray(colours).convert(mode)
        expected = file.preprocess(image.convert("RGB"), config)
        assert torch.equal(file.preprocess(image, config), expected), mode
