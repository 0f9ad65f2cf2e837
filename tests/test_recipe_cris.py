"""With one text for all images CRIS collapses in evaluation, unless its text norm is unchanged."""

from dataclasses import replace

import pytest
from conftest import command

import prepare
import train
from recipes import cris

pytestmark = pytest.mark.numeric


@pytest.mark.slow
def test_one_prompt_for_all_images(tmp_path, monkeypatch, capsys):
    demo = tmp_path / "demo"
    code, _, err = command(
        monkeypatch,
        capsys,
        prepare,
        "demo",
        "--objects",
        1,
        "--images",
        400,
        "--size",
        96,
        "--out",
        demo,
    )
    assert code == 0, err
    default = cris.PROTOCOLS["default"]
    without = replace(default, config=default.config | {"freeze_text_norm": False})
    monkeypatch.setitem(cris.PROTOCOLS, "without", without)  # as CRIS itself trains
    dice = {}
    for recipe in ("without", "default"):
        options = train.Options(
            variant="mini", weights="none", recipe=recipe, data=[str(demo)], prompt="p1", size=[96],
            epochs=20, batch_size=32, lr=2e-3, warmup=0.15, out=str(tmp_path / recipe),
            cache=str(tmp_path / "cache"),
        )  # fmt: skip
        dice[recipe] = train.run(options)["tests"]["demo"]["dice"]["mean"]
    print(dice)
    # How deep it falls is luck, another on each kind of processor: 0.495 with 0.895 on an Intel
    # Xeon, below 0.35 on an AMD EPYC.
    assert dice["default"] >= 0.80 and dice["without"] <= dice["default"] - 0.3
