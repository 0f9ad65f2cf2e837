"""LoRA: train a low-rank update of each weight matrix while the weights themselves are frozen.

Hu et al., ICLR 2022, arXiv 2106.09685: weight + up @ down. `up` (O,R) starts at zero, so a model
with new updates equals the model that was loaded. The update is a parametrisation of the weight
(torch.nn.utils.parametrize). It works for every linear layer, including the packed projections of
nn.MultiheadAttention, without a change in the model's own file.

    add_lora(model, 8, lambda name: name.startswith("clip."))
    ...                                            # train what requires gradients
    save_adapter(model, "adapter.safetensors")     # only what was trained: a small file
    save_file(merged_state_dict(model), path)      # or all weights, under the plain model's names
    merge_lora(model)                              # the plain model

    load_adapter(model, "adapter.safetensors")     # elsewhere, in the model before training
    merge_lora(model)                              # the same plain model, bit for bit

SAMed (github.com/hitachinsk/SAMed) updates only queries and values, each with rank 4, in a fully
frozen encoder:

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
    """Low-rank update of a weight (O,I): adds up @ down (O',I), of rank R, to O' of its rows."""

    def __init__(self, weight: Tensor, rank: int, rows: slice = slice(None)):
        super().__init__()
        self.rows = rows
        outputs, inputs = weight[rows].shape
        self.down = nn.Parameter(weight.new_empty(rank, inputs))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))  # as nn.Linear

    def forward(self, weight: Tensor) -> Tensor:
        updated = weight[self.rows] + self.up @ self.down  # (O',I)
        # The other rows are copied, not added to zero, so that they keep their bits.
        return weight.slice_scatter(updated, 0, self.rows.start, self.rows.stop)  # (O,I)


def add_lora(
    model: nn.Module,
    rank: int,
    frozen: Callable[[str], bool],
    chosen: Callable[[str], bool] = lambda name: True,
    thirds: tuple[int, ...] = (),
) -> None:
    """Freeze parameters, and add updates to those that are weights of linear layers.

    frozen: name of a parameter -> True to freeze it. chosen: name of a frozen weight -> True to
    give it an update. thirds: for projections that pack queries, keys and values (3C,C), which of
    the three get an update, each its own; (): one update for the whole weight. Raises ValueError if
    the rank is below 1, if no linear layer is chosen, or if a chosen one has no thirds.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, not {rank}")
    targets = linear_weights(model, lambda name: frozen(name) and chosen(name))
    if not targets:
        raise ValueError("LoRA has no linear layer to work on")
    for module, key, name in targets:
        rows, C = getattr(module, key).shape
        if thirds and rows != 3 * C:
            raise ValueError(f"{name} is ({rows},{C}), not (3C,C), so it has no thirds")

    for name, parameter in model.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    for module, key, _ in targets:
        weight = getattr(module, key)
        C = weight.shape[1]
        slices = [slice(i * C, (i + 1) * C) for i in thirds]
        for rows in slices or [slice(None)]:
            lora = LoRA(getattr(module, key), rank, rows)
            parametrize.register_parametrization(module, key, lora)


def linear_weights(
    model: nn.Module, chosen: Callable[[str], bool]
) -> list[tuple[nn.Module, str, str]]:
    """Return (module, attribute, name) of the chosen weights of linear layers."""
    attributes = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}
    weights = []
    for path, module in model.named_modules():
        for kind, key in attributes.items():
            name = f"{path}.{key}".lstrip(".")
            if isinstance(module, kind) and chosen(name):
                weights.append((module, key, name))
    return weights


# shared: tensor_fault
def tensor_fault(found: Tensor | None, expected: Tensor | None) -> str:
    """Return what is wrong with a tensor of a file, "" if nothing is wrong."""
    if found is None:
        return f"is missing, expected {tuple(expected.shape)}"
    if found.is_nested:
        return "is a nested tensor, expected a dense one"
    if expected is None:
        return f"is {tuple(found.shape)}, expected no such tensor"
    if found.shape != expected.shape:
        return f"is {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        return ""

    if found.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        kind = str(found.dtype).removeprefix("torch.")
        return f"holds {kind} numbers, expected float16, bfloat16, float32 or float64"
    if found.layout != torch.strided or found.is_meta:
        return "is sparse or has no values, expected a dense tensor"
    if found.numel():
        low, high = torch.aminmax(found.detach())  # NaN if any is; faster than isfinite
        largest = torch.finfo(expected.dtype).max
        if not -largest <= low.item() <= high.item() <= largest:
            return (
                f"holds NaN, infinity or values beyond {str(expected.dtype).removeprefix('torch.')}"
            )
    return ""


# end shared


