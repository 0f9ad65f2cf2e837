"""ONNX files as --weights of predict.py: small hand-made networks, and exports of real models."""

import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, randomised, write_run
from PIL import Image

import clipseg
import export
import predict
import sam_decoder
import segformer
import swin_unetr3d
import train
from prediction import onnx_networks
from prediction.models import find_weights, load_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

FLOAT = onnx.TensorProto.FLOAT
INT = onnx.TensorProto.INT64
KERNEL = np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype(np.float32)


def describe(kind, config, classes=()) -> dict:
    """Return what the metadata of an export say about the run."""
    return {
        "format": 1,
        "model": kind.__module__,
        "class": kind.__name__,
        "config": asdict(config),
        "classes": list(classes),
        "options": {},
    }


def write_graph(path, nodes, inputs, outputs, constants, metadata, data=False):
    """Write an ONNX file. inputs, outputs: name -> (type, shape). constants: name -> array."""
    infos = []
    for values in (inputs, outputs):
        info = onnx.helper.make_tensor_value_info
        infos.append([info(name, *value) for name, value in values.items()])
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "graph", *infos, tensors)
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10)
    texts = {key: x if isinstance(x, str) else json.dumps(x) for key, x in metadata.items()}
    onnx.helper.set_model_props(model, texts)
    if data:
        onnx.save(
            model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
        )
    else:
        onnx.save(model, path)
    return path


def write_segformer(path, kernel=KERNEL, data=False, **metadata):
    """Write a network that is a convolution by `kernel` (K,3,4,4) with stride 4."""
    config = replace(segformer.VARIANTS["mini"], num_classes=len(kernel), image_size=64)
    names = ["background", "one", "two"] if len(kernel) == 3 else ["target"]
    known = {
        "run": describe(segformer.SegFormer, config, names),
        "part": "network",
        "parts": ["network"],
    }
    return write_graph(
        path,
        [onnx.helper.make_node("Conv", ["image", "kernel"], ["logits"], strides=[4, 4])],
        {"image": (FLOAT, ["batch", 3, "height", "width"])},
        {"logits": (FLOAT, None)},
        {"kernel": kernel},
        known | metadata,
        data,
    )


def write_clipseg(folder, **metadata):
    """Write three networks. The mask is the image where the sum of the tokens is large."""
    config = replace(clipseg.VARIANTS["mini"], image_size=64)
    shared = {"run": describe(clipseg.CLIPSeg, config), "parts": ["vision", "text", "decoder"]}
    node = onnx.helper.make_node
    axis = {"axis": np.array([1])}
    graphs = {
        "vision": (
            [node("ReduceMean", ["image", "axis"], ["features"])],
            {"image": (FLOAT, ["batch", 3, 64, 64])},
            {"features": (FLOAT, ["batch", 1, 64, 64])},
            axis,
        ),
        "text": (
            [
                node("Cast", ["tokens"], ["numbers"], to=FLOAT),
                node("ReduceMean", ["numbers", "axis"], ["mean"]),
                node("Div", ["mean", "scale"], ["condition"]),
            ],
            {"tokens": (INT, ["batch", "length"])},
            {"condition": (FLOAT, ["batch", 1])},
            axis | {"scale": np.float32([10000])},
        ),
        "decoder": (
            [
                node("Unsqueeze", ["condition", "axes"], ["factor"]),
                node("Mul", ["features", "factor"], ["logits"]),
            ],
            {"features": (FLOAT, ["batch", 1, 64, 64]), "condition": (FLOAT, ["batch", 1])},
            {"logits": (FLOAT, ["batch", 1, 64, 64])},
            {"axes": np.array([2, 3])},
        ),
    }
    for part, graph in graphs.items():
        known = shared | {"part": part} | metadata
        write_graph(folder / f"model.{part}.onnx", *graph, known)
    return folder / "model.vision.onnx"


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def call(monkeypatch, capsys, program, *arguments) -> tuple[int, str, str]:
    return command(monkeypatch, capsys, program, *arguments)


def refusal(monkeypatch, capsys, program, *arguments) -> str:
    """Return the one line with which a program ends."""
    code, out, err = command(monkeypatch, capsys, program, *arguments)
    assert code == 2, out + err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


# --- predictions ----------------------------------------------------------------------------------


def convolved(photo, kernel, size=(30, 50)):
    """Return the probabilities (K,H,W) that the convolution gives for a photo."""
    config = replace(segformer.VARIANTS["mini"], num_classes=len(kernel), image_size=64)
    image = segformer.preprocess(Image.open(photo), config)
    logits = F.conv2d(image[None], torch.from_numpy(kernel), stride=4)[0]
    return segformer.postprocess(logits, size, config)


