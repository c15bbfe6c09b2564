"""Agreement of features against sums written out."""

import numpy as np
import pytest
import torch
from no_doubles import NoDoubles

from efficientsam3_hf.evaluation.features import score_maps, score_tokens, summarize
from efficientsam3_hf.evaluation.units import stack


def test_every_valid_token_of_every_phrase_counts_alike():
    rng = np.random.default_rng(0)
    records, cosines, errors, powers = [], [], [], []
    for _ in range(200):
        student, teacher = rng.normal(size=(2, 7, 5))
        valid = rng.random(7) < 0.6
        tensors = torch.tensor(student), torch.tensor(teacher), torch.tensor(valid)
        records.append(score_tokens(*tensors))
        for one, other in zip(student[valid], teacher[valid], strict=True):
            cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
            errors.append((one - other) ** 2)
            powers.append(other**2)

    summary = summarize(stack(records))

    assert summary["cosine"] == pytest.approx(np.mean(cosines), abs=1e-9)
    assert summary["mse"] == pytest.approx(np.mean(errors), abs=1e-9)
    expected = np.sqrt(np.sum(errors) / np.sum(powers))
    assert summary["relative_error"] == pytest.approx(expected, abs=1e-9)


def test_equal_features_agree_and_zeros_are_a_whole_away():
    teacher = torch.randn(4, 8)
    same = summarize(stack([score_tokens(teacher, teacher)]))
    assert same == pytest.approx({"cosine": 1, "mse": 0, "relative_error": 0}, abs=1e-6)
    nothing = summarize(stack([score_tokens(torch.zeros(4, 8), teacher)]))
    assert nothing["cosine"] == 0
    assert nothing["relative_error"] == pytest.approx(1)


def test_levels_are_told_apart_and_padding_does_not_count():
    teacher = {"8": torch.randn(3, 8, 8), "16": torch.randn(3, 4, 4)}
    student = {level: values.clone() for level, values in teacher.items()}
    student["16"] = -student["16"]
    valid = torch.zeros(16, 16, dtype=torch.bool)
    valid[:8] = True
    student["8"][:, 4:] = 100  # below the picture

    summary = summarize(stack([score_maps(student, teacher, valid)] * 2))

    assert summary["8/cosine"] == pytest.approx(1)
    assert summary["8/mse"] == 0
    assert summary["16/cosine"] == pytest.approx(-1)
    assert summary["16/relative_error"] == pytest.approx(2)


def test_a_coarser_student_is_resized():
    teacher = {"8": torch.ones(3, 8, 8)}
    summary = summarize(stack([score_maps({"8": torch.ones(3, 4, 4)}, teacher)]))
    assert summary["8/mse"] == pytest.approx(0)


def test_half_precision_is_compared_in_full():
    student = torch.full((1, 4096), 3.0, dtype=torch.float16)  # squares sum beyond its range
    assert score_tokens(student, student)["power"] == 9 * 4096 > 32768
    assert score_tokens(student, student)["cosine"] == pytest.approx(1)


def test_weights_repeat_units_and_no_token_gives_no_number():
    units = stack([score_tokens(torch.ones(1, 2), x * torch.ones(1, 2)) for x in (1, -1)])
    assert summarize(units, np.array([3, 1]))["cosine"] == pytest.approx(0.5)
    nothing = score_tokens(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2))
    assert np.isnan(summarize(stack([nothing]))["cosine"])


def test_what_does_not_fit_is_an_error():
    with pytest.raises(
        ValueError, match=r"student have the shape \(2, 3\), those of the teacher \(2, 4\)"
    ):
        score_tokens(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="Levels"):
        score_maps({"8": torch.ones(1, 2, 2)}, {"4": torch.ones(1, 2, 2)})


def test_a_device_without_doubles_is_no_hindrance():
    student, teacher = torch.randn(2, 3, 8, 8)
    valid = torch.arange(64).view(8, 8) % 3 > 0
    expected = score_maps({"8": student}, {"8": teacher}, valid)

    student, teacher, valid = (each.as_subclass(NoDoubles) for each in (student, teacher, valid))

    assert score_maps({"8": student}, {"8": teacher}, valid) == expected
