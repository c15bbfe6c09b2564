"""Flip, scale jitter and colours, of a picture and its annotations alike.

They act on samples, before the processor: how pixels become inputs is its business alone. What is
done to a sample depends on seed, epoch and its name, and on nothing else.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image, ImageEnhance

from .loading import shared_number
from .masks_rle import Rle, decode_window, encode_window, resize_window, rle_area, rle_box
from .samples import Box, ClipSample, ImageSample, Instance, Point

AnySample = TypeVar("AnySample", ImageSample, ClipSample)

# Words whose sense a flip would turn round: "left,", "rightmost", "counterclockwise"; not "bright".
SIDED = re.compile(r"\b(left|right)|clockwise", re.IGNORECASE)


@dataclass(frozen=True)
class Change:
    """What is done to one sample.

    Args:
        flip: Left to right.
        scale: Size of the picture on a canvas of the old size: above 1 a window is cut out.
        place: Where, from 0 to 1 in each direction (x, y).
        brightness, contrast, saturation: Factors.
    """

    flip: bool = False
    scale: float = 1.0
    place: tuple[float, float] = (0.5, 0.5)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


class Augmentations:
    """Random changes for `ImageCollator` and `ClipCollator`.

    A clip is changed as a whole. Instances of which too little is left within the window are
    dropped, and their query then is not exhaustive; so they are neither asked for nor absent.

    Args:
        flip: Probability. Samples with a phrase that speaks of left or right are not flipped.
        scale: Least and greatest factor; (1, 1) leaves sizes alone.
        colour: Most that brightness, contrast and saturation differ from 1.
        least_left: Share of an instance's pixels (or of its box, without mask) that must be left.
        seed: Another one makes other changes.
    """

    def __init__(
        self,
        flip: float = 0.5,
        scale: tuple[float, float] = (0.7, 1.4),
        colour: float = 0.2,
        least_left: float = 0.3,
        seed: int = 0,
    ):
        if not (0 <= flip <= 1 and 0 < scale[0] <= scale[1] and 0 <= colour < 1):
            raise ValueError(
                f"flip={flip} must be in [0, 1], scale={scale} ascend above 0, colour={colour} be "
                "in [0, 1)."
            )
        self.flip, self.scale, self.colour = flip, scale, colour
        self.least_left, self.seed = least_left, seed
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        """Choose the changes of this epoch."""
        self.epoch.fill_(epoch)

    def __call__(self, sample: AnySample) -> AnySample:
        change = self.choose(sample)
        if isinstance(sample, ClipSample):
            return change_clip(sample, change)
        return change_image(sample, change, self.least_left)

    def choose(self, sample: ImageSample | ClipSample) -> Change:
        """What to do to a sample in this epoch."""
        numbers = generator_for(sample, self.seed, int(self.epoch)).random(7)
        is_sided = any(SIDED.search(query.phrase or "") for query in sample.queries)
        low, high = np.log(self.scale[0]), np.log(self.scale[1])
        factors = 1 + self.colour * (2 * numbers[4:] - 1)
        return Change(
            flip=bool(numbers[0] < self.flip) and not is_sided,
            scale=float(np.exp(low + (high - low) * numbers[1])),
            place=(float(numbers[2]), float(numbers[3])),
            brightness=float(factors[0]),
            contrast=float(factors[1]),
            saturation=float(factors[2]),
        )


class ChooseQueries:
    """Keeps some of the queries of each image, others in each epoch, for `ImageCollator`.

    Half of the negatives, rounded down, are of a `supercategory` of which the image shows
    something, as far as there are such and files say it.

    Args:
        positives: Most that name something.
        negatives: Most that name nothing; others, that nobody annotated, are left out.
        seed: Another one makes other choices.
    """

    def __init__(self, positives: int = 2, negatives: int = 2, seed: int = 0):
        if positives < 0 or negatives < 0 or positives + negatives == 0:
            raise ValueError(f"{positives} positives and {negatives} negatives are no queries.")
        self.positives, self.negatives, self.seed = positives, negatives, seed
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        """Choose the queries of this epoch."""
        self.epoch.fill_(epoch)

    def __call__(self, sample: ImageSample) -> ImageSample:
        generator = generator_for(sample, self.seed, int(self.epoch))
        present = [index for index, each in enumerate(sample.queries) if each.instances]
        absent = [index for index, each in enumerate(sample.queries) if each.is_negative]
        kinds = [each.details.get("supercategory") for each in sample.queries]
        shown = {kinds[index] for index in present} - {None}
        positives = generator.permutation(present).tolist()
        negatives = generator.permutation(absent).tolist()
        hard = [index for index in negatives if kinds[index] in shown][: self.negatives // 2]
        others = [index for index in negatives if index not in hard]
        kept = positives[: self.positives] + (hard + others)[: self.negatives]
        return replace(sample, queries=[sample.queries[index] for index in sorted(kept)])


class ChooseInstances:
    """Keeps some of the instances of each image, others in each epoch, for `ImageCollator`.

    The masks of the others then need not be decoded. A query that loses one is not exhaustive.

    Args:
        most: Of an image.
        seed: Another one makes other choices.
    """

    def __init__(self, most: int, seed: int = 0):
        self.most, self.seed = most, seed
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        """Choose the instances of this epoch."""
        self.epoch.fill_(epoch)

    def __call__(self, sample: ImageSample) -> ImageSample:
        counts = [len(query.instances or []) for query in sample.queries]
        order = generator_for(sample, self.seed, int(self.epoch)).permutation(sum(counts))
        is_kept = np.isin(np.arange(sum(counts)), order[: self.most])
        queries, first = [], 0
        for query, count in zip(sample.queries, counts, strict=True):
            keeps = is_kept[first : first + count]
            first += count
            if not keeps.all():
                instances = [
                    each for each, kept in zip(query.instances or [], keeps, strict=True) if kept
                ]
                query = replace(query, instances=instances, is_exhaustive=False)
            queries.append(query)
        return replace(sample, queries=queries)


def generator_for(sample: ImageSample | ClipSample, seed: int, epoch: int) -> np.random.Generator:
    """Random numbers of a sample in an epoch."""
    return generator_named(f"{seed}/{epoch}/{sample.source}/{sample.source_id}")


def generator_named(name: str) -> np.random.Generator:
    """Random numbers that depend on a name alone."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Window:
    """Where a scaled picture lies on a canvas of its old size.

    Args:
        flip: Whether it is turned left to right, after all else.
        size: (height, width) of the canvas.
        scaled: (height, width) of the picture.
        corner: (x, y) of its upper left corner on the canvas; negative where it is cut off.
    """

    flip: bool
    size: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]


