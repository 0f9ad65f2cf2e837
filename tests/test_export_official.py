"""export.py --to official: transformers and MONAI load what it writes, and compute the same."""

import json
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, command, randomised, shapes, write_run
from forms import sam_decoder as sam_forms
from forms import swin_unetr3d as swin_forms
from PIL import Image
from safetensors.torch import load_file

import beit
import biomedclipseg
import clipseg
import cris
import dpt
import export
import sam_decoder
import segformer
import swin_unetr3d
import train
import universal
import upernet
from exporting import official

pytestmark = pytest.mark.numeric
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CLASS_MAPS = {
    "segformer": (segformer.SegFormer, transformers.SegformerForSemanticSegmentation),
    "upernet": (upernet.UPerNet, transformers.UperNetForSemanticSegmentation),
    "dpt": (dpt.DPT, transformers.DPTForSemanticSegmentation),
    "beit": (beit.BEiT, transformers.BeitForSemanticSegmentation),
}
CLASSES = ["background", "polyp", "tool"]


def run_of(kind, folder, /, config=None, **more):
    """Write a run of a small model whose tensors all differ; return its folder and the model."""
    model = randomised(kind(config or import_module(kind.__module__).VARIANTS["mini"]))
    return write_run(folder, kind, model.state_dict(), model.config, **more), model


def exported(monkeypatch, capsys, run, out, *more) -> str:
    """Export a run, and return what was printed."""
    arguments = ("--weights", run, "--to", "official", "--out", out)
    status, printed, err = command(monkeypatch, capsys, export, *arguments, *more)
    assert (status, err) == (0, "")
    return printed


def refusal(monkeypatch, capsys, run, *more) -> str:
    """Return the line with which an export is refused."""
    arguments = ("--weights", run, "--to", "official")
    status, _, err = command(monkeypatch, capsys, export, *arguments, *more)
    assert status == 2 and err.count("\n") == 1, err
    return err


