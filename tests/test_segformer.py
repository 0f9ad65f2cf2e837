"""SegFormer against transformers, loaded by the real loading code."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, close
from forms.segformer import (
    MINI,
    as_authors,
    hub_4,
    official_config,
    run_folder,
    theirs,
    without_count,
)
from PIL import Image
from torch import nn
from transformers import SegformerModel
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

import segformer
from segformer import SegFormer

pytestmark = pytest.mark.numeric

OFFICIAL = ("b0", "b1", "b2", "b3", "b4", "b5")
KEYS = json.loads((ROOT / "tests/golden/hub_keys.json").read_text())
B0, MIT = "nvidia/segformer-b0-finetuned-ade-512-512", "nvidia/mit-b0"
CLASSIFIER = ("decode_head.classifier.weight", "decode_head.classifier.bias")
transformers.logging.set_verbosity_error()


def randomised(model: nn.Module) -> nn.Module:
    """Weights that all do something: norms, their statistics and biases too."""
    generator = torch.Generator().manual_seed(0)
    for name, t in model.state_dict().items():
        if t.is_floating_point():
            noise = torch.randn(t.shape, generator=generator)
            one = name.endswith(("norm.weight", "running_var")) or "layer_norm" in name
            t.copy_(one + 0.1 * noise if t.ndim < 2 else noise / t[0].numel() ** 0.5)
    return model


@pytest.fixture(scope="module")
def mini():
    return randomised(SegFormer(MINI)).eval()


def shapes(state) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in state.items()}


# --- transformers, live --------------------------------------------------------------------------


def test_names_are_those_of_the_hub_s_files():
    with torch.device("meta"):
        ours = segformer.to_official(SegFormer(segformer.VARIANTS["b0"]).state_dict())
    assert shapes(ours) == dict(KEYS[B0]["keys"])
    encoder = {n: t for n, t in ours.items() if not n.startswith("decode_head.")}
    classifier = {"classifier.weight": [1000, 256], "classifier.bias": [1000]}
    assert shapes(encoder) | classifier == dict(KEYS[MIT]["keys"])
    with torch.device("meta"):
        mit = {name: torch.empty(shape) for name, shape in KEYS[MIT]["keys"]}
    assert shapes(segformer.to_official(mit)) == shapes(encoder)


def first_difference(ours: SegFormer, official, image) -> str:
    """The first map of the encoder that differs, for the message of a failure."""
    states = official(pixel_values=image, output_hidden_states=True).hidden_states
    for i, (a, b) in enumerate(zip(ours.encoder(image), states, strict=True)):
        if not torch.allclose(a, b, rtol=0, atol=1e-4):
            return f"map {i} differs by {(a - b).abs().max():.1e}"
    return "the encoders agree"


FULL = [("b0", (512, 512), torch.float32), ("b0", (288, 320), torch.float64)]
FULL += [("b2", (288, 320), torch.float64), ("b2", (352, 352), torch.float32)]


@pytest.mark.parametrize("variant, size, dtype", FULL)
@torch.no_grad()
def test_full_size_equals_transformers(variant, size, dtype):
    ours = randomised(SegFormer(segformer.VARIANTS[variant])).eval().to(dtype)
    official = theirs(ours)
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    a, b = ours(image), official(pixel_values=image).logits
    assert a.shape == (1, 150, size[0] // 4, size[1] // 4) and a.is_contiguous()
    error, scale = (a - b).abs().max().item(), b.abs().max().item()
    print(f"{variant} {size} {dtype}: logits differ by {error:.1e}, scale {scale:.1f}")
    limit = 2e-5 if dtype == torch.float32 else 1e-6 * scale
    assert error <= limit, first_difference(ours, official, image)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["eval", "train", "frozen norm"])
def test_outputs_and_all_gradients_equal_transformers(mode, dtype):
    """In training with the same samples dropped, and the batch norm's statistics after it."""
    config = replace(MINI, drop_path=0.5, dropout=0.0)
    ours = randomised(SegFormer(config)).to(dtype).train(mode != "eval")
    official = theirs(ours)
    for model in (ours, official):
        model.decode_head.batch_norm.train(mode == "train")
    image = torch.randn(4, 3, 72, 104, dtype=dtype)
    outputs, gradients = [], []
    weight = torch.randn(4, 5, 18, 26, dtype=dtype)
    for model in (ours, official):
        torch.manual_seed(3)
        out = model(image) if model is ours else model(pixel_values=image).logits
        (out * weight).sum().backward()
        outputs.append(out)
        state = {n: p.grad for n, p in model.named_parameters()}
        assert all(grad is not None for grad in state.values())
        state |= {n: t for n, t in model.named_buffers() if "running" in n}
        gradients.append(segformer.to_official(state))
    tolerance = 2e-5 if dtype == torch.float32 else 1e-6
    scale = outputs[1].abs().max().item()
    close(*outputs, tolerance * scale)
    assert set(gradients[0]) == set(gradients[1]) and len(gradients[0]) > 140
    for name, expected in gradients[1].items():
        # Some are zero but for rounding: of keys' biases, of what a batch norm subtracts.
        size = max(expected.abs().max().item(), 1e-2 if dtype == torch.float64 else 10)
        error = (gradients[0][name] - expected).abs().max().item() / size
        assert error <= tolerance, (name, error)


