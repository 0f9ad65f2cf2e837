"""The meaning of each --model of train.py: FAMILIES, one row per model.

Each file here connects a model, or several similar ones, to the training loop. It contains

    Protocol   the numbers of each --recipe: `default` is what we recommend, `origin` the study
               that the model comes from to the letter, with its quirks named. Options of the
               command line replace the numbers of the same name.
    a loader   weights -> model
    Recipe     the functions that the loop calls: inputs, forward, loss, predict, groups, and some
               that only a few models need
    Family     all of these, and what else differs between models: their options, how volumes are
               opened, which classes fit, how a prediction is prompted

base.py describes these three with their defaults. images.py has what models of images share,
cached_features.py caches the features of frozen encoders, and loading.py reads runs that were
stopped. The loop itself (train.py, engine/) never asks which model it trains. To add a model, write
its file and add its row here.
"""

from recipes import class_maps, clipseg, cris, sam, swin_unetr3d, text_swin_unetr, universal

FAMILIES = {
    "cris": cris.FAMILY,
    "clipseg": clipseg.FAMILY,
    "biomedclipseg": clipseg.BIOMED_FAMILY,
    "sam_decoder": sam.FAMILY,
    "segformer": class_maps.FAMILIES["segformer"],
    "upernet": class_maps.FAMILIES["upernet"],
    "dpt": class_maps.FAMILIES["dpt"],
    "beit": class_maps.FAMILIES["beit"],
    "swin_unetr3d": swin_unetr3d.FAMILY,
    "universal": universal.FAMILY,
    "fewshot3d": universal.FEWSHOT_FAMILY,
    "text_swin_unetr": text_swin_unetr.FAMILY,
}


def second_file(name: str, clip: str | None, decoder: str | None) -> dict:
    """Return --clip or --decoder as an argument of from_pretrained, {} without them.

    Raises ValueError, one line, if the model `name` has no use for it.
    """
    arguments = {}
    if clip:
        arguments["clip"] = clip
    if decoder:
        arguments["decoder"] = decoder
    for option in arguments:
        if FAMILIES[name].second_file != option:
            users = [model for model, family in FAMILIES.items() if family.second_file == option]
            raise ValueError(
                f"--{option}: {name} has no use for it, only {users[0]} has; remove it"
            )
    return arguments
