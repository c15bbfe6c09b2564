"""What a teacher says of pictures and phrases, as annotations that a student learns from.

Of each pair of picture and phrase it says one of three things:

* present: detections score above `confidence`; these are the instances.
* absent: nothing scores above `absent`, neither in the picture nor in its mirror image.
* doubtful: all that lies between. Such a pair is neither a positive nor a negative.

Labels are kept picture by picture, each in a file that is there whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import zoo
from ..benchmarks.image_tasks import promptable
from ..data.broken import DAMAGE
from ..data.collators import PhraseCollator
from ..data.masks_rle import Rle, rle_area, to_rle
from ..data.own_folder import OwnImages, phrases_for
from ..data.saco import write_saco
from ..data.samples import ImageSample, Instance, Query
from ..evaluation.overlaps import mask_overlaps
from ..models.score_calibration import calibrate_scores
from .cache_files import write_json
from .prompted_heads import scores_of
from .stage1_text import read
from .teacher import Teacher, TeacherModels
from .text_targets import TextTargets

PRESENT, ABSENT, DOUBTFUL = "present", "absent", "doubtful"
SAME_OBJECT = 0.5  # IoU with an instance from which on a weaker detection is of the same thing


@dataclass
class FoundInstance:
    """A detection of the teacher.

    Args:
        box_xyxy: In pixels, within the picture.
        rle: Its mask.
        score: How sure the teacher is.
    """

    box_xyxy: list[float]
    rle: Rle
    score: float


@dataclass
class PhraseLabel:
    """What the teacher says of a phrase in a picture.

    Args:
        phrase: What was asked.
        verdict: `PRESENT`, `ABSENT` or `DOUBTFUL`.
        score: Highest score in the picture.
        mirror_score: Highest score in its mirror image; None where that was not asked.
        instances: Of a phrase that is present.
        is_exhaustive: False if there may be more instances: detections of other things that score
            between the two thresholds.
    """

    phrase: str
    verdict: str
    score: float
    mirror_score: float | None = None
    instances: list[FoundInstance] = field(default_factory=list)
    is_exhaustive: bool = True


@dataclass
class PictureLabels:
    """All labels of a picture.

    Args:
        name: Its path in the folder.
        stamp: Bytes and time of change of its file, by which another picture is told.
        size: (height, width), upright.
        phrases: A label for each.
        error: Why it could not be read; empty if it could.
    """

    name: str
    stamp: list[int]
    size: list[int] = field(default_factory=list)
    phrases: list[PhraseLabel] = field(default_factory=list)
    error: str = ""

    @classmethod
    def load(cls, path: Path) -> "PictureLabels":
        """Those of a file that `LabelFolder` wrote."""
        entry = json.loads(path.read_text(encoding="utf-8"))
        phrases = [
            PhraseLabel(
                **{**each, "instances": [FoundInstance(**found) for found in each["instances"]]}
            )
            for each in entry.pop("phrases")
        ]
        return cls(**entry, phrases=phrases)

    @property
    def is_usable(self) -> bool:
        """Whether anything can be learned from it."""
        return any(label.verdict != DOUBTFUL for label in self.phrases)

    def sample(self) -> ImageSample:
        """The same as annotations. Of a doubtful phrase it is not known what it names."""
        queries = []
        for label in self.phrases:
            instances = [
                Instance(
                    tuple(found.box_xyxy),  # pyright: ignore[reportArgumentType]  four numbers
                    found.rle,
                    details={"source": "teacher", "score": round(found.score, 6)},
                )
                for found in label.instances
            ]
            known = label.verdict != DOUBTFUL and label.is_exhaustive
            queries.append(Query(label.phrase, instances, is_exhaustive=known))
        height, width = self.size
        return ImageSample("own", self.name, self.name, (height, width), queries)


class Labeller:
    """Asks a teacher of phrases in pictures.

    Args:
        teacher: On its device; its scores as its own configuration calibrates them.
        phrases: All that will be asked of any picture: each is read once.
        confidence: Score above which a detection is an instance.
        absent: Score that no detection of a phrase may exceed, if the phrase is to be absent.
        prompts_at_once: Phrases that go through the detector together.
    """

    def __init__(
        self,
        teacher: Teacher,
        phrases: Iterable[str],
        confidence: float = 0.5,
        absent: float = 0.1,
        prompts_at_once: int = 16,
    ):
        if teacher.detector is None:
            raise ValueError(f"{teacher.name} is a tracker alone: give a SAM 3 with its detector.")
        self.teacher, self.prompts_at_once = teacher, prompts_at_once
        self.confidence, self.absent = confidence, absent
        self.processor = zoo.processor(teacher.detector.config)
        self.collate = PhraseCollator(self.processor, shuffle=False)
        self.texts = TextTargets(self.teach, self.collate.encode, phrases, dtype=teacher.dtype)

    def teach(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The teacher's token features of phrases."""
        device = self.teacher.device
        return self.teacher(read, input_ids.to(device), attention_mask.to(device))

    def label(self, pixels: np.ndarray, phrases: Sequence[str]) -> list[PhraseLabel]:
        """Labels of phrases in a picture (height, width, 3)."""
        inputs = self.processor.image_processor(pixels, return_tensors="pt")["pixel_values"]
        both = torch.cat([inputs, inputs.flip(-1)]).to(self.teacher.device, self.teacher.dtype)
        seen = self.teacher.see(both)
        height, width = pixels.shape[:2]
        labels = []
        for outputs, some in self.ask(seen, phrases, image=0):
            labels += self.read(outputs, some, (height, width))
        candidates = [label for label in labels if label.verdict == ABSENT]
        asked = [label.phrase for label in candidates]
        highest = [
            score
            for outputs, _ in self.ask(seen, asked, image=1)
            for score in self.scores(outputs).amax(dim=1).tolist()
        ]
        for label, score in zip(candidates, highest, strict=True):
            label.mirror_score = score
            if score > self.absent:
                label.verdict = DOUBTFUL
        return labels

    def ask(
        self, seen: Any, phrases: Sequence[str], image: int
    ) -> Iterator[tuple[Any, Sequence[str]]]:
        """The detector's answers to phrases about one of the seen images, some at a time."""
        for start in range(0, len(phrases), self.prompts_at_once):
            some = phrases[start : start + self.prompts_at_once]
            batch = self.collate.encode(list(some))
            valid = batch["attention_mask"].to(self.teacher.device)
            text = self.texts(batch["keys"], valid.shape[1]).to(self.teacher.device)
            indices = torch.full((len(some),), image, device=self.teacher.device)
            yield self.teacher(detect, seen, text, valid, indices), some

    def read(
        self, outputs: Any, phrases: Sequence[str], size: tuple[int, int]
    ) -> list[PhraseLabel]:
        """What answers say, before any mirror image was looked at."""
        found = self.processor.post_process_instance_segmentation(
            outputs, threshold=self.absent, target_sizes=[size] * len(phrases)
        )
        labels = []
        for phrase, scores, each in zip(phrases, self.scores(outputs), found, strict=True):
            label = PhraseLabel(phrase, ABSENT, float(scores.max()))
            label.instances, doubts = self.sort_out(each, size)
            label.is_exhaustive = not doubts
            if label.instances:
                label.verdict = PRESENT
            elif label.score > self.absent:
                label.verdict = DOUBTFUL
            labels.append(label)
        return labels

    def scores(self, outputs: Any) -> Tensor:
        """(phrases, queries), calibrated."""
        own = self.processor.image_processor
        return calibrate_scores(scores_of(outputs), own.score_temperature, own.score_bias)

    def sort_out(
        self, found: dict[str, Tensor], size: tuple[int, int]
    ) -> tuple[list[FoundInstance], int]:
        """Instances, best first, and how many weaker detections are of something else."""
        order = found["scores"].float().argsort(descending=True, stable=True).cpu()
        masks = found["masks"].cpu().numpy()
        instances: list[FoundInstance] = []
        weak: list[Rle] = []
        for index in order.tolist():
            rle, score = to_rle(masks[index], size), float(found["scores"][index])
            if not rle_area(rle):
                continue
            if score > self.confidence:
                box = promptable(found["boxes"][index].float().tolist(), size)
                instances.append(FoundInstance(list(box), rle, score))
            else:
                weak.append(rle)
        if not weak or not instances:
            return instances, len(weak)
        overlaps = mask_overlaps(weak, [each.rle for each in instances])
        return instances, int((overlaps.max(axis=1) < SAME_OBJECT).sum())


