"""Average precision on COCO and LVIS, with matching by pycocotools.

A unit is an image. Matching is done once; the curves are then drawn from it as often as the
bootstrap asks for.
"""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import pycocotools.coco
    import pycocotools.cocoeval
except ImportError as error:
    raise ImportError(
        "Average precision needs pycocotools: pip install 'efficientsam3-hf[eval]'."
    ) from error

# Its stubs want file names only, and entries without what the evaluator adds to them.
COCO: Any = pycocotools.coco.COCO
COCOeval: Any = pycocotools.cocoeval.COCOeval

AREAS = ("all", "small", "medium", "large")
RECALLS = np.linspace(0.0, 1.0, 101)
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)


@dataclass
class Matches:
    """Predictions of one category, those with the best scores first, and what they match.

    Args:
        images: Index of the image of each prediction.
        ranks: Place of each among its image's predictions, by score.
        matched: (thresholds, predictions) is matched to an object.
        ignored: (thresholds, predictions) counts neither as right nor as wrong.
        objects: How many objects each image has to find.
    """

    images: np.ndarray
    ranks: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


@dataclass
class Detections:
    """All matches of a data set.

    Args:
        image_ids: The units.
        matches: Category and area -> matches.
        frequencies: Category -> `"r"`, `"c"` or `"f"`; empty for COCO.
        most: Predictions for one image that count.
    """

    image_ids: list[int]
    matches: dict[tuple[int, str], Matches]
    frequencies: dict[int, str]
    most: tuple[int, ...]


def score_coco(
    truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], kind: str = "segm"
) -> Detections:
    """Match predictions as COCO does: at most 100 for each image and category.

    Args:
        truth: The file as read by `json.load`.
        predictions: COCO's results: `image_id`, `category_id`, `score`, `segmentation` or `bbox`.
        kind: `"segm"` or `"bbox"`.
    """
    return _score(truth, predictions, kind, COCOeval, (1, 10, 100))


