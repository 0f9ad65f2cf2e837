"""CRIS against stored outputs of the official code, loaded by the real loading code."""

import contextlib
import copy
import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from forms.cris import as_released, half, run_folder, save_archive
from PIL import Image
from recipe import fill
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import v2

import cris

pytestmark = pytest.mark.numeric

VARIANTS = ("rn50", "rn101")


class Golden:
    """One file of tests/golden: official names, weights, input and outputs."""

    def __init__(self, variant: str):
        self.variant = variant
        self.file = np.load(ROOT / f"tests/golden/cris_{variant}.npz")
        self.meta = json.loads(str(self.file["meta"]))
        self.names = json.loads(str(self.file["keys"]))

    def out(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.file[f"out/{name}"])

    def weights(self) -> dict[str, torch.Tensor]:
        """The official state dict in float32."""
        state = {}
        for name, shape, dtype in self.names:
            stored = f"buffers/{name}"
            array = (
                self.file[stored]
                if stored in self.file
                else fill(name, shape, self.meta["fill_seed"])
            )
            state[name] = torch.from_numpy(np.array(array)).to(getattr(torch, dtype.split(".")[-1]))
        return state

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """image, tokens and mask as `meta.inputs` says."""
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(b"cris-image:0")))
        coarse = rng.standard_normal((2, 3, 26, 26), dtype=np.float32)
        fine = rng.standard_normal((2, 3, 416, 416), dtype=np.float32)
        image = coarse.repeat(16, axis=2).repeat(16, axis=3) + np.float32(0.25) * fine
        assert zlib.crc32(image.tobytes()) == self.meta["inputs"]["image_crc32"]
        y, x = np.mgrid[:416, :416]
        mask = [
            (y - (150 + 60 * i)) ** 2 + (x - (260 - 70 * i)) ** 2 <= (90 - 25 * i) ** 2
            for i in (0, 1)
        ]
        tokens = torch.from_numpy(self.file["in/tokens"])
        return torch.from_numpy(image), tokens, torch.from_numpy(np.stack(mask)[:, None]).float()


@pytest.fixture(scope="module", params=VARIANTS)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """The model of official size from a file as it was released, and what loading it prints."""
    path = as_released(golden.weights(), tmp_path_factory.mktemp("released") / "best_model.pth")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model = cris.CRIS.from_pretrained(path, dropout=0.0)
    path.unlink()
    return model, printed.getvalue()


def first_difference(model, golden, dtype):
    """The first layer whose output differs from the official summary, for a failing parity test."""
    v, n, summaries = model.backbone.visual, model.neck, golden.meta["summaries"]
    modules = {
        "layer1": v.layer1, "layer2": v.layer2, "layer3": v.layer3, "layer4": v.layer4,
        "connect": v.attnpool.connect, "attnpool": v.attnpool, "txt_proj": n.txt_proj,
        "f2_cat": n.f2_cat, "f3_cat": n.f3_cat, "aggr": n.aggr, "neck": n, "decoder": model.decoder,
    }  # fmt: skip
    lines = []
    for name, module in modules.items():
        want = summaries.get(name)
        if want:

            def hook(module, inputs, output, name=name, want=want):
                got = output.double()
                if abs(got.mean() - want["mean_f64"]) > 1e-6 * max(1, abs(want["std_f64"])):
                    lines.append(f"{name}: mean {got.mean():.9g}, official {want['mean_f64']:.9g}")

            module.register_forward_hook(hook)
    image, tokens, _ = golden.inputs()
    model.to(dtype)(image.to(dtype), tokens)
    return lines[0] if lines else "no intermediate result differs"


# RN101 takes half a minute and differs by depth alone: RN50's outputs are compared, and RN101's
# names and shapes by the model contract.
QUICK = [
    pytest.param("rn50", marks=pytest.mark.parity),
    pytest.param("rn101", marks=pytest.mark.slow),
]
OFFICIAL = "CRIS.pytorch e596332"