def window_of(change: Change, size: tuple[int, int]) -> Window:
    """The window that a change means for a picture of a size."""
    height, width = size
    scaled = (max(1, round(height * change.scale)), max(1, round(width * change.scale)))
    corner = (
        round((width - scaled[1]) * change.place[0]),
        round((height - scaled[0]) * change.place[1]),
    )
    return Window(change.flip, (height, width), scaled, corner)


def change_image(sample: ImageSample, change: Change, least_left: float = 0.0) -> ImageSample:
    """A changed copy of an image and its annotations."""
    window = window_of(change, sample.size)
    queries = []
    for query in sample.queries:
        if query.instances is None:
            queries.append(query)
            continue
        changed = [change_instance(each, window, least_left) for each in query.instances]
        kept = [each for each in changed if each is not None]
        is_exhaustive = query.is_exhaustive and len(kept) == len(changed)
        queries.append(replace(query, instances=kept, is_exhaustive=is_exhaustive))
    image = sample.image
    if image is not None:
        # A picture that was decoded smaller has a window of its own.
        image = change_pixels(image, change, window_of(change, image.shape[:2]))
    height, width = sample.size
    covered = sample.covered or (0.0, 0.0, float(width), float(height))
    covered = turn_box(clip_box(move_box(covered, window), window), window)
    return replace(sample, queries=queries, image=image, covered=covered)


def move_box(box: Box, window: Window) -> Box:
    """A box of the picture on the canvas, beyond whose sides it may reach; not flipped yet."""
    scale_y, scale_x = (new / old for new, old in zip(window.scaled, window.size, strict=True))
    (x, y), (x1, y1, x2, y2) = window.corner, box
    return (x1 * scale_x + x, y1 * scale_y + y, x2 * scale_x + x, y2 * scale_y + y)


def clip_box(box: Box, window: Window) -> Box:
    """What of a moved box is on the canvas."""
    height, width = window.size
    x1, x2 = (min(max(x, 0.0), width) for x in box[::2])
    y1, y2 = (min(max(y, 0.0), height) for y in box[1::2])
    return (x1, y1, x2, y2)


def turn_box(box: Box, window: Window) -> Box:
    """A box flipped if the canvas is."""
    x1, y1, x2, y2 = box
    return (window.size[1] - x2, y1, window.size[1] - x1, y2) if window.flip else box


