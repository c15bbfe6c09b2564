"""SAM 3's training objective: what `EfficientSam3Model(..., labels=...)` computes.

Each term is a sum over the units of a batch divided by a count, so that the losses of parts add up
to the loss of the whole when they are given its counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from .box_overlaps import box_overlaps, covered_share
from .concept_targets import ConceptTargets
from .mask_objective import all_pixels, dice_loss, doubtful_points, focal_loss
from .matching import instance_of_query, match_one_to_many, match_one_to_one
from .objective_config import ObjectiveConfig

CROWD_SHARE = (
    0.5  # of a prediction that lies on a crowd, from which on it is neither right nor wrong
)


@dataclass
class ConceptPredictions:
    """What all decoder layers say, the last layer last.

    `groups` is 1, or 2 with the queries that learn one to many, which come second.

    Args:
        logits: Scores (groups, layers, prompts, queries).
        boxes: (groups, layers, prompts, queries, 4) as (cx, cy, w, h).
        presence: Logits (layers, prompts).
        masks: Logits (prompts, queries, height, width) of the first group's last layer.
        semantic: Logits (prompts, 1, height, width) of all instances together.
    """

    logits: Tensor
    boxes: Tensor
    presence: Tensor
    masks: Tensor
    semantic: Tensor


@torch.compiler.disable  # matching leaves torch anyway
def concept_losses(
    predictions: ConceptPredictions,
    targets: ConceptTargets,
    objective: ObjectiveConfig,
    counts: Mapping[str, Tensor | float] | None = None,
) -> dict[str, Tensor]:
    """The terms by name, not yet weighted, in float32; `ObjectiveConfig.weights` has their weights.

    Args:
        predictions: Of a model.
        targets: What it should have found.
        objective: Which terms there are, and how they are computed.
        counts: `boxes` and `prompts` to divide by, as `count_labels` gives them. None: those of
            this batch, or where processes train together, their mean over processes.
    """
    weights = objective.weights()
    counts = mean_counts(targets) if counts is None else counts
    num_boxes, num_prompts = (
        torch.as_tensor(counts[name], device=targets.boxes.device).clamp(min=1)
        for name in ("boxes", "prompts")
    )
    boxes, logits = predictions.boxes.float(), predictions.logits.float()
    num_groups, num_layers, _, num_queries = logits.shape

    query_of = match_one_to_one(logits.flatten(0, 1), boxes.flatten(0, 1), targets, objective)
    instance_of = instance_of_query(query_of, targets, num_queries)
    instance_of = instance_of.unflatten(0, (num_groups, num_layers))
    if num_groups == 2:
        # Only in the last layer, so that each instance is sure to have a query in the others.
        instance_of[1, -1] = match_one_to_many(logits[1, -1], boxes[1, -1], targets)

    by_layer = box_losses(boxes, instance_of, targets)
    by_layer = {name: loss / num_boxes for name, loss in by_layer.items()}
    by_layer["class"] = class_loss(logits, boxes, instance_of, targets, objective) / num_prompts
    terms = {}
    for name, loss in by_layer.items():
        for group, prefix in enumerate(("", "one_to_many_")[:num_groups]):
            terms[prefix + name] = loss[group, -1]
            terms[f"auxiliary_{prefix}{name}"] = loss[group, :-1].sum()
    presence = presence_loss(predictions.presence.float(), targets) / num_prompts
    terms |= {"presence": presence[-1], "auxiliary_presence": presence[:-1].sum()}

    if targets.masks is not None and (weights["mask"] or weights["dice"]):
        query_of = query_of.unflatten(0, (num_groups, num_layers))[0, -1]
        masks = mask_losses(predictions.masks, query_of, targets, objective.mask_points)
        terms |= {name: loss / num_boxes for name, loss in masks.items()}
    if targets.masks is not None and (weights["semantic"] or weights["semantic_dice"]):
        semantic = semantic_losses(predictions.semantic, targets)
        terms |= {name: loss / num_prompts for name, loss in semantic.items()}
    return {name: terms[name] for name, weight in weights.items() if weight and name in terms}


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The loss that is to be made small."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def mean_counts(targets: ConceptTargets) -> dict[str, Tensor]:
    """Boxes that are no crowds and prompts of a batch, the mean over processes if there are any."""
    prompts = torch.tensor(float(len(targets.per_prompt)), device=targets.boxes.device)
    counts = torch.stack([(~targets.is_crowd).sum().float(), prompts])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(counts)
        counts = counts / distributed.get_world_size()
    return {"boxes": counts[0], "prompts": counts[1]}


def box_losses(boxes: Tensor, instance_of: Tensor, targets: ConceptTargets) -> dict[str, Tensor]:
    """Sums (groups, layers) over matched queries of `l1` and `giou`."""
    wanted = boxes_of(instance_of, targets)
    is_matched = instance_of >= 0
    distance = (boxes - wanted).abs().sum(dim=-1)
    _, giou = box_overlaps(boxes, wanted)
    return {
        "l1": distance.where(is_matched, 0).sum(dim=(-2, -1)),
        "giou": (1 - giou).where(is_matched, 0).sum(dim=(-2, -1)),
    }


def class_loss(
    logits: Tensor,
    boxes: Tensor,
    instance_of: Tensor,
    targets: ConceptTargets,
    objective: ObjectiveConfig,
) -> Tensor:
    """Sums (groups, layers) over prompts of the mean over queries of the error of scores.

    Queries learn only where the prompt names something: that it names nothing is for presence to
    say. Those without an instance learn nothing on crowds, and where there may be more instances.
    """
    probability = logits.sigmoid()
    with torch.no_grad():
        wanted = torch.ones_like(logits)
        if objective.class_target == "iou":
            iou, _ = box_overlaps(boxes, boxes_of(instance_of, targets))
            wanted = (probability**0.25 * iou**0.75).clamp(min=0.01)
        # Of queries, the share on a crowd of their prompt.
        on_crowd = covered_share(boxes[..., targets.prompt_of, :, :], targets.boxes[:, None])
        on_crowd = targets.most(on_crowd * targets.is_crowd[:, None])
        is_wrong = (on_crowd < CROWD_SHARE) & targets.is_exhaustive[:, None]
    if_instance = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if_nothing = probability**2 * F.softplus(logits)
    loss = torch.where(
        instance_of >= 0, objective.positive_weight * if_instance, if_nothing.where(is_wrong, 0)
    )
    loss = loss.sum(dim=-1) / max(logits.shape[-1], objective.class_queries)
    return loss.where(targets.has_instance, 0).sum(dim=-1)


def presence_loss(presence: Tensor, targets: ConceptTargets) -> Tensor:
    """Sums (layers,) over prompts of half the cross entropy of whether they name anything.

    Where nothing was found by annotators who did not look everywhere, nobody knows.
    """
    wanted = targets.has_instance.expand_as(presence)
    is_known = wanted | targets.is_exhaustive
    loss = F.binary_cross_entropy_with_logits(presence, wanted.float(), reduction="none")
    return 0.5 * loss.where(is_known, 0).sum(dim=-1)


def mask_losses(
    masks: Tensor, query_of: Tensor, targets: ConceptTargets, num_points: int | None
) -> dict[str, Tensor]:
    """Sums over matched instances that have a mask of `mask` (focal) and `dice`.

    Args:
        masks: Logits (prompts, queries, height, width).
        query_of: (instances,) the query of each, -1 for none.
        targets: What should have been found.
        num_points: Of each mask that are looked at; None for all of its pixels.
    """
    is_counted = (query_of >= 0) & targets.masks.flatten(1).any(dim=1)
    logits = masks[targets.prompt_of, query_of.clamp(min=0)].float()
    if num_points is None:
        pair = all_pixels(logits, targets.masks)
    else:
        pair = doubtful_points(logits, targets.masks, num_points)
    return {
        "mask": focal_loss(*pair).where(is_counted, 0).sum(),
        "dice": dice_loss(*pair).where(is_counted, 0).sum(),
    }


def semantic_losses(semantic: Tensor, targets: ConceptTargets) -> dict[str, Tensor]:
    """Sums over prompts of `semantic` (cross entropy) and `semantic_dice`: all instances at once.

    Crowds are among them. Prompts with an instance that has no mask, or with more instances than
    are known, teach nothing.
    """
    has_mask = targets.masks.flatten(1).any(dim=1)
    lacks_mask = targets.most((~has_mask)[:, None].float())[:, 0] > 0
    is_known = targets.is_exhaustive & ~lacks_mask
    together = targets.most(targets.masks.flatten(1).float()).unflatten(1, targets.masks.shape[1:])
    logits, wanted = all_pixels(semantic[:, 0].float(), together)
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=-1)
    return {
        "semantic": entropy.where(is_known, 0).sum(),
        "semantic_dice": dice_loss(logits, wanted).where(is_known, 0).sum(),
    }


def boxes_of(instance_of: Tensor, targets: ConceptTargets) -> Tensor:
    """The box of each query's instance; where it has none, any sound box."""
    return F.pad(targets.boxes, (0, 0, 0, 1), value=0.5)[instance_of]  # -1 is the one added
