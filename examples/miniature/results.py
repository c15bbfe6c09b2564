"""All numbers of the miniature, in one file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficientsam3_hf.distillation.cache_files import write_json

from .measure import METRICS, cost, measure
from .report import RESULTS, read_results
from .students import ABLATIONS, MAIN, SEEDS, Student, minutes_of

SPLIT = "test"  # that nothing was trained on or chosen by


def scores_of(root: Path, folder: Path) -> dict[str, Any]:
    """What a model reaches, and what it costs; measured once.

    Args:
        root: Of the miniature.
        folder: Of the model, somewhere in it.
    """
    place = root / "scores" / folder.relative_to(root)
    file = place / "scores.json"
    if not file.is_file():
        scores = measure(folder, root / "data", SPLIT, place)
        write_json(file, {"scores": scores, "cost": cost(folder)})
    return json.loads(file.read_text(encoding="utf-8"))


def gather(root: Path, seeds: Sequence[Student], ablations: Sequence[Student]) -> dict[str, Any]:
    """Measure everything that is there.

    Returns:
        `teacher`; `stages`, the student after each; `student`, its last; `seeds`, for each metric
        the numbers of all; `ablations`, by title; and `reported`, the numbers of tables, by model.
    """
    teacher = scores_of(root, root / "teacher")
    stages = {
        stage: {**scores_of(root, folder), "minutes": minutes_of(folder)}
        for stage, folder in MAIN.folders(root).items()
    }
    student = stages[MAIN.route[-1]]
    of_seeds = [scores_of(root, each.last(root))["scores"] for each in seeds]
    return {
        "split": SPLIT,
        "teacher": teacher,
        "stages": stages,
        "student": student,
        "seeds": {name: [each[name][0] for each in of_seeds] for name in METRICS},
        "ablations": {each.title: scores_of(root, each.last(root)) for each in ablations},
        "reported": {
            "teacher": table_row(teacher),
            "student": table_row(student),
        },
    }


def table_row(entry: dict[str, Any]) -> dict[str, float]:
    """The numbers of a model that a reader wants first, in percent."""
    return {name: round(value, 1) for name, (value, _, _) in entry["scores"].items()}


def write_results(root: Path, with_seeds: bool, with_ablations: bool) -> Path:
    """Measure and write `results.json`; what else it holds, of the shipped student, is kept."""
    seeds = SEEDS if with_seeds else SEEDS[:1]
    gathered = gather(root, seeds, ABLATIONS if with_ablations else ())
    write_json(RESULTS, {**read_results(RESULTS), **gathered})
    return RESULTS
