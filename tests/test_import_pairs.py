"""prepare.py import of folders in which masks are image files, in many namings and kinds."""

import hashlib
import json
from argparse import Namespace

import numpy as np
import pytest
from conftest import command, contents
from PIL import Image

import prepare
import train
from preparation import import_folder, mask_names, mask_values

SIZE = (48, 64)  # H, W
N = 12
ROWS, COLUMNS = np.mgrid[: SIZE[0], : SIZE[1]]


def photo(k):
    """uint8 (H,W,3), another one for each k."""
    coarse = np.random.default_rng(k).integers(0, 255, (6, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(SIZE[::-1]))


def disc(k, radius=9):
    """bool (H,W), a disc at another place for each k."""
    return (ROWS - 14 - k) ** 2 + (COLUMNS - 14 - 3 * k) ** 2 <= radius**2


def organs(k):
    """uint8 (H,W), class numbers: a disc of 1 with a box of 2 in it, and a box of 3."""
    indices = np.uint8(disc(k))
    indices[10 + k : 17 + k, 10 + 3 * k : 17 + 3 * k] = 2
    indices[36:44, 4 + k : 20 + k] = 3
    return indices


def black_white(mask):
    return np.uint8(255) * mask


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)


def digests(folder):
    return {name: hashlib.sha256(data).digest() for name, data in contents(folder).items()}


@pytest.fixture
def bring(monkeypatch, capsys, tmp_path):
    """Import tmp_path/raw to tmp_path/mine. The source stays as it is; a failure writes nothing."""

    def run(*options, out="mine"):
        before = digests(tmp_path / "raw")
        arguments = ["import", tmp_path / "raw", "--out", tmp_path / out, *options]
        status, text, error = command(monkeypatch, capsys, prepare, *arguments)
        assert digests(tmp_path / "raw") == before
        if status:
            assert status == 2 and error.count("\n") == 1 and "Traceback" not in error, error
            assert not (tmp_path / out).exists()
        return status, text, error

    return run


@pytest.fixture
def check(monkeypatch, capsys):
    def run(root):
        status, text, _ = command(monkeypatch, capsys, prepare, "check", root)
        assert status == 0, text

    return run


def written(root):
    """[(split, entry, mask)] of a data set, in the order of its files."""
    result = []
    for path in sorted((root / "anns").iterdir()):
        for entry in json.loads(path.read_text()):
            mask = np.asarray(Image.open(root / "masks" / entry["mask_name"]))
            assert (root / "images" / entry["img_name"]).is_file()
            result.append((path.stem, entry, mask))
    return result


def by_number(root):
    """{k: (split, mask)}; k is the last number in the name of an image."""
    result = {}
    for split, entry, mask in written(root):
        digits = "".join(c if c.isdigit() else " " for c in entry["img_name"].rsplit(".", 1)[0])
        result[int(digits.split()[-1])] = (split, mask)
    return result


# --- where masks are ------------------------------------------------------------------------------

FOLDERS = {
    "image-label": ("image/{k}.png", "label/{k}.png"),
    "upper case": ("Images/P{k}.JPG", "Masks/P{k}.PNG"),
    "img-mask": ("img/{k}.bmp", "mask/{k}.gif"),
    "annotations": ("images/{k}.jpg", "annotations/{k}.png"),
    "input-target": ("input/{k}.tiff", "target/{k}.tiff"),
    "ClinicDB": ("Original/{k}.tif", "Ground Truth/{k}.tif"),
    "VOC": ("JPEGImages/a_{k}.jpg", "SegmentationClass/a_{k}.png"),
    "x and x_mask": ("polyps/{k}.jpg", "polyps_mask/{k}.png"),
    "wrapped twice": ("data/polyps/{k}.jpg", "data/polyps_mask/{k}.png"),
    "REFUGE": ("Training400/Glaucoma/g{k}.jpg", "Annotation-Training400/Masks/Glaucoma/g{k}.bmp"),
    "HAM10000": (
        "HAM_images_part_1/I_{k}.jpg",
        "HAM_segmentations_lesion_x/I_{k}_segmentation.png",
    ),
    "wrapped": ("set/imgs/{k}.png", "set/labels/{k}.png"),
    "other name": ("CXR_png/CHNCXR_{k}.png", "masks/CHNCXR_{k}_mask.png"),
    "ISIC": (
        "ISIC-2017_Training_Data/ISIC_{k:07d}.jpg",
        "ISIC-2017_Training_Part1_GroundTruth/ISIC_{k:07d}_segmentation.png",
    ),
    "suffix": ("images/{k}.jpg", "masks/{k}_mask.png"),
    "Segmentation": ("images/{k}.jpg", "gt/{k}_Segmentation.png"),
    "lesion": ("images/im{k}.bmp", "gt/im{k}_lesion.bmp"),
    "glued": ("images/{k}.jpg", "masks/{k}mask.png"),
    "ending": ("images/{k}.jpg", "masks/{k}.jpg.png"),
    "prefix": ("images/{k}.jpg", "masks/mask_{k}.png"),
    "img_ mask_": ("images/img_{k}.jpg", "masks/mask_{k}.png"),
    "CamVid": ("train/{k}.png", "train_labels/{k}_L.png"),
    "pattern": ("training/images/{k}_training.tif", "training/1st_manual/{k}_manual1.gif"),
    "folders of images": ("{k:04x}/images/{k}.png", "{k:04x}/masks/c0ffee{k:x}.png"),
}
BESIDE = {
    "mask": ("{k}.jpg", "{k}_mask.png"),
    "BUSI": ("benign/benign ({k}).png", "benign/benign ({k})_mask.png"),
    "annotation": ("a/b/{k}.PNG", "a/b/{k}_annotation.PNG"),
    "seg": ("all images/{k}.png", "all images/{k}-seg.png"),
    "case folders": ("case{k}/image.png", "case{k}/mask.png"),
    "scan and label": ("case{k}/flair.png", "case{k}/label.png"),
    "ending": ("{k}.jpg", "{k}.png"),
    "lesion as a name": ("lesion_{k}.png", "lesion_{k}_label.png"),
}


