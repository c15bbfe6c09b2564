"""Samples that each reader gives in a second, on one core.

    python examples/benchmark_readers.py

Pictures and masks are synthetic. Their sizes are as in the real datasets.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from efficientsam3_hf import EfficientSam3ImageProcessor, EfficientSam3Processor
from efficientsam3_hf.data.augmentations import Augmentations
from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.own_folder import OwnImages, OwnVideos
from efficientsam3_hf.data.phrases import (
    PhraseList,
    RecapCaptions,
    TextSample,
    write_captions,
    write_phrases,
)
from efficientsam3_hf.data.refcoco import RefCoco, write_refcoco
from efficientsam3_hf.data.sa1b import Sa1b, write_sa1b
from efficientsam3_hf.data.samples import ImageSample
from efficientsam3_hf.data.sav import write_sav_videos
from efficientsam3_hf.data.synthetic import Clips, Scenes
from efficientsam3_hf.data.synthetic_world import World
from efficientsam3_hf.data.synthetic_writer import write_synthetic
from efficientsam3_hf.tokenizer import build_tokenizer

# Side in pixels: that of a square with about as many as the real pictures have.
IMAGES = {"coco": 560, "lvis": 560, "roboflow": 560, "saco": 1000}
SA1B_SIDE, SA1B_MASKS = 1840, 100
VIDEOS = {
    "davis2017": 640,
    "mose": 960,
    "lvos": 960,
    "youtube_vos": 960,
    "sav_folders": 960,
    "sav_videos": 960,
    "sav_tars": 960,
    "saco_video": 960,
}
CUT = 8

# Of few shapes and colours, as a miniature model is trained on.
SMALL_WORLD = World(
    shapes=("circle", "square", "triangle", "star", "heart", "cross"),
    colours=("red", "yellow", "green", "blue", "purple", "white"),
    patterns=("plain",),
    sizes={"medium": (0.09, 0.2)},
    forms=(("shape",), ("colour",), ("colour", "shape")),
    synonyms=0.0,
)


def rate(samples: Iterable, seconds: float) -> float:
    """Samples in a second of processor time; they are gone through again until it has passed."""
    next(iter(samples))  # makes what is made once
    done, start = 0, time.process_time()
    while True:
        for _ in samples:
            done += 1
            if time.process_time() - start > seconds:
                return done / (time.process_time() - start)


class Drawn:
    """Synthetic samples one after another, each drawn anew."""

    def __init__(self, dataset: Scenes | Clips):
        self.dataset = dataset

    def __iter__(self) -> Iterator:
        return (self.dataset[index] for index in range(len(self.dataset)))


class Batches:
    """Eight samples at a time, as a model of their size takes them."""

    def __init__(self, dataset: Scenes):
        self.dataset = dataset
        size = {"height": dataset.side, "width": dataset.side}
        processor = EfficientSam3Processor(
            EfficientSam3ImageProcessor(size=size), build_tokenizer(16)
        )
        self.collate = ImageCollator(processor, mask_size=(dataset.side // 3, dataset.side // 3))

    def __iter__(self) -> Iterator:
        for start in range(0, len(self.dataset) - 8, 8):
            yield self.collate([self.dataset[index] for index in range(start, start + 8)])


def refcoco_row(number: int) -> dict:
    """A row with a picture of the usual size, an object and three expressions."""
    picture, side = io.BytesIO(), IMAGES["coco"]
    pixels = np.asarray(Scenes(number + 1, side=side)[number].image)
    Image.fromarray(pixels).save(picture, "JPEG", quality=95)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    corners = side * (0.5 + 0.2 * np.stack([np.cos(angles), np.sin(angles)], axis=1))
    return {
        "question_id": str(number),
        "image": {"bytes": picture.getvalue(), "path": None},
        "answer": ["the left one", "red box", "box on the left"],
        "segmentation": corners.ravel().tolist(),
        "bbox": [0.3 * side, 0.3 * side, 0.4 * side, 0.4 * side],
        "iscrowd": 0,
        "file_name": f"{number}.jpg",
    }


def crowded(scenes: Scenes) -> Iterator[ImageSample]:
    """Scenes with as many masks as SA-1B has: their own, again and again."""
    for scene in Drawn(scenes):
        (query,) = scene.queries
        repeats = -(-SA1B_MASKS // len(query.instances))
        query.instances = (query.instances * repeats)[:SA1B_MASKS]
        yield scene


def measure(images: int, clips: int, seconds: float) -> Iterator[tuple[str, float, str]]:
    """Name, rate and unit of each row."""
    yield "synthetic scenes, 224²", rate(Drawn(Scenes(10_000)), seconds), "images"
    small = Scenes(10_000, side=168, most=8, world=SMALL_WORLD)
    yield "synthetic scenes of a small world, 168²", rate(Drawn(small), seconds), "images"
    yield "... as batches: pixels, tokens, masks", 8 * rate(Batches(small), seconds), "images"
    drawn = Drawn(Clips(10_000, num_frames=16))
    yield "synthetic clips, 224²", 16 * rate(drawn, seconds), "frames"
    with tempfile.TemporaryDirectory() as folder:
        for form, side in IMAGES.items():
            reader = write_synthetic(Path(folder, form), form, "val", images, side=side)
            yield f"{form}, {side}²", rate(load(reader, on_error="raise"), seconds), "images"
            reader.pixels = False
            samples = load(reader, on_error="raise")
            yield f"{form}, annotations alone", rate(samples, seconds), "images"
        yield from measure_sa1b(Path(folder, "sa1b"), images, seconds)
        path = Path(folder, "refcoco")
        write_refcoco(map(refcoco_row, range(images)), path)
        yield (
            f"refcoco, {IMAGES['coco']}²",
            rate(load(RefCoco(str(path)), on_error="raise"), seconds),
            "images",
        )
        samples = load(OwnImages(str(Path(folder, "saco", "images")), ["a box"]), on_error="raise")
        yield f"own pictures, {IMAGES['saco']}²", rate(samples, seconds), "images"
        for form, side in VIDEOS.items():
            path = Path(folder, form)
            reader = write_synthetic(path, form, "val", clips, side=side, num_frames=24)
            reader.cut = Cut(CUT)
            samples = load(reader, on_error="raise")
            yield f"{form}, {side}²", CUT * rate(samples, seconds), f"frames in cuts of {CUT}"
        path = Path(folder, "own")
        side = VIDEOS["sav_videos"]
        videos = Clips(clips, side=side, num_frames=24, annotate_every=4)
        write_sav_videos(Drawn(videos), path)
        samples = load(OwnVideos(str(path), ["a box"], cut=Cut(CUT)), on_error="raise")
        yield f"own videos, {side}²", CUT * rate(samples, seconds), f"frames in cuts of {CUT}"
        path = Path(folder, "captions")
        texts = [
            TextSample(f"A picture of {number} dogs.", str(number)) for number in range(50_000)
        ]
        write_captions(texts, path, per_shard=10_000)
        samples = load(RecapCaptions(str(path)), streaming=True)
        yield "captions", rate(samples, seconds), "texts, streamed"
        write_phrases((each.text for each in texts), Path(folder, "phrases.txt"))
        yield "phrases", rate(load(PhraseList(f"{folder}/phrases.txt")), seconds), "texts"


def measure_sa1b(path: Path, images: int, seconds: float) -> Iterator[tuple[str, float, str]]:
    """Rows of SA-1B, whose pictures are large and whose masks are many."""
    write_sa1b(crowded(Scenes(images, side=SA1B_SIDE, ask="anything")), path, per_tar=images)
    for what, options in {
        f"{SA1B_SIDE}², {SA1B_MASKS} masks": {},
        "pictures alone": {"annotations": False},
        "pictures alone, at half of their size": {
            "annotations": False,
            "least_size": (SA1B_SIDE // 2, SA1B_SIDE // 2),
        },
        "annotations alone": {"pixels": False},
    }.items():
        samples = load(Sa1b(str(path), **options), on_error="raise")
        yield f"sa1b, {what}", rate(samples, seconds), "images"
    sample = load(Sa1b(str(path), pixels=False), on_error="raise")[0]
    (query,) = sample.queries
    collate, augment = ImageCollator(lambda *_, **__: {}), Augmentations()
    labels = (collate.label(sample, 0, query) for _ in count())
    yield f"sa1b, labels of {SA1B_MASKS} masks at 288²", rate(labels, seconds), "images"
    augmented = (augment(sample) for _ in count())
    yield f"sa1b, {SA1B_MASKS} masks scaled", rate(augmented, seconds), "images"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="of each form")
    parser.add_argument("--clips", type=int, default=4, help="of each form, with 24 frames")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    options = parser.parse_args(arguments)
    print("| what | a second | |\n| --- | ---: | --- |")
    for name, value, unit in measure(options.images, options.clips, options.seconds):
        print(f"| {name} | {value:,.0f} | {unit} |", flush=True)


if __name__ == "__main__":
    main()
