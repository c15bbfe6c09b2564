"""What a task is: how samples are put to a model, and how its answers become numbers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation import units
from .loading import Loaded, load
from .subsets import Subset


@dataclass
class Outcome:
    """What came of one image, video or phrase; kept as JSON.

    Args:
        key: Its name in the dataset.
        records: Counts of each unit in it, for a `summarize` of `evaluation`.
        predictions: In the form in which they are submitted; none where files are written instead.
        was_skipped: It could not be read, and counts for nothing.
    """

    key: str
    records: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    was_skipped: bool = False


@dataclass
class Scores:
    """All outcomes of a subset, ready to be summed up.

    Args:
        summarize: From how often each unit counts to named numbers.
        groups: What each unit belongs to, and is drawn with.
        table: The records of all units, where there are some.
    """

    summarize: Callable[[np.ndarray], Mapping[str, float]]
    groups: list[str]
    table: units.Units | None = None


class Task:
    """One way to measure a model; a task is a subclass.

    Args:
        options: Those named in the class attribute `options`; None leaves the class's own value.
            `batch_size` is how many samples are put to the model at once.
    """

    name = ""
    job = "concepts"  # what the model is loaded for
    formats: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()  # for the table; all others are in the JSON
    kind = ""  # of task, as the Hub names it
    options: tuple[str, ...] = ("batch_size",)  # that a user may choose
    scale = 100.0  # of the numbers: shares in percent
    decimals = 1
    batch_size = 8
    draws = 1000  # of the bootstrap
    needs_teacher = False
    reads_itself = False  # is given functions in place of samples
    submission = ""  # file of the predictions; none where they are folders

    def __init__(self, **options: Any):
        for name, value in options.items():
            if name not in self.options:
                raise TypeError(f"The task {self.name} has no option {name!r}.")
            if value is not None:
                setattr(self, name, value)

    def settings(self) -> dict[str, Any]:
        """What a result depends on, beside model and data."""
        return {"batch_size": self.batch_size}

    def load(self, model: str, device: str, dtype: str) -> Loaded:
        """The model, ready for the job."""
        return load(model, self.job, device, dtype)

    def run(
        self, loaded: Any, subset: Subset, keys: Sequence[str], samples: Sequence[Any], folder: Path
    ) -> list[Outcome]:
        """Put samples to the model and count.

        Args:
            loaded: From `load`.
            subset: That the samples are of.
            keys: Their names.
            samples: Of the reader.
            folder: For predictions that are files.
        """
        raise NotImplementedError

    def can_score(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether there is anything to count: of some test sets little truth is public."""
        return any(outcome.records for outcome in outcomes)

    def summarize(self, table: units.Units, weights: np.ndarray) -> Mapping[str, float]:
        """Numbers out of the records of all units."""
        raise NotImplementedError

    def score(self, subset: Subset, outcomes: Sequence[Outcome]) -> Scores:
        """The outcomes of a subset, ready to be summed up."""
        records = [record for outcome in outcomes for record in outcome.records]
        table = units.stack(records)
        groups = [outcome.key for outcome in outcomes for _ in outcome.records]
        return Scores(partial(self.summarize, table), groups, table)

    def average(self, summaries: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Mean over subsets, each counted alike."""
        return {
            name: float(np.mean([summary[name] for summary in summaries])) for name in summaries[0]
        }

    def write_predictions(
        self, subset: Subset, outcomes: Sequence[Outcome], folder: Path
    ) -> Path | None:
        """Write what official servers and scripts take; gives the file or folder."""
        if not self.submission:
            return None
        predictions = [each for outcome in outcomes for each in outcome.predictions]
        path = folder / self.submission
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(predictions))
        return path