def draw_pairs(root, image, mask, n=N):
    for k in range(n):
        save(root / image.format(k=k), photo(k))
        save(root / mask.format(k=k), black_white(disc(k)))


@pytest.mark.parametrize("name", FOLDERS)
def test_masks_in_folders(bring, check, tmp_path, name):
    draw_pairs(tmp_path / "raw", *FOLDERS[name])
    status, text, error = bring()
    assert status == 0, error
    assert "Read as folders: 12 images in " in text and "12 masks in " in text
    masks = by_number(tmp_path / "mine")
    assert sorted(masks) == [*range(N)]
    for k, (_, mask) in masks.items():
        assert (mask == black_white(disc(k))).all()
    check(tmp_path / "mine")


@pytest.mark.parametrize("name", BESIDE)
def test_masks_beside_images(bring, check, tmp_path, name):
    draw_pairs(tmp_path / "raw", *BESIDE[name])
    status, text, error = bring()
    assert status == 0, error
    assert "Read as beside: 12 images in " in text
    masks = by_number(tmp_path / "mine")
    assert sorted(masks) == [*range(N)]
    for k, (_, mask) in masks.items():
        assert (mask == black_white(disc(k))).all()
    check(tmp_path / "mine")


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("{split}/images/{k}.png", "{split}/masks/{k}.png"),
        ("images/{split}/{k}.png", "masks/{split}/{k}.png"),
        ("{split}_images/{k}.png", "{split}_masks/{k}.png"),
        ("{split}/{k}.png", "{split}annot/{k}.png"),
        ("{split}/{split}/{k}.jpeg", "{split}_gt/{split}_gt/{k}.png"),
        ("1. Images/a. {split} Set/{k}.jpg", "2. Groundtruths/a. {split} Set/{k}.png"),
        ("{split}/{k}.jpg", "{split}/{k}_mask.png"),
    ],
)
def test_splits_of_folders_are_kept(bring, tmp_path, image, mask):
    for k in range(8):
        split = ("train", "train", "train", "valid", "Test")[k % 5]
        for template, pixels in ((image, photo(k)), (mask, black_white(disc(k)))):
            save(tmp_path / "raw" / template.format(split=split, k=k), pixels)
    status, _, error = bring("--format", "beside" if "_mask." in mask else "folders")
    assert status == 0, error
    splits = {k: split for k, (split, _) in by_number(tmp_path / "mine").items()}
    assert splits == {
        0: "train", 1: "train", 2: "train", 3: "val", 4: "test", 5: "train", 6: "train", 7: "train",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["masks", "."])
def test_several_masks_of_an_image_are_objects(bring, tmp_path, place):
    raw = tmp_path / "raw"
    images = raw / ("images" if place == "masks" else ".")
    for k in range(4):
        save(images / f"benign ({k}).png", photo(k))
        save(raw / place / f"benign ({k})_mask.png", black_white(disc(k)))
    box = np.zeros(SIZE, bool)
    box[40:, :9] = True
    save(raw / place / "benign (2)_mask_1.png", black_white(box))

    status, text, error = bring()
    assert status == 0 and "up to 2 of an image" in text, error
    masks = {entry["img_name"]: mask for _, entry, mask in written(tmp_path / "mine")}
    assert (masks["benign (2).png"] == black_white(disc(2) | box)).all()
    assert (masks["benign (3).png"] == black_white(disc(3))).all()

    assert bring("--each", "--prompt", "tumour", out="each")[0] == 0
    entries = [(e["mask_name"], e["prompts"]) for _, e, _ in written(tmp_path / "each")]
    assert len(entries) == 5
    assert ("benign (2)_2.png", {"p0": "", "p1": "tumour"}) in entries


def test_cells_in_a_folder_for_each_image(bring, tmp_path):
    """DSB-2018: ID/images/ID.png and a mask for each cell, named by a hash."""
    for k in range(3):
        name = hashlib.sha256(bytes([k])).hexdigest()[:12]
        save(tmp_path / f"raw/{name}/images/{name}.png", photo(k))
        for cell in range(3):
            other = hashlib.sha256(bytes([k, cell])).hexdigest()
            save(tmp_path / f"raw/{name}/masks/{other}.png", black_white(disc(4 * cell, 5)))
    status, text, error = bring()
    assert status == 0 and "9 masks" in text, error
    union = disc(0, 5) | disc(4, 5) | disc(8, 5)
    for _, _, mask in written(tmp_path / "mine"):
        assert (mask == black_white(union)).all()


