"""How near a student's features come to the teacher's: tokens of phrases, maps of images.

A unit is a phrase or an image. Features never stand for masks: they say where a student is weak,
not how well it segments.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from .units import Units, weights_or_ones

FIELDS = ("cosine", "squared_error", "power", "tokens", "channels")


def score_tokens(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> dict[str, float]:
    """Agreement of tokens (..., channels) of one unit.

    Args:
        student: Features of the student.
        teacher: Those of the teacher, of the same shape.
        valid: Which tokens (...) count. For phrases: those whose id for the student is not padding,
            start and end token included.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Features of the student have the shape {tuple(student.shape)}, those of the teacher "
            f"{tuple(teacher.shape)}: only equal ones can be compared."
        )
    # On the CPU, since MPS has no doubles.
    student, teacher = student.detach().cpu().double(), teacher.detach().cpu().double()
    if valid is not None:
        valid = valid.bool().cpu()
        student, teacher = student[valid], teacher[valid]
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    return {
        "cosine": float(cosine.sum()),
        "squared_error": float((student - teacher).square().sum()),
        "power": float(teacher.square().sum()),
        "tokens": cosine.numel(),
        "channels": student.shape[-1],
    }


def score_maps(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], valid: Tensor | None = None
) -> dict[str, float]:
    """Agreement of the feature maps of one image, level by level.

    Args:
        student: Level -> map (channels, height, width).
        teacher: Likewise; where sizes differ, the student's is resized.
        valid: Pixels (height, width) that are no padding, at any size.
    """
    if student.keys() != teacher.keys():
        raise ValueError(f"Levels {sorted(student)} of the student, {sorted(teacher)} elsewhere.")
    record = {}
    for level, target in teacher.items():
        size = target.shape[-2:]
        ours = student[level][None].float()
        if ours.shape[-2:] != size:
            ours = F.interpolate(ours, size, mode="bilinear")
        inside = None
        if valid is not None:
            inside = F.interpolate(valid[None, None].float(), size, mode="bilinear")[0, 0] > 0.5
        scores = score_tokens(ours[0].movedim(0, -1), target.movedim(0, -1), inside)
        record |= {f"{level}/{name}": value for name, value in scores.items()}
    return record


def summarize(units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    """Means over all tokens of all units, each token counted alike.

    `cosine` is the mean cosine, `mse` the mean squared error of a value, `relative_error` the root
    of the squared error over the teacher's power: 0 is equal, 1 is as far as zeros are. With
    several levels, names are `level/cosine`, and so on.
    """
    weights = weights_or_ones(weights, units)
    prefixes = [name.removesuffix("cosine") for name in units if name.endswith("cosine")]
    summary = {}
    for prefix in prefixes:
        cosine, error, power, tokens, _ = (weights @ units[prefix + name] for name in FIELDS)
        values = weights @ (units[prefix + "tokens"] * units[prefix + "channels"])
        summary[prefix + "cosine"] = _ratio(cosine, tokens)
        summary[prefix + "mse"] = _ratio(error, values)
        summary[prefix + "relative_error"] = _ratio(error, power) ** 0.5
    return summary


def _ratio(top: Any, bottom: Any) -> float:
    return float(top / bottom) if bottom else float("nan")
