"""The tracker in video: objects given on any frame, followed through all of them.

The parts are those of transformers' `Sam3TrackerVideoModel`, and so are the results on dense
memory. Ours is how they are joined: all objects of a frame in one batch, on a session whose size
does not depend on the length of the video.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import AutoModel
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    Sam3TrackerVideoSegmentationOutput,
)

from .checkpoint_layout import TRACKER_RENAMES, StrictLoadingMixin, tracker_weights
from .clip_forward import ClipForward, EfficientSam3ClipOutput
from .configuration_efficientsam3 import EfficientSam3Config, EfficientSam3TrackerConfig
from .configuration_efficientsam3_video import EfficientSam3TrackerVideoConfig, tracker_part
from .from_teacher import FromTeacherMixin
from .modeling_efficientsam3_vision import fuse_vision_encoder
from .object_memory import FrameFeatures, FrameMemory, TrackedObject
from .tracker_video_parts import MaskPrediction, MemoryBatch, pad_recollections
from .video_session import EfficientSam3VideoSession


class Step(NamedTuple):
    """What the tracker has to do for an object of a frame; objects of equal steps share a batch."""

    kind: str  # "mask", "points" or "track"
    num_points: int = 0
    uses_memory: bool = True


class EfficientSam3TrackerVideoModel(StrictLoadingMixin, FromTeacherMixin, ClipForward):
    """SAM 3's tracker in video on any vision encoder of the family, with dense or Perceiver memory.

    It reads its part of a checkpoint that holds all tasks, and shares its weights with the tracker
    on images.
    """

    config: EfficientSam3TrackerVideoConfig
    config_class = EfficientSam3TrackerVideoConfig
    supports_gradient_checkpointing = True
    _supports_flash_attn = False  # knows no mask for objects with shorter memories
    _keys_to_ignore_on_load_unexpected = [r"^detector_model\."]

    def __init__(
        self,
        config: EfficientSam3TrackerVideoConfig | EfficientSam3Config,
        remove_vision_encoder: bool = False,
    ):
        super().__init__(tracker_video_config(config), remove_vision_encoder)

    def fuse(self) -> "EfficientSam3TrackerVideoModel":
        """Fold RepViT's parallel branches and batch norms, for inference and export."""
        fuse_vision_encoder(self.vision_encoder)
        return self

    @classmethod
    def teacher_weights(cls, teacher: PreTrainedModel) -> dict[str, Tensor]:
        """Weights of the teacher's tracker under the names of this class."""
        return tracker_weights(teacher.state_dict())

    def forward(
        self,
        inference_session: EfficientSam3VideoSession | None = None,
        frame_idx: int | None = None,
        frame: Tensor | None = None,
        reverse: bool = False,
        run_mem_encoder: bool = True,
        object_ids: Sequence[int] | None = None,
        pixel_values: Tensor | None = None,
        frames: Sequence[FrameFeatures] | None = None,
        **kwargs,
    ) -> Sam3TrackerVideoSegmentationOutput | EfficientSam3ClipOutput:
        """Follow the objects of a session into one frame, or those of clips with gradients.

        Args:
            inference_session: Made by the processor. The rest is as in `track_frame`.
            pixel_values: Clips, in place of a session. The rest is then as in `forward_clip`. This
                is the way in for whatever wraps a model for training.
            frames: Features of clips, in place of their pixels.
        """
        if inference_session is None:
            return self.forward_clip(pixel_values, frames=frames, **kwargs)
        if kwargs or pixel_values is not None or frames is not None:
            raise TypeError(f"With a session, these mean nothing: {sorted(kwargs) or 'clips'}.")
        return self.track_frame(
            inference_session, frame_idx, frame, reverse, run_mem_encoder, object_ids
        )

    # A session, frame by frame.

    @torch.inference_mode()
    def track_frame(
        self,
        inference_session: EfficientSam3VideoSession,
        frame_idx: int | None = None,
        frame: Tensor | None = None,
        reverse: bool = False,
        run_mem_encoder: bool = True,
        object_ids: Sequence[int] | None = None,
    ) -> Sam3TrackerVideoSegmentationOutput:
        """Follow the objects of a session into one frame.

        Args:
            inference_session: Made by the processor.
            frame_idx: The frame; None for the next one of a stream.
            frame: Pixel values (3, height, width) of the next frame of a stream.
            reverse: Whether time runs backward.
            run_mem_encoder: Whether the frame is to be remembered.
            object_ids: Objects to follow; None for all.

        Returns:
            Masks (objects, 1, height, width) of those objects that have had a prompt by now.
        """
        session = inference_session
        session.check_device(self.device)
        if frame is not None:
            frame_idx = session.add_new_frame(frame, frame_idx)
        if frame_idx is None:
            raise ValueError("Give a frame of a stream, or the index of a frame of the session.")
        if reverse and session.is_streaming:
            raise ValueError("A stream only goes forward.")
        features = self.frame_features(session, frame_idx)

        found: dict[int, tuple[Tensor, Tensor]] = {}
        batches = self.plan(session, frame_idx, object_ids, found)
        for step, members in batches.items():
            prediction = self.take_step(session, features, frame_idx, step, members, reverse)
            self.remember(session, features, frame_idx, step, members, prediction, run_mem_encoder)
            for row, obj_id in enumerate(members):
                found[obj_id] = (
                    prediction.pred_masks[row],
                    prediction.object_score_logits[row],
                )
        config = self.config
        session.forget(
            frame_idx,
            config.num_maskmem,
            config.max_object_pointers_in_encoder,
            config.max_cond_frame_num,
        )

        present = [obj_id for obj_id in session.obj_ids if obj_id in found]
        if present:
            masks = torch.stack([found[obj_id][0] for obj_id in present])
            scores = torch.stack([found[obj_id][1] for obj_id in present])
        else:
            masks = features.fine.new_zeros(0, 1, *self.prompt_encoder.mask_input_size)
            scores = features.fine.new_zeros(0, 1)
        return Sam3TrackerVideoSegmentationOutput(
            object_ids=present, pred_masks=masks, object_score_logits=scores, frame_idx=frame_idx
        )

    def frame_features(self, session: EfficientSam3VideoSession, frame_idx: int) -> FrameFeatures:
        """Vision features of a frame of a session, computed once."""
        features = session.cached_features(frame_idx)
        if features is None and self.vision_encoder is None:
            raise ValueError(
                f"This tracker has no vision encoder: give session.cache_features({frame_idx}, ...)"
                " what project_levels makes of the maps of another."
            )
        if features is None:
            features = self.encode_frames(session.get_frame(frame_idx)[None])
            session.cache_features(frame_idx, features)
        return features

    def plan(
        self,
        session: EfficientSam3VideoSession,
        frame_idx: int,
        object_ids: Sequence[int] | None,
        found: dict[int, tuple[Tensor, Tensor]],
    ) -> dict[Step, list[int]]:
        """Which objects share a batch in a frame; those known already go to `found`."""
        unknown = set(object_ids or ()) - set(session.objects)
        if unknown:
            raise ValueError(f"There are no objects {sorted(unknown)}, only {session.obj_ids}.")
        batches: dict[Step, list[int]] = {}
        for obj_id in session.obj_ids if object_ids is None else object_ids:
            tracked = session.objects[obj_id]
            prompt, memory = tracked.new_prompt(frame_idx), tracked.memories.get(frame_idx)
            if prompt is None:
                if memory is not None and memory.is_conditioning and memory.pred_masks is not None:
                    found[obj_id] = (
                        memory.pred_masks.to(session.inference_device),
                        memory.object_score_logits.to(session.inference_device),
                    )
                    continue
                if not tracked.is_known(frame_idx):
                    continue  # its first prompt is yet to come
                step = Step("track")
            elif prompt.mask is not None:
                step = Step("mask", uses_memory=False)
            else:
                uses_memory = not tracked.starts_anew(frame_idx)
                step = Step("points", len(prompt.labels), uses_memory)
            batches.setdefault(step, []).append(obj_id)
        return batches

    def take_step(
        self,
        session: EfficientSam3VideoSession,
        features: FrameFeatures,
        frame_idx: int,
        step: Step,
        members: list[int],
        reverse: bool,
    ) -> MaskPrediction:
        """Masks of objects that share a batch."""
        objects = [session.objects[obj_id] for obj_id in members]
        if step.kind == "mask":
            masks = torch.stack([tracked.prompts[frame_idx].mask for tracked in objects])
            return self.adopt_masks(features, masks[:, None])
        points = labels = None
        if step.kind == "points":
            points = torch.stack([tracked.prompts[frame_idx].points for tracked in objects])
            labels = torch.stack([tracked.prompts[frame_idx].labels for tracked in objects])
        if step.uses_memory:
            limit = self.config.max_object_pointers_in_encoder
            num_pointers = limit if session.is_streaming else min(session.num_frames, limit)
            memory = self.recall(objects, frame_idx, reverse, num_pointers, features.coarse.device)
            coarse = self.with_memory(features.coarse, features.positions, memory, num_pointers)
        else:
            coarse = self.without_memory(features.coarse).expand(len(members), -1, -1, -1)
        multimask = self.use_multimask(not step.uses_memory, step.num_points)
        return self.predict_masks(features, coarse, points, labels, multimask_output=multimask)

    def recall(
        self,
        objects: list[TrackedObject],
        frame_idx: int,
        reverse: bool,
        num_pointers: int,
        device: torch.device,
    ) -> MemoryBatch:
        """What objects remember, in one batch; shorter memories are padded."""
        config = self.config
        each = [
            tracked.recall(
                frame_idx, reverse, config.num_maskmem, num_pointers, config.max_cond_frame_num
            )
            for tracked in objects
        ]
        return pad_recollections(each, self.no_object_pointer[:0].to(device), device)

    def remember(
        self,
        session: EfficientSam3VideoSession,
        features: FrameFeatures,
        frame_idx: int,
        step: Step,
        members: list[int],
        prediction: MaskPrediction,
        run_mem_encoder: bool,
    ) -> None:
        """Put what was found in a frame into the memories of its objects."""
        is_prompted = step.kind != "track"
        tokens: Sequence[Tensor | None] = [None] * len(members)
        if run_mem_encoder:
            rows = len(members)
            flags = torch.full((rows,), is_prompted, device=prediction.pred_masks.device)
            probabilities = self.memory_masks(prediction.high_res_masks, flags)
            encoded = self.encode_memories(
                features.coarse, probabilities, prediction.object_score_logits
            )
            tokens = own_rows(encoded, session)
        pointers = own_rows(prediction.object_pointer, session)
        scores = own_rows(prediction.object_score_logits, session)
        masks = own_rows(prediction.pred_masks, session) if is_prompted else [None] * len(members)
        for row, obj_id in enumerate(members):
            tracked = session.objects[obj_id]
            is_initial = is_prompted and tracked.starts_anew(frame_idx)
            memory = FrameMemory(
                pointers[row], tokens[row], masks[row], scores[row], is_prompted, is_initial
            )
            tracked.remember(frame_idx, memory)

    # A whole video.

    def propagate_in_video_iterator(
        self,
        inference_session: EfficientSam3VideoSession,
        start_frame_idx: int | None = None,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[Sam3TrackerVideoSegmentationOutput]:
        """Follow the objects from frame to frame, in one direction.

        Args:
            inference_session: One with a whole video.
            start_frame_idx: Where to start; None for the first frame with a prompt.
            max_frame_num_to_track: How many frames to go from there; None for all there are.
            reverse: Whether to go backward.
            show_progress_bar: Whether to show one.
        """
        if start_frame_idx is None:
            start_frame_idx = min(frames_with_prompts(inference_session))
        distance = inference_session.num_frames
        if max_frame_num_to_track is not None:
            distance = max_frame_num_to_track
        if reverse:
            last = max(start_frame_idx - distance, 0)
            # As in transformers, there is nothing to do backward from the first frame.
            order = range(start_frame_idx, last - 1, -1) if start_frame_idx > 0 else range(0)
        else:
            last = min(start_frame_idx + distance, inference_session.num_frames - 1)
            order = range(start_frame_idx, last + 1)
        for frame_idx in tqdm(order, desc="tracking", disable=not show_progress_bar):
            yield self(inference_session, frame_idx=frame_idx, reverse=reverse)

    def propagate_both_ways_iterator(
        self, inference_session: EfficientSam3VideoSession, show_progress_bar: bool = False
    ) -> Iterator[Sam3TrackerVideoSegmentationOutput]:
        """Follow each object from its first prompt to the end of the video, and to its beginning.

        Each object comes once for each frame: first all frames from the first prompt on, forward;
        then backward, each frame with the objects whose first prompt came later.
        """
        session = inference_session
        frames_with_prompts(session)
        yield from self.propagate_in_video_iterator(session, show_progress_bar=show_progress_bar)
        starts = {
            obj_id: tracked.first_frame
            for obj_id, tracked in session.objects.items()
            if tracked.first_frame is not None
        }
        order = range(max(starts.values(), default=0) - 1, -1, -1)
        for frame_idx in tqdm(order, desc="tracking back", disable=not show_progress_bar):
            later = [
                obj_id
                for obj_id, start in starts.items()
                if start > frame_idx and obj_id in session.objects
            ]
            yield self(session, frame_idx=frame_idx, reverse=True, object_ids=later)


def own_rows(batch: Tensor, session: EfficientSam3VideoSession) -> list[Tensor]:
    """Rows that do not keep the whole batch alive, where the session keeps its memories."""
    batch = batch.to(session.inference_state_device)
    return [row.clone() for row in batch] if len(batch) > 1 else [batch[0]]


def frames_with_prompts(session: EfficientSam3VideoSession) -> list[int]:
    """Frames of a session with prompts; none is an error."""
    if session.is_streaming:
        raise ValueError("A stream has no end: call the model with one frame after another.")
    frames = session.prompted_frames()
    if not frames:
        raise ValueError("No object has a prompt: add one before tracking.")
    return frames


def tracker_video_config(
    config: EfficientSam3TrackerVideoConfig | EfficientSam3Config, **fields: Any
) -> EfficientSam3TrackerVideoConfig:
    """The part of the tracker in video of a configuration for all tasks.

    Args:
        config: Of the checkpoint, or of the tracker itself.
        fields: What to set otherwise, e.g. `memory="perceiver"`.
    """
    is_whole = isinstance(config, EfficientSam3Config)
    if not is_whole and not fields:
        return config
    part = tracker_part(config.to_dict()) if is_whole else config.to_dict()
    if part.get("memory") != fields.get("memory", part.get("memory")):
        part.pop("memory_attention_num_layers", None)  # each memory has its own usual depth
    result = EfficientSam3TrackerVideoConfig.from_dict({**part, **fields})
    result._attn_implementation = config._attn_implementation
    return result


def image_tracker_config(
    config: EfficientSam3TrackerConfig | EfficientSam3TrackerVideoConfig,
) -> EfficientSam3TrackerConfig:
    """Configuration of the tracker on images that shares its weights with one in video."""
    if isinstance(config, EfficientSam3TrackerConfig):
        return config
    parts = config.to_dict()
    return EfficientSam3TrackerConfig(
        **{name: parts[name] for name in EfficientSam3TrackerConfig.sub_configs_defaults},
        initializer_range=config.initializer_range,
    )


# Names in a checkpoint that holds all tasks. Alone, a tracker is all under `tracker_model.`.
register_checkpoint_conversion_mapping(
    EfficientSam3TrackerVideoConfig.model_type,
    [WeightRenaming(source, target) for source, target in TRACKER_RENAMES],
    overwrite=True,
)
AutoModel.register(EfficientSam3TrackerVideoConfig, EfficientSam3TrackerVideoModel, exist_ok=True)
