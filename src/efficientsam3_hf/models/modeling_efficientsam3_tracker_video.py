"""The tracker in video: objects given on any frame, followed through all of them.

The parts are those of transformers' `Sam3TrackerVideoModel`, and so are the results on dense
memory. Ours is how they are joined: functions from tensors to tensors, which treat all objects of
a frame in one batch and let gradients through, with inference on a bounded session and the
training of clips as two thin users of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto import AutoModel
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    NO_OBJ_SCORE,
    Sam3TrackerVideoModel,
    Sam3TrackerVideoSegmentationOutput,
    get_1d_sine_pe,
)
from transformers.utils import can_return_tuple

from .checkpoint_layout import TRACKER_RENAMES, StrictLoadingMixin, tracker_weights
from .configuration_efficientsam3 import EfficientSam3Config, EfficientSam3TrackerConfig
from .configuration_efficientsam3_video import EfficientSam3TrackerVideoConfig, tracker_part
from .from_teacher import FromTeacherMixin
from .memory_attention import EfficientSam3MemoryAttention
from .modeling_efficientsam3_vision import fuse_vision_encoder
from .perceiver_memory import EfficientSam3PerceiverMemory
from .video_session import (
    EfficientSam3VideoSession,
    FrameFeatures,
    FrameMemory,
    Recollection,
    TrackedObject,
)

# Logits of a mask that was given rather than predicted, inside and outside: 0 and 1 after a sigmoid.
GIVEN_SCALE, GIVEN_BIAS = 20.0, -10.0


@dataclass
class MemoryBatch:
    """What the memory attention sees of each row (an object of a frame), padded to one length.

    Args:
        features: (rows, frames, tokens, channels).
        offsets: (rows, frames): 0 for a frame with prompts, else how many frames ago.
        pointers: (rows, pointers, hidden size).
        pointer_offsets: (rows, pointers): how many frames ago.
        has_frame: (rows, frames), false for padding; None for no padding.
        has_pointer: (rows, pointers), likewise.
    """

    features: Tensor
    offsets: Tensor
    pointers: Tensor
    pointer_offsets: Tensor
    has_frame: Tensor | None = None
    has_pointer: Tensor | None = None


@dataclass
class MaskPrediction:
    """What the mask decoder says of each row.

    Args:
        pred_masks: Logits (rows, 1, height, width) of the best mask.
        high_res_masks: The same in the size of the model's input, from which memories are made.
        iou_scores: (rows,): how good that mask is thought to be.
        object_score_logits: (rows, 1): whether the object is in the frame.
        object_pointer: (rows, channels): the object in one vector.
        all_masks: Logits (rows, masks, height, width) of all candidates.
        all_iou_scores: (rows, masks).
    """

    pred_masks: Tensor
    high_res_masks: Tensor
    iou_scores: Tensor
    object_score_logits: Tensor
    object_pointer: Tensor
    all_masks: Tensor
    all_iou_scores: Tensor


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


class Step(NamedTuple):
    """What the tracker has to do for an object of a frame; objects of equal steps share a batch."""

    kind: str  # "mask", "points" or "track"
    num_points: int = 0
    uses_memory: bool = True


class EfficientSam3TrackerVideoModel(StrictLoadingMixin, FromTeacherMixin, Sam3TrackerVideoModel):
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
        self.backbone_feature_sizes = [[scale * self.config.grid_size] * 2 for scale in (4, 2, 1)]
        self.memory_attention = EfficientSam3MemoryAttention(self.config)
        self.spatial_perceiver = None
        if self.config.memory == "perceiver":
            self.spatial_perceiver = EfficientSam3PerceiverMemory(self.config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EfficientSam3PerceiverMemory):
            for latents in (module.latents_1d, module.latents_2d):
                if latents is not None:
                    init.normal_(latents)
        elif isinstance(module, EfficientSam3TrackerVideoModel):
            init.zeros_(module.no_memory_embedding)

    def fuse(self) -> "EfficientSam3TrackerVideoModel":
        """Fold RepViT's parallel branches and batch norms, for inference and export."""
        fuse_vision_encoder(self.vision_encoder)
        return self

    @classmethod
    def teacher_weights(cls, teacher: PreTrainedModel) -> dict[str, Tensor]:
        """Weights of the teacher's tracker under the names of this class."""
        return tracker_weights(teacher.state_dict())

    # From pixels to features.

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs):
        """As in transformers; another size than the configured one is an error that says so."""
        size = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"This tracker takes {size} x {size}, not {pixel_values.shape[-2]} x "
                f"{pixel_values.shape[-1]}. Load it with image_size={pixel_values.shape[-1]}, or "
                "resize: its prompts are coordinates in the configured size."
            )
        return super().get_image_features(pixel_values, return_dict=True, **kwargs)

    def encode_frames(self, pixel_values: Tensor) -> FrameFeatures:
        """What the heads need of frames (frames, 3, height, width)."""
        outputs = self.get_image_features(pixel_values.to(self.dtype))
        maps = [
            tokens.permute(1, 2, 0).unflatten(-1, size)
            for tokens, size in zip(
                outputs.fpn_hidden_states[:3],
                map(tuple, self.backbone_feature_sizes),
                strict=True,
            )
        ]
        positions = outputs.fpn_position_encoding[2][:, :1].transpose(0, 1)
        return FrameFeatures(*maps, positions)

    # From memories to features that know of them.

    def without_memory(self, coarse: Tensor) -> Tensor:
        """Coarsest maps (rows, channels, height, width) where nothing is remembered."""
        return coarse + self.no_memory_embedding.view(1, -1, 1, 1)

    def with_memory(
        self, coarse: Tensor, positions: Tensor, memory: MemoryBatch, num_pointers: int
    ) -> Tensor:
        """Coarsest maps that have looked at the memory of each row.

        Args:
            coarse: (rows, channels, height, width), or a batch of 1 for all rows.
            positions: (1, height * width, channels).
            memory: What each row remembers.
            num_pointers: Frames whose pointers can be seen, plus one: the unit of their offsets.
        """
        rows = len(memory.features)
        features, feature_positions = memory.features.to(self.dtype), self.memory_positions()
        # Row -1 of the table stands for frames with prompts, whose offset is 0.
        times = self.memory_temporal_positional_encoding.flatten(1)[memory.offsets - 1]
        feature_positions = feature_positions + times[:, :, None]
        pointers, pointer_positions = self.pointer_tokens(
            memory.pointers.to(self.dtype), memory.pointer_offsets, num_pointers
        )
        splits = pointers.shape[1] // max(memory.pointers.shape[1], 1)
        valid = None
        if memory.has_frame is not None and memory.has_pointer is not None:
            tokens = features.shape[2]
            valid = torch.cat(
                [
                    memory.has_frame.repeat_interleave(tokens, dim=1),
                    memory.has_pointer.repeat_interleave(splits, dim=1),
                ],
                dim=1,
            )
        tokens = self.memory_attention(
            coarse.flatten(2).transpose(1, 2).expand(rows, -1, -1),
            positions,
            torch.cat([features.flatten(1, 2), pointers], dim=1),
            torch.cat([feature_positions.flatten(1, 2), pointer_positions], dim=1),
            num_object_pointer_tokens=pointers.shape[1],
            valid=valid,
        )
        return tokens.transpose(1, 2).unflatten(-1, coarse.shape[-2:])

    def memory_positions(self) -> Tensor:
        """Position encoding (tokens, channels) of the tokens by which a frame is remembered."""
        if self.spatial_perceiver is not None:
            return self.spatial_perceiver.positions()
        return self.dense_positions()[0].flatten(1).T

    def dense_positions(self) -> Tensor:
        """Position encoding (1, channels, height, width) of a map that the memory encoder made."""
        shape = (1, self.mem_dim, *self.backbone_feature_sizes[-1])
        # In float32, since bfloat16 cannot count rows; see the vision encoder.
        encoding = self.memory_encoder.position_encoding(
            torch.Size(shape), self.no_memory_embedding.device, torch.float32
        )
        return encoding.to(self.dtype)

    def pointer_tokens(
        self, pointers: Tensor, offsets: Tensor, num_pointers: int
    ) -> tuple[Tensor, Tensor]:
        """Object pointers (rows, pointers, hidden size) as tokens of the memory's width.

        Returns:
            Tokens (rows, pointers * splits, memory channels), and their positions.
        """
        splits = max(self.hidden_dim // self.mem_dim, 1)
        tokens = pointers.unflatten(-1, (splits, -1)).flatten(1, 2)
        if not self.config.enable_temporal_pos_encoding_for_object_pointers:
            return tokens, torch.zeros_like(tokens)
        times = offsets.float() / max(num_pointers - 1, 1)
        encoding = get_1d_sine_pe(times, dim=self.hidden_dim).to(tokens.dtype)
        positions = self.temporal_positional_encoding_projection_layer(encoding)
        return tokens, positions.repeat_interleave(splits, dim=1)

    # From features to masks.

    def predict_masks(
        self,
        features: FrameFeatures,
        coarse: Tensor,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        mask_logits: Tensor | None = None,
        multimask_output: bool = True,
    ) -> MaskPrediction:
        """Ask the mask decoder for one mask for each row.

        Args:
            features: Maps of each row, or of one frame for all rows.
            coarse: Coarsest map (rows, channels, height, width), with memory or without.
            points: (rows, points, 2), in pixels of the model's input; None for none.
            labels: (rows, points).
            mask_logits: (rows, 1, height, width) of any size, as a prompt.
            multimask_output: Whether to choose among several candidates.
        """
        rows = len(coarse)
        if points is None:
            points = coarse.new_zeros(rows, 1, 2)
            labels = torch.full((rows, 1), -1, device=coarse.device)
        if mask_logits is not None:
            mask_logits = resize(mask_logits, self.prompt_encoder.mask_input_size)
        sparse, dense = self.prompt_encoder(points[:, None], labels[:, None], None, mask_logits)
        masks, iou_scores, tokens, object_score_logits = self.mask_decoder(
            image_embeddings=coarse,
            image_positional_embeddings=self.get_image_wide_positional_embeddings().expand(
                rows, -1, -1, -1
            ),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask_output,
            high_resolution_features=[features.fine, features.middle],
        )
        masks, iou_scores, tokens = masks[:, 0], iou_scores[:, 0], tokens[:, 0]
        object_score_logits = object_score_logits[:, 0]  # (rows, 1)
        is_there = object_score_logits > 0
        masks = torch.where(is_there[..., None, None], masks, NO_OBJ_SCORE)

        row, best = torch.arange(rows, device=coarse.device), iou_scores.argmax(dim=-1)
        pred_masks = masks[row, best][:, None]
        # One token may stand for all candidates.
        token = tokens[row, best if tokens.shape[1] > 1 else 0]
        pointer = torch.where(is_there, self.object_pointer_proj(token), self.no_object_pointer)
        high_res_masks = F.interpolate(
            pred_masks.float(), (self.image_size,) * 2, mode="bilinear", align_corners=False
        )
        return MaskPrediction(
            pred_masks=pred_masks,
            high_res_masks=high_res_masks.to(pred_masks.dtype),
            iou_scores=iou_scores[row, best],
            object_score_logits=object_score_logits,
            object_pointer=pointer,
            all_masks=masks,
            all_iou_scores=iou_scores,
        )

    def adopt_masks(self, features: FrameFeatures, masks: Tensor) -> MaskPrediction:
        """Take masks that were given as if they had been predicted.

        Args:
            features: Maps of each row, or of one frame for all rows.
            masks: (rows, 1, height, width) of any size, from 0 to 1.
        """
        masks = resize(masks.to(self.dtype), (self.image_size,) * 2)
        high_res_masks = masks * GIVEN_SCALE + GIVEN_BIAS
        coarse = features.coarse.expand(len(masks), -1, -1, -1)
        pointer = self.predict_masks(
            features, coarse, mask_logits=self.mask_downsample(masks)
        ).object_pointer
        is_there = (masks > 0).flatten(1).any(dim=1, keepdim=True)
        pred_masks = resize(high_res_masks, self.prompt_encoder.mask_input_size)
        return MaskPrediction(
            pred_masks=pred_masks,
            high_res_masks=high_res_masks,
            iou_scores=masks.new_ones(len(masks)),
            object_score_logits=is_there.to(masks.dtype) * GIVEN_SCALE + GIVEN_BIAS,
            object_pointer=torch.where(is_there, pointer, self.no_object_pointer),
            all_masks=pred_masks,
            all_iou_scores=masks.new_ones(len(masks), 1),
        )

    def use_multimask(self, is_initial: bool, num_points: int) -> bool:
        """Whether a prompt is ambiguous enough to choose among several masks."""
        config = self.config
        return (
            config.multimask_output_in_sam
            and (is_initial or config.multimask_output_for_tracking)
            and config.multimask_min_pt_num <= num_points <= config.multimask_max_pt_num
        )

    # From masks to memories.

    def encode_memories(
        self, coarse: Tensor, probabilities: Tensor, object_score_logits: Tensor
    ) -> Tensor:
        """Tokens (rows, tokens, channels) by which a frame and its masks are remembered.

        Args:
            coarse: Coarsest map, without memory: (rows, channels, height, width), or a batch of 1
                for all rows.
            probabilities: Masks (rows, 1, height, width) from 0 to 1, as `memory_masks` makes them.
            object_score_logits: (rows, 1).
        """
        scale, bias = self.config.sigmoid_scale_for_mem_enc, self.config.sigmoid_bias_for_mem_enc
        memory_map, position_map = self.memory_encoder(
            coarse.expand(len(probabilities), -1, -1, -1), probabilities * scale + bias
        )
        if self.occlusion_spatial_embedding_parameter is not None:
            is_gone = (object_score_logits <= 0).to(memory_map.dtype)
            embedding = self.occlusion_spatial_embedding_parameter
            memory_map = memory_map + (is_gone * embedding)[..., None, None]
        if self.spatial_perceiver is not None:
            return self.spatial_perceiver(memory_map, self.dense_positions())
        # Half the memory, and the rounding that SAM 3 was trained with.
        return memory_map.flatten(2).transpose(1, 2).to(torch.bfloat16)

    def memory_masks(self, high_res_masks: Tensor, is_prompted: Tensor) -> Tensor:
        """Mask logits (rows, 1, height, width) as the memory encoder takes them, from 0 to 1.

        Args:
            high_res_masks: In the size of the model's input.
            is_prompted: (rows,): masks that a prompt stands for become 0 or 1, except in training,
                where that would cut the gradient.
        """
        logits = resize(high_res_masks, self.memory_mask_size)
        soft = logits.sigmoid()
        if self.training:
            return soft
        return torch.where(is_prompted.view(-1, 1, 1, 1), (logits > 0).to(soft.dtype), soft)

    @property
    def memory_mask_size(self) -> tuple[int, int]:
        """Size of the masks that the memory encoder takes."""
        height, width = self.prompt_encoder.mask_input_size
        return 4 * height, 4 * width

    # A session, frame by frame.

    @torch.inference_mode()
    def forward(
        self,
        inference_session: EfficientSam3VideoSession,
        frame_idx: int | None = None,
        frame: Tensor | None = None,
        reverse: bool = False,
        run_mem_encoder: bool = True,
        object_ids: Sequence[int] | None = None,
        **kwargs,
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
                if not any(frame != frame_idx for frame in tracked.conditioning()):
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
        return pad_recollections(each, self.hidden_dim, device)

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
            later = [obj_id for obj_id, start in starts.items() if start > frame_idx]
            yield self(session, frame_idx=frame_idx, reverse=True, object_ids=later)

    # A clip, with gradients.

    def forward_clip(
        self,
        pixel_values: Tensor,
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
        """
        clips, clip_length = pixel_values.shape[:2]
        num_frames = clip_length if num_frames is None else num_frames
        if not 1 <= num_frames <= clip_length:
            raise ValueError(f"num_frames={num_frames} of clips of {clip_length} frames.")
        prompts = ClipPrompts.read(input_points, input_labels, input_boxes, input_masks)
        constant = 0 if gradient_frames is None else max(num_frames - gradient_frames, 0)
        frames = self.encode_clips(pixel_values[:, :num_frames], constant)
        forced = forced_rows(memory_masks, is_forced, num_frames, prompts.num_objects)
        limit = self.config.max_object_pointers_in_encoder
        num_pointers = limit if streaming else min(clip_length, limit)

        predictions, conditioned = [], []
        memories: list[Tensor] = []
        with_gradient = torch.is_grad_enabled()
        for time, features in enumerate(frames):
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

    def encode_clips(self, pixel_values: Tensor, constant: int) -> list[FrameFeatures]:
        """Features of each frame of clips, the first `constant` frames without gradients."""
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


def pad_recollections(
    each: list[Recollection], hidden_size: int, device: torch.device
) -> MemoryBatch:
    """One batch of what objects remember; shorter memories are padded and marked."""

    def padded(rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True)

    def counts(lengths: list[int]) -> Tensor | None:
        if len(set(lengths)) == 1:
            return None
        steps = torch.arange(max(lengths), device=device)
        return steps < torch.tensor(lengths, device=device)[:, None]

    def offsets(values: list[list[int]]) -> Tensor:
        return padded([torch.tensor(row, dtype=torch.long) for row in values])

    has_frame = counts([len(one.offsets) for one in each])
    has_pointer = counts([len(one.pointer_offsets) for one in each])
    batch = MemoryBatch(
        features=padded([torch.stack(one.features) for one in each]),
        offsets=offsets([one.offsets for one in each]),
        pointers=padded(
            [
                torch.stack(one.pointers) if one.pointers else torch.zeros(0, hidden_size)
                for one in each
            ]
        ),
        pointer_offsets=offsets([one.pointer_offsets for one in each]),
    )
    if has_frame is not None or has_pointer is not None:
        batch.has_frame = torch.ones_like(batch.offsets, dtype=torch.bool)
        batch.has_pointer = torch.ones_like(batch.pointer_offsets, dtype=torch.bool)
        batch.has_frame = batch.has_frame if has_frame is None else has_frame
        batch.has_pointer = batch.has_pointer if has_pointer is None else has_pointer
    return batch


def own_rows(batch: Tensor, session: EfficientSam3VideoSession) -> list[Tensor]:
    """Rows that do not keep the whole batch alive, where the session keeps its memories."""
    batch = batch.to(session.inference_state_device)
    return [row.clone() for row in batch] if len(batch) > 1 else [batch[0]]


def resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (rows, 1, height, width) in another size, smoothed where that is smaller."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    resized = F.interpolate(
        masks.float(), size, mode="bilinear", align_corners=False, antialias=True
    )
    return resized.to(masks.dtype)


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
AutoModel.register(
    EfficientSam3TrackerVideoConfig, EfficientSam3TrackerVideoModel, exist_ok=True
)
