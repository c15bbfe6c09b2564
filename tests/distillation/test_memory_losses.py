"""Losses of masks, overlaps and pointers against other computations of them."""

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from efficientsam3_hf.distillation.memory_losses import (
    dice_error,
    focal_error,
    mask_cross_entropy,
    overlap,
    pointer_error,
)

LOGITS = torch.tensor([[[4.0, -4.0], [1.0, -1.0]], [[-3.0, -2.0], [-5.0, -1.0]]])
INSIDE = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_focal_error_is_torchvisions(gamma: float):
    expected = sigmoid_focal_loss(LOGITS, INSIDE, 0.25, gamma, "none").mean(dim=(1, 2))

    torch.testing.assert_close(focal_error(LOGITS, INSIDE, gamma=gamma), expected)


def test_dice_error_counts_pixels():
    sharp = torch.tensor([[[9e3, 9e3], [-9e3, -9e3]], [[-9e3] * 2] * 2])

    errors = dice_error(sharp, INSIDE)

    # Two found, one of them right: 1 - (2 * 1 + 1) / (2 + 1 + 1). Nothing found where is nothing.
    torch.testing.assert_close(errors, torch.tensor([0.25, 0.0]))


def test_cross_entropy_is_least_at_soft_targets():
    soft = LOGITS.sigmoid()
    least = mask_cross_entropy(LOGITS, soft)

    for shift in (-0.1, 0.1):
        assert (mask_cross_entropy(LOGITS + shift, soft) > least).all()
    entropy = -(soft * soft.log() + (1 - soft) * (1 - soft).log()).mean(dim=(1, 2))
    torch.testing.assert_close(least, entropy)


def test_overlap_is_that_of_pixels_and_one_of_nothing():
    assert overlap(LOGITS, INSIDE).tolist() == [0.5, 1.0]
    assert overlap(-LOGITS, INSIDE).tolist() == [0.0, 0.0]


def test_pointer_error_knows_no_scale():
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    student = torch.tensor([[3.0, 4.0], [0.0, 0.0]])

    for scale in (1.0, 100.0):
        error = pointer_error(scale * student, scale * teacher)
        torch.testing.assert_close(error, torch.tensor([0.0, 1.0]))
