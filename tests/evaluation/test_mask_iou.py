"""IoU of single objects, and the clicks of SAM's protocol."""

import doctest

import numpy as np
import pytest
from random_masks import near, random_mask
from scipy.spatial.distance import cdist

from efficientsam3_hf.evaluation import mask_iou as module
from efficientsam3_hf.evaluation.mask_iou import (
    Click,
    best_mask,
    box_centre,
    box_prompt,
    centre_click,
    click_rounds,
    mask_iou,
    next_click,
    score_instance,
    summarize,
)
from efficientsam3_hf.evaluation.units import stack


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(module).failed == 0


def test_iou_counts_pixels_and_is_zero_for_two_empty_masks():
    rng = np.random.default_rng(0)
    for _ in range(300):
        truth = random_mask(rng, (9, 7))
        predicted = near(rng, truth) if rng.random() < 0.5 else random_mask(rng, (9, 7))
        union = np.sum(predicted | truth)
        expected = np.sum(predicted & truth) / union if union else 0.0

        assert mask_iou(predicted, truth) == pytest.approx(expected, abs=1e-12)
    assert mask_iou(np.zeros((2, 2)), np.zeros((2, 2))) == 0.0


def test_mean_is_over_instances_not_images():
    half = np.array([[True, False]])
    records = [score_instance([mask], np.array([[True, True]])) for mask in (half, half, ~half * 0)]

    assert summarize(stack(records))["mIoU"] == pytest.approx(1 / 3)
    assert summarize(stack(records), np.array([1, 0, 1]))["mIoU"] == pytest.approx(0.25)


def test_box_prompt_and_centre():
    assert box_prompt([3.5, 2, 10, 4]) == (3.5, 2, 13.5, 6)
    assert box_centre([3.5, 2, 10, 4]) == (8.5, 4)


def slow_depths(region: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the nearest pixel outside, all pairs looked at."""
    padded = np.pad(region, 1)
    inside, outside = np.argwhere(padded), np.argwhere(~padded)
    depths = np.zeros(padded.shape)
    if len(inside):
        depths[tuple(inside.T)] = cdist(inside, outside).min(axis=1)
    return depths[1:-1, 1:-1]


def test_next_click_is_deepest_in_the_error_and_says_which_kind():
    rng = np.random.default_rng(1)
    kinds = set()
    for _ in range(300):
        size = tuple(rng.integers(1, 14, size=2))
        truth = random_mask(rng, size)
        predicted = near(rng, truth) if rng.random() < 0.5 else random_mask(rng, size)
        missed, added = slow_depths(truth & ~predicted), slow_depths(predicted & ~truth)

        click = next_click(predicted, truth)

        kinds.add(None if click is None else click.is_positive)
        if click is None:
            assert np.array_equal(predicted, truth)
            continue
        assert click.is_positive == (missed.max() > added.max())
        depths = missed if click.is_positive else added
        y, x = np.unravel_index(np.argmax(depths), size)
        assert (click.x, click.y) == (x, y)
    assert kinds == {None, True, False}


def test_centre_is_farthest_from_the_border_and_the_picture_ends_there():
    truth = np.zeros((7, 9), dtype=bool)
    truth[:5, :5] = True  # touches the upper left corner
    assert centre_click(truth) == Click(2, 2, True)

    one_pixel = np.zeros((3, 3), dtype=bool)
    one_pixel[2, 2] = True
    assert centre_click(one_pixel) == Click(2, 2, True)

    ring = np.ones((7, 7), dtype=bool)
    ring[2:5, 2:5] = False
    x, y, _ = centre_click(ring)
    assert ring[y, x]  # the centre of its box would lie outside
    with pytest.raises(ValueError, match="empty mask"):
        centre_click(np.zeros((3, 3)))


def test_rounds_add_clicks_until_nothing_is_wrong():
    truth = np.zeros((8, 8), dtype=bool)
    truth[1:7, 1:7] = True
    seen = []

    def predict(clicks: list[Click]) -> np.ndarray:
        seen.append(clicks)
        mask = np.zeros_like(truth)
        if len(clicks) == 1:
            mask[1:7, 1:5] = True  # misses the right two columns
        elif len(clicks) == 2:
            mask[1:7] = truth[1:7]
            mask[1:4, 7] = True  # adds three pixels
        else:
            mask = truth
        return mask

    ious = click_rounds(predict, truth, rounds=5)["iou"]

    assert ious == pytest.approx([24 / 36, 36 / 39, 1, 1, 1])
    assert [len(clicks) for clicks in seen] == [1, 2, 3]
    first, second, third = seen[-1]
    assert first.is_positive
    assert second.is_positive
    assert second.x in (5, 6)
    assert not third.is_positive
    assert third.x == 7
    summary = summarize(stack([{"iou": ious}]))
    assert summary["mIoU@1"] == pytest.approx(24 / 36)
    assert summary["mIoU@5"] == 1


def test_the_oracle_takes_the_mask_nearest_to_the_truth():
    truth = np.array([[True, True, False]])
    assert best_mask([~truth, truth, truth * 0], truth) == 1


def test_another_size_than_the_truth_is_an_error():
    with pytest.raises(ValueError, match="shape"):
        mask_iou(np.ones((2, 3)), np.ones((4, 6)))
