"""Make and check data sets.

    python prepare.py demo                      writes data/demo: synthetic endoscopy with prompts
    python prepare.py check data/demo [DATA]    reads whole data sets and reports what is wrong
    python prepare.py uw-madison DOWNLOAD       writes data/uw_madison: MR slices with class maps
    python prepare.py duke-dme DOWNLOAD         writes data/duke_dme: OCT, layers and fluid
    python prepare.py duke-amd DOWNLOAD         writes data/duke_amd: OCT, drusen
    python prepare.py msd RAW --out DATA        divides a task of the Medical Segmentation Decathlon
    python prepare.py btcv RAW                  writes data/btcv: abdominal CT, with a split
    python prepare.py demo-volumes              writes data/demo_volumes: synthetic abdominal CT
    python prepare.py boxes MASKS --like DATA   writes boxes.csv: prompts for SAM out of masks
    python prepare.py text-codes --data DATA    writes text_codes.safetensors: of classes, by CLIP;
                                                with --subsets of all lists of classes

`demo` and `check` speak the layout of the medvlsm study (arXiv 2308.07706), with text prompts:

    images/  masks/  anns/{train,val,test}.json: [{"img_name", "mask_name", "prompts": {...}}, ...]

and `uw-madison` and `duke-*` that of class maps, whose pixels are class numbers:

    {train,val,test}/{images,masks}/NAME.png  classes.json: {"0": "background", "1": "stomach", ...}

`msd`, `btcv` and `demo-volumes` make volumes, in the Decathlon's layout (volume_sets.py):

    images{Tr,Ts}/NAME.nii.gz  labels{Tr,Ts}/NAME.nii.gz  dataset.json, which lists the splits

`check` only reads. Exit status: 0 fine, 1 findings, 2 could not run (one line on stderr).
"""

if __name__ == "__main__":
    from engine import startup

    startup.guard_imports()  # the imports below take seconds

from engine import command_line
from preparation import (
    boxes,
    btcv,
    check,
    decathlon,
    demo,
    demo_volumes,
    duke_oct,
    text_embeddings,
    uw_madison,
)

# A file describes its commands in `options`; --help lists them in this order.
COMMAND_FILES = (
    demo,
    check,
    uw_madison,
    duke_oct,
    decathlon,
    btcv,
    demo_volumes,
    boxes,
    text_embeddings,
)


def parser():
    """Return the parser of all commands, each of which its own file describes."""
    top = command_line.Parser(__doc__)
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    def command(run, help):
        name = run.__name__.replace("_", "-")
        one = commands.add_parser(name, help=help, description=run.__doc__)
        one.set_defaults(run=run)
        return one.add_argument

    for file in COMMAND_FILES:
        file.options(command)
    return top


def main(argv=None):
    args = parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    command_line.command(main)
