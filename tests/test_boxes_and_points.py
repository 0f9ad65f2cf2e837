"""Prompts for SAM: components, boxes and points, and which files of boxes are refused."""

import json

import numpy as np
import pytest

from imaging.boxes_and_points import (
    SOURCES,
    Component,
    ImageNames,
    box_prompt,
    components,
    deepest_point,
    image_box,
    make_prompts,
    point_prompts,
    read_boxes,
)


def class_map():
    """Class 1: two pieces; class 2: one that hangs together by a corner; class 3: a speck."""
    mask = np.zeros((40, 60), np.int64)
    mask[2:8, 3:13] = 1
    mask[20:30, 50:60] = 1
    mask[10:14, 20:25], mask[14:19, 25:30] = 2, 2
    mask[35, 35] = 3
    mask[0, :] = 255
    mask[39, :5] = -1
    return mask


def rectangle(x0, y0, x1, y1, size=(30, 40)):
    mask = np.zeros(size, np.uint8)
    mask[y0 : y1 + 1, x0 : x1 + 1] = 1
    return Component(1, mask, np.float32([x0, y0, x1, y1]))


# --- components -----------------------------------------------------------------------------------


def test_components_by_hand():
    mask = class_map()
    found = components(mask, range(1, 4))
    assert [c.label for c in found] == [1, 1, 2]
    boxes = [[3, 2, 12, 7], [50, 20, 59, 29], [20, 10, 29, 18]]
    assert [c.box.tolist() for c in found] == boxes
    for component, area in zip(found, (60, 100, 45), strict=True):
        assert component.mask.dtype == np.uint8 and (component.mask == 1).sum() == area
        assert ((component.mask == 255) == ((mask == 255) | (mask == -1))).all()
        assert (mask[component.mask == 1] == component.label).all()
    assert [c.box.tolist() for c in components(mask, [3], min_area=1)] == [[35, 35, 35, 35]]
    assert components(mask, [3], min_area=2) == components(mask, [7]) == []


def test_the_background_is_a_class_if_asked_for():
    (background,) = components(class_map(), [0])
    assert (background.mask == 1).sum() == (class_map() == 0).sum()


@pytest.mark.parametrize("seed", range(20))
def test_components_divide_a_class(seed):
    mask = np.random.default_rng(seed).integers(0, 3, (17, 23))
    found = components(mask, [1], min_area=1)
    assert (sum((c.mask == 1).astype(int) for c in found) == (mask == 1)).all()
    for c in found:
        y, x = np.nonzero(c.mask == 1)
        assert c.box.tolist() == [x.min(), y.min(), x.max(), y.max()]


# --- boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [1, 5, 10, 1000])
@pytest.mark.parametrize(
    "corners", [(0, 0, 39, 29), (5, 5, 5, 5), (39, 29, 39, 29), (10, 3, 11, 20), (0, 8, 9, 9)]
)
def test_jitter_neither_inverts_nor_leaves_the_image(corners, jitter):
    component, rng = rectangle(*corners), np.random.default_rng(0)
    for _ in range(300):
        box = box_prompt(component, jitter, rng)
        x0, y0, x1, y1 = box
        assert 0 <= x0 <= x1 <= 39 and 0 <= y0 <= y1 <= 29 and box.dtype == np.float32
        assert np.abs(box - corners).max() <= jitter
    assert component.box.tolist() == list(corners)


def test_jitter_moves_each_side_both_ways_by_whole_pixels():
    rng = np.random.default_rng(0)
    moves = [box_prompt(rectangle(15, 12, 28, 22), 3, rng) - [15, 12, 28, 22] for _ in range(500)]
    for side in np.stack(moves).T:
        assert set(side) == set(range(-3, 4)) and abs(side.mean()) < 0.4


def test_without_jitter_the_box_is_tight():
    component = rectangle(15, 12, 28, 22)
    assert box_prompt(component).tolist() == [15, 12, 28, 22]
    box_prompt(component)[:] = 0
    assert component.box.tolist() == [15, 12, 28, 22]
    assert image_box((30, 40)).tolist() == [0, 0, 39, 29]


# --- points ---------------------------------------------------------------------------------------


