"""Miniatures of the archives of the medvlsm study's data sets, and of its annotation files."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

GENERAL = ["polyp which is a projecting growth of tissue", "polyp which is a small lump"]
ENDING = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "tif": "TIFF", "bmp": "BMP"}


def picture(seed: int, size=(48, 64)) -> np.ndarray:
    """An image of smooth colours, uint8 (H,W,3), unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC))


def blob(seed: int, size=(48, 64)) -> tuple[np.ndarray, list[int]]:
    """A mask, bool (H,W), and its box as the study writes it: x1 and y1 lie behind the mask."""
    rng = np.random.default_rng(seed)
    height, width = size
    x0, y0 = int(rng.integers(2, width // 2)), int(rng.integers(2, height // 2))
    w, h = int(rng.integers(8, width // 3)), int(rng.integers(8, height // 3))
    mask = np.zeros(size, bool)
    mask[y0 : y0 + h, x0 : x0 + w] = True
    return mask, [x0 - 1, y0 - 1, x0 + w, y0 + h]


def encoded(pixels: np.ndarray, ending: str, **options) -> bytes:
    file = io.BytesIO()
    if ENDING[ending] == "JPEG":
        options = {"quality": 90} | options
    Image.fromarray(pixels).save(file, ENDING[ending], **options)
    return file.getvalue()


def polyp_prompts(size="small") -> dict:
    """p0 to p9 as the study writes them."""
    short = f"one {size} pink round polyp"
    place = "located in center of the image"
    return {
        "p0": "",
        "p1": "polyp",
        "p2": "round polyp",
        "p3": "pink round polyp",
        "p4": f"{size} pink round polyp",
        "p5": short,
        "p6": f"{short}, {place}",
        "p7": GENERAL,
        "p8": [f"{short} {text.removeprefix('polyp ')}" for text in GENERAL],
        "p9": [f"{short} {text.removeprefix('polyp ')} {place}" for text in GENERAL],
    }


def item(image: str, mask: str, box, prompts: dict) -> dict:
    """An entry of an annotation file, with the keys that are not used."""
    content = {
        "bbox": box,
        "cat": 0,
        "segment_id": image.split(".")[0],
        "img_name": image,
        "mask_name": mask,
        "sentences": [{"idx": 0, "sent_id": 958, "sent": ""}],
        "prompts": prompts,
        "sentences_num": 1,
    }
    if box is None:
        del content["bbox"]
    return content


def write_zip(path, files: dict[str, bytes]):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_files(folder, files: dict[str, bytes]):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_annotations(folder, splits: dict[str, list], **dump):
    """SPLIT.json for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, items in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(items, **dump))
    return folder


def shares(items: list) -> dict[str, list]:
    """All but four for training, two each for val and test."""
    return {"train": items[:-4], "val": items[-4:-2], "test": items[-2:]}
