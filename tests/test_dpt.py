"""DPT against transformers, loaded by the real loading code."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, shapes
from forms.dpt import (
    DEPTH,
    LARGE,
    MINI,
    NAMES,
    UNUSED,
    filled,
    hub_2022,
    run_folder,
    theirs,
    without_unused,
)
from PIL import Image
from recipe import fill
from safetensors.torch import save_file
from torch import nn
from transformers import (
    DPTForSemanticSegmentation,
    DPTImageProcessorPil,
    DPTModel,
)

import dpt
from dpt import DPT

pytestmark = pytest.mark.numeric


OFFICIAL = f"transformers {transformers.__version__}"


def official(ours: DPT) -> DPTForSemanticSegmentation:
    """transformers' class with our weights; what it does not use is NaN."""
    model = theirs(ours.config).to(next(ours.parameters()).dtype)
    missing, unexpected = model.load_state_dict(dpt.to_official(ours.state_dict()), strict=False)
    assert not unexpected
    unused = {n for n in model.state_dict() if re.fullmatch(UNUSED, n)}
    assert set(missing) == {n for n in unused if "num_batches" not in n}  # torch fills those in
    for name, p in model.named_parameters():
        if name in missing:
            nn.init.constant_(p, float("nan"))
    return model


def randomised(config: dpt.Config) -> DPT:
    model = DPT(config).eval()
    model.load_state_dict(filled(model))
    return model


@pytest.fixture(scope="module")
def mini():
    return randomised(MINI)


