"""The clicks of the page: what they do, the prompts they become, and the files of both."""

import numpy as np
import pytest
from PIL import Image

from imaging import boxes_and_points, pictures
from page import clicks
from page.clicks import BOX, INSIDE, OUTSIDE, Clicks

SIZE = (30, 40)  # height, width
EMPTY = Clicks(SIZE)


def after(*steps, start=EMPTY) -> Clicks:
    """Clicks after steps: (x, y, mode) or the name of a method."""
    state = start
    for step in steps:
        state = getattr(state, step)() if isinstance(step, str) else state.click(*step)
    return state


def unpacked(state: Clicks) -> list[tuple]:
    """(class, box, points, labels) of each prompt, as lists."""
    rows = []
    for prompt in state.prompts():
        box = None if prompt.box is None else prompt.box.tolist()
        rows.append((prompt.label, box, prompt.points.tolist(), prompt.labels.tolist()))
        assert prompt.mask is None
        assert prompt.points.dtype == np.float32 and prompt.labels.dtype == np.int64
    return rows


@pytest.mark.parametrize(
    "corners",
    [((3, 5), (20, 9)), ((20, 9), (3, 5)), ((3, 9), (20, 5)), ((20, 5), (3, 9))],
)
def test_two_opposite_corners_in_any_order_are_a_box(corners):
    first, second = corners
    waiting = EMPTY.click(*first, BOX)
    assert (
        waiting.corner == first and not waiting.prompts() and "opposite corner" in waiting.message
    )
    state = waiting.click(*second, BOX)
    assert unpacked(state) == [(1, [3, 5, 20, 9], [], [])]
    assert state.corner is None and state.message == ""


def test_clicks_do_not_change_what_they_start_from():
    EMPTY.click(3, 5, BOX).click(20, 9, BOX)
    assert Clicks(SIZE) == EMPTY and EMPTY.objects == (clicks.ClickedObject(),)


def test_clicks_outside_move_to_the_border():
    state = after((-4, -1, BOX), (40, 31.2, BOX), (50, 3.4, INSIDE))
    assert unpacked(state) == [(1, [0, 0, 39, 29], [[39, 3]], [1])]


@pytest.mark.parametrize("second", [(3, 20), (20, 5), (3, 5)])
def test_a_box_without_area_is_not_taken(second):
    state = after((3, 5, BOX), (*second, BOX))
    assert state.corner == (3, 5) and not state.prompts() and "one line" in state.message
    assert unpacked(state.click(9, 9, BOX)) == [(1, [3, 5, 9, 9], [], [])]


def test_points_add_to_the_box_of_the_object():
    state = after((3, 5, BOX), (20, 9, BOX), (4, 6, INSIDE), (19, 8, OUTSIDE))
    assert unpacked(state) == [(1, [3, 5, 20, 9], [[4, 6], [19, 8]], [1, 0])]


def test_a_second_box_is_a_second_object_and_so_are_points_after_next():
    state = after((3, 5, BOX), (20, 9, BOX), (1, 1, BOX), (2, 2, BOX), "new_object", (7, 8, INSIDE))
    boxes = [(1, [3, 5, 20, 9], [], []), (1, [1, 1, 2, 2], [], [])]
    assert unpacked(state) == [*boxes, (1, None, [[7, 8]], [1])]


def test_an_object_needs_a_box_or_a_point_inside():
    state = after((4, 6, OUTSIDE))
    assert not state.prompts() and "only points outside" in state.message
    assert len(after("new_object", start=state).objects) == 1
    assert len(after("new_object").objects) == 1
    assert after("new_object").message == "Object 1: set a box or a point inside."
    assert after((3, 5, INSIDE), "new_object").message.startswith("Object 2: set a box")
    assert unpacked(state.click(5, 5, INSIDE)) == [(1, None, [[4, 6], [5, 5]], [0, 1])]
    assert state.click(5, 5, INSIDE).message == ""


def test_a_point_drops_an_open_box():
    assert after((3, 5, BOX), (4, 6, INSIDE)).corner is None


def test_undo_takes_back_one_step_after_the_other():
    steps = [(3, 5, BOX), (20, 9, BOX), (4, 6, INSIDE), "new_object", (7, 8, INSIDE), "clear"]
    states = [EMPTY]
    for step in steps:
        states.append(after(step, start=states[-1]))
    assert not states[-1].prompts() and len(states[-2].prompts()) == 2

    state = states.pop()
    for earlier in reversed(states):
        state = state.undo()
        assert state is earlier
    assert EMPTY.undo() is EMPTY


