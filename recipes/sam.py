"""Recipes for SAM: prompts from ground truth or files, losses, `default` and `origin`.

Letters in shapes: K classes, Q prompts of an image, N prompts of a batch, P points of a prompt, H
and W height and width of an image, S side of SAM's square input, s side of SAM's masks, S/4.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

import sam_decoder
from data import Dataset
from engine import evaluate
from engine.runs import DataSets
from imaging import boxes_and_points, image_files, layouts
from imaging.augment import MIRRORS, Augment
from imaging.boxes_and_points import Prompt, mirrored
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
from recipes.images import encode_image, preprocessed_image, random_view, scoring_fields

TOPOLOGY = ("none", "persistence", "cldice", "oct")
PROMPTS_AT_A_TIME = 16  # in evaluation; decoding needs about 30 MB per prompt

# --- prompts and targets --------------------------------------------------------------------------


def prompts_for(sample, source: str, settings, rng=None, from_files=None) -> list[Prompt]:
    """Return the prompts of one sample. With rng they are made for training.

    source is one of:
    - boxes_and_points.SOURCES: prompts made from the mask
    - "jittered boxes": boxes as in training, but the same ones every time
    - "given boxes", "given points", "given both": the prompts of `from_files`, {image file:
      [Prompt, ...]}, which have no targets; they are mirrored by the sample's "flips", if any

    A sample without a mask is prompted by the box around the whole image, unless the prompts come
    from files.
    """
    if source.startswith("given"):
        prompts = from_files.get(sample["file"], [])
        for flip in sample.get("flips", ()):
            prompts = [mirrored(prompt, sample["size"], MIRRORS[flip]) for prompt in prompts]
        return prompts
    if "mask" not in sample:
        return [Prompt(1, None, boxes_and_points.image_box(sample["size"]))]

    is_training = rng is not None
    limit = settings.prompts_per_image or None if is_training else None
    first = 0 if is_training and settings.ask_background else 1
    if source == "jittered boxes":
        rng = np.random.default_rng(crc32(sample["name"].encode()))
    return boxes_and_points.make_prompts(
        sample["mask"].numpy(),
        classes=range(first, max(2, len(sample["classes"]))),
        kind=source.split()[-1],
        rng=rng,
        jitter=settings.jitter,
        min_area=settings.min_area,
        limit=limit,
    )


def prompt_tensors(prompts: list[Prompt], size, config) -> dict:
    """Return Q prompts of an image of `size` (H,W) as tensors, in pixels of SAM's input.

    boxes (Q,4): NaN where a prompt has none
    points (Q,P,2), labels (Q,P): filled up with label -1
    numbers (Q,): class indices
    shown: (box, points, labels) of each prompt in pixels of the image, for overlays
    """
    Q = len(prompts)
    P = max((len(prompt.labels) for prompt in prompts), default=0)
    boxes = torch.full((Q, 4), torch.nan)
    points = torch.zeros(Q, P, 2)
    labels = torch.full((Q, P), -1)
    numbers = torch.zeros(Q, dtype=torch.int64)
    shown = []

    for k, prompt in enumerate(prompts):
        if prompt.box is not None:
            boxes[k] = sam_decoder.to_input_pixels(torch.from_numpy(prompt.box), size, config)
        count = len(prompt.labels)
        xy = torch.from_numpy(prompt.points)
        points[k, :count] = sam_decoder.to_input_pixels(xy, size, config)
        labels[k, :count] = torch.from_numpy(prompt.labels)
        numbers[k] = prompt.label
        shown.append((prompt.box, prompt.points, prompt.labels))

    tensors = {"boxes": boxes, "points": points, "labels": labels, "numbers": numbers}
    return tensors | {"shown": shown}


def tensors_from_source(sample, source: str, config, settings, from_files=None) -> dict:
    """Return the tensors of a sample's prompts in evaluation; source as in `prompts_for`."""
    prompts = prompts_for(sample, source, settings, from_files=from_files)
    return prompt_tensors(prompts, sample["size"], config)


