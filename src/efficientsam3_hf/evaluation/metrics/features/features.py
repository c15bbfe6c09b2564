"""`evaluate` metric: tokens of a student against the teacher's (`evaluation/features.py`)."""

import datasets
import evaluate
import torch

# Absolute, since `evaluate` runs a copy of this file from elsewhere.
from efficientsam3_hf.evaluation import features
from efficientsam3_hf.evaluation.units import stack

TOKENS = [[datasets.Value("float32")]]


class Features(evaluate.Metric):
    """Agreement of tokens over phrases or images."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean cosine, mean squared error and relative error over tokens.",
            citation="",
            inputs_description=(
                "predictions: tokens (tokens, channels) of the student for one phrase or image; "
                "references: those of the teacher. Leave padding out of both."
            ),
            features=datasets.Features({"predictions": TOKENS, "references": TOKENS}),
        )

    def _compute(self, predictions: list, references: list) -> dict[str, float]:
        records = [
            features.score_tokens(torch.tensor(student), torch.tensor(teacher))
            for student, teacher in zip(predictions, references, strict=True)
        ]
        return features.summarize(stack(records))
