"""A small world to learn and test in: scenes and clips whose every pixel is known.

    scenes = Scenes(1000, split="train", seed=0)
    scenes[7].queries[0].phrase, scenes[7].queries[0].instances[0].mask

Sample `index` of a split is the same each time it is made, and splits share no random numbers.
"""

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from .masks_rle import Rle, encode_window, point_inside, rle_box
from .samples import ClipQuery, ClipSample, ImageSample, Instance, Masklet, Query
from .synthetic_motion import EVENTS, choose_paths, place_at
from .synthetic_phrases import Meaning, choose_meanings, meets, to_words
from .synthetic_shapes import SHAPES, Silhouette, Thing, background, paint, silhouette
from .synthetic_world import World
from .video import PicturesVideo

SPLITS = ("train", "val", "test")

MOST_THINGS = 255  # in an image, since their numbers have 8 bits

# As categories of COCO's files, for which each category is asked of each image.
CATEGORIES = dict(enumerate(SHAPES, start=1))


class Scenes(Dataset):
    """Images of things on textured grounds, which may overlap, with phrases.

    Args:
        length: Number of images.
        split: "train", "val" or "test".
        seed: Another one makes another world of the same kind.
        side: Height and width in pixels.
        least, most: Things in an image; fewer where no more find room.
        positives: Phrases that name something.
        negatives: Phrases that name nothing.
        world: What things there are and how they are named.
        ask: "phrases"; "shapes" asks for each shape in each image, as a detection dataset does;
            "anything" has one query without phrase for all things, as SA-1B does.
    """

    def __init__(
        self,
        length: int,
        split: str = "train",
        seed: int = 0,
        side: int = 224,
        least: int = 1,
        most: int = 12,
        positives: int = 2,
        negatives: int = 2,
        world: World | None = None,
        ask: str = "phrases",
    ):
        check_choice("split", split, SPLITS)
        check_choice("ask", ask, ("phrases", "shapes", "anything"))
        check_numbers(least, most, 1)
        self.length, self.split, self.seed, self.side = length, split, seed, side
        self.least, self.most, self.world = least, most, world or World()
        self.positives, self.negatives, self.ask = positives, negatives, ask

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> ImageSample:
        generator = generator_of(self.seed, self.split, index, self.length)
        image = background(generator, self.side)
        wanted = int(generator.integers(self.least, self.most + 1))
        things, outlines, labels = place_things(generator, self.side, wanted, self.world)
        for thing, outline in zip(things, outlines, strict=True):
            paint(image, thing, outline)
        pixels = to_pixels(image, generator)
        # Numbers are unique in the dataset, as those of COCO are.
        instances = [
            instance_of(labels, outline, number, index * MOST_THINGS + number)
            for number, outline in enumerate(outlines, start=1)
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
            return [
                (name, (("shape", name),), number)
                for number, name in CATEGORIES.items()
                if name in self.world.shapes
            ]
        counts = (self.positives, self.negatives)
        meanings = choose_meanings(things, *counts, self.world, generator)
        return [
            (to_words(meaning, generator, self.world.synonyms), meaning, number)
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
        least, most: Things in a clip, 2 or more.
        annotate_every: 4 leaves three frames between those with masks, as SA-V does.
        positives: Phrases that name something.
        negatives: Phrases that name nothing.
        world: What things there are and how they are named.
        ask: "phrases", or "anything" for one query without phrase for all things.
        spans: Least and greatest share of its motion that a clip shows, from anywhere in it: in a
            smaller one things move less from frame to frame.
        events: What happens: in each clip one of these, of "leave", "cross", "hide" and "drift".
            One that is named twice is twice as likely.
    """

    def __init__(
        self,
        length: int,
        split: str = "train",
        seed: int = 0,
        side: int = 224,
        num_frames: int = 16,
        least: int = 2,
        most: int = 5,
        annotate_every: int = 1,
        positives: int = 2,
        negatives: int = 1,
        world: World | None = None,
        ask: str = "anything",
        spans: tuple[float, float] = (1.0, 1.0),
        events: Sequence[str] = EVENTS,
    ):
        check_choice("split", split, SPLITS)
        if not events:
            raise ValueError("events must name at least one thing that happens.")
        for event in events:
            check_choice("events", event, EVENTS)
        check_choice("ask", ask, ("phrases", "anything"))
        if not 0 < spans[0] <= spans[1] <= 1:
            raise ValueError(f"spans={spans} must be two shares of a motion, the least first.")
        check_numbers(least, most, 2)
        self.length, self.split, self.seed, self.side = length, split, seed, side
        self.least, self.most, self.world = least, most, world or World()
        self.num_frames, self.annotate_every = num_frames, annotate_every
        self.positives, self.negatives, self.ask = positives, negatives, ask
        self.spans, self.events = spans, tuple(events)

    def __len__(self) -> int:
        return self.length

    def times(self, generator: np.random.Generator) -> np.ndarray:
        """Of each frame, from 0 to 1 through the motion."""
        if self.spans[0] == 1:
            first, last = 0.0, 1.0
        else:
            span = generator.uniform(*self.spans)
            first = generator.uniform(0, 1 - span)
            last = first + span
        return np.linspace(first, last, self.num_frames)

    def __getitem__(self, index: int) -> ClipSample:
        # Clips are no continuation of the scenes with the same seed.
        generator = generator_of(self.seed, self.split, index, self.length, kind=1)
        ground = background(generator, self.side)
        wanted = int(generator.integers(self.least, self.most + 1))
        things = [self.world.new_thing(generator) for _ in range(wanted)]
        paths = choose_paths(things, self.world, generator, self.events)
        masklets = [
            Masklet({}, source_id=number + 1, details={"motion": path.kind})
            for number, path in enumerate(paths)
        ]
        frames = []
        for frame, time in enumerate(self.times(generator)):
            image = ground.copy()
            labels = np.zeros((self.side, self.side), dtype=np.uint8)
            outlines = {}
            for number, path in enumerate(paths, start=1):
                thing = place_at(path, float(time))
                outline = silhouette(thing, self.side)
                if outline is not None:
                    paint(image, thing, outline)
                    labels[outline.window][outline.inside] = number
                    outlines[number] = outline
            frames.append(to_pixels(image, generator))
            if frame % self.annotate_every:
                continue
            for number, outline in outlines.items():
                seen = labels[outline.window] == number
                if seen.any():
                    masklets[number - 1].rles[frame] = encode(seen, outline, self.side)
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
            counts = (self.positives, self.negatives)
            meanings = choose_meanings(seen, *counts, self.world, generator)
        for number, meaning in enumerate(meanings):
            named = [
                masklet
                for thing, masklet in zip(things, masklets, strict=True)
                if masklet.rles and meets(thing, meaning)
            ]
            phrase = to_words(meaning, generator, self.world.synonyms) if meaning else None
            sample.queries.append(ClipQuery(phrase, named, source_id=number))
        return sample


def place_things(
    generator: np.random.Generator, side: int, wanted: int, world: World
) -> tuple[list[Thing], list[Silhouette], np.ndarray]:
    """Things from back to front, where each is, and the number (from 1) of the foremost anywhere.

    A thing that would hide too much of another, or be hidden by the border, is not placed.
    """
    things: list[Thing] = []
    outlines: list[Silhouette] = []
    labels = np.zeros((side, side), dtype=np.uint8)
    areas: list[int] = []
    visible: list[int] = []
    for _ in range(8 + 4 * wanted):
        like = things[generator.integers(len(things))] if things else None
        thing = world.new_thing(generator, like)
        outline = silhouette(thing, side)
        if outline is None:
            continue
        own = int(np.count_nonzero(outline.inside))
        part = labels[outline.window]
        hidden = np.bincount(part[outline.inside], minlength=len(things) + 1)[1:]
        left = [count - int(lost) for count, lost in zip(visible, hidden, strict=True)]
        if own < max(1, world.least_visible * outline.area) or any(
            count < max(1, world.least_visible * area)
            for count, area in zip(left, areas, strict=True)
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


def instance_of(labels: np.ndarray, outline: Silhouette, number: int, source_id: int) -> Instance:
    """What a dataset would say of the thing with this number."""
    seen = labels[outline.window] == number
    rle = encode(seen, outline, len(labels))
    x, y = point_inside(seen)
    point = (x + outline.window[1].start, y + outline.window[0].start)
    return Instance(rle_box(rle), rle, [point], source_id=source_id)


def encode(seen: np.ndarray, outline: Silhouette, side: int) -> Rle:
    """Run lengths of what is seen of a thing within its window."""
    rows, columns = outline.window
    return encode_window(seen, (rows.start, columns.start), (side, side))


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


def check_choice(name: str, value: str, options: Sequence[str]) -> None:
    """Raise for a value that is none of the options."""
    if value not in options:
        raise ValueError(f"{name} is one of {list(options)}, not {value!r}.")


def check_numbers(least: int, most: int, needed: int) -> None:
    """Raise for numbers of things that cannot be drawn."""
    if not needed <= least <= most <= MOST_THINGS:
        raise ValueError(
            f"least and most ascend from {needed} to {MOST_THINGS}; {least} and {most} do not."
        )
