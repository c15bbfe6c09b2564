"""cgF1 of SA-Co: which phrases are in an image, and how well their instances are found.

A unit is a pair of image and phrase. https://github.com/facebookresearch/sam3, `cgf1_eval.py`,
defines the official form, whose small constants are part of the numbers.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .overlaps import box_overlaps, mask_overlaps, to_rle
from .units import Units, stack, weights_or_ones

try:
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise ImportError("cgF1 needs scipy: pip install 'efficientsam3-hf[eval]'.") from error

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
SCORE_THRESHOLD = 0.5

Record = dict[str, Any]


def score_pair(
    predicted: Sequence,
    scores: Sequence[float],
    truth: Sequence,
    crowd: Sequence[bool] | None = None,
    *,
    kind: str = "mask",
    score_threshold: float = SCORE_THRESHOLD,
    crowd_aware: bool = False,
) -> Record:
    """Count what was found, missed and added for one phrase in one image.

    Args:
        predicted: Masks, or boxes (x, y, width, height), of all instances.
        scores: One for each prediction; below the threshold it does not count.
        truth: Masks or boxes of all instances; none where the image lacks the phrase.
        crowd: True for regions of the truth that hold uncounted instances.
        kind: `"mask"` or `"box"`.
        crowd_aware: The official form drops crowds, so that predictions on them count as wrong.
            Here, what lies on a crowd by a share of at least the IoU threshold does not count,
            and pairs whose truth is nothing but a crowd are left out.
    """
    overlap_of = {"mask": mask_overlaps, "box": box_overlaps}[kind]
    if len(scores) != len(predicted):
        raise ValueError(f"{len(scores)} scores for {len(predicted)} predictions.")
    predicted = [p for p, score in zip(predicted, scores, strict=True) if score >= score_threshold]
    flags = [False] * len(truth) if crowd is None else [bool(flag) for flag in crowd]
    instances = [one for one, flag in zip(truth, flags, strict=True) if not flag]
    crowds = [one for one, flag in zip(truth, flags, strict=True) if flag] if crowd_aware else []
    on_crowd = None
    if crowds:
        on_crowd = overlap_of(predicted, crowds, [True] * len(crowds)).max(axis=1)
    record = count_matches(overlap_of(predicted, instances), on_crowd)
    record["is_counted"] = bool(instances) or not crowds
    return record


def count_matches(overlaps: np.ndarray, on_crowd: np.ndarray | None = None) -> Record:
    """Match predictions to instances so that the sum of overlaps is greatest, and count.

    Args:
        overlaps: IoU (predicted, truth).
        on_crowd: Share of each prediction that lies on a crowd; None where there is none.
    """
    rows, columns = linear_sum_assignment(-overlaps)
    matched = np.zeros((len(IOU_THRESHOLDS), len(overlaps)), dtype=bool)
    matched[:, rows] = overlaps[rows, columns] >= IOU_THRESHOLDS[:, None]
    wrong = ~matched
    if on_crowd is not None:
        wrong &= on_crowd < IOU_THRESHOLDS[:, None]
    found = matched.sum(axis=1)
    return {
        "found": found,
        "wrong": wrong.sum(axis=1),
        "missed": overlaps.shape[1] - found,
        "has_truth": overlaps.shape[1] > 0,
        "has_prediction": len(overlaps) > 0,
        "is_counted": True,
    }


def best_annotator(records: Sequence[Record]) -> Record:
    """Of the scores against several annotators, the one that SA-Co Gold counts.

    That is the best mean F1; an annotator who, like the prediction, has nothing beats all others.
    """
    records = [record for record in records if record["is_counted"]] or records
    best = records[0]
    for record in records[1:]:
        is_empty = not (record["has_truth"] or record["has_prediction"])
        best_is_empty = not (best["has_truth"] or best["has_prediction"])
        if is_empty or (not best_is_empty and _mean_f1(record) > _mean_f1(best)):
            best = record
    return best


def summarize(units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    """Numbers of SA-Co as fractions; `@0.5` and `@0.75` are at one IoU threshold.

    * `cgF1` = `pmF1` x `IL_MCC`, the headline.
    * `pmF1` (`positive_micro_F1`): F1 of instances over pairs that hold the phrase, counted
      together; predictions in pairs without it, or of which nothing was found, are not wrong here.
    * `positive_macro_F1`: mean F1 of the pairs that have both truth and predictions.
    * `precision`, `recall`, `F1`: of instances over all pairs.
    * `IL_...`: does a pair with the phrase get any prediction, and one without get none?
    """
    weights = weights_or_ones(weights, units) * units["is_counted"]
    truth, predicted = units["has_truth"].astype(bool), units["has_prediction"].astype(bool)
    found, wrong, missed = (weights @ units[name] for name in ("found", "wrong", "missed"))
    wrong_in_positives = (weights * truth) @ units["wrong"]
    recall = found / (found + missed + 1e-4)
    precision = found / (found + wrong + 1e-4)
    positive_precision = found / (found + wrong_in_positives + 1e-4)
    positive_f1 = _f1(positive_precision, recall, 1e-4)
    levels = image_level(
        *(float(weights @ (t & p)) for t in (truth, ~truth) for p in (predicted, ~predicted))
    )
    by_threshold = {
        "cgF1": positive_f1 * levels["IL_MCC"],
        "pmF1": positive_f1,
        "positive_macro_F1": _macro_f1(units, weights * (truth & predicted)),
        "positive_micro_precision": positive_precision,
        "precision": precision,
        "recall": recall,
        "F1": _f1(precision, recall, 1e-4),
    }
    summary = {name: float(values.mean()) for name, values in by_threshold.items()}
    summary |= levels
    for suffix, index in (("@0.5", 0), ("@0.75", 5)):
        summary |= {name + suffix: float(values[index]) for name, values in by_threshold.items()}
    return summary


def image_level(found: float, missed: float, wrong: float, rejected: float) -> dict[str, float]:
    """Numbers of the question whether a phrase is in an image.

    >>> round(image_level(found=2, missed=0, wrong=0, rejected=2)["IL_MCC"], 6)
    1.0

    Args:
        found: Pairs with the phrase and predictions.
        missed: With the phrase, without predictions.
        wrong: Without the phrase, with predictions.
        rejected: Without both.
    """
    recall = found / (found + missed + 1e-6)
    precision = found / (found + wrong + 1e-6)
    spread = (found + wrong) * (found + missed) * (rejected + wrong) * (rejected + missed)
    return {
        "IL_MCC": (found * rejected - wrong * missed) / (spread**0.5 + 1e-6),
        "IL_precision": precision,
        "IL_recall": recall,
        "IL_F1": float(_f1(precision, recall, 1e-6)),
        "IL_FPR": wrong / (wrong + rejected + 1e-6),
    }


def average(summaries: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Mean over subsets, each counted alike, as SA-Co Gold and Silver are reported."""
    summaries = list(summaries)
    return {name: float(np.mean([s[name] for s in summaries])) for name in summaries[0]}


