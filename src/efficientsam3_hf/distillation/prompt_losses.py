"""Losses between what heads answer to prompts on a student's features and on its teacher's.

All are 0 where the two answers are equal.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from .mask_losses import MASK_LOSSES, divergence, soft_masks
from .prompted_heads import ObjectAnswers

OBJECT_TERMS = ("mask_bce", "mask_dice", "mask_focal", "iou_score", "object_score")
CONCEPT_TERMS = (
    "concept_bce",
    "concept_dice",
    "concept_focal",
    "concept_box",
    "concept_overlap",
    "concept_score",
    "concept_presence",
)


@dataclass
class ConceptPairs:
    """Answers of a detector and its teacher to the same prompts, side by side.

    A pair is a detection of the teacher with the student's query for it.

    Args:
        row: (pairs,): the prompt each answers.
        shares: (pairs,): what each counts, 1 for all pairs of a prompt together.
        masks: Logits (pairs, height, width), the student's and the teacher's.
        boxes: (pairs, 4) as (x1, y1, x2, y2) in [0, 1], likewise.
        scores: Logits (prompts, queries), likewise, in one order.
        presence: Logits (prompts, 1), likewise.
    """

    row: Tensor
    shares: Tensor
    masks: tuple[Tensor, Tensor]
    boxes: tuple[Tensor, Tensor]
    scores: tuple[Tensor, Tensor]
    presence: tuple[Tensor, Tensor]


def pair_answers(
    own: Any,
    theirs: Any,
    teacher_of: Tensor,
    is_confident: Tensor,
) -> ConceptPairs:
    """The student's answers beside the teacher's.

    Args:
        own: What the student's detector returned.
        theirs: What the teacher's did.
        teacher_of: (prompts, queries): the teacher's query that each of the student's belongs to.
        is_confident: (prompts, queries): which of the teacher's are detections.
    """
    row, query = torch.nonzero(is_confident.gather(1, teacher_of), as_tuple=True)
    other = teacher_of[row, query]
    masks = theirs.pred_masks[row, other].float()
    return ConceptPairs(
        row=row,
        shares=1 / is_confident.sum(dim=1)[row],
        masks=(resized(own.pred_masks[row, query].float(), masks.shape[-2:]), masks),
        boxes=(own.pred_boxes[row, query].float(), theirs.pred_boxes[row, other].float()),
        scores=(own.pred_logits, theirs.pred_logits.gather(1, teacher_of)),
        presence=(own.presence_logits, theirs.presence_logits),
    )


def object_losses(
    names: list[str],
    own: ObjectAnswers,
    theirs: ObjectAnswers,
    temperature: float = 1.0,
    valid: Tensor | None = None,
) -> dict[str, Tensor]:
    """Losses (prompts,) of answers of the tracker, the mean over candidates.

    Args:
        names: Some of `OBJECT_TERMS`.
        own: The student's.
        theirs: The teacher's.
        temperature: By which logits of masks are divided.
        valid: (prompts, height, width), true where there is a picture.
    """
    valid = None if valid is None else valid[:, None]
    losses = {}
    for name in names:
        if name == "iou_score":
            losses[name] = (own.iou_scores - theirs.iou_scores).square().mean(dim=1)
        elif name == "object_score":
            losses[name] = score_loss(own.object_logits, theirs.object_logits)
        else:
            masks = resized(own.masks, theirs.masks.shape[-2:])
            losses[name] = mask_loss(name, masks, theirs.masks, temperature, valid).mean(dim=1)
    return losses


def concept_losses(
    names: list[str], pairs: ConceptPairs, temperature: float = 1.0, valid: Tensor | None = None
) -> dict[str, Tensor]:
    """Losses of answers of the detector, (prompts,) or shares (pairs,) of them.

    Args:
        names: Some of `CONCEPT_TERMS`.
        pairs: Answers.
        temperature: By which logits of masks are divided.
        valid: (prompts, height, width), true where there is a picture.
    """
    valid = None if valid is None else valid[pairs.row]
    losses = {}
    for name in names:
        if name == "concept_presence":
            losses[name] = score_loss(*pairs.presence)
        elif name == "concept_score":
            # By detection, for most of the many queries have nothing to say. A score is worth what
            # presence lets through: SAM 3's own queries learned nothing of phrases that name
            # nothing. So weighted, it is the divergence of scores given presence.
            counts = torch.bincount(pairs.row, minlength=len(pairs.presence[0])).clamp(min=1)
            is_there = pairs.presence[1][:, 0].float().sigmoid()
            losses[name] = is_there * score_loss(*pairs.scores).sum(dim=1) / counts
        elif name == "concept_box":
            losses[name] = pairs.shares * F.l1_loss(*pairs.boxes, reduction="none").sum(dim=1)
        elif name == "concept_overlap":
            losses[name] = pairs.shares * generalized_box_iou_loss(*pairs.boxes)
        else:
            losses[name] = pairs.shares * mask_loss(name, *pairs.masks, temperature, valid)
    return losses


def mask_loss(
    name: str, own: Tensor, theirs: Tensor, temperature: float, valid: Tensor | None
) -> Tensor:
    """A loss (...) of masks from their logits (..., height, width)."""
    loss = MASK_LOSSES[name.rpartition("_")[2]]
    return loss(own / temperature, soft_masks(theirs, temperature), valid)


def score_loss(own: Tensor, theirs: Tensor) -> Tensor:
    """Loss of each score from its logit."""
    return divergence(own, theirs.float().sigmoid())


def resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits of masks (rows, height, width), or with candidates, in another size."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    flat = logits.flatten(0, -3)[:, None]
    flat = F.interpolate(flat, tuple(size), mode="bilinear", align_corners=False)
    return flat.view(*logits.shape[:-2], *size)
