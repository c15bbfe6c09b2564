"""cgF1 against a computation that tries every matching, and against examples done by hand."""

import doctest
import itertools

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from random_masks import near, random_mask

from efficientsam3_hf.evaluation import concept
from efficientsam3_hf.evaluation.concept import (
    average,
    best_annotator,
    exhaustive_ids,
    image_level,
    score_files,
    score_pair,
    summarize,
)
from efficientsam3_hf.evaluation.units import join, stack

SIZE = (8, 10)
THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]


def random_pair(rng: np.random.Generator) -> tuple[list, list, list, list]:
    truth = [random_mask(rng, SIZE) for _ in range(rng.integers(4))]
    crowd = [bool(rng.random() < 0.2) for _ in truth]
    predicted = [near(rng, mask) for mask in truth if rng.random() < 0.8]
    predicted += [random_mask(rng, SIZE) for _ in range(rng.integers(2))]
    rng.shuffle(predicted)
    scores = [float(rng.choice([0.2, 0.499999, 0.5, 0.9])) for _ in predicted]
    return predicted, scores, truth, crowd


def iou(first: np.ndarray, second: np.ndarray) -> float:
    union = np.sum(first | second)
    return float(np.sum(first & second) / union) if union else 0.0


def slow_counts(predicted, scores, truth, crowd) -> dict:
    """Counts from the best of all matchings of the predictions that count."""
    kept = [mask for mask, score in zip(predicted, scores, strict=True) if score >= 0.5]
    instances = [mask for mask, flag in zip(truth, crowd, strict=True) if not flag]
    short, long = sorted((kept, instances), key=len)
    best, found = -1.0, [0] * 10
    for order in itertools.permutations(range(len(long)), len(short)):
        values = [iou(one, long[place]) for one, place in zip(short, order, strict=True)]
        if sum(values) > best + 1e-9:
            best = sum(values)
            found = [sum(value >= t - 1e-12 for value in values) for t in THRESHOLDS]
    return {"found": found, "predictions": len(kept), "instances": len(instances)}


def slow_summary(pairs: list[dict]) -> dict[str, float]:
    """The formulas of SA-Co written out, one pair and one threshold at a time."""
    yes_yes = sum(p["instances"] > 0 and p["predictions"] > 0 for p in pairs)
    yes_no = sum(p["instances"] > 0 and p["predictions"] == 0 for p in pairs)
    no_yes = sum(p["instances"] == 0 and p["predictions"] > 0 for p in pairs)
    no_no = sum(p["instances"] == 0 and p["predictions"] == 0 for p in pairs)
    product = (yes_yes + no_yes) * (yes_yes + yes_no) * (no_no + no_yes) * (no_no + yes_no)
    mcc = (yes_yes * no_no - no_yes * yes_no) / (product**0.5 + 1e-6)
    pm_f1, micro, macro = [], [], []
    for index in range(10):
        found = sum(p["found"][index] for p in pairs)
        missed = sum(p["instances"] - p["found"][index] for p in pairs)
        wrong = sum(p["predictions"] - p["found"][index] for p in pairs)
        both = [p for p in pairs if p["instances"] and p["predictions"]]
        wrong_there = sum(p["predictions"] - p["found"][index] for p in both)
        recall = found / (found + missed + 1e-4)
        for target, errors in ((pm_f1, wrong_there), (micro, wrong)):
            precision = found / (found + errors + 1e-4)
            target.append(2 * precision * recall / (precision + recall + 1e-4))
        local = []
        for p in both:
            precision = p["found"][index] / (p["predictions"] + 1e-4)
            of_pair = p["found"][index] / (p["instances"] + 1e-4)
            local.append(2 * precision * of_pair / (precision + of_pair + 1e-4))
        macro.append(sum(local) / len(local) if local else float("nan"))
    return {
        "cgF1": sum(pm_f1) / 10 * mcc,
        "pmF1": sum(pm_f1) / 10,
        "F1": sum(micro) / 10,
        "positive_macro_F1": sum(macro) / 10,
        "IL_MCC": mcc,
        "IL_recall": yes_yes / (yes_yes + yes_no + 1e-6),
        "IL_precision": yes_yes / (yes_yes + no_yes + 1e-6),
        "IL_FPR": no_yes / (no_yes + no_no + 1e-6),
        "cgF1@0.5": pm_f1[0] * mcc,
        "cgF1@0.75": pm_f1[5] * mcc,
    }


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(concept).failed == 0


