"""SegFormer, UPerNet, DPT, BEiT against transformers: same weights, equal outputs, then time.

    python benchmarks/classes_transformers.py                    # the table in docs/benchmarks.md
    python benchmarks/classes_transformers.py --model segformer --variant b0 --size 512
    python benchmarks/classes_transformers.py --model dpt --variant large-ade --size 288 --step

Forward: evaluation mode, no gradients, 150 classes.
Step: training mode, 4 classes as in the GI-tract study. Both models have the same loss (cross
entropy at the size of the labels, on logits upsampled bilinearly) and the same AdamW.

transformers' UPerNet, DPT and BEiT have auxiliary heads and run them in evaluation, too. As in the
GI-tract study, they take no part in the loss. Our models have none.
"""

import argparse
import importlib
import re
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from common import HEADER, ROOT, in_turns, machine, peak_memory, print_memory_rows, row

sys.path.insert(0, str(ROOT))

from engine import command_line
from engine.ranges import POSITIVE


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str  # name of the file
    variant: str
    size: int  # height and width of the images
    batch: int = 1
    step: bool = False
    classes: int = 150

    def __str__(self) -> str:
        kind = "step" if self.step else "forward"
        return f"{self.model} {self.variant}, {kind}, {self.batch} x {self.size} px"


TABLE = [
    Case("segformer", "b0", 512),
    Case("segformer", "b2", 288),
    Case("segformer", "b5", 512),
    Case("upernet", "convnext-small", 512),
    Case("dpt", "large-ade", 480),
    Case("beit", "base", 640),
    Case("segformer", "b0", 288, 2, True, 4),
    Case("segformer", "b2", 288, 2, True, 4),
    Case("upernet", "convnext-small", 288, 2, True, 4),
    Case("dpt", "large-ade", 288, 2, True, 4),
    Case("beit", "base", 288, 2, True, 4),
]
MEMORY_CASE = TABLE[6]  # its peak memory is measured, too
# Weights of transformers' classes that do not influence their output.
UNUSED = r"auxiliary_head\.|neck\.fusion_stage\.layers\.0\.residual_layer1\.|dpt\.layernorm\."
CLASSES = {"segformer": "SegFormer", "upernet": "UPerNet", "dpt": "DPT", "beit": "BEiT"}


def our_model(case: Case) -> torch.nn.Module:
    """Return our model with random weights, all of which influence the output.

    The weights of a new model would not do: its norms start as identities.
    """
    file = importlib.import_module(case.model)
    config = replace(file.VARIANTS[case.variant], num_classes=case.classes)
    model = getattr(file, CLASSES[case.model])(config)

    torch.manual_seed(0)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        if p.ndim >= 2:
            p.data = noise / p[0].numel() ** 0.5
        elif name.endswith("weight"):  # of a norm
            p.data = 1 + 0.1 * noise
        else:
            p.data = 0.1 * noise
    return model.train(case.step)