def test_a_network_of_class_maps(photo, tmp_path, monkeypatch, capsys):
    source = write_segformer(tmp_path / "net.onnx")
    out = tmp_path / "out"
    arguments = ["--weights", source, "--out", out, "--probabilities", photo]
    code, _, err = call(monkeypatch, capsys, predict, *arguments)
    assert code == 0, err

    expected = convolved(photo, KERNEL)
    mask = np.asarray(Image.open(out / "photo.png"))
    assert (mask == expected.argmax(0).numpy()).mean() > 0.999  # ties may go either way
    assert len(np.unique(mask)) == 3
    highest = np.asarray(Image.open(out / "photo_probability.png")) / 65535
    assert np.abs(highest - expected[1:].amax(0).numpy()).max() < 1e-4
    assert json.loads((out / "classes.json").read_text())["2"] == "two"


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_a_threshold_of_one_class(threshold, photo, tmp_path, monkeypatch, capsys):
    source = write_segformer(tmp_path / "net.onnx", KERNEL[:1])
    out = tmp_path / "out"
    more = [] if threshold is None else ["--threshold", threshold]
    code, _, err = call(
        monkeypatch, capsys, predict, "--weights", source, "--out", out, photo, *more
    )
    assert code == 0, err
    expected = convolved(photo, KERNEL[:1])[0] > (threshold or 0.5)
    mask = np.asarray(Image.open(out / "photo.png"))
    assert (mask == 255 * expected.numpy()).mean() > 0.999
    assert 0 < mask.mean() < 255


def test_a_model_s_files_are_opened_once(photo, tmp_path, monkeypatch, capsys):
    source = write_clipseg(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(photo.read_bytes())
    opened = []
    session = onnx_networks.Session.__init__

    def record(self, path, providers):
        opened.append(path.name)
        session(self, path, providers)

    monkeypatch.setattr(onnx_networks.Session, "__init__", record)
    arguments = ["--weights", source, "--out", tmp_path / "out", "--prompt", "a polyp", folder]
    code, _, err = call(monkeypatch, capsys, predict, *arguments)
    assert code == 0, err
    assert len([*(tmp_path / "out").glob("?.png")]) == 3
    assert opened == ["model.vision.onnx", "model.text.onnx", "model.decoder.onnx"]


@pytest.mark.parametrize("part", ["vision", "text", "decoder"])
def test_an_encoded_image_serves_all_prompts(part, photo, tmp_path):
    write_clipseg(tmp_path)
    loaded = load_model(find_weights(str(tmp_path / f"model.{part}.onnx")))
    recipe = loaded.recipe
    image = clipseg.preprocess(Image.open(photo), loaded.config)  # (3,64,64)
    item = {"image": image, "size": (64, 64)}
    encoded = recipe.encode(loaded.model, item)
    assert torch.allclose(encoded["features"], image.mean(0, True), atol=1e-6)

    for prompt in ("a polyp", "two pink polyps"):
        tokens = recipe.tokenize(prompt)
        expected = (image.mean(0, True) * tokens["tokens"].float().mean() / 1e4).sigmoid()
        for inputs in (item, encoded | {"size": (64, 64)}):
            probabilities, _ = recipe.predict(loaded.model, inputs | tokens)
            torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-5)


def test_a_box_becomes_two_points_and_none_a_padding_point():
    boxes = torch.tensor([[[1.0, 2, 3, 4]]])
    points = torch.tensor([[[[5.0, 6], [7, 8]]]])
    labels = torch.tensor([[[1, 0]]])
    both = onnx_networks.as_points(boxes, points, labels)
    assert both[0].tolist() == [[[[5, 6], [7, 8], [1, 2], [3, 4]]]]
    assert both[1].tolist() == [[[1, 0, 2, 3]]]
    assert onnx_networks.as_points(boxes, None, None)[1].tolist() == [[[2, 3]]]
    assert onnx_networks.as_points(None, points, labels)[1].tolist() == [[[1, 0, -1]]]


def test_classes_of_a_universal_model_are_selected():
    logits = torch.arange(3.0).view(1, 3, 1, 1, 1)
    sessions = {"network": lambda volume: [logits]}
    model = onnx_networks.OnnxUniversal(None, None, sessions)
    assert model(None, [2, 0]).flatten().tolist() == [2, 0]
    assert model(None).flatten().tolist() == [0, 1, 2]


# --- mistakes -------------------------------------------------------------------------------------


