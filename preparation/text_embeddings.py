"""Names of classes -> their codes by the text tower of CLIP, for the Universal Model.

    name          "liver"
      template    "A computerized tomography of a liver"
      tokens      (77,)
      text tower, projection: not normalised, as in the released codes
    code          float32 (512,)

A file of codes is safetensors: {name: code}, names in small letters, and as metadata `template` and
`weights`. With --subsets, for text_swin_unetr, it holds texts of all subsets of the names instead,
as the few-shot study wrote them: "liver , spleen", and "none". The models are in universal.py and
fewshot3d.py. Official: pretrained_weights/clip_embedding.py of
github.com/ljwztc/CLIP-Driven-Universal-Model at 43c1239, with OpenAI's ViT-B/32 (MIT). The tower is
that of clipseg.py.
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
# quirk: the released codes, and so the released weights, are of these two names with typos
SPELLINGS = {"aorta": "arota", "celiac trunk": "celiac truck"}
CLIP_FILES = ("model.safetensors", "pytorch_model.bin", "ViT-B-32.pt")
LENGTH = 77  # tokens
MOST = 13  # names of which all subsets are encoded: 8,192
IGNORED_OF_CLIP = {
    r"(vision_model|visual)\..*|visual_projection\.weight": "CLIP's half that sees",
    r"logit_scale": "temperature of its training on pairs",
}


class TextTower(nn.Module):
    """The half of CLIP that reads."""

    def __init__(self, dim: int, layers: int, embed_dim: int):
        super().__init__()
        self.text_model = clipseg.TextModel(dim, layers)
        self.text_projection = nn.Linear(dim, embed_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B,T) -> (B,embed_dim), not normalised."""
        return self.text_projection(self.text_model(tokens))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "TextTower":
        """From a file, a folder or a hub id of a whole CLIP or its text half, under the names of
        transformers or OpenAI. In evaluation mode, float32."""
        weights, settings = clipseg.read_checkpoint(source, CLIP_FILES)
        activation = settings.get("text_config", settings).get("hidden_act", "quick_gelu")
        if activation != "quick_gelu":  # as LAION's CLIPs have it, in the same shapes
            raise ValueError(f"{source}: has {activation}, OpenAI's CLIP has quick_gelu: take that")
        text = {
            n: t for n, t in weights.items() if not any(re.fullmatch(p, n) for p in IGNORED_OF_CLIP)
        }
        hub = any(name.startswith("text_model.") for name in text)
        prefix = "clip." if hub else "clip_model."  # which clipseg.py knows them by
        text = clipseg.to_official({prefix + n: t for n, t in text.items()})
        if (projection := text.get("clip.text_projection.weight")) is None:
            raise ValueError(f"{source}: no text tower of CLIP; take {WEIGHTS}")
        layers = {m[1] for n in text if (m := re.match(r"clip\.text_model\.\D+(\d+)\.", n))}
        embed_dim, dim = projection.shape
        tower = cls(dim, len(layers), embed_dim)
        ours = {f"clip.{n}": t for n, t in tower.state_dict().items()}
        clipseg.check_complete(text, clipseg.to_official(ours), source)
        text = clipseg.convert(text)
        tower.load_state_dict({n.removeprefix("clip."): t for n, t in text.items()})
        return tower.eval()


@torch.no_grad()
def encode(tower: TextTower, texts: list[str], batch: int = 64) -> Tensor:
    """n texts -> (n,512), not normalised. ValueError, one line: a text is too long for CLIP."""
    tokens = CLIPTokenizer(LENGTH + 1)(texts)
    for text, row in zip(texts, tokens, strict=True):
        if row[LENGTH]:
            raise ValueError(f"{text!r} has more than {LENGTH} tokens; shorten it")
    parts = tokens[:, :LENGTH].split(batch)
    hidden = None if len(parts) > 1 else True
    codes = []
    for part in tqdm(parts, "texts", disable=hidden, leave=False):
        codes.append(tower(part))
    return torch.cat(codes)


def subsets_of(names: list[str]) -> list[str]:
    """Return the texts of all subsets of some names, "none" first, the text of all last.

    Raises ValueError, one line, if there are more than MOST names, or one has a comma in it.
    """
    if len(names) > MOST:
        told = f"{len(names)} classes have {2 ** len(names):,} subsets"
        raise ValueError(f"--subsets: {told}; give {MOST} classes at most")
    for name in names:
        if "," in name or name == "none":
            raise ValueError(f"--subsets: class {name!r} cannot be told from a list; rename it")
    texts = ["none"]
    for count in range(1, len(names) + 1):
        for subset in combinations(names, count):
            texts.append(" , ".join(subset))
    return texts


