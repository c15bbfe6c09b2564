"""`evaluate` metric: video cgF1 and pHOTA (`evaluation/video_concept.py`)."""

import datasets
import evaluate

# Absolute, since `evaluate` runs a copy of this file from elsewhere.
from efficientsam3_hf.evaluation import video_concept
from efficientsam3_hf.evaluation.metrics import or_none
from efficientsam3_hf.evaluation.units import stack

RLE = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}


class VideoConcept(evaluate.Metric):
    """cgF1 and pHOTA over pairs of video and phrase."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Video cgF1 and pHOTA, as SA-Co/VEval defines them.",
            citation="",
            inputs_description=(
                "predictions: `masklets` and `scores` of one pair of video and phrase; "
                "references: `masklets`. A masklet has a mask or `ABSENT` for each frame."
            ),
            features=datasets.Features(
                {
                    "predictions": {"masklets": [[RLE]], "scores": [datasets.Value("float64")]},
                    "references": {"masklets": [[RLE]]},
                }
            ),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        records = [
            video_concept.score_pair(
                [or_none(masklet) for masklet in predicted["masklets"]],
                predicted["scores"],
                [or_none(masklet) for masklet in truth["masklets"]],
            )
            for predicted, truth in zip(predictions, references, strict=True)
        ]
        return video_concept.summarize(stack(records))
