"""SAM: boxes and points that are made of masks or given, its losses and its recipes."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sam_decoder
from data import Dataset
from engine import evaluate
from engine.runs import DataSets
from imaging import boxes_and_points, image_files, layouts
from imaging.augment import Augment
from losses import cldice_loss, dice_bce, oct_topological_loss, sam_loss, topological_loss
from recipes.base import (
    BOX_OPTIONS,
    IMAGE_OPTIONS,
    Family,
    Protocol,
    Recipe,
    Settings,
    load_variant,
    parameter_groups,
)
from recipes.images import encode_image, for_scores, one_view, pixels

TOPOLOGY = ("none", "persistence", "cldice", "oct")
NO_BOX = np.full(4, np.nan, np.float32)
NO_POINTS = np.zeros((0, 2), np.float32), np.zeros(0, np.int64)


def sam_prompts(sample, source, settings, rng=None, given=None) -> list:
    """The prompts (imaging/boxes_and_points.py) of one sample, in training with rng.

    source: one of boxes_and_points.SOURCES, made of the mask; "jittered boxes", as in training, but
    always the same; "given boxes", "given points", "given both": those of `given`, {image file as a
    path: [Prompt]}, which have no truth. Without a mask "image" is all else that can be asked.
    """
    names = sample["classes"]
    if source.startswith("given"):
        return given.get(sample["file"], [])
    if "mask" not in sample:
        return [
            boxes_and_points.Prompt(1, None, boxes_and_points.image_box(sample["size"]), *NO_POINTS)
        ]
    kind, how = source.split()[-1], {"jitter": settings.jitter, "min_area": settings.min_area}
    first = 0 if rng is not None and settings.ask_background else 1
    if source == "jittered boxes":
        rng = np.random.default_rng(crc32(sample["name"].encode()))
    elif rng is not None:
        how["limit"] = settings.prompts_per_image or None
    classes = range(first, max(2, len(names)))
    return boxes_and_points.make_prompts(sample["mask"].numpy(), classes, kind, rng, **how)


def tensors_of_prompts(asked: list, size, config) -> dict:
    """boxes (Q,4), NaN where there is none, points (Q,P,2), labels (Q,P), all in SAM's frame;
    numbers (Q,), the prompts' classes; and `shown`, each one's box, points and labels to be drawn.
    Of the prompts of an image of `size` (H,W). Fewer points than P are followed by label -1."""
    frame = partial(sam_decoder.to_frame, size=size, config=config)
    boxes = [NO_BOX if p.box is None else frame(torch.from_numpy(p.box)).numpy() for p in asked]
    q = len(asked)
    n = max((len(p.labels) for p in asked), default=0)
    points = np.zeros((q, n, 2), np.float32)
    labels = np.full((q, n), -1)
    for k, p in enumerate(asked):
        points[k, : len(p.points)] = frame(torch.from_numpy(p.points)).numpy()
        labels[k, : len(p.labels)] = p.labels
    return {
        "boxes": torch.from_numpy(np.float32(boxes).reshape(q, 4)),
        "points": torch.from_numpy(points),
        "labels": torch.from_numpy(labels),
        "numbers": torch.tensor([p.label for p in asked], dtype=torch.int64),
        "shown": [(p.box, p.points, p.labels) for p in asked],
    }


def sam_ask(sample, source, config, settings, given=None) -> dict:
    """What an item of evaluation has of its prompts."""
    asked = sam_prompts(sample, source, settings, given=given)
    return tensors_of_prompts(asked, sample["size"], config)


def sam_inputs(sample, train, rng, config, settings, look) -> dict:
    """What `look` makes of the image, the tensors of its prompts, and mask (Q,1,s,s) float32, the
    target of each: at the logits' size or, if the recipe says so, the image's.

    In evaluation also what scoring needs: that of `for_scores`, the source of the prompts as
    prompt, classes, and parts (Q,H,W) uint8, the truth of each prompt.
    """
    sample = one_view(sample, settings.views, rng) if train else sample
    if train and settings.augment is not None:
        image, mask, _ = settings.augment(sample["image"], sample["mask"], "", None, rng)
        sample = sample | {"image": image, "mask": mask}
    item, source = look(sample), settings.sam_prompts
    if not train:
        item |= for_scores(sample) | {"prompt": source, "classes": sample["classes"]}
    if "mask" not in sample:
        return item
    asked = sam_prompts(sample, source, settings, rng if train else None)
    item |= tensors_of_prompts(asked, sample["size"], config)
    targets = [torch.from_numpy(p.mask) for p in asked] or [torch.zeros(sample["size"])]  # (H,W)
    small = replace(config, image_size=config.image_size // 4)
    if settings.full_size:
        masks = torch.stack([t[None].float() for t in targets])
    else:
        masks = torch.stack([sam_decoder.preprocess_mask(t, small) for t in targets])
        h, w = sam_decoder.frame_size(sample["size"], small)
        masks[..., h:, :] = masks[..., w:] = 255  # beyond the image nothing counts
    item["mask"] = masks[: len(asked)]
    if not train:
        item["parts"] = torch.stack(targets)[: len(asked)]
    return item


def collate_prompts(items: list[dict]) -> dict:
    """A batch: images stacked, the prompts of all images in a row, `of` tells whose each is.

    An image without an object is left out, unless there is no other.
    """
    items = [item for item in items if len(item["boxes"])] or items[:1]
    sizes = sorted({tuple(item["mask"].shape[2:]) for item in items})
    if len(sizes) > 1:
        (h, w), (H, W), *_ = sizes
        message = f"images of one size in a batch, not {w}x{h} and {W}x{H}; --batch-size 1"
        raise ValueError(f"this recipe's loss is taken at the images' own size and needs {message}")
    per_image = torch.tensor([len(item["boxes"]) for item in items])
    one = "features" if "features" in items[0] else "image"
    stacked = {one: torch.stack([item[one] for item in items])}
    names = ("boxes", "points", "labels", "mask")
    packed = {name: torch.cat([item[name] for item in items]) for name in names}
    return stacked | packed | {"of": torch.arange(len(items)).repeat_interleave(per_image)}


def count_points(labels: Tensor) -> Tensor:
    """Return (N,) int64: the points of each prompt, up to the last whose label (N,P) is not -1."""
    is_point = labels >= 0
    if labels.shape[1] == 0:
        return is_point.sum(1)
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return (places * is_point).amax(1)


def sam_forward(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """masks (N,1,1,s,s), logits, and their estimated IoU (N,1,1), for all N prompts of a batch.

    Prompts of one form (box, points, both) and number of points pass together: tokens for what a
    prompt does not have would change its answer.
    """
    if not len(batch["boxes"]):  # nothing asked: an empty answer, whose gradients are 0
        nothing = 0 * sum(p.sum() for p in model.mask_decoder.parameters())
        return nothing.expand(0, 1, 1, 1, 1), nothing.expand(0, 1, 1)
    if "features" in batch:
        features = batch["features"].float()
    else:
        features = model.encode_image(batch["image"])
    form = ~batch["boxes"].isnan().any(1) + 2 * count_points(batch["labels"])  # (N,)
    order, masks, iou = [], [], []
    for kind in form.unique().tolist():
        rows, asked = (form == kind).nonzero()[:, 0], {}
        if kind & 1:
            asked["boxes"] = batch["boxes"][rows, None]  # (n,1,4)
        p = kind // 2
        if p:
            asked |= {k: batch[k][rows, None, :p] for k in ("points", "labels")}  # (n,1,p,...)
        some, estimate = model.decode(features[batch["of"][rows]], **asked)
        order, masks, iou = [*order, rows], [*masks, some], [*iou, estimate]
    back = torch.cat(order).argsort()
    return torch.cat(masks)[back], torch.cat(iou)[back]


def sam_each(model, item: dict, output) -> Tensor:
    """Probabilities (Q,H,W) of every prompt's mask at the image's own size."""
    return model.postprocess(output[0].flatten(0, 2), item["size"])


def sam_predict(model, item: dict) -> tuple[Tensor, tuple | None]:
    """Probabilities (K,H,W), and the output for `loss`; None if nothing was asked.

    Of a class the largest of its prompts'. Of several classes the first is the background, as
    probable as the threshold: a pixel is of the most probable class above it.
    """
    n, (H, W), device = len(item["classes"]), item["size"], next(model.parameters()).device
    classes = torch.zeros(max(2, n), H, W, device=device)
    classes[0] = model.config.threshold
    features, outputs = item.get("features"), []
    if features is None and len(item["boxes"]):
        features = model.encode_image(item["image"][None].to(device))[0]
    for k in range(0, len(item["boxes"]), 16):  # 30 MB a prompt
        batch = {key: item[key][k : k + 16].to(device) for key in ("boxes", "points", "labels")}
        batch["of"] = torch.zeros(len(batch["boxes"]), dtype=torch.int64, device=device)
        outputs.append(sam_forward(model, batch | {"features": features[None].to(device)}))
        for number, p in zip(
            item["numbers"][k : k + 16].tolist(), sam_each(model, item, outputs[-1]), strict=True
        ):
            classes[number] = torch.maximum(classes[number], p)
    output = tuple(map(torch.cat, zip(*outputs, strict=True))) if outputs else None
    return classes if n > 1 else classes[1:], output


def sam_terms(logits: Tensor, target: Tensor, settings) -> tuple[Tensor | float, dict]:
    """The topological term beside the loss of N masks: logits (N,1,h,w), target (N,1,h,w)."""
    if settings.topology == "none":
        return 0.0, {}
    p, keep = logits.sigmoid(), (target != 255).to(logits.dtype)
    if settings.topology == "persistence":
        term = topological_loss(p, target)
    elif settings.topology == "cldice":
        term = cldice_loss(p, target * keep, keep=keep).mean()
    else:
        term = oct_topological_loss(p * keep, target * keep)
    return settings.topology_weight * term, {settings.topology: term}


def sam_dice_bce(output, batch, settings, config) -> tuple[Tensor, dict]:
    """losses.sam_loss at the logits' size, and what is asked for beside."""
    masks, iou = (x.float().flatten(0, 2) for x in output)  # (N,s,s), (N,)
    target = batch["mask"].flatten(0, -3)  # (N,s,s)
    if not len(target):  # no image of the batch has an object: nothing to learn
        return masks.sum() + iou.sum(), {}
    loss, parts = sam_loss(masks, iou, target)
    term, more = sam_terms(masks[:, None], target[:, None], settings)
    return loss + term, parts | more


