"""Boxes and points from files: their formats, how they are paired, and SAM's predictions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import close, command, rows, write_run
from PIL import Image

import data
import predict
import prepare
import sam_decoder
import train
from engine import evaluate
from imaging import boxes_and_points, image_files, layouts, pictures
from recipes import sam

SIZES = {"a.png": (30, 40), "b.png": (10, 20)}
MINI = replace(sam_decoder.VARIANTS["mini"], image_size=64)


def write(folder, text, ending="csv"):
    path = folder / f"given.{ending}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def plain(given):
    """{image: [(class, object, numbers)]} of what prompts.read_boxes and read_points return."""
    return {i: [(r.name, r.object, r.xy.tolist()) for r in rows] for i, rows in given.items()}


def unpacked(given):
    """{image: [(class number, box, points, labels)]} of what read_prompts returns."""
    made = {}
    for image, some in given.items():
        made[image] = []
        for p in some:
            box = None if p.box is None else p.box.tolist()
            made[image].append((p.label, box, p.points.tolist(), p.labels.tolist()))
    return made


# --- formats --------------------------------------------------------------------------------------

TWO = [("a.png", 1, 2, 30.5, 20), ("b.png", 0, 0, 5, 5)]
BOXES = {
    "a.png": [("polyp", None, [1, 2, 30.5, 20])],
    "b.png": [("polyp", None, [0, 0, 5, 5])],
}


def table(header, separator=","):
    """The two boxes in a table. NAME:FIELD is the column NAME with what FIELD holds."""
    columns = [column.rpartition(":") for column in header.split()]
    lines = [separator.join(name if colon else field for name, colon, field in columns)]
    for box in TWO:
        values = dict(zip(("image", "x0", "y0", "x1", "y1"), map(str, box), strict=True))
        values |= {"class": "polyp", "more": "7", "size": "40"}
        lines.append(separator.join(values[field] for _, _, field in columns))
    return "\n".join(lines) + "\n"


PLAIN = "image class x0 y0 x1 y1"
CORNERS = "xmin:x0 ymin:y0 xmax:x1 ymax:y1"
COCO = {
    "images": [{"id": 7, "file_name": "a.png"}, {"id": 9, "file_name": "b.png"}],
    "categories": [{"id": 3, "name": "polyp"}],
    "annotations": [
        {"image_id": 7, "category_id": 3, "bbox": [1, 2, 30.5, 19]},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 6, 6]},
    ],
}
ANNOTATIONS = [
    {"img_name": "a.png", "mask_name": "m.png", "bbox": [1, 2, 30.5, 20], "class": "polyp"},
    {"img_name": "b.png", "mask_name": "n.png", "bbox": [20, 10, 0, 0]},  # an empty mask
    {"img_name": "b.png", "mask_name": "o.png", "bbox": [0, 0, 5, 5], "class": "polyp"},
]
FORMATS = {
    "commas": (table(PLAIN), "csv"),
    "semicolons": (table(PLAIN, ";"), "csv"),
    "tabs": (table(PLAIN, "\t"), "csv"),
    "UTF-16": (table(PLAIN, "\t").encode("utf-16"), "csv"),
    "a mark at the start": ("\ufeff" + table(PLAIN, ";").replace("\n", "\r\n"), "csv"),
    "xmin": (table(f"filename:image size class {CORNERS}"), "csv"),
    "XMin": (table("ImageID:image LabelName:class XMin:x0 XMax:x1 YMin:y0 YMax:y1"), "csv"),
    "x_min": (table("img_name:image label:class x_min:x0 y_min:y0 x_max:x1 y_max:y1"), "csv"),
    "x1 to x2": (table("file_name:image name:class x1:x0 y1:y0 x2:x1 y2:y1"), "csv"),
    "bbox_x1": (table("Image_Name:image class bbox_x1:x0 bbox_y1:y0 bbox_x2:x1 bbox_y2:y1"), "csv"),
    "left to bottom": (table("image_id:image class left:x0 top:y0 right:x1 bottom:y1"), "csv"),
    "an index and more": (table(f":more {PLAIN} score:more"), "csv"),
    "sizes of images": (table(f"filename:image width:size height:size class {CORNERS}"), "csv"),
    "without endings": (table(PLAIN).replace(".png", ""), "csv"),
    "empty lines and cells": (table(PLAIN).replace("\n", ",\n") + "\n,,,,,,\n", "csv"),
    "COCO": (json.dumps(COCO), "json"),
    "annotations": (json.dumps(ANNOTATIONS), "json"),
}


def test_the_tables_are_as_meant():
    lines = ["image,class,x0,y0,x1,y1", "a.png,polyp,1,2,30.5,20", "b.png,polyp,0,0,5,5"]
    assert table(PLAIN).splitlines() == lines
    assert table(":more x1:x0", ";") == ";x1\n7;1\n7;0\n"


@pytest.mark.parametrize("name", FORMATS)
def test_boxes_of_every_format(name, tmp_path):
    path = write(tmp_path, *FORMATS[name])
    assert plain(boxes_and_points.read_boxes(path, SIZES, ["polyp"])) == BOXES


def test_keys_of_annotation_files_are_no_news(tmp_path, capsys):
    boxes_and_points.read_boxes(write(tmp_path, *FORMATS["annotations"]), SIZES)
    assert capsys.readouterr().out == ""


def test_columns_that_are_not_read_are_said_once(tmp_path, capsys):
    path = write(tmp_path, table(f"score:more {PLAIN} note:more"))
    boxes_and_points.read_boxes(path, SIZES, ["polyp"])
    assert capsys.readouterr().out == f"{path}: ignored columns: note, score\n"
    rows = [{"image": "a.png", "x0": 1, "y0": 1, "x1": 2, "y1": 2, "id": k} for k in range(3)]
    path = write(tmp_path, json.dumps(rows), "json")
    boxes_and_points.read_boxes(path, SIZES)
    assert capsys.readouterr().out == f"{path}: ignored columns: id\n"


HEADER = "image,x0,y0,x1,y1\n"
ONE = "a.png,1,1,2,2\n"


def test_boxes_of_other_images_are_counted(tmp_path, capsys):
    """What they hold does not matter: their images are unknown."""
    others = "".join(f"z{k}.png,5,5,2,inf\n" for k in range(4))
    path = write(tmp_path, HEADER + ONE + others + "z0.png,1,1,2,2\n")
    assert plain(boxes_and_points.read_boxes(path, SIZES)) == {
        "a.png": [(None, None, [1, 1, 2, 2])]
    }
    line = "5 rows for other images are ignored (z0.png, z1.png, z2.png, …)"
    assert capsys.readouterr().out == f"{path}: {line}\n"


def test_names_in_either_form_of_unicode_are_one(tmp_path):
    sizes = {"L\u00e4sion.png": (30, 40)}
    path = write(tmp_path, HEADER + ONE.replace("a.png", "La\u0308sion.png"))
    assert list(boxes_and_points.read_boxes(path, sizes)) == list(sizes)


def test_a_name_without_ending_fits_one_image(tmp_path):
    names = boxes_and_points.ImageNames(
        {1: "g/a.png", 2: "a.jpg", 3: "g/b.png", 4: "c.png", 5: "c.png.jpg"}
    )
    assert names.find("g/a") == 1 and names.find("./a") == 2 and names.find("b") == 3
    assert names.find("c.png") == 4 and names.find("c.png.jpg") == 5
    assert names.shortest(4) == "c.png" and names.find("d") is None
    hint = "a fits 2 images; add its folder or ending, as in a.png, a.jpg"
    with pytest.raises(ValueError, match=hint):
        names.find("a")


def coco(**annotation):
    """COCO's file with this annotation alone."""
    return json.dumps(COCO | {"annotations": [annotation]})


