"""Random masks for tests of the scores: blobs, speckles, single pixels, edges, nothing."""

import numpy as np


def random_mask(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A boolean mask of one of five kinds, also at the borders."""
    height, width = size
    mask = np.zeros(size, dtype=bool)
    kind = rng.integers(5)
    if kind == 1:
        mask[rng.integers(height), rng.integers(width)] = True
    elif kind == 2:
        mask = rng.random(size) < rng.random()
    elif kind > 2:
        top, left = rng.integers(height), rng.integers(width)
        mask[top : top + rng.integers(1, height + 1), left : left + rng.integers(1, width + 1)] = 1
    return mask


def near(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """The mask moved by some pixels, with a few of them flipped."""
    moved = np.roll(mask, rng.integers(-2, 3, size=2), axis=(0, 1))
    return moved ^ (rng.random(mask.shape) < rng.choice([0, 0.02, 0.1]))


def uncompressed_rle(mask: np.ndarray) -> dict:
    """COCO's uncompressed run-length encoding: columns first, runs of 0 and 1 in turn."""
    counts, value = [], False
    for pixel in mask.T.ravel():
        if pixel != value or not counts:
            counts += [0] if not counts and pixel else []
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}