def test_undo_skips_refused_clicks():
    state = after((3, 5, BOX), (3, 9, BOX), "undo")
    assert state == EMPTY


def test_classes_belong_to_objects():
    state = after((3, 5, BOX), (20, 9, BOX)).name_class(2)
    state = after("new_object", (7, 8, INSIDE), start=state)
    assert [row[0] for row in unpacked(state)] == [2, 2]
    assert [row[0] for row in unpacked(state.name_class(1))] == [2, 1]
    assert state.name_class(1).undo() is state
    assert state.name_class(2) is state  # nothing to undo
    assert state.undo().name_class(1).message == "Object 2: set a box or a point inside."


def test_pixels_of_a_preview_are_the_middle_of_those_they_stand_for():
    assert clicks.to_image_pixel(0, 2, 1) == (0, 2)
    assert clicks.to_image_pixel(0, 2, 1 / 3) == (1, 7)  # of 0 1 2 and 6 7 8
    assert clicks.to_image_pixel(0, 1, 1 / 2) == (0.5, 2.5)
    assert clicks.to_image_pixel(4, 7, 3) == (1, 2)  # the middle of 3 4 5 and of 6 7 8
    for scale in (1, 1 / 2, 1 / 7, 3):
        x, y = clicks.to_preview_pixel(*clicks.to_image_pixel(5, 9, scale), scale)
        assert (x, y) == pytest.approx((5, 9))


@pytest.mark.parametrize("scale", [1, 1 / 3, 2])
def test_prompts_are_drawn_where_they_are_clicked(scale):
    """In the colours of the objects: a box's side, a point's rim, the cross of an open box."""

    def at(x, y, mode):  # in the preview
        return *clicks.to_image_pixel(x, y, scale), mode

    start = Clicks((round(120 / scale), round(160 / scale)))
    state = after(at(30, 40, BOX), at(90, 80, BOX), start=start)
    state = after("new_object", at(120, 20, INSIDE), at(20, 100, BOX), start=state)
    picture = Image.new("RGB", (160, 120))
    clicks.draw_clicks(picture, state, scale)
    pixels = np.asarray(picture)
    first, second = pictures.class_colours(2)
    assert tuple(pixels[60, 30]) == first and tuple(pixels[60, 60]) == (0, 0, 0)
    assert tuple(pixels[18, 118]) == second
    assert tuple(pixels[100, 20]) == (255, 255, 255)


@pytest.mark.parametrize("classes", [("polyp",), ("background", "one", "two"), None])
def test_predict_reads_the_same_prompts_from_the_files(tmp_path, classes):
    """Objects with a box, with points, and with both, of one class and of several."""
    state = after((3, 5, BOX), (20, 9, BOX), (4, 6, INSIDE), (19, 8, OUTSIDE))
    state = after("new_object", (7, 8, INSIDE), start=state)
    state = after("new_object", (1, 1, BOX), (9, 9, BOX), start=state)
    if classes and len(classes) > 1:
        state = state.name_class(2)

    paths = {"boxes": None, "points": None}
    for kind, text in clicks.prompt_files(state, "scan 1", classes or ("target",)).items():
        paths[kind] = tmp_path / f"{kind}.csv"
        paths[kind].write_text(text)
    names = {"k": "scan 1.png"}
    read, _ = boxes_and_points.read_prompts(*paths.values(), {"k": SIZE}, classes, names)

    def key(prompt):
        box = () if prompt.box is None else tuple(prompt.box.tolist())
        return prompt.label, box, prompt.points.tolist(), prompt.labels.tolist()

    assert sorted(map(key, read["k"])) == sorted(map(key, state.prompts()))


def test_files_without_rows_are_left_out():
    assert clicks.prompt_files(EMPTY, "a", ("target",)) == {}
    assert clicks.prompt_files(after((1, 2, INSIDE)), "a", ("target",)) == {
        "points": "image,class,object,x,y,label\na,,1,1,2,1\n"
    }
    two = after((1, 2, BOX), (5, 6, BOX))
    assert clicks.prompt_files(two, "a", ("background", "one")) == {
        "boxes": "image,class,object,x0,y0,x1,y1\na,one,1,1,2,5,6\n"
    }
