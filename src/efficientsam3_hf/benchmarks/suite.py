"""Everything that fits in minutes: each task that the model can do and the data has something for.

Without data it is the synthetic world, whose files are written first, by the writers of `data`.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.phrases import write_phrases
from ..data.synthetic import Scenes
from ..data.synthetic_writer import write_synthetic
from .feature_tasks import FeatureTask, TextTask
from .image_tasks import BoxTask, ClickTask, ConceptTask, DetectionTask
from .loading import can_do
from .speed_task import SpeedTask
from .subsets import FINDERS, Subset, find_subsets
from .tasks import Task
from .video_tasks import ConceptVideoTask, VosTask

TASKS: dict[str, type[Task]] = {
    each.name: each
    for each in (
        BoxTask,
        ClickTask,
        ConceptTask,
        DetectionTask,
        VosTask,
        ConceptVideoTask,
        TextTask,
        FeatureTask,
        SpeedTask,
    )
}

# Images, or videos, of each task: enough to see a change, few enough for minutes.
LIMITS = {"vos": 3, "concept-video": 3, "text": 1000, "speed": 20}
LIMIT = 50
QUICK_CLICKS = 3

SYNTHETIC_IMAGES = 16
SYNTHETIC_CLIPS = 2
SYNTHETIC_FRAMES = 8


@dataclass
class Planned:
    """A task of the suite, or why it is left out."""

    task: Task | None
    subsets: list[Subset]
    reason: str = ""


def plan(
    model: str,
    data: Path,
    teacher: str | None,
    limit: int | None,
    options: dict[str, Any],
    split: str | None = None,
) -> dict[str, Planned]:
    """What to run on a model: by name of the task.

    Args:
        model: Folder or Hub name.
        data: Folder of a dataset, or of folders of datasets.
        teacher: For features; None leaves them out.
        limit: Images and videos of each task; None for `LIMITS`.
        options: Of all tasks that have them.
        split: Of the data.
    """
    planned = {}
    for name, kind in TASKS.items():
        jobs = ["concepts", "objects"] if name == "speed" else [kind.job]
        if not any(can_do(model, job) for job in jobs):
            planned[name] = Planned(None, [], f"the model cannot do {kind.job!r}")
        elif kind.needs_teacher and teacher is None:
            planned[name] = Planned(None, [], "no --teacher is given")
        elif not (subsets := look_around(data, kind.formats, split)):
            planned[name] = Planned(None, [], f"no data in {', '.join(kind.formats)}")
        else:
            known = {
                each: value
                for each, value in options.items()
                if value is not None and each in kind.options
            }
            if kind.needs_teacher:
                known["teacher"] = teacher
            if name == "clicks":
                known.setdefault("clicks", QUICK_CLICKS)
            most = LIMITS.get(name, LIMIT) if limit is None else limit
            planned[name] = Planned(kind(**known), [each.open(most) for each in subsets])
    return planned


def look_around(data: Path, formats: Sequence[str], split: str | None) -> list[Subset]:
    """The first dataset of one of the formats in a folder or one of the folders in it."""
    places = [data, *sorted(each for each in data.iterdir() if each.is_dir())]
    for form in formats:
        for place in places:
            if form == "own" and place == data:
                continue  # any folder with pictures somewhere below it would do
            if FINDERS[form](place, split, None):
                return find_subsets(place, [form], split=split)
    return []


def write_synthetic_world(folder: Path) -> Path:
    """Scenes and clips in the formats of the tasks; written once, whole or not at all."""
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    for form in ("coco", "saco"):
        write_synthetic(unfinished / form, form, split="test", count=SYNTHETIC_IMAGES)
    for form in ("davis2017", "saco_video"):
        write_synthetic(
            unfinished / form,
            form,
            split="test",
            count=SYNTHETIC_CLIPS,
            num_frames=SYNTHETIC_FRAMES,
        )
    scenes = Scenes(SYNTHETIC_IMAGES, split="test")
    phrases = [
        query.phrase
        for scene in map(scenes.__getitem__, range(SYNTHETIC_IMAGES))
        for query in scene.queries
    ]
    (unfinished / "text").mkdir()
    write_phrases([phrase for phrase in phrases if phrase], unfinished / "text" / "phrases.txt")
    unfinished.rename(folder)
    return folder
