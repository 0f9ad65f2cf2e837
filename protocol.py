"""What a protocol is, Settings and Recipe, and the pieces that those of several models are made of.

recipes.py has the protocols themselves.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from types import MethodType

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data import Dataset, Items, loader
from engine.feature_cache import Rows, fingerprint, keep
from engine.lora import add_lora, is_lora
from imaging.augment import MIRRORS, Augment, mirror_prompt, sided, view
from imaging.layouts import is_prompt_type
from losses import dice_bce


@dataclass(frozen=True)
class Settings:
    """Every number of a protocol."""

    weights: dict[str, str]  # variant -> hub id that training starts from
    config: dict = field(default_factory=dict)  # what the protocol sets of the model's Config
    decoder: str | None = None  # BiomedCLIPSeg: hub id of the CLIPSeg whose decoder it starts from
    prompt: str = "p6"  # prompt type
    negatives: float = 0.0  # share of training samples with another image's prompt, an empty mask
    train: str = "all"  # all | decoder | adapters | lora: see `choose_trained`
    lora_rank: int = 8
    adapter_dim: int = 64
    keep_features: bool | None = None  # of a frozen encoder, on files; None: wherever it is frozen
    feature_dtype: str = "float16"
    views: tuple[str, ...] = ("original",)  # of an image (imaging/augment.py), the augmentation then
    augment: Augment | dict | None = None  # None: the model's own preprocessing
    crops_per_volume: int | None = None  # random windows that a volume gives in a training step
    crop_ratio: tuple[float, ...] | None = None  # of those around background and foreground, or
    # around each class
    codes: str | None = None  # what stands for a class of the Universal Model
    text_codes: str | None = None  # file of them, see `read_codes` of recipes.py
    overlap: float | None = None  # share of a side that neighbouring windows have in common
    window_batch: int | None = None  # windows at a time
    eval_every: int = 1  # epochs between validations
    pseudocolor: str | None = None  # colours of a map for grey levels: see data.py
    sam_prompts: str | None = None  # SAM: boxes | points | both | image, see imaging/boxes_and_points.py
    jitter: int | None = None  # largest move of a box's side in training, in pixels of the image
    min_area: int | None = None  # pixels that a component needs to be asked for
    prompts_per_image: int | None = None  # in training, by lot; 0: all
    ask_background: bool = False  # background is asked for in training, too
    topology: str | None = None  # SAM: none | persistence | cldice | oct, beside the other losses
    topology_weight: float | None = None
    full_size: bool = False  # SAM's loss is taken at the image's own size, else at the logits'
    loss: Callable = None  # (output, batch) -> scalar, parts
    optimizer: str = "adamw"  # adam | adamw
    amsgrad: bool = False
    lr: float = 1e-4
    backbone_lr: float = 1e-5  # of the pretrained towers,
    backbone: Callable = None  # which are the parameters for whose name this is true
    weight_decay: float = 1e-2
    decay_all: bool = False  # also of biases and norms
    batch_size: int = 16
    epochs: int = 50
    schedule: str = "cosine"  # cosine | poly | constant | multistep | plateau
    warmup: float = 0.05  # share of all steps in which the rate rises from 0
    milestones: tuple[float, ...] = ()  # shares of all steps at which `multistep` divides by ten
    clip_grad: float | None = 1.0  # largest norm of all gradients together
    dtype: str = "bfloat16"  # of the forward pass on a GPU in training; evaluation is float32
    patience: int | None = None  # epochs without a better validation Dice before training stops
    min_epochs: int = 0
    min_delta: float = 0.0  # what counts as better


def lr_factor(step: int, total: int, settings: Settings) -> float:
    """What every learning rate is multiplied by at this step of `total`."""
    warm = round(settings.warmup * total)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, total - warm)  # 0..1
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "poly":
        return (1 - done) ** 0.9
    if settings.schedule == "multistep":
        return 0.1 ** sum(step >= round(share * total) for share in settings.milestones)
    return 1.0


@dataclass(frozen=True)
class Recipe:
    """What the loop needs of a model; see the top of recipes.py."""

    inputs: Callable
    forward: Callable
    loss: Callable
    predict: Callable
    groups: Callable
    look: Callable | None = None  # sample -> what `inputs` makes of its image, or kept features
    read: Callable | None = None  # prompt -> the tensors that `inputs` makes of it, of text models
    tokenizer: Callable | None = None  # of text models: texts -> ids (B,T)
    collate: Callable | None = None  # items -> a training batch; None: their tensors stacked
    ask: Callable | None = None  # (sample, source) -> SAM's prompts of a sample, see `sam_prompts`
    each: Callable | None = None  # (model, item, output) -> probabilities (Q,H,W) of each prompt
    prepare: Callable | None = None  # (volumes, cache) -> the same, on the grid that the model sees
    files: dict[str, Path] = field(default_factory=dict)  # name -> what a run folder gets a copy of


# --- images, and what is asked of them in words ---------------------------------------------------


def pixels(sample, config, preprocess) -> dict:
    """image (3,S,S) float32."""
    return {"image": preprocess(Image.fromarray(sample["image"].permute(1, 2, 0).numpy()), config)}


def tokens(prompt: str, tokenizer) -> dict:
    """tokens (T,) int64."""
    return {"tokens": tokenizer(prompt)[0]}


def one_view(sample, views, rng) -> dict:
    """One of the views of a sample, by lot."""
    return view(sample, views[rng.integers(len(views))]) if len(views) > 1 else sample


def for_scores(sample) -> dict:
    """What scoring needs of a sample: truth (1,H,W) int64 if there is one, size, whose it is."""
    item = {key: sample[key] for key in ("name", "prompt", "size", "group", "dataset")}
    return item | ({"truth": sample["mask"][None]} if "mask" in sample else {})


def image_inputs(sample, train, rng, config, look, read, augment, views, preprocess_mask) -> dict:
    """What `look` makes of the image and `read` of the prompt; mask (1,S,S) float32 of 0 and 1, or
    of class numbers (255: does not count).

    In evaluation also that of `for_scores`; a sample without a mask gives an item without one.
    """
    classes = sample["classes"]
    if train:
        views = [v for v in views if v not in MIRRORS or not sided(classes, MIRRORS[v])]
        sample = one_view(sample, views, rng)
    prompt, mask = sample["prompt"], sample.get("mask")
    if train and augment is not None:
        how = prompt, config.image_size, rng, classes
        image, mask, prompt = augment(sample["image"], mask, *how)
        mean, std = (torch.tensor(x)[:, None, None] for x in (config.mean, config.std))  # (3,1,1)
        item = {"image": (image / 255 - mean) / std, "mask": mask[None].float()}  # (3,S,S), (1,S,S)
    else:
        item = look(sample)
        if mask is not None:
            item["mask"] = preprocess_mask(mask, config)
    item |= read(prompt) if read else {}
    return item if train else item | for_scores(sample)


def prompted_forward(model: nn.Module, batch: dict) -> Tensor:
    """Logits (B,1,h,w) of a batch: of pixels or kept features, of tokens or kept embeddings."""
    if "features" not in batch:
        return model(batch["image"], batch["tokens"])
    condition = batch.get("condition")
    if condition is None:
        condition = model.encode_text(batch["tokens"])
    return model.decode(batch["features"].float(), condition=condition.float())


def image_predict(model: nn.Module, item: dict, forward: Callable) -> tuple[Tensor, Tensor]:
    """Probabilities (K,H,W) at the image's own size, and the logits (1,K,h,w)."""
    device = next(model.parameters()).device
    names = ("image", "features", "tokens", "condition")
    batch = {name: item[name][None].to(device) for name in names if name in item}
    logits = forward(model, batch)
    return model.postprocess(logits[0], item["size"]), logits


