"""Swin UNETR against MONAI and stored outputs of its older versions, with the real loading code."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, close, shapes, write_run
from forms.swin_unetr3d import MINI, hub, official_state, release, run_folder, theirs
from monai.networks.nets import SwinUNETR as Official
from monai.networks.nets import swin_unetr as official_file
from monai.transforms import NormalizeIntensity, ScaleIntensityRange
from recipe import fill

import swin_unetr3d
from swin_unetr3d import SwinUNETR

pytestmark = pytest.mark.numeric

KEYS = json.loads((ROOT / "tests/golden/monai_keys.json").read_text())


def filled(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of MONAI's names whose tensors all do something."""
    state = {n: torch.from_numpy(fill(n, tuple(s), seed)) for n, s in shapes.items()}
    index = Official(1, 2, feature_size=12).swinViT.layers1[0].blocks[0].attn
    index = index.relative_position_index
    return {n: index.clone() if n.endswith("_index") else t for n, t in state.items()}


def randomised(model: SwinUNETR) -> SwinUNETR:
    state = filled(shapes(swin_unetr3d.to_official(model.state_dict())))
    model.load_state_dict(swin_unetr3d.convert(state))
    return model


@pytest.fixture(scope="module")
def mini():
    return randomised(SwinUNETR(MINI)).eval()


# --- the same numbers as MONAI -------------------------------------------------------------------

MERGING = replace(MINI, merging="merging")
LIVE = [  # stages of 32, 16, 8, 4 tokens a side and less: windows of 7, padded, shifted, and of 4
    (MERGING, (64, 32, 32)),
    (replace(MINI, merging="merging", v2=True), (32, 64, 32)),
    (replace(MINI, merging="mergingv2", in_channels=4, num_classes=1), (96, 32, 32)),
    (replace(MINI, merging="legacy", feature_size=24), (32, 32, 64)),
]
IDS = ["merging", "merging-v2", "mergingv2", "legacy-24"]
SLOW = "mergingv2", "legacy-24"  # the goldens, too, have both orders
CASES = [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW))
    for case, name in zip(LIVE, IDS, strict=True)
]


@pytest.mark.parity
@pytest.mark.parametrize("config, size", CASES)
def test_outputs_and_all_gradients_equal_monai(config, size, parity):
    """In float64. Without gradients the decoder goes another way, which is compared too."""
    ours, official = randomised(SwinUNETR(config)).double(), theirs(config).double()
    official.load_state_dict(swin_unetr3d.to_official(ours.state_dict()))
    generator = torch.Generator().manual_seed(1)
    volume = torch.randn(1, config.in_channels, *size, generator=generator).double()
    mine, their_volume = volume.clone().requires_grad_(), volume.clone().requires_grad_()
    logits, expected = ours(mine), official(their_volume)
    weight = torch.randn_like(expected)
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    with torch.no_grad():
        alone = ours(volume)
    assert logits.shape == alone.shape == (1, config.num_classes, *size)
    scale = expected.abs().max().item()
    errors = [(x - expected).abs().max().item() / scale for x in (logits, alone)]
    gradients = {n: p.grad for n, p in ours.named_parameters()}
    gradients = swin_unetr3d.to_official(gradients) | {"volume": mine.grad}
    reference = {n: p.grad for n, p in official.named_parameters()}
    reference |= {"volume": their_volume.grad}
    worst = {}
    for name, g in reference.items():
        worst[name] = (gradients[name] - g).abs().max().item() / g.abs().max().item()
    print(f"logits {max(errors):.1e} of {scale:.1f}, gradients {max(worst.values()):.1e}")
    assert max(errors) <= 1e-6, first_difference(ours, official, volume)
    assert max(worst.values()) <= 1e-6, max(worst, key=worst.get)
    if config == MERGING:
        parity("swin_unetr3d", "mini, logits", "MONAI 1.6.1", float64=max(errors))
        gradient = max(worst.values())
        parity("swin_unetr3d", "mini, all gradients", "MONAI 1.6.1", float64=gradient)


