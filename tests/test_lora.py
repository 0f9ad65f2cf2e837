"""LoRA: changes nothing at first, trains alone, merges into the plain model, makes small files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import cris
import sam_decoder
from engine import lora

pytestmark = pytest.mark.numeric


def mini() -> cris.CRIS:
    torch.manual_seed(0)
    return cris.CRIS(cris.VARIANTS["mini"]).eval()


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 64), torch.tensor([[49406, 320, 49407], [49406, 500, 49407]])


def test_it_starts_as_the_loaded_model_and_ends_in_its_names():
    model, plain = mini(), mini()
    lora.add_lora(model, 4, lambda name: name.startswith("backbone."))
    torch.testing.assert_close(model(*inputs()), plain(*inputs()), rtol=0, atol=0)
    merged = lora.merged_state_dict(model)
    assert set(merged) == set(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(merged[name], tensor), name


def test_only_the_updates_and_what_was_not_chosen_learn():
    model = mini().train()
    before = {name: t.clone() for name, t in lora.merged_state_dict(model).items()}
    lora.add_lora(model, 4, lambda name: name.startswith("backbone."))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    towers = {name for name in trained if name.startswith("backbone.")}
    assert towers and all(lora.is_lora(name) for name in towers)
    assert any("in_proj_weight" in name for name in towers), "packed projections are reached too"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step `up` is zero, and so is the gradient of `down`
        model(*inputs()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = lora.merged_state_dict(model)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    linear = {name for name in changed if name.startswith("backbone.transformer")}
    assert linear == {
        f"backbone.transformer.resblocks.{i}.{layer}"
        for i in range(2)
        for layer in (
            "attn.in_proj_weight",
            "attn.out_proj.weight",
            "mlp.c_fc.weight",
            "mlp.c_proj.weight",
        )
    }
    assert torch.equal(
        after["backbone.token_embedding.weight"], before["backbone.token_embedding.weight"]
    )


def test_the_update_has_the_rank_that_was_asked_for():
    layer = nn.Sequential(nn.Linear(20, 30))
    weight = layer[0].weight.detach().clone()
    lora.add_lora(layer, 3, lambda name: True)
    nn.init.normal_(layer[0].parametrizations.weight[0].up)
    difference = lora.merged_state_dict(layer)["0.weight"] - weight
    assert torch.linalg.matrix_rank(difference) == 3
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 3 * (20 + 30)


def test_a_merged_model_is_plain_and_gives_the_same():
    image, tokens = inputs()
    model, untouched = mini().double(), mini().double()
    lora.add_lora(model, 4, lambda name: name.startswith("backbone."))
    for name, p in model.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(p, std=0.1)
    expected, state = model(image.double(), tokens), lora.merged_state_dict(model)
    assert (expected - untouched(image.double(), tokens)).abs().max() > 1e-3
    lora.merge_lora(model)
    assert set(model.state_dict()) == set(untouched.state_dict()) == set(state)
    torch.testing.assert_close(model(image.double(), tokens), expected, rtol=0, atol=1e-12)
    untouched.load_state_dict(state)
    torch.testing.assert_close(untouched(image.double(), tokens), expected, rtol=0, atol=1e-12)


def test_nothing_to_work_on_is_an_error():
    with pytest.raises(ValueError, match="no linear layer"):
        lora.add_lora(mini(), 4, lambda name: "bn" in name)
    with pytest.raises(ValueError, match="at least 1"):
        lora.add_lora(mini(), 0, lambda name: True)


# --- some rows ------------------------------------------------------------------------------------


def mini_sam(seed: int = 0) -> sam_decoder.SAM:
    torch.manual_seed(seed)
    return sam_decoder.SAM(sam_decoder.VARIANTS["mini"]).eval()


def samed(model, rank: int = 4) -> None:
    """As SAMed does."""
    lora.add_lora(
        model,
        rank,
        lambda name: name.startswith("vision_encoder."),
        chosen=lambda name: name.endswith("attn.qkv.weight"),
        thirds=(0, 2),
    )


def train(model, forward, steps: int = 2, lr: float = 1.0) -> None:
    """In the first step `up` is zero, and so is the gradient of `down`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        forward(model).square().mean().backward()
        optimizer.step()


def sam_masks(model):
    torch.manual_seed(1)
    boxes = torch.tensor([[[9.0, 9, 99, 80]]])
    return model(torch.randn(1, 3, 256, 256), boxes=boxes)[0]


