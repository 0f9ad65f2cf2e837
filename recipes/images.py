"""What the recipes of images share: inputs, forward pass, prediction, and prompts in words."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from textwrap import shorten
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data import Dataset
from engine.runs import DataSets
from imaging.augment import MIRRORS, sided, view
from imaging.layouts import is_prompt_type
from losses import dice_bce, dice_loss
from recipes.base import (
    IMAGE_OPTIONS,
    STUDY_OPTIONS,
    TEXT_OPTIONS,
    Family,
    Protocol,
    Recipe,
    Settings,
    parameter_groups,
)
from tokenizer import CLIPTokenizer

# --- inputs, forward pass, prediction -------------------------------------------------------------


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


def image_recipe(file, model, settings: Protocol, forward: Callable, read=None) -> Recipe:
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


def prompted_recipe(file, model: nn.Module, settings: Protocol, tokenizer) -> Recipe:
    """Return the recipe of the model of `file`, which reads a text."""
    read = partial(tokens, tokenizer=tokenizer)
    recipe = image_recipe(file, model, settings, prompted_forward, read)
    return replace(
        recipe,
        tokenizer=tokenizer,
        caption=quoted_prompt,
        sources=common_prompt_types,
        ask_each=ask_every_type,
        encode=encode_image,
    )


def quoted_prompt(item: dict) -> str:
    """Return the prompt of an item as a caption."""
    return f"“{item['prompt']}”" if item["prompt"] else "no text"


def common_prompt_types(dataset: Dataset, settings) -> list[str]:
    """Return the types of prompts that all entries of a data set have."""
    entries = dataset.entries
    return [kind for kind in entries[0].prompts if all(kind in e.prompts for e in entries)]


def ask_every_type(recipe: Recipe, dataset: Dataset, i: int, kinds: list[str]) -> dict[str, dict]:
    """Return {type of prompt: item} of entry i."""
    entry = dataset.entries[i]
    item = recipe.inputs(dataset.sample(i, kinds[0]), train=False, rng=None)
    items = {}
    for kind in kinds:
        text = entry.text(kind)
        items[kind] = item | recipe.read(text) | {"prompt": text}
    return items


def encode_image(model: nn.Module, item: dict) -> dict:
    """Return the features of an item's image, for models that encode images apart from texts."""
    if not hasattr(model, "encode_image"):
        return {}
    device = next(model.parameters()).device
    return {"features": model.encode_image(item["image"][None].to(device))[0]}


@dataclass(frozen=True)
class PromptedFamily(Family):
    """A model that reads a text and finds in an image what it asks for."""

    tokenizer: Callable | None = None  # (Config) -> tokenizer
    text_config: dict = field(default_factory=dict)  # Config fields that training starts with

    options: ClassVar[tuple] = (IMAGE_OPTIONS, TEXT_OPTIONS, STUDY_OPTIONS)

    def tokenizers(self) -> dict[str, Callable]:
        """Return {names of recipes: tokenizer} for each text length at which training starts.

        Needs no weights, but BiomedCLIPSeg needs its vocabulary.
        """
        variant = next(iter(self.variants.values()))
        configs = {}
        recipes = {}
        for name, protocol in self.protocols.items():
            config = replace(variant, **self.text_config | protocol.config)
            configs.setdefault(config.text_length, config)
            recipes.setdefault(config.text_length, []).append(name)
        return {", ".join(recipes[n]): self.tokenizer(config) for n, config in configs.items()}

    def check_options(self, options) -> None:
        super().check_options(options)
        if options.prompt_study and options.score_size == "network":
            message = "--prompt-study scores at the image's size, drop it"
            raise ValueError(f"--score-size network: {message}")

    def make_ready(
        self, model: nn.Module, recipe: Recipe, data_sets: DataSets, settings: Settings
    ) -> Recipe:
        """Hand the tokenizer to the data sets, which compare prompts by it; say what is cut.

        Raises ValueError if --negatives cannot find a prompt of another image that differs.
        """
        texts = set()
        for dataset in data_sets.all:
            dataset.compare_prompts_by(recipe.tokenizer)
            for entry in dataset.entries:
                kinds = entry.prompts if settings.prompt_study else [settings.prompt]
                for kind in kinds:
                    texts.update(entry.texts(kind))

        cuts = describe_cuts(texts, recipe.tokenizer)
        if cuts:
            is_study = settings.prompt_study
            title = "prompts of all types" if is_study else f"prompt {settings.prompt}"
            print(f"{title}: {cuts}")
        if settings.negatives and not settings.eval:
            data_sets.parts["train"].check_negatives(settings.prompt)
        return recipe

    def reads_text(self) -> bool:
        return True


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


# --- the medvlsm study, whose protocols CRIS and both CLIPSegs have -------------------------------


def medvlsm_dice(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """What the study's loss computed.

    quirk: it asked for Dice + 0.2 cross entropy (monai 1.1.0 DiceCELoss on sigmoid outputs), but
    the log softmax over a single channel is 0, so that only soft Dice with smooth 1e-5 remained.
    """
    logits = F.interpolate(
        logits.float(), batch["mask"].shape[-2:], mode="bicubic", align_corners=True
    )
    keep = (batch["mask"] != 255).to(logits.dtype)  # the study's masks have no 255
    loss = dice_loss(logits.sigmoid(), batch["mask"], smooth=1e-5, keep=keep).mean()
    return loss, {"dice_loss": loss}


# What medvlsm's recipes have in common.
MEDVLSM = dict(
    loss=medvlsm_dice,
    weight_decay=1e-3,
    decay_all=True,
    epochs=1000,
    schedule="plateau",
    warmup=0.0,
    clip_grad=0.5,
    dtype="float16",
    patience=20,
    min_epochs=10,
    min_delta=1e-4,
)


def clip_tokenizer(config) -> CLIPTokenizer:
    """Return the tokenizer of a model with a CLIP text tower."""
    return CLIPTokenizer(config.text_length, config.pad_token)
