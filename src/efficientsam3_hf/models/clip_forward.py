"""Clips with gradients, for training the memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

from .object_memory import FrameFeatures
from .tracker_video_parts import (
    GIVEN_BIAS,
    GIVEN_SCALE,
    EfficientSam3TrackerVideoParts,
    MaskPrediction,
    MemoryBatch,
    resize,
)


@dataclass
class EfficientSam3ClipOutput(ModelOutput):
    """What the tracker says of the objects of some clips.

    Args:
        pred_masks: Logits (clips, frames, objects, height, width) of the best masks.
        iou_scores: (clips, frames, objects): how good these are thought to be.
        object_score_logits: (clips, frames, objects): whether the object is in the frame.
        object_pointers: (clips, frames, objects, channels).
        all_masks: For each frame, logits (clips, objects, masks, height, width) of all candidates.
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
    ) -> EfficientSam3ClipOutput:
        """Follow objects from the first frame of clips to the last, with gradients.

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
        prompts = ClipPrompts.read(input_points, input_labels, input_boxes, input_masks)
        constant = 0 if gradient_frames is None else max(num_frames - gradient_frames, 0)
        if frames is None:
            frames = self.encode_clips(pixel_values[:, :num_frames], constant)
        forced = forced_rows(memory_masks, is_forced, num_frames, prompts.num_objects)
        limit = self.config.max_object_pointers_in_encoder
        num_pointers = limit if streaming else min(clip_length, limit)

        predictions, conditioned = [], []
        memories: list[Tensor] = []
        with_gradient = torch.is_grad_enabled()
        for time, features in enumerate(frames[:num_frames]):
            with torch.set_grad_enabled(with_gradient and time >= constant):
                rows = repeat_features(features, prompts.num_objects)
                prediction, coarse = self.roll_on(
                    rows, prompts, time, memories, predictions, num_pointers
                )
                predictions.append(prediction)
                if output_conditioned_features:
                    conditioned.append(coarse.unflatten(0, (clips, -1)))
                if time + 1 < num_frames:
                    memories.append(self.clip_memory(rows, prediction, time, forced))

        def gathered(field: str) -> Tensor:
            rows = torch.stack([getattr(each, field) for each in predictions], dim=1)
            return rows.unflatten(0, (clips, -1)).transpose(1, 2)  # (clips, frames, objects, ...)

        def listed(field: str) -> tuple[Tensor, ...]:
            return tuple(getattr(each, field).unflatten(0, (clips, -1)) for each in predictions)

        return EfficientSam3ClipOutput(
            pred_masks=gathered("pred_masks").squeeze(3),
            iou_scores=gathered("iou_scores"),
            object_score_logits=gathered("object_score_logits").squeeze(3),
            object_pointers=gathered("object_pointer"),
            all_masks=listed("all_masks"),
            all_iou_scores=listed("all_iou_scores"),
            conditioned_features=tuple(conditioned) if output_conditioned_features else None,
        )

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
            with torch.set_grad_enabled(with_gradient and enabled):
                *maps, positions = self.encode_frames(pixels.flatten(0, 1))
                maps = [each.unflatten(0, pixels.shape[:2]).unbind(dim=1) for each in maps]
            frames += [FrameFeatures(*each, positions) for each in zip(*maps, strict=True)]
        return frames

    def roll_on(
        self,
        features: FrameFeatures,
        prompts: "ClipPrompts",
        time: int,
        memories: list[Tensor],
        predictions: list[MaskPrediction],
        num_pointers: int,
    ) -> tuple[MaskPrediction, Tensor]:
        """Masks of one frame of clips, and its coarsest map as the mask decoder saw it."""
        if time == 0:
            coarse = self.without_memory(features.coarse)
            if prompts.masks is not None:
                return self.adopt_masks(features, prompts.masks), coarse
            points, labels = prompts.points, prompts.labels
            multimask = self.use_multimask(True, labels.shape[1])
        else:
            memory = self.recall_clip(time, memories, predictions, num_pointers)
            coarse = self.with_memory(features.coarse, features.positions, memory, num_pointers)
            points = labels = None
            multimask = self.use_multimask(False, 0)
        prediction = self.predict_masks(
            features, coarse, points, labels, multimask_output=multimask
        )
        return prediction, coarse

    def recall_clip(
        self,
        time: int,
        memories: list[Tensor],
        predictions: list[MaskPrediction],
        num_pointers: int,
    ) -> MemoryBatch:
        """What all rows remember in a frame of clips: the first frame, and the latest."""
        seen = [0, *range(max(1, time - self.config.num_maskmem + 1), time)]
        pointed = [0, *range(time - 1, max(0, time - num_pointers), -1)]
        rows, device = len(memories[0]), memories[0].device
        offsets = torch.tensor([0 if frame == 0 else time - frame for frame in seen], device=device)
        ago = torch.tensor([time - frame for frame in pointed], device=device)
        return MemoryBatch(
            features=torch.stack([memories[frame] for frame in seen], dim=1),
            offsets=offsets.expand(rows, -1),
            pointers=torch.stack([predictions[frame].object_pointer for frame in pointed], dim=1),
            pointer_offsets=ago.expand(rows, -1),
        )

    def clip_memory(
        self,
        features: FrameFeatures,
        prediction: MaskPrediction,
        time: int,
        forced: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Memory of a frame of clips: of the masks found there, or of those to be remembered."""
        rows = len(prediction.pred_masks)
        is_prompted = torch.full((rows,), time == 0, device=prediction.pred_masks.device)
        probabilities = self.memory_masks(prediction.high_res_masks, is_prompted)
        scores = prediction.object_score_logits
        if forced is not None:
            masks, is_forced = forced[0][:, time, None], forced[1][:, time]
            masks = resize(masks.to(probabilities.dtype), self.memory_mask_size)
            is_there = (masks > 0).flatten(1).any(dim=1, keepdim=True)
            probabilities = torch.where(is_forced.view(-1, 1, 1, 1), masks, probabilities)
            given = is_there.to(scores.dtype) * GIVEN_SCALE + GIVEN_BIAS
            scores = torch.where(is_forced[:, None], given, scores)
        return self.encode_memories(features.coarse, probabilities, scores)


