"""Stage 1+, prompt in the loop: the student's features must lead frozen heads to the same masks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers.models.sam3.modeling_sam3 import (
    Sam3ImageSegmentationOutput,
    Sam3VisionEncoderOutput,
)

from ..models.object_memory import FrameFeatures
from ..models.prompts import VISUAL_PHRASE
from ..tokenizer import build_tokenizer
from .family import Family
from .prompt_losses import (
    CONCEPT_TERMS,
    OBJECT_TERMS,
    concept_losses,
    object_losses,
    pair_answers,
    resized,
)
from .prompt_scores import draw_answers, score_answers
from .prompted_heads import (
    ObjectAnswers,
    ask_concepts,
    ask_objects,
    match_queries,
    scores_of,
)
from .prompts import (
    ConceptPrompts,
    ObjectPrompts,
    choose_concepts,
    choose_objects,
    correct,
    count_concepts,
    count_objects,
    read_objects,
)
from .stage1_image import (
    TARGETS,
    ImageDistillationArguments,
    map_terms,
    target_maps,
)
from .trainer import DistillationTrainer

MATCHES = ("hungarian", "teacher_query")
TEXTS = ("teacher", "student")

Answer = TypeVar("Answer")


@dataclass
class PromptDistillationArguments(ImageDistillationArguments):
    """Arguments of stage 1+; `targets` are those of its feature term.

    Args:
        prompts_per_image: Objects of an image that the tracker's mask decoder is asked for, each by
            itself; 0 for none.
        box_share: How many of them by box; the others by click.
        box_noise: By which the corners of these boxes are moved: standard deviation as a share of
            the side, up to 2 % of the image.
        iterations: Answers of the tracker to a prompt, each but the first after one more click.
        least_disagreement: Pixels of the decoder's masks in which student and teacher must differ
            for such a click.
        concepts_per_image: Phrases of an image that the detector is asked for, or where there are
            no phrases, single exemplar boxes; 0 for none.
        exemplar_share: How many of the phrases come with one of their instances as exemplar.
        confidence: Score from which on a detection of the teacher counts.
        match: `"hungarian"`: detections of the teacher are matched to the student's queries at the
            least cost. `"teacher_query"`: to those of the same number.
        text: Whose text tower reads the phrases for the student's detector.
        temperature: By which logits of masks are divided, the student's and the teacher's.
    """

    prompts_per_image: int = field(default=16, metadata={"help": "Objects asked for in an image."})
    box_share: float = field(default=0.5, metadata={"help": "Share of prompts that are boxes."})
    box_noise: float = field(default=0.1, metadata={"help": "Noise of boxes, in sides."})
    iterations: int = field(default=2, metadata={"help": "Answers to each prompt."})
    least_disagreement: int = field(default=10, metadata={"help": "Pixels worth a click."})
    concepts_per_image: int = field(default=1, metadata={"help": "Phrases or exemplars an image."})
    exemplar_share: float = field(default=0.5, metadata={"help": "Phrases with an exemplar."})
    confidence: float = field(default=0.5, metadata={"help": "Least score of a detection."})
    match: str = field(default="hungarian", metadata={"help": f"One of {', '.join(MATCHES)}."})
    text: str = field(default="teacher", metadata={"help": f"One of {', '.join(TEXTS)}."})
    temperature: float = field(default=1.0, metadata={"help": "Softness of the teacher's masks."})

    def __post_init__(self):
        super().__post_init__()
        for name, choices in (("match", MATCHES), ("text", TEXTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}.")
        if min(self.prompts_per_image, self.concepts_per_image) < 0 or self.iterations < 1:
            raise ValueError(
                f"prompts_per_image={self.prompts_per_image} and concepts_per_image="
                f"{self.concepts_per_image} must not be negative, and iterations="
                f"{self.iterations} not less than 1."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be more than 0.")


@dataclass
class Lesson:
    """What a batch is asked, and all of the teacher that does not depend on the student.

    Args:
        maps: The teacher's, for the feature term.
        objects: Groups of prompts for the tracker.
        features: For the heads of the teacher's tracker.
        concepts: Prompts for the detector.
        text: The teacher's token features of their phrases.
        text_mask: Which of them are valid.
        found: What the teacher's detector answers.
    """

    maps: dict[str, list[Tensor]]
    objects: list[ObjectPrompts] = field(default_factory=list)
    features: FrameFeatures | None = None
    concepts: ConceptPrompts | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    found: Sam3ImageSegmentationOutput | None = None


class PromptDistillationTrainer(DistillationTrainer):
    """Trains the encoder on what heads, frozen and equal in both, make of its features."""

    stage = "stage 1+: prompts"
    trained_parts = ("backbone",)
    units = {
        **{f"{target}_{kind}": "samples" for target in TARGETS for kind in ("error", "angle")},
        **dict.fromkeys(OBJECT_TERMS, "prompts"),
        **dict.fromkeys(CONCEPT_TERMS, "concepts"),
    }
    weights = {
        **dict.fromkeys(units, 1.0),
        **{"mask_bce": 5.0, "mask_dice": 5.0, "mask_focal": 0.0},
        **{"concept_bce": 5.0, "concept_dice": 5.0, "concept_focal": 0.0},
        **{"concept_box": 5.0, "concept_overlap": 2.0},
    }

    args: PromptDistillationArguments

    def __init__(self, model: Family, args: PromptDistillationArguments, **kwargs: Any):
        super().__init__(model, args, **kwargs)
        for name, family in (("student", model), ("teacher", self.teacher)):
            if args.prompts_per_image and family.tracker is None:
                raise ValueError(
                    f"The {name} has no tracker, which boxes and clicks go to: set "
                    "prompts_per_image=0, or give one that has it."
                )
        self.visual: tuple[Tensor, Tensor] | None = None

    # What is asked.

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """Images, prompts of the tracker, prompts of the detector."""
        labels, number = inputs["labels"], len(inputs["pixel_values"])
        objects = read_objects(labels, number)
        most = self.args.concepts_per_image
        return {
            "samples": number,
            "prompts": count_objects(objects, self.args.prompts_per_image),
            "concepts": count_concepts(labels, objects, most, "input_ids" in inputs),
        }

    @property
    def choice(self) -> dict[str, int]:
        """What choices depend on, beside the sample; in evaluation they are always the same."""
        is_training = self.family.training
        return {"seed": self.args.seed, "step": self.state.global_step if is_training else 0}

    def teacher_step(self, inputs: Mapping[str, Any]) -> Lesson:
        """What is asked, and the teacher's part of it that does not depend on the student."""
        args, labels, pixel_values = self.args, inputs["labels"], inputs["pixel_values"]
        teacher, device = self.teacher, pixel_values.device
        seen = teacher.see(pixel_values)
        lesson = Lesson(target_maps(teacher, seen, args.targets))
        objects = read_objects(labels, len(pixel_values))
        if args.prompts_per_image:
            lesson.features = teacher.tracker_features(seen)
            groups = choose_objects(
                objects,
                args.prompts_per_image,
                **self.choice,
                box_share=args.box_share,
                box_noise=args.box_noise,
                corrections=args.iterations - 1,
            )
            lesson.objects = [prompts.to(device) for prompts in groups]
        if args.concepts_per_image:
            lesson.concepts = choose_concepts(
                labels,
                objects,
                args.concepts_per_image,
                **self.choice,
                has_phrases="input_ids" in inputs,
                exemplar_share=args.exemplar_share,
            ).to(device)
            if len(lesson.concepts):
                lesson.text, lesson.text_mask = self.read_phrases(teacher, inputs, lesson.concepts)
                question = lesson.text, lesson.text_mask, lesson.concepts
                lesson.found = ask_concepts(teacher.detector, seen, *question)
        return lesson

    def read_phrases(
        self, family: Any, inputs: Mapping[str, Any], concepts: ConceptPrompts
    ) -> tuple[Tensor, Tensor]:
        """Token features of the phrases of prompts, and which tokens are valid."""
        if "input_ids" in inputs:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            ids, mask = ids[concepts.label], mask[concepts.label]
        else:
            ids, mask = self.visual_phrase(concepts.image.device)
        return family.detector.get_text_features(ids, mask, return_dict=True).pooler_output, mask

    def visual_phrase(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token ids and mask of the phrase that goes with exemplars alone."""
        if self.visual is None:
            config = self.family.configuration
            length = config.text_config.max_position_embeddings
            tokens = build_tokenizer(length, config.words)(VISUAL_PHRASE, return_tensors="pt")
            self.visual = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        return self.visual

    # What the student makes of it.

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Lesson
    ) -> dict[str, Tensor]:
        """Distances of maps, and of what heads make of them."""
        seen = student.see(inputs["pixel_values"])
        valid = inputs.get("valid")
        terms = map_terms(target_maps(student, seen, self.args.targets), targets.maps, valid)
        if targets.features is not None:
            terms |= self.object_terms(student, seen, targets.features, targets.objects, valid)
        if targets.concepts is not None:
            terms |= self.concept_terms(student, seen, inputs, targets)
        return terms

    def answered(self, ask: Callable[..., Answer], *question: Any) -> Answer:
        """An answer of the student; with gradient checkpointing, nothing inside is kept."""
        if self.args.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(ask, *question, use_reentrant=False)  # pyright: ignore
        return ask(*question)

    def wanted(self, names: tuple[str, ...]) -> list[str]:
        """Those terms that have a weight."""
        return [name for name in names if self.factors[name]]

    def object_terms(
        self,
        student: Family,
        seen: Sam3VisionEncoderOutput,
        teacher_features: FrameFeatures,
        groups: list[ObjectPrompts],
        valid: Tensor | None,
    ) -> dict[str, Tensor]:
        """Terms of the tracker's answers, the mean over the answers to each prompt."""
        features = student.tracker_features(seen)
        names, temperature = self.wanted(OBJECT_TERMS), self.args.temperature
        totals = {name: features.coarse.new_zeros((), dtype=torch.float32) for name in names}
        for prompts in groups:
            shares = torch.zeros(len(prompts), device=prompts.image.device)
            answers: list[tuple[Tensor, dict[str, Tensor]]] = []
            for rows, own, theirs, where in self.conversation(
                student, features, prompts, teacher_features, valid
            ):
                shares[rows] += 1
                answers.append((rows, object_losses(names, own, theirs, temperature, where)))
            for rows, losses in answers:
                for name, loss in losses.items():
                    totals[name] = totals[name] + (loss / shares[rows]).sum()
        return totals

    def conversation(
        self,
        student: Family,
        features: FrameFeatures,
        prompts: ObjectPrompts,
        teacher_features: FrameFeatures,
        valid: Tensor | None,
    ) -> Iterator[tuple[Tensor, ObjectAnswers, ObjectAnswers, Tensor | None]]:
        """Answers of student and teacher to prompts, and after each, to what corrects the student.

        Yields:
            The rows of the prompts that are still asked, the student's answers, the teacher's, and
            where there is a picture (prompts, height, width).
        """
        rows = torch.arange(len(prompts), device=prompts.image.device)
        for iteration in range(self.args.iterations):
            if not len(prompts):
                return
            own = self.answered(ask_objects, student.tracker, features, prompts)
            with torch.no_grad():
                theirs = ask_objects(self.teacher.tracker, teacher_features, prompts)
            own = own._replace(masks=resized(own.masks, theirs.masks.shape[-2:]))
            where = valid_masks(valid, prompts.image, theirs.masks)
            yield rows, own, theirs, where
            if iteration + 1 < self.args.iterations:
                best = theirs.iou_scores.argmax(dim=1)
                least = self.args.least_disagreement
                prompts, kept = correct(
                    prompts, own.best(best).detach(), theirs.best(best), iteration, least, where
                )
                rows = rows[kept]

    def concept_terms(
        self,
        student: Family,
        seen: Sam3VisionEncoderOutput,
        inputs: Mapping[str, Any],
        lesson: Lesson,
    ) -> dict[str, Tensor]:
        """Terms of the detector's answers, the mean over detections of each prompt."""
        names = self.wanted(CONCEPT_TERMS)
        concepts, theirs = lesson.concepts, lesson.found
        if concepts is None or theirs is None:
            return {name: seen.fpn_hidden_states[0].new_zeros(()) for name in names}
        text, text_mask = lesson.text, lesson.text_mask
        if self.args.text == "student":
            text, text_mask = self.read_phrases(student, inputs, concepts)
        question = text, text_mask, concepts
        own = self.answered(ask_concepts, student.detector, seen, *question)
        is_confident = scores_of(theirs) > self.args.confidence
        teacher_of = torch.arange(is_confident.shape[1], device=is_confident.device)
        teacher_of = teacher_of.expand_as(is_confident)
        if self.args.match == "hungarian":
            teacher_of = match_queries(own, theirs, is_confident)
        valid = valid_masks(inputs.get("valid"), concepts.image, theirs.pred_masks)
        pairs = pair_answers(own, theirs, teacher_of, is_confident)
        losses = concept_losses(names, pairs, self.args.temperature, valid)
        return {name: loss.sum() for name, loss in losses.items()}

    # How well it does.

    def measure(self, student: Family, dataloader: DataLoader) -> dict[str, float]:
        """IoU of answers to boxes and to clicks in the middle, with the truth and the teacher."""
        if not self.args.prompts_per_image:
            return {}
        sums: dict[str, float] = {}
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with self.autocast_smart_context_manager():
                families = {"student": student, "teacher": self.teacher}
                scores = score_answers(families, inputs, self.args.prompts_per_image, **self.choice)
            for name, score in scores.items():
                sums[name] = sums.get(name, 0.0) + score
        values = torch.tensor(list(sums.values()), dtype=torch.float32, device=self.args.device)
        totals = dict(zip(sums, self.accelerator.reduce(values).tolist(), strict=True))
        count = max(totals.pop("objects", 0), 1)
        return {name: total / count for name, total in totals.items()}

    @torch.no_grad()
    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Pictures of prompts with the teacher's masks (left) and the student's, by image."""
        families = {"teacher": self.teacher, "student": student}
        inputs: Any = self._prepare_inputs(dict(batch))
        with self.autocast_smart_context_manager():
            return draw_answers(families, inputs, self.args.prompts_per_image, self.args.seed)


def valid_masks(valid: Tensor | None, image: Tensor, masks: Tensor) -> Tensor | None:
    """Where (prompts, height, width) masks lie on a picture, from where (images, ...) images do."""
    if valid is None:
        return None
    size = tuple(masks.shape[-2:])
    return F.interpolate(valid[:, None].float(), size, mode="nearest")[image, 0] > 0
