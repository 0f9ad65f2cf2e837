"""Write the model card of a run: README.md of its repository on the hub.

Every number comes from the files of the run: config.json, metrics.csv and test/.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from engine.runs import is_hub_id
from engine.tables import score_label
from exporting.paths import folderless, without_folders
from imaging import files, layouts
from prediction.models import Weights
from recipes.base import BOX_OPTIONS

CODE = "Minimal reference implementations of medical image segmentation models"
WORST = 5  # cases

# Start of a hub id -> the licence of its weights, as the hub spells it and in words. The facts are
# those of docs/credits.md.
LICENCES = {
    "timm/resnet": ("mit", "MIT"),
    "CIDAS/clipseg": (
        "other",
        "unclear; the card says Apache 2.0, but the authors' README excludes the weights from its "
        "MIT licence",
    ),
    "microsoft/BiomedCLIP": ("mit", "MIT"),
    "nvidia/": ("other", "NVIDIA Source Code License, research and evaluation only"),
    "openmmlab/upernet-convnext": ("mit", "MIT"),
    "Intel/dpt-large": ("apache-2.0", "Apache 2.0"),
    "microsoft/beit-": ("apache-2.0", "Apache 2.0"),
    "facebook/sam-vit": ("apache-2.0", "Apache 2.0"),
    "darragh/swinunetr": ("apache-2.0", "Apache 2.0"),
}
CLIPSEG_PAPER = "CLIPSeg: Lüddecke and Ecker, CVPR 2022, https://arxiv.org/abs/2112.10003"
BIOMEDCLIP_PAPER = "BiomedCLIP: Zhang et al., 2023, https://arxiv.org/abs/2303.00915"
UPERNET_PAPER = "UPerNet: Xiao et al., ECCV 2018, https://arxiv.org/abs/1807.10221"
SWIN_PAPER = "Swin UNETR: Hatamizadeh et al., 2021, https://arxiv.org/abs/2201.01266"
UNIVERSAL_PAPER = "Universal Model: Liu et al., ICCV 2023, https://arxiv.org/abs/2301.00785"
PAPERS = {
    "cris": ("CRIS: Wang et al., CVPR 2022, https://arxiv.org/abs/2111.15174",),
    "clipseg": (CLIPSEG_PAPER,),
    "biomedclipseg": (CLIPSEG_PAPER, BIOMEDCLIP_PAPER),
    "sam_decoder": ("SAM: Kirillov et al., ICCV 2023, https://arxiv.org/abs/2304.02643",),
    "segformer": ("SegFormer: Xie et al., NeurIPS 2021, https://arxiv.org/abs/2105.15203",),
    "upernet": (UPERNET_PAPER,),
    "dpt": ("DPT: Ranftl et al., ICCV 2021, https://arxiv.org/abs/2103.13413",),
    "beit": ("BEiT: Bao et al., ICLR 2022, https://arxiv.org/abs/2106.08254", UPERNET_PAPER),
    "swin_unetr3d": (SWIN_PAPER,),
    "universal": (UNIVERSAL_PAPER, SWIN_PAPER),
    "fewshot3d": (UNIVERSAL_PAPER, SWIN_PAPER),
    "text_swin_unetr": (SWIN_PAPER,),
}
# The options of a run that its card lists.
RECIPE = (
    "recipe", "variant", "train", "size", "spacing", "intensity", "prompt", "sam_prompts", "codes",
    "pseudocolor", "epochs", "max_steps", "batch_size", "grad_accum_steps", "lr", "backbone_lr",
    "weight_decay", "schedule", "warmup", "ema", "topology", "fold", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """A run, and the repository that it is uploaded to."""

    weights: Weights
    model: nn.Module
    folder: Path  # of the run
    repository: str

    @property
    def options(self) -> dict:
        """Return the options of the run."""
        return self.weights.options

    @property
    def family(self):
        """Return the family of the model."""
        return self.weights.family

    # --- what the run says ---

    def data_sets(self) -> list[str]:
        """Return the names of the data sets that the run was trained on."""
        names = []
        for data_set in self.options.get("data", []):
            path, _ = layouts.path_and_split(data_set)
            names.append(folderless(path))
        return names

    def start(self) -> list[str]:
        """Return what training started from: hub ids, names of files, or "none"."""
        weights = self.options.get("weights")
        if weights is None:
            recipe = self.weights.run.get("recipe", "default")
            protocol = self.family.protocols.get(recipe)
            hub_ids = protocol.hub_ids if protocol else {}
            variant = self.options.get("variant") or next(iter(hub_ids), None)
            weights = hub_ids.get(variant, "unknown weights")
        sources = [without_folders(weights)]
        decoder = self.weights.run.get("decoder")
        if decoder and decoder != weights:
            sources.append(without_folders(decoder))
        return sources

    def licence(self) -> tuple[str, str]:
        """Return the licence of the start weights, as the hub spells it and in words."""
        if self.start() == ["none"]:
            return "other", "none; training started from random ones. No licence was chosen"

        names = set()
        texts = []
        for source in self.start():
            name, text = licence_of(source)
            names.add(name)
            texts.append(f"`{source}`: {text}")
        return names.pop() if len(names) == 1 else "other", "; ".join(texts)

    @cached_property
    def tests(self) -> list[tuple[str, str, dict]]:
        """Return test set, type of prompt and summary of all tests, [] if it was not tested.

        Only --prompt-study has a summary for each type of prompt; otherwise the type is "".
        """
        path = self.folder / "test" / "summary.json"
        if not path.is_file():
            return []
        tests = []
        for name, summary in files.read_json(path)["tests"].items():
            by_type = {"": summary} if "images" in summary else summary
            for kind, scores in by_type.items():
                tests.append((name, kind, scores))
        return tests

    @cached_property
    def worst_cases(self) -> list[dict]:
        """Return the rows of per_image.csv with the lowest Dice, the lowest first."""
        path = self.folder / "test" / "per_image.csv"
        if not path.is_file():
            return []
        rows = [row for row in files.read_csv(path) if row.get("dice")]
        rows.sort(key=lambda row: float(row["dice"]))
        return rows[:WORST]

    def count(self, number: int) -> str:
        """Return a number of images or volumes in words."""
        noun = self.family.takes.removesuffix("s")
        return f"1 {noun}" if number == 1 else f"{number} {noun}s"

    # --- the card ---

    def text(self) -> str:
        """Return the card in Markdown, with its metadata in YAML."""
        sections = [
            self.metadata(),
            self.title(),
            self.data_section(),
            self.recipe_section(),
            self.scores_section(),
            self.limits_section(),
            self.use_section(),
            self.licence_section(),
        ]
        return "\n\n".join(sections) + "\n"

    def metadata(self) -> str:
        """Return the front matter, which the hub reads."""
        tags = ["medical", "segmentation", self.weights.name]
        tags.append("3d" if self.family.takes == "volumes" else "2d")
        lines = ["---", "library_name: pytorch", "pipeline_tag: image-segmentation"]
        lines += yaml_list("tags", tags)
        hub_ids = [source.partition("@")[0] for source in self.start() if is_hub_id(source)]
        lines += yaml_list("base_model", hub_ids)
        lines += yaml_list("datasets", self.data_sets())
        lines += [f"license: {self.licence()[0]}", "---"]
        return "\n".join(lines)

    def title(self) -> str:
        """Return the heading and what the model is."""
        run = self.weights.run
        count = sum(parameter.numel() for parameter in self.model.parameters())
        classes = run.get("classes", [])
        lines = [
            f"# {self.repository.split('/')[1]}",
            "",
            f"{type(self.model).__name__} with {count:,} parameters, trained to segment medical "
            f"{self.family.takes} with `train.py` of",
            f"*{CODE}*.",
        ]
        if self.start() != ["none"]:
            lines.append(f"Training started from {listed(self.start())}.")
        if classes:
            lines.append(f"Classes: {', '.join(classes)}.")
        return "\n".join(lines)

    def data_section(self) -> str:
        """Return the data sets and the number of cases in each split."""
        names = self.data_sets()
        lines = ["## Data", "", f"Trained on {listed(names)}." if names else "Not recorded."]
        rows = dict(self.weights.run.get("data", {}))
        remark = " (the training cases)" if self.options.get("overfit") else ""
        for name, _, summary in self.tests:
            rows[f"test {name}"] = self.count(summary["images"]) + remark
        lines += table(("split", "cases"), [*rows.items()])
        return "\n".join(lines)

    def recipe_section(self) -> str:
        """Return the options of the training and how long it was."""
        recipe = self.options.get("recipe") or self.weights.run.get("recipe")
        values = self.options | {"recipe": recipe}
        rows = []
        for name in RECIPE:
            value = values.get(name)
            if value not in (None, "", []):
                items = value if isinstance(value, list) else [value]
                rows.append((f"`{name}`", " ".join(map(str, items))))
        lines = ["## Training", *table(("option", "value"), rows)]

        history = self.folder / "metrics.csv"
        epochs = files.read_csv(history) if history.is_file() else []
        validated = [row for row in epochs if row.get("val_dice")]
        if epochs:
            last = epochs[-1]
            lines += ["", f"It ended after epoch {last['epoch']}, step {last['step']}."]
        if validated:
            best = max(validated, key=lambda row: float(row["val_dice"]))
            dice = float(best["val_dice"])
            lines.append(f"The highest validation Dice was {dice:.4f}, in epoch {best['epoch']}.")
        return "\n".join(lines)

    def scores_section(self) -> str:
        """Return the scores of all test sets, by class too, and the worst cases."""
        lines = ["## Scores"]
        if not self.tests:
            return "\n".join([*lines, "", "**This model was not tested.**"])

        for name, kind, summary in self.tests:
            title = f"{name}, prompt {kind}" if kind else name
            lines += ["", f"### {title}, {self.count(summary['images'])}"]
            lines += score_rows(summary)
            lines += class_rows(summary)
            lines += prompt_rows(summary)
        lines += ["", "Intervals: 95 %, expanded percentile bootstrap over patients where they are"]
        lines.append(
            "known, else over images. They do not cover kinds of failure that the test set lacks."
        )

        worst = self.worst_cases
        if worst:
            lines += ["", "Worst cases:"]
            rows = []
            for row in worst:
                rows.append((row["test"], row["name"], row["class"], f"{float(row['dice']):.4f}"))
            lines += table(("test", "case", "class", "Dice"), rows)
        return "\n".join(lines)

    def limits_section(self) -> str:
        """Return the known limits of the model, from the facts of the run."""
        lines = ["## Limits", "", "- For research only. This is not a medical device."]
        names = self.data_sets()
        if len(names) == 1:
            lines.append(
                "- It was trained on a single data set. How well it does on images from other "
                "scanners, clinics and patient groups is unknown."
            )
        lines += [f"- {text}" for text in self.test_limits()]
        if self.options.get("max_steps"):
            lines.append(f"- Training was limited to {self.options['max_steps']} steps.")
        if self.options.get("threshold") == "auto":
            lines.append("- The threshold was chosen on the validation data.")
        return "\n".join(lines)

    def test_limits(self) -> list[str]:
        """Return the limits of the tests."""
        tests = self.tests
        if not tests:
            return ["It was not tested: how well it does is unknown."]
        if self.options.get("overfit"):
            return ["It was tested on its training cases: the scores say nothing about new ones."]

        images = {}
        misses = 0
        for name, _, summary in tests:
            images[name] = summary["images"]
            misses += summary["misses"]

        texts = [f"It was tested on {self.count(sum(images.values()))}."]
        if misses:
            texts.append(
                f"Misses and false alarms in the tests: {misses} (the prediction or the ground "
                "truth is empty, the other is not)."
            )

        foreign = [name for name in images if name.split(":")[0] not in self.data_sets()]
        if foreign:
            texts.append(f"Test data from outside its training data: {listed(foreign)}.")
        else:
            texts.append("It was not tested on data from outside its training data sets.")

        if not any(row.get("group") for row in self.worst_cases):
            texts.append(
                "It is not recorded which patient a test case is from, so the training data may "
                "contain the same patients."
            )
        if "prompts" in tests[0][2]:  # SAM
            texts.append(
                "Its prompts in the tests were made from the ground truth; those of real users are "
                "less exact."
            )
        return texts

    def use_section(self) -> str:
        """Return how to load the model from Python and on the command line."""
        module = type(self.model).__module__
        kind = type(self.model).__name__
        code = [f"from {module} import {kind}"]
        if kind == "TextSwinUNETR":
            code.insert(0, "import fewshot3d")
        if self.family.takes == "volumes":
            code.insert(0, "from imaging import volumes")
        code += ["", f'model = {kind}.from_pretrained("{self.repository}")', self.segment_line()]

        command = f"python predict.py --weights {self.repository}{self.prompt_option()} --out masks"
        inputs = "ct.nii.gz" if self.family.takes == "volumes" else "photos/"

        lines = ["## Use", "", f"In a folder with the code of *{CODE}*:"]
        lines += ["", "```python", *code, "```", "", "```sh", f"{command} {inputs}", "```"]
        if self.options.get("pseudocolor"):
            lines += [
                "",
                "Grey images need the colour map of the training: `predict.py` applies it, the "
                "Python code above does not.",
            ]
        return "\n".join(lines)

    def segment_line(self) -> str:
        """Return the line of Python that segments an image or a volume."""
        if self.family.takes == "volumes":
            model = "model"
            if type(self.model).__name__ == "TextSwinUNETR":
                model = "fewshot3d.WithText(model)"
            return f'probabilities, labels, affine = volumes.segment({model}, "ct.nii.gz")'
        argument = ""
        if self.family.reads_text():
            argument = f", {json.dumps(self.example_prompt(), ensure_ascii=False)}"
        elif BOX_OPTIONS in self.family.options:
            argument = ", boxes=[[10, 20, 110, 90]]"  # x0, y0, x1, y1
        return f'probabilities, mask = model.segment("photo.jpg"{argument})'

    def prompt_option(self) -> str:
        """Return the option of predict.py that prompts the model, "" if it needs none."""
        if self.family.reads_text():
            return f" --prompt {json.dumps(self.example_prompt(), ensure_ascii=False)}"
        if BOX_OPTIONS in self.family.options:
            return " --boxes boxes.csv"
        return ""

    def example_prompt(self) -> str:
        """Return a text for the model: the one of its worst test case, else the run's."""
        for row in self.worst_cases:
            if row.get("prompt"):
                return row["prompt"]
        prompt = self.options.get("prompt") or ""
        return "a polyp" if not prompt or layouts.is_prompt_type(prompt) else prompt

    def licence_section(self) -> str:
        """Return the licence of the start weights, and the papers."""
        lines = ["## Licence and credits", "", f"Start weights: {self.licence()[1]}."]
        lines.append("The licences of the training data may apply as well; they were not checked.")
        lines += ["", *(f"- {paper}" for paper in PAPERS[self.weights.name])]
        lines.append(f"- Code: *{CODE}*; its `docs/credits.md` lists all sources")
        return "\n".join(lines)