CLASSES = {
    "folders": ("images/{k}.png", "masks/{c}/{k}.png"),
    "folders beside images": ("images/{k}.png", "{c}/{k}.png"),
    "folders of masks": ("images/{k}.png", "{c}_masks/{k}.png"),
    "names": ("{k}.png", "{k}_{c}.png"),
    "names with mask": ("all/{k}.jpg", "all/{k}_mask_{c}.png"),
    "names in folders": ("images/{k}.png", "labels/{k}_{c}.png"),
    "first in names": ("images/{k}.png", "labels/{c}-{k}.png"),
    "COVID-QU": ("x/images/{k}.png", "x/{c} masks/{k}.png"),
    "Montgomery": ("Set/CXR_png/M_{k}.png", "Set/ManualMask/{c}Mask/M_{k}.png"),
    "IDRiD": ("1. Original Images/a. Set/I{k}.jpg", "2. Masks/a. Set/{c}/I{k}_{c}x.tif"),
    "folder for each image": ("images/{k}.png", "masks/{k}/{c}.png"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_mask_for_each_class(bring, check, tmp_path, name):
    image, mask = CLASSES[name]
    for k in range(N):
        save(tmp_path / "raw" / image.format(k=k), photo(k))
        for c, pixels in ("liver", disc(k)), ("tumour", organs(k) == 2), ("kidney", organs(k) == 3):
            save(tmp_path / "raw" / mask.format(k=k, c=c), black_white(pixels))
    status, text, error = bring()
    assert status == 0, error
    assert "Read as class-folders" in text and "kidney (12), liver (12), tumour (12)" in text
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert classes == {"0": "background", "1": "kidney", "2": "liver", "3": "tumour"}
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == np.array([0, 2, 3, 1])[organs(k)]).all()  # the tumour covers the liver
    check(tmp_path / "mine")


def test_classes_brings_the_classes_of_folders_into_another_order(bring, tmp_path):
    for k in range(3):
        save(tmp_path / f"raw/images/{k}.png", photo(k))
        save(tmp_path / f"raw/masks/a tumour/{k}.png", black_white(organs(k) == 2))
        save(tmp_path / f"raw/masks/liver/{k}.png", black_white(disc(k)))
    assert bring("--classes", "liver,a tumour")[0] == 0
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == organs(k) * (organs(k) < 3)).all()
    status, _, error = bring("--classes", "liver,lung", out="other")
    assert status == 2 and "a tumour, liver" in error


# --- values of masks ------------------------------------------------------------------------------

RGB = np.zeros((256, 3), np.uint8)
RGB[:4] = (0, 0, 0), (255, 0, 0), (0, 255, 0), (128, 64, 128)


def coloured(k):
    return RGB[organs(k)]


def draw_maps(root, draw, ending="png", **options):
    for k in range(N):
        save(root / f"images/{k}.png", photo(k))
        save(root / f"labels/{k}.{ending}", draw(k), **options)


def test_colours_are_classes(bring, check, tmp_path):
    draw_maps(tmp_path / "raw", coloured)
    status, text, error = bring()
    assert status == 0, error
    assert "masks of colours: #00ff00, #804080, #ff0000; nothing names them" in text
    assert "again with --classes 'NAME1=#00ff00,NAME2=#804080,NAME3=#ff0000'" in text
    names = {"#000000": "background", "#00ff00": "green", "#804080": "colour #804080"}
    assert json.loads((tmp_path / "mine/colours.json").read_text()) == {**names, "#ff0000": "red"}
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == np.array([0, 3, 1, 2])[organs(k)]).all()
    check(tmp_path / "mine")


TABLES = {
    "class_dict.csv": "name,r,g,b\nOther,0,0,0\nliver,255,0,0\ntumour,0,255,0\nkidney,128,64,128\n",
    "labelmap.txt": "# label:color_rgb:parts:actions\nbackground:0,0,0::\nliver:255,0,0::\n"
    "tumour:0,255,0::\nkidney:128,64,128::\n",
    "label_colors.txt": "0 0 0\tbackground\n255 0 0\tliver\n0 255 0 tumour\n128 64 128\tkidney\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_files_name_colours(bring, tmp_path, name):
    draw_maps(tmp_path / "raw", coloured)
    (tmp_path / "raw" / name).write_text(TABLES[name])
    status, text, error = bring()
    assert status == 0 and f"named by {name}" in text, error
    classes = [*json.loads((tmp_path / "mine/classes.json").read_text()).values()]
    first = name == "class_dict.csv"  # there black is a class of its own
    assert classes == ["background", *["Other"] * first, "liver", "tumour", "kidney"]
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == organs(k) + first).all()


def test_classes_names_colours(bring, tmp_path):
    draw_maps(tmp_path / "raw", coloured)
    status, _, error = bring("--classes", "liver,tumour,kidney")
    assert status == 2 and "write --classes 'NAME=#" in error
    status, _, error = bring("--classes", "liver=#ff0000,tumour=#00ff00")
    assert status == 2 and "0.png: holds #804080, which is none of the colours" in error
    assert bring("--classes", "liver=#ff0000,tumour=#00FF00,liver=#804080", out="two")[0] == 0
    for k, (_, indices) in by_number(tmp_path / "two").items():
        assert (indices == np.array([0, 1, 2, 1])[organs(k)]).all()
    assert bring("--classes", "liver=#ff0000,tumour=#00FF00,kidney=#804080")[0] == 0
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == organs(k)).all()


@pytest.mark.parametrize("quality", [60, 90])
def test_noise_of_jpeg_belongs_to_the_nearest_colour(bring, tmp_path, quality):
    def draw(k):
        return np.kron(coloured(k), np.ones((4, 4, 1), np.uint8))

    raw = tmp_path / "raw"
    for k in range(4):
        save(raw / f"images/{k}.png", Image.fromarray(photo(k)).resize((256, 192)))
        save(raw / f"labels/{k}.jpg", draw(k), quality=quality)
        stored = np.asarray(Image.open(raw / f"labels/{k}.jpg"))
        assert len(np.unique(stored.reshape(-1, 3), axis=0)) > 100
    status, text, error = bring()
    assert status == 0, error
    assert len(json.loads((tmp_path / "mine/classes.json").read_text())) == 4
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        expected = np.kron(np.array([0, 3, 1, 2])[organs(k)], np.ones((4, 4), int))
        assert (indices == expected).mean() > 0.97

    save(raw / "labels/3.jpg", Image.fromarray(photo(3)).resize((256, 192)))
    status, _, error = bring(out="other")
    assert status == 2 and "labels/3.jpg: holds #" in error