def at_mask_size(logits: Tensor, batch: dict) -> Tensor:
    """Logits brought bilinearly to the size of the target."""
    size = batch["mask"].shape[-2:]
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def dice_bce_at_mask_size(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    return dice_bce(at_mask_size(logits, batch), batch["mask"])


def texts_per_batch(dataset: Dataset, kind: str, batch_size: int) -> float:
    """Return the mean number of prompts in a training batch that differ to the model.

    Prompts are compared by `Dataset.prompt_key`.
    """
    share = {}  # key of a prompt -> its share of all draws
    for entry in dataset.entries:
        kinds = entry.types(kind) if is_prompt_type(kind) else [kind]
        for k in kinds:
            texts = entry.prompts.get(k, [kind])  # a literal text stands for itself
            for text in texts:
                key = dataset.prompt_key(text)
                share[key] = share.get(key, 0) + 1 / (len(dataset) * len(kinds) * len(texts))
    return sum(1 - (1 - p) ** batch_size for p in share.values())


def parameter_groups(model: nn.Module, settings: Settings) -> list[dict]:
    """Up to four groups: backbone or not, decayed or not (biases and norms, unless `decay_all`)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decayed = settings.decay_all or p.ndim > 1
            backbone = settings.backbone(name) and not is_lora(name)  # updates are new parts
            groups.setdefault((backbone, decayed), []).append(p)
    return [
        {
            "params": params,
            "lr": settings.backbone_lr if backbone else settings.lr,
            "weight_decay": settings.weight_decay if decayed else 0.0,
        }
        for (backbone, decayed), params in groups.items()
    ]


def image_recipe(file, model, settings: Settings, forward: Callable, read=None) -> Recipe:
    """For the model of `file`, which has preprocess and preprocess_mask."""
    look = partial(pixels, config=model.config, preprocess=file.preprocess)
    inputs = partial(
        image_inputs,
        config=model.config,
        look=look,
        read=read,
        augment=settings.augment,
        views=settings.views,
        preprocess_mask=file.preprocess_mask,
    )
    predict = partial(image_predict, forward=forward)
    return Recipe(inputs, forward, settings.loss, predict, parameter_groups, look, read)


def prompted_recipe(file, model: nn.Module, settings: Settings, tokenizer) -> Recipe:
    read = partial(tokens, tokenizer=tokenizer)
    recipe = image_recipe(file, model, settings, prompted_forward, read)
    return replace(recipe, tokenizer=tokenizer)


def cut_texts(texts, tokenizer) -> list[str]:
    """Return the texts that have more tokens than the model takes, and so lose their end."""
    return [text for text in texts if tokenizer.count(text) > tokenizer.length]


def describe_cuts(texts, tokenizer) -> str:
    """Return a phrase about the texts that the model cuts, with the longest one as an example.

    Returns "" if there are none, or if the model has no tokenizer.
    """
    cut = cut_texts(texts, tokenizer) if tokenizer else []
    if not cut:
        return ""

    example = max(sorted(cut), key=tokenizer.count)
    tokens_of_example = tokenizer.count(example)
    words = example.split()
    while words and tokenizer.count(" ".join(words)) > tokenizer.length:
        words.pop()
    return (
        f"{len(cut)} of {len(texts)} texts are cut at the model's {tokenizer.length} tokens; "
        f"“{shorten(example, 60, placeholder=' …')}” has {tokens_of_example} and ends after "
        f"“{' '.join(words[-3:])}”"
    )


def hub_id(settings: Settings, variant: str) -> str:
    """Where training of a variant starts. ValueError if it has no pretrained weights."""
    if variant not in settings.weights:
        message = "has no pretrained weights; pass --weights none or a file"
        raise ValueError(f"--variant {variant} {message}")
    return settings.weights[variant]


# --- batch norms of a single value ---------------------------------------------------------------


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """Return batch norm's forward of x (B,C) or (B,C,H,W) -> the same shape.

    A single value a channel is normalised by the running statistics, which stay as they are: it has
    no variance, and its own mean would leave nothing of it.
    """
    if norm.training and x.numel() == x.shape[1]:
        weights = norm.running_mean, norm.running_var, norm.weight, norm.bias
        return F.batch_norm(x, *weights, training=False, eps=norm.eps)
    return type(norm).forward(norm, x)


def allow_single_values(model: nn.Module) -> None:
    """Let a model with batch norm learn from batches of one image.

    The pooled branches of UPerNet and BEiT, and the last maps of CRIS and DPT for small images,
    have a single value an image and channel, which torch refuses in training. All other batches are
    normalised as ever.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.forward = MethodType(normalise, module)


# --- kept features of frozen towers ---------------------------------------------------------------


@dataclass
class Kept:
    """What frozen towers gave for images and texts, in files of engine/feature_cache.py."""

    images: dict[tuple[Path, str], tuple[Rows, int]]  # image file and view -> where
    texts: dict[str, tuple[Rows, int]]

    def look(self, sample) -> dict:
        rows, i = self.images[sample["file"], sample.get("view", "original")]
        return {"features": rows[i]}

    def read(self, prompt: str) -> dict:
        rows, i = self.texts[prompt]
        return {"condition": rows[i]}


def look_at_view(sample, train, rng, look, name) -> dict:
    """What `look` makes of one view of an image, whatever is asked of it."""
    return look(view(sample | {"prompt": ""}, name))


def texts_of(sets: list[Dataset], kind: str, views) -> list[str]:
    """Every text that the loop may ask for."""
    texts = {text for dataset in sets for entry in dataset.entries for text in entry.texts(kind)}
    for name in MIRRORS.keys() & set(views):
        texts |= {mirror_prompt(text, MIRRORS[name]) for text in texts} - {None}
    return sorted(texts)


def image_features(model, dataset: Dataset, views, look, rows: Callable, options) -> dict:
    """Image file and name of a view -> where the features are, of every image and view."""
    first = {entry.image: i for i, entry in reversed(list(enumerate(dataset.entries)))}
    order, device, places = sorted(first.values()), next(model.parameters()).device, {}
    pixels = [hashlib.sha256(dataset.pixels(i)[0].tobytes()).hexdigest() for i in order]
    for name in views:
        inputs = partial(look_at_view, look=look, name=name)
        items = Items(dataset, options.prompt, inputs, train=False, seed=0)

        def encode(start, items=items):
            for item in loader(items, [[(0, i)] for i in order[start:]], options.workers, device):
                yield model.encode_image(item["image"][None].to(device))[0]

        content = [dataset.colours, *pixels]
        found = rows(f"image features, {name}", len(order), content, encode)
        places |= {(dataset.entries[i].image, name): (found, row) for row, i in enumerate(order)}
    return places


def keep_features(recipe: Recipe, model, frozen: Callable, sets: list[Dataset], options) -> Recipe:
    """The recipe of a model with `encode_image` on kept features; computes what no file holds yet,
    of the first of `sets`, which trains, for all views. frozen: tells by name which weights make
    them."""
    weights = {name: t for name, t in model.state_dict().items() if frozen(name)}
    made_by = fingerprint(weights, replace(model.config, threshold=0.5))  # which comes after them

    @torch.no_grad()
    def rows(what: str, n: int, content: list, compute: Callable) -> Rows:
        key = fingerprint({}, made_by, what, content, options.feature_dtype)
        path = Path(options.cache) / f"{key}.npy"
        keep(path, n, compute, f"{n} {what}", options.feature_dtype)
        return Rows(path)

    kept = Kept({}, {})
    model.eval()
    for dataset in sets:
        views = options.views if dataset is sets[0] else ["original"]
        kept.images |= image_features(model, dataset, views, recipe.look, rows, options)
    if recipe.read is None:
        return replace(recipe, inputs=partial(recipe.inputs, look=kept.look))
    texts, device = texts_of(sets, options.prompt, options.views), next(model.parameters()).device

    def embeddings(start):
        for text in texts[start:]:
            yield model.encode_text(recipe.read(text)["tokens"][None].to(device))[0]

    found = rows("text embeddings", len(texts), texts, embeddings)
    kept.texts |= {text: (found, i) for i, text in enumerate(texts)}
    return replace(recipe, inputs=partial(recipe.inputs, look=kept.look, read=kept.read))


def choose_trained(model: nn.Module, family, settings: Settings) -> None:
    """Freezes what `settings.train` leaves as it is; family: the model's in recipes.FAMILIES.

    all: nothing is frozen; decoder: the towers are; lora: the towers are, with a low-rank update of
    `lora_rank` on their linear layers (engine/lora.py; see `Family.lora`), which is trained with the
    decoder; adapters: everything but the adapters of `adapter_dim` in both towers.
    """
    adapters = [name for name, _ in model.named_parameters() if "adapter" in name]
    if settings.train == "adapters" and not adapters:
        raise ValueError(f"--train adapters: {type(model).__name__} has no place for them")
    for name, parameter in model.named_parameters():
        frozen = {"decoder": family.backbone(name), "adapters": name not in adapters}
        if frozen.get(settings.train):
            parameter.requires_grad_(False)
    if settings.train == "lora":
        add_lora(model, settings.lora_rank, family.backbone, **family.lora)