class Attending(nn.Module):
    """Packed projections of nn.MultiheadAttention, and a batch norm behind."""

    def __init__(self, dim: int = 24):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, 3, batch_first=True)
        self.norm, self.head = nn.BatchNorm1d(dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.attn(x, x, x, need_weights=False)[0].mean(1)
        return self.head(self.norm(x))


def mini_attending(seed: int = 0) -> Attending:
    torch.manual_seed(seed)
    return Attending().eval()


def test_rows_against_plain_matrices():
    """An update of rows 4 to 10, then one of all rows, of a bare layer."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 12).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    register = torch.nn.utils.parametrize.register_parametrization
    register(layer, "weight", lora.LoRA(layer.weight, 2, slice(4, 10)))
    register(layer, "weight", lora.LoRA(layer.weight, 1))
    some, whole = layer.parametrizations.weight
    assert some.up.shape == (6, 2) and whole.up.shape == (12, 1)
    assert not some.up.any() and not whole.up.any()
    bound = (6 / (1 + 5) / 5) ** 0.5  # kaiming_uniform: gain sqrt(2 / (1 + a**2)), a**2 = 5
    assert 0.1 * bound < some.down.abs().max() <= bound
    nn.init.normal_(some.up), nn.init.normal_(whole.up)
    expected = weight.clone()
    matrices = (some.up, some.down, whole.up, whole.down)
    up, down, up_of_all, down_of_all = (m.tolist() for m in matrices)
    for o in range(12):
        for i in range(5):
            expected[o, i] += up_of_all[o][0] * down_of_all[0][i]
            if 4 <= o < 10:
                expected[o, i] += up[o - 4][0] * down[0][i] + up[o - 4][1] * down[1][i]
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ expected.T + bias, rtol=0, atol=1e-12)
    lora.merge_lora(layer)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-12)


def test_samed_updates_queries_and_values_alone():
    model, plain = mini_sam(), mini_sam().state_dict()
    total = sum(p.numel() for p in model.parameters())
    encoder = sum(p.numel() for p in model.vision_encoder.parameters())
    samed(model)
    assert torch.equal(sam_masks(model), sam_masks(mini_sam()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # 4 blocks, 2 updates of rank 4 each, 64 channels in and 64 of the 192 rows out
    assert trained == total - encoder + 4 * 2 * 4 * (64 + 64)
    train(model, sam_masks)
    after = lora.merged_state_dict(model)
    assert set(after) == set(plain)
    for name, tensor in plain.items():
        if name.endswith("attn.qkv.weight"):
            bits = [t.view(torch.int32).split(64) for t in (after[name], tensor)]
            assert [torch.equal(*pair) for pair in zip(*bits, strict=True)] == [False, True, False]
        elif name.startswith("vision_encoder."):
            assert torch.equal(after[name], tensor), name
    name = "mask_decoder.iou_token.weight"
    assert not torch.equal(after[name], plain[name])


def test_each_third_has_an_update_of_its_own_rank():
    model = mini_sam().double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    samed(model)
    for name, p in model.named_parameters():
        if name.endswith(".up"):
            assert p.shape == (64, 4)
            nn.init.normal_(p)
    after = lora.merged_state_dict(model)
    name = "vision_encoder.layers.2.attn.qkv.weight"
    q, k, v = (after[name] - before[name]).split(64)
    assert [torch.linalg.matrix_rank(x).item() for x in (q, k, v)] == [4, 0, 4]
    assert torch.linalg.matrix_rank(torch.cat([q, v])) == 8  # none of them shares its `down`


def test_thirds_of_packed_projections_in_torch():
    model, plain = mini_attending(), mini_attending()
    lora.add_lora(
        model, 3, lambda name: name.startswith("attn."), lambda name: "in_proj" in name, (1,)
    )
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    updates = {n: size for n, size in trained.items() if n.startswith("attn.")}
    assert sum(updates.values()) == 3 * (24 + 24) and all(map(lora.is_lora, updates))
    x = torch.randn(2, 6, 24)
    train(model, lambda m: m(x))
    after, before = lora.merged_state_dict(model), plain.state_dict()
    changed = (after["attn.in_proj_weight"] != before["attn.in_proj_weight"]).any(1)
    assert changed[24:48].any() and not changed[:24].any() and not changed[48:].any()
    assert torch.equal(after["attn.out_proj.weight"], before["attn.out_proj.weight"])
    expected = model(x)
    lora.merge_lora(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


def test_what_has_no_thirds_is_refused_and_left_alone():
    model = mini_sam()
    with pytest.raises(ValueError, match=r"attn.proj.weight is \(64,64\), .*no thirds$"):
        lora.add_lora(
            model, 4, lambda name: ".attn." in name, lambda name: "attn.proj" in name, (0, 2)
        )
    assert all(p.requires_grad for p in model.parameters())


# --- small files ----------------------------------------------------------------------------------


def trained_sam():
    model = mini_sam()
    samed(model)
    train(model, sam_masks)
    return model, mini_sam, "vision_encoder.layers.0.attn.qkv.weight"


def trained_attending():
    """In training mode, so that the batch norm's statistics change."""
    model = mini_attending()
    lora.add_lora(model, 3, lambda name: name.startswith(("attn.", "norm.")))
    model.train()
    torch.manual_seed(1)
    train(model, lambda m: m(torch.randn(8, 6, 24)))
    return model, mini_attending, "norm.running_mean"


def trained_cris():
    model = mini().train()
    lora.add_lora(model, 4, lambda name: name.startswith("backbone."))
    train(model, lambda m: m(*inputs()), lr=0.1)
    return model, mini, "backbone.transformer.resblocks.0.attn.in_proj_weight"


def decoder_only():
    model = mini_sam()
    model.vision_encoder.requires_grad_(False)
    train(model, sam_masks)
    return model, mini_sam, "mask_decoder.iou_token.weight"


@pytest.mark.parametrize("make", [trained_sam, trained_attending, trained_cris, decoder_only])
def test_a_small_file_and_the_plain_model_give_the_trained_one(make, tmp_path):
    model, plain, changed = make()
    lora.save_adapter(model, tmp_path / "a.safetensors")
    expected, other = lora.merged_state_dict(model), plain()
    assert not torch.equal(expected[changed], other.state_dict()[changed])
    lora.load_adapter(other, tmp_path / "a.safetensors")
    # ready to go on: the same is trained, and saved again the file is the same
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, other)]
    assert flags[0] == flags[1]
    lora.save_adapter(other, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    lora.merge_lora(other)
    state = other.state_dict()
    assert set(state) == set(plain().state_dict()) == set(expected)
    for name, tensor in expected.items():
        same = tensor.numpy().tobytes() == state[name].numpy().tobytes()
        assert same, f"{name} is not the same bit for bit"


def test_the_file_is_small_and_its_names_are_what_was_trained(tmp_path):
    model, path = mini_sam(), tmp_path / "adapter.safetensors"
    samed(model)
    model.prompt_encoder.requires_grad_(False)
    model.mask_decoder.requires_grad_(False)
    lora.save_adapter(model, path)
    saved = load_file(path)
    fourier = "prompt_encoder.shared_embedding.positional_embedding"
    assert {name for name in saved if not lora.is_lora(name)} == {fourier}  # a buffer
    assert len(saved) == 4 * 2 * 2 + 1
    numbers = 4 * 2 * 4 * (64 + 64) + 2 * 32
    whole = sum(4 * t.numel() for t in mini_sam().state_dict().values())
    assert 4 * numbers < path.stat().st_size < 4 * numbers + 4096 < whole / 50
    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["lora"])
    first = "vision_encoder.layers.0.attn.qkv.parametrizations.weight.0"
    assert places[first] == [4, 0, 64] and places[first[:-1] + "1"] == [4, 128, 192]


