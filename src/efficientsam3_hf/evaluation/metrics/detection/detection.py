"""`evaluate` metric: average precision as on COCO or LVIS (`evaluation/detection.py`)."""

from collections.abc import Mapping

import datasets
import evaluate

# Absolute, since `evaluate` runs a copy of this file from elsewhere.
from efficientsam3_hf.evaluation import detection
from efficientsam3_hf.evaluation.overlaps import area

RLE = {"size": [datasets.Value("int64")], "counts": datasets.Value("string")}
INTEGER = datasets.Value("int64")


class Detection(evaluate.Metric):
    """Average precision over images."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Average precision and recall of masks, as COCO or LVIS defines them.",
            citation="",
            inputs_description=(
                "predictions: `segmentations`, `scores` and `category_ids` of one image; "
                "references: `segmentations`, `category_ids`, `iscrowd`, and for LVIS "
                "`neg_category_ids` and `not_exhaustive_category_ids` (empty for COCO). Option: "
                "`frequencies`, category -> r, c or f, asks for the numbers of LVIS."
            ),
            features=datasets.Features(
                {
                    "predictions": {
                        "segmentations": [RLE],
                        "scores": [datasets.Value("float64")],
                        "category_ids": [INTEGER],
                    },
                    "references": {
                        "segmentations": [RLE],
                        "category_ids": [INTEGER],
                        "iscrowd": [datasets.Value("bool")],
                        "neg_category_ids": [INTEGER],
                        "not_exhaustive_category_ids": [INTEGER],
                    },
                }
            ),
        )

    def _compute(
        self,
        predictions: list,
        references: list,
        frequencies: Mapping[int, str] | None = None,
    ) -> dict[str, float]:
        truth: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        results = []
        for image, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
            names = ("neg_category_ids", "not_exhaustive_category_ids")
            masks = true["segmentations"] + predicted["segmentations"]
            height, width = masks[0]["size"] if masks else (1, 1)
            entry = {"id": image, "height": height, "width": width}
            truth["images"].append({**entry, **{name: true[name] for name in names}})
            for mask, category, crowd in zip(
                true["segmentations"], true["category_ids"], true["iscrowd"], strict=True
            ):
                entry = {"image_id": image, "category_id": category, "segmentation": mask}
                truth["annotations"].append({**entry, "area": area(mask), "iscrowd": int(crowd)})
            for mask, category, score in zip(
                predicted["segmentations"],
                predicted["category_ids"],
                predicted["scores"],
                strict=True,
            ):
                entry = {"image_id": image, "category_id": category, "segmentation": mask}
                results.append({**entry, "score": score})
        frequencies = dict(frequencies or {})
        categories = frequencies.keys() | {a["category_id"] for a in truth["annotations"]}
        truth["categories"] = [
            {"id": category, "frequency": frequencies.get(category)}
            for category in sorted(categories)
        ]
        score = detection.score_lvis if frequencies else detection.score_coco
        return detection.summarize(score(truth, results))
