"""Records beside the weights, and the forms in which the Hub reads them."""

import doctest
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCardData, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results

from efficientsam3_hf.hub import results as results_module
from efficientsam3_hf.hub.results import (
    Result,
    TrainingRecord,
    read_results,
    read_training,
    to_hub_files,
    to_model_index,
    write_hub_files,
    write_results,
    write_training,
)

ROOT = Path(__file__).resolve().parents[2]
RESULT = Result(
    task="promptable-concept-segmentation",
    dataset="SA-Co/Gold",
    split="test",
    metric="cgF1",
    value=12.5,
    command="python examples/evaluate.py --split test",
    hardware="one quiet core",
    date="2026-11-21",
    revision="abc123",
    dataset_id="facebook/SACo-Gold",
    dataset_revision="def456",
)
STAGE = TrainingRecord(
    stage="encoder distillation",
    teacher="facebook/sam3",
    datasets=["owner/pictures", "a folder of pictures"],
    command="python examples/train_distill.py",
    steps=1000,
    hardware="one quiet core",
    initial_weights={"text tower": "random"},
)
HOSTILE = 'a: "b" # c\n---\n- d\'e\u2028{f} | `g` \x07 \ud800 <!-- -->'


def test_records_come_back_as_they_were_written(tmp_path):
    results, stages = [RESULT, replace(RESULT, metric="pmF1")], [STAGE, replace(STAGE, steps=2)]

    write_results(results, tmp_path)
    write_training(stages, tmp_path)

    assert read_results(tmp_path) == results
    assert read_training(tmp_path) == stages


def test_there_are_no_records_where_nothing_was_written(tmp_path):
    assert read_results(tmp_path) == []
    assert read_training(tmp_path) == []


def test_whoever_measures_needs_only_json(tmp_path):
    fields = ["task", "dataset", "split", "metric", "command", "hardware", "revision"]
    record = dict.fromkeys(fields, "x") | {"value": 3, "date": "2026-11-21"}
    (tmp_path / "evaluation_results.json").write_text(json.dumps([record]))

    (result,) = read_results(tmp_path)

    assert (result.metric, result.value, result.dataset_id) == ("x", 3, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": float("nan")}, "nan is no measured number"),
        ({"value": float("inf")}, "inf is no measured number"),
        ({"value": True}, "True is no measured number"),
        ({"value": "12.5"}, "'12.5' is no measured number"),
        ({"command": ""}, "command='' says nothing"),
        ({"hardware": " \n"}, "says nothing"),
        ({"revision": None}, "revision=None says nothing"),
        ({"dataset_id": ""}, "dataset_id='' says nothing"),
        ({"date": "yesterday"}, "date='yesterday' is no day"),
    ],
)
def test_a_result_without_all_that_was_measured_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        replace(RESULT, **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"datasets": "owner/pictures"}, TypeError, "must be a list"),
        ({"steps": -1}, ValueError, "no number of steps"),
        ({"steps": 1.5}, ValueError, "no number of steps"),
        ({"teacher": ""}, ValueError, "says nothing"),
    ],
)
def test_a_stage_that_says_too_little_is_an_error(change, error, message):
    with pytest.raises(error, match=message):
        replace(STAGE, **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no list of Result"),
        ('[{"task": "x"}]', "is no list of Result: .*missing 8 required"),
        ('[{"tusk": "x"}]', "unexpected keyword argument 'tusk'"),
        ('{"task": "x"}', "is no list of Result"),
    ],
)
def test_a_file_that_is_no_record_is_an_error_that_names_it(text, message, tmp_path):
    (tmp_path / "evaluation_results.json").write_text(text)

    with pytest.raises(ValueError, match=rf"evaluation_results\.json.*{message}"):
        read_results(tmp_path)


def test_numbers_of_numpy_are_stored_as_numbers(tmp_path):
    result = replace(RESULT, value=np.float32(0.5))
    write_results([result], tmp_path)

    assert read_results(tmp_path)[0].value == 0.5
    (text,) = to_hub_files([replace(RESULT, value=np.float64(0.25))]).values()
    assert yaml.safe_load(text)[0]["value"] == 0.25


