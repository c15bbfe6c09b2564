"""J and F against dilation, and the rules of the data sets against examples."""

import numpy as np
import pytest
from random_masks import near, random_mask
from scipy.ndimage import binary_dilation

from efficientsam3_hf.evaluation.units import stack
from efficientsam3_hf.evaluation.video_objects import (
    RULES,
    Rule,
    adaptive_accuracy,
    outline,
    outline_accuracy,
    region_similarity,
    score_label_maps,
    score_object,
    smoothed_similarity,
    summarize,
)

FULL, NONE = np.ones((6, 6), dtype=bool), np.zeros((6, 6), dtype=bool)
LEFT = FULL.copy()
LEFT[:, 3:] = False


def slow_outline(mask: np.ndarray) -> np.ndarray:
    """DAVIS's outline, pixel by pixel."""
    height, width = mask.shape
    edges = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, 0), (1, 1)):
                below, right = min(y + dy, height - 1), min(x + dx, width - 1)
                edges[y, x] |= mask[y, x] != mask[below, right]
    return edges


def slow_accuracy(predicted: np.ndarray, truth: np.ndarray, reach: int) -> float:
    """DAVIS's F: outlines grown by a disk."""
    steps = np.arange(-reach, reach + 1)
    disk = steps[:, None] ** 2 + steps**2 <= reach**2
    first, second = slow_outline(predicted), slow_outline(truth)
    if first.any() != second.any():
        return 0.0
    if not first.any():
        return 1.0
    precision = (first & binary_dilation(second, disk)).sum() / first.sum()
    recall = (second & binary_dilation(first, disk)).sum() / second.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_outline_accuracy_is_that_of_dilation():
    rng = np.random.default_rng(0)
    for _ in range(300):
        size = tuple(rng.integers(1, 24, size=2))
        truth = random_mask(rng, size)
        predicted = near(rng, truth) if rng.random() < 0.6 else random_mask(rng, size)
        reach = int(rng.integers(1, 5))
        diagonal = np.linalg.norm(size)

        assert np.array_equal(outline(truth), slow_outline(truth))
        expected = slow_accuracy(predicted, truth, reach)
        assert outline_accuracy(predicted, truth, reach) == pytest.approx(expected, abs=1e-12)
        as_share = outline_accuracy(predicted, truth, tolerance=(reach - 0.5) / diagonal)
        if (reach - 0.5) / diagonal < 1:
            assert as_share == pytest.approx(expected, abs=1e-12)


def test_j_and_f_are_those_of_an_official_evaluator():
    evaluator = pytest.importorskip("vos_benchmark.evaluator", reason="vos-benchmark is missing")
    rng = np.random.default_rng(1)
    for _ in range(200):
        size, frames = tuple(rng.integers(8, 40, size=2)), int(rng.integers(1, 5))
        truth = [random_mask(rng, size) for _ in range(frames)]
        predicted = [near(rng, mask) for mask in truth]
        official = evaluator.Evaluator()
        for p, t in zip(predicted, truth, strict=True):
            official.feed_frame(p.astype(np.uint8), t.astype(np.uint8))
        j, f = official.conclude()

        rule = Rule(skip_first=False, skip_last=False, leading_empty_counts=False, needs_truth=True)
        ours = score_object(predicted, truth, rule)

        if ours is None:
            assert 1 not in j
        else:
            assert 100 * ours["J"] == pytest.approx(j[1], abs=1e-9)
            assert 100 * ours["F"] == pytest.approx(f[1], abs=1e-9)


def grown(edges: np.ndarray, reach: float) -> np.ndarray:
    """Dilation by scikit-image's disk, which has places for a radius that is no whole number."""
    steps = np.arange(-reach, reach + 1)
    middle = len(steps) // 2
    result = np.zeros_like(edges)
    height, width = edges.shape
    for row, y in enumerate(steps):
        for column, x in enumerate(steps):
            if y**2 + x**2 > reach**2:
                continue
            dy, dx = row - middle, column - middle  # what is there is seen from here
            here = (slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx)))
            there = (slice(max(0, dy), height + min(0, dy)), slice(max(0, dx), width + min(0, dx)))
            result[here] |= edges[there]
    return result


def slow_adaptive_accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    """F of MOSEv2 as its evaluator has it."""
    reach = 0.008 * np.linalg.norm(truth.shape)
    if truth.any():
        reach = min(reach, np.ceil(0.1 * np.sqrt(truth.sum())))
    first, second = outline(predicted), outline(truth)
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    precision = (first & grown(second, reach)).sum() / first.sum()
    recall = (second & grown(first, reach)).sum() / second.sum()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_adaptive_accuracy_is_that_of_dilation_by_the_evaluator_s_disk():
    rng = np.random.default_rng(3)
    kinds = set()
    for number in range(200):
        # Long pictures have a long diagonal, and so reach far, with few pixels.
        size = (int(rng.integers(2, 12)), int(rng.integers(130, 460)))
        truth = random_mask(rng, size)
        predicted = near(rng, truth) if number % 3 else random_mask(rng, size)
        limit = 0.008 * np.linalg.norm(size)
        kinds.add((truth.any(), np.ceil(0.1 * truth.sum() ** 0.5) < limit, limit % 1 > 0.5))

        expected = slow_adaptive_accuracy(predicted, truth)

        assert adaptive_accuracy(predicted, truth) == pytest.approx(expected, abs=1e-12)
    assert len(kinds) >= 5  # empty, small, and large with the middle of the disk on either side


