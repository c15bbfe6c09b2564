"""Tasks on images: boxes, clicks, concepts, detection with a phrase for each class."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.files import read_json
from ..data.masks_rle import Rle, to_rle
from ..data.samples import ImageSample, Instance
from ..evaluation import concept, detection, mask_iou, units
from .images import Instances, PointedImages, find_concepts, pixels_of
from .loading import Loaded
from .subsets import Subset
from .tasks import Outcome, Scores, Task

WITH_INSTANCES = ("coco", "lvis", "roboflow", "sa1b")


class ObjectTask(Task):
    """mIoU of single objects that are pointed at."""

    job = "objects"
    formats = WITH_INSTANCES
    kind = "mask-generation"

    def summarize(self, table: units.Units, weights: np.ndarray) -> Mapping[str, float]:
        return mask_iou.summarize(table, weights)


class BoxTask(ObjectTask):
    """mIoU of single objects under their own boxes: the protocol behind the released numbers."""

    name = "coco-box"
    metrics = ("mIoU",)
    submission = "masks.json"

    def run(
        self,
        loaded: Loaded,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[ImageSample],
        folder: Path,
    ) -> list[Outcome]:
        images = PointedImages.of(loaded, pixels_of(samples))
        outcomes = []
        for index, (key, sample) in enumerate(zip(keys, samples, strict=True)):
            outcome = Outcome(key)
            objects = objects_of(sample)
            boxes = [promptable(each.box_xyxy, sample.size) for _, each in objects]
            masks = images.by_boxes(index, boxes)
            for (category, instance), mask in zip(objects, masks, strict=True):
                truth = instance.mask
                outcome.records.append(mask_iou.score_instance([mask], truth))
                prediction = {"annotation_id": instance.source_id, "score": 1.0}
                outcome.predictions.append(
                    {**coco_result(sample.source_id, category, mask), **prediction}
                )
            outcomes.append(outcome)
        return outcomes


class ClickTask(ObjectTask):
    """mIoU of single objects after 1, 2, ... clicks, as SAM and SAM 2 choose them."""

    name = "clicks"
    options = ("batch_size", "clicks")
    clicks = 5

    @property
    def metrics(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        rounds = sorted({1, min(3, self.clicks), self.clicks})
        return ("mIoU",) if self.clicks == 1 else tuple(f"mIoU@{number}" for number in rounds)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "clicks": self.clicks}

    def run(
        self,
        loaded: Loaded,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[ImageSample],
        folder: Path,
    ) -> list[Outcome]:
        images = PointedImages.of(loaded, pixels_of(samples))
        outcomes = []
        for index, (key, sample) in enumerate(zip(keys, samples, strict=True)):
            records = []
            for _, instance in objects_of(sample):
                truth = instance.mask
                if truth.any():  # there is no pixel to click at otherwise
                    records.append(mask_iou.click_rounds(images.clicker(index), truth, self.clicks))
            outcomes.append(Outcome(key, records))
        return outcomes


class ConceptTask(Task):
    """cgF1 of SA-Co Gold and Silver: which phrases are in an image, and all their instances."""

    name = "concept"
    formats = ("saco",)
    metrics = ("cgF1", "IL_MCC", "pmF1")
    kind = "promptable-concept-segmentation"
    submission = "predictions.json"

    def run(
        self,
        loaded: Loaded,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[ImageSample],
        folder: Path,
    ) -> list[Outcome]:
        annotators = truth_of_pairs(tuple(subset.truth))
        found = find_concepts(
            loaded,
            pixels_of(samples),
            [[query.phrase or "" for query in sample.queries] for sample in samples],
            concept.SCORE_THRESHOLD,
        )
        outcomes = []
        for key, sample, of_queries in zip(keys, samples, found, strict=True):
            outcome = Outcome(key)
            for query, instances in zip(sample.queries, of_queries, strict=True):
                predictions = [
                    {**coco_result(query.source_id, 1, mask), "score": float(score)}
                    for mask, score in zip(instances.masks, instances.scores, strict=True)
                ]
                outcome.predictions += predictions
                truths = [truth[query.source_id] for truth in annotators]
                if not all(each["is_exhaustive"] for each in truths):
                    continue
                of_annotators = [
                    concept.score_pair(
                        [each["segmentation"] for each in predictions],
                        [each["score"] for each in predictions],
                        [to_rle(mask, sample.size) for mask in each["masks"]],
                        each["crowd"],
                    )
                    for each in truths
                ]
                outcome.records.append(plain(concept.best_annotator(of_annotators)))
            outcomes.append(outcome)
        return outcomes

    def summarize(self, table: units.Units, weights: np.ndarray) -> Mapping[str, float]:
        return concept.summarize(table, weights)


class DetectionTask(Task):
    """AP of COCO and LVIS, with the name of each class as a phrase."""

    name = "detection"
    formats = ("coco", "lvis", "roboflow")
    metrics = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    kind = "zero-shot-object-detection"
    submission = "predictions.json"
    draws = 100  # each draws the curves of all classes anew
    most: dict[str, int] = {"coco": 100, "roboflow": 100, "lvis": 300}

    def run(
        self,
        loaded: Loaded,
        subset: Subset,
        keys: Sequence[str],
        samples: Sequence[ImageSample],
        folder: Path,
    ) -> list[Outcome]:
        # Those that an evaluator would drop need no mask: LVIS asks for the checked classes only.
        found = find_concepts(
            loaded,
            pixels_of(samples),
            [[query.phrase or "" for query in sample.queries] for sample in samples],
            threshold=0.0,
            most=self.most[subset.form],
        )
        outcomes = []
        for key, sample, of_queries in zip(keys, samples, found, strict=True):
            outcome = Outcome(key)
            for query, instances in zip(sample.queries, of_queries, strict=True):
                outcome.predictions += detections(sample.source_id, query.source_id, instances)
            outcomes.append(outcome)
        return outcomes

    def can_score(self, outcomes: Sequence[Outcome]) -> bool:
        return True

    def score(self, subset: Subset, outcomes: Sequence[Outcome]) -> Scores:
        kept = {outcome.key for outcome in outcomes if not outcome.was_skipped}
        truth = read_json(str(subset.truth[0]))
        truth["images"] = [image for image in truth["images"] if str(image["id"]) in kept]
        numbers = {image["id"] for image in truth["images"]}
        truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in numbers]
        predictions = [each for outcome in outcomes for each in outcome.predictions]
        if subset.form == "lvis":
            for category in truth["categories"]:
                category.setdefault("frequency", "f")
            found = detection.score_lvis(truth, predictions)
        else:
            found = detection.score_coco(truth, predictions)
        return Scores(partial(detection.summarize, found), [str(each) for each in found.image_ids])


def objects_of(sample: ImageSample) -> list[tuple[Any, Instance]]:
    """Category and instance of all objects of an image that have a mask and are no crowd."""
    return [
        (query.source_id, instance)
        for query in sample.queries
        for instance in query.instances or []
        if instance.rle is not None and not instance.is_crowd
    ]


def promptable(box: Sequence[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box clipped to the image; a pixel high or wide where nothing of it would be left.

    >>> promptable((5, 5, 5, 9), (10, 10))
    (5.0, 5.0, 6.0, 9.0)
    """
    height, width = size
    x1, x2 = clip(box[0], box[2], width)
    y1, y2 = clip(box[1], box[3], height)
    return x1, y1, x2, y2