def test_soft_edges_belong_to_the_nearest_colour(bring, tmp_path):
    raw = tmp_path / "raw"
    for k in range(4):
        save(raw / f"images/{k}.png", Image.fromarray(photo(k)).resize((256, 192)))
        big = Image.fromarray(coloured(k)).resize((256, 192), Image.Resampling.BILINEAR)
        save(raw / f"labels/{k}.png", big)
    assert bring()[0] == 0
    assert len(json.loads((tmp_path / "mine/classes.json").read_text())) == 4
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        expected = np.kron(np.array([0, 3, 1, 2])[organs(k)], np.ones((4, 4), int))
        assert (indices == expected).mean() > 0.95


@pytest.mark.parametrize(("ending", "change"), [("png", 6), ("jpg", 30)])
def test_colours_that_differ_by_noise_are_one_class(bring, tmp_path, ending, change):
    """A map that was saved as JPEG holds slightly other colours, also if it is a PNG again."""

    def draw(k):
        return np.where(coloured(k) > 200, np.uint8(255 - change * (k % 2)), coloured(k))

    for k in range(4):
        big = np.kron(draw(k), np.ones((4, 4, 1), np.uint8))
        save(tmp_path / f"raw/images/{k}.png", Image.fromarray(photo(k)).resize((256, 192)))
        save(tmp_path / f"raw/labels/{k}.{ending}", big)
    status, _, error = bring()
    assert status == 0, error
    assert len(json.loads((tmp_path / "mine/classes.json").read_text())) == 4


def test_hidden_colours_of_transparent_pixels_are_background(bring, tmp_path):
    def draw(k):
        pixels = np.dstack([coloured(k), black_white(organs(k) > 0)])
        pixels[organs(k) == 0] = (9, 200, 77, 0)
        return pixels

    draw_maps(tmp_path / "raw", draw)
    assert bring()[0] == 0
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == np.array([0, 3, 1, 2])[organs(k)]).all()


def test_thin_lines_of_two_colours_are_classes(bring, tmp_path):
    def draw(k):
        pixels = np.zeros((*SIZE, 3), np.uint8)
        pixels[5 + k, 4:60] = (255, 0, 0)
        pixels[4:40, 20 + k] = (0, 0, 255)
        return pixels

    draw_maps(tmp_path / "raw", draw)
    assert bring()[0] == 0
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        red = draw(k)[..., 0] > 0
        blue = draw(k)[..., 2] > 0
        assert (indices == 2 * red + 1 * blue).all()


def test_one_colour_is_a_binary_mask_and_one_colour_a_file_is_not(bring, tmp_path):
    draw_maps(tmp_path / "raw", lambda k: RGB[np.uint8(disc(k))])
    status, text, _ = bring("--format", "folders")
    assert status == 0 and "binary masks" in text
    for k, (_, mask) in by_number(tmp_path / "mine").items():
        assert (mask == black_white(disc(k))).all()

    draw_maps(tmp_path / "raw", lambda k: RGB[disc(k) * np.uint8(1 + k % 2)])
    assert bring(out="two")[0] == 0
    for k, (_, mask) in by_number(tmp_path / "two").items():
        assert (mask == disc(k) * (2 - k % 2)).all()  # green is 1, red 2


def test_colours_without_black_need_names(bring, tmp_path):
    def draw(k):
        return np.where(organs(k)[..., None] > 0, RGB[1], np.uint8(255))

    draw_maps(tmp_path / "raw", draw)
    status, _, error = bring()
    assert status == 2 and "without black" in error and "NAME=#ffffff" in error
    assert bring("--classes", "background=#ffffff,organ=#ff0000")[0] == 0
    for k, (_, mask) in by_number(tmp_path / "mine").items():
        assert (mask == black_white(organs(k) > 0)).all()


def palette(indices, colours=RGB):
    picture = Image.fromarray(indices)
    picture.putpalette(colours.ravel().tolist())
    return picture


def test_indices_of_palettes_are_the_classes(bring, check, tmp_path):
    """VOC: the colours name the classes unless names are given; the border of 255 is ignored."""
    colours = RGB.copy()
    colours[255] = (224, 224, 192)

    def draw(k):
        indices = organs(k)
        indices[30:34, 2:50] = 255
        return indices

    draw_maps(tmp_path / "raw", lambda k: palette(draw(k), colours))
    status, text, _ = bring()
    assert status == 0 and "#e0e0c0 are ignored" in text
    assert "again with --classes 'NAME1,NAME2,NAME3'" in text
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert [*classes.values()] == ["background", "red", "green", "colour #804080"]
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == draw(k)).all()
    check(tmp_path / "mine")

    status, text, _ = bring("--classes", "liver,tumour,kidney", out="named")
    assert status == 0 and "pixels of 255 are ignored" in text
    assert (tmp_path / "named/classes.json").read_text().count("tumour") == 1
    for k, (_, indices) in by_number(tmp_path / "named").items():
        assert (indices == draw(k)).all()


NUMBERS = {
    "classes.txt": "background\nliver\ntumour\nkidney\n",
    "labels.txt": "__ignore__\n_background_\nliver\ntumour\nkidney\n",
    "class_names.txt": "liver\r\ntumour\r\nkidney",
    "_classes.csv": "Pixel Value, Class\n0, background\n1, liver\n2, tumour\n3, kidney\n",
}


@pytest.mark.parametrize("name", [None, *NUMBERS])
def test_class_numbers(bring, check, tmp_path, name):
    draw_maps(tmp_path / "raw", organs)
    if name:
        (tmp_path / "raw" / name).write_text(NUMBERS[name])
    status, text, error = bring(*([] if name else ["--classes", "liver,tumour,kidney"]))
    assert status == 0 and "masks of class numbers: 0, 1, 2, 3" in text, error
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert [*classes.values()] == ["background", "liver", "tumour", "kidney"]
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == organs(k)).all()
    check(tmp_path / "mine")


