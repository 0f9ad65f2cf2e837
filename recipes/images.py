"""Helpers of the recipes for images: inputs, forward pass, prediction, and prompts in words."""

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
from imaging.augment import MIRRORS, names_a_side, view
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


def preprocessed_image(sample, config, preprocess) -> dict:
    """Return {"image": (3,S,S) float32}, a sample's image preprocessed for the model."""
    image = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
    return {"image": preprocess(image, config)}


def prompt_tokens(prompt: str, tokenizer) -> dict:
    """Return {"tokens": (T,) int64}, the token ids of a prompt."""
    return {"tokens": tokenizer(prompt)[0]}


def random_view(sample, views, rng) -> dict:
    """Return a random view of a sample."""
    if len(views) <= 1:
        return sample
    name = views[rng.integers(len(views))]
    return view(sample, name)


def scoring_fields(sample) -> dict:
    """Return what scoring needs of a sample, including "truth" (1,H,W) int64 if it has a mask."""
    keys = ("name", "prompt", "size", "group", "dataset")
    item = {key: sample[key] for key in keys}
    if "mask" in sample:
        item["truth"] = sample["mask"][None]  # (1,H,W)
    return item


def image_inputs(
    sample, train, rng, config, load_image, tokenize, augment, views, preprocess_mask
) -> dict:
    """Return the item of a sample: inputs of the model, target and what scoring needs.

    It contains the results of `load_image` for the image and of `tokenize` for the prompt, and, if
    the sample has a mask, "mask" (1,S,S) float32: 0 and 1, or class indices; 255 is ignored. In
    evaluation it also contains the result of `scoring_fields`.
    """
    if train:
        sample = random_view(sample, views_of_classes(views, sample["classes"]), rng)

    if train and augment is not None:
        item, prompt = augmented_inputs(sample, rng, config, augment)
    else:
        item = load_image(sample)
        prompt = sample["prompt"]
        if sample.get("mask") is not None:
            item["mask"] = preprocess_mask(sample["mask"], config)  # (1,S,S)

    if tokenize:
        item |= tokenize(prompt)
    if not train:
        item |= scoring_fields(sample)
    return item


def views_of_classes(views, classes) -> list[str]:
    """Return the views that do not mirror a class such as "left lung" to the wrong side."""
    allowed = []
    for name in views:
        if name not in MIRRORS or not names_a_side(classes, MIRRORS[name]):
            allowed.append(name)
    return allowed


def augmented_inputs(sample, rng, config, augment) -> tuple[dict, str]:
    """Return {"image": (3,S,S), "mask": (1,S,S)}, float32, and the prompt, augmented together."""
    image, mask, prompt = augment(
        sample["image"],
        sample.get("mask"),
        sample["prompt"],
        config.image_size,
        rng,
        sample["classes"],
    )

    mean = torch.tensor(config.mean)[:, None, None]  # (3,1,1)
    std = torch.tensor(config.std)[:, None, None]  # (3,1,1)
    image = (image / 255 - mean) / std  # (3,S,S)
    return {"image": image, "mask": mask[None].float()}, prompt


def prompted_forward(model: nn.Module, batch: dict) -> Tensor:
    """Return the logits (B,1,h,w) of a batch.

    The batch holds either images and tokens, or cached features of images with tokens or cached
    embeddings of texts.
    """
    if "features" not in batch:
        return model(batch["image"], batch["tokens"])

    condition = batch.get("condition")
    if condition is None:
        condition = model.encode_text(batch["tokens"])
    return model.decode(batch["features"].float(), condition=condition.float())


def image_predict(model: nn.Module, item: dict, forward: Callable) -> tuple[Tensor, Tensor]:
    """Return probabilities (K,H,W) at the image's own size, and the logits (1,K,h,w)."""
    device = next(model.parameters()).device
    batch = {}
    for name in ("image", "features", "tokens", "condition"):
        if name in item:
            batch[name] = item[name][None].to(device)

    logits = forward(model, batch)  # (1,K,h,w)
    return model.postprocess(logits[0], item["size"]), logits


def at_mask_size(logits: Tensor, batch: dict) -> Tensor:
    """Resize logits (B,K,h,w) bilinearly to the size of the target -> (B,K,S,S) float32."""
    size = batch["mask"].shape[-2:]
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)


