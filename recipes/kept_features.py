"""Compute what frozen towers give for images and texts once, and train on that."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from data import Dataset, Items, loader
from engine.feature_cache import Rows, fingerprint, keep
from imaging.augment import MIRRORS, mirror_prompt, view
from recipes.base import Recipe


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