def close(ours, theirs, relative=1e-5):
    """To a part of the scale of what is expected."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("norm", [True, False], ids=["batch norm", "biases"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_outputs_and_all_gradients_equal_transformers(training, norm, parity):
    """In float64: in float32 a value beside the kink of a ReLU may lie on either side of it."""
    torch.manual_seed(0)
    dtype = torch.float64
    ours = randomised(replace(MINI, fusion_norm=norm)).to(dtype).train(training)
    hub = official(ours).train(training)
    for module in (*ours.modules(), *hub.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it draws differently where an auxiliary head draws too
    image, weight = torch.randn(2, 3, 64, 64, dtype=dtype), torch.randn(2, 4, 64, 64, dtype=dtype)
    logits, expected = ours(image), hub(image).logits
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    close(logits, expected, 1e-9)

    gradients = dpt.to_official({n: p.grad for n, p in ours.named_parameters()})
    worst, scale = 0.0, max(g.abs().max().item() for g in gradients.values())
    for name, p in hub.named_parameters():
        if re.fullmatch(UNUSED, name):
            assert p.grad is None and name not in gradients
            continue
        # The gradients of keys' biases and of those before a batch norm are zero but for rounding.
        error = (gradients.pop(name) - p.grad).abs().max() / max(p.grad.abs().max(), 1e-3 * scale)
        assert error <= 1e-8, name
        worst = max(worst, error.item())
    assert not gradients
    buffers = dpt.to_official(dict(ours.named_buffers()))
    for name, t in hub.named_buffers():  # running statistics
        if name in buffers:
            close(buffers.pop(name).double(), t.double(), 1e-9)
    assert not buffers
    error = (logits - expected).abs().max() / expected.abs().max()
    print(f"logits {error:.1e}, gradients {worst:.1e}")
    if norm and not training:
        parity("dpt", "mini, logits", OFFICIAL, float64=error)
        parity("dpt", "mini, every gradient by its own size", OFFICIAL, float64=worst)


@pytest.mark.parametrize("side", [480, 384, 288, 240, 80])
@torch.no_grad()
def test_any_square_equals_transformers(mini, side):
    image = torch.randn(1, 3, side, side)
    expected = official(mini)(image).logits
    assert expected.shape[-1] == side + side % 32  # an odd number of patches is rounded up
    close(mini(image), expected)


@pytest.mark.parametrize("size", [(64, 128), (160, 96), (64, 256), (80, 112)])
@torch.no_grad()
def test_what_is_not_square_equals_transformers_parts_with_the_true_grid(mini, size):
    """transformers' own forward passes no grid on and takes the root of the number of tokens."""
    image, hub = torch.randn(2, 3, *size), official(mini)
    states = hub.dpt(image, output_hidden_states=True).hidden_states[1:]
    taps = [states[i] for i in MINI.taps]
    expected = hub.head(hub.neck(taps, size[0] // 16, size[1] // 16))
    logits = mini(image)
    close(logits, expected)
    assert logits.shape == (2, 4, *(side + side % 32 for side in size))


@torch.no_grad()
def test_a_turned_image_is_another_image_of_the_same_model(mini):
    """With all that knows directions made symmetric, transposing an image transposes the logits."""
    model = DPT(MINI).eval()
    state = mini.state_dict()
    for name, t in state.items():
        if t.ndim == 4:
            state[name] = t + t.transpose(2, 3)
    table = state["vit.pos_embed"][:, 1:].unflatten(1, (MINI.grid, MINI.grid))
    state["vit.pos_embed"][:, 1:] = (table + table.transpose(1, 2)).flatten(1, 2)
    model.load_state_dict(state)
    image = torch.randn(1, 3, 96, 160)
    close(model(image.transpose(2, 3)), model(image).transpose(2, 3))


def equal_with_gradients(ours, plain, inputs):
    """Outputs and the gradients of all inputs agree, in float64."""
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, weights)
    for a, b in zip(torch.autograd.grad(ours, inputs, weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_readout_is_a_linear_layer_of_each_token_beside_the_class_token():
    """Against the plain lines in the docstring of `project_readout`."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 5).double()
    tokens = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    patches = tokens[:, 1:]
    class_token = tokens[:, :1]
    plain = linear(torch.cat([patches, class_token.expand_as(patches)], 2))
    inputs = (tokens, linear.weight, linear.bias)
    equal_with_gradients(dpt.project_readout(tokens, linear), plain, inputs)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3)])
def test_a_1x1_convolution_may_go_before_the_upsampling(size):
    """Against the plain lines in the docstring of `upsampled_conv1x1`."""
    torch.manual_seed(0)
    conv1x1 = nn.Conv2d(4, 3, 1).double()
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    plain = conv1x1(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
    inputs = (x, conv1x1.weight, conv1x1.bias)
    equal_with_gradients(dpt.upsampled_conv1x1(x, conv1x1), plain, inputs)


def test_sides_that_are_no_multiples_of_16_are_refused(mini):
    with pytest.raises(ValueError, match=r"multiples of 16, not \(64, 72\)"):
        mini(torch.zeros(1, 3, 64, 72))


def test_a_new_model_learns():
    torch.manual_seed(0)
    model = DPT(MINI).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        squares = torch.randn(4, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
        mask = (squares > 0).long() + 2 * (torch.arange(64) > 31)
        image = squares[:, None] + 0.1 * torch.randn(4, 3, 64, 64)
        loss = F.cross_entropy(model(image), mask)
        optimizer.zero_grad()
        loss.backward()
        assert all(0 < p.grad.norm() < 100 for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


# --- the official size ---------------------------------------------------------------------------

KEYS = json.loads((ROOT / "tests/golden/dpt_keys.json").read_text())  # of Intel/dpt-large-ade


def test_the_hub_s_names_and_shapes():
    with torch.device("meta"):
        hub = theirs(dpt.VARIANTS["large-ade"]).state_dict()
    assert {n: tuple(shape) for n, shape in KEYS["keys"]} == shapes(hub)


def test_numbers_of_parameters():
    """Those of the facts, 343,960,364 and for depth 343,030,465, less what is not used."""
    unused = 2 * 1024 + 2 * 256 * 256 * 9  # norm; convolutions of the deepest fusion
    head = 256 * 256 * 9 + 512 + 257 * 150
    depth_head = (256 * 9 + 1) * 128 + (128 * 9 + 1) * 32 + 33
    numbers = {"large-ade": 343_960_364 - unused - 4 * 256 - head}
    numbers["large"] = 343_030_465 - unused - 2 * 256 - depth_head + head
    for variant, number in numbers.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in DPT(dpt.VARIANTS[variant]).parameters()) == number


@pytest.mark.parametrize(
    "side",
    [pytest.param(288, marks=pytest.mark.parity), pytest.param(480, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_dpt_large_ade_equals_transformers(side, tmp_path, parity):
    """All 536 tensors of the hub's file, through the real file and loader."""
    with torch.device("meta"):
        hub = theirs(dpt.VARIANTS["large-ade"])
    state = {n: torch.from_numpy(fill(n, tuple(t.shape))) for n, t in hub.state_dict().items()}
    state = {n: t.long() if n in KEYS["int64"] else t for n, t in state.items()}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hub.config.to_dict()))
    hub.load_state_dict(state, assign=True)
    ours = DPT.from_pretrained(tmp_path)
    assert ours.config == dpt.VARIANTS["large-ade"] and not ours.training
    (tmp_path / "model.safetensors").unlink()
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
    logits, expected = ours(image), hub(image).logits
    assert logits.shape == (1, 150, side, side)
    error = (logits - expected).abs().max() / expected.abs().max()
    print(f"logits differ by {error:.1e}")
    close(logits, expected)
    if side == 288:
        parity("dpt", "large-ade, logits at 288 px", OFFICIAL, float32=error)


# --- files ---------------------------------------------------------------------------------------

FORMS = (*NAMES,)
OTHERS = FORMS[:-1]


def name_of(x):
    return getattr(x, "__name__", None)


@pytest.mark.parametrize("form", OTHERS, ids=name_of)
@torch.no_grad()
def test_a_checkpoint_for_depth_gets_a_new_head(form, tmp_path, capsys):
    state = filled(theirs(LARGE, DEPTH))
    source = form(NAMES[form](state), LARGE, tmp_path)
    with pytest.raises(ValueError, match=r"no tensor head\.\*; num_classes=") as caught:
        DPT.from_pretrained(source)
    assert "\n" not in str(caught.value)
    capsys.readouterr()
    model = DPT.from_pretrained(source, num_classes=3)
    assert model.config == replace(LARGE, num_classes=3)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2
    assert "using the usual " in printed and "image_size 384; neither" in printed
    assert printed.endswith("new and untrained: head.head.0, head.head.1, head.head.4\n")
    loaded = dpt.to_official(model.state_dict())
    new = {name for name in loaded if name.startswith("head.")}
    assert set(loaded) - new == {n for n in without_unused(state) if not n.startswith("head.")}
    for name in set(loaded) - new:
        assert torch.equal(loaded[name], state[name]), name
    assert loaded["head.head.0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not loaded["head.head.4.bias"].any() and (loaded["head.head.1.weight"] == 1).all()
    # Behind the neck the segmentation model sees what the one for depth sees.
    hub, image = theirs(LARGE, DEPTH), torch.randn(1, 3, 64, 64)
    hub.load_state_dict(state)
    seen = []
    hub.neck.register_forward_hook(lambda _, x, y: seen.append(y[-1]))
    model.head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    hub(image), model(image)
    close(seen[1], seen[0])


def test_new_parameters_are_drawn_in_the_order_of_the_state_dict(tmp_path, monkeypatch):
    """So that a seed decides them; the order of a set differs from process to process."""
    drawn = []
    initial_value = dpt.initial_value

    def record(name, tensor):
        drawn.append(name)
        return initial_value(name, tensor)

    monkeypatch.setattr(dpt, "initial_value", record)
    source = hub_2022(filled(theirs(LARGE, DEPTH)), LARGE, tmp_path)
    model = DPT.from_pretrained(source, num_classes=3)
    names = list(dpt.to_official(model.state_dict()))
    assert drawn == [name for name in names if name.startswith("head.")]


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_other_classes_get_a_new_classifier(form, tmp_path, capsys):
    state = filled(theirs(MINI))
    source = form(NAMES[form](state), MINI, tmp_path)
    same = DPT.from_pretrained(source, num_classes=4)
    assert "untrained" not in capsys.readouterr().out
    assert torch.equal(same.head[4].weight, state["head.head.4.weight"])
    torch.manual_seed(0)
    model = DPT.from_pretrained(source, num_classes=1, threshold=0.3)
    assert capsys.readouterr().out.endswith("new and untrained: head.head.4\n")
    assert (model.config.num_classes, model.config.threshold) == (1, 0.3)
    assert model.head[4].weight.std().item() == pytest.approx(0.02, rel=0.4)  # of 32 numbers
    assert not model.head[4].bias.any()
    for name, t in dpt.to_official(model.state_dict()).items():
        assert name.startswith("head.head.4.") or torch.equal(t, state[name]), name


def test_an_encoder_alone_gets_a_new_neck_too(tmp_path, capsys):
    hub = theirs(replace(LARGE, fusion_dim=16), DPTModel)
    hub.load_state_dict(filled(hub))
    hub.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no tensor neck\.\*; num_classes="):
        DPT.from_pretrained(tmp_path)
    capsys.readouterr()
    model = DPT.from_pretrained(tmp_path, num_classes=3)
    assert model.config == replace(LARGE, fusion_dim=16, num_classes=3)  # by its config.json
    printed = capsys.readouterr().out
    assert "neck.convs.0" in printed and "head.head.4" in printed and "dpt." not in printed
    loaded, state = dpt.to_official(model.state_dict()), hub.state_dict()
    for name, t in loaded.items():
        if name.startswith("dpt."):
            assert torch.equal(t, state[name.removeprefix("dpt.")]), name
    assert torch.equal(model.vit.blocks[7].fc2.bias, state["encoder.layer.7.output.dense.bias"])


def test_settings_that_no_tensor_tells_come_from_config_json(tmp_path):
    config = replace(MINI, taps=(0, 2, 4, 6), heads=4, eps=1e-3, image_size=480)
    hub = theirs(config, layer_norm_eps=1e-3)
    hub.load_state_dict(filled(hub))
    hub.save_pretrained(tmp_path)
    model = DPT.from_pretrained(tmp_path)
    assert model.config == config
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        close(model(image), hub(image).logits)


def test_a_file_without_counters_of_batches_is_whole(tmp_path):
    state = {n: t for n, t in filled(theirs(MINI)).items() if "num_batches" not in n}
    model = DPT.from_pretrained(hub_2022(state, MINI, tmp_path))
    assert torch.equal(model.head[1].running_mean, state["head.head.1.running_mean"])


def test_other_models_are_refused(tmp_path):
    save_file({"decode_head.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no tensor dpt.encoder.layer") as caught:
        DPT.from_pretrained(tmp_path, num_classes=2)
    assert "\n" not in str(caught.value)
    run_folder(filled(theirs(MINI)), MINI, tmp_path, **{"class": "BEiT"})
    with pytest.raises(ValueError, match="holds BEiT in format 1, not DPT"):
        DPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "part", ["neck.convs.1.weight", "neck.reassemble_stage.layers.3.resize.bias"]
)
def test_a_hole_in_the_neck_is_not_filled(part, tmp_path):
    state = filled(theirs(LARGE, DEPTH))
    state.pop(part)  # where a new head is welcome
    with pytest.raises(ValueError, match=f": 1 tensors do not fit: {part} is missing"):
        DPT.from_pretrained(hub_2022(state, LARGE, tmp_path), num_classes=2)


# --- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["large-ade", "large"])
def test_preprocessing_is_the_official_one(variant, real_data):
    config = dpt.VARIANTS[variant]
    side = config.image_size
    size = {"height": side, "width": side}
    processor = DPTImageProcessorPil(size=size, resample=Image.Resampling.BILINEAR)
    for folder in ("kvasir_polyp", "isic2017_skin", "ct_gi"):
        path = min((real_data / folder / "images").rglob("*.*"))
        image = Image.open(path)
        expected = processor(image.convert("RGB"), return_tensors="pt").pixel_values[0]
        ours = DPT(replace(MINI, image_size=side)).preprocess(image)
        assert ours.shape == (3, side, side) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_masks_there_and_back():
    mask = np.random.default_rng(0).integers(0, 4, (147, 301)).astype(np.uint8)
    nearest = Image.fromarray(mask).resize((96, 96), Image.Resampling.NEAREST)
    ours = dpt.preprocess_mask(torch.from_numpy(mask), MINI)
    assert ours.dtype == torch.float32 and np.array_equal(ours[0].numpy(), np.asarray(nearest))
    for classes in (4, 1):
        logits = torch.randn(classes, 96, 96)
        ours = DPT(MINI).postprocess(logits, (147, 301))
        up = F.interpolate(logits[None], (147, 301), mode="bilinear", align_corners=False)[0]
        expected = up.exp() / up.exp().sum(0) if classes > 1 else 1 / (1 + (-up).exp())
        close(ours, expected)


# --- real weights --------------------------------------------------------------------------------


@pytest.mark.online
@torch.no_grad()
def test_published_numbers_of_the_real_weights(tmp_path):
    """transformers, convert_dpt_to_pytorch.py: what the original code gave for the two cats."""
    from test_online import CATS, picture

    image = picture(CATS, tmp_path)
    model = DPT.from_pretrained("Intel/dpt-large-ade")
    assert model.config == dpt.VARIANTS["large-ade"]
    logits = model(model.preprocess(image)[None])
    assert logits.shape == (1, 150, 480, 480)
    expected = [[4.0480, 4.2420, 4.4360], [4.3124, 4.5693, 4.8261], [4.5768, 4.8965, 5.2163]]
    torch.testing.assert_close(logits[0, 0, :3, :3], torch.tensor(expected), rtol=0, atol=1e-3)


@pytest.mark.online
def test_the_checkpoint_for_depth_loads_from_the_hub():
    from huggingface_hub import constants
    from test_online import reach

    reach(constants.ENDPOINT)
    model = DPT.from_pretrained("Intel/dpt-large", num_classes=4)
    assert model.config == replace(dpt.VARIANTS["large"], num_classes=4)