@torch.no_grad()
def first_difference(ours: SwinUNETR, official, volume) -> str:
    """The first map that differs, for the message of a failure."""
    names = [
        "swinViT",
        *["encoder10", "decoder5", "decoder4", "decoder3", "decoder2", "decoder1", "out"],
    ]
    outputs = {}
    for model in (ours, official):
        for name in names:
            hook = lambda _, x, y, key=(model is ours, name): outputs.update({key: y})  # noqa: E731
            model.get_submodule(name).register_forward_hook(hook)
        model(volume)
    for name in names:
        a, b = outputs[True, name], outputs[False, name]
        pairs = zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]
        for i, (x, y) in enumerate(pairs):
            if not torch.allclose(x, y, rtol=0, atol=1e-5 * y.abs().max().item()):
                return f"{name}, output {i}, differs by {(x - y).abs().max():.1e}"
    return "all maps agree"


GOLDEN = ROOT / "tests/golden/monai_swinunetr.npz"
PARTS = {"swinViT.4": (slice(None),) * 3, "swinViT.2": (slice(0, None, 2), slice(1, None, 2))}
PARTS["swinViT.2"] += (slice(0, None, 2),)
PARTS["logits"] = (slice(1, None, 4), slice(2, None, 4), slice(3, None, 4))


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["legacy", "merging", "mergingv2", "legacy_v2", "merging_v2"])
@torch.no_grad()
def test_golden_outputs_through_the_loader(variant, tmp_path, capsys, parity):
    """MONAI 1.3.2 and 1.6.1; the file is named as the released one, whose merging is legacy."""
    golden = np.load(GOLDEN)
    meta, v2 = json.loads(str(golden["meta"])), variant.endswith("_v2")
    keys = {n: s for n, s, _ in json.loads(str(golden["keys"])) if v2 or "c.0.layer" not in n}
    state = filled(keys, meta["seed"])
    index = [n for n in golden.files if n.startswith("buffers/")]
    assert len(index) == 8
    for name in index:
        state[name.removeprefix("buffers/")] = torch.from_numpy(golden[name])
    path = tmp_path / "swin_unetr.small_5000ep_f24_lr2e-4_pretrained.pt"
    torch.save({"epoch": 1, "state_dict": state}, path)
    merging = variant.removesuffix("_v2")
    told = {} if merging == "legacy" else {"merging": merging}
    model = SwinUNETR.from_pretrained(path, **told)
    assert model.config == swin_unetr3d.Config(24, v2=v2, merging=merging, **swin_unetr3d.BTCV)
    assert ("merging legacy, by its name" in capsys.readouterr().out) == (not told)
    maps = []
    model.swinViT.register_forward_hook(lambda _, x, y: maps.extend(y))
    logits = model(torch.from_numpy(golden["in/image"]))
    found = {"swinViT.4": maps[4], "swinViT.2": maps[2], "logits": logits}
    for name, x in found.items():
        expected = torch.from_numpy(golden[f"out/{variant}/{name}"])
        error = (x[(..., *PARTS[name])] - expected).abs().max().item()
        limit = 4 * meta["float32_vs_float64_max_abs"][f"{variant}/{name}"]
        print(f"{variant} {name} differs by {error:.1e} of {expected.abs().max():.1f}")
        assert error <= limit, f"{name} differs by {error:.1e}, more than {limit:.1e}"
    if variant in ("legacy", "legacy_v2"):
        kind = "small" if variant == "legacy" else "small-v2"
        deviation = error / expected.abs().max().item()
        parity("swin_unetr3d", f"{kind}, logits", "MONAI 1.3.2", float32=deviation)
    total = torch.from_numpy(golden[f"out/{variant}/logits_sum"])
    # The means, of all voxels: a last bit that is everywhere the same adds up in a sum. The norms'
    # means and deviations are each rounded once for all voxels: some 1e-7 a layer.
    n = logits[0, 0].numel()
    close(logits.double().mean((2, 3, 4)), total / n, 1e-6 * logits.abs().max().item())


def test_indices_and_masks_are_monai_s():
    attention = Official(1, 2, feature_size=12).swinViT.layers1[0].blocks[1].attn
    assert torch.equal(swin_unetr3d.position_index(), attention.relative_position_index)
    masks = swin_unetr3d.shift_masks()
    for window, grid in (((7, 7, 7), (3, 2, 2)), ((7, 4, 7), (2, 1, 3)), ((3, 2, 7), (1, 1, 2))):
        shifts = tuple(3 if n > 1 else 0 for n in grid)
        sides = [w * n for w, n in zip(window, grid, strict=True)]
        expected = official_file.compute_mask(sides, window, shifts, "cpu")
        N = expected.shape[1]
        ours = torch.ones(1, 1, *grid, N, N)
        for part, mask in swin_unetr3d.windows_by_mask(window, shifts):
            ours[part] *= masks[mask].reshape(N, N)
        assert torch.equal(ours.view(-1, N, N), expected)