# --- sources --------------------------------------------------------------------------------------


def licence_of(source: str) -> tuple[str, str]:
    """Return the licence of released weights, as the hub spells it and in words."""
    for start, licence in LICENCES.items():
        if source.startswith(start):
            return licence
    return "other", "not checked"


# --- Markdown and YAML ----------------------------------------------------------------------------


def yaml_list(key: str, values: list[str]) -> list[str]:
    """Return the lines of a list in YAML, none for an empty list."""
    if not values:
        return []
    return [f"{key}:", *(f"- {json.dumps(value, ensure_ascii=False)}" for value in values)]


def listed(names: list[str]) -> str:
    """Return names in code marks, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)


def table(columns: tuple[str, ...], rows: list) -> list[str]:
    """Return the lines of a table after an empty line, none without rows."""
    if not rows:
        return []
    lines = ["", f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        cells = [str(cell).replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def interval(score: dict) -> str:
    """Return the 95 % interval of a score, "none" for a single case."""
    if score["low"] is None:
        return "none"
    return f"{score['low']:.4f} to {score['high']:.4f}"


def mean(score: dict) -> str:
    """Return the mean of a score, "none" if there is none."""
    return "none" if score["mean"] is None else f"{score['mean']:.4f}"


def score_rows(summary: dict) -> list[str]:
    """Return the table of a test set's scores."""
    rows = []
    for name, score in summary.items():
        if isinstance(score, dict) and "mean" in score:
            label = score_label(name, summary)
            rows.append((label, mean(score), interval(score), score["n"]))
    return table(("score", "mean", "95 % interval", "n"), rows)


def class_rows(summary: dict) -> list[str]:
    """Return the table of the scores of each class, none with a single class."""
    rows = []
    for name, scores in summary.get("classes", {}).items():
        dice = scores["dice"]
        rows.append((name, mean(dice), interval(dice), mean(scores["iou"]), dice["n"]))
    return table(("class", "Dice", "95 % interval", "IoU", "n"), rows)


def prompt_rows(summary: dict) -> list[str]:
    """Return the table of the scores with each kind of SAM's prompts, none for other models."""
    rows = []
    for kind, scores in summary.get("prompts", {}).items():
        dice = scores["dice"]
        rows.append((kind, mean(dice), interval(dice), dice["n"]))
    return table(("prompts", "Dice", "95 % interval", "n"), rows)
