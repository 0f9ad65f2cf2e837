"""Synthetic abdominal CT volumes."""

import gzip
from pathlib import Path

import numpy as np
from scipy import ndimage

from engine.ranges import SEED, Number
from imaging import atomic_files
from preparation.volume_sets import write_data_set

# Abdomens of a child's size. A class is more than its grey values: liver and spleen, both kidneys,
# the aorta and the vein beside it look alike, and stomach, vein and bowel have no number at all.

DEMO_ORGANS = ("spleen", "right kidney", "left kidney", "liver", "aorta")  # class 1, 2, ...
TISSUES = {  # Hounsfield units: mean, and standard deviation over patients
    "air": (-1000, 0), "lung": (-830, 25), "fat": (-100, 6), "bowel": (35, 10), "muscle": (60, 5),
    "stomach": (25, 10), "liver": (108, 10), "spleen": (118, 10), "kidney": (165, 14),
    "aorta": (160, 14), "disc": (85, 8), "marrow": (190, 25), "bone": (430, 40),
}  # fmt: skip
STORED = ("RAS", "LPS", "LAS")  # where the stored axes point to, in turn
DEMO_ABOUT = {
    "name": "demo_volumes",
    "description": "synthetic abdominal CT with five organs, for trying out",
    "reference": "made by prepare.py demo-volumes",
    "licence": "CC0-1.0",
    "tensorImageSize": "3D",
    "modality": {"0": "CT"},
    "labels": {str(k): name for k, name in enumerate(("background", *DEMO_ORGANS))},
}


def smooth_noise_3d(rng, shape, cells):
    """(X,Y,Z) float32, normal with a deviation of 0.5, with features of 1/cells of the volume."""
    noise = rng.normal(0, 0.5, [cells + 1] * 3).astype(np.float32)
    for n in shape:  # an axis is spread out and goes to the end
        apart = np.linspace(0, cells, n, dtype=np.float32)[:, None] - np.arange(cells + 1)
        weights = np.exp(-(apart**2)).astype(np.float32)  # (n, cells + 1)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)  # so that the deviation stays
        noise = np.einsum("abc,xa->bcx", noise, weights)
    return noise


def ball(grid, centre, axes):
    """Where an ellipsoid is; grid, centre and half axes in mm, to the right, front and head."""
    return (
        sum(((x - c) / r) ** 2 for x, c, r in zip(grid, centre, axes, strict=True)) < 1
    )  # (X,Y,Z) bool


def draw_torso(rng, grid, a, b, level):
    """What is around the organs, Hounsfield units (X,Y,Z), and the cavity for them, bool (X,Y,Z).

    a, b: half width and half depth of the body in mm; level: Hounsfield units of TISSUES.
    """
    x, y, z = grid
    depth = np.hypot(x / a, y / b) + (z / 150) ** 4  # 0 in the middle, 1 on the skin
    image = np.full(depth.shape, level["air"], np.float32)
    cavity = depth < 0.76
    bowel = smooth_noise_3d(rng, depth.shape, 11) > 0.1
    ribs = (depth < 0.87) & (np.sin(z / 4 + y / 16) > 0.6) & (z > -30 + y / 2)
    for where, tissue in (
        (depth < 1, "fat"), (depth < 0.9, "muscle"), (ribs & (depth > 0.8), "bone"),
        (cavity, "fat"), (cavity & bowel, "bowel"),
        (cavity & (z > 75 - (x / 9) ** 2 / 9 - (y / 9) ** 2 / 6), "lung"),
    ):  # fmt: skip
        image[where] = level[tissue]
    back, phase = -0.62 * b, rng.uniform(0, 6)
    canal = np.hypot(x, y - back + 20)
    body = np.hypot(x / 17, (y - back) / 14)
    disc = np.cos(z / 4 + phase) > 0.8  # every 25 mm
    process = (abs(x) < 3) & (y < back - 26) & (y > back - 40) & (np.cos(z / 4 + phase) < 0)
    for where, tissue in (
        (body < 1, "bone"), (body < 0.85, "marrow"), ((body < 1) & disc, "disc"),
        ((canal < 12) | process, "bone"), (canal < 8, "muscle"),
    ):  # fmt: skip
        image[where] = level[tissue]
    return image, cavity & (body > 1)


