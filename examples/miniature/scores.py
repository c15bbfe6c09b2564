"""How well a concept model knows the world."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from efficientsam3_hf import EfficientSam3Model
from efficientsam3_hf.distillation.concept_scores import detections_of, masks_at, truths_of
from efficientsam3_hf.evaluation import concept, units
from efficientsam3_hf.evaluation.overlaps import mask_overlaps


@torch.no_grad()
def score_concepts(
    model: EfficientSam3Model, batches: Iterable[Mapping[str, Any]]
) -> dict[str, float]:
    """cgF1 and its parts, and what stands behind them.

    `presence` is the share of phrases of which the model knows whether they name anything. `best`
    is the mean IoU of instances with the query that suits them best, whatever its score, and
    `matched` that of the pairs of instances and detections that cgF1 forms.
    """
    model.eval()
    records, right, best, matched = [], [], [], []
    for batch in batches:
        inputs: Any = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name not in ("labels", "words", "boxes")
        }
        outputs = model(**inputs)
        labels = batch["labels"]
        sizes = [tuple(label["masks"].shape[-2:]) for label in labels]
        found = detections_of(outputs, sizes, model.config)
        says = (outputs.presence_logits.flatten() > 0).tolist()
        for row, ((masks, scores), truth) in enumerate(zip(found, truths_of(labels), strict=True)):
            records.append(concept.score_pair(list(masks), scores.tolist(), list(truth)))
            right.append(says[row] == (len(truth) > 0))
            if not len(truth):
                continue
            every = masks_at(outputs.pred_masks[row], sizes[row])
            best += mask_overlaps(list(truth), list(every)).max(axis=1).tolist()
            if len(masks):
                overlaps = mask_overlaps(list(truth), list(masks)).max(axis=1)
                matched += overlaps[overlaps >= 0.5].tolist()
    summary = concept.summarize(units.stack(records))
    names = ("cgF1", "IL_MCC", "pmF1", "positive_micro_precision", "recall", "cgF1@0.5", "IL_FPR")
    return {
        **{name: float(summary[name]) for name in names},
        "matched": float(np.mean(matched)) if matched else 0.0,
        "best": float(np.mean(best)),
        "presence": float(np.mean(right)),
    }