def test_class_numbers_without_fitting_names_are_refused(bring, tmp_path):
    draw_maps(tmp_path / "raw", organs)
    status, _, error = bring()
    assert status == 2 and "hold the values 1, 2, 3 besides 0" in error
    assert "--classes NAME1,NAME2,NAME3" in error
    status, _, error = bring("--classes", "liver,tumour")
    assert status == 2 and "holds the class number 3" in error and "liver, tumour" in error
    status, _, error = bring("--classes", "liver,,kidney")
    assert status == 2 and "separated by commas" in error
    status, text, _ = bring("--mask-threshold", "1")
    assert status == 0 and "--mask-threshold 1" in text
    for k, (_, mask) in by_number(tmp_path / "mine").items():
        assert (mask == black_white(organs(k) > 1)).all()


def test_classes_names_some_numbers(bring, tmp_path):
    numbers = np.array([0, 7, 1, 4], np.uint8)
    draw_maps(tmp_path / "raw", lambda k: numbers[organs(k)])
    status, text, _ = bring("--classes", "7=liver,1=tumour, 4 = kidney")
    assert status == 0 and "class numbers: 0, 1, 4, 7, named by --classes" in text
    classes = json.loads((tmp_path / "mine/classes.json").read_text())
    assert classes == {"0": "background", "1": "tumour", "2": "kidney", "3": "liver"}
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == np.array([0, 3, 1, 2])[organs(k)]).all()

    status, _, error = bring("--classes", "1=tumour,4=kidney,8=liver", out="other")
    assert status == 2 and "holds the class number 7" in error  # not the name of 8
    for wrong in ("1=a,1=b", "1=a,2=a", "0=a,1=b", "256=a", "liver,4=b"):
        status, _, error = bring("--classes", wrong, out="other")
        assert status == 2 and f"--classes {wrong}: write NUMBER=NAME" in error


def test_a_single_number_in_classes_is_that_of_the_masks(bring, tmp_path):
    draw_maps(tmp_path / "raw", lambda k: 4 * disc(k).astype(np.uint8))
    status, _, error = bring("--classes", "3=polyp")
    assert status == 2 and "holds the class number 4" in error
    assert bring("--classes", "4=polyp")[0] == 0
    for k, (_, mask) in by_number(tmp_path / "mine").items():
        assert ((mask > 0) == disc(k)).all()


def test_grey_levels_are_named_in_ascending_order(bring, tmp_path):
    levels = np.array([0, 64, 128, 255], np.uint8)
    draw_maps(tmp_path / "raw", lambda k: levels[organs(k)])
    assert "hold the values 64, 128, 255" in bring()[2]
    status, text, _ = bring("--classes", "liver,tumour,kidney")
    assert status == 0 and "64 liver, 128 tumour, 255 kidney" in text
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == organs(k)).all()


def test_zero_and_one_are_binary_unless_several_classes_are_named(bring, tmp_path):
    draw_maps(tmp_path / "raw", lambda k: np.uint8(disc(k)))
    assert bring("--classes", "polyp")[0] == 0
    for _, entry, mask in written(tmp_path / "mine"):
        assert entry["prompts"]["p1"] == "polyp" and {*np.unique(mask)} == {0, 255}
    assert bring("--classes", "polyp,tool", out="two")[0] == 0
    assert json.loads((tmp_path / "two/classes.json").read_text())["2"] == "tool"

    draw_maps(tmp_path / "raw", lambda k: black_white(disc(k)))
    status, _, error = bring("--classes", "polyp,tool", out="other")
    assert status == 2 and "255" in error


def test_empty_masks_and_soft_edges_are_honest(bring, tmp_path):
    def draw(k):
        big = Image.fromarray(black_white(disc(k) & (k > 2))).resize((16, 12))
        return big.resize(SIZE[::-1], Image.Resampling.BILINEAR)

    draw_maps(tmp_path / "raw", draw)
    status, text, _ = bring("--format", "folders")
    assert status == 0 and "images without objects: 3" in text
    for k, (_, mask) in by_number(tmp_path / "mine").items():
        assert (mask == black_white(np.asarray(draw(k)) > 127)).all()


# --- patterns -------------------------------------------------------------------------------------


def test_patterns_name_the_files(bring, tmp_path):
    raw = tmp_path / "raw"
    for k in range(4):
        save(raw / f"training/images/{k}_training.tif", photo(k))
        save(raw / f"training/1st_manual/{k}_manual1.gif", black_white(disc(k)))
        save(raw / f"training/mask/{k}_training_mask.gif", black_white(disc(k, 30)))
    status, _, error = bring()
    assert status == 2 and "training/1st_manual/ or in training/mask/" in error
    assert "--images 'GLOB' --masks 'training/" in error

    patterns = ["--images", "*/images/*_training.tif", "--masks", "*/1st_manual/*_manual1.gif"]
    status, text, error = bring(*patterns)
    assert status == 0 and "Read as globs: 4 images" in text, error
    for k, (split, mask) in by_number(tmp_path / "mine").items():
        assert split == "train" and (mask == black_white(disc(k))).all()


def test_patterns_name_classes_and_objects(bring, tmp_path):
    raw = tmp_path / "raw"
    for k in range(3):
        save(raw / f"a/{k}.png", photo(k))
        for c, number in ("liver", 1), ("tumour", 2):
            rows = ROWS < 24
            save(raw / f"b/{c}/{k}-upper.png", black_white((organs(k) == number) & rows))
            save(raw / f"b/{c}/{k}-preview.png", black_white((organs(k) == number) & ~rows))
    status, _, error = bring("--images", "a/*.png", "--masks", "b/{class}/*-{object}.png")
    assert status == 0, error
    for k, (_, indices) in by_number(tmp_path / "mine").items():
        assert (indices == organs(k) * (organs(k) < 3)).all()


