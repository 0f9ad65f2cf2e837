"""CRIS against the official code: same weights, same input, equal outputs, then time and memory.

    git clone https://github.com/DerrickWang005/CRIS.pytorch
    python benchmarks/cris_official.py --official CRIS.pytorch

Forward: evaluation mode, no gradients. Training step: forward, loss, backward, Adam. The two take
turns in one process; memory is measured in a process of its own each, as the peak over what was
there before.
"""

import argparse
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from common import HEADER, ROOT, in_turns, machine, memory_rows, peak_memory, row, settle
from torch import nn

sys.path.insert(0, str(ROOT))

import cris  # noqa: E402
from engine import command_line  # noqa: E402
from engine.ranges import POSITIVE  # noqa: E402


def our_model(variant: str) -> cris.CRIS:
    """Untrained, but with norms that do not start as identities."""
    torch.manual_seed(0)
    model = cris.CRIS(cris.VARIANTS[variant])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def official_model(checkout: str, ours: cris.CRIS) -> nn.Module:
    """The official class with our weights."""
    sys.modules.setdefault("loguru", types.SimpleNamespace(logger=None))  # it logs nothing here
    sys.path.insert(0, checkout)
    from model.segmenter import CRIS

    c, state = ours.config, cris.to_official(ours.state_dict())
    clip = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    settings = types.SimpleNamespace(
        clip_pretrain="", word_len=17, word_dim=c.state_dim, vis_dim=c.dim, num_head=c.heads,
        fpn_in=[8 * c.width, 16 * c.width, c.state_dim], fpn_out=[c.dim // 2, c.dim, 2 * c.dim],
        num_layers=c.decoder_layers, dim_ffn=c.ffn_dim, dropout=c.dropout, intermediate=False,
    )  # fmt: skip
    archive = mock.Mock()  # it reads CLIP from a TorchScript archive and nowhere else
    archive.eval.return_value.state_dict.return_value = clip
    with mock.patch("torch.jit.load", return_value=archive):
        model = CRIS(settings)
    model.load_state_dict(state)
    return model


def training_step(model: nn.Module, image, tokens, mask):
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-5)

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


def forward_step(model: nn.Module, image, tokens):
    def step():
        with torch.no_grad():
            return model(image, tokens)

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", required=True, help="checkout of the official repository")
    parser.add_argument("--variant", default="rn50", choices=("rn50", "rn101"))
    parser.add_argument("--batch-size", type=POSITIVE, default=2)
    parser.add_argument("--rounds", type=POSITIVE, default=7)
    parser.add_argument("--threads", type=POSITIVE, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--memory", nargs=2, help=argparse.SUPPRESS
    )  # whose, of what: a child of ours
    args = parser.parse_args()
    if not (Path(args.official) / "model" / "segmenter.py").exists():
        raise ValueError(
            f"{args.official} has no model/segmenter.py; name a checkout of CRIS.pytorch"
        )
    settle(args)

    models = {"ours": our_model(args.variant)}
    models["official"] = official_model(args.official, models["ours"])
    models = {name: model.to(args.device) for name, model in models.items()}
    image = torch.randn(args.batch_size, 3, 416, 416, device=args.device)
    mask = (torch.rand(args.batch_size, 1, 416, 416, device=args.device) > 0.5).float()
    text = [[49406, *range(320, 335 - 3 * (i % 3)), 49407] for i in range(args.batch_size)]
    tokens = torch.tensor([t + [0] * (17 - len(t)) for t in text], device=args.device)  # (B,17)
    kinds = {
        "forward": lambda m: forward_step(m.eval(), image, tokens),
        "training step": lambda m: training_step(m.train(), image, tokens, mask),
    }
    if args.memory:
        whose, kind = args.memory
        model = models.pop(whose)
        models.clear()
        print(peak_memory(kinds[kind](model)))
        return 0

    a, b = (forward_step(models[name].eval(), image, tokens)() for name in ("official", "ours"))
    print(f"{machine()}\n{args.variant}, {args.batch_size} images of 416 px, float32")
    print(
        f"largest difference of logits: {(a - b).abs().max():.1e} at a deviation of {a.std():.1e}"
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * a.std().item())
    print(f"\n{HEADER}")
    for kind, build in kinds.items():
        times = in_turns({name: build(models[name]) for name in models}, args.rounds)
        print(row(kind, times["official"], times["ours"], "s"), flush=True)
    models.clear()
    memory_rows(kinds)
    return 0


if __name__ == "__main__":
    command_line.command(main)
