"""How images are put to a model: what holds for its scores."""

import numpy as np
import pytest
import tiny_stock
import torch

from efficientsam3_hf.benchmarks.images import find_concepts
from efficientsam3_hf.benchmarks.loading import load


@pytest.mark.parametrize("bias", [4.0, -4.0])
def test_a_threshold_is_one_of_calibrated_scores(tmp_path, bias, monkeypatch):
    loaded = load(str(tiny_stock.write_ours(tmp_path)), "concepts")
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    ((before,),) = find_concepts(loaded, [image], [["dog"]], threshold=0.0)
    logits = np.log(before.scores / (1 - before.scores))
    middle = (logits[1] + logits[2]) / 2 + bias  # between the second and the third

    monkeypatch.setattr(loaded.processor.image_processor, "score_bias", bias)
    threshold = float(torch.tensor(middle).sigmoid())
    ((found,),) = find_concepts(loaded, [image], [["dog"]], threshold)

    assert len(found.scores) == 2
    np.testing.assert_array_equal(found.masks, before.masks[:2])
    np.testing.assert_allclose(
        np.log(found.scores / (1 - found.scores)) - bias, logits[:2], atol=1e-3
    )
