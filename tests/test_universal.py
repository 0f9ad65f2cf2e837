"""The Universal Model: official numbers, loading, its head, its classes, its files."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, close, randomised, shapes, write_run
from forms.universal import MINI, model_of, released, todays
from recipe import fill

import swin_unetr3d
import universal
from swin_unetr3d import SwinUNETR
from universal import CODES, UniversalConfig, UniversalSwinUNETR, dynamic_head

pytestmark = pytest.mark.numeric

GOLDEN = ROOT / "tests/golden/universal_swinunetr.npz"
KEYS = json.loads((ROOT / "tests/golden/monai_keys.json").read_text())
SIZE = (64, 32, 32)


@pytest.fixture(scope="module")
def mini():
    return model_of("text")


@pytest.fixture(scope="module")
def plain():
    """A Swin UNETR of 14 classes, in MONAI's names."""
    model = randomised(SwinUNETR(swin_unetr3d.Config(12)))
    return swin_unetr3d.to_official(model.state_dict())


@pytest.fixture
def volume():
    return torch.rand(1, 1, *SIZE, generator=torch.Generator().manual_seed(0))


# --- the official numbers ------------------------------------------------------------------------


EVERY = {  # what of an output is in the golden file
    "logits": (slice(1, None, 4), slice(2, None, 4), slice(3, None, 4)),
    "decoder": (slice(1, None, 8), slice(2, None, 8), slice(3, None, 8)),
}


@pytest.mark.parity
@torch.no_grad()
def test_golden_outputs_through_the_released_form(tmp_path, capsys, parity):
    golden = np.load(GOLDEN)
    meta, keys = json.loads(str(golden["meta"])), json.loads(str(golden["keys"]))
    state = {n: torch.from_numpy(fill(n, tuple(s), meta["seed"])) for n, s, _ in keys}
    index = [n for n in golden.files if n.startswith("buffers/")]
    state |= {n.removeprefix("buffers/"): torch.from_numpy(golden[n]) for n in index}
    model = UniversalSwinUNETR.from_pretrained(released(state, tmp_path))
    told = capsys.readouterr().out
    assert "merging legacy, by its name" in told and "untrained" not in told
    assert model.config == UniversalConfig() and not model.training
    assert torch.equal(model.organ_embedding, state["organ_embedding"])
    found = {}
    keep = {"encoder10": "dec4", "decoder1": "decoder", "GAP": "GAP"}
    for module, name in keep.items():

        def hook(_module, _inputs, output, name=name):
            found[name] = output

        model.get_submodule(module).register_forward_hook(hook)
    logits = model(torch.from_numpy(golden["in/image"][:1]))
    found |= {"params": model.head_numbers(found["dec4"]), "logits": logits}
    for name in ("dec4", "decoder", "GAP", "params", "logits"):  # the first that differs is told
        x = found[name][(..., *EVERY.get(name, ()))]
        expected = torch.from_numpy(golden[f"out/{name}"][:1])
        error = (x - expected).abs().max().item()
        limit = 4 * meta["float32_vs_float64_max_abs"][name]
        print(f"{name} differs by {error:.1e} of {expected.abs().max():.1f}, limit {limit:.1e}")
        assert error <= limit, f"{name} differs by {error:.1e}, more than {limit:.1e}"
    official = "CLIP-Driven-Universal-Model 43c1239"
    deviation = error / expected.abs().max().item()
    parity("universal", "universal, logits", official, float32=deviation)
    means = torch.from_numpy(golden["out/logits_abs_mean"][:1])
    close(logits.double().abs().mean((2, 3, 4)), means, 4e-6)


