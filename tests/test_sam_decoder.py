"""SAM against stored and live outputs of the official code, with the real loading code."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, close, shapes
from forms import sam_decoder as forms_of_sam
from forms.sam_decoder import MINI, hub_2023, run_folder, theirs
from PIL import Image
from recipe import fill
from safetensors.torch import save_file
from scipy import ndimage
from torch import nn
from transformers.models.sam import image_processing_pil_sam

import sam_decoder
from sam_decoder import SAM, TWIN

pytestmark = pytest.mark.numeric

OFFICIAL = ("vit-base", "vit-large", "vit-huge")
PROCESSOR = image_processing_pil_sam.SamImageProcessorPil()


# --- the official size: recorded outputs of transformers and of the authors' code ----------------


class Golden:
    """A file of tests/golden: inputs, outputs and the names of the weights."""

    def __init__(self, name: str):
        self.name, self.file = name, np.load(ROOT / "tests/golden" / name)
        self.meta = json.loads(str(self.file["meta"]))
        self.names = json.loads(str(self.file["keys"]))

    def get(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.file[name])

    def weights(self) -> dict[str, torch.Tensor]:
        seed = self.meta["seed"]
        return {n: torch.from_numpy(fill(n, tuple(s), seed)) for n, s, _ in self.names}

    def image(self) -> Image.Image:
        return Image.fromarray(self.file["in/image_small"].repeat(16, 0).repeat(16, 1))

    def prompts(self, case: str, model: SAM) -> dict[str, torch.Tensor]:
        prompts, size = {}, (496, 512)
        if "boxes" in case:
            prompts["boxes"] = model.to_input_pixels(self.get("in/boxes"), size)
        if "points" in case:
            prompts["points"] = model.to_input_pixels(self.get("in/points"), size)
            prompts["labels"] = self.get("in/labels")
        if "mask" in case:
            mask = fill("in/mask", (1, 1, 256, 256), self.meta["seed"]) * 256
            prompts["masks"] = torch.from_numpy(mask)[None].expand(1, 3, -1, -1, -1)
        return prompts


MEASURED = {
    "sam_vit_b.npz": ("the hub's", "transformers 5.23.0"),
    "sam_vit_b_original.npz": ("the authors'", "segment-anything dca509f"),
}
FILES = {"sam_vit_b.npz": ("hub", 1e-6), "sam_vit_b_original.npz": ("sam_vit_b_01ec64.pth", 1e-5)}


@pytest.fixture(scope="module", params=FILES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="module")
def official(golden, tmp_path_factory):
    """The model of official size from a file like the released one, and its features."""
    source, eps = FILES[golden.name]
    folder = tmp_path_factory.mktemp("released") / source
    file = folder / "model.safetensors" if source == "hub" else folder
    if source == "hub":
        folder.mkdir()
        save_file(golden.weights(), file)
    else:
        torch.save(golden.weights(), file)
    model = SAM.from_pretrained(folder)
    file.unlink()
    assert model.config == replace(sam_decoder.VARIANTS["vit-base"], eps=eps)
    assert not model.training
    seen = {}
    layers = {"patch_embed": model.vision_encoder.patch_embed["projection"]}
    layers |= {f"layer{i}": layer for i, layer in enumerate(model.vision_encoder.layers)}
    hooks = [
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: y}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        features = model.encode_image(model.preprocess(golden.image())[None])
    for hook in hooks:
        hook.remove()
    seen["patch_embed"] = seen["patch_embed"].permute(0, 2, 3, 1)  # (1,64,64,768)
    return model, features, seen


def test_encoder_at_official_size(golden, official):
    """Layer by layer, so that a failure names the first that differs."""
    _, features, seen = official
    for name, x in seen.items():
        close(x[0, ::8, ::8, ::96], golden.get(f"out/{name}/sample"), 5e-5)
        told = torch.stack([x.double().mean(), x.double().std()])
        close(told, golden.get(f"out/{name}/mean_std"), 1e-6)
    assert features.shape == (1, 256, 64, 64)
    close(features[0, :, ::4, ::4], golden.get("out/image_embedding"), 5e-5)


@pytest.mark.parametrize(
    "case",
    ["boxes", "points", pytest.param("points_boxes", marks=pytest.mark.parity), "boxes_mask"],
)
@torch.no_grad()
def test_masks_at_official_size(golden, official, case, parity):
    model, features, _ = official
    prompts = golden.prompts(case, model)
    places = ("boxes", "points", "labels", "masks")
    sparse, dense = model.prompt_encoder(*(prompts.get(name) for name in places))
    close(sparse[0], golden.get(f"out/{case}/sparse"), 5e-6)
    position = model.prompt_encoder.grid_positions(64).T.unflatten(1, (64, 64))
    close(position[:, ::8, ::8], golden.get("out/dense_pe"), 5e-6)
    if case == "boxes_mask":
        close(dense[0, 0, :, ::8, ::8], golden.get(f"out/{case}/dense"), 5e-6)
    for multimask, kind in ((True, "multi"), (False, "single")):
        masks, iou = model.decode(features, **prompts, multimask=multimask)
        assert masks.shape == (1, 3, 3 if multimask else 1, 256, 256)
        expected = golden.get(f"out/{case}/{kind}/masks")
        error = (masks[0, ..., ::4, ::4] - expected).abs().max().item()
        print(f"{case} {kind}: masks differ by {error:.1e}")
        assert error <= 2e-5
        close(iou[0], golden.get(f"out/{case}/{kind}/iou"), 5e-6)
        if case == "points_boxes" and multimask:
            names, against = MEASURED[golden.name]
            what = f"vit-base, masks by box and point, {names} names"
            parity("sam_decoder", what, against, float32=error / expected.abs().max().item())
        if multimask:
            for layer in model.mask_decoder.transformer.layers:  # another eps would be seen
                for i in (1, 2, 3, 4):
                    layer.get_submodule(f"layer_norm{i}").eps = 1.1e-5 - model.config.eps
            wrong = model.decode(features, **prompts, multimask=True)[0]
            for layer in model.mask_decoder.transformer.layers:
                for i in (1, 2, 3, 4):
                    layer.get_submodule(f"layer_norm{i}").eps = model.config.eps
            assert (wrong[0, ..., ::4, ::4] - expected).abs().max() > 2e-5
    expected = golden.get(f"out/{case}/single/masks_original_size").sigmoid()
    ours = torch.stack([model.postprocess(m, (496, 512)) for m in masks[0]])
    close(ours[..., ::8, ::8], expected)


def test_a_training_step_of_the_decoder_at_official_size(golden, official):
    model, features, _ = official
    targets = torch.zeros(3, 496, 512)
    targets[0, 80:200, 60:180] = 1
    targets[1] = 1
    targets[1, 100:300, 100:300] = 0
    targets[2, 120:380, 302:328] = 1
    logits, _ = model.decode(features, **golden.prompts("boxes", model))
    logits = F.interpolate(logits[0], (1024, 1024), mode="bilinear", align_corners=False)
    logits = F.interpolate(logits[..., :992, :], (496, 512), mode="bilinear", align_corners=False)
    p = logits[:, 0].sigmoid()
    overlap, total = (p * targets).sum((1, 2)), p.sum((1, 2)) + targets.sum((1, 2))
    dice = (1 - (2 * overlap + 1e-5) / (total + 1e-5)).mean()
    bce = F.binary_cross_entropy_with_logits(logits[:, 0], targets)
    close(dice.double(), golden.get("out/train/dice"), 2e-6)
    close(bce.double(), golden.get("out/train/bce"), 2e-6)
    (dice + bce).backward()
    # Under the official names of this file; convert wants all of a model to know a naming.
    zeros = {n: torch.zeros(1).expand(shape) for n, shape, _ in golden.names}
    found = dict(zip(zeros, sam_decoder.convert(zeros), strict=True))
    parameters = dict(model.named_parameters())
    names = [found[f"mask_decoder.{name}"] for name in golden.meta["train_params"]]
    gradients = [parameters[name].grad for name in names]  # None of the IoU's head
    norms = torch.stack([torch.tensor(0.0) if g is None else g.norm() for g in gradients]).double()
    model.zero_grad()
    close(norms, golden.get("out/train/grad_norm"), 1e-4)


# --- every size: transformers, live --------------------------------------------------------------


def randomised(model: nn.Module) -> nn.Module:
    """Weights that all do something: norms, biases and position tables too."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        table = "pos" in name or "embed.weight" in name or "token" in name or "point_embed" in name
        scale = 0.5 if table and p.ndim > 1 else p[0].numel() ** -0.5
        p.data = 1 + 0.1 * noise if p.ndim < 2 else noise * scale
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(
        torch.randn(2, model.config.out_dim // 2, generator=generator)
    )
    return model


@pytest.fixture(scope="module")
def mini():
    return randomised(SAM(MINI)).eval()


BOXES = torch.tensor([[[10.0, 20, 100, 90], [0, 0, 256, 256]], [[40.5, 7, 41, 200], [3, 3, 9, 9]]])
POINTS = torch.tensor([[[[5.0, 9], [100, 200]], [[0, 256], [77, 31]]]]).repeat(2, 1, 1, 1)
LABELS = torch.tensor([[[1, 0], [1, -1]], [[0, 1], [1, 1]]])


def prompts(kinds: str, dtype=torch.float32) -> dict[str, torch.Tensor]:
    masks = 4 * torch.randn(2, 1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    if kinds != "masks":
        masks = masks.expand(-1, 2, -1, -1, -1)
    given = {"boxes": BOXES, "points": POINTS, "masks": masks}
    given = {name: x.to(dtype) for name, x in given.items() if name in kinds}
    return given | ({"labels": LABELS} if "points" in kinds else {})


def official_prompts(kinds: str, dtype) -> dict[str, torch.Tensor]:
    """transformers' take one mask an image."""
    given = prompts(kinds, dtype)
    if "masks" in given:
        given["masks"] = given["masks"][:, 0]
    return {f"input_{name}": x for name, x in given.items()}


@pytest.mark.parametrize("multimask, eps", [(False, 1e-6), (True, 1e-5)])
@pytest.mark.parametrize(
    "kinds",
    [
        "boxes",
        "points",
        pytest.param("boxes points", marks=pytest.mark.parity),
        "masks",
        "boxes masks",
    ],
)
def test_outputs_and_all_gradients_equal_transformers(kinds, eps, multimask, parity):
    ours = randomised(SAM(replace(MINI, eps=eps))).eval().double()
    official = theirs(ours.config).double()
    official.load_state_dict(sam_decoder.to_official(ours.state_dict()))  # strict
    image = torch.randn(2, 3, 256, 256, dtype=torch.float64)
    masks, iou = ours(image, **prompts(kinds, torch.float64), multimask=multimask)
    there = official(
        pixel_values=image,
        **official_prompts(kinds, torch.float64),
        multimask_output=multimask,
    )
    assert masks.shape == there.pred_masks.shape and iou.shape == there.iou_scores.shape
    close(masks, there.pred_masks, 1e-9 * there.pred_masks.abs().max().item())
    close(iou, there.iou_scores, 1e-9 * there.iou_scores.abs().max().item())
    weight = torch.randn_like(masks)
    for m, i in ((masks, iou), (there.pred_masks, there.iou_scores)):
        ((m * weight).mean() + (i * weight[..., 0, 0]).mean()).backward()
    expected = {n: p.grad for n, p in official.named_parameters() if n != TWIN}
    compared = 0
    worst = 0.0
    for name, p in ours.named_parameters():
        theirs_ = expected.pop(name)
        if theirs_ is None or p.grad is None:  # a part that these prompts do not use
            assert (theirs_ is None or not theirs_.any()) and (p.grad is None or not p.grad.any())
            continue
        scale = max(theirs_.abs().max().item(), 1e-6)  # gradients of keys' biases are rounding
        deviation = (p.grad - theirs_).abs().max().item() / scale
        assert deviation <= 1e-7, name
        worst = max(worst, deviation)
        compared += 1
    assert not expected and compared > 180
    if kinds == "boxes points" and multimask:
        deviation = (masks - there.pred_masks).abs().max() / there.pred_masks.abs().max()
        parity("sam_decoder", "mini, masks", "transformers 5.23.0", float64=deviation.item())
        parity("sam_decoder", "mini, gradients", "transformers 5.23.0", float64=worst)
    with torch.no_grad():  # the other way to attend
        close(ours.encode_image(image), official.get_image_embeddings(image), 1e-9)


@pytest.mark.parametrize("variant", OFFICIAL)
def test_names_and_sizes_of_the_hub_s_and_of_the_authors_files(variant):
    zeros, old = forms_of_sam.official(variant)
    with torch.device("meta"):
        ours = SAM(sam_decoder.VARIANTS[variant])
    assert shapes(ours.state_dict()) == {n: s for n, s in shapes(zeros).items() if n != TWIN}
    assert shapes(sam_decoder.to_official(zeros)) == shapes(zeros)
    assert len(zeros) == {"vit-base": 315, "vit-large": 483, "vit-huge": 595}[variant]
    assert len(old) == len(zeros) - 1
    config = sam_decoder.read_config(old, {}, {}, variant)
    assert config == replace(ours.config, eps=1e-5)
    if variant == "vit-base":
        files = json.loads((ROOT / "tests/golden/hub_keys.json").read_text())
        hub = {n: tuple(s) for n, s in files["facebook/sam-vit-base"]["keys"]}
        assert hub == shapes(zeros)
        assert set(old) == {n for n, *_ in Golden("sam_vit_b_original.npz").names}
        assert sum(p.numel() for p in ours.mask_decoder.parameters()) == 4_058_340


# --- attention ------------------------------------------------------------------------------------


def plain_attention(q, k, v, by_row, by_column):
    """Attend as the docstrings of `bias_attention` and `widened_attention` say."""
    B, h, S = by_row.shape[:3]
    bias = by_row[..., :, None] + by_column[..., None, :]  # (B,h,S,S,S,S)
    bias = bias.view(B, h, S * S, S * S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def random_attention(B, h, S, d):
    """Return q, k, v, by_row and by_column with random values, float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, h, S * S, d, dtype=torch.float64)
    by_row, by_column = torch.randn(2, B, h, S, S, S, dtype=torch.float64)
    return q, k, v, by_row, by_column


def test_plain_attention_is_the_softmax_of_all_scores():
    q, k, v, by_row, by_column = random_attention(2, 3, 5, 8)
    scores = q @ k.mT / 8**0.5  # (B,h,S*S,S*S)
    bias = by_row[..., :, None] + by_column[..., None, :]  # (B,h,S,S,S,S)
    expected = (scores + bias.view_as(scores)).softmax(3) @ v
    close(plain_attention(q, k, v, by_row, by_column), expected, 1e-12)


def test_widened_attention_has_the_gradients_of_the_plain_one():
    inputs = random_attention(2, 3, 5, 8)
    for x in inputs:
        x.requires_grad_()
    expected = torch.autograd.grad(plain_attention(*inputs).square().sum(), inputs)
    gradients = torch.autograd.grad(sam_decoder.widened_attention(*inputs).square().sum(), inputs)
    for ours, plain in zip(gradients, expected, strict=True):
        close(ours, plain, 1e-10)


def test_both_fast_ways_to_attend_equal_the_plain_one(monkeypatch):
    """With the bias in blocks, the last one smaller, and with the bias inside of the product."""
    B, h, S, d = 2, 3, 10, 8
    q, k, v, by_row, by_column = random_attention(B, h, S, d)
    expected = plain_attention(q, k, v, by_row, by_column)
    widths = []
    attend = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, scale=None):
        assert attn_mask is None or attn_mask.numel() <= sam_decoder.MAX_BIAS_ELEMENTS
        widths.append(q.shape[2])
        return attend(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(sam_decoder, "MAX_BIAS_ELEMENTS", 3 * B * h * S**3)
    close(sam_decoder.bias_attention(q, k, v, by_row, by_column), expected, 1e-12)
    assert widths == [30, 30, 30, 10]
    close(sam_decoder.widened_attention(q, k, v, by_row, by_column), expected, 1e-12)


@pytest.mark.parametrize("train", [False, True])
def test_no_tensor_is_as_large_as_the_scores(train):
    """What one global block allocates at 1024, forward and backward, with little channels."""
    layer = sam_decoder.VisionAttention(16, 2, 64)
    x = torch.randn(1, 64, 64, 16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            nonlocal largest
            out = f(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return out

    with Watch(), torch.set_grad_enabled(train):
        y = layer(x)
        if train:
            y.sum().backward()
    assert 0 < largest <= sam_decoder.MAX_BIAS_ELEMENTS < 2 * 4096**2, largest


def test_autocast_leaves_the_fourier_features_alone(mini):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = mini.prompt_encoder(BOXES, POINTS, LABELS, None)[0]
    with torch.no_grad():
        close(rough, mini.prompt_encoder(BOXES, POINTS, LABELS, None)[0], 1e-6)


# --- prompts --------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_of_one_image_serve_many_prompts(mini):
    """Q prompts of an image, the same packed one an image, and forward: one result."""
    image = torch.randn(2, 3, 256, 256)
    features = mini.encode_image(image)
    assert features.shape == (2, 64, 16, 16)
    image_index = torch.tensor([0, 0, 1, 1])
    for kinds in ("boxes", "boxes points", "boxes masks"):
        given = prompts(kinds)
        masks, iou = mini.decode(features, **given, multimask=True)
        packed = {name: x.flatten(0, 1)[:, None] for name, x in given.items()}
        alone = mini.decode(features[image_index], **packed, multimask=True)
        close(masks.flatten(0, 1), alone[0][:, 0], 1e-5)
        close(iou.flatten(0, 1), alone[1][:, 0], 1e-5)
        whole = mini(image, **given, multimask=True)
        assert torch.equal(whole[0], masks) and torch.equal(whole[1], iou)


@torch.no_grad()
def test_a_point_that_is_none_stands_anywhere(mini):
    features = torch.randn(2, 64, 16, 16)
    moved = POINTS.clone()
    moved[0, 1, 1] = torch.tensor([200.0, 100.0])  # its label is -1
    ours, same = (mini.decode(features, points=p, labels=LABELS)[0] for p in (POINTS, moved))
    assert torch.equal(ours, same)
    moved[0, 0, 1] += 50
    assert not torch.equal(ours, mini.decode(features, points=moved, labels=LABELS)[0])


def with_value(x: torch.Tensor, *values: float) -> torch.Tensor:
    x = x.clone()
    x[0, 1].view(-1)[: len(values)] = torch.tensor(values)
    return x


NAN = float("nan")
EMPTY = torch.full((2, 2, 1, 64, 64), -3.0)
WRONG = {
    "a box outside": ({"boxes": with_value(BOXES, 10, 10, 257, 20)}, "not within the image of 256"),
    "a box left of it": ({"boxes": with_value(BOXES, -1, 10, 20, 20)}, "boxes .-1.0, .* not with"),
    "an inverted box": ({"boxes": with_value(BOXES, 30, 10, 20, 20)}, "30.0, .* inverted"),
    "an upside-down box": ({"boxes": with_value(BOXES, 10, 30, 20, 20)}, "inverted"),
    "NaN in a box": ({"boxes": with_value(BOXES, NAN)}, "boxes .nan, .* not within"),
    "an endless box": ({"boxes": with_value(BOXES, 0, 0, float("inf"))}, "not within"),
    "a point outside": (
        {"points": with_value(POINTS, 3, 300), "labels": LABELS},
        "points .3.0, 300.0.: not within",
    ),
    "NaN in a point": ({"points": with_value(POINTS, NAN), "labels": LABELS}, "points .nan"),
    "points without labels": ({"points": POINTS}, "points need labels"),
    "labels without points": ({"boxes": BOXES, "labels": LABELS}, "labels need points"),
    "no prompt": ({}, "no prompt"),
    "transformers' filler": (
        {"points": POINTS, "labels": LABELS.masked_fill(LABELS == 0, -10)},
        "labels must be 1",
    ),
    "an empty mask": ({"masks": EMPTY}, "masks: one is empty"),
    "one empty mask": ({"masks": with_value(EMPTY, 1.0)}, "masks: one is empty"),
    "NaN in a mask": ({"boxes": BOXES, "masks": with_value(EMPTY, NAN)}, "finite"),
    "boxes of one image": ({"boxes": BOXES[:1]}, r"boxes are of shape \(1, 2, 4\), .*\(2,2,4\)"),
    "boxes without Q": ({"boxes": BOXES[0]}, r"boxes are of shape \(2, 4\), expected \(2,4,4\)"),
    "a flat box": ({"boxes": BOXES[0, 0]}, r"boxes are of shape \(4,\), expected \(2,Q,4\)"),
    "other numbers of prompts": (
        {"boxes": BOXES, "points": POINTS[:, :1], "labels": LABELS[:, :1]},
        r"points are of shape \(2, 1, 2, 2\), expected \(2,2,2,2\)",
    ),
    "fewer labels": ({"points": POINTS, "labels": LABELS[..., :1]}, "points are of shape"),
    "a large mask": (
        {"masks": torch.ones(2, 1, 1, 256, 256)},
        r"masks are of shape .* expected \(2,1,1,64,64\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_prompts_are_told_in_one_line(mini, case):
    given, told = WRONG[case]
    with pytest.raises(ValueError, match=told) as caught:
        mini.decode(torch.zeros(2, 64, 16, 16), **given)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150


@torch.no_grad()
def test_prompts_at_the_edge_are_fine(mini):
    """Also an empty mask beside a box: the last answer may have been empty."""
    features = torch.zeros(2, 64, 16, 16)
    boxes = with_value(BOXES, 0, 0, 256, 256)
    assert mini.decode(features, boxes=boxes, masks=EMPTY)[0].isfinite().all()
    boxes = with_value(BOXES, 9, 9, 9, 9)  # one pixel
    assert mini.decode(features, boxes=boxes)[0].isfinite().all()


def test_images_of_another_size_are_refused(mini):
    with pytest.raises(ValueError, match=r"image is \(1, 3, 128, 256\), not \(B,3,256,256\)"):
        mini(torch.zeros(1, 3, 128, 256), boxes=BOXES[:1])
    for size in (250, 0):
        with pytest.raises(ValueError, match=f"image_size={size}: must be a multiple of 16"):
            SAM(replace(MINI, image_size=size))


# --- files ----------------------------------------------------------------------------------------


def test_names_of_the_hub_tell_the_pixels(mini, tmp_path, capsys):
    """A repository's clone; a name is not looked for in other folders above."""
    for name, kind in sam_decoder.RELEASED.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        file = folder / "model.safetensors"
        save_file(mini.state_dict(), file)
        for source in (folder, file):
            config = SAM.from_pretrained(source).config
            assert config == (replace(MINI, **sam_decoder.MEDSAM) if kind == "MedSAM" else MINI)
        file.unlink()
    assert "by its name" in capsys.readouterr().out
    save_file(mini.state_dict(), tmp_path / "best.safetensors")
    config = SAM.from_pretrained(tmp_path, **sam_decoder.MEDSAM, threshold=0.4).config
    assert config == replace(MINI, **sam_decoder.MEDSAM, threshold=0.4)
    assert capsys.readouterr().out == ""


def test_another_eps_in_config_json_counts(mini, tmp_path):
    official = theirs(replace(MINI, eps=1e-4))
    official.save_pretrained(tmp_path)
    assert SAM.from_pretrained(tmp_path).config == replace(MINI, eps=1e-4)
    assert SAM.from_pretrained(tmp_path, eps=1e-5).config == replace(MINI, eps=1e-5)


ATTN = "vision_encoder.layers.{}.attn."


def test_other_files_are_refused(mini, tmp_path):
    state = sam_decoder.to_official(mini.state_dict())
    with pytest.raises(ValueError, match="under two names"):
        SAM.from_pretrained(hub_2023(state | {TWIN: state[TWIN] + 1}, tmp_path))
    torch.save({"weight": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a SAM checkpoint .no tensors named vision_encoder"):
        SAM.from_pretrained(tmp_path)
    run_folder(mini.state_dict(), tmp_path, **{"class": "CRIS"})
    with pytest.raises(ValueError, match="holds CRIS in format 1, not SAM"):
        SAM.from_pretrained(tmp_path)
    hub_2023(state, tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(ValueError, match="do not fit"):
        SAM.from_pretrained(tmp_path, out_dim=128)


@pytest.mark.parametrize("size", [128, 512, 224])
@torch.no_grad()
def test_another_image_size_resizes_the_position_tables(mini, size, tmp_path):
    """SAMed's sam_lora: two-dimensional bilinear interpolation of all, windows stay."""
    state = sam_decoder.to_official(mini.state_dict())
    model = SAM.from_pretrained(hub_2023(state, tmp_path), image_size=size)
    assert model.config == replace(MINI, image_size=size)
    grid, loaded = size // 16, model.state_dict()
    table = state["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    table = F.interpolate(table, (grid, grid), mode="bilinear", align_corners=False)
    close(loaded["vision_encoder.pos_embed"], table.permute(0, 2, 3, 1), 1e-6)
    for i in range(4):
        for axis in "hw":
            name = ATTN.format(i) + f"rel_pos_{axis}"
            expected = state[name]
            if i in MINI.global_blocks:
                rows = (2 * grid - 1, expected.shape[1])
                expected = F.interpolate(
                    expected[None, None], rows, mode="bilinear", align_corners=False
                )[0, 0]
            close(loaded[name], expected, 1e-6)
    boxes = torch.tensor([[[0.0, 0.0, size, size / 2]]])
    masks, iou = model(torch.randn(1, 3, size, size), boxes=boxes)
    assert masks.shape == (1, 1, 1, size // 4, size // 4) and iou.shape == (1, 1, 1)
    official = theirs(model.config)
    official.load_state_dict(sam_decoder.to_official(loaded))
    image = torch.randn(1, 3, size, size)
    masks = model(image, boxes=boxes, multimask=True)[0]
    close(masks, official(pixel_values=image, input_boxes=boxes).pred_masks, 1e-4)
    again = tmp_path / "run"  # a run at that size, read as such and at the old one
    again.mkdir()
    run_folder(loaded, again, config=asdict(model.config))
    assert SAM.from_pretrained(again).config == model.config
    assert SAM.from_pretrained(again, image_size=256).config == MINI


# --- pixels ---------------------------------------------------------------------------------------

SIZES = [(496, 512), (1500, 2250), (147, 301), (301, 147), (1024, 1024), (1, 3000), (37, 1023)]


def photo(size, seed=0) -> np.ndarray:
    """Smooth, with some noise and edges, in uint8."""
    rng = np.random.default_rng(seed)
    coarse = ndimage.zoom(rng.random((9, 9, 3)), (size[0] / 9, size[1] / 9, 1), order=1)
    noise = 0.1 * rng.random((*size, 3))
    x = 255 * (0.9 * coarse + noise)
    x[size[0] // 3 : size[0] // 2, size[1] // 4 : size[1] // 2] *= 0.3
    return x.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_is_the_official_one(size):
    image, config = photo(size), sam_decoder.VARIANTS["vit-base"]
    ours = sam_decoder.preprocess(Image.fromarray(image), config)
    if size == (1, 3000):  # the official code fails: its image would have no row
        assert ours.shape == (3, 1024, 1024) and not ours[:, 1:].any()
        return
    mask = (image[..., 0] > 128).astype(np.uint8)
    there = PROCESSOR(image, segmentation_maps=mask, return_tensors="pt")
    assert ours.shape == (3, 1024, 1024) and ours.dtype == torch.float32
    close(ours, there.pixel_values[0], 1e-6)
    h, w = there.reshaped_input_sizes[0].tolist()
    assert not ours[:, h:].any() and not ours[:, :, w:].any()
    small = replace(config, image_size=256)  # the official targets have the size of the logits
    ours = sam_decoder.preprocess_mask(torch.from_numpy(mask), small)
    rows = (ours[0] != there.labels[0]).any(1).nonzero().flatten().tolist()
    ties = {28, 85, 142} if size == (1500, 2250) else set()  # (i + 1/2) 1500/171 is whole there
    assert set(rows) <= ties
    logits = torch.randn(2, 256, 256)
    ours = sam_decoder.postprocess(logits, size, config)
    sizes = ([list(size)], there.reshaped_input_sizes)
    expected = PROCESSOR.post_process_masks(logits[None, None], *sizes, binarize=False)[0][0]
    assert ours.shape == (2, *size)
    close(ours, expected.sigmoid(), 1e-6)


@pytest.mark.parametrize("size", SIZES[:-2])
def test_prompts_are_mapped_to_input_pixels_as_officially(size):
    H, W = size
    config = sam_decoder.VARIANTS["vit-base"]
    rng = np.random.default_rng(0)
    points = rng.random((5, 3, 2)) * (W, H)
    boxes = np.concatenate([points[:, 0] * 0.4, (W, H) - points[:, 1] * 0.4], 1)
    bring = image_processing_pil_sam._normalize_coordinates
    for xy, is_box in ((points, False), (boxes, True)):
        ours = sam_decoder.to_input_pixels(torch.from_numpy(xy), size, config)
        expected = bring(1024, xy, size, is_bounding_box=is_box)
        close(ours, torch.from_numpy(expected), 1e-9)
    edge = sam_decoder.to_input_pixels(
        torch.tensor([0, 0, W, H]), size, config
    )  # whole numbers too
    assert edge.tolist() == [0, 0, *sam_decoder.size_in_input(size, config)[::-1]]
    medsam = replace(config, **sam_decoder.MEDSAM)
    edge = sam_decoder.to_input_pixels(torch.tensor([W, H]), size, medsam)
    assert edge.tolist() == [1024, 1024]


@pytest.mark.parametrize(
    "xy, told",
    [
        ([0, 0, 301, 147.5], "not within the image of 301 x 147 pixels"),
        ([5, 5, 4, 9], "inverted"),
        ([NAN, 0, 5, 5], "not within"),
        ([302, 10], "not within"),
    ],
)
def test_prompts_outside_of_the_image_are_told_in_its_own_pixels(mini, xy, told):
    with pytest.raises(ValueError, match=told):
        mini.to_input_pixels(torch.tensor(xy), (147, 301))


@pytest.mark.parametrize("size", [(147, 301), (301, 147), (500, 500), (1023, 37)])
@pytest.mark.parametrize("pixels", [{}, sam_decoder.MEDSAM], ids=["SAM", "MedSAM"])
def test_there_and_back(size, pixels):
    """A mask mapped to the input and back is itself, and its box goes where it goes."""
    config = replace(sam_decoder.VARIANTS["vit-base"], **pixels)
    H, W = size
    y, x = np.mgrid[:H, :W]
    mask = ((y - 0.6 * H) / (0.3 * H)) ** 2 + ((x - 0.3 * W) / (0.25 * W)) ** 2 < 1
    there = sam_decoder.preprocess_mask(torch.from_numpy(mask), config)
    assert there.shape == (1, 1024, 1024)
    logits = F.avg_pool2d(20 * there - 10, 4)
    back = sam_decoder.postprocess(logits, size, config) > config.threshold
    union, both = (back[0].numpy() | mask).sum(), (back[0].numpy() & mask).sum()
    assert both / union > 0.95
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    box = sam_decoder.to_input_pixels(torch.tensor(box), size, config)
    rows, columns = np.nonzero(there[0].numpy())
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    close(box, torch.tensor(edges).float(), 1.0)


def authors_medsam(image: np.ndarray) -> np.ndarray:
    """skimage's resize to 1024 (order 3, antialias) as MedSAM's scripts call it, by scipy."""
    factors = np.array(image.shape[:2]) / 1024
    sigma = [*np.maximum(0, (factors - 1) / 2), 0]
    x = ndimage.gaussian_filter(image.astype(float), sigma, mode="mirror")
    zoom = [1024 / s for s in image.shape[:2]]
    x = np.stack(
        [ndimage.zoom(x[..., c], zoom, order=3, mode="mirror", grid_mode=True) for c in range(3)],
        2,
    )
    x = x.clip(image.min(), image.max()).astype(np.uint8)
    return (x - x.min()) / max(int(x.max()) - int(x.min()), 1e-8)


@pytest.mark.parametrize("size", [(512, 512), (600, 400), (1500, 2250)])
def test_medsam_s_pixels(size):
    image, config = photo(size), replace(sam_decoder.VARIANTS["vit-base"], **sam_decoder.MEDSAM)
    ours = sam_decoder.preprocess(Image.fromarray(image), config)
    assert ours.shape == (3, 1024, 1024) and ours.min() == 0 and ours.max() == 1
    x = np.asarray(Image.fromarray(image).resize((1024, 1024), Image.Resampling.BICUBIC))
    x = x.astype(np.float32)
    expected = torch.from_numpy((x - x.min()) / (x.max() - x.min())).permute(2, 0, 1)
    close(ours, expected, 1e-6)
    levels = 255 * np.abs(ours.numpy().transpose(1, 2, 0) - authors_medsam(image))
    print(f"{size}: {levels.mean():.1f} of 255 on average, {np.quantile(levels, 0.99):.1f} at 99 %")
    assert levels.mean() < 2.2 and np.quantile(levels, 0.99) < 7  # as `preprocess` says
    grey = sam_decoder.preprocess(Image.new("L", (50, 70), 7), config)
    assert not grey.any()


def test_medsam_s_probabilities_are_resized(mini):
    """MedSAM_Inference.py: the sigmoid first, then straight to the image's size."""
    config, logits = replace(MINI, **sam_decoder.MEDSAM), 5 * torch.randn(1, 64, 64)
    p = F.interpolate(logits[None].sigmoid(), (147, 301), mode="bilinear", align_corners=False)
    close(sam_decoder.postprocess(logits, (147, 301), config), p[0], 1e-6)


# --- real weights ---------------------------------------------------------------------------------


@pytest.mark.online
@torch.no_grad()
def test_published_numbers_of_the_real_weights(tmp_path):
    """transformers, tests/models/sam/test_modeling_sam.py, the integration tests."""
    from test_online import picture

    url = "https://huggingface.co/ybelkada/segment-anything/resolve/main/assets/car.png"
    image = picture(url, tmp_path)
    model = SAM.from_pretrained("facebook/sam-vit-base")
    assert model.config == sam_decoder.VARIANTS["vit-base"]
    features, size = model.encode_image(model.preprocess(image)[None]), (image.height, image.width)
    points = model.to_input_pixels(torch.tensor([[[[400, 650]], [[220, 470]]]]), size)
    labels = torch.ones(1, 2, 1)
    iou = model.decode(features, points=points, labels=labels, multimask=True)[1]
    expected = [[0.9105, 0.9825, 0.9675], [0.7646, 0.7943, 0.7774]]
    close(iou[0], torch.tensor(expected), 3e-4)
    boxes = torch.tensor([[[620, 900, 1000, 1255], [75, 275, 1725, 850]]])
    boxes = model.to_input_pixels(boxes, size)
    iou = model.decode(features, boxes=boxes, multimask=True)[1]
    expected = [[0.9773, 0.9881, 0.9522], [0.5996, 0.7661, 0.7937]]
    close(iou[0], torch.tensor(expected), 3e-4)
    points = model.to_input_pixels(torch.tensor([[[[820, 1080]]]]), size)
    given = {"points": points, "labels": torch.zeros(1, 1, 1), "boxes": boxes[:, :1]}
    assert abs(model.decode(features, **given, multimask=True)[1][0, 0, 2] - 0.7894) < 3e-4