def stack_masks(prompts: list[Prompt], size) -> Tensor:
    """Return the masks of Q prompts, uint8 (Q,H,W): 1 inside, 0 outside, 255 ignored."""
    if not prompts:
        return torch.zeros(0, *size, dtype=torch.uint8)
    return torch.stack([torch.from_numpy(prompt.mask) for prompt in prompts])


def targets_at_logits(masks: Tensor, config) -> Tensor:
    """Resize masks (Q,H,W) to the size of the logits -> (Q,1,s,s) float32, with padding 255."""
    side = config.image_size // 4
    small = replace(config, image_size=side)
    targets = torch.zeros(len(masks), 1, side, side)
    for k, mask in enumerate(masks):
        targets[k] = sam_decoder.preprocess_mask(mask, small)

    h, w = sam_decoder.size_in_input(masks.shape[1:], small)
    targets[..., h:, :] = 255
    targets[..., :, w:] = 255
    return targets


def sam_inputs(sample, train: bool, rng, config, settings, load_image) -> dict:
    """Return the item of a sample: the result of `load_image`, its prompts and their targets.

    mask: the targets, float32 (Q,1,s,s), or (Q,1,H,W) with `settings.full_size`.
    In evaluation, the item also has what scoring needs: the keys of `scoring_fields`, prompt (the
    source of the prompts), classes, and parts (Q,H,W) uint8, the masks of the prompts.
    """
    if train:
        sample = random_view(sample, settings.views, rng)
        if settings.augment is not None:
            image, mask, _ = settings.augment(sample["image"], sample["mask"], "", None, rng)
            sample = sample | {"image": image, "mask": mask}

    source = settings.sam_prompts
    item = load_image(sample)
    if not train:
        item |= scoring_fields(sample) | {"prompt": source, "classes": sample["classes"]}
    if "mask" not in sample:
        return item

    prompts = prompts_for(sample, source, settings, rng if train else None)
    item |= prompt_tensors(prompts, sample["size"], config)
    masks = stack_masks(prompts, sample["size"])  # (Q,H,W)
    if settings.full_size:
        item["mask"] = masks[:, None].float()  # (Q,1,H,W)
    else:
        item["mask"] = targets_at_logits(masks, config)  # (Q,1,s,s)
    if not train:
        item["parts"] = masks
    return item


def collate_prompts(items: list[dict]) -> dict:
    """Return a batch: images stacked, the prompts of all images one after another.

    image_index (N,) is the image of each prompt. Images without an object are left out, unless
    there is no other. Raises ValueError if targets differ in size.
    """
    items = [item for item in items if len(item["boxes"])] or items[:1]
    sizes = sorted({tuple(item["mask"].shape[2:]) for item in items})
    if len(sizes) > 1:
        (h, w), (H, W) = sizes[:2]
        raise ValueError(
            "this recipe's loss is taken at the images' own size and needs images of one size in a "
            f"batch, not {w}x{h} and {W}x{H}; use --batch-size 1"
        )

    key = "features" if "features" in items[0] else "image"
    batch = {key: torch.stack([item[key] for item in items])}
    for name in ("boxes", "points", "labels", "mask"):
        batch[name] = torch.cat([item[name] for item in items])
    counts = torch.tensor([len(item["boxes"]) for item in items])
    batch["image_index"] = torch.arange(len(items)).repeat_interleave(counts)
    return batch


# --- forward pass and prediction ------------------------------------------------------------------


def count_points(labels: Tensor) -> Tensor:
    """Return the number of points of each prompt, (N,) int64. labels (N,P): -1 is padding.

    A -1 in front of other labels counts, as it adds a token.
    """
    is_point = labels >= 0
    if labels.shape[1] == 0:
        return is_point.sum(1)
    position = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return (position * is_point).amax(1)


