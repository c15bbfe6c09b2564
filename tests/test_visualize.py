"""Drawing: what is coloured, what is left alone."""

import doctest
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam3_hf import visualize
from efficientsam3_hf.visualize import colour_of, draw_instances, outline

GREY = np.full((40, 60, 3), 128, dtype=np.uint8)


def test_a_mask_is_tinted_and_outlined_and_the_rest_stays():
    mask = np.zeros((1, 40, 60), dtype=bool)
    mask[0, 10:20, 10:30] = True

    drawn = np.array(draw_instances(GREY, masks=torch.from_numpy(mask), numbers=[3]))

    colour = np.array(colour_of(3))
    assert (drawn[~mask[0]] == 128).all()
    assert (drawn[10, 10:30] == colour).all()
    np.testing.assert_allclose(drawn[15, 20], 0.55 * 128 + 0.45 * colour, atol=1)
    assert (GREY == 128).all()  # a copy was drawn on


def test_boxes_and_captions_are_drawn_inside_the_picture():
    image = Image.fromarray(GREY)

    boxed = np.array(draw_instances(image, boxes=[[5, 5, 30, 30]]))
    captioned = np.array(draw_instances(image, boxes=[[55, 1, 59, 9]], captions=["a long name"]))

    assert (boxed[5, 5:31] == colour_of(0)).all()
    assert (boxed[10:20, 10:20] == 128).all()
    assert (captioned != 128).any(axis=2).sum() > (boxed != 128).any(axis=2).sum()


def test_an_object_keeps_its_colour_and_neighbours_differ():
    colours = [colour_of(number) for number in range(24)]

    assert len(set(colours)) == 24
    for one, next_one in pairwise(colours):
        assert sum(abs(a - b) for a, b in zip(one, next_one, strict=True)) > 150


def test_nothing_to_draw_leaves_the_picture_as_it_is():
    nothing = draw_instances(GREY, masks=np.zeros((0, 40, 60)), boxes=np.zeros((0, 4)))

    assert np.array_equal(np.array(nothing), GREY)
    assert np.array_equal(np.array(draw_instances(GREY)), GREY)


def test_an_empty_mask_may_have_a_caption():
    draw_instances(GREY, masks=np.zeros((1, 40, 60)), captions=["gone"])


def test_the_outline_is_the_rim_of_a_mask():
    mask = np.zeros((6, 6), dtype=bool)
    mask[1:5, 1:5] = True

    rim = outline(mask)

    assert rim.sum() == 12
    assert not rim[2:4, 2:4].any()
    assert outline(np.ones((3, 3), dtype=bool)).sum() == 8  # the picture's border counts


def test_lists_that_do_not_belong_together_are_errors():
    with pytest.raises(ValueError, match=r"differ in count: \[1, 2\]"):
        draw_instances(GREY, boxes=[[0, 0, 5, 5]], captions=["a", "b"])
    with pytest.raises(ValueError, match="mask of 5 x 5 does not fit a picture of 60 x 40"):
        draw_instances(GREY, masks=np.ones((1, 5, 5)))


def test_examples_in_docstrings_are_true():
    result = doctest.testmod(visualize)

    assert result.attempted > 0
    assert result.failed == 0