def dice_bce_at_mask_size(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """Return Dice + BCE of the logits at the size of the target, and both as {name: part}."""
    return dice_bce(at_mask_size(logits, batch), batch["mask"])


def texts_per_batch(dataset: Dataset, kind: str, batch_size: int) -> float:
    """Return the expected number of distinct prompts in a training batch.

    Prompts are compared by `Dataset.prompt_key`. kind: prompt types, or a literal text.
    """
    probabilities = {}  # key of a prompt -> probability that a training sample has it
    for entry in dataset.entries:
        types = entry.types(kind) if is_prompt_type(kind) else [kind]
        for prompt_type in types:
            texts = entry.prompts.get(prompt_type, [kind])  # a literal text stands for itself
            for text in texts:
                key = dataset.prompt_key(text)
                probability = 1 / (len(dataset) * len(types) * len(texts))
                probabilities[key] = probabilities.get(key, 0) + probability
    return sum(1 - (1 - p) ** batch_size for p in probabilities.values())


def image_recipe(file, model, settings: Protocol, forward: Callable, tokenize=None) -> Recipe:
    """Return the recipe of a model for images.

    file: the model's module, with `preprocess` and `preprocess_mask`. forward: (model, batch) ->
    logits. read: (prompt) -> {name: tensor}, for models that read texts.
    """
    load_image = partial(preprocessed_image, config=model.config, preprocess=file.preprocess)
    inputs = partial(
        image_inputs,
        config=model.config,
        load_image=load_image,
        tokenize=tokenize,
        augment=settings.augment,
        views=settings.views,
        preprocess_mask=file.preprocess_mask,
    )

    return Recipe(
        inputs=inputs,
        forward=forward,
        loss=settings.loss,
        predict=partial(image_predict, forward=forward),
        groups=parameter_groups,
        load_image=load_image,
        tokenize=tokenize,
    )


def prompted_recipe(file, model: nn.Module, settings: Protocol, tokenizer) -> Recipe:
    """Return the recipe of a model that segments images by texts. file: the model's module."""
    tokenize = partial(prompt_tokens, tokenizer=tokenizer)
    recipe = image_recipe(file, model, settings, prompted_forward, tokenize)
    return replace(
        recipe,
        tokenizer=tokenizer,
        caption=quoted_prompt,
        sources=common_prompt_types,
        items_by_source=items_of_types,
        encode=encode_image,
    )


def quoted_prompt(item: dict) -> str:
    """Return the prompt of an item, in quotes, as the caption of a picture."""
    if not item["prompt"]:
        return "no text"
    return f"“{item['prompt']}”"


def common_prompt_types(dataset: Dataset, settings) -> list[str]:
    """Return the prompt types that all entries of a data set have."""
    common = list(dataset.entries[0].prompts)
    for entry in dataset.entries:
        common = [kind for kind in common if kind in entry.prompts]
    return common


def check_training_types(dataset: Dataset, prompt: str) -> None:
    """Raise ValueError, one line, if an entry lacks one of the prompt types to train with."""
    if not is_prompt_type(prompt):
        return
    for entry in dataset.entries:
        for kind in entry.types(prompt):
            if not entry.prompts.get(kind):
                available = ", ".join(entry.prompts) or "none"
                raise ValueError(
                    f"{entry.root.name}, {entry.name}: no prompt of type {kind} to train with, "
                    f"only {available}; types that only the test split has are for --eval"
                )


def items_of_types(recipe: Recipe, dataset: Dataset, i: int, kinds: list[str]) -> dict[str, dict]:
    """Return {prompt type: item} of entry i. The image is loaded once."""
    entry = dataset.entries[i]
    item = recipe.inputs(dataset.sample(i, kinds[0]), train=False, rng=None)

    items = {}
    for kind in kinds:
        text = entry.text(kind)
        items[kind] = item | recipe.tokenize(text) | {"prompt": text}
    return items


def encode_image(model: nn.Module, item: dict) -> dict:
    """Return {"features": those of an item's image}, or {} for models without `encode_image`."""
    if not hasattr(model, "encode_image"):
        return {}
    device = next(model.parameters()).device
    image = item["image"][None].to(device)  # (1,3,S,S)
    return {"features": model.encode_image(image)[0]}


@dataclass(frozen=True)
class PromptedFamily(Family):
    """A model that segments what a text names in an image."""

    tokenizer: Callable | None = None  # (Config) -> tokenizer
    # Fields of Config about texts that training sets where a protocol does not.
    text_config: dict = field(default_factory=dict)

    options: ClassVar[tuple] = (IMAGE_OPTIONS, TEXT_OPTIONS, STUDY_OPTIONS)

    def tokenizers(self) -> dict[str, Callable]:
        """Return {names of recipes: tokenizer} for each text length in the recipes.

        Weights are not needed, except for the vocabulary of BiomedCLIPSeg.
        """
        variant = next(iter(self.variants.values()))
        configs = {}  # text length -> Config
        recipes = {}  # text length -> names of recipes
        for name, protocol in self.protocols.items():
            config = replace(variant, **self.text_config | protocol.config)
            configs.setdefault(config.text_length, config)
            recipes.setdefault(config.text_length, []).append(name)

        tokenizers = {}
        for length, config in configs.items():
            tokenizers[", ".join(recipes[length])] = self.tokenizer(config)
        return tokenizers

    def check_options(self, options) -> None:
        """Raise ValueError, one line, for values of options that this model does not support."""
        super().check_options(options)
        if options.prompt_study and options.score_size == "network":
            raise ValueError(
                "--score-size network: --prompt-study scores at the image's size; remove it"
            )

    def make_ready(
        self, model: nn.Module, recipe: Recipe, data_sets: DataSets, settings: Settings
    ) -> Recipe:
        """Let the data sets compare prompts by their tokens, and print which prompts are cut.

        Raise ValueError if an entry of the training split lacks a prompt type, or if --negatives
        finds no other image's prompt that differs to the model.
        """
        if not settings.eval:
            check_training_types(data_sets.parts["train"], settings.prompt)

        texts = set()
        for dataset in data_sets.all:
            dataset.compare_prompts_by(recipe.tokenizer)
            for entry in dataset.entries:
                kinds = entry.prompts if settings.prompt_study else [settings.prompt]
                for kind in kinds:
                    texts.update(entry.texts(kind))

        cuts = describe_cuts(texts, recipe.tokenizer)
        if cuts:
            title = f"prompt {settings.prompt}"
            if settings.prompt_study:
                title = "prompts of all types"
            print(f"{title}: {cuts}")

        if settings.negatives and not settings.eval:
            data_sets.parts["train"].check_negatives(settings.prompt)
        return recipe

    def reads_text(self) -> bool:
        """Return True: every image of a prediction needs a text."""
        return True


def cut_texts(texts, tokenizer) -> list[str]:
    """Return the texts that are too long for the model, so that their end is cut off."""
    return [text for text in texts if tokenizer.count(text) > tokenizer.length]


def describe_cuts(texts, tokenizer) -> str:
    """Return a phrase about the texts that the model cuts, with the longest one as an example.

    The phrase is "" if no text is cut or if there is no tokenizer.
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


# --- the medvlsm study: common parts of the recipe "origin" of CRIS and both CLIPSegs -------------


def medvlsm_dice(logits: Tensor, batch: dict) -> tuple[Tensor, dict]:
    """Return the loss that the study's code computed, and {name: part of it}.

    quirk: the study chose Dice + 0.2 cross entropy (monai 1.1.0, DiceCELoss on sigmoid outputs),
    but the log softmax over a single channel is 0: only soft Dice with smooth 1e-5 remained.
    """
    size = batch["mask"].shape[-2:]
    logits = logits.float()
    logits = F.interpolate(logits, size, mode="bicubic", align_corners=True)  # (B,1,S,S)

    is_annotated = batch["mask"] != 255  # everywhere in the study
    keep = is_annotated.to(logits.dtype)
    loss = dice_loss(logits.sigmoid(), batch["mask"], smooth=1e-5, keep=keep).mean()
    return loss, {"dice_loss": loss}


# Fields of Protocol that all of medvlsm's recipes share.
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
