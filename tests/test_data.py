"""Reading rules, annotation errors, the cache, and the order of batches."""

import io
import itertools
import json
import os
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFilter
from scipy import ndimage

import data
from imaging import image_files, layouts

RNG = np.random.default_rng(0)
BLOB = np.zeros((40, 60), dtype=bool)
BLOB[5:20, 10:30] = True


def write_set(
    root, masks: dict[str, Image.Image], images: dict[str, Image.Image] | None = None, split="train"
):
    """A prompted data set with one entry a mask; images are noise unless given."""
    for folder in ("images", "masks", "anns"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    items = []
    for name, mask in masks.items():
        image = (images or {}).get(name)
        if image is None:
            image = Image.fromarray(
                RNG.integers(0, 255, (mask.height, mask.width, 3), dtype=np.uint8)
            )
        stem = os.path.splitext(name)[0]
        image.save(root / "images" / f"{stem}.png", exif=image.getexif())
        mask.save(root / "masks" / name, **({"quality": 90} if name.endswith("jpg") else {}))
        prompts = {"p0": "", "p1": "polyp", "p7": ["a growth", "a lump"]}
        items.append({"img_name": f"{stem}.png", "mask_name": name, "prompts": prompts})
    (root / "anns" / f"{split}.json").write_text(json.dumps(items))
    return root


def opened(root, tmp_path, split="train"):
    return data.open_dataset(layouts.read_entries(root, split), tmp_path / "cache")


def palette_mask():
    mask = Image.fromarray(BLOB.astype(np.uint8), mode="P")
    mask.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)  # as VOC colours its class 1
    return mask


def as_image(array, mode=None):
    image = Image.fromarray(array)
    return image.convert(mode) if mode else image


