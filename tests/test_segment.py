"""`segment`: from an image or a volume to probabilities and mask, equal to predict.py's files."""

import struct
import zlib
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from conftest import command, randomised, write_run
from PIL import ExifTags, Image

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
import universal
import upernet
from imaging import volumes

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(0)
LEVEL = 1 / 65535  # of the probabilities that predict.py writes
CLASS_MAPS = {
    "segformer": (segformer, segformer.SegFormer),
    "upernet": (upernet, upernet.UPerNet),
    "dpt": (dpt, dpt.DPT),
    "beit": (beit, beit.BEiT),
}
TEXTS = {
    "clipseg": (clipseg, clipseg.CLIPSeg),
    "cris": (cris, cris.CRIS),
    "biomedclipseg": (biomedclipseg, biomedclipseg.BiomedCLIPSeg),
}
IMAGE_MODELS = CLASS_MAPS | TEXTS | {"sam_decoder": (sam_decoder, sam_decoder.SAM)}


def make(name, **fields):
    """A small model, all of whose tensors do something."""
    file, kind = IMAGE_MODELS[name]
    return randomised(kind(replace(file.VARIANTS["mini"], **fields)))


def divide(model, probabilities):
    """Set a threshold above which half of the probabilities (those above 0) are."""
    threshold = float(np.median(probabilities[probabilities > 0]))
    model.config = replace(model.config, threshold=threshold)


