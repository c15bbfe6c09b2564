"""Run lengths in all forms, and what damage to them says."""

import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from random_masks import random_mask

from efficientsam3_hf.data.masks_rle import (
    decode_rle,
    decode_window,
    encode_window,
    point_inside,
    resize_window,
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


def test_a_window_is_the_mask_within_its_box_and_goes_back():
    generator = np.random.default_rng(0)
    for _ in range(400):
        size = tuple(int(side) for side in generator.integers(1, 12, 2))
        mask = random_mask(generator, size)
        rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))

        part, (top, left) = decode_window({"size": list(size), "counts": rle["counts"].decode()})

        rows, columns = part.shape
        assert rows == mask.any(1).nonzero()[0].max(initial=-1) - top + 1
        assert columns == mask.any(0).nonzero()[0].max(initial=-1) - left + 1
        np.testing.assert_array_equal(part, mask[top : top + rows, left : left + columns])
        assert part.sum() == mask.sum()
        again = encode_window(part, (top, left), size)
        assert again == {"size": list(size), "counts": rle["counts"].decode()}
        # A larger window says the same.
        assert encode_window(mask, (0, 0), size) == again


@pytest.mark.parametrize("resample", [Image.Resampling.BOX, Image.Resampling.BILINEAR])
def test_a_window_is_resized_as_the_whole_mask_is(resample):
    generator = np.random.default_rng(1)
    for _ in range(300):
        # Odd, since then no new pixel begins or ends in the middle of an old one, where the
        # single precision of Pillow's places decides what belongs to it.
        size, new_size = (2 * generator.integers(0, 30, (2, 2)) + 1).tolist()
        mask = random_mask(generator, size)
        if not mask.any():
            continue
        whole = Image.fromarray(mask.astype(np.uint8) * 255).resize(new_size[::-1], resample)
        grey = np.asarray(whole).astype(int)

        window = decode_window(to_rle(mask, tuple(size)))
        part, (top, left) = resize_window(*window, size, new_size, resample)

        resized = np.zeros(new_size, dtype=bool)
        resized[top : top + part.shape[0], left : left + part.shape[1]] = part
        np.testing.assert_array_equal(resized[grey > 127], True)
        np.testing.assert_array_equal(resized[grey < 126], False)


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
