"""Random predictions and labels of every kind, and plain loops over them."""

from typing import Any

import torch
from torch import Tensor

from efficientsam3_hf.models.concept_objective import ConceptPredictions
from efficientsam3_hf.models.concept_targets import ConceptTargets

LAYERS, QUERIES, SIDE = 3, 6, 8
# Instances of each prompt: none, one, several, more than there are queries, crowds.
COUNTS = (0, 1, 4, 8, 3, 0, 2)
CROWDS = {4: (1,), 6: (0, 1)}  # in prompt 6 nothing but crowds
NOT_EXHAUSTIVE = (2, 5)  # 5 has none: whether there is one is unknown


def random_boxes(*shape: int, generator: torch.Generator) -> Tensor:
    """Boxes (..., 4) as (cx, cy, w, h) inside the image."""
    size = 0.05 + 0.6 * torch.rand(*shape, 2, generator=generator)
    centre = size / 2 + (1 - size) * torch.rand(*shape, 2, generator=generator)
    return torch.cat([centre, size], dim=-1)


def random_labels(generator: torch.Generator, mask_side: int = 2 * SIDE) -> list[dict[str, Any]]:
    """Labels of the prompts in COUNTS; an instance of prompt 3 has no mask."""
    labels = []
    for prompt, count in enumerate(COUNTS):
        masks = torch.rand(count, mask_side, mask_side, generator=generator) > 0.6
        if prompt == 3:
            masks[5] = False
        is_crowd = torch.zeros(count, dtype=torch.bool)
        is_crowd[list(CROWDS.get(prompt, ()))] = True
        labels.append(
            {
                "boxes": random_boxes(count, generator=generator),
                "masks": masks,
                "is_crowd": is_crowd,
                "is_exhaustive": torch.tensor(prompt not in NOT_EXHAUSTIVE),
                "phrase": f"phrase {prompt}",
            }
        )
    return labels


def random_predictions(generator: torch.Generator, groups: int = 2) -> ConceptPredictions:
    """Predictions for them; the second group has queries near instances, to learn one to many."""
    prompts = len(COUNTS)

    def randn(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator)

    return ConceptPredictions(
        logits=randn(groups, LAYERS, prompts, QUERIES),
        boxes=random_boxes(groups, LAYERS, prompts, QUERIES, generator=generator),
        presence=randn(LAYERS, prompts),
        masks=randn(prompts, QUERIES, SIDE, SIDE),
        semantic=randn(prompts, 1, SIDE, SIDE),
    )


def plain_iou(first: list[float], second: list[float]) -> tuple[float, float]:
    """IoU and generalised IoU of two boxes (cx, cy, w, h)."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = first, second
    a = (ax - aw / 2, ay - ah / 2, ax + aw / 2, ay + ah / 2)
    b = (bx - bw / 2, by - bh / 2, bx + bw / 2, by + bh / 2)
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    union = aw * ah + bw * bh - shared
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return shared / union, shared / union - (hull - union) / hull


def plain_one_to_many(
    logits: Tensor, boxes: Tensor, targets: ConceptTargets, threshold: float
) -> Tensor:
    """One instance after the other, one query after the other."""
    instance_of = torch.full(logits.shape, -1)
    for prompt in range(len(logits)):
        wanted: dict[int, list[tuple[float, int]]] = {}
        for instance in range(len(targets.boxes)):
            if targets.prompt_of[instance] != prompt or targets.is_crowd[instance]:
                continue
            quality = [
                0.3 * logits[prompt, query].sigmoid().item()
                + 0.7
                * plain_iou(boxes[prompt, query].tolist(), targets.boxes[instance].tolist())[0]
                for query in range(logits.shape[1])
            ]
            best = sorted(range(len(quality)), key=lambda query: -quality[query])[:4]
            for query in best:
                if quality[query] > threshold:
                    wanted.setdefault(query, []).append((-quality[query], instance))
        for query, suitors in wanted.items():
            instance_of[prompt, query] = min(suitors)[1]
    return instance_of
