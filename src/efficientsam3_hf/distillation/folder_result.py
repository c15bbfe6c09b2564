"""The end of distilling on a folder: a student calibrated, evaluated, written with its card."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import zoo
from ..benchmarks.image_tasks import ConceptTask
from ..benchmarks.running import Run as EvaluationRun
from ..benchmarks.running import run_task
from ..benchmarks.subsets import Subset
from ..data.collators import ImageCollator
from ..data.loading import Samples
from ..data.saco import SacoImages
from ..evaluation.report import write_hub_record
from ..hub.model_card import write_model_card
from ..hub.results import RESULTS_FILE, read_training, write_training
from .calibration import calibrate
from .family import Family
from .folder_stages import Show
from .in_batches import in_batches

PROMPTS_AT_ONCE = 16


@dataclass
class FolderResult:
    """What came of a folder.

    Args:
        folder: Of the student.
        labels: For each part, what `write_part` says of it.
        stages: Name -> steps.
        calibration: What was found; None where it was not possible.
        measurements: The student compared with the teacher's labels.
        remarks: What the reader should know.
    """

    folder: str
    labels: dict[str, Any]
    stages: dict[str, int]
    calibration: dict[str, Any] | None = None
    measurements: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def broken(self) -> dict[str, str]:
        """Why pictures could not be read, by name."""
        return {name: why for part in self.labels.values() for name, why in part["broken"].items()}

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def write_student(source: Path, output: Path, samples: Samples | None, device: torch.device) -> Any:
    """Calibrate a student and write it with the records of its training.

    Args:
        source: Folder of the last stage.
        output: Where to.
        samples: Pictures to calibrate on; None if there are none.
        device: To compute on.

    Returns:
        The calibration, and why there is none if there is none.
    """
    student = Family.load(source).to(device)
    found, reason = None, "no picture held out for it has labels"
    if samples is not None:
        try:
            found = calibrate(student, batches_of(samples, student))
        except ValueError as error:  # a student that is always right, or never
            reason = str(error)
    student.save(output)
    (output / RESULTS_FILE).unlink(missing_ok=True)  # of a student that was here before
    write_training(read_training(source), output)
    return found, reason


def batches_of(samples: Samples, student: Family) -> Iterator[Mapping[str, Any]]:
    """Prompts of one picture after another of which it is known what they name, some at a time."""
    collate = ImageCollator(zoo.processor(student.configuration))
    for sample in samples:
        known = [query for query in sample.queries if query.is_exhaustive]
        for some in in_batches(known, PROMPTS_AT_ONCE):
            yield collate([replace(sample, queries=some)])


def evaluate_student(
    output: Path,
    annotations: Path,
    images: str,
    dataset: str,
    run: Mapping[str, Any],
    show: Show,
) -> list[Any]:
    """Numbers of a student by the teacher's labels as truth. All processes take part.

    Args:
        output: Folder of the student, which gets the numbers and a card with them.
        annotations: The labels.
        images: Folder of the pictures.
        dataset: What to call them.
        run: Of `benchmarks.running.Run`: folder for predictions, device and the like.
        show: Counts batches.
    """
    reader = SacoImages(str(annotations), images, upright=True)
    subset = Subset(dataset, "held-out", "saco", reader, [annotations]).open(None)
    place = EvaluationRun(str(output), restart=True, **run)
    result = run_task(ConceptTask(), [subset], place, lambda count: show("evaluation", count))
    if result is None:  # the first process has it
        return []
    if result.headline:
        write_hub_record(result.headline, output)
    shutil.rmtree(result.folder / "parts")
    write_model_card(output)
    return result.headline