def loaded(kind, folder):
    """Load a folder with a class of transformers, which must use and find every tensor."""
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def photo(width: int, height: int) -> Image.Image:
    """Return a smooth image: resampling differs least between implementations."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("name", CLASS_MAPS)
def test_transformers_computes_the_same_class_maps(name, tmp_path, monkeypatch, capsys):
    ours, theirs = CLASS_MAPS[name]
    mini = import_module(name).VARIANTS["mini"]
    config = replace(mini, num_classes=3, image_size=96)
    run, model = run_of(ours, tmp_path / "run", config, classes=CLASSES)
    exported(monkeypatch, capsys, run, tmp_path / "out")

    their_model = loaded(theirs, tmp_path / "out")
    assert their_model.config.id2label == dict(enumerate(CLASSES))
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = their_model(pixels).logits
        torch.testing.assert_close(model(pixels), expected, rtol=0, atol=1e-4)
    auto = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert type(auto) is theirs

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = photo(130, 70)
    theirs_pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    difference = (model.preprocess(image) - theirs_pixels).abs()
    assert difference.max() * min(config.std) * 255 < 1.5  # grey levels


def test_logits_are_not_those_of_any_weights(tmp_path, monkeypatch, capsys):
    """The comparison above can fail."""
    run, model = run_of(segformer.SegFormer, tmp_path / "run")
    exported(monkeypatch, capsys, run, tmp_path / "out")
    theirs = loaded(transformers.SegformerForSemanticSegmentation, tmp_path / "out")
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs.decode_head.classifier.bias += 0.01
        assert (theirs(pixels).logits - model(pixels)).abs().max() > 1e-3


def test_clipseg_in_transformers(tmp_path, monkeypatch, capsys):
    run, model = run_of(clipseg.CLIPSeg, tmp_path / "run")
    printed = exported(monkeypatch, capsys, run, tmp_path / "out")
    assert "openai/clip-vit-base-patch16" in printed

    theirs = loaded(transformers.CLIPSegForImageSegmentation, tmp_path / "out")
    pixels = torch.randn(2, 3, 128, 128)
    tokens = torch.tensor([[49406, 320, 49407, 49407], [49406, 736, 17, 49407]])
    with torch.no_grad():
        expected = theirs(input_ids=tokens, pixel_values=pixels).logits
        torch.testing.assert_close(model(pixels, tokens)[:, 0], expected, rtol=0, atol=1e-4)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs_pixels = processor(photo(90, 60), return_tensors="pt")["pixel_values"][0]
    difference = (model.preprocess(photo(90, 60)) - theirs_pixels).abs()
    assert difference.max() * 0.224 * 255 < 1.5


def test_sam_in_transformers(tmp_path, monkeypatch, capsys):
    config = replace(sam_decoder.VARIANTS["mini"], threshold=0.6)
    run, model = run_of(sam_decoder.SAM, tmp_path / "run", config)
    printed = exported(monkeypatch, capsys, run, tmp_path / "out")
    assert "mask_threshold=0.405465" in printed  # log(0.6 / 0.4)

    theirs = loaded(transformers.SamModel, tmp_path / "out")
    pixels = torch.randn(1, 3, 256, 256)
    boxes = torch.tensor([[[9.0, 9, 99, 80], [20, 30, 200, 220]]])
    with torch.no_grad():
        expected = theirs(pixels, input_boxes=boxes, multimask_output=False)
        masks, iou = model(pixels, boxes=boxes)
    torch.testing.assert_close(masks, expected.pred_masks, rtol=0, atol=1e-4)
    torch.testing.assert_close(iou, expected.iou_scores, rtol=0, atol=1e-4)

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    theirs_pixels = processor(photo(130, 70), return_tensors="pt")["pixel_values"][0]
    difference = (model.preprocess(photo(130, 70)) - theirs_pixels).abs()
    assert difference.max() * 0.224 * 255 < 1.5


@pytest.mark.parametrize(
    "merging",
    [
        "legacy",
        pytest.param("merging", marks=pytest.mark.slow),
        pytest.param("mergingv2", marks=pytest.mark.slow),
    ],
)
def test_swin_unetr_in_monai(merging, tmp_path, monkeypatch, capsys):
    config = replace(swin_unetr3d.VARIANTS["mini"], merging=merging)
    model = swin_unetr3d.SwinUNETR(config).eval()
    run = write_run(tmp_path / "run", type(model), model.state_dict(), config)
    printed = exported(monkeypatch, capsys, run, tmp_path / "swin.pt")
    assert ("MONAI 0.9 to 1.4" in printed) == (merging == "legacy")
    assert "out_channels=3, feature_size=12, use_v2=False" in printed

    theirs = swin_forms.theirs(config).eval()
    theirs.load_state_dict(torch.load(tmp_path / "swin.pt", weights_only=True))  # strict
    volume = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(volume), theirs(volume), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", ["rn50", "rn101"])
def test_names_and_shapes_of_cris_are_those_of_the_authors(variant):
    golden = np.load(ROOT / f"tests/golden/cris_{variant}.npz")
    expected = {f"module.{name}": tuple(s) for name, s, _ in json.loads(str(golden["keys"]))}
    with torch.device("meta"):
        model = cris.CRIS(cris.VARIANTS[variant])
    checkpoint = official.cris_form(model, [])
    assert shapes(checkpoint.content["state_dict"]) == expected


def test_notes_of_cris_say_what_its_program_does_otherwise(tmp_path, monkeypatch, capsys):
    config = replace(cris.VARIANTS["mini"], pixels="medvlsm", pad_token=49407, threshold=0.5)
    run, model = run_of(cris.CRIS, tmp_path / "run", config)
    printed = exported(monkeypatch, capsys, run, tmp_path / "cris.pth")
    for words in ("word_len 77", "0.5 are foreground", "stretched", "padded with 49407"):
        assert words in printed
    again = cris.CRIS.from_pretrained(tmp_path / "cris.pth")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_names_and_shapes_of_the_universal_model_are_those_of_the_authors():
    table = json.loads((ROOT / "tests/golden/monai_keys.json").read_text())
    expected = {name: tuple(s) for name, s in table["universal_swin_unetr_released"]}
    with torch.device("meta"):
        model = universal.UniversalSwinUNETR(
            universal.UNIVERSAL_VARIANTS["universal"], torch.zeros(32, 512)
        )
    checkpoint = official.universal_form(model, [])
    assert shapes(checkpoint.content["net"]) == expected


def test_universal_model_loads_again(tmp_path, monkeypatch, capsys):
    config = replace(
        universal.UNIVERSAL_VARIANTS["mini"],
        num_classes=2,
        codes="random",
        classes=("background", "liver", "spleen"),
    )
    kind = universal.UniversalSwinUNETR
    model = randomised(kind(config))
    run = write_run(tmp_path / "run", kind, model.state_dict(), config)
    printed = exported(monkeypatch, capsys, run, tmp_path / "universal.pth")
    assert "out_channels=2 and encoding='rand_embedding'" in printed and "liver, spleen" in printed
    again = kind.from_pretrained(tmp_path / "universal.pth", merging=config.merging)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_authors_file_becomes_one_of_transformers(tmp_path, monkeypatch, capsys):
    """Official weights need no run."""
    model = randomised(sam_decoder.SAM(sam_decoder.VARIANTS["mini"]))
    state = sam_forms.as_original(sam_decoder.to_official(model.state_dict()))
    torch.save(state, tmp_path / "sam_vit_b_01ec64.pth")
    monkeypatch.chdir(tmp_path)
    exported(monkeypatch, capsys, "sam_vit_b_01ec64.pth", "out", "--model", "sam_decoder")
    theirs = loaded(transformers.SamModel, tmp_path / "out").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(theirs[name], tensor), name


# --- runs with LoRA -------------------------------------------------------------------------------


def test_lora_is_merged(options, tmp_path, monkeypatch, capsys):
    start = segformer.SegFormer(segformer.VARIANTS["mini"])
    write_run(tmp_path / "start", type(start), start.state_dict(), start.config)
    settings = replace(
        options, model="segformer", variant=None, train="lora", weights=str(tmp_path / "start"),
        max_steps=2, overlays=0,
    )  # fmt: skip
    train.run(settings)
    exported(monkeypatch, capsys, settings.out, tmp_path / "out")

    theirs = loaded(transformers.SegformerForSemanticSegmentation, tmp_path / "out")
    ours = segformer.SegFormer.from_pretrained(settings.out)
    assert not torch.equal(
        ours.encoder.block[0][0].mlp.dense1.weight, start.encoder.block[0][0].mlp.dense1.weight
    )
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(pixels).logits, rtol=0, atol=1e-4)


# --- what the official form cannot say ------------------------------------------------------------


def test_one_class_and_other_pixels_are_noted(tmp_path, monkeypatch, capsys):
    config = replace(segformer.VARIANTS["mini"], num_classes=1, resample="cv2 nearest")
    run, _ = run_of(segformer.SegFormer, tmp_path / "run", config)
    printed = exported(monkeypatch, capsys, run, tmp_path / "out")
    assert "one class: take the sigmoid" in printed and "cv2 nearest" in printed
    assert not (tmp_path / "out/preprocessor_config.json").exists()


def test_medsam_pixels_are_noted(tmp_path, monkeypatch, capsys):
    config = replace(sam_decoder.VARIANTS["mini"], **sam_decoder.MEDSAM)
    run, _ = run_of(sam_decoder.SAM, tmp_path / "run", config)
    assert "stretched" in exported(monkeypatch, capsys, run, tmp_path / "out")
    assert not (tmp_path / "out/preprocessor_config.json").exists()


def test_what_has_no_official_form_is_refused(tmp_path, monkeypatch, capsys):
    config = replace(clipseg.VARIANTS["mini"], adapter_dim=8)
    run, _ = run_of(clipseg.CLIPSeg, tmp_path / "adapters", config)
    assert "has adapters" in refusal(monkeypatch, capsys, run)

    config = replace(beit.VARIANTS["mini"], taps=(0, 1, 2, 5))
    run, _ = run_of(beit.BEiT, tmp_path / "taps", config)
    assert "the last block of 6" in refusal(monkeypatch, capsys, run)

    run, _ = run_of(biomedclipseg.BiomedCLIPSeg, tmp_path / "biomedclipseg")
    assert "no program loads" in refusal(monkeypatch, capsys, run)


def test_files_are_never_overwritten(tmp_path, monkeypatch, capsys):
    run, model = run_of(segformer.SegFormer, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    status, printed, _ = command(monkeypatch, capsys, export, "--weights", run, "--to", "official")
    assert status == 0 and "exports/run-official: for from_pretrained" in printed
    weights = load_file("exports/run-official/model.safetensors")
    assert shapes(weights) == shapes(segformer.to_official(model.state_dict()))
    assert "exists already" in refusal(monkeypatch, capsys, run)
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["run-official"]
