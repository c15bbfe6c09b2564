"""The heads that answer prompts, on features of images that were computed once for all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou
from transformers.models.sam3.modeling_sam3 import (
    Sam3ImageSegmentationOutput,
    Sam3VisionEncoderOutput,
)

from ..models.modeling_efficientsam3 import EfficientSam3Model
from ..models.object_memory import FrameFeatures
from .family import Tracker
from .prompts import ConceptPrompts, ObjectPrompts

try:
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise ImportError(
        "Matching detections needs scipy: pip install 'efficientsam3-hf[train]'."
    ) from error

BOX_COST, OVERLAP_COST, SCORE_COST = 5.0, 2.0, 2.0  # of a match, as in DETR


class ObjectAnswers(NamedTuple):
    """What a tracker says of the object of each prompt."""

    masks: Tensor  # logits (prompts, candidates, height, width)
    iou_scores: Tensor  # (prompts, candidates)
    object_logits: Tensor  # (prompts,)

    def best(self, candidate: Tensor | None = None) -> Tensor:
        """Logits (prompts, height, width) of one candidate; of that with the best score."""
        candidate = self.iou_scores.argmax(dim=1) if candidate is None else candidate
        return self.masks[torch.arange(len(self.masks), device=self.masks.device), candidate]


def ask_objects(
    tracker: Tracker, features: FrameFeatures, prompts: ObjectPrompts, in_use: bool = False
) -> ObjectAnswers:
    """Ask the mask decoder as it is asked in use: one click has three answers, all else has one.

    Args:
        tracker: Whose decoder.
        features: Of all images, as `Family.tracker_features` gives them.
        prompts: Independent ones.
        in_use: Let the decoder replace a single mask that is not stable by one of the three.
    """
    image, rows = prompts.image, len(prompts)
    sparse, dense = tracker.prompt_encoder(
        prompts.points[:, None] * tracker.image_size, prompts.labels[:, None], None, None
    )
    coarse = features.coarse + tracker.no_memory_embedding.view(1, -1, 1, 1)
    positions = tracker.get_image_wide_positional_embeddings()
    decoder: Any = tracker.mask_decoder
    with own_token(decoder, in_use):
        masks, iou_scores, _, object_logits = decoder(
            image_embeddings=coarse[image],
            image_positional_embeddings=positions.expand(rows, -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=prompts.points.shape[1] == 1,
            high_resolution_features=[features.fine[image], features.middle[image]],
        )
    return ObjectAnswers(masks[:, 0].float(), iou_scores[:, 0].float(), object_logits[:, 0, 0])


@contextmanager
def own_token(decoder: Any, in_use: bool) -> Iterator[None]:
    """Within it, a single mask comes from the token for single masks, unless it is for use.

    A student's token would else get no gradient for as long as its masks are not stable.
    """
    replaces = decoder.dynamic_multimask_via_stability
    decoder.dynamic_multimask_via_stability = replaces and in_use
    try:
        yield
    finally:
        decoder.dynamic_multimask_via_stability = replaces


def ask_concepts(
    detector: EfficientSam3Model,
    seen: Sam3VisionEncoderOutput,
    text: Tensor,
    text_mask: Tensor,
    prompts: ConceptPrompts,
) -> Sam3ImageSegmentationOutput:
    """Ask the detector for all instances of phrases and exemplars.

    Args:
        detector: On its own features.
        seen: Of all images.
        text: Token features (prompts, length, channels), or of one phrase for all prompts.
        text_mask: (prompts, length) or of one phrase likewise, 0 where a token is padding.
        prompts: What else is asked.
    """
    return detector(
        vision_embeds=seen,
        text_embeds=text.to(seen.fpn_hidden_states[0].dtype),
        attention_mask=text_mask,
        input_boxes=prompts.boxes_cxcywh,
        input_boxes_labels=prompts.boxes_labels,
        image_indices=prompts.image,
        return_dict=True,
    )


def scores_of(outputs: Sam3ImageSegmentationOutput) -> Tensor:
    """(prompts, queries): how sure it is that there is something, and that this is an instance."""
    return outputs.pred_logits.float().sigmoid() * outputs.presence_logits.float().sigmoid()


@torch.no_grad()
def match_queries(
    own: Sam3ImageSegmentationOutput, theirs: Sam3ImageSegmentationOutput, is_confident: Tensor
) -> Tensor:
    """The teacher's query (prompts, queries) that each query of the student is compared with.

    The teacher's confident detections go to those queries that are nearest to them, one to one at
    the least cost. The others keep their number, and those whose number is taken get what is left.

    Args:
        own: The student's answers.
        theirs: The teacher's answers to the same prompts.
        is_confident: (prompts, queries): which of these are detections.
    """
    boxes, wanted = own.pred_boxes.float(), theirs.pred_boxes.float()
    overlaps = [generalized_box_iou(*pair) for pair in zip(wanted, boxes, strict=True)]
    costs = (
        BOX_COST * torch.cdist(wanted, boxes, p=1)
        - OVERLAP_COST * torch.stack(overlaps)
        - SCORE_COST * scores_of(own)[:, None]
    )
    # What is no number is left for the trainer to find in the loss.
    tables = np.nan_to_num(costs.cpu().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    teacher_of = [
        match_one_prompt(table, confident)  # pyright: ignore  torch's decorator has no types
        for table, confident in zip(tables, is_confident.cpu().numpy(), strict=True)
    ]
    return torch.from_numpy(np.stack(teacher_of)).to(boxes.device)


@torch.compiler.disable  # scipy leaves torch anyway
def match_one_prompt(costs: np.ndarray, is_confident: np.ndarray) -> np.ndarray:
    """The teacher's query of each of the student's, from costs (teacher's, student's)."""
    teacher_of = np.full(len(costs), -1)
    detections = np.flatnonzero(is_confident)
    rows, columns = linear_sum_assignment(costs[detections])
    teacher_of[columns] = detections[rows]
    keeps = (teacher_of < 0) & ~is_confident
    teacher_of[keeps] = np.flatnonzero(keeps)
    left = np.setdiff1d(np.arange(len(costs)), teacher_of)
    teacher_of[teacher_of < 0] = left
    return teacher_of
