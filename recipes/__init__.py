"""Recipes: what connects a model to the training loop, every number of a protocol, its source.

The loop knows nothing of prompts, boxes or windows. A `Recipe` (base.py) gives it five functions

    inputs(sample, train, rng) -> dict of tensors    made in the workers: pixels, tokens, the target
    forward(model, batch)      -> output             a training batch through the model
    loss(output, batch)        -> scalar, its parts  output is what the model gave for the batch
    predict(model, item)       -> probabilities (K,H,W) at the image's own size, output for `loss`
    groups(model, settings)    -> parameter groups for the optimiser

(a text model's also `read`, what makes tensors of a prompt; SAM's also how its prompts, of which
images have different numbers, become a batch, are made of a mask, and are scored one by one)

and a table of settings. `default` is what we recommend, `origin` the study that a model comes from
to the letter, quirks named. The command line overrides any setting of the same name.

FAMILIES holds what each --model means. A new model is a file beside these and a row here.
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
