"""Features of phrases in memory."""

import pytest
import torch
from sam3_teachers import tiny_sam3_video, tiny_teacher

from efficientsam3_hf.distillation.teacher import load_teacher
from efficientsam3_hf.distillation.text_features import TeacherTextFeatures
from efficientsam3_hf.tokenizer import build_tokenizer

PHRASES = ["a boat", "a very small red boat by the shore", "boat", "a boat", "two dogs", "boat"]


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(16)


def test_features_are_the_towers_own_for_each_phrase_alone(teacher, tokenizer):
    text = TeacherTextFeatures.compute(teacher, tokenizer, PHRASES, batch_size=3)

    features, valid = text(["boat", "a very small red boat by the shore"])

    for row, phrase in enumerate(["boat", "a very small red boat by the shore"]):
        encoded = tokenizer(phrase, return_tensors="pt")
        expected = teacher(
            lambda models, ids: models.detector.get_text_features(ids).pooler_output[0],
            encoded["input_ids"],
        )
        torch.testing.assert_close(features[row][valid[row]], expected)
        assert (features[row][~valid[row]] == 0).all()
    assert valid.sum(dim=1).tolist() == [3, 10]


def test_each_phrase_is_computed_and_kept_once_without_padding(teacher, tokenizer):
    seen = []

    def counting(phrases, **options):
        seen.extend(phrases)
        return tokenizer(phrases, **options)

    text = TeacherTextFeatures.compute(teacher, counting, PHRASES, batch_size=2)

    assert seen == ["a boat", "a very small red boat by the shore", "boat", "two dogs"]
    assert len(text) == 4
    assert "two dogs" in text
    assert text.tokens.shape == (4 + 10 + 3 + 4, 32)


def test_they_may_be_kept_in_half_precision(teacher, tokenizer):
    full = TeacherTextFeatures.compute(teacher, tokenizer, PHRASES)
    half = TeacherTextFeatures.compute(teacher, tokenizer, PHRASES, dtype=torch.float16)

    assert half.tokens.dtype == torch.float16
    torch.testing.assert_close(half.tokens.float(), full.tokens, rtol=2**-10, atol=1e-6)
    assert not half.tokens.requires_grad


def test_what_is_not_there_is_an_error_that_names_it(teacher, tokenizer):
    text = TeacherTextFeatures.compute(teacher, tokenizer, PHRASES)
    with pytest.raises(KeyError, match=r"1 of 2 phrases, e\.g\. 'a cat', are not among the 4"):
        text(["boat", "a cat"])
    with pytest.raises(ValueError, match="no phrases"):
        TeacherTextFeatures.compute(teacher, tokenizer, [])
    tracker = load_teacher(tiny_sam3_video(), with_tracker=True)
    tracker.models.detector = None
    with pytest.raises(ValueError, match="A tracker knows no phrases"):
        TeacherTextFeatures.compute(tracker, tokenizer, PHRASES)
