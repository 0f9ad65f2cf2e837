"""Write the networks of a model to files of a format, and compare them with PyTorch."""

from exporting import (
    comparison,
    image_networks,
    onnx_files,
    output_files,
    programs,
    sam_networks,
    volume_networks,
)
from exporting.parts import Part
from imaging.atomic_files import refuse_existing
from prediction.models import LoadedModel, Weights, load_model

FORMATS = {"onnx": onnx_files, "torch-export": programs}


def parts_of(loaded: LoadedModel) -> list[Part]:
    """Return the networks of a model, in the order in which they run."""
    if loaded.weights.name == "sam_decoder":
        return sam_networks.parts(loaded)
    if loaded.weights.family.takes == "volumes":
        return volume_networks.parts(loaded)
    return image_networks.parts(loaded)


def write_networks(weights: Weights, second: dict, args) -> int:
    """Write the files of --to onnx or torch-export. Return the exit status.

    second: of `recipes.second_file`. Each file is opened and compared with PyTorch; if one differs
    too much, none is left. Raises ValueError or OSError, one line.
    """
    file_format = FORMATS[args.to]
    output_files.check_packages(args.to, file_format.PACKAGES)
    out = output_files.output_path(weights, args.out, file_format.ENDING)
    refuse_existing(out)  # again below, but loading takes seconds
    loaded = load_model(weights, "cpu", second)
    loaded.model.requires_grad_(False)
    parts = parts_of(loaded)
    output_files.refuse_existing_files(out, parts)

    case = comparison.find_case(loaded, parts, args.image)
    print(f"comparing on {case.description}")
    precision = "float16 matrices" if args.half else "float32"
    metadata = output_files.describe(loaded, parts, precision)
    limit = comparison.HALF_LIMIT if args.half else comparison.LIMIT
    tensors = dict(case.tensors)
    with output_files.new_files(out) as folder:
        for part in parts:
            path = output_files.part_path(out, part, parts)
            print(f"{path}: exporting …", flush=True)
            file_format.save(part, folder / path.name, metadata | {"part": part.name}, args.half)
            run = file_format.load(folder / path.name, part)
            result = comparison.compare(part, run, tensors)
            result.check(path, limit)
            print(f"{path}: {result.describe(file_format.RUNTIME)}", flush=True)
            tensors |= result.outputs
    if args.half:
        print("--half: half the size, the same speed: weights become 32 bits when a file is loaded")
    return 0
