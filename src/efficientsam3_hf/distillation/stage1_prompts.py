"""Stage 1+, prompt in the loop: the student's features must lead frozen heads to the same masks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.models.sam3.modeling_sam3 import (
    Sam3ImageSegmentationOutput,
    Sam3VisionEncoderOutput,
)

from ..models.object_memory import FrameFeatures
from .arguments import check_shares, option
from .exemplars import Tokens, visual_tokens, without_words
from .family import Family
from .feature_losses import valid_places
from .prompt_losses import (
    CONCEPT_TERMS,
    OBJECT_TERMS,
    concept_losses,
    object_losses,
    pair_answers,
    resized,
)
from .prompt_scores import Answerer, draw_answers, score_answers
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
    Objects,
    choose_concepts,
    choose_objects,
    correct,
    count_concepts,
    count_objects,
    read_objects,
)
from .stage1_image import (
    ImageDistillationArguments,
    ImageDistillationTrainer,
    Maps,
    check_cache,
    map_terms,
    seen_maps,
)

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
        exemplar_share: How many of the phrases that name something come with one of their instances
            as exemplar.
        exemplar_alone: How many of these come without their words, as users draw a box and say
            nothing.
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
    exemplar_alone: float = field(default=0.5, metadata={"help": "Of these, those without words."})
    confidence: float = field(default=0.5, metadata={"help": "Least score of a detection."})
    match: str = field(default="hungarian", metadata={"help": f"One of {', '.join(MATCHES)}."})
    text: str = field(default="teacher", metadata={"help": f"One of {', '.join(TEXTS)}."})
    temperature: float = field(default=1.0, metadata={"help": "Softness of the teacher's masks."})

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    # Batches of few pictures say little of their statistics.
    freeze_norms: bool = option(True, "Leave the statistics of batch norms as they are.")

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
        check_shares(
            box_share=self.box_share,
            exemplar_share=self.exemplar_share,
            exemplar_alone=self.exemplar_alone,
        )


@dataclass
class Lesson:
    """What a batch is asked, and all of the teacher that does not depend on the student.

    Args:
        asked: All objects that can be asked for.
        objects: Groups of prompts for the tracker.
        maps: The teacher's, for the feature term.
        features: For the heads of the teacher's tracker.
        concepts: Prompts for the detector.
        text: The teacher's token features of their phrases.
        text_mask: Which of them are valid.
        found: What the teacher's detector answers.
    """

    asked: Objects
    objects: list[ObjectPrompts] = field(default_factory=list)
    maps: Maps = field(default_factory=dict)
    features: FrameFeatures | None = None
    concepts: ConceptPrompts | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    found: Sam3ImageSegmentationOutput | None = None


class PromptDistillationTrainer(ImageDistillationTrainer):
    """Trains the encoder on what heads make of its features, which stay as the teacher's.

    What is trained is as in stage 1: `backbone`, and of a lateral student the necks, too.
    """

    stage = "stage 1+: prompts"
    units = {
        **ImageDistillationTrainer.units,
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
        if self.cache is not None:
            check_cache(self.cache, ["trunk"])
        for name, family in (("student", model), ("teacher", self.teacher)):
            if args.prompts_per_image and family.tracker is None:
                raise ValueError(
                    f"The {name} has no tracker, which boxes and clicks go to: set "
                    "prompts_per_image=0, or give one that has it."
                )
        self.visual: Tokens = visual_tokens(model.configuration)

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
        objects = read_objects(labels, len(pixel_values))
        lesson = Lesson(objects)
        if args.prompts_per_image:
            groups = choose_objects(
                objects,
                args.prompts_per_image,
                **self.choice,
                box_share=args.box_share,
                box_noise=args.box_noise,
                corrections=args.iterations - 1,
            )
            lesson.objects = [prompts.to(pixel_values.device) for prompts in groups]
        if args.concepts_per_image:
            lesson.concepts = choose_concepts(
                labels,
                objects,
                args.concepts_per_image,
                **self.choice,
                has_phrases="input_ids" in inputs,
                exemplar_share=args.exemplar_share,
                exemplar_alone=args.exemplar_alone,
            ).to(pixel_values.device)
        return self.of_teacher(self.teach, inputs, lesson)

    def of_teacher(self, step: Callable[..., Answer], *args: Any) -> Answer:
        """What a step gives on the teacher's models, through whatever wraps them."""
        with torch.no_grad():
            return self.teacher(step, *args)

    def teach(self, teacher: Family, inputs: Mapping[str, Any], lesson: Lesson) -> Lesson:
        """A lesson with the teacher's maps, features and detections."""
        tokens = self.cached(inputs)
        if tokens is None:
            pixels = inputs.get("teacher_pixel_values", inputs["pixel_values"])
            seen = teacher.see(pixels)
        else:
            seen = teacher.see_again(tokens["trunk"])
        lesson.maps = seen_maps(teacher, seen, self.targets)
        if self.args.prompts_per_image:
            lesson.features = teacher.tracker_features(seen)
        if lesson.concepts is not None:
            lesson.text, lesson.text_mask = self.read_phrases(teacher, inputs, lesson.concepts)
            concepts = lesson.concepts.at_least_one()
            question = lesson.text, lesson.text_mask, concepts
            lesson.found = ask_concepts(teacher.detector, seen, *question)
        return lesson

    def read_phrases(
        self, family: Family, inputs: Mapping[str, Any], concepts: ConceptPrompts
    ) -> tuple[Tensor, Tensor]:
        """Token features of the phrases of prompts, and which tokens are valid."""
        ids, mask = (each.to(concepts.image.device) for each in self.visual)
        if "input_ids" in inputs and len(concepts):
            tokens = inputs["input_ids"][concepts.label], inputs["attention_mask"][concepts.label]
            ids, mask = without_words(tokens, concepts.has_words, (ids, mask))
        text: Any = family.detector.get_text_features(ids, mask, return_dict=True)
        return text.pooler_output, mask

    # What the student makes of it.

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: Lesson
    ) -> dict[str, Tensor]:
        """Distances of maps, and of what heads make of them."""
        seen = student.see(inputs["pixel_values"])
        valid = inputs.get("valid")
        terms = map_terms(seen_maps(student, seen, self.targets), targets.maps, valid)
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
                losses = object_losses(names, own, theirs, temperature, where)
                # Without rows, there is one answer that counts nothing.
                losses = {name: loss[: len(rows)] for name, loss in losses.items()}
                answers.append((rows, losses))
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

        Every process asks equally often, whatever it has to ask: where weights are sharded, all
        gather them, or none can.

        Yields:
            The rows of the prompts that are still asked, the student's answers, the teacher's, and
            where there is a picture (prompts, height, width).
        """
        rows = torch.arange(len(prompts), device=prompts.image.device)
        for iteration in range(self.args.iterations):
            asked = prompts.at_least_one()
            own = self.answered(answer_objects, student, features, asked)
            theirs = self.of_teacher(answer_objects, teacher_features, asked)
            own = own._replace(masks=resized(own.masks, theirs.masks.shape[-2:]))
            where = valid_masks(valid, asked.image, theirs.masks)
            yield rows, own, theirs, where
            if not len(prompts) or iteration + 1 == self.args.iterations:
                continue
            best = theirs.iou_scores.argmax(dim=1)
            masks = own.best(best).detach(), theirs.best(best)
            least = self.args.least_disagreement
            prompts, kept = correct(prompts, *masks, iteration, least, where)
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
        assert concepts is not None
        assert theirs is not None
        text, text_mask = lesson.text, lesson.text_mask
        if self.args.text == "student":
            text, text_mask = self.read_phrases(student, inputs, concepts)
        asked = concepts.at_least_one()
        question = text, text_mask, asked
        own = self.answered(ask_concepts, student.detector, seen, *question)
        is_confident = scores_of(theirs) > self.args.confidence
        teacher_of = torch.arange(is_confident.shape[1], device=is_confident.device)
        teacher_of = teacher_of.expand_as(is_confident)
        if self.args.match == "hungarian":
            teacher_of = match_queries(own, theirs, is_confident)
        valid = valid_masks(inputs.get("valid"), asked.image, theirs.pred_masks)
        pairs = pair_answers(own, theirs, teacher_of, is_confident)
        losses = concept_losses(names, pairs, self.args.temperature, valid)
        counts = float(len(concepts) > 0)  # one that is only there to be asked counts nothing
        return {name: counts * loss.sum() for name, loss in losses.items()}

    # How well it does.

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: Lesson
    ) -> list[dict[str, float]]:
        """IoU of answers to boxes and to clicks in the middle, with the truth and the teacher."""
        if targets.features is None:
            return []
        answerers = self.answerers(student, inputs, targets.features)
        device = inputs["pixel_values"].device
        return score_answers(answerers, inputs["labels"], targets.asked, device)

    def summarize(self, records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Means over objects."""
        return {name: fmean(record[name] for record in records) for name in records[0]}

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Prompts of each image with the masks of the teacher (left) and of the student."""
        lesson = self.teacher_step(batch)
        if lesson.features is None:
            return {}
        answerers = self.answerers(student, batch, lesson.features)
        return draw_answers(answerers, batch["pixel_values"], lesson.asked, lesson.objects)

    def answerers(
        self, student: Family, inputs: Mapping[str, Any], teacher_features: FrameFeatures
    ) -> dict[str, Answerer]:
        """Teacher and student as they answer in use."""
        features = student.tracker_features(student.see(inputs["pixel_values"]))
        return {
            "teacher": lambda asked: self.of_teacher(answer_objects, teacher_features, asked, True),
            "student": lambda asked: answer_objects(student, features, asked, True),
        }


def answer_objects(
    family: Family, features: FrameFeatures, prompts: ObjectPrompts, in_use: bool = False
) -> ObjectAnswers:
    """What the tracker of a family says to prompts."""
    tracker: Any = family.tracker
    return ask_objects(tracker, features, prompts, in_use)


def valid_masks(valid: Tensor | None, image: Tensor, masks: Tensor) -> Tensor | None:
    """Where masks (prompts, ..., height, width) lie on a picture.

    Args:
        valid: (images, height, width) of pixels, true where there is a picture; None for all.
        image: (prompts,): the image of each.
        masks: Of the size that is wanted.
    """
    places = valid_places(valid, masks.shape[-2:])
    return None if places is None else places[image]
