"""What there is in the synthetic world, and which words name it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .synthetic_shapes import COLOURS, PATTERNS, SHAPES, SIZES, Thing

# Words for the same; the first is the common one.
SYNONYMS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
    "oval": ("oval", "ellipse"),
    "diamond": ("diamond", "rhombus"),
    "red": ("red", "crimson"),
    "purple": ("purple", "violet"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
    "plain": ("plain", "unpatterned"),
    "small": ("small", "little"),
    "large": ("large", "big"),
    "object": ("object", "thing"),
}

# What phrases say, in the order of words.
FORMS = (
    ("shape",),
    ("colour",),
    ("colour", "shape"),
    ("colour", "shape"),
    ("pattern", "shape"),
    ("pattern", "colour"),
    ("size", "shape"),
    ("size", "colour", "shape"),
    ("pattern", "colour", "shape"),
)


@dataclass(frozen=True)
class World:
    """Things and the phrases for them; the fewer words there are, the easier it is to learn.

    Args:
        shapes, colours, patterns: Words of `SHAPES`, `COLOURS` and `PATTERNS`.
        sizes: "small", "medium" and "large", or some of them, with the least and greatest radius
            of such a thing as shares of the image's side. Half are medium, if there are others;
            no phrase says so.
        forms: What phrases say, in the order of words; one that stands twice is said twice as
            often.
        synonyms: Probability of a word to be replaced by another of the same sense.
        hard: Share of the negatives that differ in one word from a thing in the image.
        least_visible: Share of each thing in a scene that can be seen, so that phrases are never
            about hidden things.
    """

    shapes: Sequence[str] = tuple(SHAPES)
    colours: Sequence[str] = tuple(COLOURS)
    patterns: Sequence[str] = PATTERNS
    sizes: Mapping[str, tuple[float, float]] = field(default_factory=lambda: dict(SIZES))
    forms: Sequence[Sequence[str]] = FORMS
    synonyms: float = 0.3
    hard: float = 0.75
    least_visible: float = 0.5

    def __post_init__(self):
        for name, known in (
            ("shapes", SHAPES),
            ("colours", COLOURS),
            ("patterns", PATTERNS),
            ("sizes", SIZES),
            ("forms", None),
        ):
            words = list(getattr(self, name))
            if not words or (known is not None and not set(words) <= set(known)):
                raise ValueError(f"{name} are some of {list(known or FORMS)}, not {words}.")
        for word, (least, most) in self.sizes.items():
            if not 0 < least <= most <= 0.5:
                raise ValueError(f"{word} is from {least} to {most} of the side: not in (0, 0.5].")
        for form in self.forms:
            unknown = [name for name in form if not self.words.get(name)]
            if unknown or not form or len(set(form)) < len(form):
                raise ValueError(
                    f"{tuple(form)} is no form of phrases: it has some of "
                    f"{[name for name, words in self.words.items() if words]}, each once."
                )
        shares = (self.synonyms, self.hard, self.least_visible)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"synonyms, hard and least_visible are in [0, 1], not {shares}.")

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """What may be said of each attribute."""
        return {
            "shape": tuple(self.shapes),
            "colour": tuple(self.colours),
            "pattern": tuple(self.patterns),
            "size": tuple(size for size in self.sizes if size != "medium"),
        }

    def vocabulary(self) -> list[str]:
        """Every word that the phrases are made of."""
        said = {word for form in self.forms for name in form for word in self.words[name]}
        if any(form[-1] != "shape" for form in self.forms):
            said.add("object")
        names = [name for word in said for name in SYNONYMS.get(word, (word,))]
        if self.synonyms == 0:
            names = list(said)
        return sorted({word for name in names for word in name.split()})

    def new_thing(self, generator: np.random.Generator, like: Thing | None = None) -> Thing:
        """A thing at a random place, which may share some words with another."""
        shape, colour, pattern = (
            choose(generator, words) for words in (self.shapes, self.colours, self.patterns)
        )
        if like is not None:
            keep = generator.random(3) < 0.55
            shape = like.shape if keep[0] else shape
            colour = like.colour if keep[1] else colour
            pattern = like.pattern if keep[2] else pattern
        sizes = list(self.sizes)
        size = choose(generator, [*sizes, "medium"] if "medium" in sizes else sizes)
        numbers = generator.uniform(-1, 1, 10).tolist()
        least, most = self.sizes[size]
        tint = [
            min(max(value + 12 * number, 0.0), 255.0)
            for value, number in zip(COLOURS[colour], numbers, strict=False)
        ]
        return Thing(
            shape=shape,
            colour=colour,
            pattern=pattern,
            size=size,
            radius=least + (most - least) * (numbers[3] + 1) / 2,
            centre=(0.5 + 0.47 * numbers[4], 0.5 + 0.47 * numbers[5]),
            angle=0.45 * numbers[6],
            pattern_angle=np.pi * numbers[7],
            shade=(1 + 0.15 * numbers[8], 1 + 0.15 * numbers[9]),
            tint=(tint[0], tint[1], tint[2]),
        )


def choose(generator: np.random.Generator, options: Sequence) -> str:
    """One of them."""
    return options[int(generator.integers(len(options)))]
