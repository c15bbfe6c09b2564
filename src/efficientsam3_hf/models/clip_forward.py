"""Clips with gradients, for training the memory."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .object_memory import FrameFeatures, FrameMemory, TrackedObject
from .tracker_video_parts import (
    GIVEN_BIAS,
    GIVEN_SCALE,
    EfficientSam3TrackerVideoParts,
    MaskPrediction,
    pad_recollections,
    resize,
)


@dataclass
class EfficientSam3ClipOutput(ModelOutput):
    """What the tracker says of the objects of some clips.

    Where an object has had no prompt yet, all of it is 0.

    Args:
        pred_masks: Logits (clips, frames, objects, height, width) of the best masks.
        iou_scores: (clips, frames, objects): how good these are thought to be.
        object_score_logits: (clips, frames, objects): whether the object is in the frame.
        object_pointers: (clips, frames, objects, channels).
        all_masks: For each frame, logits (clips, objects, masks, height, width) of all candidates,
            also where the object is said to be gone. An object with fewer candidates than others
            has its last one repeated.
        all_iou_scores: For each frame, (clips, objects, masks).
        conditioned_features: For each frame, its coarsest map after it has looked at the memory:
            (clips, objects, channels, height, width). Only where asked for.
    """

    pred_masks: Tensor | None = None
    iou_scores: Tensor | None = None
    object_score_logits: Tensor | None = None
    object_pointers: Tensor | None = None
    all_masks: tuple[Tensor, ...] | None = None
    all_iou_scores: tuple[Tensor, ...] | None = None
    conditioned_features: tuple[Tensor, ...] | None = None


@dataclass
class FramePrompt:
    """Prompts of one kind on one frame of clips.

    Args:
        frame: Its number in the clips.
        rows: Whose prompts they are: object o of clip c is row c * objects + o.
        points: (prompted, points, 2) as (x, y) in pixels of the model's input; boxes are two.
        labels: (prompted, points): 1 on the object, 0 beside it, 2 and 3 for corners of a box.
        masks: (prompted, 1, height, width) of any size, from 0 to 1, in place of points.
    """

    frame: int
    rows: list[int]
    points: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None

    def of(self, chosen: list[int]) -> "FramePrompt":
        """Of some of its rows alone, by their place among them."""
        index = torch.tensor(chosen)
        points, labels, masks = (
            None if each is None else each[index.to(each.device)]
            for each in (self.points, self.labels, self.masks)
        )
        return FramePrompt(self.frame, [self.rows[i] for i in chosen], points, labels, masks)


@dataclass
class ClipPrompts:
    """All prompts of clips. An object begins with its first; those after that are corrections.

    Args:
        num_objects: Objects of each clip. Those without a prompt are not followed.
        prompts: In any order.
    """

    num_objects: int
    prompts: list[FramePrompt]

    @classmethod
    def read(
        cls,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        masks: Tensor | None,
    ) -> "ClipPrompts":
        """Prompts on the first frame as `forward_clip` takes them, checked."""
        if (points is None) != (labels is None):
            raise ValueError("Give points and labels together.")
        if (masks is None) == (points is None and boxes is None):
            raise ValueError("Give points, boxes (or both), or masks, on the first frame.")
        if masks is not None:
            rows = list(range(masks.shape[0] * masks.shape[1]))
            return cls(masks.shape[1], [FramePrompt(0, rows, masks=masks.flatten(0, 1)[:, None])])
        all_points, all_labels = [], []
        if boxes is not None:
            corners = boxes.unflatten(-1, (2, 2))
            all_points.append(corners)
            all_labels.append(torch.tensor([2, 3], device=boxes.device).expand(corners.shape[:-1]))
        if points is not None:
            all_points.append(points)
            all_labels.append(labels)
        joined = torch.cat([each.float() for each in all_points], dim=2)
        labels = torch.cat([each.long() for each in all_labels], dim=2)
        rows = list(range(joined.shape[0] * joined.shape[1]))
        prompt = FramePrompt(0, rows, joined.flatten(0, 1), labels.flatten(0, 1))
        return cls(joined.shape[1], [prompt])

    def starts(self) -> dict[int, int]:
        """First frame with a prompt of each row that has one."""
        starts: dict[int, int] = {}
        for prompt in self.prompts:
            for row in prompt.rows:
                starts[row] = min(prompt.frame, starts.get(row, prompt.frame))
        return starts

    def at(self, frame: int, starts: dict[int, int]) -> list[tuple[FramePrompt, bool]]:
        """Those of one frame, and whether an object begins with them or is corrected by them."""
        found = []
        for prompt in self.prompts:
            for is_first in (True, False):
                chosen = [
                    place
                    for place, row in enumerate(prompt.rows)
                    if prompt.frame == frame and (starts[row] == frame) == is_first
                ]
                if chosen:
                    found.append((prompt.of(chosen), is_first))
        return found


@dataclass
class ClipStep:
    """What was found in one frame of clips.

    Args:
        rows: Objects that had begun.
        prediction: Of these.
        coarse: Coarsest map of each of these, as the mask decoder saw it.
    """

    rows: list[int]
    prediction: MaskPrediction
    coarse: Tensor

    def get(self, name: str) -> Tensor:
        """One field of it all."""
        return self.coarse if name == "coarse" else getattr(self.prediction, name)


class ClipForward(EfficientSam3TrackerVideoParts):
    """Gives the tracker in video its method `forward_clip`."""

    def forward_clip(
        self,
        pixel_values: Tensor | None = None,
        input_points: Tensor | None = None,
        input_labels: Tensor | None = None,
        input_boxes: Tensor | None = None,
        input_masks: Tensor | None = None,
        num_frames: int | None = None,
        memory_masks: Tensor | None = None,
        is_forced: Tensor | None = None,
        gradient_frames: int | None = None,
        streaming: bool = False,
        output_conditioned_features: bool = False,
        frames: Sequence[FrameFeatures] | None = None,
        prompts: ClipPrompts | None = None,
    ) -> EfficientSam3ClipOutput:
        """Follow objects through clips, with gradients.

        In evaluation mode the masks are those of a session on each clip.

        Args:
            pixel_values: Clips (clips, frames, 3, height, width).
            input_points: Prompts on the first frame: (clips, objects, points, 2), in pixels of the
                model's input. Give points, boxes (or both), or masks.
            input_labels: (clips, objects, points): 1 on the object, 0 beside it.
            input_boxes: (clips, objects, 4) as (x1, y1, x2, y2).
            input_masks: (clips, objects, height, width) of any size, from 0 to 1.
            num_frames: How many frames to roll out; None for all.
            memory_masks: Masks (clips, frames, objects, height, width) of any size, from 0 to 1, to
                be remembered in place of predicted ones (teacher forcing).
            is_forced: Where they are: (frames,) or (clips, frames); None for all frames.
            gradient_frames: Frames at the end that have gradients; what comes before them is
                computed without, and remembered as a constant. None for all.
            streaming: Whether the offsets of pointers count as in a stream or a long video, rather
                than in a video of the length of the clip.
            output_conditioned_features: Whether to return the maps that have looked at the memory.
            frames: What `encode_clips` gave, in place of pixels: where the trunk is frozen, clips
                need to be encoded only once.
            prompts: In place of prompts on the first frame: objects that begin on frames of their
                own, each with prompts of its own kind, and corrections.
        """
        if (pixel_values is None) == (frames is None):
            raise ValueError(
                "Give an inference_session or, of clips, either pixel_values or frames."
            )
        if frames is None:
            clips, clip_length = pixel_values.shape[:2]
        else:
            clips, clip_length = len(frames[0].coarse), len(frames)
        num_frames = clip_length if num_frames is None else num_frames
        if not 1 <= num_frames <= clip_length:
            raise ValueError(f"num_frames={num_frames} of clips of {clip_length} frames.")
        inputs = (input_points, input_labels, input_boxes, input_masks)
        if prompts is None:
            prompts = ClipPrompts.read(*inputs)
        elif any(each is not None for each in inputs):
            raise ValueError("Give prompts on the first frame, or prompts of any frame, not both.")
        starts = prompts.starts()
        if min(starts.values(), default=num_frames) >= num_frames:
            raise ValueError(f"No object has a prompt in the {num_frames} frames.")
        constant = 0 if gradient_frames is None else max(num_frames - gradient_frames, 0)
        if frames is None:
            frames = self.encode_clips(pixel_values[:, :num_frames], constant)
        forced = forced_rows(memory_masks, is_forced, num_frames, prompts.num_objects)
        limit = self.config.max_object_pointers_in_encoder
        num_pointers = limit if streaming else min(clip_length, limit)

        objects = [TrackedObject() for _ in range(clips * prompts.num_objects)]
        steps: list[ClipStep | None] = []
        with_gradient = torch.is_grad_enabled()
        for time, features in enumerate(frames[:num_frames]):
            if with_gradient and time == constant:
                forget_casts()
            rows = sorted(row for row, start in starts.items() if start <= time)
            if not rows:
                steps.append(None)
                continue
            with torch.set_grad_enabled(with_gradient and time >= constant):
                own = rows_of_clips(features, rows, prompts.num_objects)
                given = prompts.at(time, starts)
                is_known = [starts[row] < time for row in rows]
                coarse = self.recall_clips(own, rows, is_known, objects, time, num_pointers)
                prediction = self.predict_clips(own, coarse, rows, given)
                steps.append(ClipStep(rows, prediction, coarse))
                prompted = {row for prompt, _ in given for row in prompt.rows}
                tokens = None
                if time + 1 < num_frames:
                    tokens = self.encode_clip_memories(
                        own, prediction, rows, prompted, time, forced
                    )
                remember_clips(objects, time, rows, prompted, prediction, tokens)
        return clip_output(steps, clips, prompts.num_objects, output_conditioned_features)

    def encode_clips(self, pixel_values: Tensor, constant: int = 0) -> list[FrameFeatures]:
        """Features of each frame of clips (clips, frames, 3, height, width).

        Args:
            pixel_values: The clips.
            constant: Frames at the beginning that need no gradients.
        """
        frames: list[FrameFeatures] = []
        with_gradient = torch.is_grad_enabled()
        for part, enabled in ((slice(0, constant), False), (slice(constant, None), True)):
            pixels = pixel_values[:, part]
            if pixels.shape[1] == 0:
                continue
            if with_gradient and enabled:
                forget_casts()
            with torch.set_grad_enabled(with_gradient and enabled):
                *maps, positions = self.encode_frames(pixels.flatten(0, 1))
                maps = [each.unflatten(0, pixels.shape[:2]).unbind(dim=1) for each in maps]
            frames += [FrameFeatures(*each, positions) for each in zip(*maps, strict=True)]
        return frames

    def recall_clips(
        self,
        features: FrameFeatures,
        rows: list[int],
        is_known: list[bool],
        objects: list[TrackedObject],
        time: int,
        num_pointers: int,
    ) -> Tensor:
        """Coarsest map of each row of a frame; of those that are known, with their memories."""
        known = [place for place, each in enumerate(is_known) if each]
        if not known:
            return self.without_memory(features.coarse)
        config = self.config
        memory = pad_recollections(
            [
                objects[rows[place]].recall(
                    time, False, config.num_maskmem, num_pointers, config.max_cond_frame_num
                )
                for place in known
            ],
            self.no_object_pointer[:0],
            features.coarse.device,
        )
        if len(known) == len(rows):
            return self.with_memory(features.coarse, features.positions, memory, num_pointers)
        index = torch.tensor(known, device=features.coarse.device)
        seen = self.with_memory(features.coarse[index], features.positions, memory, num_pointers)
        return self.without_memory(features.coarse).index_copy(0, index, seen)

    def predict_clips(
        self,
        features: FrameFeatures,
        coarse: Tensor,
        rows: list[int],
        given: list[tuple[FramePrompt, bool]],
    ) -> MaskPrediction:
        """Masks of each row of a frame: of those with prompts, kind by kind, and of the others."""
        place_of = {row: place for place, row in enumerate(rows)}
        prompted = {row for prompt, _ in given for row in prompt.rows}
        others = [place for place, row in enumerate(rows) if row not in prompted]
        groups = [([place_of[row] for row in prompt.rows], prompt, new) for prompt, new in given]
        if others:
            groups.append((others, None, False))
        predictions = []
        for places, prompt, is_initial in groups:
            own, own_coarse = features, coarse
            if places != list(range(len(rows))):
                index = torch.tensor(places, device=coarse.device)
                own, own_coarse = take_rows(features, index), coarse[index]
            predictions.append(self.answer_prompt(own, own_coarse, prompt, is_initial))
        return join_predictions(predictions, [place for places, _, _ in groups for place in places])

    def answer_prompt(
        self,
        features: FrameFeatures,
        coarse: Tensor,
        prompt: FramePrompt | None,
        is_initial: bool,
    ) -> MaskPrediction:
        """Masks of rows with prompts of one kind, or with none."""
        if prompt is not None and prompt.masks is not None:
            return self.adopt_masks(features, prompt.masks)
        points = labels = None
        if prompt is not None:
            points, labels = prompt.points, prompt.labels
        multimask = self.use_multimask(is_initial, 0 if labels is None else labels.shape[1])
        return self.predict_masks(features, coarse, points, labels, multimask_output=multimask)

    def encode_clip_memories(
        self,
        features: FrameFeatures,
        prediction: MaskPrediction,
        rows: list[int],
        prompted: set[int],
        time: int,
        forced: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Memory of each row of a frame: of the masks found there, or of those to be remembered."""
        device = prediction.pred_masks.device
        is_prompted = torch.tensor([row in prompted for row in rows], device=device)
        probabilities = self.memory_masks(prediction.high_res_masks, is_prompted)
        scores = prediction.object_score_logits
        if forced is not None:
            masks, is_forced = forced[0][rows, time, None], forced[1][rows, time]
            masks = resize(masks.to(probabilities.dtype), self.memory_mask_size)
            is_there = (masks > 0).flatten(1).any(dim=1, keepdim=True)
            probabilities = torch.where(is_forced.view(-1, 1, 1, 1), masks, probabilities)
            given = is_there.to(scores.dtype) * GIVEN_SCALE + GIVEN_BIAS
            scores = torch.where(is_forced[:, None], given, scores)
        return self.encode_memories(features.coarse, probabilities, scores)


