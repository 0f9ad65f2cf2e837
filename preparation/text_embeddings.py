"""Encode class names with CLIP's text tower: the text codes of the Universal Model.

    name          "liver"
      template    "A computerized tomography of a liver"
      tokens      (77,)
      text tower, projection: not normalised, as in the released codes
    code          float32 (512,)

A file of codes is safetensors: {name: code}, names in lower case, with the metadata `template` and
`weights`. With --subsets, for text_swin_unetr, it holds a text for each subset of the names
instead, as the few-shot study wrote them: "liver , spleen", and "none". The models are in
universal.py and fewshot3d.py. Official code: pretrained_weights/clip_embedding.py of
github.com/ljwztc/CLIP-Driven-Universal-Model at 43c1239, with OpenAI's ViT-B/32 (MIT). The text
tower is that of clipseg.py.
"""

import re
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import clipseg
from imaging import atomic_files, layouts
from tokenizer import CLIPTokenizer
from universal import ORGANS, TEXT

WEIGHTS = "openai/clip-vit-base-patch32"
TEMPLATE = "A computerized tomography of a {}"
# quirk: the released codes, and so the released weights, have these typos in two names
SPELLINGS = {"aorta": "arota", "celiac trunk": "celiac truck"}
CLIP_FILES = ("model.safetensors", "pytorch_model.bin", "ViT-B-32.pt")
LENGTH = 77  # tokens
MOST_CLASSES = 13  # of which all subsets are encoded: 8,192
IGNORED_OF_CLIP = {
    r"(vision_model|visual)\..*|visual_projection\.weight": "CLIP's vision tower",
    r"logit_scale": "temperature of the contrastive pre-training",
}


# --- the text tower -------------------------------------------------------------------------------


class TextTower(nn.Module):
    """CLIP's text encoder and projection."""

    def __init__(self, dim: int, layers: int, embed_dim: int):
        super().__init__()
        self.text_model = clipseg.TextModel(dim, layers)
        self.text_projection = nn.Linear(dim, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) -> (B,embed_dim), not normalised."""
        return self.text_projection(self.text_model(tokens))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "TextTower":
        """Load the text half of a file, a folder or a hub id, in evaluation mode, float32.

        The file holds a whole CLIP or its text half, under the names of transformers or OpenAI.
        Raises ValueError or FileNotFoundError, one line, for a file that does not fit.
        """
        weights, settings = clipseg.read_checkpoint(source, CLIP_FILES)
        activation = settings.get("text_config", settings).get("hidden_act", "quick_gelu")
        if activation != "quick_gelu":  # LAION's CLIPs have GELU and the same shapes
            raise ValueError(f"{source}: has {activation}, OpenAI's CLIP has quick_gelu: take that")

        # Under the names of clipseg.py, the numbers of layers and channels can be read.
        text = official_text_weights(weights)
        projection = text.get("clip.text_projection.weight")  # (embed_dim,dim)
        if projection is None:
            raise ValueError(f"{source}: no text tower of CLIP; take {WEIGHTS}")
        layers = set()
        for name in text:
            match = re.match(r"clip\.text_model\.\D+(\d+)\.", name)
            if match:
                layers.add(match[1])
        embed_dim, dim = projection.shape
        tower = cls(dim, len(layers), embed_dim)

        expected = {f"clip.{name}": tensor for name, tensor in tower.state_dict().items()}
        clipseg.check_complete(text, clipseg.to_official(expected), source)
        state = {}
        for name, tensor in clipseg.convert(text).items():
            state[name.removeprefix("clip.")] = tensor
        tower.load_state_dict(state)
        return tower.eval()


def official_text_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the text half of CLIP's weights under the names of transformers' CLIPSeg."""
    text = {}
    for name, tensor in weights.items():
        if not any(re.fullmatch(pattern, name) for pattern in IGNORED_OF_CLIP):
            text[name] = tensor

    is_transformers = any(name.startswith("text_model.") for name in text)
    prefix = "clip." if is_transformers else "clip_model."  # as clipseg.py expects them
    return clipseg.to_official({prefix + name: tensor for name, tensor in text.items()})


@torch.no_grad()
def encode(tower: TextTower, texts: list[str], batch: int = 64) -> Tensor:
    """Return the codes (n,512) of n texts, not normalised.

    Raises ValueError, one line, if a text is too long for CLIP.
    """
    tokens = CLIPTokenizer(LENGTH + 1)(texts)  # (n,78)
    for text, row in zip(texts, tokens, strict=True):
        if row[LENGTH]:
            raise ValueError(f"{text!r} has more than {LENGTH} tokens; shorten it")

    parts = tokens[:, :LENGTH].split(batch)
    hidden = None if len(parts) > 1 else True
    codes = []
    for part in tqdm(parts, "texts", disable=hidden, leave=False):
        codes.append(tower(part))  # (batch,512)
    return torch.cat(codes)


# --- names and texts ------------------------------------------------------------------------------