def exhaustive_ids(annotators: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of the pairs in which every annotator marked all instances.

    Args:
        annotators: Files of SA-Co as read by `json.load`, one for each annotator.
    """
    unsure = {
        image["id"]
        for annotator in annotators
        for image in annotator["images"]
        if not image["is_instance_exhaustive"]
    }
    return [image["id"] for image in annotators[0]["images"] if image["id"] not in unsure]


def score_files(
    annotators: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    *,
    kind: str = "mask",
    crowd_aware: bool = False,
) -> Units:
    """Units of a whole subset of SA-Co.

    Args:
        annotators: Files of SA-Co as read by `json.load`: three for Gold, one for Silver.
        predictions: COCO's results: `image_id` (of the pair), `score`, `segmentation` or `bbox`.
    """
    field = {"mask": "segmentation", "box": "bbox"}[kind]
    by_pair: dict[int, list] = defaultdict(list)
    for prediction in predictions:
        by_pair[prediction["image_id"]].append(prediction)
    unknown = by_pair.keys() - {image["id"] for image in annotators[0]["images"]}
    if unknown:
        raise ValueError(
            f"Predictions name {len(unknown)} pairs that the truth does not have, for example "
            f"{sorted(unknown)[:3]}. `image_id` is the id of the pair of image and phrase."
        )
    truths = [_by_pair(annotator) for annotator in annotators]
    sizes = {i["id"]: (i["height"], i["width"]) for i in annotators[0]["images"]}
    records = []
    for pair in exhaustive_ids(annotators):
        size = sizes[pair]

        def shapes(entries: Sequence[Mapping], size: tuple[int, int] = size) -> list:
            return [to_rle(e[field], size) if kind == "mask" else e[field] for e in entries]

        of_pair = by_pair[pair]
        records.append(
            best_annotator(
                [
                    score_pair(
                        shapes(of_pair),
                        [prediction["score"] for prediction in of_pair],
                        shapes(truth[pair]),
                        [bool(entry.get("iscrowd", 0)) for entry in truth[pair]],
                        kind=kind,
                        crowd_aware=crowd_aware,
                    )
                    for truth in truths
                ]
            )
        )
    return stack(records)


def _by_pair(annotator: Mapping[str, Any]) -> dict[int, list]:
    entries: dict[int, list] = defaultdict(list)
    for entry in annotator["annotations"]:
        entries[entry["image_id"]].append(entry)
    return entries


def _f1(precision: Any, recall: Any, epsilon: float) -> Any:
    return 2 * precision * recall / (precision + recall + epsilon)


def _local_f1(found: np.ndarray, wrong: np.ndarray, missed: np.ndarray) -> np.ndarray:
    return _f1(found / (found + wrong + 1e-4), found / (found + missed + 1e-4), 1e-4)


def _mean_f1(record: Record) -> float:
    return float(_local_f1(record["found"], record["wrong"], record["missed"]).mean())


def _macro_f1(units: Units, weights: np.ndarray) -> np.ndarray:
    total = weights.sum()
    if total == 0:  # no pair has both
        return np.full(len(IOU_THRESHOLDS), np.nan)
    return weights @ _local_f1(units["found"], units["wrong"], units["missed"]) / total
