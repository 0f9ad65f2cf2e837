"""Write networks as programs of torch.export, and run such programs."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from exporting.parts import Part

ENDING = ".pt2"
RUNTIME = "torch.export"
PACKAGES = ()  # besides torch


def save(part: Part, path: Path, metadata: dict[str, str], half: bool) -> None:
    """Write a network to a file, with the metadata as its extra files. half: must be False."""
    axes = []
    for name in part.inputs:
        axes.append(dict.fromkeys(part.dynamic.get(name, {}), torch.export.Dim.DYNAMIC))
    with torch.no_grad():
        program = torch.export.export(
            part.module, tuple(part.inputs.values()), dynamic_shapes=tuple(axes)
        )
    remove_unused(program)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # lines of source and paths of this machine

    # Write to memory first: if torch cannot finish a file, such as on a full disk, it aborts the
    # process.
    content = io.BytesIO()
    torch.export.save(program, content, extra_files=metadata)
    path.write_bytes(content.getbuffer())


def remove_unused(program: torch.export.ExportedProgram) -> None:
    """Remove the weights that a program does not read, such as those of the model's other parts."""
    signature = program.graph_signature
    for node in program.graph.find_nodes(op="placeholder"):
        name = signature.inputs_to_parameters.get(node.name)
        if name is None or node.users:
            continue
        program.graph.erase_node(node)
        spec = next(spec for spec in signature.input_specs if spec.arg.name == node.name)
        signature.input_specs.remove(spec)
        del program.state_dict[name]
    program.graph_module.recompile()


def load(path: Path, part: Part) -> Callable:
    """Open a file that this process has written. Loading any other file may run foreign code.

    Return a function: inputs by name -> outputs by name.
    """
    return replace(part, module=torch.export.load(path).module()).run
