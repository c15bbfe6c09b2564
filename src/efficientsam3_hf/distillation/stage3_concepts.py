"""Stage 3, end to end: the truth as SAM 3 learned it, and the teacher's answers beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch._functorch import config as functorch_config
from transformers import TrainerCallback
from transformers.models.sam3.modeling_sam3 import (
    Sam3ImageSegmentationOutput,
    Sam3VisionEncoderOutput,
)

from ..evaluation import concept, units
from ..hub.results import TrainingRecord
from ..models.objective_config import ObjectiveConfig
from ..models.prompts import PADDING_LABEL, VISUAL_PHRASE
from ..tokenizer import build_tokenizer
from .arguments import DistillationArguments, check_shares, option
from .calibration import Calibration, calibrate
from .concept_scores import detections_of, draw_concepts, truths_of
from .exemplars import visual_tokens, with_exemplars
from .family import Family
from .feature_losses import valid_places
from .prompt_losses import CONCEPT_TERMS, concept_losses, pair_answers
from .prompted_heads import match_queries, scores_of
from .stage1_image import TARGETS, check_cache, check_targets, map_terms, seen_maps
from .trainer import DistillationTrainer

# Of the objective, those that are means over instances; the others are means over prompts.
OF_BOXES = ("l1", "giou", "mask", "dice")
MAP_TERMS = tuple(f"{target}_{kind}" for target in TARGETS for kind in ("error", "angle"))


@dataclass
class ConceptTrainingArguments(DistillationArguments):
    """Arguments of stage 3. The objective's own are those of the student's configuration.

    Args:
        targets: Maps that are compared with the teacher's, as in stage 1; none for no such term.
        balance: Size of the gradient of these terms in the trunk's maps, in units of that of all
            other terms together; 0 leaves them as their weights say.
        balance_memory: Share of the old in the running ratio of the two.
        exemplar_share: How many of the phrases that name something come with one of their instances
            as exemplar.
        exemplar_alone: How many of these come without their words. What looks like such an exemplar
            is for the teacher to say, as labels do not.
        confidence: Score from which on a detection of the teacher counts.
        temperature: By which logits of masks are divided, the student's and the teacher's.
    """

    targets: list[str] = field(
        default_factory=lambda: ["neck"], metadata={"help": "Maps compared with the teacher's."}
    )
    balance: float = field(
        default=0.5, metadata={"help": "Gradient of the map terms, in units of the others'."}
    )
    balance_memory: float = field(
        default=0.9, metadata={"help": "Share of the old in the running ratio of gradients."}
    )
    exemplar_share: float = field(default=0.25, metadata={"help": "Phrases with an exemplar."})
    exemplar_alone: float = field(default=0.5, metadata={"help": "Of these, those without words."})
    confidence: float = field(default=0.5, metadata={"help": "Least score of a detection."})
    temperature: float = field(default=1.0, metadata={"help": "Softness of the teacher's masks."})

    learning_rate: float = 1e-4
    weight_decay: float = 0.1
    max_grad_norm: float = 0.1
    # Batches of few pictures say little of their statistics.
    freeze_norms: bool = option(True, "Leave the statistics of batch norms as they are.")

    def __post_init__(self):
        super().__post_init__()
        check_targets(self.targets)
        if self.balance < 0 or not 0 <= self.balance_memory < 1:
            raise ValueError(
                f"balance={self.balance} must not be negative, and balance_memory="
                f"{self.balance_memory} be at least 0 and less than 1."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be more than 0.")
        check_shares(exemplar_share=self.exemplar_share, exemplar_alone=self.exemplar_alone)


@dataclass
class ConceptLesson:
    """What the teacher makes of a batch.

    Args:
        asked: The batch with the exemplars of this step, and at least one prompt.
        maps: For the terms of maps, by target.
        found: What its detector answers; None if no term asks for it.
    """

    asked: Mapping[str, Any]
    maps: dict[str, list[Tensor]] = field(default_factory=dict)
    found: Sam3ImageSegmentationOutput | None = None


class ConceptTrainer(DistillationTrainer):
    """Trains on phrases with all their instances, negatives included, and on a teacher's answers.

    Without a teacher there is the truth alone: plain fine-tuning.
    """

    stage = "stage 3: concepts"
    trained_parts = ("backbone", "neck", "geometry", "encoder", "decoder", "scoring", "masks")

    args: ConceptTrainingArguments

    def __init__(
        self, model: Family, args: ConceptTrainingArguments, teacher: Any = None, **kwargs: Any
    ):
        if teacher is None:
            args.targets = []
        self.units, self.weights = self.terms(model, args)
        super().__init__(model, args, teacher, **kwargs)
        self.calibration: Calibration | None = None
        self.visual = visual_tokens(model.configuration)
        self.balancer = Balancer(self)
        self.add_callback(self.balancer)
        if args.torch_compile:
            backbone: Any = model.detector.vision_encoder.backbone
            backbone.register_forward_hook(part_graph)
        if self.cache is not None:
            check_cache(self.cache, ["trunk"])
        if teacher is not None:  # which may read longer phrases than the student
            config = teacher.detector.config
            self.tokenizer = build_tokenizer(config.context_length, getattr(config, "words", None))

    def terms(
        self, model: Family, args: ConceptTrainingArguments
    ) -> tuple[dict[str, str], dict[str, float]]:
        """What each term is counted in, and its factor."""
        objective = ObjectiveConfig.from_dict(model.configuration.objective).weights()
        units = {
            **{name: "boxes" if name.endswith(OF_BOXES) else "prompts" for name in objective},
            "semantic_dice": "prompts",
            **dict.fromkeys(CONCEPT_TERMS, "prompts"),
            **dict.fromkeys(MAP_TERMS, "samples"),
        }
        weights = {
            **objective,
            **{"concept_bce": 5.0, "concept_dice": 5.0, "concept_focal": 0.0},
            **{"concept_box": 5.0, "concept_overlap": 2.0},
            **{"concept_score": 5.0, "concept_presence": 5.0},
            **dict.fromkeys(MAP_TERMS, 1.0),
        }
        return units, weights

    # What is asked, and what the teacher says.

    @property
    def asks_by_exemplars(self) -> bool:
        """Whether there are any in this step: in evaluation, phrases are asked alone."""
        return self.args.exemplar_share > 0 and not self.is_evaluating

    def ask(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """A batch with the exemplars of this step, where it has prompts.

        What an exemplar without words means, only a teacher can say; without one, all keep theirs.
        """
        if not self.asks_by_exemplars or "input_ids" not in inputs:
            return inputs
        has_answers = self.teacher is not None and self.wanted(CONCEPT_TERMS)
        return with_exemplars(
            inputs,
            self.visual,
            self.args.exemplar_share,
            self.args.exemplar_alone if has_answers else 0.0,
            seed=self.args.seed,
            step=self.state.global_step,
        )

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """Images, prompts, and instances that are no crowds."""
        labels = self.ask(inputs)["labels"]
        return {
            "samples": len(inputs["pixel_values"]),
            "prompts": len(labels),
            "boxes": sum(int((~label["is_crowd"]).sum()) for label in labels),
        }

    def teacher_step(self, inputs: Mapping[str, Any]) -> ConceptLesson:
        """The teacher's maps and its answers to the same prompts."""
        lesson = ConceptLesson(at_least_one(self.ask(inputs), self.asks_by_exemplars))
        return lesson if self.teacher is None else self.teacher(self.teach, inputs, lesson)

    def teach(
        self, teacher: Family, inputs: Mapping[str, Any], lesson: ConceptLesson
    ) -> ConceptLesson:
        """The same, computed on the models themselves."""
        tokens = self.cached(inputs)
        if tokens is None:
            seen = teacher.see(inputs.get("teacher_pixel_values", inputs["pixel_values"]))
        else:
            seen = teacher.see_again(tokens["trunk"])
        lesson.maps = seen_maps(teacher, seen, self.args.targets)
        if self.wanted(CONCEPT_TERMS):
            asked = lesson.asked
            phrases = [label["phrase"] for label in asked["labels"]]
            tokens = self.tokenizer(phrases, padding=True, truncation=True, return_tensors="pt")
            lesson.found = teacher.detector(
                vision_embeds=seen,
                input_ids=tokens["input_ids"].to(self.args.device),
                attention_mask=tokens["attention_mask"].to(self.args.device),
                image_indices=asked.get("image_indices"),
                input_boxes=asked.get("input_boxes"),
                input_boxes_labels=asked.get("input_boxes_labels"),
                return_dict=True,
            )
        return lesson

    # What the student makes of it.

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: ConceptLesson
    ) -> dict[str, Tensor]:
        """The objective's terms, those of the teacher's answers, and those of its maps."""
        seen = student.see(inputs["pixel_values"])
        self.balancer.shared = shared_maps(seen)
        asked = targets.asked
        own: Any = student.detector(
            vision_embeds=seen,
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            image_indices=asked.get("image_indices"),
            input_boxes=asked.get("input_boxes"),
            input_boxes_labels=asked.get("input_boxes_labels"),
            labels=asked["labels"],
            loss_counts={"boxes": 1, "prompts": 1},
            return_dict=True,
        )
        terms = dict(own.loss_dict)
        if targets.found is not None:
            counts = float(len(inputs["labels"]) > 0)  # what is pretended counts nothing
            answers = self.answer_terms(own, targets.found, inputs)
            terms |= {name: counts * term for name, term in answers.items()}
        if targets.maps:
            maps = seen_maps(student, seen, self.args.targets)
            terms |= map_terms(maps, targets.maps, inputs.get("valid"))
        return terms

    def answer_terms(
        self,
        own: Sam3ImageSegmentationOutput,
        theirs: Sam3ImageSegmentationOutput,
        inputs: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """How far the student's answers are from the teacher's, query by matched query.

        The truth holds for a canvas that a picture leaves empty, too: there is nothing. What the
        teacher says of it does not count.
        """
        is_confident = scores_of(theirs) > self.args.confidence
        pairs = pair_answers(own, theirs, match_queries(own, theirs, is_confident), is_confident)
        valid = masks_valid(inputs, theirs)
        losses = concept_losses(self.wanted(CONCEPT_TERMS), pairs, self.args.temperature, valid)
        return {name: loss.sum() for name, loss in losses.items()}

    def balance(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms with those of maps scaled to their share of the gradient."""
        if not self.args.balance or not self.args.targets:
            return terms
        if torch.is_grad_enabled():
            self.balancer.look(terms)
        scale = self.balancer.scale
        return {name: term * scale if name in MAP_TERMS else term for name, term in terms.items()}

    def extra_state(self) -> dict[str, float]:
        """The running ratio of gradients."""
        return {"balance": self.balancer.scale}

    def load_extra_state(self, state: Mapping[str, float]) -> None:
        """Go on with it."""
        self.balancer.scale = state["balance"]

    # What its scores are worth.

    def calibrate(self, samples: Any, most_false_positives: float | None = 0.02) -> Calibration:
        """Set temperature and bias of the scores of the student as it will be saved.

        Each process looks at all samples, and finds the same.

        Args:
            samples: Images with phrases, on which it is not evaluated.
            most_false_positives: As `calibration.calibrate` takes it.
        """
        collate: Any = self.eval_collator or self.data_collator
        batches = self.loader(samples, self.args.eval_batch_size, collate)
        images = (batch.get("images", batch) for batch in batches)
        with self.averaged(), self.autocast_smart_context_manager():
            self.calibration = calibrate(self.family, images, most_false_positives)
        found = {"temperature": self.calibration.temperature, "bias": self.calibration.bias}
        self.log({f"score_{name}": value for name, value in found.items()})
        return self.calibration

    def training_record(self) -> TrainingRecord:
        """This stage, for the card, with what scores were calibrated by."""
        record = super().training_record()
        if self.calibration is None:
            return record
        temperature, bias = self.calibration.temperature, self.calibration.bias
        told = {"score temperature": f"{temperature:.4g}", "score bias": f"{bias:.4g}"}
        return replace(record, hyper_parameters={**record.hyper_parameters, **told})

    # How well it does.

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: ConceptLesson
    ) -> list[dict[str, Any]]:
        """What was found of each prompt, at the size of the masks in the labels."""
        return [
            concept.score_pair(list(masks), scores.tolist(), list(truth))
            for (masks, scores), truth, label in zip(
                self.answer(student, inputs),
                truths_of(inputs["labels"]),
                inputs["labels"],
                strict=True,
            )
            if bool(label["is_exhaustive"])
        ]

    def summarize(self, records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """cgF1 and its parts."""
        return concept.summarize(units.stack(records))

    def answer(self, student: Family, inputs: Mapping[str, Any]) -> list[Any]:
        """Masks and scores of what the student finds for each prompt of a batch."""
        asked = at_least_one(inputs)
        outputs = student.detector(
            pixel_values=inputs["pixel_values"],
            input_ids=asked["input_ids"],
            attention_mask=asked["attention_mask"],
            image_indices=asked.get("image_indices"),
            return_dict=True,
        )
        sizes = [tuple(label["masks"].shape[-2:]) for label in inputs["labels"]]
        return detections_of(outputs, sizes, student.configuration)

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Pictures of what phrases name: the truth (left) and what the student finds."""
        return draw_concepts(batch, self.answer(student, batch))


class Balancer(TrainerCallback):
    """Holds the gradient of the terms of maps at its share of that of all other terms.

    Squares of norms are sums over all batches and processes of a step, so they do not depend on
    how it was cut up. What is found in one step holds from the next one on.
    """

    def __init__(self, trainer: ConceptTrainer):
        self.trainer = trainer
        self.scale = 1.0
        self.shared: list[Tensor] = []
        self.squares = torch.zeros(2, dtype=torch.float64)
        # A graph is gone through twice: what is compiled must not give buffers away the first time.
        functorch_config.donated_buffer = False

    def look(self, terms: Mapping[str, Tensor]) -> None:
        """Add the gradients of a batch in the maps of the trunk."""
        shared = [each for each in self.shared if each.requires_grad]
        if not shared:
            return
        for row, of_maps in enumerate((True, False)):
            weighted = [
                self.trainer.factors[name] * term
                for name, term in terms.items()
                if (name in MAP_TERMS) == of_maps and term.requires_grad
            ]
            if weighted:
                gradients = torch.autograd.grad(
                    torch.stack(weighted).sum(), shared, retain_graph=True, allow_unused=True
                )
                squares = [each.float().square().sum() for each in gradients if each is not None]
                self.squares[row] += float(sum(squares))
        self.shared = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Take a step towards the ratio of this step."""
        of_maps, of_others = (
            math.sqrt(each) for each in self.trainer.summed(self.squares).tolist()
        )
        self.squares.zero_()
        if not (0 < of_maps < math.inf and 0 < of_others < math.inf):
            return
        wanted = self.trainer.args.balance * of_others / of_maps
        memory = 0.0 if state.global_step <= 1 else self.trainer.args.balance_memory
        self.scale = self.scale**memory * wanted ** (1 - memory)


def masks_valid(inputs: Mapping[str, Any], answers: Sam3ImageSegmentationOutput) -> Tensor | None:
    """Where the masks of answers (prompts, height, width) lie on a picture; None for everywhere."""
    places = valid_places(inputs.get("valid"), answers.pred_masks.shape[-2:])
    images = inputs.get("image_indices")
    return places if places is None or images is None else places[images]


def at_least_one(inputs: Mapping[str, Any], with_box: bool = False) -> Mapping[str, Any]:
    """A batch with prompts; if it has none, with one of which nothing is known.

    Every process asks equally often: where weights are sharded, all gather them, or none can.

    Args:
        inputs: The batch.
        with_box: Whether those of others have boxes.
    """
    if "input_ids" in inputs:
        return inputs
    if inputs["labels"]:
        raise ValueError(
            "Stage 3 learns from phrases, and these samples have none. For SA-1B, say with "
            "data.captions which captions to ask for."
        )
    ids = torch.zeros(1, 2, dtype=torch.long, device=inputs["pixel_values"].device)
    unknown = {
        "boxes": torch.zeros(0, 4),
        "masks": torch.zeros(0, 8, 8, dtype=torch.bool),
        "is_exhaustive": False,
        "phrase": VISUAL_PHRASE,
    }
    box = {
        "input_boxes": torch.full((1, 1, 4), 0.5, device=ids.device),
        "input_boxes_labels": torch.full((1, 1), PADDING_LABEL, device=ids.device),
    }
    return {
        **inputs,
        **(box if with_box else {}),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_indices": torch.zeros_like(ids[0, :1]),
        "labels": [unknown],
    }


@torch.compiler.disable
def part_graph(*args: Any) -> None:
    """A hook at which compiled graphs end: gradients are measured in what a module gave."""


def shared_maps(seen: Sam3VisionEncoderOutput) -> list[Tensor]:
    """What all terms are computed from: the maps of the backbone, or the tokens of a ViT."""
    maps: Any = getattr(seen, "feature_maps", None) or [seen.last_hidden_state]
    return list(maps)
