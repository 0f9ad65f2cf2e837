"""Folders of volumes -> entries: the layouts of the Decathlon, nnU-Net and BTCV.

The contents of the volumes are not read here.
"""

import json
import unicodedata

import numpy as np
import pytest

import swin_unetr3d
from imaging import layouts


def make(root, files, settings=None):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    if settings is not None:
        (root / "dataset.json").write_text(json.dumps(settings))
    return root


def pair(name):
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


ORGANS = {"0": "background", "1": "liver", "2": "spleen"}


def decathlon(root, labels=ORGANS):
    files = [f"{kind}/{x}.nii.gz" for kind in ("imagesTr", "labelsTr") for x in "abc"]
    test = ["./imagesTs/d.nii.gz", pair("c")]
    settings = {"modality": {"0": "CT"}, "labels": labels, "training": [pair("a"), pair("b")]}
    return make(root, files, settings | {"test": test})


def test_a_decathlon_task(tmp_path):
    root = decathlon(tmp_path)
    assert list(layouts.find_splits(root)) == ["train", "test"]
    a, b = layouts.read_entries(root, "train")
    assert (a.name, b.name) == ("a", "b")
    assert a.image == root / "imagesTr/a.nii.gz" and a.mask == root / "labelsTr/a.nii.gz"
    assert a.classes == ("background", "liver", "spleen") and a.labels == (0, 1, 2)
    assert a.regions is None and a.modality == "CT" and a.more_channels == ()
    (c,) = layouts.read_entries(root, "test")  # d has no label
    assert c.name == "c"


@pytest.mark.parametrize(
    "labels",
    [ORGANS, {name: int(k) for k, name in ORGANS.items()}, {n: k for k, n in ORGANS.items()}],
    ids=["Decathlon", "nnU-Net", "nnU-Net as text"],
)
def test_labels_are_read_in_either_direction(tmp_path, labels):
    (a, _) = layouts.read_entries(decathlon(tmp_path, labels), "train")
    assert a.classes == ("background", "liver", "spleen") and a.labels == (0, 1, 2)


def test_numbers_may_have_gaps_and_any_order(tmp_path):
    labels = {"4": "enhancing", "0": "background", "2": "edema"}
    (a, _) = layouts.read_entries(decathlon(tmp_path, labels), "train")
    assert a.classes == ("background", "edema", "enhancing") and a.labels == (0, 2, 4)


def test_one_class_has_no_background(tmp_path):
    (a, _) = layouts.read_entries(decathlon(tmp_path, {"0": "background", "1": "tumour"}), "train")
    assert a.classes == ("tumour",) and a.labels == (0, 1)


def test_regions_overlap(tmp_path):
    """BraTS 2021 has the numbers 0, 1, 2 and 4."""
    labels = {"background": 0, "TC": [1, 4], "WT": [1, 2, 4], "ET": [4]}
    (a, _) = layouts.read_entries(decathlon(tmp_path, labels), "train")
    assert a.classes == ("background", "TC", "WT", "ET") and a.labels == (0, 1, 2, 4)
    numbers = [[a.labels[k] for k in region] for region in a.regions]
    assert numbers == [[1, 4], [1, 2, 4], [4]]


@pytest.mark.parametrize(
    "labels",
    [
        {"background": [0, 3], "spleen": 2, "liver": 1},
        {"background": [3, 0], "spleen": [2], "liver": [1]},
        {"spleen": 2, "background": [0, 3], "liver": [1]},
    ],
)
def test_a_background_of_several_numbers_makes_no_regions(tmp_path, labels):
    (a, _) = layouts.read_entries(decathlon(tmp_path, labels), "train")
    assert a.classes == ("background", "liver", "spleen") and a.labels == (0, 1, 2)
    assert a.regions is None and a.background_numbers == (3,)


def test_regions_and_a_background_of_several_numbers(tmp_path):
    labels = {"background": [0, 3], "TC": [1, 4], "WT": [1, 2, 4]}
    (a, _) = layouts.read_entries(decathlon(tmp_path, labels), "train")
    assert a.classes == ("background", "TC", "WT") and a.labels == (0, 1, 2, 4)
    assert a.regions == ((1, 3), (1, 2, 3)) and a.background_numbers == (3,)


