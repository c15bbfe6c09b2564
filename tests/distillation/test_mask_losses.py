"""Losses of masks."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from efficientsam3_hf.distillation.mask_losses import (
    MASK_LOSSES,
    cross_entropy,
    dice_loss,
    focal_loss,
    overlap,
    soft_masks,
)


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(4, 2, 6, 9, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hard() -> torch.Tensor:
    return (torch.rand(4, 2, 6, 9, generator=torch.Generator().manual_seed(1)) < 0.4).float()


def test_for_hard_masks_they_are_what_their_names_say(logits, hard):
    bce = F.binary_cross_entropy_with_logits(logits, hard, reduction="none").mean(dim=(2, 3))
    focal = sigmoid_focal_loss(logits, hard, alpha=0.3, gamma=1.5).mean(dim=(2, 3))
    probability = logits.sigmoid()
    shared, total = (probability * hard).sum(dim=(2, 3)), (probability + hard).sum(dim=(2, 3))

    torch.testing.assert_close(cross_entropy(logits, hard), bce)
    torch.testing.assert_close(focal_loss(logits, hard, alpha=0.3, gamma=1.5), focal)
    torch.testing.assert_close(dice_loss(logits, hard), 1 - (2 * shared + 1) / (total + 1))


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_a_soft_mask_is_where_its_loss_is_least(name, logits):
    """Of all masks of one value each, that of the target's value is the nearest, and at no cost."""
    probabilities = torch.linspace(0.01, 0.99, 99)
    own = probabilities.logit()[:, None, None].expand(-1, 20, 20)

    for target in (0.1, 0.3, 0.8):
        losses = MASK_LOSSES[name](own, torch.full_like(own, target))
        assert probabilities[losses.argmin()].item() == pytest.approx(target, abs=1e-3)
    at_target = MASK_LOSSES[name](logits, soft_masks(logits))
    torch.testing.assert_close(at_target, torch.zeros(4, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MASK_LOSSES)
def test_what_is_no_picture_counts_nothing(name, logits, hard):
    valid = torch.zeros(4, 1, 6, 9, dtype=torch.bool)
    valid[:, :, :4, :7] = True
    expected = MASK_LOSSES[name](logits[..., :4, :7], hard[..., :4, :7])
    leaf = logits.clone().requires_grad_()

    losses = MASK_LOSSES[name](leaf, hard, valid)
    losses.sum().backward()

    torch.testing.assert_close(losses, expected)
    assert leaf.grad is not None
    assert not leaf.grad[~valid.expand_as(leaf)].any()
    assert leaf.grad[valid.expand_as(leaf)].all()


def test_overlap_is_that_of_pixels_and_one_of_nothing():
    logits = torch.tensor([[[4.0, -4.0], [1.0, -1.0]], [[-3.0, -2.0], [-5.0, -1.0]]])
    inside = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])

    assert overlap(logits, inside).tolist() == [0.5, 1.0]
    assert overlap(-logits, inside).tolist() == [0.0, 0.0]
