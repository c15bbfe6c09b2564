"""What the detector and the tracker see of a frame, and what the detector finds in it."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput, Sam3VisionNeck

from .concept_session import ConceptPrompt, EfficientSam3ConceptSession
from .configuration_efficientsam3_video import EfficientSam3VideoConfig
from .masks import distinct_masks
from .modeling_efficientsam3 import EfficientSam3Model
from .modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
from .object_memory import FrameFeatures


@dataclass
class Detections:
    """What the detector found in a frame, for all prompts.

    Args:
        masks: Logits (detections, height, width).
        scores: (detections,) probabilities, presence included.
        prompts: Number of the prompt that found each.
    """

    masks: Tensor
    scores: Tensor
    prompts: list[int]


class ConceptDetection(PreTrainedModel):
    """The half of a model of concepts in video that looks at single frames."""

    config: EfficientSam3VideoConfig
    detector_model: EfficientSam3Model
    tracker_model: EfficientSam3TrackerVideoModel
    tracker_neck: nn.Module

    def encode_frame(self, pixel_values: Tensor) -> tuple[Sam3VisionEncoderOutput, FrameFeatures]:
        """What the detector and the tracker see of a frame (1, 3, height, width)."""
        vision = self.detector_model.get_vision_features(
            pixel_values.to(self.dtype), return_dict=True
        )
        if isinstance(self.tracker_neck, Sam3VisionNeck):
            height, width = vision.fpn_hidden_states[2].shape[-2:]
            tokens = vision.last_hidden_state.transpose(1, 2).unflatten(2, (height, width))
            levels, _ = self.tracker_neck(tokens)
        else:
            levels = self.tracker_neck(vision.feature_maps)
        return vision, self.tracker_model.project_levels(levels, vision.fpn_position_encoding)

    def detect(
        self,
        session: EfficientSam3ConceptSession,
        vision: Sam3VisionEncoderOutput,
        frame_idx: int,
    ) -> Detections:
        """Instances of all prompts in a frame, the image encoded once, duplicates left out."""
        levels, position, _ = self.detector_model.unpack_vision(vision)
        numbers = [n for n, prompt in enumerate(session.prompts) if session.can_look_for(prompt)]
        rows = [
            self.prompt_tokens(session, session.prompts[number], levels[-1], position, frame_idx)
            for number in numbers
        ]
        if not rows:
            empty = levels[0].new_zeros(0, *levels[0].shape[-2:])
            return Detections(empty, levels[0].new_zeros(0), [])
        tokens = nn.utils.rnn.pad_sequence([row[0] for row, _ in rows], batch_first=True)
        valid = nn.utils.rnn.pad_sequence([mask[0] for _, mask in rows], batch_first=True)
        output = self.detector_model.detect(
            [level.expand(len(rows), -1, -1, -1) for level in levels],
            position.expand(len(rows), -1, -1, -1),
            tokens,
            valid,
        )
        probabilities = output.pred_logits.sigmoid() * output.presence_logits.sigmoid()
        masks, scores, prompts = [], [], []
        for row, number in enumerate(numbers):
            sure = probabilities[row] > self.config.score_threshold_detection
            found, found_scores = output.pred_masks[row][sure], probabilities[row][sure]
            if self.config.det_nms_thresh > 0:
                keep = distinct_masks(found > 0, found_scores, self.config.det_nms_thresh)
                found, found_scores = found[keep], found_scores[keep]
            masks.append(found)
            scores.append(found_scores)
            prompts += [number] * len(found)
        return Detections(torch.cat(masks), torch.cat(scores), prompts)

    def prompt_tokens(
        self,
        session: EfficientSam3ConceptSession,
        prompt: ConceptPrompt,
        coarse: Tensor,
        position: Tensor,
        frame_idx: int,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (1, length, channels) of a prompt, and which are valid.

        Exemplars are encoded in the frame they were given in, and their tokens go with the phrase
        in all others.
        """
        detector = self.detector_model
        tokens = prompt.text_embeds
        if tokens is None:
            features = detector.get_text_features(
                prompt.input_ids, prompt.attention_mask, return_dict=True
            )
            tokens = prompt.text_embeds = cast(Tensor, features.pooler_output)
        valid = prompt.attention_mask.bool()
        if prompt.frame_idx is not None:
            geometry = prompt.exemplar_tokens
            if geometry is None:
                if prompt.frame_idx != frame_idx:  # one that has passed, but was kept
                    frame = prompt.frame
                    if frame is None:
                        frame = session.tracker.get_frame(prompt.frame_idx)
                    levels, position, _ = detector.unpack_vision(self.encode_frame(frame[None])[0])
                    coarse = levels[-1]
                geometry, _ = detector.geometry_encoder(
                    coarse, position, prompt.boxes, prompt.boxes_labels
                )
                prompt.exemplar_tokens, prompt.frame = geometry, None
        elif detector.config.always_encode_geometry:
            geometry, _ = detector.geometry_encoder(coarse, position)
        else:
            return tokens, valid
        more = torch.ones(geometry.shape[:2], dtype=torch.bool, device=valid.device)
        return torch.cat([tokens, geometry], dim=1), torch.cat([valid, more], dim=1)