def test_training_drops_and_evaluation_does_not(mini):
    model = SegFormer(replace(MINI, drop_path=0.9, dropout=0.5))
    model.load_state_dict(mini.state_dict())
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(image), mini(image))
        assert not torch.equal(model.train()(image), model(image))
    rates = [block.drop_path for blocks in model.encoder.block for block in blocks]
    assert rates == pytest.approx([0.9 * i / 4 for i in range(5)])


@pytest.mark.parametrize("size", [(29, 29), (33, 100), (64, 32), (101, 75)])
@torch.no_grad()
def test_any_size_equals_transformers(mini, size):
    image = torch.randn(2, 3, *size)
    ours, official = mini(image), theirs(mini)(pixel_values=image).logits
    assert ours.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    close(ours, official, 2e-5)


def largest(tensors) -> float:
    return max(t.abs().max().item() for t in tensors)


@pytest.mark.parity
def test_deviation_from_transformers(parity):
    """Logits and the gradients of all parameters of b0 with 150 classes, in evaluation mode."""
    logits, gradients = {}, {}
    for dtype in (torch.float64, torch.float32):
        ours = randomised(SegFormer(segformer.VARIANTS["b0"])).eval().to(dtype)
        official = theirs(ours)
        image = torch.randn(1, 3, 288, 320, generator=torch.Generator().manual_seed(1)).to(dtype)
        outputs, states = [], []
        for model in (ours, official):
            output = model(image) if model is ours else model(pixel_values=image).logits
            output.square().mean().backward()
            outputs.append(output.detach())
            state = {name: p.grad for name, p in model.named_parameters()}
            states.append(segformer.to_official(state))

        precision = str(dtype).removeprefix("torch.")
        logits[precision] = largest([outputs[0] - outputs[1]]) / largest([outputs[1]])
        differences = [states[0][name] - states[1][name] for name in states[1]]
        gradients[precision] = largest(differences) / largest(states[1].values())
    against = f"transformers {transformers.__version__}"
    parity("segformer", "b0, logits", against=against, **logits)
    parity("segformer", "b0, gradients", against=against, **gradients)
    assert max(logits["float64"], gradients["float64"]) < 1e-12
    assert max(logits["float32"], gradients["float32"]) < 2e-5


def plain_decoder(head: segformer.DecodeHead, maps) -> torch.Tensor:
    """The lines that the docstring of DecodeHead gives."""
    projected = []
    for linear, x in zip(head.linear_c, maps, strict=True):
        x = linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.interpolate(x, maps[0].shape[2:], mode="bilinear", align_corners=False)
        projected.append(x)
    y = head.linear_fuse(torch.cat(projected[::-1], 1))
    y = F.relu(head.batch_norm(y))
    return head.classifier(head.dropout(y))


@pytest.mark.parametrize("is_training", [False, True])
def test_the_folded_decoder_equals_the_plain_one(is_training):
    """Logits, the gradients of parameters and maps, and the batch norm's statistics."""
    generator = torch.Generator().manual_seed(2)
    sizes = ((25, 33), (13, 17), (7, 9), (4, 5))
    maps = [
        torch.randn(2, width, *size, generator=generator, dtype=torch.float64)
        for width, size in zip(MINI.widths, sizes, strict=True)
    ]
    results = []
    for forward in (segformer.DecodeHead.forward, plain_decoder):
        head = randomised(segformer.DecodeHead(MINI.widths, 64, dropout=0.3, num_classes=5))
        head = head.double().train(is_training)
        inputs = [x.clone().requires_grad_() for x in maps]
        torch.manual_seed(4)  # the same channels are dropped
        logits = forward(head, inputs)
        logits.square().sum().backward()
        results.append([logits, *(t.grad for t in (*inputs, *head.parameters())), *head.buffers()])
    for ours, plain in zip(*results, strict=True):
        close(ours, plain, 1e-10 * max(1.0, plain.abs().max().item()))


