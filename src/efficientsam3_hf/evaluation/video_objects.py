"""J, F and G of objects that are given in one frame and followed through a video.

A unit is an object. Which of its frames count is a rule of the data set (`RULES`). J is the IoU of
masks, F the agreement of their outlines: https://github.com/davisvideochallenge/davis2017-evaluation
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, hypot

import numpy as np

from .overlaps import Mask, to_array
from .units import Units, weights_or_ones

try:
    from scipy.spatial import cKDTree
except ImportError as error:
    raise ImportError(
        "Comparing outlines needs scipy: pip install 'efficientsam3-hf[eval]'."
    ) from error

# Distance at which outlines still agree, as a share of the picture's diagonal.
OUTLINE_TOLERANCE = 0.008

# For MOSEv2 it is no more than this share of the root of the object's pixels.
OBJECT_TOLERANCE = 0.1


@dataclass(frozen=True)
class Rule:
    """Which annotated frames of an object count.

    Args:
        from_first_appearance: Frames before the first in which the truth shows the object do not
            count, nor is the object looked at there.
        skip_first: The first of the frames, where the object is given, does not count.
        skip_last: Nor does the last.
        leading_empty_counts: Frames before the first that truth or prediction fill count.
        needs_truth: Objects that the truth shows in no frame that counts are left out.
        is_adaptive: J and F are `smoothed_similarity` and `adaptive_accuracy`.
    """

    from_first_appearance: bool = False
    skip_first: bool = True
    skip_last: bool = True
    leading_empty_counts: bool = True
    needs_truth: bool = False
    is_adaptive: bool = False


RULES = {
    # All objects of the first frame, all frames but the first and the last.
    "davis": Rule(),
    "mose": Rule(),
    # The same frames: https://github.com/henghuiding/MOSE-api, MOSEv2/sam2_rcms/tools/score.py
    "mosev2": Rule(is_adaptive=True),
    # SAM 2's sav_evaluator, one folder for each object, masks every fourth frame.
    "sa-v": Rule(leading_empty_counts=False, needs_truth=True),
    # From the frame where the object is given, that frame included, up to before its last.
    "lvos": Rule(from_first_appearance=True, skip_first=False),
    # From the frame where the object is given, that frame excluded.
    "youtube-vos": Rule(from_first_appearance=True, skip_last=False),
}


def region_similarity(predicted: Mask, truth: Mask) -> float:
    """J of one frame: IoU, and 1 where neither has a pixel."""
    predicted, truth = _same_size(predicted, truth)
    union = int((predicted | truth).sum())
    return int((predicted & truth).sum()) / union if union else 1.0


def outline_accuracy(predicted: Mask, truth: Mask, tolerance: float = OUTLINE_TOLERANCE) -> float:
    """F of one frame: outlines within reach of each other; 1 where neither has one.

    Args:
        tolerance: Below 1 a share of the picture's diagonal, rounded up to pixels; else pixels.
    """
    predicted, truth = _same_size(predicted, truth)
    reach = tolerance if tolerance >= 1 else ceil(tolerance * hypot(*truth.shape))
    return _agreement(predicted, truth, reach)


def smoothed_similarity(predicted: Mask, truth: Mask) -> float:
    """J of MOSEv2's evaluator: one pixel more in intersection and union."""
    predicted, truth = _same_size(predicted, truth)
    return (int((predicted & truth).sum()) + 1) / (int((predicted | truth).sum()) + 1)


