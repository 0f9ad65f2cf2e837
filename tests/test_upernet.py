"""UPerNet against transformers, loaded by the real loading code."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from forms.upernet import FORMS, MINI, encoder_config, hub_2023, mmseg, run_folder, theirs
from PIL import Image
from recipe import fill
from torch import nn
from transformers import (
    ConvNextBackbone,
    ConvNextForImageClassification,
    ConvNextModel,
    SegformerImageProcessorPil,
)

import upernet
from upernet import UPerNet

pytestmark = pytest.mark.numeric

TRANSFORMERS = f"transformers {transformers.__version__}"
OFFICIAL = [name for name in upernet.VARIANTS if name != "mini"]


def randomised(model: nn.Module) -> nn.Module:
    """Weights and statistics that all do something: norms, biases and layer scales too."""
    for name, t in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            t.copy_(torch.from_numpy(fill(name, tuple(t.shape))))
            if name.endswith("layer_scale_parameter"):
                t += 0.5
    return model


@pytest.fixture(scope="module")
def mini():
    return randomised(UPerNet(MINI)).eval()


def only_auxiliary_missing(official, state) -> bool:
    missing, unexpected = official.load_state_dict(state, strict=False)
    return not unexpected and bool(missing) and all(n.startswith("auxiliary_") for n in missing)


# --- the same numbers as transformers ------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("size", [(96, 64), (101, 75), (32, 97)])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_statistics_and_all_gradients_equal_transformers(training, size, parity):
    ours, official = randomised(UPerNet(MINI)).double(), theirs(MINI).double()
    assert only_auxiliary_missing(official, upernet.to_official(ours.state_dict()))
    ours.train(training)
    official.train(training)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    mine, their_image = image.clone().requires_grad_(), image.clone().requires_grad_()
    logits, expected = ours(mine), official(their_image).logits
    weight = torch.randn_like(logits)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()

    assert logits.shape == (2, 5, *size)
    scale = expected.abs().max().item()
    error = (logits - expected).abs().max().item() / scale
    gradients = {n: p.grad for n, p in ours.named_parameters()} | {"image": mine.grad}
    reference = {n: p.grad for n, p in official.named_parameters()} | {"image": their_image.grad}
    # Batch norm takes away what the biases before a 1x1 convolution add: zero but for rounding.
    floor = 1e-3 * max(g.abs().max().item() for g in reference.values() if g is not None)
    worst = {}
    for name, g in gradients.items():
        difference = (g - reference[name]).abs().max().item()
        worst[name] = difference / max(reference[name].abs().max().item(), floor)
    print(f"logits {error:.1e} of {scale:.1f}, gradients {max(worst.values()):.1e}")
    if size == (101, 75) and training:
        what = "mini, all gradients, training"
        parity("upernet", what, TRANSFORMERS, float64=max(worst.values()))
    elif size == (101, 75):
        parity("upernet", "mini, logits", TRANSFORMERS, float64=error)
    assert error <= 1e-6
    assert max(worst.values()) <= 1e-6, max(worst, key=worst.get)
    buffers = dict(official.named_buffers())  # running statistics
    for name, b in ours.named_buffers():
        torch.testing.assert_close(b, buffers[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parity
@torch.no_grad()
def test_small_at_full_size_as_transformers_writes_it(tmp_path, capsys, parity):
    """The official names filled, through `from_pretrained`; the first part that differs is told."""
    config = upernet.VARIANTS["convnext-small"]
    keys = json.loads((ROOT / "tests/golden/hub_keys.json").read_text())
    keys = keys["openmmlab/upernet-convnext-small"]["keys"]
    integers = "num_batches_tracked"
    state = {
        n: torch.tensor(0) if n.endswith(integers) else torch.from_numpy(fill(n, tuple(s)))
        for n, s in keys
    }
    with torch.device("meta"):
        official = theirs(config)
    official.load_state_dict(state, assign=True)  # strict: the hub's names are those of today
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = UPerNet.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    assert model.config == config and not model.training
    assert "image_size is not stored in the file, using 512" in capsys.readouterr().out

    image = torch.randn(1, 3, 288, 320)
    flipped = model(image.flip(3)).flip(3)
    seen, expected = {}, {}
    for network, outputs in ((model, seen), (official, expected)):
        for name, module in network.named_modules():
            if re.fullmatch(r"backbone\.encoder\.stages\.\d|decode_head\.\w+(\.\d)?", name):
                module.register_forward_hook(lambda _, x, y, n=name, o=outputs: o.update({n: y}))
    seen["logits"], expected["logits"] = model(image), official(image).logits
    # A turned image gives something else: the weights let the image through.
    assert (flipped - seen["logits"]).std() > 0.1 * seen["logits"].std()
    compared = [name for name in expected if isinstance(seen.get(name), torch.Tensor)]
    assert len(compared) == 4 + 4 + 9 + 1  # stages, pools, the head's convolutions, logits
    for name in compared:
        scale = expected[name].abs().max().item()
        error = (seen[name] - expected[name]).abs().max().item() / scale
        assert error <= 2e-5, f"{name} differs by {error:.1e} of {scale:.1f}"
    print(f"{name} differ by {error:.1e} of {scale:.1f}")
    assert name == "logits"
    parity("upernet", "convnext-small, logits, 288x320", TRANSFORMERS, float32=error)


@pytest.mark.parametrize("size", [(24, 32), (23, 31), (2, 9), (6, 8), (5, 1)])
def test_a_convolution_of_an_enlarged_map(size):
    x, weight = torch.randn(2, 4, 6, 8).double(), torch.randn(5, 4, 3, 3).double()
    enlarged = F.interpolate(x, size, mode="bilinear", align_corners=False)
    expected = F.conv2d(enlarged, weight, padding=1)
    ours = upernet.upsampled_conv3x3(x, weight, size)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_a_fusion_equals_the_convolution_of_the_enlarged_maps(training):
    """Outputs, statistics and all gradients."""
    ours = randomised(upernet.Fusion(3 + 5 + 4, 6, 3)).double().train(training)
    plain = randomised(upernet.ConvModule(3 + 5 + 4, 6, 3)).double().train(training)
    shapes = ((2, 3, 12, 17), (2, 5, 6, 8), (2, 4, 1, 1))
    maps = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    enlarged = [F.interpolate(x, (12, 17), mode="bilinear", align_corners=False) for x in maps]

    outputs = ours(maps)
    expected = plain(torch.cat(enlarged, 1))
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((outputs * weight).sum(), [*maps, *ours.parameters()])
    reference = torch.autograd.grad((expected * weight).sum(), [*maps, *plain.parameters()])

    assert (outputs > 0).any() and (outputs == 0).any()
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients, reference, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


@torch.no_grad()
def test_half_precision_of_training_programs(mini):
    """Autocast: no operation stumbles over two types, and the result is that of half precision."""
    image = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        half = mini(image).float()
    whole = mini(image)
    assert (half - whole).std() < 0.05 * whole.std()


def test_wrong_calls_are_told(mini):
    with pytest.raises(ValueError, match="at least 32, not \\(31, 64\\)"):
        mini(torch.zeros(1, 3, 31, 64))


@pytest.mark.parametrize("variant", OFFICIAL)
def test_numbers_of_parameters_with_the_auxiliary_head(variant):
    config = upernet.VARIANTS[variant]
    with torch.device("meta"):
        ours, official = UPerNet(config), theirs(config)
    sizes = {"tiny": 60_242_636, "small": 81_877_196, "base": 122_102_956}
    sizes |= {"large": 234_994_796, "xlarge": 391_140_396}
    extra = sum(p.numel() for p in official.auxiliary_head.parameters())
    count = sum(p.numel() for p in ours.parameters())
    assert count + extra == sizes[variant.removeprefix("convnext-")]


def test_fresh_weights_are_those_of_transformers():
    """Their spread, as they are random; what is not random is equal."""
    ours, official = UPerNet(MINI).state_dict(), theirs(MINI).state_dict()
    spreads = 0
    for name, t in ours.items():
        if t.ndim < 2:
            assert torch.equal(t, official[name]), name
        elif t.numel() > 4000:
            assert 0.9 * 0.02 < t.std() < 1.1 * 0.02 and abs(t.mean()) < 2e-3, name
            assert 0.9 * 0.02 < official[name].std() < 1.1 * 0.02, name
            spreads += 1
    assert spreads > 10


# --- files ---------------------------------------------------------------------------------------

# A form of a checkpoint: how its names come from the hub's, and how it is written into a folder.


def official_state(model):
    return upernet.to_official(model.state_dict())


CLASSIFIER = "decode_head.classifier.weight"


def test_a_name_that_is_there_twice_is_refused(mini, tmp_path):
    state = official_state(mini)
    state["decode_head.conv_seg.weight"] = state[CLASSIFIER].clone()
    with pytest.raises(ValueError, match=f"{CLASSIFIER} occurs twice"):
        UPerNet.from_pretrained(hub_2023(state, tmp_path))


def test_a_file_without_counters_of_batches_is_whole(mini, tmp_path, capsys):
    state = official_state(mini)
    bare = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    assert len(bare) < len(state)
    source = hub_2023(bare, tmp_path)
    loaded = UPerNet.from_pretrained(source).state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in bare.items())
    # Where they are, they are kept, with a new classifier too.
    state |= {n: torch.tensor(7) for n in state if n not in bare}
    hub_2023(state, tmp_path)
    loaded = UPerNet.from_pretrained(source, num_classes=3).state_dict()
    assert all(loaded[name] == 7 for name in state if name not in bare)
    assert capsys.readouterr().out.count("new and untrained: decode_head.classifier\n") == 1


SOME = [form for form in FORMS if form.write in (hub_2023, mmseg, run_folder)]


@pytest.mark.parametrize("form", SOME, ids=lambda form: form.name)
def test_other_classes_get_a_new_classifier(mini, form, tmp_path, capsys):
    state = official_state(mini)
    source = form.write(form.names(state), tmp_path)
    kept = UPerNet.from_pretrained(source, num_classes=5, threshold=0.3)
    assert kept.config == replace(MINI, threshold=0.3)
    assert torch.equal(kept.state_dict()[CLASSIFIER], state[CLASSIFIER])
    assert "untrained" not in capsys.readouterr().out

    model = UPerNet.from_pretrained(source, num_classes=1)
    assert model.config == replace(MINI, num_classes=1)
    assert capsys.readouterr().out.endswith(": new and untrained: decode_head.classifier\n")
    for name, t in model.state_dict().items():
        if not name.startswith("decode_head.classifier."):
            assert torch.equal(t, state[name]), name
    classifier = model.decode_head.classifier
    assert not classifier.bias.any() and 0.01 < classifier.weight.std() < 0.03
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("kind", [ConvNextForImageClassification, ConvNextModel, ConvNextBackbone])
def test_an_encoder_alone_gets_a_new_head(kind, tmp_path, capsys):
    official = randomised(kind(encoder_config(MINI)))
    official.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the encoder alone, without a head; give num_classes"):
        UPerNet.from_pretrained(tmp_path)
    capsys.readouterr()
    model = UPerNet.from_pretrained(tmp_path, num_classes=3)
    assert model.config == replace(MINI, num_classes=3)
    out = capsys.readouterr().out
    assert "new and untrained: " in out and "decode_head.fpn_bottleneck" in out
    norms = kind is ConvNextBackbone  # which has the norms behind the stages
    assert ("backbone.hidden_states_norms" in out) != norms
    state, compared = model.state_dict(), 0
    for name, t in official.state_dict().items():
        name = f"backbone.{name.removeprefix('convnext.')}"
        if name in state:
            assert torch.equal(state[name], t), name
            compared += 1
    encoder = [n for n in state if n.startswith("backbone.") and (norms or "hidden_" not in n)]
    assert compared == len(encoder) > 40
    assert torch.equal(state["backbone.hidden_states_norms.stage1.weight"], torch.ones(16)) or norms


def test_a_hole_in_an_encoder_is_told(tmp_path):
    official = ConvNextForImageClassification(encoder_config(MINI))
    state = official.state_dict()
    del state["convnext.encoder.stages.1.layers.0.dwconv.bias"]
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="stages.1.layers.0.dwconv.bias is missing"):
        UPerNet.from_pretrained(tmp_path, num_classes=3)


def test_a_run_folder_of_another_model_is_refused(mini, tmp_path):
    run_folder(official_state(mini), tmp_path, **{"class": "CRIS"})
    with pytest.raises(ValueError, match="holds CRIS in format 1, not UPerNet in format 1"):
        UPerNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", OFFICIAL)
def test_the_variant_is_known_by_its_tensors(variant):
    """Also with other classes and without a head."""
    config = upernet.VARIANTS[variant]
    with torch.device("meta"):
        state = UPerNet(replace(config, num_classes=4)).state_dict()
    assert upernet.closest_variant(state) == config
    state = {n: t for n, t in state.items() if n.startswith("backbone.e")}
    assert upernet.closest_variant(state) == config


# --- pixels --------------------------------------------------------------------------------------


def test_preprocessing_is_the_official_one(real_data):
    official = SegformerImageProcessorPil()  # its defaults are those of openmmlab's repositories
    config, compared = upernet.VARIANTS["convnext-small"], 0
    for folder in ("kvasir_polyp", "busi", "ct_gi", "isic2017_skin"):
        path = min((real_data / folder / "images").rglob("*.*g"))
        image = Image.open(path)
        expected = official(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        ours = upernet.preprocess(image, config)
        assert ours.shape == (3, 512, 512) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
        compared += 1
    assert compared == 4


def test_masks_there_and_back():
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 256, (147, 301), dtype=np.uint8)
    nearest = Image.fromarray(mask).resize((128, 128), Image.Resampling.NEAREST)
    ours = upernet.preprocess_mask(torch.from_numpy(mask), MINI)
    assert ours.dtype == torch.float32 and np.array_equal(ours[0].numpy(), np.asarray(nearest))
    for classes in (1, 5):
        logits = torch.randn(classes, 128, 128)
        ours = UPerNet(MINI).postprocess(logits, (147, 301))
        up = F.interpolate(logits[None], (147, 301), mode="bilinear", align_corners=False)[0]
        expected = up.exp() / up.exp().sum(0) if classes > 1 else 1 / (1 + (-up).exp())
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


# --- real weights --------------------------------------------------------------------------------

PUBLISHED = {  # the first and the third row; the second is the first again
    "tiny": ((-8.8110, -8.8110, -8.6521), (-8.7746, -8.7746, -8.6130)),
    "small": ((-8.8236, -8.8236, -8.6771), (-8.7638, -8.7638, -8.6240)),
    "base": ((-8.8558, -8.8558, -8.6905), (-8.7669, -8.7669, -8.6021)),
    "large": ((-8.6660, -8.6660, -8.6210), (-8.6310, -8.6310, -8.5964)),
    "xlarge": ((-8.4980, -8.4980, -8.3977), (-8.4379, -8.4379, -8.3412)),
}


@pytest.mark.online
@pytest.mark.parametrize("size", PUBLISHED)
@torch.no_grad()
def test_published_numbers_of_the_real_weights(size):
    """transformers, convert_convnext_upernet_to_pytorch.py: what mmsegmentation's weights gave."""
    from huggingface_hub import constants, hf_hub_download
    from test_online import reach

    reach(constants.ENDPOINT)
    images = {"repo_id": "hf-internal-testing/fixtures_ade20k", "repo_type": "dataset"}
    path = hf_hub_download(filename="ADE_val_00000001.jpg", **images)
    model = UPerNet.from_pretrained(f"openmmlab/upernet-convnext-{size}")
    assert model.config == upernet.VARIANTS[f"convnext-{size}"]
    logits = model(model.preprocess(Image.open(path))[None])
    assert logits.shape == (1, 150, 512, 512)
    first, third = PUBLISHED[size]
    expected = torch.tensor([first, first, third])
    torch.testing.assert_close(logits[0, 0, :3, :3], expected, rtol=0, atol=1e-4)
