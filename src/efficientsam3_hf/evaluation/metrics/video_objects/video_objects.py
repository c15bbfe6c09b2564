"""`evaluate` metric: J, F, J&F and G of followed objects (`evaluation/video_objects.py`)."""

import datasets
import evaluate

# Absolute, since `evaluate` runs a copy of this file from elsewhere.
from efficientsam3_hf.evaluation import video_objects
from efficientsam3_hf.evaluation.metrics import or_none
from efficientsam3_hf.evaluation.units import stack

RLE = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}


class VideoObjects(evaluate.Metric):
    """J and F over objects."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="J, F and J&F over objects, by the rule of a data set; G where it says "
            "which categories were seen in training.",
            citation="",
            inputs_description=(
                "predictions: `segmentations` of one object, a mask or `ABSENT` for each annotated "
                "frame; references: likewise, and `is_seen`, None where the data set has no such "
                "thing. Option: `rule`, a name in `video_objects.RULES`."
            ),
            features=datasets.Features(
                {
                    "predictions": {"segmentations": [RLE]},
                    "references": {"segmentations": [RLE], "is_seen": datasets.Value("bool")},
                }
            ),
        )

    def _compute(
        self, predictions: list, references: list, rule: str = "davis"
    ) -> dict[str, float]:
        records = []
        for predicted, truth in zip(predictions, references, strict=True):
            score = video_objects.score_object(
                or_none(predicted["segmentations"]), or_none(truth["segmentations"]), rule
            )
            if score is not None:
                seen = {} if truth["is_seen"] is None else {"is_seen": truth["is_seen"]}
                records.append(score | seen)
        return video_objects.summarize(stack(records))
