"""How far masks, overlaps and object pointers of a student are from where they should be.

Masks are compared pixel by pixel, and each gives one number, whatever its size.
"""

from torch import Tensor
from torch.nn import functional as F


def mask_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the pixels of each mask.

    Args:
        logits: (..., height, width).
        targets: Of the same shape, from 0 to 1.
    """
    errors = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return errors.mean(dim=(-2, -1))


def focal_error(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Cross-entropy in which pixels that are already right hardly count; mean over each mask.

    Args:
        logits: (..., height, width).
        targets: Of the same shape, 0 or 1.
        alpha: How much pixels inside count; those outside count 1 - alpha.
        gamma: The higher, the less what is already right counts.
    """
    probabilities = logits.sigmoid()
    errors = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = probabilities * (1 - targets) + (1 - probabilities) * targets
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return (balance * wrong**gamma * errors).mean(dim=(-2, -1))


def dice_error(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - Dice of each mask, with a pixel added to both so that empty masks agree.

    Args:
        logits: (..., height, width).
        targets: Of the same shape, from 0 to 1.
    """
    probabilities = logits.sigmoid()
    shared = (probabilities * targets).sum(dim=(-2, -1))
    both = (probabilities + targets).sum(dim=(-2, -1))
    return 1 - (2 * shared + 1) / (both + 1)


def overlap(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU of each mask, cut at 0, with its target; 1 where both are empty.

    Args:
        logits: (..., height, width).
        targets: Of the same shape, 0 or 1.
    """
    predicted, inside = logits > 0, targets > 0.5
    shared = (predicted & inside).sum(dim=(-2, -1))
    union = (predicted | inside).sum(dim=(-2, -1))
    return (shared / union.clamp(min=1)).where(union > 0, 1.0)


def pointer_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of each vector (..., channels), in units of the teacher's length."""
    student, teacher = student.float(), teacher.float()
    length = teacher.square().sum(dim=-1).clamp(min=1e-6)
    return (student - teacher).square().sum(dim=-1) / length
