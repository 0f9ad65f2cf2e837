"""Write networks as ONNX files, and run such files with ONNX Runtime."""

import io
import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch

from exporting.parts import Part
from prediction.onnx_networks import CPU, DATA, Session

ENDING = ".onnx"
RUNTIME = "ONNX Runtime"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Protobuf's limit is 2 GiB for a file. Larger weights lie in a second file, without a limit.
MOST_BYTES = 2_000_000_000
LARGEST_HALF = 65504.0  # of float16


def save(part: Part, path: Path, metadata: dict[str, str], half: bool) -> None:
    """Write a network to a file. half: store its matrices and kernels in 16 bits.

    Weights of 2 GB and more are written beside it, into FILE.data, and that is printed.
    """
    import onnx_ir

    with silence(), torch.no_grad():
        program = torch.onnx.export(
            part.module,
            tuple(part.inputs.values()),
            input_names=[*part.inputs],
            output_names=[*part.outputs],
            dynamic_shapes=tuple(part.dynamic.get(name) for name in part.inputs),
            dynamo=True,
            verbose=False,
        )
    model = program.model
    remove_notes(model)
    model.metadata_props.update(metadata)
    if half:
        store_in_half(model)

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size < MOST_BYTES:
        onnx_ir.save(model, path)
        return
    data = path.name + DATA
    onnx_ir.save(model, path, external_data=data)
    print(f"{part.name}: an ONNX file holds 2 GB at most; its weights are in {data}, keep both")


@contextmanager
def silence():
    """Hide what the exporter prints, logs and warns about."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(disabled)


def remove_notes(model) -> None:
    """Remove the exporter's notes about nodes, which hold lines of source and paths."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def store_in_half(model) -> None:
    """Store matrices and kernels as float16, each with a node that casts it back to float32.

    Vectors, such as biases and the parameters of norms, are small and stay float32, and so does a
    tensor with a value outside the range of float16. Programs compute in float32; ONNX Runtime
    casts once, when it loads the file.
    """
    import onnx_ir

    casts = []
    for value in [*model.graph.initializers.values()]:
        weights = value.const_value.numpy()
        if value.dtype != onnx_ir.DataType.FLOAT or weights.ndim < 2:
            continue
        if not abs(weights).max(initial=0) <= LARGEST_HALF:
            continue

        stored = onnx_ir.val(
            f"{value.name}.float16",
            const_value=onnx_ir.tensor(weights.astype("float16"), name=f"{value.name}.float16"),
        )
        cast = onnx_ir.node("Cast", [stored], {"to": onnx_ir.DataType.FLOAT})
        cast.outputs[0].dtype = onnx_ir.DataType.FLOAT
        cast.outputs[0].shape = value.shape
        value.replace_all_uses_with(cast.outputs[0])
        del model.graph.initializers[value.name]
        model.graph.register_initializer(stored)
        casts.append(cast)
    model.graph.insert_before(model.graph[0], casts)


def load(path: Path, part: Part) -> Callable:
    """Open a file with ONNX Runtime. Return a function: inputs by name -> outputs by name."""
    return replace(part, module=Session(path, [CPU])).run