def detect(models: TeacherModels, seen: Any, text: Tensor, valid: Tensor, indices: Tensor) -> Any:
    """The concept model's answers to phrases, given what it sees of images."""
    detector: Any = models.detector
    outputs = detector(
        vision_embeds=seen,
        text_embeds=text.to(detector.dtype),
        attention_mask=valid,
        image_indices=indices,
        return_dict=True,
    )
    # So that whoever compares scores with a threshold rounds them alike.
    outputs.pred_logits = outputs.pred_logits.float()
    outputs.presence_logits = outputs.presence_logits.float()
    return outputs


class LabelFolder:
    """Labels of pictures on disk.

    Args:
        folder: To keep them in.
        pictures: Where the pictures are, and what is asked of each.
    """

    def __init__(self, folder: Path, pictures: OwnImages):
        self.folder, self.pictures = folder, pictures

    def labelled(self, name: str) -> PictureLabels | None:
        """The labels of a picture; None if they are missing, or of other phrases or pixels."""
        path = self.path(name)
        if not path.is_file():
            return None
        labels = PictureLabels.load(path)
        asked = [label.phrase for label in labels.phrases]
        is_same = labels.error or asked == self.phrases_of(name)
        return labels if is_same and labels.stamp == self.stamp(name) else None

    def phrases_of(self, name: str) -> list[str]:
        """What is asked of a picture."""
        return list(dict.fromkeys(phrases_for(self.pictures.phrases, name)))

    def label(self, name: str, labeller: Labeller) -> PictureLabels:
        """Label a picture, and keep what comes of it."""
        labels = self.compute(name, labeller)
        write_json(self.path(name), asdict(labels))
        return labels

    def compute(self, name: str, labeller: Labeller) -> PictureLabels:
        """Labels of a picture; one that cannot be read has none, and says why."""
        labels = PictureLabels(name, self.stamp(name))
        try:
            sample = self.pictures.read({"name": name})
        except DAMAGE as error:
            labels.error = f"{type(error).__name__}: {error}".rstrip(".")
            return labels
        assert sample.image is not None  # the reader reads it
        labels.size = list(sample.size)
        labels.phrases = labeller.label(sample.image, self.phrases_of(name))
        return labels

    def path(self, name: str) -> Path:
        """The file of a picture."""
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16)
        return self.folder / f"{digest.hexdigest()}.json"

    def stamp(self, name: str) -> list[int]:
        """Bytes and time of change of a picture's file."""
        status = Path(self.pictures.folder, name).stat()
        return [status.st_size, status.st_mtime_ns]


