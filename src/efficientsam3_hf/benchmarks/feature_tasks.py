"""Tasks that hold a student's features against those of its teacher: phrases, images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.phrases import TextSample
from ..data.samples import ImageSample
from ..evaluation import features, units
from .images import encode_levels, encode_phrases, pixels_of
from .loading import Loaded, fingerprint, load
from .subsets import Subset
from .tasks import Outcome, Task


@dataclass
class Pair:
    """A student and its teacher."""

    student: Loaded
    teacher: Loaded


class TeacherTask(Task):
    """A task that needs a teacher beside the model.

    Args:
        teacher: Folder or Hub name.
    """

    kind = "feature-extraction"
    options = ("batch_size", "teacher")
    scale = 1.0
    decimals = 4
    needs_teacher = True
    teacher: str = ""

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "teacher": self.teacher,
            "weights of the teacher": fingerprint(self.teacher),
        }

    def load(self, model: str, device: str, dtype: str) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Pair(super().load(model, device, dtype), load(self.teacher, self.job, device, dtype))

    def summarize(self, table: units.Units, weights: np.ndarray) -> Mapping[str, float]:
        return features.summarize(table, weights)


class TextTask(TeacherTask):
    """Cosine of student and teacher over the tokens of phrases."""

    name = "text"
    formats = ("phrases",)
    metrics = ("cosine", "relative_error")
    batch_size = 64

    def run(
        self,
        loaded: Pair,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[TextSample],
        folder: Path,
    ) -> list[Outcome]:
        texts = [sample.text for sample in samples]
        ours, valid = encode_phrases(loaded.student, texts)
        theirs, _ = encode_phrases(loaded.teacher, texts)
        length = min(ours.shape[1], theirs.shape[1])
        return [
            Outcome(
                key,
                [
                    features.score_tokens(
                        ours[row, :length], theirs[row, :length], valid[row, :length]
                    )
                ],
            )
            for row, key in enumerate(keys)
        ]


class FeatureTask(TeacherTask):
    """Cosine of student and teacher over the maps that the detector reads, level by level."""

    name = "features"
    formats = ("coco", "lvis", "roboflow", "saco", "sa1b", "own")
    metrics = ("fine/cosine", "middle/cosine", "coarse/cosine")
    batch_size = 4

    def run(
        self,
        loaded: Pair,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[ImageSample],
        folder: Path,
    ) -> list[Outcome]:
        images = pixels_of(samples)
        pairs = zip(
            encode_levels(loaded.student, images),
            encode_levels(loaded.teacher, images),
            strict=True,
        )
        return [
            Outcome(key, [features.score_maps(ours, theirs)])
            for key, (ours, theirs) in zip(keys, pairs, strict=True)
        ]
