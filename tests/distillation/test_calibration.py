"""Scores that mean what they say, and a threshold of one half that holds back what is not there."""

import numpy as np
import pytest
import torch
from distillation.worlds import scenes, tiny_student
from huggingface_hub.errors import StrictDataclassClassValidationError

from efficientsam3_hf import EfficientSam3Model, EfficientSam3Processor, zoo
from efficientsam3_hf.distillation import calibration
from efficientsam3_hf.distillation.calibration import bias_for, calibrate, fit, rightness
from efficientsam3_hf.models.score_calibration import calibrate_scores


def test_the_fit_finds_what_scores_were_bent_by():
    generator = torch.Generator().manual_seed(0)
    true_logits = 2 * torch.randn(20000, generator=generator)
    is_right = torch.rand(20000, generator=generator) < true_logits.sigmoid()
    bent = (1.7 * true_logits + 0.9).sigmoid()  # what a model might say in its place

    temperature, bias = fit(bent, is_right)

    assert temperature == pytest.approx(1.7, rel=0.05)
    assert bias == pytest.approx(-0.9 / 1.7, abs=0.05)
    straight = calibrate_scores(bent, temperature, bias)
    torch.testing.assert_close(straight, true_logits.sigmoid(), rtol=0, atol=0.02)


def test_scores_that_separate_perfectly_stay_finite():
    temperature, bias = fit(torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0, 0, 1, 1]).bool())

    assert 0 < temperature < 1
    assert np.isfinite(bias)


def test_calibration_keeps_the_order_of_scores_and_their_ends():
    scores = torch.tensor([0.0, 1e-9, 0.2, 0.5, 0.9, 1.0])

    calibrated = calibrate_scores(scores, 2.0, -1.0)

    assert bool((calibrated.diff() >= 0).all())
    assert bool(((calibrated >= 0) & (calibrated <= 1)).all())
    assert calibrated[3].item() == pytest.approx(1 / (1 + np.e))
    assert calibrate_scores(scores) is scores


@pytest.mark.parametrize("most", [0.0, 0.02, 0.3, 1.0])
def test_no_more_negatives_find_something_than_is_wanted(most):
    highest = torch.rand(200, generator=torch.Generator().manual_seed(0))

    bias = bias_for(highest, 1.5, most)

    found = (calibrate_scores(highest, 1.5, min(bias, 20.0)) >= 0.5).float().mean().item()
    assert found <= most + 1e-6
    assert most in (0.0, 1.0) or found > most - 0.01  # and not far fewer


def test_of_two_detections_of_one_thing_the_better_one_is_right():
    truth = np.zeros((2, 8, 8), dtype=bool)
    truth[0, :4], truth[1, 4:] = True, True
    masks = np.stack([truth[0], truth[0], truth[1], np.eye(8, dtype=bool)])

    right = rightness(masks, np.array([0.4, 0.6, 0.5, 0.9]), truth)

    assert right.tolist() == [False, True, True, False]
    assert rightness(masks, np.ones(4), truth[:0]).tolist() == [False] * 4


def test_a_calibrated_student_says_so_wherever_scores_are_given(tmp_path, monkeypatch):
    student = tiny_student()
    dataset, collator = scenes(student, 3)
    batch = collator([dataset[index] for index in range(3)])
    # Random weights are right of nothing: call every second detection right.
    monkeypatch.setattr(calibration, "rightness", lambda masks, *_: np.arange(len(masks)) % 2 == 0)

    found = calibrate(student, [batch], most_false_positives=0.0)

    config = student.configuration
    assert (config.score_temperature, config.score_bias) == (found.temperature, found.bias)
    assert found.false_positives[1] == 0
    folder = student.save(tmp_path)
    model = EfficientSam3Model.from_pretrained(folder)
    processor = EfficientSam3Processor.from_pretrained(folder)
    assert model.config.score_temperature == found.temperature
    with torch.no_grad():
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
    raw = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid()).flatten()
    results = processor.post_process_instance_segmentation(outputs, threshold=0.0)
    scores = torch.cat([result["scores"] for result in results])
    torch.testing.assert_close(scores, calibrate_scores(raw, found.temperature, found.bias))
    assert not torch.allclose(scores, raw)


def test_held_out_data_must_hold_right_and_wrong_detections():
    student = tiny_student()
    dataset, collator = scenes(student, 2)

    with pytest.raises(ValueError, match="both right and wrong"):
        calibrate(student, [collator([dataset[0], dataset[1]])])


def test_a_temperature_of_nothing_is_an_error():
    with pytest.raises(StrictDataclassClassValidationError, match="score_temperature=0"):
        zoo.config("efficientsam3-tinyvit-s", score_temperature=0.0)
