"""Plots of `results.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from .students import ABLATIONS, BASE

# What a reader follows through the stages.
METRICS = ("cgF1", "box mIoU", "click mIoU", "J&F")


def draw_stages(results: Mapping[str, Any], path: Path) -> None:
    """Each metric as a share of the teacher's, stage by stage."""
    teacher, stages = results["teacher"]["scores"], results["stages"]
    reached = [stage["scores"] for stage in stages.values()]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for metric in METRICS:
        shares = [100 * scores[metric][0] / teacher[metric][0] for scores in reached]
        axes.plot(list(stages), shares, marker="o", label=metric)
    axes.axhline(100, color="black", linewidth=0.8, linestyle=":")
    axes.text(0, 101, "teacher", fontsize=8)
    axes.set(ylabel="percent of the teacher's", xlabel="after stage", ylim=(0, None))
    finish(figure, axes, path)


def draw_ablations(results: Mapping[str, Any], path: Path) -> None:
    """cgF1 and J&F of each row, with intervals, and between which the seeds of the first are."""
    entries = ablation_rows(results)
    metrics = ("cgF1", "J&F")
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.4 * len(entries) + 1.2), layout="constrained")
    for axes, metric in zip(panels, metrics, strict=True):
        of_seeds = [entry["scores"][metric][0] for entry in results["ablation_seeds"].values()]
        axes.axvspan(min(of_seeds), max(of_seeds), color="tab:blue", alpha=0.2)
        for row, (name, entry) in enumerate(entries.items()):
            number, low, high = entry["scores"][metric]
            axes.plot([low, high], [row, row], color="gray")
            axes.plot(number, row, "o", color="tab:blue" if name == BASE.title else "tab:orange")
        names = list(entries) if metric == metrics[0] else ["" for _ in entries]
        axes.set_yticks(range(len(entries)), names)
        axes.invert_yaxis()
        axes.set_xlabel(f"{metric}, percent")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def ablation_rows(results: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of ablations, in their order."""
    known = results.get("ablations", {})
    return {each.title: known[each.title] for each in ABLATIONS if each.title in known}


def finish(figure: Any, axes: Any, path: Path) -> None:
    """Legend, grid and file."""
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
