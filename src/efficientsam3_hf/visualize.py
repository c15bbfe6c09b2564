"""Masks and boxes drawn on pictures, each object in a colour of its own."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

GOLDEN_ANGLE = 0.61803398875  # of the colour wheel: neighbours in number are far apart in colour


def colour_of(number: int) -> tuple[int, int, int]:
    """A colour that an object keeps through a video.

    >>> colour_of(0)
    (242, 73, 73)
    """
    hue, lightness = number * GOLDEN_ANGLE % 1.0, (0.95, 0.75)[number // 12 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.7, lightness)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_instances(
    image: Any,
    masks: Any = None,
    boxes: Any = None,
    captions: Sequence[str] | None = None,
    numbers: Sequence[int] | None = None,
    opacity: float = 0.45,
) -> Image.Image:
    """A copy of a picture under coloured masks with outlines, boxes and captions.

    Args:
        image: PIL image, or array (height, width, 3) of 8 bits.
        masks: Booleans (instances, height, width) of the picture's size.
        boxes: (instances, 4) as (x1, y1, x2, y2), in pixels.
        captions: One for each instance, written at its box or, without boxes, its mask.
        numbers: One for each instance, which gives its colour; by default its position.
        opacity: Of the masks, 0 to 1.
    """
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    masks = None if masks is None else to_array(masks).astype(bool)
    boxes = None if boxes is None else to_array(boxes).astype(float)
    given = (masks, boxes, captions, numbers)
    counts = {len(each) for each in given if each is not None}
    if len(counts) > 1:
        raise ValueError(f"Masks, boxes, captions and numbers differ in count: {sorted(counts)}.")
    count = counts.pop() if counts else 0
    colours = [colour_of(number) for number in (range(count) if numbers is None else numbers)]

    pixels = np.array(picture.convert("RGB"))
    for mask, colour in zip(masks if masks is not None else [], colours, strict=False):
        if mask.shape != pixels.shape[:2]:
            raise ValueError(
                f"A mask of {mask.shape[1]} x {mask.shape[0]} does not fit a picture of "
                f"{picture.width} x {picture.height}."
            )
        tinted = (1 - opacity) * pixels[mask] + opacity * np.array(colour)
        pixels[mask] = tinted.round().astype(np.uint8)
        pixels[outline(mask)] = colour
    overlay = Image.fromarray(pixels)
    pen = ImageDraw.Draw(overlay)
    width = max(1, max(picture.size) // 400)
    for index, colour in enumerate(colours):
        corner = (0, 0) if masks is None else corner_of(masks[index])
        if boxes is not None:
            pen.rectangle(boxes[index].tolist(), outline=colour, width=width)
            corner = boxes[index, :2]
        if captions is not None and captions[index]:
            write(pen, captions[index], corner, colour, picture.size)
    return overlay


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask (height, width) that touch its outside."""
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def corner_of(mask: np.ndarray) -> tuple[int, int]:
    """Where a caption of a mask goes: (x, y) of its upper left."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return (int(columns[0]), int(rows[0])) if len(rows) else (0, 0)


def write(
    pen: ImageDraw.ImageDraw,
    caption: str,
    corner: Sequence[float],
    colour: tuple[int, int, int],
    size: tuple[int, int],
) -> None:
    """A caption on a plate of its colour, wholly inside the picture."""
    longest = max(size)
    font_size = max(10, min(14, longest // 30), longest // 55)
    left, top, right, bottom = pen.textbbox((0, 0), caption, font_size=font_size)
    x = min(max(corner[0], 0), max(size[0] - right - 4, 0))
    y = min(max(corner[1] - bottom - 4, 0), max(size[1] - bottom - 4, 0))
    pen.rectangle((x, y, x + right + 4, y + bottom + 3), fill=colour)
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128  # as the eye weighs them
    pen.text((x + 2, y + 1), caption, fill="white" if dark else "black", font_size=font_size)


def to_array(values: Any) -> np.ndarray:
    """A tensor of any device, a list or an array as an array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