def oct_study_loss(output, batch, settings, config) -> tuple[Tensor, dict]:
    """Dice + BCE + topological loss at the image's own size; the IoU head learns nothing.

    quirk of the study, not built: for several prompts an image its cross entropy was a softmax
    across them (monai's DiceCELoss), so that a mask's loss hung on what else was asked.
    """
    target = batch["mask"].flatten(0, -4)  # (N,1,H,W)
    logits, S = output[0].float().flatten(0, 1), config.image_size  # (N,1,s,s)
    if not len(target):
        return logits.sum(), {}
    h, w = sam_decoder.frame_size(target.shape[2:], config)
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    logits = resize(resize(logits, (S, S))[..., :h, :w], target.shape[2:])
    loss, parts = dice_bce(logits, target, smooth=1e-5)
    term, more = sam_terms(logits, target, settings)
    return loss + term, parts | more


def not_mask_decoder(name: str) -> bool:
    return not name.startswith("mask_decoder.")


def qkv_weight(name: str) -> bool:
    return name.endswith(".attn.qkv.weight")


PROTOCOLS = {
    # What we recommend: the decoder alone, on kept features; boxes as a user draws them.
    "default": Protocol(
        hub_ids={f"vit-{size}": f"facebook/sam-vit-{size}" for size in ("base", "large", "huge")},
        prompt="",
        train="decoder",
        lora_rank=4,
        views=("original", "hflip"),
        augment=Augment(rotate=15),
        sam_prompts="boxes",
        jitter=10,
        min_area=20,
        prompts_per_image=8,
        topology="none",
        topology_weight=0.1,
        loss=sam_dice_bce,
        lr=1e-4,
        backbone_lr=1e-5,
        backbone=not_mask_decoder,
        batch_size=4,
    ),
}
# github.com/philippendres/DILabHelmholtzOCT (octsam/models/training.py) with its topological loss.
# Quirks: the background and every speck are asked for; no augmentation, though it is free here.
# Left out, as they are slips: the first batch of each epoch was not trained on, prompts that filled
# up batches were trained on as boxes at 0, jitter could invert boxes, the softmax across prompts,
# and roots over sums of masks in the topological loss of a batch.
PROTOCOLS["origin"] = replace(
    PROTOCOLS["default"],
    views=("original",),
    augment=None,
    min_area=1,
    prompts_per_image=0,
    ask_background=True,
    topology="oct",
    topology_weight=1.0,  # the loss has the study's 0.1 in it
    full_size=True,
    loss=oct_study_loss,
    optimizer="adam",
    lr=1e-3,
    weight_decay=0.0,
    batch_size=2,
    epochs=10,
    schedule="constant",
    warmup=0.0,
    clip_grad=None,
    dtype="float32",
)


