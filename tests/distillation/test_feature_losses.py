"""Distances of features, against plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from efficientsam3_hf.distillation.feature_losses import (
    angle_error,
    channel_variance,
    order_error,
    pointer_error,
    same_size,
    token_angle,
    token_error,
    valid_places,
    whitened_error,
)


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 4, 6, generator=generator) for _ in range(2))
    teacher = teacher * torch.tensor([1.0, 10, 0.1, 3, 5])[:, None, None] + 7
    valid = torch.ones(2, 4, 6, dtype=torch.bool)
    valid[0, 2:] = False
    valid[1, :, :1] = False
    return student, teacher, valid


def test_errors_of_maps_equal_plain_loops(maps):
    student, teacher, valid = maps
    squared, angle = 0.0, 0.0
    for own, theirs, inside in zip(*maps, strict=True):
        own, theirs = own[:, inside].double(), theirs[:, inside].double()
        variances = [channel.var(correction=0).item() for channel in theirs]
        floor = 0.01 * sum(variances) / len(variances)
        per_channel = [
            (a - b).square().mean().item() / max(variance, floor)
            for a, b, variance in zip(own, theirs, variances, strict=True)
        ]
        squared += sum(per_channel) / len(per_channel)
        angle += 1 - F.cosine_similarity(own, theirs, dim=0).mean().item()

    assert whitened_error(student, teacher, valid).item() == pytest.approx(squared, rel=1e-5)
    assert angle_error(student, teacher, valid).item() == pytest.approx(angle, rel=1e-5)


def test_errors_of_maps_know_no_scale_and_no_place_outside(maps):
    student, teacher, valid = maps
    student.requires_grad_(True)
    error = whitened_error(student, teacher, valid) + angle_error(student, teacher, valid)

    error.backward()
    scaled = whitened_error(3 * student, 3 * teacher, valid)

    torch.testing.assert_close(scaled, whitened_error(student, teacher, valid))
    moved = student.grad.abs().sum(dim=1) > 0
    assert torch.equal(moved, valid)


def test_the_mean_of_each_channel_is_one_away(maps):
    _, teacher, _ = maps
    mean = teacher.mean(dim=(2, 3), keepdim=True).expand_as(teacher)

    # The third channel hardly varies, so its share is less than the others'.
    assert 0.8 * 2 < whitened_error(mean, teacher).item() <= 2


def test_a_map_of_another_size_shows_the_same_places():
    def ramp(size: int) -> torch.Tensor:  # what lies at the middle of each place
        line = (torch.arange(size) + 0.5) / size
        return torch.stack([line[:, None].expand(size, size), line[None].expand(size, size)])[None]

    resized = same_size(ramp(64), ramp(72))

    torch.testing.assert_close(
        resized[..., 1:-1, 1:-1], ramp(72)[..., 1:-1, 1:-1], rtol=0, atol=1e-6
    )
    assert same_size(resized, ramp(72)) is resized


def test_a_place_is_valid_if_more_than_half_of_it_is_picture():
    valid = torch.zeros(1, 12, 12, dtype=torch.bool)
    valid[:, :, :6] = True
    places = valid_places(valid, (3, 3))
    assert places[0].tolist() == [[True, False, False]] * 3  # 4 columns of 4, 2 of 4, none

    valid[:, :, 6] = True
    assert valid_places(valid, (3, 3))[0].tolist() == [[True, True, False]] * 3
    assert valid_places(None, (3, 3)) is None


def test_errors_of_tokens_equal_plain_loops():
    generator = torch.Generator().manual_seed(1)
    student, shuffled, teacher = (torch.randn(3, 6, 4, generator=generator) for _ in range(3))
    lengths = [6, 2, 4]
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    variance = channel_variance(teacher[valid])

    squared, angle, order = 0.0, 0.0, 0.0
    for own, other, theirs, length in zip(student, shuffled, teacher, lengths, strict=True):
        for a, b in zip(own[:length], theirs[:length], strict=True):
            difference = [
                (x - y) ** 2 / v for x, y, v in zip(a.tolist(), b.tolist(), variance, strict=True)
            ]
            squared += float(sum(difference)) / 4
            angle += 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
        moved = own[:length].mean(dim=0) - other[:length].mean(dim=0)
        order += float((moved.square() / variance).mean())

    student.requires_grad_(True)
    own_error = token_error(student, teacher, variance, valid)
    assert own_error.item() == pytest.approx(squared, rel=1e-5)
    own_angle = token_angle(student, teacher, valid)
    assert own_angle.item() == pytest.approx(angle, rel=1e-5)
    own_order = order_error(student, shuffled, variance, valid)
    assert own_order.item() == pytest.approx(order, rel=1e-5)
    own_error.backward()
    assert torch.equal(student.grad.abs().sum(dim=-1) > 0, valid)


def test_a_channel_without_variance_does_not_outweigh_all_others():
    tokens = torch.randn(50, 3) * torch.tensor([1.0, 2.0, 0.0])

    variance = channel_variance(tokens)

    assert variance[2] == pytest.approx(0.01 * tokens.var(dim=0, correction=0).mean().item())
    torch.testing.assert_close(variance[:2], tokens.var(dim=0, correction=0)[:2])


def test_pointer_error_knows_no_scale():
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    student = torch.tensor([[3.0, 4.0], [0.0, 0.0]])

    for scale in (1.0, 100.0):
        error = pointer_error(scale * student, scale * teacher)
        torch.testing.assert_close(error, torch.tensor([0.0, 1.0]))