def test_the_model_index_comes_back_from_the_metadata():
    results = [RESULT, replace(RESULT, metric="pmF1", value=1), replace(RESULT, dataset_id=None)]
    expected = to_model_index(results)
    data = ModelCardData(model_name="model", eval_results=expected)

    index = yaml.safe_load(data.to_yaml())["model-index"]
    name, found = model_index_to_eval_results(index)

    assert name == "model"
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert found[0].dataset_type == "facebook/SACo-Gold"
    assert [result.metric_value for result in found if result.metric_type == "pmF1"] == [1]


def test_the_hub_reads_one_file_for_each_setting():
    pm = replace(RESULT, metric="pmF1", value=20.0)
    other_hardware = replace(RESULT, hardware="another core", value=12.25)
    other_split = replace(RESULT, split="val", benchmark_task="gold_val")

    files = to_hub_files([RESULT, pm, other_hardware, other_split])

    assert list(files) == [
        "facebook-saco-gold-test_1.yaml",
        "facebook-saco-gold-test_2.yaml",
        "facebook-saco-gold-val_1.yaml",
    ]
    first, second, third = (parse_eval_result_entries(yaml.safe_load(t)) for t in files.values())
    assert [(entry.task_id, entry.value) for entry in first] == [("cgf1", 12.5), ("pmf1", 20.0)]
    assert [entry.value for entry in second] == [12.25]
    assert third[0].task_id == "gold_val"
    assert first[0].dataset_id == "facebook/SACo-Gold"
    assert (first[0].dataset_revision, first[0].date) == ("def456", "2026-11-21")
    assert first[0].notes == (
        "cgF1, test split, on one quiet core: python examples/evaluate.py --split test"
    )


def test_what_the_hub_has_no_dataset_for_is_no_file():
    assert to_hub_files([replace(RESULT, dataset_id=None)]) == {}


def test_a_new_measurement_replaces_our_files_and_no_others(tmp_path):
    write_hub_files([RESULT, replace(RESULT, split="val")], tmp_path)
    other = tmp_path / ".eval_results" / "other.yaml"
    other.write_text("- dataset:\n    id: a/b\n    task_id: c\n  value: 1\n")

    write_hub_files([replace(RESULT, value=13.0)], tmp_path)

    names = sorted(path.name for path in other.parent.iterdir())
    assert names == ["facebook-saco-gold-test_1.yaml", "other.yaml"]
    assert yaml.safe_load((other.parent / names[0]).read_text())[0]["value"] == 13.0


def test_without_results_no_folder_is_made(tmp_path):
    write_hub_files([], tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_hostile_texts_stay_texts(tmp_path):
    texts = ("task", "dataset", "split", "metric", "command", "hardware", "revision", "dataset_id")
    result = replace(RESULT, **dict.fromkeys(texts, HOSTILE))
    write_results([result], tmp_path)

    write_hub_files(read_results(tmp_path), tmp_path)

    (path,) = (tmp_path / ".eval_results").iterdir()
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert entry.dataset_id == 'a: "b" # c --- - d\'e {f} | `g` <!-- -->'
    assert entry.value == 12.5
    assert path.name == "a-b-c-d-e-f-g-a-b-c-d-e-f-g_1.yaml"


def test_the_documentation_shows_records_that_are_read(tmp_path):
    text = (ROOT / "docs" / "model_cards.md").read_text(encoding="utf-8")
    results, training = re.findall(r"```json\n(.*?)```", text, re.DOTALL)

    (tmp_path / "evaluation_results.json").write_text(results)
    (tmp_path / "training_record.json").write_text(training)

    assert [result.metric for result in read_results(tmp_path)] == ["cgF1"]
    assert read_training(tmp_path)[0].initial_weights["text tower"] == "random"


def test_examples_in_docstrings_are_true():
    outcome = doctest.testmod(results_module)

    assert outcome.attempted > 0
    assert outcome.failed == 0
