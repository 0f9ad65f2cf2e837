"""Overlays of volumes: which slices they show, their size, proportions and captions."""

import time

import numpy as np
import pytest

from imaging import pictures

SPACING = (1.0, 1.0, 1.0)


def grey(shape=(40, 30, 20)):
    return np.full(shape, 100, np.uint8)


def masks_of(shape, *boxes):
    """Return bool (K,X,Y,Z), a box of slices for each class."""
    masks = np.zeros((len(boxes), *shape), bool)
    for mask, box in zip(masks, boxes, strict=True):
        mask[box] = True
    return masks


@pytest.fixture
def captions(monkeypatch):
    """The captions of the planes that are drawn from here on, and the sizes of the planes."""
    seen = []
    labelled = pictures.labelled

    def record(picture, caption):
        seen.append((caption, picture.size))
        return labelled(picture, caption)

    monkeypatch.setattr(pictures, "labelled", record)
    return seen


def numbers(captions, plane):
    """The indices, from 0, of the slices of a plane."""
    return [int(text.split()[1]) - 1 for text, _ in captions if text.startswith(plane)]


# --- which slices --------------------------------------------------------------------------------


def test_five_axial_slices_go_through_the_object(captions):
    shape = (40, 30, 60)
    prediction = masks_of(shape, np.s_[10:20, 5:10, 20:40])
    prediction[0, 10:30, 5:10, 33] = True  # the largest slice
    pictures.volume_overlay(grey(shape), None, prediction, SPACING)
    axial = numbers(captions, "axial")
    assert axial == [22, 26, 30, 33, 38]  # 34 became 33
    assert numbers(captions, "coronal") == [5]  # the first of those that show most
    assert numbers(captions, "sagittal") == [10]
    assert captions[0][0] == "axial 23 of 60, 22.0 mm"


def test_the_ground_truth_decides_if_it_has_an_object(captions):
    shape = (40, 30, 60)
    truth = masks_of(shape, np.s_[10:20, 5:10, 50:60])
    prediction = masks_of(shape, np.s_[10:20, 5:10, 0:10])
    pictures.volume_overlay(grey(shape), truth, prediction, SPACING)
    assert min(numbers(captions, "axial")) >= 50
    captions.clear()
    pictures.volume_overlay(grey(shape), np.zeros_like(truth), prediction, SPACING)
    assert max(numbers(captions, "axial")) < 10


@pytest.mark.parametrize(
    "at, expected", [(0, [0, 1, 2, 3, 4]), (30, [28, 29, 30, 31, 32]), (59, [55, 56, 57, 58, 59])]
)
def test_a_thin_object_is_shown_with_its_neighbours(at, expected, captions):
    shape = (10, 10, 60)
    pictures.volume_overlay(grey(shape), None, masks_of(shape, np.s_[3:5, 3:5, at]), SPACING)
    assert numbers(captions, "axial") == expected


def test_without_an_object_slices_are_spread_over_the_volume(captions):
    shape = (10, 20, 50)
    pictures.volume_overlay(grey(shape), None, np.zeros((2, *shape), bool), SPACING)
    assert numbers(captions, "axial") == [5, 15, 25, 35, 45]
    assert numbers(captions, "coronal") == [10] and numbers(captions, "sagittal") == [5]


def test_classes_count_the_same_whatever_their_size():
    shape = (12, 9, 8)
    rng = np.random.default_rng(0)
    masks = rng.random((3, *shape)) < 0.1
    masks[1] = False
    shares = pictures.class_shares(masks, masks.shape[1:])
    for axis in range(3):
        other_axes = tuple(1 + other for other in range(3) if other != axis)
        areas = masks.sum(other_axes)
        expected = (areas / np.maximum(1, areas.sum(1, keepdims=True))).sum(0)
        np.testing.assert_allclose(shares[axis], expected, rtol=1e-12)


# --- size and proportions ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 48, 2), (64, 48, 1), (10, 80, 40), (3, 3, 3), (2, 99, 99)])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.5, 0.5, 12), (4, 1, 1)])
def test_every_volume_gets_a_page_of_a_readable_size(shape, spacing, captions):
    picture = pictures.volume_overlay(grey(shape), None, np.zeros((1, *shape), bool), spacing)
    assert 900 <= picture.width <= 5000 and picture.height <= 3500
    assert len(captions) == 2 + min(5, shape[pictures.main_axis(spacing)])


def test_planes_have_true_proportions(captions):
    """Slices of 2 mm through 100 x 60 pixels of 0.5 mm: 50 x 30 x 80 mm."""
    shape = (100, 60, 40)
    pictures.volume_overlay(grey(shape), None, np.zeros((1, *shape), bool), (0.5, 0.5, 2.0))
    sizes = {text.split()[0]: size for text, size in captions}
    assert sizes == {"axial": (360, 216), "coronal": (360, 576), "sagittal": (216, 576)}


def test_slices_are_those_that_were_taken():
    assert pictures.main_axis((0.8, 0.8, 5.0)) == 2
    assert pictures.main_axis((5.0, 0.8, 0.8)) == 0  # sagittal MR
    assert pictures.main_axis((1.0, 1.0, 1.0)) == 2
    assert pictures.main_axis((1.1, 1.0, 1.0)) == 2  # nearly the same


def test_masks_lie_where_the_grey_levels_do():
    """A bright box in a dark volume has the colour of the prediction and nothing else has."""
    shape = (40, 30, 20)
    prediction = masks_of(shape, np.s_[5:20, 20:28, 5:15])
    image = np.zeros(shape, np.uint8)
    image[prediction[0]] = 255
    picture = pictures.draw_plane(image, None, prediction, (2, 10), (400, 300))
    coloured = np.asarray(picture).any(2)
    assert coloured[20:100, 200:350].all()  # right is left, front is up
    inside = coloured[15:105, 195:355].sum()
    assert inside == coloured.sum()


def test_a_thumbnail_has_three_planes_in_a_row():
    shape = (40, 30, 20)
    prediction = masks_of(shape, np.s_[5:20, 20:28, 5:15])
    assert pictures.volume_thumbnail(grey(), None, prediction, SPACING).size == (110, 30)


def test_a_large_volume_is_drawn_in_a_moment():
    """512 x 512 x 300 voxels took 0.25 s when this was written."""
    shape = (512, 512, 300)
    prediction = masks_of(shape, np.s_[100:300, 150:350, 60:200])
    image = np.zeros(shape, np.uint8)
    start = time.process_time()
    pictures.volume_overlay(image, None, prediction, (0.8, 0.8, 1.0))
    assert time.process_time() - start < 10
