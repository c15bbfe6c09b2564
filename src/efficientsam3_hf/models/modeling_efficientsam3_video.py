"""Concepts through video: every instance of a phrase, each with an identity that stays."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.models.auto import AutoModel
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput, Sam3VisionNeck
from transformers.utils import logging

from .checkpoint_layout import StrictLoadingMixin
from .concept_session import (
    ConceptPrompt,
    EfficientSam3ConceptSession,
    EfficientSam3VideoOutput,
)
from .configuration_efficientsam3_video import EfficientSam3VideoConfig
from .masklets import Association, Masklet, associate, judge, newly_confused
from .masks import NO_OBJECT_LOGIT, clean_masks, distinct_masks, drop_overlapped
from .modeling_efficientsam3 import EfficientSam3Model
from .modeling_efficientsam3_tracker_video import EfficientSam3TrackerVideoModel
from .modeling_efficientsam3_vision import build_neck
from .object_memory import FrameFeatures
from .processing_efficientsam3_video import EfficientSam3VideoProcessor, FrameMasklets
from .score_calibration import calibrate_scores

logger = logging.get_logger(__name__)

# Logits of "the object is here", by which the memory encoder is told what a mask says.
HERE, GONE = 10.0, -10.0


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


class EfficientSam3VideoModel(StrictLoadingMixin, PreTrainedModel):
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
        if self.is_due(session, frame_idx):
            detections = self.detect(session, vision, frame_idx)
        return self.settle(session, frame_idx, features, masks, scores, detections, reverse)

    def is_due(self, session: EfficientSam3ConceptSession, frame_idx: int) -> bool:
        """Whether to look for new objects in a frame."""
        has_exemplars = any(prompt.frame_idx == frame_idx for prompt in session.prompts)
        return has_exemplars or frame_idx % self.config.detect_every_nth_frame == 0

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

    # What the detector sees.

    def detect(
        self,
        session: EfficientSam3ConceptSession,
        vision: Sam3VisionEncoderOutput,
        frame_idx: int,
    ) -> Detections:
        """Instances of all prompts in a frame, the image encoded once, duplicates left out."""
        levels, position, _ = self.detector_model.unpack_vision(vision)
        rows, numbers = [], []
        for number, prompt in enumerate(session.prompts):
            tokens = self.prompt_tokens(prompt, levels[-1], position, frame_idx)
            if tokens is not None:
                rows.append(tokens)
                numbers.append(number)
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
        config = self.detector_model.config
        probabilities = calibrate_scores(
            output.pred_logits.sigmoid() * output.presence_logits.sigmoid(),
            config.score_temperature,
            config.score_bias,
        )
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
        self, prompt: ConceptPrompt, coarse: Tensor, position: Tensor, frame_idx: int
    ) -> tuple[Tensor, Tensor] | None:
        """Tokens (1, length, channels) of a prompt, and which are valid; None before its frame.

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
        if prompt.boxes is None:
            if not detector.config.always_encode_geometry:
                return tokens, valid
            geometry, _ = detector.geometry_encoder(coarse, position)
        else:
            if prompt.frame_idx == frame_idx:
                prompt.exemplar_tokens, _ = detector.geometry_encoder(
                    coarse, position, prompt.boxes, prompt.boxes_labels
                )
            if prompt.exemplar_tokens is None:
                return None
            geometry = prompt.exemplar_tokens
        more = torch.ones(geometry.shape[:2], dtype=torch.bool, device=valid.device)
        return torch.cat([tokens, geometry], dim=1), torch.cat([valid, more], dim=1)

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
        shown = {
            masklet.object_id: mask[None] for masklet, mask in zip(masklets, masks, strict=True)
        }
        removed, hidden, newborn, association = set(), set(), [], None
        if detections is not None:
            association = associate(
                detections.masks,
                detections.scores,
                detections.prompts,
                masks,
                [masklet.prompt for masklet in masklets],
                self.config,
            )
            newborn = self.within_limit(association.new, detections, len(masklets))
            removed, hidden = judge(masklets, association, frame_idx, self.config)
        self.note_absence(masklets, masks, frame_idx, removed, reverse)
        if masklets:
            certain = {}
            if association is not None and detections is not None:
                certain = self.certain_masks(association, detections, masks, scores, frame_idx)
                for index, detection in certain.items():
                    shown[masklets[index].object_id] = detections.masks[detection][None]
            self.remember(session, frame_idx, features, masklets, masks, detections, certain)

        for obj_id in removed:
            session.remove_object(obj_id)
            session.removed[obj_id] = frame_idx
        begun = []
        if detections is not None and newborn:
            begun = self.begin(session, frame_idx, detections, newborn, reverse)
            cleaned = clean_masks(detections.masks[newborn], self.config.fill_hole_area)
            shown |= {m.object_id: mask[None] for m, mask in zip(begun, cleaned, strict=True)}
        self.forget_removed(session, frame_idx)
        tracker_scores = scores.sigmoid().tolist()
        everyone = [*masklets, *begun]
        output = EfficientSam3VideoOutput(
            object_ids=session.obj_ids,
            obj_id_to_mask=shown,
            obj_id_to_score={masklet.object_id: masklet.score for masklet in everyone},
            obj_id_to_tracker_score={
                **{m.object_id: score for m, score in zip(masklets, tracker_scores, strict=True)},
                **{masklet.object_id: masklet.score for masklet in begun},
            },
            removed_obj_ids=set(session.removed),
            suppressed_obj_ids=hidden,
            frame_idx=frame_idx,
            obj_id_to_prompt_id={masklet.object_id: masklet.prompt for masklet in everyone},
            obj_id_to_first_frame={m.object_id: m.first_frame for m in everyone},
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
        self,
        masklets: list[Masklet],
        masks: Tensor,
        frame_idx: int,
        removed: set[int],
        reverse: bool,
    ) -> None:
        """Empty the masks of masklets that took another's place; end those lost for too long."""
        threshold = self.config.suppress_overlapping_based_on_recent_occlusion_threshold
        if threshold > 0:
            for group in by_prompt(masklets):
                confused = newly_confused(
                    masks[group] > 0, [masklets[index] for index in group], threshold, reverse
                )
                masks[torch.tensor(group, device=masks.device)[confused]] = NO_OBJECT_LOGIT
        is_seen = (masks > 0).flatten(1).any(dim=1).tolist()
        for masklet, seen in zip(masklets, is_seen, strict=True):
            masklet.lost_for = 0 if seen else masklet.lost_for + 1
            if not seen:
                masklet.last_occluded = frame_idx
            limit = self.config.lost_after
            if limit is not None and masklet.lost_for > limit:
                removed.add(masklet.object_id)

    def certain_masks(
        self,
        association: Association,
        detections: Detections,
        masks: Tensor,
        scores: Tensor,
        frame_idx: int,
    ) -> dict[int, int]:
        """Masklets that a detection confirms so surely that the frame counts as prompted."""
        every = self.config.recondition_every_nth_frame
        if every <= 0 or frame_idx % every != 0:
            return {}
        is_sure = (scores > self.config.high_conf_thresh).tolist()
        return {index: detection for index, detection in association.sure.items() if is_sure[index]}

    def remember(
        self,
        session: EfficientSam3ConceptSession,
        frame_idx: int,
        features: FrameFeatures,
        masklets: list[Masklet],
        masks: Tensor,
        detections: Detections | None,
        certain: dict[int, int],
    ) -> None:
        """Put the masks of a frame, now that they are settled, into the memories of the tracker."""
        masks = masks.clone()
        for index, detection in certain.items():
            if not self.config.recondition_on_trk_masks and detections is not None:
                masks[index] = (detections.masks[detection] >= 0.5).to(masks.dtype)
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
            memory.is_conditioning = memory.is_conditioning or index in certain

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

    def forget_removed(self, session: EfficientSam3ConceptSession, frame_idx: int) -> None:
        """Remember what was found to be none for as long as results come late."""
        session.removed = {
            obj_id: frame
            for obj_id, frame in session.removed.items()
            if abs(frame - frame_idx) <= self.config.hotstart_delay
        }

    # A whole video, or a stream.

    def propagate_in_video_iterator(
        self,
        inference_session: EfficientSam3ConceptSession,
        start_frame_idx: int = 0,
        max_frame_num_to_track: int | None = None,
        reverse: bool = False,
        show_progress_bar: bool = False,
    ) -> Iterator[EfficientSam3VideoOutput]:
        """Find and follow all concepts from frame to frame, in one direction.

        Results come `hotstart_delay` frames late, when it is known which objects are none.

        Args:
            inference_session: One with a whole video.
            start_frame_idx: Where to start.
            max_frame_num_to_track: How many frames to go from there; None for all there are.
            reverse: Whether to go backward.
            show_progress_bar: Whether to show one.
        """
        length = inference_session.num_frames
        distance = length if max_frame_num_to_track is None else max_frame_num_to_track
        if reverse:
            order = range(start_frame_idx, max(start_frame_idx - distance, 0) - 1, -1)
        else:
            order = range(start_frame_idx, min(start_frame_idx + distance, length - 1) + 1)
        waiting: list[EfficientSam3VideoOutput] = []
        for frame_idx in tqdm(order, desc="tracking", disable=not show_progress_bar):
            output = self(inference_session, frame_idx=frame_idx, reverse=reverse)
            yield from self.release(waiting, output, self.config.hotstart_delay)
        yield from waiting

    def release(
        self, waiting: list[EfficientSam3VideoOutput], output: EfficientSam3VideoOutput, delay: int
    ) -> Iterator[EfficientSam3VideoOutput]:
        """Put an output at the end of a queue, and give those that have waited long enough."""
        waiting.append(output)
        for earlier in waiting:
            earlier.learn(output, self.config.hotstart_delay)
        while len(waiting) >= max(delay, 1):
            yield waiting.pop(0)

    def stream(
        self,
        frames: Iterable[Any],
        text: str | Sequence[str] | None = None,
        input_boxes: Sequence[Sequence[float]] | None = None,
        input_boxes_labels: Sequence[int] | None = None,
        processor: EfficientSam3VideoProcessor | None = None,
        delay: int | None = None,
        session: EfficientSam3ConceptSession | None = None,
    ) -> Iterator[FrameMasklets]:
        """Find and follow concepts in frames as they come: of a file, a camera, a list.

        Memory does not grow with the number of frames.

        Args:
            frames: Pictures of any kind that the image processor takes, or objects that have one as
                `pixels` and its number as `index`.
            text: A phrase, or several.
            input_boxes: Exemplars (x1, y1, x2, y2) in the first frame, with one phrase or none.
            input_boxes_labels: 1 for "like this", 0 for "unlike this"; all 1 if left out.
            processor: None for the one beside the model's weights.
            delay: By how many frames results come late; None for `hotstart_delay`, within which
                objects turn out to be none. With 0 they come at once, and `is_confirmed` tells.
            session: One to go on with, as it was left or saved; None for a new one.
        """
        processor = processor or self.own_processor()
        if session is None:
            session = processor.init_video_session(inference_device=self.device, dtype=self.dtype)
        phrases = [text] if isinstance(text, str) else list(text or [])
        if input_boxes is None:
            processor.add_text_prompt(session, phrases)
        elif len(phrases) > 1:
            raise ValueError("Exemplars go with one phrase or none. Add others to a session.")
        if input_boxes is None and not session.prompts:
            raise ValueError("There is nothing to look for: give text or input_boxes.")
        delay = self.config.hotstart_delay if delay is None else delay
        pictures: dict[int, Any] = {}
        for frame in frames:
            picture = getattr(frame, "pixels", frame)
            frame_idx = processor.add_frame(session, picture)
            if input_boxes is not None:
                phrase = phrases[0] if phrases else None
                processor.add_exemplars(session, frame_idx, input_boxes, input_boxes_labels, phrase)
                input_boxes = None
            pictures[frame_idx] = picture
            output = self(session, frame_idx=frame_idx)
            output.source_frame = getattr(frame, "index", None)
            for ready in self.release(session.pending, output, delay):
                yield self.finish(processor, session, ready, pictures)
        while session.pending:
            yield self.finish(processor, session, session.pending.pop(0), pictures)

    def finish(
        self,
        processor: EfficientSam3VideoProcessor,
        session: EfficientSam3ConceptSession,
        output: EfficientSam3VideoOutput,
        pictures: dict[int, Any],
    ) -> FrameMasklets:
        """The result of one frame of a stream, with its picture if that is at hand."""
        result = processor.post_process_frame(session, output)
        result.pixels = pictures.pop(output.frame_idx, None)
        return result

    def own_processor(self) -> EfficientSam3VideoProcessor:
        """The processor in the folder that the model was loaded from."""
        if not self.name_or_path:
            raise ValueError("This model was not loaded from a folder: pass processor=...")
        return EfficientSam3VideoProcessor.from_pretrained(self.name_or_path)


def by_prompt(masklets: Sequence[Masklet]) -> list[list[int]]:
    """Positions of masklets, those of each prompt together."""
    groups: dict[int, list[int]] = {}
    for index, masklet in enumerate(masklets):
        groups.setdefault(masklet.prompt, []).append(index)
    return list(groups.values())


AutoModel.register(EfficientSam3VideoConfig, EfficientSam3VideoModel, exist_ok=True)
