"""Measure time and peak memory of a prediction on a large volume (Linux).

    python benchmarks/volume_memory.py

The model is a 1x1x1 convolution, so that the memory is that of imaging/volumes.py: the image, the
logits on the prepared grid, which is a little finer than the file's, and the probabilities on the
file's grid.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import ROOT, process_memory

sys.path.insert(0, str(ROOT))

from engine.ranges import POSITIVE, Number  # noqa: E402
from imaging import nifti, volumes  # noqa: E402


def parse() -> argparse.Namespace:
    """Return the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    size = {"type": POSITIVE, "nargs": 3, "metavar": "N"}
    spacing = {"type": Number(above=0), "nargs": 3, "metavar": "X"}
    help = "size of the volume in voxels (default: 512 512 300)"
    add("--size", default=(512, 512, 300), help=help, **size)
    help = "voxel size of the volume in mm (default: 0.8 0.8 1)"
    add("--spacing", default=(0.8, 0.8, 1.0), help=help, **spacing)
    help = "voxel size in mm that the volume is resampled to (default: 0.78 0.78 0.98)"
    add("--prepared", default=(0.78, 0.78, 0.98), help=help, **spacing)
    help = "size of the sliding window in voxels (default: 96 96 96)"
    add("--window", default=(96, 96, 96), help=help, **size)
    help = "number of classes (default: %(default)s)"
    add("--classes", type=POSITIVE, default=14, metavar="N", help=help)
    return parser.parse_args()


def main() -> int:
    args = parse()
    grid = nifti.Grid(Path("-"), np.diag([*args.spacing, 1]), tuple(args.size), 1, b"")
    image = np.random.default_rng(0).random((1, *args.size), dtype=np.float32)
    model = torch.nn.Conv3d(1, args.classes, 1)

    times = [time.perf_counter()]
    x, placement = volumes.prepare_image(image, grid, args.prepared, lambda x: x)
    times.append(time.perf_counter())
    logits = volumes.sliding_window(model, x, args.window)
    times.append(time.perf_counter())
    probabilities = volumes.restore(logits, placement, partial(torch.softmax, dim=0))
    times.append(time.perf_counter())
    labels = probabilities.argmax(0)
    times.append(time.perf_counter())

    steps = []
    names = ("prepare", "windows", "restore", "argmax")
    for name, seconds in zip(names, np.diff(times), strict=True):
        steps.append(f"{name} {seconds:.0f} s")
    peak = process_memory("VmHWM") / 2**20  # GiB
    size = "x".join(map(str, labels.shape))
    prepared_size = "x".join(map(str, x.shape[1:]))
    print(
        f"{size} voxels, prepared {prepared_size}, {args.classes} classes: {', '.join(steps)}; "
        f"peak {peak:.1f} GiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
