"""What a concept model finds in a batch, beside what is there."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.models.sam3.modeling_sam3 import Sam3ImageSegmentationOutput

from ..models.configuration_efficientsam3 import EfficientSam3Config
from ..models.score_calibration import calibrate_scores
from ..visualize import draw_instances
from .pictures import to_picture
from .prompted_heads import scores_of

Found = tuple[np.ndarray, np.ndarray]  # masks (instances, height, width), scores (instances,)


def detections_of(
    outputs: Sam3ImageSegmentationOutput,
    sizes: Sequence[tuple[int, ...]],
    configuration: EfficientSam3Config,
    threshold: float = 0.5,
) -> list[Found]:
    """Boolean masks and scores of what was found for each prompt.

    Args:
        outputs: Of a concept model.
        sizes: (height, width) of the masks of each prompt.
        configuration: Of the model, which says how its scores are calibrated.
        threshold: Least score.
    """
    scores = calibrate_scores(
        scores_of(outputs), configuration.score_temperature, configuration.score_bias
    )
    found = []
    for row, size in enumerate(sizes):
        keep = scores[row] >= threshold
        found.append((masks_at(outputs.pred_masks[row][keep], size), to_numpy(scores[row][keep])))
    return found


def masks_at(logits: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Boolean masks (instances, height, width) that logits of another size stand for."""
    if not len(logits):
        return np.zeros((0, *size), dtype=bool)
    resized = F.interpolate(logits[None].float(), tuple(size), mode="bilinear")
    return to_numpy(resized[0] > 0)


def truths_of(labels: Sequence[Mapping[str, Any]]) -> list[np.ndarray]:
    """Boolean masks (instances, height, width) of what each prompt names; crowds are left out."""
    return [to_numpy(label["masks"][~label["is_crowd"]].bool()) for label in labels]


def draw_concepts(inputs: Mapping[str, Any], found: Sequence[Found]) -> dict[str, Image.Image]:
    """For each prompt of a batch, what is there (left) and what was found."""
    pictures: dict[str, Image.Image] = {}
    labels = inputs["labels"]
    for number, (label, truth, (masks, scores)) in enumerate(
        zip(labels, truths_of(labels), found, strict=True)
    ):
        # The processor's mean and standard deviation are both one half.
        pixels = inputs["pixel_values"][label["image"]].float() * 0.5 + 0.5
        image = to_picture(pixels.movedim(0, -1))
        image = image.resize(truth.shape[:0:-1])  # (width, height) of the masks
        panels = [
            draw_instances(image, truth),
            draw_instances(image, masks, captions=[f"{score:.2f}" for score in scores]),
        ]
        picture = Image.new("RGB", (sum(each.width for each in panels), panels[0].height))
        for place, panel in enumerate(panels):
            picture.paste(panel, (place * panel.width, 0))
        pictures[f"{label['image']}-{number} {label['phrase']}"] = picture
    return pictures


def to_numpy(values: Tensor) -> np.ndarray:
    """A tensor as an array."""
    return values.detach().cpu().numpy()
