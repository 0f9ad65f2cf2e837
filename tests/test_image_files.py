"""Image files as they occur: every format, damaged files, names and JSON of other systems."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import ExifTags, Image

import data
from imaging import image_files, layouts
from prediction.inputs import list_cases
from preparation import check_images
from preparation.check_findings import Findings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes data.py's filter
COLOURS = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
MASK = np.zeros((24, 32), np.uint8)
MASK[3:10, 5:20] = 255


def save_pair(folder, stem="a", image_ending="png", mask_ending="png"):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    Image.fromarray(COLOURS).save(folder / "images" / f"{stem}.{image_ending}")
    Image.fromarray(MASK).save(folder / "masks" / f"{stem}.{mask_ending}")


def annotate(root, items, encoding="utf-8", split="train"):
    (root / "anns").mkdir(exist_ok=True)
    text = json.dumps(items, ensure_ascii=False)
    (root / "anns" / f"{split}.json").write_bytes(text.encode(encoding))


def entry(image="a.png", mask="a.png", **more):
    return {"img_name": image, "mask_name": mask, "prompts": {"p1": "polyp"}} | more


def one_line(function, *arguments, error=ValueError):
    with pytest.raises(error) as caught:
        function(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def open_split(root, tmp_path, split="train"):
    return data.open_dataset(layouts.read_entries(root, split), tmp_path / "cache")


# --- formats -------------------------------------------------------------------------------------


def test_endings_are_those_that_pillow_reads_as_one_picture():
    assert {".pgm", ".ppm", ".pbm", ".jp2", ".tif", ".jfif", ".mpo"} <= layouts.ENDINGS
    assert not {".pdf", ".psd", ".eps", ".h5", ".mpg", ".wmf", ".icns"} & layouts.ENDINGS


@pytest.mark.parametrize("ending", ["pgm", "ppm", "pnm", "jp2", "jfif", "tga", "dib", "sgi"])
def test_pairs_of_any_format_are_listed_and_read(ending, tmp_path):
    save_pair(tmp_path / "set/train", image_ending=ending, mask_ending="pgm")
    image, mask = open_split(tmp_path / "set", tmp_path).pixels(0)
    assert np.array_equal(mask * 255, MASK)
    if ending in ("ppm", "tga", "dib", "sgi"):
        assert np.array_equal(image, COLOURS)


def test_numbers_in_a_pgm_are_not_scaled_to_its_white(tmp_path):
    numbers = (MASK // 255 * 2).astype(np.uint8)
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5\n32 24\n3\n" + numbers.tobytes())
    assert np.array_equal(image_files.read_mask(path, numbers=True), numbers)
    assert image_files.read_mask(path).max() == 170  # as grey
    path.write_bytes(b"P5\n32 24\n1000\n" + numbers.astype(">u2").tobytes())
    assert np.array_equal(image_files.read_mask(path, numbers=True), numbers)


def tiff(path, pixels, **how):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(path, pixels, **how)
    return path


REFUSED = {  # by Pillow: pixels as stored, and how tifffile writes them
    "colours marked as grey": (COLOURS, {"photometric": 1, "planarconfig": 1}),
    "four channels marked as grey": (
        np.dstack([COLOURS, MASK]),
        {"photometric": 1, "planarconfig": 1},
    ),
    "half floats": (COLOURS[..., 0].astype(np.float16), {"tile": (16, 16)}),
    "double floats": (COLOURS[..., 0].astype(np.float64) / 4, {"compression": "zlib"}),
    "64-bit integers": (COLOURS[..., 0].astype(np.int64) * 1000, {}),
    "float colours": (COLOURS.astype(np.float32) / 7, {"photometric": 2}),
    "32-bit colours": (COLOURS.astype(np.uint32) << 24, {"photometric": 2}),
    "16-bit grey and alpha": (
        np.dstack([COLOURS[..., 0], MASK]).astype(np.uint16) * 257,
        {"photometric": 1, "planarconfig": 1, "extrasamples": [2]},
    ),
}


def expected_image(pixels):
    """The rules of data.py's docstring: uint8 as it is, all else stretched, alpha dropped."""
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 2:
        pixels = pixels[..., [0, 0, 0]]
    pixels = pixels[..., :3]
    if pixels.dtype == np.uint8:
        return pixels
    x = pixels.astype(np.float64)
    return ((x - x.min()) * (255 / (x.max() - x.min()))).round().astype(np.uint8)