def test_a_list_of_one_number_is_that_number(tmp_path):
    (a, _) = layouts.read_entries(decathlon(tmp_path, {"background": [0], "x": [2]}), "train")
    assert (a.classes, a.labels, a.regions, a.background_numbers) == (("x",), (0, 2), None, ())
    (a, _) = layouts.read_entries(decathlon(tmp_path, {"background": 0, "x": [2, 2]}), "train")
    assert a.regions is None and a.labels == (0, 2)


def test_regions_of_single_numbers_are_asked_for(tmp_path):
    root = decathlon(tmp_path, {"background": [0, 3], "spleen": 2, "liver": 1})
    settings = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(settings | {"overlapping": True}))
    (a, _) = layouts.read_entries(root, "train")
    assert a.classes == ("background", "spleen", "liver") and a.regions == ((2,), (1,))


def test_a_run_with_regions_from_such_a_background_can_be_tested(tmp_path):
    """Its model has regions, in the order in which dataset.json gave them then."""
    labels = {"background": [0, 3], "spleen": 2, "liver": 1}
    (a, _) = layouts.read_entries(decathlon(tmp_path, labels), "train")
    names = ["background", "spleen", "liver"]
    old = layouts.as_overlapping(a, names)
    assert (
        old.classes == tuple(names)
        and old.regions == ((2,), (1,))
        and old.background_numbers == (3,)
    )
    assert layouts.as_overlapping(a, ["background", "kidney"]) == a
    (plain, _) = layouts.read_entries(decathlon(tmp_path), "train")  # classes that never overlapped
    assert layouts.as_overlapping(plain, ["background", "liver", "spleen"]) == plain


def test_nnunet_lists_no_files(tmp_path):
    files = ["imagesTr/p1_0000.nii.gz", "imagesTr/p1_0001.nii.gz", "labelsTr/p1.nii.gz"]
    files += ["imagesTr/p10_0000.nii.gz", "imagesTr/p10_0001.nii.gz", "labelsTr/p10.nii.gz"]
    files += ["imagesTs/p2_0000.nii.gz", "imagesTs/p2_0001.nii.gz", "labelsTs/p2.nii.gz"]
    files += ["labelsTr/._p1.nii.gz", "labelsTr/notes.txt"]
    labels = {"background": 0, "liver": 1, "spleen": 2}
    channels = {"channel_names": {"0": "T1", "1": "T2"}}
    root = make(tmp_path, files, channels | {"labels": labels, "file_ending": ".nii.gz"})
    assert list(layouts.find_splits(root)) == ["train", "test"]
    p1, p10 = layouts.read_entries(root, "train")
    assert p1.image == root / "imagesTr/p1_0000.nii.gz"
    assert p1.more_channels == (root / "imagesTr/p1_0001.nii.gz",) and p1.modality == "T1, T2"
    assert p10.more_channels == (root / "imagesTr/p10_0001.nii.gz",)
    assert [entry.name for entry in layouts.read_entries(root, "test")] == ["p2"]


@pytest.mark.parametrize(
    ("names", "cases"),
    [
        (["a_0000", "a_0001", "a_0002"], {"a": 3}),
        (["a_0001", "a_0000"], {"a": 2}),
        (["m_2018", "m_2019", "m_2020"], {"m_2018": 1, "m_2019": 1, "m_2020": 1}),
        (["a_0001", "a_0002"], {"a_0001": 1, "a_0002": 1}),
        (["a_0000", "a_0002"], {"a_0000": 1, "a_0002": 1}),
        (["m_2018_0000", "m_2018_0001", "m_2019_0000"], {"m_2018": 2, "m_2019": 1}),
        (["a_0000", "b_0001", "c"], {"a": 1, "b_0001": 1, "c": 1}),
        (["a_000", "a_00001"], {"a_000": 1, "a_00001": 1}),
    ],
)
def test_channels_go_from_0000_on_without_a_gap(tmp_path, names, cases):
    files = [tmp_path / f"{name}.nii.gz" for name in names]
    found = layouts.channels_of(files)
    assert {case: len(some) for case, some in found.items()} == cases
    assert all(some == sorted(some) for some in found.values())
    assert sorted(sum(found.values(), [])) == sorted(files)


@pytest.mark.parametrize(
    "names",
    [
        ["x/a_0000.nii.gz", "y/a_0000.nii.gz"],
        ["a_0000.nii.gz", "a_0000.nii"],
        ["a_0000.nii.gz", "a_0001.nii.gz", "a.nii.gz"],
    ],
)
def test_two_volumes_of_one_name_are_not_joined(tmp_path, names):
    with pytest.raises(ValueError, match="a second volume named a"):
        layouts.channels_of([tmp_path / name for name in names])


