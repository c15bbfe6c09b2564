"""Results kept, shown, compared; and the record beside the weights as the cards read it."""

import json
from dataclasses import replace

import pytest

from efficientsam3_hf.evaluation.bootstrap import Difference, Interval
from efficientsam3_hf.evaluation.report import (
    Measurement,
    changes,
    markdown_changes,
    markdown_table,
    measurements,
    read_json,
    write_hub_record,
    write_json,
)
from efficientsam3_hf.hub.results import Result, read_results

TEMPLATE = Measurement(
    model="tinyvit-s",
    task="promptable-concept-segmentation",
    dataset="SA-Co/Gold",
    split="test",
    metric="",
    value=0.0,
    command="efficientsam3 evaluate --task concept",
    hardware="one quiet core",
    date="2026-11-21",
    revision="abc123",
    units=500,
    dataset_id="facebook/SACo-Gold",
)
SUMMARY = {"cgF1": Interval(0.541, 0.53, 0.55), "IL_MCC": 0.82, "macro": float("nan")}


def test_a_summary_becomes_measurements_in_percent():
    results = measurements(SUMMARY, TEMPLATE)

    assert [(result.metric, result.value) for result in results] == [
        ("cgF1", pytest.approx(54.1)),
        ("IL_MCC", pytest.approx(82)),
    ]
    assert (results[0].low, results[0].high) == (pytest.approx(53), pytest.approx(55))
    assert results[1].low is None
    chosen = measurements({"a": 3.0, "b": 4.0}, TEMPLATE, metrics=["b"], scale=1)
    assert [(result.metric, result.value) for result in chosen] == [("b", 4.0)]
    with pytest.raises(KeyError, match="no 'AP'"):
        measurements(SUMMARY, TEMPLATE, metrics=["AP"])


def test_measurements_come_back_from_json(tmp_path):
    results = measurements(SUMMARY, TEMPLATE)
    write_json(results, tmp_path / "results.json")
    assert read_json(tmp_path / "results.json") == results

    (tmp_path / "other.json").write_text(json.dumps([{"model": "m", "speed": 1}]))
    with pytest.raises(ValueError, match=r"does not: \['speed'\]"):
        read_json(tmp_path / "other.json")


def test_cards_read_what_is_written_beside_the_weights(tmp_path):
    results = measurements(SUMMARY, TEMPLATE)

    write_hub_record(results, tmp_path)

    read = read_results(tmp_path)
    assert all(isinstance(result, Result) for result in read)
    assert [(result.metric, result.value) for result in read] == [
        ("cgF1", pytest.approx(54.1)),
        ("IL_MCC", pytest.approx(82)),
    ]
    assert read[0].dataset_id == "facebook/SACo-Gold"


def test_a_new_result_replaces_its_elder_and_leaves_the_others(tmp_path):
    write_hub_record(measurements(SUMMARY, TEMPLATE), tmp_path)
    write_hub_record(measurements({"cgF1": 0.6}, TEMPLATE), tmp_path)
    write_hub_record(measurements({"cgF1": 0.5}, replace(TEMPLATE, hardware="other")), tmp_path)

    values = [(result.metric, result.value) for result in read_results(tmp_path)]
    assert values == [("IL_MCC", pytest.approx(82)), ("cgF1", 60.0), ("cgF1", 50.0)]
    with pytest.raises(ValueError, match="one by one"):
        write_hub_record([TEMPLATE, replace(TEMPLATE, model="other")], tmp_path)


def test_the_table_has_a_row_for_each_model_and_gaps_where_nothing_was_measured():
    first = measurements(SUMMARY, TEMPLATE)
    second = measurements({"cgF1": 0.6}, replace(TEMPLATE, model="a|b"))

    assert markdown_table(first + second) == (
        "| model | cgF1 | IL_MCC |\n"
        "| --- | ---: | ---: |\n"
        "| tinyvit-s | 54.1 [53.0, 55.0] | 82.0 |\n"
        "| a\\|b | 60.0 | – |\n"
    )
    other = measurements({"cgF1": 0.4}, replace(TEMPLATE, dataset="SA-Co/Silver"))
    assert "SA-Co/Silver test: cgF1" in markdown_table(first + other)


def result(value: float, half: float | None = None, metric: str = "cgF1") -> Measurement:
    ends = {} if half is None else {"low": value - half, "high": value + half}
    return replace(TEMPLATE, metric=metric, value=value, **ends)


def test_changes_beyond_both_half_intervals_exceed_noise():
    verdicts = [
        changes([result(50, 3)], [result(50 + delta, 4)])[0].exceeds_noise
        for delta in (4.9, 5.1, -4.9, -5.1)  # 3, 4, 5
    ]
    assert verdicts == [False, True, False, True]
    assert changes([result(50)], [result(90, 1)])[0].exceeds_noise is None
    assert changes([result(50, metric="AP")], [result(50)]) == []


def test_pairs_drawn_together_decide_before_intervals_do():
    drawn = {"cgF1": Difference(0.50, 0.51, 0.004, 0.016)}

    (change,) = changes([result(50, 3)], [result(51, 3)], drawn)

    assert change.exceeds_noise
    assert (change.low, change.high) == (pytest.approx(0.4), pytest.approx(1.6))
    assert markdown_changes([change]).splitlines()[-1] == (
        "| SA-Co/Gold test | cgF1 | 50.00 | 51.00 | +1.00 | +0.40 to +1.60 | more than noise |"
    )


def test_a_change_without_intervals_has_no_verdict():
    table = markdown_changes(changes([result(50)], [result(49)]))
    assert table.splitlines()[-1].endswith("| -1.00 | – | unknown |")