@pytest.mark.parametrize("golden", QUICK, indirect=True, scope="module")
def test_outputs_equal_the_official_ones(golden, official, parity):
    model, printed = official
    model.eval().float()
    assert "they are 17, 0 and letterbox" in printed  # the settings that no tensor tells
    image, tokens, _ = golden.inputs()
    tolerance = {"rn50": 0.057, "rn101": 0.44}[golden.variant]  # four times its own float32 error
    with torch.no_grad():
        error = (model(image, tokens) - golden.out("logits")).abs().max()
        assert error <= tolerance
        model.double()
        error64 = (model(image.double(), tokens) - golden.out("logits_f64")).abs().max()
    print(f"{golden.variant}: float64 {error64:.1e}, float32 {error:.1e}")
    assert error64 <= 1e-6 * 17, first_difference(model, golden, torch.float64)
    if golden.variant == "rn50":
        largest = golden.out("logits_f64").abs().max()
        parity("cris", "RN50, logits", OFFICIAL, float64=error64 / largest, float32=error / largest)


@pytest.mark.parametrize("golden", QUICK, indirect=True, scope="module")
def test_gradients_equal_the_official_ones(golden, official, parity):
    model = copy.deepcopy(official[0]).double()
    image, tokens, mask = golden.inputs()
    model.train()
    target = F.interpolate(mask.double(), (104, 104), mode="nearest")
    loss = F.binary_cross_entropy_with_logits(model(image.double(), tokens), target)
    assert loss.item() == pytest.approx(float(golden.out("loss_train_dropout0")), rel=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    untrained = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert untrained == {"backbone.logit_scale"}
    norms = golden.meta["train_dropout0"]["grad_norm_f64"]
    errors = []
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-6), name
        errors.append(abs(gradients[name].norm().item() - norm) / norm)
    if golden.variant == "rn50":
        what = f"RN50, norms of {len(norms)} gradients, each by its own size"
        parity("cris", what, OFFICIAL, float64=max(errors))


def test_medvlsm_s_padding_and_way_back(tmp_path):
    golden = Golden("rn50")
    model = cris.CRIS.from_pretrained(
        as_released(golden.weights(), tmp_path / "x.pth"),
        pixels="medvlsm",
        text_length=77,
        pad_token=49407,
    )
    image, _, mask = golden.inputs()
    tokens = torch.from_numpy(golden.file["in/medvlsm_input_ids"])
    with torch.no_grad():
        logits = model(image, tokens)
        ours = torch.stack([model.postprocess(x, (416, 416)) for x in logits])
        official = golden.out("medvlsm_logits416_stride8")
        assert (ours[..., ::8, ::8] - official.sigmoid()).abs().max() < 0.057 / 4  # sigmoid's slope
        from losses import dice_loss

        loss = dice_loss(ours, mask, smooth=1e-5).mean()
    assert loss.item() == pytest.approx(float(golden.out("medvlsm_dice_loss")), abs=1e-4)


def test_official_evaluation_s_probabilities(tmp_path):
    golden = Golden("rn50")
    config = cris.VARIANTS["rn50"]
    ours = torch.stack([cris.postprocess(x, (416, 416), config) for x in golden.out("logits")])
    torch.testing.assert_close(
        ours[..., ::8, ::8], golden.out("prob416_stride8").clamp(0, 1), rtol=0, atol=2e-5
    )


# --- CLIP alone -----------------------------------------------------------------------------------


def clip_names(variant):
    """Names, shapes and types of CLIP's own files, from CRIS's."""
    with torch.device("meta"):
        whole = cris.CRIS(cris.VARIANTS[variant]).state_dict()
    for name, t in whole.items():
        if name.startswith("backbone.") and ".connect." not in name:
            yield name.removeprefix("backbone."), tuple(t.shape), t.dtype


