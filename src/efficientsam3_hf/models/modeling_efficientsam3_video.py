"""Concepts through video: every instance of a phrase, each with an identity that stays."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.models.auto import AutoModel
from transformers.models.sam3.modeling_sam3 import Sam3VisionNeck
from transformers.utils import logging

from .checkpoint_layout import StrictLoadingMixin
from .concept_detection import ConceptDetection, Detections
from .concept_runs import ConceptRuns
from .concept_session import (
    EfficientSam3ConceptSession,
    EfficientSam3VideoOutput,
)
from .configuration_efficientsam3_video import EfficientSam3VideoConfig
from .masklets import (
    Masklet,
    associate,
    hidden_masklets,
    judge,
    lost_masklets,
    newly_confused,
)
from .masks import NO_OBJECT_LOGIT, clean_masks, drop_overlapped
from .modeling_efficientsam3 import EfficientSam3Model
from .modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
from .modeling_efficientsam3_vision import build_neck
from .object_memory import FrameFeatures

logger = logging.get_logger(__name__)

# Logits of "the object is here", by which the memory encoder is told what a mask says.
HERE, GONE = 10.0, -10.0


class EfficientSam3VideoModel(StrictLoadingMixin, ConceptDetection, ConceptRuns):
    """Detector and tracker on one trunk; takes and returns what `Sam3VideoModel` does, and more.

    Weights have the names of a checkpoint for all tasks, and are read from one as they are.
    """

    config: EfficientSam3VideoConfig
    config_class = EfficientSam3VideoConfig
    base_model_prefix = "efficientsam3_video"
    main_input_name = "pixel_values"
    input_modalities = ["video", "text"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: EfficientSam3VideoConfig):
        super().__init__(config)
        config.detector_config._attn_implementation = config._attn_implementation
        config.tracker_config._attn_implementation = config._attn_implementation
        self.detector_model = EfficientSam3Model(config.detector_config)
        self.tracker_model = EfficientSam3TrackerVideoModel(
            config.tracker_config, remove_vision_encoder=True
        )
        vision_config = config.detector_config.vision_config
        is_vit = vision_config.model_type == "sam3_vision_model"
        self.tracker_neck = Sam3VisionNeck(vision_config) if is_vit else build_neck(vision_config)
        self.post_init()

    def fuse(self) -> "EfficientSam3VideoModel":
        """Fold RepViT's parallel branches and batch norms, for inference and export."""
        self.detector_model.fuse()
        return self

    # One frame.

    @torch.inference_mode()
    def forward(
        self,
        inference_session: EfficientSam3ConceptSession,
        frame_idx: int | None = None,
        frame: Tensor | None = None,
        reverse: bool = False,
    ) -> EfficientSam3VideoOutput:
        """Find and follow all concepts of a session in one frame.

        Args:
            inference_session: Made by the processor.
            frame_idx: The frame; None for the next one of a stream.
            frame: Pixel values (3, height, width) of the next frame of a stream.
            reverse: Whether time runs backward.

        Returns:
            Of each object its mask logits (1, height, width) and scores, and which objects have
            been found to be none by now.
        """
        session = inference_session
        session.tracker.check_device(self.device)
        if not session.prompts:
            raise ValueError("There is nothing to look for: add a phrase or exemplars first.")
        if frame is not None:
            frame_idx = session.tracker.add_new_frame(frame, frame_idx)
        if frame_idx is None:
            raise ValueError("Give a frame of a stream, or the index of a frame of the session.")
        vision, features = self.encode_frame(session.tracker.get_frame(frame_idx)[None])
        session.tracker.cache_features(frame_idx, features)

        masks, scores = self.track(session, frame_idx, reverse)
        detections = None
        if session.is_due(frame_idx, self.config.detect_every_nth_frame):
            detections = self.detect(session, vision, frame_idx)
        return self.settle(session, frame_idx, features, masks, scores, detections, reverse)

    # What the tracker sees.

    def track(
        self, session: EfficientSam3ConceptSession, frame_idx: int, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Mask logits (objects, height, width) of all masklets, and whether each is there.

        Nothing is remembered yet: that waits for what the detector says.
        """
        output = self.tracker_model.track_frame(
            session.tracker, frame_idx, reverse=reverse, run_mem_encoder=False
        )
        masks = clean_masks(output.pred_masks[:, 0], self.config.fill_hole_area)
        return masks, output.object_score_logits[:, 0]

    # What becomes of both.

    def settle(
        self,
        session: EfficientSam3ConceptSession,
        frame_idx: int,
        features: FrameFeatures,
        masks: Tensor,
        scores: Tensor,
        detections: Detections | None,
        reverse: bool,
    ) -> EfficientSam3VideoOutput:
        """Compare both, remember what was seen, begin and end masklets.

        Args:
            session: Its state is changed.
            frame_idx: The frame.
            features: Of the frame, for the memory.
            masks: Of the masklets, as `track` gives them.
            scores: Likewise.
            detections: Of the frame, if it was looked at.
            reverse: Whether time runs backward.
        """
        masklets = list(session.masklets.values())
        newborn, certain = [], {}
        if detections is not None:
            newborn, certain = self.compare(session, frame_idx, masklets, masks, scores, detections)
        staying = [row for row, one in enumerate(masklets) if one.object_id in session.masklets]
        masklets = [masklets[row] for row in staying]
        masks, scores = masks[staying], scores[staying]
        self.note_absence(masklets, masks, frame_idx, reverse)
        if masklets:
            self.remember(session, frame_idx, features, masklets, masks, certain)

        shown = {m.object_id: mask[None] for m, mask in zip(masklets, masks, strict=True)}
        shown |= {obj_id: mask[None] for obj_id, mask in certain.items() if obj_id in shown}
        sureness = {
            masklet.object_id: score
            for masklet, score in zip(masklets, scores.sigmoid().tolist(), strict=True)
        }
        if detections is not None and newborn:
            begun = self.begin(session, frame_idx, detections, newborn, reverse)
            cleaned = clean_masks(detections.masks[newborn], self.config.fill_hole_area)
            shown |= {m.object_id: mask[None] for m, mask in zip(begun, cleaned, strict=True)}
            sureness |= {masklet.object_id: masklet.score for masklet in begun}
        return self.build_output(session, frame_idx, shown, sureness)

    def compare(
        self,
        session: EfficientSam3ConceptSession,
        frame_idx: int,
        masklets: list[Masklet],
        masks: Tensor,
        scores: Tensor,
        detections: Detections,
    ) -> tuple[list[int], dict[int, Tensor]]:
        """Hold masklets against the detections of a frame, and end those that do not stand.

        Args:
            session: Its state is changed.
            frame_idx: The frame.
            masklets: All of them.
            masks: Of the masklets, as `track` gives them.
            scores: Likewise.
            detections: Of the frame.

        Returns:
            Detections that begin a masklet, and the masks (height, width) of those that confirm
            one, by its id, so surely that the frame counts as prompted.
        """
        weight = session.note_look(frame_idx, self.config.detect_every_nth_frame)
        association = associate(
            detections.masks,
            detections.scores,
            detections.prompts,
            masks,
            [masklet.prompt for masklet in masklets],
            self.config,
        )
        newborn = self.within_limit(association.new, detections, len(masklets))
        certain = {}
        if self.is_reconditioning(session, weight):
            is_sure = (scores > self.config.high_conf_thresh).tolist()
            certain = {
                masklets[index].object_id: detections.masks[detection]
                for index, detection in association.sure.items()
                if is_sure[index]
            }
        none = judge(masklets, association, frame_idx, self.config, weight)
        for obj_id in none | lost_masklets(masklets, self.config.lost_after):
            session.remove_object(obj_id)
        session.removed |= dict.fromkeys(none, frame_idx)
        return newborn, certain

    def is_reconditioning(self, session: EfficientSam3ConceptSession, weight: int) -> bool:
        """Whether one of the frames that the last look speaks for is a `recondition_every_nth`."""
        every = self.config.recondition_every_nth_frame
        return every > 0 and session.clock // every > (session.clock - weight) // every

    def build_output(
        self,
        session: EfficientSam3ConceptSession,
        frame_idx: int,
        masks: dict[int, Tensor],
        sureness: dict[int, float],
    ) -> EfficientSam3VideoOutput:
        """What is known of the objects of a frame, once it has been settled.

        Args:
            session: After that frame.
            frame_idx: The frame.
            masks: Logits (1, height, width) of each object.
            sureness: Of the tracker, for each object.
        """
        session.removed = {  # remembered for as long as results come late
            obj_id: frame
            for obj_id, frame in session.removed.items()
            if abs(frame - frame_idx) <= self.config.hotstart_delay
        }
        masklets = session.masklets
        output = EfficientSam3VideoOutput(
            object_ids=session.obj_ids,
            obj_id_to_mask=masks,
            obj_id_to_score={obj_id: one.score for obj_id, one in masklets.items()},
            obj_id_to_tracker_score=sureness,
            removed_obj_ids=set(session.removed),
            suppressed_obj_ids=hidden_masklets(list(masklets.values()), self.config),
            frame_idx=frame_idx,
            obj_id_to_prompt_id={obj_id: one.prompt for obj_id, one in masklets.items()},
            obj_id_to_first_frame={obj_id: one.first_frame for obj_id, one in masklets.items()},
        )
        output.learn(output, self.config.hotstart_delay)
        return output

    def within_limit(self, new: list[int], detections: Detections, count: int) -> list[int]:
        """The new detections for which there is room, the surest first where there is not."""
        room = self.config.max_num_objects - count
        if len(new) <= room:
            return new
        logger.warning_once(
            f"More than max_num_objects={self.config.max_num_objects} objects: the least sure of "
            "the new ones are left out."
        )
        order = detections.scores[new].argsort(descending=True)[: max(room, 0)]
        return [new[index] for index in order.tolist()]

    def note_absence(
        self, masklets: list[Masklet], masks: Tensor, frame_idx: int, reverse: bool
    ) -> None:
        """Empty the masks of masklets that took another's place; note which are out of sight."""
        threshold = self.config.suppress_overlapping_based_on_recent_occlusion_threshold
        if threshold > 0:
            for group in by_prompt(masklets):
                confused = newly_confused(
                    masks[group] > 0, [masklets[index] for index in group], threshold, reverse
                )
                masks[torch.tensor(group, device=masks.device)[confused]] = NO_OBJECT_LOGIT
        is_seen = (masks > 0).flatten(1).any(dim=1).tolist()
        for masklet, seen in zip(masklets, is_seen, strict=True):
            if not seen:
                masklet.last_occluded = frame_idx

    def remember(
        self,
        session: EfficientSam3ConceptSession,
        frame_idx: int,
        features: FrameFeatures,
        masklets: list[Masklet],
        masks: Tensor,
        certain: dict[int, Tensor],
    ) -> None:
        """Put the masks of a frame, now that they are settled, into the memories of the tracker."""
        masks = masks.clone()
        if not self.config.recondition_on_trk_masks:
            for index, masklet in enumerate(masklets):
                if masklet.object_id in certain:
                    masks[index] = (certain[masklet.object_id] >= 0.5).to(masks.dtype)
        for group in by_prompt(masklets):
            masks[group] = drop_overlapped(masks[group])
        is_seen = (masks > 0).flatten(1).any(dim=1)
        tracker = self.tracker_model
        probabilities = tracker.memory_masks(
            masks[:, None], torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
        )
        tokens = tracker.encode_memories(
            features.coarse, probabilities, torch.where(is_seen, HERE, GONE)[:, None]
        )
        tokens = tokens.to(session.tracker.inference_state_device)
        for index, masklet in enumerate(masklets):
            memory = session.tracker.objects[masklet.object_id].memories[frame_idx]
            memory.features = tokens[index].clone()
            if masklet.object_id in certain and not memory.is_conditioning:
                memory.is_conditioning = memory.is_reconditioned = True

    def begin(
        self,
        session: EfficientSam3ConceptSession,
        frame_idx: int,
        detections: Detections,
        newborn: list[int],
        reverse: bool,
    ) -> list[Masklet]:
        """Follow detections from now on."""
        begun = []
        for index in newborn:
            masklet = Masklet(
                object_id=session.max_obj_id + 1,
                prompt=detections.prompts[index],
                score=float(detections.scores[index]),
                first_frame=frame_idx,
                keep_alive=self.config.init_trk_keep_alive,
            )
            session.add_masklet(masklet)
            mask = (detections.masks[index] >= 0.5).to(self.dtype)
            session.tracker.add_mask(masklet.object_id, frame_idx, mask)
            begun.append(masklet)
        self.tracker_model.track_frame(
            session.tracker,
            frame_idx,
            reverse=reverse,
            object_ids=[masklet.object_id for masklet in begun],
        )
        return begun


def by_prompt(masklets: Sequence[Masklet]) -> list[list[int]]:
    """Positions of masklets, those of each prompt together."""
    groups: dict[int, list[int]] = {}
    for index, masklet in enumerate(masklets):
        groups.setdefault(masklet.prompt, []).append(index)
    return list(groups.values())


AutoModel.register(EfficientSam3VideoConfig, EfficientSam3VideoModel, exist_ok=True)