# --- files ---------------------------------------------------------------------------------------

# A form of a checkpoint: how it is written into a folder.


def hub_state(model) -> dict[str, torch.Tensor]:
    return segformer.to_official(model.state_dict())


def encoder_alone(state):
    return {n: t for n, t in state.items() if not n.startswith("decode_head.")}


def mit_hub(state, folder):
    more = {"classifier.weight": torch.ones(1000, 128), "classifier.bias": torch.ones(1000)}
    torch.save(encoder_alone(state) | more, folder / "pytorch_model.bin")
    return folder


def mit_authors(state, folder):
    state = {n.removeprefix("backbone."): t for n, t in as_authors(encoder_alone(state)).items()}
    state = {n: t for n, t in state.items() if "conv_seg" not in n}
    more = {"head.weight": torch.ones(1000, 128), "head.bias": torch.ones(1000)}
    torch.save(state | more, folder / "mit_b0.pth")
    return folder / "mit_b0.pth"


def mit_5(state, folder):
    """transformers' class for the encoder."""
    named = {n.removeprefix("segformer."): t for n, t in encoder_alone(state).items()}
    model = SegformerModel.from_pretrained(None, config=official_config(MINI), state_dict=named)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("form", [mit_hub, mit_authors, mit_5], ids=lambda form: form.__name__)
def test_an_encoder_gets_a_new_head(mini, form, tmp_path, capsys):
    source = form(hub_state(mini), tmp_path)
    with pytest.raises(ValueError, match="encoder alone, without a head; give num_classes"):
        SegFormer.from_pretrained(source)
    capsys.readouterr()
    model = SegFormer.from_pretrained(source, num_classes=3, image_size=96)
    assert model.config == replace(MINI, num_classes=3, image_size=96)
    (printed,) = capsys.readouterr().out.splitlines()
    names = set(printed.split("untrained: ")[1].split(", "))
    parameters = {n for n in hub_state(model) if n.startswith("decode_head.")}
    assert names == without_count(dict.fromkeys(parameters)).keys()
    for name, t in encoder_alone(hub_state(mini)).items():
        assert torch.equal(hub_state(model)[name], t), name
    head = model.decode_head
    for module in (*head.linear_c, head.linear_fuse, head.classifier):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.2)
        assert module.bias is None or not module.bias.any()
    assert head.batch_norm.weight.eq(1).all() and head.batch_norm.running_var.eq(1).all()


def test_another_number_of_classes_makes_a_new_classifier(mini, tmp_path, capsys):
    source = hub_4(without_count(hub_state(mini)), tmp_path)
    same = SegFormer.from_pretrained(source, num_classes=5)
    assert "untrained" not in capsys.readouterr().out
    assert torch.equal(same.decode_head.classifier.weight, mini.decode_head.classifier.weight)
    model = SegFormer.from_pretrained(source, num_classes=2)
    assert f"new and untrained: {', '.join(CLASSIFIER)}\n" in capsys.readouterr().out
    assert model.config == replace(MINI, num_classes=2)
    old, new = hub_state(mini), hub_state(model)
    assert new[CLASSIFIER[0]].shape == (2, 64, 1, 1) and not new[CLASSIFIER[1]].any()
    assert 0.01 < new[CLASSIFIER[0]].std() < 0.03
    for name in set(old) - set(CLASSIFIER):
        assert torch.equal(old[name], new[name]), name


@pytest.mark.parametrize(
    "absent", ["decode_head.classifier.weight", "decode_head.linear_c.2.proj.bias"]
)
def test_num_classes_excuses_nothing_else(mini, absent, tmp_path):
    state = hub_state(mini)
    del state[absent]
    with pytest.raises(ValueError, match=f"{absent} is missing"):
        SegFormer.from_pretrained(hub_4(state, tmp_path), num_classes=3)


def test_two_names_of_one_tensor_and_other_models_are_refused(mini, tmp_path):
    state = hub_state(mini)
    state["backbone.norm4.bias"] = state["segformer.encoder.layer_norm.3.bias"]
    with pytest.raises(ValueError, match="segformer.encoder.layer_norm.3.bias occurs twice"):
        SegFormer.from_pretrained(hub_4(state, tmp_path))
    run_folder(segformer.convert(hub_state(mini)), tmp_path, **{"class": "BEiT"})
    with pytest.raises(ValueError, match="holds BEiT in format 1, not SegFormer"):
        SegFormer.from_pretrained(tmp_path)