@pytest.mark.parametrize(
    ("images", "masks", "words"),
    [
        ("x/*.png", "*_mask.png", "--images x/*.png: fits none of 8 image files"),
        ("*/*.png", "*_mask.png", "2 stars, but --masks *_mask.png has 1"),
        ("{class}.png", "*_mask.png", "{class} may be in --masks"),
        ("?.png", "*_mask.png", "0 stars, but --masks *_mask.png has 1"),
    ],
)
def test_wrong_patterns_are_refused(bring, tmp_path, images, masks, words):
    draw_pairs(tmp_path / "raw", "{k}.png", "{k}_mask.png", 4)
    status, _, error = bring("--images", images, "--masks", masks)
    assert status == 2 and words in error


def test_masks_that_the_pattern_of_images_fits_too_are_masks(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "{k}.png", "{k}_outline.png", 4)
    patterns = ["--images", "*.png", "--masks", "*_outline.png"]
    assert bring(*patterns)[0] == 0
    assert len(by_number(tmp_path / "mine")) == 4

    (tmp_path / "raw/2.png").unlink()
    status, _, error = bring(*patterns, out="other")
    assert status == 2 and "2_outline.png: no image belongs to this mask" in error


# --- refusals -------------------------------------------------------------------------------------


def test_missing_and_leftover_masks_are_refused_or_left_out(bring, tmp_path):
    raw = tmp_path / "raw"
    draw_pairs(raw, "images/{k}.png", "labels/{k}_seg.png", 6)
    (raw / "labels/4_seg.png").unlink()
    status, _, error = bring()
    assert status == 2 and "images/4.png: no mask belongs to this image (1 such of 6" in error
    (raw / "images/4.png").unlink()
    (raw / "images/2.png").unlink()
    status, _, error = bring()
    assert status == 2 and "labels/2_seg.png: no image belongs to this mask (1 such of 5" in error
    (raw / "labels/1_seg.png").unlink()
    status, text, _ = bring("--skip-unpaired")
    assert status == 0
    assert "left out: 1 image without a mask" in text and "left out: 1 mask without an" in text
    assert sorted(by_number(tmp_path / "mine")) == [0, 3, 5]


def test_the_mask_of_image_10_is_not_that_of_image_1(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "images/{k}.png", "labels/{k}_seg.png")
    (tmp_path / "raw/images/10.png").unlink()
    status, _, error = bring()
    assert status == 2 and "labels/10_seg.png: no image belongs to this mask" in error


def test_two_folders_of_masks_are_refused(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "images/{k}.png", "masks/{k}.png", 4)
    draw_pairs(tmp_path / "raw", "images/{k}.png", "masks_refined/{k}.png", 4)
    status, _, error = bring()
    assert status == 2 and "could be those in masks/ or in masks_refined/" in error
    patterns = ["--images", "images/*.png", "--masks", "masks_refined/*.png"]
    assert bring(*patterns)[0] == 0


def test_two_masks_of_an_image_with_different_words_are_refused(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "{k}.png", "{k}_mask.png", 4)
    draw_pairs(tmp_path / "raw", "{k}.png", "{k}_gt.png", 4)
    status, _, error = bring()
    assert status == 2 and "0_gt.png or 0_mask.png" in error


@pytest.mark.parametrize(
    "masks", ["masks{n}/{k}.png", "expert{n}_masks/{k}.png", "{n}st_manual/{k}.png"]
)
def test_masks_of_several_people_are_no_classes(bring, tmp_path, masks):
    for n in 1, 2:
        draw_pairs(tmp_path / "raw", "images/{k}.png", masks.replace("{n}", str(n)), 4)
    status, _, error = bring()
    assert status == 2 and "the masks could be those in" in error


def test_two_observers_of_chase_are_no_classes(bring, tmp_path):
    for observer in "1st", "2nd":
        draw_pairs(tmp_path / "raw", "Image_{k:02d}L.jpg", f"Image_{{k:02d}}L_{observer}HO.png", 4)
    status, _, error = bring()
    assert status == 2 and "not recognised as images with masks" in error
    assert bring("--images", "*.jpg", "--masks", "*_1stHO.png")[0] == 0
    assert len(by_number(tmp_path / "mine")) == 4


def test_masks_of_one_name_in_two_folders_are_not_objects(bring, tmp_path):
    for folder in "a", "b":
        draw_pairs(
            tmp_path / "raw", "Training/x/{k}.png", f"Notes-Training/{folder} masks/{{k}}.png"
        )
    status, _, error = bring()
    assert status == 2 and "choose with --images 'GLOB'" in error


def test_a_mask_with_another_name_belongs_to_no_image(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "a/images/{k}.png", "a/masks/{k}.png", 4)
    save(tmp_path / "raw/b/images/scan.png", photo(9))
    save(tmp_path / "raw/b/masks/tumour.png", black_white(disc(9)))
    status, _, error = bring()
    assert status == 2 and "b/images/scan.png: no mask belongs to this image" in error


def test_names_that_do_not_fit_are_refused(bring, tmp_path):
    for k in range(4):
        save(tmp_path / f"raw/images/{'abcd'[k]}.png", photo(k))
        save(tmp_path / f"raw/masks/{k * k + 3}z.png", black_white(disc(k)))
    status, _, error = bring()
    assert status == 2 and "4 images in images/, 4 masks in masks/, but no two names fit" in error
    assert "give each mask the name of its image" in error


