"""Run lengths in all forms, and what damage to them says."""

import sys

import numpy as np
import pytest

from efficientsam3_hf.data.masks_rle import (
    decode_rle,
    point_inside,
    rle_area,
    rle_box,
    runs_of,
    to_rle,
)

# Columns 1 to 3 of rows 1 to 2 in an image of 4 rows and 5 columns.
MASK = np.zeros((4, 5), dtype=bool)
MASK[1:3, 1:4] = True
COUNTS = [5, 2, 2, 2, 2, 2, 5]


def test_polygons_run_lengths_and_arrays_are_one_mask():
    polygon = [[1, 1, 4, 1, 4, 3, 1, 3]]
    compressed = to_rle({"size": [4, 5], "counts": COUNTS}, (4, 5))

    for form in (polygon, {"size": [4, 5], "counts": COUNTS}, compressed, MASK):
        assert to_rle(form, (4, 5)) == compressed
    with_bytes = {"size": [4, 5], "counts": compressed["counts"].encode()}
    assert to_rle(with_bytes, (4, 5)) == compressed
    np.testing.assert_array_equal(decode_rle(compressed), MASK)


def test_box_area_and_point_of_a_mask():
    rle = to_rle(MASK, (4, 5))

    assert rle_box(rle) == (1, 1, 4, 3)
    assert rle_area(rle) == 6
    assert point_inside(MASK) in {(2.0, 1.0), (2.0, 2.0)}


@pytest.mark.parametrize("seed", range(20))
def test_runs_are_those_that_were_compressed(seed: int):
    generator = np.random.default_rng(seed)
    height, width = generator.integers(1, 90, 2)
    mask = generator.random((height, width)) < generator.choice([0.0, 0.02, 0.5, 1.0])
    rle = to_rle(mask, (height, width))

    runs = runs_of(rle["counts"])

    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    np.testing.assert_array_equal(values.reshape(width, height).T, mask)
    np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"size": [4, 5], "counts": [5, 2]}, "cover 7 of 20"),
        ({"size": [4, 5], "counts": [-5, 25]}, "damaged"),
        ({"size": [5, 4], "counts": COUNTS}, "do not fit"),
        ({"size": [4, 5], "counts": "522"}, "cover 9 of 20"),
        ({"size": [4, 5], "counts": "5 2"}, "strange"),
        ({"size": [4, 5], "counts": "5222Z"}, "cut short"),
        ({"size": [4, 5], "counts": "ooooooooooo0"}, "damaged"),
        ([[1, 1, 4, 1]], "three corners"),
        ([[1, 1, 4, 1, float("nan"), 3]], "not finite"),
        ([], "no polygon"),
        (None, "list of polygons"),
        (np.zeros((5, 4), dtype=bool), "does not fit"),
    ],
)
def test_damage_is_an_error_that_says_so(broken, message: str):
    with pytest.raises(ValueError, match=message):
        to_rle(broken, (4, 5))


def test_without_pycocotools_the_error_names_the_extra(monkeypatch):
    from efficientsam3_hf.data import masks_rle

    masks_rle.import_mask_api.cache_clear()
    monkeypatch.setitem(sys.modules, "pycocotools", None)

    with pytest.raises(ImportError, match=r"efficientsam3-hf\[train\]"):
        to_rle(MASK, (4, 5))
