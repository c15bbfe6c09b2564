"""Masks as run lengths, in each of the three forms that COCO's files know.

* polygons: `[[x1, y1, x2, y2, ...], ...]`
* uncompressed: `{"size": [height, width], "counts": [12, 3, ...]}`
* compressed: `{"size": [height, width], "counts": "<characters>"}`

Runs go down the columns, and the first is of pixels outside. Within the package a mask is in the
compressed form. The work is done by pycocotools: `pip install "efficientsam3-hf[train]"`.
"""

from functools import lru_cache
from math import ceil, floor
from typing import Any, TypedDict

import numpy as np
from PIL import Image


class Rle(TypedDict):
    """Compressed run lengths of a mask."""

    size: list[int]
    counts: str


@lru_cache(maxsize=1)
def import_mask_api() -> Any:
    """`pycocotools.mask`, or an error that says how to get it."""
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            'Masks are read and written by pycocotools: pip install "efficientsam3-hf[train]".'
        ) from error
    return mask


def to_rle(segmentation: Any, size: tuple[int, int]) -> Rle:
    """Any of the three forms, or a boolean mask, as compressed run lengths.

    Args:
        segmentation: Polygons, run lengths or an array (height, width).
        size: (height, width) of the image that it must fit.
    """
    height, width = (int(side) for side in size)
    api = import_mask_api()
    if isinstance(segmentation, np.ndarray):
        if segmentation.shape != (height, width):
            raise ValueError(
                f"A mask of {segmentation.shape} does not fit an image of {(height, width)}."
            )
        return to_text(api.encode(np.asfortranarray(segmentation, dtype=np.uint8)))
    if isinstance(segmentation, list):
        return to_text(api.merge(api.frPyObjects(check_polygons(segmentation), height, width)))
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= set(segmentation):
        raise ValueError(
            f"A mask is a list of polygons or has size and counts; this is {segmentation!r:.80}."
        )
    if [int(side) for side in segmentation["size"]] != [height, width]:
        raise ValueError(
            f"Run lengths of size {list(segmentation['size'])} do not fit an image of "
            f"{[height, width]} (height, width)."
        )
    counts = segmentation["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    runs = np.asarray(counts, dtype=np.int64) if isinstance(counts, list) else runs_of(counts)
    if runs.sum() != height * width or (runs < 0).any():
        raise ValueError(
            f"Run lengths cover {int(runs.sum())} of {height * width} pixels: they are damaged."
        )
    if isinstance(counts, list):
        compressed = api.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        return to_text(compressed)
    return {"size": [height, width], "counts": counts}


def to_text(rle: dict[str, Any]) -> Rle:
    """What pycocotools gives, with characters in place of bytes."""
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def check_polygons(polygons: list[Any]) -> list[list[float]]:
    """Polygons of three corners or more, each a flat list of finite numbers."""
    if not polygons:
        raise ValueError("A mask has no polygon.")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                "A polygon is [x1, y1, x2, y2, x3, y3, ...] with three corners or more; this is "
                f"{polygon!r:.80}."
            )
        if not np.isfinite(np.asarray(polygon, dtype=float)).all():
            raise ValueError(f"A polygon has corners that are not finite: {polygon!r:.80}.")
    return polygons


