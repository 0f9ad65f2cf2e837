"""prepare.py boxes: from masks as predict.py writes them to a file of prompts for SAM."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import command, rows
from PIL import Image

import data
import prepare
import sam_decoder
from imaging import boxes_and_points, image_files, layouts, pictures
from recipes import sam

NAMES = {"0": "background", "1": "stomach", "2": "small bowel"}
CORNERS = ("x0", "y0", "x1", "y1")
SAM = replace(sam_decoder.VARIANTS["mini"], image_size=64)


def pieces(size, *rectangles):
    """uint8 (H,W) with (value, x0, y0, x1, y1) filled, both corners inside."""
    mask = np.zeros(size, np.uint8)
    for value, x0, y0, x1, y1 in rectangles:
        mask[y0 : y1 + 1, x0 : x1 + 1] = value
    return mask


def save(path, mask, classes=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(mask) if classes is None else pictures.class_map(mask, classes)
    pictures.save_picture(path, picture)


def found(path):
    """The rows of a file: (image, class, x0, y0, x1, y1)."""
    assert path.read_text().splitlines()[0] == "image,class,x0,y0,x1,y1"
    return [(r["image"], r["class"], *(int(r[key]) for key in CORNERS)) for r in rows(path)]


def run(masks, out, like, *options):
    arguments = ["boxes", str(masks), "--out", str(out), "--like", str(like), *options]
    assert prepare.main(arguments) == 0
    return found(out)


@pytest.fixture
def images(tmp_path):
    """A folder of images whose endings differ."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "a.jpg", "b.png", "c.tif", "d.bmp":
        Image.new("RGB", (40, 30), "grey").save(folder / name)
    return folder


@pytest.fixture
def binary(tmp_path):
    """What predict.py leaves of a binary model with --overlays and --probabilities."""
    folder = tmp_path / "masks"
    save(folder / "a.png", pieces((30, 40), (255, 2, 3, 7, 8), (255, 20, 10, 39, 29)))
    save(folder / "b.png", pieces((30, 40)))  # found nothing
    # 20 pixels, 19 pixels; two pieces that touch at a corner are one
    save(folder / "c.png", pieces((30, 40), (255, 0, 0, 4, 3), (255, 10, 5, 28, 5)))
    save(folder / "d.png", pieces((30, 40), (255, 5, 5, 9, 9), (255, 10, 10, 12, 14)))
    for name in "a_overlay", "a_probability", "legend":
        save(folder / f"{name}.png", np.full((30, 40, 3), 255, np.uint8))
    return folder


BINARY = [
    ("a.jpg", "", 2, 3, 7, 8),
    ("a.jpg", "", 20, 10, 39, 29),
    ("c.tif", "", 0, 0, 4, 3),
    ("d.bmp", "", 5, 5, 12, 14),
]


def test_binary_masks_of_a_folder_of_images(binary, images, tmp_path, capsys):
    assert run(binary, tmp_path / "boxes.csv", images) == BINARY
    said = f"{tmp_path / 'boxes.csv'}: 4 boxes in 3 images, of 4 masks\n"
    assert capsys.readouterr().out == said
    least = run(binary, tmp_path / "least.csv", images, "--min-area", "19")
    assert [row for row in least if row not in BINARY] == [("c.tif", "", 10, 5, 28, 5)]
    most = run(binary, tmp_path / "most.csv", images, "--min-area", "41")
    assert most == [("a.jpg", "", 20, 10, 39, 29)]


def test_boxes_are_read_back(binary, images, tmp_path):
    run(binary, tmp_path / "boxes.csv", images)
    sizes = {path.name: image_files.read_image(path).shape[:2] for path in images.iterdir()}
    read = boxes_and_points.read_boxes(tmp_path / "boxes.csv", sizes, ["polyp"])
    assert read.keys() == {"a.jpg", "c.tif", "d.bmp"}  # b has none
    flat = [(i, row.name or "", *row.xy.tolist()) for i in read for row in read[i]]
    assert flat == BINARY
    # and they are the components' own
    mask = (image_files.read_mask(binary / "a.png") > 127).astype(np.uint8)
    expected = [component.box.tolist() for component in boxes_and_points.components(mask, [1])]
    assert [row.xy.tolist() for row in read["a.jpg"]] == expected