MASKS = {
    "0/1": ("a.png", as_image(BLOB.astype(np.uint8))),
    "0/255": ("a.png", as_image(BLOB.astype(np.uint8) * 255)),
    "1 bit": ("a.png", as_image(BLOB)),
    "palette": ("a.png", palette_mask()),
    "jpeg": ("a.jpg", as_image(BLOB.astype(np.uint8) * 255)),
    "green": ("a.png", as_image(np.stack([BLOB * 0, BLOB * 255, BLOB * 0], -1).astype(np.uint8))),
    "grey + alpha": ("a.png", as_image(BLOB.astype(np.uint8) * 255, "LA")),
    "16 bit": ("a.png", as_image(BLOB.astype(np.uint16) * 65535)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask_is_read_as_the_same_foreground(kind, tmp_path):
    name, mask = MASKS[kind]
    dataset = opened(write_set(tmp_path / "set", {name: mask}), tmp_path)
    assert np.array_equal(dataset.pixels(0)[1], BLOB)
    sample = dataset.sample(0, "p1")
    assert sample["mask"].dtype == torch.int64 and sample["mask"].sum() == BLOB.sum()
    assert sample["image"].shape == (3, 40, 60) and sample["image"].dtype == torch.uint8


def test_a_nearly_black_jpeg_mask_beside_a_full_one_stays_empty(tmp_path):
    noise = BLOB * RNG.integers(0, 8, BLOB.shape)  # what compression can leave of nothing
    faint = as_image(noise.astype(np.uint8))
    full = as_image(BLOB.astype(np.uint8) * 255)
    dataset = opened(write_set(tmp_path / "set", {"a.png": full, "b.png": faint}), tmp_path)
    assert dataset.pixels(0)[1].sum() == BLOB.sum() and dataset.pixels(1)[1].sum() == 0
    assert "read > 127, 1 of them empty" in dataset.describe()


# --- binary masks, maps of several values, and one decision for a data set ---


def blobs(size=96, seed=0):
    """Return a mask of a few ellipses, bool (size,size)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    mask = np.zeros((size, size), dtype=bool)
    for _ in range(4):
        centre = rng.uniform(0.15, 0.85, 2) * size
        radii = rng.uniform(0.06, 0.22, 2) * size
        mask |= ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    return mask


def through_jpeg(mask, quality):
    file = io.BytesIO()
    mask.save(file, "JPEG", quality=quality)
    return as_image(np.asarray(Image.open(file)))


def resized(mask, factor, how):
    side = round(mask.width * factor)
    return mask.resize((side, side), how)


HONEST = {
    "hard": lambda mask: mask,
    **{f"JPEG {q}": lambda mask, q=q: through_jpeg(mask, q) for q in (50, 70, 75, 85, 95, 100)},
    **{
        f"blurred {sigma}": lambda mask, sigma=sigma: mask.filter(ImageFilter.GaussianBlur(sigma))
        for sigma in (1, 3)
    },
    **{
        f"{how.name} x{factor}": lambda mask, how=how, factor=factor: resized(mask, factor, how)
        for how in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
        for factor in (0.4, 4)
    },
    "resized and JPEG": lambda mask: through_jpeg(resized(mask, 2, Image.Resampling.BICUBIC), 75),
}


@pytest.mark.parametrize("kind", HONEST)
def test_noise_and_soft_edges_are_cut_at_a_half_without_a_word(kind, tmp_path, capsys):
    masks = {}
    for k in range(3):
        masks[f"{k}.png"] = HONEST[kind](as_image(blobs(seed=k).astype(np.uint8) * 255))
    dataset = opened(write_set(tmp_path / "set", masks), tmp_path)
    assert dataset.rules == {dataset.entries[0].root: "> 127"}
    for k, mask in enumerate(masks.values()):
        assert np.array_equal(dataset.pixels(k)[1], np.asarray(mask) > 127)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("decoding 3 images")


def nuclei(step=7, side=5):
    """Return numbered squares, uint16 (96,96): 1, 2, …"""
    numbers = np.zeros((96, 96), dtype=np.uint16)
    corners = range(0, 96 - side, step)
    for k, (y, x) in enumerate(itertools.product(corners, corners)):
        numbers[y : y + side, x : x + side] = k + 1
    return numbers


def painted(*values):
    """Return stripes of these values on 0, uint8 (60,80)."""
    mask = np.zeros((60, 80), dtype=np.uint8)
    for k, value in enumerate(values):
        mask[5 + 12 * k : 12 + 12 * k, 10:70] = value
    return mask


def in_colours():
    mask = np.zeros((60, 80, 3), dtype=np.uint8)
    mask[5:20, 10:40] = 112, 48, 32
    mask[30:50, 20:60] = 176, 112, 32
    return mask


SEVERAL = {
    "instances": (as_image(nuclei()), "0 (4991 pixels), 1 (25 pixels)"),
    "grey levels": (as_image(painted(128, 255)), "0 (3960 pixels), 128 (420 pixels), 255 (420"),
    "colours": (as_image(in_colours()), "0 (3550 pixels), 112 (450 pixels), 176 (800 pixels)"),
    "class numbers and void": (as_image(painted(1, 2, 255)), "1 (420 pixels), 2 (420 pixels), 255"),
    "a class and void": (as_image(painted(1, 255)), "0 (3960 pixels), 1 (420 pixels), 255 (420"),
    "numbers alone": (as_image(painted(1, 2, 3)), "no value above 127: 0 (3540 pixels), 1 (420"),
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("beside", ["none", "JPEG masks"])
def test_maps_of_several_values_are_refused(kind, beside, tmp_path):
    mask, counts = SEVERAL[kind]
    masks = {"map.png": mask}
    if beside == "JPEG masks" and kind != "numbers alone":
        for k in range(5):
            masks[f"{k}.png"] = through_jpeg(as_image(blobs(seed=k).astype(np.uint8) * 255), 75)
    with pytest.raises(ValueError) as caught:
        opened(write_set(tmp_path / "set", masks), tmp_path)
    line = str(caught.value)
    assert "set/masks/map.png: holds" in line and counts in line and "\n" not in line
    assert "classes.json" in line and "--mask-threshold 0..255" in line


def test_a_class_alone_is_named_but_other_values_are_in_the_masks(tmp_path):
    root = write_set(tmp_path / "set", {"a.png": as_image(painted(51, 102, 153, 204))})
    (root / "classes.json").write_text('{"0": "background", "1": "lesion"}')
    with pytest.raises(ValueError, match="a.png: holds several values"):
        opened(root, tmp_path)


def test_small_objects_in_many_files_are_found_together(tmp_path):
    masks = {}
    for k in range(12):
        mask = painted(255)
        mask[40:43, 10 + 5 * k : 13 + 5 * k] = 128  # nine pixels, one of them flat
        masks[f"{k}.png"] = as_image(mask)
    with pytest.raises(
        ValueError, match=r"0.png: holds several values.*\(11 more masks are like it"
    ):
        opened(write_set(tmp_path / "set", masks), tmp_path)


@pytest.mark.parametrize("value", [128, 200, 254])
def test_a_foreground_of_one_value_is_binary(value, tmp_path):
    root = write_set(tmp_path / "set", {"a.png": as_image(painted(value))})
    assert np.array_equal(opened(root, tmp_path).pixels(0)[1], painted(value) > 0)


def test_flat_pixels_are_those_whose_neighbourhood_has_one_value(tmp_path):
    rng = np.random.default_rng(1)
    for shape in ((40, 50), (3, 3), (2, 9), (1, 1)):
        mask = np.kron(rng.integers(0, 4, shape), np.ones((2, 3)))[: shape[0], : shape[1]] * 85
        mask = mask.astype(np.uint8)
        low = ndimage.minimum_filter(mask, 3, mode="nearest")
        flat = low == ndimage.maximum_filter(mask, 3, mode="nearest")
        flat[[0, -1]] = flat[:, [0, -1]] = False  # the border has no whole neighbourhood
        expected = [
            np.bincount(mask.ravel(), minlength=256),
            np.bincount(mask[flat], minlength=256),
        ]
        path = tmp_path / "a.png"
        as_image(mask).save(path)
        counts = data.count_values(layouts.Entry("a", path, path, {}, tmp_path), mask)
        assert np.array_equal(counts, [*expected, np.zeros(256)]), shape


def test_a_given_threshold_decides_and_the_images_are_not_decoded_again(tmp_path, capsys):
    root = write_set(tmp_path / "set", {"a.png": as_image(painted(64, 128, 255))})
    lists = {"all": layouts.read_entries(root, "train")}
    with pytest.raises(ValueError, match="several values"):
        data.open_datasets(lists, tmp_path / "cache")
    capsys.readouterr()
    for threshold in (0, 63, 64, 127, 128, 254):
        reading = data.MaskReading(threshold)
        dataset = data.open_datasets(lists, tmp_path / "cache", reading=reading)["all"]
        assert np.array_equal(dataset.pixels(0)[1], painted(64, 128, 255) > threshold)
        assert f"masks read > {threshold}," in dataset.describe()
        assert data.rules_by_name(dataset.rules) == {"set": f"--mask-threshold {threshold}"}
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"all 1 masks are empty \(read --mask-threshold 255\)"):
        data.open_datasets(lists, tmp_path / "cache", reading=data.MaskReading(255))


def test_a_threshold_has_no_meaning_for_class_numbers(tmp_path):
    root = write_set(tmp_path / "set", {"a.png": as_image(painted(1, 2))})
    (root / "classes.json").write_text('{"0": "background", "1": "a", "2": "b"}')
    lists = {"all": layouts.read_entries(root, "train")}
    with pytest.raises(ValueError, match="--mask-threshold: these masks hold class numbers"):
        data.open_datasets(lists, tmp_path / "cache", reading=data.MaskReading(40))


def three_splits(root, train, val, test):
    for split, mask in {"train": train, "val": val, "test": test}.items():
        write_set(root, {f"{split}.png": as_image(mask)}, split=split)
    return {split: layouts.read_entries(root, split) for split in ("train", "val", "test")}


def test_void_stays_void_in_a_split_without_a_lesion(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/classes.json").write_text('{"0": "background", "1": "lesion"}')
    lists = three_splits(tmp_path / "set", painted(1, 255), painted(255), painted(1))
    counts = data.count_masks(sum(lists.values(), []))
    decision = data.mask_rule(sum(lists.values(), []), counts)
    assert (decision.rule, decision.errors, decision.notes) == ("by number", [], [])
    with pytest.raises(ValueError, match=r"all 1 masks are empty \(read by number\)"):
        data.open_datasets(lists, tmp_path / "cache")  # not "> 127", which made void the lesion
    del lists["val"]
    sets = data.open_datasets(lists, tmp_path / "cache")
    assert np.array_equal(sets["train"].pixels(0)[1], painted(1, 255))
    assert np.array_equal(sets["test"].pixels(0)[1], painted(1))

    # A later test of a split that holds too little to tell goes by the run's rule.
    lists = {"val": layouts.read_entries(tmp_path / "set", "val")}
    alone = data.open_datasets(lists, tmp_path / "cache")["val"]
    assert "read > 127" in alone.describe()
    with pytest.raises(ValueError, match="read by number"):
        reading = data.MaskReading(known={"set": "by number"})
        data.open_datasets(lists, tmp_path / "cache", reading=reading)


def test_a_run_s_rule_is_left_where_the_values_contradict_it(tmp_path, capsys):
    root = write_set(
        tmp_path / "set", {"a.png": through_jpeg(as_image(blobs() * np.uint8(255)), 75)}
    )
    reading = data.MaskReading(known={"set": "> 0", "other": "by number"})
    lists = {"all": layouts.read_entries(root, "train")}
    dataset = data.open_datasets(lists, tmp_path / "cache", reading=reading)["all"]
    assert "read > 127" in dataset.describe()
    assert f"{root}: masks are read > 127; the run read set > 0" in capsys.readouterr().out


@pytest.mark.parametrize("joined", [True, False])
def test_files_of_two_ranges_are_each_read_by_their_own(joined, tmp_path, capsys):
    """0/255 in train, 0/1 in val, and in test a black JPEG that is 1 all over and a 0/255 mask."""
    black = through_jpeg(Image.new("L", (80, 60)), 70)
    assert set(np.unique(black)) == {1}
    lists = three_splits(tmp_path / "set", painted(255), painted(1), painted(255))
    if joined:
        sets = data.open_datasets(lists, tmp_path / "cache")
        for name in lists:
            assert np.array_equal(sets[name].pixels(0)[1], painted(1)), name
        said = capsys.readouterr().out
        assert said.count("1 mask holds 0 and 1 (val.png), others go up to 255") == 1
        assert data.rules_by_name(sets["train"].rules) == {"set": "by file"}
    else:
        black.save(tmp_path / "set/masks/val.png")
        sets = data.open_datasets(lists | {"val": lists["val"] + lists["test"]}, tmp_path / "cache")
        assert data.rules_by_name(sets["val"].rules) == {"set": "> 127"}
        assert not sets["val"].pixels(0)[1].any() and sets["val"].pixels(1)[1].any()


def test_colours_are_no_class_numbers(tmp_path):
    red_green = np.zeros((60, 80, 3), dtype=np.uint8)
    red_green[5:20, 10:40, 0] = 255
    red_green[30:50, 20:60, 1] = 255
    root = write_set(tmp_path / "set", {"a.png": as_image(red_green)})
    names = {"0": "background", "1": "red", "2": "green"}
    (root / "classes.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match="a.png: holds colours, which are no class numbers"):
        opened(root, tmp_path)
    as_image(np.repeat(painted(1, 2)[..., None], 3, axis=2)).save(root / "masks/a.png")
    assert np.array_equal(opened(root, tmp_path).pixels(0)[1], painted(1, 2))  # grey as RGB


def test_a_foreground_in_any_one_colour_is_binary_but_not_in_several(tmp_path):
    shapes = painted(1, 2)
    for k, colour in enumerate([(255, 0, 0), (128, 0, 0), (0, 200, 90), (255, 255, 255)]):
        colours = np.zeros((60, 80, 3), dtype=np.uint8)
        colours[shapes > 0] = colour
        for kind, mask in {
            "png": as_image(colours),
            "jpg": through_jpeg(as_image(colours), 90),
        }.items():
            if kind == "jpg" and max(colour) < 255:
                continue  # noise around a grey value cannot be cut at a half
            root = write_set(tmp_path / f"{kind}{k}", {"a.png": mask})
            read = opened(root, tmp_path).pixels(0)[1]
            assert np.array_equal(read, np.asarray(mask).max(axis=2) > 127), (kind, colour)

    voc = Image.fromarray(shapes, mode="P")  # two classes, both of which have 128 as their maximum
    voc.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759)
    red_green = np.stack([(shapes == 1) * 255, (shapes == 2) * 255, shapes * 0], -1).astype(
        np.uint8
    )
    on_blue = np.where(shapes[..., None] > 0, 255, (0, 0, 255)).astype(np.uint8)
    several = {
        "palette": voc,
        "red and green": as_image(red_green),
        "white on blue": as_image(on_blue),
    }
    for kind, mask in several.items():
        root = write_set(tmp_path / kind, {"a.png": mask})
        with pytest.raises(ValueError, match="a.png: holds several colours"):
            opened(root, tmp_path)
        lists = {"all": layouts.read_entries(root, "train")}
        reading = data.MaskReading(0)
        chosen = data.open_datasets(lists, tmp_path / "cache", reading=reading)["all"]
        assert np.array_equal(chosen.pixels(0)[1], np.asarray(mask.convert("RGB")).any(axis=2))


def test_all_masks_empty_is_an_error(tmp_path):
    empty = as_image(np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match="all 1 masks are empty"):
        opened(write_set(tmp_path / "set", {"a.png": empty}), tmp_path)


def test_pooled_sets_keep_their_own_mask_rule(tmp_path):
    ones = write_set(tmp_path / "ones", {"a.png": as_image(BLOB.astype(np.uint8))})
    full = write_set(tmp_path / "full", {"a.png": as_image(BLOB.astype(np.uint8) * 255)})
    entries, _ = layouts.read_entries(ones, "train") + layouts.read_entries(full, "train"), None
    dataset = data.open_dataset(entries, tmp_path / "cache")
    assert [dataset.pixels(i)[1].sum() for i in (0, 1)] == [BLOB.sum()] * 2
    assert [dataset.sample(i, "p1")["dataset"] for i in (0, 1)] == ["ones", "full"]


def test_label_takes_one_class_of_a_class_map(tmp_path):
    classes = np.zeros((10, 10), np.uint8)
    classes[:3], classes[5:] = 1, 2
    root = write_set(tmp_path / "set", {"a.png": as_image(classes)})
    item = json.loads((root / "anns/train.json").read_text())[0]
    (root / "anns/train.json").write_text(json.dumps([item | {"label": k} for k in (1, 2)]))
    dataset = opened(root, tmp_path)
    assert [entry.name for entry in dataset.entries] == ["a-1", "a-2"]
    assert [dataset.pixels(i)[1].sum() for i in (0, 1)] == [30, 50]
    assert len({int(row[0]) for row in dataset.rows}) == 1  # the image is kept once


def test_images_of_every_kind(tmp_path):
    ramp = np.linspace(0, 1, 256)[None].repeat(4, 0)
    grey = (ramp * 255).astype(np.uint8)
    colour = np.stack([grey, 255 - grey, grey // 2], -1)
    wanted = np.repeat(grey[..., None], 3, 2)
    cases = {
        "grey": (Image.fromarray(grey), wanted),
        "rgba": (Image.fromarray(np.dstack([colour, grey])), colour),
        "1 bit": (Image.fromarray(grey > 127), np.repeat((grey > 127)[..., None] * 255, 3, 2)),
        "16 bit": (Image.fromarray((1000 + ramp * 3000).astype(np.uint16)), wanted),
    }
    for kind, (image, expected) in cases.items():
        image.save(tmp_path / "x.png")
        read = image_files.read_image(tmp_path / "x.png")
        assert read.dtype == np.uint8 and read.shape == (4, 256, 3), kind
        assert np.abs(read.astype(int) - expected).max() <= 1, kind
    Image.fromarray((ramp * 7 - 3).astype(np.float32)).save(tmp_path / "x.tif")
    assert np.abs(image_files.read_image(tmp_path / "x.tif").astype(int) - wanted).max() <= 1
    Image.fromarray(np.full((4, 4), 700, np.uint16)).save(tmp_path / "flat.png")
    assert not image_files.read_image(tmp_path / "flat.png").any()


def with_orientation(image, number):
    image.getexif()[ExifTags.Base.Orientation] = number
    return image


def test_exif_orientation_turns_image_and_mask_alike(tmp_path):
    pixels = RNG.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    turned = np.rot90(pixels, -1)  # orientation 6: turn a quarter clockwise to see it upright
    full = BLOB.astype(np.uint8) * 255
    masks = {
        "stored like the image": as_image(full),
        "with its own tag": with_orientation(as_image(full), 6),
        "drawn upright": as_image(np.rot90(full, -1).copy()),
    }
    for k, (kind, mask) in enumerate(masks.items()):
        root = tmp_path / str(k)
        write_set(root, {"a.png": mask}, {"a.png": with_orientation(as_image(pixels), 6)})
        if kind == "with its own tag":
            mask.save(root / "masks/a.png", exif=mask.getexif())
        dataset = opened(root, tmp_path)
        assert np.array_equal(dataset.pixels(0)[0], turned), kind
        assert np.array_equal(dataset.pixels(0)[1], np.rot90(BLOB, -1)), kind


def good_set(tmp_path):
    mask = as_image(BLOB.astype(np.uint8) * 255)
    return write_set(tmp_path / "set", {"a.png": mask, "b.png": mask})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def rewrite(root, change):
    items = json.loads((root / "anns/train.json").read_text())
    (root / "anns/train.json").write_text(json.dumps(change(items)))


BROKEN = {
    "missing image": (
        lambda root: (root / "images/a.png").unlink(),
        FileNotFoundError,
        "images/a.png",
    ),
    "missing mask": (
        lambda root: (root / "masks/b.png").unlink(),
        FileNotFoundError,
        "masks/b.png",
    ),
    "truncated image": (lambda root: truncate(root / "images/a.png"), ValueError, "images/a.png"),
    "not an image": (
        lambda root: (root / "masks/a.png").write_text("<html>"),
        ValueError,
        "masks/a.png",
    ),
    "other size": (
        lambda root: as_image(np.ones((8, 8), np.uint8) * 255).save(root / "masks/a.png"),
        ValueError,
        "masks/a.png: 8x8, but",
    ),
    "not JSON": (lambda root: (root / "anns/train.json").write_text("{"), ValueError, "train.json"),
    "no list": (lambda root: (root / "anns/train.json").write_text("3"), ValueError, "train.json"),
    "no mask_name": (
        lambda root: rewrite(root, lambda x: [{"img_name": "a.png"}]),
        ValueError,
        "mask_name",
    ),
    "numbers as prompts": (
        lambda root: rewrite(root, lambda x: [x[0] | {"prompts": {"p1": [3]}}]),
        ValueError,
        "entry 0",
    ),
    **{
        f"label {label!r}": (
            lambda root, label=label: rewrite(root, lambda x: [x[0] | {"label": label}]),
            ValueError,
            f"label {label!r} of",
        )
        for label in ("2", 1.0, 300, True)
    },
    "one name twice": (
        lambda root: rewrite(root, lambda x: [x[0], x[0] | {"prompts": {"p1": "b"}}]),
        ValueError,
        "a second mask named a",
    ),
    "no entries": (lambda root: rewrite(root, lambda x: []), ValueError, "no entries"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sets_are_refused_with_the_file_s_name(kind, tmp_path):
    root = good_set(tmp_path)
    breaking, error, words = BROKEN[kind]
    breaking(root)
    with pytest.raises(error) as caught:
        opened(root, tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True


def test_folders_that_are_no_data_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        layouts.read_entries(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="not a data set; it needs"):
        layouts.read_entries(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="splits here: train"):
        layouts.read_entries(good_set(tmp_path), "testA")


def test_prompt_choice(tmp_path):
    entry = layouts.read_entries(good_set(tmp_path), "train")[0]
    assert entry.text("p0") == "" and entry.text("p7") == "a growth"
    assert entry.text("a red polyp") == "a red polyp"
    drawn = {entry.text("random", np.random.default_rng(k)) for k in range(40)}
    assert drawn == {"polyp", "a growth", "a lump"}  # never p0
    both = {entry.text("p7,p0", np.random.default_rng(k)) for k in range(40)}
    assert both == {"", "a growth", "a lump"} and entry.text("p7,p0") == "a growth"
    with pytest.raises(ValueError, match="no prompt of type p9, only p0, p1, p7"):
        entry.text("p9")


def test_the_cache_is_made_once_and_notices_a_changed_file(tmp_path, capsys):
    root = good_set(tmp_path)
    first = opened(root, tmp_path)
    assert "decoding 2 images once" in capsys.readouterr().out
    assert opened(root, tmp_path).path == first.path
    assert "decoding" not in capsys.readouterr().out
    as_image(np.zeros((40, 60, 3), np.uint8)).save(root / "images/a.png")
    changed = opened(root, tmp_path)
    assert changed.path != first.path and not changed.pixels(0)[0].any()
    changed.path.unlink()  # by somebody who needs the room
    capsys.readouterr()
    assert not opened(root, tmp_path).pixels(0)[0].any()
    assert "decoding 2 images once" in capsys.readouterr().out


def test_no_room_for_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: type("U", (), {"free": 10})())
    with pytest.raises(OSError, match="choose another folder with --cache"):
        opened(good_set(tmp_path), tmp_path)


def test_a_dataset_travels_to_workers_without_its_pixels(tmp_path):
    dataset = opened(good_set(tmp_path), tmp_path)
    dataset.pixels(0)
    packed = pickle.dumps(dataset)
    assert len(packed) < 4000
    assert np.array_equal(pickle.loads(packed).pixels(1)[0], dataset.pixels(1)[0])


def test_what_another_entry_of_the_image_has_is_not_absent(tmp_path):
    root = write_set(tmp_path / "set", {name: palette_mask() for name in ("a.png", "b.png")})
    one, other = json.loads((root / "anns/train.json").read_text())
    texts = ("lung", one), ("heart", one), ("liver", other), ("heart", other)
    rewrite(root, lambda _: [item | {"label": k, "prompts": {"p1": text}}
                             for k, (text, item) in enumerate(texts, 1)])  # fmt: skip
    dataset, rng = opened(root, tmp_path), np.random.default_rng(0)
    asked = [{dataset.absent_prompt(i, "p1", rng) for _ in range(20)} for i in range(4)]
    assert asked == [{"liver"}, {"liver"}, {"lung"}, {"lung"}]


def test_an_empty_training_split_is_told(tmp_path):
    root = good_set(tmp_path)
    rewrite(root, lambda x: [])
    with pytest.raises(ValueError, match="set: its split train is empty"):
        layouts.train_and_val([root], 0)


def test_validation_is_split_off_by_patient(tmp_path, capsys):
    mask = as_image(BLOB.astype(np.uint8) * 255)
    names = [f"patient{p}_{k}.png" for p in range(10) for k in range(3)]
    root = write_set(tmp_path / "set", dict.fromkeys(names, mask))
    train, val = layouts.train_and_val([root], seed=1, group_regex=r"patient\d+")
    assert len(val) == 3 and len({entry.group for entry in val}) == 1 and len(train) == 27
    assert not {e.group for e in train} & {e.group for e in val}
    assert "no validation split" in capsys.readouterr().out
    assert [e.name for e in layouts.train_and_val([root], 1, r"patient\d+")[1]] == [
        e.name for e in val
    ]
    assert layouts.train_and_val([root], 1, r"patient(\d+)")[1][0].group.isdigit()


def test_batches_are_the_same_from_anywhere():
    whole = list(data.train_batches(10, 3, epochs=4, seed=7, start=0))
    assert len(whole) == 4 * 3 and [len(b) for b in whole[:3]] == [
        3,
        3,
        3,
    ]  # a last one of 1 is left out
    for start in (1, 5, 11):
        assert list(data.train_batches(10, 3, 4, 7, start)) == whole[start:]
    for epoch in range(4):
        seen = [i for batch in whole for e, i in batch if e == epoch]
        assert len(seen) == len(set(seen)) == 9
    assert whole[0] != [(0, i) for _, i in whole[3]]  # another order in another epoch
    assert list(data.train_batches(1, 16, 2, 0, 0)) == [[(0, 0)], [(1, 0)]]  # --overfit 1
    assert [data.batches_per_epoch(n, 4) for n in (1, 3, 4, 5, 6, 8)] == [1, 1, 1, 1, 2, 2]
    assert data.batches_per_epoch(10, 1) == 10 and data.batches_per_epoch(11, 3) == 4


def test_loader_gives_the_same_with_any_number_of_workers(tmp_path):
    dataset = opened(good_set(tmp_path), tmp_path)
    results = []
    for workers in (0, 2):
        items = data.Items(dataset, "p7", drawn, train=True, seed=3)
        before = torch.get_rng_state()
        batches = data.make_loader(
            items, data.train_batches(2, 2, 5, 3, 0), workers, torch.device("cpu")
        )
        results.append(torch.cat([batch["x"] for batch in batches]))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*results) and len(results[0].unique()) == 10


def drawn(sample, train, rng):
    """A recipe's inputs for the test above: one number that the item's generator draws."""
    return {"x": torch.tensor(rng.random())}


# --- which pixels a file holds -------------------------------------------------------------------


def png_bytes(x, colour_type):
    """A PNG of uint16 (H,W,C), written by hand: Pillow writes no 16-bit colours."""
    H, W, C = x.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    header = struct.pack(">IIBBBBB", W, H, 16, colour_type, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, part in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = struct.pack(">I", zlib.crc32(kind + part))
        content += struct.pack(">I", len(part)) + kind + part + check
    return content


def tiff_bytes(x, order="<", compressed=False, planes=False, **more):
    """A TIFF of (H,W,C), of uint16, int16 or float32, in either byte order. more: further tags."""
    H, W, C = x.shape
    kinds = {"u": 1, "i": 2, "f": 3}
    pixels = x.astype(x.dtype.newbyteorder(order))
    parts = [pixels[..., k] for k in range(C)] if planes else [pixels]
    parts = [part.tobytes() for part in parts]
    if compressed:
        parts = [zlib.compress(part) for part in parts]
    starts = [8 + sum(map(len, parts[:k])) for k in range(len(parts))]

    tags = {256: [W], 257: [H], 258: [8 * x.dtype.itemsize] * C, 259: [8 if compressed else 1]}
    tags |= {262: [2 if C > 1 else 1], 273: starts, 277: [C], 278: [H]}
    tags |= {279: [len(part) for part in parts], 284: [2 if planes else 1]}
    tags |= {338: [2]} if C == 4 else {}
    tags |= {339: [kinds[x.dtype.kind]] * C} | {int(k[1:]): v for k, v in more.items()}

    pixels = b"".join(parts)
    ifd = struct.pack(order + "H", len(tags))
    beyond, place = b"", 8 + len(pixels) + 2 + 12 * len(tags) + 4
    for tag in sorted(tags):
        value = struct.pack(f"{order}{len(tags[tag])}I", *tags[tag])
        if len(value) > 4:
            place_here = struct.pack(order + "I", place + len(beyond))
            beyond, value = beyond + value, place_here
        ifd += struct.pack(order + "HHI", tag, 4, len(tags[tag])) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(pixels))
    return head + pixels + ifd + struct.pack(order + "I", 0) + beyond


def stretched(x):
    low, high = x.min(), x.max()
    return np.round((x.astype(float) - low) * 255 / (high - low))


COLOURS_16 = np.random.default_rng(7).integers(5000, 5200, (6, 8, 4)).astype(np.uint16)
DEEP = {
    "png rgb": lambda x: (png_bytes(x[..., :3], 2), x[..., :3]),
    "png rgba": lambda x: (png_bytes(x, 6), x[..., :3]),
    "png grey + alpha": lambda x: (png_bytes(x[..., :2], 4), x[..., [0, 0, 0]]),
    "tiff": lambda x: (tiff_bytes(x[..., :3]), x[..., :3]),
    "tiff rgba": lambda x: (tiff_bytes(x), x[..., :3]),
    "tiff big-endian": lambda x: (tiff_bytes(x[..., :3], ">"), x[..., :3]),
    "tiff deflated": lambda x: (tiff_bytes(x[..., :3], "<", True), x[..., :3]),
    "tiff big-endian deflated": lambda x: (tiff_bytes(x[..., :3], ">", True), x[..., :3]),
}


@pytest.mark.parametrize("kind", DEEP)
def test_16_bits_a_channel_are_stretched_as_16_bit_grey_is(kind, tmp_path):
    """All values share their high bytes, 19 and 20, but for two in a hundred."""
    content, colours = DEEP[kind](COLOURS_16)
    path = tmp_path / "x"
    path.write_bytes(content)
    read = image_files.read_image(path)
    assert read.dtype == np.uint8 and np.array_equal(read, stretched(colours))


def test_16_bit_colours_are_turned(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(COLOURS_16[..., :3], 2))
    assert np.array_equal(image_files.sixteen_bit_colours(path), COLOURS_16[..., :3])
    turned = image_files.sixteen_bit_colours(path, orientation=6)
    assert np.array_equal(turned, np.rot90(COLOURS_16[..., :3], -1))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.int16, np.uint16, np.uint32])
def test_grey_tiffs_of_either_byte_order(order, compressed, dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    x = np.random.default_rng(3).integers(0, 3000, (6, 8, 1)).astype(dtype)
    if dtype == np.uint32:
        x = x * np.uint32(1_400_000)  # above the largest signed number
    (tmp_path / "x.tif").write_bytes(tiff_bytes(x, order, compressed))
    if dtype == np.uint32 and order == ">":
        with pytest.raises(ValueError, match="not readable as an image"):  # Pillow knows it not
            image_files.read_image(tmp_path / "x.tif")
        return
    read = image_files.read_image(tmp_path / "x.tif")
    assert np.array_equal(read, np.repeat(stretched(x), 3, axis=2))


def test_wide_channels_that_cannot_be_had_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    planes = tmp_path / "planes.tif"
    planes.write_bytes(tiff_bytes(COLOURS_16[..., :3], planes=True))
    with pytest.raises(ValueError, match="planes.tif: .* pip install tifffile.* save it as PNG"):
        image_files.read_image(planes)
    wide = tmp_path / "wide.ppm"
    wide.write_bytes(b"P6\n8 6\n65535\n" + COLOURS_16[..., :3].astype(">u2").tobytes())
    with pytest.raises(ValueError, match="wide.ppm: 16 bits a channel of this kind"):
        image_files.read_image(wide)
    premultiplied = tmp_path / "premultiplied.tif"
    premultiplied.write_bytes(tiff_bytes(COLOURS_16, _338=[1]))
    with pytest.raises(ValueError, match="16 bits a channel of this kind .RGBa."):
        image_files.read_image(premultiplied)


def test_masks_of_16_bit_colours(tmp_path):
    path = tmp_path / "a.png"
    classes = (BLOB * 3).astype(np.uint16)
    for mask, numbers, expected in (
        (classes, True, classes),  # the high byte of 3 is 0
        ((BLOB * 65535).astype(np.uint16), False, BLOB * 255),
    ):
        path.write_bytes(png_bytes(np.repeat(mask[..., None], 3, axis=2), 2))
        assert np.array_equal(image_files.read_mask(path, numbers=numbers), expected)


@pytest.mark.filterwarnings("error::RuntimeWarning")  # of arithmetic with NaN
def test_pixels_that_are_no_numbers_become_0_and_the_rest_is_stretched(tmp_path, capsys):
    ramp = np.linspace(-3, 4, 60)[None].repeat(40, 0).astype(np.float32)
    spoilt = ramp.copy()
    spoilt[0, 30], spoilt[1], spoilt[2], spoilt[3] = np.nan, np.nan, np.inf, -np.inf
    finite = np.isfinite(spoilt)
    full = as_image(BLOB.astype(np.uint8) * 255)
    root = write_set(tmp_path / "set", {"a.png": full, "b.png": full, "c.png": full})
    for name, image in (("a", spoilt), ("b", ramp), ("c", spoilt)):
        Image.fromarray(image).save(root / "images" / f"{name}.tif")
    rewrite(root, lambda x: [item | {"img_name": item["img_name"][:1] + ".tif"} for item in x])

    read = image_files.read_image(root / "images/a.tif")
    assert not read[~finite].any()
    assert np.array_equal(read[finite], np.repeat(stretched(ramp)[..., None], 3, 2)[finite])
    for _ in "decoded", "from the cache":
        dataset = opened(root, tmp_path)
        assert np.array_equal(dataset.pixels(2)[0], read)
        lines = [line for line in capsys.readouterr().out.splitlines() if "decoding" not in line]
        assert lines == [f"{root}: 2 images (a.tif, c.tif) with NaN or infinite pixels, read as 0"]

    Image.fromarray(np.full((40, 60), np.nan, np.float32)).save(root / "images/a.tif")
    with pytest.raises(ValueError, match="a.tif: no pixel is a finite number"):
        opened(root, tmp_path)


def with_alpha(colour, hidden, alpha=BLOB * 255):
    """RGBA: a colour where the blob is, another one elsewhere."""
    colours = np.where(BLOB[..., None], np.uint8(colour), np.uint8(hidden))
    return as_image(np.dstack([colours, alpha]).astype(np.uint8))


def palette_with_alpha(colours, alphas):
    """Index 0 outside and 1 inside the blob."""
    mask = as_image(BLOB.astype(np.uint8))
    mask = Image.frombytes("P", mask.size, mask.tobytes())
    mask.putpalette(colours + [0] * 762)
    mask.info["transparency"] = bytes(alphas)
    return mask


WHITE, BLACK, RED, GREY = [255] * 3, [0] * 3, [250, 9, 9], [200] * 3
STROKE = with_alpha(RED, BLACK, np.where(BLOB, 255, 0))
FAINT = np.array(with_alpha(RED, BLACK))
FAINT[30, 30:40] = [170, 85, 0, 3]  # colours of faint pixels are rounded by whoever drew them
ALPHA = {
    "white, drawn in alpha": with_alpha(WHITE, WHITE),
    "black, drawn in alpha": with_alpha(BLACK, BLACK),
    "grey + alpha": Image.merge(
        "LA", [as_image(np.full(BLOB.shape, 255, np.uint8)), as_image(BLOB * np.uint8(255))]
    ),
    "red stroke on hidden white": with_alpha(RED, WHITE),
    "red stroke on hidden black": STROKE,
    "faint pixels": as_image(FAINT),
    "colours and alpha agree": with_alpha(WHITE, BLACK),
    "alpha 1": with_alpha(WHITE, WHITE, np.where(BLOB, 1, 0)),
    "opaque": with_alpha(WHITE, BLACK, np.full(BLOB.shape, 255)),
    "alpha forgotten": with_alpha(WHITE, BLACK, np.zeros(BLOB.shape)),
    "palette, white in alpha": palette_with_alpha(WHITE + WHITE, [0, 255]),
    "palette, hidden white": palette_with_alpha(WHITE + RED, [0, 255]),
    "palette, opaque": palette_with_alpha(BLACK + RED, [255, 255]),
}


@pytest.mark.parametrize("kind", ALPHA)
def test_masks_with_an_alpha_channel(kind, tmp_path):
    root = write_set(tmp_path / "set", {"a.png": as_image(BLOB)})
    mask = ALPHA[kind]
    mask.save(root / "masks/a.png")
    assert Image.open(root / "masks/a.png").mode == mask.mode
    assert np.array_equal(opened(root, tmp_path).pixels(0)[1], BLOB)


def test_soft_alpha_is_cut_at_a_half(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    mask = np.dstack([np.full_like(ramp, 255)] * 3 + [ramp])
    as_image(mask).save(tmp_path / "a.png")
    assert np.array_equal(image_files.read_mask(tmp_path / "a.png"), ramp)


def test_nothing_drawn_in_alpha_is_empty(tmp_path):
    with_alpha(WHITE, WHITE, np.zeros(BLOB.shape)).save(tmp_path / "a.png")
    assert not image_files.read_mask(tmp_path / "a.png").any()


HOLE = np.zeros(BLOB.shape)
HOLE[:, :30] = 255
UNCLEAR = {
    "a photo cut out": as_image(
        np.dstack([RNG.integers(0, 255, (40, 60, 3)), BLOB * 255]).astype(np.uint8)
    ),
    "white on black in a field of view": with_alpha(WHITE, BLACK, HOLE),
    "black on hidden white": with_alpha(BLACK, WHITE),
    "palette": palette_with_alpha(GREY + RED, [128, 255]),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_colours_and_alpha_that_contradict_each_other_are_refused(kind, tmp_path):
    UNCLEAR[kind].save(tmp_path / "a.png")
    words = "a.png: colours and transparency both vary, .*save the mask as a grey image"
    with pytest.raises(ValueError, match=words):
        image_files.read_mask(tmp_path / "a.png")


def test_class_numbers_are_colours_whatever_is_transparent(tmp_path):
    numbers = np.zeros(BLOB.shape, np.uint8)
    numbers[:5], numbers[20:] = 1, 2
    path = tmp_path / "a.png"
    alpha = (numbers > 0) * np.uint8(255)
    as_image(np.dstack([numbers] * 3 + [alpha])).save(path)
    assert np.array_equal(image_files.read_mask(path, numbers=True), numbers)
    alpha[0, 0] = 0  # a class that is hidden
    as_image(np.dstack([numbers] * 3 + [alpha])).save(path)
    with pytest.raises(ValueError, match="colours and transparency both vary"):
        image_files.read_mask(path, numbers=True)
    palette = palette_with_alpha(BLACK + BLACK, [0, 255])
    palette.save(path)
    assert np.array_equal(image_files.read_mask(path, numbers=True), BLOB)


def test_float_masks_are_cut_at_a_half(tmp_path):
    soft = np.array([[0, 0.2, 0.499, 0.5, 0.95, 1]] * 6, np.float32)
    Image.fromarray(soft).save(tmp_path / "soft.tif")
    read = image_files.read_mask(tmp_path / "soft.tif")
    assert np.array_equal(read > 127, soft >= 0.5) and read[0].tolist() == [
        0,
        51,
        127,
        128,
        242,
        255,
    ]

    root = write_set(tmp_path / "set", {"hard.png": as_image(BLOB), "soft.png": as_image(BLOB)})
    for name, value in (("hard", 1), ("soft", 0.95)):
        (root / f"masks/{name}.png").unlink()
        Image.fromarray((BLOB * value).astype(np.float32)).save(root / f"masks/{name}.tif")
    rewrite(root, lambda x: [i | {"mask_name": i["mask_name"][:4] + ".tif"} for i in x])
    dataset = opened(root, tmp_path)
    assert all(np.array_equal(dataset.pixels(i)[1], BLOB) for i in (0, 1))


def test_float_masks_of_several_values_are_refused_unless_they_are_probabilities(tmp_path):
    """Averages of four annotators lie in 0..1 and have flat areas; floats up to 200 are numbers."""
    levels = np.zeros((40, 60), np.float32)
    for k, level in enumerate((0.25, 0.5, 0.75, 1)):
        levels[5:35, 10 * k : 10 * k + 10] = level
    root = write_set(tmp_path / "set", {"a.tif": Image.fromarray(levels)})
    assert np.array_equal(opened(root, tmp_path).pixels(0)[1], levels >= 0.5)

    Image.fromarray(levels * 200).save(root / "masks/a.tif")
    with pytest.raises(ValueError, match="several values instead of one foreground"):
        opened(root, tmp_path)


NUMBERS = {
    # values of the blob, class numbers?, what is read or said
    "instances below 256": (np.uint16(155), False, 155),
    "12 bits": (np.uint16(4095), False, 255),
    "32 bits": (np.int32(65535), False, 255),
    "instance 300": (
        np.uint16(300),
        False,
        "holds values from 0 to 300; a binary mask holds 0 and",
    ),
    "class 300": (np.uint16(300), True, "holds class number 300; class numbers go from 0 to 254"),
    "class 65535": (np.uint16(65535), True, "holds class number 65535; "),
    "class 255": (np.uint16(255), True, 255),
    "class -1": (np.int32(-1), True, "holds class number -1; "),
    "-1": (np.int32(-1), False, "holds values from -1 to 0; "),
    "class 2.0": (np.float32(2), True, 2),
    "class 2.5": (np.float32(2.5), True, "holds 2.5, but class numbers are whole"),
    "class 300.0": (np.float32(300), True, "holds class number 300; "),
    "255.0": (np.float32(255), False, 255),
    "nan": (np.float32(np.nan), False, "holds NaN or infinite pixels, which no mask may"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_values_that_no_byte_holds(kind, tmp_path):
    value, numbers, expected = NUMBERS[kind]
    path = tmp_path / "a.tif"
    Image.fromarray(np.where(BLOB, value, value.dtype.type(0))).save(path)
    if isinstance(expected, int):
        assert np.array_equal(image_files.read_mask(path, numbers=numbers), BLOB * expected)
        return
    with pytest.raises(ValueError, match=f"a.tif: {expected}"):
        image_files.read_mask(path, numbers=numbers)


def test_16_bit_masks_with_soft_edges_are_scaled_and_numbers_beside_65535_are_not(tmp_path):
    path = tmp_path / "a.tif"
    disc = np.hypot(*np.mgrid[-20:20, -30:30]) < 15
    soft = ndimage.zoom(disc * 65535.0, 4, order=1).round().astype(np.uint16)
    assert len(np.unique(soft)) > 20
    Image.fromarray(soft).save(path)
    assert np.array_equal(image_files.read_mask(path), np.round(soft / 257.0))
    numbered = (disc * 65535).astype(np.uint16)
    numbered[:4, :4] = 120  # an object that scaling would turn into background
    Image.fromarray(numbered).save(path)
    with pytest.raises(ValueError, match="holds values from 0 to 65535; a binary mask holds"):
        image_files.read_mask(path)


def test_one_class_in_classes_json_may_be_drawn_in_any_range(tmp_path):
    root = write_set(tmp_path / "set", {"a.png": as_image(BLOB.astype(np.uint16) * 65535)})
    (root / "classes.json").write_text('{"0": "background", "1": "nuclei"}')
    assert np.array_equal(opened(root, tmp_path).pixels(0)[1], BLOB)
    (root / "classes.json").write_text('{"0": "background", "1": "nuclei", "2": "debris"}')
    with pytest.raises(ValueError, match="a.png: holds class number 65535"):
        opened(root, tmp_path)


FRAMES = [as_image(RNG.integers(0, 255, (40, 60), dtype=np.uint8)) for _ in range(3)]


@pytest.mark.parametrize("ending", ["tif", "gif", "png", "webp"])
def test_files_of_several_pages_are_refused(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:])
    for read in (
        image_files.read_image,
        image_files.read_mask,
        lambda path: image_files.open_image(path, decode=False),
    ):
        with pytest.raises(ValueError, match=f"a.{ending}: holds 3 pages or frames.* of its own"):
            read(path)
    FRAMES[0].save(path, **{"lossless": True} if ending == "webp" else {})
    assert np.array_equal(image_files.read_mask(path), np.asarray(FRAMES[0]))


def test_further_pictures_of_a_photograph_do_not_count(tmp_path):
    path = tmp_path / "a.jpg"
    FRAMES[0].save(path, format="MPO", save_all=True, append_images=FRAMES[1:])
    assert Image.open(path).n_frames == 3
    read = image_files.read_image(path)[..., 0].astype(int)
    assert np.abs(read - np.asarray(FRAMES[0])).mean() < 20 < np.abs(read - FRAMES[1]).mean()


@pytest.mark.parametrize("tag, value, counts", [(254, 1, False), (254, 4, False), (255, 2, False),
                                               (254, 2, True), (254, 0, True)])  # fmt: skip
def test_previews_in_a_tiff_do_not_count(tag, value, counts, tmp_path):
    path = tmp_path / "a.tif"
    preview = FRAMES[1].resize((15, 10))
    preview.encoderinfo = {"tiffinfo": {tag: value}}
    FRAMES[0].save(path, save_all=True, append_images=[preview])
    if counts:
        with pytest.raises(ValueError, match="holds 2 pages"):
            image_files.read_image(path)
    else:
        assert np.array_equal(image_files.read_mask(path), np.asarray(FRAMES[0]))


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_damaged_exif_data_leaves_the_pixels_as_stored(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    lossless = {"lossless": True} if ending == "webp" else {}
    exif = b"M?\0*\0\0\0\x08" + bytes(20)  # MM is what it begins with
    FRAMES[0].save(path, exif=exif, **lossless)
    assert np.array_equal(image_files.read_image(path)[..., 0], np.asarray(FRAMES[0]))
    assert image_files.has_damaged_exif(path)


def turned_set(tmp_path, number, ending="png", size=(40, 60)):
    """An image of a given orientation, and its mask stored like it; the blob as seen upright."""
    full = np.zeros(size, np.uint8)
    full[2:12, 5:25] = 255
    root = write_set(tmp_path / "set", {"a.png": as_image(full), "b.png": as_image(full)})
    shown = {3: np.rot90(full, 2), 2: full[:, ::-1], 4: full[::-1], 6: np.rot90(full, -1)}[number]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    image = as_image(np.repeat(full[..., None], 3, axis=2) // 2)
    image.save(root / f"images/turned.{ending}", exif=exif)
    names = {"img_name": f"turned.{ending}"}
    rewrite(root, lambda x: [x[0] | names, x[1]])
    return root, full > 0, shown > 0


def opened_as(root, tmp_path, orientation):
    entries = data.with_mask_orientation(layouts.read_entries(root, "train"), orientation)
    return data.open_dataset(entries, tmp_path / "cache")


@pytest.mark.parametrize(
    "number, size", [(2, (40, 60)), (3, (40, 60)), (4, (40, 60)), (6, (40, 40))]
)
def test_what_no_size_tells_of_a_mask_s_orientation_is_said_or_decided(
    number, size, tmp_path, capsys
):
    root, stored, shown = turned_set(tmp_path, number, size=size)
    for orientation, expected in ((None, shown), ("stored", shown), ("upright", stored)):
        for _ in "decoded", "from the cache":
            dataset = opened_as(root, tmp_path, orientation)
            assert np.array_equal(dataset.pixels(0)[1], expected), orientation
            assert np.array_equal(dataset.pixels(1)[1], stored)
            said = [line for line in capsys.readouterr().out.splitlines() if "turned" in line]
            if orientation is not None:
                assert not said
                continue
            (line,) = said
            assert line.startswith(f"{root}: 1 mask (a.png) turned like the image's EXIF orient")
            assert "set --mask-orientation stored or upright" in line


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", [None, "stored", "upright"])
def test_sizes_tell_of_a_mask_s_orientation(ending, orientation, tmp_path, capsys):
    root, stored, shown = turned_set(tmp_path, 6, ending)
    assert np.array_equal(opened_as(root, tmp_path, orientation).pixels(0)[1], shown)
    as_image(shown).save(root / "masks/a.png")
    assert np.array_equal(opened_as(root, tmp_path, orientation).pixels(0)[1], shown)
    assert "turned like" not in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_tag_of_the_mask_s_own_counts(ending, tmp_path, capsys):
    root, stored, shown = turned_set(tmp_path, 3)
    exif = Image.Exif()
    for number, expected in ((1, stored), (3, shown)):
        exif[ExifTags.Base.Orientation] = number
        (root / "masks/a.png").unlink(missing_ok=True)
        as_image(stored).save(root / f"masks/a.{ending}", exif=exif)
        rewrite(root, lambda x: [x[0] | {"mask_name": f"a.{ending}"}, x[1]])
        for orientation in None, "stored", "upright":
            dataset = opened_as(root, tmp_path, orientation)
            assert np.array_equal(dataset.pixels(0)[1], expected)
    assert "turned like" not in capsys.readouterr().out


def filled(value, rows=slice(5, 20), columns=slice(10, 30)):
    mask = np.zeros((40, 60), np.uint8)
    mask[rows, columns] = value
    return mask


FULL = filled(255)
ONE_AND_FULL = np.where(FULL, 255, 1)
SMALL = filled(1, slice(4, 6), slice(4, 6))
BESIDE = {
    # masks of one set: foreground pixels of each, or what the refusal says
    "0/7 beside 0/255": ([FULL, filled(7)], "b.png: holds several values"),
    "0/2 beside 0/255": ([FULL, filled(2)], "b.png: holds several values"),
    "a small lesion of 1": ([FULL, SMALL], [300, 4]),
    "one pixel of 1": ([FULL, filled(1, 4, 4)], [300, 1]),
    "1 and 255 without 0": ([filled(1), ONE_AND_FULL], "b.png: holds several values"),
    "1 and 255 alone": ([ONE_AND_FULL], "a.png: holds several values"),
    "three pixels of 255 beside 1": (
        [filled(1), filled(1) + filled(255, 4, slice(0, 3))],
        "b.png: holds several values",
    ),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_masks_of_other_ranges_in_one_set(kind, tmp_path):
    """Lossless files: whatever they hold is no noise, however little it is."""
    masks, expected = BESIDE[kind]
    files = {
        f"{name}.png": as_image(mask.astype(np.uint8))
        for name, mask in zip("abc", masks, strict=False)
    }
    root = write_set(tmp_path / "set", files)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            opened(root, tmp_path)
        return
    dataset = opened(root, tmp_path)
    assert [int(dataset.pixels(i)[1].sum()) for i in range(len(masks))] == expected


@pytest.mark.parametrize("quality", [10, 50, 75, 80, 90])
def test_webp_masks_are_honest(quality, tmp_path):
    mask = as_image(filled(255)).resize((360, 240))
    root = write_set(tmp_path / "set", {"a.png": mask})
    (root / "masks/a.png").unlink()
    mask.convert("RGB").save(root / "masks/a.webp", quality=quality)
    rewrite(root, lambda x: [i | {"mask_name": "a.webp"} for i in x])
    found = opened(root, tmp_path).pixels(0)[1]
    assert np.mean(found != (np.asarray(mask) > 127)) < 0.001  # JPEG-like noise at the edge


@pytest.mark.parametrize("number", [5, 6, 7, 8])
def test_an_uncompressed_grey_tiff_is_turned_not_scrambled(number, tmp_path):
    pixels = np.arange(28 * 40).reshape(28, 40).astype(np.uint8)
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = number
    image.save(tmp_path / "a.tif", exif=exif)
    turned = {5: pixels.T, 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).T, 8: np.rot90(pixels)}
    assert np.array_equal(image_files.read_image(tmp_path / "a.tif")[..., 0], turned[number])