def segformer_settings(c):
    """Return transformers' SegFormer class and its configuration for our Config `c`."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        hidden_sizes=c.widths,
        depths=c.depths,
        decoder_hidden_size=c.decoder_dim,
        num_labels=c.num_classes,
    )
    return SegformerForSemanticSegmentation, config


def upernet_settings(c):
    """Return transformers' UPerNet class and its configuration for our Config `c`."""
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(
        hidden_sizes=list(c.widths),
        depths=list(c.depths),
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = UperNetConfig(
        backbone_config=backbone,
        auxiliary_in_channels=c.widths[2],
        num_labels=c.num_classes,
    )
    return UperNetForSemanticSegmentation, config


VIT_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def dpt_settings(c):
    """Return transformers' DPT class and its configuration for our Config `c`, DPT-large."""
    from transformers import DPTConfig, DPTForSemanticSegmentation

    config = DPTConfig(
        **VIT_LARGE,
        image_size=384,
        backbone_out_indices=[5, 11, 17, 23],
        qkv_bias=True,
        use_batch_norm_in_fusion_residual=c.fusion_norm,
        neck_hidden_sizes=[256, 512, 1024, 1024],
        num_labels=c.num_classes,
    )
    return DPTForSemanticSegmentation, config


def beit_settings(c, variant: str):
    """Return transformers' BEiT class and its configuration for our Config `c`."""
    from transformers import BeitConfig, BeitForSemanticSegmentation

    if variant == "large":
        sizes = VIT_LARGE | {"out_indices": [7, 11, 15, 23]}
    else:
        sizes = {"out_indices": [3, 5, 7, 11]}
    config = BeitConfig(
        **sizes,
        image_size=640,
        use_relative_position_bias=True,
        num_labels=c.num_classes,
    )
    return BeitForSemanticSegmentation, config


def official_settings(case: Case, c):
    """Return transformers' class and its configuration for our Config `c`."""
    if case.model == "segformer":
        return segformer_settings(c)
    if case.model == "upernet":
        return upernet_settings(c)
    if case.model == "dpt":
        return dpt_settings(c)
    return beit_settings(c, case.variant)


def official_model(case: Case, ours) -> torch.nn.Module:
    """Return transformers' model with our weights. Raise ValueError if they do not fit."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model_class, config = official_settings(case, ours.config)
    state = importlib.import_module(case.model).to_official(ours.state_dict())
    model, report = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )

    missing = [name for name in report["missing_keys"] if not re.match(UNUSED, name)]
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{case}: our weights do not fit transformers' class: {report}")
    return model.train(case.step)


def both_models(case: Case) -> dict:
    """Return {"official": model, "ours": model} with the same weights."""
    ours = our_model(case)
    return {"official": official_model(case, ours), "ours": ours}


def logits_of(model, image):
    """Return the logits (B,K,H,W) of either model."""
    out = model(image)
    return out if isinstance(out, torch.Tensor) else out.logits


def build_step(case: Case, model):
    """Return the function to time; a forward pass returns its logits."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.size, case.size)
    image = torch.randn(case.batch, 3, case.size, case.size, generator=generator)
    labels = torch.randint(case.classes, shape, generator=generator)

    def forward():
        with torch.no_grad():
            return logits_of(model, image)

    if not case.step:
        return forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        logits = logits_of(model, image)
        logits = F.interpolate(logits, shape[1:], mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def check_equal(case: Case, models: dict) -> float:
    """Return the largest difference of two logits as a share of the largest logit.

    In evaluation mode. Raise AssertionError if it is above 1e-5.
    """
    forward_case = replace(case, step=False)
    expected = build_step(forward_case, models["official"].eval())()
    actual = build_step(forward_case, models["ours"].eval())()
    for model in models.values():
        model.train(case.step)

    largest = expected.abs().max()
    torch.testing.assert_close(expected, actual, rtol=0, atol=1e-5 * largest.item())
    return ((expected - actual).abs().max() / largest).item()


def parse() -> argparse.Namespace:
    """Return the command line. Raise ValueError if --model lacks --variant or --size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "model to measure (default: the whole table in docs/benchmarks.md)"
    add("--model", choices=CLASSES, help=help)
    help = "variant of --model, a key of VARIANTS in its file"
    add("--variant", metavar="NAME", help=help)
    add("--size", type=POSITIVE, metavar="PX", help="height and width of the images for --model")
    help = "images in a batch of --model (default: %(default)s)"
    add("--batch", type=POSITIVE, default=1, metavar="N", help=help)
    help = "measure a training step of --model (default: a forward pass)"
    add("--step", action="store_true", help=help)
    help = "number of classes of --model (default: 150, with --step 4)"
    add("--classes", type=POSITIVE, metavar="K", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=5, metavar="N", help=help)
    help = "CPU threads (default: %(default)s)"
    add("--threads", type=POSITIVE, default=2, metavar="N", help=help)
    # For child processes: implementation, case.
    add("--memory", nargs=2, help=argparse.SUPPRESS)

    args = parser.parse_args()
    if args.model and not (args.variant and args.size):
        raise ValueError("--model needs --variant and --size")
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    cases = TABLE
    memory_case = MEMORY_CASE
    if args.model:
        classes = args.classes or (4 if args.step else 150)
        case = Case(args.model, args.variant, args.size, args.batch, args.step, classes)
        cases = [case]
        memory_case = case

    if args.memory:
        implementation, _ = args.memory
        model = our_model(memory_case)
        if implementation == "official":
            model = official_model(memory_case, model)
        print(peak_memory(build_step(memory_case, model)))
        return 0

    print(f"{machine()}\nfloat32\n\n{HEADER}")
    comparisons = []
    for case in cases:
        models = both_models(case)
        error = check_equal(case, models)
        comparisons.append(f"{case}: outputs differ by {error:.1e} of the largest logit")
        steps = {name: build_step(case, model) for name, model in models.items()}
        times = in_turns(steps, args.rounds)
        print(row(str(case), times["official"], times["ours"], "s"), flush=True)
    print_memory_rows([str(memory_case)])
    print("\n" + "\n".join(comparisons))
    return 0


if __name__ == "__main__":
    command_line.command(main)