BOX_ERRORS = {
    "no box fits": (HEADER + "photos/q.png,1,1,2,2\n", "csv",
                    "none of the 1 boxes is for any of the images; the file names "
                    "photos/q.png, the images are named like a.png"),
    "no header": (ONE + ONE, "csv", "has no header; its first line must be like image,class,x0"),
    "blanks": ("image x0 y0 x1 y1\na.png 1 1 2 2\n", "csv", "has no image, x0, y0, x1, y1; write"),
    "decimal commas": (HEADER.replace(",", ";") + "a.png;1,5;1;2;2\n", "csv",
                       "line 2: box 1,5 1 2 2 has decimal commas; write decimals with a point"),
    "commas for both": (HEADER + "a.png,1,5,1,2,2\n", "csv", "line 2: has 6 values for 5 columns"),
    "x y w h": ("image,x,y,w,h\n" + ONE, "csv",
                "gives boxes by w and h; "
                "write corners instead: x0 = x, y0 = y, x1 = x + width - 1"),
    "width": ("image,x,y,Width,height\n" + ONE, "csv", "gives boxes by Width and height; write"),
    "a row that is cut": ("width,height,image,xmin,ymin,xmax,ymax\n40,30,a.png,1,1\n", "csv",
                          "line 2: has no x1, y1"),
    "two columns": ("image,x0,x0,y0,x1,y1\na.png,1,1,1,2,2\n", "csv", "has two columns x0"),
    "shares": (HEADER + "a.png,0.1,0.2,0.5,1\nb.png,0,0,1,1\n", "csv",
               "all numbers are from 0 to 1, but boxes are in pixels"),
    "bbox without corners": ('[{"image": "a.png", "bbox": [1, 1, 2, 2]}]', "json",
                             "entry 0: bbox may be corners or x, y, width, height"),
    "bbox of three": ('[{"img_name": "a.png", "bbox": [1, 1, 2]}]', "json",
                      "entry 0: bbox [1, 1, 2] is not four numbers"),
    "bbox inverted": ('[{"img_name": "a.png", "bbox": [5, 1, 2, 2]}]', "json",
                      "entry 0: box 5 1 2 2 is inverted"),
    "a key twice": ('[{"image": "a.png", "image": "b.png"}]', "json", "is repeated"),
    "COCO without names": ('{"images": [{"id": 1}], "annotations": []}', "json",
                           "expected COCO's images with id and file_name"),
    "COCO without a list": ('{"images": [], "annotations": 5}', "json", "a list of annotations"),
    "COCO of no image": (coco(image_id=8, bbox=[1, 1, 2, 2]), "json",
                         "annotation 0: expected image_id of one of the images"),
    "COCO of a huge number": (coco(image_id=7, bbox=[10**400, 1, 2.5, 2]), "json",
                              "annotation 0: expected image_id"),
    "COCO outside": (coco(image_id=9, bbox=[9, 9, 20, 2]), "json",
                     "annotation 0: box 9 9 28 10 lies outside b.png, which is 20x10"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOX_ERRORS)
def test_boxes_that_cannot_be_read_are_one_line(name, tmp_path):
    text, ending, expected = BOX_ERRORS[name]
    path = write(tmp_path, text, ending)
    with pytest.raises(ValueError) as caught:
        boxes_and_points.read_boxes(path, SIZES)
    message = str(caught.value)
    assert message.startswith(str(path)) and expected in message and "\n" not in message, message


# --- points ---------------------------------------------------------------------------------------

POINTS = "image,class,x,y,label\n"


def given(tmp_path, boxes=None, points=None, classes=("background", "one", "two")):
    """read_prompts of two texts."""
    paths = []
    for name, text in (("boxes.csv", boxes), ("points.csv", points)):
        if text is not None:
            (tmp_path / name).write_text(text)
        paths.append(None if text is None else tmp_path / name)
    return boxes_and_points.read_prompts(*paths, SIZES, classes if classes is None else [*classes])


def test_points_of_one_class_are_one_object(tmp_path):
    rows = "a.png,one,3,4,1\na.png,two,7,8,\na.png,one,5,6.5,0\nb.png,one,20,10,1.0\n"
    made, classes = given(tmp_path, points=POINTS + rows)
    assert classes == ["background", "one", "two"]
    assert unpacked(made) == {
        "a.png": [(1, None, [[3, 4], [5, 6.5]], [1, 0]), (2, None, [[7, 8]], [1])],
        "b.png": [(1, None, [[20, 10]], [1])],
    }
    assert made["a.png"][0].points.dtype == np.float32
    assert made["a.png"][0].labels.dtype == np.int64


def test_objects_tell_points_of_one_class_apart(tmp_path):
    header = "Object,IMAGE,X,Y,Label\n"
    rows = "1,a,3,4,1\n2,a,9,9,1\n1,a,5,6,0\n"
    made, classes = given(tmp_path, points=header + rows, classes=None)
    assert classes == ["target"]
    expected = [(1, None, [[3, 4], [5, 6]], [1, 0]), (1, None, [[9, 9]], [1])]
    assert unpacked(made) == {"a.png": expected}


def test_points_of_a_json_file(tmp_path):
    rows = [{"image": "a.png", "x": 3, "y": 4}, {"image": "a.png", "x": 5, "y": 6, "label": False}]
    path = write(tmp_path, json.dumps(rows), "json")
    made, _ = boxes_and_points.read_prompts(None, path, SIZES, ["polyp"])
    assert unpacked(made) == {"a.png": [(1, None, [[3, 4], [5, 6]], [1, 0])]}


BOXED = "image,class,object,x0,y0,x1,y1\n"


def test_boxes_and_points_pair_by_order(tmp_path):
    """Of a class of an image; a class that only one of the files has is asked by it alone."""
    boxes = "a.png,one,,0,0,9,9\na.png,two,,1,1,8,8\na.png,one,,20,20,30,29\nb.png,one,,0,0,5,5\n"
    points = "image,class,object,x,y\na.png,one,k,3,4\na.png,one,m,25,25\na.png,one,k,5,6\n"
    points += "b.png,two,,9,9\n"
    made, _ = given(tmp_path, BOXED + boxes, points)
    assert unpacked(made) == {
        "a.png": [
            (1, [0, 0, 9, 9], [[3, 4], [5, 6]], [1, 1]),
            (1, [20, 20, 30, 29], [[25, 25]], [1]),
            (2, [1, 1, 8, 8], [], []),
        ],
        "b.png": [(1, [0, 0, 5, 5], [], []), (2, None, [[9, 9]], [1])],
    }


def test_boxes_and_points_pair_by_object(tmp_path):
    boxes = "a.png,one,1,0,0,9,9\na.png,one,2,1,1,8,8\na.png,one,3,20,20,30,29\n"
    points = "image,class,object,x,y,label\na.png,one,3,25,25,0\na.png,one,1,3,4,1\n"
    made, _ = given(tmp_path, BOXED + boxes, points)
    assert unpacked(made) == {
        "a.png": [
            (1, [0, 0, 9, 9], [[3, 4]], [1]),
            (1, [1, 1, 8, 8], [], []),
            (1, [20, 20, 30, 29], [[25, 25]], [0]),  # with a box, points may all be outside
        ]
    }


def test_numbered_objects_may_have_points_alone(tmp_path):
    boxes = "a.png,one,2,0,0,9,9\n"
    points = "image,class,object,x,y,label\na.png,one,1,25,25,1\na.png,one,2,3,4,0\n"
    made, _ = given(tmp_path, BOXED + boxes, points)
    assert unpacked(made) == {
        "a.png": [(1, [0, 0, 9, 9], [[3, 4]], [0]), (1, None, [[25, 25]], [1])]
    }


TWO_BOXES = BOXED + "a.png,one,1,0,0,9,9\na.png,one,2,1,1,8,8\n"
POINT_ERRORS = {
    "counts": (TWO_BOXES, POINTS + "a.png,one,3,4,1\n", "2 boxes and points of 1 objects do not"),
    "no such object": (TWO_BOXES, "image,class,x,y,object,label\na.png,one,3,4,5,0\n",
                       "object 5 has neither a box nor a point inside; objects of boxes: 1, 2"),
    "an object twice": (TWO_BOXES + "a.png,one,2,2,2,3,3\n",
                        "image,class,x,y,object\na.png,one,3,4,2\n", "object 2 has 2 boxes"),
    "all outside": (None, POINTS + "a.png,one,3,4,0\n", "all points of an object are outside"),
    "no class": (None, POINTS + "a.png,,3,4,1\n", "a point of a.png has no class; there are one,"),
    "unknown class": (None, POINTS + "a.png,six,3,4,1\n", "line 2: unknown class six"),
    "a class as label": (None, "image,x,y,label\na.png,3,4,one\n",
                         "line 2: unknown label one of a point: 1 is inside, 0 outside"),
    "outside the image": (None, POINTS + "a.png,one,3,31,1\n",
                          "line 2: point 3 31 lies outside a.png, which is 40x30"),
    "no number": (None, POINTS + "a.png,one,x,4,1\n", "line 2: point x 4 is not two numbers"),
    "boxes": (None, TWO_BOXES, "has no x, y; write image,class,x,y,label"),
}  # fmt: skip


@pytest.mark.parametrize("name", POINT_ERRORS)
def test_what_does_not_pair_is_one_line(name, tmp_path):
    boxes, points, expected = POINT_ERRORS[name]
    with pytest.raises(ValueError) as caught:
        given(tmp_path, boxes, points)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "points.csv")), message
    assert expected in message and "\n" not in message, message