@dataclass
class ClipPrompts:
    """Prompts on the first frame of clips, one row for each object of each clip.

    Args:
        num_objects: Objects of each clip.
        points: (rows, points, 2), boxes as two of them.
        labels: (rows, points).
        masks: (rows, 1, height, width).
    """

    num_objects: int
    points: Tensor | None = None
    labels: Tensor | None = None
    masks: Tensor | None = None

    @classmethod
    def read(
        cls,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        masks: Tensor | None,
    ) -> "ClipPrompts":
        """Prompts as `forward_clip` takes them, checked."""
        if (points is None) != (labels is None):
            raise ValueError("Give points and labels together.")
        if (masks is None) == (points is None and boxes is None):
            raise ValueError("Give points, boxes (or both), or masks, on the first frame.")
        if masks is not None:
            return cls(masks.shape[1], masks=masks.flatten(0, 1)[:, None])
        all_points, all_labels = [], []
        if boxes is not None:
            corners = boxes.unflatten(-1, (2, 2))
            all_points.append(corners)
            all_labels.append(torch.tensor([2, 3], device=boxes.device).expand(corners.shape[:-1]))
        if points is not None:
            all_points.append(points)
            all_labels.append(labels)
        joined = torch.cat([each.float() for each in all_points], dim=2)
        return cls(
            joined.shape[1],
            joined.flatten(0, 1),
            torch.cat([each.long() for each in all_labels], dim=2).flatten(0, 1),
        )


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


def repeat_features(features: FrameFeatures, num_objects: int) -> FrameFeatures:
    """Features of one frame of each clip, for each of its objects."""
    *maps, positions = features
    return FrameFeatures(*(each.repeat_interleave(num_objects, dim=0) for each in maps), positions)
