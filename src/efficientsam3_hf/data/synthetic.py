"""A small world to learn and test in: scenes and clips whose every pixel is known.

    scenes = Scenes(1000, split="train", seed=0)
    scenes[7].queries[0].phrase, scenes[7].queries[0].instances[0].mask

Sample `index` of a split is the same each time it is made, and splits share no random numbers.
"""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from .masks_rle import import_mask_api, point_inside, rle_box, to_text
from .samples import ClipQuery, ClipSample, ImageSample, Instance, Masklet, Query
from .synthetic_motion import choose_paths, place_at
from .synthetic_phrases import (
    SYNONYMS,
    Meaning,
    choose_negatives,
    choose_positives,
    meets,
    to_words,
)
from .synthetic_shapes import (
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    Silhouette,
    Thing,
    background,
    paint,
    silhouette,
)
from .video import PicturesVideo

SPLITS = ("train", "val", "test")

MOST_THINGS = 255  # in an image, since their numbers have 8 bits

LEAST_VISIBLE = 0.5  # share of a thing in a scene, so that phrases are never about hidden things

# As categories of COCO's files, for which each category is asked of each image.
CATEGORIES = dict(enumerate(SHAPES, start=1))


class Scenes(Dataset):
    """Images of things on textured grounds, which may overlap, with phrases.

    Args:
        length: Number of images.
        split: "train", "val" or "test".
        seed: Another one makes another world of the same kind.
        side: Height and width in pixels.
        most: Things in an image, from 1 up to this.
        positives: Phrases that name something.
        negatives: Phrases that name nothing.
        ask: "phrases"; "shapes" asks for each shape in each image, as a detection dataset does;
            "anything" has one query without phrase for all things, as SA-1B does.
    """

    def __init__(
        self,
        length: int,
        split: str = "train",
        seed: int = 0,
        side: int = 224,
        most: int = 12,
        positives: int = 2,
        negatives: int = 2,
        ask: str = "phrases",
    ):
        check_choice("split", split, SPLITS)
        check_choice("ask", ask, ("phrases", "shapes", "anything"))
        check_most(most, 1)
        self.length, self.split, self.seed, self.side = length, split, seed, side
        self.most, self.positives, self.negatives, self.ask = most, positives, negatives, ask

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ImageSample:
        generator = generator_of(self.seed, self.split, index, self.length)
        image = background(generator, self.side)
        things, outlines, labels = place_things(generator, self.side, self.most)
        for thing, outline in zip(things, outlines, strict=True):
            paint(image, thing, outline)
        pixels = to_pixels(image, generator)
        # Numbers are unique in the dataset, as those of COCO are.
        instances = [
            instance_of(labels == number, index * MOST_THINGS + number)
            for number in range(1, len(things) + 1)
        ]
        sample = ImageSample(
            source="synthetic",
            source_id=index,
            file_name=f"{self.split}_{index:06d}.jpg",
            size=(self.side, self.side),
            image=pixels,
        )
        for phrase, meaning, number in self.questions(things, generator):
            named = [
                instance
                for thing, instance in zip(things, instances, strict=True)
                if meets(thing, meaning)
            ]
            sample.queries.append(Query(phrase, named, source_id=number))
        return sample

    def questions(
        self, things: Sequence[Thing], generator: np.random.Generator
    ) -> list[tuple[str | None, Meaning, int]]:
        """Phrase, what it means, and number of each query."""
        if self.ask == "anything":
            return [(None, (), 0)]
        if self.ask == "shapes":
            return [(name, (("shape", name),), number) for number, name in CATEGORIES.items()]
        meanings = choose_positives(things, self.positives, generator)
        meanings += choose_negatives(things, self.negatives, generator)
        return [
            (to_words(meaning, generator), meaning, number)
            for number, meaning in enumerate(meanings)
        ]


class Clips(Dataset):
    """Videos of moving things: drifting, hiding each other, leaving and coming back, crossing.

    Args:
        length: Number of clips.
        split: "train", "val" or "test".
        seed: Another one makes another world of the same kind.
        side: Height and width in pixels.
        num_frames: Of each clip.
        most: Things in a clip, from 2 up to this.
        annotate_every: 4 leaves three frames between those with masks, as SA-V does.
        positives: Phrases that name something.
        negatives: Phrases that name nothing.
        ask: "phrases", or "anything" for one query without phrase for all things.
    """

    def __init__(
        self,
        length: int,
        split: str = "train",
        seed: int = 0,
        side: int = 224,
        num_frames: int = 16,
        most: int = 5,
        annotate_every: int = 1,
        positives: int = 2,
        negatives: int = 1,
        ask: str = "anything",
    ):
        check_choice("split", split, SPLITS)
        check_choice("ask", ask, ("phrases", "anything"))
        check_most(most, 2)
        self.length, self.split, self.seed, self.side = length, split, seed, side
        self.num_frames, self.most, self.annotate_every = num_frames, most, annotate_every
        self.positives, self.negatives, self.ask = positives, negatives, ask

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ClipSample:
        # Clips are no continuation of the scenes with the same seed.
        generator = generator_of(self.seed, self.split, index, self.length, kind=1)
        ground = background(generator, self.side)
        paths = choose_paths(
            [new_thing(generator) for _ in range(generator.integers(2, self.most + 1))], generator
        )
        masklets = [
            Masklet({}, source_id=number + 1, details={"motion": path.kind})
            for number, path in enumerate(paths)
        ]
        frames = []
        for frame in range(self.num_frames):
            image = ground.copy()
            labels = np.zeros((self.side, self.side), dtype=np.uint8)
            for number, path in enumerate(paths):
                thing = place_at(path, frame / max(1, self.num_frames - 1))
                outline = silhouette(thing, self.side)
                if outline is not None:
                    paint(image, thing, outline)
                    labels[outline.window][outline.inside] = number + 1
            frames.append(to_pixels(image, generator))
            if frame % self.annotate_every == 0:
                for masklet in masklets:
                    mask = labels == masklet.source_id
                    if mask.any():
                        masklet.rles[frame] = encode(mask)
        sample = ClipSample(
            source="synthetic",
            source_id=f"{self.split}_{index:06d}",
            size=(self.side, self.side),
            num_frames=self.num_frames,
            annotated_frames=list(range(0, self.num_frames, self.annotate_every)),
            video=PicturesVideo(frames, f"Clip {index} of {self.split}"),
            frame_indices=list(range(self.num_frames)),
            frames=frames,
            fps=24.0,
        )
        things = [path.thing for path in paths]
        # What the image never shows is not there to be named.
        shown = [bool(masklet.rles) for masklet in masklets]
        seen = [thing for thing, is_shown in zip(things, shown, strict=True) if is_shown]
        meanings: list[Meaning] = [()]
        if self.ask == "phrases":
            meanings = choose_positives(seen, self.positives, generator)
            meanings += choose_negatives(seen, self.negatives, generator)
        for number, meaning in enumerate(meanings):
            named = [
                masklet
                for thing, masklet in zip(things, masklets, strict=True)
                if masklet.rles and meets(thing, meaning)
            ]
            phrase = to_words(meaning, generator) if meaning else None
            sample.queries.append(ClipQuery(phrase, named, source_id=number))
        return sample