def photo(size=(70, 90)):
    """Noise in colour (H,W,3) with a bright disc."""
    pixels = RNG.integers(0, 120, (*size, 3), dtype=np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    pixels[(y - 30) ** 2 + (x - 40) ** 2 < 200] += 130
    return pixels


@pytest.fixture
def images(tmp_path):
    """A folder: colour, grey, palette with transparency, turned by EXIF as JPEG and grey TIFF."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.fromarray(photo())
    image.save(folder / "colour.png")
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    image.save(folder / "turned.jpg", exif=turned)
    image.convert("L").save(folder / "greyturned.tif", exif=turned)
    return folder


def predicted(monkeypatch, capsys, run, out, *arguments):
    """{name of an image: (mask, probability)} as predict.py writes them."""
    given = ["--weights", run, "--out", out, "--probabilities", "--device", "cpu"]
    code, _, error = command(monkeypatch, capsys, predict, *given, *arguments)
    assert code == 0, error
    results = {}
    for path in out.glob("*_probability.png"):
        name = path.stem.removesuffix("_probability")
        mask = np.asarray(Image.open(out / f"{name}.png"))
        results[name] = mask, np.asarray(Image.open(path)) / 65535
    return results


def check(probability, mask, expected, thresholds=()):
    """Compare with predict.py: its mask wherever the probability is not at a threshold."""
    expected_mask, expected_probability = expected
    assert probability.shape == expected_probability.shape
    assert np.abs(probability - expected_probability).max() < 0.51 * LEVEL + 1e-5
    near = np.zeros(mask.shape, bool)
    for threshold in thresholds:
        near |= np.abs(probability - threshold) < 1e-5
    assert (mask == expected_mask)[~near].all()


@pytest.mark.parametrize("k", [3, 1])
@pytest.mark.parametrize("name", CLASS_MAPS)
def test_class_maps_equal_those_of_predict(name, k, images, tmp_path, monkeypatch, capsys):
    model = make(name, num_classes=k)
    divide(model, model.segment(images / "colour.png")[0])
    names = ["background", "one", "two"][-k:]
    run = tmp_path / "run"
    write_run(run, type(model), model.state_dict(), model.config, classes=names)
    expected = predicted(monkeypatch, capsys, run, tmp_path / "out", images)
    assert len(expected) == 5
    for path in images.iterdir():
        probabilities, mask = model.segment(path)
        assert probabilities.dtype == np.float32 and mask.dtype == np.uint8
        assert len(probabilities) == k and mask.shape == probabilities.shape[1:]
        shown = mask if k > 1 else mask * 255
        check(probabilities[min(1, k - 1) :].max(0), shown, expected[path.stem])
    assert expected["turned"][0].shape == (90, 70)


@pytest.mark.parametrize("name", TEXTS)
def test_masks_of_a_text_equal_those_of_predict(name, images, tmp_path, monkeypatch, capsys):
    model = make(name)
    divide(model, model.segment(images / "colour.png", "a pink polyp")[0])
    run = tmp_path / "run"
    write_run(run, type(model), model.state_dict(), model.config)
    arguments = ["--prompt", "a pink polyp", images]
    expected = predicted(monkeypatch, capsys, run, tmp_path / "out", *arguments)
    for path in images.iterdir():
        probabilities, mask = model.segment(str(path), "a pink polyp")
        assert probabilities.dtype == np.float32 and mask.dtype == np.uint8
        assert len(probabilities) == 1 and mask.max() == 1
        check(probabilities[0], mask * 255, expected[path.stem])
    other, _ = model.segment(path, "the liver")
    assert not np.array_equal(other, probabilities)


@pytest.fixture(scope="module")
def sam():
    torch.manual_seed(0)
    model = sam_decoder.SAM(replace(sam_decoder.VARIANTS["mini"], image_size=64)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_masks_of_boxes_equal_those_of_predict(sam, images, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", sam_decoder.SAM, sam.state_dict(), sam.config)
    boxes = [[10, 20, 60, 55], [30.5, 2, 66, 40]]
    lines = ["image,x0,y0,x1,y1"]
    for path in images.iterdir():
        lines += [",".join([path.name, *map(str, box)]) for box in boxes]
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    arguments = ["--boxes", tmp_path / "boxes.csv", images]
    expected = predicted(monkeypatch, capsys, run, tmp_path / "out", *arguments)
    for path in images.iterdir():
        probabilities, masks = sam.segment(path, boxes)
        assert probabilities.dtype == np.float32 and masks.dtype == np.uint8
        assert masks.shape == probabilities.shape and len(masks) == 2
        together = probabilities.max(0), masks.max(0) * 255
        check(*together, expected[path.stem], [sam.config.threshold])


def test_prompts_of_every_form_mean_what_the_decoder_is_given(sam):
    image = Image.fromarray(photo((64, 64)))  # its pixels are those of the square
    pixels = sam.preprocess(image)[None]
    boxes = torch.tensor([[[10.0, 20, 60, 55], [30, 2, 50, 40]]])
    points = torch.tensor([[[[20.0, 30], [5, 5]], [[40, 9], [60, 60]]]])
    labels = torch.tensor([[[1, 0], [1, -1]]])

    def given(**prompts):
        with torch.no_grad():
            masks, _ = sam(pixels, **prompts)
        return sam.postprocess(masks[0, :, 0], (64, 64)).numpy()

    calls = [
        (given(boxes=boxes), {"boxes": boxes[0]}),
        (given(boxes=boxes[:, :1]), {"boxes": boxes[0, 0].tolist()}),
        (given(points=points, labels=labels), {"points": points[0], "labels": labels[0]}),
        (
            given(points=points[:, :1], labels=labels[:, :1]),
            {"points": points[0, 0].numpy(), "labels": [1, 0]},
        ),
        (
            given(points=points[:, :1, :1], labels=torch.ones(1, 1, 1)),
            {"points": points[0, 0, 0].tolist()},
        ),
        (
            given(boxes=boxes, points=points, labels=labels),
            {"boxes": boxes[0], "points": points[0], "labels": labels[0]},
        ),
    ]
    for expected, prompts in calls:
        probabilities, masks = sam.segment(image, **prompts)
        assert np.abs(probabilities - expected).max() < 1e-5
        assert np.array_equal(masks, probabilities > sam.config.threshold)
    for nothing in ([], np.zeros((0, 4))):
        assert sam.segment(image, nothing)[1].shape == (0, 64, 64)


WRONG_PROMPTS = {
    "none": ({}, "no prompt: segment takes boxes, points or both"),
    "labels alone": ({"boxes": [1, 2, 3, 4], "labels": [1]}, "labels belong to points"),
    "three numbers": ({"boxes": [1, 2, 3]}, r"boxes are of shape \(1, 3\), expected \(Q,4\)"),
    "outside": ({"boxes": [0, 0, 91, 5]}, "not within the image of 90 x 70 pixels"),
    "inverted": ({"boxes": [9, 9, 3, 3]}, "inverted"),
    "one number": ({"points": [3]}, r"points are of shape \(1, 1, 1\)"),
    "a label too few": ({"points": [[1, 1], [2, 2]], "labels": [1]}, "one for each point"),
    "label 7": ({"points": [1, 1], "labels": [7]}, "labels must be 1 inside"),
    "two and one": ({"boxes": [[1, 2, 3, 4]] * 2, "points": [5, 5]}, "2 boxes and points of 1"),
}


@pytest.mark.parametrize("kind", WRONG_PROMPTS)
def test_wrong_prompts_are_a_line(kind, sam):
    prompts, message = WRONG_PROMPTS[kind]
    with pytest.raises(ValueError, match=message) as caught:
        sam.segment(Image.fromarray(photo()), **prompts)
    assert "\n" not in str(caught.value)


def test_one_text_at_a_time():
    with pytest.raises(TypeError, match="prompt must be one text, not list"):
        make("cris").segment(Image.fromarray(photo()), ["a polyp", "a fold"])


# --- images --------------------------------------------------------------------------------------


def test_a_pil_image_is_taken_as_it_is(images):
    model = make("segformer", num_classes=3)
    path = images / "turned.jpg"
    stored, _ = model.segment(Image.open(path))
    upright, _ = model.segment(path)
    assert stored.shape == (3, 70, 90) and upright.shape == (3, 90, 70)
    again, _ = model.segment(Image.open(images / "colour.png"))
    assert np.array_equal(again, model.segment(images / "colour.png")[0])


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_what_is_no_photo_is_refused(name, tmp_path):
    """By the name of the file, or by what to pass instead."""
    file, _ = IMAGE_MODELS[name]
    deep = tmp_path / "deep.png"
    Image.fromarray(RNG.integers(0, 4000, (40, 50), dtype=np.uint16)).save(deep)
    with pytest.raises(ValueError, match="deep.png: has 16 bits a channel"):
        file.open_upright(deep)
    pages = [Image.fromarray(photo()) for _ in range(2)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ValueError, match="stack.tif: holds 2 pages"):
        file.open_upright(str(tmp_path / "stack.tif"))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match="text.png"):
        file.open_upright(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        file.open_upright(tmp_path / "nowhere.png")

    preprocess, config = file.preprocess, file.VARIANTS["mini"]
    for wrong in photo(), torch.zeros(3, 9, 9), "a.png", tmp_path / "a.png", None:
        message = f"preprocess takes a PIL image, not {type(wrong).__name__}; use Image.open"
        with pytest.raises(TypeError, match=message):
            preprocess(wrong, config)


def test_sixteen_bit_colours_are_refused(tmp_path):
    """Pillow reads them as 8 bits, so that dark ones would come out black."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + RNG.integers(0, 255, 5 * 6, dtype=np.uint8).tobytes() for _ in range(4))
    head = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert Image.open(path).mode == "RGB"
    with pytest.raises(ValueError, match="deep.png: has 16 bits a channel"):
        segformer.open_upright(path)


def test_the_mode_of_every_module_stays(images):
    """Also where the model fails, and where a part of it is in another mode than the rest."""
    model = make("cris", dropout=0.5).train()
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    assert len({*modes}) == 2
    first, _ = model.segment(images / "colour.png", "a polyp")
    second, _ = model.segment(images / "colour.png", "a polyp")
    assert np.array_equal(first, second)  # no dropout
    assert [module.training for module in model.modules()] == modes

    model.postprocess = None
    with pytest.raises(TypeError):
        model.segment(images / "colour.png", "a polyp")
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


# --- volumes -------------------------------------------------------------------------------------

AFFINE = np.diag([4.0, 4.2, 5.0, 1])  # RAS
AFFINE[:3, 3] = -80, -50, 30


def body(channels=1):
    """HU int16 (40,28,24), or so many channels, of two blocks in a body in air."""
    x = np.full((40, 28, 24), -1000, np.int16)
    x[4:36, 4:24, 2:22] = 0
    x[8:14, 8:16, 6:16] = 80
    x[20:32, 10:22, 6:18] = 160
    x = x + RNG.integers(-20, 20, x.shape, np.int16)
    return np.stack([x] * channels, 3) if channels > 1 else x


def store(path, array, codes):
    """Write a volume whose axes are stored in this order, as "LPS"."""
    wanted = nibabel.orientations.axcodes2ornt(codes)
    image = nibabel.Nifti1Image(array, AFFINE)
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(AFFINE), wanted)
    nibabel.save(image.as_reoriented(turn), path)
    return path