@pytest.mark.parametrize("form", ["archive", "hub"])
@pytest.mark.parametrize(
    "variant", ["mini", *[pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]]
)
def test_clip_alone_fills_the_towers_bit_for_bit(variant, form, tmp_path, capsys):
    state = {}
    for name, shape, dtype in clip_names(variant):
        state[name] = torch.from_numpy(np.array(fill(name, shape))).to(dtype)
    if form == "archive":
        state = {name: half(name, x) for name, x in state.items()}
        assert {x.dtype for x in state.values()} == {torch.half, torch.float, torch.int64}
        path = tmp_path / "RN50.pt"
        save_archive(state, path)
    else:
        path = tmp_path
        save_file(state, path / "open_clip_model.safetensors")
    model = cris.CRIS.from_pretrained(path)
    loaded = model.state_dict()
    for name, x in state.items():
        assert loaded[f"backbone.{name}"].dtype == (
            torch.int64 if x.dtype == torch.int64 else torch.float32
        )
        assert torch.equal(loaded[f"backbone.{name}"], x.to(loaded[f"backbone.{name}"].dtype)), name
    fresh = set(loaded) - {f"backbone.{name}" for name in state}
    parts = ("backbone.visual.attnpool.connect.", "neck.", "decoder.", "proj.")
    assert fresh == {name for name in loaded if name.startswith(parts)}
    assert model.config == replace(cris.VARIANTS[variant], text_length=77)
    out = capsys.readouterr().out
    assert "they are 77, 0 and letterbox" in out  # what is assumed
    new = "new and untrained: backbone.visual.attnpool.connect, neck, decoder, proj\n"
    assert out.endswith(f"{path}: a plain CLIP checkpoint; {new}")


# --- loading is total -----------------------------------------------------------------------------


def mini_state():
    torch.manual_seed(0)
    return {k: v.clone() for k, v in cris.CRIS(cris.VARIANTS["mini"]).state_dict().items()}


