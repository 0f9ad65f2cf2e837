"""BEiT against transformers, loaded by the real loading code."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, close, shapes
from forms.beit import (
    MINI,
    as_original,
    hub_2021,
    hub_state,
    run_folder,
    settings,
    theirs,
    with_indices,
)
from PIL import Image
from torch import nn
from transformers import (
    BeitForImageClassification,
    BeitModel,
    logging,
)
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

import beit
from beit import BEiT

pytestmark = pytest.mark.numeric

logging.set_verbosity_error()  # it tells that the auxiliary head is missing; so do the tests
logging.disable_progress_bar()
AUTHORS = tuple(i + 2 for i in MINI.taps)
COUNTS = {"base": 163_407_980, "large": 441_271_084}  # with the auxiliary head
HUB_ID = "microsoft/beit-base-finetuned-ade-640-640"


def randomised(model: nn.Module) -> nn.Module:
    """Weights that all do something: norms, biases and running statistics too."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = 1 + 0.1 * noise if p.ndim < 2 else noise / p[0].numel() ** 0.5
    for name, t in model.named_buffers():
        if "running" in name:
            t.copy_(0.5 + torch.rand(t.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def mini():
    return randomised(BEiT(MINI)).eval()


def close_to_scale(ours, theirs, tolerance):
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{error:.1e} of the scale")
    assert ours.shape == theirs.shape and error <= tolerance
    return error


# --- transformers, live --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", COUNTS)
def test_numbers_of_parameters_with_the_auxiliary_head(variant):
    with torch.device("meta"):
        ours = BEiT(beit.VARIANTS[variant])
        official = theirs(beit.VARIANTS[variant])
    assert sum(p.numel() for p in official.parameters()) == COUNTS[variant]
    auxiliary = sum(p.numel() for p in official.auxiliary_head.parameters())
    assert sum(p.numel() for p in ours.parameters()) == COUNTS[variant] - auxiliary


def test_the_hub_s_names_and_shapes():
    keys = json.loads((ROOT / "tests/golden/hub_keys.json").read_text())[HUB_ID]
    with torch.device("meta"):
        ours = BEiT(beit.VARIANTS["base"]).state_dict()
    hub = {name: torch.empty(shape, device="meta") for name, shape in keys["keys"]}
    left_out = r"auxiliary_head\..*|.*relative_position_index"
    expected = {n: s for n, s in shapes(hub).items() if not re.fullmatch(left_out, n)}
    assert shapes(beit.to_official(ours)) == expected
    assert shapes(beit.convert(hub)) == shapes(ours)


TRANSFORMERS = f"transformers {transformers.__version__}"
CASES = [  # taps, dtype, training
    (MINI.taps, torch.float32, False),
    (MINI.taps, torch.float64, False),
    (AUTHORS, torch.float64, False),
    (AUTHORS, torch.float64, True),
]


@pytest.mark.parity
@pytest.mark.parametrize("taps, dtype, training", CASES)
def test_outputs_and_all_gradients_equal_transformers(taps, dtype, training, parity):
    config = replace(MINI, taps=taps, drop_path=0.0)
    ours = randomised(BEiT(config)).to(dtype).train(training)
    official = theirs(config, beit.to_official(ours.state_dict())).train(training)
    image = torch.randn(2, 3, 64, 96, dtype=dtype)
    weight = torch.randn(2, 150, 16, 24, dtype=dtype)
    logits = ours(image)
    (logits * weight).sum().backward()
    expected = official(image).logits
    (expected * weight).sum().backward()

    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    error = close_to_scale(logits, expected, tolerance)
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    late = {n for n, p in ours.named_parameters() if not p.requires_grad}
    assert set(dict(ours.named_parameters())) - set(gradients) == late
    assert {n.split(".")[2] for n in late} == {str(i) for i in range(max(taps) + 1, MINI.layers)}
    named = {n: p.grad for n, p in official.named_parameters() if p.grad is not None}
    named, gradients = beit.to_official(named), beit.to_official(gradients)
    assert set(named) == set(gradients)
    largest = max(t.abs().max().item() for t in named.values())
    worst = 0.0
    for name, t in named.items():
        # A bias in front of a batch norm in training has no gradient but for rounding.
        scale = max(t.abs().max().item(), 1e-6 * largest)
        error = (gradients[name] - t).abs().max().item() / scale
        assert error <= (1e-4 if dtype == torch.float32 else 1e-6), name
        worst = max(worst, error)
    print(f"gradients: {worst:.1e} of the scale of each")
    if (taps, dtype, training) == CASES[1]:
        parity("beit", "mini, logits", TRANSFORMERS, float64=error)
    if training:
        parity("beit", "mini, all gradients, training", TRANSFORMERS, float64=worst)
        statistics = beit.to_official(official.state_dict())
        for name, t in beit.to_official(ours.state_dict()).items():
            if "running" in name or "num_batches" in name:
                close(t, statistics[name], 1e-6)


@pytest.mark.parametrize("taps", [MINI.taps, AUTHORS])
@pytest.mark.parametrize("size", [(64, 64), (160, 224), (32, 48)])
@torch.no_grad()
def test_any_size_follows_transformers(mini, size, taps):
    config = replace(MINI, taps=taps)
    ours = BEiT(config).eval()
    ours.load_state_dict(mini.state_dict())
    ours, image = ours.double(), torch.randn(1, 3, *size, dtype=torch.float64)
    logits = ours(image)
    assert logits.shape == (1, 150, size[0] // 4, size[1] // 4)
    official = theirs(config, beit.to_official(ours.state_dict()))
    close_to_scale(logits, official(image).logits, 1e-6)


@pytest.mark.parametrize(
    "side",
    [pytest.param(288, marks=pytest.mark.parity), pytest.param(640, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_base_at_full_size_as_transformers_writes_it(side, tmp_path, parity):
    official = randomised(theirs(beit.VARIANTS["base"]))
    official.save_pretrained(tmp_path)
    model = BEiT.from_pretrained(tmp_path)
    assert model.config == beit.VARIANTS["base"]
    (tmp_path / "model.safetensors").unlink()
    image = torch.randn(1, 3, side, side)
    logits = model(image)
    assert logits.shape == (1, 150, side // 4, side // 4)
    error = close_to_scale(logits, official(image).logits, 1e-5)
    if side == 288:
        parity("beit", "base, logits, 288x288", TRANSFORMERS, float32=error)


@pytest.mark.parametrize("grid", [(4, 4), (3, 6), (9, 2)])
def test_relative_position_bias(grid):
    """Equal to the plain lines in the table's own grid and to transformers' in others."""
    H, W = grid
    bias = randomised(beit.RelativePositionBias(MINI.window, 2))
    index = beit.relative_position_index(H, W)
    ours = bias(H, W, index)

    official = BeitRelativePositionBias(settings(MINI))
    official.relative_position_bias_table = bias.relative_position_bias_table
    assert torch.equal(index, official.generate_relative_position_index(grid))
    close(ours, official(grid), 1e-6)
    if grid == (MINI.window, MINI.window):
        plain = bias.relative_position_bias_table[index]  # (N,N,h)
        assert torch.equal(ours, plain.permute(2, 0, 1)[None])
    else:
        assert ours.shape == (1, 2, 1 + H * W, 1 + H * W)


@torch.no_grad()
def test_blocks_behind_the_last_tap_do_not_run(mini):
    image = torch.randn(2, 3, 64, 64)
    cut = BEiT(MINI).eval()
    cut.load_state_dict(mini.state_dict())
    late = cut.beit.layers[max(MINI.taps) + 1 :]
    assert len(late) == 2
    for p in late.parameters():
        nn.init.constant_(p, float("nan"))
        assert not p.requires_grad
    calls = []
    late[0].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(cut(image), mini(image)) and not calls
    authors = BEiT(replace(MINI, taps=AUTHORS)).eval()
    assert all(p.requires_grad for p in authors.parameters())
    authors.load_state_dict(cut.state_dict())
    assert authors(image).isnan().all()


def test_stochastic_depth_is_that_of_transformers():
    config = replace(MINI, drop_path=0.4)
    official = theirs(config).beit.layers
    for layer, other in zip(BEiT(config).train().beit.layers, official, strict=True):
        rate = getattr(other.drop_path, "drop_prob", 0.0)
        assert layer.drop_path == pytest.approx(rate)
        scale = layer.residual_scale(torch.tensor([2.0, 4.0]), 4000)
        assert scale.shape == (4000, 1, 2)
        dropped = (scale == 0).all(2)
        assert dropped.float().mean().item() == pytest.approx(rate, abs=0.04)
        close(scale[~dropped], torch.tensor([2.0, 4.0]).expand((~dropped).sum(), 2) / (1 - rate))
        layer.eval()
        assert torch.equal(layer.residual_scale(torch.ones(2), 3), torch.ones(3, 1, 2))


@torch.no_grad()
def test_half_precision_of_training_programs(mini):
    image = torch.randn(2, 3, 64, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = mini(image)
    assert logits.dtype == torch.bfloat16
    close_to_scale(logits.float(), mini(image), 0.1)


def test_wrong_calls_are_told(mini):
    for size in ((64, 72), (16, 64)):
        with pytest.raises(ValueError, match="multiples of 16, at least 32"):
            mini(torch.zeros(1, 3, *size))
    for taps in ((1, 2, 3), (2, 3, 4, 6)):
        with pytest.raises(ValueError, match="four block indices from 0 to 5"):
            BEiT(replace(MINI, taps=taps))


# --- files ---------------------------------------------------------------------------------------


# A form of a checkpoint: how its names come from the hub's, and how it is written into a folder.


def test_another_number_of_classes_gets_a_new_classifier(mini, tmp_path, capsys):
    source = hub_2021(hub_state(mini), tmp_path)
    assert BEiT.from_pretrained(source, num_classes=150).config == MINI
    assert "untrained" not in capsys.readouterr().out
    model = BEiT.from_pretrained(source, num_classes=4, taps=AUTHORS, image_size=96)
    assert model.config == replace(MINI, num_classes=4, taps=AUTHORS, image_size=96)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{source}: new and untrained: decode_head.classifier"]
    loaded, state = beit.to_official(model.state_dict()), hub_state(mini)
    classifier = loaded.pop("decode_head.classifier.weight")
    assert classifier.shape == (4, 128, 1, 1) and classifier.abs().max() < 0.1
    assert 0.015 < classifier.std() < 0.025
    assert not loaded.pop("decode_head.classifier.bias").any()
    assert all(torch.equal(t, state[name]) for name, t in loaded.items())
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 16, 16)


ENCODER = replace(MINI, window=6)


def classifier_of_images(folder):
    model = randomised(BeitForImageClassification(settings(ENCODER)))
    model.save_pretrained(folder)
    return folder, model.beit


def bare_encoder(folder):
    model = randomised(BeitModel(settings(ENCODER)))
    model.save_pretrained(folder)
    return folder, model


def classifier_of_the_authors(folder):
    """In timm the names are the same."""
    model = randomised(BeitForImageClassification(settings(ENCODER)))
    state = as_original(beit.to_official(model.state_dict()))
    state = {name.removeprefix("backbone."): t for name, t in state.items()}
    state |= {"fc_norm.weight": torch.ones(128), "head.bias": torch.ones(150)}
    torch.save({"model": with_indices(state)}, folder / "beit.pth")
    return folder / "beit.pth", model.beit


@pytest.mark.parametrize(
    "form",
    [classifier_of_images, bare_encoder, classifier_of_the_authors],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_an_encoder_alone_gets_a_new_head(form, tmp_path, capsys):
    source, encoder = form(tmp_path)
    with pytest.raises(ValueError, match="the encoder alone, without a head; give num_classes"):
        BEiT.from_pretrained(source)
    capsys.readouterr()
    model = BEiT.from_pretrained(source, num_classes=1)
    assert model.config == replace(ENCODER, num_classes=1, image_size=96)
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"{source}: new and untrained: fpn1.0, fpn1.1, fpn1.3, fpn2.0, decode")
    assert told.endswith("decode_head.classifier") and "beit" not in told.split("untrained")[1]
    image = torch.randn(1, 3, 96, 96)
    states = encoder.eval()(image, output_hidden_states=True).hidden_states
    for i, x in zip(MINI.taps, model.beit(image), strict=True):
        expected = states[i + 1][:, 1:].transpose(1, 2).unflatten(2, (6, 6))
        close_to_scale(x, expected, 1e-5)
    for name, p in model.named_parameters():
        if name.startswith(("fpn", "decode_head")) and p.ndim > 1:
            assert 0.018 < p.std() < 0.022 or p.numel() < 1000, name


def test_fresh_weights_are_those_of_transformers():
    torch.manual_seed(0)
    ours = beit.to_official(BEiT(MINI).state_dict())
    official = beit.to_official(theirs(MINI).state_dict())
    for name, t in official.items():
        if t.is_floating_point():
            error = t.std().item() * 6 / t.numel() ** 0.5 if t.numel() > 1 else 0
            assert ours[name].mean().item() == pytest.approx(t.mean().item(), abs=error + 1e-9), (
                name
            )
            assert ours[name].std().item() == pytest.approx(t.std().item(), rel=0.2), name


def test_other_classes_are_refused(mini, tmp_path):
    run_folder(beit.convert(hub_state(mini)), tmp_path, **{"class": "CRIS"})
    with pytest.raises(ValueError, match="holds CRIS in format 1, not BEiT in format 1"):
        BEiT.from_pretrained(tmp_path)


# --- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kvasir_polyp", "ct_gi"])
def test_preprocessing_is_the_official_one(real_data, name):
    processor = BeitImageProcessorPil(
        size={"height": 640, "width": 640}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    for path in sorted((real_data / name / "images").iterdir())[:2]:
        image = Image.open(path)
        expected = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        ours = beit.preprocess(image, beit.VARIANTS["base"])
        assert ours.shape == (3, 640, 640) and ours.dtype == torch.float32
        close(ours, expected, 1e-6)


def test_masks_there_and_back():
    mask = np.random.default_rng(0).integers(0, 256, (147, 301), dtype=np.uint8)
    nearest = Image.fromarray(mask).resize((64, 64), Image.Resampling.NEAREST)
    ours = beit.preprocess_mask(torch.from_numpy(mask), MINI)
    assert ours.dtype == torch.float32 and np.array_equal(ours[0].numpy(), np.asarray(nearest))
    logits = torch.randn(5, 16, 16)
    for k in (5, 1):
        expected = F.interpolate(logits[None, :k], (147, 301), mode="bilinear")[0]
        expected = expected.softmax(0) if k > 1 else expected.sigmoid()
        close(BEiT(MINI).postprocess(logits[:k], (147, 301)), expected, 1e-6)


# --- real weights --------------------------------------------------------------------------------


@pytest.mark.online
@torch.no_grad()
def test_published_numbers_of_the_real_weights():
    """transformers, tests/models/beit/test_modeling_beit.py, the integration test."""
    from huggingface_hub import constants, hf_hub_download
    from test_online import reach

    reach(constants.ENDPOINT)
    fixtures = "hf-internal-testing/fixtures_ade20k"
    path = hf_hub_download(fixtures, "ADE_val_00000001.jpg", repo_type="dataset")
    model = BEiT.from_pretrained(HUB_ID)
    assert model.config == beit.VARIANTS["base"]
    logits = model(model.preprocess(Image.open(path))[None])
    expected = [  # since Pillow 9, whose JPEG decoder is another
        [[-4.8960, -2.3688, -3.0355], [-2.8478, -0.9836, -1.7418], [-2.9449, -1.3332, -2.1456]],
        [[-5.8081, -3.4124, -4.1006], [-3.8561, -2.2081, -3.0323], [-3.8365, -2.4601, -3.3669]],
        [[-0.0309, 3.9868, 4.0540], [2.9640, 4.6877, 4.9976], [3.2081, 4.7690, 4.9942]],
    ]
    close(logits[0, :3, :3, :3], torch.tensor(expected), 1e-3)
