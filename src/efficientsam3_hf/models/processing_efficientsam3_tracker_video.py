"""Frames, points, boxes and masks to a session of the tracker in video."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .processing_efficientsam3_tracker import EfficientSam3TrackerProcessor
from .prompts import PADDING_LABEL
from .video_session import EfficientSam3VideoSession


class VideoFramesMixin:
    """Gives a processor the way from frames to a session.

    There is no video processor: frames go through the image processor, each when it is asked for,
    so that a video takes no more memory than it came in.
    """

    def init_video_session(
        self,
        video: Any = None,
        inference_device: str | torch.device = "cpu",
        inference_state_device: str | torch.device | None = None,
        processing_device: str | torch.device | None = None,
        video_storage_device: str | torch.device | None = None,
        max_vision_features_cache_size: int = 1,
        dtype: torch.dtype = torch.float32,
        max_conditioning_frames: int = 16,
        history: int | None = 0,
    ) -> EfficientSam3VideoSession:
        """A session to add prompts to, and to track in.

        Args:
            video: Frames of any kind that the image processor takes: a list, an array, or a tensor
                (frames, ...). None for a stream.
            inference_device: Where the model runs.
            inference_state_device: Where memories lie; None for `inference_device`.
            processing_device: Where frames are resized; None for `inference_device`.
            video_storage_device: Where frames of a stream lie; None for `inference_device`.
            max_vision_features_cache_size: As in `EfficientSam3VideoSession`.
            dtype: Of the frames.
            max_conditioning_frames: As in `EfficientSam3VideoSession`.
            history: As in `EfficientSam3VideoSession`.
        """
        frames, size = None, (None, None)
        if video is not None:
            frames = self.frames(video, processing_device or inference_device)
            size = frames.original_size
        return EfficientSam3VideoSession(
            frames,
            *size,
            inference_device=inference_device,
            inference_state_device=inference_state_device or inference_device,
            video_storage_device=video_storage_device or inference_device,
            dtype=dtype,
            max_vision_features_cache_size=max_vision_features_cache_size,
            max_conditioning_frames=max_conditioning_frames,
            history=history,
        )

    def frames(self, video: Any, device: str | torch.device = "cpu") -> "ProcessedFrames":
        """Frames of a video as the model takes them, each made when it is asked for.

        `EfficientSam3VideoSession.load` takes them too.
        """
        return ProcessedFrames(video, self.image_processor, device)

    def add_frame(self, inference_session: EfficientSam3VideoSession, frame: Any) -> int:
        """Add the next frame of a stream, as it came, to a session; gives its index.

        The model goes there with `model(inference_session, frame_idx=index)`.
        """
        inputs = self.image_processor(
            self.open_frame(frame), return_tensors="pt", device=inference_session.inference_device
        )
        set_size(inference_session, inputs["original_sizes"][0])
        return inference_session.add_new_frame(inputs["pixel_values"][0])

    def open_frame(self, frame: Any) -> Any:
        """A frame of any kind as a PIL image, an array or a tensor."""
        pictures = self.image_processor.flatten(frame)
        if len(pictures) != 1:
            raise ValueError(f"Give one frame at a time, not {len(pictures)}.")
        return pictures[0]


class EfficientSam3TrackerVideoProcessor(VideoFramesMixin, EfficientSam3TrackerProcessor):
    """`Sam3TrackerVideoProcessor`, call for call, that checks prompts before they are used."""

    def add_inputs_to_inference_session(
        self,
        inference_session: EfficientSam3VideoSession,
        frame_idx: int,
        obj_ids: list[int] | int,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        input_masks=None,
        original_size: tuple[int, int] | None = None,
        clear_old_inputs: bool = True,
    ) -> EfficientSam3VideoSession:
        """Say what objects are in a frame, by points, boxes, or masks, in original pixels.

        Args:
            inference_session: To add to.
            frame_idx: The frame; of a stream, the newest or one to come.
            obj_ids: One object or several, new ones or some to correct.
            input_points: Points (x, y), nested as image, object, point.
            input_labels: 1 on the object, 0 beside it; nested as image, object, point.
            input_boxes: Boxes (x1, y1, x2, y2), nested as image, object.
            input_masks: A mask (height, width) for each object.
            original_size: (height, width) of the frames of a stream, where no frame has come yet.
            clear_old_inputs: Whether points given before for this frame are dropped.
        """
        obj_ids = [obj_ids] if isinstance(obj_ids, int | np.integer) else list(obj_ids)
        if len(set(obj_ids)) != len(obj_ids):
            raise ValueError(f"obj_ids {obj_ids} name an object twice.")
        if (input_points is None) != (input_labels is None):
            raise ValueError("points and labels must be provided together")
        if input_points is None and input_boxes is None and input_masks is None:
            raise ValueError("at least one of points, boxes, or masks must be provided as input")
        if input_masks is not None:
            if input_points is not None or input_boxes is not None:
                raise ValueError("masks cannot be provided together with points or boxes")
            return self.process_new_mask_for_video_frame(
                inference_session, frame_idx, obj_ids, input_masks
            )
        return self.process_new_points_or_boxes_for_video_frame(
            inference_session,
            frame_idx,
            obj_ids,
            input_points,
            input_labels,
            input_boxes,
            original_size,
            clear_old_inputs,
        )

    def process_new_points_or_boxes_for_video_frame(
        self,
        inference_session: EfficientSam3VideoSession,
        frame_idx: int,
        obj_ids: list[int],
        input_points=None,
        input_labels=None,
        input_boxes=None,
        original_size: tuple[int, int] | None = None,
        clear_old_inputs: bool = True,
    ) -> EfficientSam3VideoSession:
        """As `add_inputs_to_inference_session`, for points and boxes."""
        if input_boxes is not None and not clear_old_inputs:
            raise ValueError(
                "A box comes before any point: it cannot be added to older points "
                "(clear_old_inputs=False)."
            )
        if original_size is not None:
            set_size(inference_session, original_size)
        size = [inference_session.video_height, inference_session.video_width]
        if None in size:
            raise ValueError(
                "The size of the frames is not known yet: give original_size=(height, width) with "
                "prompts that come before the first frame of a stream."
            )
        encoding = self(
            input_points=input_points,
            input_labels=input_labels,
            input_boxes=input_boxes,
            original_sizes=[size],
        )
        prompts = {name: encoding.get(name) for name in ("input_points", "input_boxes")}
        for name, values in prompts.items():
            if values is not None and values.shape[:2] != (1, len(obj_ids)):
                raise ValueError(
                    f"{name} must be of one frame and {len(obj_ids)} objects, as obj_ids are, not "
                    f"of {values.shape[0]} and {values.shape[1]}."
                )
        for index, obj_id in enumerate(obj_ids):
            points, labels = [], []
            if prompts["input_boxes"] is not None:
                points.append(prompts["input_boxes"][0, index].view(2, 2))
                labels.append(torch.tensor([2, 3]))
            if prompts["input_points"] is not None:
                of_object = encoding["input_labels"][0, index]
                points.append(prompts["input_points"][0, index][of_object != PADDING_LABEL])
                labels.append(of_object[of_object != PADDING_LABEL])
            inference_session.add_points(
                obj_id, frame_idx, torch.cat(points), torch.cat(labels), clear_old_inputs
            )
        return inference_session

    def process_new_mask_for_video_frame(
        self,
        inference_session: EfficientSam3VideoSession,
        frame_idx: int,
        obj_ids: list[int],
        input_masks,
    ) -> EfficientSam3VideoSession:
        """As `add_inputs_to_inference_session`, for masks."""
        masks = input_masks if isinstance(input_masks, list | tuple) else [input_masks]
        if len(masks) == 1 and len(obj_ids) > 1 and np.ndim(masks[0]) == 3:
            masks = list(masks[0])
        if len(masks) != len(obj_ids):
            raise ValueError(f"{len(masks)} masks do not fit {len(obj_ids)} objects {obj_ids}.")
        for obj_id, mask in zip(obj_ids, masks, strict=True):
            mask = torch.as_tensor(np.asarray(mask)) if not isinstance(mask, Tensor) else mask
            if mask.ndim < 2 or mask[..., 0, 0].numel() != 1:
                raise ValueError(f"A mask is (height, width), not {tuple(mask.shape)}.")
            mask = mask.reshape(1, 1, *mask.shape[-2:]).float()
            if not bool(mask.isfinite().all()):
                raise ValueError(f"The mask of object {obj_id} holds values that are not finite.")
            size = (self.target_size, self.target_size)
            if mask.shape[-2:] != size:
                mask = F.interpolate(
                    mask, size, mode="bilinear", align_corners=False, antialias=True
                )
                mask = (mask >= 0.5).float()
            inference_session.add_mask(obj_id, frame_idx, mask[0, 0])
        return inference_session


class ProcessedFrames(Sequence):
    """Frames of a video as the model takes them, each made when it is asked for.

    Args:
        video: Frames of any kind that the image processor takes, all of one size.
        image_processor: Of the family.
        device: Where frames are resized.
    """

    def __init__(self, video: Any, image_processor, device: str | torch.device = "cpu"):
        if isinstance(video, list | tuple) and len(video) == 1 and np.ndim(video[0]) == 4:
            video = video[0]  # a batch of one video
        if isinstance(video, np.ndarray | Tensor) and video.ndim != 4:
            raise ValueError(
                f"A video is (frames, height, width, 3) or (frames, 3, height, width), not "
                f"{tuple(video.shape)}."
            )
        if isinstance(video, str) or not hasattr(video, "__getitem__"):
            raise TypeError(
                f"A video is a list, an array or a tensor of frames, not {type(video).__name__}."
            )
        if len(video) == 0:
            raise ValueError("The video has no frames.")
        self.video = video
        self.image_processor = image_processor
        self.device = device
        first = image_processor(video[0], return_tensors="pt", device=device)
        self.original_size = tuple(int(side) for side in first["original_sizes"][0])

    def __len__(self) -> int:
        return len(self.video)

    def __getitem__(self, index: int) -> Tensor:
        inputs = self.image_processor(self.video[index], return_tensors="pt", device=self.device)
        size = tuple(int(side) for side in inputs["original_sizes"][0])
        if size != self.original_size:
            raise ValueError(
                f"Frame {index} is of {size[0]} x {size[1]} pixels, the first one of "
                f"{self.original_size[0]} x {self.original_size[1]}."
            )
        return inputs["pixel_values"][0]


def set_size(session: EfficientSam3VideoSession, size: Sequence[int] | Tensor) -> None:
    """Tell a session the (height, width) of its frames, which do not change."""
    height, width = (int(side) for side in size)
    known = (session.video_height, session.video_width)
    if None not in known and known != (height, width):
        raise ValueError(
            f"A frame of {height} x {width} pixels in a video of {known[0]} x {known[1]}."
        )
    session.video_height, session.video_width = height, width