def remember_clips(
    objects: list[TrackedObject],
    time: int,
    rows: list[int],
    prompted: set[int],
    prediction: MaskPrediction,
    tokens: Tensor | None,
) -> None:
    """Give each object what is remembered of it in a frame."""
    features = [None] * len(rows) if tokens is None else tokens.unbind()
    pointers, scores = prediction.object_pointer.unbind(), prediction.object_score_logits.unbind()
    for place, row in enumerate(rows):
        objects[row].memories[time] = FrameMemory(
            pointers[place], features[place], None, scores[place], row in prompted
        )


def rows_of_clips(features: FrameFeatures, rows: list[int], num_objects: int) -> FrameFeatures:
    """Features of one frame of each clip, for each of these rows."""
    clips = torch.tensor([row // num_objects for row in rows], device=features.coarse.device)
    return take_rows(features, clips)


def take_rows(features: FrameFeatures, index: Tensor) -> FrameFeatures:
    """Features of some rows."""
    *maps, positions = features
    return FrameFeatures(*(each[index] for each in maps), positions)


def join_predictions(parts: list[MaskPrediction], order: list[int]) -> MaskPrediction:
    """Predictions of groups of rows as one, of rows 0, 1, ...

    Args:
        parts: Of each group.
        order: Numbers of the rows in the order of the groups.
    """
    if len(parts) == 1 and order == sorted(order):
        return parts[0]
    most = max(part.all_masks.shape[1] for part in parts)
    for part in parts:
        # Where there is one, copies of it change neither which is best nor the mean of all.
        missing = most - part.all_masks.shape[1]
        for name in ("all_masks", "all_iou_scores") if missing else ():
            each = getattr(part, name)
            last = each[:, -1:].expand(-1, missing, *each.shape[2:])
            setattr(part, name, torch.cat([each, last], dim=1))
    index = torch.tensor(order, device=parts[0].pred_masks.device).argsort()
    return MaskPrediction(
        *(
            torch.cat([getattr(part, field.name) for part in parts])[index]
            for field in fields(MaskPrediction)
        )
    )


def clip_output(
    steps: list[ClipStep | None], clips: int, num_objects: int, with_features: bool
) -> EfficientSam3ClipOutput:
    """What was found frame by frame as it is returned; zeros for objects that had not begun."""
    first = next(step for step in steps if step is not None)

    def listed(name: str) -> tuple[Tensor, ...]:
        """(clips, objects, ...) of each frame."""
        frames = []
        for step in steps:
            found = first.get(name) if step is None else step.get(name)
            rows = [] if step is None else step.rows
            if len(rows) < clips * num_objects:
                everyone = found.new_zeros(clips * num_objects, *found.shape[1:])
                index = torch.tensor(rows, dtype=torch.long, device=found.device)
                found = everyone.index_copy(0, index, found[: len(rows)])
            frames.append(found.unflatten(0, (clips, num_objects)))
        return tuple(frames)

    return EfficientSam3ClipOutput(
        pred_masks=torch.stack(listed("pred_masks"), dim=1).squeeze(3),
        iou_scores=torch.stack(listed("iou_scores"), dim=1),
        object_score_logits=torch.stack(listed("object_score_logits"), dim=1).squeeze(3),
        object_pointers=torch.stack(listed("object_pointer"), dim=1),
        all_masks=listed("all_masks"),
        all_iou_scores=listed("all_iou_scores"),
        conditioned_features=listed("coarse") if with_features else None,
    )


@torch.compiler.disable  # what is compiled keeps no casts
def forget_casts() -> None:
    """Have autocast cast weights anew, before frames with gradients.

    Older versions of torch keep what was cast without gradients, and then give it none.
    """
    torch.clear_autocast_cache()


def forced_rows(
    masks: Tensor | None, is_forced: Tensor | None, num_frames: int, num_objects: int
) -> tuple[Tensor, Tensor] | None:
    """Masks (rows, frames, height, width) to be remembered, and in which frames (rows, frames)."""
    if masks is None:
        if is_forced is not None:
            raise ValueError("is_forced says where memory_masks are remembered: give those too.")
        return None
    if masks.ndim != 5 or masks.shape[1] < num_frames or masks.shape[2] != num_objects:
        raise ValueError(
            f"memory_masks {tuple(masks.shape)} must be (clips, frames, objects, height, width), "
            f"with {num_objects} objects and at least {num_frames} frames."
        )
    if is_forced is None:
        is_forced = torch.ones(masks.shape[1], dtype=torch.bool, device=masks.device)
    is_forced = is_forced.to(masks.device).expand(len(masks), -1)
    return (
        masks.transpose(1, 2).flatten(0, 1),
        is_forced.repeat_interleave(num_objects, dim=0),
    )
