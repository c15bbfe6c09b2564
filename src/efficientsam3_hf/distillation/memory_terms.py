"""What clips teach a tracker's memory: the terms of stage 2, for every trainer that has clips."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..evaluation.units import stack
from ..evaluation.video_objects import score_object, summarize
from ..models.clip_forward import EfficientSam3ClipOutput, FramePrompt
from ..models.modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
from ..models.object_memory import FrameFeatures
from ..visualize import draw_instances
from .cached_features import decoded
from .clip_prompts import (
    KINDS,
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
from .feature_losses import pointer_error, same_size, whitened_error
from .mask_losses import cross_entropy, dice_loss, focal_loss, overlap
from .pictures import SIDE, to_picture
from .prompt_losses import resized, score_loss
from .teacher import clip_frames
from .teacher_cache import TeacherCache

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

# Term -> what it is counted in, and its factor.
TERMS = {
    "features": ("remembered", 1.0),
    "pointers": ("tracked", 1.0),
    "teacher_masks": ("predicted", 5.0),
    "teacher_dice": ("predicted", 1.0),
    "teacher_iou": ("predicted", 1.0),
    "teacher_object": ("predicted", 1.0),
    # SAM 2's.
    "focal": ("visible", 20.0),
    "dice": ("visible", 1.0),
    "iou": ("visible", 1.0),
    "object": ("judged", 1.0),
}


class MemoryTerms:
    """Loss terms of clips, and what they are counted in; how well a memory follows objects.

    Args:
        trainer: A `DistillationTrainer` whose arguments have those of stage 2; of it are teacher,
            step, and factors of terms.
        prefix: Of the names of terms and units.
        cache: `TeacherCache` of clips of which batches bring the teacher's features along.
    """

    def __init__(self, trainer: Any, prefix: str = "", cache: TeacherCache | None = None):
        if cache is not None and cache.manifest.kind != "clip":
            raise ValueError(
                f"The cache in {cache.folder} has features of kind {cache.manifest.kind!r}. What "
                "learns from clips takes those of clips: write a cache with --kind clip."
            )
        self.trainer, self.prefix, self.cache = trainer, prefix, cache
        self.teacher_scores: dict[tuple, dict[str, float] | None] = {}

    @property
    def units(self) -> dict[str, str]:
        """What each term is counted in."""
        return self.named({name: self.prefix + unit for name, (unit, _) in TERMS.items()})

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each term."""
        return self.named({name: factor for name, (_, factor) in TERMS.items()})

    def named(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The same with the prefix before each name."""
        return {self.prefix + name: value for name, value in values.items()}

    # What is asked.

    def plan(self, inputs: Mapping[str, Any]) -> Plan:
        """What to ask of a batch in this step; always the same in evaluation."""
        trainer, args = self.trainer, self.trainer.args
        moment = "evaluation" if trainer.is_evaluating else trainer.state.global_step
        rules = PromptRules(args.max_objects, args.prompt_shares, args.corrections)
        return make_plan(inputs["labels"], rules, args.seed, moment)

    def constant_frames(self, inputs: Mapping[str, Any]) -> int:
        """Frames at the beginning without gradient."""
        frames = inputs["pixel_values"].shape[1]
        return max(frames - (self.trainer.args.gradient_frames or frames), 0)

    def forcing_probability(self) -> float:
        """Of remembering a mask that is not the student's own."""
        trainer, share = self.trainer, self.trainer.args.forcing_share
        if trainer.is_evaluating or not share:
            return 0.0
        forced_steps = share * max(trainer.state.max_steps, 1)
        return max(0.0, 1 - trainer.state.global_step / forced_steps)

    def forced_masks(
        self, inputs: Mapping[str, Any], taught: EfficientSam3ClipOutput | None, truth: Tensor
    ) -> dict[str, Tensor]:
        """Masks to be remembered, and in which frames, for `forward_clip`."""
        args, step = self.trainer.args, self.trainer.state.global_step
        probability, labels = self.forcing_probability(), inputs["labels"]
        if not probability:
            return {}
        frames = inputs["pixel_values"].shape[1]
        draws = [generator_of(label, args.seed, step, "forcing").random(frames) for label in labels]
        is_forced = torch.stack([torch.from_numpy(each) < probability for each in draws])
        if taught is None or args.forcing == "truth":
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
        numbers = {name: int(flags.sum()) for name, flags in counted.items()}
        return self.named({"samples": len(inputs["labels"]), **numbers})

    def teacher_step(self, inputs: Mapping[str, Any]) -> list[FrameFeatures] | None:
        """What the teacher sees in each frame. What it answers depends on corrections."""
        teacher, tokens = self.trainer.teacher, decoded(inputs, self.cache)
        if teacher is None:
            return None
        if tokens is not None:
            frames = clip_frames(tokens, len(inputs["labels"]))
            dtype = teacher.tracker.dtype
            return [FrameFeatures(*(each.to(dtype) for each in frame)) for frame in frames]
        return teacher(encode, inputs.get("teacher_pixel_values", inputs["pixel_values"]))

    def student_step(
        self, student: Family, inputs: Mapping[str, Any], targets: list[FrameFeatures] | None
    ) -> dict[str, Tensor]:
        """Loss terms of the objects of a batch, frame by frame."""
        labels, plan = inputs["labels"], self.plan(inputs)
        constant = self.constant_frames(inputs)
        frames = encode(student, inputs["pixel_values"], constant)
        truth = true_masks(plan, labels)
        prompts = first_prompts(plan, labels, 0.0 if self.trainer.is_evaluating else JITTER)
        with torch.no_grad():
            if any(asked.corrections for _, _, asked in plan.rows()):
                said = follow(student, frames, prompts, plan)
                prompts = prompts + correcting_clicks(plan, labels, truth, said_masks(said, truth))
            taught = None
            if targets is not None:
                taught = self.trainer.teacher(
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
        sums: dict[str, Any] = dict.fromkeys(TERMS, nothing)
        for time in range(constant, len(frames)):
            at = {name: flags[:, time].nonzero()[:, 0] for name, flags in counted.items()}
            of_frame = [self.truth_terms(said, truth[:, time], counted, time, at)]
            if taught is not None:
                of_frame.append(memory_terms(said, taught, time, at))
                of_frame.append(teacher_terms(said, taught, time, at["predicted"]))
            for terms in of_frame:
                sums = {name: total + terms.get(name, 0.0) for name, total in sums.items()}
        return self.named(sums)

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
        logits = resized(candidates[visible].float(), truth.shape[-2:])
        inside = truth[visible, None].expand_as(logits)
        focal, dice = focal_loss(logits, inside), dice_loss(logits, inside)
        factors = self.trainer.factors
        errors = factors[f"{self.prefix}focal"] * focal + factors[f"{self.prefix}dice"] * dice
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
        # The teacher does not change, and is asked once; by all processes whenever one must, as
        # they gather weights that are sharded.
        is_new = not self.teacher_scores.keys() >= set(names.values())
        mine = torch.tensor([is_new], device=self.trainer.args.device)
        if targets is not None and self.trainer.accelerator.gather(mine).any():
            taught = self.trainer.teacher(follow, targets, prompts, plan)
            theirs = score_rows(taught, plan, labels)
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
        args = self.trainer.args
        shares = [float(kind == args.scored_prompt) for kind in KINDS]
        return make_plan(inputs["labels"], PromptRules(None, shares), args.seed, "score")

    def summarize(self, records: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """J, F and J&F of the student and any teacher."""
        units = stack(records)
        if self.trainer.teacher is None:
            return summarize(units)
        theirs = {name: units.pop(f"teacher_{name}") for name in ("J", "F")}
        teacher = {f"teacher_{name}": value for name, value in summarize(theirs).items()}
        return summarize(units) | teacher

    def draw(self, student: Family, batch: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Frames of each clip, above with any teacher's masks, below with the student's."""
        labels, plan = batch["labels"], self.score_plan(batch)
        pixels, prompts = batch["pixel_values"], first_prompts(plan, labels, jitter=0.0)
        masks = [follow(student, encode(student, pixels), prompts, plan).pred_masks]
        if self.trainer.teacher is not None:
            seen = self.teacher_step(batch)
            masks.insert(0, self.trainer.teacher(follow, seen, prompts, plan).pred_masks)
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
        "teacher_masks": (cross_entropy(logits, goal) * is_seen).sum(),
        "teacher_dice": (dice_loss(logits, goal) * is_seen).sum(),
        "teacher_iou": ((scores - target_scores).abs().mean(dim=1) * is_seen).sum(),
        "teacher_object": score_loss(objects, target_objects).sum(),
    }


def of_rows(frames: Sequence[Tensor] | None, time: int) -> Tensor:
    """One frame (clips, objects, ...) as (rows, ...)."""
    return frames[time].flatten(0, 1)  # pyright: ignore[reportOptionalSubscript]: was asked for


def said_masks(said: EfficientSam3ClipOutput, truth: Tensor) -> Tensor:
    """Logits (rows, frames, height, width) in the size of the truth."""
    return resized(said.pred_masks.float().transpose(1, 2).flatten(0, 1), truth.shape[-2:])


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


def memory_parts(student: Family) -> list[str]:
    """Those of `MEMORY_PARTS` that a student has."""
    weights = [name for name, _ in student.named_parameters()]
    return [part for part in MEMORY_PARTS if fnmatch.filter(weights, PARTS.get(part, part))]


def check_video(role: str, family: Any) -> None:
    """Raise for what cannot follow objects."""
    if not isinstance(getattr(family, "tracker", None), EfficientSam3TrackerVideoModel):
        raise ValueError(
            f"The {role} has no tracker in video. Take a folder that has one, or make a student "
            "of such a teacher with a configuration that says what its memory is."
        )
