"""All numbers of the miniature, in one file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from efficientsam3_hf.benchmarks.where import best_device, hardware
from efficientsam3_hf.distillation.cache_files import write_json
from efficientsam3_hf.distillation.checkpoints import last_checkpoint

from .measure import cost, measure
from .report import RESULTS
from .state import minutes_of
from .students import ABLATIONS, BASES, MAIN, SEEDS, Student, digest, is_done, stage_minutes

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
    known = {
        "weights": weights,
        "scores": scores,
        "cost": cost(folder),
        "machine": machine(device),
    }
    write_json(file, known)
    return known


def gather(root: Path, device: str) -> dict[str, Any]:
    """Measure everything that is there.

    Returns:
        `teacher`; `stages`, the main student after each; `seeds` and `ablation_seeds`, by seed;
        and `ablations`, by title.
    """

    def measured(students: Iterable[tuple[str, Student]]) -> dict[str, Any]:
        lasts = {name: student.last(root) for name, student in students}
        return {
            name: scores_of(root, folder, device)
            for name, folder in lasts.items()
            if is_done(folder)
        }

    folders = {stage: folder for stage, folder in MAIN.folders(root).items() if is_done(folder)}
    return {
        "split": SPLIT,
        "teacher": {
            **scores_of(root, root / "teacher", device),
            "minutes": teacher_minutes(root),
        },
        "stages": {
            stage: {**scores_of(root, folder, device), "minutes": stage_minutes(folder)}
            for stage, folder in folders.items()
        },
        "seeds": measured((str(each.seed), each) for each in SEEDS),
        "ablations": measured((each.title, each) for each in ABLATIONS),
        "ablation_seeds": measured((str(each.seed), each) for each in BASES),
    }


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


def write_results(root: Path, is_on_cpu: bool = False) -> Path:
    """Measure, and write `results.json` into the folder of the miniature."""
    found = gather(root, "cpu" if is_on_cpu else best_device())
    write_json(root / RESULTS.name, found)
    return root / RESULTS.name
