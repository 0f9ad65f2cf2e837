"""LoRA: train a small update beside large weights that stay as they are.

Hu et al., ICLR 2022, arXiv 2106.09685: weight + up @ down, where `up` (O,R) starts at zero, so that
an untouched model is the model that was loaded. Here the update is a parametrisation of the weight
(torch.nn.utils.parametrize), so it reaches every linear layer, the packed projections of
nn.MultiheadAttention too, without a line in the model's own file.

    add_lora(model, 8, lambda name: name.startswith("clip."))
    ...                                            # train what requires gradients
    save_adapter(model, "adapter.safetensors")     # small: what was trained
    save_file(merged_state_dict(model), path)      # or all of it, with the plain model's names
    merge_lora(model)                              # the plain model

    load_adapter(model, "adapter.safetensors")     # elsewhere, in the model before training
    merge_lora(model)                              # the same plain model, bit for bit

SAMed (github.com/hitachinsk/SAMed) updates queries and values alone, each by rank 4, in an encoder
that is frozen whole:

    add_lora(sam, 4, lambda name: name.startswith("vision_encoder."),
             chosen=lambda name: name.endswith("attn.qkv.weight"), thirds=(0, 2))
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LoRA(nn.Module):
    """weight (O,I) -> weight + up @ down in some rows (O' of them), an update of rank R at most."""

    def __init__(self, weight: Tensor, rank: int, rows: slice = slice(None)):
        super().__init__()
        self.rows, (outputs, inputs) = rows, weight[rows].shape
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def forward(self, weight: Tensor) -> Tensor:
        updated = weight[self.rows] + self.up @ self.down  # (O',I)
        # Not weight + zeros elsewhere: the other rows stay the same bits.
        return weight.slice_scatter(updated, 0, self.rows.start, self.rows.stop)  # (O,I)


def add_lora(
    model: nn.Module,
    rank: int,
    frozen: Callable[[str], bool],
    chosen: Callable[[str], bool] = lambda name: True,
    thirds: tuple[int, ...] = (),
) -> None:
    """Freezes the parameters of a frozen name; those that are weights of linear layers get LoRA.

    chosen: of these weights only some. thirds: of a projection that packs queries, keys and values
    (3C,C), which of the three get an update, each its own; (): the weight has one for all rows.
    Raises ValueError if rank is below 1, no linear layer is chosen or one is not packed in thirds.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, not {rank}")
    linear = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}
    places = []
    for path, module in model.named_modules():
        for kind, key in linear.items():
            name = f"{path}.{key}".lstrip(".")
            if isinstance(module, kind) and frozen(name) and chosen(name):
                rows, C = getattr(module, key).shape
                if thirds and rows != 3 * C:
                    raise ValueError(f"{name} is ({rows},{C}), not (3C,C), so it has no thirds")
                places.append((module, key, C))
    if not places:
        raise ValueError("LoRA has no linear layer to work on")
    for name, parameter in model.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    for module, key, C in places:
        for rows in [slice(i * C, (i + 1) * C) for i in thirds] or [slice(None)]:
            lora = LoRA(getattr(module, key), rank, rows)
            parametrize.register_parametrization(module, key, lora)


# shared: tensor_fault
def tensor_fault(found: Tensor | None, expected: Tensor | None) -> str:
    """Return what is wrong with a tensor of a file, "" if nothing is."""
    if found is not None and found.is_nested:
        return "is a nested tensor, expected a dense one"
    shape = "missing" if found is None else tuple(found.shape)
    expected_shape = "no such tensor" if expected is None else tuple(expected.shape)
    if shape != expected_shape:
        return f"is {shape}, expected {expected_shape}"
    if not expected.is_floating_point():
        return ""

    if found.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(found.dtype).removeprefix("torch.")
        return f"holds {kind} numbers, expected float16, bfloat16, float32 or float64"
    if found.layout != torch.strided or found.is_meta:
        return "is sparse or has no values, expected a dense tensor"
    if found.numel():
        low, high = torch.aminmax(found.detach())  # NaN if any value is; ten times isfinite's speed
        largest = torch.finfo(expected.dtype).max
        if not -largest <= low.item() <= high.item() <= largest:
            return f"holds NaN, infinity or values beyond {str(expected.dtype)[6:]}"
    return ""


# end shared


def is_lora(name: str) -> bool:
    """Whether a parameter or tensor of this name belongs to an update."""
    return name.endswith((".down", ".up")) and "parametrizations." in name


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


def merge_state_dict(state: dict[str, Tensor], thirds: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Return `merged_state_dict` of the model with this state dict, whose updates are not merged.

    thirds: as for `add_lora`. Without updates all tensors stay as they are.
    """
    plain = {}
    for name, tensor in state.items():
        module, is_parametrised, rest = name.partition("parametrizations.")
        if not is_parametrised:
            plain[name] = tensor
        elif not is_lora(name):  # MODULE.parametrizations.KEY.original
            plain[module + rest.removesuffix(".original")] = tensor.clone()

    for name, up in state.items():
        if not is_lora(name) or not name.endswith(".up"):
            continue
        module, _, rest = name.partition("parametrizations.")
        key, number, _ = rest.split(".")  # MODULE.parametrizations.KEY.NUMBER.up
        rows = slice(None)
        if thirds:
            first = thirds[int(number)] * len(up)
            rows = slice(first, first + len(up))
        plain[module + key][rows] += up @ state[name.removesuffix("up") + "down"]
    return plain


def merge_lora(model: nn.Module) -> None:
    """Adds the updates to the weights and takes the parametrisations off."""
    for module in list(model.modules()):
        for key in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, key, leave_parametrized=True)


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Every tensor that is not frozen, as safetensors: updates (not merged yet), decoder, buffers.

    Buffers (statistics of batch norms) are small and may change under frozen parameters, too. Where
    updates belong stands in the metadata: `lora`, name -> rank, first row and end, null for all.
    """
    from safetensors.torch import save_file

    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = {name: t.contiguous() for name, t in model.state_dict().items() if name not in frozen}
    updates = {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}
    places = {name: (len(m.down), m.rows.start, m.rows.stop) for name, m in updates.items()}
    save_file(state, path, {"lora": json.dumps(places)})


def is_place(place) -> bool:
    """Return True if a value is a rank and the first row and end of an update, or null for all."""
    if not isinstance(place, list) or len(place) != 3:
        return False
    rank, *rows = place
    return type(rank) is int and rank > 0 and all(n is None or type(n) is int for n in rows)


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """What `save_adapter` wrote, into the plain model that its training began with, ready to go on.

    Raises ValueError, with the model as it was, if the file is no adapter, is cut off, does not fit
    or holds NaN, infinity or another kind of numbers. Only names and shapes can tell: other weights
    of the same shapes give another model.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {})["lora"])
            found = {name: file.get_tensor(name) for name in [*file.keys()]}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no file of save_adapter, or cut off ({error})") from None
    if not isinstance(places, dict) or not all(map(is_place, places.values())):
        raise ValueError(f"{path}: does not say where its updates belong; save the adapter again")
    plain, parameters = model.state_dict(), dict(model.named_parameters())
    updates, wrong = [], []
    needed = {name: t for name, t in plain.items() if name not in parameters}  # buffers
    for name, (rank, start, stop) in places.items():
        module, _, rest = name.partition("parametrizations.")  # MODULE.parametrizations.KEY.INDEX
        key = rest.partition(".")[0]
        weight = parameters.get(module + key)
        if weight is None or weight.ndim != 2:
            wrong.append(module + key)
            continue
        if rank > min(weight.shape):  # which also bounds the memory for it
            wrong.append(f"{name} of rank {rank}")
            continue
        lora = LoRA(weight, rank, slice(start, stop))
        updates.append((module.rstrip("."), key, lora))
        needed |= {f"{name}.{part}": t for part, t in lora.state_dict().items()}
    fitting = plain | needed
    for name, tensor in found.items():
        if name not in fitting or fitting[name].shape != tensor.shape:
            wrong.append(name)
            continue
        fault = tensor_fault(tensor, fitting[name])
        if fault:
            wrong.append(f"{name} {fault}")
    wrong += [name for name in needed if name not in found]
    if wrong:
        raise ValueError(f"{path} does not fit this model: {', '.join(wrong[:3])} ({len(wrong)})")
    for module, key, lora in updates:
        parametrize.register_parametrization(model.get_submodule(module), key, lora)
    model.load_state_dict(model.state_dict() | found)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in found)