def draw_organs(rng, grid, a, b):
    """Yields tissue, class number (0: none) and place, bool (X,Y,Z); a later one lies on top."""
    x, y, z = grid

    def organ(x0, y0, z0, *axes):  # shares of a and b, z in mm
        at = np.array([x0 * a, y0 * b, z0]) + rng.normal(0, 2.5, 3)
        return ball(grid, at, axes * np.array([a, b, 1]) * rng.uniform(0.9, 1.1))

    vessels = np.hypot(x + 9 - 3 * np.sin(z / 40), y + 0.22 * b), np.hypot(x - 13, y + 0.2 * b)
    stomach = organ(-0.4, 0.3, 40, 0.27, 0.32, 32)
    yield "stomach", 0, stomach
    yield "air", 0, stomach & (y > rng.uniform(0.38, 0.5) * b)  # rises, the patient lies
    yield "aorta", 0, vessels[1] < rng.uniform(8, 10)  # the vein
    yield "liver", 4, organ(0.4, 0.08, 30, 0.38, 0.62, 52) | organ(0.02, 0.4, 42, 0.4, 0.26, 24)
    yield "spleen", 1, organ(-0.55, -0.15, 40, 0.17, 0.4, 34)
    for number, side in (2, 1), (3, -1):
        yield "kidney", number, organ(0.38 * side, -0.38, -22, 0.155, 0.26, 38)
        yield "fat", 0, organ(0.27 * side, -0.33, -22, 0.1, 0.12, 15)  # the sinus
    yield "aorta", 5, vessels[0] < rng.uniform(8, 10)


def draw_volume(rng):
    """Hounsfield units int16 (X,Y,Z), class numbers uint8 (X,Y,Z), affine (4,4) in RAS."""
    shape = rng.integers((68, 60, 52), (77, 69, 61))
    spacing = np.round(rng.uniform((2.8, 2.8, 3.7), (3.2, 3.2, 4.3)), 3)  # mm
    first = -(shape - 1) / 2 * spacing + rng.normal(0, (3, 3, 8))  # of the first voxel's centre
    axes = [x0 + mm * np.arange(n) for x0, mm, n in zip(first, spacing, shape, strict=True)]
    grid = [x.astype(np.float32) for x in np.meshgrid(*axes, indexing="ij")]
    grid = [x + 4 * smooth_noise_3d(rng, shape, 5) for x in grid]  # everything is bent a little
    a, b = rng.uniform((84, 64), (96, 76))
    level = {tissue: rng.normal(*known) for tissue, known in TISSUES.items()}
    image, cavity = draw_torso(rng, grid, a, b, level)
    mask = np.zeros(shape, np.uint8)
    lost = rng.integers(1, 4) if rng.random() < 0.2 else None  # taken out: spleen or a kidney
    for tissue, number, where in draw_organs(rng, grid, a, b):
        where &= cavity
        if number != lost:
            image[where], mask[where] = level[tissue], number
    image += 10 * smooth_noise_3d(rng, shape, 4) + 8 * smooth_noise_3d(rng, shape, 16)
    image += rng.normal(0, 25, shape).astype(np.float32)
    image = ndimage.gaussian_filter(image, 0.5)  # voxels on a border hold a little of both sides
    affine = np.diag([*spacing, 1])
    affine[:3, 3] = first
    return image.clip(-1024, 3071).round().astype(np.int16), mask, affine


def demo_volumes(args):
    """Writes a small synthetic data set of abdominal CT: whole, or not at all.

    Two thirds of the volumes train, a sixth validates, a sixth tests. The same seed gives the same
    bytes.
    """
    import nibabel

    atomic_files.refuse_existing(args.out)
    sixth = max(1, round(args.volumes / 6))
    names = [f"ct_{k:03}.nii.gz" for k in range(1, args.volumes + 1)]
    ends = {"train": args.volumes - 2 * sixth, "val": args.volumes - sixth, "test": args.volumes}
    splits, start = {}, 0
    for split, end in ends.items():
        kind = "Ts" if split == "test" else "Tr"
        splits[split] = [(f"images{kind}/{n}", f"labels{kind}/{n}") for n in names[start:end]]
        start = end

    def put(part, image, label):
        number = names.index(Path(image).name)
        pixels, mask, affine = draw_volume(np.random.default_rng([args.seed, number]))
        wanted = nibabel.orientations.axcodes2ornt(STORED[number % len(STORED)])
        for name, array in (image, pixels), (label, mask):
            volume = nibabel.Nifti1Image(array, affine).as_reoriented(wanted)
            (part / name).write_bytes(gzip.compress(volume.to_bytes(), 6, mtime=0))

    title = f"synthetic abdominal CT, seed {args.seed}"
    return write_data_set(args.out, DEMO_ABOUT, splits, put, [title])


def options(command):
    """Describe `prepare.py demo-volumes`."""
    add = command(demo_volumes, "write a small synthetic data set of CT volumes")
    add("--out", type=Path, default="data/demo_volumes", help="folder to make (%(default)s)")
    help = "volumes in all (%(default)s)"
    add("--volumes", type=Number(True, 3), default=24, metavar="N", help=help)
    add("--seed", type=SEED, default=0, metavar="N", help="same seed, same bytes (%(default)s)")