@pytest.mark.parametrize("slope", [0.01, 1.0])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("has_way_round", [True, False])
def test_a_norm_and_its_gradients_equal_torch_s(has_way_round, format, slope):
    generator = torch.Generator().manual_seed(0)
    x, around, weight = torch.randn(3, 2, 5, 4, 3, 6, generator=generator).double()
    x = (3 * x + 5).contiguous(memory_format=format).requires_grad_()
    around = around.requires_grad_() if has_way_round else None
    inputs = [t for t in (x, around) if t is not None]
    y = swin_unetr3d.NormAddReLU.apply(x.clone(), around, slope)
    expected = F.instance_norm(x)
    expected = F.leaky_relu(expected + around if has_way_round else expected, slope)
    close(y, expected, 1e-12)
    for pair in zip(*(torch.autograd.grad(t, inputs, weight) for t in (y, expected)), strict=True):
        close(*pair, 1e-12)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_a_norm_of_many_voxels_is_exact(dtype, limit):
    """torch's own batch norm is off by 4e-4 here, with channels last in float32 on the CPU.

    The results reach 6, where the last bit is 5e-7: the limit allows for some of them.
    """
    x = torch.randn(1, 12, 64, 64, 64, generator=torch.Generator().manual_seed(0)).add_(1).to(dtype)
    expected = F.instance_norm(x.double())
    x = x.contiguous(memory_format=torch.channels_last_3d)
    close(swin_unetr3d.NormAddReLU.apply(x, None, 1.0).double(), expected, limit)