def test_points_lie_where_their_labels_say():
    component = components(class_map(), [2])[0]
    xy, labels = point_prompts(component, 1000, np.random.default_rng(0), background=300)
    assert xy.dtype == np.float32 and labels.dtype == np.int64
    assert labels.tolist() == [1] * 1000 + [0] * 300
    x, y = xy.astype(int).T
    assert (component.mask[y, x] == labels).all()  # so none lies where it is 255
    assert len(set(zip(x[:1000], y[:1000], strict=True))) == 45  # every pixel comes up


def test_points_are_as_many_as_asked_for_whatever_there_is():
    rng = np.random.default_rng(0)
    speck, everything = rectangle(3, 4, 3, 4), rectangle(0, 0, 39, 29)
    xy, labels = point_prompts(speck, 3, rng)
    assert xy.tolist() == [[3, 4]] * 3 and labels.tolist() == [1] * 3
    xy, labels = point_prompts(everything, 1, rng, background=2)
    assert labels.tolist() == [1, -1, -1] and xy[1:].tolist() == [[0, 0]] * 2


def test_the_deepest_point_by_hand():
    assert deepest_point(rectangle(10, 4, 16, 10)).tolist() == [13, 7]
    assert deepest_point(rectangle(0, 0, 8, 8)).tolist() == [4, 4]  # the border is outside, too
    dumbbell = rectangle(2, 2, 6, 6)
    dumbbell.mask[4, 6:20], dumbbell.mask[10:27, 10:27] = 1, 1
    assert deepest_point(dumbbell).tolist() == [18, 18]
    ring = rectangle(5, 5, 25, 25)
    ring.mask[8:23, 8:23] = 0
    x, y = deepest_point(ring).astype(int)
    assert ring.mask[y, x] == 1  # where the middle of the box is not


# --- all prompts of a sample ----------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
def test_what_each_kind_holds(train):
    how = {"jitter": 2, "points": 3, "background": 2} if train else {}
    for kind in SOURCES[:3]:
        rng = np.random.default_rng(0) if train else None
        prompts = make_prompts(class_map(), [1, 2, 3], kind, rng, **how)
        assert [p.label for p in prompts] == [1, 1, 2]
        for prompt, component in zip(prompts, components(class_map(), [1, 2]), strict=True):
            assert (prompt.mask == component.mask).all()
            if kind != "both" or not train:
                assert (prompt.box is None) == (kind == "points")
            count = 0 if kind == "boxes" else 5 if train else 1
            assert prompt.points.shape == (count, 2) and prompt.labels.shape == (count,)
            if not train and kind != "points":
                assert (prompt.box == component.box).all()
            if not train and kind != "boxes":
                assert (prompt.points[0] == deepest_point(component)).all()


def test_of_both_each_prompt_is_a_box_or_points_or_box_and_points():
    rng, forms = np.random.default_rng(0), []
    for _ in range(200):
        for p in make_prompts(class_map(), [1, 2], "both", rng, points=2):
            assert p.points.shape == (2, 2)
            forms.append((p.box is not None, bool((p.labels == 1).all())))
            assert (p.labels == 1).all() or (p.labels == -1).all()
    shares = {form: forms.count(form) / len(forms) for form in set(forms)}
    assert shares.keys() == {(True, False), (False, True), (True, True)}
    assert all(abs(share - 1 / 3) < 0.07 for share in shares.values()), shares


def test_a_whole_image_as_box_asks_for_a_whole_class():
    (prompt,) = make_prompts(class_map(), [1], "image")
    assert prompt.box.tolist() == [0, 0, 59, 39] and prompt.points.shape == (0, 2)
    assert (prompt.mask == 1).sum() == 160 and (prompt.mask == 255).sum() == 65
    (absent,) = make_prompts(class_map() * 0, [1], "image")
    assert not absent.mask.any()  # an empty answer is an answer
    with pytest.raises(ValueError, match="--sam-prompts image: does not say which of 2 classes"):
        make_prompts(class_map(), [1, 2], "image")


def test_unknown_kinds_are_refused():
    with pytest.raises(
        ValueError, match="--sam-prompts box: unknown; SAM takes one of boxes, points"
    ):
        make_prompts(class_map(), [1], "box")


def test_a_sample_without_objects_has_no_prompts():
    assert make_prompts(np.zeros((9, 9), np.int64), [1, 2], "boxes") == []


