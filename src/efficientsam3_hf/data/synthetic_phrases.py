"""Noun phrases for synthetic things: which of them a phrase names, and phrases that name none."""

from collections.abc import Sequence

import numpy as np

from .synthetic_shapes import COLOURS, PATTERNS, SHAPES, Thing

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

WORDS = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "size": ("small", "large"),
}

# What phrases say, in the order of words. Negatives have the same forms in the same shares, so that
# the form of a phrase tells nothing of whether it is there.
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

Meaning = tuple[tuple[str, str], ...]


def meets(thing: Thing, meaning: Meaning) -> bool:
    """Whether a phrase of this meaning names the thing."""
    return all(getattr(thing, attribute) == value for attribute, value in meaning)


def to_words(meaning: Meaning, generator: np.random.Generator, synonyms: float = 0.3) -> str:
    """A noun phrase; each word is replaced by another of the same sense with some probability."""
    words = [value for _, value in meaning]
    if meaning[-1][0] != "shape":
        words.append("object")
    chosen = []
    for word in words:
        others = SYNONYMS.get(word, (word,))
        use_other = len(others) > 1 and generator.random() < synonyms
        chosen.append(others[int(generator.integers(1, len(others)))] if use_other else word)
    return " ".join(chosen)


def choose_positives(
    things: Sequence[Thing], count: int, generator: np.random.Generator
) -> list[Meaning]:
    """Different meanings, each of which names a thing."""
    meanings: list[Meaning] = []
    for _ in range(8 * count if things else 0):
        form = FORMS[int(generator.integers(len(FORMS)))]
        thing = things[int(generator.integers(len(things)))]
        meaning = tuple((attribute, getattr(thing, attribute)) for attribute in form)
        if meaning not in meanings and ("size", "medium") not in meaning:
            meanings.append(meaning)
        if len(meanings) == count:
            break
    return meanings


def choose_negatives(
    things: Sequence[Thing], count: int, generator: np.random.Generator, hard: float = 0.75
) -> list[Meaning]:
    """Different meanings that name nothing; the hard ones differ in one word from a thing."""
    meanings: list[Meaning] = []
    for _ in range(16 * count):
        form = FORMS[int(generator.integers(len(FORMS)))]
        values = {name: WORDS[name][int(generator.integers(len(WORDS[name])))] for name in form}
        if things and generator.random() < hard:
            thing = things[int(generator.integers(len(things)))]
            kept = generator.integers(len(form))  # the one attribute that stays as drawn
            for position, name in enumerate(form):
                if position != kept:
                    values[name] = getattr(thing, name)
        meaning = tuple((name, values[name]) for name in form)
        named = any(meets(thing, meaning) for thing in things)
        if not named and meaning not in meanings and ("size", "medium") not in meaning:
            meanings.append(meaning)
        if len(meanings) == count:
            break
    return meanings
