"""Times by a clock that the test turns, memory by what the test takes."""

import time

import numpy as np
import pytest
import torch

from efficientsam3_hf.evaluation import bootstrap
from efficientsam3_hf.evaluation.speed import (
    Stopwatch,
    count_operations,
    count_parameters,
    memory_peak,
    summarize,
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def timed(decode: list[float], model: list[float], warm_up: int) -> Stopwatch:
    clock = Clock()
    watch = Stopwatch(warm_up=warm_up, clock=clock)
    for first, second in zip(decode, model, strict=True):
        with watch.stage("decode"):
            clock.now += first
        clock.now += 5  # outside of any stage
        for part in (0.25, 0.75):
            with watch.stage("model"):
                clock.now += part * second
        watch.lap()
    return watch


def test_percentiles_leave_out_the_warm_up():
    rng = np.random.default_rng(0)
    decode, model = rng.random((2, 103))

    summary = timed([9, 9, 9, *decode[3:]], [9, 9, 9, *model[3:]], warm_up=3).summary()

    for percent in (50, 90, 95, 99):
        expected = np.percentile(1000 * decode[3:], percent)
        assert summary[f"decode/p{percent}"] == pytest.approx(expected)
        total = np.percentile(1000 * (decode + model)[3:], percent)
        assert summary[f"total/p{percent}"] == pytest.approx(total)
    assert summary["model/mean"] == pytest.approx(1000 * model[3:].mean())
    assert summary["rate"] == pytest.approx(1 / (decode + model)[3:].mean())


def test_laps_can_be_drawn_anew():
    units = timed([1, 2, 3], [0, 0, 0], warm_up=0).units()
    assert summarize(units, np.array([0.0, 0.0, 3.0]))["decode/p50"] == pytest.approx(3000)
    drawn = bootstrap.intervals(lambda weights: summarize(units, weights), 3, samples=50)
    assert drawn["decode/mean"].low < 2000 < drawn["decode/mean"].high


def test_the_real_clock_runs():
    watch = Stopwatch(warm_up=0)
    with watch.stage("sleep"):
        time.sleep(0.01)
    watch.lap()
    assert 10 <= watch.summary()["sleep/p50"] < 1000


def test_too_few_laps_and_empty_laps_are_errors():
    with pytest.raises(ValueError, match="leave none after a warm-up of 3"):
        timed([1, 1, 1], [1, 1, 1], warm_up=3).units()
    with pytest.raises(ValueError, match="no stage"):
        Stopwatch().lap()
    with pytest.raises(ValueError, match="sum of all stages"), Stopwatch().stage("total"):
        pass


def test_the_peak_of_memory_is_seen_after_it_was_given_back():
    with memory_peak() as small:
        pass
    with memory_peak() as large:
        np.ones(2**25).sum()  # 256 MiB, gone at once
    if np.isnan(large["bytes"]):
        pytest.skip("this system does not tell the peak of a process")
    assert 2**27 < large["bytes"] - small["bytes"] < 2**29


@pytest.mark.gpu
def test_the_peak_of_a_gpu_is_that_of_its_tensors():
    with memory_peak("cuda") as peak:
        torch.ones(2**20, device="cuda").sum()
    assert peak["bytes"] >= 2**22


def test_parameters_and_operations_are_counted():
    layer = torch.nn.Linear(16, 32)
    shared = torch.nn.ModuleList([layer, layer, torch.nn.BatchNorm1d(4)])
    assert count_parameters(shared) == 16 * 32 + 32 + 8
    assert count_operations(lambda: layer(torch.ones(5, 16))) == 2 * 5 * 16 * 32