def class_maps(folder):
    # stomach in two pieces and bowel around the first; 255 is no class
    mask = pieces((30, 40), (2, 0, 0, 14, 14), (1, 3, 3, 9, 9), (1, 30, 20, 39, 29))
    save(folder / "case1_slice1.png", mask, 3)
    save(folder / "case1_slice2.png", pieces((30, 40)), 3)
    (folder / "classes.json").write_text(json.dumps(NAMES))
    save(folder / "legend.png", np.full((9, 9, 3), 255, np.uint8))
    return [
        ("case1_slice1.tif", "stomach", 3, 3, 9, 9),
        ("case1_slice1.tif", "stomach", 30, 20, 39, 29),
        ("case1_slice1.tif", "small bowel", 0, 0, 14, 14),
    ]


def test_class_maps_of_a_data_set(tmp_path):
    """Images and masks have different endings; the masks are named like the set's masks."""
    expected = class_maps(tmp_path / "predicted")
    for split in "train", "val", "test":
        for kind, ending in ("images", "tif"), ("masks", "png"):
            for k in 1, 2:
                path = tmp_path / "set" / split / kind / f"case{'tvt'.find(split[0])}"
                path = path.with_name(f"case{1 if split == 'test' else 2}_slice{k}.{ending}")
                save(path, pieces((30, 40)))
    (tmp_path / "set" / "classes.json").write_text(json.dumps(NAMES))
    assert run(tmp_path / "predicted", tmp_path / "a.csv", tmp_path / "set") == expected
    assert run(tmp_path / "predicted", tmp_path / "b.csv", f"{tmp_path / 'set'}:test") == expected
    sizes = {"case1_slice1.tif": (30, 40)}
    read = boxes_and_points.read_boxes(tmp_path / "a.csv", sizes, ["stomach", "small bowel"])
    assert [row.name for row in read["case1_slice1.tif"]] == ["stomach"] * 2 + ["small bowel"]


def test_two_classes_and_pixels_that_do_not_count(images, tmp_path):
    mask = pieces((30, 40), (1, 0, 0, 9, 9), (255, 4, 0, 4, 9))  # 255 parts it in two
    save(tmp_path / "masks" / "a.png", mask)
    (tmp_path / "masks" / "classes.json").write_text('{"0": "background", "1": "fluid"}')
    expected = [("a.jpg", "fluid", 0, 0, 3, 9), ("a.jpg", "fluid", 5, 0, 9, 9)]
    assert run(tmp_path / "masks", tmp_path / "boxes.csv", images) == expected


def test_masks_of_prompts_name_their_image(demo, tmp_path):
    """Several masks of one image, as of a data set with text prompts: here of its other blobs."""
    entries = layouts.read_entries(demo, "other_blob")
    for entry in entries:
        assert entry.name == f"{entry.image.stem}_other"
        (tmp_path / "masks").mkdir(exist_ok=True)
        shutil.copy(entry.mask, tmp_path / "masks" / f"{entry.name}.png")
    boxes = run(tmp_path / "masks", tmp_path / "boxes.csv", f"{demo}:other_blob")
    listed = json.loads((demo / "anns" / "other_blob.json").read_text())
    # its bbox has the ends outside
    expected = {(i["img_name"], *(np.array(i["bbox"]) - [0, 0, 1, 1]).tolist()) for i in listed}
    assert {(image, *box) for image, _, *box in boxes} == expected and len(boxes) == len(entries)


def test_several_folders_and_masks_in_folders(images, tmp_path):
    save(tmp_path / "one" / "a.png", pieces((30, 40), (255, 0, 0, 9, 9)))
    save(tmp_path / "two" / "a.png", pieces((30, 40), (255, 5, 5, 9, 9)))
    (tmp_path / "one" / "legend.png").write_bytes(b"never opened")
    arguments = [tmp_path / "one", tmp_path / "two", "--out", tmp_path / "x.csv", "--like", images]
    assert prepare.main(["boxes", *map(str, arguments)]) == 0
    assert found(tmp_path / "x.csv") == [("a.jpg", "", 0, 0, 9, 9), ("a.jpg", "", 5, 5, 9, 9)]


