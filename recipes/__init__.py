"""What each --model of train.py means: FAMILIES, one row a model.

A file beside this one connects one model, or several alike, to the training loop. It has

    Protocol   the numbers of each --recipe: `default` is what we recommend, `origin` the study that
               the model comes from to the letter, quirks named. Options of the command line
               replace numbers of the same name.
    a loader   weights -> model
    Recipe     the functions that the loop calls: inputs, forward, loss, predict, groups, and those
               that only some models need
    Family     all of it, and what else differs between models: which options there are, how
               volumes are opened, which classes fit, what a prediction is asked

base.py describes these three and their defaults. images.py has what models of images share,
kept_features.py computes what frozen encoders give once, loading.py reads runs that were stopped.
The loop itself (train.py, engine/) asks no model what it is. To add a model, write its file and
its row here.
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
    """Return the argument of from_pretrained that --clip or --decoder is, {} without them.

    Raises ValueError, one line, if the model `name` has no use for it.
    """
    given = {key: value for key, value in (("clip", clip), ("decoder", decoder)) if value}
    for key in given:
        if FAMILIES[name].second_file != key:
            users = [other for other, family in FAMILIES.items() if family.second_file == key]
            raise ValueError(f"--{key}: {name} has no use for it, only {users[0]} has; remove it")
    return given
