"""cgF1 and pHOTA of SA-Co/VEval: phrases in videos.

A unit is a pair of video and phrase. cgF1 is that of images with masklets in place of masks, and
pHOTA is HOTA (https://github.com/JonathonLuiten/TrackEval) of the pairs, as if each were a video
with a single class. A masklet is a list with a mask, or None, for each frame.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import concept
from .overlaps import Mask, frame_overlaps
from .units import Units, stack, weights_or_ones

try:
    from scipy.optimize import linear_sum_assignment
except ImportError as error:
    raise ImportError("pHOTA needs scipy: pip install 'efficientsam3-hf[eval]'.") from error

# IoU from which a mask of a frame is found; HOTA is the mean over them.
LOCALIZATIONS = np.arange(0.05, 0.99, 0.05)
EPSILON = float(np.finfo(float).eps)
HOTA_FIELDS = ("hota_found", "hota_wrong", "hota_missed", "hota_iou")
ASSOCIATION_FIELDS = ("association", "association_recall", "association_precision")

Masklet = Sequence[Mask | None]


def volume_overlaps(predicted: Sequence[Masklet], truth: Sequence[Masklet]) -> np.ndarray:
    """Intersection over union (predicted, truth), each summed over frames; 1 if both are empty."""
    return _volume_overlaps(*frame_overlaps(predicted, truth))


def score_pair(
    predicted: Sequence[Masklet],
    scores: Sequence[float],
    truth: Sequence[Masklet],
    crowd: Sequence[bool] | None = None,
    *,
    score_threshold: float = concept.SCORE_THRESHOLD,
) -> dict[str, Any]:
    """Count what was found, missed and added for one phrase in one video, and how it was followed.

    For cgF1 a prediction counts from the threshold on, and crowds of the truth are dropped; for
    pHOTA it counts above the threshold, and a crowd is an object like any other. Both are so in
    the official evaluators.

    Args:
        predicted: Masklets, with a mask or None for each frame.
        scores: One for each masklet.
        truth: Masklets of all instances; none where the video lacks the phrase.
        crowd: True for masklets of the truth that hold uncounted instances.
    """
    if len(scores) != len(predicted):
        raise ValueError(f"{len(scores)} scores for {len(predicted)} masklets.")
    values = np.asarray(scores, dtype=np.float64)
    crowds = np.zeros(len(truth), dtype=bool) if crowd is None else np.asarray(crowd, dtype=bool)
    areas, true_areas, shared = frame_overlaps(predicted, truth)
    shown = values >= score_threshold
    record = concept.count_matches(
        _volume_overlaps(areas[shown], true_areas[~crowds], shared[shown][:, ~crowds])
    )
    followed = values > score_threshold
    return record | count_tracks(areas[followed], true_areas, shared[followed])


def count_tracks(
    areas: np.ndarray, true_areas: np.ndarray, intersections: np.ndarray
) -> dict[str, np.ndarray]:
    """What HOTA sums up, one number for each of `LOCALIZATIONS`.

    Args:
        areas: Pixels of predictions (predicted, frames). Frames without any are left out.
        true_areas: Pixels of the truth (truth, frames), -1 where the object is not seen.
        intersections: Pixels (predicted, truth, frames).
    """
    seen, truly_seen = areas > 0, true_areas >= 0
    union = np.maximum(areas, 0)[:, None] + np.maximum(true_areas, 0) - intersections
    overlaps = intersections / np.maximum(union, 1)
    overlaps *= seen[:, None] & truly_seen

    # How well two tracks fit over the whole video decides which masks are matched in each frame.
    rivals = overlaps.sum(axis=0, keepdims=True) + overlaps.sum(axis=1, keepdims=True) - overlaps
    fit = np.divide(overlaps, rivals, out=np.zeros_like(overlaps), where=rivals > EPSILON).sum(
        axis=2
    )
    lengths, true_lengths = seen.sum(axis=1)[:, None], truly_seen.sum(axis=1)
    alignment = fit / np.maximum(lengths + true_lengths - fit, 1e-10)

    matches = np.zeros((len(LOCALIZATIONS), *fit.shape))
    total_overlap = np.zeros(len(LOCALIZATIONS))
    for frame in range(areas.shape[1]):
        here, truly_here = np.nonzero(seen[:, frame])[0], np.nonzero(truly_seen[:, frame])[0]
        overlap = overlaps[..., frame][np.ix_(here, truly_here)]
        merit = alignment[np.ix_(here, truly_here)] * overlap
        columns, rows = linear_sum_assignment(-merit.T)  # ties as in TrackEval: truth comes first
        pairs = overlap[rows, columns]
        close = pairs >= LOCALIZATIONS[:, None] - EPSILON
        matches[:, here[rows], truly_here[columns]] += close
        total_overlap += close @ pairs
    found = matches.sum(axis=(1, 2))
    association = matches / np.maximum(lengths + true_lengths - matches, 1)
    return {
        "hota_found": found,
        "hota_wrong": seen.sum() - found,
        "hota_missed": truly_seen.sum() - found,
        "hota_iou": total_overlap,
        "association": (matches * association).sum(axis=(1, 2)),
        "association_recall": (matches**2 / np.maximum(true_lengths, 1)).sum(axis=(1, 2)),
        "association_precision": (matches**2 / np.maximum(lengths, 1)).sum(axis=(1, 2)),
    }


def summarize(units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    """Numbers of VEval as fractions: those of `concept.summarize`, and `pHOTA` with its parts.

    * `DetA`, `DetRe`, `DetPr`: masks of frames that are found, whatever object they belong to.
    * `AssA`, `AssRe`, `AssPr`: found masks of a track that are of one object.
    * `LocA`: IoU of what is found.
    """
    return concept.summarize(units, weights) | summarize_tracks(units, weights)


def summarize_tracks(units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    """`pHOTA` and its parts alone, from records of `count_tracks`."""
    weights = weights_or_ones(weights, units)
    found, wrong, missed, overlap = (weights @ units[name] for name in HOTA_FIELDS)
    association, recall, precision = (
        weights @ units[name] / np.maximum(found, 1) for name in ASSOCIATION_FIELDS
    )
    detection = found / np.maximum(found + wrong + missed, 1)
    by_localization = {
        "pHOTA": np.sqrt(detection * association),
        "DetA": detection,
        "AssA": association,
        "DetRe": found / np.maximum(found + missed, 1),
        "DetPr": found / np.maximum(found + wrong, 1),
        "AssRe": recall,
        "AssPr": precision,
        "LocA": np.maximum(overlap, 1e-10) / np.maximum(found, 1e-10),
    }
    return {name: float(values.mean()) for name, values in by_localization.items()}


def score_files(truth: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> Units:
    """Units of a whole subset of SA-Co/VEval.

    Args:
        truth: The file as read by `json.load`, with `videos`, `annotations`, `video_np_pairs`.
        predictions: Results in YouTube-VIS form: `video_id`, `category_id`, `score`,
            `segmentations`.
    """
    sizes = {v["id"]: (v["height"], v["width"]) for v in truth["videos"]}
    pairs = {(pair["video_id"], pair["category_id"]): ([], []) for pair in truth["video_np_pairs"]}
    for place, entries in enumerate((predictions, truth["annotations"])):
        for entry in entries:
            key = (entry["video_id"], entry["category_id"])
            if key not in pairs:
                raise ValueError(
                    f"Video {key[0]} with category {key[1]} is none of the {len(pairs)} pairs in "
                    "`video_np_pairs`. Predict only for the phrases that were asked."
                )
            pairs[key][place].append(entry)
    records = []
    for (video, _), (predicted, annotations) in pairs.items():
        masklets = [
            [[_as_rle(mask, sizes[video]) for mask in entry["segmentations"]] for entry in entries]
            for entries in (predicted, annotations)
        ]
        records.append(
            score_pair(
                masklets[0],
                [entry["score"] for entry in predicted],
                masklets[1],
                [bool(entry.get("iscrowd", 0)) for entry in annotations],
            )
        )
    return stack(records)


def _volume_overlaps(
    areas: np.ndarray, true_areas: np.ndarray, intersections: np.ndarray
) -> np.ndarray:
    shared = intersections.sum(axis=2)
    total = np.maximum(areas, 0).sum(axis=1)[:, None] + np.maximum(true_areas, 0).sum(axis=1)
    union = total - shared
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def _as_rle(mask: Any, size: tuple[int, int]) -> Any:
    # Some files write the absence of a mask as None, some as an empty list.
    return None if not mask else {"size": list(size), **mask} if isinstance(mask, dict) else mask