def sam_forward(model: nn.Module, batch: dict) -> tuple[Tensor, Tensor]:
    """Return masks (N,1,1,s,s), logits, and their estimated IoU (N,1,1) for N prompts of a batch.

    Only prompts of one form (box, points, both) and number of points are decoded together: padding
    would add tokens, and these change the masks.
    """
    if not len(batch["boxes"]):  # no prompts: empty outputs that still carry a (zero) gradient
        zero = 0 * sum(p.sum() for p in model.mask_decoder.parameters())
        return zero.expand(0, 1, 1, 1, 1), zero.expand(0, 1, 1)

    if "features" in batch:
        features = batch["features"].float()
    else:
        features = model.encode_image(batch["image"])

    # A group's number is odd if its prompts have a box; half of it is their number of points.
    has_box = ~batch["boxes"].isnan().any(1)  # (N,)
    group = has_box + 2 * count_points(batch["labels"])  # (N,)
    order = []
    masks = []
    iou = []
    for number in group.unique().tolist():
        rows = (group == number).nonzero()[:, 0]  # (n,), the group's prompts
        prompts = {}
        if number % 2:
            prompts["boxes"] = batch["boxes"][rows, None]  # (n,1,4)
        P = number // 2
        if P:
            prompts["points"] = batch["points"][rows, None, :P]  # (n,1,P,2)
            prompts["labels"] = batch["labels"][rows, None, :P]  # (n,1,P)
        image_index = batch["image_index"][rows]  # (n,)
        group_masks, group_iou = model.decode(features[image_index], **prompts)
        order.append(rows)
        masks.append(group_masks)  # (n,1,1,s,s)
        iou.append(group_iou)  # (n,1,1)

    original_order = torch.cat(order).argsort()  # (N,)
    return torch.cat(masks)[original_order], torch.cat(iou)[original_order]


def predict_each(model, item: dict, output) -> Tensor:
    """Return the probabilities (Q,H,W) of every prompt's mask at the image's own size."""
    masks, _ = output
    return model.postprocess(masks.flatten(0, 2), item["size"])


def sam_predict(model, item: dict) -> tuple[Tensor, tuple | None]:
    """Return probabilities (K,H,W), and the output for `loss`, None if there are no prompts.

    A class gets the maximum over its prompts. Of several classes the first is the background, with
    the threshold as its probability: a pixel belongs to the most probable class above it.
    """
    K = len(item["classes"])
    Q = len(item["boxes"])
    device = next(model.parameters()).device
    classes = torch.zeros(max(2, K), *item["size"], device=device)
    classes[0] = model.config.threshold

    features = item.get("features")
    if features is None and Q:
        features = model.encode_image(item["image"][None].to(device))[0]

    masks = []
    iou = []
    for start in range(0, Q, PROMPTS_AT_A_TIME):
        rows = slice(start, start + PROMPTS_AT_A_TIME)
        batch = {name: item[name][rows].to(device) for name in ("boxes", "points", "labels")}
        batch["features"] = features[None].to(device)
        batch["image_index"] = torch.zeros(len(batch["boxes"]), dtype=torch.int64, device=device)
        output = sam_forward(model, batch)
        masks.append(output[0])
        iou.append(output[1])
        probabilities = predict_each(model, item, output)  # (n,H,W)
        for label, p in zip(item["numbers"][rows].tolist(), probabilities, strict=True):
            classes[label] = torch.maximum(classes[label], p)

    if K == 1:
        classes = classes[1:]
    if not masks:
        return classes, None
    return classes, (torch.cat(masks), torch.cat(iou))  # (Q,1,1,s,s), (Q,1,1)


# --- losses ---------------------------------------------------------------------------------------


