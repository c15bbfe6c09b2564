"""How the teacher learns: first what is where, then phrases, by SAM 3's own objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
# The channel of the DETR encoder's tokens that says whether they are of what the phrase names.
NAMED_CHANNEL = NUM_WORDS + 4


@dataclass
class LessonArguments(ConceptTrainingArguments):
    """Arguments of the teacher's training.

    Args:
        warm_up: Steps in which the vision encoder alone learns what is where.
        naming: Steps after these in which it and the DETR encoder learn what phrases name.
        where_weight: Weight of both once the detector learns, in units of their weight before.
    """

    warm_up: int = field(default=0, metadata={"help": "Steps of the vision encoder alone."})
    naming: int = field(default=0, metadata={"help": "Then, of the two encoders alone."})
    where_weight: float = field(default=1.0, metadata={"help": "Of what is where, afterwards."})


class LessonTrainer(ConceptTrainer):
    """Stage 3 without a teacher, with words and boxes for each place of the maps beside it."""

    stage = "miniature teacher"
    trained_parts = ("detector",)

    args: LessonArguments

    def __init__(self, model: Family, args: LessonArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        self.units |= {"words": "samples", "places": "samples", "named": "prompts"}
        self.factors |= {"words": 20.0, "places": 10.0, "named": 20.0}
        # Of training, those before a stop included, and steps of the run that it was started from.
        self.minutes, self.past_steps = 0.0, 0

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Any
    ) -> dict[str, Tensor]:
        """What is where, and once the warm-up is over, the objective's terms."""
        if "words" not in inputs:  # nor is it known in evaluation
            return super().student_step(student, inputs, targets)
        seen = student.see(inputs["pixel_values"])
        terms = where_terms(seen.fpn_hidden_states[:3], inputs["words"], inputs["boxes"])
        if self.steps < self.args.warm_up:
            return terms
        detector = student.detector
        text = detector.get_text_features(
            inputs["input_ids"], inputs["attention_mask"], return_dict=True
        )
        if self.steps < self.args.warm_up + self.args.naming:
            rows = inputs["image_indices"]
            encoded = detector.detr_encoder(
                vision_features=[seen.fpn_hidden_states[2][rows]],
                text_features=text.pooler_output,
                vision_pos_embeds=[seen.fpn_position_encoding[2][rows]],
                text_mask=inputs["attention_mask"].bool(),
            )
            named = named_loss(encoded.last_hidden_state, inputs["labels"])
            return {**terms, "named": named}
        with KeptOutput(detector.detr_encoder) as encoder:
            answers: Any = detector(
                vision_embeds=seen,
                text_embeds=text,
                image_indices=inputs["image_indices"],
                labels=inputs["labels"],
                loss_counts={"boxes": 1, "prompts": 1},
                return_dict=True,
            )
        terms["named"] = named_loss(encoder.output.last_hidden_state, inputs["labels"])
        terms = {name: self.args.where_weight * term for name, term in terms.items()}
        return {**answers.loss_dict, **terms}

    @property
    def steps(self) -> int:
        """Done in all."""
        return self.past_steps + self.state.global_step

    def extra_state(self) -> dict[str, float]:
        """With the minutes and steps that it took."""
        past = {"minutes": self.minutes, "steps": self.steps, "past_steps": self.past_steps}
        return {**super().extra_state(), **past}

    def load_extra_state(self, state: Mapping[str, float]) -> None:
        """Go on counting."""
        super().load_extra_state(state)
        self.minutes, self.past_steps = state["minutes"], int(state["past_steps"])


class KeptOutput:
    """Within it, the last output of a module is kept."""

    def __init__(self, module: nn.Module):
        self.module, self.output = module, None

    def __enter__(self) -> "KeptOutput":
        self.hook = self.module.register_forward_hook(self.keep)
        return self

    def keep(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.output = output

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


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


def named_loss(tokens: Tensor, labels: Sequence[Mapping[str, Any]]) -> Tensor:
    """Sum over prompts of the error of what tokens say of themselves, the mean over tokens.

    Args:
        tokens: Of the DETR encoder (prompts, grid x grid, channels).
        labels: Of the prompts.
    """
    side = round(tokens.shape[1] ** 0.5)
    masks = torch.stack([label["masks"].any(dim=0) for label in labels]).float()
    share = F.adaptive_avg_pool2d(masks[:, None], side).flatten(1)
    said = tokens[..., NAMED_CHANNEL].float()
    return F.binary_cross_entropy_with_logits(said, share, reduction="none").mean(dim=1).sum()