def test_years_are_no_channels_in_a_data_set(tmp_path):
    files = [f"{kind}/m_201{k}.nii.gz" for kind in ("imagesTr", "labelsTr") for k in (8, 9)]
    root = make(tmp_path, files, {"labels": ORGANS})
    entries = layouts.read_entries(root, "train")
    assert [(entry.name, entry.more_channels) for entry in entries] == [
        ("m_2018", ()),
        ("m_2019", ()),
    ]


def test_validation_of_the_list_and_folds_of_nnunet(tmp_path):
    root = decathlon(tmp_path)
    settings = json.loads((root / "dataset.json").read_text())
    (root / "dataset.json").write_text(json.dumps(settings | {"validation": [pair("c")]}))
    assert list(layouts.find_splits(root)) == ["train", "val", "test"]
    train, val = layouts.train_and_val([root], 0)
    assert [e.name for e in train] == ["a", "b"] and [e.name for e in val] == ["c"]
    folds = [{"train": ["a"], "val": ["b", "c"]}, {"train": ["b", "c"], "val": ["a"]}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    train, val = layouts.train_and_val([root], 0, fold_of="0/2")
    assert [e.name for e in train] == ["a"] and [e.name for e in val] == ["b", "c"]


def test_names_that_repeat_get_their_folders(tmp_path):
    cases = [{"image": f"./{x}/image.nii.gz", "label": f"./{x}/label.nii.gz"} for x in "ab"]
    files = [name for case in cases for name in case.values()]
    root = make(tmp_path, files, {"labels": ORGANS, "training": cases})
    assert [entry.name for entry in layouts.read_entries(root, "train")] == ["a/label", "b/label"]
    # A list of these files in another folder, which links to them, as a study writes it.
    listed = [{key: f"source/{name}" for key, name in case.items()} for case in cases]
    other = make(tmp_path / "other", ["x"], {"labels": ORGANS, "training": listed})
    (other / "source").symlink_to(root)
    entries = layouts.read_entries(other, "train")
    assert [entry.name for entry in entries] == ["source/a/label", "source/b/label"]
    assert all(entry.image.is_file() and entry.mask.is_file() for entry in entries)


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize(
    "name, said",
    [
        ("/scans/a.nii.gz", "is an absolute path"),
        ("C:\\scans\\a.nii.gz", "is an absolute path"),
        ("../a.nii.gz", "leaves its folder"),
        ("imagesTr/../../a.nii.gz", "leaves its folder"),
        ("imagesTr\\..\\..\\a.nii.gz", "leaves its folder"),
    ],
)
def test_names_stay_below_their_folder(tmp_path, key, name, said):
    cases = [pair("a"), pair("b") | {key: name}]
    root = make(tmp_path, [], {"labels": ORGANS, "training": [pair("c")], "validation": cases})
    with pytest.raises(ValueError) as error:
        layouts.read_entries(root, "train")
    message = str(error.value)
    assert str(root / "dataset.json") in message and "validation entry 1" in message
    assert f"{key} {name!r} {said}" in message and "\n" not in message


def test_a_dataset_json_beside_images_is_passed_over(tmp_path):
    make(tmp_path, ["images/a.png", "masks/a.png"], {"anything": 1})
    assert list(layouts.find_splits(tmp_path)) == ["train", "val", "test"]


def test_the_organs_of_btcv_are_those_of_its_weights():
    """Written down twice, as a model file works alone."""
    assert swin_unetr3d.BTCV["classes"] == layouts.BTCV_CLASSES


def test_btcv_as_it_is_handed_out(tmp_path):
    files = [f"img/img000{k}.nii.gz" for k in range(4)] + [
        f"label/label000{k}.nii.gz" for k in range(4)
    ]
    root = make(tmp_path, files)
    entries = layouts.read_entries(root, "train")
    assert [(e.image.name, e.mask.name) for e in entries[:1]] == [
        ("img0000.nii.gz", "label0000.nii.gz")
    ]
    assert entries[0].classes[6] == "liver" and entries[0].labels == tuple(range(14))
    (root / "label/label0002.nii.gz").unlink()
    with pytest.raises(ValueError, match="img0002.nii.gz: no image or label map of the same"):
        layouts.read_entries(root, "train")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"training": []}, "has no 'labels'"),
        ({"labels": {"liver": 1}}, "need one background"),
        ({"labels": {"background": 0, "liver": "one"}}, 'label liver is "one"; it must be a whole'),
        ({"labels": {"background": 0, "liver": 1.5}}, "label liver is 1.5; it must be a whole"),
        ({"labels": {"background": 0, "liver": True}}, "label liver is true; it must be a whole"),
        ({"labels": {"background": 0, "liver": -1}}, "label liver is -1; numbers go from 0 to"),
        ({"labels": {"background": 0, "liver": 70000}}, "label liver is 70000; numbers go from 0"),
        ({"labels": {"background": 0, "liver": "1.5"}}, 'label liver is "1.5"; it must be a whole'),
        ({"labels": {"background": 0, "liver": [1, 2.5]}}, "label liver is 2.5; it must be"),
        ({"labels": {"background": False, "liver": 1}}, "label background is false; it must"),
        ({"labels": {"background": 0, "liver": None}}, "label liver is null; it must be"),
        ({"labels": {"background": 0, "liver": 1, "ignore": 2}}, "ignore"),
        ({"labels": {"background": 0, "liver": 1, "tumour": 1}}, "one name, or one number"),
        ({"labels": {"0": "background", "1": "liver", "2": "liver"}}, "one name, or one number"),
        ({"labels": {"background": 0, "liver": 1, "tumour": [1]}}, "two labels have one number"),
        ({"labels": {"background": 0, "liver": []}}, "a label lists no number"),
        ({"labels": ORGANS, "overlapping": "yes"}, "overlapping must be true or false"),
        ({"labels": ["background"]}, "not a data set of volumes"),
        ({"labels": ORGANS, "training": [{"label": "x.nii.gz"}]}, "has no 'image'"),
    ],
)
def test_a_wrong_dataset_json_is_refused_by_name(tmp_path, settings, message):
    root = make(tmp_path, [], settings)
    with pytest.raises(ValueError, match=message) as error:
        layouts.read_entries(root, "train")
    assert str(root / "dataset.json") in str(error.value) and "\n" not in str(error.value)


