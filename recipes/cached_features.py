"""Cached features: run frozen towers once on all images and texts, and train on their outputs."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data import Dataset, Items, make_loader
from engine.feature_cache import CachedRows, cache_rows, fingerprint
from imaging.augment import MIRRORS, mirror_prompt, view
from recipes.base import Recipe


@dataclass
class CachedFeatures:
    """Features of images and embeddings of texts, in files of engine/feature_cache.py."""

    images: dict[
        tuple[Path, str], tuple[CachedRows, int]
    ]  # (image file, view) -> file and row in it
    texts: dict[str, tuple[CachedRows, int]]  # text -> file and row in it

    def load_image(self, sample: dict) -> dict:
        """Return {"features": those of a sample's image} instead of its pixels."""
        rows, i = self.images[sample["file"], sample.get("view", "original")]
        return {"features": rows[i]}

    def load_text(self, prompt: str) -> dict:
        """Return {"condition": the embedding of a text} instead of its tokens."""
        rows, i = self.texts[prompt]
        return {"condition": rows[i]}


class FeatureEncoder:
    """Run the frozen towers of a model on the images and texts that are not cached yet.

    model: has `encode_image` and, if it reads texts, `encode_text`. frozen: (name of a tensor) ->
    True if it belongs to the towers. options: settings of a run.
    """

    def __init__(self, model: nn.Module, frozen: Callable[[str], bool], options):
        towers = {name: tensor for name, tensor in model.state_dict().items() if frozen(name)}
        config = replace(model.config, threshold=0.5)  # no feature depends on the threshold
        self.model = model
        self.options = options
        self.device = next(model.parameters()).device
        self.model_key = fingerprint(towers, config)

    @torch.no_grad()
    def rows(self, title: str, count: int, content: list, compute: Callable) -> CachedRows:
        """Return the rows of a cache file, computing those that are missing.

        title: describes the rows. content: everything that they depend on except the model and the
        title. compute: (first row) -> iterator over the rows from there on.
        """
        dtype = self.options.feature_dtype
        key = fingerprint({}, self.model_key, title, content, dtype)
        path = Path(self.options.cache) / f"{key}.npy"
        cache_rows(path, count, compute, f"{count} {title}", dtype)
        return CachedRows(path)

    def encode_images(self, dataset: Dataset, views: list[str], load_image: Callable) -> dict:
        """Return {(image file, view): (file, row)} for each image of a data set and each view."""
        indices = first_entries(dataset)
        content = [dataset.colours]
        for i in indices:
            pixels, _ = dataset.pixels(i)
            content.append(hashlib.sha256(pixels.tobytes()).hexdigest())

        locations = {}
        for name in views:
            inputs = partial(image_of_view, load_image=load_image, name=name)
            items = Items(dataset, self.options.prompt, inputs, train=False, seed=0)
            compute = partial(self.image_features, items, indices)
            file = self.rows(f"image features, {name}", len(indices), content, compute)
            for row, i in enumerate(indices):
                locations[dataset.entries[i].image, name] = (file, row)
        return locations

    def image_features(self, items: Items, indices: list[int], start: int) -> Iterator[Tensor]:
        """Yield the features of the images of these entries, from index `start` on."""
        batches = [[(0, i)] for i in indices[start:]]  # one image each: (epoch 0, entry i)
        for item in make_loader(items, batches, self.options.workers, self.device):
            image = item["image"][None].to(self.device)  # (1,3,S,S)
            yield self.model.encode_image(image)[0]

    def encode_texts(self, texts: list[str], tokenize: Callable) -> dict:
        """Return {text: (file, row)}. tokenize: (text) -> {"tokens": (T,)}."""
        compute = partial(self.text_embeddings, texts, tokenize)
        file = self.rows("text embeddings", len(texts), texts, compute)
        return {text: (file, row) for row, text in enumerate(texts)}

    def text_embeddings(self, texts: list[str], tokenize: Callable, start: int) -> Iterator[Tensor]:
        """Yield the embeddings (embed_dim,) of texts, from index `start` on."""
        for text in texts[start:]:
            tokens = tokenize(text)["tokens"][None].to(self.device)  # (1,T)
            yield self.model.encode_text(tokens)[0]


def first_entries(dataset: Dataset) -> list[int]:
    """Return the index of the first entry of each image file, in ascending order."""
    images = set()
    indices = []
    for i, entry in enumerate(dataset.entries):
        if entry.image not in images:
            images.add(entry.image)
            indices.append(i)
    return indices


def image_of_view(sample: dict, train: bool, rng, load_image: Callable, name: str) -> dict:
    """Return the inputs that `load_image` makes of one view of a sample's image.

    The prompt is emptied, because `view` does not mirror a sample if its prompt cannot be mirrored.
    """
    return load_image(view(sample | {"prompt": ""}, name))


def texts_of(sets: list[Dataset], kind: str, views: list[str]) -> list[str]:
    """Return all texts of a prompt type, sorted, with their mirrored forms if a view mirrors."""
    texts = set()
    for dataset in sets:
        for entry in dataset.entries:
            texts.update(entry.texts(kind))

    for name, axis in MIRRORS.items():
        if name in views:
            mirrored = {mirror_prompt(text, axis) for text in texts}
            texts |= mirrored - {None}
    return sorted(texts)


def cache_features(recipe: Recipe, model, frozen: Callable, sets: list[Dataset], options) -> Recipe:
    """Return a recipe with cached features instead of images and texts; compute missing ones.

    model: has `encode_image` and, if it reads texts, `encode_text`. frozen: (name of a tensor) ->
    True if it belongs to the frozen towers. sets: the first is the training set, whose images are
    encoded in all of `options.views`; those of the others only in the original view.
    """
    model.eval()
    encoder = FeatureEncoder(model, frozen, options)
    features = CachedFeatures({}, {})
    for dataset in sets:
        views = options.views if dataset is sets[0] else ["original"]
        features.images |= encoder.encode_images(dataset, views, recipe.load_image)
    if recipe.tokenize is None:
        return replace(recipe, inputs=partial(recipe.inputs, load_image=features.load_image))

    texts = texts_of(sets, options.prompt, options.views)
    features.texts |= encoder.encode_texts(texts, recipe.tokenize)
    inputs = partial(recipe.inputs, load_image=features.load_image, tokenize=features.load_text)
    return replace(recipe, inputs=inputs)
