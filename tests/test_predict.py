"""predict.py: masks for images of every kind, and what is refused."""

import json

import numpy as np
import pytest
import torch
from conftest import command, contents, write_run
from PIL import Image

import cris
import predict
import sam_decoder
import segformer
from imaging import atomic_files, image_files

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A CRIS as a plain checkpoint, not a run folder."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "cris.pth"
    torch.save({"state_dict": cris.CRIS(cris.VARIANTS["mini"]).state_dict()}, path)
    return path


@pytest.fixture
def images(tmp_path):
    """A folder with a colour, a grey, a transparent and a 16-bit image, of different sizes."""
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / "colour.jpg")
    Image.fromarray(rng.integers(0, 255, (50, 40), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 255, (33, 61, 4), dtype=np.uint8)).save(folder / "alpha.png")
    Image.fromarray(rng.integers(0, 4000, (64, 64), dtype=np.uint16)).save(folder / "deep.tif")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_of_images_becomes_masks_of_their_sizes(
    images, weights, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "masks"
    code, said, err = command(
        monkeypatch, capsys, predict, images, "--model", "cris", "--weights", weights,
        "--prompt", "a polyp", "--out", out, "--overlays", "--probabilities", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "4 masks" in said
    assert len(list(out.glob("*.png"))) == 12
    model = cris.CRIS.from_pretrained(weights)
    for name, size in {
        "colour": (90, 70),
        "grey": (40, 50),
        "alpha": (61, 33),
        "deep": (64, 64),
    }.items():
        mask = Image.open(out / f"{name}.png")
        assert mask.size == size and mask.mode == "L" and set(np.unique(mask)) <= {0, 255}
        probability = np.asarray(Image.open(out / f"{name}_probability.png")) / 65535
        near = np.abs(probability - model.config.threshold) < 1e-4
        assert ((probability > model.config.threshold) == (np.asarray(mask) > 0))[~near].all()
        assert Image.open(out / f"{name}_overlay.png").size == size


def test_a_prompt_changes_the_mask_s_probabilities(images, weights, tmp_path, monkeypatch, capsys):
    seen = []
    for prompt in ("a polyp", "the tumour on the left"):
        out = tmp_path / prompt[:3]
        common = ["--model", "cris", "--weights", weights, "--prompt", prompt, "--probabilities"]
        code, _, err = command(
            monkeypatch,
            capsys,
            predict,
            images / "colour.jpg",
            *common,
            "--out",
            out,
            "--device",
            "cpu",
        )
        assert code == 0, err
        seen.append(np.asarray(Image.open(out / "colour_probability.png")))
    assert not np.array_equal(*seen)


REFUSED = {
    "no such image": (["nowhere.png", "--prompt", "a"], "nowhere.png: no such image or folder"),
    "a text is missing": (["{images}"], 'images need --prompt "a text"'),
    "a type is no text": (["{images}", "--prompt", "p6"], "prompt types belong to data sets"),
    "one name twice": (
        ["{images}", "{images}/grey.png", "--prompt", "a"],
        "two inputs have the same name",
    ),
    "truncated": (["{broken}", "--prompt", "a"], "broken.jpg: not readable as an image"),
    "no images": (["{empty}", "--prompt", "a"], "no images in this folder"),
    "several pages": (["{stack}", "--prompt", "a"], "stack.tif: holds 2 pages or"),
    "no such device": (["{images}", "--prompt", "a", "--device", "cuda:9"], "not on this machine"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_user_did_wrong_is_one_line(kind, images, weights, tmp_path, monkeypatch, capsys):
    broken, empty = tmp_path / "broken.jpg", tmp_path / "empty"
    broken.write_bytes((images / "colour.jpg").read_bytes()[:-400])
    empty.mkdir()
    stack, page = tmp_path / "stack.tif", Image.new("L", (40, 50))
    page.save(stack, save_all=True, append_images=[page])
    places = {"images": images, "broken": broken, "empty": empty, "stack": stack}
    words, message = REFUSED[kind]
    words = [word.format(**places) for word in words]
    common = ["--model", "cris", "--weights", weights, "--out", tmp_path / "masks"]
    code, _, err = command(monkeypatch, capsys, predict, *words, *common)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "masks").exists()


def test_an_empty_out_is_not_the_current_folder(images, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = ["--model", "cris", "--weights", weights, images, "--prompt", "a", "--out", ""]
    code, _, err = command(monkeypatch, capsys, predict, *given)
    assert code == 2 and "--out is empty" in err and err.count("\n") == 1, err
    assert not any((tmp_path / "here").iterdir())


def test_pixels_that_are_no_numbers_are_said_once(weights, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, value in {"a": np.nan, "b": 0.5, "c": np.inf}.items():
        image = np.random.default_rng(0).random((40, 50), np.float32)
        image[:3] = value
        Image.fromarray(image).save(folder / f"{name}.tif")
    code, said, _ = command(
        monkeypatch, capsys, predict, folder, "--model", "cris", "--weights", weights,
        "--prompt", "a", "--out", tmp_path / "masks", "--device", "cpu",
    )  # fmt: skip
    assert code == 0 and said.count("NaN") == 1
    assert "2 images (a.tif, c.tif) with NaN or infinite pixels, read as 0\n" in said


def test_weights_must_say_or_be_told_what_they_are(images, weights, tmp_path, monkeypatch, capsys):
    code, _, err = command(
        monkeypatch,
        capsys,
        predict,
        images,
        "--weights",
        weights,
        "--prompt",
        "a",
        "--out",
        tmp_path / "m",
    )
    assert code == 2 and "--model is missing" in err
    missing = tmp_path / "mistyped"
    code, _, err = command(
        monkeypatch, capsys, predict, images, "--weights", missing, "--out", tmp_path / "m"
    )
    assert (code, err) == (2, f"error: {missing}: no such run folder or file of weights\n")
    code, _, err = command(
        monkeypatch, capsys, predict, images, "--model", "cris", "--weights", images,
        "--prompt", "a", "--out", tmp_path / "m",
    )  # fmt: skip
    assert code == 2 and "best.safetensors" in err and err.count("\n") == 1


def test_a_data_set_needs_its_prompts(demo, weights, tmp_path, monkeypatch, capsys):
    common = ["--model", "cris", "--weights", weights, "--out", tmp_path / "m", "--device", "cpu"]
    code, _, err = command(monkeypatch, capsys, predict, demo, *common)
    assert code == 2 and "--prompt is missing" in err
    code, _, err = command(
        monkeypatch, capsys, predict, demo, "--prompt", "p6", "--split", "val", *common
    )
    assert code == 0, err
    names = {f"{item['mask_name']}" for item in json.loads((demo / "anns/val.json").read_text())}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names | {"measurements.csv"}


def test_two_at_once_do_not_share_a_folder(images, weights, tmp_path, monkeypatch, capsys):
    out = tmp_path / "masks"
    with atomic_files.claim_folder(out):
        code, _, error = command(
            monkeypatch, capsys, predict, images, "--model", "cris", "--weights", weights,
            "--prompt", "a", "--out", out,
        )  # fmt: skip
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert code == 2 and error.count("\n") == 1
    assert f"{out}: another process is writing to this folder" in error


# --- where files are written ----------------------------------------------------------------------


def tried(monkeypatch, capsys, *arguments) -> str:
    """The one line that predict.py refuses with."""
    code, _, err = command(monkeypatch, capsys, predict, *arguments, "--device", "cpu")
    assert code == 2 and err.count("\n") == 1, err
    return err


def write_listing(root, name, folders=("images", "masks")):
    """A data set of one entry, whose image and mask have this name."""
    (root / "anns").mkdir(parents=True)
    entry = {"img_name": name, "mask_name": name, "prompts": {"p1": "polyp"}}
    (root / "anns/test.json").write_text(json.dumps([entry]))
    for folder in folders:
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "grey").save(path)
    return root


@pytest.mark.parametrize("name", ["{}/labels/a.jpg", "../labels/a.jpg"])
def test_nothing_is_written_beside_the_truth(name, weights, tmp_path, monkeypatch, capsys):
    (tmp_path / "labels").mkdir()
    root = write_listing(tmp_path / "set", name.format(tmp_path))
    before = contents(tmp_path)
    given = ["--model", "cris", "--weights", weights, "--prompt", "p1", root]
    given += ["--out", tmp_path / "deep" / "out"]
    message = tried(monkeypatch, capsys, *given)
    assert "test.json, entry 0: img_name" in message and "labels/a.jpg" in message
    assert contents(tmp_path) == before


def test_links_in_out_do_not_lead_out_of_it(weights, tmp_path, monkeypatch, capsys):
    root = write_listing(tmp_path / "set", "g/a.png")
    given = ["--model", "cris", "--weights", weights, "--prompt", "p1", root]
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "g").symlink_to(elsewhere)
    message = tried(monkeypatch, capsys, *given, "--out", out)
    assert f"{out}/g/a.png: lies outside --out {out}" in message and str(elsewhere) in message
    (out / "g").unlink()
    (out / "g").mkdir()
    (out / "g/a.png").symlink_to(out / "nowhere.png")
    assert "g/a.png exists already" in tried(monkeypatch, capsys, *given, "--out", out)
    assert not list(elsewhere.iterdir()) and not (out / "nowhere.png").exists()

    # --out itself may be a link.
    (tmp_path / "link").symlink_to(elsewhere)
    code, _, err = command(monkeypatch, capsys, predict, *given, "--out", tmp_path / "link")
    assert code == 0, err
    assert [path.as_posix() for path in elsewhere.rglob("*.png")] == [f"{elsewhere}/g/a.png"]


@pytest.mark.parametrize(
    "names, said",
    [
        (["a.png", "../a.png"], "../a.png: lies outside --out"),
        (["a/b.png", "a/../../b.png"], "lies outside --out"),
        (["a.png", "a.png"], "a.png would be written twice"),
        (["a.png", "g/../a.png"], "a.png would be written twice"),
        (["a.png", "a.png/b.png"], "would be a file and a folder"),
        (["a.png", "old.png"], "old.png exists already"),
    ],
)
def test_outputs_are_new_different_and_inside(names, said, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.png").write_text("old")
    with pytest.raises(ValueError, match=said):
        predict.check_outputs([out / name for name in names], out)
    predict.check_outputs([out / "a.png", out / "g/a.png", out / "g/h/a.png"], out)


@pytest.fixture
def class_run(tmp_path):
    """A run of a SegFormer with three classes."""
    torch.manual_seed(0)
    config = segformer.VARIANTS["mini"]
    config = type(config)(**vars(config) | {"num_classes": 3})
    state = segformer.SegFormer(config).state_dict()
    names = ["background", "one", "two"]
    return write_run(tmp_path / "run", segformer.SegFormer, state, config, classes=names)


@pytest.mark.parametrize("image", ["legend.png", "a.png"])
@pytest.mark.parametrize("old", ["legend.png", "classes.json", None])
def test_the_legend_overwrites_nothing(image, old, class_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 30), "grey").save(tmp_path / "in" / image)
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / old).write_text("mine")
    before = contents(tmp_path)
    given = ["--weights", class_run, "--out", out, tmp_path / "in"]
    if old or image == "legend.png":
        message = tried(monkeypatch, capsys, *given)
        assert "legend.png" in message or "classes.json exists already" in message
        assert contents(tmp_path) == before
    else:
        code, _, err = command(monkeypatch, capsys, predict, *given, "--device", "cpu")
        assert code == 0, err
        names = {"a.png", "classes.json", "legend.png", "measurements.csv"}
        assert {path.name for path in out.iterdir()} == names


# --- prompts and boxes ----------------------------------------------------------------------------


def test_prompt_types_are_read_in_any_case(demo, weights, tmp_path, monkeypatch, capsys):
    masks = []
    for prompt in ("p6", " P6 "):
        out = tmp_path / str(len(masks))
        given = ["--weights", weights, "--prompt", prompt, "--split", "val", "--out", out, demo]
        given += ["--probabilities", "--model", "cris", "--device", "cpu"]
        code, _, err = command(monkeypatch, capsys, predict, *given)
        assert code == 0, err
        masks.append(contents(out))
    assert masks[0] == masks[1]
    message = tried(monkeypatch, capsys, *given, "--prompt", "p6 p1")
    assert "--prompt 'p6 p1': write prompt types like p6 or p6,p1" in message


def test_a_prompt_that_is_cut_is_said(images, weights, tmp_path, monkeypatch, capsys):
    for count, out in ((15, tmp_path / "a"), (16, tmp_path / "b")):
        given = ["--model", "cris", "--weights", weights, "--prompt", "red " * count]
        given += ["--out", out, "--device", "cpu", images / "grey.png"]
        code, said, err = command(monkeypatch, capsys, predict, *given)
        assert code == 0, err
        assert ("1 of 1 texts are cut at the model's 17 tokens" in said) == (count == 16), said


def test_boxes_belong_to_one_of_the_files_of_a_name(tmp_path, monkeypatch, capsys):
    """Two patients, each with a slice0.png, of different sizes."""
    torch.manual_seed(0)
    config = type(sam_decoder.VARIANTS["mini"])(
        **vars(sam_decoder.VARIANTS["mini"]) | {"image_size": 64}
    )
    model = sam_decoder.SAM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    run = write_run(tmp_path / "run", sam_decoder.SAM, model.state_dict(), config)

    root, sizes, entries = tmp_path / "set", {"g": (48, 64), "h": (30, 40)}, []
    (root / "anns").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for folder, size in sizes.items():
        name = f"{folder}/slice0.png"
        entries.append({"img_name": name, "mask_name": name, "prompts": {}})
        for kind in ("images", "masks"):
            (root / kind / folder).mkdir(parents=True)
            noise = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / kind / name)
    (root / "anns/test.json").write_text(json.dumps(entries))

    sheet, header = tmp_path / "boxes.csv", "image,x0,y0,x1,y1\n"
    given = ["--weights", run, "--boxes", sheet, "--probabilities", root]
    sheet.write_text(header + "slice0.png,5,5,20,20\n")
    message = tried(monkeypatch, capsys, *given, "--out", tmp_path / "no")
    assert "boxes.csv, line 2: slice0.png fits 2 images" in message
    assert "g/slice0.png, h/slice0.png" in message and not (tmp_path / "no").exists()

    for separator in "/\\":
        out = tmp_path / f"out{ord(separator)}"
        # The second box lies outside the other image.
        lines = "h/slice0.png,5,5,20,20\ng/slice0.png,30,10,60,45\n"
        sheet.write_text(header + lines.replace("/", separator))
        code, _, err = command(monkeypatch, capsys, predict, *given, "--out", out)
        assert code == 0, err
        for folder, box in (("h", (5, 5, 20, 20)), ("g", (30, 10, 60, 45))):
            size = sizes[folder]
            pixels = image_files.read_image(root / "images" / folder / "slice0.png")
            with torch.no_grad():
                image = model.preprocess(Image.fromarray(pixels))[None]
                frame = model.to_input_pixels(torch.tensor(box, dtype=torch.float32), size)
                logits, _ = model(image, boxes=frame[None, None])
            expected = model.postprocess(logits[0, 0], size)[0].numpy()
            picture = Image.open(out / folder / "slice0_probability.png")
            np.testing.assert_allclose(np.asarray(picture) / 65535, expected, atol=1e-4)
