"""How much boxes overlap. All are (cx, cy, w, h), shapes broadcast, and nothing divides by zero."""

import torch
from torch import Tensor
from transformers.models.sam3.modeling_sam3 import box_cxcywh_to_xyxy

SMALLEST_AREA = 1e-12  # of an image; a box of a millionth of its height and width


def box_overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU."""
    (low_1, high_1), (low_2, high_2) = corners(first), corners(second)
    shared = area(torch.maximum(low_1, low_2), torch.minimum(high_1, high_2))
    union = area(low_1, high_1) + area(low_2, high_2) - shared
    hull = area(torch.minimum(low_1, low_2), torch.maximum(high_1, high_2))
    iou = shared / union.clamp(min=SMALLEST_AREA)
    return iou, iou - (hull - union) / hull.clamp(min=SMALLEST_AREA)


def covered_share(boxes: Tensor, cover: Tensor) -> Tensor:
    """Share of each box that lies within another."""
    (low_1, high_1), (low_2, high_2) = corners(boxes), corners(cover)
    shared = area(torch.maximum(low_1, low_2), torch.minimum(high_1, high_2))
    return shared / area(low_1, high_1).clamp(min=SMALLEST_AREA)


def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Upper left and lower right corner (..., 2)."""
    low, high = box_cxcywh_to_xyxy(boxes).split(2, dim=-1)
    return low, high


def area(low: Tensor, high: Tensor) -> Tensor:
    """Of boxes between two corners; 0 where they are the wrong way round."""
    return (high - low).clamp(min=0).prod(dim=-1)
