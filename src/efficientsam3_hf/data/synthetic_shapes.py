"""Drawing of one thing: shape, colour, pattern, size and turn, and the exact pixels it covers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

Array = np.ndarray

COLOURS = {
    "red": (205, 30, 35),
    "orange": (240, 125, 20),
    "yellow": (245, 215, 40),
    "green": (35, 150, 55),
    "blue": (30, 75, 205),
    "purple": (125, 45, 165),
    "pink": (245, 135, 185),
    "brown": (115, 65, 30),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}

PATTERNS = ("plain", "striped", "dotted", "checkered")

# Radius as a share of the image's side. Gaps between them leave no word in doubt.
SIZES = {"small": (0.05, 0.07), "medium": (0.09, 0.12), "large": (0.155, 0.21)}


def star(u: Array, v: Array) -> Array:
    """Five points: the nearest of them is turned upwards, then it is two straight edges."""
    angle = np.abs((np.arctan2(u, -v) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(u, v)
    return (radius * np.cos(angle) - 1) * 0.60 + radius * np.sin(angle) * 0.80 + 0.05


def heart(u: Array, v: Array) -> Array:
    """Two discs above a wedge."""
    discs = np.hypot(np.abs(u) - 0.45, v + 0.35) - 0.5
    wedge = np.maximum((np.abs(u) + v) * 0.707 - 0.57, np.maximum(np.abs(u) - 0.8, -v - 0.35))
    return np.minimum(discs, wedge)


def cross(u: Array, v: Array) -> Array:
    """Two bars."""
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.minimum(u, v) - 0.3, np.maximum(u, v) - 0.95)


# Each says how far a point (u, v), in radii from the middle and v pointing down, lies outside.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: np.hypot(u, v) - 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.82,
    "triangle": lambda u, v: np.maximum(v - 0.6, 0.866 * np.abs(u) - 0.5 * v - 0.5),
    "star": star,
    "heart": heart,
    "cross": cross,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) - 0.23,
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.8 - np.hypot(u - 0.5, v)),
    "oval": lambda u, v: (np.hypot(u, v / 0.5) - 1) * 0.5,
    "diamond": lambda u, v: (np.abs(u) / 0.6 + np.abs(v) - 1) * 0.51,
    "hexagon": lambda u, v: np.maximum(0.866 * np.abs(u) + 0.5 * np.abs(v), np.abs(v)) - 0.85,
}


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Args:
        shape, colour, pattern, size: Words for it.
        radius: As a share of the image's side.
        centre: (x, y) as shares of the image's side; may be outside.
        angle: Turn in radians.
        pattern_angle: Direction of stripes and rows.
        shade: Brightness from one side to the other.
        tint: Colour in the image.
    """

    shape: str
    colour: str
    pattern: str
    size: str
    radius: float
    centre: tuple[float, float]
    angle: float
    pattern_angle: float
    shade: tuple[float, float]
    tint: tuple[float, float, float]

    def moved(self, centre: tuple[float, float], turn: float) -> "Thing":
        """The same at another place."""
        return replace(
            self,
            centre=centre,
            angle=self.angle + turn,
            pattern_angle=self.pattern_angle + turn,
        )


@dataclass
class Silhouette:
    """Where a thing is in an image.

    Args:
        window: Rows and columns of the image.
        coverage: Share of each pixel there, for soft edges.
        inside: Pixels there that are its own.
        u, v: Their places in radii from its middle, turned upright.
        area: Pixels it would have if nothing hid it and the image went on.
    """

    window: tuple[slice, slice]
    coverage: Array
    inside: Array
    u: Array
    v: Array
    area: int