def classes_of_data(root: Path) -> tuple[str, ...]:
    """Names of a data set's classes, without the background's. ValueError: nothing names them."""
    split = next(iter(layouts.splits(root)), "train")
    entries = layouts.annotations(root, split)
    if not entries or not entries[0].numbers:
        raise ValueError(f"{root}: a data set without names of classes; give --classes")
    return layouts.foreground(entries[0].classes)


def describe_codes(codes: dict[str, Tensor]) -> str:
    """How far apart codes are, in a line."""
    names, n = list(codes), len(codes)
    x = F.normalize(torch.stack(list(codes.values())), dim=1)
    cosines = (x @ x.T).fill_diagonal_(-1)
    if n == 1:
        return f"1 code, of {names[0]}"
    mean = cosines.triu(1).sum() / (n * (n - 1) / 2)
    one, other = divmod(int(cosines.argmax()), n)
    closest = f"{names[one]} and {names[other]} {cosines.max():.3f}"
    return f"{n} codes; cosine between two: mean {mean:.3f}, closest {closest}"


def text_codes(args):
    """Writes the codes of classes, the texts of the Universal Model, and tells how close they are.

    Which classes: their names, those of data sets, or the 32 of --study universal, two of which
    then have the typos of the released codes in the text. Released codes and weights are of the
    default template; '{}' alone is the bare name, of which the few-shot study made others. With
    --subsets a text for each subset of the classes, and the default template is the bare list.
    """
    atomic_files.refuse_existing(args.out)
    if args.out.suffix != ".safetensors":
        raise ValueError(f"--out {args.out}: codes are kept in a .safetensors")
    if sum(map(bool, (args.classes, args.data, args.study))) != 1:
        raise ValueError("give one of --classes, --data and --study")
    if args.subsets and args.study:
        raise ValueError("--subsets: the 32 of --study have too many; give --classes or --data")
    template = args.template or ("{}" if args.subsets else TEMPLATE)
    if template.count("{}") != 1:
        raise ValueError(f"--template {template!r}: {{}} must be in it once, for the name")
    names = args.classes or [name for root in args.data or () for name in classes_of_data(root)]
    names = ORGANS[1:] if args.study else map(layouts.plain_name, names)
    names, spellings = list(dict.fromkeys(names)), SPELLINGS if args.study else {}
    count = len(names)
    if args.subsets:
        names = subsets_of(names)
    tower = TextTower.from_pretrained(args.weights)
    if tower.text_projection.out_features != TEXT:
        told = f"codes of {tower.text_projection.out_features} numbers, the model takes {TEXT}"
        raise ValueError(f"{args.weights}: {told}; take {WEIGHTS}")
    texts = [template.replace("{}", spellings.get(name, name)) for name in names]
    codes = dict(zip(names, encode(tower, texts), strict=True))
    write_codes(args.out, codes, {"template": template, "weights": args.weights})
    if args.subsets:
        print(f"{args.out}: {len(codes):,} texts of the subsets of {count} classes")
    else:
        print(f"{args.out}: {describe_codes(codes)}")
    return 0


def write_codes(path: Path, codes: dict[str, Tensor], about: dict[str, str]) -> None:
    """{name: (512,)} and metadata -> a file of codes."""
    from safetensors.torch import save_file

    with atomic_files.whole_file(path) as part:
        save_file({name: code.clone() for name, code in codes.items()}, part, about)


def options(command):
    """The command of `prepare.py` that makes codes."""
    add = command(text_codes, "make text codes of classes for the Universal Model")
    add("--classes", nargs="+", metavar="NAME", help="names of classes")
    add("--data", type=Path, nargs="+", metavar="DATA", help="data sets whose classes they are")
    add("--study", choices=("universal",), help="the 32 of the Universal Model")
    help = f"with {{}} for the name ({TEMPLATE}; with --subsets {{}})"
    add("--template", metavar="TEXT", help=help)
    help = "a text for each subset of the classes, for text_swin_unetr"
    add("--subsets", action="store_true", help=help)
    help = "CLIP ViT-B/32: hub id, file or folder (%(default)s)"
    add("--weights", default=WEIGHTS, help=help)
    out = Path("text_codes.safetensors")
    add("--out", type=Path, default=out, metavar="FILE", help="to write (%(default)s)")
