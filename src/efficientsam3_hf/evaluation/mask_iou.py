"""IoU of single objects under boxes and clicks, and how the clicks are chosen.

* Box: the box of the annotation, (x, y, x + width, y + height) in pixels of the image; one mask;
  IoU; mean over all instances that are not crowds (the protocol behind the released numbers).
* Clicks: the first in the middle of the object, each next one in the middle of the largest error,
  as SAM and SAM 2 do.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .overlaps import Mask, to_array
from .units import Units, weights_or_ones

try:
    from scipy.ndimage import distance_transform_edt
except ImportError as error:
    raise ImportError(
        "Choosing clicks needs scipy: pip install 'efficientsam3-hf[eval]'."
    ) from error


class Click(NamedTuple):
    """A pixel that a user points at.

    Args:
        x: Column, counted from 0.
        y: Row, counted from 0.
        is_positive: The pixel belongs to the object.
    """

    x: int
    y: int
    is_positive: bool


def mask_iou(predicted: Mask, truth: Mask) -> float:
    """Intersection over union of two masks; 0 where both are empty.

    >>> mask_iou(np.array([[True, True, False]]), np.array([[False, True, True]]))
    0.3333333333333333
    """
    predicted, truth = to_array(predicted), to_array(truth)
    if predicted.shape != truth.shape:
        raise ValueError(f"The prediction has shape {predicted.shape}, the truth {truth.shape}.")
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 0.0


def score_instance(predicted: Sequence[Mask], truth: Mask) -> dict[str, list[float]]:
    """IoU of the masks that were predicted for one object, in the order of the prompts."""
    return {"iou": [mask_iou(mask, truth) for mask in predicted]}


def summarize(units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    """Mean over instances of the IoU after each prompt: `mIoU`, or `mIoU@1`, `mIoU@2`, ..."""
    weights = weights_or_ones(weights, units)
    means = weights @ units["iou"].reshape(len(weights), -1) / weights.sum()
    if len(means) == 1:
        return {"mIoU": float(means[0])}
    return {f"mIoU@{number}": float(mean) for number, mean in enumerate(means, start=1)}


def box_prompt(box_xywh: Sequence[float]) -> tuple[float, float, float, float]:
    """The box (x, y, x + width, y + height) that the reference hands to the model.

    >>> box_prompt([1, 2, 10, 20])
    (1, 2, 11, 22)
    """
    x, y, width, height = box_xywh
    return x, y, x + width, y + height


def box_centre(box_xywh: Sequence[float]) -> tuple[float, float]:
    """The middle (x, y) of a box, which need not lie on the object."""
    x, y, width, height = box_xywh
    return x + width / 2, y + height / 2


def centre_click(truth: Mask) -> Click:
    """The pixel of an object that lies farthest from its border; the picture's edge is a border."""
    click = next_click(None, truth)
    if click is None:
        raise ValueError("An empty mask has no centre: leave objects without pixels out.")
    return click


def next_click(predicted: Mask | None, truth: Mask) -> Click | None:
    """The pixel farthest inside the missed or the added region, whichever is deeper.

    Of equally deep pixels the first in reading order is taken; of equally deep regions the added
    one. None where nothing is wrong.
    """
    truth = to_array(truth)
    shown = np.zeros_like(truth) if predicted is None else to_array(predicted)
    missed, added = _deepest(truth & ~shown), _deepest(shown & ~truth)
    is_positive = missed[0] > added[0]
    depth, x, y = missed if is_positive else added
    return Click(x, y, is_positive) if depth else None


def click_rounds(
    predict: Callable[[list[Click]], Mask], truth: Mask, rounds: int
) -> dict[str, list[float]]:
    """IoU after each of several clicks on one object, for `summarize`.

    Args:
        predict: Returns the mask for all clicks so far. Where a model answers the first click with
            several masks, it returns the one the model itself holds best.
        rounds: Number of clicks. A mask without error gets no further click and keeps its IoU.
    """
    clicks, ious = [centre_click(truth)], []
    while len(ious) < rounds:
        mask = predict(list(clicks))
        ious.append(mask_iou(mask, truth))
        click = next_click(mask, truth)
        if click is None:
            ious += [1.0] * (rounds - len(ious))
        else:
            clicks.append(click)
    return {"iou": ious}


def best_mask(masks: Sequence[Mask], truth: Mask) -> int:
    """Index of the mask nearest to the truth, for the oracle that SAM's papers report beside."""
    return int(np.argmax([mask_iou(mask, truth) for mask in masks]))


def _deepest(region: np.ndarray) -> tuple[float, int, int]:
    """Depth, column and row of the pixel farthest from all outside, beyond the edge included."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        return 0.0, 0, 0
    top, left = int(rows[0]), int(columns[0])
    box = region[top : rows[-1] + 1, left : columns[-1] + 1]  # outside of it all is outside
    depths = np.asarray(distance_transform_edt(np.pad(box, 1)))[1:-1, 1:-1]
    row, column = divmod(int(depths.argmax()), box.shape[1])
    return float(depths[row, column]), left + column, top + row
