"""The teacher's words on phrases, kept in memory."""

import pytest
import torch
from distillation.worlds import tiny_teacher

from efficientsam3_hf.data.collators import PhraseCollator
from efficientsam3_hf.distillation.stage1_text import read
from efficientsam3_hf.distillation.text_targets import TextTargets

PHRASES = ["a red car", "dog", "A  red car", "two people on a bench", "dog", "window", "a cat"]


def test_each_phrase_is_asked_once_and_answered_as_the_teacher_does(processor):
    teacher, encode, asked = tiny_teacher(), PhraseCollator(processor).encode, []

    def teach(ids, mask):
        asked.extend(ids.tolist())
        with torch.no_grad():
            return read(teacher, ids, mask)

    targets = TextTargets(teach, encode, iter(PHRASES), batch_size=2, dtype=torch.float32)

    assert len(asked) == len(targets) == 5  # "A  red car" is a phrase that was there
    batch = encode(["window", "a red car"])
    kept = targets(batch["keys"], batch["input_ids"].shape[1])
    mask = batch["attention_mask"]
    with torch.no_grad():
        said = read(teacher, batch["input_ids"], mask)
    torch.testing.assert_close(kept, said * mask[..., None], rtol=1e-5, atol=1e-6)
    assert not kept[0, 3:].any()


def test_half_precision_is_off_by_rounding(processor):
    teacher, encode = tiny_teacher(), PhraseCollator(processor).encode

    def teach(ids, mask):
        with torch.no_grad():
            return read(teacher, ids, mask)

    half, full = (
        TextTargets(teach, encode, PHRASES, dtype=dtype) for dtype in (torch.float16, torch.float32)
    )

    assert half.values.dtype == torch.float16
    # 2^-11 of a value, and 2^-25 for those below what float16 has digits for.
    torch.testing.assert_close(half.values.float(), full.values, rtol=2**-11, atol=2**-25)


def test_no_phrases_are_an_error(processor):
    with pytest.raises(ValueError, match="no phrases"):
        TextTargets(lambda ids, mask: ids, PhraseCollator(processor).encode, [])
