"""Lay out BTCV's abdominal CT, with a split."""

from pathlib import Path

from engine.ranges import SEED
from imaging import layouts
from preparation import archives
from preparation.decathlon import split_cases, split_cases_at_random
from preparation.volume_sets import LINKED, link, relabelled, write_data_set

# synapse.org, syn3193805, "Multi-Atlas Labeling Beyond the Cranial Vault": abdominal CT.
# RawData.zip has Training/ (30 volumes, 0001 to 0010 and 0021 to 0040) and Testing/ (20 volumes, no
# labels).

# The split of Swin UNETR and UNETR, dataset_0.json: printed by 3d_segmentation/
# swin_unetr_btcv_segmentation_3d.ipynb of github.com/Project-MONAI/tutorials;
# research-contributions has it as SwinMM/Pretrain/jsons/dataset00_BTCV.json.
SWIN_UNETR = {"train": [*range(1, 11), *range(21, 35)], "val": [*range(35, 41)]}
BTCV_ABOUT = {
    "name": "BTCV",
    "description": "abdominal CT, 13 organs: Multi-Atlas Labeling Beyond the Cranial Vault",
    "reference": "synapse.org, syn3193805",
    "licence": "by registration, see there",
    "tensorImageSize": "3D",
    "modality": {"0": "CT"},
    "labels": {str(k): name for k, name in enumerate(layouts.BTCV_CLASSES)},
}
BTCV_FOLDERS = {"imagesTr": "Training/img", "labelsTr": "Training/label", "imagesTs": "Testing/img"}


def find_btcv(raw):
    """Return {image: label} and the images without labels, named "imagesTr/img0001.nii.gz".

    Raises FileNotFoundError, one line, if the folder is another one, or if an image or a label
    lacks its counterpart.
    """
    files = {}
    for folder, source in BTCV_FOLDERS.items():
        prefix = source.split("/")[1]
        paths = (raw / source).glob(f"{prefix}[0-9][0-9][0-9][0-9].nii.gz")
        files[folder] = sorted(f"{folder}/{path.name}" for path in paths)

    images = files["imagesTr"]
    if not images:
        raise FileNotFoundError(
            f"{raw}: no Training/img/img0001.nii.gz and so on; DOWNLOAD is RawData.zip, "
            "or the folder RawData in it"
        )
    labels = [name.replace("imagesTr/img", "labelsTr/label") for name in images]
    unpaired = sorted(set(labels) ^ set(files["labelsTr"]))
    if unpaired:
        number = unpaired[0].removesuffix(".nii.gz")[-4:]
        raise FileNotFoundError(
            f"{raw}/Training: case {number} is not whole, image or label is missing; unpack the "
            "download again"
        )
    return dict(zip(images, labels, strict=True)), files["imagesTs"]


def swin_unetr_cases(pairs, where):
    """Return the split of each image as Swin UNETR has it.

    Raises ValueError, one line, unless its 30 volumes, and no others, are given.
    """
    split_of = {}
    for split, numbers in SWIN_UNETR.items():
        for number in numbers:
            split_of[f"imagesTr/img{number:04}.nii.gz"] = split

    different = sorted(split_of.keys() ^ pairs)
    if different:
        file = different[0].split("/")[1]
        fault = "missing" if different[0] in split_of else "none of these"
        raise ValueError(
            f"{where}/Training: Swin UNETR has 30 volumes, {file} is {fault}; unpack RawData.zip "
            "again, or choose --split case"
        )
    return split_of


@archives.takes_archives
def btcv(args):
    """Split BTCV's abdominal CT with 13 organs, and write it in the Decathlon's layout.

    --split swin-unetr takes 24 volumes to train (0001-0010, 0021-0034) and 6 to validate
    (0035-0040), as for the released Swin UNETR. It has no test split: the authors report the Dice
    of the six val volumes, with which they also chose the epoch. Compare with --test DIR:val.
    --split case splits the volumes at random: 70 % train, 15 % val, 15 % test.

    The images of Testing/ have no labels. Files are hard-linked, or copied where that is
    impossible. With --labels universal_labels.json the classes get the Universal Model's names.
    """
    about = relabelled(BTCV_ABOUT, args.labels)
    pairs, unlabelled_images = find_btcv(args.download)
    if args.split == "case":
        split_of = split_cases_at_random(pairs, args.seed, args.download)
        title = [f"BTCV by case, seed {args.seed}"]
    else:
        split_of = swin_unetr_cases(pairs, args.download)
        title = [
            "BTCV, split of Swin UNETR",
            "its authors' Dice is of val, which chose the epoch as well: no test split",
        ]
    splits, origin = split_cases(pairs, split_of, unlabelled_images)

    def put(part, *names):  # image and label; a label may be None
        for name in filter(None, names):
            folder, file = origin[name].split("/")
            link(args.download / BTCV_FOLDERS[folder] / file, part / name)

    if args.raw.is_dir():
        title.append(LINKED)
    return write_data_set(args.out, about, splits, put, title)


def options(command):
    """Describe `prepare.py btcv`."""
    add = command(btcv, "split BTCV's abdominal CT")
    help = "archive or folder RawData of the download, with Training/ and Testing/"
    archives.add_download(add, help)
    help = "folder of the new data set (default: %(default)s)"
    add("--out", type=Path, default="data/btcv", metavar="DIR", help=help)
    help = "Swin UNETR's 24 train and 6 val volumes, or a random split (default: %(default)s)"
    add("--split", choices=("swin-unetr", "case"), default="swin-unetr", help=help)
    help = "random seed of --split case (default: %(default)s)"
    add("--seed", type=SEED, default=0, metavar="N", help=help)
    help = (
        "JSON file that maps this data set's labels to other classes, such as "
        "universal_labels.json (default: keep the labels)"
    )
    add("--labels", type=Path, metavar="FILE", help=help)
