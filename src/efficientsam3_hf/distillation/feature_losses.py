"""Distances between the maps of a student and of its teacher.

Each is the sum over images, where every image counts 1: divide by their number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def whitened_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Squared error in units of how much the teacher's channels vary, so that scales do not matter.

    A student that gives each channel's mean over the image gets 1 an image.

    Args:
        student: Maps (images, channels, height, width).
        teacher: Of the same shape.
        valid: (images, height, width), true where there is a picture; None for everywhere.
    """
    student, teacher = student.float(), teacher.float()
    share = shares(teacher, valid)
    mean = (teacher * share).sum(dim=(2, 3), keepdim=True)
    variance = ((teacher - mean).square() * share).sum(dim=(2, 3), keepdim=True)
    # Channels that hardly vary must not outweigh all others.
    floor = 0.01 * variance.mean(dim=1, keepdim=True) + torch.finfo(torch.float32).tiny
    error = (student - teacher).square() / variance.clamp(min=floor)
    return (error * share).sum(dim=(2, 3)).mean(dim=1).sum()


def angle_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """1 - cosine of the angle between the channels of each place.

    Args:
        student: Maps (images, channels, height, width).
        teacher: Of the same shape.
        valid: (images, height, width), true where there is a picture; None for everywhere.
    """
    angles = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)
    return (angles * shares(teacher, valid)[:, 0]).sum()


def shares(maps: Tensor, valid: Tensor | None) -> Tensor:
    """How much each place (images, 1, height, width) counts, 1 in sum over an image."""
    if valid is None:
        return torch.full_like(maps[:, :1], 1 / maps[0, 0].numel(), dtype=torch.float32)
    weights = valid[:, None].float()
    return weights / weights.sum(dim=(2, 3), keepdim=True).clamp(min=1)


def same_size(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's maps on the teacher's grid: both show the whole picture, edge to edge."""
    size = teacher.shape[-2:]
    if student.shape[-2:] == size:
        return student
    return F.interpolate(student, size, mode="bilinear", align_corners=False)


def valid_places(valid: Tensor | None, size: Sequence[int]) -> Tensor | None:
    """Which places of a map show more picture than canvas.

    Args:
        valid: (images, height, width) of pixels, true where there is a picture; None for all.
        size: (height, width) of the maps.
    """
    if valid is None:
        return None
    return F.adaptive_avg_pool2d(valid[:, None].float(), list(size))[:, 0] > 0.5
