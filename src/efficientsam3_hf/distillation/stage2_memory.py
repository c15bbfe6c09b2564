"""Stage 2, memory: the student follows objects through clips as its teacher does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from ..models.object_memory import FrameFeatures
from .arguments import DistillationArguments, check_shares
from .clip_prompts import KINDS, MOST_CORRECTIONS
from .family import Family
from .memory_terms import MemoryTerms, check_video, memory_parts
from .teacher_cache import TeacherCache
from .trainer import DistillationTrainer


@dataclass
class MemoryDistillationArguments(DistillationArguments):
    """Arguments of stage 2.

    Args:
        max_objects: Objects of a clip at most, chosen anew in each step.
        prompt_shares: How often an object begins with a point, with a box, and with a mask.
        corrections: Most clicks that an object gets after that, each in a frame of its own where
            the student is wrong; how many is drawn from 0 to this.
        forcing: Whose masks are remembered where the student's own are not: `"teacher"` or
            `"truth"`, the latter in annotated frames only.
        forcing_share: Share of the steps over which the probability of that falls from 1 to 0.
        gradient_frames: Frames at the end of a clip that have gradients and count; None for all.
        scored_prompt: With what objects begin in evaluation: `"point"`, `"box"` or `"mask"`.
    """

    max_objects: int = field(default=3, metadata={"help": "Objects of a clip at most."})
    prompt_shares: list[float] = field(
        default_factory=lambda: [0.25, 0.25, 0.5],
        metadata={"help": f"How often an object begins with each of {', '.join(KINDS)}."},
    )
    corrections: int = field(
        default=2, metadata={"help": "Most clicks on later frames where the student is wrong."}
    )
    forcing: Literal["teacher", "truth"] = field(
        default="teacher", metadata={"help": "Whose masks are remembered at first."}
    )
    forcing_share: float = field(
        default=1 / 3, metadata={"help": "Share of the steps until only own masks are remembered."}
    )
    gradient_frames: int | None = field(
        default=None, metadata={"help": "Frames at the end of a clip that have gradients."}
    )
    scored_prompt: Literal["point", "box", "mask"] = field(
        default="mask", metadata={"help": "With what objects begin in evaluation."}
    )

    def __post_init__(self):
        super().__post_init__()
        shares = self.prompt_shares
        if len(shares) != len(KINDS) or min(shares) < 0 or not sum(shares):
            raise ValueError(f"prompt_shares={shares} must be three numbers, none below 0.")
        if not 0 <= self.corrections <= MOST_CORRECTIONS:
            raise ValueError(f"corrections={self.corrections} is from 0 to {MOST_CORRECTIONS}.")
        check_shares(forcing_share=self.forcing_share)
        if self.max_objects < 1 or (self.gradient_frames is not None and self.gradient_frames < 1):
            raise ValueError("max_objects and gradient_frames are 1 or more.")


class MemoryDistillationTrainer(DistillationTrainer):
    """Trains the memory of a tracker on clips: on its teacher's answers, and on annotations.

    Frames that nobody annotated count for the teacher's terms alone.
    """

    stage = "stage 2: memory"

    args: MemoryDistillationArguments

    def __init__(
        self,
        model: Family,
        args: MemoryDistillationArguments,
        teacher: Any = None,
        cache: TeacherCache | None = None,
        **kwargs: Any,
    ):
        check_video("student", model)
        if teacher is None:
            args.forcing = "truth"
        else:
            check_video("teacher", teacher)
        self.memory = MemoryTerms(self, cache=cache)
        self.units, self.weights = self.memory.units, self.memory.weights
        self.trained_parts = memory_parts(model)
        super().__init__(model, args, teacher, cache=cache, **kwargs)

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """Clips, and objects in frames that count for something."""
        return self.memory.count(inputs)

    def teacher_step(self, inputs: Mapping[str, Any]) -> list[FrameFeatures] | None:
        """What the teacher sees in each frame. What it answers depends on corrections."""
        return self.memory.teacher_step(inputs)

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: list[FrameFeatures] | None
    ) -> dict[str, Tensor]:
        """Loss terms of the objects of a batch, frame by frame."""
        return self.memory.student_step(student, inputs, targets)

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: list[FrameFeatures] | None
    ) -> list[dict[str, float]]:
        """J and F of each object, given where it is first seen; the teacher's beside them."""
        return self.memory.score(student, inputs, targets)

    def summarize(self, records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """J, F and J&F of student and teacher."""
        return self.memory.summarize(records)

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Frames of each clip, above with the teacher's masks, below with the student's."""
        return self.memory.draw(student, batch)
