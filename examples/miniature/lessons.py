"""How the teacher learns: first what is where, then phrases, by SAM 3's own objective."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from efficientsam3_hf.distillation.exemplars import without_words
from efficientsam3_hf.distillation.family import Family
from efficientsam3_hf.distillation.stage3_concepts import (
    ConceptTrainer,
    ConceptTrainingArguments,
)

from .timekeeper import PastMixin
from .world import ATTRIBUTES, NUM_SHAPES

NUM_WORDS = len(ATTRIBUTES)
# The channels of the maps that say it: words, then the box. Which ones makes no difference, as
# the neck ends in a linear layer.
WORD_CHANNELS = slice(0, NUM_WORDS)
BOX_CHANNELS = slice(NUM_WORDS, NUM_WORDS + 4)
BOX_SCALE = 4.0
# The channel of the DETR encoder's tokens that says whether they are of what the phrase names.
NAMED_CHANNEL = NUM_WORDS + 4
WHERE = ("words", "kinds", "places", "named")
MEMORY = 0.98  # share of the old in the running error


@dataclass
class LessonArguments(ConceptTrainingArguments):
    """Arguments of the teacher's training.

    Args:
        warm_up: Most steps in which the vision encoder alone learns what is where.
        enough: Error of kinds, a running mean, at which that ends.
        naming: Steps after these in which it and the DETR encoder learn what phrases name.
        where_weight: Weight of both once the detector learns, in units of their weight before.
        exemplars_every: Of so many steps of the detector, one is of exemplar boxes, in place of
            `exemplar_share`; 0 for none.
    """

    warm_up: int = field(default=0, metadata={"help": "Most steps of the vision encoder alone."})
    enough: float = field(default=0.5, metadata={"help": "Error of kinds at which that ends."})
    naming: int = field(default=0, metadata={"help": "Then, of the two encoders alone."})
    where_weight: float = field(default=1.0, metadata={"help": "Of what is where, afterwards."})
    exemplars_every: int = field(default=0, metadata={"help": "Steps from one with boxes on."})

    exemplar_share: float = 0.0


class LessonTrainer(PastMixin, ConceptTrainer):
    """Stage 3 without a teacher, with words and boxes for each place of the maps beside it."""

    stage = "miniature teacher"
    trained_parts = ("detector",)

    args: LessonArguments

    def __init__(self, model: Family, args: LessonArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        own = dict.fromkeys(("words", "kinds", "places"), "samples") | {"named": "prompts"}
        self.units = {**self.units, **own}
        self.factors |= {"words": 20.0, "kinds": 4.0, "places": 10.0, "named": 20.0}
        self.lesson, self.began = 0, 0  # which of the three, and the step it began with
        self.unsure = 4.0  # the running error of kinds, at first more than that of guessing
        self.add_callback(Curriculum(self))

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Any
    ) -> dict[str, Tensor]:
        """What is where, and once the warm-up is over, the objective's terms."""
        if "words" not in inputs:  # nor is it known in evaluation
            return super().student_step(student, inputs, targets)
        seen = student.see(inputs["pixel_values"])
        terms = where_terms(seen.fpn_hidden_states[:3], inputs["words"], inputs["boxes"])
        if self.lesson == 0:
            return terms
        detector, inputs = student.detector, self.ask(inputs)
        text = detector.get_text_features(
            inputs["input_ids"], inputs["attention_mask"], return_dict=True
        )
        if self.lesson == 1:
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
                input_boxes=inputs.get("input_boxes"),
                image_indices=inputs["image_indices"],
                labels=inputs["labels"],
                loss_counts={"boxes": 1, "prompts": 1},
                return_dict=True,
            )
        terms["named"] = named_loss(encoder.output.last_hidden_state, inputs["labels"])
        return {**answers.loss_dict, **terms}

    def ask(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Phrases, or in some steps those that name something, each with a box of what it names.

        Where the phrase says both colour and shape, the box does alone: it shows no less.
        """
        every = self.args.exemplars_every
        rows = [row for row, label in enumerate(inputs["labels"]) if len(label["boxes"])]
        if "words" not in inputs or self.lesson < 2 or not every or self.steps % every:
            return inputs
        labels = [inputs["labels"][row] for row in rows]
        phrases = [label["phrase"].split() for label in labels]
        says_all = torch.tensor([len(words) > 1 and words[-1] != "object" for words in phrases])
        ids = inputs["input_ids"][rows]
        tokens = ids, inputs["attention_mask"][rows]
        ids, mask = without_words(tokens, ~says_all, self.visual)
        return {
            **inputs,
            "input_ids": ids,
            "attention_mask": mask,
            "input_boxes": torch.stack([label["boxes"][:1] for label in labels]).to(ids.device),
            "image_indices": inputs["image_indices"][rows],
            "labels": labels,
        }

    def balance(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Once the detector learns, more weight for what the encoders have learned before."""
        if "class" not in terms:
            return terms
        weight = self.args.where_weight
        return {name: term * weight if name in WHERE else term for name, term in terms.items()}

    def note(self, terms: Mapping[str, Tensor]) -> None:
        """Keep the running error of kinds, too."""
        super().note(terms)
        if "kinds" in terms:
            self.unsure = MEMORY * self.unsure + (1 - MEMORY) * float(terms["kinds"].detach())

    def extra_state(self) -> dict[str, float]:
        """With the place in the curriculum."""
        place = {"lesson": self.lesson, "began": self.began, "unsure": self.unsure}
        return {**super().extra_state(), **place}

    def load_extra_state(self, state: Mapping[str, float]) -> None:
        """Go on there."""
        super().load_extra_state(state)
        self.lesson, self.began = int(state["lesson"]), int(state["began"])
        self.unsure = state["unsure"]


class Curriculum(TrainerCallback):
    """Goes from one lesson to the next."""

    def __init__(self, trainer: LessonTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """See if enough was learned."""
        trainer, passed = self.trainer, self.trainer.steps - self.trainer.began
        is_sure = trainer.unsure < args.enough or passed >= args.warm_up
        if (trainer.lesson == 0 and is_sure) or (trainer.lesson == 1 and passed >= args.naming):
            trainer.lesson, trainer.began = trainer.lesson + 1, trainer.steps


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
    """Sums over images of the errors of words, kinds and boxes, the mean over levels and places.

    That of words is about each of them for itself, in all places; that of kinds about which shape
    and which colour, where there is a thing.

    Args:
        levels: Maps (images, channels, height, width), finest first.
        words: (images, words, height, width) of the finest, 1 where a pixel is of such a thing.
        boxes: (images, 4, height, width) of the thing there.
    """
    terms = {name: levels[0].new_zeros(()) for name in ("words", "kinds", "places")}
    is_thing = words.amax(dim=1, keepdim=True)
    for level in levels:
        size = level.shape[-2:]
        step = words.shape[-1] // size[-1]
        share = F.adaptive_avg_pool2d(words, (size[0], size[1]))
        entropy = F.binary_cross_entropy_with_logits(
            level[:, WORD_CHANNELS].float(), share, reduction="none"
        )
        terms["words"] += entropy.mean(dim=(1, 2, 3)).sum() / len(levels)
        middle = slice(step // 2, None, step)
        wanted = BOX_SCALE * (boxes[..., middle, middle] - boxes.new_tensor(0.5))
        error = F.smooth_l1_loss(level[:, BOX_CHANNELS].float(), wanted, reduction="none", beta=0.2)
        counted = is_thing[..., middle, middle]
        counts = counted.sum(dim=(1, 2, 3)).clamp(min=1)
        said, true = level[:, WORD_CHANNELS].float(), words[..., middle, middle]
        for kind in (slice(0, NUM_SHAPES), slice(NUM_SHAPES, NUM_WORDS)):
            unsure = F.cross_entropy(said[:, kind], true[:, kind].argmax(dim=1), reduction="none")
            total = (unsure * counted[:, 0]).sum(dim=(1, 2))
            terms["kinds"] += (total / counts).sum() / len(levels)
        total = (error * counted).mean(dim=1).sum(dim=(1, 2))
        terms["places"] += (total / counts).sum() / len(levels)
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
