"""Probabilities of one image or volume: windows, test-time flips, and the mean of several models.

The probabilities of all members and flips are averaged at the size of the image or volume. They are
added up one at a time, so memory does not grow with their number.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imaging import volumes
from imaging.nifti import Grid
from prediction.flips import flip_back, flip_sample
from prediction.models import LoadedModel


def mean(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return the mean of float32 arrays of the same shape. The sum overwrites the first array."""
    count = 0
    for part in parts:
        count += 1
        if count == 1:
            total = part
        else:
            total += part
        del part  # before the next one is made
    return total if count == 1 else np.divide(total, count, out=total)


# --- images --------------------------------------------------------------------------------------

OVERLAP = 0.25  # of the windows of images


@dataclass(frozen=True)
class ImageMember:
    """A model of a prediction of images, alone or in an ensemble."""

    loaded: LoadedModel
    make_prompts: Callable  # sample -> tensors that are added to those of the recipe's `inputs`
    window_size: int | None = None  # pixels; None: no windows
    overlap: float = OVERLAP  # of the windows

    @property
    def colours(self) -> str | None:
        """Return the colour map that the model's run gave grey images."""
        return self.loaded.weights.options.get("pseudocolor")

    def predict(self, sample: dict) -> Tensor:
        """Return the probabilities (K,H,W) of a sample at its own size, float32 on the CPU."""
        recipe = self.loaded.recipe
        item = recipe.inputs(sample, train=False, rng=None)
        item |= self.make_prompts(sample)
        with torch.no_grad():
            return recipe.predict(self.loaded.model, item)[0].cpu()

    def views(self, sample: dict, flips: list) -> Iterator[np.ndarray]:
        """Yield the probabilities (K,H,W) of each flip of a sample, flipped back, one at a time.

        flips: from `flips.image_flips`, [()] for no flips. Flips that would make the text of the
        sample wrong are left out.
        """
        for flip in flips:
            flipped = flip_sample(sample, flip)
            if flipped is None:
                continue
            yield flip_back(
                predict_in_windows(self.predict, flipped, self.window_size, self.overlap), flip
            )


def predict_in_windows(
    predict: Callable, sample: dict, side: int | None, overlap: float = OVERLAP
) -> Tensor:
    """Return the probabilities (K,H,W) of a sample, blended from those of overlapping windows.

    predict: sample -> probabilities (K,h,w). Each window is predicted like an image of its own, of
    side x side pixels, or less where the image is smaller. side None: the whole image at once.
    """
    H, W = sample["size"]
    window = (H, W) if side is None else (min(side, H), min(side, W))
    if window == (H, W):
        return predict(sample)

    def predict_window(crops: Tensor) -> Tensor:
        """Map one crop, uint8 (1,3,h,w), to its probabilities (1,K,h,w)."""
        return predict(sample | {"image": crops[0], "size": window})[None]

    return volumes.sliding_window(
        predict_window, sample["image"], window, overlap, batch=1, progress=True
    )


# --- volumes -------------------------------------------------------------------------------------


def predict_volume(loaded: LoadedModel, item: dict) -> np.ndarray:
    """Return the probabilities (K,X,Y,Z) of a prepared volume on the grid of its file."""
    with torch.no_grad():
        return loaded.recipe.predict(loaded.model, item)[0].numpy()


def views_of_volume(
    loaded: LoadedModel, image: np.ndarray, grid: Grid, flips: list, chosen: list[int] | None
) -> Iterator[np.ndarray]:
    """Yield the probabilities (K,X,Y,Z) of each flip of a volume, flipped back, one at a time.

    image: float32 (C,X,Y,Z) in RAS. flips: from `flips.volume_flips`, [()] for no flips.
    chosen: indices of the classes that a Universal Model predicts, None for all.
    """
    preprocess = loaded.model.preprocess
    for axes in flips:
        flipped = np.ascontiguousarray(np.flip(image, axes))
        prepared, placement = volumes.prepare_image(
            flipped, grid, loaded.config.spacing, preprocess
        )
        item = {"image": prepared, "place": placement}
        if chosen is not None:
            item["asked"] = chosen
        yield np.flip(predict_volume(loaded, item), axes)