def test_weights_of_another_kind_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html></html>")
    as_released(mini_state(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:100_000])
    save_file(mini_state(), tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(
        (tmp_path / "cut.safetensors").read_bytes()[:100_000]
    )
    expected = {
        "linear.pth": "backbone.",
        "code.pth": "torch.save(model.state_dict(), path)",
        "page.pth": "a web page",
        "cut.pth": "get the whole file",
        "cut.safetensors": "get the whole file",
    }
    for name, words in expected.items():
        with pytest.raises(ValueError) as caught:
            cris.CRIS.from_pretrained(tmp_path / name)
        assert (
            words in str(caught.value)
            and name in str(caught.value)
            and "\n" not in str(caught.value)
        )
    for source in (tmp_path / "none.pth", "weights/none.pth", "none"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            cris.CRIS.from_pretrained(source)
    with pytest.raises(ValueError, match="holds SAM in format 1, not CRIS"):
        cris.CRIS.from_pretrained(run_folder(mini_state(), tmp_path / "sam", **{"class": "SAM"}))


# --- the forward pass -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(1)
    model = cris.CRIS(replace(cris.VARIANTS["mini"], image_size=96)).eval()
    for module in model.modules():  # statistics that do something
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.double()


TOKENS = torch.tensor([[49406, 736, 17, 49407, 0, 0], [49406, 1, 2, 3, 4, 49407]])


def test_trailing_padding_changes_nothing(mini):
    image = torch.randn(2, 3, 64, 96).double()
    padded = F.pad(TOKENS, (0, 20))
    with torch.no_grad():
        torch.testing.assert_close(mini(image, padded), mini(image, TOKENS), rtol=0, atol=0)
        alone = mini(image[:1], TOKENS[:1, :4])
        torch.testing.assert_close(mini(image, TOKENS)[:1], alone, rtol=1e-9, atol=1e-9)
        others = mini(image, TOKENS.where(TOKENS != 0, 49407))  # this padding is attended to
    assert (others - mini(image, TOKENS)).abs()[0].max() > 1e-6


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 3)])
def test_the_convolution_of_an_upsampled_map(size):
    x = torch.randn(2, 4, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    up = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    plain = F.conv2d(up, weight, padding=1)
    ours = cris.upsampled_conv3x3(x, weight)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(plain)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), g),
        torch.autograd.grad(plain, (x, weight), g),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_convolution_with_a_kernel_for_each_image():
    """Against the plain lines in the docstring of `conv3x3_per_image`, gradients too."""
    torch.manual_seed(0)
    B, C, H, W = 3, 4, 5, 7
    pointwise = nn.Conv2d(C, C, 1).double()
    x = torch.randn(B, C, H, W, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(B, C, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(B, dtype=torch.float64, requires_grad=True)

    groups = pointwise(x).reshape(1, B * C, H, W)
    plain = F.conv2d(groups, kernel, bias, padding=1, groups=B).transpose(0, 1)
    ours = cris.conv3x3_per_image(x, pointwise, kernel, bias)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)

    inputs = (x, kernel, bias, pointwise.weight, pointwise.bias)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, inputs, weights)
    for a, b in zip(torch.autograd.grad(ours, inputs, weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_projector_is_a_convolution_with_the_sentence_s_kernel(mini):
    x, state = torch.randn(2, 64, 3, 4).double(), torch.randn(2, 128).double()
    vis, y = mini.proj.vis, x
    for n in ("1", "3"):
        y = vis[n](F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False))
    y, words = vis["4"](y), mini.proj.txt(state)
    each = [
        F.conv2d(y[i : i + 1], words[i, :-1].view(1, 32, 3, 3), words[i, -1:], padding=1)
        for i in (0, 1)
    ]
    torch.testing.assert_close(mini.proj(x, state), torch.cat(each), rtol=1e-9, atol=1e-9)


def test_sizes_that_are_no_multiple_of_32_are_refused(mini):
    with pytest.raises(ValueError, match="multiples of 32"):
        mini(torch.zeros(1, 3, 80, 96).double(), TOKENS[:1])


def test_the_text_norm_can_be_kept_in_evaluation_mode():
    model = cris.CRIS(replace(cris.VARIANTS["mini"], freeze_text_norm=True)).train()
    model(torch.randn(1, 3, 64, 64), TOKENS[:1])  # a batch of one works then
    assert (
        not model.neck.txt_proj[1].running_mean.any()
        and model.neck.norm_layer[0].running_mean.any()
    )
    assert cris.CRIS(cris.VARIANTS["mini"]).train().neck.txt_proj[1].training


# --- pixels ---------------------------------------------------------------------------------------


def picture(width, height):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_stretch_is_torchvision_s_resize_of_pil_images():
    config = replace(cris.VARIANTS["mini"], pixels="stretch")
    image = picture(301, 147)
    steps = [v2.Resize((128, 128)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    official = v2.Compose([*steps, v2.Normalize(config.mean, config.std)])(image)
    torch.testing.assert_close(cris.preprocess(image, config), official, rtol=0, atol=1e-6)
    mask = Image.fromarray(np.asarray(image.convert("L")) > 127)
    nearest = np.asarray(mask.resize((128, 128), Image.Resampling.NEAREST))
    ours = cris.preprocess_mask(torch.from_numpy(np.array(mask)), config)
    assert np.array_equal(ours[0].numpy() > 0.5, nearest)


@pytest.mark.parametrize("size", [(33, 60), (64, 64), (50, 20)])
def test_what_leaves_the_letterbox_is_what_went_in(size):
    """A linear ramp: bilinear interpolation returns it exactly wherever it has both neighbours."""
    height, width = size
    ramp = torch.arange(height)[:, None] + 2.0 * torch.arange(width)
    square = cris.letterbox(ramp[None], 128, "bilinear")
    assert square.shape == (1, 128, 128)
    back = cris.undo_letterbox(square, size, "bilinear")
    assert back.shape == (1, height, width)
    inside = (slice(1, -1), slice(1, -1))
    torch.testing.assert_close(back[0][inside], ramp[inside], rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(416, 208), (301, 147), (97, 531)])
def test_letterbox_keeps_the_shape_and_comes_back(size):
    config = cris.VARIANTS["rn50"]
    image, (width, height) = picture(*size), size
    x = cris.preprocess(image, config)
    scale = min(416 / side for side in size)
    top, left = (416 - height * scale) / 2, (416 - width * scale) / 2
    assert x.shape == (3, 416, 416)
    if top > 3:
        assert x[:, : int(top) - 2].abs().max() < 0.01  # the mean colour, to 8 bits
    row, column = height // 3, width // 3
    at = round(top + row * scale), round(left + column * scale)
    colour = (
        torch.tensor(image.getpixel((column, row))) / 255 - torch.tensor(config.mean)
    ) / torch.tensor(config.std)
    assert (x[:, at[0], at[1]] - colour).abs().max() < 0.25
    mask = torch.zeros(height, width)
    mask[height // 4 : height // 2, width // 3 : width // 2] = 1
    small = F.interpolate(
        cris.preprocess_mask(mask, config)[None], (104, 104), mode="bilinear", antialias=True
    )
    back = cris.postprocess((small[0] - 0.5) * 40, (height, width), config)
    assert back.shape == (1, height, width)
    inside = (back[0] > 0.5).float()
    assert 2 * (inside * mask).sum() / (inside.sum() + mask.sum()) > 0.93