@torch.no_grad()
def test_a_norm_of_few_grey_levels_is_exact():
    """Added up one by one, such numbers all round the same way: 4e-5 off in long rows."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 16, (1, 1, 96, 96, 96), generator=draw) / 16
    x = x * torch.randn(1, 12, 1, 1, 1, generator=draw)
    expected = F.instance_norm(x.double())
    x = x.contiguous(memory_format=torch.channels_last_3d)
    close(swin_unetr3d.NormAddReLU.apply(x, None, 1.0).double(), expected, 1e-5)


def test_what_other_devices_compute_fits_together():
    """Only shapes and types: off the CPU, norms take another way."""
    with torch.device("meta"):
        model = SwinUNETR(MINI)
        logits = model(torch.empty(2, 1, 64, 32, 32))
        logits.sum().backward()
    assert logits.shape == (2, 3, 64, 32, 32)
    x = torch.randn(2, 3, 4, 5, 6)
    found = swin_unetr3d.mean_and_variance(x)
    elsewhere = swin_unetr3d.mean_and_variance(x.to("meta"))
    assert [t.shape for t in found] == [t.shape for t in elsewhere]
    var, mean = torch.var_mean(x.double(), (2, 3, 4), correction=0, keepdim=True)
    close(found[0], mean, 1e-6)
    close(found[1], var, 1e-6)


class Elsewhere(torch.Tensor):
    """On the CPU, but says that it is not: the way of GPUs."""

    device = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_are_not_of_half_precision(dtype):
    x = (400 * torch.randn(2, 3, 5, 6, 7) + 1000).to(
        dtype
    )  # a variance that float16 has no room for
    mean, var = swin_unetr3d.mean_and_variance(x.as_subclass(Elsewhere))
    whole = torch.var_mean(x.double(), (2, 3, 4), correction=0, keepdim=True)
    for found, expected in zip((var, mean), whole, strict=True):
        assert (found.as_subclass(torch.Tensor).double() / expected - 1).abs().max() < 1e-5


def test_pointwise_and_transposed_convolutions_equal_torch_s():
    x = torch.randn(2, 5, 3, 4, 6).double()
    weight, bias = torch.randn(7, 5, 1, 1, 1).double(), torch.randn(7).double()
    close(swin_unetr3d.pointwise(x, weight, bias), F.conv3d(x, weight, bias), 1e-12)
    weight = torch.randn(5, 7, 2, 2, 2).double()
    close(swin_unetr3d.upsampled(x, weight), F.conv_transpose3d(x, weight, stride=2), 1e-12)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_an_up_block_equals_the_plain_lines(with_gradients):
    torch.manual_seed(0)
    block = swin_unetr3d.UpBlock(6, 4).double()
    x, skip = torch.randn(2, 6, 4, 3, 5).double(), torch.randn(2, 4, 8, 6, 10).double()
    with torch.set_grad_enabled(with_gradients):
        y = block(x, skip)
        expected = block.conv_block(torch.cat((block.transp_conv(x), skip), 1))
    close(y, expected, 1e-12)


@pytest.mark.parametrize("size", [(2, 3, 4), (1, 1, 2)])
def test_a_convolution_of_an_enlarged_map(size):
    x = torch.randn(2, 5, *size).double()
    up, weight = torch.randn(5, 4, 2, 2, 2).double(), torch.randn(4, 4, 3, 3, 3).double()
    expected = F.conv3d(F.conv_transpose3d(x, up, stride=2), weight, padding=1)
    y = torch.randn_like(expected)
    expected = expected + y
    swin_unetr3d.add_upsampled_conv(y, x, up, weight)
    close(y, expected, 1e-12)


def test_checkpointed_activations_change_no_number(mini):
    volume, results = torch.randn(1, 1, 64, 32, 32), []
    model = SwinUNETR(MINI)
    model.load_state_dict(mini.state_dict())
    calls = []
    model.encoder1.register_forward_pre_hook(lambda *_: calls.append(1))
    for model.checkpointing in (False, True):
        model.zero_grad()
        logits = model(volume)
        logits.square().mean().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
    assert len(calls) == 3  # the second time again for the gradients
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_volumes_of_a_batch_do_not_see_each_other(mini):
    volumes = torch.randn(2, 1, 32, 64, 32)
    together, alone = mini(volumes), torch.cat([mini(volume[None]) for volume in volumes])
    close(together, alone, 1e-5 * alone.abs().max().item())


def test_training_after_inference_mode(mini):
    """What is made once serves both."""
    volume = torch.randn(1, 1, 64, 32, 32)
    with torch.inference_mode():
        expected = mini(volume)
    logits = mini(volume)
    logits.sum().backward()
    close(logits, expected, 1e-5 * expected.abs().max().item())
    assert all(p.grad.isfinite().all() for p in mini.parameters())
    mini.zero_grad()


def test_half_precision_of_training_programs(mini):
    """Autocast: no operation stumbles over two types, and the result is that of half precision."""
    volume, outputs = torch.randn(1, 1, 64, 32, 32), []
    weight = torch.randn(1, 3, 64, 32, 32)
    for enabled in (True, False):
        mini.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = mini(volume)
        (logits.float() * weight).sum().backward()
        gradients = mini.out.weight.grad, mini.decoder1.transp_conv.weight.grad
        outputs.append((logits.float(), *gradients))
    mini.zero_grad()
    for half, whole in zip(*outputs, strict=True):
        assert (half - whole).std() < 0.2 * whole.std()


@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_attention_and_its_gradients_equal_the_formula(dtype, limit):
    """Window by window, without groups, in float64. Half precision keeps float32 biases."""
    generator = torch.Generator().manual_seed(0)
    window, shifts, (h, d) = (7, 2, 7), (3, 0, 3), (3, 4)
    masks = swin_unetr3d.shift_masks()
    qkv = torch.randn(2, 14, 4, 21, 3 * h * d, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(h, 98, 98, generator=generator)
    bias = bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    weight = torch.randn(2, 14, 4, 21, h * d, generator=generator).to(dtype)
    y = swin_unetr3d.WindowAttentionFunction.apply(qkv, bias, masks, window, shifts)
    found = [y, *torch.autograd.grad(y, (qkv, bias), weight)]

    exact, exact_bias = (x.detach().double().requires_grad_() for x in (qkv, bias))
    mask = official_file.compute_mask((14, 4, 21), window, shifts, "cpu").double()  # (12,98,98)
    cut = official_file.window_partition(exact, window)  # (2*12,98,3*h*d)
    q, k, v = cut.view(-1, 98, 3, h, d).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / d**0.5 + exact_bias + mask.repeat(2, 1, 1)[:, None]
    rows = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, *window, h * d)
    expected = official_file.window_reverse(rows, window, (2, 14, 4, 21))
    expected = [expected, *torch.autograd.grad(expected, (exact, exact_bias), weight.double())]
    for ours, reference in zip(found, expected, strict=True):
        assert (ours.double() - reference).abs().max() < limit * reference.abs().max()


# --- names ---------------------------------------------------------------------------------------


def meta(keys) -> dict[str, torch.Tensor]:
    return {n: torch.empty([1] if s is None else s, device="meta") for n, s in keys}


def test_names_are_those_of_the_released_files():
    brats = dict(KEYS["swin_unetr_f48_v1"]) | dict(KEYS["swin_unetr_f48_brats21_changed"])
    files = {"base": KEYS["swin_unetr_f48_v1"], "base-v2": KEYS["swin_unetr_f48_v2"]}
    for variant, keys in (files | {"brats21": brats.items()}).items():
        with torch.device("meta"):
            ours = SwinUNETR(swin_unetr3d.VARIANTS[variant]).state_dict()
        assert shapes(swin_unetr3d.convert(meta(keys))) == shapes(ours)
        assert shapes(swin_unetr3d.to_official(ours)) == {n: tuple(s) for n, s in keys}
    with torch.device("meta"):
        ours = SwinUNETR(swin_unetr3d.VARIANTS["base"]).swinViT.state_dict()
    keys = [(n.removeprefix("module."), s) for n, s in KEYS["ssl_model_swinvit"]]
    encoder = {f"swinViT.{n}": s for n, s in shapes(ours).items()}
    assert len(keys) == 134 and shapes(swin_unetr3d.convert(meta(keys))) == encoder


# --- files ---------------------------------------------------------------------------------------


# A form of a checkpoint: how it is written into a folder.


@pytest.mark.parametrize("merging", ["legacy", "merging", "mergingv2"])
def test_what_tells_the_merging(mini, merging, tmp_path, capsys):
    """A keyword, else config.json, else a name, else nothing: legacy."""
    state = official_state(mini)
    source = hub(state, tmp_path)
    model = SwinUNETR.from_pretrained(source, merging=merging)
    assert model.config.merging == merging and capsys.readouterr().out == ""
    (tmp_path / "config.json").write_text(json.dumps({"merging": merging}))
    assert SwinUNETR.from_pretrained(source).config.merging == merging
    assert f"merging {merging}, as config.json says" in capsys.readouterr().out
    (tmp_path / "config.json").unlink()
    assert SwinUNETR.from_pretrained(source).config.merging == "legacy"
    assert "merging legacy, the default for unknown names" in capsys.readouterr().out
    folder = tmp_path / "run"
    write_run(folder, SwinUNETR, mini.state_dict(), replace(MINI, merging=merging))
    assert SwinUNETR.from_pretrained(folder).config.merging == merging
    assert capsys.readouterr().out == ""


def test_a_fold_of_brats21_is_known_by_its_folder(tmp_path):
    config = replace(swin_unetr3d.VARIANTS["brats21"], feature_size=12)
    folder = tmp_path / "fold1_f48_ep300_4gpu_dice0_9059"
    folder.mkdir()
    state = official_state(SwinUNETR(config))
    torch.save({"epoch": 299, "state_dict": state, "best_acc": 0.9}, folder / "model.pt")
    for source in (folder, folder / "model.pt"):
        assert SwinUNETR.from_pretrained(source).config == config


def self_supervised(state) -> dict[str, torch.Tensor]:
    """MONAI's names of the encoder -> those of model_swinvit.pt, its heads beside them."""
    named = {n.removeprefix("swinViT."): t for n, t in state.items() if n.startswith("swinViT.")}
    named = {f"module.{n.replace('.linear', '.fc')}": t for n, t in named.items()}
    heads = "norm.weight norm.bias rotation_head.weight rotation_head.bias contrastive_head.weight"
    heads = [*heads.split(), "contrastive_head.bias", "convTrans3d.weight", "convTrans3d.bias"]
    return named | {f"module.{n}": torch.ones(4) for n in heads}


