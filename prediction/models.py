"""Find and load the models of --weights: run folders, files, hub ids and ONNX files."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from engine.runs import is_hub_id, is_onnx, pick_device, read_run
from prediction import onnx_networks
from recipes import FAMILIES
from recipes.base import Family, Protocol, Recipe


@dataclass(frozen=True)
class Weights:
    """What is known about --weights before they are loaded."""

    source: str  # run folder, file (also ONNX) or hub id
    name: str  # of the model, a key of FAMILIES
    run: dict  # config.json of the run, or what an ONNX file has of it; {} without a run

    @property
    def family(self) -> Family:
        """Return what the model's name means."""
        return FAMILIES[self.name]

    @property
    def options(self) -> dict:
        """Return the options of the run, {} without a run."""
        return self.run.get("options", {})


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode on its device, with what a prediction needs beside it."""

    weights: Weights
    model: nn.Module
    recipe: Recipe

    @property
    def config(self):
        """Return the model's Config."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Return the device that the model is on."""
        return next(self.model.parameters()).device


def find_weights(source: str, name: str | None = None) -> Weights:
    """Return what is known about --weights. name: of the model, if no run names it.

    Raises FileNotFoundError or ValueError, one line, if there are no such weights, if nothing names
    the model, or if this version does not have it.
    For an ONNX file, raises as `onnx_networks.read_run` does.
    """
    if is_onnx(source):
        run = onnx_networks.read_run(source)
        if name not in (None, run["model"]):
            raise ValueError(f"--model {name}: {source} is a {run['model']}; remove the option")
        return Weights(source, run["model"], run)

    run = read_run(source)
    name = name or run.get("model")
    if name is None and not Path(source).exists() and not is_hub_id(source):
        raise FileNotFoundError(f"{source}: no such run folder or file of weights")
    if name is None:
        raise ValueError(f"--model is missing: {source} is not a run, which would name its model")
    if name not in FAMILIES:
        raise ValueError(f"{source}: is a run of {name}, no model that this version has")
    return Weights(source, name, run)


def protocol_of(
    weights: Weights, overlap: float | None = None, window_batch: int | None = None
) -> Protocol:
    """Return the protocol `default` of a model for predictions.

    overlap, window_batch: of the sliding windows of volumes. None: those of the run or the recipe.
    """
    protocol = weights.family.protocols["default"]
    if overlap is None:
        overlap = weights.options.get("overlap")
    if overlap is not None:
        protocol = replace(protocol, overlap=overlap)
    if window_batch is not None:
        protocol = replace(protocol, window_batch=window_batch)
    return protocol


def load_model(
    weights: Weights,
    device: str = "auto",
    overrides: dict | None = None,
    overlap: float | None = None,
    window_batch: int | None = None,
) -> LoadedModel:
    """Load weights for predictions.

    device: as --device. overrides: fields of the model's Config, such as threshold, and the second
    file of weights (`recipes.second_file`). overlap, window_batch: as for `protocol_of`. Raises
    OSError or ValueError, one line, if the weights cannot be loaded.
    """
    overrides = overrides or {}
    protocol = protocol_of(weights, overlap, window_batch)
    if is_onnx(weights.source):
        model = onnx_networks.load(weights.source, weights.run, device, overrides)
    else:
        place = pick_device(device)
        model = weights.family.load_model(weights.source, None, protocol, overrides)
        model = model.eval().to(place)
    recipe = weights.family.recipe(model, protocol)
    return LoadedModel(weights, model, recipe)