def test_names_and_shapes_are_those_of_the_released_file():
    keys = KEYS["universal_swin_unetr_released"]
    assert len(keys) == 170
    file = {n.removeprefix("module."): torch.empty(s, device="meta") for n, s, *_ in keys}
    with torch.device("meta"):
        config = universal.UNIVERSAL_VARIANTS["universal"]
        model = UniversalSwinUNETR(config, torch.empty(32, universal.TEXT))
    ours = model.state_dict()
    assert shapes(swin_unetr3d.convert(file)) == shapes(ours)
    official = {
        n.removeprefix("backbone."): s for n, s in shapes(universal.to_official(ours)).items()
    }
    assert official == shapes(file)
    assert shapes(swin_unetr3d.convert(universal.to_official(ours))) == shapes(ours)
    count = sum(p.numel() for p in model.parameters())
    assert f'"universal": UniversalConfig(),  # {count:,}\n' in (ROOT / "universal.py").read_text()


def test_a_one_hot_checkpoint_of_the_few_shot_study(tmp_path):
    """Its codes of 32 numbers were never the file's: they are random ones, which it saved."""
    config = UniversalConfig(12, codes="one-hot")
    state = universal.to_official(randomised(UniversalSwinUNETR(config)).state_dict())
    codes = torch.randn(32, 32, generator=torch.Generator().manual_seed(5))
    loaded = UniversalSwinUNETR.from_pretrained(
        todays(state | {"organ_embedding": codes}, tmp_path)
    )
    assert loaded.config == config and torch.equal(loaded.organ_embedding, codes)
    linear = loaded.text_to_vision
    expected = (codes @ linear.weight.T + linear.bias).clamp(min=0)
    close(loaded.codes(), expected, 1e-5 * expected.max().item())


# --- the head ------------------------------------------------------------------------------------