@pytest.mark.parametrize("kind", REFUSED)
def test_tiffs_that_pillow_refuses_are_read_by_the_same_rules(kind, tmp_path):
    pixels, how = REFUSED[kind]
    path = tiff(tmp_path / "a.tif", pixels, **how)
    with pytest.raises(Image.UnidentifiedImageError):
        Image.open(path)
    assert np.array_equal(image_files.read_image(path), expected_image(pixels))
    for number in range(1, 9):
        tiff(path, pixels, extratags=[(274, 3, 1, number, True)], **how)
        turned = turned_by(expected_image(pixels), number)
        assert np.array_equal(image_files.read_image(path), turned), number


def test_planes_of_16_bits_are_read(tmp_path):
    planes = np.moveaxis(COLOURS.astype(np.uint16) * 200, -1, 0)
    path = tiff(tmp_path / "a.tif", planes, photometric=2, planarconfig=2)
    assert np.array_equal(image_files.read_image(path), expected_image(np.moveaxis(planes, 0, -1)))


def test_masks_in_tiffs_that_pillow_refuses(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path, np.dstack([MASK] * 3), photometric=1, planarconfig=1)
    assert np.array_equal(image_files.read_mask(path), MASK)
    tiff(path, np.dstack([MASK * 0 + 255] * 3 + [MASK]), photometric=1, planarconfig=1)
    assert np.array_equal(image_files.read_mask(path), MASK)  # white all over: alpha is the mask
    tiff(path, MASK.astype(np.float64) / 255)
    assert np.array_equal(image_files.read_mask(path), MASK)
    tiff(path, (MASK // 255 * 7).astype(np.int64))
    assert np.array_equal(image_files.read_mask(path, numbers=True), MASK // 255 * 7)


def test_what_tifffile_must_not_hide(tmp_path):
    path = tmp_path / "a.tif"
    tiff(path, np.stack([COLOURS] * 2), photometric=1, planarconfig=1)
    assert "a.tif: holds 2 pages" in one_line(image_files.read_image, path)
    tiff(path, COLOURS, photometric=1, planarconfig=1)
    path.write_bytes(path.read_bytes()[:-100])
    assert "cut off" in one_line(image_files.read_image, path)
    tiff(path, np.dstack([COLOURS, COLOURS]), photometric=1, planarconfig=1)
    assert "(6 channels)" in one_line(image_files.read_image, path)
    tiff(path, COLOURS, photometric=0, planarconfig=1)
    assert "PhotometricInterpretation 0" in one_line(image_files.read_image, path)


def test_without_tifffile_the_line_names_it(tmp_path, monkeypatch):
    path = tiff(tmp_path / "a.tif", COLOURS, photometric=1, planarconfig=1)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    assert "a.tif: " in one_line(image_files.read_image, path)
    assert "pip install tifffile" in one_line(image_files.read_image, path)


# --- orientation ---------------------------------------------------------------------------------


def turned_by(pixels, number):
    """Turn pixels (H,W,…) by an EXIF orientation, as its definition says."""
    across = np.swapaxes(pixels, 0, 1)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: across,
        6: across[:, ::-1],
        7: across[::-1, ::-1],
        8: across[::-1],
    }[number]


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("kind", ["raw.tif", "tiff_lzw.tif", "jpg", "png"])
def test_images_and_their_masks_are_upright(kind, number, tmp_path):
    """A mask without a tag, of the stored size, is turned like its image."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    how = {"compression": kind.split(".")[0]} if kind.endswith("tif") else {}
    path = tmp_path / f"a.{kind}"
    plain = tmp_path / f"plain.{kind}"
    Image.fromarray(COLOURS).save(path, exif=exif, **how)
    Image.fromarray(COLOURS).save(plain, **how)
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    Image.fromarray(MASK).save(tmp_path / "mask.tif")

    assert np.array_equal(
        image_files.read_image(path), turned_by(image_files.read_image(plain), number)
    )
    for mask in ("mask.png", "mask.tif"):
        read, _ = image_files.load_mask(tmp_path / mask, path, orientation="stored")
        assert np.array_equal(read, turned_by(MASK, number))


def jpeg_with(exif: bytes) -> bytes:
    """A JPEG file whose EXIF segment holds these bytes."""
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, "JPEG", quality=95)
    content = b"Exif\0\0" + exif
    segment = b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
    return b"\xff\xd8" + segment + file.getvalue()[2:]


DAMAGED_EXIF = {
    "no byte order": b"M?\0*\0\0\0\x08" + bytes(20),
    "too short": b"MM\0",
    "no tags": b"MM\0*\0\0\0\x08",
    "list cut off": b"MM\0*\0\0\0\x08\0\x05" + struct.pack(">HHII", 271, 2, 3, 0),
    "begins beyond its end": b"MM\0*\xff\0\0\x08" + bytes(20),
}


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
def test_damaged_exif_data_is_said_and_the_image_read(kind, tmp_path, capsys):
    root = tmp_path / "set"
    save_pair(root / "train", image_ending="jpg")
    path = root / "train/images/a.jpg"
    path.write_bytes(jpeg_with(b""))
    expected = image_files.read_image(path)
    path.write_bytes(jpeg_with(DAMAGED_EXIF[kind]))
    assert np.array_equal(image_files.read_image(path), expected)
    open_split(root, tmp_path)
    assert "1 image (a.jpg) with damaged EXIF data" in capsys.readouterr().out
    open_split(root, tmp_path)  # from the cache
    assert "1 image (a.jpg) with damaged EXIF data" in capsys.readouterr().out
    assert not image_files.has_damaged_exif(root / "train/masks/a.png")


def test_a_damaged_tag_beside_the_orientation_does_not_matter(tmp_path):
    tags = struct.pack(">HHII", 274, 3, 1, 6 << 16) + struct.pack(">HHII", 282, 5, 1, 2**31)
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_with(b"MM\0*\0\0\0\x08\0\x02" + tags + bytes(4)))
    assert image_files.read_image(path).shape == (32, 24, 3)


# --- damaged, foreign and large files ------------------------------------------------------------


def damaged(rng: random.Random, content: bytes) -> bytes:
    content = bytearray(content)
    kind = rng.choice(["head", "anywhere", "cut", "zero"])
    if kind == "cut":
        return bytes(content[: rng.randrange(len(content))])
    if kind == "zero":
        start = rng.randrange(len(content))
        content[start : start + 8] = bytes(len(content[start : start + 8]))
        return bytes(content)
    end = min(len(content), 200) if kind == "head" else len(content)
    for _ in range(rng.choice([1, 2, 4, 16])):
        content[rng.randrange(end)] = rng.randrange(256)
    return bytes(content)


FORMATS = ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000"]


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_are_one_line_or_read(kind, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "maker"
    file = io.BytesIO()
    Image.fromarray(COLOURS).save(file, kind, exif=exif)
    path = tmp_path / "a.png"
    rng = random.Random(kind)
    for _ in range(40):
        path.write_bytes(damaged(rng, file.getvalue()))
        for read in image_files.load_image, image_files.load_mask, image_files.has_damaged_exif:
            try:
                read(path)
            except (ValueError, OSError) as error:
                line = str(error)
                assert line.startswith(f"{path}: ") and "\n" not in line


ERRORS = [MemoryError(), ZeroDivisionError("x"), AssertionError(), EOFError(), OSError("a\nb")]


@pytest.mark.parametrize("error", ERRORS)
def test_whatever_pillow_raises_is_one_line(error, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(path)

    def fail(image):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert one_line(image_files.read_image, path).startswith(f"{path}: ")


@pytest.mark.slow
def test_libraries_write_nothing_of_their_own(tmp_path):
    """Warnings of Pillow, and what libtiff writes to stderr while a progress bar is drawn."""
    file = io.BytesIO()
    smooth = np.repeat(np.arange(32, dtype=np.uint8)[None], 24, 0)
    Image.fromarray(smooth).save(file, "TIFF", compression="tiff_lzw")
    content = bytearray(file.getvalue())
    content[20:60] = bytes(range(200, 240))
    (tmp_path / "lzw.tif").write_bytes(content)
    Image.fromarray(COLOURS).save(tmp_path / "large.png")
    (tmp_path / "exif.jpg").write_bytes(jpeg_with(DAMAGED_EXIF["list cut off"]))
    palette = Image.fromarray(MASK, mode="L").convert("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    code = """
import sys, pathlib
from PIL import Image
from imaging import image_files
Image.MAX_IMAGE_PIXELS = 700  # the files have more than that, and less than twice as many
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        image_files.read_image(path)
        image_files.read_mask(path)
        print(path.name, "read")
    except ValueError as error:
        print(error)
print("bar |", end="", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stderr == "bar |"
    lines = done.stdout.splitlines()
    assert lines[:2] == ["exif.jpg read", "large.png read"] and lines[3:] == ["palette.png read"]
    assert "lzw.tif: not readable as an image (" in lines[2] and "tempfile" not in lines[2]


def test_other_output_is_not_taken_for_that_of_libtiff():
    bar = "\rdecode:  10%|█ | 6/60 [00:00<00:01]"
    written = f"{bar}tempfile.tif: Using code not yet in table.\n{bar}"
    assert image_files.LIBTIFF_LINE.findall(written) == [
        "tempfile.tif: Using code not yet in table.\n"
    ]
    assert image_files.LIBTIFF_LINE.sub("", written) == bar * 2


def test_large_images_get_advice(tmp_path, monkeypatch, recwarn):
    path = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    line = one_line(image_files.read_image, path)
    assert "a.png: has more than" in line and "tiles" in line
    assert "replace" not in line and "bomb" not in line


FOREIGN = {
    "a.dcm": (b"anything", "DICOM is not read; .*prepare.py import FOLDER.*pydicom"),
    "a": (bytes(128) + b"DICM", "DICOM is not read"),
    "b.png": (bytes(128) + b"DICM", "DICOM is not read"),
    "a.nrrd": (b"NRRD0004", "NRRD is not read; .*prepare.py import FOLDER.*SimpleITK"),
    "a.MHA": (b"ObjectType = Image", "MetaImage is not read; .*prepare.py import FOLDER"),
    "a.h5": (b"\x89HDF\r\n", "HDF5 is not read"),
    "a.heic": (b"\0\0\0\x20ftypheic", "HEIC is not read; save it as PNG or JPEG"),
    "a.svs": (b"II*\0", "whole-slide is not read; cut it into tiles"),
    "c.png": (b"version https://git-lfs.github.com/spec/v1", "Git LFS .*git lfs pull"),
    "a.nii.gz": (b"\x1f\x8b", "holds a volume, not an image"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_known_formats_that_are_not_read_name_the_way_out(name, tmp_path):
    content, words = FOREIGN[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        image_files.read_image(path)
    assert str(error.value).startswith(f"{path}: ") and "replace" not in str(error.value)


def test_folders_of_other_files_are_refused_with_counts(tmp_path):
    root = tmp_path / "set"
    save_pair(root / "train")
    for name in ("images", "masks"):
        (root / "train" / name / "a.png").rename(root / "train" / name / "a.xyz")
        (root / "train" / name / "b.xyz").write_text("b")
    line = one_line(layouts.read_entries, root, "train")
    assert "train/images: no images in this folder, only 2 .xyz; images end in .png" in line
    findings = Findings()
    check_images.read_splits(root, None, findings)
    assert findings["splits that cannot be used"] == [line]


def test_an_image_whose_partner_is_dicom(tmp_path):
    root = tmp_path / "set"
    save_pair(root / "train")
    save_pair(root / "train", "b")
    (root / "train/images/a.png").rename(root / "train/images/a.dcm")
    assert "images/a.dcm: DICOM is not read" in one_line(layouts.read_entries, root, "train")
    (root / "train/images/a.dcm").rename(root / "train/images/a.xyz")
    line = one_line(layouts.read_entries, root, "train")
    assert "masks/a.png: no image or mask of the same name" in line
    assert "a.xyz is not an image file" in line


def test_other_files_beside_pairs_are_counted_aloud(tmp_path, capsys):
    root = tmp_path / "set"
    save_pair(root / "train")
    for name in ("x.xyz", "readme.txt", "Thumbs.db", "._a.png", ".DS_Store"):
        (root / "train/images" / name).write_text("x")
    (root / "train/images/sub").mkdir()
    assert len(layouts.read_entries(root, "train")) == 1
    said = capsys.readouterr().out
    assert "train/images: skipped files that are not images: " in said
    assert "1 folder" in said and "1 .xyz" in said and "1 .txt" in said


def test_predict_lists_images_by_the_same_rule(tmp_path):
    save_pair(tmp_path)
    folder = tmp_path / "images"
    (folder / "._a.png").write_bytes(b"macOS")
    Image.fromarray(COLOURS).save(folder / "b.ppm")
    args = SimpleNamespace(
        inputs=[str(folder)], prompt=None, split=None, out="o", roots={}, prompts_csv=None
    )
    assert [name for name, _, _ in list_cases(args, {}, False)] == ["a", "b"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.nrrd").write_bytes(b"x")
    args.inputs = [str(tmp_path / "other")]
    assert "NRRD is not read" in one_line(list_cases, args, {}, False)


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    assert "a.png: is not a file" in one_line(image_files.read_image, tmp_path / "a.png")


def test_files_that_may_not_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", refuse)
    line = one_line(image_files.read_image, tmp_path / "a.png", error=OSError)
    assert line == f"{tmp_path / 'a.png'}: Permission denied"


# --- names and JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_files_of_other_systems(encoding, tmp_path):
    save_pair(tmp_path, "Läsion")
    annotate(tmp_path, [entry("Läsion.png", "Läsion.png")], encoding)
    classes = '{"0": "Grund", "1": "Läsion"}'
    (tmp_path / "classes.json").write_bytes(classes.encode(encoding))
    dataset = open_split(tmp_path, tmp_path)
    assert dataset.classes == ("Läsion",) and dataset.pixels(0)[1].any()


@pytest.mark.parametrize("written, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_of_either_unicode_form(written, stored, tmp_path):
    on_disk = unicodedata.normalize(stored, "Größe/Läsion")
    (tmp_path / "images" / on_disk).parent.mkdir(parents=True)
    (tmp_path / "masks" / on_disk).parent.mkdir(parents=True)
    Image.fromarray(COLOURS).save(tmp_path / "images" / f"{on_disk}.png")
    Image.fromarray(MASK).save(tmp_path / "masks" / f"{on_disk}.png")
    name = unicodedata.normalize(written, "Größe/Läsion.png")
    annotate(tmp_path, [entry(name, name)])
    assert open_split(tmp_path, tmp_path).pixels(0)[1].any()


def test_pairs_of_different_unicode_forms(tmp_path):
    root = tmp_path / "set"
    save_pair(root / "train", unicodedata.normalize("NFC", "Läsion"))
    mask = root / "train/masks" / unicodedata.normalize("NFC", "Läsion.png")
    mask.rename(root / "train/masks" / unicodedata.normalize("NFD", "Läsion.png"))
    (found,) = layouts.read_entries(root, "train")
    assert found.name == unicodedata.normalize("NFD", "Läsion")
    Image.fromarray(MASK).save(mask)  # now both forms are there
    line = one_line(layouts.read_entries, root, "train")
    assert "a second file of this name" in line and line.endswith("; remove or rename one")


def test_missing_files_say_what_is_there(tmp_path):
    save_pair(tmp_path)
    annotate(tmp_path, [entry("a.jpg", "a.png")])
    line = one_line(open_split, tmp_path, tmp_path, error=FileNotFoundError)
    assert "images/a.jpg (a.png is there)" in line
    assert "a.jpg (a.png is there): no such file" in one_line(
        image_files.read_image, tmp_path / "images/a.jpg", error=FileNotFoundError
    )
    (tmp_path / "images/link.png").symlink_to(tmp_path / "nowhere.png")
    annotate(tmp_path, [entry("link.png", "a.png")])
    line = one_line(open_split, tmp_path, tmp_path, error=FileNotFoundError)
    assert "link.png (a link to " in line


def test_linked_folders_and_files_are_read(tmp_path):
    save_pair(tmp_path / "disk")
    root = tmp_path / "set"
    root.mkdir()
    (root / "images").symlink_to(tmp_path / "disk/images")
    (root / "masks").mkdir()
    (root / "masks/a.png").symlink_to(tmp_path / "disk/masks/a.png")
    annotate(root, [entry()])
    (tmp_path / "link").symlink_to(root)
    assert open_split(tmp_path / "link", tmp_path).pixels(0)[1].any()


ODD = {
    "several masks": (entry(mask=["a.png", "b.png"]), "mask_name lists 2 files.*union"),
    "number as a name": (entry(image=3), "img_name 3 is not a string"),
    "no name": (entry(image=""), "img_name '' is not the name of a file"),
    "null byte": (entry(image="a\0.png"), "is not the name of a file"),
    "no prompts": ({"img_name": "a.png", "mask_name": "a.png"}, "has no prompts"),
    "prompts as a text": (entry(prompts="polyp"), "prompts are a text instead of an object"),
    "prompts as null": (entry(prompts=None), "prompts are null"),
    "prompt as null": (entry(prompts={"p1": None}), "prompt p1 is null"),
    "prompt as an object": (entry(prompts={"p1": {"a": "b"}}), "prompt p1 is an object"),
    "prompt lists null": (entry(prompts={"p1": ["a", None]}), "prompt p1 lists null"),
    "label true": (entry(label=True), "label True of a.png is not a whole number"),
    "label Infinity": (entry(label=float("inf")), "label inf of a.png is not a whole number"),
    "no object": ("a.png", "is a text; expected an object"),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_entries_are_one_line(kind, tmp_path):
    item, words = ODD[kind]
    save_pair(tmp_path)
    annotate(tmp_path, [item])
    with pytest.raises(ValueError, match=f"train.json, entry 0: .*{words}") as error:
        layouts.read_entries(tmp_path, "train")
    assert "\n" not in str(error.value) and "Error(" not in str(error.value)


ODD_FILES = {
    "an object": ("{}", "holds an object; expected a list"),
    "very deep": ("[" * 100_000, "nested too deeply"),
    "half a character": (r'[{"img_name": "a\ud800.png"}]', "half a character"),
    "one key twice": ('[{"img_name": "a.png", "img_name": "b.png"}]', "is repeated"),
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_odd_annotation_files_are_one_line(kind, tmp_path):
    text, words = ODD_FILES[kind]
    save_pair(tmp_path)
    annotate(tmp_path, [])
    (tmp_path / "anns/train.json").write_text(text)
    assert words in one_line(layouts.read_entries, tmp_path, "train")


def test_names_that_are_not_unicode_are_one_line(tmp_path):
    save_pair(tmp_path / "set/train")
    folder = os.fsencode(tmp_path / "set/train/images")
    os.rename(folder + b"/a.png", folder + b"/a\xff.png")
    line = one_line(layouts.read_entries, tmp_path / "set", "train")
    assert "is not Unicode; rename it" in line
    line.encode("utf-8")


def test_hidden_annotation_files_are_passed_over(tmp_path):
    save_pair(tmp_path)
    annotate(tmp_path, [entry()])
    (tmp_path / "anns/._train.json").write_bytes(b"macOS")
    assert [*layouts.find_splits(tmp_path)] == ["train"]


def test_a_file_of_macos_beside_an_image_is_named_as_such(tmp_path):
    path = tmp_path / "._a.jpg"
    path.write_bytes(b"\0\5\26\7")
    assert one_line(image_files.read_image, path) == (
        f"{path}: not an image, but a file that macOS creates; delete it"
    )
