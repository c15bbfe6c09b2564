"""Losses of masks: focal and Dice, on all pixels or on points where the prediction is in doubt.

Every function gives one number for each mask, so that whoever calls it knows what to average over.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of masks (count, points), a mean over points.

    Args:
        logits: Before the sigmoid.
        targets: In [0, 1].
        alpha: Weight of points inside; that of points outside is the rest.
        gamma: How little points count that are right already.
    """
    probability = logits.sigmoid()
    wrong = probability + targets - 2 * probability * targets
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (weight * wrong**gamma * entropy).mean(dim=-1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One less the Dice coefficient of masks (count, points), smoothed by one point."""
    probability = logits.sigmoid()
    shared = (probability * targets).sum(dim=-1)
    total = probability.sum(dim=-1) + targets.sum(dim=-1)
    return 1 - (2 * shared + 1) / (total + 1)


def all_pixels(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets (count, pixels) at the targets' size.

    Args:
        logits: (count, height, width).
        targets: (count, height, width), of another size or the same.
    """
    if logits.shape[-2:] != targets.shape[-2:]:
        size = tuple(targets.shape[-2:])
        logits = F.interpolate(logits[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return logits.flatten(1), targets.flatten(1).to(logits.dtype)


def doubtful_points(
    logits: Tensor,
    targets: Tensor,
    num_points: int,
    oversampling: float = 3.0,
    doubtful_share: float = 0.75,
) -> tuple[Tensor, Tensor]:
    """Logits and targets (count, points) at random points, as in PointRend.

    Args:
        logits: (count, height, width).
        targets: (count, height, width), of another size or the same.
        num_points: Of each mask.
        oversampling: How many times as many points the doubtful ones are chosen from.
        doubtful_share: Share of the points that are chosen for doubt, not drawn evenly.
    """
    count = len(logits)
    with torch.no_grad():
        num_doubtful = int(doubtful_share * num_points)
        num_candidates = max(int(oversampling * num_points), num_points)
        candidates = torch.rand(count, num_candidates, 2, device=logits.device)
        doubt = -at_points(logits, candidates).abs()
        chosen = doubt.topk(num_doubtful).indices[..., None].expand(-1, -1, 2)
        even = torch.rand(count, num_points - num_doubtful, 2, device=logits.device)
        points = torch.cat([candidates.gather(1, chosen), even], dim=1)
        wanted = at_points(targets.to(logits.dtype), points)
    return at_points(logits, points), wanted


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values (count, points) of maps (count, height, width) at (x, y) in [0, 1]."""
    grid = 2 * points[:, None] - 1
    values = F.grid_sample(maps[:, None], grid, align_corners=False, padding_mode="border")
    return values[:, 0, 0]
