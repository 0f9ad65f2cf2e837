"""A small CLIPSeg learns to read on the demo set, where only the text identifies the target."""

import pytest
from conftest import rows

import prepare
import train
from preparation import demo as demo_set
from preparation.demo import draw_blobs

pytestmark = [pytest.mark.slow, pytest.mark.numeric]


HOW = {
    "prompt": "p6,p3",
    "size": [128],
    "batch_size": 16,
    "warmup": 0.1,
    "workers": 0,
    "overlays": 0,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo set, and the colours of the blobs in each of its images."""
    folder, colours, draw = tmp_path_factory.mktemp("reading") / "demo", [], draw_blobs

    def recorded(*args):
        blobs = draw(*args)
        colours.append({blob.colour for blob in blobs})
        return blobs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_set, "draw_blobs", recorded)
        assert prepare.main(["demo", "--out", str(folder)]) == 0
    return folder, colours


def study(demo, out, **how):
    """Trains and asks with every type of prompt.

    -> {type: mean Dice}, the same with the prompts of other images, and the share of empty masks
    where p6 asks for a colour that the image has nowhere.
    """
    (folder, colours), cache = demo, str(demo[0].parent / "cache")
    options = train.Options(model="clipseg", data=[str(folder)], out=out, cache=cache, **HOW | how)
    train.run(options)
    tests = [str(folder), f"{folder}:other_prompts"]
    asked = train.Options(
        weights=out, eval=True, test=tests, prompt_study=True, out=out + "-study", cache=cache
    )
    right, wrong = train.run(asked)["tests"].values()
    cases = rows(f"{out}-study/test/per_image.csv")
    cases = [r for r in cases if "other" in r["test"] and r["type"] == "p6"]
    absent = [r for r in cases if not colours[int(r["name"])] & set(r["prompt"].split())]
    assert len(absent) >= 50
    empty = sum(r["in_pred"] == "False" for r in absent) / len(absent)
    dice = [{kind: s["dice"]["mean"] for kind, s in scores.items()} for scores in (right, wrong)]
    print(how, *dice, f"empty {empty:.3f} of {len(absent)}")
    return *dice, empty


@pytest.fixture(scope="module")
def reader(demo, tmp_path_factory):
    """A model of which everything was trained, and its study."""
    out = str(tmp_path_factory.mktemp("reader") / "run")
    return out, study(demo, out, variant="mini", weights="none", lr=1e-3, epochs=20)


def test_it_learns_to_read(reader):
    right, wrong, _ = reader[1]
    assert right["p6"] >= 0.70 and right["p3"] >= 0.70
    assert right["p0"] <= right["p6"] - 0.40 and wrong["p6"] <= right["p6"] - 0.40


def test_negatives_teach_it_to_find_nothing(reader, demo, tmp_path):
    out, (_, _, before) = reader
    more = {"weights": out, "lr": 1e-3, "backbone_lr": 1e-3, "epochs": 15, "negatives": 0.4}
    right, _, empty = study(demo, str(tmp_path / "run"), **more)
    assert before < 0.80 <= empty and right["p6"] >= 0.80


def test_lora_learns_to_read(demo, tmp_path):
    """Updates of rank 16 on towers that stay as they were drawn, and the decoder."""
    how = {"variant": "mini", "weights": "none", "train": "lora", "lora_rank": 16}
    right, wrong, _ = study(demo, str(tmp_path / "run"), lr=2e-3, epochs=20, warmup=0.2, **how)
    assert right["p6"] >= 0.80 and right["p3"] >= 0.80
    assert right["p0"] <= right["p6"] - 0.40 and wrong["p6"] <= right["p6"] - 0.40