def is_lora(name: str) -> bool:
    """Return True if a parameter or tensor of this name belongs to an update."""
    return name.endswith((".down", ".up")) and "parametrizations." in name


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the plain model, with the updates added to the weights.

    The model itself does not change.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        module, is_parametrised, rest = name.partition("parametrizations.")
        if is_parametrised and not is_lora(name):  # MODULE.parametrizations.KEY.original
            key = rest.removesuffix(".original")
            tensor = getattr(model.get_submodule(module.rstrip(".")), key).detach()
            name = module + key
        if not is_lora(name):
            state[name] = tensor
    return state


def merge_state_dict(state: dict[str, Tensor], thirds: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Return the state dict of the plain model from that of a model with updates.

    thirds: as for `add_lora`. A state dict without updates is returned as it is.
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
    """Add the updates to the weights, and remove the parametrisations from the model."""
    for module in list(model.modules()):
        for key in list(getattr(module, "parametrizations", {})):
            parametrize.remove_parametrizations(module, key, leave_parametrized=True)


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Save every tensor that is not frozen as safetensors: updates (not merged), decoder, buffers.

    Buffers (the statistics of batch norms) are small, and they can change under frozen parameters.
    The metadata `lora` say which rows each update belongs to: name -> rank, start and stop of the
    rows, null for all.
    """
    from safetensors.torch import save_file

    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    state = {}
    for name, tensor in model.state_dict().items():
        if name not in frozen:
            state[name] = tensor.contiguous()

    updates = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            updates[name] = (len(module.down), module.rows.start, module.rows.stop)
    save_file(state, path, {"lora": json.dumps(updates)})


def is_update(entry) -> bool:
    """Return True if an entry of the metadata is a rank, and start and stop of rows or null."""
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    rank, start, stop = entry
    are_rows = all(number is None or type(number) is int for number in (start, stop))
    return type(rank) is int and rank > 0 and are_rows


def load_adapter(model: nn.Module, path: str | Path) -> None:
    """Load what `save_adapter` wrote into the plain model that its training started from.

    The model can then be trained further, or merged. Raises ValueError, and leaves the model
    unchanged, if the file is no adapter, is truncated, does not fit, or holds NaN, infinity or
    another kind of numbers. The check compares names and shapes: other weights of the same shapes
    load, and give another model.
    """
    saved, entries = read_adapter(path)
    parameters = dict(model.named_parameters())
    plain = model.state_dict()
    needed = {name: tensor for name, tensor in plain.items() if name not in parameters}  # buffers
    updates = []  # (module, key, update)
    faults = []
    for name, (rank, start, stop) in entries.items():
        module, _, rest = name.partition("parametrizations.")  # MODULE.parametrizations.KEY.INDEX
        key = rest.partition(".")[0]
        weight = parameters.get(module + key)
        if weight is None or weight.ndim != 2:
            faults.append(module + key)
            continue
        if rank > min(weight.shape):  # a huge rank would also need huge memory
            faults.append(f"{name} of rank {rank}")
            continue
        lora = LoRA(weight, rank, slice(start, stop))
        updates.append((module.rstrip("."), key, lora))
        for part, tensor in lora.state_dict().items():
            needed[f"{name}.{part}"] = tensor

    faults += adapter_faults(saved, plain | needed, needed)
    if faults:
        raise ValueError(f"{path} does not fit this model: {', '.join(faults[:3])} ({len(faults)})")
    for module, key, lora in updates:
        parametrize.register_parametrization(model.get_submodule(module), key, lora)
    model.load_state_dict(model.state_dict() | saved)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in saved)


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, list]]:
    """Return the tensors of an adapter file and its metadata, name -> [rank, start, stop].

    Raises ValueError, one line, if the file is no adapter or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            entries = json.loads((file.metadata() or {})["lora"])
            saved = {name: file.get_tensor(name) for name in [*file.keys()]}
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no file of save_adapter, or cut off ({error})") from None
    if not isinstance(entries, dict) or not all(map(is_update, entries.values())):
        raise ValueError(f"{path}: does not say where its updates belong; save the adapter again")
    return saved, entries


def adapter_faults(
    saved: dict[str, Tensor], allowed: dict[str, Tensor], needed: dict[str, Tensor]
) -> list[str]:
    """Return the tensors of an adapter that do not fit, and the needed ones that it lacks."""
    faults = []
    for name, tensor in saved.items():
        if name not in allowed or allowed[name].shape != tensor.shape:
            faults.append(name)
            continue
        fault = tensor_fault(tensor, allowed[name])
        if fault:
            faults.append(f"{name} {fault}")
    faults += [name for name in needed if name not in saved]
    return faults
