"""CRIS against the official code: same weights, equal outputs, then time and memory.

    git clone https://github.com/DerrickWang005/CRIS.pytorch
    python benchmarks/cris_official.py --official CRIS.pytorch

Forward: evaluation mode, no gradients. Training step: forward, loss, backward, Adam. The two models
take turns in one process. Memory is the peak over the memory before the step, measured in a fresh
process for each model.
"""

import argparse
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from common import (
    HEADER,
    ROOT,
    in_turns,
    machine,
    peak_memory,
    print_memory_rows,
    row,
    set_up_torch,
)
from torch import nn

sys.path.insert(0, str(ROOT))

import cris  # noqa: E402
from engine import command_line  # noqa: E402
from engine.ranges import POSITIVE  # noqa: E402

KINDS = ("forward", "training step")


def our_model(variant: str) -> cris.CRIS:
    """Return an untrained model whose batch norms are not identities."""
    torch.manual_seed(0)
    model = cris.CRIS(cris.VARIANTS[variant])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def official_model(checkout: str, ours: cris.CRIS) -> nn.Module:
    """Return the official model with our weights."""
    sys.modules.setdefault("loguru", types.SimpleNamespace(logger=None))  # imported, not used here
    sys.path.insert(0, checkout)
    from model.segmenter import CRIS

    c = ours.config
    state = cris.to_official(ours.state_dict())
    clip = {}
    for name, tensor in state.items():
        if name.startswith("backbone."):
            clip[name.removeprefix("backbone.")] = tensor

    settings = types.SimpleNamespace(
        clip_pretrain="", word_len=17, word_dim=c.state_dim, vis_dim=c.dim, num_head=c.heads,
        fpn_in=[8 * c.width, 16 * c.width, c.state_dim], fpn_out=[c.dim // 2, c.dim, 2 * c.dim],
        num_layers=c.decoder_layers, dim_ffn=c.ffn_dim, dropout=c.dropout, intermediate=False,
    )  # fmt: skip
    # The official class reads CLIP from a TorchScript archive. Hand it our weights in place of one.
    archive = mock.Mock()
    archive.eval.return_value.state_dict.return_value = clip
    with mock.patch("torch.jit.load", return_value=archive):
        model = CRIS(settings)
    model.load_state_dict(state)
    return model


def random_batch(size: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return image (B,3,416,416), tokens (B,17), mask (B,1,416,416). Texts differ in length."""
    image = torch.randn(size, 3, 416, 416, device=device)
    mask = (torch.rand(size, 1, 416, 416, device=device) > 0.5).float()
    texts = []
    for i in range(size):
        text = [49406, *range(320, 335 - 3 * (i % 3)), 49407]
        padding = [0] * (17 - len(text))
        texts.append(text + padding)
    return image, torch.tensor(texts, device=device), mask


def build_step(kind: str, model: nn.Module, batch: tuple):
    """Return the function to time, and set the mode of the model. A forward pass returns logits."""
    image, tokens, mask = batch

    def forward():
        with torch.no_grad():
            return model(image, tokens)

    if kind == "forward":
        model.eval()
        return forward

    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-5)

    def step():
        if isinstance(model, cris.CRIS):
            logits = model(image, tokens)
            target = F.interpolate(mask, logits.shape[2:], mode="nearest")
            loss = F.binary_cross_entropy_with_logits(logits, target)
        else:
            loss = model(image, tokens, mask)[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def check_equal(models: dict, batch: tuple) -> None:
    """Print how much the logits differ. Raise AssertionError if it is too much."""
    expected = build_step("forward", models["official"], batch)()
    actual = build_step("forward", models["ours"], batch)()
    difference = (expected - actual).abs().max()
    deviation = expected.std()
    print(f"logits differ by at most {difference:.1e}; their standard deviation is {deviation:.1e}")
    torch.testing.assert_close(expected, actual, rtol=0, atol=1e-3 * deviation.item())


def parse() -> argparse.Namespace:
    """Return the command line. Raise ValueError if --official is no checkout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    help = "folder of a checkout of github.com/DerrickWang005/CRIS.pytorch"
    add("--official", required=True, metavar="DIR", help=help)
    help = "variant of CRIS (default: %(default)s)"
    add("--variant", default="rn50", choices=("rn50", "rn101"), help=help)
    help = "images in a batch (default: %(default)s)"
    add("--batch-size", type=POSITIVE, default=2, metavar="N", help=help)
    help = "timed rounds after the warm-up (default: %(default)s)"
    add("--rounds", type=POSITIVE, default=7, metavar="N", help=help)
    help = "CPU threads (default: %(default)s)"
    add("--threads", type=POSITIVE, default=2, metavar="N", help=help)
    help = "device to run on: cpu or cuda (default: %(default)s)"
    add("--device", default="cpu", metavar="NAME", help=help)
    # For child processes: implementation, kind of step.
    add("--memory", nargs=2, help=argparse.SUPPRESS)

    args = parser.parse_args()
    if not (Path(args.official) / "model" / "segmenter.py").exists():
        raise ValueError(
            f"{args.official} has no model/segmenter.py; name a checkout of CRIS.pytorch"
        )
    return args


def main() -> int:
    args = parse()
    set_up_torch(args)
    ours = our_model(args.variant)
    official = official_model(args.official, ours)
    models = {"ours": ours.to(args.device), "official": official.to(args.device)}
    batch = random_batch(args.batch_size, args.device)
    del ours, official

    if args.memory:
        implementation, kind = args.memory
        model = models.pop(implementation)
        models.clear()  # frees the other model
        print(peak_memory(build_step(kind, model, batch)))
        return 0

    print(f"{machine()}\n{args.variant}, {args.batch_size} images of 416 px, float32")
    check_equal(models, batch)
    print(f"\n{HEADER}")
    for kind in KINDS:
        steps = {name: build_step(kind, model, batch) for name, model in models.items()}
        times = in_turns(steps, args.rounds)
        print(row(kind, times["official"], times["ours"], "s"), flush=True)
    models.clear()
    del steps  # frees both models
    print_memory_rows(KINDS)
    return 0


if __name__ == "__main__":
    command_line.command(main)