def test_json_that_is_none_is_refused(tmp_path):
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="dataset.json"):
        layouts.find_splits(tmp_path)


def test_a_single_case_cannot_be_trained_and_validated_on(tmp_path):
    root = make(tmp_path, ["imagesTr/a.nii.gz", "labelsTr/a.nii.gz"], {"labels": ORGANS})
    with pytest.raises(ValueError, match="--overfit 1"):
        layouts.train_and_val([root], 0)


# --- dataset.json as people and programs write it -------------------------------------------------


def write_json(root, content, encoding="utf-8"):
    (root / "dataset.json").write_bytes(json.dumps(content).encode(encoding))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_dataset_json_of_another_encoding(tmp_path, encoding):
    root = decathlon(tmp_path)
    write_json(root, json.loads((root / "dataset.json").read_text()), encoding)
    assert [e.name for e in layouts.read_entries(root, "train")] == ["a", "b"]
    folds = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]
    (root / "splits_final.json").write_bytes(json.dumps(folds).encode(encoding))
    train, val = layouts.train_and_val([root], 0, fold_of="1/2")
    assert [e.name for e in train] == ["b"] and [e.name for e in val] == ["a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"labels": {}, "labels": {}}', "the key 'labels' is repeated"),
        ('{"labels": {"0": "background", "1": "\\ud800"}}', "half a character"),
        ("[]", "not a data set of volumes .it is not an object"),
        ('{"labels": {"background": 0, "liver": Infinity}}', "label liver is Infinity; it must be"),
        ('{"labels": {"background": 0, "liver": NaN}}', "label liver is NaN; it must be a whole"),
        ('{"labels": {"background": 0, "liver": 1e400}}', "label liver is Infinity; it must be"),
        ('{"labels": {"background": 0, "liver": 1' + "0" * 99 + "}}", "liver is 10{39}…; numbers"),
        ('{"labels": {"background": 0}}', "name no class besides the background"),
        ('{"labels": {"0": "background", "1": "a\\nb"}}', "the label 'a.nb' is not a name"),
    ],
)
def test_texts_that_are_no_dataset_json(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        layouts.find_splits(tmp_path)
    text = str(error.value)
    assert str(tmp_path / "dataset.json") in text and "\n" not in text and len(text) < 300


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"training": {"a": 1}}, "training must be a list"),
        ({"test": "imagesTs"}, "test must be a list"),
        ({"training": [pair("a"), 5]}, "training entry 1: is neither"),
        ({"validation": [None]}, "validation entry 0: is neither"),
        ({"validation": [pair("a") | {"label": 5}]}, "validation entry 0: label 5 is not a string"),
        ({"validation": [pair("a") | {"label": []}]}, "entry 0: label lists 0 files"),
        ({"training": [pair("a") | {"image": ["x", "y"]}]}, "entry 0: image lists 2 .* 4-D file"),
        ({"training": [pair("a") | {"image": "a\nb"}]}, "training entry 0: image 'a.nb' is no"),
    ],
)
def test_wrong_types_in_the_lists_are_named(tmp_path, lists, message):
    root = make(tmp_path, [], {"labels": ORGANS, "training": [pair("c")]} | lists)
    with pytest.raises(ValueError, match=message) as error:
        layouts.read_entries(root, "train")
    assert str(root / "dataset.json") in str(error.value) and "\n" not in str(error.value)


