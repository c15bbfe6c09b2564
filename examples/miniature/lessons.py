"""How the teacher learns: first what is where, then phrases, by SAM 3's own objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.stage3_concepts import (
    ConceptTrainer,
    ConceptTrainingArguments,
)

from .world import ATTRIBUTES

NUM_WORDS = len(ATTRIBUTES)
# The channels of the maps that say it: words, then the box. Which ones makes no difference, as
# the neck ends in a linear layer.
WORD_CHANNELS = slice(0, NUM_WORDS)
BOX_CHANNELS = slice(NUM_WORDS, NUM_WORDS + 4)
BOX_SCALE = 4.0


@dataclass
class LessonArguments(ConceptTrainingArguments):
    """Arguments of the teacher's training.

    Args:
        warm_up: Steps in which the vision encoder alone learns what is where.
        where_weight: Weight of what is where afterwards, in units of its weight before.
    """

    warm_up: int = field(default=0, metadata={"help": "Steps of the vision encoder alone."})
    where_weight: float = field(default=1.0, metadata={"help": "Of what is where, afterwards."})


class LessonTrainer(ConceptTrainer):
    """Stage 3 without a teacher, with words and boxes for each place of the maps beside it."""

    stage = "miniature teacher"
    trained_parts = ("detector",)

    args: LessonArguments

    def __init__(self, model: Family, args: LessonArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.units = {**self.units, "words": "samples", "places": "samples"}
        self.factors |= {"words": 20.0, "places": 10.0}
        self.minutes = 0.0  # of training, those before a stop included

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Any
    ) -> dict[str, Tensor]:
        """What is where, and once the warm-up is over, the objective's terms."""
        if "words" not in inputs:  # nor is it known in evaluation
            return super().student_step(student, inputs, targets)
        seen = student.see(inputs["pixel_values"])
        terms = where_terms(seen.fpn_hidden_states[:3], inputs["words"], inputs["boxes"])
        if self.state.global_step < self.args.warm_up:
            return terms
        terms = {name: self.args.where_weight * term for name, term in terms.items()}
        answers: Any = student.detector(
            vision_embeds=seen,
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            image_indices=inputs["image_indices"],
            labels=inputs["labels"],
            loss_counts={"boxes": 1, "prompts": 1},
            return_dict=True,
        )
        return {**answers.loss_dict, **terms}

    def extra_state(self) -> dict[str, float]:
        """With the minutes it took."""
        return {**super().extra_state(), "minutes": self.minutes}

    def load_extra_state(self, state: Mapping[str, float]) -> None:
        """Go on counting."""
        super().load_extra_state(state)
        self.minutes = state["minutes"]


def where_terms(levels: Sequence[Tensor], words: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """Sums over images of the errors of words and boxes, the mean over levels and places.

    Args:
        levels: Maps (images, channels, height, width), finest first.
        words: (images, words, height, width) of the finest, 1 where a pixel is of such a thing.
        boxes: (images, 4, height, width) of the thing there.
    """
    terms = {"words": levels[0].new_zeros(()), "places": levels[0].new_zeros(())}
    is_thing = words.amax(dim=1, keepdim=True)
    for level in levels:
        size = level.shape[-2:]
        step = words.shape[-1] // size[-1]
        share = F.adaptive_avg_pool2d(words, size)
        entropy = F.binary_cross_entropy_with_logits(
            level[:, WORD_CHANNELS].float(), share, reduction="none"
        )
        terms["words"] += entropy.mean(dim=(1, 2, 3)).sum() / len(levels)
        middle = slice(step // 2, None, step)
        wanted = BOX_SCALE * (boxes[..., middle, middle] - boxes.new_tensor(0.5))
        error = F.smooth_l1_loss(level[:, BOX_CHANNELS].float(), wanted, reduction="none", beta=0.2)
        counted = is_thing[..., middle, middle]
        total = (error * counted).mean(dim=1).sum(dim=(1, 2))
        terms["places"] += (total / counted.sum(dim=(1, 2, 3)).clamp(min=1)).sum() / len(levels)
    return terms
