"""Lay out BTCV's abdominal CT, with a split."""

from pathlib import Path

from engine.ranges import SEED
from imaging import atomic_files, layouts
from preparation.decathlon import deal_cases, split_cases
from preparation.volume_sets import LINKED, link, relabelled, write_data_set

# synapse.org, syn3193805, "Multi-Atlas Labeling Beyond the Cranial Vault": abdominal CT,
# RawData.zip with Training/ (30 volumes, 0001 to 0010, 0021 to 0040) and Testing/ (20, no labels).

# dataset_0.json of Swin UNETR, and of UNETR: github.com/Project-MONAI/tutorials,
# 3d_segmentation/swin_unetr_btcv_segmentation_3d.ipynb prints it; research-contributions has it as
# SwinMM/Pretrain/jsons/dataset00_BTCV.json.
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
    """{image: label} and images without labels, by the data set's names: imagesTr/img0001.nii.gz

    FileNotFoundError, one line: no such folder, or an image without its label, or the reverse.
    """
    files = {}
    for folder, place in BTCV_FOLDERS.items():
        paths = (raw / place).glob(f"{place.split('/')[1]}[0-9][0-9][0-9][0-9].nii.gz")
        files[folder] = sorted(f"{folder}/{path.name}" for path in paths)
    if not files["imagesTr"]:
        hint = "RAW is the folder RawData of RawData.zip"
        raise FileNotFoundError(f"{raw}: no Training/img/img0001.nii.gz and so on; {hint}")
    labels = [name.replace("imagesTr/img", "labelsTr/label") for name in files["imagesTr"]]
    if odd := sorted(set(labels) ^ set(files["labelsTr"])):
        number = odd[0][-11:-7]
        hint = "image or label is missing; unpack the download again"
        raise FileNotFoundError(f"{raw}/Training: case {number} is not whole, {hint}")
    return dict(zip(files["imagesTr"], labels, strict=True)), files["imagesTs"]


def swin_unetr_cases(pairs, where):
    """{image: split} of Swin UNETR's 30 volumes. ValueError if it is not these that are there."""
    dealt = {f"imagesTr/img{k:04}.nii.gz": s for s in SWIN_UNETR for k in SWIN_UNETR[s]}
    if odd := sorted(dealt.keys() ^ pairs):
        said = f"{odd[0].split('/')[1]} is " + ("missing" if odd[0] in dealt else "none of these")
        hint = "unpack RawData.zip again, or choose --split case"
        raise ValueError(f"{where}/Training: Swin UNETR has 30 volumes, {said}; {hint}")
    return dealt


def btcv(args):
    """Lays out BTCV's abdominal CT, 13 organs, as the Decathlon does, with a split.

    RAW is the folder RawData. --split swin-unetr: 24 volumes to train (0001-0010, 0021-0034) and 6
    to validate (0035-0040), as for the released Swin UNETR. The Dice that its authors give is of
    these six, which chose the epoch as well: there is no test split, compare with --test OUT:val.
    --split case deals the volumes at random, 70 % train, 15 % val, 15 % test. The images of
    Testing/ have no labels. Files get a second name (a hard link), or a copy where there is none.
    With --labels universal_labels.json the names are the Universal Model's.
    """
    atomic_files.refuse_existing(args.out)
    about = relabelled(BTCV_ABOUT, args.labels)
    pairs, bare = find_btcv(args.raw)
    if args.split == "case":
        dealt, title = deal_cases(pairs, args.seed, args.raw), [f"BTCV by case, seed {args.seed}"]
    else:
        dealt, title = swin_unetr_cases(pairs, args.raw), ["BTCV, split of Swin UNETR"]
        title += ["its authors' Dice is of val, which chose the epoch as well: no test split"]
    splits, origin = split_cases(pairs, dealt, bare)

    def put(part, *names):
        for name in filter(None, names):
            folder, file = origin[name].split("/")
            link(args.raw / BTCV_FOLDERS[folder] / file, part / name)

    return write_data_set(args.out, about, splits, put, [*title, LINKED])


def options(command):
    """Describe `prepare.py btcv`."""
    add = command(btcv, "lay out BTCV's abdominal CT with a split")
    add("raw", type=Path, metavar="RAW", help="folder RawData, with Training/ and Testing/ in it")
    add("--out", type=Path, default="data/btcv", help="folder to make (%(default)s)")
    add("--split", choices=("swin-unetr", "case"), default="swin-unetr", help="(%(default)s)")
    add("--seed", type=SEED, default=0, metavar="N", help="of --split case (%(default)s)")
    help = "of classes, say universal_labels.json"
    add("--labels", type=Path, metavar="FILE", help=help)
