"""What users write as prompts: cleaned phrases, checked boxes and points."""

import html
import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import ftfy

PADDING_LABEL = -10  # of a box or point that only fills up the batch

# The phrase that goes with exemplars alone.
VISUAL_PHRASE = "visual"

COORDINATES = {"box": ("x1", "y1", "x2", "y2"), "point": ("x", "y")}


def clean_phrase(phrase: str) -> str:
    """The text that CLIP's tokenizer sees: mended, unescaped, on one line, in lower case.

    >>> clean_phrase("  Tom &amp;amp; JERRY\\n")
    'tom & jerry'
    """
    if not isinstance(phrase, str):
        raise TypeError(f"A phrase must be a string, not {type(phrase).__name__}: {phrase!r}.")
    mended = html.unescape(html.unescape(ftfy.fix_text(phrase)))
    cleaned = " ".join(mended.split()).lower()
    if not cleaned:
        raise ValueError(
            "A phrase is empty. Name what to find; to prompt with boxes or points alone, leave the "
            "text out (or put None in its place)."
        )
    return cleaned


def check_box(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    """A box (x1, y1, x2, y2) in pixels of an image of (height, width), clipped to the image.

    A box without area, or wholly outside the image, is an error.
    """
    x1, y1, x2, y2 = check_coordinates("box", box)
    if x2 <= x1 or y2 <= y1:
        raise ValueError(
            f"The box {[x1, y1, x2, y2]} has no area: it must be (x1, y1, x2, y2) with x1 < x2 and "
            "y1 < y2."
        )
    height, width = size
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise ValueError(
            f"The box {[x1, y1, x2, y2]} lies outside the image of {width} x {height} pixels."
        )
    return [max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))]


def check_point(point: Sequence[float], size: tuple[int, int]) -> list[float]:
    """A point (x, y) in pixels of an image of (height, width); one outside is an error."""
    x, y = check_coordinates("point", point)
    height, width = size
    if not (0 <= x <= width and 0 <= y <= height):
        raise ValueError(f"The point {[x, y]} lies outside the image of {width} x {height} pixels.")
    return [x, y]


def check_coordinates(kind: str, numbers: Sequence[float]) -> list[float]:
    """The coordinates of a box or point as floats, finite and as many as there should be."""
    names = COORDINATES[kind]
    if not is_list(numbers) or not all(isinstance(number, Real) for number in numbers):
        raise ValueError(
            f"A {kind} must be a list of numbers ({', '.join(names)}), not {numbers!r}. Are the "
            "lists nested as deep as they should be?"
        )
    if len(numbers) != len(names):
        raise ValueError(
            f"A {kind} has {len(names)} numbers ({', '.join(names)}), not {len(numbers)}: "
            f"{list(numbers)}."
        )
    floats = [float(number) for number in numbers]
    if not all(math.isfinite(number) for number in floats):
        raise ValueError(f"The {kind} {floats} holds numbers that are not finite.")
    return floats


def check_labels(kind: str, labels: Sequence[int], count: int, allowed: Sequence[int]) -> list[int]:
    """One label of the allowed values for each of `count` boxes or points."""
    if not is_list(labels):
        raise ValueError(f"Labels of kind {kind!r} must be a list for each prompt, not {labels!r}.")
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels do not fit {count} of kind {kind!r}.")
    wrong = [label for label in labels if label not in allowed]
    if wrong:
        raise ValueError(f"Label {wrong[0]!r} of a {kind} is none of {list(allowed)}.")
    return [int(label) for label in labels]


def check_sizes(sizes: Any) -> list[list[int]]:
    """(height, width) of each image, as whole numbers."""
    lists = to_lists(sizes)
    is_good = is_list(lists) and all(
        is_list(size) and len(size) == 2 and all(isinstance(side, Real) for side in size)
        for size in lists
    )
    if not (is_good and lists) or min(map(min, lists)) < 1:
        raise ValueError(
            "original_sizes must be a list of (height, width), one for each image, such as "
            f"[(480, 640)], not {lists!r}."
        )
    return [[int(side) for side in size] for size in lists]


def check_options(options: Iterable[str], image_processor: Any, has_images: bool) -> None:
    """Raise for arguments of a processor that nothing would read."""
    known = set(image_processor.valid_kwargs.__annotations__) if has_images else set()
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"The processor has no argument {unknown[0]!r}. Beside those of its signature it takes "
            "options of the image processor, where there are images."
        )


def is_list(data: Any) -> bool:
    """Whether this is a list of anything, a string being none."""
    return isinstance(data, Sequence) and not isinstance(data, str)


def to_lists(data: Any) -> Any:
    """Nested lists out of tensors, arrays and sequences; None and single values as they are."""
    if hasattr(data, "tolist"):
        return data.tolist()
    return [to_lists(item) for item in data] if is_list(data) else data
