"""Synthetic abdominal CT volumes."""

import gzip
from pathlib import Path

import numpy as np
from scipy import ndimage

from engine.ranges import SEED, Number
from imaging import atomic_files
from preparation.volume_sets import write_data_set

# Abdomens of a child's size. Grey values alone do not identify a class: liver and spleen, both
# kidneys, the aorta and the vein beside it look alike, and stomach, vein and bowel are background.

DEMO_ORGANS = ("spleen", "right kidney", "left kidney", "liver", "aorta")  # class 1, 2, ...
TISSUES = {  # Hounsfield units: mean, and standard deviation over patients
    "air": (-1000, 0),
    "lung": (-830, 25),
    "fat": (-100, 6),
    "bowel": (35, 10),
    "muscle": (60, 5),
    "stomach": (25, 10),
    "liver": (108, 10),
    "spleen": (118, 10),
    "kidney": (165, 14),
    "aorta": (160, 14),
    "disc": (85, 8),
    "marrow": (190, 25),
    "bone": (430, 40),
}
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
    """Return smooth normal noise float32 (X,Y,Z), standard deviation 0.5.

    Its features are as large as 1/cells of a side.
    """
    noise = rng.normal(0, 0.5, [cells + 1] * 3).astype(np.float32)
    for n in shape:  # each turn interpolates the first axis and moves it to the end
        distance = np.linspace(0, cells, n, dtype=np.float32)[:, None] - np.arange(cells + 1)
        weights = np.exp(-(distance**2)).astype(np.float32)  # (n,cells+1)
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)  # preserves the deviation
        noise = np.einsum("abc,xa->bcx", noise, weights)
    return noise


def ellipsoid(grid, centre, half_axes):
    """Return the voxels of an ellipsoid, bool (X,Y,Z).

    grid: x, y and z of each voxel; all in mm, to the right, front and head.
    """
    squares = [((x - c) / r) ** 2 for x, c, r in zip(grid, centre, half_axes, strict=True)]
    return sum(squares) < 1


def paint(image, level, layers):
    """Set the voxels of each layer (mask, tissue) to the tissue's level, in order."""
    for mask, tissue in layers:
        image[mask] = level[tissue]


def draw_torso(rng, grid, a, b, level):
    """Return all that surrounds the organs, float32 (X,Y,Z), and their cavity, bool (X,Y,Z).

    a, b: half width and half depth of the body in mm; level: Hounsfield units of each tissue.
    """
    x, y, z = grid
    depth = np.hypot(x / a, y / b) + (z / 150) ** 4  # 0 in the middle, 1 on the skin
    image = np.full(depth.shape, level["air"], np.float32)
    cavity = depth < 0.76

    bowel = smooth_noise_3d(rng, depth.shape, 11) > 0.1
    ribs = (depth < 0.87) & (np.sin(z / 4 + y / 16) > 0.6) & (z > -30 + y / 2)
    lung = z > 75 - (x / 9) ** 2 / 9 - (y / 9) ** 2 / 6
    layers = [
        (depth < 1, "fat"),
        (depth < 0.9, "muscle"),
        (ribs & (depth > 0.8), "bone"),
        (cavity, "fat"),
        (cavity & bowel, "bowel"),
        (cavity & lung, "lung"),
    ]
    paint(image, level, layers)

    # The spine: vertebrae and discs, the canal behind them, and spinous processes.
    back = -0.62 * b
    phase = rng.uniform(0, 6)
    canal = np.hypot(x, y - back + 20)
    vertebra = np.hypot(x / 17, (y - back) / 14)
    disc = np.cos(z / 4 + phase) > 0.8  # every 25 mm
    is_behind = (y < back - 26) & (y > back - 40)
    process = (abs(x) < 3) & is_behind & (np.cos(z / 4 + phase) < 0)
    layers = [
        (vertebra < 1, "bone"),
        (vertebra < 0.85, "marrow"),
        ((vertebra < 1) & disc, "disc"),
        ((canal < 12) | process, "bone"),
        (canal < 8, "muscle"),
    ]
    paint(image, level, layers)
    return image, cavity & (vertebra > 1)