def todays_script(state):
    """Of research-contributions' Pretrain: names of the class, heads, a decoder `conv`."""
    named = {f"module.{n}": t for n, t in state.items() if n.startswith("swinViT.")}
    heads = "rotation_head.weight", "contrastive_head.bias", "conv.0.weight", "conv.20.bias"
    return named | {f"module.{n}": torch.ones(4) for n in heads}


def older_script(state):
    return {n.replace("swinViT.", "swin_vit."): t for n, t in todays_script(state).items()}


def autoencoder(state):
    """Disruptive Autoencoders: names that MONAI's filter takes apart."""
    named = {n.removeprefix("swinViT."): t for n, t in state.items() if n.startswith("swinViT.")}
    named = {re.sub(r"^(layers\d\.0\.)", r"\g<1>0.", n): t for n, t in named.items()}
    named = {f"encoder.{n}": t for n, t in named.items()}
    for name in ("encoder.mask_token", "encoder.norm.weight", "out.conv.conv.weight"):
        named[name] = torch.ones(3)
    return named


ENCODERS = [self_supervised, todays_script, older_script, autoencoder]


@pytest.mark.parametrize("naming", ENCODERS, ids=lambda naming: naming.__name__)
def test_an_encoder_gets_a_new_decoder(mini, naming, tmp_path, capsys):
    state, path = official_state(mini), tmp_path / "model_swinvit.pt"
    torch.save({"state_dict": naming(state)}, path)
    with pytest.raises(ValueError, match="encoder alone, without a decoder; give num_classes"):
        SwinUNETR.from_pretrained(path)
    capsys.readouterr()
    model = SwinUNETR.from_pretrained(tmp_path, num_classes=5)
    assert model.config == swin_unetr3d.Config(12, num_classes=5)
    told = "new and untrained: encoder1, encoder2, encoder3, encoder4, encoder10, decoder5"
    assert told in capsys.readouterr().out
    loaded, encoder = official_state(model), [n for n in state if n.startswith("swinViT.")]
    assert len(encoder) == 126
    for name in encoder:
        assert torch.equal(loaded[name], state[name]), name
    assert loaded["decoder1.transp_conv.conv.weight"].std() > 0