def test_the_outline_of_a_small_object_must_be_nearer():
    truth = np.zeros((480, 854), dtype=bool)
    truth[100:112, 100:112] = True
    beside = np.roll(truth, 6, axis=1)

    assert outline_accuracy(beside, truth) == 1  # up to 8 pixels
    assert adaptive_accuracy(beside, truth) < 0.5  # up to 2
    assert adaptive_accuracy(truth, truth) == 1


def test_mosev2_has_its_own_j_and_f():
    truth, predicted = [LEFT, LEFT, NONE, LEFT], [LEFT, FULL, NONE, NONE]
    score = score_object(predicted, truth, "mosev2")

    assert smoothed_similarity(NONE, NONE) == 1
    assert score == {
        "J": pytest.approx((19 / 37 + 1) / 2),
        "F_dot": pytest.approx((adaptive_accuracy(FULL, LEFT) + 1) / 2),
    }
    summary = summarize(stack([score]))
    assert summary["J&F_dot"] == pytest.approx((score["J"] + score["F_dot"]) / 2)
    assert "J&F" not in summary  # not to be mistaken for the number of other data sets


def test_empty_frames():
    assert region_similarity(NONE, NONE) == outline_accuracy(NONE, NONE) == 1
    assert region_similarity(NONE, LEFT) == outline_accuracy(NONE, LEFT) == 0
    assert region_similarity(LEFT, NONE) == outline_accuracy(LEFT, NONE) == 0
    assert outline_accuracy(FULL, FULL) == 1  # neither has an outline
    assert region_similarity(FULL, LEFT) == 0.5


def test_davis_leaves_out_the_first_and_the_last_frame():
    truth = [LEFT, LEFT, FULL, LEFT]
    predicted = [NONE, LEFT, LEFT, NONE]
    assert score_object(predicted, truth, "davis")["J"] == pytest.approx((1 + 0.5) / 2)
    assert RULES["mose"] == RULES["davis"]


def test_davis_counts_frames_where_the_object_is_hidden():
    truth = [LEFT, NONE, NONE, LEFT]
    assert score_object([LEFT, NONE, LEFT, LEFT], truth, "davis")["J"] == 0.5


def test_sa_v_starts_where_anything_is_seen():
    truth = [NONE, NONE, NONE, LEFT, NONE, LEFT]
    kept = score_object([NONE, NONE, NONE, LEFT, LEFT, LEFT], truth, "sa-v")
    assert kept["J"] == 0.5  # frames 3 and 4; the empty ones before do not count
    early = score_object([NONE, NONE, LEFT, LEFT, LEFT, LEFT], truth, "sa-v")
    assert early["J"] == pytest.approx(1 / 3)  # a hallucination starts the count
    assert score_object([LEFT] * 3, [LEFT, NONE, LEFT], "sa-v") is None  # no truth that counts


def test_youtube_vos_starts_after_the_first_appearance_and_keeps_the_last_frame():
    truth = [NONE, LEFT, FULL, LEFT]
    predicted = [FULL, NONE, LEFT, LEFT]
    assert score_object(predicted, truth, "youtube-vos")["J"] == pytest.approx((0.5 + 1) / 2)


def test_lvos_starts_at_the_first_appearance_and_leaves_out_the_last_frame():
    truth = [NONE, LEFT, FULL, LEFT]
    predicted = [FULL, LEFT, LEFT, NONE]
    assert score_object(predicted, truth, "lvos")["J"] == pytest.approx((1 + 0.5) / 2)


def test_missing_predictions_are_empty_and_short_videos_have_no_score():
    assert score_object([None] * 3, [LEFT, None, LEFT], "davis")["J"] == 1
    assert score_object([None] * 3, [LEFT] * 3, "davis")["J"] == 0
    assert score_object([LEFT] * 2, [LEFT] * 2, "davis") is None


def test_label_maps_are_scored_object_by_object():
    rng = np.random.default_rng(2)
    truth = [rng.integers(4, size=(9, 9)) for _ in range(5)]
    truth[0][truth[0] == 3] = 255  # void is no object, and object 3 comes later
    predicted = [np.where(rng.random((9, 9)) < 0.8, t, 0) for t in truth]

    davis = score_label_maps(predicted, truth, "davis")
    youtube = score_label_maps(predicted, truth, "youtube-vos")

    assert sorted(davis) == [1, 2]
    assert sorted(youtube) == [1, 2, 3]
    for number, score in davis.items():
        masks = [[labels == number for labels in maps] for maps in (predicted, truth)]
        assert score == score_object(*masks, "davis")
    assert list(score_label_maps(predicted, truth, "davis", objects=[2])) == [2]


def test_means_are_over_objects_and_g_over_its_four_parts():
    records = [
        {"J": 0.2, "F": 0.4, "is_seen": True},
        {"J": 0.6, "F": 0.8, "is_seen": True},
        {"J": 1.0, "F": 0.6, "is_seen": False},
    ]
    summary = summarize(stack(records))

    assert summary["J"] == pytest.approx(0.6)
    assert summary["J&F"] == pytest.approx(0.6)
    assert summary["G"] == pytest.approx((0.4 + 1.0 + 0.6 + 0.6) / 4)
    assert "G" not in summarize(stack([{"J": 1.0, "F": 1.0}]))
    alone = summarize(stack(records), np.array([1, 1, 0]))
    assert np.isnan(alone["J_unseen"])
    assert np.isnan(alone["G"])


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="Resize predictions"):
        region_similarity(np.ones((3, 3)), np.ones((6, 6)))
    with pytest.raises(ValueError, match="2 predicted frames for 3"):
        score_object([LEFT] * 2, [LEFT] * 3, "davis")