def vocabulary() -> list[str]:
    """Every word that the phrases are made of."""
    words = {*COLOURS, *PATTERNS, *SHAPES, "small", "large", "object"}
    for synonyms in SYNONYMS.values():
        words |= {word for synonym in synonyms for word in synonym.split()}
    return sorted(words)


def new_thing(generator: np.random.Generator, like: Thing | None = None) -> Thing:
    """A thing at a random place, which may share some words with another."""
    keep = generator.random(3) < 0.55 if like is not None else (False, False, False)
    shape = choose(generator, tuple(SHAPES)) if not keep[0] else like.shape
    colour = choose(generator, tuple(COLOURS)) if not keep[1] else like.colour
    pattern = choose(generator, PATTERNS) if not keep[2] else like.pattern
    size = choose(generator, ("small", "medium", "medium", "large"))
    numbers = generator.uniform(-1, 1, 10)
    least, most = SIZES[size]
    tint = np.clip(np.asarray(COLOURS[colour]) + 12 * numbers[:3], 0, 255)
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
        tint=(float(tint[0]), float(tint[1]), float(tint[2])),
    )


def place_things(
    generator: np.random.Generator, side: int, most: int
) -> tuple[list[Thing], list[Silhouette], np.ndarray]:
    """Things from back to front, where each is, and the number (from 1) of the foremost anywhere.

    A thing that would hide too much of another, or be hidden by the border, is not placed.
    """
    wanted = int(generator.integers(1, most + 1))
    things: list[Thing] = []
    outlines: list[Silhouette] = []
    labels = np.zeros((side, side), dtype=np.uint8)
    areas: list[int] = []
    visible: list[int] = []
    for _ in range(4 * wanted):
        like = things[generator.integers(len(things))] if things else None
        thing = new_thing(generator, like)
        outline = silhouette(thing, side)
        if outline is None:
            continue
        own = int(np.count_nonzero(outline.inside))
        part = labels[outline.window]
        hidden = np.bincount(part[outline.inside], minlength=len(things) + 1)[1:]
        left = [count - int(lost) for count, lost in zip(visible, hidden, strict=True)]
        if own < LEAST_VISIBLE * outline.area or any(
            count < LEAST_VISIBLE * area for count, area in zip(left, areas, strict=True)
        ):
            continue
        things.append(thing)
        outlines.append(outline)
        part[outline.inside] = len(things)
        areas.append(outline.area)
        visible = [*left, own]
        if len(things) == wanted:
            break
    return things, outlines, labels


def instance_of(mask: np.ndarray, number: int) -> Instance:
    """What a dataset would say of a thing with this mask."""
    rle = encode(mask)
    box = rle_box(rle)
    left, top, right, bottom = (int(edge) for edge in box)
    x, y = point_inside(mask[top:bottom, left:right])
    return Instance(box, rle, [(x + left, y + top)], source_id=number)


def encode(mask: np.ndarray):
    """Run lengths of a boolean mask."""
    return to_text(import_mask_api().encode(np.asfortranarray(mask.view(np.uint8))))


def to_pixels(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """8-bit pixels with the noise of a camera."""
    noise = generator.integers(0, 256, image.shape[:2], dtype=np.uint8)
    image += (noise.astype(np.float32) * (8 / 255) - 4)[..., None]
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def generator_of(
    seed: int, split: str, index: int, length: int, kind: int = 0
) -> np.random.Generator:
    """Random numbers of one sample of one split."""
    if not 0 <= index < length:
        raise IndexError(f"There is no sample {index} among {length}.")
    return np.random.default_rng([seed, kind, SPLITS.index(split), index])


def choose(generator: np.random.Generator, options: Sequence[str]) -> str:
    """One of them."""
    return options[int(generator.integers(len(options)))]


def check_choice(name: str, value: str, options: Sequence[str]) -> None:
    """Raise for a value that is none of the options."""
    if value not in options:
        raise ValueError(f"{name} is one of {list(options)}, not {value!r}.")


def check_most(most: int, least: int) -> None:
    """Raise for a number of things that cannot be drawn."""
    if not least <= most <= MOST_THINGS:
        raise ValueError(f"most is from {least} to {MOST_THINGS}, not {most}.")
