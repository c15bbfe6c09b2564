"""What video models do to masks, against scipy and plain loops."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from efficientsam3_hf.models.masks import (
    NO_OBJECT_LOGIT,
    clean_masks,
    component_areas,
    distinct_masks,
    drop_overlapped,
    mask_iou,
    without_overlap,
)

EIGHT_NEIGHBOURS = np.ones((3, 3))


def areas_of_scipy(mask: np.ndarray) -> np.ndarray:
    labels, _ = ndimage.label(mask, EIGHT_NEIGHBOURS)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return areas[labels]


def spiral(side: int) -> np.ndarray:
    """One long, thin component."""
    mask = np.zeros((side, side), dtype=bool)
    row = column = 0
    step, mask[0, 0] = (0, 1), True
    while True:
        for _ in range(2):
            ahead = (row + step[0], column + step[1])
            beyond = (row + 2 * step[0], column + 2 * step[1])
            inside = 0 <= ahead[0] < side and 0 <= ahead[1] < side
            free = not (0 <= beyond[0] < side and 0 <= beyond[1] < side and mask[beyond])
            if inside and free and not mask[ahead]:
                row, column = ahead
                mask[row, column] = True
                break
            step = (step[1], -step[0])
        else:
            return mask


@pytest.mark.parametrize("density", [0.1, 0.3, 0.4, 0.45, 0.6, 0.9])
@pytest.mark.parametrize("shape", [(37, 53), (1, 20), (64, 64)])
def test_areas_are_those_of_scipy(density: float, shape: tuple[int, int]):
    masks = np.random.default_rng(int(100 * density)).random((4, *shape)) < density

    areas = component_areas(torch.from_numpy(masks))

    assert np.array_equal(areas.numpy(), np.stack([areas_of_scipy(mask) for mask in masks]))


@pytest.mark.parametrize("side", [8, 65])
def test_a_spiral_is_one_component(side: int):
    mask = spiral(side)
    assert mask.sum() > 3 * side

    areas = component_areas(torch.from_numpy(mask)[None])[0]

    assert np.array_equal(areas.numpy(), areas_of_scipy(mask))


@pytest.mark.parametrize("masks", [torch.zeros(2, 5, 5), torch.ones(2, 5, 5), torch.zeros(0, 5, 5)])
def test_areas_of_nothing_and_everything(masks: torch.Tensor):
    areas = component_areas(masks.bool())

    assert areas.shape == masks.shape
    assert (areas == masks.long() * 25).all()


def test_small_holes_are_filled_and_large_ones_stay():
    logits = torch.full((1, 20, 20), 5.0)
    logits[0, 2:4, 2:4] = -5  # 4 pixels
    logits[0, 8:14, 8:14] = -5  # 36 pixels

    cleaned = clean_masks(logits, max_area=16)

    assert (cleaned[0, 2:4, 2:4] > 0).all()
    assert torch.equal(cleaned[0, 8:14, 8:14], logits[0, 8:14, 8:14])
    assert torch.equal(clean_masks(logits, max_area=0), logits)


def test_small_islands_are_removed_but_small_objects_stay():
    logits = torch.full((2, 20, 20), -5.0)
    logits[0, 2:12, 2:12] = 5
    logits[0, 16:18, 16:18] = 5  # an island beside an object
    logits[1, 4:6, 4:6] = 5  # an object as small

    cleaned = clean_masks(logits, max_area=16)

    assert (cleaned[0] > 0).sum() == 100
    assert torch.equal(cleaned[1], logits[1])


def test_overlap_is_counted_exactly():
    first = torch.zeros(2, 300, 300, dtype=torch.bool)
    second = torch.zeros(3, 300, 300, dtype=torch.bool)
    first[0, :, :200] = second[0, :, 100:] = second[1, :, :200] = True

    iou = mask_iou(first, second)

    assert iou[0].tolist() == pytest.approx([1 / 3, 1, 0])
    assert (iou[1] == 0).all()  # empty masks overlap with nothing, not even with one another


def test_overlap_is_counted_exactly_in_half_precision_too():
    masks = torch.zeros(2, 300, 300, dtype=torch.bool)
    masks[0, :, :200] = masks[1, :, 1:] = True  # more pixels than bfloat16 can tell apart
    expected = mask_iou(masks, masks)

    with torch.autocast("cpu", torch.bfloat16):
        iou = mask_iou(masks, masks)

    assert torch.equal(iou, expected)


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_are_suppressed_as_a_plain_loop_does(seed: int):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (30, 2), generator=generator)
    masks = torch.zeros(30, 24, 24, dtype=torch.bool)
    for mask, (y, x) in zip(masks, corners.tolist(), strict=True):
        mask[y : y + 9, x : x + 9] = True
    scores = torch.rand(30, generator=generator)

    keep = distinct_masks(masks, scores, 0.3)

    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(mask_iou(masks[[index]], masks[[other]]) <= 0.3 for other in kept):
            kept.append(index)
    assert keep.nonzero()[:, 0].tolist() == sorted(kept)
    assert 1 < len(kept) < 30


def test_each_pixel_is_left_to_the_strongest_mask():
    logits = torch.randn(3, 6, 6)

    apart = without_overlap(logits)

    assert torch.equal(apart.max(dim=0).values, logits.max(dim=0).values)
    assert ((apart > NO_OBJECT_LOGIT).sum(dim=0) <= 1).all()


def test_a_mask_that_a_stronger_one_covers_is_dropped():
    logits = torch.full((3, 10, 10), -5.0)
    logits[0, :, :6] = 5
    logits[1, :, 1:7] = 3  # five sixths of it are covered
    logits[2, :, 4:] = 4  # one third of it is

    result = drop_overlapped(logits)

    assert torch.equal(result[[0, 2]], logits[[0, 2]])
    assert (result[1] <= NO_OBJECT_LOGIT).all()
    assert torch.equal(drop_overlapped(logits[:1]), logits[:1])
