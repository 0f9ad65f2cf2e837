"""Class maps: how a folder is recognised, how masks are read, what is refused, folds."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import data
from imaging import layouts
from prediction.inputs import list_cases

CLASSES = {"0": "background", "1": "large bowel", "2": "small bowel", "3": "stomach"}
RNG = np.random.default_rng(0)


def pair(folder, stem, mask, images="images", masks="masks", mode=None):
    """A noise image and a mask of one stem."""
    for name in (images, masks):
        (folder / name).mkdir(parents=True, exist_ok=True)
    noise = RNG.integers(0, 255, (*mask.shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / images / f"{stem}.png")
    picture = Image.fromarray(mask.astype(np.uint8))
    if mode == "P":
        picture = Image.fromarray(mask.astype(np.uint8), mode="P")
        picture.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    picture.save(folder / masks / f"{stem}.png")


def square(value, rest=0, size=(20, 30)):
    mask = np.full(size, rest)
    mask[5:10, 5:15] = value
    return mask


def class_maps(root, classes=CLASSES, splits=("train", "val", "test"), values=(1, 2, 3), **how):
    for split in splits:
        for k in range(4):
            pair(root / split, f"case{k}_{split}", square(values[k % len(values)]), **how)
    if classes:
        (root / "classes.json").write_text(json.dumps(classes))
    return root


def opened(root, split, tmp_path, **how):
    return data.open_dataset(layouts.read_entries(root, split, **how), tmp_path / "cache")


@pytest.mark.parametrize("mode", [None, "P"])
@pytest.mark.parametrize("names", [("images", "masks"), ("imagesgreyscale", "masks14")])
def test_split_folders_hold_class_numbers(tmp_path, mode, names):
    how = dict(zip(("images", "masks"), names, strict=True))
    root = class_maps(tmp_path / "set", splits=("train", "valid"), mode=mode, **how)
    assert set(layouts.find_splits(root)) == {"train", "val"}
    dataset = opened(root, "val", tmp_path)
    assert dataset.classes == ("background", "large bowel", "small bowel", "stomach")
    for i, expected in enumerate((1, 2, 3, 1)):
        sample = dataset.sample(i, "")
        assert (sample["mask"].numpy() == square(expected)).all() and sample["prompt"] == ""
        assert sample["name"] == f"case{i}_valid"


def test_255_does_not_count_and_is_kept(tmp_path):
    root = class_maps(tmp_path / "set", splits=("train",))
    pair(root / "train", "odd", square(3, rest=255))
    dataset = opened(root, "train", tmp_path)
    (odd,) = [i for i, entry in enumerate(dataset.entries) if entry.name == "odd"]
    assert set(np.unique(dataset.pixels(odd)[1])) == {3, 255}


def test_ct_gi_is_recognised(real_data, tmp_path):
    dataset = opened(real_data / "ct_gi", "train", tmp_path)
    assert len(dataset) == 72 and dataset.classes[1:] == ("large bowel", "small bowel", "stomach")
    stored = np.asarray(Image.open(dataset.entries[5].mask))
    assert (dataset.pixels(5)[1] == stored).all() and stored.max() in (1, 2, 3)


def test_a_folder_without_splits_is_divided_once_and_for_all(tmp_path):
    root = tmp_path / "flat"
    for case in range(20):
        for day in range(2):
            pair(root, f"case{case}_day{day}", square(255))
    names = {s: layouts.read_entries(root, s, r"case\d+") for s in ("train", "val", "test")}
    assert {s: len(e) for s, e in names.items()} == {"train": 32, "val": 4, "test": 4}
    groups = [{entry.group for entry in entries} for entries in names.values()]
    assert not (groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2])
    assert set.union(*groups) == {f"case{k}" for k in range(20)}
    with pytest.raises(ValueError, match=r"--group-regex case\(: missing \)"):
        layouts.read_entries(root, "test", "case(")
    again = layouts.read_entries(root, "test", r"case\d+")
    assert again == names["test"] and again[0].classes == ("target",)
    args = SimpleNamespace(
        inputs=[str(root)], prompt=None, split="test", roots={}, prompts_csv=None
    )
    run = {
        "options": {"data": ["elsewhere/flat"], "group_regex": r"case\d+"}
    }  # is divided as it was
    assert [name for name, _, _ in list_cases(args, run, False)] == [e.name for e in again]


ONE = {"0": "background", "1": "polyp"}


@pytest.mark.parametrize(
    "classes, masks, expected",
    [
        (None, [square(255)], [square(1)]),  # binary
        (None, [square(1)], [square(1)]),
        (ONE, [square(255)], [square(1)]),  # 255 is no class number where no 1 is
        (ONE, [square(1)], [square(1)]),
        (ONE, [square(1, rest=255)], [square(1, rest=255)]),  # here it does not count
        (ONE, [square(250, rest=3)], [square(1)]),  # as JPEG leaves it
    ],
)
def test_one_class(classes, masks, expected, tmp_path):
    root = tmp_path / "set"
    for k, mask in enumerate(masks):
        pair(root / "train", f"a{k}", mask)
    if classes:
        (root / "classes.json").write_text(json.dumps(classes))
    dataset = opened(root, "train", tmp_path)
    assert dataset.classes == (("polyp",) if classes else ("target",))
    for i, mask in enumerate(expected):
        assert (dataset.pixels(i)[1] == mask).all()


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda r: pair(r / "train", "b", square(7)), "b.png: holds class number 7"),
        (lambda r: (r / "classes.json").write_text('{"0": "a", "2": "b"}'), "without a gap"),
        (lambda r: (r / "classes.json").write_text("[1, 2"), "classes.json: is not"),
        (lambda r: (r / "classes.json").write_text('{"0": "a", "1": "b", "2": "b"}'), "names once"),
        (lambda r: (r / "classes.json").unlink(), "class numbers need a classes.json"),
        (
            lambda r: (r / "train/masks/case0_train.png").unlink(),
            "case0_train.png: no image or mask",
        ),
        (
            lambda r: (r / "train/images/case0_train.png").unlink(),
            "case0_train.png: no image or mask",
        ),
        (lambda r: pair_jpeg(r / "train"), "a second file of this name"),
        (lambda r: blank(r / "train"), "masks are empty"),
        (lambda r: (r / "train/masks/case0_train.png").write_bytes(b"x"), "not readable"),
    ],
)
def test_what_cannot_be_is_one_line(spoil, said, tmp_path):
    root = class_maps(tmp_path / "set", splits=("train",))
    spoil(root)
    with pytest.raises(ValueError, match=said) as error:
        opened(root, "train", tmp_path)
    assert "\n" not in str(error.value)


def pair_jpeg(folder):
    Image.new("RGB", (30, 20)).save(folder / "images" / "case0_train.jpg")


def blank(folder):
    for path in (folder / "masks").iterdir():
        Image.new("L", (30, 20)).save(path)


def test_a_missing_split_is_told(tmp_path):
    root = class_maps(tmp_path / "set", splits=("train",))
    with pytest.raises(FileNotFoundError, match="no split test, only train"):
        layouts.read_entries(root, "test")


def test_files_of_the_system_are_not_images(tmp_path):
    root = class_maps(tmp_path / "set", splits=("train",))
    (root / "train/images/._case0_train.png").write_bytes(b"macOS")
    (root / "train/images/Thumbs.db").write_bytes(b"Windows")
    assert len(opened(root, "train", tmp_path)) == 4


def test_data_sets_of_other_classes_are_not_pooled(tmp_path):
    one = class_maps(tmp_path / "one", splits=("train",))
    other = class_maps(tmp_path / "two", {**CLASSES, "3": "liver"}, splits=("train",))
    entries = layouts.read_entries(one, "train") + layouts.read_entries(other, "train")
    with pytest.raises(ValueError, match="other classes than"):
        data.open_dataset(entries, tmp_path / "cache")


def test_folds_are_by_patient_and_cover_all(tmp_path):
    root = tmp_path / "set"
    for case in range(7):
        for day in range(2):
            split = "train" if case < 5 else "val"
            pair(root / split, f"case{case}_day{day}", square(255))
    seen = []
    for k in range(3):
        train, val = layouts.train_and_val([root], 0, r"case\d+", f"{k}/3")
        assert not {e.group for e in train} & {e.group for e in val}
        assert len(train) + len(val) == 14
        seen += [e.name for e in val]
    assert sorted(seen) == sorted(f"case{c}_day{d}" for c in range(7) for d in range(2))
    for wrong in ("3/3", "1", "0/1", "x/y"):
        with pytest.raises(ValueError, match="--fold"):
            layouts.train_and_val([root], 0, None, wrong)
    with pytest.raises(ValueError, match="too few for 8"):
        layouts.train_and_val([root], 0, r"case\d+", "0/8")


def test_nnunet_s_folds_are_honoured(tmp_path):
    root = class_maps(tmp_path / "set", splits=("train",))
    names = [f"case{k}_train" for k in range(4)]
    folds = [{"train": names[:3], "val": names[3:]}, {"train": names[1:], "val": names[:1]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    train, val = layouts.train_and_val([root], 0, None, "1/2")
    assert [e.name for e in val] == names[:1] and {e.name for e in train} == set(names[1:])
    with pytest.raises(ValueError, match="has 2 folds"):
        layouts.train_and_val([root], 0, None, "1/5")
    (root / "splits_final.json").write_text(json.dumps([{"train": ["gone"], "val": names}] * 2))
    with pytest.raises(ValueError, match="names gone"):
        layouts.train_and_val([root], 0, None, "0/2")
    for text in ("[", "[]", '{"train": []}', '[{"val": []}, {"val": []}]'):
        (root / "splits_final.json").write_text(text)
        with pytest.raises(ValueError, match="splits_final.json: (expected|is not valid JSON)"):
            layouts.train_and_val([root], 0, None, "0/2")


def test_too_few_images_to_divide_are_told(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    with pytest.raises(ValueError, match="0 images or patients, too few for 10"):
        layouts.read_entries(tmp_path / "set", "train")


# --- names and prompts ----------------------------------------------------------------------------


def listed(root, *items):
    """A data set with anns/train.json."""
    (root / "anns").mkdir(parents=True)
    (root / "anns/train.json").write_text(json.dumps([{"prompts": {}} | item for item in items]))
    return root


@pytest.mark.parametrize("key", ["img_name", "mask_name"])
@pytest.mark.parametrize(
    "name, said",
    [
        ("/data/a.png", "is an absolute path"),
        ("C:\\data\\a.png", "is an absolute path"),
        ("C:/data/a.png", "is an absolute path"),
        ("c:a.png", "is an absolute path"),
        ("\\\\server\\share\\a.png", "is an absolute path"),
        ("\\a.png", "is an absolute path"),
        ("../a.png", "leaves its folder"),
        ("g/../../a.png", "leaves its folder"),
        ("./g/h/../../../a.png", "leaves its folder"),
        ("..\\a.png", "leaves its folder"),
        ("g\\..\\..\\a.png", "leaves its folder"),
        ("..", "leaves its folder"),
    ],
)
def test_names_stay_below_their_folder(tmp_path, key, name, said):
    good = {"img_name": "a.png", "mask_name": "a.png"}
    root = listed(tmp_path / "set", good, good | {"mask_name": "b.png", key: name})
    with pytest.raises(ValueError) as error:
        layouts.read_entries(root, "train")
    path = root / "anns/train.json"
    message = str(error.value)
    assert message.startswith(f"{path}, entry 1: {key} {name!r} {said}") and "\n" not in message


@pytest.mark.parametrize("name", ["a.png", "./g/a.png", "g/../a.png", "..a.png", "a..png", "g/..a"])
def test_other_names_are_taken(tmp_path, name):
    root = listed(tmp_path / "set", {"img_name": name, "mask_name": name})
    (entry,) = layouts.read_entries(root, "train")
    assert entry.image == root.resolve() / "images" / name


def test_a_name_that_is_a_list_is_one_line(tmp_path):
    root = listed(tmp_path / "set", {"img_name": "a.png", "mask_name": ["a.png", "b.png"]})
    with pytest.raises(ValueError, match="entry 0.*mask_name lists 2 files, but an entry has one"):
        layouts.read_entries(root, "train")


def test_links_on_the_disk_are_followed(tmp_path):
    """images/ and a folder in masks/ may lie on another disk."""
    pair(tmp_path / "disk", "a", square(255))
    root = listed(tmp_path / "set", {"img_name": "a.png", "mask_name": "old/a.png"})
    (root / "images").symlink_to(tmp_path / "disk/images")
    (root / "masks").mkdir()
    (root / "masks/old").symlink_to(tmp_path / "disk/masks")
    dataset = opened(root, "train", tmp_path)
    assert (dataset.pixels(0)[1] == square(1)).all()


def test_a_split_is_a_name_too(tmp_path):
    root = listed(tmp_path / "set", {"img_name": "a.png", "mask_name": "a.png"})
    (root / "other.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match="splits here: train"):
        layouts.read_entries(root, "../other")


def test_paths_within_the_images_folder(tmp_path):
    for name in ("images/g/a.png", "test/images/a.png", "val/imagesgreyscale/a.png"):
        expected = name.split("/", 1 if name.startswith("images") else 2)[-1]
        assert layouts.name_in_images(tmp_path / name, tmp_path) == expected
    assert layouts.name_in_images(tmp_path / "a/images/b.png", tmp_path / "a/images") == "b.png"


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("p6", "p6"),
        ("P6", "p6"),
        (" P6 ", "p6"),
        ("p6, p1", "p6,p1"),
        ("P6,P3", "p6,p3"),
        ("P10 ,p1,", "p10,p1"),
        ("Random", "random"),
        ("m_original", "m_original"),
        ("M_Original, P6,m_missing_location", "m_original,p6,m_missing_location"),
        # texts
        ("", ""),
        ("P6 polyp", "P6 polyp"),
        ("one pink polyp, left", "one pink polyp, left"),
        ("Polyp", "Polyp"),
        ("random noise", "random noise"),
        ("m_original polyp", "m_original polyp"),
        ("M_1 tumour", "M_1 tumour"),
        ("m_", "m_"),
        ("m_2", "m_2"),
    ],
)
def test_prompt_types_are_read_in_any_case(typed, expected):
    assert layouts.prompt_option(typed) == expected


MISWRITTEN = ["p6 p1", "P6;P1", "p 6", "p6,random", "p1 p2,p3", "p6/p3"]
MISWRITTEN += ["m_original p6", "random,m_original", "m_original/m_contradictory"]


@pytest.mark.parametrize("typed", MISWRITTEN)
def test_what_only_looks_like_prompt_types_is_refused(typed):
    with pytest.raises(ValueError, match="write prompt types like p6 or p6,p1"):
        layouts.prompt_option(typed)


def test_random_draws_numbered_types_alone(tmp_path):
    prompts = {"p0": "", "p1": "polyp", "m_original": "one polyp", "p6": ["a", "b"]}
    root = listed(tmp_path, {"img_name": "a.png", "mask_name": "a.png", "prompts": prompts})
    (entry,) = layouts.read_entries(root, "train")
    assert entry.types("random") == ["p1", "p6"]
    assert entry.texts("random") == ["polyp", "a", "b"]
    assert entry.text("m_original,p6") == "one polyp"
    with pytest.raises(ValueError, match="no prompt of type m_other, only p0, p1, m_original, p6"):
        entry.text("m_other")


# --- other splits to train on ---------------------------------------------------------------------


def with_parts(root, **names):
    """A data set whose splits have images of these names."""
    (root / "anns").mkdir(parents=True)
    for split, images in names.items():
        entries = [{"img_name": f"{n}.png", "mask_name": f"{n}.png", "prompts": {}} for n in images]
        (root / "anns" / f"{split}.json").write_text(json.dumps(entries))
    return root


@pytest.mark.parametrize(
    "splits, chosen, expected",
    [
        ({"train": "abcd", "val": "ef", "train_10": "a", "val_10": "f"}, ":train_10", ("a", "f")),
        ({"train": "abcd", "val": "ef", "train_10": "ab"}, ":train_10", ("ab", "ef")),
        ({"train": "abcd", "val": "ef", "train_10": "ab"}, ":train", ("abcd", "ef")),
        ({"train": "abcd", "val": "ef", "val_10": "f"}, "", ("abcd", "ef")),
    ],
)
def test_a_part_of_train_has_its_own_validation(tmp_path, capsys, splits, chosen, expected):
    root = with_parts(tmp_path / "set", **splits)
    train, val = layouts.train_and_val([f"{root}{chosen}"], 0)
    assert ("".join(e.name for e in train), "".join(e.name for e in val)) == expected
    printed = capsys.readouterr().out
    if chosen == ":train_10":
        val_split = "val_10" if "val_10" in splits else "val"
        assert printed == f"{root}: training on the split train_10, validating on {val_split}\n"
    else:
        assert printed == ""


def test_only_splits_for_training_are_trained_on(tmp_path):
    root = with_parts(tmp_path / "set", train="ab", val="c", test="d", testA="d", train_10="")
    for split in ("test", "testA", "val", "trainer"):
        with pytest.raises(ValueError, match="splits to train on are called train or train_NAME"):
            layouts.train_and_val([f"{root}:{split}"], 0)
    with pytest.raises(FileNotFoundError, match="train_20.json: no such annotation file"):
        layouts.train_and_val([f"{root}:train_20"], 0)
    with pytest.raises(ValueError, match="its split train_10 is empty"):
        layouts.train_and_val([f"{root}:train_10"], 0)


def test_roles_of_splits():
    train = ["train", "train_10"]
    val = ["val", "val_10", "valid"]
    test = ["test", "testA", "test_train", "trainer", "other_blob"]
    for role, splits in {"train": train, "val": val, "test": test}.items():
        assert {layouts.split_role(split) for split in splits} == {role}
