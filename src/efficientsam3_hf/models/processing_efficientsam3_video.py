"""Frames, phrases and exemplars to a session of concept tracking, and its outputs to masklets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes

from .concept_session import (
    ConceptPrompt,
    EfficientSam3ConceptSession,
    EfficientSam3VideoOutput,
)
from .image_processing_efficientsam3 import to_eight_bits, to_rgb
from .masks import without_overlap
from .processing_efficientsam3 import EfficientSam3Processor
from .processing_efficientsam3_tracker_video import VideoFramesMixin, set_size


@dataclass
class FrameMasklets:
    """The objects of one frame, in the size of the video.

    Args:
        frame_index: Number of the frame, where it came from.
        object_ids: Identity of each object, which stays through the video.
        labels: The phrase that each belongs to.
        scores: (objects,): of the detection that each began with.
        boxes: (objects, 4) as (x1, y1, x2, y2), in pixels.
        masks: Booleans (objects, height, width); those of one phrase do not overlap.
        is_confirmed: Whether each has outlived the time in which it could turn out to be none.
        pixels: (height, width, 3) of 8 bits: the frame itself, if it came as part of a stream.
    """

    frame_index: int
    object_ids: list[int]
    labels: list[str]
    scores: Tensor
    boxes: Tensor
    masks: Tensor
    is_confirmed: list[bool]
    pixels: np.ndarray | None = None


class EfficientSam3VideoProcessor(VideoFramesMixin, EfficientSam3Processor):
    """`Sam3VideoProcessor`, call for call, that also takes exemplars."""

    def init_video_session(self, *args, **kwargs) -> EfficientSam3ConceptSession:
        """A session to add phrases and exemplars to, and to follow them in.

        Arguments are those of `EfficientSam3TrackerVideoProcessor.init_video_session`.
        """
        return EfficientSam3ConceptSession(super().init_video_session(*args, **kwargs))

    def add_frame(self, inference_session: EfficientSam3ConceptSession, frame: Any) -> int:
        """Add the next frame of a stream, as it came, to a session; gives its index.

        The model goes there with `model(inference_session, frame_idx=index)`.
        """
        return super().add_frame(inference_session.tracker, frame)

    def to_pixels(self, picture: Any) -> np.ndarray:
        """A copy of a picture that the image processor takes, as (height, width, 3) of 8 bits."""
        full_scale = 255 if self.image_processor.do_rescale else 1
        pixels = to_rgb(to_eight_bits(picture), full_scale=full_scale)
        if pixels.is_floating_point():
            pixels = (pixels * (255 / full_scale)).round().clamp(0, 255)
        return np.array(pixels.movedim(0, -1).to("cpu", torch.uint8), order="C")

    def add_text_prompt(
        self, inference_session: EfficientSam3ConceptSession, text: str | Sequence[str]
    ) -> EfficientSam3ConceptSession:
        """Follow the instances of one phrase, or of several, from now on."""
        for phrase in [text] if isinstance(text, str) else text:
            inputs = self(text=phrase)
            inference_session.add_prompt(
                ConceptPrompt(phrase, inputs["input_ids"], inputs["attention_mask"])
            )
        return inference_session

    def add_exemplars(
        self,
        inference_session: EfficientSam3ConceptSession,
        frame_idx: int | None,
        boxes: Sequence[Sequence[float]],
        labels: Sequence[int] | None = None,
        text: str | None = None,
        original_size: tuple[int, int] | None = None,
    ) -> EfficientSam3ConceptSession:
        """Follow whatever is like the boxes of one frame, and unlike those labelled 0.

        Args:
            inference_session: To add to.
            frame_idx: The frame, as the session counts: its first is 0, whatever number that has in
                a file. Of a stream it is one at hand, such as the newest (None), or one to come.
            boxes: (x1, y1, x2, y2), in pixels of the original frame.
            labels: 1 for "like this", 0 for "unlike this"; all 1 if left out.
            text: A phrase that goes with them.
            original_size: (height, width) of the frames of a stream, where none has come yet.
        """
        tracker = inference_session.tracker
        if original_size is not None:
            set_size(tracker, original_size)
        if tracker.video_height is None:
            raise ValueError(
                "The size of the frames is not known yet: give original_size=(height, width) with "
                "exemplars that come before the first frame of a stream."
            )
        newest, source = inference_session.num_frames - 1, inference_session.source_frame
        if frame_idx is None:
            if not tracker.is_streaming or newest < 0:
                raise ValueError("frame_idx=None is the newest frame of a stream: there is none.")
            frame_idx = newest
        is_numbered = tracker.is_streaming and source is not None and source != newest
        if is_numbered and frame_idx > newest:
            raise ValueError(
                f"Frame {frame_idx} has yet to come as the session counts: {newest} is its newest, "
                f"which has the number {source} where it came from. Name the newest by None."
            )
        inputs = self(
            text=text,
            input_boxes=[boxes],
            input_boxes_labels=None if labels is None else [labels],
            original_sizes=[(tracker.video_height, tracker.video_width)],
        )
        inference_session.add_prompt(
            ConceptPrompt(
                text or "exemplars",
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs["input_boxes"],
                inputs["input_boxes_labels"],
                frame_idx,
            )
        )
        return inference_session

    def post_process_frame(
        self,
        inference_session: EfficientSam3ConceptSession,
        model_outputs: EfficientSam3VideoOutput,
        original_size: tuple[int, int] | None = None,
    ) -> FrameMasklets:
        """Objects of a frame in the size of the video.

        Objects without a mask are left out, and so are those found to be none by now, and those
        that no detection has confirmed for too long. Where masks of one phrase overlap, a pixel
        goes to the object that the tracker is surest of.

        Args:
            inference_session: That the outputs came from.
            model_outputs: Of one frame.
            original_size: (height, width); None for that of the session.
        """
        tracker = inference_session.tracker
        size = original_size or (tracker.video_height, tracker.video_width)
        if None in size:
            raise ValueError("The size of the frames is not known: give original_size.")
        left_out = model_outputs.removed_obj_ids | model_outputs.suppressed_obj_ids
        object_ids = sorted(set(model_outputs.obj_id_to_mask) - left_out)
        logits = [model_outputs.obj_id_to_mask[obj_id] for obj_id in object_ids]
        masks = resize_masks(logits, size)
        seen = masks.flatten(1).any(dim=1)
        object_ids = [obj_id for obj_id, is_seen in zip(object_ids, seen, strict=True) if is_seen]
        masks = masks[seen]
        boxes = masks_to_boxes(masks)
        sure = model_outputs.obj_id_to_tracker_score
        prompts = [model_outputs.obj_id_to_prompt_id[obj_id] for obj_id in object_ids]
        for prompt in set(prompts):
            rows = [row for row, of_object in enumerate(prompts) if of_object == prompt]
            scores = torch.tensor([sure.get(object_ids[row], 0.0) for row in rows])
            claims = torch.where(masks[rows], scores.to(masks.device)[:, None, None], -1.0)
            masks[rows] = without_overlap(claims) > 0
        source_frame = model_outputs.source_frame
        return FrameMasklets(
            frame_index=model_outputs.frame_idx if source_frame is None else source_frame,
            object_ids=object_ids,
            labels=[inference_session.prompts[prompt].label for prompt in prompts],
            scores=torch.tensor([model_outputs.obj_id_to_score[i] for i in object_ids]),
            boxes=boxes,
            masks=masks,
            is_confirmed=[i in model_outputs.confirmed_obj_ids for i in object_ids],
            pixels=model_outputs.pixels,
        )

    def postprocess_outputs(
        self,
        inference_session: EfficientSam3ConceptSession,
        model_outputs: EfficientSam3VideoOutput,
        original_sizes: Sequence[Any] | Tensor | None = None,
    ) -> dict[str, Any]:
        """As `post_process_frame`, in the form of `Sam3VideoProcessor`."""
        size = None
        if original_sizes is not None:
            sizes = torch.as_tensor(original_sizes).view(-1, 2)
            size = (int(sizes[0, 0]), int(sizes[0, 1]))
        frame = self.post_process_frame(inference_session, model_outputs, size)
        by_label: dict[str, list[int]] = {}
        for obj_id, label in zip(frame.object_ids, frame.labels, strict=True):
            by_label.setdefault(label, []).append(obj_id)
        return {
            "object_ids": torch.tensor(frame.object_ids, dtype=torch.int64),
            "scores": frame.scores,
            "boxes": frame.boxes,
            "masks": frame.masks,
            "prompt_to_obj_ids": by_label,
        }


def resize_masks(logits: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Mask logits (1, height, width) each, as booleans (masks, *size)."""
    if not logits:
        return torch.zeros(0, *size, dtype=torch.bool)
    return torch.cat(
        [
            F.interpolate(mask[None].float(), size, mode="bilinear", align_corners=False)[0] > 0
            for mask in logits
        ]
    )