SMALL = {"image_size": (64, 32, 32), "spacing": (4.0, 4.0, 4.0)}
VOLUME_MODELS = {
    "softmax": (swin_unetr3d.SwinUNETR, {}, "swin_unetr3d"),
    "one class": (swin_unetr3d.SwinUNETR, {"num_classes": 1}, "swin_unetr3d"),
    "overlapping": (
        swin_unetr3d.SwinUNETR,
        {"overlapping": True, "intensity": None, "in_channels": 2, "classes": ("none", *"abc")},
        "swin_unetr3d",
    ),
    "universal": (universal.UniversalSwinUNETR, {}, "universal"),
    "fewshot3d": (fewshot3d.AttentionUniversal, {}, "fewshot3d"),
}


@pytest.fixture(scope="module", params=VOLUME_MODELS)
def volume_run(request, tmp_path_factory):
    """A small model of volumes and its run folder."""
    kind, fields, family = VOLUME_MODELS[request.param]
    variants = swin_unetr3d.VARIANTS
    if family != "swin_unetr3d":
        variants = {"universal": universal.UNIVERSAL_VARIANTS, "fewshot3d": fewshot3d.VARIANTS}
        variants = variants[family]
        fields = {"num_classes": 2, "classes": ("background", "liver", "spleen")}
    model = randomised(kind(replace(variants["mini"], **SMALL | fields)))
    folder = tmp_path_factory.mktemp("run") / "run"
    channels = model.config.in_channels
    path = store(folder.parent / "ct.nii.gz", body(channels), "RAS")
    divide(model, volumes.segment(model, path)[0])
    write_run(folder, kind, model.state_dict(), model.config, model=family)
    return SimpleNamespace(model=model, folder=folder, config=model.config)