def test_folders_without_masks_are_not_recognised(bring, tmp_path):
    for k in range(6):
        save(tmp_path / f"raw/photos/IMG_{k}.jpg", photo(k))
        save(tmp_path / f"raw/photos/IMG_{k}_edited.jpg", photo(k))
    status, _, error = bring()
    assert status == 2 and "with masks or annotations; it contains 12 .jpg" in error


def test_an_error_names_other_formats_that_fit(bring, monkeypatch, tmp_path):
    draw_pairs(tmp_path / "raw", "images/{k}.png", "masks/{k}.png", 4)
    (tmp_path / "raw/masks/1.png").unlink()
    reading = import_folder.ImageReading("coco", ["4 images in one file"], [])
    coco = import_folder.Format("coco", "", lambda folder, args: [reading])
    monkeypatch.setattr(import_folder, "FORMATS", (*import_folder.FORMATS, coco))
    status, _, error = bring()
    assert status == 2 and "images/1.png: no mask" in error
    assert "or choose --format coco: 4 images in one file" in error


def test_superpixels_beside_the_images_of_isic_are_not_read(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "Training_Data/{k}.jpg", "Training_GroundTruth/{k}_seg.png", 4)
    for k in range(4):
        save(tmp_path / f"raw/Training_Data/{k}_superpixels.png", photo(k))
    status, text, error = bring()
    assert status == 0, error
    assert "not read: 4 images, overlays, previews or superpixels" in text
    assert len(written(tmp_path / "mine")) == 4


def test_a_mask_of_another_size_is_refused(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "image/{k}.png", "label/{k}.png", 4)
    save(tmp_path / "raw/label/2.png", np.zeros((20, 30), np.uint8))
    status, _, error = bring()
    assert status == 2 and "label/2.png: 30x20, but its image" in error
    assert "is 64x48; draw or resize the mask at that size" in error


def test_an_empty_map_of_another_size_is_refused(bring, tmp_path):
    draw_maps(tmp_path / "raw", coloured)
    save(tmp_path / "raw/labels/2.png", np.zeros((20, 30, 3), np.uint8))
    status, _, error = bring()
    assert status == 2 and "labels/2.png: 30x20, but its image" in error


def test_each_class_leaves_out_classes_that_an_image_lacks(bring, tmp_path):
    draw_maps(tmp_path / "raw", lambda k: organs(k) * np.uint8(k > 0) % (3 if k > 5 else 4))
    assert bring("--classes", "a,b,c", "--each", "class")[0] == 0
    names = sorted(entry["mask_name"] for _, entry, _ in written(tmp_path / "mine"))
    assert len(names) == 5 * 3 + 6 * 2 and "1_c.png" in names and "7_c.png" not in names
    assert not (tmp_path / "mine/images/0.png").exists()


def test_several_values_in_a_mask_of_one_class_are_refused(bring, tmp_path):
    for k in range(4):
        save(tmp_path / f"raw/images/{k}.png", photo(k))
        save(tmp_path / f"raw/masks/liver/{k}.png", organs(k))
    status, _, error = bring()
    assert status == 2 and "masks/liver/0.png: holds several values" in error
    assert "state the classes liver" in error


def test_pages_are_refused(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "image/{k}.png", "label/{k}.tif", 4)
    pages = [Image.fromarray(black_white(disc(k))) for k in range(3)]
    pages[0].save(tmp_path / "raw/label/1.tif", save_all=True, append_images=pages[1:])
    status, _, error = bring()
    assert status == 2 and "label/1.tif: holds 3 pages" in error


def test_our_own_layout_needs_no_import(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "images/{k}.png", "masks/{k}.png")
    status, _, error = bring()
    assert status == 2 and "needs no import" in error and "prepare.py check" in error
    assert bring("--prompt", "a polyp")[0] == 0


def test_splits_of_voc_are_kept(bring, tmp_path):
    raw = tmp_path / "raw"
    draw_pairs(raw, "VOC/JPEGImages/2007_{k}.jpg", "VOC/SegmentationClass/2007_{k}.png", 6)
    lists = raw / "VOC/ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_0\n2007_1\n2007_2\n2007_5\n")
    (lists / "val.txt").write_text("2007_3\n2007_4\n")
    (lists / "trainval.txt").write_text("2007_3\n")
    status, text, _ = bring()
    assert status == 0 and "splits are those of ImageSets/Segmentation/" in text
    for k, (split, _) in by_number(tmp_path / "mine").items():
        assert split == ("val" if k in (3, 4) else "train")


def test_splits_and_patients_of_our_annotation_files_are_kept(bring, tmp_path):
    raw = tmp_path / "raw"
    draw_pairs(raw, "images/{k}.png", "masks/{k}.png", 9)
    for number, split in enumerate(("train", "val", "test", "testA")):
        entries = []
        for k in range(9):
            if k % 3 == number % 3:
                entry = {"img_name": f"{k}.png", "mask_name": f"{k}.png", "prompts": {}}
                entries.append({**entry, "group": f"patient {k}"})
        (raw / "anns").mkdir(exist_ok=True)
        (raw / f"anns/{split}.json").write_text(json.dumps(entries))
    assert "needs no import" in bring()[2]
    assert bring("--format", "folders")[0] == 0
    for split, entry, _ in written(tmp_path / "mine"):
        k = int(entry["img_name"][0])
        assert split == ("train", "val", "test")[k % 3] and entry["group"] == f"patient {k}"


def test_overlays_are_not_read(bring, tmp_path):
    draw_pairs(tmp_path / "raw", "img/{k}.png", "label/{k}.png", 4)
    draw_pairs(tmp_path / "raw", "img/{k}.png", "label_visualization/{k}.png", 4)
    save(tmp_path / "raw/example.png", photo(0))
    status, text, _ = bring()
    assert status == 0 and "not read: 4 images, label_visualization/" in text
    assert "not read: 1 image in the folder itself" in text


