"""How long each score takes on this machine's processor, at the sizes of the real data sets.

    python examples/benchmark_scores.py --seconds 2

Masks are ellipses; predictions are moved by some pixels. One thread.
"""

import argparse
from collections.abc import Callable
from functools import partial
from time import process_time

import numpy as np
import torch

from efficientsam3_hf.evaluation import (
    bootstrap,
    concept,
    detection,
    features,
    mask_iou,
    video_concept,
    video_objects,
)
from efficientsam3_hf.evaluation.overlaps import area, to_rle
from efficientsam3_hf.evaluation.units import Units, stack


def ellipse(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A mask of about a tenth of the picture's sides."""
    height, width = size
    y, x = np.ogrid[:height, :width]
    centre, radius = rng.random(2) * size, (0.05 + 0.05 * rng.random(2)) * size
    return ((y - centre[0]) / radius[0]) ** 2 + ((x - centre[1]) / radius[1]) ** 2 <= 1


def moved(mask: np.ndarray) -> np.ndarray:
    """The mask some pixels off."""
    return np.roll(mask, (2, 3), axis=(0, 1))


def rate(run: Callable[[], object], seconds: float) -> float:
    """Calls in a second of processor time, after one that does not count."""
    run()
    calls, start = 0, process_time()
    while process_time() - start < seconds:
        run()
        calls += 1
    return calls / (process_time() - start)


def pairs(rng: np.random.Generator, count: int) -> Units:
    """Counts of as many pairs of image and phrase as asked for."""
    found = np.sort(rng.integers(0, 4, (count, 10)), axis=1)[:, ::-1]
    return {
        "found": found,
        "wrong": 4 - found,
        "missed": 4 - found,
        "has_truth": rng.random(count) < 0.3,
        "has_prediction": rng.random(count) < 0.3,
        "is_counted": np.ones(count, dtype=bool),
    }


def detections(rng: np.random.Generator, size: tuple[int, int]) -> tuple[dict, list[dict]]:
    """One image with 7 objects and 100 predictions."""
    truth = [ellipse(rng, size) for _ in range(7)]
    entries = [
        {"id": i + 1, "image_id": 0, "category_id": 1, "segmentation": to_rle(m), "area": area(m)}
        for i, m in enumerate(truth)
    ]
    image = {"id": 0, "height": size[0], "width": size[1]}
    masks = [moved(m) for m in truth] + [ellipse(rng, size) for _ in range(93)]
    predictions = [
        {"image_id": 0, "category_id": 1, "segmentation": to_rle(mask), "score": score}
        for mask, score in zip(masks, rng.random(100).tolist(), strict=True)
    ]
    return {"images": [image], "annotations": entries, "categories": [{"id": 1}]}, predictions


def many_detections(rng: np.random.Generator, images: int) -> detection.Detections:
    """Matches of boxes in images with 7 objects of 10 classes, and 70 predictions."""
    truth = {"images": [], "annotations": [], "categories": [{"id": i} for i in range(10)]}
    predictions = []
    for image in range(images):
        truth["images"].append({"id": image, "height": 480, "width": 640})
        for number in range(70):
            box = [*(300 * rng.random(2)).tolist(), *(20 + 100 * rng.random(2)).tolist()]
            shared = {"image_id": image, "category_id": int(rng.integers(10))}
            if number < 7:
                sizes = {"id": len(truth["annotations"]) + 1, "area": box[2] * box[3]}
                truth["annotations"].append({**shared, **sizes, "bbox": box})
            predictions.append({**shared, "bbox": box, "score": float(rng.random())})
    return detection.score_coco(truth, predictions, "bbox")


def cases(small: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    rng = np.random.default_rng(0)
    photo, film = ((48, 64), (48, 85)) if small else ((480, 640), (480, 854))
    masks = [ellipse(rng, photo) for _ in range(5)]
    encoded = [to_rle(mask) for mask in masks]
    predicted = [to_rle(moved(mask)) for mask in masks]
    frames = [ellipse(rng, film) for _ in range(30)]
    tracks = [[to_rle(mask) for mask in frames] for _ in range(5)]
    units = pairs(rng, 300 if small else 30000)
    truth, results = detections(rng, photo)
    matched = many_detections(rng, 20 if small else 500)
    tokens = torch.randn(72 * 72, 256)
    return {
        "mask IoU, one instance": lambda: mask_iou.mask_iou(moved(masks[0]), masks[0]),
        "next click": lambda: mask_iou.next_click(moved(masks[0]), masks[0]),
        "cgF1, a pair with 5 instances": lambda: concept.score_pair(predicted, [0.9] * 5, encoded),
        "AP, an image with 100 predictions": lambda: detection.score_coco(truth, results),
        f"bootstrap of AP, {len(matched.image_ids)} images with 10 classes, 10 draws": lambda: (
            bootstrap.intervals(
                partial(detection.summarize, matched), len(matched.image_ids), samples=10
            )
        ),
        "J and F, a frame of an object": lambda: (
            video_objects.region_similarity(moved(frames[0]), frames[0]),
            video_objects.outline_accuracy(moved(frames[0]), frames[0]),
        ),
        "video cgF1 and pHOTA, 5 masklets of 30 frames": lambda: video_concept.score_pair(
            tracks, [0.9] * 5, tracks
        ),
        "features, a map of 72 x 72 x 256": lambda: stack([features.score_tokens(tokens, tokens)]),
        f"bootstrap of cgF1, {len(units['found'])} pairs, 100 draws": lambda: bootstrap.intervals(
            partial(concept.summarize, units), len(units["found"]), samples=100
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print a table of rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each score")
    parser.add_argument("--small", action="store_true", help="tiny pictures, to try the script")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| score | in a second | ms each |\n| --- | ---: | ---: |")
    for name, run in cases(options.small).items():
        speed = rate(run, options.seconds)
        print(f"| {name} | {speed:.4g} | {1000 / speed:.3g} |")


if __name__ == "__main__":
    main()