# --- SAM's answers --------------------------------------------------------------------------------


def net(seed=0) -> sam_decoder.SAM:
    torch.manual_seed(seed)
    model = sam_decoder.SAM(MINI).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # with 0.1, prompts hardly change the answer
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of a small SAM of one class."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    more = {"classes": ["polyp"], "options": {}}
    return write_run(folder, sam_decoder.SAM, net().state_dict(), MINI, **more)


def blobs(*rectangles, size=(48, 64)):
    mask = np.zeros(size, np.uint8)
    for value, x0, y0, x1, y1 in rectangles:
        mask[y0 : y1 + 1, x0 : x1 + 1] = value
    return mask


MASKS = {
    "a": blobs((1, 4, 5, 20, 18), (2, 30, 8, 50, 20), (1, 25, 30, 40, 44)),
    "b": blobs((2, 3, 3, 12, 40)),
    "empty": blobs(),
}


@pytest.fixture
def maps(tmp_path):
    root = tmp_path / "maps"
    noise = np.random.default_rng(0)
    for stem, mask in MASKS.items():
        for kind in ("images", "masks"):
            (root / "test" / kind).mkdir(parents=True, exist_ok=True)
        image = noise.integers(0, 255, (*mask.shape, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / "test" / "images" / f"{stem}.png")
        Image.fromarray(mask).save(root / "test" / "masks" / f"{stem}.png")
    (root / "classes.json").write_text('{"0": "background", "1": "one", "2": "two"}')
    return root


def test_the_same_prompts_from_files_give_the_same_answers(maps, tmp_path, capsys):
    """Boxes by hand and the deepest points, against those that are made of the ground truth."""
    dataset = data.open_dataset(layouts.read_entries(maps, "test"), tmp_path / "cache")
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(
        "image,class,x0,y0,x1,y1\na.png,one,4,5,20,18\na.png,two,30,8,50,20\n"
        "a.png,one,25,30,40,44\nb.png,two,3,3,12,40\n"
    )
    points = tmp_path / "points.csv"
    lines = ["image,class,object,x,y"]
    for i, entry in enumerate(dataset.entries):
        pieces = boxes_and_points.components(dataset.sample(i, "")["mask"].numpy(), (1, 2))
        for k, piece in enumerate(pieces):
            x, y = boxes_and_points.deepest_point(piece)
            lines.append(f"{entry.image.name},{dataset.classes[piece.label]},{k},{x:g},{y:g}")
    points.write_text("\n".join(lines))

    model = net()
    recipe = sam.sam_recipe(model, sam.PROTOCOLS["default"])
    files = {"boxes": (boxes, None), "points": (None, points), "both": (boxes, points)}
    what = {"boxes": "box", "points": "point", "both": "box or point"}
    for kind, pair in files.items():
        asking = sam.with_file_prompts(recipe, {"maps": dataset}, *pair).make_prompts
        line = f"1 of 3 images have no {what[kind]}, and their masks are empty (empty.png)"
        assert line in capsys.readouterr().out
        for i in range(3):
            sample = dataset.sample(i, "")
            item = recipe.inputs(sample, train=False, rng=None)
            with torch.no_grad():
                expected, _ = recipe.predict(model, item | recipe.make_prompts(sample, kind))
                ours, _ = recipe.predict(model, item | asking(sample, f"given {kind}"))
            close(ours, expected)
            is_empty = dataset.entries[i].name == "empty"
            assert bool((evaluate.to_masks(ours.numpy(), model.config)[0]).all()) == is_empty


def test_objects_with_other_numbers_of_points_are_answered_as_if_alone():
    model = net()
    size = (48, 64)
    some = [
        boxes_and_points.Prompt(1, None, np.float32([3, 4, 20, 30])),
        boxes_and_points.Prompt(1, None, None, np.float32([[9, 9]]), np.int64([1])),
        boxes_and_points.Prompt(
            1, None, None, np.float32([[9, 9], [30, 30], [5, 40]]), np.int64([1, 0, 1])
        ),
        boxes_and_points.Prompt(
            1, None, np.float32([3, 4, 20, 30]), np.float32([[9, 9], [30, 30]]), np.int64([0, 1])
        ),
    ]
    tensors = sam.prompt_tensors(some, size, MINI)
    assert tensors["points"].shape == (4, 3, 2)
    image = torch.randn(1, 3, 64, 64)
    batch = {key: tensors[key] for key in ("boxes", "points", "labels")}
    with torch.no_grad():
        batch |= {"image": image, "image_index": torch.zeros(4, dtype=torch.int64)}
        masks, _ = sam.sam_forward(model, batch)
        for k, p in enumerate(some):
            how = {}
            if p.box is not None:
                how["boxes"] = sam_decoder.to_input_pixels(torch.from_numpy(p.box), size, MINI)[
                    None, None
                ]
            if len(p.points):
                points = sam_decoder.to_input_pixels(torch.from_numpy(p.points), size, MINI)
                how |= {"points": points[None, None]}
                how |= {"labels": torch.from_numpy(p.labels)[None, None]}
            close(masks[k], model(image, **how)[0][0], atol=1e-3)  # 0.01 where padding is a token


# --- predict.py -----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name in "abcde":
        pixels = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def predicted(monkeypatch, capsys, out, *arguments):
    """Output of predict.py with --probabilities into a folder."""
    arguments = [*arguments, "--probabilities", "--out", out, "--device", "cpu"]
    code, said, err = command(monkeypatch, capsys, predict, *arguments)
    assert code == 0, err
    return said


def probability(out, name):
    return np.asarray(Image.open(out / f"{name}_probability.png")) / 65535


def test_images_without_a_box_are_counted_and_empty(photos, run, tmp_path, monkeypatch, capsys):
    sheet = write(tmp_path, HEADER + "a,3,4,40,30\nz.png,1,1,2,2\n")
    out = tmp_path / "out"
    said = predicted(monkeypatch, capsys, out, "--weights", run, "--boxes", sheet, photos)
    line = "4 of 5 images have no box, and their masks are empty (b.png, c.png, d.png, …)"
    assert f"{sheet}: {line}\n" in said
    assert "1 row for another image is ignored (z.png)" in said
    assert probability(out, "a").max() > 0
    for name in "bcde":
        assert not probability(out, name).any()
        assert not np.asarray(Image.open(out / f"{name}.png")).any()


def expected_answer(photos, name, box=None, points=None, labels=None):
    """SAM's probabilities (H,W), asked directly."""
    model = net()
    pixels = image_files.read_image(photos / f"{name}.png")
    how = {}
    if box is not None:
        how["boxes"] = model.to_input_pixels(torch.tensor(box, dtype=torch.float32), (48, 64))[
            None, None
        ]
    if points is not None:
        frame = model.to_input_pixels(torch.tensor(points, dtype=torch.float32), (48, 64))
        how |= {"points": frame[None, None], "labels": torch.tensor([[labels]])}
    with torch.no_grad():
        image = model.preprocess(Image.fromarray(pixels))[None]
        logits, _ = model(image, **how)
        return model.postprocess(logits[0, 0], (48, 64))[0].numpy()


def test_predict_asks_by_points_and_by_both(photos, run, tmp_path, monkeypatch, capsys):
    points = tmp_path / "points.csv"
    points.write_text("image,x,y,label\na.png,9,9,1\na.png,40,30,0\nb.png,20,20,\n")
    boxes = write(tmp_path, HEADER + "a.png,3,4,40,30\nc.png,5,5,20,30\n")
    common = ["--weights", run, "--points", points, photos]
    said = predicted(monkeypatch, capsys, tmp_path / "p", *common)
    assert "3 of 5 images have no point, and their masks are empty (c.png, d.png, e.png)" in said
    predicted(monkeypatch, capsys, tmp_path / "b", *common, "--boxes", boxes, "--overlays")

    pair = {"points": [[9, 9], [40, 30]], "labels": [1, 0]}
    one = {"points": [[20, 20]], "labels": [1]}
    for folder, name, how in (
        ("p", "a", pair), ("p", "b", one), ("b", "a", pair | {"box": [3, 4, 40, 30]}),
        ("b", "b", one), ("b", "c", {"box": [5, 5, 20, 30]}),
    ):  # fmt: skip
        expected = expected_answer(photos, name, **how)
        np.testing.assert_allclose(probability(tmp_path / folder, name), expected, atol=1e-4)

    # Points inside and the box are yellow, points outside cyan.
    overlay = np.asarray(Image.open(tmp_path / "b" / "a_overlay.png"))
    assert overlay[9, 9].tolist() == [255, 255, 0] and overlay[4, 20].tolist() == [255, 255, 0]
    assert overlay[30, 39].tolist() == [0, 255, 255]


def test_overlays_leave_out_points_that_are_none():
    picture = Image.new("RGB", (40, 40))
    pictures.draw_prompts(picture, [(None, np.float32([[9, 9], [30, 30]]), np.int64([1, -1]))])
    assert picture.getpixel((9, 9)) == (255, 255, 0) and picture.getpixel((30, 30)) == (0, 0, 0)


def test_points_are_for_sam_alone(photos, run, tmp_path, monkeypatch, capsys):
    sheet = write(tmp_path, "image,x,y\nq.png,1,1\n")
    arguments = ["--weights", run, "--points", sheet, "--out", tmp_path / "no", photos]
    code, _, err = command(monkeypatch, capsys, predict, *arguments)
    assert (
        code == 2
        and err.count("\n") == 1
        and "none of the 1 points is for any of the images" in err
    )
    with pytest.raises(ValueError, match="--points: segformer takes no boxes or points"):
        train.run(train.Options(model="segformer", data=["x"], points="p.csv"))


def test_a_test_scores_points_of_a_file(maps, run, tmp_path, capsys):
    """Beside the ground truth's: deepest points of the file score as those."""
    points = tmp_path / "points.csv"
    lines = ["image,class,object,x,y"]
    for stem, mask in MASKS.items():
        for k, piece in enumerate(boxes_and_points.components(mask, (1, 2))):
            x, y = boxes_and_points.deepest_point(piece)
            lines.append(f"{stem},{['one', 'two'][piece.label - 1]},{k},{x:g},{y:g}")
    points.write_text("\n".join(lines))
    how = {"out": str(tmp_path / "test"), "cache": str(tmp_path / "cache"), "workers": 0}
    how |= {"weights": str(run), "eval": True, "test": [str(maps)], "overlays": 0}
    scores = train.run(train.Options(points=str(points), **how))["tests"]["maps"]["prompts"]
    said = capsys.readouterr().out
    assert "1 of 3 images have no point, and their masks are empty (empty.png)" in said
    scored = rows(tmp_path / "test" / "test" / "per_prompt.csv")
    for kind, names in (("given points", {"a", "b", "empty"}), ("points", {"a", "b"})):
        assert {row["name"] for row in scored if row["prompt"] == kind} == names
    assert scores["given points"]["misses"] == scores["points"]["misses"]
    assert scores["given points"]["dice_pooled"] == scores["points"]["dice_pooled"]


# --- prepare.py boxes -----------------------------------------------------------------------------


def prepared(tmp_path, *arguments):
    """The rows of a file that prepare.py boxes writes: (image, class, x0, y0, x1, y1)."""
    out = tmp_path / "boxes.csv"
    out.unlink(missing_ok=True)
    assert prepare.main(["boxes", *map(str, arguments), "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert lines[0] == "image,class,x0,y0,x1,y1"
    split = [line.split(",") for line in lines[1:]]
    return [(image, name, *map(float, corners)) for image, name, *corners in split]


SQUARE = blobs((255, 4, 5, 20, 18))
MASK_FORMATS = {
    "bmp": Image.fromarray(SQUARE),
    "tif": Image.fromarray(SQUARE.astype(np.uint16) * 257),
    "tiff": Image.fromarray(SQUARE.astype(np.float32) / 255),
    "gif": Image.fromarray(SQUARE),
    "webp": Image.fromarray(SQUARE).convert("RGB"),
    "png": Image.fromarray(SQUARE > 0),
    "jpg": Image.fromarray(SQUARE),
}


@pytest.mark.parametrize("ending", MASK_FORMATS)
def test_masks_of_every_format_give_boxes(ending, photos, tmp_path):
    (tmp_path / "masks").mkdir()
    how = {"lossless": True} if ending == "webp" else {}
    MASK_FORMATS[ending].save(tmp_path / "masks" / f"a.{ending}", **how)
    (tmp_path / "masks" / "._a.png").write_bytes(b"of macOS")
    made = prepared(tmp_path, tmp_path / "masks", "--like", photos)
    assert made == [("a.png", "", 4, 5, 20, 18)]


def test_a_palette_of_two_colours_is_binary(photos, tmp_path):
    mask = Image.fromarray(SQUARE // 255)
    mask.putpalette([0, 0, 0, 128, 0, 0])
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks" / "a.png")
    assert prepared(tmp_path, tmp_path / "masks", "--like", photos)[0][2:] == (4, 5, 20, 18)


def test_numbers_of_instances(photos, tmp_path):
    """Touching nuclei are two objects, one that is cut in two is one; numbers are of 16 bits."""
    mask = blobs((1, 4, 5, 10, 18), (2, 11, 5, 20, 18), size=(48, 64)).astype(np.uint16)
    mask[30:40, 30:40] = 40000
    mask[30:40, 50:55] = 40000
    mask[45, 0:3] = 7  # a speck
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks" / "a.tif")
    made = prepared(tmp_path, tmp_path / "masks", "--like", photos, "--instances")
    assert made == [
        ("a.png", "", 4, 5, 10, 18), ("a.png", "", 11, 5, 20, 18), ("a.png", "", 30, 30, 54, 39),
    ]  # fmt: skip
    how = ["--like", photos, "--instances", "--min-area", "3"]
    assert ("a.png", "", 0, 45, 2, 45) in prepared(tmp_path, tmp_path / "masks", *how)


def test_masks_of_the_data_set_itself(maps, tmp_path):
    expected = [
        ("a.png", "one", 4, 5, 20, 18), ("a.png", "one", 25, 30, 40, 44),
        ("a.png", "two", 30, 8, 50, 20), ("b.png", "two", 3, 3, 12, 40),
    ]  # fmt: skip
    assert prepared(tmp_path, maps / "test" / "masks", "--like", maps) == expected
    assert prepared(tmp_path, maps, "--like", f"{maps}:test") == expected


def test_boxes_of_annotation_files(photos, tmp_path):
    entries = [
        {"img_name": "a.png", "mask_name": "m.png", "bbox": [1, 2, 30.5, 20], "prompts": {}},
        {"img_name": "b.png", "mask_name": "b.png", "bbox": [64, 48, 0, 0], "prompts": {}},
    ]
    path = write(tmp_path, json.dumps(entries), "json")
    assert prepared(tmp_path, path, "--like", photos) == [("a.png", "", 1, 2, 30.5, 20)]
    path = write(tmp_path, json.dumps(COCO), "json")
    made = prepared(tmp_path, path, "--like", photos)
    assert made == [("a.png", "polyp", 1, 2, 30.5, 20), ("b.png", "polyp", 0, 0, 5, 5)]


def test_masks_in_folders_like_their_images(photos, tmp_path):
    for name in ("p1", "p2"):
        (photos / name).mkdir()
        (tmp_path / "masks" / name).mkdir(parents=True)
        Image.new("RGB", (64, 48)).save(photos / name / "x.jpg")
        Image.fromarray(SQUARE).save(tmp_path / "masks" / name / "x.png")
    made = prepared(tmp_path, tmp_path / "masks", "--like", photos)
    assert [row[0] for row in made] == ["p1/x.jpg", "p2/x.jpg"]


def test_what_prepare_boxes_refuses(photos, tmp_path, monkeypatch, capsys):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(SQUARE).save(masks / "a.png")
    Image.fromarray(SQUARE).save(masks / "a.bmp")
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(SQUARE[:-1]).save(other / "a.png")
    (tmp_path / "named").mkdir()
    Image.fromarray(SQUARE).save(tmp_path / "named" / "a.png")
    (tmp_path / "named" / "classes.json").write_text('{"0": "background", "1": "one"}')
    for arguments, expected in (
        ([masks], "a.png: a second mask of this name, with another ending"),
        ([other, "--instances"], "a.png: 64x47, but its image"),
        ([tmp_path / "named", "--instances"], "classes.json names class numbers; remove one"),
        ([other, "--instances", "--mask-threshold", 9], "--instances takes numbers"),
    ):
        how = ["boxes", *arguments, "--like", photos, "--out", tmp_path / "x.csv"]
        code, _, err = command(monkeypatch, capsys, prepare, *how)
        assert code == 2 and err.count("\n") == 1 and expected in err, err
        assert not (tmp_path / "x.csv").exists()