def test_a_volume_equals_what_predict_writes(volume_run, tmp_path, monkeypatch, capsys):
    model, config = volume_run.model, volume_run.config
    path = store(tmp_path / "ct.nii.gz", body(config.in_channels), "LSA")
    arguments = ["--weights", volume_run.folder, "--out", tmp_path / "out", "--probabilities"]
    code, _, error = command(monkeypatch, capsys, predict, *arguments, "--device", "cpu", path)
    assert code == 0, error

    model.train()
    probabilities, labels, affine = volumes.segment(model, path)
    assert model.training
    model.eval()
    written = nibabel.load(tmp_path / "out" / "ct_probability.nii.gz")
    assert np.array_equal(affine, written.affine)
    assert probabilities.dtype == np.float32 and labels.dtype == np.uint8
    assert probabilities.shape[1:] == written.shape == (40, 24, 28)
    first = 0 if config.overlapping or config.num_classes == 1 else 1
    assert np.abs(probabilities[first:].max(0) - written.get_fdata()).max() < 1e-6

    files = [tmp_path / "out" / "ct.nii.gz"]
    if config.overlapping:
        names = config.classes[1:] or [f"class_{k}" for k in range(1, config.num_classes)]
        files = [tmp_path / "out" / f"ct_{name}.nii.gz" for name in names]
    maps = np.stack([np.asarray(nibabel.load(file).dataobj) for file in files])
    assert np.array_equal(labels, maps if config.overlapping else maps[0])
    assert len(np.unique(labels)) > 1


def test_channels_in_several_files_and_some_classes(volume_run, tmp_path):
    model, config = volume_run.model, volume_run.config
    array = body(config.in_channels)
    whole, _, affine = volumes.segment(model, str(store(tmp_path / "a.nii", array, "RAS")))
    assert np.abs(affine - AFFINE).max() < 1e-5  # float32 in the file
    with pytest.raises(ValueError, match=r"a.nii: \d channels, the model takes"):
        volumes.segment(model, [tmp_path / "a.nii"] * 2)
    if config.in_channels == 2:
        parts = [store(tmp_path / f"{c}.nii", array[..., c], "RAS") for c in range(2)]
        assert np.array_equal(volumes.segment(model, parts)[0], whole)
    if not hasattr(model, "add_class"):
        with pytest.raises(ValueError, match="classes: this model finds all of its classes at"):
            volumes.segment(model, tmp_path / "a.nii", classes=["liver"])
        return
    some, labels, _ = volumes.segment(model, tmp_path / "a.nii", classes=["spleen"])
    assert some.shape == labels.shape == (1, 40, 28, 24)
    assert np.abs(some[0] - whole[1]).max() < 1e-5
    with pytest.raises(ValueError, match="classes: the model has no lung, only liver, spleen"):
        volumes.segment(model, tmp_path / "a.nii", classes=["lung"])


def test_what_is_no_volume_is_refused():
    config = swin_unetr3d.VARIANTS["mini"]
    for wrong in body(), "ct.nii.gz", None:
        message = f"preprocess takes a tensor .C,D,H,W., not {type(wrong).__name__}"
        with pytest.raises(TypeError, match=message):
            swin_unetr3d.preprocess(wrong, config)
    with pytest.raises(ValueError, match=r"not \(4, 5, 6\); volume\[None\] adds C"):
        swin_unetr3d.preprocess(torch.zeros(4, 5, 6), config)