def test_a_seed_gives_the_same_prompts_and_another_one_others():
    def draw(seed):
        how = {"jitter": 5, "points": 2, "limit": 2}
        prompts = make_prompts(class_map(), [1, 2], "both", np.random.default_rng(seed), **how)
        return [[p.label, str(p.box), p.points.tolist()] for p in prompts]

    assert draw(1) == draw(1) != draw(2)


def test_a_limit_draws_among_all_components():
    mask = np.zeros((40, 40), np.int64)
    for k in range(9):
        mask[k // 3 * 12 : k // 3 * 12 + 6, k % 3 * 12 : k % 3 * 12 + 6] = 1
    seen, rng = set(), np.random.default_rng(0)
    for _ in range(50):
        boxes = [tuple(p.box.tolist()) for p in make_prompts(mask, [1], "boxes", rng, limit=4)]
        assert len(set(boxes)) == 4
        seen |= set(boxes)
    assert len(seen) == 9
    assert len(make_prompts(mask, [1], "boxes", limit=4)) == 9  # an evaluation asks for all


# --- boxes from files -----------------------------------------------------------------------------

SIZES = {"a.png": (30, 40), "b, c.png": (10, 20)}
ROWS = [
    {"image": "a.png", "class": "polyp", "x0": 1, "y0": 2.5, "x1": 40, "y1": 30},
    {"image": "b, c.png", "x0": 0, "y0": 0, "x1": 5, "y1": 5},
    {"image": "a.png", "class": "", "x0": 3, "y0": 4, "x1": 3, "y1": 4},
]
TABLE = """class,image,x0,y0,x1,y1
polyp,a.png,1,2.5,40,30
, "b, c.png", 0, 0, 5, 5

,a.png,3,4,3,4
"""


def write(folder, text, ending="csv"):
    path = folder / f"boxes.{ending}"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        (TABLE, "csv"),
        ("\ufeff" + TABLE.replace("\n", "\r\n"), "CSV"),  # as Excel writes it
        (json.dumps(ROWS), "json"),
    ],
)
def test_boxes_from_a_file(tmp_path, text, ending):
    boxes = read_boxes(write(tmp_path, text, ending), SIZES, ("polyp", "wall"))
    assert list(boxes) == ["a.png", "b, c.png"]
    first, second = boxes["a.png"]
    assert (first.name, second.name) == ("polyp", None) and first.xy.dtype == np.float32
    assert first.xy.tolist() == [1, 2.5, 40, 30] and second.xy.tolist() == [3, 4, 3, 4]
    assert boxes["b, c.png"][0].xy.tolist() == [0, 0, 5, 5]


def line(*values):
    return "image,class,x0,y0,x1,y1\na.png,polyp,1,1,2,2\n" + ",".join(map(str, values)) + "\n"


def entry(**changes):
    return json.dumps([{"image": "a.png", "x0": 1, "y0": 1, "x1": 2, "y1": 2} | changes])