def silhouette(thing: Thing, side: int) -> Silhouette | None:
    """Where a thing is in a square image, or None if it is outside."""
    radius = thing.radius * side
    x, y = thing.centre[0] * side - 0.5, thing.centre[1] * side - 0.5  # of pixel centres
    reach = int(radius * 1.1) + 2
    left, top = round(x) - reach, round(y) - reach
    length = 2 * reach + 1
    columns = (np.arange(left, left + length, dtype=np.float32) - np.float32(x)) / radius
    rows = ((np.arange(top, top + length, dtype=np.float32) - np.float32(y)) / radius)[:, None]
    cosine, sine = np.float32(np.cos(thing.angle)), np.float32(np.sin(thing.angle))
    u, v = columns * cosine + rows * sine, rows * cosine - columns * sine
    distance = SHAPES[thing.shape](u, v) * np.float32(radius)
    area = int(np.count_nonzero(distance < 0))
    row_cut = slice(max(0, -top), max(0, min(length, side - top)))
    column_cut = slice(max(0, -left), max(0, min(length, side - left)))
    if row_cut.stop <= row_cut.start or column_cut.stop <= column_cut.start:
        return None
    cut = (row_cut, column_cut)
    window = (
        slice(top + row_cut.start, top + row_cut.stop),
        slice(left + column_cut.start, left + column_cut.stop),
    )
    distance = distance[cut]
    coverage = np.clip(0.5 - distance, 0, 1)
    return Silhouette(window, coverage, distance < 0, u[cut], v[cut], area)


def paint(image: Array, thing: Thing, outline: Silhouette) -> None:
    """Draw a thing over an image (height, width, 3) of floats."""
    u, v = outline.u, outline.v
    first, last = thing.shade
    brightness = (first + last) / 2 + (last - first) / 2 * v
    tint = np.asarray(thing.tint, dtype=np.float32)
    colours = tint * brightness[..., None]
    if thing.pattern != "plain":
        marks = pattern_marks(thing, u, v)[..., None]
        # Dark things get light marks, and others dark ones.
        other = tint * 0.4 if tint.mean() > 90 else tint * 0.35 + 150
        colours += marks * (other * brightness[..., None] - colours)
    part = image[outline.window]
    part += outline.coverage[..., None] * (colours - part)


def pattern_marks(thing: Thing, u: Array, v: Array) -> Array:
    """1 where the second tone of a pattern is, else 0."""
    turn = thing.pattern_angle - thing.angle
    cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    along, across = u * cosine + v * sine, v * cosine - u * sine
    if thing.pattern == "striped":
        return ((along * 2.6) % 1 < 0.45).astype(np.float32)
    if thing.pattern == "checkered":
        return ((np.floor(along * 2.9) + np.floor(across * 2.9)) % 2).astype(np.float32)
    spots = ((along * 2.2) % 1 - 0.5) ** 2 + ((across * 2.2) % 1 - 0.5) ** 2
    return (spots < 0.1).astype(np.float32)


@lru_cache(maxsize=1)
def textures(count: int = 24, side: int = 512) -> Array:
    """Grey textures (count, side, side) of 8 bits: clouds, grain, weave and waves."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:side, 0:side].astype(np.float32)
    drawn = []
    for index in range(count):
        texture = np.zeros((side, side), dtype=np.float32)
        for octave in range(2, 8):
            cells = generator.standard_normal((2**octave, 2**octave)).astype(np.float32)
            weight = (0.45 + 0.4 * (index % 3)) ** (octave - 2)
            grown = Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC)
            texture += weight * np.asarray(grown)
        if index % 4 == 1:  # boards, waves
            angle, length = generator.uniform(0, np.pi), generator.uniform(8, 40)
            phase = (rows * np.cos(angle) + columns * np.sin(angle)) / length
            texture += 1.2 * np.sin(2 * np.pi * phase + texture)
        if index % 4 == 3:  # weave
            length = generator.uniform(6, 20)
            texture += np.sin(rows / length) * np.sin(columns / length)
        texture -= texture.min()
        drawn.append((texture * (255 / texture.max())).astype(np.uint8))
    return np.stack(drawn)


def background(generator: np.random.Generator, side: int) -> Array:
    """A textured image (side, side, 3) of floats, in muted colours between dark and light."""
    bank = textures()
    texture = bank[generator.integers(len(bank))]
    if side > texture.shape[0]:
        texture = np.tile(texture, (-(-side // texture.shape[0]),) * 2)
    top, left = generator.integers(0, texture.shape[0] - side + 1, 2)
    part = texture[top : top + side, left : left + side]
    if generator.random() < 0.5:
        part = part.T
    middle = generator.uniform(85, 175)
    ends = middle + np.array([[-35.0], [35.0]]) + generator.uniform(-18, 18, (2, 3))
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    tones = ends[0] + ramp * (ends[1] - ends[0])
    return tones.astype(np.float32).take(np.ascontiguousarray(part), axis=0)
