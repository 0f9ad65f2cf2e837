"""Write JSON and CSV files, and format tables of scores."""

import csv
import json
from pathlib import Path

import numpy as np

from imaging.atomic_files import atomic_write

# --- JSON and CSV ---------------------------------------------------------------------------------


def write_json(path: Path, content) -> None:
    """Write a JSON file. NaN and infinity, which JSON does not have, become null."""
    content = json.loads(json.dumps(content, default=str), parse_constant=lambda _: None)
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write a CSV file with a column for every key that occurs, in order of first occurrence."""
    columns = {}  # a dict keeps the order
    for row in rows:
        columns |= dict.fromkeys(row)
    with atomic_write(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns])
        writer.writeheader()
        writer.writerows(rows)


# --- tables of scores -----------------------------------------------------------------------------


# Printed once per test: how the intervals are computed, and what they cannot contain.
INTERVALS = "95 % intervals: expanded percentile bootstrap"
ABSENT = "failures that the test cases do not contain are in no interval"


def show_interval(score: dict) -> str:
    """Return "[low, high]  n=cases" of a mean; a single case has no interval."""
    interval = "[no interval]   "
    if not np.isnan(score["low"]):
        interval = f"[{score['low']:.4f}, {score['high']:.4f}]"
    return f"{interval}  n={score['n']}"


def score_label(name: str, summary: dict) -> str:
    """Return the name of a score in a table: distances with their unit, NSD with its tolerance."""
    unit = summary.get("distance_unit")
    if unit is None or name not in ("hd95", "assd", "nsd"):
        return name
    if name == "nsd":
        return f"nsd ({summary['nsd_tolerance']:g} {unit})"
    return f"{name} ({unit})"


def score_table(summary: dict) -> str:
    """Return a summary of scores (metrics.summarise) as lines: mean, 95 % interval, failures."""
    lines = []
    for name, score in summary.items():
        if isinstance(score, dict) and "mean" in score:
            label = score_label(name, summary)
            lines.append(f"  {label:12} {score['mean']:8.4f}  {show_interval(score)}")
    lines += class_lines(summary)

    if "macro_f1_pooled" in summary:
        lines.append(f"  macro F1 of all pixels, with background: {summary['macro_f1_pooled']:.4f}")
    lines += failure_lines(summary)
    if "warning" in summary:
        lines += [f"  {warning}" for warning in summary["warning"].split("; ")]
    return "\n".join(lines)


def class_lines(summary: dict) -> list[str]:
    """Return a line for each class of a summary: Dice with its interval, IoU, HD95."""
    classes = summary.get("classes", {})
    width = max([12, *map(len, classes)])
    unit = summary.get("distance_unit", "")
    lines = []
    for name, scores in classes.items():
        line = f"  {name:{width}} Dice {scores['dice']['mean']:.4f}"
        line += f"  {show_interval(scores['dice'])}  IoU {scores['iou']['mean']:.4f}"
        if "hd95" in scores:
            line += f"  HD95 {scores['hd95']['mean']:.2f} {unit}".rstrip()
        lines.append(line)
    return lines


def failure_lines(summary: dict) -> list[str]:
    """Return the lines that count misses, and false alarms on images without foreground."""
    classes = summary.get("classes", {})
    cases = summary["images"]
    unit = "images"
    if classes:
        cases = sum(scores["images"] for scores in classes.values())
        unit = "classes in images"
    lines = [f"  misses and false alarms: {summary['misses']} of {cases} {unit}"]

    if "image_specificity" in summary:
        lines.append(
            f"  false alarms: {summary['false_alarms']} of {summary['empty_images']} images "
            f"without foreground, specificity of images {summary['image_specificity']:.4f}"
        )
    return lines


def study_table(summaries: dict[str, dict], examples: dict[str, str] | None = None) -> str:
    """Return Dice and IoU for each kind of prompt as lines, with an example of each if given."""
    width = max([4, *map(len, summaries)])
    lines = []
    for kind, summary in summaries.items():
        dice = summary["dice"]
        line = f"  {kind:{width}} Dice {dice['mean']:.4f} {show_interval(dice)}"
        line += f"  IoU {summary['iou']['mean']:.4f}"
        if examples:
            line += f"  “{examples[kind]}”"
        lines.append(line)
    return "\n".join(lines)