@pytest.mark.parametrize(
    ("ending", "text", "error"),
    [
        ("csv", line("a.png", "cat", 1, 1, 2, 2), "line 3: unknown class cat; there are polyp"),
        ("csv", line("a.png", "", 5, 1, 2, 2), "line 3: box 5 1 2 2 is inverted"),
        ("csv", line("a.png", "", 1, 5, 2, 2), "line 3: box 1 5 2 2 is inverted"),
        ("csv", line("a.png", "", "nan", 1, 2, 2), "line 3: box nan 1 2 2 is not four numbers"),
        ("csv", line("a.png", "", 1, 1, "inf", 2), "line 3: box 1 1 inf 2 is not four numbers"),
        ("csv", line("a.png", "", 1, "one", 2, 2), "line 3: box 1 one 2 2 is not four numbers"),
        ("csv", line("a.png", "", -1, 1, 2, 2), "line 3: box -1 1 2 2 lies outside a.png"),
        ("csv", line("a.png", "", 1, 1, 40.5, 2), "outside a.png, which is 40x30"),
        ("csv", line("a.png", "", 1, 1, 2, 31), "line 3: box 1 1 2 31 lies outside"),
        ("csv", line("a.png", "", 1, 1, 2), "line 3: has no y1"),
        ("csv", line("a.png", "", 1, 1, 2, 2, 7), "line 3: has 7 values for 6 columns"),
        ("csv", line("", "", 1, 1, 2, 2), "line 3: has no image"),
        ("csv", "a.png,1,1,2,2\na.png,1,1,2,2\n", "has no header; its first line must be"),
        ("csv", line('"a.png', "", 1, 1, 2, 2), "boxes.csv: unexpected end of data"),
        ("csv", 'image,x0,y0,x1,y1\n"a\nb",1,1,2,2\n', "the file names a b, the images are named"),
        ("csv", "image,x0,y0,x1,y1\n", "holds no boxes"),
        ("csv", "", "holds no boxes"),
        ("csv", b"image,x0\n\xff\xfe", "is not text in UTF-8 (byte 9)"),
        ("json", "[]", "holds no boxes"),
        ("json", "[{", "line 1 column"),
        ("json", '{"image": "a.png"}', "expected a list"),
        ("json", "[1]", "expected a list"),
        ("json", entry(x0=float("nan")), "entry 0: box nan 1 2 2 is not four numbers"),
        ("json", entry(x0=None), "entry 0: has no x0"),
        ("json", entry(x0=True), "entry 0: box True 1 2 2 is not four numbers"),
        ("json", entry(x0=[1]), "is not four numbers"),
        ("json", entry(x1=10**400), "is not four numbers"),
        (
            "json",
            entry(image=["a.png"]),
            "the file names ['a.png'], the images are named like a.png",
        ),
        ("txt", "1 1 2 2", "boxes are read from .csv and .json files"),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path, ending, text, error):
    path = write(tmp_path, text, ending)
    with pytest.raises(ValueError) as caught:
        read_boxes(path, SIZES, ("polyp",))
    message = str(caught.value)
    assert message.startswith(str(path)) and error in message and "\n" not in message


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.csv: no such file of boxes"):
        read_boxes(tmp_path / "none.csv", SIZES)


# --- which image a name means ---------------------------------------------------------------------

PATHS = {1: "g/slice0.png", 2: "h/slice0.png", 3: "slice0.png", 4: "h/slice1.png", 5: "a/h/b.png"}


@pytest.mark.parametrize(
    "name, image",
    [
        ("g/slice0.png", 1),
        ("./h/slice0.png", 2),
        ("h\\slice0.png", 2),
        ("h/../g/slice0.png", 1),
        ("./slice0.png", 3),
        ("slice1.png", 4),
        ("b.png", 5),
        ("a\\h/b.png", 5),
    ],
)
def test_a_name_means_one_image(name, image):
    assert ImageNames(PATHS).find(name) == image


@pytest.mark.parametrize(
    "name", ["h/b.png", "../g/slice0.png", "/g/slice0.png", "C:\\b.png", "B.png"]
)
def test_names_of_no_image(name):
    assert ImageNames(PATHS).find(name) is None


def test_a_bare_name_of_several_images_is_refused():
    expected = "fits 3 images; add its folder, as in g/slice0.png, h/slice0.png, ./slice0.png"
    with pytest.raises(ValueError, match=expected):
        ImageNames(PATHS).find("slice0.png")


def test_the_shortest_name_means_its_image():
    names = ImageNames(PATHS)
    shortest = {image: names.shortest(image) for image in PATHS}
    assert shortest == PATHS | {3: "./slice0.png", 4: "slice1.png", 5: "b.png"}
    for image, name in shortest.items():
        assert names.find(name) == image


def test_boxes_of_files_of_one_name_stay_apart(tmp_path):
    sizes = {1: (10, 20), 2: (30, 40)}
    paths = {1: "g/a.png", 2: "h/a.png"}
    header = "image,x0,y0,x1,y1\n"
    path = write(tmp_path, header + "g/a.png,1,2,3,4\nh\\a.png,5,6,39,29\n")
    boxes = read_boxes(path, sizes, names=paths)
    assert {image: [row.xy.tolist() for row in found] for image, found in boxes.items()} == {
        1: [[1, 2, 3, 4]],
        2: [[5, 6, 39, 29]],
    }
    path = write(tmp_path, header + "g/a.png,1,2,39,4\n")  # would fit into the other one
    with pytest.raises(ValueError, match="line 2: box 1 2 39 4 lies outside g/a.png, .* 20x10"):
        read_boxes(path, sizes, names=paths)
    path = write(tmp_path, header + "g/a.png,1,2,3,4\na.png,1,2,3,4\n")
    with pytest.raises(ValueError, match="boxes.csv, line 3: a.png fits 2 images"):
        read_boxes(path, sizes, names=paths)
