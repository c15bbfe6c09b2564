"""The parts of the tracker in video, as functions from tensors to tensors.

A row is an object of a frame. All rows go through in one batch, and gradients pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    NO_OBJ_SCORE,
    Sam3TrackerVideoModel,
    get_1d_sine_pe,
)
from transformers.utils import can_return_tuple

from .configuration_efficientsam3_video import EfficientSam3TrackerVideoConfig
from .memory_attention import EfficientSam3MemoryAttention
from .object_memory import FrameFeatures, Recollection
from .perceiver_memory import EfficientSam3PerceiverMemory

# Logits of a mask that was given, inside and outside of it: 0 and 1 after a sigmoid.
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
        all_masks: Logits (rows, masks, height, width) of all candidates, also where the object is
            said to be gone and `pred_masks` are therefore empty.
        all_iou_scores: (rows, masks).
    """

    pred_masks: Tensor
    high_res_masks: Tensor
    iou_scores: Tensor
    object_score_logits: Tensor
    object_pointer: Tensor
    all_masks: Tensor
    all_iou_scores: Tensor


class EfficientSam3TrackerVideoParts(Sam3TrackerVideoModel):
    """transformers' `Sam3TrackerVideoModel` taken apart: features, memories, masks.

    Its weights keep their names. `EfficientSam3TrackerVideoModel` joins the parts again, for
    sessions and for clips.
    """

    config: EfficientSam3TrackerVideoConfig

    def __init__(self, config: EfficientSam3TrackerVideoConfig, remove_vision_encoder: bool):
        super().__init__(config, remove_vision_encoder)
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
        elif isinstance(module, EfficientSam3TrackerVideoParts):
            init.zeros_(module.no_memory_embedding)

    # From pixels to features.

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs):
        """As in transformers; another size than the configured one is an error that says so."""
        self.check_size(pixel_values)
        return super().get_image_features(pixel_values, return_dict=True, **kwargs)

    def encode_frames(self, pixel_values: Tensor) -> FrameFeatures:
        """What the heads need of frames (frames, 3, height, width)."""
        self.check_size(pixel_values)
        outputs = self.vision_encoder(pixel_values.to(self.dtype), return_dict=True)
        return self.project_levels(outputs.fpn_hidden_states, outputs.fpn_position_encoding)

    def project_levels(
        self, levels: Sequence[Tensor], positions: Sequence[Tensor]
    ) -> FrameFeatures:
        """What the heads need of the maps of a neck, finest first, and of their positions."""
        fine, middle, coarse = levels[:3]
        return FrameFeatures(
            fine=self.mask_decoder.conv_s0(fine),
            middle=self.mask_decoder.conv_s1(middle),
            coarse=coarse,
            positions=positions[2][:1].flatten(2).transpose(1, 2),
        )

    def check_size(self, pixel_values: Tensor) -> None:
        """Raise for frames of another size than the prompts are given in."""
        size = self.image_size  # that its positions are laid out for
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"This tracker takes {size} x {size}, not {pixel_values.shape[-2]} x "
                f"{pixel_values.shape[-1]}. Load it with image_size={pixel_values.shape[-1]}, or "
                "resize: its prompts are coordinates in the configured size."
            )

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

        row, best = torch.arange(rows, device=coarse.device), iou_scores.argmax(dim=-1)
        pred_masks = torch.where(is_there[..., None, None], masks[row, best][:, None], NO_OBJ_SCORE)
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


def pad_recollections(
    each: list[Recollection], no_pointers: Tensor, device: torch.device
) -> MemoryBatch:
    """One batch of what objects remember; shorter memories are padded and marked.

    Args:
        each: What each object remembers.
        no_pointers: (0, hidden size), for an object that is followed before its first prompt.
        device: Where the model runs.
    """

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
            [torch.stack(one.pointers) if one.pointers else no_pointers for one in each]
        ),
        pointer_offsets=offsets([one.pointer_offsets for one in each]),
    )
    if has_frame is not None or has_pointer is not None:
        batch.has_frame = torch.ones_like(batch.offsets, dtype=torch.bool)
        batch.has_pointer = torch.ones_like(batch.pointer_offsets, dtype=torch.bool)
        batch.has_frame = batch.has_frame if has_frame is None else has_frame
        batch.has_pointer = batch.has_pointer if has_pointer is None else has_pointer
    return batch


def resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (rows, 1, height, width) in another size, smoothed where that is smaller."""
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    resized = F.interpolate(
        masks.float(), size, mode="bilinear", align_corners=False, antialias=True
    )
    return resized.to(masks.dtype)