def changed_file(path, tensors=None, **metadata):
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path) if tensors is None else tensors, path, old | metadata)


def test_what_does_not_fit_is_told_in_a_line_and_changes_nothing(tmp_path):
    path = tmp_path / "adapter.safetensors"
    lora.save_adapter(trained_sam()[0], path)
    good = path.read_bytes()

    def refused(words, model=None):
        model = model or mini_sam()
        names, before = list(model.state_dict()), [t.clone() for t in model.state_dict().values()]
        with pytest.raises(ValueError, match=words) as caught:
            lora.load_adapter(model, path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        assert list(model.state_dict()) == names  # no update was left behind
        assert all(map(torch.equal, model.state_dict().values(), before))
        path.write_bytes(good)

    first = "vision_encoder.layers.0.attn.qkv.parametrizations.weight.0"
    refused("this model: vision_encoder.layers.0.attn.qkv.weight, .*, ", mini())
    # a model that has updates already, maybe of other rows
    refused(r"this model: vision_encoder.layers.0.attn.qkv.weight, .* \(8\)", trained_sam()[0])
    narrow = replace(sam_decoder.VARIANTS["mini"], dim=32)
    refused(f"this model: {first}.down, ", sam_decoder.SAM(narrow))

    with safe_open(path, "pt") as file:
        places = json.loads(file.metadata()["lora"])
    changed_file(path, lora=json.dumps(places | {first: [5, 0, 64]}))
    refused(rf"{first}.down, {first}.up \(2\)")
    changed_file(path, lora=json.dumps(places | {first: [4, 0, 63]}))
    refused(rf"{first}.up \(1\)")
    changed_file(path, lora=json.dumps({k: v for k, v in places.items() if k != first}))
    refused(rf"{first}.down, {first}.up \(2\)")

    tensors = load_file(path)
    changed_file(path, {k: t for k, t in tensors.items() if k != f"{first}.up"})
    refused(rf"{first}.up \(1\)")
    buffer = "prompt_encoder.shared_embedding.positional_embedding"
    changed_file(path, {k: t for k, t in tensors.items() if k != buffer})
    refused(rf"{buffer} \(1\)")
    save_file(tensors, path)
    refused("no file of save_adapter")
    for size in (0, 5, 200, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        refused("no file of save_adapter, or cut off")
