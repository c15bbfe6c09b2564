"""Stage 2, memory: the student follows objects through clips as its teacher does."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..evaluation.units import stack
from ..evaluation.video_objects import score_object, summarize
from ..models.clip_forward import EfficientSam3ClipOutput, FramePrompt
from ..models.modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
from ..models.object_memory import FrameFeatures
from ..visualize import draw_instances
from .arguments import DistillationArguments
from .clip_prompts import (
    KINDS,
    MOST_CORRECTIONS,
    Plan,
    PromptRules,
    correcting_clicks,
    counted_frames,
    first_prompts,
    generator_of,
    make_plan,
    to_pixels,
    true_masks,
)
from .family import PARTS, Family
from .feature_losses import same_size, whitened_error
from .memory_losses import (
    dice_error,
    focal_error,
    mask_cross_entropy,
    overlap,
    pointer_error,
)
from .pictures import SIDE, to_picture
from .teacher import clip_frames
from .trainer import DistillationTrainer

JITTER = 0.1  # of boxes, as in the training of SAM 2
MOST_DRAWN = 6  # frames of a clip in a picture

# All that makes and reads memories, as far as a tracker has it; without what only given masks go
# through.
MEMORY_PARTS = (
    "memory",
    "perceiver",
    "tracker.object_pointer_proj.*",
    "tracker.temporal_positional_encoding_projection_layer.*",
    "tracker.occlusion_spatial_embedding_parameter",
    "tracker.no_object_pointer",
    "tracker.no_memory_embedding",
)


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
        dropout: Leave out units of memory attention and Perceiver as their configuration says.
            Then gradients depend on how a batch is shared out among processes.
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
    dropout: bool = field(default=False, metadata={"help": "Use the configuration's dropout."})
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
        if not 0 <= self.forcing_share <= 1:
            raise ValueError(f"forcing_share={self.forcing_share} is from 0 to 1.")
        if self.max_objects < 1 or (self.gradient_frames is not None and self.gradient_frames < 1):
            raise ValueError("max_objects and gradient_frames are 1 or more.")


class MemoryDistillationTrainer(DistillationTrainer):
    """Trains the memory of a tracker on clips: on its teacher's answers, and on annotations.

    Frames that nobody annotated count for the teacher's terms alone. Without a teacher there are
    annotations alone, and it is them that are remembered at first: plain training.
    """

    stage = "stage 2: memory"
    units = {
        "features": "remembered",
        "pointers": "tracked",
        "teacher_masks": "predicted",
        "teacher_dice": "predicted",
        "teacher_iou": "predicted",
        "teacher_object": "predicted",
        "focal": "visible",
        "dice": "visible",
        "iou": "visible",
        "object": "judged",
    }
    weights = {
        "features": 1.0,
        "pointers": 1.0,
        "teacher_masks": 5.0,
        "teacher_dice": 1.0,
        "teacher_iou": 1.0,
        "teacher_object": 1.0,
        # SAM 2's.
        "focal": 20.0,
        "dice": 1.0,
        "iou": 1.0,
        "object": 1.0,
    }

    args: MemoryDistillationArguments

    def __init__(self, model: Family, args: MemoryDistillationArguments, **kwargs: Any):
        check_video("student", model)
        if kwargs.get("teacher") is None:
            args.forcing = "truth"
        else:
            check_video("teacher", kwargs["teacher"])
        weights = [name for name, _ in model.named_parameters()]
        self.trained_parts = [
            part for part in MEMORY_PARTS if fnmatch.filter(weights, PARTS.get(part, part))
        ]
        super().__init__(model, args, **kwargs)
        model.drops_out = args.dropout
        if self.cache is not None and self.cache.manifest.kind != "clip":
            raise ValueError(
                f"The cache in {self.cache.folder} has features of kind "
                f"{self.cache.manifest.kind!r}. Stage 2 takes those of clips: write a cache with "
                "--kind clip."
            )
        self.is_evaluating = False
        # The teacher does not change: it is scored on each dataset once.
        self.scores_teacher = True
        self.scored: list[Any] = []
        self.teacher_scores: dict[tuple, dict[str, float] | None] = {}

    # What is asked.

    def plan(self, inputs: Mapping[str, Any]) -> Plan:
        """What to ask of a batch in this step; always the same in evaluation."""
        args = self.args
        moment = "evaluation" if self.is_evaluating else self.state.global_step
        rules = PromptRules(args.max_objects, args.prompt_shares, args.corrections)
        return make_plan(inputs["labels"], rules, args.seed, moment)

    def constant_frames(self, inputs: Mapping[str, Any]) -> int:
        """Frames at the beginning without gradient."""
        frames = inputs["pixel_values"].shape[1]
        return max(frames - (self.args.gradient_frames or frames), 0)

    def forcing_probability(self) -> float:
        """Of remembering a mask that is not the student's own."""
        if self.is_evaluating or not self.args.forcing_share:
            return 0.0
        forced_steps = self.args.forcing_share * max(self.state.max_steps, 1)
        return max(0.0, 1 - self.state.global_step / forced_steps)

    def forced_masks(
        self, inputs: Mapping[str, Any], taught: EfficientSam3ClipOutput | None, truth: Tensor
    ) -> dict[str, Tensor]:
        """Masks to be remembered, and in which frames, for `forward_clip`."""
        probability, labels = self.forcing_probability(), inputs["labels"]
        if not probability:
            return {}
        frames = inputs["pixel_values"].shape[1]
        draws = [
            generator_of(label, self.args.seed, self.state.global_step, "forcing").random(frames)
            for label in labels
        ]
        is_forced = torch.stack([torch.from_numpy(each) < probability for each in draws])
        if taught is None or self.args.forcing == "truth":
            is_forced &= torch.stack([label["is_annotated"].cpu() for label in labels])
            masks = truth.unflatten(0, (len(labels), -1)).transpose(1, 2)
        else:
            logits: Any = taught.pred_masks
            masks = logits.float().sigmoid()
        return {"memory_masks": masks, "is_forced": is_forced}

    # One step.

    def count(self, inputs: Mapping[str, Any]) -> dict[str, int | Tensor]:
        """Clips, and objects in frames that count for something."""
        counted = counted_frames(self.plan(inputs), inputs["labels"], self.constant_frames(inputs))
        return {
            "samples": len(inputs["labels"]),
            **{name: int(flags.sum()) for name, flags in counted.items()},
        }

    def teacher_step(self, inputs: Mapping[str, Any]) -> list[FrameFeatures] | None:
        """What the teacher sees in each frame. What it answers depends on corrections."""
        if self.teacher is None:
            return None
        tokens = self.cached(inputs)
        if tokens is not None:
            frames = clip_frames(tokens, len(inputs["labels"]))
            dtype = self.teacher.tracker.dtype
            return [FrameFeatures(*(each.to(dtype) for each in frame)) for frame in frames]
        return self.teacher(encode, inputs.get("teacher_pixel_values", inputs["pixel_values"]))

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: list[FrameFeatures] | None
    ) -> dict[str, Tensor]:
        """Loss terms of the objects of a batch, frame by frame."""
        labels, plan = inputs["labels"], self.plan(inputs)
        constant = self.constant_frames(inputs)
        frames = encode(student, inputs["pixel_values"], constant)
        truth = true_masks(plan, labels)
        prompts = first_prompts(plan, labels, 0.0 if self.is_evaluating else JITTER)
        with torch.no_grad():
            if any(asked.corrections for _, _, asked in plan.rows()):
                said = follow(student, frames, prompts, plan)
                prompts = prompts + correcting_clicks(plan, labels, truth, said_masks(said, truth))
            taught = None
            if targets is not None:
                taught = self.teacher(
                    follow, targets, prompts, plan, output_conditioned_features=True
                )
        said = follow(
            student,
            frames,
            prompts,
            plan,
            gradient_frames=len(frames) - constant,
            output_conditioned_features=taught is not None,
            **self.forced_masks(inputs, taught, truth),
        )
        counted = counted_frames(plan, labels, constant)
        # Every trained weight gets a gradient, even where nothing in a batch asks for it.
        trained = [weight for weight in student.parameters() if weight.requires_grad]
        nothing: Any = 0.0 * sum(weight.float().sum() for weight in trained)
        sums: dict[str, Any] = dict.fromkeys(self.units, nothing)
        for time in range(constant, len(frames)):
            at = {name: flags[:, time].nonzero()[:, 0] for name, flags in counted.items()}
            of_frame = [self.truth_terms(said, truth[:, time], counted, time, at)]
            if taught is not None:
                of_frame.append(memory_terms(said, taught, time, at))
                of_frame.append(teacher_terms(said, taught, time, at["predicted"]))
            for terms in of_frame:
                sums = {name: total + terms.get(name, 0.0) for name, total in sums.items()}
        return sums

    def truth_terms(
        self,
        said: EfficientSam3ClipOutput,
        truth: Tensor,
        counted: Mapping[str, Tensor],
        time: int,
        at: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """What annotations say of one frame: SAM 2's losses.

        Of an object's candidates only the nearest is trained, and all of their predicted overlaps.
        """
        visible, judged = at["visible"].to(truth.device), at["judged"].to(truth.device)
        candidates, scores = of_rows(said.all_masks, time), of_rows(said.all_iou_scores, time)
        logits = resized(candidates[visible], truth.shape[-2:])
        inside = truth[visible, None].expand_as(logits)
        focal, dice = focal_error(logits, inside), dice_error(logits, inside)
        errors = self.factors["focal"] * focal + self.factors["dice"] * dice
        best = errors.argmin(dim=1, keepdim=True)
        misjudged = (scores[visible] - overlap(logits, inside)).abs()
        is_there = counted["visible"][at["judged"], time].to(truth)
        scored = said.object_score_logits[:, time].flatten()[judged].float()
        return {
            "focal": focal.gather(1, best).sum(),
            "dice": dice.gather(1, best).sum(),
            "iou": misjudged.mean(dim=1).sum(),
            "object": F.binary_cross_entropy_with_logits(scored, is_there, reduction="sum"),
        }

    # Evaluation.

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """As in every stage, with the same prompts each time, and own memories alone."""
        dataset: Any = dataloader.dataset
        dataset = getattr(dataset, "dataset", dataset)  # the whole, of this process's part
        self.is_evaluating = True
        self.scores_teacher = not any(each is dataset for each in self.scored)
        try:
            outcome = super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.is_evaluating = False
        self.scored.append(dataset)
        return outcome

    def score(
        self, student: Family, inputs: Mapping[str, Any], targets: list[FrameFeatures] | None
    ) -> list[dict[str, float]]:
        """J and F of each object, given where it is first seen; any teacher's beside them."""
        labels, plan = inputs["labels"], self.score_plan(inputs)
        prompts = first_prompts(plan, labels, jitter=0.0)
        names = {
            row: (labels[clip]["source_id"], labels[clip]["frame_indices"][0], asked.number)
            for row, clip, asked in plan.rows()
        }
        if self.scores_teacher and targets is not None:
            theirs = score_rows(self.teacher(follow, targets, prompts, plan), plan, labels)
            self.teacher_scores |= {names[row]: scores for row, scores in theirs.items()}
        frames = encode(student, inputs["pixel_values"])
        ours = score_rows(follow(student, frames, prompts, plan), plan, labels)
        if targets is None:
            return [scores for scores in ours.values() if scores is not None]
        records = []
        for row, scores in ours.items():
            beside = self.teacher_scores[names[row]]
            if scores is not None and beside is not None:
                records.append(scores | {f"teacher_{name}": each for name, each in beside.items()})
        return records

    def score_plan(self, inputs: Mapping[str, Any]) -> Plan:
        """All objects, each with a prompt of the kind that is scored, where it is first seen."""
        shares = [float(kind == self.args.scored_prompt) for kind in KINDS]
        return make_plan(inputs["labels"], PromptRules(None, shares), self.args.seed, "score")

    def summarize(self, records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """J, F and J&F of student and teacher."""
        units = stack(records)
        if self.teacher is None:
            return summarize(units)
        theirs = {name: units.pop(f"teacher_{name}") for name in ("J", "F")}
        teacher = {f"teacher_{name}": value for name, value in summarize(theirs).items()}
        return summarize(units) | teacher

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Frames of each clip, above with any teacher's masks, below with the student's."""
        labels, plan = batch["labels"], self.score_plan(batch)
        pixels, prompts = batch["pixel_values"], first_prompts(plan, labels, jitter=0.0)
        masks = [follow(student, encode(student, pixels), prompts, plan).pred_masks]
        if self.teacher is not None:
            seen = self.teacher_step(batch)
            masks.insert(0, self.teacher(follow, seen, prompts, plan).pred_masks)
        length = pixels.shape[1]
        shown = sorted(
            {round(step * (length - 1) / (MOST_DRAWN - 1)) for step in range(MOST_DRAWN)}
        )
        return {
            f"clip_{clip}": draw_strip(
                pixels[clip, shown],
                [each[clip, shown, : len(plan.clips[clip])] for each in masks],
            )
            for clip in range(len(pixels))
        }


def encode(family: Family, pixel_values: Tensor, constant: int = 0) -> list[FrameFeatures]:
    """What a tracker sees in each frame of clips, without gradients where its trunk is frozen."""
    tracker: Any = family.tracker
    return tracker.encode_clips(pixel_values, constant)


def follow(
    family: Family,
    frames: Sequence[FrameFeatures],
    prompts: Sequence[FramePrompt],
    plan: Plan,
    **options: Any,
) -> EfficientSam3ClipOutput:
    """What a tracker makes of clips that were encoded, and of prompts in relative places."""
    tracker: Any = family.tracker
    device = frames[0].coarse.device
    placed = to_pixels(prompts, plan.num_objects, tracker.config.image_size, device)
    return tracker.forward_clip(frames=frames, prompts=placed, **options)


def memory_terms(
    said: EfficientSam3ClipOutput,
    taught: EfficientSam3ClipOutput,
    time: int,
    at: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Distances of what memory made of one frame: its features, and pointers to its objects."""
    terms = {}
    if len(at["remembered"]):
        rows = at["remembered"].to(said.object_pointers.device)
        own, theirs = (of_rows(each.conditioned_features, time)[rows] for each in (said, taught))
        terms["features"] = whitened_error(same_size(own, theirs), theirs)
    rows = at["tracked"].to(said.object_pointers.device)
    own, theirs = (each.object_pointers[:, time].flatten(0, 1)[rows] for each in (said, taught))
    terms["pointers"] = pointer_error(own, theirs).sum()
    return terms


def teacher_terms(
    said: EfficientSam3ClipOutput, taught: EfficientSam3ClipOutput, time: int, rows: Tensor
) -> dict[str, Tensor]:
    """Distances of the student's answers in one frame to its teacher's.

    Masks and their predicted overlaps count where the teacher sees the object. Of the candidates,
    which both have in the same order, the one is compared that the teacher takes for the best.
    """
    rows = rows.to(said.object_pointers.device)
    candidates, targets = (of_rows(each.all_masks, time)[rows].float() for each in (said, taught))
    scores, target_scores = (
        of_rows(each.all_iou_scores, time)[rows].float() for each in (said, taught)
    )
    objects, target_objects = (
        each.object_score_logits[:, time].flatten()[rows].float() for each in (said, taught)
    )
    row, best = torch.arange(len(rows), device=rows.device), target_scores.argmax(dim=1)
    logits, goal = candidates[row, best], targets[row, best][:, None]
    goal = resized(goal, logits.shape[-2:])[:, 0].sigmoid()
    is_seen = (target_objects > 0).float()
    return {
        "teacher_masks": (mask_cross_entropy(logits, goal) * is_seen).sum(),
        "teacher_dice": (dice_error(logits, goal) * is_seen).sum(),
        "teacher_iou": ((scores - target_scores).abs().mean(dim=1) * is_seen).sum(),
        "teacher_object": F.binary_cross_entropy_with_logits(
            objects, target_objects.sigmoid(), reduction="sum"
        ),
    }


def of_rows(frames: Sequence[Tensor] | None, time: int) -> Tensor:
    """One frame (clips, objects, ...) as (rows, ...)."""
    return frames[time].flatten(0, 1)  # pyright: ignore[reportOptionalSubscript]: was asked for


def resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (rows, masks, height, width) in another size, in float32."""
    logits = logits.float()
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def said_masks(said: EfficientSam3ClipOutput, truth: Tensor) -> Tensor:
    """Logits (rows, frames, height, width) in the size of the truth."""
    return resized(said.pred_masks.transpose(1, 2).flatten(0, 1), truth.shape[-2:])


def score_rows(
    said: EfficientSam3ClipOutput, plan: Plan, labels: Sequence[Mapping[str, Any]]
) -> dict[int, dict[str, float] | None]:
    """J and F of each row, in annotated frames after the one where it was given."""
    truth = true_masks(plan, labels)
    masks = (said_masks(said, truth) > 0).cpu().numpy()
    truth = (truth > 0.5).cpu().numpy()
    scores = {}
    for row, clip, asked in plan.rows():
        annotated = [
            time
            for time, known in enumerate(labels[clip]["is_annotated"].tolist())
            if known and time >= asked.start
        ]
        found, expected = (list(each[row, annotated]) for each in (masks, truth))
        scores[row] = score_object(found, expected, "youtube-vos")
    return scores


def draw_strip(pixels: Tensor, masks: Sequence[Tensor]) -> Image.Image:
    """Frames side by side, a row for each of several predictions.

    Args:
        pixels: (frames, 3, height, width) as the image processor makes them.
        masks: Of each prediction, logits (frames, objects, height, width).
    """
    frames = F.interpolate(pixels.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
    pictures = [to_picture(each.movedim(0, -1) * 0.5 + 0.5) for each in frames]
    strip = Image.new("RGB", (SIDE * len(pictures), SIDE * len(masks)))
    for line, logits in enumerate(masks):
        found = (resized(logits, (SIDE, SIDE)) > 0).cpu().numpy() if logits.shape[1] else None
        for column, picture in enumerate(pictures):
            drawn = picture if found is None else draw_instances(picture, found[column])
            strip.paste(drawn, (column * SIDE, line * SIDE))
    return strip


def check_video(role: str, family: Any) -> None:
    """Raise for what cannot follow objects."""
    if not isinstance(getattr(family, "tracker", None), EfficientSam3TrackerVideoModel):
        raise ValueError(
            f"The {role} has no tracker in video. Take a folder that has one, or make a student "
            "of such a teacher with a configuration that says what its memory is."
        )
