"""Overlaps against counting pixels."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from random_masks import near, random_mask, uncompressed_rle

from efficientsam3_hf.evaluation.overlaps import (
    area,
    box_overlaps,
    frame_overlaps,
    mask_overlaps,
    to_array,
    to_rle,
)


def counted_iou(first: np.ndarray, second: np.ndarray) -> float:
    union = np.sum(first | second)
    return np.sum(first & second) / union if union else 0.0


def test_mask_overlaps_count_pixels():
    rng = np.random.default_rng(0)
    for _ in range(200):
        size = tuple(rng.integers(1, 12, size=2))
        predicted = [random_mask(rng, size) for _ in range(rng.integers(4))]
        truth = [random_mask(rng, size) for _ in range(rng.integers(4))]
        truth += [near(rng, mask) for mask in predicted[:1]]
        crowd = rng.random(len(truth)) < 0.3

        overlaps = mask_overlaps(predicted, truth, crowd)

        assert overlaps.shape == (len(predicted), len(truth))
        for i, one in enumerate(predicted):
            for j, other in enumerate(truth):
                share = np.sum(one & other) / one.sum() if one.any() else 0.0
                expected = share if crowd[j] else counted_iou(one, other)
                assert overlaps[i, j] == pytest.approx(expected, abs=1e-12)


def test_every_form_of_a_mask_is_the_same_mask():
    rng = np.random.default_rng(1)
    for _ in range(200):
        mask = random_mask(rng, tuple(rng.integers(1, 12, size=2)))
        compressed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        text = {"size": compressed["size"], "counts": compressed["counts"].decode()}

        for form in (mask, mask.astype(np.uint8) * 255, compressed, text, uncompressed_rle(mask)):
            assert np.array_equal(to_array(form), mask)
            assert area(form) == mask.sum()


def test_polygons_need_a_size():
    square = [[2, 1, 5, 1, 5, 4, 2, 4]]

    mask = to_array(square, size=(6, 8))

    assert mask.sum() == 9
    assert mask[1:4, 2:5].all()
    with pytest.raises(ValueError, match="pass size"):
        to_rle(square)


def test_box_overlaps_are_those_of_areas():
    rng = np.random.default_rng(2)
    predicted, truth = rng.random((20, 4)), rng.random((15, 4))
    crowd = rng.random(15) < 0.5

    overlaps = box_overlaps(predicted, truth, crowd)

    for i, (x, y, w, h) in enumerate(predicted):
        for j, (u, v, a, b) in enumerate(truth):
            wide = max(0, min(x + w, u + a) - max(x, u))
            shared = wide * max(0, min(y + h, v + b) - max(y, v))
            whole = w * h if crowd[j] else w * h + a * b - shared
            assert overlaps[i, j] == pytest.approx(shared / whole, abs=1e-12)
    assert box_overlaps([], truth).shape == (0, 15)


def test_frame_overlaps_count_pixels_and_know_absence_from_emptiness():
    rng = np.random.default_rng(3)
    for _ in range(200):
        size, frames = tuple(rng.integers(1, 9, size=2)), rng.integers(1, 5)

        def masklet(size=size, frames=frames):
            return [random_mask(rng, size) if rng.random() < 0.7 else None for _ in range(frames)]

        predicted = [masklet() for _ in range(rng.integers(3))]
        truth = [masklet() for _ in range(rng.integers(3))]

        areas, true_areas, shared = frame_overlaps(predicted, truth)

        for pixels, masklets in ((areas, predicted), (true_areas, truth)):
            expected = [[-1 if m is None else m.sum() for m in masklet] for masklet in masklets]
            assert pixels.tolist() == expected
        for i, one in enumerate(predicted):
            for j, other in enumerate(truth):
                for t in range(frames):
                    absent = one[t] is None or other[t] is None
                    assert shared[i, j, t] == (0 if absent else np.sum(one[t] & other[t]))


def test_masks_of_different_size_are_an_error():
    with pytest.raises(ValueError, match="differ in size"):
        mask_overlaps([np.ones((2, 3))], [np.ones((3, 2))])
    with pytest.raises(ValueError, match="number of frames"):
        frame_overlaps([[None]], [[None, None]])
    with pytest.raises(ValueError, match="two dimensions"):
        to_rle(np.ones((1, 2, 3)))
