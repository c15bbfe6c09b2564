"""Intervals against theory, scipy's bootstrap, and how often they hold the truth."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from efficientsam3_hf.evaluation import concept
from efficientsam3_hf.evaluation.bootstrap import differences, draws, intervals
from efficientsam3_hf.evaluation.units import stack


def mean_of(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    return {"mean": float(weights @ values / weights.sum())}


def test_intervals_are_those_of_scipy():
    values = np.random.default_rng(0).exponential(size=80)

    ours = intervals(partial(mean_of, values), 80, samples=4000)["mean"]

    scipys = stats.bootstrap((values,), np.mean, method="percentile", rng=1, n_resamples=4000)
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(scipys.confidence_interval.low, abs=0.02)
    assert ours.high == pytest.approx(scipys.confidence_interval.high, abs=0.02)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(200):
        interval = intervals(partial(mean_of, rng.normal(size=60)), 60, samples=200, seed=trial)
        held += interval["mean"].low <= 0 <= interval["mean"].high
    assert 0.88 <= held / 200 <= 0.99


def test_units_of_one_picture_are_drawn_together():
    values = np.repeat(np.random.default_rng(2).normal(size=40), 25)
    groups = [f"picture {index // 25}" for index in range(1000)]

    single = intervals(partial(mean_of, values), 1000, samples=300)["mean"]
    grouped = intervals(partial(mean_of, values), 1000, samples=300, groups=groups)["mean"]

    ratio = (grouped.high - grouped.low) / (single.high - single.low)
    assert ratio == pytest.approx(5, rel=0.25)  # root of 25
    weights = next(draws(1000, 1, groups))
    assert (weights.reshape(40, 25) == weights.reshape(40, 25)[:, :1]).all()


def test_a_paired_difference_sees_what_two_intervals_do_not():
    rng = np.random.default_rng(3)
    before = rng.normal(size=300)
    after = before + 0.02 + 0.05 * rng.normal(size=300)
    first, second = partial(mean_of, before), partial(mean_of, after)

    change = differences(first, second, 300)["mean"]

    assert change.exceeds_noise
    assert change.low < change.value < change.high
    assert change.value == pytest.approx((after - before).mean())
    one, other = intervals(first, 300)["mean"], intervals(second, 300)["mean"]
    assert other.low < one.high  # they overlap


def test_noise_is_called_noise():
    rng = np.random.default_rng(4)
    called = 0
    for trial in range(100):
        first, second = (partial(mean_of, rng.normal(size=50)) for _ in range(2))
        change = differences(first, second, 50, samples=200, seed=trial)["mean"]
        called += change.exceeds_noise
    assert called <= 14  # 5 are expected
    same = differences(first, first, 50)["mean"]
    assert (same.low, same.high, same.exceeds_noise) == (0, 0, False)


def test_the_same_seed_draws_the_same_and_another_does_not():
    assert np.array_equal(list(draws(9, 3, seed=5)), list(draws(9, 3, seed=5)))
    assert not np.array_equal(list(draws(9, 3, seed=5)), list(draws(9, 3, seed=6)))
    assert all(weights.sum() == 9 for weights in draws(9, 20))


def test_a_whole_summary_gets_intervals_and_undefined_numbers_stay_undefined():
    rng = np.random.default_rng(6)
    records = []
    for _ in range(60):
        truth = [np.ones((4, 4))] * int(rng.integers(2))
        predicted = [np.ones((4, 4))] * int(rng.integers(2))
        records.append(concept.score_pair(predicted, [1.0] * len(predicted), truth))
    units = stack(records)

    found = intervals(partial(concept.summarize, units), 60, samples=100)

    assert found["cgF1"].low <= found["cgF1"].value <= found["cgF1"].high
    assert found.keys() == concept.summarize(units).keys()
    nothing = stack([concept.score_pair([], [], [])] * 3)
    assert np.isnan(intervals(partial(concept.summarize, nothing), 3)["positive_macro_F1"].low)


def test_what_cannot_be_drawn_is_an_error():
    with pytest.raises(ValueError, match="no unit"):
        intervals(lambda weights: {}, 0)
    with pytest.raises(ValueError, match="2 groups named for 3"):
        list(draws(3, 1, groups=[1, 2]))
