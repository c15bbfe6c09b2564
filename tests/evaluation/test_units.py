"""Records of units, stacked and kept."""

import doctest

import numpy as np
import pytest

from efficientsam3_hf.evaluation import units as module
from efficientsam3_hf.evaluation.units import count, join, load, save, stack, weights_or_ones


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(module).failed == 0


def test_units_come_back_from_disk_and_parts_join(tmp_path):
    units = stack([{"found": [1, 2], "is_seen": True}, {"found": [3, 4], "is_seen": False}])
    save(units, tmp_path / "units.npz")

    back = load(tmp_path / "units.npz")

    assert back.keys() == units.keys()
    assert all(np.array_equal(back[name], units[name]) for name in units)
    joined = join([units, back])
    assert count(joined) == 4
    assert joined["found"].tolist() == [[1, 2], [3, 4]] * 2


def test_what_does_not_stack_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        stack([])
    with pytest.raises(ValueError, match="Record 1 has the fields"):
        stack([{"iou": 1}, {"J": 1}])
    with pytest.raises(ValueError, match="no parts"):
        join([])
    with pytest.raises(ValueError, match="1 weights for 2"):
        weights_or_ones(np.ones(1), stack([{"iou": 1}, {"iou": 0}]))