def change_instance(instance: Instance, window: Window, least_left: float) -> Instance | None:
    """A moved copy, or None if too little of it is left."""
    height, width = window.size
    scale_x, scale_y = window.scaled[1] / width, window.scaled[0] / height
    x, y = window.corner
    whole = move_box(instance.box_xyxy, window)
    box = clip_box(whole, window)
    rle = None
    if instance.rle is not None:
        rle = change_rle(instance.rle, window)
        left = rle_area(rle) / max(1.0, rle_area(instance.rle) * scale_x * scale_y)
        if rle_area(rle) == 0 or left < least_left:
            return None
        if box != whole:  # it was cut
            box = turn_box(rle_box(rle), window)
    area = (box[2] - box[0]) * (box[3] - box[1])
    old_area = (whole[2] - whole[0]) * (whole[3] - whole[1])
    if rle is None and (area <= 0 or area < least_left * old_area):
        return None
    points = [(px * scale_x + x, py * scale_y + y) for px, py in instance.points]
    box = turn_box(box, window)
    if window.flip:
        # A point is a pixel by its number, a box is between pixels.
        points = [(width - 1 - px, py) for px, py in points]
    if rle is None:
        points = [(px, py) for px, py in points if 0 <= px < width and 0 <= py < height]
    elif points:
        points = points_inside(points, rle)
    return replace(instance, box_xyxy=box, rle=rle, points=points)


def points_inside(points: list[Point], rle: Rle) -> list[Point]:
    """Those on a mask."""
    part, (top, left) = decode_window(rle)
    rows, columns = part.shape
    return [
        (x, y)
        for x, y in points
        if 0 <= y - top < rows and 0 <= x - left < columns and part[int(y - top), int(x - left)]
    ]


def change_clip(sample: ClipSample, change: Change) -> ClipSample:
    """A changed copy of a cut and its annotations; what leaves the window is not seen."""
    if sample.frames is None:
        raise ValueError(f"Clip {sample.source_id} has no frames: take a cut of it first.")
    window = window_of(change, sample.size)
    queries = []
    for query in sample.queries:
        masklets = query.masklets
        if masklets is not None:
            masklets = [replace(each, rles=change_rles(each.rles, window)) for each in masklets]
        queries.append(replace(query, masklets=masklets))
    frames = [change_pixels(frame, change, window) for frame in sample.frames]
    ignored = change_rles(sample.ignored, window)
    return replace(sample, queries=queries, frames=frames, ignored=ignored, video=None)


def change_rles(rles: dict[int, Rle], window: Window) -> dict[int, Rle]:
    """Moved masks of those frames where something is left."""
    changed = {frame: change_rle(rle, window) for frame, rle in rles.items()}
    return {frame: rle for frame, rle in changed.items() if rle_area(rle)}


def change_rle(rle: Rle, window: Window) -> Rle:
    """A moved mask: where at least half of what becomes a pixel was inside."""
    if not rle_area(rle):
        return rle
    height, width = window.size
    part, corner = decode_window(rle)
    if window.scaled != window.size:
        bilinear = Image.Resampling.BILINEAR
        part, corner = resize_window(part, corner, window.size, window.scaled, bilinear)
    top, left = corner[0] + window.corner[1], corner[1] + window.corner[0]
    part = part[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    top, left = max(0, top), max(0, left)
    if window.flip:
        part, left = part[:, ::-1], width - left - part.shape[1]
    return encode_window(part, (top, left), window.size)


def change_pixels(pixels: np.ndarray, change: Change, window: Window) -> np.ndarray:
    """A moved picture in other colours; what it does not cover has its mean colour."""
    picture = Image.fromarray(pixels)
    for enhancer, factor in (
        (ImageEnhance.Brightness, change.brightness),
        (ImageEnhance.Contrast, change.contrast),
        (ImageEnhance.Color, change.saturation),
    ):
        if factor != 1:
            picture = enhancer(picture).enhance(factor)
    coloured = np.asarray(picture)
    return move(coloured, window, coloured.mean((0, 1)).round().astype(np.uint8))


def move(pixels: np.ndarray, window: Window, fill: int | np.ndarray) -> np.ndarray:
    """Pixels scaled, laid on the canvas and flipped."""
    scaled = pixels
    if window.scaled != window.size:
        size = (window.scaled[1], window.scaled[0])
        scaled = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    (height, width), (x, y) = window.size, window.corner
    canvas = np.empty((height, width, *pixels.shape[2:]), dtype=np.uint8)
    canvas[:] = fill
    part = scaled[max(0, -y) : height - y, max(0, -x) : width - x]
    canvas[max(0, y) : max(0, y) + part.shape[0], max(0, x) : max(0, x) + part.shape[1]] = part
    return np.ascontiguousarray(canvas[:, ::-1]) if window.flip else canvas