def damage(name, tmp_path, monkeypatch):
    """Return the --weights of a mistake of this name."""
    path = tmp_path / "net.onnx"
    if name == "missing":
        return path
    if name in ("no vision", "other decoder", "other weights", "renamed part", "exchanged parts"):
        source = write_clipseg(tmp_path)
        decoder = tmp_path / "model.decoder.onnx"
        if name == "no vision":
            source.unlink()
            return decoder
        if name == "renamed part":
            return source.rename(path)
        if name == "exchanged parts":
            return decoder.replace(source)
        other = tmp_path / "other"
        other.mkdir()
        run = describe(clipseg.CLIPSeg, clipseg.VARIANTS["mini"])
        if name == "other weights":
            write_clipseg(other, weights="another hash")
        else:
            write_clipseg(other, run=run | {"options": {"seed": 1}})
        (other / decoder.name).replace(decoder)
        return source

    write_segformer(path, data=name == "no data")
    run = describe(segformer.SegFormer, segformer.VARIANTS["mini"])
    changed = {
        "foreign": {"run": None},
        "no JSON": {"run": "{"},
        "other format": {"run": run | {"format": 2}},
        "edited": {"run": run | {"classes": "polyp"}},
        "unknown model": {"run": run | {"model": "unet"}},
        "unknown class": {"run": run | {"class": "Tensor"}},
        "class of another type": {"run": run | {"class": []}},
        "model of another type": {"run": run | {"model": {}}},
        "unknown part": {"part": "encoder"},
        "other parts": {"parts": ["network", "../network"]},
    }
    if name == "no data":
        path.with_name("net.onnx.data").unlink()
    elif name == "truncated":
        path.write_bytes(path.read_bytes()[:300])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif name == "no onnxruntime":
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    elif name == "foreign":
        write_graph(path, [], {"a": (FLOAT, [1])}, {"a": (FLOAT, [1])}, {}, {})
    else:
        write_segformer(path, **changed[name])
    return path


MISTAKES = {
    "missing": "net.onnx: no such file",
    "no vision": "model.decoder.onnx: needs model.vision.onnx, which is not beside it",
    "other decoder": "model.vision.onnx and model.decoder.onnx: are not of the same export",
    "other weights": "model.vision.onnx and model.decoder.onnx: are not of the same export",
    "renamed part": "net.onnx: the files of this model must be named NAME.vision.onnx, NAME.text",
    "exchanged parts": "model.vision.onnx: is the decoder of a model; rename it accordingly",
    "no data": "net.onnx: needs net.onnx.data, which is not beside it; keep both files together",
    "truncated": "net.onnx: ONNX Runtime cannot read it",
    "empty": "net.onnx: ONNX Runtime cannot read it",
    "text": "net.onnx: ONNX Runtime cannot read it",
    "no onnxruntime": "net.onnx: ONNX files need onnxruntime: pip install onnxruntime",
    "foreign": "net.onnx: was not written by export.py",
    "no JSON": "net.onnx: is not valid JSON",
    "other format": "net.onnx: was written by a newer version (it has format 2)",
    "edited": "net.onnx: classes is 'polyp', expected list[str]",
    "unknown model": "net.onnx: was written by a newer version",
    "unknown class": "net.onnx: was written by a newer version (it has 'Tensor')",
    "class of another type": "net.onnx: class is [], expected str",
    "model of another type": "net.onnx: was written by a newer version",
    "unknown part": "net.onnx: was written by a newer version",
    "other parts": "net.onnx: was written by a newer version",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_file_that_cannot_be_used_is_one_line(name, photo, tmp_path, monkeypatch, capsys):
    source = damage(name, tmp_path, monkeypatch)
    arguments = ["--weights", source, "--out", tmp_path / "out", "--prompt", "a", photo]
    if not source.name.startswith("model.") and name != "renamed part":
        arguments.remove("--prompt")
        arguments.remove("a")
    assert MISTAKES[name] in refusal(monkeypatch, capsys, predict, *arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "dpt"], "--model dpt: "),
        (["--device", "meta"], "--device meta"),
        (["--threshold", "0.4"], "--threshold: has no effect with several classes"),
        (["--boxes", "boxes.csv"], "this model takes no boxes or points"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    options, message, photo, tmp_path, monkeypatch, capsys
):
    source = write_segformer(tmp_path / "net.onnx")
    arguments = ["--weights", source, "--out", tmp_path / "out", photo]
    assert message in refusal(monkeypatch, capsys, predict, *arguments, *options)


def test_a_second_file_of_weights_is_refused(photo, tmp_path, monkeypatch, capsys):
    source = write_clipseg(tmp_path)
    arguments = ["--weights", source, "--out", tmp_path / "out", "--prompt", "a", photo]
    message = refusal(monkeypatch, capsys, predict, *arguments, "--clip", photo)
    assert "--clip: an ONNX file holds all weights of its model; remove it" in message


