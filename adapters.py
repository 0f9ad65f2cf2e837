"""LoRA: train a small update beside large weights that stay as they are.

Hu et al., ICLR 2022, arXiv 2106.09685: weight + up @ down, where `up` (O,R) starts at zero, so that
an untouched model is the model that was loaded. Here the update is a parametrisation of the weight
(torch.nn.utils.parametrize), so it reaches every linear layer, the packed projections of
nn.MultiheadAttention too, without a line in the model's own file.

    add_lora(model, rank=8, chosen=lambda name: name.startswith("clip."))
    ...                                            # train what requires gradients
    save_file(merged_state_dict(model), path)      # the plain model's names
    merge_lora(model)                              # the plain model
"""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.utils import parametrize


class LoRA(nn.Module):
    """weight (O,I) -> weight + up @ down, an update of rank `rank` at most."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        O, I = weight.shape
        self.down = nn.Parameter(weight.new_empty(rank, I))
        self.up = nn.Parameter(weight.new_zeros(O, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down  # (O,I)


def add_lora(model: nn.Module, rank: int, chosen: Callable[[str], bool]) -> None:
    """Freezes the parameters with a chosen name; those that are weights of linear layers get LoRA.

    Raises ValueError if rank is below 1 or no linear layer is chosen.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, not {rank}")
    linear = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}
    places = []
    for name, module in model.named_modules():
        for kind, key in linear.items():
            if isinstance(module, kind) and chosen(f"{name}.{key}"):
                places.append((module, key))
    if not places:
        raise ValueError("LoRA has no linear layer to work on")
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter.requires_grad_(False)
    for module, key in places:
        parametrize.register_parametrization(module, key, LoRA(getattr(module, key), rank))


def is_lora(name: str) -> bool:
    """Whether a parameter or tensor of this name belongs to an update."""
    return name.endswith((".down", ".up")) and ".parametrizations." in name


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the plain model, updates added to the weights. The model stays as it is."""
    state = {}
    for name, tensor in model.state_dict().items():
        module, found, rest = name.partition("parametrizations.")
        if found and not is_lora(name):  # MODULE.parametrizations.KEY.original
            key = rest.removesuffix(".original")
            tensor = getattr(model.get_submodule(module.rstrip(".")), key).detach()
            name = module + key
        if not is_lora(name):
            state[name] = tensor
    return state


def merge_lora(model: nn.Module) -> None:
    """Adds the updates to the weights and takes the parametrisations off."""
    for module in list(model.modules()):
        for key in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, key, leave_parametrized=True)