def draw_organs(rng, grid, a, b):
    """Yield tissue, class index (0: background) and mask, bool (X,Y,Z); later ones lie on top.

    a, b: half width and half depth of the body in mm.
    """
    x, y, z = grid

    def organ(x0, y0, z0, *half_axes):  # x and y as shares of a and b, z in mm
        centre = np.array([x0 * a, y0 * b, z0]) + rng.normal(0, 2.5, 3)
        return ellipsoid(grid, centre, half_axes * np.array([a, b, 1]) * rng.uniform(0.9, 1.1))

    from_aorta = np.hypot(x + 9 - 3 * np.sin(z / 40), y + 0.22 * b)  # mm
    from_vein = np.hypot(x - 13, y + 0.2 * b)

    stomach = organ(-0.4, 0.3, 40, 0.27, 0.32, 32)
    yield "stomach", 0, stomach
    yield "air", 0, stomach & (y > rng.uniform(0.38, 0.5) * b)  # rises, as the patient lies
    yield "aorta", 0, from_vein < rng.uniform(8, 10)

    right_lobe = organ(0.4, 0.08, 30, 0.38, 0.62, 52)
    left_lobe = organ(0.02, 0.4, 42, 0.4, 0.26, 24)
    yield "liver", 4, right_lobe | left_lobe
    yield "spleen", 1, organ(-0.55, -0.15, 40, 0.17, 0.4, 34)
    for number, side in ((2, 1), (3, -1)):
        yield "kidney", number, organ(0.38 * side, -0.38, -22, 0.155, 0.26, 38)
        yield "fat", 0, organ(0.27 * side, -0.33, -22, 0.1, 0.12, 15)  # the renal sinus
    yield "aorta", 5, from_aorta < rng.uniform(8, 10)


def draw_volume(rng):
    """Return Hounsfield units int16 (X,Y,Z), labels uint8 (X,Y,Z) and the affine (4,4) in RAS."""
    shape = rng.integers((68, 60, 52), (77, 69, 61))
    spacing = np.round(rng.uniform((2.8, 2.8, 3.7), (3.2, 3.2, 4.3)), 3)  # mm
    first = -(shape - 1) / 2 * spacing + rng.normal(0, (3, 3, 8))  # centre of the first voxel
    axes = [x0 + mm * np.arange(n) for x0, mm, n in zip(first, spacing, shape, strict=True)]

    # Positions of the voxels in mm, slightly bent.
    grid = []
    for x in np.meshgrid(*axes, indexing="ij"):
        grid.append(x.astype(np.float32))
    grid = [x + 4 * smooth_noise_3d(rng, shape, 5) for x in grid]

    a, b = rng.uniform((84, 64), (96, 76))
    level = {tissue: rng.normal(*moments) for tissue, moments in TISSUES.items()}
    image, cavity = draw_torso(rng, grid, a, b, level)
    labels = np.zeros(shape, np.uint8)
    removed = rng.integers(1, 4) if rng.random() < 0.2 else None  # spleen or a kidney
    for tissue, number, mask in draw_organs(rng, grid, a, b):
        mask &= cavity
        if number != removed:
            image[mask] = level[tissue]
            labels[mask] = number

    image += 10 * smooth_noise_3d(rng, shape, 4) + 8 * smooth_noise_3d(rng, shape, 16)
    image += rng.normal(0, 25, shape).astype(np.float32)
    image = ndimage.gaussian_filter(image, 0.5)  # voxels on a border mix both sides
    affine = np.diag([*spacing, 1])
    affine[:3, 3] = first
    return image.clip(-1024, 3071).round().astype(np.int16), labels, affine


def demo_volumes(args):
    """Write a small synthetic data set of abdominal CT in the Decathlon's layout.

    Two thirds of the volumes train, a sixth validates and a sixth tests.
    """
    import nibabel

    atomic_files.refuse_existing(args.out)
    names = [f"ct_{k:03}.nii.gz" for k in range(1, args.volumes + 1)]
    sixth = max(1, round(args.volumes / 6))
    ends = {"train": args.volumes - 2 * sixth, "val": args.volumes - sixth, "test": args.volumes}
    splits = {}
    start = 0
    for split, end in ends.items():
        kind = "Ts" if split == "test" else "Tr"
        splits[split] = []
        for name in names[start:end]:
            splits[split].append((f"images{kind}/{name}", f"labels{kind}/{name}"))
        start = end

    def put(part, image, label):
        number = names.index(Path(image).name)
        rng = np.random.default_rng([args.seed, number])
        voxels, labels, affine = draw_volume(rng)
        orientation = nibabel.orientations.axcodes2ornt(STORED[number % len(STORED)])
        for name, array in ((image, voxels), (label, labels)):
            volume = nibabel.Nifti1Image(array, affine).as_reoriented(orientation)
            (part / name).write_bytes(gzip.compress(volume.to_bytes(), 6, mtime=0))

    title = f"synthetic abdominal CT, seed {args.seed}"
    return write_data_set(args.out, DEMO_ABOUT, splits, put, [title])


def options(command):
    """Describe `prepare.py demo-volumes`."""
    add = command(demo_volumes, "make a small synthetic data set of CT volumes")
    help = "folder of the new data set (default: %(default)s)"
    add("--out", type=Path, default="data/demo_volumes", metavar="DIR", help=help)
    help = "number of volumes, all splits together (default: %(default)s)"
    add("--volumes", type=Number(True, 3), default=24, metavar="N", help=help)
    help = "random seed; the same seed gives identical files (default: %(default)s)"
    add("--seed", type=SEED, default=0, metavar="N", help=help)