def test_cases_without_labels_may_be_objects_or_names_or_none(tmp_path):
    root = decathlon(tmp_path)
    settings = json.loads((root / "dataset.json").read_text())
    bare = [{"image": "./imagesTs/d.nii.gz"}, {"image": "x.nii.gz", "label": None}, "y.nii.gz"]
    for test in bare, None:
        write_json(root, settings | {"test": test, "numTest": 7})
        assert list(layouts.find_splits(root)) == ["train"]


def test_endings_in_capitals(tmp_path):
    files = ["imagesTr/A.NII.GZ", "labelsTr/A.NII.GZ", "imagesTr/b_0000.Nii", "labelsTr/b.nii.gz"]
    root = make(tmp_path, files, {"labels": ORGANS})
    entries = layouts.read_entries(root, "train")
    assert [(e.name, e.image.name) for e in entries] == [("A", "A.NII.GZ"), ("b", "b_0000.Nii")]


def test_label_maps_of_another_format_are_said(tmp_path):
    root = make(tmp_path, ["imagesTr/a.nrrd", "labelsTr/a.nrrd"], {"labels": ORGANS})
    with pytest.raises(
        ValueError, match="no label maps that end in .nii.gz or .nii; .*import conv"
    ):
        layouts.read_entries(root, "train")


def change(content, rng):
    """Replace, remove or rename a value of some JSON at random."""
    values = [None, True, 0, -1, 1.5, float("inf"), 10**30, "", "../a", "a\nb", [], {}, [[]]]
    places = [(content, key) for key in content]
    for parent, key in places:  # grows
        inner = parent[key]
        if isinstance(inner, dict):
            places += [(inner, key) for key in inner]
        elif isinstance(inner, list):
            places += [(inner, key) for key in range(len(inner))]
    parent, key = places[rng.integers(len(places))]
    kind = rng.integers(3)
    if kind == 0:
        parent[key] = values[rng.integers(len(values))]
    elif kind == 1:
        del parent[key]
    elif isinstance(parent, dict):
        parent[str(values[rng.integers(len(values))])] = parent.pop(key)


def test_any_change_of_a_dataset_json_is_read_or_a_line(tmp_path):
    rng = np.random.default_rng(0)
    root = decathlon(tmp_path)
    good = json.loads((root / "dataset.json").read_text()) | {"validation": [pair("c")]}
    refused = 0
    for _ in range(300):
        settings = json.loads(json.dumps(good))
        change(settings, rng)
        write_json(root, settings)
        try:
            for split in layouts.find_splits(root):
                for entry in layouts.read_entries(root, split):
                    assert entry.classes and len(entry.labels) >= 2
        except (ValueError, OSError) as error:
            refused += 1
            assert str(root) in str(error) and len(str(error).splitlines()) == 1
    assert refused > 30


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_of_other_unicode_forms_are_the_same(tmp_path, forms, listed):
    """As macOS writes them: in dataset.json or in the labels' folder, and on the disk."""
    given, stored = (unicodedata.normalize(form, "Läsion") for form in forms)
    end = "" if listed else "_0000"
    label_name = stored if listed else given
    files = [f"imagesTr/{stored}{end}.nii.gz", f"labelsTr/{label_name}.nii.gz"]
    settings = {"labels": ORGANS, "training": [pair(given)] if listed else []}
    root = make(tmp_path, files, settings)
    (entry,) = layouts.read_entries(root, "train")
    assert entry.image == root / files[0] and entry.mask == root / files[1]
    layouts.check_files_exist([entry])
