"""All numbers of the miniature, in one file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from efficientsam3_hf.benchmarks.where import best_device, hardware
from efficientsam3_hf.distillation.cache_files import write_json
from efficientsam3_hf.distillation.checkpoints import last_checkpoint

from .measure import METRICS, cost, measure
from .report import RESULTS
from .state import minutes_of
from .students import ABLATIONS, BASES, MAIN, SEEDS, Student, digest, stage_minutes

SPLIT = "test"  # that nothing was trained on or chosen by


def scores_of(root: Path, folder: Path, device: str) -> dict[str, Any]:
    """What a model reaches, and what it costs; measured once.

    Args:
        root: Of the miniature.
        folder: Of the model, somewhere in it.
        device: Where to measure.
    """
    place = root / "scores" / folder.relative_to(root)
    file = place / "scores.json"
    weights = digest(folder)
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["weights"] == weights:
            return known
    scores = measure(folder, root / "data", SPLIT, place, device=device)
    known = {"weights": weights, "scores": scores, "cost": cost(folder)}
    write_json(file, known)
    return known


def gather(
    root: Path, seeds: Sequence[Student], ablations: Sequence[Student], device: str
) -> dict[str, Any]:
    """Measure everything that is there.

    Returns:
        `teacher`; `stages`, the student after each; `seeds`, for each metric the numbers of all;
        `ablations`, by title, and `ablation_seeds`, as `seeds`, of the first of these. Nothing of
        seeds and ablations where there are none.
    """
    teacher = scores_of(root, root / "teacher", device)
    stages = {
        stage: {**scores_of(root, folder, device), "minutes": stage_minutes(folder)}
        for stage, folder in MAIN.folders(root).items()
    }
    found = {
        "split": SPLIT,
        "machine": machine(device),
        "teacher": {**teacher, "minutes": teacher_minutes(root)},
        "stages": stages,
    }

    def over(students: Sequence[Student]) -> dict[str, list[float]]:
        scores = [scores_of(root, each.last(root), device)["scores"] for each in students]
        return {name: [each[name][0] for each in scores] for name in METRICS}

    if len(seeds) > 1:
        found["seeds"] = over(seeds)
    if ablations:
        found["ablations"] = {
            each.title: scores_of(root, each.last(root), device) for each in ablations
        }
        found["ablation_seeds"] = over(BASES)
    return found


def machine(device: str) -> dict[str, str]:
    """What measured."""
    return {
        "hardware": hardware(torch.device(device)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def teacher_minutes(root: Path) -> float | None:
    """How long its training took; None where it was given."""
    runs = [root / name for name in ("concepts", "long")]  # which counts in those before it
    return sum(map(minutes_of, runs)) if all(map(last_checkpoint, runs)) else None


def write_results(
    root: Path, with_seeds: bool, with_ablations: bool, is_on_cpu: bool = False
) -> Path:
    """Measure, and write `results.json` into the folder of the miniature."""
    device = "cpu" if is_on_cpu else best_device()
    found = gather(root, SEEDS if with_seeds else (), ABLATIONS if with_ablations else (), device)
    write_json(root / RESULTS.name, found)
    return root / RESULTS.name
