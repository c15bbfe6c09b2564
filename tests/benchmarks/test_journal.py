"""Outcomes on disk: whole or not at all, and only of one kind of run."""

import json

import numpy as np
import pytest

from efficientsam3_hf.benchmarks.image_tasks import promptable
from efficientsam3_hf.benchmarks.journal import Journal
from efficientsam3_hf.benchmarks.tasks import Outcome
from efficientsam3_hf.benchmarks.video_tasks import apart, frames_in_range
from efficientsam3_hf.data.samples import Masklet


def test_what_was_written_is_read_to_the_bit(tmp_path):
    journal = Journal(tmp_path)
    values = [0.1 + 0.2, 1e-300, float("nan"), 1 / 3]
    journal.write("", 0, [Outcome("a", [{"iou": value} for value in values])])
    journal.write("", 1, [Outcome("b", was_skipped=True)])

    first, second = journal.read("", 2)

    assert np.array_equal([each["iou"] for each in first.records], values, equal_nan=True)
    assert second == Outcome("b", was_skipped=True)
    assert journal.missing("", 4) == [2, 3]
    assert journal.missing("other", 2) == [0, 1]


def test_a_part_that_was_not_finished_is_missing(tmp_path, monkeypatch):
    journal = Journal(tmp_path)
    monkeypatch.setattr(
        "efficientsam3_hf.benchmarks.journal.os.replace", lambda *names: 1 / 0
    )  # dies here

    with pytest.raises(ZeroDivisionError):
        journal.write("", 0, [Outcome("a")])

    assert journal.missing("", 1) == [0]


def test_settings_that_differ_are_named(tmp_path):
    journal = Journal(tmp_path)
    journal.begin({"task": "vos", "data": ("a", "b")})
    journal.begin({"task": "vos", "data": ["a", "b"]})  # the same, as JSON has it

    with pytest.raises(ValueError, match=r"task: 'vos' then, 'text' now") as error:
        journal.begin({"task": "text", "data": ["a", "b"], "new": 1})

    assert "new: None then, 1 now" in str(error.value)
    assert "data" not in str(error.value).replace(str(tmp_path), "")
    assert json.loads((tmp_path / "settings.json").read_text())["task"] == "vos"


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((-5, 2, 30, 4), (0, 2, 20, 4)),
        ((5, 2, 5, 2), (5, 2, 6, 3)),  # no area
        ((20, 10, 20, 10), (19, 9, 20, 10)),  # in the corner
        ((25, 3, 40, 4), (19, 3, 20, 4)),  # outside
    ],
)
def test_any_box_can_be_given_to_a_model(box, expected):
    assert promptable(box, (10, 20)) == expected


def test_a_pixel_belongs_to_the_surest_object():
    import torch

    masks = apart({3: torch.tensor([[1.0, 2.0, -1.0]]), 7: torch.tensor([[2.0, 1.0, -2.0]])})

    assert masks[3].tolist() == [[False, True, False]]
    assert masks[7].tolist() == [[True, False, False]]


def test_an_object_of_lvos_counts_in_its_range_without_the_end():
    ranged = Masklet({}, 1, {"frame_range": {"start": "00000006", "end": "00000016"}})
    names = [f"{number:08d}" for number in range(1, 22)]

    assert frames_in_range(ranged, [0, 5, 10, 15, 20], names) == [5, 10]
    assert frames_in_range(Masklet({}, 1), [0, 5], ["not", "numbers"]) == []