def subsets_of(names: list[str]) -> list[str]:
    """Return the texts of all subsets of some names: "none" first, the text of all names last.

    Raises ValueError, one line, if there are more than MOST_CLASSES names, or if one is "none" or
    has a comma in it.
    """
    if len(names) > MOST_CLASSES:
        raise ValueError(
            f"--subsets: {len(names)} classes have {2 ** len(names):,} subsets; give "
            f"{MOST_CLASSES} classes at most"
        )
    for name in names:
        if "," in name or name == "none":
            raise ValueError(f"--subsets: class {name!r} looks like a list of classes; rename it")

    texts = ["none"]
    for count in range(1, len(names) + 1):
        for subset in combinations(names, count):
            texts.append(" , ".join(subset))
    return texts


def classes_of_data(root: Path) -> tuple[str, ...]:
    """Return the names of a data set's classes, without the background.

    Raises ValueError, one line, if the data set does not name them.
    """
    split = next(iter(layouts.find_splits(root)), "train")
    entries = layouts.read_entries(root, split)
    if not entries or not entries[0].has_class_indices:
        raise ValueError(f"{root}: a data set without names of classes; give --classes")
    return layouts.foreground(entries[0].classes)


def class_names(args) -> list[str]:
    """Return the names of the classes that --classes, --data or --study give, each once."""
    if args.study:
        return list(ORGANS[1:])
    names = list(args.classes or [])
    for root in args.data or []:
        names += classes_of_data(root)
    return list(dict.fromkeys(layouts.plain_name(name) for name in names))


def check_arguments(args, template: str) -> None:
    """Raise ValueError, one line, for options that do not fit each other."""
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: codes are kept in a .safetensors file")
    if sum(map(bool, (args.classes, args.data, args.study))) != 1:
        raise ValueError("give one of --classes, --data and --study")
    if args.subsets and args.study:
        raise ValueError("--subsets: the 32 of --study have too many; give --classes or --data")
    if template.count("{}") != 1:
        raise ValueError(f"--template {template!r}: {{}} must be in it once, for the name")


# --- the command ----------------------------------------------------------------------------------


def describe_codes(codes: dict[str, Tensor]) -> str:
    """Return how similar the codes are, in one line: the mean and the largest cosine."""
    names = list(codes)
    n = len(names)
    if n == 1:
        return f"1 code, of {names[0]}"

    x = F.normalize(torch.stack(list(codes.values())), dim=1)  # (n,512)
    cosines = (x @ x.T).fill_diagonal_(-1)  # (n,n)
    mean = cosines.triu(1).sum() / (n * (n - 1) / 2)
    first, second = divmod(int(cosines.argmax()), n)
    closest = f"{names[first]} and {names[second]} {cosines.max():.3f}"
    return f"{n} codes; cosine between two: mean {mean:.3f}, closest {closest}"


def text_codes(args):
    """Encode class names with CLIP for the Universal Model, and print how similar the codes are.

    Give one of --classes, --data and --study. A text code is the embedding of a text with the name
    of the class. The released weights use the default template; with --study universal, two texts
    have the same typos as the released codes. The template '{}' is the name alone, as the few-shot
    study used it for some codes.

    With --subsets, each subset of the classes is encoded as one text, a list of names.
    """
    atomic_files.refuse_existing(args.out)
    template = args.template or ("{}" if args.subsets else TEMPLATE)
    check_arguments(args, template)
    classes = class_names(args)
    names = subsets_of(classes) if args.subsets else classes
    spellings = SPELLINGS if args.study else {}
    texts = [template.replace("{}", spellings.get(name, name)) for name in names]

    tower = TextTower.from_pretrained(args.weights)
    width = tower.text_projection.out_features
    if width != TEXT:
        raise ValueError(
            f"{args.weights}: codes of {width} numbers, the model takes {TEXT}; take {WEIGHTS}"
        )
    codes = dict(zip(names, encode(tower, texts), strict=True))
    write_codes(args.out, codes, {"template": template, "weights": args.weights})

    if args.subsets:
        description = f"{len(codes):,} texts of the subsets of {len(classes)} classes"
    else:
        description = describe_codes(codes)
    print(f"{args.out}: {description}")
    return 0


def write_codes(path: Path, codes: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of codes: {name: (512,)}, and its metadata."""
    from safetensors.torch import save_file

    with atomic_files.atomic_write(path) as part:
        save_file({name: code.clone() for name, code in codes.items()}, part, metadata)


def options(command):
    """Describe `prepare.py text-codes`."""
    add = command(text_codes, "encode class names with CLIP for the Universal Model")
    add("--classes", nargs="+", metavar="NAME", help="encode these class names")
    help = "encode the class names of these data sets"
    add("--data", type=Path, nargs="+", metavar="DATA", help=help)
    help = "encode the 32 class names of the Universal Model"
    add("--study", choices=("universal",), help=help)
    help = (
        "text that is encoded for each class, with {} in place of its name "
        f"(default: {TEMPLATE}; with --subsets: {{}})"
    )
    add("--template", metavar="TEXT", help=help)
    help = "encode the list of names of each subset of the classes, for text_swin_unetr"
    add("--subsets", action="store_true", help=help)
    help = "weights of CLIP ViT-B/32: hub id, file or folder (default: %(default)s)"
    add("--weights", default=WEIGHTS, metavar="SOURCE", help=help)
    out = Path("text_codes.safetensors")
    help = "safetensors file to write (default: %(default)s)"
    add("--out", type=Path, default=out, metavar="FILE", help=help)