def score_lvis(
    truth: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]], kind: str = "segm"
) -> Detections:
    """Match predictions as LVIS does: at most 300 for each image, of the categories it was checked
    for; where a category was not marked exhaustively, predictions that match nothing do not count.
    """
    present = defaultdict(set)
    for annotation in truth["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    checked = {i["id"]: present[i["id"]] | set(i["neg_category_ids"]) for i in truth["images"]}
    by_image = defaultdict(list)
    for prediction in predictions:
        by_image[prediction["image_id"]].append(prediction)
    kept = []
    for image, entries in by_image.items():
        best = sorted(entries, key=lambda entry: entry["score"], reverse=True)[:300]
        kept += [entry for entry in best if entry["category_id"] in checked[image]]
    detections = _score(truth, kept, kind, _LvisEval, (300,))
    detections.frequencies = {c["id"]: c["frequency"] for c in truth["categories"]}
    return detections


def summarize(detections: Detections, weights: np.ndarray | None = None) -> dict[str, float]:
    """The numbers of COCO or LVIS as fractions; nan where there is no object to find.

    `AP` is the mean over IoU 0.5 to 0.95 and categories, `AP50`, `AP75` at one IoU, `APs`, `APm`,
    `APl` of small, medium and large objects; `AR@100` is the recall with 100 predictions for each
    image. LVIS adds `APr`, `APc`, `APf` of rare, common and frequent categories.
    """
    if weights is None:
        weights = np.ones(len(detections.image_ids))
    if len(weights) != len(detections.image_ids):
        raise ValueError(f"{len(weights)} weights for {len(detections.image_ids)} images.")
    weights = np.asarray(weights, dtype=np.float64)
    most = detections.most[-1]
    matches = detections.matches
    curves = {key: _curve(each, weights, most) for key, each in matches.items()}
    precision = {key: curve[0] for key, curve in curves.items()}
    summary = {
        "AP": _mean(precision, "all"),
        "AP50": _mean({key: values[:1] for key, values in precision.items()}, "all"),
        "AP75": _mean({key: values[5:6] for key, values in precision.items()}, "all"),
    }
    summary |= {f"AP{area[0]}": _mean(precision, area) for area in AREAS[1:]}
    for letter in "rcf" if detections.frequencies else "":
        of_letter = {k: v for k, v in precision.items() if detections.frequencies[k[0]] == letter}
        summary[f"AP{letter}"] = _mean(of_letter, "all")
    for few in detections.most[:-1]:
        of_all = {key: each for key, each in matches.items() if key[1] == "all"}
        recall = {key: _recall(each, weights, few) for key, each in of_all.items()}
        summary[f"AR@{few}"] = _mean(recall, "all")
    recall = {key: curve[1] for key, curve in curves.items()}
    summary[f"AR@{most}"] = _mean(recall, "all")
    return summary | {f"AR{area[0]}@{most}": _mean(recall, area) for area in AREAS[1:]}


def _score(
    truth: Mapping[str, Any],
    predictions: Sequence[Mapping[str, Any]],
    kind: str,
    evaluator: type,
    most: tuple[int, ...],
) -> Detections:
    if kind not in ("segm", "bbox"):
        raise ValueError(f"kind={kind!r} is neither 'segm' nor 'bbox'.")
    with redirect_stdout(io.StringIO()):  # pycocotools talks
        reference, results = COCO(), COCO()
        reference.dataset = deepcopy(dict(truth))
        # pycocotools takes an annotation of id 0 for none; LVIS has no crowds.
        for number, annotation in enumerate(reference.dataset["annotations"], start=1):
            annotation["id"] = number
            annotation.setdefault("iscrowd", 0)
        reference.createIndex()
        results.dataset = {**reference.dataset, "annotations": []}
        if predictions:
            _check_images(predictions, reference)
            results = reference.loadRes([dict(prediction) for prediction in predictions])
        else:
            results.createIndex()
        evaluation = evaluator(reference, results, kind)
        evaluation.params.maxDets = list(most)
        evaluation.evaluate()
    image_ids = [int(image) for image in evaluation.params.imgIds]
    index_of = {image: index for index, image in enumerate(image_ids)}
    found = defaultdict(list)
    for entry in evaluation.evalImgs:
        if entry is not None:
            area = AREAS[evaluation.params.areaRng.index(entry["aRng"])]
            found[entry["category_id"], area].append(entry)
    matches = {key: _join(entries, index_of) for key, entries in found.items()}
    return Detections(image_ids, matches, {}, most)


def _check_images(predictions: Sequence[Mapping[str, Any]], reference: Any) -> None:
    unknown = {prediction["image_id"] for prediction in predictions} - set(reference.getImgIds())
    if unknown:
        raise ValueError(
            f"Predictions name {len(unknown)} images that the truth does not have, for example "
            f"{sorted(unknown)[:3]}."
        )


class _LvisEval(COCOeval):
    def evaluateImg(self, imgId: int, catId: int, aRng: list, maxDet: int) -> dict | None:
        entry = super().evaluateImg(imgId, catId, aRng, maxDet)
        if entry and catId in self.cocoGt.imgs[imgId]["not_exhaustive_category_ids"]:
            entry["dtIgnore"] = np.logical_or(entry["dtIgnore"], entry["dtMatches"] == 0)
        return entry


def _join(entries: Sequence[Mapping[str, Any]], index_of: Mapping[int, int]) -> Matches:
    objects = np.zeros(len(index_of))
    for entry in entries:
        objects[index_of[entry["image_id"]]] += np.count_nonzero(np.equal(entry["gtIgnore"], 0))
    counts = [len(entry["dtScores"]) for entry in entries]
    scores = np.concatenate([np.asarray(entry["dtScores"], float) for entry in entries])
    order = np.argsort(-scores, kind="stable")
    matched = np.concatenate([entry["dtMatches"] > 0 for entry in entries], axis=1)
    ignored = np.concatenate([entry["dtIgnore"].astype(bool) for entry in entries], axis=1)
    return Matches(
        images=np.repeat([index_of[entry["image_id"]] for entry in entries], counts)[order],
        ranks=np.concatenate([np.arange(count) for count in counts])[order],
        matched=matched[:, order],
        ignored=ignored[:, order],
        objects=objects,
    )


def _curve(matches: Matches, weights: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision (thresholds, recalls) and final recall (thresholds,); empty without objects."""
    objects = weights @ matches.objects
    if objects == 0:
        return np.zeros((0, len(RECALLS))), np.zeros(0)
    right, counted = _counted(matches, weights, most)
    found = np.cumsum(right, axis=1)
    recall, precision = found / objects, found / (np.cumsum(counted, axis=1) + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    at_recall = np.zeros((len(recall), len(RECALLS)))
    for threshold, (reached, best) in enumerate(zip(recall, precision, strict=True)):
        places = np.searchsorted(reached, RECALLS, side="left")
        inside = places < len(best)
        at_recall[threshold, inside] = best[places[inside]]
    return at_recall, recall[:, -1] if recall.size else np.zeros(len(recall))


def _recall(matches: Matches, weights: np.ndarray, most: int) -> np.ndarray:
    """Final recall (thresholds,) alone; empty without objects."""
    objects = weights @ matches.objects
    return _counted(matches, weights, most)[0].sum(axis=1) / objects if objects else np.zeros(0)


def _counted(matches: Matches, weights: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each prediction (thresholds, predictions) is right, and how often it counts."""
    kept = matches.ranks < most
    counted = weights[matches.images[kept]] * ~matches.ignored[:, kept]
    return counted * matches.matched[:, kept], counted


def _mean(values: Mapping[tuple[int, str], np.ndarray], area: str) -> float:
    parts = [value.ravel() for key, value in values.items() if key[1] == area]
    joined = np.concatenate(parts) if parts else np.zeros(0)
    return float(joined.mean()) if len(joined) else float("nan")
