"""LoRA: starts as nothing, trains alone, merges into the plain model."""

import pytest
import torch
from torch import nn

import adapters
import cris


def mini() -> cris.CRIS:
    torch.manual_seed(0)
    return cris.CRIS(cris.VARIANTS["mini"]).eval()


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 3, 64, 64), torch.tensor([[49406, 320, 49407], [49406, 500, 49407]])


def test_it_starts_as_the_loaded_model_and_ends_in_its_names():
    model, plain = mini(), mini()
    adapters.add_lora(model, 4, lambda name: name.startswith("backbone."))
    torch.testing.assert_close(model(*inputs()), plain(*inputs()), rtol=0, atol=0)
    merged = adapters.merged_state_dict(model)
    assert set(merged) == set(plain.state_dict())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(merged[name], tensor), name


def test_only_the_updates_and_what_was_not_chosen_learn():
    model = mini().train()
    before = {name: t.clone() for name, t in adapters.merged_state_dict(model).items()}
    adapters.add_lora(model, 4, lambda name: name.startswith("backbone."))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    towers = {name for name in trained if name.startswith("backbone.")}
    assert towers and all(adapters.is_lora(name) for name in towers)
    assert any("in_proj_weight" in name for name in towers), "packed projections are reached too"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step `up` is zero, and so is the gradient of `down`
        model(*inputs()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = adapters.merged_state_dict(model)
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
    adapters.add_lora(layer, 3, lambda name: True)
    nn.init.normal_(layer[0].parametrizations.weight[0].up)
    difference = adapters.merged_state_dict(layer)["0.weight"] - weight
    assert torch.linalg.matrix_rank(difference) == 3
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 3 * (20 + 30)


def test_a_merged_model_is_plain_and_gives_the_same():
    image, tokens = inputs()
    model, untouched = mini().double(), mini().double()
    adapters.add_lora(model, 4, lambda name: name.startswith("backbone."))
    for name, p in model.named_parameters():
        if name.endswith(".up"):
            nn.init.normal_(p, std=0.1)
    expected, state = model(image.double(), tokens), adapters.merged_state_dict(model)
    assert (expected - untouched(image.double(), tokens)).abs().max() > 1e-3
    adapters.merge_lora(model)
    assert set(model.state_dict()) == set(untouched.state_dict()) == set(state)
    torch.testing.assert_close(model(image.double(), tokens), expected, rtol=0, atol=1e-12)
    untouched.load_state_dict(state)
    torch.testing.assert_close(untouched(image.double(), tokens), expected, rtol=0, atol=1e-12)


def test_nothing_to_work_on_is_an_error():
    with pytest.raises(ValueError, match="no linear layer"):
        adapters.add_lora(mini(), 4, lambda name: "bn" in name)
    with pytest.raises(ValueError, match="at least 1"):
        adapters.add_lora(mini(), 0, lambda name: True)