def test_two_files_of_a_model_are_no_ensemble(photo, tmp_path, monkeypatch, capsys):
    write_clipseg(tmp_path)
    files = [tmp_path / "model.text.onnx", tmp_path / "model.decoder.onnx"]
    arguments = [photo, "--out", tmp_path / "out", "--prompt", "a", "--weights", *files]
    message = refusal(monkeypatch, capsys, predict, *arguments)
    assert "model.decoder.onnx are the same weights; give each once" in message


def test_onnx_files_form_an_ensemble(photo, tmp_path, monkeypatch, capsys):
    kernels = [KERNEL[:1], -KERNEL[:1] / 2]
    files = [write_segformer(tmp_path / f"{k}.onnx", kernel) for k, kernel in enumerate(kernels)]
    out = tmp_path / "out"
    arguments = [photo, "--out", out, "--probabilities", "--weights", *files]
    code, _, err = call(monkeypatch, capsys, predict, *arguments)
    assert code == 0, err
    expected = sum(convolved(photo, kernel)[0] for kernel in kernels) / 2
    probabilities = np.asarray(Image.open(out / "photo_probability.png")) / 65535
    assert np.abs(probabilities - expected.numpy()).max() < 1e-4


def test_devices(monkeypatch):
    def choose(device, available, place):
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
        monkeypatch.setattr(onnx_networks, "pick_device", lambda _: torch.device(place))
        return onnx_networks.providers_for(device)

    cpu = ["CPUExecutionProvider"]
    both = ["CUDAExecutionProvider", *cpu]
    assert choose("auto", cpu, "cuda") == cpu
    assert choose("auto", both, "cpu") == cpu
    assert choose("auto", both, "cuda") == [("CUDAExecutionProvider", {"device_id": 0}), *cpu]
    assert choose("cuda:1", both, "cuda:1")[0] == ("CUDAExecutionProvider", {"device_id": 1})
    assert choose("auto", cpu, "mps") == cpu
    with pytest.raises(ValueError, match="^--device mps: ONNX files run on cpu or cuda$"):
        choose("mps", cpu, "mps")
    with pytest.raises(ValueError, match="^--device cuda: this onnxruntime has no CUDA"):
        choose("cuda", cpu, "cuda")


def test_full_memory_is_told_from_other_errors():
    def run(message):
        def fail(*_):
            raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException(message)

        session = object.__new__(onnx_networks.Session)
        session.inputs = ["image"]
        session.session = SimpleNamespace(run=fail)
        session(torch.zeros(1))

    with pytest.raises(MemoryError):
        run("Failed to allocate memory for requested buffer of size 8")
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException):
        run("Non-zero status code")


@pytest.mark.parametrize("ending", ["onnx", "pt2", "PT2"])
@pytest.mark.parametrize("program", [train, export, predict])
def test_only_predictions_take_exports(program, ending, photo, demo, tmp_path, monkeypatch, capsys):
    if ending == "onnx" and program is predict:
        return
    source = tmp_path / f"net.{ending}"
    if ending == "onnx":
        write_segformer(source)
    else:
        source.write_bytes(b"")
    arguments = {
        train: ["--model", "segformer", "--data", demo, "--out", tmp_path / "run"],
        export: ["--to", "onnx", "--out", tmp_path / "copy.onnx"],
        predict: ["--out", tmp_path / "out", photo],
    }[program]
    monkeypatch.chdir(tmp_path)
    message = refusal(monkeypatch, capsys, program, "--weights", source, *arguments)
    kinds = {
        "onnx": "ONNX files are for predict.py and app.py",
        "pt2": ".pt2 files are for export only",
    }
    assert f"net.{ending}: {kinds[ending.lower()]}" in message
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "photo.png"}


# --- exports of real models -----------------------------------------------------------------------


def export_run(folder, source, monkeypatch, capsys):
    """Export a run with export.py. Return the first of the files."""
    path = folder / "model.onnx"
    code, out, err = call(
        monkeypatch, capsys, export, "--weights", source, "--to", "onnx", "--out", path
    )
    assert code == 0, out + err
    return sorted(folder.glob("model*.onnx"))[0]