@torch.no_grad()
def test_the_self_supervised_file_as_monai_loads_it(mini, tmp_path):
    """`load_from` and the filter of MONAI are the reference; theirs merges in today's order."""
    state, config = official_state(mini), replace(MINI, merging="merging")
    weights = {"state_dict": self_supervised(state)}
    torch.save(weights, tmp_path / "model_swinvit.pt")
    ours = SwinUNETR.from_pretrained(tmp_path, num_classes=3, merging="merging")
    official = theirs(config).eval()
    official.load_from(weights)
    volume = torch.randn(1, 1, 64, 32, 32)
    maps = ours.swinViT(volume, torch.nn.Module.__call__), official.swinViT(volume)
    for a, b in zip(*maps, strict=True):
        close(a, b, 1e-5 * b.abs().max().item())
    filtered = (official_file.filter_swinunetr(n, t) for n, t in autoencoder(state).items())
    filtered = dict(x for x in filtered if x)
    assert filtered.keys() == {n for n in state if n.startswith("swinViT.")}
    assert shapes(swin_unetr3d.convert(filtered)) == shapes(
        swin_unetr3d.convert(autoencoder(state))
    )


def test_another_number_of_classes_makes_a_new_classifier(mini, tmp_path, capsys):
    source = release(official_state(mini), tmp_path)
    kept = SwinUNETR.from_pretrained(source, num_classes=3, threshold=0.3)
    assert kept.config.threshold == 0.3 and "untrained" not in capsys.readouterr().out
    assert torch.equal(kept.out.weight, mini.out.weight)
    model = SwinUNETR.from_pretrained(source, num_classes=2)
    assert model.config.num_classes == 2
    assert capsys.readouterr().out.endswith(": new and untrained: out\n")
    for name, t in model.state_dict().items():
        assert name.startswith("out.") or torch.equal(t, mini.state_dict()[name]), name


def test_an_encoder_excuses_no_hole_and_nothing_more(mini, tmp_path):
    state, path = self_supervised(official_state(mini)), tmp_path / "model_swinvit.pt"
    name = "module.layers3.0.blocks.0.mlp.fc1.bias"
    bias = state.pop(name)
    torch.save({"state_dict": state}, path)
    with pytest.raises(ValueError, match="layers3.0.blocks.0.mlp.linear1.bias is missing"):
        SwinUNETR.from_pretrained(path, num_classes=3)
    torch.save({"state_dict": state | {name: bias, "module.other_head.bias": bias}}, path)
    with pytest.raises(ValueError, match="1 tensors do not fit: other_head.bias is "):
        SwinUNETR.from_pretrained(path, num_classes=3)