def write_part(labels: Iterable[PictureLabels], path: Path) -> dict[str, Any]:
    """Write what can be learned from in SA-Co's form, and say what there is.

    Args:
        labels: Of some pictures.
        path: The JSON file; not written where nothing can be learned.

    Returns:
        How many pairs there are of each verdict, how many pictures are written, how many have
        doubtful pairs alone, and, by name, why others could not be read.
    """
    kinds: tuple[str, ...] = (PRESENT, ABSENT, DOUBTFUL, "instances", "pictures", "left out")
    counts: dict[str, int] = dict.fromkeys(kinds, 0)
    broken, samples = {}, []
    number = 0
    for each in labels:
        if each.error:
            broken[each.name] = each.error
            continue
        for label in each.phrases:
            counts[label.verdict] += 1
            counts["instances"] += len(label.instances)
        if not each.is_usable:
            counts["left out"] += 1
            continue
        sample = each.sample()
        for query in sample.queries:
            query.source_id = number
            number += 1
        samples.append(sample)
    counts["pictures"] = len(samples)
    path.unlink(missing_ok=True)
    if samples:
        temporary = path.with_name(f"{path.name}.part")
        write_saco(samples, temporary, path.parent)  # no pictures: they stay where they are
        os.replace(temporary, path)
    return {**counts, "broken": broken}