def assert_same_predictions(run, file, inputs, tmp_path, monkeypatch, capsys):
    """Compare the files that predict.py writes for a run and for its export."""
    for name, source in (("ours", run), ("theirs", file)):
        arguments = ["--weights", source, "--out", tmp_path / name, "--probabilities", *inputs]
        code, out, err = call(monkeypatch, capsys, predict, *arguments, "--device", "cpu")
        assert code == 0, out + err

    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {path.name for path in (tmp_path / "theirs").iterdir()}
    compared = 0
    for name in names:
        if name.endswith((".csv", ".json")) or name == "legend.png":
            continue
        ours, theirs = (pixels(tmp_path / folder / name) for folder in ("ours", "theirs"))
        if "probability" in name:
            assert np.abs(ours - theirs).max() <= 1e-4
            assert ours.std() > 1e-3
        else:
            assert (ours == theirs).mean() > 0.999  # ties may go either way
            assert ours.std() > 0
        compared += 1
    assert compared >= 2


def pixels(path) -> np.ndarray:
    """Return a picture or a volume; probabilities of pictures as shares of 65535."""
    if path.name.endswith(".nii.gz"):
        return nibabel.load(path).get_fdata()
    image = np.asarray(Image.open(path)).astype(float)
    return image / 65535 if "probability" in path.name else image


@pytest.mark.slow
def test_an_exported_class_map(photo, tmp_path, monkeypatch, capsys):
    config = replace(segformer.VARIANTS["mini"], num_classes=3, image_size=64)
    model = randomised(segformer.SegFormer(config))
    with torch.no_grad():  # make all classes occur
        logits = model(model.preprocess(Image.open(photo))[None])
        model.decode_head.classifier.bias -= logits.mean((0, 2, 3))
    names = ["background", "one", "two"]
    run = write_run(
        tmp_path / "run", segformer.SegFormer, model.state_dict(), config, classes=names
    )
    file = export_run(tmp_path, run, monkeypatch, capsys)
    assert_same_predictions(run, file, [photo], tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_an_exported_model_of_texts(photo, tmp_path, monkeypatch, capsys):
    config = replace(clipseg.VARIANTS["mini"], image_size=64)
    model = randomised(clipseg.CLIPSeg(config))
    run = write_run(tmp_path / "run", clipseg.CLIPSeg, model.state_dict(), config)
    file = export_run(tmp_path, run, monkeypatch, capsys)
    loaded = {name: load_model(find_weights(str(name)), "cpu") for name in (run, file)}
    item = {"image": clipseg.preprocess(Image.open(photo), config), "size": (30, 50)}
    for prompt in ("a polyp", "two pink polyps"):
        results = []
        for one in loaded.values():
            with torch.no_grad():
                encoded = one.recipe.encode(one.model, item)
                inputs = encoded | one.recipe.tokenize(prompt) | {"size": item["size"]}
                results.append(one.recipe.predict(one.model, inputs)[0])
        torch.testing.assert_close(*results, rtol=0, atol=1e-4)
    inputs = [photo, "--prompt", "a polyp", "--threshold", f"{results[0].median():.4f}"]
    assert_same_predictions(run, file, inputs, tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_an_exported_sam(photo, tmp_path, monkeypatch, capsys):
    model = randomised(sam_decoder.SAM(sam_decoder.VARIANTS["mini"]))
    run = write_run(tmp_path / "run", sam_decoder.SAM, model.state_dict(), model.config)
    file = export_run(tmp_path, run, monkeypatch, capsys)
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("image,x1,y1,x2,y2\nphoto.png,5,5,30,20\nphoto.png,20,10,45,29\n")
    points = tmp_path / "points.csv"
    points.write_text("image,x,y,label,object\nphoto.png,12,9,1,1\nphoto.png,30,20,1,1\n")
    for number, options in enumerate((["--boxes", boxes], ["--points", points])):
        folder = tmp_path / str(number)
        folder.mkdir()
        inputs = [photo, *options]
        assert_same_predictions(run, file, inputs, folder, monkeypatch, capsys)


@pytest.mark.slow
def test_an_exported_model_of_volumes(tmp_path, monkeypatch, capsys):
    """The volume needs several windows, and the last batch of windows is smaller."""
    config = replace(swin_unetr3d.VARIANTS["mini"], image_size=(64, 32, 32))
    model = randomised(swin_unetr3d.SwinUNETR(config))
    run = write_run(tmp_path / "run", swin_unetr3d.SwinUNETR, model.state_dict(), config)
    file = export_run(tmp_path, run, monkeypatch, capsys)

    values = np.random.default_rng(0).normal(0, 200, (70, 50, 20)).astype(np.float32)
    affine = np.diag([*config.spacing, 1])
    nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "ct.nii.gz")
    inputs = [tmp_path / "ct.nii.gz", "--window-batch", 4]
    assert_same_predictions(run, file, inputs, tmp_path, monkeypatch, capsys)
