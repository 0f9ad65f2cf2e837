"""prepare.py import: exports of annotation tools, written here in the structure of each tool."""

import base64
import io
import json
from xml.sax.saxutils import quoteattr

import numpy as np
import pytest
from conftest import command, contents
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

import prepare
import train
from preparation import label_studio, shapes

SIZE = (48, 64)  # H, W
TRIANGLE = [[10.0, 5.0], [50.0, 8.0], [30.0, 40.0]]


def rectangle(x0, y0, x1, y1, size=SIZE):
    """bool (H,W), True from x0, y0 up to, not including, x1, y1."""
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def flat(points):
    """[x0, y0, x1, y1, …]"""
    return [value for point in points for value in point]


BOX = [[4, 6], [20, 6], [20, 30], [4, 30]]  # a polygon along the borders of pixels
BOX_MASK = rectangle(4, 6, 20, 30)
RING = rectangle(30, 10, 60, 40) & ~rectangle(40, 15, 50, 35)  # an object with a hole


def photo(path, size=SIZE, **options):
    """A picture of random pixels; the name decides which."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(sum(path.name.encode()))
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(path, **options)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    return folder


@pytest.fixture
def make(monkeypatch, capsys, tmp_path, source):
    """Run `prepare.py import` on the export. Return the status, the output, the errors."""

    def run(*options):
        arguments = ["import", source, "--out", tmp_path / "mine", *options]
        return command(monkeypatch, capsys, prepare, *arguments)

    return run


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """Run `prepare.py check` on what was imported."""
    return lambda: command(monkeypatch, capsys, prepare, "check", tmp_path / "mine")


@pytest.fixture
def masks(tmp_path):
    """Return {image name: mask, uint8 (H,W)} of what was imported, without endings."""

    def read():
        found = {}
        for path in sorted((tmp_path / "mine/masks").iterdir()):
            found[path.stem] = np.asarray(Image.open(path))
        return found

    return read


def entries(root):
    return {p.stem: json.loads(p.read_text()) for p in sorted((root / "anns").iterdir())}


def refused(result, *words):
    """Assert that a command ended with one line on stderr that has the words."""
    status, _, error = result
    assert status == 2 and error.count("\n") == 1, error
    for word in words:
        assert word in error, error


# --- shapes ---------------------------------------------------------------------------------------


def test_polygons_agree_with_pycocotools_within_the_pixels_on_the_outline():
    rng = np.random.default_rng(1)
    H, W = 90, 120
    for count in range(60):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 3 + count % 20))
        radii = rng.uniform(20, 60, len(angles))
        outline = np.stack([60 + radii * np.cos(angles), 45 + radii * np.sin(angles)], 1)
        code = coco_mask.merge(coco_mask.frPyObjects([outline.ravel().tolist()], H, W))
        expected = coco_mask.decode(code) > 0
        mask = shapes.polygon(outline, (H, W))

        edges = np.roll(outline, -1, axis=0) - outline
        perimeter = np.hypot(*edges.T).sum()
        assert (mask ^ expected).sum() <= 0.25 * perimeter
        assert iou(mask, expected) > 0.95


def test_polygons_along_pixel_borders_are_exact():
    assert (shapes.polygon(shapes.points(BOX), SIZE) == BOX_MASK).all()
    assert (shapes.polygon(shapes.points(flat(BOX[::-1])), SIZE) == BOX_MASK).all()
    outside = shapes.points([[-900, 6], [20, 6], [20, 30], [-900, 30]])
    assert (shapes.polygon(outside, SIZE) == rectangle(0, 6, 20, 30)).all()
    everything = shapes.points([[-1e6, -1e6], [1e6, -1e6], [1e6, 1e6], [-1e6, 1e6]])
    assert shapes.polygon(everything, SIZE).all()
    bow = shapes.points([[0, 0], [20, 20], [20, 0], [0, 20]])  # crosses itself: even-odd
    assert shapes.polygon(bow, SIZE)[:20, :20].sum() == pytest.approx(200, abs=20)


def test_ellipses_are_turned_clockwise():
    flat_one = shapes.ellipse((32.0, 24.0, 20.0, 5.0, 0.0), SIZE)
    assert flat_one.sum() == pytest.approx(np.pi * 20 * 5, rel=0.02)
    turned = shapes.ellipse((32.0, 24.0, 20.0, 5.0, 90.0), SIZE)
    assert (turned[4:44, 12:52] == np.rot90(flat_one[4:44, 12:52])).all()
    tilted = shapes.ellipse((32.0, 24.0, 20.0, 5.0, 45.0), SIZE)
    assert tilted[34, 42] and tilted[13, 21] and not tilted[13, 42]  # down to the right
    assert tilted.sum() == pytest.approx(np.pi * 20 * 5, rel=0.02)
    corners = shapes.box_outline((10, 10, 30, 20), 90, (10, 10))
    assert np.allclose(corners, [[10, 10], [10, 30], [0, 30], [0, 10]])


def test_run_lengths_agree_with_pycocotools():
    rng = np.random.default_rng(2)
    for density in (0.02, 0.5, 0.97, 0, 1):
        mask = rng.random((37, 51)) < density
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        counts = shapes.decompress_counts(code["counts"].decode())
        assert (shapes.from_counts(counts, mask.shape, "F") == mask).all()


@pytest.mark.parametrize("text", ["P1000000", "o", "1234", "abc\x7f", "é", "ooooooooooo0"])
def test_damaged_run_lengths_are_errors(text):
    with pytest.raises(ValueError):
        shapes.from_counts(shapes.decompress_counts(text), (5, 7), "F")


# Codes of label_studio_sdk 2.1.2: mask2rle of a mask of 5x7 pixels; and a code with blocks of many
# values, lengths of 2, 3, 5 and 9 bits, and the opacities that its decode_rle returns.
BRUSH = [0, 0, 0, 140, 57, 27, 254, 35, 0, 191, 255, 108, 2, 63, 248, 192, 39, 255, 182, 1, 127]
BRUSH += [255, 15, 128, 0]
BLOCKS = [0, 0, 0, 48, 56, 146, 70, 126, 64, 44, 84, 47, 2, 7, 92, 217, 56, 225, 26, 219, 170, 165]
BLOCKS += [139, 47, 48, 125, 50, 82, 19, 20, 64, 41, 172, 183, 159, 252, 0, 4, 224, 60, 83, 8, 193]
BLOCKS += [254]


def test_brushes_are_unpacked_as_label_studio_does():
    expected = np.zeros((5, 7), bool)
    expected[1:4, 2:6] = True
    expected[2, 3] = False
    assert (label_studio.draw_brush(bytes(BRUSH), (5, 7)) == expected).all()
    opacity = label_studio.unpack(bytes(BLOCKS), 48).reshape(3, 4, 4)[..., 3]
    assert opacity.tolist() == [[200] * 4, [29, 132, 150, 244], [0, 127, 128, 255]]
    drawn = label_studio.draw_brush(bytes(BLOCKS), (3, 4))
    assert drawn[2].tolist() == [False, False, True, True]
    for damaged in (BRUSH[:-8], BRUSH[:4], [0, 0, 1, 140, *BRUSH[4:]], [255] * 30):
        with pytest.raises(ValueError):
            label_studio.draw_brush(bytes(damaged), (5, 7))


# --- COCO -----------------------------------------------------------------------------------------


def coco(names, annotations, categories=("polyp",), size=SIZE):
    """COCO's content: annotations are (number of the image, number of the category, fields)."""
    images = []
    for k, name in enumerate(names):
        images.append({"id": k, "file_name": name, "height": size[0], "width": size[1]})
    items = []
    for k, (image, category, fields) in enumerate(annotations):
        item = {"id": k, "image_id": image, "category_id": category, "iscrowd": 0, "area": 1.0}
        items.append(item | {"bbox": [0, 0, 9, 9]} | fields)
    numbered = [{"id": k, "name": name, "supercategory": ""} for k, name in enumerate(categories)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": items}
    return content | {"categories": numbered}


def outline(*polygons):
    return {"segmentation": [flat(polygon) for polygon in polygons]}


def roboflow(source):
    """Roboflow's COCO export: a folder for each split, and a category that only names the group."""
    for split, n in (("train", 4), ("valid", 2), ("test", 2)):
        names = [f"{split}{k}_jpg.rf.{k}a2b.png" for k in range(n)]
        annotations = []
        for k in range(n):
            photo(source / split / names[k])
            annotations.append((k, 1, outline(TRIANGLE)))
            annotations.append((k, 2, outline([[40, 20], [60, 20], [60, 44], [40, 44]])))
        content = coco(names, annotations, ("findings", "polyp", "tool"))
        content["categories"][1]["supercategory"] = "findings"
        content["categories"][2]["supercategory"] = "findings"
        write_json(source / split / "_annotations.coco.json", content)
    (source / "README.roboflow.txt").write_text("made by a test")


def test_roboflow_folders_become_class_maps_of_the_same_splits(
    make, check, masks, source, tmp_path
):
    roboflow(source)
    before = contents(source)
    status, text, error = make()
    assert status == 0, error
    assert "COCO JSON: 8 images, 16 objects of 2 classes" in text
    assert "objects: polyp 8, tool 8" in text and "overlap in 8 images" in text
    assert contents(source) == before
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert classes == {"0": "background", "1": "polyp", "2": "tool"}
    assert {s: len(items) for s, items in entries(tmp_path / "mine").items()} == {
        "train": 4,
        "val": 2,
        "test": 2,
    }

    reference = COCO(str(source / "valid/_annotations.coco.json"))
    polyp, tool = (reference.annToMask(reference.anns[k]) > 0 for k in (2, 3))
    mask = masks()["valid_valid1_jpg.rf.1a2b"]
    assert iou(mask == 2, tool) == 1
    assert iou(mask == 1, polyp & ~tool) > 0.95
    assert check()[0] == 0

    make("--out", tmp_path / "again")
    assert contents(tmp_path / "mine") == contents(tmp_path / "again")


def test_an_import_can_be_trained_on(make, monkeypatch, capsys, source, tmp_path):
    roboflow(source)
    assert make("--each", "class")[0] == 0
    entry = entries(tmp_path / "mine")["train"][0]
    assert entry["prompts"] == {"p0": "", "p1": "polyp"}
    arguments = ["--model", "clipseg", "--variant", "mini", "--weights", "none", "--prompt", "p1"]
    arguments += ["--data", tmp_path / "mine", "--out", tmp_path / "run", "--size", 64]
    arguments += ["--epochs", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
    status, _, error = command(monkeypatch, capsys, train, *arguments)
    assert status == 0, error
    assert (tmp_path / "run/metrics.csv").is_file()


def test_coco_of_cvat_and_label_studio_with_all_kinds_of_masks(make, masks, source):
    """annotations/instances_default.json and images/; run lengths as CVAT and pycocotools write."""
    names = ["a.png", "sub/b.png", "c.png", "d.png"]
    for name in names:
        photo(source / "images" / name)
    runs = np.flatnonzero(np.diff(np.r_[0, RING.ravel(order="F"), 0]))
    counts = np.diff(np.r_[0, runs, RING.size]).tolist()
    code = coco_mask.encode(np.asfortranarray(RING.astype(np.uint8)))
    plain = {"segmentation": {"size": [*SIZE], "counts": counts}, "iscrowd": 1}
    packed = {"segmentation": {"size": [*SIZE], "counts": code["counts"].decode()}}
    rings = outline([[0, 0], [10, 0], [10, 10], [0, 10]], [[5, 5], [15, 5], [15, 15], [5, 15]])
    content = coco(names, [(0, 0, plain), (1, 0, packed), (2, 0, rings)], ("polyp", "tool"))
    write_json(source / "annotations/instances_default.json", content)

    status, text, error = make()
    assert status == 0, error
    assert "crowd regions, which count as objects: 1" in text
    assert "images without annotations: 1" in text
    mine = masks()
    assert (mine["a"] == RING).all() and (mine["sub_b"] == RING).all()
    assert (mine["c"] == (rectangle(0, 0, 10, 10) | rectangle(5, 5, 15, 15))).all()
    assert not mine["d"].any()


def test_one_coco_file_for_each_split_finds_images_of_the_same_name(make, masks, source, tmp_path):
    for split, polygon in (("train", BOX), ("val", TRIANGLE)):
        photo(source / f"{split}2017" / "0001.png")
        content = coco(["0001.png"], [(0, 0, outline(polygon))])
        write_json(source / f"annotations/instances_{split}2017.json", content)
    status, text, error = make()
    assert status == 0, error
    mine = masks()
    assert (mine["train2017_0001"] == 255 * BOX_MASK).all()
    assert sorted(entries(tmp_path / "mine")) == ["train", "val"]
    assert mine["val2017_0001"].sum() // 255 == pytest.approx(670, rel=0.01)


def test_absolute_paths_are_found_by_file_name_and_counted(make, masks, source):
    photo(source / "images/a.png")
    name = "C:\\Users\\me\\pictures\\a.png"
    write_json(source / "result.json", coco([name], [(0, 0, outline(BOX))]))
    status, text, error = make()
    assert status == 0, error
    assert "found by the file name alone: 1 images" in text
    assert (masks()["a"] == 255 * BOX_MASK).all()


@pytest.mark.parametrize("is_stored", [True, False])
def test_the_size_says_whether_coordinates_are_of_the_stored_photo(make, masks, source, is_stored):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored 64 wide and 48 high, seen turned by 90 degrees to the right
    photo(source / "a.png", exif=exif)
    size = SIZE if is_stored else SIZE[::-1]
    write_json(source / "a.json", coco(["a.png"], [(0, 0, outline(BOX))], size=size))
    status, _, error = make()
    assert status == 0, error
    expected = np.rot90(BOX_MASK, -1) if is_stored else rectangle(4, 6, 20, 30, SIZE[::-1])
    assert (masks()["a"] == 255 * expected).all()


@pytest.mark.parametrize("tool", ["coco", "labelme"])
def test_each_tool_has_its_rule_where_the_size_does_not_decide(make, masks, source, tool):
    exif = Image.Exif()
    exif[0x0112] = 3  # seen turned by half
    photo(source / "a.png", exif=exif)
    if tool == "coco":
        write_json(source / "a.json", coco(["a.png"], [(0, 0, outline(BOX))]))
    else:
        labelme(source / "a.json", [("x", "polygon", BOX, {})], "a.png")
    status, text, error = make()
    assert status == 0, error
    assert ("is stored turned (EXIF)" in text) == (tool == "coco")
    expected = np.rot90(BOX_MASK, 2) if tool == "coco" else BOX_MASK
    assert (masks()["a"] == 255 * expected).all()


def test_an_image_of_another_folder_does_not_replace_a_missing_one(make, source):
    names = ["case1/scan.png", "case2/scan_b.png"]
    photo(source / "images/case2/scan_b.png")
    photo(source / "images/case3/scan.png")
    annotations = [(0, 0, outline(BOX)), (1, 0, outline(BOX))]
    write_json(source / "x.json", coco(names, annotations))
    refused(make(), "x.json, image 0: no image case1/scan.png below")
    write_json(source / "x.json", coco(["/home/me/case1/scan.png", names[1]], annotations))
    assert make()[0] == 0


def test_file_names_of_images_say_nothing_about_splits(make, source, tmp_path):
    for name in ("test_1", "train", "val-2"):
        photo(source / f"{name}.png")
        labelme(source / f"{name}.json", [("x", "polygon", BOX, {})], f"{name}.png")
    assert make()[0] == 0
    assert {s: len(items) for s, items in entries(tmp_path / "mine").items()} == {
        "train": 1,
        "val": 1,
        "test": 1,
    }


def test_outlines_without_three_points_cover_nothing_and_are_counted(make, masks, source):
    photo(source / "a.png")
    fields = {"segmentation": [flat(BOX), [1, 1, 9, 9]]}
    alone = {"segmentation": [[1, 1, 9, 9]]}
    write_json(source / "x.json", coco(["a.png"], [(0, 0, fields), (0, 0, alone)]))
    status, text, _ = make()
    assert status == 0 and "fewer than three points, which cover nothing: 2" in text
    assert "1 images, 1 objects" in text and (masks()["a"] == 255 * BOX_MASK).all()


def test_two_tools_for_the_same_images_need_a_choice(make, source):
    photo(source / "a.png")
    write_json(source / "coco.json", coco(["a.png"], [(0, 0, outline(BOX))]))
    labelme(source / "a.json", [("x", "polygon", BOX, {})], "a.png")
    refused(make(), "2 ways", "--format coco: COCO JSON: 1 images", "--format labelme: LabelMe")
    assert make("--format", "labelme")[0] == 0


FAULTS = [
    ({"segmentation": []}, "annotation 0: has no segmentation, only a box"),
    ({"segmentation": [[1, 2, float("nan"), 4, 5, 6]]}, "nan is far outside of any image"),
    ({"segmentation": [[1, 2, 1e9, 4, 5, 6]]}, "1e+09 is far outside"),
    ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "7 coordinates, an odd number"),
    ({"segmentation": [[100, 100, 120, 100, 120, 130]]}, "lies outside of its image of 64x48"),
    ({"segmentation": {"size": [48, 64], "counts": [0, 10**18]}}, "is not the length of a run"),
    ({"segmentation": {"size": [48, 64], "counts": [-1, 5]}}, "is not the length of a run"),
    ({"segmentation": {"size": [48, 64], "counts": [5, 5]}}, "the runs cover 10 pixels"),
    ({"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}}, "the image has 64x48"),
    ({"segmentation": {"size": [48, 64], "counts": "\x01"}}, "not a run-length code"),
    ({"category_id": 7}, "category_id 7 is not the id of a category"),
    ({"image_id": 7}, "image_id 7 is not the id of an image"),
    ({"image_id": None}, "image_id is null"),
]


@pytest.mark.parametrize("fields, words", FAULTS)
def test_faulty_coco_annotations_are_refused(make, source, tmp_path, fields, words):
    photo(source / "a.png")
    write_json(source / "x.json", coco(["a.png"], [(0, 0, outline(BOX) | fields)]))
    refused(make(), "x.json, annotation 0", words)
    assert not (tmp_path / "mine").exists()


def test_coco_that_does_not_fit_the_folder_is_refused(make, source):
    content = coco(["a.png"], [(0, 0, outline(BOX))])
    write_json(source / "x.json", content)
    refused(make(), "x.json, image 0: no image a.png below")
    photo(source / "a.png", (50, 64))
    refused(make(), "a.png: has 64x50 pixels, but", "x.json, image 0 says 64x48")
    photo(source / "a.png")
    photo(source / "b.png")
    refused(make(), "b.png: not annotated in the COCO JSON", "--skip-unpaired")
    write_json(source / "y.json", content)
    refused(make("--skip-unpaired"), "annotated twice", "x.json, image 0", "y.json, image 0")
    (source / "y.json").write_text('{"images": [')
    refused(make("--skip-unpaired"), "y.json: is not valid JSON")
    (source / "y.json").unlink()
    status, text, _ = make("--skip-unpaired")
    assert status == 0 and "images that are not listed, left out: 1" in text


def test_ambiguous_names_and_options_without_effect_are_refused(make, source):
    photo(source / "one/a.png")
    photo(source / "two/a.png")
    write_json(source / "x.json", coco(["a.png"], [(0, 0, outline(BOX))]))
    refused(make("--skip-unpaired"), "x.json, image 0: a.png may be", "one/a.png and", "two/a.png")
    refused(make("--classes", "a,b"), "--classes: has no effect on COCO JSON")
    write_json(source / "x.json", coco(["a.png"], [(0, 0, outline(BOX))], ("background",)))
    refused(make(), "1 objects of the class background")
    write_json(source / "x.json", coco(["a.png"], []))
    refused(make(), "lists 1 images, but no areas")
    write_json(source / "x.json", coco([], []))
    refused(make(), "x.json: lists no images")
    two = coco(["a.png"], [(0, 0, outline(BOX))], ("polyp", "polyp"))
    write_json(source / "x.json", two)
    refused(make(), "x.json: has two categories polyp")
    write_json(source / "y.json", coco(["b.png"], [], ("tool",)))
    refused(make(), "y.json: category 0 is tool, but polyp in", "x.json")
    write_json(source / "x.json", coco(["a.png"], []) | {"annotations": {}})
    refused(make(), "x.json: annotations is an object, expected a list")
    write_json(source / "x.json", coco([3], []))
    refused(make(), "x.json, image 0: file_name is a number, expected a text")


def test_other_json_is_not_read_as_an_export(make, source):
    photo(source / "images/a.png")
    write_json(
        source / "anns/train.json", [{"img_name": "a.png", "prompts": {"p1": "annotations"}}]
    )
    write_json(source / "classes.json", {"0": "background", "1": "polyp"})
    write_json(source / "dataset.json", {"labels": {}, "images": 3, "annotations": "none"})
    write_json(source / "notes.json", {"info": "shapes and images"})
    (source / "voc.xml").write_text("<annotation><filename>a.png</filename></annotation>")
    (source / "boxes.csv").write_text("image,class,x0,y0,x1,y1\na.png,polyp,1,2,3,4\n")
    (source / "faces.csv").write_text("image,pixels\na.png,70 80 82\n")
    refused(make("--format", "coco"), "not recognised as the format coco")
    for name in ("labelme", "cvat", "label-studio"):
        refused(make("--format", name), f"not recognised as the format {name}")


# --- LabelMe --------------------------------------------------------------------------------------


def png(pixels):
    """A PNG file in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def labelme(path, drawn, image, size=SIZE, data=None):
    """A file as LabelMe 5.5 writes it. drawn: (label, type, points, other fields)."""
    items = []
    for label, kind, points, fields in drawn:
        item = {"label": label, "points": points, "group_id": None, "description": ""}
        items.append(item | {"shape_type": kind, "flags": {}, "mask": None} | fields)
    content = {"version": "5.5.0", "flags": {}, "shapes": items, "imagePath": image}
    write_json(path, content | {"imageData": data, "imageHeight": size[0], "imageWidth": size[1]})


def test_labelme_files_beside_their_images(make, check, masks, source, tmp_path):
    for name in "abcd":
        photo(source / f"train/{name}.png")
    ring = RING[10:40, 30:60]
    drawn = [
        ("liver", "polygon", BOX, {}),
        ("cyst", "rectangle", [[16, 20], [10, 12]], {}),
        ("liver", "mask", [[30.0, 10.0], [59.0, 39.0]], {"mask": png(ring)}),
        ("liver", "linestrip", [[1, 1], [2, 2]], {}),
        ("tip", "point", [[1, 1]], {}),
    ]
    labelme(source / "train/a.json", drawn, "a.png")
    labelme(source / "train/b.json", [("cyst", "circle", [[30, 24], [40, 24]], {})], "b.png")
    labelme(source / "train/c.json", [], "c.png")
    labelme(source / "train/d.json", [("cyst", "polygon", TRIANGLE, {})], "..\\train\\d.png")

    status, text, error = make()
    assert status == 0, error
    assert "LabelMe JSON: 4 images, 5 objects of 2 classes" in text
    assert "shapes that are no areas, skipped: 1 linestrip, 1 point" in text
    assert "images without annotations: 1" in text
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert classes == {"0": "background", "1": "cyst", "2": "liver"}
    mine = masks()
    expected = np.where(BOX_MASK | RING, 2, 0)
    expected[rectangle(10, 12, 16, 20)] = 1
    assert (mine["a"] == expected).all()
    assert mine["b"].sum() == pytest.approx(np.pi * 100, rel=0.02)
    assert mine["b"][24, 39] and not mine["b"][24, 40]
    assert not mine["c"].any()
    assert check()[0] == 0


def test_labelme_groups_are_objects_of_several_parts(make, masks, source):
    photo(source / "a.png")
    group = {"group_id": 3}
    drawn = [
        ("cell", "rectangle", [[0, 0], [4, 4]], group),
        ("cell", "rectangle", [[10, 10], [14, 14]], {}),
        ("cell", "rectangle", [[20, 20], [24, 24]], group),
    ]
    labelme(source / "a.json", drawn, "a.png")
    assert make("--each")[0] == 0
    mine = masks()
    assert sorted(mine) == ["a_1", "a_2"]
    assert (mine["a_1"] == 255 * (rectangle(0, 0, 4, 4) | rectangle(20, 20, 24, 24))).all()


def test_labelme_uses_the_pixels_in_the_file_if_the_image_is_missing(make, masks, source, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
    drawn = [("polyp", "polygon", BOX, {})]
    labelme(source / "a.json", drawn, "lost.jpg", data=png(pixels))
    status, _, error = make()
    assert status == 0, error
    assert (np.asarray(Image.open(tmp_path / "mine/images/a.png")) == pixels).all()
    assert (masks()["a"] == 255 * BOX_MASK).all()
    labelme(source / "a.json", drawn, "lost.jpg", data=png(pixels)[:50])
    refused(make("--out", tmp_path / "two"), "a.json: imageData is not an image file in base64")
    labelme(source / "a.json", drawn, "lost.jpg")
    refused(make("--out", tmp_path / "two"), "a.json: no image lost.jpg below")


LABELME_FAULTS = [
    (("x", "polygon", [[1, 2], [3, 4]], {}), "is a polygon of 2 points"),
    (("x", "blob", [[1, 2]], {}), "has the unknown type blob"),
    (("", "polygon", BOX, {}), "label is empty"),
    (("x", "polygon", BOX, {"group_id": []}), "group_id is a list, expected a number"),
    (("x", "polygon", [[1, 2], [3, None], [4, 5]], {}), "'None' is not a number"),
    (("x", "mask", [[30, 10], [99, 39]], {"mask": "AAAA"}), "leaves its image"),
    (("x", "mask", [[30, 10], [59, 39]], {"mask": "AAAA"}), "mask is not an image file"),
    (("x", "mask", [[0, 0], [9, 9]], {"mask": png(RING)}), "64x48 pixels, its corners say 10x10"),
]


@pytest.mark.parametrize("shape, words", LABELME_FAULTS)
def test_faulty_labelme_shapes_are_refused(make, source, tmp_path, shape, words):
    photo(source / "a.png")
    labelme(source / "a.json", [("x", "point", [[1, 1]], {}), shape], "a.png")
    refused(make(), "a.json, shape 1", words)
    assert not (tmp_path / "mine").exists()


# --- CVAT -----------------------------------------------------------------------------------------


def cvat(path, images, labels=("polyp", "tool"), doctype=""):
    """annotations.xml of "CVAT for images 1.1". images: (name, subset, inner XML)."""
    lines = ['<?xml version="1.0" encoding="utf-8"?>', doctype, "<annotations>"]
    lines += ["<version>1.1</version><meta><job><id>1</id><size>3</size><labels>"]
    for name in labels:
        lines.append(f"<label><name>{name}</name><color>#fa3253</color><type>any</type></label>")
    lines += ["</labels></job><dumped>2026-01-02</dumped></meta>"]
    for k, (name, subset, inner) in enumerate(images):
        extra = f" subset={quoteattr(subset)}" if subset else ""
        size = f'width="{SIZE[1]}" height="{SIZE[0]}"'
        lines.append(f'<image id="{k}" name={quoteattr(name)}{extra} {size}>{inner}</image>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</annotations>"]))


def cvat_polygon(label, points, order=0):
    text = ";".join(f"{x:.2f},{y:.2f}" for x, y in points)
    return f'<polygon label="{label}" source="manual" points="{text}" z_order="{order}"></polygon>'


CVAT_BOX = '<box label="{}" xtl="10.00" ytl="12.00" xbr="16.00" ybr="20.00" z_order="{}" {}></box>'


def test_cvat_tasks_with_all_kinds_of_areas_and_subsets(make, check, masks, source, tmp_path):
    ring = RING[10:40, 30:60].ravel()
    runs = np.flatnonzero(np.diff(np.r_[0, ring, 0]))
    rle = ", ".join(map(str, np.diff(np.r_[0, runs, ring.size])))
    mask = f'<mask label="tool" rle="{rle}" left="30" top="10" width="30" height="30" z_order="0"/>'
    hidden = CVAT_BOX.format("tool", -1, "")  # drawn first, although it is later in the file
    turned = CVAT_BOX.format("tool", 1, 'rotation="90.00"')  # around 13, 16
    ellipse = '<ellipse label="polyp" cx="32" cy="24" rx="20" ry="5" rotation="90" z_order="0"/>'
    point = '<points label="polyp" points="1,2" z_order="0"/><tag label="polyp"/>'
    images = [
        ("a.png", "Train", cvat_polygon("polyp", BOX) + hidden + mask + point),
        ("b.png", "Train", ellipse),
        ("case 1/c.png", "Validation", cvat_polygon("polyp", BOX) + turned),
        ("d.png", "Test", ""),
    ]
    cvat(source / "annotations.xml", images)
    for name, subset, _ in images:
        photo(source / "images" / subset / name)

    status, text, error = make()
    assert status == 0, error
    assert "CVAT XML: 4 images, 6 objects of 2 classes" in text
    assert "shapes that are no areas, skipped: 1 points, 1 tag" in text
    splits = {split: len(items) for split, items in entries(tmp_path / "mine").items()}
    assert splits == {"train": 2, "val": 1, "test": 1}
    mine = masks()
    assert (mine["Train_a"] == np.where(RING, 2, BOX_MASK)).all()
    upright = rectangle(27, 4, 37, 44)
    assert mine["Train_b"].any() and not mine["Train_b"][~upright].any()
    expected = BOX_MASK.astype(int)
    expected[rectangle(9, 13, 17, 19)] = 2
    assert (mine["Validation_case 1_c"] == expected).all()
    assert check()[0] == 0


def test_faulty_cvat_files_are_refused(make, source, tmp_path):
    photo(source / "images/a.png")
    path = source / "annotations.xml"
    good = cvat_polygon("polyp", BOX)
    faults = [
        (good.replace("4.00", "nan"), "nan is far outside"),
        (good.replace('"polyp"', '"cow"'), "the label cow is not among polyp, tool"),
        (good.replace("points", "pts"), "<polygon> has no points"),
        ('<mask label="tool" rle="9" left="60" top="0" width="9" height="1"/>', "leaves its image"),
        ('<mask label="tool" rle="5, 1" left="0" top="0" width="9" height="1"/>', "cover 6 pixels"),
        ('<mask label="tool" rle="-5, 14" left="0" top="0" width="9" height="1"/>', "not a whole"),
    ]
    for shape, words in faults:
        cvat(path, [("a.png", "", shape)])
        refused(make(), "annotations.xml", "a.png" if "cover" in words else "", words)

    bomb = '<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]>'
    cvat(path, [("a.png", "", good)], doctype=bomb)
    refused(make(), "annotations.xml: has a DOCTYPE")
    path.write_text("<annotations><image")
    refused(make(), "annotations.xml: is not valid XML")
    path.write_text("<annotations>" + 10**5 * "<image>" + 10**5 * "</image>" + "</annotations>")
    refused(make(), "annotations.xml, image 0: <image> has no name")
    path.write_text('<annotations><track id="0" label="polyp"></track></annotations>')
    refused(make(), "CVAT for video", 'export the task again as "CVAT for images 1.1"')
    assert not (tmp_path / "mine").exists()


# --- Label Studio ---------------------------------------------------------------------------------


def region(kind, labels, value, count=0):
    """A result of an annotation, as Label Studio 1.x exports it."""
    named = {kind: labels} if labels is not None else {}
    result = {"id": f"r{count}", "type": kind, "from_name": "label", "to_name": "image"}
    size = {"original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0}
    return result | size | {"origin": "manual", "value": value | named}


def percent(points):
    return [[100 * x / SIZE[1], 100 * y / SIZE[0]] for x, y in points]


def task(number, image, *annotations):
    items = []
    for k, annotation in enumerate(annotations):
        fields = {"id": 10 * number + k, "was_cancelled": False, "ground_truth": False}
        items.append(fields | annotation)
    return {"id": number, "annotations": items, "predictions": [], "data": {"image": image}}


def rle_pack(mask):
    """Label Studio's code of a mask, in blocks of one repeated value (see BRUSH for a real one)."""
    values = np.repeat(mask.ravel() * 255, 4)
    bits = f"{len(values):032b}{7:05b}" + f"{2:04b}{3:04b}{7:04b}{15:04b}"
    starts = np.r_[0, np.flatnonzero(np.diff(values)) + 1, len(values)]
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        bits += f"111{end - start - 1:016b}{values[start]:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


LS_POLYGON = region("polygonlabels", ["polyp"], {"points": percent(BOX), "closed": True})


def test_label_studio_tasks(make, check, masks, source, tmp_path):
    brush = region("brushlabels", ["tool"], {"format": "rle", "rle": rle_pack(RING)}, 1)
    half = {"x": 25.0, "y": 25.0, "width": 50.0, "height": 12.5, "rotation": 90}
    box = region("rectanglelabels", ["tool"], half)
    circle = {"x": 50.0, "y": 50.0, "radiusX": 10.0, "radiusY": 25.0, "rotation": 0}
    point = region("keypointlabels", ["polyp"], {"x": 1, "y": 2, "width": 0.3}, 2)
    plain = {"format": "rle", "rle": rle_pack(RING)}
    two = [region("brush", None, plain), region("labels", ["tool"], plain)]
    tasks = [
        task(1, "/data/upload/1/1a2b3c4d-Scan_1.png", {"result": [LS_POLYGON, brush, point]}),
        task(2, "/data/local-files/?d=set%201/b.png", {"result": [box]}),
        task(
            3, "https://x.org/c.png?s=1", {"result": [region("ellipselabels", ["polyp"], circle)]}
        ),
        task(4, "s3://bucket/d.png", {"result": []}, {"result": [box], "was_cancelled": True}),
        task(5, "e.png", {"result": [box]}, {"result": two, "ground_truth": True}),
    ]
    write_json(source / "project-1-at-2026-01-02.json", tasks)
    for name in ("Scan 1.png", "set 1/b.png", "c.png", "d.png", "e.png"):
        photo(source / name)

    status, text, error = make()
    assert status == 0, error
    assert "Label Studio JSON: 5 images, 5 objects of 2 classes" in text
    assert "cancelled annotations, left out: 1" in text and "skipped: 1 keypointlabels" in text
    mine = masks()
    assert (mine["Scan 1"] == np.where(RING, 2, BOX_MASK)).all()
    assert (mine["set 1_b"] == 2 * rectangle(10, 12, 16, 44)).all()  # 32x6, turned at 16, 12
    assert mine["c"].sum() == pytest.approx(np.pi * 6.4 * 12, rel=0.03)
    assert not mine["d"].any()
    assert (mine["e"] == 2 * RING).all()
    assert check()[0] == 0


def test_faulty_label_studio_files_are_refused(make, source, tmp_path):
    photo(source / "a.png")
    path = source / "x.json"
    good = {"result": [LS_POLYGON]}
    turned = LS_POLYGON | {"image_rotation": 90}
    other = LS_POLYGON | {"original_width": 65}
    no_label = region("polygonlabels", [], {"points": percent(BOX)})
    short = region("brushlabels", ["a"], {"format": "rle", "rle": rle_pack(RING)[:20]})
    huge = region("brushlabels", ["a"], {"format": "rle", "rle": [255] * 40})
    faults = [
        (task(7, "a.png", good, good), "x.json, task 7: has 2 annotations, 0 of them marked"),
        (task(7, "a.png"), "x.json, task 7: is not annotated"),
        (task(7, "a.png", good | {"was_cancelled": True}), "x.json, task 7: is not annotated"),
        (task(7, "b.png", good), "x.json, task 7: no image b.png"),
        (task(7, "a.txt", good), "data names 0 images"),
        (task(7, "a.png", {"result": [LS_POLYGON | {"to_name": []}, 3]}), "a region is a number"),
        (task(7, "a.png", {"result": [3]}), "task 7: a region is a number"),
        (task(7, "a.png", {"result": [{"type": "polygonlabels"}]}), "region 0: has no value"),
        (task(7, "a.png", {"result": [turned]}), "region r0: its image was turned"),
        (task(7, "a.png", {"result": [other]}), "has 64x48 pixels, but"),
        (task(7, "a.png", {"result": [other, LS_POLYGON]}), "for images of 2 sizes"),
        (task(7, "a.png", {"result": [no_label]}), "region r0: has no label"),
        (task(7, "a.png", {"result": [short]}), "task 7, region 0: rle ends early"),
        (task(7, "a.png", {"result": [huge]}), "rle holds 4294967295 values"),
        ({"id": 1, "image": "a.png", "annotation_id": 3, "annotator": 1}, 'is "JSON-MIN"'),
    ]
    for content, words in faults:
        write_json(path, [content])
        refused(make(), words)
    assert not (tmp_path / "mine").exists()

    write_json(path, [task(1, "a.png", good), {"id": 2, "annotations": []}])
    refused(make(), "x.json, task 2: has no data")
    photo(source / "b.png")
    write_json(path, [task(1, "a.png", good), task(2, "b.png")])
    status, text, _ = make("--skip-unpaired")
    assert status == 0 and "tasks that are not annotated, left out: 1" in text


# --- CSV with run-length codes --------------------------------------------------------------------


def pairs(mask):
    """Kaggle's code: start and length, from 1, column by column."""
    edges = np.flatnonzero(np.diff(np.r_[0, mask.ravel(order="F"), 0])) + 1
    starts = edges[::2]
    lengths = edges[1::2] - starts
    return " ".join(map(str, np.stack([starts, lengths], 1).ravel()))


def test_kaggle_tables(make, check, masks, source, tmp_path):
    for name in "abc":
        photo(source / f"train_images/{name}.jpg", quality=95)
    rows = ["ImageId,EncodedPixels", f"a.jpg,{pairs(RING)}", f"a.jpg,{pairs(BOX_MASK)}"]
    rows += [f"b.jpg,{pairs(BOX_MASK)}", "c.jpg,-1"]
    (source / "train.csv").write_text("\n".join(rows))
    (source / "sample_submission.csv").write_text("ImageId,EncodedPixels\nz.jpg,1 1\n")
    status, text, error = make("--prompt", "a ship")
    assert status == 0, error
    assert "CSV with run-length codes: 3 images, 3 objects of one class" in text
    assert "column by column" in text and "sample_submission files, skipped: 1" in text
    mine = masks()
    assert (mine["a"] == 255 * (RING | BOX_MASK)).all()
    assert (mine["b"] == 255 * BOX_MASK).all() and not mine["c"].any()
    found = entries(tmp_path / "mine")
    assert sorted(found) == ["test", "train", "val"]
    assert found["train"][0]["prompts"] == {"p0": "", "p1": "a ship"}
    status, text, _ = check()  # "no ship" agrees with the empty mask
    assert status == 0 and "no pixel" not in text


def test_a_line_break_in_a_value_stays_within_the_message():
    refused = pytest.raises(ValueError, match="a.json, annotation 3: image_id a b is not an id")
    with refused, shapes.errors_at("a.json, annotation 3"):
        raise ValueError("image_id a\nb is not an id")


def test_kaggle_tables_of_pandas_have_an_index_and_old_ones_other_line_ends(make, masks, source):
    photo(source / "a.png")
    rows = [",ImageId,EncodedPixels", f"0,a.png,{pairs(RING)}", f"1,a.png,{pairs(BOX_MASK)}"]
    for line_end in ("\n", "\r"):
        (source / "train.csv").write_bytes(line_end.join(rows).encode())
        status, text, error = make("--out", source.parent / f"mine{ord(line_end)}")
        assert status == 0 and "2 objects of one class" in text, error


def test_kaggle_classes_may_be_numbers_or_part_of_the_name(make, masks, source, tmp_path):
    photo(source / "a.png")
    table = source / "train.csv"
    rows = ["ImageId,ClassId,EncodedPixels", f"a,2,{pairs(RING)}", f"a,1,{pairs(BOX_MASK)}"]
    table.write_text("\n".join(rows))
    assert make("--classes", "pitted,patch,scratch")[0] == 0
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert classes == {"0": "background", "1": "pitted", "2": "patch", "3": "scratch"}
    assert (masks()["a"] == np.where(RING, 2, BOX_MASK)).all()
    refused(make("--out", tmp_path / "two", "--classes", "pitted"), "the classes in the table are")

    rows = ["Image_Label,EncodedPixels", f"a.png_Fish,{pairs(RING)}", "a.png_Flower,"]
    table.write_text("\n".join(rows))
    status, text, error = make("--out", tmp_path / "three")
    assert status == 0 and "classes: Fish" in text, error


@pytest.mark.parametrize(
    "code, words",
    [
        ("5 3 6 2", "the run 6 2 starts before pixel 8"),
        ("0 3", "starts before pixel 1"),
        ("3070 4", "the run 3070 4 leaves its image of 64x48 pixels"),
        ("1 99999999999999", "leaves its image"),
        ("5 3 9", "holds 3 numbers"),
        ("5 x", "'x' is not a number"),
    ],
)
def test_faulty_run_lengths_are_refused(make, source, code, words):
    photo(source / "a.png")
    text = f"image_id,rle,source\na.png,1 2,x\na.png,{code},x\n"
    (source / "train.csv").write_text(text)
    refused(make(), "train.csv, line 3", words)


def test_long_codes_are_read_and_uw_madison_has_its_own_command(make, masks, source):
    photo(source / "a.png", (700, 800))
    checks = np.indices((700, 800)).sum(axis=0) % 2 == 1
    (source / "train.csv").write_text(f"img,pixels\na.png,{pairs(checks)}\n")
    status, _, error = make()
    assert status == 0, error
    assert (masks()["a"] == 255 * checks).all()
    row = "case1_day0_slice_0001,stomach,1 2"
    (source / "train.csv").write_text(f"id,class,segmentation\n{row}\n")
    refused(make("--out", source.parent / "two"), "python prepare.py uw-madison")
