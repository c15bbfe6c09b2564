"""What video models do to masks: overlap, duplicates, holes, islands. Plain torch, any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Logit of a pixel that has been decided against.
NO_OBJECT_LOGIT = -10.0


def mask_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union (N, M) of boolean masks (N, height, width) and (M, height, width)."""
    first, second = first.flatten(1).float(), second.flatten(1).float()
    with torch.autocast(first.device.type, enabled=False):  # half precision cannot count pixels
        intersection = first @ second.T  # whole numbers, exact below 2 ** 24 pixels
    union = first.sum(dim=1, keepdim=True) + second.sum(dim=1) - intersection
    return intersection / union.clamp(min=1)


def distinct_masks(masks: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Which of (N, height, width) boolean masks stay if the better of any two that overlap does.

    Greedy non-maximum suppression: masks are taken by falling score, and each removes those after
    it whose intersection over union with it lies above the threshold.
    """
    order = scores.argsort(descending=True, stable=True)
    overlaps = (mask_iou(masks, masks) > iou_threshold)[order][:, order].cpu()
    keep = torch.ones(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if keep[index]:
            keep[index + 1 :] &= ~overlaps[index, index + 1 :]
    result = torch.empty_like(keep)
    result[order.cpu()] = keep
    return result.to(masks.device)


def component_areas(masks: Tensor) -> Tensor:
    """Pixels of the component that each pixel of (N, height, width) boolean masks belongs to.

    Pixels touch at their sides and corners. Unset pixels have area 0.
    """
    if masks.numel() == 0:
        return torch.zeros_like(masks, dtype=torch.long)
    count, height, width = masks.shape
    nobody = height * width
    own = torch.arange(nobody, device=masks.device).view(1, height, width)
    # Every pixel names one of its component: at first itself, in the end all of them the first.
    named = torch.where(masks, own, nobody)
    while True:
        least = -F.max_pool2d(-named.float(), 3, stride=1, padding=1)  # of the pixel's neighbours
        least = torch.where(masks, least.long(), nobody)
        if torch.equal(least, named):
            break
        # Whoever is named learns the least name known to those that name it, and passes it on, so
        # that the number of rounds grows with the logarithm of the length of a component.
        names = named.flatten(1)
        known = torch.arange(nobody + 1, device=masks.device).repeat(count, 1)
        known = known.scatter_reduce(1, names, least.flatten(1), "amin")
        known = known.gather(1, known)
        named = torch.minimum(least, known.gather(1, names).view_as(least))
    names = named.flatten(1)
    areas = torch.zeros(count, nobody + 1, dtype=torch.long, device=masks.device)
    areas.scatter_add_(1, names, torch.ones_like(names))
    areas[:, nobody] = 0
    return areas.gather(1, names).view_as(named)


def clean_masks(logits: Tensor, max_area: int) -> Tensor:
    """Mask logits (N, height, width) with small holes filled and small islands removed.

    Args:
        logits: Positive inside.
        max_area: Largest hole or island in pixels; 0 leaves masks as they are. Islands of more than
            half a mask stay, so that small objects do.
    """
    if max_area <= 0:
        return logits
    outside = logits <= 0
    holes = outside & (component_areas(outside) <= max_area)
    logits = torch.where(holes, 0.1, logits)
    inside = logits > 0
    largest_island = (inside.sum(dim=(1, 2), keepdim=True) // 2).clamp(max=max_area)
    islands = inside & (component_areas(inside) <= largest_island)
    return torch.where(islands, -0.1, logits)


def without_overlap(logits: Tensor) -> Tensor:
    """Mask logits (N, height, width) in which each pixel is left to the mask strongest there."""
    owner = logits.argmax(dim=0, keepdim=True)
    numbers = torch.arange(len(logits), device=logits.device)[:, None, None]
    return torch.where(owner == numbers, logits, logits.clamp(max=NO_OBJECT_LOGIT))


def drop_overlapped(logits: Tensor, least_share: float = 0.3) -> Tensor:
    """Mask logits (N, height, width) without the masks that stronger ones cover.

    Args:
        logits: Positive inside.
        least_share: Of its area that a mask must keep when each pixel is left to the strongest.
    """
    if len(logits) < 2:
        return logits
    area = (logits > 0).sum(dim=(1, 2)).clamp(min=1)
    kept_area = (without_overlap(logits) > 0).sum(dim=(1, 2))
    keep = (kept_area / area >= least_share)[:, None, None]
    return torch.where(keep, logits, logits.clamp(max=NO_OBJECT_LOGIT))
