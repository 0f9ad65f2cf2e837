"""What a run leaves in numbers: JSON, CSV, and tables of scores."""

import csv
import json
from pathlib import Path

import numpy as np

from imaging.atomic_files import whole_file

# --- JSON and CSV ---------------------------------------------------------------------------------


def write_json(path: Path, content) -> None:
    """NaN and infinities, which JSON does not know, become null."""
    content = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """One column for every key that occurs, in the order of first occurrence."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# --- tables of scores -----------------------------------------------------------------------------


# Said once a test: what the intervals are, and what no interval of this kind can hold.
INTERVALS = "95 % intervals: expanded percentile bootstrap"
ABSENT = "failures that the test cases do not contain are in no interval"


def show_interval(score: dict) -> str:
    """Return "[low, high]  n=cases" of a mean; one case has no interval."""
    ends = "[no interval]   "
    if not np.isnan(score["low"]):
        ends = f"[{score['low']:.4f}, {score['high']:.4f}]"
    return f"{ends}  n={score['n']}"


def score_label(name: str, summary: dict) -> str:
    """Return the name of a score as a table shows it: distances with their unit, NSD with its
    tolerance, where the summary has them."""
    unit = summary.get("distance_unit")
    if unit is None or name not in ("hd95", "assd", "nsd"):
        return name
    if name == "nsd":
        return f"nsd ({summary['nsd_tolerance']:g} {unit})"
    return f"{name} ({unit})"


def score_table(summary: dict) -> str:
    """A summary of scores (metrics.summarise) as lines of text: mean [95 % interval]."""
    scores = {
        name: score
        for name, score in summary.items()
        if isinstance(score, dict) and "mean" in score
    }
    lines = []
    for name, score in scores.items():
        label = score_label(name, summary)
        lines.append(f"  {label:12} {score['mean']:8.4f}  {show_interval(score)}")
    classes = summary.get("classes", {})
    width = max([12, *map(len, classes)])
    for name, of in classes.items():
        unit = summary.get("distance_unit", "")
        more = f"  HD95 {of['hd95']['mean']:.2f} {unit}".rstrip() if "hd95" in of else ""
        dice = f"Dice {of['dice']['mean']:.4f}  {show_interval(of['dice'])}"
        lines.append(f"  {name:{width}} {dice}  IoU {of['iou']['mean']:.4f}{more}")
    if "macro_f1_pooled" in summary:
        lines.append(f"  macro F1 of all pixels, with background: {summary['macro_f1_pooled']:.4f}")
    cases = sum(of["images"] for of in classes.values()) if classes else summary["images"]
    what = "classes in images" if classes else "images"
    lines.append(f"  misses and false alarms: {summary['misses']} of {cases} {what}")
    if "image_specificity" in summary:
        alarms = summary["false_alarms"]
        images = f"{summary['empty_images']} images without foreground"
        specificity = f"specificity of images {summary['image_specificity']:.4f}"
        lines.append(f"  false alarms: {alarms} of {images}, {specificity}")
    if "warning" in summary:
        for warning in summary["warning"].split("; "):
            lines.append(f"  {warning}")
    return "\n".join(lines)


def study_table(summaries: dict[str, dict], examples: dict[str, str] | None = None) -> str:
    """Dice and IoU by what was asked, as lines of text, perhaps with an example."""
    lines, width = [], max(4, *map(len, summaries))
    for kind, summary in summaries.items():
        dice, iou = summary["dice"], summary["iou"]
        score = f"Dice {dice['mean']:.4f} {show_interval(dice)}  IoU {iou['mean']:.4f}"
        lines.append(f"  {kind:{width}} {score}" + (f"  “{examples[kind]}”" if examples else ""))
    return "\n".join(lines)
