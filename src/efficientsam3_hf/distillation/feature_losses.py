"""Distances between the features of a student and of its teacher.

Those of maps are sums over images, where every image counts 1; those of tokens are sums over valid
tokens; `order_error` is one over phrases. Divide by their number. `pointer_error` gives one number
for each pointer.
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
    error = ((student - teacher).square() * share).sum(dim=(2, 3), keepdim=True)
    return (error / variance.clamp(min=floor)).mean(dim=1).sum()


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
    height, width = size
    return F.adaptive_avg_pool2d(valid[:, None].float(), (height, width))[:, 0] > 0.5


def pointer_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of each vector (..., channels), in units of the teacher's length."""
    student, teacher = student.float(), teacher.float()
    length = teacher.square().sum(dim=-1).clamp(min=1e-6)
    return (student - teacher).square().sum(dim=-1) / length


def token_error(student: Tensor, teacher: Tensor, variance: Tensor, valid: Tensor) -> Tensor:
    """Squared error of tokens in units of how much the teacher's channels vary.

    A student that gives each channel's mean over all tokens gets 1 a token.

    Args:
        student: Tokens (phrases, length, channels).
        teacher: Of the same shape.
        variance: (channels,) of the teacher's tokens, from `channel_variance`.
        valid: (phrases, length), true where a token is no padding.
    """
    error = (student.float() - teacher.float()).square() / variance
    return (error.mean(dim=-1) * valid).sum()


def token_angle(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """1 - cosine of the angle between the channels of each valid token; shapes as above."""
    angles = 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return (angles * valid).sum()


def order_error(student: Tensor, shuffled: Tensor, variance: Tensor, valid: Tensor) -> Tensor:
    """How far the mean token of a phrase moves when its words change places.

    Args:
        student: Tokens (phrases, length, channels).
        shuffled: Those of the same phrases with their words in another order.
        variance: (channels,) of the teacher's tokens.
        valid: (phrases, length), true where a token is no padding, in both.
    """
    moved = mean_token(student, valid) - mean_token(shuffled, valid)
    return (moved.square() / variance).mean(dim=-1).sum()


def mean_token(tokens: Tensor, valid: Tensor) -> Tensor:
    """Mean (phrases, channels) of the valid tokens (phrases, length, channels)."""
    weights = valid[..., None].float()
    return (tokens.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def channel_variance(tokens: Tensor) -> Tensor:
    """Variance (channels,) of tokens (number, channels), for channels to be weighed by."""
    variance = tokens.float().var(dim=0, correction=0)
    # Channels that hardly vary must not outweigh all others.
    return variance.clamp(min=0.01 * variance.mean() + torch.finfo(torch.float32).tiny)
