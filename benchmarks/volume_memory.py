"""What a large volume takes on its way from windows to labels, in a process of its own (Linux).

    python benchmarks/volume_memory.py

The model is a 1x1 convolution, so that the memory is that of imaging/volumes.py: the image, the
logits on a grid a little finer than the file's, the probabilities on the file's own.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.ranges import POSITIVE, Number  # noqa: E402
from imaging import nifti, volumes  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=POSITIVE, nargs=3, default=(512, 512, 300))
    parser.add_argument(
        "--spacing", type=Number(above=0), nargs=3, default=(0.8, 0.8, 1.0), help="mm"
    )
    parser.add_argument(
        "--prepared", type=Number(above=0), nargs=3, default=(0.78, 0.78, 0.98), help="mm"
    )
    parser.add_argument("--window", type=POSITIVE, nargs=3, default=(96, 96, 96))
    parser.add_argument("--classes", type=POSITIVE, default=14)
    args = parser.parse_args()

    grid = nifti.Grid(Path("-"), np.diag([*args.spacing, 1]), tuple(args.size), 1, b"")
    image = np.random.default_rng(0).random((1, *args.size), dtype=np.float32)
    model, times = torch.nn.Conv3d(1, args.classes, 1), [time.perf_counter()]
    x, place = volumes.prepare_image(image, grid, args.prepared, lambda x: x)
    times.append(time.perf_counter())
    logits = volumes.sliding_window(model, x, args.window)
    times.append(time.perf_counter())
    probabilities = volumes.restore(logits, place, partial(torch.softmax, dim=0))
    times.append(time.perf_counter())
    labels = probabilities.argmax(0)
    times.append(time.perf_counter())

    names = ("prepare", "windows", "restore", "argmax")
    told = ", ".join(f"{name} {t:.0f} s" for name, t in zip(names, np.diff(times), strict=True))
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
    sizes = (labels.shape, x.shape[1:])
    sizes = "{} voxels, prepared {}".format(*("x".join(map(str, size)) for size in sizes))
    print(f"{sizes}, {args.classes} classes: {told}; peak {peak:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
