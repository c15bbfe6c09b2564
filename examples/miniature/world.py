"""The world of the miniature: few shapes and colours, large enough to be seen by a small model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.data.samples import ImageSample
from efficientsam3_hf.data.synthetic import Scenes
from efficientsam3_hf.data.synthetic_phrases import Meaning
from efficientsam3_hf.data.synthetic_shapes import Thing
from efficientsam3_hf.data.synthetic_world import World

SIDE = 120  # of images, in pixels
MOST_THINGS = 4
MOST_MOVING = 3  # things in a clip
# What happens in clips. Two of a kind that cross are more than so small a tracker tells apart.
EVENTS = ("drift", "drift", "leave", "hide")

WORLD = World(
    shapes=("circle", "square", "triangle", "star", "heart", "cross"),
    colours=("red", "yellow", "green", "blue", "purple", "white"),
    patterns=("plain",),
    sizes={"medium": (0.14, 0.26)},
    forms=(("shape",), ("colour",), ("colour", "shape")),
    synonyms=0.0,
    least_visible=0.7,  # half of a heart is any shape
)

# The words of the world, and that which stands for exemplars alone.
WORDS = ["visual", *WORLD.vocabulary()]

# What each thing is, in one word for its shape and one for its colour.
ATTRIBUTES: tuple[Meaning, ...] = tuple(
    ((name, word),) for name in ("shape", "colour") for word in WORLD.words[name]
)
NUM_SHAPES = len(WORLD.shapes)


def scenes(length: int, split: str, side: int = SIDE, most: int = MOST_THINGS) -> Scenes:
    """Scenes of the world, with two phrases that name something and two that name nothing."""
    return Scenes(length, split, side=side, most=most, positives=2, negatives=2, world=WORLD)


class DescribedScenes(Scenes):
    """Scenes in which, after the phrases, each shape and each colour is asked for."""

    def questions(
        self, things: Sequence[Thing], generator: np.random.Generator
    ) -> list[tuple[str | None, Meaning, int]]:
        asked = super().questions(things, generator)
        words = [(meaning[0][1], meaning, 0) for meaning in ATTRIBUTES]
        return asked + words


class DescribedCollator:
    """Batches of `DescribedScenes`: those of their phrases, and what is where.

    Adds `words` (images, shapes + colours, height, width): whether a pixel is of such a thing; and
    `boxes` (images, 4, height, width): the box of the thing that it is of, as (cx, cy, w, h).

    Args:
        collate: Of phrases.
        grid: Side of these maps.
    """

    def __init__(self, collate: ImageCollator, grid: int):
        self.collate, self.grid = collate, grid
        self.describe = ImageCollator(lambda **_: {}, mask_size=(grid, grid))

    def __call__(self, samples: Sequence[ImageSample]) -> dict[str, Any]:
        asked, described = [], []
        for sample in samples:
            count = len(sample.queries) - len(ATTRIBUTES)
            asked.append(replace(sample, queries=sample.queries[:count]))
            described.append(replace(sample, queries=sample.queries[count:]))
        batch = self.collate(asked)
        words = torch.zeros(len(samples), len(ATTRIBUTES), self.grid, self.grid)
        boxes = torch.zeros(len(samples), 4, self.grid, self.grid)
        labels = iter(self.describe(described)["labels"])
        for image in range(len(samples)):
            for number in range(len(ATTRIBUTES)):
                label = next(labels)
                for mask, box in zip(label["masks"], label["boxes"], strict=True):
                    words[image, number][mask] = 1.0
                    if number < NUM_SHAPES:  # each thing has one shape
                        boxes[image, :, mask] = box[:, None]
        return {**batch, "words": words, "boxes": boxes}
