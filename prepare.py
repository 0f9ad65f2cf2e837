"""Make and check data sets.

    python prepare.py demo                      make data/demo: synthetic endoscopy with prompts
    python prepare.py import FOLDER --out DATA  bring your own images and masks into our layout
    python prepare.py check data/demo           read whole data sets and report problems
    python prepare.py annotate DATA             write text prompts from masks and images
    python prepare.py uw-madison DOWNLOAD       make data/uw_madison: MR slices with class maps
    python prepare.py duke-dme DOWNLOAD         make data/duke_dme: OCT, retinal layers and fluid
    python prepare.py duke-amd DOWNLOAD         make data/duke_amd: OCT, drusen
    python prepare.py msd DOWNLOAD --out DATA   split a task of the Medical Segmentation Decathlon
    python prepare.py btcv DOWNLOAD             make data/btcv: abdominal CT, with a split
    python prepare.py demo-volumes              make data/demo_volumes: synthetic abdominal CT
    python prepare.py kvasir-polyp --raw ZIP    make data/kvasir_polyp; likewise clinicdb-polyp,
                                                bkai-polyp, cvc300-polyp, colondb-polyp, etis-polyp,
                                                isic, dfu, busi, camus, chexlocalize
    python prepare.py boxes MASKS --like DATA   make boxes.csv: boxes around masks, for SAM
    python prepare.py text-codes --data DATA    make text_codes.safetensors: CLIP's embeddings of
                                                the class names
    python prepare.py medclipseg-texts --texts FOLDER --data DATA
                                                add MedCLIPSeg's texts to DATA as prompt types

`demo` and the data sets of the medvlsm study (arXiv 2308.07706) have its layout, with text prompts:

    images/  masks/  anns/{train,val,test}.json: [{"img_name", "mask_name", "prompts": {...}}, ...]

`uw-madison` and `duke-*` make class maps, whose pixels are class indices:

    {train,val,test}/{images,masks}/NAME.png  classes.json: {"0": "background", "1": "stomach", ...}

`msd`, `btcv` and `demo-volumes` make volumes in the Decathlon's layout (volume_sets.py):

    images{Tr,Ts}/NAME.nii.gz  labels{Tr,Ts}/NAME.nii.gz  dataset.json, which lists the splits

`check` reads all of these. Exit status: 0 if all is well, 1 if `check` found errors, 2 if the
command could not run (one line on stderr says why).

`python prepare.py COMMAND --help` explains a command and its options.
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

import inspect
import sys

from engine import command_line
from preparation import (
    annotate,
    boxes,
    btcv,
    busi,
    camus,
    check,
    chexlocalize,
    decathlon,
    demo,
    demo_volumes,
    duke_oct,
    import_folder,
    isic,
    medclipseg_texts,
    polyps,
    text_embeddings,
    uw_madison,
)

# Each file describes its commands in `options`. --help lists them in this order.
COMMAND_FILES = (
    demo,
    import_folder,
    check,
    annotate,
    uw_madison,
    duke_oct,
    decathlon,
    btcv,
    demo_volumes,
    polyps,
    isic,
    busi,
    camus,
    chexlocalize,
    boxes,
    text_embeddings,
    medclipseg_texts,
)


def parser():
    """Return the parser of all commands."""
    top = command_line.Parser(__doc__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(run, help, name=None):
        """Add the command that calls run(args); return the function that adds its options.

        name: of the command (default: that of the function).
        """
        name = name or run.__name__.replace("_", "-")
        description = inspect.getdoc(run)
        subparser = commands.add_parser(name, help=help, description=description)
        subparser.set_defaults(run=run)
        return subparser.add_argument

    for file in COMMAND_FILES:
        file.options(command)
    return top


def main(argv=None):
    """Run one command and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    words[:1] = [word.replace("_", "-") for word in words[:1]]  # data sets may be spelled with _
    args = parser().parse_args(words)
    return args.run(args)


if __name__ == "__main__":
    command_line.command(main)
