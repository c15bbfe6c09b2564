"""Samples that each reader gives in a second, on one core.

    python examples/benchmark_readers.py

Pictures and masks are synthetic. Their sizes are as in the real datasets.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.phrases import RecapCaptions, TextSample, write_captions
from efficientsam3_hf.data.sa1b import Sa1b, write_sa1b
from efficientsam3_hf.data.samples import ImageSample
from efficientsam3_hf.data.synthetic import Clips, Scenes
from efficientsam3_hf.data.synthetic_writer import write_synthetic

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
    "saco_video": 960,
}
CUT = 8


def rate(samples: Iterable, seconds: float) -> float:
    """Samples in a second of processor time; they are gone through again until it has passed."""
    next(iter(samples))  # makes what is made once
    count, start = 0, time.process_time()
    while True:
        for _ in samples:
            count += 1
            if time.process_time() - start > seconds:
                return count / (time.process_time() - start)


class Drawn:
    """Synthetic samples one after another, each drawn anew."""

    def __init__(self, dataset: Scenes | Clips):
        self.dataset = dataset

    def __iter__(self) -> Iterator:
        return (self.dataset[index] for index in range(len(self.dataset)))


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
        for form, side in VIDEOS.items():
            path = Path(folder, form)
            reader = write_synthetic(path, form, "val", clips, side=side, num_frames=24)
            reader.cut = Cut(CUT)
            samples = load(reader, on_error="raise")
            yield f"{form}, {side}²", CUT * rate(samples, seconds), f"frames in cuts of {CUT}"
        path = Path(folder, "captions")
        texts = [
            TextSample(f"A picture of {number} dogs.", str(number)) for number in range(50_000)
        ]
        write_captions(texts, path, per_shard=10_000)
        samples = load(RecapCaptions(str(path)), streaming=True)
        yield "captions", rate(samples, seconds), "texts, streamed"


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
