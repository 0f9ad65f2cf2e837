"""SegFormer, UPerNet, DPT, BEiT against transformers: same weights, equal outputs, then time.

    python benchmarks/classes_transformers.py                              # the README's table
    python benchmarks/classes_transformers.py --model segformer --variant b0 --size 512
    python benchmarks/classes_transformers.py --model dpt --variant large-ade --size 288 --step

Forward: evaluation mode, no gradients, 150 classes. Step: training mode, 4 classes as in the
GI-tract study (--classes), both with the same loss, cross entropy at the labels' size on logits
upsampled bilinearly, and the same AdamW. In that study the auxiliary heads of transformers'
UPerNet, DPT and BEiT are in no loss, nor are they here; but transformers runs them, in evaluation
too, and we have none.
"""

import argparse
import importlib
import re
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from common import HEADER, ROOT, in_turns, machine, memory_rows, peak_memory, row

sys.path.insert(0, str(ROOT))

from engine import command_line
from engine.ranges import POSITIVE


@dataclass(frozen=True)
class Case:
    model: str  # file
    variant: str
    size: int  # side of the images
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
MEMORY = TABLE[6]  # whose peak memory is in the table too
# What transformers' classes have and their output does not depend on.
NOT_OURS = r"auxiliary_head\.|neck\.fusion_stage\.layers\.0\.residual_layer1\.|dpt\.layernorm\."
CLASSES = {"segformer": "SegFormer", "upernet": "UPerNet", "dpt": "DPT", "beit": "BEiT"}


def our_model(case: Case) -> torch.nn.Module:
    """Random weights that all do something: those of a new model would hide what norms do."""
    file = importlib.import_module(case.model)
    model = getattr(file, CLASSES[case.model])(
        replace(file.VARIANTS[case.variant], num_classes=case.classes)
    )
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        noise, scale = torch.randn(p.shape), name.endswith("weight")  # of norms
        p.data = scale + 0.1 * noise if p.ndim < 2 else noise / p[0].numel() ** 0.5
    return model.train(case.step)


def official_settings(case: Case, c):
    """transformers' class for a variant, its configuration; `c` is our Config."""
    import transformers as t

    labels = {"num_labels": c.num_classes}
    if case.model == "segformer":
        sizes = {"hidden_sizes": c.widths, "depths": c.depths, "decoder_hidden_size": c.decoder_dim}
        return t.SegformerForSemanticSegmentation, t.SegformerConfig(**sizes, **labels)
    if case.model == "upernet":
        stages = [f"stage{i}" for i in (1, 2, 3, 4)]
        backbone = t.ConvNextConfig(
            hidden_sizes=list(c.widths), depths=list(c.depths), out_features=stages
        )
        more = {"backbone_config": backbone, "auxiliary_in_channels": c.widths[2]}
        config = t.UperNetConfig(**more, **labels)
        return t.UperNetForSemanticSegmentation, config
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    large["intermediate_size"] = 4096
    if case.model == "dpt":
        large |= {"image_size": 384, "backbone_out_indices": [5, 11, 17, 23], "qkv_bias": True}
        large |= {"use_batch_norm_in_fusion_residual": c.fusion_norm}
        large |= {"neck_hidden_sizes": [256, 512, 1024, 1024]}
        return t.DPTForSemanticSegmentation, t.DPTConfig(**large, **labels)
    base = {"out_indices": [3, 5, 7, 11]}
    sizes = large | {"out_indices": [7, 11, 15, 23]} if case.variant == "large" else base
    config = t.BeitConfig(image_size=640, use_relative_position_bias=True, **sizes, **labels)
    return t.BeitForSemanticSegmentation, config


def official_model(case: Case, ours) -> torch.nn.Module:
    """transformers' class with our weights."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind, config = official_settings(case, ours.config)
    state = importlib.import_module(case.model).to_official(ours.state_dict())
    arguments = {"config": config, "state_dict": state, "output_loading_info": True}
    model, told = kind.from_pretrained(None, **arguments)
    lacking = {name for name in told["missing_keys"] if not re.match(NOT_OURS, name)}
    if lacking or told["unexpected_keys"] or told["mismatched_keys"]:
        raise ValueError(f"{case}: transformers' class does not take our weights: {told}")
    return model.train(case.step)


def logits_of(model, image):
    out = model(image)
    return out if isinstance(out, torch.Tensor) else out.logits


def work(case: Case, model):
    """-> the function that is timed."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.size, case.size)
    image = torch.randn(case.batch, 3, *shape[1:], generator=generator)
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
    """The largest difference of two logits over the largest logit, in evaluation mode."""
    plain = replace(case, step=False)
    outputs = [work(plain, model.eval())() for model in models.values()]
    for model in models.values():
        model.train(case.step)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5 * outputs[0].abs().max().item())
    return ((outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()).item()


def both(case: Case) -> dict:
    ours = our_model(case)
    return {"official": official_model(case, ours), "ours": ours}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CLASSES, help="one row; without it the README's table")
    parser.add_argument("--variant", help="key of its VARIANTS")
    parser.add_argument("--size", type=POSITIVE, help="side of the images")
    parser.add_argument("--batch", type=POSITIVE, default=1)
    parser.add_argument("--step", action="store_true", help="a training step")
    parser.add_argument("--classes", type=POSITIVE, help="150, in steps 4")
    parser.add_argument("--rounds", type=POSITIVE, default=5)
    parser.add_argument("--threads", type=POSITIVE, default=2)
    parser.add_argument(
        "--memory", nargs=2, help=argparse.SUPPRESS
    )  # whose, of what: a child of ours
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases, measured = TABLE, [MEMORY]
    if args.model:
        if not (args.variant and args.size):
            raise ValueError("--model needs --variant and --size")
        classes = args.classes or (4 if args.step else 150)
        cases = [Case(args.model, args.variant, args.size, args.batch, args.step, classes)]
        measured = cases
    if args.memory:
        whose, what = args.memory
        (case,) = (case for case in measured if str(case) == what)
        model = our_model(case)
        model = model if whose == "ours" else official_model(case, model)
        print(peak_memory(work(case, model)))
        return 0
    print(f"{machine()}\nfloat32; equal: largest difference over largest logit\n\n{HEADER}")
    equal = []
    for case in cases:
        models = both(case)
        equal.append(f"{case}: equal to {check_equal(case, models):.1e}")
        times = in_turns({name: work(case, model) for name, model in models.items()}, args.rounds)
        print(row(str(case), times["official"], times["ours"], "s"), flush=True)
    memory_rows([str(case) for case in measured])
    print("\n" + "\n".join(equal))
    return 0


if __name__ == "__main__":
    command_line.command(main)
