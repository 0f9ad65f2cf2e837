"""Slices of volumes on the page: planes, windows, masks, thresholds."""

import time

import numpy as np
import pytest

from imaging import pictures
from page import slices
from page.slices import PLANES, LabelMasks, ThresholdMasks

RNG = np.random.default_rng(0)


def marked(voxel, size=(5, 4, 3)) -> np.ndarray:
    x = np.zeros(size, np.uint8)
    x[voxel] = 9
    return x


# The picture's row and column of the marked voxel in each plane. The volume has 5 voxels from left
# to right, 4 from back to front, 3 from the feet up.
@pytest.mark.parametrize(
    ("voxel", "axial", "coronal", "sagittal"),
    [
        ((4, 3, 2), (0, 0), (0, 0), (0, 0)),  # the rightmost, foremost, highest
        ((0, 3, 2), (0, 4), (0, 4), (0, 0)),  # the patient's left is on the right
        ((4, 0, 2), (3, 0), (0, 0), (0, 3)),  # the back is below, or on the right
        ((4, 3, 0), (0, 0), (2, 0), (2, 0)),  # the feet are below
    ],
)
def test_planes_lie_as_radiologists_look(voxel, axial, coronal, sagittal):
    expected = {"axial": axial, "coronal": coronal, "sagittal": sagittal}
    x = marked(voxel)
    for name, plane in PLANES.items():
        part = pictures.plane(x, plane.axis, voxel[plane.axis])
        assert [tuple(place) for place in np.argwhere(part)] == [expected[name]], name
    page = pictures.three_planes(x, voxel, (1, 1, 1))  # as predict.py draws them
    assert np.array_equal(page[:, :5], pictures.plane(x, PLANES["axial"].axis, voxel[2]))


def test_pixels_lead_back_to_voxels():
    size = (5, 4, 3)
    for voxel in np.ndindex(size):
        x = marked(voxel)
        for plane in PLANES.values():
            part = pictures.plane(x, plane.axis, voxel[plane.axis])
            ((row, column),) = np.argwhere(part)
            place = slices.voxel_at(
                plane, (column + 0.5) / part.shape[1], (row + 0.5) / part.shape[0], size
            )
            assert place == {a: voxel[a] for a in range(3) if a != plane.axis}
    assert slices.voxel_at(PLANES["axial"], 1.0, -0.1, size) == {0: 0, 1: 3}


def test_letters_name_the_sides():
    """Letters are written at all four edges, and each plane has those of its axes."""
    assert {name: plane.edges for name, plane in PLANES.items()} == {
        "axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI",
    }  # fmt: skip
    drawn = slices.write_edges(np.zeros((90, 120, 3), np.uint8), "RLAP").any(2)
    assert drawn[30:60, :20].any() and drawn[30:60, -20:].any()
    assert drawn[:20, 50:70].any() and drawn[-20:, 50:70].any()
    assert not drawn[25:65, 25:95].any()


def test_pictures_have_true_proportions_and_one_scale():
    size, spacing = (100, 80, 20), (1.0, 1.0, 5.0)  # 100 x 80 x 100 mm
    assert slices.picture_size(PLANES["axial"], size, spacing, 200) == (160, 200)
    assert slices.picture_size(PLANES["coronal"], size, spacing, 200) == (200, 200)
    assert slices.picture_size(PLANES["sagittal"], size, spacing, 200) == (200, 160)
    assert slices.picture_size(PLANES["coronal"], (600, 600, 1), (1, 1, 0.1)) == (1, 512)


def test_the_first_slices_show_most_of_the_masks():
    first, second = np.zeros((2, 6, 6, 6), bool)
    first[2, 3, 4] = True
    second[2, 1:5, 4] = True
    assert pictures.central_voxel([first, second], first.shape) == (2, 3, 4)
    assert pictures.central_voxel([], (6, 5, 4)) == (3, 2, 2)
    assert pictures.central_voxel([np.zeros((6, 5, 4), bool)], (6, 5, 4)) == (3, 2, 2)


# --- grey levels ----------------------------------------------------------------------------------


def test_windows_map_level_and_width_to_grey():
    limits = slices.window_limits(40, 400)
    assert limits == (-160, 240)
    hu = np.int16([-1000, -160, 40, 240, 3000])
    assert slices.grey_levels(hu, limits).tolist() == [0, 0, 128, 255, 255]
    assert slices.grey_levels(hu, (5, 5)).tolist() == [0, 0, 255, 255, 255]  # a window of no width