def official_head(x: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """As the official code has it: the map once for each class, convolutions in groups."""
    logits = []
    for features, of_image in zip(x, numbers, strict=True):
        K, y = len(of_image), features.repeat(len(of_image), 1, 1, 1)[None]  # (1,K*8,D,H,W)
        parts = of_image.split([64, 64, 8, 8, 8, 1], 1)
        for i, outputs in enumerate((8, 8, 1)):
            weight, bias = parts[i].reshape(K * outputs, 8, 1, 1, 1), parts[i + 3].reshape(-1)
            y = F.conv3d(y.relu() if i else y, weight, bias, groups=K)
        logits.append(y)
    return torch.cat(logits)


def test_the_head_and_its_gradients_equal_grouped_convolutions():
    """In float64, with more voxels than are done at a time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 16, 17, 18, generator=generator).double().requires_grad_()
    numbers = torch.randn(2, 5, 153, generator=generator).double().requires_grad_()
    assert x[0, 0].numel() > universal.CHUNK
    weight = torch.randn(2, 5, 16, 17, 18, generator=generator).double()
    results = []
    for head in (dynamic_head, official_head):
        logits = head(x, numbers)
        assert logits.shape == weight.shape
        results.append([logits, *torch.autograd.grad(logits, (x, numbers), weight)])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs, 1e-12 * theirs.abs().max().item())


@torch.no_grad()
def test_numbers_of_a_class_come_from_image_and_code(mini):
    """The official concatenation: the image's 256 numbers first, then the class's."""
    bottom = torch.randn(2, 192, 2, 1, 3)
    y = F.group_norm(bottom, 16, mini.GAP[0].weight, mini.GAP[0].bias).relu().mean((2, 3, 4))
    image = y @ mini.GAP[3].weight.flatten(1).T + mini.GAP[3].bias
    linear = mini.text_to_vision
    code = (mini.organ_embedding @ linear.weight.T + linear.bias).relu()
    x = torch.cat((image[:, None].repeat(1, 3, 1), code.repeat(2, 1, 1)), 2)
    expected = x @ mini.controller.weight.flatten(1).T + mini.controller.bias
    # Sums of 512 products, which round by sqrt(512) * 6e-8 = 1.4e-6 of their scale.
    close(mini.head_numbers(bottom), expected, 1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_group_norms_on_maps_of_many_voxels_are_exact():
    """With channels last in memory a CPU's are not: 5e-4 of the deviation here, not below 2e-5."""
    model = model_of("random", intensity=None)
    volume = torch.rand(1, 1, 96, 96, 64, generator=torch.Generator().manual_seed(0))
    top = torch.randn(1, 12, 96, 96, 64, generator=torch.Generator().manual_seed(1)) + 3
    top = top.contiguous(memory_format=torch.channels_last_3d)  # as the decoder's
    bottom = torch.randn(1, 192, 3, 3, 2)
    model.features = lambda volume: (bottom.to(volume.dtype), top.to(volume.dtype))
    logits = model(volume)
    exact = model.double()(volume.double())
    error = ((logits - exact).abs().max() / exact.std()).item()
    assert error < 2e-5, error


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", CODES)
@torch.no_grad()
def test_asking_for_some_classes_gives_their_channels(codes, volume):
    model = model_of(codes)
    every, some = model(volume), model(volume, [2, 0])
    assert every.shape == (1, 3, *SIZE) and some.shape == (1, 2, *SIZE)
    close(some, every[:, [2, 0]], 1e-5 * every.abs().max().item())


@torch.no_grad()
def test_volumes_of_a_batch_do_not_see_each_other(mini, volume):
    """In float64: batches of another size are summed in another order, which float32 rounds."""
    model = copy.deepcopy(mini).double()
    volume = torch.cat((volume, volume.flip(2) ** 2)).double()
    together = model(volume)
    alone = torch.cat([model(one[None]) for one in volume])
    close(together, alone, 1e-9 * alone.abs().max().item())


@pytest.mark.parametrize("codes", CODES)
@torch.no_grad()
def test_a_further_class_leaves_the_others_as_they_are(codes, volume, tmp_path):
    model, others = model_of(codes), [0, 1, 2]
    before = model(volume, others)
    model.add_class("kidney", torch.randn(512) if codes == "text" else None)
    assert model.config.num_classes == 4 and model.config.classes[-1] == "kidney"
    # Products for four classes may add up in another order than those for three. Sums of 512
    # numbers round by sqrt(512) * 6e-8 = 1.4e-6 of their scale, and a few layers follow.
    close(model(volume, others), before, 1e-5 * before.abs().max().item())
    if codes == "one-hot":
        rest = model.organ_embedding[:3, 3], model.organ_embedding[3]
        assert torch.cat(rest).tolist() == [0, 0, 0, 0, 0, 0, 1]
    every = model(volume)
    assert every.shape == (1, 4, *SIZE)
    assert not torch.allclose(every[:, 3:], every[:, :3], atol=1e-2)
    write_run(tmp_path / "run", UniversalSwinUNETR, model.state_dict(), model.config)
    loaded = UniversalSwinUNETR.from_pretrained(tmp_path / "run")
    assert loaded.config == model.config and torch.equal(loaded(volume), every)
    with pytest.raises(ValueError, match="class 'kidney' exists already"):
        model.add_class("kidney")


def test_a_further_class_learns(volume):
    model = model_of("random")
    model.add_class("kidney")
    model(volume, [3]).sum().backward()
    gradient = model.organ_embedding.weight.grad
    assert gradient[3].abs().sum() > 0 and gradient[:3].abs().sum() == 0


def test_probabilities_are_a_sigmoid_for_each_class(mini):
    logits = torch.randn(3, 4, 5, 6)
    close(mini.postprocess(logits, (4, 5, 6)), 1 / (1 + (-logits).exp()), 1e-6)


# --- from other models' files --------------------------------------------------------------------


def encoder_alone(state) -> dict[str, torch.Tensor]:
    named = {n.removeprefix("swinViT."): t for n, t in state.items() if n.startswith("swinViT.")}
    return {f"module.{n.replace('.linear', '.fc')}": t for n, t in named.items()}


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("file", ["Swin UNETR", "encoder alone"])
def test_a_backbone_gets_a_new_head(plain, file, codes, tmp_path, capsys):
    path, state = tmp_path / "model.pt", plain if file == "Swin UNETR" else encoder_alone(plain)
    torch.save({"state_dict": state}, path)
    embedding = torch.randn(2, 512) if codes == "text" else None
    with pytest.raises(
        ValueError, match="has no codes of classes; give classes and, for texts, em"
    ):
        UniversalSwinUNETR.from_pretrained(path, embedding=embedding, codes=codes)
    model = UniversalSwinUNETR.from_pretrained(path, ["liver", "lung"], embedding, codes=codes)
    assert model.config == replace(
        MINI, num_classes=2, codes=codes, classes=("background", "liver", "lung")
    )
    told = capsys.readouterr().out.splitlines()[-1]
    new = ["organ_embedding", "text_to_vision", "precls_conv", "GAP", "controller"]
    new.remove("text_to_vision") if codes == "random" else None
    if file == "encoder alone":
        new += [f"encoder{i}" for i in (1, 2, 3, 4, 10)] + [f"decoder{i}" for i in (1, 2, 3, 4, 5)]
    assert set(re.split(": |, ", told.split("new and untrained: ")[1])) == set(new)
    ours, loaded = swin_unetr3d.convert(plain), model.state_dict()
    kept = [n for n in ours if n in loaded and n.split(".")[0] not in new]
    assert len(kept) == {"Swin UNETR": 149, "encoder alone": 118}[file]
    assert all(torch.equal(ours[n], loaded[n]) for n in kept)
    if codes == "text":
        assert torch.equal(model.organ_embedding, embedding)
    if codes == "one-hot":
        assert torch.equal(model.organ_embedding, torch.eye(2))


def test_a_backbone_needs_the_texts_of_its_classes(plain, tmp_path):
    torch.save({"state_dict": plain}, tmp_path / "model.pt")
    with pytest.raises(
        ValueError, match="has no codes of classes; give classes and, for texts, em"
    ):
        UniversalSwinUNETR.from_pretrained(tmp_path, ["liver"])
    with pytest.raises(ValueError, match="codes 'random' take no embedding; remove it"):
        UniversalSwinUNETR.from_pretrained(tmp_path, ["liver"], torch.ones(1, 512), codes="random")
    for shape in (2, 512), (1, 768), (512,):
        with pytest.raises(ValueError, match=re.escape(f"{shape}, these classes need (1, 512)")):
            UniversalSwinUNETR.from_pretrained(tmp_path, ["liver"], torch.ones(shape))


def test_a_hole_is_named(mini, tmp_path):
    state = universal.to_official(mini.state_dict())
    for name in (
        "controller.bias",
        "controller.weight",
        "backbone.decoder3.conv_block.conv3.conv.weight",
    ):
        rest = {n: t for n, t in state.items() if n != name}
        with pytest.raises(ValueError, match=f"1 tensors do not fit: {name} is missing"):
            UniversalSwinUNETR.from_pretrained(released(rest, tmp_path))


# --- wrong calls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 4, 64, 64, 64), (64, 64, 64), (1, 1, 64, 64, 48)])
def test_volumes_that_do_not_fit_are_told(mini, shape):
    with pytest.raises(ValueError) as caught:
        mini(torch.zeros(shape))
    assert "\n" not in str(caught.value) and str(shape[-3:])[1:-1] in str(caught.value)


@pytest.mark.parametrize("codes", ["texts", "", "one_hot"])
def test_codes_that_do_not_exist_are_told(codes):
    with pytest.raises(ValueError, match=f"codes is {codes!r}, must be one of text, random"):
        UniversalSwinUNETR(replace(MINI, codes=codes))


def test_a_further_class_needs_the_code_of_its_kind():
    with pytest.raises(ValueError, match=r"codes 'text' need an embedding \(512,\)"):
        model_of("text").add_class("kidney")
    with pytest.raises(ValueError, match="codes 'random' take no embedding"):
        model_of("random").add_class("kidney", torch.ones(512))
    with pytest.raises(ValueError, match=r"embedding is \(1, 512\), these classes need \(512,\)"):
        model_of("text").add_class("kidney", torch.ones(1, 512))


def test_codes_of_another_kind_than_the_file_s_are_told(mini, tmp_path):
    path = released(universal.to_official(mini.state_dict()), tmp_path)
    with pytest.raises(ValueError, match="its codes are text, not random"):
        UniversalSwinUNETR.from_pretrained(path, codes="random")