def test_other_files_are_refused(mini, tmp_path):
    state = official_state(mini)
    state["swin_vit.patch_embed.proj.bias"] = state["swinViT.patch_embed.proj.bias"]
    with pytest.raises(ValueError, match="swinViT.patch_embed.proj.bias is in the file twice"):
        SwinUNETR.from_pretrained(release(state, tmp_path))
    run_folder(official_state(mini), tmp_path, **{"class": "BEiT"})
    with pytest.raises(ValueError, match="holds BEiT in format 1, not SwinUNETR in format 1"):
        SwinUNETR.from_pretrained(tmp_path)


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32, 32), (64, 64, 48), (96, 96, 90)])
def test_sizes_that_do_not_work_are_told(mini, size):
    with pytest.raises(ValueError) as caught:
        mini(torch.zeros(1, 1, *size))
    expected = f"the volume's sides are {size}; each must be a multiple of 32 and at least one must"
    assert str(caught.value) == f"{expected} be 64 or more; pad or crop the volume"


@pytest.mark.parametrize("shape", [(1, 4, 64, 64, 64), (1, 64, 64, 64), (64, 64, 64)])
def test_other_channels_than_the_model_s_are_told(mini, shape):
    with pytest.raises(ValueError, match=r"the model takes \(B,1,D,H,W\)"):
        mini(torch.zeros(shape))


WRONG = [
    ({"feature_size": 16}, "feature_size is 16, must be a multiple of 12"),
    ({"merging": "merging-v2"}, "merging is 'merging-v2', must be one of legacy, merging, "),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_settings_that_do_not_exist_are_told(wrong, message):
    with pytest.raises(ValueError, match=message):
        SwinUNETR(replace(MINI, **wrong))


# --- numbers of voxels ---------------------------------------------------------------------------


def test_intensities_are_those_of_monai():
    volume = torch.randint(-1024, 1500, (1, 9, 8, 7), generator=torch.Generator().manual_seed(0))
    official = ScaleIntensityRange(-175, 250, 0, 1, clip=True)(volume.float())
    ours = SwinUNETR(MINI).preprocess(volume)
    assert ours.dtype == torch.float32 and ours.shape == volume.shape
    close(ours, official, 1e-6)

    config = swin_unetr3d.VARIANTS["brats21"]
    volume = torch.randint(0, 900, (4, 9, 8, 7)).float() * (torch.rand(4, 9, 8, 7) > 0.4)
    volume[2], volume[3] = 0, 7  # nothing there, and all the same
    official = NormalizeIntensity(nonzero=True, channel_wise=True)(volume)
    close(swin_unetr3d.preprocess(volume, config), official, 1e-5)


def test_probabilities_at_another_size(mini):
    logits = torch.randn(3, 4, 5, 6)
    up = F.interpolate(logits[None], (9, 7, 8), mode="trilinear", align_corners=False)[0]
    ours = mini.postprocess(logits, (9, 7, 8))
    close(ours, up.exp() / up.exp().sum(0), 1e-6)
    one = mini.postprocess(logits[:1], (4, 5, 6))
    close(one, 1 / (1 + (-logits[:1]).exp()), 1e-6)
    brats = swin_unetr3d.postprocess(logits, (4, 5, 6), swin_unetr3d.VARIANTS["brats21"])
    close(brats, 1 / (1 + (-logits).exp()), 1e-6)


def test_fresh_weights_are_those_of_monai():
    """Their spread, as they are random; what is not random is equal."""
    ours, official = official_state(SwinUNETR(MINI)), theirs(MINI).state_dict()
    for name, t in ours.items():
        if t.numel() > 3000 and t.is_floating_point():
            assert t.std().item() == pytest.approx(official[name].std().item(), rel=0.1), name
        elif "norm" in name:
            assert torch.equal(t, official[name]), name


def test_names_of_released_classes_go_with_the_number_of_classes(tmp_path, capsys):
    """The organs of BTCV are those of the file's own 14 classes, of no others."""
    model = SwinUNETR(swin_unetr3d.Config(12))
    path = tmp_path / "swin_unetr.tiny_5000ep_f12_lr2e-4_pretrained.pt"
    torch.save({"state_dict": swin_unetr3d.to_official(model.state_dict())}, path)
    classes = SwinUNETR.from_pretrained(path).config.classes
    assert classes[6] == "liver" and len(classes) == 14
    assert SwinUNETR.from_pretrained(path, num_classes=3).config.classes == ()
    named = SwinUNETR.from_pretrained(path, num_classes=2, classes=("background", "liver"))
    assert named.config.classes == ("background", "liver")