def test_percentiles_leave_half_of_the_share_on_each_side():
    x = np.arange(1000, dtype=np.uint16).reshape(10, 10, 10)
    low, high = slices.percentile_limits(x, 10)
    sample = x[::2, ::2, ::2]
    assert np.mean(sample < low) == pytest.approx(0.05, abs=0.01)
    assert np.mean(sample > high) == pytest.approx(0.05, abs=0.01)


def test_volumes_are_stored_in_half_of_the_memory():
    hu = np.float32([-1024.4, 0.6, 40000]).reshape(1, 1, 3)
    assert slices.whole_hu(hu).ravel().tolist() == [-1024, 1, 32767]
    grey = np.float32([2, 3, 4]).reshape(1, 1, 3)
    assert slices.sixteen_bits(grey).ravel().tolist() == [0, 32768, 65535]
    assert not slices.sixteen_bits(np.full((2, 2, 2), 7, np.float32)).any()


# --- masks ----------------------------------------------------------------------------------------


def test_masks_at_every_threshold_are_those_of_the_probabilities():
    steps = slices.threshold_steps(0.4213)
    p = RNG.random((2, 4, 5, 6), np.float32)
    p[0, 0, 0] = [0, 1, 0.5, 0.01, 0.4213, 0.99]  # on the steps themselves: not above them
    masks = ThresholdMasks(p, steps)
    assert len(steps) == 100 and np.float32(0.4213) in steps
    for threshold in [0.01, 0.3, 0.4213, 0.5, 0.99]:
        expected = p > np.float32(threshold)
        assert np.array_equal(np.stack([*masks.volumes(threshold)]), expected)
        assert masks.counts(threshold) == expected.sum((1, 2, 3)).tolist()
        part = masks.slices(PLANES["coronal"], 3, threshold, [1])
        assert np.array_equal(part, pictures.plane(expected, PLANES["coronal"].axis, 3)[1:])


def test_masks_of_labels():
    labels = RNG.integers(0, 4, (4, 5, 6)).astype(np.uint8)
    masks = LabelMasks(labels, [1, 3])
    assert masks.counts(0.5) == [(labels == 1).sum(), (labels == 3).sum()]
    part = pictures.plane(labels, PLANES["axial"].axis, 2)
    assert np.array_equal(masks.slices(PLANES["axial"], 2, 0.5, [1]), [part == 3])
    assert masks.slices(PLANES["axial"], 2, 0.5, []).shape == (0, 5, 4)
    assert np.array_equal([*masks.volumes(0.5)], [labels == 1, labels == 3])


def test_masks_are_drawn_in_their_colours():
    grey = np.full((4, 5), 100, np.uint8)
    masks = np.zeros((2, 4, 5), bool)
    masks[0, 1, 2] = masks[1, 3, 4] = True
    drawn = slices.draw_slice(grey, masks, [(200, 0, 0), (0, 200, 100)], 0.5, (8, 10))
    assert drawn.shape == (8, 10, 3)
    assert (drawn[2:4, 4:6] == [150, 50, 50]).all()
    assert (drawn[6:, 8:] == [50, 150, 100]).all()
    assert (drawn == 100).all(2).sum() == 80 - 8


def test_pictures_stand_side_by_side():
    row = slices.side_by_side([np.full((4, 3, 3), 1, np.uint8), np.full((2, 5, 3), 2, np.uint8)], 2)
    assert row.shape == (4, 10, 3)
    assert (row[:, :3] == 1).all() and (row[:2, 5:] == 2).all()
    assert not row[2:, 5:].any() and not row[:, 3:5].any()


@pytest.mark.slow
def test_a_slice_of_a_large_volume_is_drawn_in_a_third_of_a_second():
    """The fastest of five, as other programs use the machine, too."""
    values = slices.axial_order(np.zeros((512, 512, 300), np.int16))
    masks = LabelMasks(np.ones((512, 512, 300), np.uint8), [*range(1, 15)])
    colours = pictures.class_colours(14)
    for plane in PLANES.values():
        seconds = []
        for index in range(100, 105):
            start = time.perf_counter()
            grey = slices.grey_levels(pictures.plane(values, plane.axis, index), (-160, 240))
            part = masks.slices(plane, index, 0.5, [*range(14)])
            size = slices.picture_size(plane, values.shape, (0.8, 0.8, 1))
            slices.draw_slice(grey, part, colours, 0.4, size)
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.3