def topology_term(logits: Tensor, target: Tensor, settings) -> tuple[Tensor | float, dict]:
    """Return the weighted topological loss of N masks, and its part by name; 0.0, {} without one.

    logits (N,1,h,w), target (N,1,h,w) of 0, 1 and 255.
    """
    if settings.topology == "none":
        return 0.0, {}

    p = logits.sigmoid()
    keep = (target != 255).to(logits.dtype)
    if settings.topology == "persistence":
        term = topological_loss(p, target)
    elif settings.topology == "cldice":
        term = cldice_loss(p, target * keep, keep=keep).mean()
    else:
        term = oct_topological_loss(p * keep, target * keep)
    return settings.topology_weight * term, {settings.topology: term}


def sam_dice_bce(output, batch, settings, config) -> tuple[Tensor, dict]:
    """Return losses.sam_loss at the size of the logits, plus the topological loss if set."""
    masks, iou = output
    masks = masks.float().flatten(0, 2)  # (N,s,s)
    iou = iou.float().flatten(0, 2)  # (N,)
    target = batch["mask"].flatten(0, -3)  # (N,s,s)
    if not len(target):  # no image of the batch has an object: nothing to learn
        return masks.sum() + iou.sum(), {}

    loss, parts = sam_loss(masks, iou, target)
    term, topology_parts = topology_term(masks[:, None], target[:, None], settings)
    return loss + term, parts | topology_parts


def oct_study_loss(output, batch, settings, config) -> tuple[Tensor, dict]:
    """Return Dice + BCE + topological loss at the image's own size; the IoU head learns nothing.

    quirk of the study, left out: with several prompts per image its cross entropy was a softmax
    across them (monai's DiceCELoss), so the loss of a mask depended on the other prompts.
    """
    masks, _ = output
    target = batch["mask"].flatten(0, -4)  # (N,1,H,W)
    logits = masks.float().flatten(0, 1)  # (N,1,s,s)
    if not len(target):
        return logits.sum(), {}

    logits = sam_decoder.to_image_size(logits, target.shape[2:], config)  # (N,1,H,W)
    loss, parts = dice_bce(logits, target, smooth=1e-5)
    term, topology_parts = topology_term(logits, target, settings)
    return loss + term, parts | topology_parts


# --- recipes --------------------------------------------------------------------------------------


def not_mask_decoder(name: str) -> bool:
    """Return True for parameters of the image encoder and the prompt encoder."""
    return not name.startswith("mask_decoder.")


def qkv_weight(name: str) -> bool:
    """Return True for the weights that LoRA updates."""
    return name.endswith(".attn.qkv.weight")


