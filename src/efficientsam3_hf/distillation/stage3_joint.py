"""Stage 3 on images and clips: concepts and memory learn together, on one trunk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from .arguments import option
from .family import Family
from .memory_terms import MemoryTerms, check_video, memory_parts
from .stage2_memory import MemoryDistillationArguments
from .stage3_concepts import ConceptTrainer, ConceptTrainingArguments
from .teacher_cache import TeacherCache


@dataclass
class JointTrainingArguments(ConceptTrainingArguments, MemoryDistillationArguments):
    """Arguments of stage 3 on images and clips: those of stage 3 and those of stage 2.

    A sample is `images_per_clip` images and a clip, so a batch has of both, always as many.

    Args:
        images_per_clip: Images that come with each clip.
        clip_weight: Factor of all terms of clips.
    """

    images_per_clip: int = option(4, "Images that come with each clip.")
    clip_weight: float = option(1.0, "Factor of all terms of clips.")


class JointTrainer(ConceptTrainer):
    """Trains on images as stage 3 does and on clips as stage 2 does, in each step on both.

    Batches are as `ImagesWithClipsCollator` makes them. What is of clips has `clip_` before its
    name. Datasets to evaluate on are of images or of clips.

    Args:
        model: The student, with a tracker in video.
        args: Of the stage.
        teacher: With a tracker in video.
        clip_cache: `TeacherCache` of clips; `cache` is that of images.
        **kwargs: As for every stage.
    """

    stage = "stage 3: concepts and memory"

    args: JointTrainingArguments

    def __init__(
        self,
        model: Family,
        args: JointTrainingArguments,
        teacher: Any = None,
        clip_cache: TeacherCache | None = None,
        **kwargs: Any,
    ):
        check_video("student", model)
        check_video("teacher", teacher)
        self.memory = MemoryTerms(self, "clip_", clip_cache)
        # The tracker's neck, too, as the trunk moves under it.
        self.trained_parts = (*self.trained_parts, "tracker_neck", *memory_parts(model))
        super().__init__(model, args, teacher, **kwargs)

    def terms(
        self, model: Family, args: JointTrainingArguments
    ) -> tuple[dict[str, str], dict[str, float]]:
        """Those of both."""
        units, weights = super().terms(model, args)
        of_clips = {name: args.clip_weight * each for name, each in self.memory.weights.items()}
        return units | self.memory.units, weights | of_clips

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """What stage 3 counts of images, and stage 2 of clips."""
        counts = {}
        if "images" in inputs:
            counts |= super().count(inputs["images"])
        if "clips" in inputs:
            counts |= self.memory.count(inputs["clips"])
        return counts

    def teacher_step(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the teacher makes of images, and sees in clips."""
        targets = {}
        if "images" in inputs:
            targets["images"] = super().teacher_step(inputs["images"])
        if "clips" in inputs:
            targets["clips"] = self.memory.teacher_step(inputs["clips"])
        return targets

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The terms of both."""
        terms = {}
        if "images" in inputs:
            terms |= super().student_step(student, inputs["images"], targets["images"])
        if "clips" in inputs:
            terms |= self.memory.student_step(student, inputs["clips"], targets["clips"])
        return terms

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """What was found of each phrase, and J and F of each object."""
        records = []
        if "images" in inputs:
            records += super().score(student, inputs["images"], targets["images"])
        if "clips" in inputs:
            records += self.memory.score(student, inputs["clips"], targets["clips"])
        return records

    def summarize(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """cgF1 of images, J&F of clips."""
        of_clips = [record for record in records if "J" in record]
        of_images = [record for record in records if "J" not in record]
        return {
            **(super().summarize(of_images) if of_images else {}),
            **(self.memory.summarize(of_clips) if of_clips else {}),
        }

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Pictures of both."""
        pictures = {}
        if "images" in batch:
            pictures |= super().draw(student, batch["images"])
        if "clips" in batch:
            pictures |= self.memory.draw(student, batch["clips"])
        return pictures
