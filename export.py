"""Export a model for other programs: ONNX, torch.export, official checkpoints, the hub.

    python export.py --weights runs/segformer-mine --to onnx
    python export.py --weights runs/clipseg-mine --to onnx --half
    python export.py --weights runs/cris-mine --to torch-export
    python export.py --weights runs/segformer-mine --to official
    python export.py --weights runs/segformer-mine --push-to-hub OWNER/NAME --private

Files of --to onnx and torch-export are compared with PyTorch before they appear, and both speeds
are printed. predict.py --weights FILE.onnx predicts with ONNX Runtime. docs/export.md has the
details.
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import argparse
from collections.abc import Callable

from engine import command_line
from engine.runs import refuse_exports
from exporting import hub, networks, official
from prediction.models import find_weights
from recipes import FAMILIES, second_file

USAGE = "python export.py --weights SOURCE (--to FORMAT | --push-to-hub OWNER/NAME) [options]"
FORMATS = (*networks.FORMATS, "official")


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = command_line.Parser(__doc__, usage=USAGE, add_help=False)
    add_common_options(parser.add_argument_group("common options").add_argument)
    add_hub_options(parser.add_argument_group("hub options").add_argument)
    add_model_options(parser.add_argument_group("model options").add_argument)

    args = parser.parse_args()
    if (args.to is None) == (args.push_to_hub is None):
        raise ValueError("choose one of --to and --push-to-hub")
    refuse_unused(args)
    return args


def refuse_unused(args) -> None:
    """Raise ValueError, one line, for options that have no effect on what is chosen."""
    users = {
        "half": args.to == "onnx",
        "image": args.to in networks.FORMATS,
        "out": args.to is not None,
        "private": args.push_to_hub is not None,
    }
    for option, has_effect in users.items():
        if getattr(args, option) and not has_effect:
            chosen = f"--to {args.to}" if args.to else "--push-to-hub"
            raise ValueError(f"--{option}: has no effect with {chosen}; remove it")


def add_common_options(add: Callable) -> None:
    """Add the options that most people need."""
    add(
        "--weights",
        metavar="SOURCE",
        required=True,
        help="trained model: run folder, file, or hub id",
    )
    add("--to", metavar="FORMAT", choices=FORMATS, help=f"format to write: {', '.join(FORMATS)}")
    add(
        "--out",
        metavar="PATH",
        help="file or folder to write [exports/NAME plus the ending]",
    )
    add("--half", action="store_true", help="ONNX: store weights in 16 bits; results stay 32 bits")
    add(
        "--image",
        metavar="FILE",
        help="image or volume to compare the export with PyTorch on [first case of the run's data]",
    )
    add("-h", "--help", action="help", help="show this help and exit")


def add_hub_options(add: Callable) -> None:
    """Add the options of an upload."""
    add(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload weights, config.json and a model card to the Hugging Face hub",
    )
    add("--private", action="store_true", help="make a new repository private [public]")


def add_model_options(add: Callable) -> None:
    """Add the options that say what --weights hold."""
    add(
        "--model",
        metavar="NAME",
        choices=sorted(FAMILIES),
        help=f"model of --weights: {', '.join(sorted(FAMILIES))} [run]",
    )
    add("--clip", metavar="FILE", help="CLIP ViT-B/16 for CLIPSeg's --weights rd64-uni-refined.pth")
    add(
        "--decoder",
        metavar="SOURCE",
        help="biomedclipseg: CLIPSeg with the decoder, if --weights have none",
    )


def main() -> int:
    """Run the command line. Return the exit status."""
    args = parse()
    refuse_exports(args.weights)
    weights = find_weights(args.weights, args.model)
    second = second_file(weights.name, args.clip, args.decoder)
    if args.push_to_hub:
        return hub.push(weights, second, args)
    if args.to == "official":
        return official.write_official(weights, second, args)
    return networks.write_networks(weights, second, args)


if __name__ == "__main__":
    command_line.command(main)