PROTOCOLS = {
    # Our recommendation: train the decoder on cached features, with boxes as a user draws them.
    "default": Protocol(
        hub_ids={
            "vit-base": "facebook/sam-vit-base",
            "vit-large": "facebook/sam-vit-large",
            "vit-huge": "facebook/sam-vit-huge",
        },
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
# The OCT study, github.com/philippendres/DILabHelmholtzOCT (octsam/models/training.py), with its
# topological loss. Quirks: the background and every speck get a prompt; there is no augmentation.
# Left out, as they are mistakes: the first batch of each epoch was skipped, padding of batches was
# trained on as boxes at 0, jitter could invert boxes, the softmax across prompts, and roots over
# sums of masks in the topological loss of a batch.
PROTOCOLS["origin"] = replace(
    PROTOCOLS["default"],
    views=("original",),
    augment=None,
    min_area=1,
    prompts_per_image=0,
    ask_background=True,
    topology="oct",
    topology_weight=1.0,  # the study's 0.1 is inside the loss
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
    """Return the model of `weights`; SAM has no classes, so the training set does not matter."""
    return load_variant(
        sam_decoder.SAM, sam_decoder.VARIANTS, weights, variant, settings, overrides
    )


def sam_recipe(model: sam_decoder.SAM, settings: Protocol) -> Recipe:
    """Return the recipe of a model under the settings of a run."""
    context = {"config": model.config, "settings": settings}
    load_image = partial(preprocessed_image, config=model.config, preprocess=sam_decoder.preprocess)
    return Recipe(
        inputs=partial(sam_inputs, load_image=load_image, **context),
        forward=sam_forward,
        loss=partial(settings.loss, **context),
        predict=sam_predict,
        groups=parameter_groups,
        collate=collate_prompts,
        make_prompts=partial(tensors_from_source, **context),
        predict_each=predict_each,
        load_image=load_image,
        test=evaluate.prompted_test,
        sources=sam_sources,
        items_by_source=items_of_every_source,
        encode=encode_image,
    )


# --- prompts from files ---------------------------------------------------------------------------


def with_file_prompts(recipe, tests: dict, boxes: str | None, points: str | None):
    """Return the recipe, which then also knows the prompts of the files --boxes and --points.

    Raises ValueError, one line, for several test sets and for files that do not fit the test set.
    """
    if len(tests) != 1:
        option = f"--boxes {boxes}" if boxes else f"--points {points}"
        raise ValueError(f"{option}: for one test set, not {len(tests)}")

    (dataset,) = tests.values()
    images = []
    names = []
    for entry in dataset.entries:
        images.append(entry.image)
        names.append(layouts.name_in_images(entry.image, entry.root))
    sizes = [tuple(row[2:4]) for row in dataset.rows]
    prompts, _ = read_image_prompts((boxes, points), images, names, sizes, dataset.classes)
    return replace(recipe, make_prompts=partial(recipe.make_prompts, from_files=prompts))


def read_image_prompts(
    sheets: tuple, images: list[Path], names: list[str], sizes: list, classes=None
):
    """Read the prompts of n images from files: {image file: [Prompt, ...]}, and the classes.

    sheets: the paths of a file of boxes and of one of points, one may be None. names: the images'
    paths as `boxes_and_points.ImageNames` takes them. sizes: their (H,W). Prints how many images
    have no prompt. Raises ValueError, one line, if an image is listed twice, for two masks: a box
    names only the image.
    """
    boxes, points = sheets
    noun = "point" if boxes is None else "box"
    option = "--points" if boxes is None else "--boxes"
    for image, count in Counter(images).items():
        if count > 1:
            raise ValueError(
                f"{option}: {image} has {count} masks; a {noun} does not say which it is for"
            )

    paths = dict(zip(images, names, strict=True))
    sizes = dict(zip(images, sizes, strict=True))
    prompts, classes = boxes_and_points.read_prompts(boxes, points, sizes, classes, paths)

    without = [paths[image] for image in images if image not in prompts]
    if without:
        noun = "box or point" if boxes and points else noun
        examples = boxes_and_points.first_three(without)
        print(
            f"{boxes or points}: {len(without)} of {len(images)} images have no {noun}, and their "
            f"masks are empty ({examples})"
        )
    return prompts, classes


def file_source(settings) -> str | None:
    """Return the name of prompts from files in tables, None without --boxes and --points."""
    if settings.boxes and settings.points:
        return "given both"
    if settings.boxes:
        return "given boxes"
    return "given points" if settings.points else None


def sam_sources(dataset: Dataset, settings) -> list[str]:
    """Return the sources of prompts that a test compares."""
    sources = ["boxes", "jittered boxes"]
    from_files = file_source(settings)
    if from_files:
        sources.append(from_files)
    sources += ["points", "both"]
    if len(dataset.classes) == 1:  # a whole image does not tell classes apart
        sources.append("image")
    return sources


def items_of_every_source(
    recipe: Recipe, dataset: Dataset, i: int, sources: list[str]
) -> dict[str, dict]:
    """Return {source of prompts: item} of entry i."""
    sample = dataset.sample(i, "")
    item = recipe.inputs(sample, train=False, rng=None)
    items = {}
    for source in sources:
        items[source] = item | recipe.make_prompts(sample, source) | {"prompt": source}
    return items


def containing(image: Path, folders: list[Path]) -> Path | None:
    """Return the first of the folders that contains an image, None if none does."""
    for folder in folders:
        if image.is_relative_to(folder):
            return folder
    return None


def image_names(images: list[Path], inputs: list[str]) -> list[str]:
    """Return the images' paths within their input folder or their data set's images folder.

    With several data sets, a path that occurs in two of them starts with the data set's folder.
    """
    data_sets = [Path(path).resolve() for path in inputs if layouts.find_splits(Path(path))]
    folders = [Path(path) for path in inputs if Path(path).is_dir()]
    names = []
    long_names = []
    for image in images:
        root = containing(image, data_sets)
        folder = containing(image, folders)
        if root is not None:
            name = layouts.name_in_images(image, root)
            long_names.append(f"{root.name}/{name}")
        else:
            name = image.name if folder is None else image.relative_to(folder).as_posix()
            long_names.append(name)
        names.append(name)

    counts = Counter(names)
    for i, name in enumerate(names):
        if counts[name] > 1:
            names[i] = long_names[i]
    return names


def size_for_boxes(file: Path) -> tuple[float, float]:
    """Return the (H,W) of an upright image; infinite if it cannot be read, so that boxes fit.

    The prediction of the image then reports the error.
    """
    try:
        return image_files.read_image(file).shape[:2]
    except (ValueError, OSError):
        return np.inf, np.inf


# --- SAM in the programs --------------------------------------------------------------------------


@dataclass(frozen=True)
class SAMFamily(Family):
    """SAM, prompted by boxes and points from ground truth or files."""

    options: ClassVar[tuple] = (IMAGE_OPTIONS, BOX_OPTIONS)
    compiles: ClassVar[bool] = False  # training calls `encode_image` and `decode`, not `forward`

    def check_options(self, options) -> None:
        super().check_options(options)
        if options.score_size == "network":
            raise ValueError("--score-size network: SAM is scored at the image's size; remove it")

    def check_classes(self, model: nn.Module, datasets: list, settings: Settings) -> None:
        """Accept any classes, as SAM has none. Raises ValueError for options of one class."""
        if settings.threshold == "auto" and len(datasets[0].classes) > 1:
            raise ValueError("--threshold auto: only for a single class; remove it")

    def make_ready(
        self, model: nn.Module, recipe: Recipe, data_sets: DataSets, settings: Settings
    ) -> Recipe:
        """Read the files of --boxes and --points."""
        if settings.boxes or settings.points:
            return with_file_prompts(recipe, data_sets.tests, settings.boxes, settings.points)
        return recipe

    def prompts_for_prediction(
        self, recipe: Recipe, cases: list, classes: list | None, args
    ) -> tuple:
        """Prompt by the files of --boxes and --points, or by the whole image."""
        if args.boxes or args.points:
            images = [file for _, file, _ in cases]
            sizes = [size_for_boxes(file) for file in images]
            names = image_names(images, args.inputs)
            sheets = (args.boxes, args.points)
            prompts, classes = read_image_prompts(sheets, images, names, sizes, classes)
            return partial(recipe.make_prompts, source="given boxes", from_files=prompts), classes

        if classes and len(classes) > 1:
            raise ValueError(
                "--boxes or --points is missing: a whole image does not say which of "
                f"{', '.join(classes[1:])} is meant"
            )
        print("no --boxes or --points: the prompt is the box around each whole image")
        return partial(recipe.make_prompts, source="image"), classes or ["target"]


FAMILY = SAMFamily(
    PROTOCOLS,
    sam_decoder.VARIANTS,
    load_sam,
    sam_recipe,
    not_mask_decoder,
    sides=(16, 16),
    can_cache=True,
    lora={"chosen": qkv_weight, "thirds": (0, 2)},  # queries and values, as in SAMed
)