def test_an_image_may_be_called_overlay(images, tmp_path):
    Image.new("RGB", (40, 30)).save(images / "x_overlay.png")
    save(tmp_path / "masks" / "x_overlay.png", pieces((30, 40), (255, 0, 0, 9, 9)))
    boxes = run(tmp_path / "masks", tmp_path / "boxes.csv", images)
    assert boxes == [("x_overlay.png", "", 0, 0, 9, 9)]


def test_turned_photographs(images, tmp_path):
    """predict.py's masks are upright, the camera's file is not; square ones would hide a turn."""
    for name, size in ("wide", (40, 30)), ("square", (30, 30)):
        picture = Image.new("RGB", size)
        exif = picture.getexif()
        exif[0x0112] = 6  # turn it by 90 degrees
        picture.save(images / f"{name}.jpg", exif=exif)
        shape = image_files.read_image(images / f"{name}.jpg").shape[:2]
        assert shape == size
        save(tmp_path / "masks" / f"{name}.png", pieces(shape, (255, 20, 1, 29, 4)))
    boxes = run(tmp_path / "masks", tmp_path / "boxes.csv", images)
    assert boxes == [(f"{name}.jpg", "", 20, 1, 29, 4) for name in ("square", "wide")]


# --- errors --------------------------------------------------------------------------------------


def unknown(masks, images):
    save(masks / "e.png", pieces((30, 40)))
    return f"{masks / 'e.png'}: no image of this name in {images}"


def other_size(masks, images):
    save(masks / "c.png", pieces((30, 41)))
    return f"{masks / 'c.png'}: 41x30, but its image {images / 'c.tif'} is 40x30"


def truncated(masks, images):
    (masks / "c.png").write_bytes((masks / "c.png").read_bytes()[:60])
    return f"{masks / 'c.png'}: not readable as an image"


def no_names(masks, images):
    save(masks / "c.png", pieces((30, 40), (1, 0, 0, 9, 9)), 3)
    return f"{masks / 'c.png'}: a palette of classes without names; put the classes.json"


def unnamed(masks, images):
    for name in "abcd":
        save(masks / f"{name}.png", pieces((30, 40), (3, 0, 0, 9, 9)), 4)
    (masks / "classes.json").write_text(json.dumps(NAMES))
    return f"{masks / 'a.png'}: holds class number 3, but {masks / 'classes.json'} ends at 2"


def bad_names(masks, images):
    (masks / "classes.json").write_text("[]")
    return f"{masks / 'classes.json'}: expected"


def all_empty(masks, images):
    for name in "abcd":
        save(masks / f"{name}.png", pieces((30, 40)))
    return "4 masks have no component of 20 pixels: no boxes"


def no_masks(masks, images):
    for path in masks.glob("[a-d].png"):
        path.unlink()
    return f"{masks}: no masks in this folder"


def no_folder(masks, images):
    shutil.rmtree(masks)
    return f"{masks}: no such folder of masks"


def no_images(masks, images):
    shutil.rmtree(images)
    return f"--like {images}: no such folder of images or data set"


def same_stem(masks, images):
    shutil.copy(images / "b.png", images / "c.png")
    return f"{images / 'c.tif'}: a second image of this name"


def out_is_there(masks, images):
    (masks.parent / "boxes.csv").write_text("mine")
    return f"{masks.parent / 'boxes.csv'}: exists already"


DEFECTS = [unknown, other_size, truncated, no_names, unnamed, bad_names, all_empty, no_masks]
DEFECTS += [no_folder, no_images, same_stem, out_is_there]


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_one_line_and_write_nothing(
    binary, images, tmp_path, monkeypatch, capsys, defect
):
    said = defect(binary, images)
    before = set(tmp_path.rglob("*"))
    arguments = ["boxes", binary, "--like", images, "--out", tmp_path / "boxes.csv"]
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and text == "" and error.count("\n") == 1, error
    assert error.startswith(f"error: {said}"), error
    assert set(tmp_path.rglob("*")) == before
    if defect is out_is_there:
        assert (tmp_path / "boxes.csv").read_text() == "mine"