def load_sam(weights, variant, settings: Protocol, overrides: dict, train_set) -> sam_decoder.SAM:
    return load_variant(
        sam_decoder.SAM, sam_decoder.VARIANTS, weights, variant, settings, overrides
    )


def sam_recipe(model: sam_decoder.SAM, settings: Protocol) -> Recipe:
    config = model.config
    look = partial(pixels, config=config, preprocess=sam_decoder.preprocess)
    how = {"config": config, "settings": settings}
    return Recipe(
        partial(sam_inputs, look=look, **how),
        sam_forward,
        partial(settings.loss, **how),
        sam_predict,
        parameter_groups,
        collate=collate_prompts,
        ask=partial(sam_ask, **how),
        each=sam_each,
        look=look,
        test=evaluate.prompted_test,
        sources=sam_sources,
        ask_each=ask_every_source,
        encode=encode_image,
    )


def with_given(recipe, tests: dict, boxes: str | None, points: str | None):
    """Return the recipe, which then can also ask by the boxes and points of files.

    Raises ValueError if they are not those of the one test set.
    """
    if len(tests) != 1:
        given = f"--boxes {boxes}" if boxes else f"--points {points}"
        raise ValueError(f"{given}: for one test set, not {len(tests)}")
    (dataset,) = tests.values()
    images = []
    names = []
    for entry in dataset.entries:
        images.append(entry.image)
        names.append(layouts.name_in_images(entry.image, entry.root))
    sizes = [tuple(row[2:4]) for row in dataset.rows]
    given, _ = read_image_prompts(boxes, points, images, names, sizes, dataset.classes)
    return replace(recipe, ask=partial(recipe.ask, given=given))


