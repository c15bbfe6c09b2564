"""Overlap of masks, boxes and masklets, by pycocotools: `pip install "efficientsam3-hf[eval]"`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.masks_rle import decode_rle, to_text

try:
    import pycocotools.mask
except ImportError as error:
    raise ImportError(
        "Scoring masks needs pycocotools: pip install 'efficientsam3-hf[eval]'."
    ) from error

coco_mask: Any = pycocotools.mask  # its stubs know neither lists of encodings nor float64

# What a mask may be: a boolean array (height, width), a run-length encoding of COCO, compressed or
# not, or a list of polygons.
Mask = Any


def to_rle(mask: Mask, size: tuple[int, int] | None = None) -> dict:
    """A mask as COCO's compressed run-length encoding.

    Args:
        mask: Boolean array (height, width), run-length encoding, or list of polygons.
        size: (height, width); only polygons need it.
    """
    if isinstance(mask, dict):
        return coco_mask.frPyObjects(mask, *mask["size"]) if _is_uncompressed(mask) else mask
    if isinstance(mask, list):
        if size is None:
            raise ValueError("Polygons have no size of their own: pass size=(height, width).")
        return coco_mask.merge(coco_mask.frPyObjects(mask, *size))
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"A mask has two dimensions, not the shape {array.shape}.")
    return coco_mask.encode(np.asfortranarray(array > 0, dtype=np.uint8))


def to_array(mask: Mask, size: tuple[int, int] | None = None) -> np.ndarray:
    """A mask as a boolean array (height, width); `size` as in `to_rle`."""
    if not isinstance(mask, (dict, list)):
        array = np.asarray(mask)
        return array if array.dtype == bool else array > 0
    return decode_rle(to_text(to_rle(mask, size)))


def area(mask: Mask) -> int:
    """Pixels of a mask."""
    return int(coco_mask.area(to_rle(mask)))


def mask_overlaps(
    predicted: Sequence[Mask], truth: Sequence[Mask], crowd: Sequence[bool] | None = None
) -> np.ndarray:
    """Intersection over union (predicted, truth) of masks of one size; 0 where both are empty.

    Args:
        crowd: True for regions of the truth that hold uncounted instances. Their column has the
            share of each prediction that lies in them.
    """
    first, second = [to_rle(mask) for mask in predicted], [to_rle(mask) for mask in truth]
    if not first or not second:
        return np.zeros((len(first), len(second)))
    sizes = {tuple(mask["size"]) for mask in first + second}
    if len(sizes) > 1:
        raise ValueError(f"Masks of one image differ in size: {sorted(sizes)} (height, width).")
    return np.asarray(coco_mask.iou(first, second, _crowd_flags(crowd, len(second))))


def box_overlaps(
    predicted: Sequence, truth: Sequence, crowd: Sequence[bool] | None = None
) -> np.ndarray:
    """Intersection over union (predicted, truth) of boxes (x, y, width, height)."""
    if not len(predicted) or not len(truth):
        return np.zeros((len(predicted), len(truth)))
    first = np.asarray(predicted, dtype=np.float64).reshape(-1, 4)
    second = np.asarray(truth, dtype=np.float64).reshape(-1, 4)
    return np.asarray(coco_mask.iou(first, second, _crowd_flags(crowd, len(second))))


def frame_overlaps(
    predicted: Sequence[Sequence[Mask | None]], truth: Sequence[Sequence[Mask | None]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Areas and intersections of masklets in each frame.

    Args:
        predicted: One list for each masklet, with a mask or None for each frame.
        truth: Likewise, of the same number of frames.

    Returns:
        Pixels of predictions (predicted, frames) and truth (truth, frames), -1 where there is no
        mask, and of their intersections (predicted, truth, frames).
    """
    lengths = {len(masklet) for masklet in [*predicted, *truth]}
    if len(lengths) > 1:
        raise ValueError(f"Masklets of one video differ in their number of frames: {lengths}.")
    frames = lengths.pop() if lengths else 0
    intersections = np.zeros((len(predicted), len(truth), frames), dtype=np.int64)
    areas = [np.full((len(masklets), frames), -1, np.int64) for masklets in (predicted, truth)]
    for frame in range(frames):
        seen = []
        for masklets, pixels in zip((predicted, truth), areas, strict=True):
            rles = {i: to_rle(m[frame]) for i, m in enumerate(masklets) if m[frame] is not None}
            if rles:
                pixels[list(rles), frame] = coco_mask.area(list(rles.values()))
            seen.append(rles)
        if seen[0] and seen[1]:
            share = mask_overlaps(list(seen[0].values()), list(seen[1].values()))
            both = areas[0][list(seen[0]), frame][:, None] + areas[1][list(seen[1]), frame]
            shared = np.rint(share * both / (1 + share)).astype(np.int64)  # whole pixels, exact
            intersections[np.ix_(list(seen[0]), list(seen[1]), [frame])] = shared[..., None]
    return areas[0], areas[1], intersections


def _is_uncompressed(rle: dict) -> bool:
    return isinstance(rle["counts"], list)


def _crowd_flags(crowd: Sequence[bool] | None, count: int) -> list[int]:
    return [0] * count if crowd is None else [int(flag) for flag in crowd]
