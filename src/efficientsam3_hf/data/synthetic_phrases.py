"""Noun phrases for synthetic things: which of them a phrase names, and phrases that name none."""

from collections.abc import Sequence

import numpy as np

from .synthetic_shapes import Thing
from .synthetic_world import SYNONYMS, World, choose

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
        chosen.append(choose(generator, others[1:]) if use_other else word)
    return " ".join(chosen)


def choose_meanings(
    things: Sequence[Thing],
    positives: int,
    negatives: int,
    world: World,
    generator: np.random.Generator,
) -> list[Meaning]:
    """Different meanings that name something, then ones that name nothing.

    Both are drawn in pairs of one form, so that the form of a phrase tells nothing of whether it
    is there.
    """
    there: list[Meaning] = []
    absent: list[Meaning] = []
    wanted = max(positives, negatives)
    for _ in range(16 * wanted if things else 0):
        form = world.forms[int(generator.integers(len(world.forms)))]
        named = draw_positive(things, form, generator) if positives else None
        unnamed = draw_negative(things, form, world, generator) if negatives else None
        if positives and (named is None or named in there):
            continue
        if negatives and (unnamed is None or unnamed in absent):
            continue
        there += [named] if named is not None else []
        absent += [unnamed] if unnamed is not None else []
        if max(len(there), len(absent)) == wanted:
            break
    return there[:positives] + absent[:negatives]


def draw_positive(
    things: Sequence[Thing], form: Sequence[str], generator: np.random.Generator
) -> Meaning | None:
    """A meaning of this form that names a thing; None where all are of medium size, unsaid."""
    sayable = [thing for thing in things if "size" not in form or thing.size != "medium"]
    if not sayable:
        return None
    thing = sayable[int(generator.integers(len(sayable)))]
    return tuple((attribute, getattr(thing, attribute)) for attribute in form)


def draw_negative(
    things: Sequence[Thing], form: Sequence[str], world: World, generator: np.random.Generator
) -> Meaning | None:
    """A meaning of this form that names nothing; a hard one differs in one word from a thing."""
    words = world.words
    for _ in range(8):
        values = {name: choose(generator, words[name]) for name in form}
        if generator.random() < world.hard:
            thing = things[int(generator.integers(len(things)))]
            drawn = form[int(generator.integers(len(form)))]  # the one word that is not its own
            if "size" in form and drawn != "size" and thing.size == "medium":
                continue
            values |= {name: getattr(thing, name) for name in form if name != drawn}
        meaning = tuple((name, values[name]) for name in form)
        if not any(meets(thing, meaning) for thing in things):
            return meaning
    return None
