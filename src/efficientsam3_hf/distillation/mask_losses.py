"""How far masks are from soft masks: cross entropy, focal, Dice. How much they overlap.

Each gives one number for each mask, and losses are 0 where a mask equals its target. For targets of
0 and 1 they are the losses that go by these names, as the objective of concepts has them at points.
For soft targets those would not be 0 at the target: the cross entropy has the target's own entropy
in it, and the Dice loss is least for a mask that is harder than its target, which would pull a
student's features away from the teacher's.

Logits and targets are (..., height, width), targets from 0 to 1; `valid` can be broadcast to them,
true where there is a picture, None for everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_masks(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Masks from 0 to 1, softer for higher temperatures."""
    return (logits.float() / temperature).sigmoid()


def cross_entropy(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cross entropy less the entropy of the target, a mean over pixels."""
    return mean_over_pixels(divergence(logits, targets), valid)


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """The same with less weight where little is wrong, a mean over pixels.

    Args:
        logits: Of the masks.
        targets: Soft masks.
        valid: Where there is a picture.
        alpha: Weight of pixels inside; that of pixels outside is the rest.
        gamma: How little pixels count that are nearly right.
    """
    wrong = (logits.float().sigmoid() - targets).abs()
    weight = alpha * targets + (1 - alpha) * (1 - targets)
    return mean_over_pixels(weight * wrong**gamma * divergence(logits, targets), valid)


def dice_loss(logits: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """One less the Dice coefficient, smoothed by one pixel.

    What two soft masks share is taken as half of their sum less half of their difference.
    """
    probability = logits.float().sigmoid()
    if valid is not None:
        probability, targets = probability * valid, targets * valid
    difference = (probability - targets).abs().sum(dim=(-2, -1))
    return difference / (probability.sum(dim=(-2, -1)) + targets.sum(dim=(-2, -1)) + 1)


def overlap(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of each mask, cut at 0, with its target; 1 where both are empty.

    Args:
        logits: Of the masks.
        targets: 0 or 1.
    """
    predicted, inside = logits > 0, targets > 0.5
    shared = (predicted & inside).sum(dim=(-2, -1))
    union = (predicted | inside).sum(dim=(-2, -1))
    return (shared / union.clamp(min=1)).where(union > 0, 1.0)


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each value less the entropy of its target; 0 where they are equal."""
    targets = targets.float()
    entropy = torch.special.entr(targets) + torch.special.entr(1 - targets)
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none") - entropy


def mean_over_pixels(values: Tensor, valid: Tensor | None) -> Tensor:
    """Means (...) of maps (..., height, width)."""
    if valid is None:
        return values.mean(dim=(-2, -1))
    shares = valid.float()
    total = shares.sum(dim=(-2, -1)).clamp(min=1)
    return (values * shares).sum(dim=(-2, -1)) / total


MASK_LOSSES = {"bce": cross_entropy, "dice": dice_loss, "focal": focal_loss}
