"""Several --weights as one prediction: which models fit together, and the threshold of their mean.

The members of an ensemble may be different models with different preprocessing. They take the same
kind of input and have the same classes in the same order, so that their probabilities can be
averaged at the image's or volume's own size.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from engine.runs import is_onnx, num_classes
from imaging.layouts import plain_name
from prediction import onnx_networks
from prediction.models import LoadedModel, Weights, find_weights, load_model
from recipes import second_file
from recipes.base import BOX_OPTIONS, TEXT_OPTIONS, Family

# --- before the models are loaded ----------------------------------------------------------------


def find_members(sources: list[str], name_of: Callable) -> list[Weights]:
    """Return what is known about each of --weights.

    name_of: source -> name of its model, None for the one that its run names. Raises ValueError,
    one line, if the same weights are given twice or if two models take different kinds of input.
    """
    members = []
    for source in sources:
        members.append(find_weights(source, name_of(source)))
    check_different(members)

    first = members[0]
    for other in members[1:]:
        kind = kind_of_input(first.family)
        other_kind = kind_of_input(other.family)
        if kind != other_kind:
            raise ValueError(
                f"--weights: {first.source} ({first.name}) takes {kind}, {other.source} "
                f"({other.name}) takes {other_kind}; an ensemble needs one kind of input"
            )
    return members


def file_of(weights: Weights) -> str:
    """Return a text that is the same for all spellings of the same weights.

    A run folder is the same as its best.safetensors. All files of an ONNX model are the same.
    """
    path = Path(weights.source)
    if is_onnx(weights.source):
        path = onnx_networks.first_file(weights.source, weights.run)
    if not path.exists():  # a hub id
        return weights.source
    if path.name == "best.safetensors" and weights.run:
        path = path.parent
    return str(path.resolve())


def check_different(members: list[Weights]) -> None:
    """Raise ValueError, one line, if two of --weights are the same run, file or hub id."""
    known = {}
    for weights in members:
        file = file_of(weights)
        if file in known:
            raise ValueError(
                f"--weights: {known[file]} and {weights.source} are the same weights; give each "
                "once"
            )
        known[file] = weights.source


def kind_of_input(family: Family) -> str:
    """Return what a prediction of a model needs, in words."""
    if BOX_OPTIONS in family.options:
        return "images with boxes or points"
    if TEXT_OPTIONS in family.options:
        return "images with a text"
    return family.takes


def second_files(members: list[Weights], clip: str | None, decoder: str | None) -> dict:
    """Return --clip or --decoder as an argument of from_pretrained (`recipes.second_file`).

    Raises ValueError, one line, if one is given with several weights: it completes one file.
    """
    if len(members) == 1:
        return second_file(members[0].name, clip, decoder)
    for option, value in (("--clip", clip), ("--decoder", decoder)):
        if value is not None:
            raise ValueError(f"{option}: completes one file of weights; give a single --weights")
    return {}


def check_prompts(members: list[Weights], prompt: str | None) -> None:
    """Raise ValueError, one line, if --prompt is missing and the runs read different prompts."""
    if prompt is not None or not members[0].family.reads_text():
        return
    first = members[0]
    for other in members[1:]:
        prompts = [weights.options.get("prompt") for weights in (first, other)]
        if prompts[0] != prompts[1]:
            raise ValueError(
                f"--prompt is missing: {first.source} was trained with {prompts[0]}, "
                f"{other.source} with {prompts[1]}"
            )


# --- loaded models -------------------------------------------------------------------------------


def load_members(
    members: list[Weights],
    device: str,
    overrides: dict,
    overlap: float | None = None,
    window_batch: int | None = None,
) -> list[LoadedModel]:
    """Load all members; arguments and errors as for `load_model`."""
    loaded = []
    for weights in members:
        loaded.append(load_model(weights, device, overrides, overlap, window_batch))
    return loaded


def check_classes(members: list[LoadedModel], all_names: list) -> list[str] | None:
    """Return the names of the members' classes, None if no member names them.

    all_names: the names of each member, or None. Raises ValueError, one line, unless all members
    have the same number of classes, in the same order where both name them, and unless all or none
    have classes that overlap.
    """
    first = members[0]
    for other in members[1:]:
        if describe_classes(first) != describe_classes(other):
            raise ValueError(
                f"--weights: {first.weights.source} has {describe_classes(first)}, "
                f"{other.weights.source} has {describe_classes(other)}; an ensemble needs the same"
            )

    named = None  # the first member that names its classes
    names = None
    for member, member_names in zip(members, all_names, strict=True):
        if not member_names:
            continue
        if named is None:
            named = member
            names = member_names
        elif [*map(plain_name, names)] != [*map(plain_name, member_names)]:
            raise ValueError(
                f"--weights: the classes of {named.weights.source} are {', '.join(names)}, those "
                f"of {member.weights.source} {', '.join(member_names)}; an ensemble needs the same "
                "in the same order"
            )
    return names


def describe_classes(member: LoadedModel) -> str:
    """Return how many classes a model predicts, such as "4 classes", and if they may overlap."""
    count = num_classes(member.model)
    noun = "class" if count == 1 else "classes"
    kind = "overlapping " if getattr(member.config, "overlapping", False) else ""
    return f"{count} {kind}{noun}"


def shared_config(members: list[LoadedModel]):
    """Return the Config that turns the members' mean into masks; describe an ensemble in a line.

    It is the first member's. Its threshold, where masks need one, is the mean of the members'
    thresholds. With --threshold, all members have that threshold.
    """
    config = members[0].config
    if len(members) == 1:
        return config

    takes_threshold = num_classes(members[0].model) == 1 or getattr(config, "overlapping", False)
    if not takes_threshold:
        print(f"ensemble of {len(members)}: the mean of their probabilities")
        return config

    thresholds = [member.config.threshold for member in members]
    threshold = thresholds[0]
    origin = ""
    if len({*thresholds}) > 1:
        threshold = fmean(thresholds)
        origin = f", the mean of {', '.join(f'{value:g}' for value in thresholds)}"
    print(
        f"ensemble of {len(members)}: the mean of their probabilities; threshold "
        f"{threshold:g}{origin}"
    )
    return replace(config, threshold=threshold)
