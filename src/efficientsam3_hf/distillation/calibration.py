"""Scores of a student set right on data it has not seen: a temperature and a bias."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..evaluation.overlaps import mask_overlaps
from ..models.score_calibration import calibrate_scores
from .concept_scores import masks_at, truths_of
from .family import Family
from .prompted_heads import scores_of

logger = logging.getLogger(__name__)

CANDIDATE = 0.02  # Score below which no calibration makes a detection of anything
# Of a batch, what the concept model reads.
INPUTS = ("pixel_values", "input_ids", "attention_mask", "image_indices")
RIGHT = 0.5  # IoU with an instance from which on a detection is right


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Args:
        temperature: Of the logits of scores.
        bias: Added to them.
        before: Mean cross entropy of scores as they came.
        after: And as they are now.
        false_positives: Share of prompts that name nothing for which something is found, before
            and after; nan where there are no such prompts.
    """

    temperature: float
    bias: float
    before: float
    after: float
    false_positives: tuple[float, float]


def calibrate(
    student: Family,
    batches: Iterable[Mapping[str, Any]],
    most_false_positives: float | None = 0.02,
    show_progress: bool = False,
) -> Calibration:
    """Fit temperature and bias on held-out prompts, some of which name nothing; set them.

    The fit is by maximum likelihood of whether a detection is right. If, at the threshold of one
    half, more of the prompts that name nothing would still find something than is wanted, the bias
    is lowered until no more do.

    Args:
        student: Its configuration gets the values; save it afterwards.
        batches: As `ImageCollator` makes them.
        most_false_positives: Largest share of prompts that name nothing for which something may be
            found; None leaves the fit as it is.
        show_progress: Whether to show a bar.
    """
    scores, is_right, highest = collect(
        student, tqdm(batches, "calibrating", disable=not show_progress)
    )
    temperature, bias = fit(scores, is_right)
    if most_false_positives is not None and len(highest):
        bias = min(bias, bias_for(highest, temperature, most_false_positives))
    configuration = student.configuration
    configuration.score_temperature, configuration.score_bias = temperature, bias
    return Calibration(
        temperature,
        bias,
        before=entropy(scores, is_right),
        after=entropy(calibrate_scores(scores, temperature, bias), is_right),
        false_positives=(
            share_above(highest),
            share_above(calibrate_scores(highest, temperature, bias)),
        ),
    )


@torch.no_grad()
def collect(student: Family, batches: Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of detections, whether they are right, and the highest score of each negative."""
    was_training = student.training
    student.eval()
    device = student.detector.device
    scores: list[float] = []
    is_right: list[bool] = []
    highest: list[float] = []
    for inputs in batches:
        tensors = {name: inputs[name].to(device) for name in INPUTS if name in inputs}
        outputs: Any = student(find, tensors)
        of_prompts = scores_of(outputs).cpu()
        truths = truths_of(inputs["labels"])
        for row, (label, truth) in enumerate(zip(inputs["labels"], truths, strict=True)):
            if not bool(label["is_exhaustive"]) or bool(label["is_crowd"].any()):
                continue  # nobody knows which detections are wrong
            if not len(truth):
                highest.append(float(of_prompts[row].max()))
            keep = of_prompts[row] > CANDIDATE
            masks = masks_at(outputs.pred_masks[row][keep.to(device)], truth.shape[1:])
            kept = of_prompts[row][keep].numpy()
            scores += kept.tolist()
            is_right += rightness(masks, kept, truth).tolist()
    student.train(was_training)
    if not any(is_right) or all(is_right):
        raise ValueError(
            f"Of {len(is_right)} detections {sum(is_right)} are right: scores are calibrated by "
            "both right and wrong ones. Give more held-out prompts, with such as name nothing "
            "among them, or train longer."
        )
    return torch.tensor(scores), torch.tensor(is_right), torch.tensor(highest)


def find(family: Family, inputs: Mapping[str, Tensor]) -> Any:
    """What the concept model answers."""
    return family.detector(**inputs, return_dict=True)


def rightness(masks: np.ndarray, scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Which detections are right; of several on one instance, the one with the best score."""
    right = np.zeros(len(masks), dtype=bool)
    if not len(masks) or not len(truth):
        return right
    overlaps = mask_overlaps(list(masks), list(truth))
    for index in np.argsort(-scores, kind="stable"):
        instance = int(overlaps[index].argmax())
        if overlaps[index, instance] >= RIGHT:
            right[index] = True
            overlaps[:, instance] = 0
    return right


def fit(scores: Tensor, is_right: Tensor) -> tuple[float, float]:
    """Temperature and bias that make what happened the most likely."""
    logits = scores.double().logit(eps=1e-7)
    wanted = is_right.double()
    # In the logarithm of the slope, which so stays positive: the order of scores must not turn.
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        calibrated = logits * parameters[0].exp() + parameters[1]
        value = F.binary_cross_entropy_with_logits(calibrated, wanted)
        value = value + 1e-4 * parameters[0].square()  # where right and wrong do not overlap
        value.backward()
        return value

    optimizer.step(loss)
    slope, bias = parameters[0].detach().exp().item(), parameters[1].item()
    return 1 / slope, bias


def bias_for(highest: Tensor, temperature: float, most: float) -> float:
    """The largest bias with which no more than a share of negatives finds anything."""
    logits = (highest.double().logit(eps=1e-7) / temperature).sort(descending=True).values
    allowed = int(most * len(logits))
    if allowed >= len(logits):
        return float("inf")
    return -logits[allowed].item() - 1e-3


def entropy(scores: Tensor, is_right: Tensor) -> float:
    """Mean cross entropy of scores."""
    return F.binary_cross_entropy(scores.float().clamp(1e-7, 1 - 1e-7), is_right.float()).item()


def share_above(scores: Sequence[float] | Tensor, threshold: float = 0.5) -> float:
    """Share of scores that are a detection."""
    scores = torch.as_tensor(scores)
    return float("nan") if not len(scores) else (scores >= threshold).float().mean().item()