# --- photos that are stored rotated ---------------------------------------------------------------


@pytest.mark.parametrize("is_upright", [False, True])
def test_masks_of_rotated_photos_lie_on_the_upright_image(bring, tmp_path, is_upright):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it upright
    raw = tmp_path / "raw"
    for k in range(4):
        stored = Image.fromarray(photo(k))
        save(raw / f"image/{k}.jpg", stored, exif=exif, quality=95)
        mask = Image.fromarray(black_white(disc(k)))
        save(
            raw / f"label/{k}.png",
            mask.transpose(Image.Transpose.ROTATE_270) if is_upright else mask,
        )
    assert bring()[0] == 0
    for k, (_, mask) in by_number(tmp_path / "mine").items():
        assert (mask == np.rot90(black_white(disc(k)), -1)).all()


def test_turned_masks_that_may_be_upright_are_counted(bring, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # turn by 180 degrees
    for k in range(3):
        save(tmp_path / f"raw/image/{k}.jpg", photo(k), exif=exif)
        save(tmp_path / f"raw/label/{k}.png", black_white(disc(k)))
    status, text, _ = bring()
    assert status == 0 and "may be upright already: 3 masks" in text
    for k, (_, mask) in by_number(tmp_path / "mine").items():
        assert (mask == black_white(disc(k))[::-1, ::-1]).all()


# --- the whole way --------------------------------------------------------------------------------


def test_two_imports_give_the_same_bytes(bring, tmp_path):
    draw_maps(tmp_path / "raw", coloured)
    assert bring()[0] == 0
    assert bring(out="again")[0] == 0
    assert contents(tmp_path / "mine") == contents(tmp_path / "again")


def test_advice_says_how_a_folder_is_read(tmp_path):
    draw_pairs(tmp_path / "raw", "Original/{k}.png", "Ground Truth/{k}.png", 4)
    line = import_folder.advice(tmp_path / "raw")
    assert "--out data/NAME reads it as folders: 4 images in Original/, 4 masks in" in line
    (tmp_path / "raw/Original/0.png").unlink()
    assert "no image belongs to this mask" in import_folder.advice(tmp_path / "raw")
    assert import_folder.advice(tmp_path / "raw/Original") is None
    assert import_folder.advice(tmp_path / "nowhere")  # the error of the system, not an exception


def test_imported_masks_are_trained_on(bring, monkeypatch, capsys, tmp_path):
    draw_pairs(tmp_path / "raw", "{k}.jpg", "{k}_mask.png")
    assert bring("--prompt", "a disc")[0] == 0
    train_two_steps(monkeypatch, capsys, tmp_path, "clipseg", "--prompt", "p1")


def test_training_names_patients_of_two_splits(bring, monkeypatch, capsys, tmp_path):
    draw_pairs(tmp_path / "raw", "train/images/p{k}.png", "train/masks/p{k}.png", 4)
    draw_pairs(tmp_path / "raw", "val/images/p{k}_b.png", "val/masks/p{k}_b.png", 2)
    draw_pairs(tmp_path / "raw", "test/images/q{k}.png", "test/masks/q{k}.png", 2)
    assert bring("--format", "folders", "--group-regex", "[pq][0-9]+")[0] == 0
    text = train_two_steps(monkeypatch, capsys, tmp_path, "segformer")
    (line,) = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: val shares patients with train (2, such as p0); ")
    assert f"python prepare.py check {tmp_path / 'mine'} lists them" in line


def test_imported_class_maps_are_trained_on(bring, monkeypatch, capsys, tmp_path):
    draw_maps(tmp_path / "raw", coloured)
    assert bring()[0] == 0
    train_two_steps(monkeypatch, capsys, tmp_path, "segformer")


def train_two_steps(monkeypatch, capsys, tmp_path, model, *options):
    words = ["--model", model, "--variant", "mini", "--weights", "none", "--size", 64]
    words += ["--data", tmp_path / "mine", "--out", tmp_path / "run", "--cache", tmp_path / "cache"]
    words += ["--epochs", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--overlays", 0]
    words += options
    status, text, error = command(monkeypatch, capsys, train, *words)
    assert status == 0, error
    assert (tmp_path / "run/best.safetensors").is_file()
    return text


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Images", "image"), ("imgs", "image"), ("JPEGImages", "image"), ("Original", "image"),
        ("ISIC_Training_Data", "image"), ("unlabeled_images", "image"), ("input", "image"),
        ("Ground Truth", "mask"), ("GroundTruth", "mask"), ("SegmentationClassPNG", "mask"),
        ("trainannot", "mask"), ("gt", "mask"), ("mask_images", "mask"), ("1st_manual", "mask"),
        ("length", ""), ("benign", ""), ("train", ""), ("database", ""),
    ],
)  # fmt: skip
def test_roles_of_folders(name, role):
    assert mask_names.role_of_folder(name) == role


def test_names_files(tmp_path):
    args = Namespace(classes=None)
    (tmp_path / "classes.txt").write_text("liver\nliver\n")
    with pytest.raises(ValueError, match="names a class twice"):
        mask_values.names_of(tmp_path, args)
    (tmp_path / "classes.txt").write_text("liver\n")
    (tmp_path / "labels.txt").write_text("kidney\n")
    with pytest.raises(ValueError, match="both name classes"):
        mask_values.names_of(tmp_path, args)
    names = mask_values.names_of(tmp_path, Namespace(classes="a,b"))
    assert names.by_number == {1: "a", 2: "b"} and names.foreground == ("a", "b")