def test_counts_and_summary_are_those_of_the_slow_way():
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng) for _ in range(400)]
    slow = [slow_counts(*pair) for pair in pairs]

    records = [score_pair(*pair) for pair in pairs]

    for record, expected in zip(records, slow, strict=True):
        assert record["found"].tolist() == expected["found"]
        assert (record["found"] + record["missed"] == expected["instances"]).all()
        assert (record["found"] + record["wrong"] == expected["predictions"]).all()
    for _ in range(200):
        some = rng.integers(400, size=rng.integers(1, 40))
        summary = summarize(stack([records[index] for index in some]))
        for name, value in slow_summary([slow[index] for index in some]).items():
            assert summary[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name


def test_an_example_done_by_hand():
    square, other = np.zeros(SIZE), np.zeros(SIZE)
    square[:4, :4], other[5:, 5:] = 1, 1
    pairs = [
        score_pair([square], [0.9], [square, other]),  # one of two is found
        score_pair([square, other], [0.9, 0.8], [square]),  # one is added
        score_pair([], [], [square]),  # missed
        score_pair([square], [0.7], []),  # hallucinated
        score_pair([square], [0.3], []),  # rejected, since the score is low
        score_pair([], [], []),  # rejected
    ]

    summary = summarize(stack(pairs))

    # Instances: 2 found, 2 missed, 1 wrong in pairs with the phrase, 2 wrong in all.
    precision, recall = 2 / 3, 2 / 4
    pm_f1 = 2 * precision * recall / (precision + recall)
    # Pairs: 2 found, 1 missed, 1 wrong, 2 rejected.
    mcc = (2 * 2 - 1 * 1) / np.sqrt(3 * 3 * 3 * 3)
    assert summary["IL_MCC"] == pytest.approx(mcc, abs=1e-6)
    assert summary["pmF1"] == pytest.approx(pm_f1, abs=2e-4)
    assert summary["cgF1"] == pytest.approx(pm_f1 * mcc, abs=2e-4)
    assert summary["precision"] == pytest.approx(2 / 4, abs=1e-4)
    assert summary["positive_macro_F1"] == pytest.approx(2 / 3, abs=2e-4)


def test_nothing_anywhere_is_perfect_rejection_and_no_cgf1():
    summary = summarize(stack([score_pair([], [], [])] * 3))

    assert summary["cgF1"] == 0
    assert summary["IL_FPR"] == 0
    assert np.isnan(summary["positive_macro_F1"])


def test_boxes_are_scored_by_boxes():
    record = score_pair([[0, 0, 4, 4]], [1.0], [[0, 0, 4, 6]], kind="box")
    assert record["found"].tolist() == [1] * 4 + [0] * 6  # IoU 2 / 3


def test_a_crowd_makes_predictions_on_it_wrong_only_in_the_official_form():
    left, right = np.zeros(SIZE, dtype=bool), np.zeros(SIZE, dtype=bool)
    left[:, :3], right[:, 6:] = True, True
    part = right.copy()
    part[2:] = False
    half = np.roll(right, -2, axis=1)  # half of it lies on the crowd
    pair = [left, part, half], [0.9] * 3, [left, right], [False, True]

    official, aware = score_pair(*pair), score_pair(*pair, crowd_aware=True)

    assert official["wrong"].tolist() == [2] * 10
    assert aware["wrong"].tolist() == [0] + [1] * 9
    assert official["found"].tolist() == aware["found"].tolist() == [1] * 10


def test_a_pair_of_nothing_but_a_crowd_counts_only_in_the_official_form():
    whole = np.ones(SIZE)
    for predicted, field in (([whole], "IL_FPR"), ([], "IL_FPR")):
        arguments = predicted, [0.9] * len(predicted), [whole], [True]
        official = score_pair(*arguments)
        aware = score_pair(*arguments, crowd_aware=True)
        others = [score_pair([whole], [0.9], []), score_pair([], [], [])]
        base = summarize(stack(others))[field]

        assert summarize(stack([*others, official]))[field] != pytest.approx(base, abs=1e-3)
        assert summarize(stack([*others, aware]))[field] == pytest.approx(base, abs=1e-6)


def test_crowd_aware_equals_the_official_form_without_crowds():
    rng = np.random.default_rng(5)
    for _ in range(200):
        predicted, scores, truth, _ = random_pair(rng)
        first = score_pair(predicted, scores, truth)
        second = score_pair(predicted, scores, truth, crowd_aware=True)
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_oracle_takes_the_kindest_annotator():
    square, other = np.zeros(SIZE), np.zeros(SIZE)
    square[:4, :4], other[5:, 5:] = 1, 1
    found = score_pair([square], [0.9], [square])
    half = score_pair([square], [0.9], [square, other])
    wrong = score_pair([square], [0.9], [other])
    assert best_annotator([wrong, half, found]) is found
    assert best_annotator([half, wrong]) is half
    assert best_annotator([found, half]) is found

    missed, agreed = score_pair([], [], [square]), score_pair([], [], [])
    assert best_annotator([missed, agreed]) is agreed
    assert best_annotator([agreed, missed]) is agreed


def test_files_of_three_annotators_are_scored_pair_by_pair():
    rng = np.random.default_rng(7)
    sizes = {"height": SIZE[0], "width": SIZE[1]}
    annotators = [{"images": [], "annotations": []} for _ in range(3)]
    predictions, expected = [], []
    for pair in range(1, 61):
        predicted, scores, _, _ = random_pair(rng)
        for mask, score in zip(predicted, scores, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
            predictions.append({"image_id": pair, "score": score, "segmentation": rle})
        records, is_sure = [], True
        for annotator in annotators:
            sure = int(rng.random() < 0.9)
            is_sure &= bool(sure)
            annotator["images"].append({"id": pair, "is_instance_exhaustive": sure, **sizes})
            truth = [near(rng, mask) for mask in predicted if rng.random() < 0.8]
            for mask in truth:
                rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
                entry = {"image_id": pair, "segmentation": rle, "iscrowd": 0}
                annotator["annotations"].append(entry)
            records.append(score_pair(predicted, scores, truth))
        if is_sure:
            expected.append(best_annotator(records))

    units = score_files(annotators, predictions)

    assert len(units["found"]) == len(exhaustive_ids(annotators)) == len(expected) < 60
    assert summarize(units) == summarize(stack(expected))
    with pytest.raises(ValueError, match="1 pairs that the truth does not have"):
        score_files(annotators, [{"image_id": 99, "score": 1, "segmentation": []}])


def test_weights_stand_for_repeated_pairs():
    rng = np.random.default_rng(8)
    units = stack([score_pair(*random_pair(rng)) for _ in range(30)])
    weights = rng.integers(4, size=30)
    repeated = {name: np.repeat(values, weights, axis=0) for name, values in units.items()}

    assert summarize(units, weights) == pytest.approx(summarize(repeated), nan_ok=True)
    assert summarize(join([units, units]), np.ones(60)) == pytest.approx(
        summarize(join([units, units]))
    )


def test_subsets_count_alike_and_the_confusion_is_symmetric():
    assert average([{"cgF1": 0.2}, {"cgF1": 0.6}])["cgF1"] == pytest.approx(0.4)
    assert image_level(3, 0, 0, 5)["IL_MCC"] == pytest.approx(1)
    assert image_level(0, 3, 5, 0)["IL_MCC"] == pytest.approx(-1)


def test_a_score_is_needed_for_each_prediction():
    with pytest.raises(ValueError, match="1 scores for 2"):
        score_pair([np.ones(SIZE)] * 2, [0.5], [])