def read_image_prompts(boxes, points, images: list[Path], names: list[str], sizes, classes=None):
    """Read the prompts of n images from files: {image file: [prompts.Prompt, ...]}, and classes.

    boxes, points: paths of files, one may be None. names: the images' paths as `prompts.ImageNames`
    takes them. sizes: their (H,W). Prints how many images have no prompt. Raises ValueError if an
    image is listed twice, as the masks of two entries: a box names only the image.
    """
    kind = "point" if boxes is None else "box"
    if len({*images}) < len(images):
        image = next(image for image in images if images.count(image) > 1)
        masks = f"{image} has {images.count(image)} masks"
        option = "--points" if boxes is None else "--boxes"
        raise ValueError(f"{option}: {masks}; a {kind} does not say which it is for")

    paths = dict(zip(images, names, strict=True))
    sizes = dict(zip(images, sizes, strict=True))
    given, classes = boxes_and_points.read_given(boxes, points, sizes, classes, paths)
    without = [paths[image] for image in images if image not in given]
    if without:
        kind = "box or point" if boxes and points else kind
        count = f"{len(without)} of {len(images)} images have no {kind}, and their masks are empty"
        print(f"{boxes or points}: {count} ({boxes_and_points.first_three(without)})")
    return given, classes


def given_source(settings) -> str | None:
    """Return what the prompts of --boxes, of --points, or of both are called in tables."""
    if settings.boxes and settings.points:
        return "given both"
    if settings.boxes:
        return "given boxes"
    return "given points" if settings.points else None


