"""Scores moved to where a threshold of one half separates right from wrong."""

from torch import Tensor


def calibrate_scores(scores: Tensor, temperature: float = 1.0, bias: float = 0.0) -> Tensor:
    """Scores whose logits are divided by a temperature and moved by a bias; their order stays.

    Args:
        scores: Probabilities.
        temperature: Above 1, scores come closer to one half.
        bias: Added to logits.
    """
    if temperature == 1 and bias == 0:
        return scores
    # Of float32 the nearest to 0 and 1 that have a logit.
    return (scores.float().logit(eps=1e-7) / temperature + bias).sigmoid()
