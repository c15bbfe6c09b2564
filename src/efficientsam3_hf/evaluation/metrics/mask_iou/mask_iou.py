"""`evaluate` metric: mean IoU of single objects after each prompt (`evaluation/mask_iou.py`)."""

import datasets
import evaluate

# Absolute, since `evaluate` runs a copy of this file from elsewhere.
from efficientsam3_hf.evaluation import mask_iou
from efficientsam3_hf.evaluation.units import stack

RLE = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}


class MaskIou(evaluate.Metric):
    """Mean IoU over instances."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean IoU over instances, after each prompt.",
            citation="",
            inputs_description=(
                "predictions: `segmentations`, the masks of one object, one for each prompt; "
                "references: `segmentation`, its true mask."
            ),
            features=datasets.Features(
                {"predictions": {"segmentations": [RLE]}, "references": {"segmentation": RLE}}
            ),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        records = [
            mask_iou.score_instance(predicted["segmentations"], truth["segmentation"])
            for predicted, truth in zip(predictions, references, strict=True)
        ]
        return mask_iou.summarize(stack(records))