def sam_sources(dataset: Dataset, settings) -> list[str]:
    """Return what every entry can be asked by: all that a user may have."""
    whole = ["image"] if len(dataset.classes) == 1 else []  # which tells no classes apart
    given = given_source(settings)
    given = [given] if given else []
    return ["boxes", "jittered boxes", *given, "points", "both", *whole]


def ask_every_source(recipe: Recipe, dataset: Dataset, i: int, kinds: list[str]) -> dict[str, dict]:
    """Return {source of prompts: item} of entry i."""
    sample = dataset.sample(i, "")
    item = recipe.inputs(sample, train=False, rng=None)
    return {kind: item | recipe.ask(sample, kind) | {"prompt": kind} for kind in kinds}


def image_names(images: list[Path], inputs: list[str]) -> list[str]:
    """Return the images' paths within their input folder or their data set's images folder.

    With several data sets the folder of the data set comes first where a path occurs twice.
    """
    data_sets = [Path(place).resolve() for place in inputs if layouts.splits(Path(place))]
    folders = [Path(place) for place in inputs if Path(place).is_dir()]
    names = []
    longer_names = []
    for image in images:
        root = next((root for root in data_sets if image.is_relative_to(root)), None)
        folder = next((folder for folder in folders if image.is_relative_to(folder)), None)
        if root is not None:
            name = layouts.name_in_images(image, root)
        else:
            name = image.name if folder is None else image.relative_to(folder).as_posix()
        names.append(name)
        longer_names.append(name if root is None else f"{root.name}/{name}")

    counts = Counter(names)
    return [
        long if counts[name] > 1 else name for name, long in zip(names, longer_names, strict=True)
    ]


def size_for_boxes(file: Path) -> tuple[float, float]:
    """Return the (H,W) of an image, upright; infinite if it cannot be read, so that boxes fit.

    That it cannot be read is said when it is predicted.
    """
    try:
        return image_files.read_image(file).shape[:2]
    except (ValueError, OSError):
        return np.inf, np.inf


@dataclass(frozen=True)
class SAMFamily(Family):
    """SAM: asked by boxes and points, which are made of masks or given in files."""

    options: ClassVar[tuple] = (IMAGE_OPTIONS, BOX_OPTIONS)
    compiles: ClassVar[bool] = False  # `forward` is not called: it encodes and decodes apart

    def check_options(self, options) -> None:
        super().check_options(options)
        if options.score_size == "network":
            raise ValueError("--score-size network: SAM is scored at the image's size, drop it")

    def check_classes(self, model: nn.Module, datasets: list, settings: Settings) -> None:
        """SAM has no classes of its own, and takes those of every data set."""
        if settings.threshold == "auto" and len(datasets[0].classes) > 1:
            raise ValueError("--threshold auto: of one class alone; drop it")

    def make_ready(
        self, model: nn.Module, recipe: Recipe, data_sets: DataSets, settings: Settings
    ) -> Recipe:
        """Read the files of --boxes and --points."""
        if settings.boxes or settings.points:
            return with_given(recipe, data_sets.tests, settings.boxes, settings.points)
        return recipe

    def ask_in_prediction(self, recipe: Recipe, cases: list, classes: list | None, args) -> tuple:
        """Ask by the files of --boxes and --points, or by the whole image."""
        if args.boxes or args.points:
            images = [file for _, file, _ in cases]
            sizes = [size_for_boxes(file) for file in images]
            names = image_names(images, args.inputs)
            files = args.boxes, args.points
            given, classes = read_image_prompts(*files, images, names, sizes, classes)
            return partial(recipe.ask, source="given boxes", given=given), classes
        if classes and len(classes) > 1:
            told = ", ".join(classes[1:])
            need = "--boxes or --points is missing"
            raise ValueError(f"{need}: a whole image does not say which of {told} is meant")
        print("no --boxes or --points: SAM is asked by the box around each whole image")
        return partial(recipe.ask, source="image"), classes or ["target"]


FAMILY = SAMFamily(
    PROTOCOLS,
    sam_decoder.VARIANTS,
    load_sam,
    sam_recipe,
    not_mask_decoder,
    sides=(16, 16),
    keeps=True,
    lora={"chosen": qkv_weight, "thirds": (0, 2)},  # queries and values, as SAMed
)