def adaptive_accuracy(predicted: Mask, truth: Mask) -> float:
    """F of MOSEv2, written F with a dot: the smaller the object, the nearer outlines must be.

    Outlines agree up to a tenth of the root of the object's pixels, rounded up, and at most up to
    `OUTLINE_TOLERANCE` of the diagonal, which the evaluator does not round.
    """
    predicted, truth = _same_size(predicted, truth)
    reach = OUTLINE_TOLERANCE * hypot(*truth.shape)
    if truth.any():
        reach = min(reach, ceil(OBJECT_TOLERANCE * int(truth.sum()) ** 0.5))
    # Its disk is of whole pixels: the middle of one of another radius lies off the middle pixel.
    return _agreement(predicted, truth, reach, ceil(2 * reach + 1) // 2 - reach)


def outline(mask: np.ndarray) -> np.ndarray:
    """Pixels that differ from the one to the right, below, or both; past the edge is the same."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def score_object(
    predicted: Sequence[Mask | None], truth: Sequence[Mask | None], rule: Rule | str
) -> dict[str, float] | None:
    """J and F of one object, or J and `F_dot`; None where it has no frame that counts.

    Args:
        predicted: One mask for each annotated frame; None where there is none.
        truth: Likewise, in the same order.
        rule: Name in `RULES`, or a rule of one's own.
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted frames for {len(truth)} annotated ones.")
    size = next((to_array(m).shape for m in [*truth, *predicted] if m is not None), (1, 1))
    pairs = [
        (_or_empty(p, size), _or_empty(t, size)) for p, t in zip(predicted, truth, strict=True)
    ]
    if rule.from_first_appearance:
        first = next((index for index, (_, t) in enumerate(pairs) if t.any()), len(pairs))
        pairs = pairs[first:]
    pairs = pairs[int(rule.skip_first) : len(pairs) - int(rule.skip_last)]
    if not rule.leading_empty_counts:
        first = next((i for i, (p, t) in enumerate(pairs) if p.any() or t.any()), len(pairs))
        pairs = pairs[first:]
    if not pairs or (rule.needs_truth and not any(t.any() for _, t in pairs)):
        return None
    scores = {"J": region_similarity, "F": outline_accuracy}
    if rule.is_adaptive:
        scores = {"J": smoothed_similarity, "F_dot": adaptive_accuracy}
    return {name: float(np.mean([of(p, t) for p, t in pairs])) for name, of in scores.items()}


def score_label_maps(
    predicted: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    rule: Rule | str,
    objects: Sequence[int] | None = None,
    void: int = 255,
) -> dict[int, dict[str, float]]:
    """J and F of each object in pictures whose values are numbers of objects.

    Args:
        predicted: One map (height, width) for each annotated frame.
        truth: Likewise.
        objects: Numbers to score; None takes all that the truth has, or, where the rule looks at
            whole videos, all that its first frame has.
        void: Value of the truth that belongs to no object.
    """
    rule = RULES[rule] if isinstance(rule, str) else rule
    if objects is None:
        whole_video = not rule.from_first_appearance and not rule.needs_truth
        looked_at = truth[:1] if whole_video else truth
        found = {int(number) for labels in looked_at for number in np.unique(labels)}
        objects = sorted(found - {0, void})
    scores = {}
    for number in objects:
        score = score_object([p == number for p in predicted], [t == number for t in truth], rule)
        if score is not None:
            scores[number] = score
    return scores


def summarize(units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    """Means over objects: `J`, `F`, and `J&F`, the mean of both; or `F_dot` and `J&F_dot`.

    With a field `is_seen` in the units (the object's category was in the training set), also
    `J_seen`, `J_unseen`, `F_seen`, `F_unseen` and `G`, the mean of these four.
    """
    weights = weights_or_ones(weights, units)
    second = "F_dot" if "F_dot" in units else "F"
    summary = {name: float(_mean(units[name], weights)) for name in ("J", second)}
    summary[f"J&{second}"] = (summary["J"] + summary[second]) / 2
    if "is_seen" in units:
        seen = units["is_seen"].astype(bool)
        parts = {
            f"{name}_{part}": float(_mean(units[name], weights * which))
            for name in ("J", second)
            for part, which in (("seen", seen), ("unseen", ~seen))
        }
        summary |= parts | {"G": float(np.mean(list(parts.values())))}
    return summary


def _same_size(predicted: Mask, truth: Mask) -> tuple[np.ndarray, np.ndarray]:
    first, second = to_array(predicted), to_array(truth)
    if first.shape != second.shape:
        raise ValueError(
            f"The prediction has shape {first.shape}, the truth {second.shape}. Resize predictions "
            "to the size of the annotation, and logits before they are thresholded."
        )
    return first, second


def _or_empty(mask: Mask | None, size: tuple[int, ...]) -> np.ndarray:
    return np.zeros(size, dtype=bool) if mask is None else to_array(mask)


def _positions(edges: np.ndarray) -> np.ndarray:
    rows, columns = np.divmod(np.flatnonzero(edges), edges.shape[1])  # argwhere takes ten times it
    return np.stack([rows, columns], axis=1)


def _agreement(
    predicted: np.ndarray, truth: np.ndarray, reach: float, offset: float = 0.0
) -> float:
    """F of the outlines, given how far they reach, and how far off the middle of their disk is."""
    first, second = (_positions(outline(mask)) for mask in (predicted, truth))
    if not len(first) or not len(second):
        return float(len(first) == len(second))
    precision = _share_within(first - offset, second, reach)
    recall = _share_within(second - offset, first, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share_within(points: np.ndarray, others: np.ndarray, reach: float) -> float:
    distances, _ = cKDTree(others).query(points)
    return float((distances <= reach).mean())


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = weights.sum()
    return weights @ values / total if total else np.nan