def test_settings_that_no_tensor_tells_come_from_config_json(mini, tmp_path):
    config = replace(MINI, heads=(2, 4, 5, 4), drop_path=0.3, dropout=0.2)
    other = SegFormer(config).eval()
    other.load_state_dict(mini.state_dict())
    official = theirs(other)
    official.save_pretrained(tmp_path)
    model = SegFormer.from_pretrained(tmp_path, threshold=0.3)
    assert model.config == replace(config, threshold=0.3)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        close(model(image), official(pixel_values=image).logits)
        assert not torch.allclose(model(image), mini(image), atol=1e-3)


# --- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["kvasir_polyp", "ct_gi", "busi"])
def test_preprocessing_is_the_official_one(data, real_data):
    config = segformer.VARIANTS["b0"]
    processor = SegformerImageProcessorPil()
    for path in sorted((real_data / data / "images").iterdir())[:2]:
        image = Image.open(path)
        mask = np.asarray(Image.open(real_data / data / "masks" / path.name).convert("L")).copy()
        mask[:5, :5] = 255  # to be ignored
        expected = processor(image.convert("RGB"), mask, return_tensors="pt")
        ours = segformer.preprocess(image, config)
        assert ours.shape == (3, 512, 512) and ours.dtype == torch.float32
        close(ours, expected["pixel_values"][0], 2e-6)
        ours = segformer.preprocess_mask(torch.from_numpy(mask), config)
        assert torch.equal(ours[0].long(), expected["labels"][0])


def test_probabilities_at_the_image_s_own_size(mini):
    logits = torch.randn(5, 32, 32)
    ours = mini.postprocess(logits, (147, 301))
    outputs = type("Outputs", (), {"logits": logits[None]})
    (classes,) = SegformerImageProcessorPil().post_process_semantic_segmentation(
        outputs, [(147, 301)]
    )
    assert ours.shape == (5, 147, 301)
    first, second = ours.topk(2, 0).values
    clear = first - second > 1e-6  # float32 may make ties of probabilities that are closer
    assert clear.float().mean() > 0.999 and torch.equal(ours.argmax(0)[clear], classes[clear])
    close(ours.sum(0), torch.ones(147, 301), 1e-5)
    one = mini.postprocess(logits[:1], (64, 64))
    expected = F.interpolate(logits[None, :1], (64, 64), mode="bilinear", align_corners=False)
    close(one, expected[0].sigmoid(), 1e-6)


# --- real weights --------------------------------------------------------------------------------

PUBLISHED = {  # logits[0, 0, :3, :3]; transformers' conversion script
    "b0": (-4.6310, -5.5232, -6.2356, -5.1921, -6.1444, -6.5996, -5.4424, -6.2790, -6.7574),
    "b1": (-7.5820, -8.7231, -8.3215, -8.0600, -10.3529, -10.0304, -7.5208, -9.4103, -9.6239),
    "b2": (-11.8173, -14.3850, -16.3128, -14.5648, -16.5804, -18.6568, -14.7223, -15.7387,
           -18.4218),
    "b3": (-9.0878, -10.2081, -10.1891, -9.3144, -10.7941, -10.9843, -9.2294, -10.3855, -10.5704),
    "b4": (-12.3144, -13.2447, -14.0802, -13.3614, -14.5816, -15.6117, -13.3340, -14.4433,
           -16.2219),
    "b5": (-9.5524, -12.0835, -11.7348, -10.5229, -13.6446, -14.5662, -9.5842, -12.8851, -13.9414),
}  # fmt: skip


@pytest.mark.online
@pytest.mark.parametrize("variant", OFFICIAL)
@torch.no_grad()
def test_published_numbers_of_the_real_weights(variant, tmp_path):
    from test_online import CATS, picture

    image = picture(CATS, tmp_path)
    size = "640-640" if variant == "b5" else "512-512"
    hub_id = f"nvidia/segformer-{variant}-finetuned-ade-{size}"
    model = SegFormer.from_pretrained(hub_id, image_size=512)  # the script's, for b5 too
    assert model.config == replace(segformer.VARIANTS[variant], image_size=512)
    logits = model(model.preprocess(image)[None])
    assert logits.shape == (1, 150, 128, 128)
    close(logits[0, 0, :3, :3].flatten(), torch.tensor(PUBLISHED[variant]), 1e-3)


@pytest.mark.online
def test_an_encoder_loads_from_the_hub(capsys):
    from huggingface_hub import constants
    from test_online import reach

    reach(constants.ENDPOINT)
    model = SegFormer.from_pretrained("nvidia/mit-b0", num_classes=4)
    assert model.config == replace(segformer.VARIANTS["b0"], num_classes=4)
    assert "new and untrained: decode_head." in capsys.readouterr().out