def clip(low: float, high: float, most: int) -> tuple[float, float]:
    """Both ends within 0 and `most`, a pixel apart where nothing would be left between them."""
    low, high = max(0.0, min(float(low), most - 1.0)), min(float(high), float(most))
    return (low, high) if high > low else (low, low + 1.0)


def coco_result(image: Any, category: Any, mask: np.ndarray) -> dict[str, Any]:
    """A mask in the form of COCO's results, less its score."""
    rle: Rle = to_rle(mask, mask.shape)
    return {"image_id": image, "category_id": category, "segmentation": rle}


def detections(image: Any, category: Any, instances: Instances) -> list[dict[str, Any]]:
    """Instances of one class in the form of COCO's results."""
    results = []
    for mask, score, box in zip(
        instances.masks, instances.scores, instances.boxes_xyxy, strict=True
    ):
        x1, y1, x2, y2 = (round(float(side), 3) for side in box)
        result = coco_result(image, category, mask)
        results.append({**result, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": float(score)})
    return results


@lru_cache(maxsize=1)
def truth_of_pairs(files: tuple[Path, ...]) -> list[dict[Any, dict[str, Any]]]:
    """For each annotator of SA-Co what is true of each pair of image and phrase."""
    annotators = []
    for path in files:
        content = read_json(str(path))
        pairs = {
            image["id"]: {
                "is_exhaustive": bool(image.get("is_instance_exhaustive", 1)),
                "masks": [],
                "crowd": [],
            }
            for image in content["images"]
        }
        for annotation in content["annotations"]:
            pair = pairs[annotation["image_id"]]
            pair["masks"].append(annotation["segmentation"])
            pair["crowd"].append(bool(annotation.get("iscrowd", 0)))
        if annotators and annotators[0].keys() != pairs.keys():
            raise ValueError(f"{path} has other pairs of image and phrase than {files[0]}.")
        annotators.append(pairs)
    return annotators


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without numpy's types, as JSON takes it."""
    return {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name, value in record.items()
    }
