"""`evaluate` metric: cgF1 and its parts (`evaluation/concept.py`)."""

import datasets
import evaluate

# Absolute, since `evaluate` runs a copy of this file from elsewhere.
from efficientsam3_hf.evaluation import concept
from efficientsam3_hf.evaluation.units import stack

RLE = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}


class Concept(evaluate.Metric):
    """cgF1 over pairs of image and phrase."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="cgF1, IL_MCC, pmF1 and their variants, as SA-Co defines them.",
            citation="",
            inputs_description=(
                "predictions: `segmentations` and `scores` of one pair of image and phrase; "
                "references: `segmentations` and `iscrowd`, one list for each annotator."
            ),
            features=datasets.Features(
                {
                    "predictions": {"segmentations": [RLE], "scores": [datasets.Value("float64")]},
                    "references": {
                        "segmentations": [[RLE]],
                        "iscrowd": [[datasets.Value("bool")]],
                    },
                }
            ),
        )

    def _compute(
        self, predictions: list, references: list, crowd_aware: bool = False
    ) -> dict[str, float]:
        records = []
        for predicted, truth in zip(predictions, references, strict=True):
            of_annotators = [
                concept.score_pair(
                    predicted["segmentations"],
                    predicted["scores"],
                    masks,
                    crowd,
                    crowd_aware=crowd_aware,
                )
                for masks, crowd in zip(truth["segmentations"], truth["iscrowd"], strict=True)
            ]
            records.append(concept.best_annotator(of_annotators))
        return concept.summarize(stack(records))
