"""cgF1 against the evaluator of SA-Co itself, where a copy of it is at hand.

    SAM3_SOURCE=/path/to/facebookresearch/sam3 python -m pytest tests/evaluation/test_official.py

Its licence keeps it out of this repository and its pins out of this environment; its one file
needs no more than what is installed here. `test_concept.py` does not depend on it.
"""

import importlib.util
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from random_masks import near, random_mask

from efficientsam3_hf.evaluation.concept import score_files, summarize

SIZE = (8, 10)
EVALUATOR = Path(os.environ.get("SAM3_SOURCE", "nowhere")) / "sam3" / "eval" / "cgf1_eval.py"


def entry(rng: np.random.Generator, pair: int, mask: np.ndarray) -> dict:
    moved = near(rng, mask)
    rle = coco_mask.encode(np.asfortranarray(moved, dtype=np.uint8))
    text = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    box = coco_mask.toBbox(rle).tolist()
    shape = {"segmentation": text, "bbox": box, "area": float(moved.sum())}
    return {"image_id": pair, "category_id": 1, **shape}


def random_subset(rng: np.random.Generator, annotators: int) -> tuple[list[dict], list[dict]]:
    """Files of SA-Co in miniature, and predictions for them."""
    truths = [
        {"images": [], "annotations": [], "categories": [{"id": 1, "name": "it"}]}
        for _ in range(annotators)
    ]
    predictions = []
    for pair in range(1, 61):
        masks = [random_mask(rng, SIZE) for _ in range(rng.integers(4))]
        for truth in truths:
            sure = int(rng.random() < 0.9)
            image = {"id": pair, "height": SIZE[0], "width": SIZE[1]}
            truth["images"].append({**image, "is_instance_exhaustive": sure})
            for mask in masks:
                if rng.random() < 0.8:
                    number, crowd = len(truth["annotations"]) + 1, int(rng.random() < 0.15)
                    found = {**entry(rng, pair, mask), "id": number, "iscrowd": crowd}
                    truth["annotations"].append(found)
        for mask in masks + [random_mask(rng, SIZE)] * int(rng.integers(2)):
            score = float(rng.choice([0.3, 0.5, 0.9]))
            predictions.append({**entry(rng, pair, mask), "score": score})
    return truths, predictions


@pytest.mark.skipif(not EVALUATOR.is_file(), reason="SAM3_SOURCE names no checkout of sam3")
@pytest.mark.parametrize("annotators", [1, 3])
@pytest.mark.parametrize(("kind", "theirs"), [("mask", "segm"), ("box", "bbox")])
def test_numbers_are_those_of_the_official_evaluator(tmp_path, annotators, kind, theirs):
    spec = importlib.util.spec_from_file_location("cgf1_eval", EVALUATOR)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    rng = np.random.default_rng(annotators)
    for _ in range(5):
        truths, predictions = random_subset(rng, annotators)
        paths = [tmp_path / f"{number}.json" for number in range(annotators)]
        for path, truth in zip(paths, truths, strict=True):
            path.write_text(json.dumps(truth))
        (tmp_path / "predictions.json").write_text(json.dumps(predictions))
        with redirect_stdout(io.StringIO()):
            evaluator = official.CGF1Evaluator([str(path) for path in paths], theirs)
            expected = evaluator.evaluate(str(tmp_path / "predictions.json"))

        summary = summarize(score_files(truths, predictions, kind=kind))

        for name, value in expected.items():
            name = name.removeprefix(f"cgF1_eval_{theirs}_")
            name = name.replace("positive_micro_F1", "pmF1")
            assert summary[name] == pytest.approx(value, abs=1e-9), name