def runs_of(counts: str) -> np.ndarray:
    """Run lengths out of their compressed form.

    Each is a number of 5-bit digits, lowest first; the sixth bit says that another follows, and
    the highest digit carries the sign. From the fourth on it is the difference to the one before
    the last.

    >>> runs_of("52203").tolist()
    [5, 2, 2, 2, 5]
    """
    characters = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    if not len(characters) or ((characters < 0) | (characters > 63)).any() or characters[-1] & 32:
        raise ValueError(f"Run lengths are cut short or hold strange characters: {counts!r:.80}.")
    last = np.flatnonzero((characters & 32) == 0)
    first = np.concatenate([[0], last[:-1] + 1])
    length = last - first + 1
    if length.max() > 7:
        raise ValueError(f"A run length of {int(length.max())} digits is damaged: {counts!r:.80}.")
    place = np.arange(len(characters)) - np.repeat(first, length)
    values = np.add.reduceat((characters & 31) << (5 * place), first)
    values -= np.where(characters[last] & 16, 1 << (5 * length), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    return values


def decode_rle(rle: Rle) -> np.ndarray:
    """The mask: boolean (height, width)."""
    height, width = rle["size"]
    runs = runs_of(rle["counts"])
    # pycocotools' own decoder warns with numpy 2: it has an `__array__` of the old kind.
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def decode_window(rle: Rle) -> tuple[np.ndarray, tuple[int, int]]:
    """The mask within its box, and row and column of that box: most of a picture is outside."""
    left, top, right, bottom = (int(edge) for edge in rle_box(rle))
    height = rle["size"][0]
    ends = np.clip(runs_of(rle["counts"]).cumsum(), left * height, right * height)
    runs = np.diff(ends, prepend=left * height)
    columns = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(right - left, height)
    return columns[:, top:bottom].T, (top, left)


def encode_window(part: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> Rle:
    """A mask that is outside everywhere but in a window.

    Args:
        part: Boolean mask of the window.
        corner: Row and column of its first pixel, in the image.
        size: (height, width) of the image.
    """
    (height, width), (rows, columns) = size, part.shape
    padded = np.zeros((columns, rows + 2), dtype=np.int8)
    padded[:, 1:-1] = part.T
    column, row = np.divmod(np.flatnonzero(np.diff(padded)), rows + 1)
    changes = (corner[1] + column) * height + corner[0] + row  # in and out, in turn
    kept = np.ones(len(changes), dtype=bool)
    # A run that reaches the foot of the image goes on at the head of the next column.
    meeting = 2 * np.flatnonzero(changes[1:-1:2] == changes[2::2])
    kept[meeting + 1] = kept[meeting + 2] = False
    counts = np.diff(changes[kept], prepend=0, append=height * width).tolist()
    if len(counts) > 1 and counts[-1] == 0:
        counts.pop()
    size_and_counts = {"size": [height, width], "counts": counts}
    return to_text(import_mask_api().frPyObjects(size_and_counts, height, width))


def resize_window(
    part: np.ndarray,
    corner: tuple[int, int],
    size: tuple[int, int],
    new_size: tuple[int, int],
    resample: Image.Resampling,
) -> tuple[np.ndarray, tuple[int, int]]:
    """What a window of a mask becomes when its image is resized, and where: inside from 1/2 on.

    Args:
        part: Boolean mask of the window.
        corner: Row and column of its first pixel.
        size: (height, width) of the image.
        new_size: Likewise, afterwards.
        resample: `BOX` or `BILINEAR`.
    """
    firsts, lasts, scales, lows, highs = [], [], [], [], []
    for start, length, old, new in zip(corner, part.shape, size, new_size, strict=True):
        scale = old / new
        reach = max(1.0, scale)  # of the filter, in old pixels
        first = max(0, floor((start - reach) / scale))
        last = min(new, ceil((start + length + reach) / scale))
        firsts.append(first)
        lasts.append(last)
        scales.append(scale)
        lows.append(max(0, floor(first * scale - reach)))
        highs.append(min(old, ceil(last * scale + reach)))
    grey = np.zeros((highs[0] - lows[0], highs[1] - lows[1]), dtype=np.uint8)
    top, left = corner[0] - lows[0], corner[1] - lows[1]
    grey[top : top + part.shape[0], left : left + part.shape[1]][part] = 255
    box = (
        firsts[1] * scales[1] - lows[1],
        firsts[0] * scales[0] - lows[0],
        min(lasts[1] * scales[1] - lows[1], grey.shape[1]),
        min(lasts[0] * scales[0] - lows[0], grey.shape[0]),
    )
    target = (lasts[1] - firsts[1], lasts[0] - firsts[0])
    resized = Image.fromarray(grey).resize(target, resample, box)
    # Half of 255 is rounded to 127 or 128, since Pillow has places in single precision.
    return np.asarray(resized) >= 127, (firsts[0], firsts[1])


def rle_area(rle: Rle) -> int:
    """Pixels inside."""
    return int(import_mask_api().area(rle))


def rle_box(rle: Rle) -> tuple[float, float, float, float]:
    """The smallest box (x1, y1, x2, y2) around the mask; zeros if it is empty."""
    x, y, width, height = import_mask_api().toBbox(rle).tolist()
    return x, y, x + width, y + height


def point_inside(mask: np.ndarray) -> tuple[float, float]:
    """The pixel (x, y) of a mask that is nearest to its centre.

    >>> point_inside(np.array([[1, 1, 1], [1, 0, 1]], dtype=bool))
    (1.0, 0.0)
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError("An empty mask has no point inside.")
    distance = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    nearest = int(distance.argmin())
    return float(columns[nearest]), float(rows[nearest])