@pytest.mark.parametrize("options", ["", "--like x:test", "--like IMAGES --min-area 0"])
def test_wrong_options(binary, images, tmp_path, monkeypatch, capsys, options):
    options = options.replace("IMAGES", str(images)).split()
    arguments = ["boxes", binary, "--out", tmp_path / "boxes.csv", *options]
    code, text, error = command(monkeypatch, capsys, prepare, *arguments)
    assert code == 2 and text == "" and error.count("\n") == 1
    assert not (tmp_path / "boxes.csv").exists()


# --- files of one name in two folders -------------------------------------------------------------


@pytest.fixture
def patients(tmp_path):
    """A data set with a slice0.png of two patients, one of no patient, and a name of its own."""
    root = tmp_path / "patients"
    names = {"g/slice0.png": 2, "h/slice0.png": 12, "slice0.png": 22, "h/slice1.png": 5}
    for name, x0 in names.items():
        save(root / "images" / name, pieces((30, 40)))
        save(root / "masks" / name, pieces((30, 40), (255, x0, 3, x0 + 6, 8)))
    entries = [{"img_name": name, "mask_name": name, "prompts": {}} for name in names]
    (root / "anns").mkdir()
    (root / "anns/test.json").write_text(json.dumps(entries))
    return root


def test_boxes_of_files_of_one_name_are_read_back(patients, tmp_path):
    """prepare.py boxes names what train.py --eval --boxes reads."""
    made = run(patients / "masks", tmp_path / "boxes.csv", patients)
    assert {row[0]: row[2] for row in made} == {
        "g/slice0.png": 2, "h/slice0.png": 12, "./slice0.png": 22, "slice1.png": 5,
    }  # fmt: skip
    dataset = data.open_dataset(layouts.read_entries(patients, "test"), tmp_path / "cache")
    recipe = sam.sam_recipe(sam_decoder.SAM(SAM), sam.PROTOCOLS["default"])
    asking = sam.with_file_prompts(
        recipe, {"test": dataset}, str(tmp_path / "boxes.csv"), None
    ).make_prompts
    for i, x0 in enumerate((2, 12, 22, 5)):
        ((box, _, _),) = asking(dataset.sample(i, ""), source="given boxes")["shown"]
        assert box.tolist() == [x0, 3, x0 + 6, 8]

    sheet = tmp_path / "bare.csv"
    sheet.write_text("image,x0,y0,x1,y1\nslice0.png,1,1,5,5\n")
    with pytest.raises(ValueError, match="bare.csv, line 2: slice0.png fits 3 images; add its"):
        sam.with_file_prompts(recipe, {"test": dataset}, str(sheet), None)
    sheet.write_text("image,x0,y0,x1,y1\nslice1.png,1,1,5,5\n")
    sam.with_file_prompts(recipe, {"test": dataset}, str(sheet), None)


def test_a_box_does_not_say_which_mask_of_an_image_it_is_for(patients, tmp_path):
    entries = layouts.read_entries(patients, "test")
    entries[1] = replace(entries[1], image=entries[0].image)
    dataset = data.open_dataset(entries, tmp_path / "cache")
    sheet = tmp_path / "boxes.csv"
    sheet.write_text("image,x0,y0,x1,y1\nslice1.png,1,1,5,5\n")
    with pytest.raises(ValueError, match="g/slice0.png has 2 masks"):
        sam.with_file_prompts(None, {"test": dataset}, str(sheet), None)


def test_images_of_two_data_sets(patients, tmp_path):
    """Their folders tell the files of one path apart."""
    other = tmp_path / "other"
    shutil.copytree(patients, other)
    images = [
        entry.image for root in (patients, other) for entry in layouts.read_entries(root, "test")
    ]
    names = sam.image_names(images, [str(patients), str(other)])
    assert names[0] == "patients/g/slice0.png" and names[4] == "other/g/slice0.png"
    assert sam.image_names(images[:4], [str(patients)])[0] == "g/slice0.png"
    assert sam.image_names([tmp_path / "x/a.png"], [str(tmp_path / "x")]) == ["a.png"]
