"""Which query learns which instance: one to one (Hungarian), and one to many.

Instances are those of `ConceptTargets`, in one row. Crowds are matched to nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .box_overlaps import box_overlaps
from .concept_targets import ConceptTargets
from .objective_config import ObjectiveConfig

try:
    from scipy.optimize import linear_sum_assignment
except ImportError:  # using a model takes no scipy
    linear_sum_assignment = None


@torch.no_grad()
def match_one_to_one(
    logits: Tensor, boxes: Tensor, targets: ConceptTargets, objective: ObjectiveConfig
) -> Tensor:
    """The query (layers, instances) of each instance, at the least cost for each prompt and layer.

    -1 for crowds, and for instances beyond the number of queries. The costs of all layers go to the
    CPU in one copy.

    Args:
        logits: Scores (layers, prompts, queries).
        boxes: (layers, prompts, queries, 4) as (cx, cy, w, h).
    """
    if linear_sum_assignment is None:
        raise ImportError(
            'Queries are matched to instances by scipy: pip install "efficientsam3-hf[train]".'
        )
    costs = matching_costs(logits, boxes, targets, objective).cpu().numpy()
    if not np.isfinite(costs).all():
        layer, instance, query = np.argwhere(~np.isfinite(costs))[0].tolist()
        raise FloatingPointError(
            f"The cost of matching is {costs[layer, instance, query]} for query {query} in decoder "
            f"layer {layer} and box {targets.boxes[instance].tolist()}. If the box is sound, "
            "training has diverged: lower the learning rate, or clip gradients harder."
        )
    query_of = np.full(costs.shape[:2], -1)
    instances = np.flatnonzero(~targets.is_crowd.cpu().numpy())
    prompts = targets.prompt_of.cpu().numpy()[instances]
    for prompt in np.unique(prompts):
        of_prompt = instances[prompts == prompt]
        for layer, of_layer in enumerate(costs):
            rows, queries = linear_sum_assignment(of_layer[of_prompt])
            query_of[layer, of_prompt[rows]] = queries
    return torch.from_numpy(query_of).to(boxes.device)


def matching_costs(
    logits: Tensor, boxes: Tensor, targets: ConceptTargets, objective: ObjectiveConfig
) -> Tensor:
    """What it costs (layers, instances, queries) to match each query to each instance."""
    logits, boxes = logits[:, targets.prompt_of], boxes[:, targets.prompt_of]
    wanted = targets.boxes[:, None]
    probability = logits.sigmoid()
    if_instance = 0.25 * (1 - probability) ** 2 * F.softplus(-logits)
    if_nothing = 0.75 * probability**2 * F.softplus(logits)
    distance = (boxes - wanted).abs().sum(dim=-1)
    _, giou = box_overlaps(boxes, wanted)
    return (
        objective.class_cost * (if_instance - if_nothing)
        + objective.l1_cost * distance
        - objective.giou_cost * giou
    )


@torch.no_grad()
def match_one_to_many(
    logits: Tensor,
    boxes: Tensor,
    targets: ConceptTargets,
    score_share: float = 0.3,
    most: int = 4,
    threshold: float = 0.4,
) -> Tensor:
    """The instance (prompts, queries) that each query learns, -1 for none.

    An instance takes its best queries, by score and IoU; a query that several instances want goes
    to the one that it suits best.

    Args:
        logits: Scores (prompts, queries).
        boxes: (prompts, queries, 4) as (cx, cy, w, h).
        score_share: Weight of the score; that of the IoU is the rest.
        most: Queries of an instance.
        threshold: Quality from which on a query is good enough.
    """
    iou, _ = box_overlaps(boxes[targets.prompt_of], targets.boxes[:, None])
    probability = logits.sigmoid()[targets.prompt_of]
    quality = score_share * probability + (1 - score_share) * iou  # (instances, queries)
    quality = quality.masked_fill(targets.is_crowd[:, None], 0)
    best = quality.topk(min(most, quality.shape[1])).indices
    is_wanted = torch.zeros_like(quality, dtype=torch.bool).scatter_(1, best, True)
    quality = quality.where(is_wanted & (quality > threshold), 0)

    is_suited = (quality > 0) & (quality == targets.most(quality)[targets.prompt_of])
    # Of two instances that it suits equally well the first one, whose rank is higher.
    count = len(quality)
    rank = torch.arange(count, 0, -1, device=quality.device)[:, None].expand_as(quality)
    highest = targets.most(rank.where(is_suited, 0))
    return (count - highest).where(highest > 0, -1)


def instance_of_query(query_of: Tensor, targets: ConceptTargets, num_queries: int) -> Tensor:
    """The instance (layers, prompts, queries) of each query, -1 for none; from the query of each.

    Args:
        query_of: (layers, instances), as `match_one_to_one` gives it.
        targets: Whose instances they are.
        num_queries: Of each prompt.
    """
    layers, instances = query_of.shape
    device = query_of.device
    shape = (layers, len(targets.per_prompt), num_queries + 1)  # one more, for unmatched instances
    instance_of = torch.full(shape, -1, device=device)
    layer = torch.arange(layers, device=device)[:, None]
    query = query_of.where(query_of >= 0, num_queries)
    instance_of[layer, targets.prompt_of, query] = torch.arange(instances, device=device)
    return instance_of[..., :num_queries]
