"""The metrics that `evaluate` loads by path give the numbers of the functions behind them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from random_masks import near, random_mask

from efficientsam3_hf.evaluation import (
    concept,
    detection,
    features,
    mask_iou,
    video_concept,
    video_objects,
)
from efficientsam3_hf.evaluation.metrics import ABSENT, metric_names, metric_path, or_none
from efficientsam3_hf.evaluation.overlaps import to_array
from efficientsam3_hf.evaluation.units import stack

SIZE = (8, 9)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` with a cache of its own and without network."""
    evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")
    cache = tmp_path_factory.mktemp("evaluate")
    (cache / "modules").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", cache / "modules")
        # First, before the user's own, which transformers puts there and older metrics may be in.
        patch.setattr(sys, "path", [str(cache / "modules"), *sys.path])
        yield lambda name: evaluate.load(metric_path(name), cache_dir=str(cache / "data"))
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]


def rle(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def masks(rng: np.random.Generator, most: int = 3) -> list[dict]:
    return [rle(random_mask(rng, SIZE)) for _ in range(rng.integers(most + 1))]


def test_every_metric_has_its_file():
    assert metric_names() == sorted(
        ["concept", "detection", "features", "mask_iou", "video_concept", "video_objects"]
    )
    assert (Path(metric_path("concept")) / "concept.py").is_file()
    with pytest.raises(ValueError, match="no metric 'bleu'; there are concept"):
        metric_path("bleu")


def test_mask_iou(load):
    rng = np.random.default_rng(0)
    truths = [random_mask(rng, SIZE) for _ in range(20)]
    predictions = [[near(rng, truth) for _ in range(3)] for truth in truths]

    numbers = load("mask_iou").compute(
        predictions=[{"segmentations": [rle(m) for m in some]} for some in predictions],
        references=[{"segmentation": rle(truth)} for truth in truths],
    )

    records = map(mask_iou.score_instance, predictions, truths)
    assert numbers == mask_iou.summarize(stack(list(records)))
    assert "mIoU@3" in numbers


@pytest.mark.parametrize("crowd_aware", [False, True])
def test_concept(load, crowd_aware):
    rng = np.random.default_rng(1)
    predictions, references, records = [], [], []
    for _ in range(30):
        found = masks(rng)
        scores = rng.random(len(found)).tolist()
        annotators = [masks(rng) for _ in range(3)]
        crowds = [(rng.random(len(some)) < 0.3).tolist() for some in annotators]
        predictions.append({"segmentations": found, "scores": scores})
        references.append({"segmentations": annotators, "iscrowd": crowds})
        of_annotators = [
            concept.score_pair(found, scores, truth, crowd, crowd_aware=crowd_aware)
            for truth, crowd in zip(annotators, crowds, strict=True)
        ]
        records.append(concept.best_annotator(of_annotators))

    numbers = load("concept").compute(
        predictions=predictions, references=references, crowd_aware=crowd_aware
    )

    assert numbers == pytest.approx(concept.summarize(stack(records)), nan_ok=True)


def test_batches_add_up(load):
    metric = load("concept")
    full = rle(np.ones(SIZE, dtype=bool))
    for _ in range(2):
        metric.add_batch(
            predictions=[{"segmentations": [full], "scores": [0.9]}],
            references=[{"segmentations": [[full]], "iscrowd": [[False]]}],
        )
    metric.add(
        prediction={"segmentations": [], "scores": []},
        reference={"segmentations": [[]], "iscrowd": [[]]},
    )
    assert metric.compute()["cgF1"] == pytest.approx(1, abs=1e-3)


def test_video_concept(load):
    rng = np.random.default_rng(2)
    predictions, references, records = [], [], []
    for _ in range(20):
        found, truth = (
            [
                [rle(random_mask(rng, SIZE)) if rng.random() < 0.7 else ABSENT for _ in range(4)]
                for _ in range(rng.integers(3))
            ]
            for _ in range(2)
        )
        scores = rng.random(len(found)).tolist()
        predictions.append({"masklets": found, "scores": scores})
        references.append({"masklets": truth})
        masklets = [[or_none(masklet) for masklet in some] for some in (found, truth)]
        records.append(video_concept.score_pair(masklets[0], scores, masklets[1]))

    numbers = load("video_concept").compute(predictions=predictions, references=references)

    expected = video_concept.summarize(stack(records))
    assert numbers == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("rule", ["davis", "youtube-vos"])
def test_video_objects(load, rule):
    rng = np.random.default_rng(3)
    predictions, references, records = [], [], []
    for number in range(20):
        found, truth = ([rle(random_mask(rng, SIZE)) for _ in range(5)] for _ in range(2))
        found[2] = ABSENT
        seen = number % 2 == 0 if rule == "youtube-vos" else None
        predictions.append({"segmentations": found})
        references.append({"segmentations": truth, "is_seen": seen})
        score = video_objects.score_object(or_none(found), truth, rule)
        records.append(score if seen is None else {**score, "is_seen": seen})

    numbers = load("video_objects").compute(
        predictions=predictions, references=references, rule=rule
    )

    assert numbers == video_objects.summarize(stack(records))
    assert ("G" in numbers) == (rule == "youtube-vos")


@pytest.mark.parametrize("frequencies", [None, {1: "r", 2: "c", 3: "f"}])
def test_detection(load, frequencies):
    rng = np.random.default_rng(4)
    predictions, references = [], []
    truth = {"images": [], "annotations": [], "categories": []}
    truth["categories"] = [{"id": i, "frequency": "_rcf"[i]} for i in (1, 2, 3)]
    results = []
    for image in range(20):
        found, true = masks(rng), masks(rng)
        found += [rle(near(rng, to_array(mask))) for mask in true]
        kinds, true_kinds = (rng.integers(1, 4, len(m)).tolist() for m in (found, true))
        scores, crowd = (
            rng.random(len(found)).tolist(),
            (rng.random(len(true)) < 0.3 * (frequencies is None)).tolist(),
        )
        extra = {"neg_category_ids": [1], "not_exhaustive_category_ids": [2]}
        predictions.append({"segmentations": found, "scores": scores, "category_ids": kinds})
        reference = {"segmentations": true, "category_ids": true_kinds, "iscrowd": crowd}
        references.append({**reference, **extra})
        truth["images"].append({"id": image, "height": SIZE[0], "width": SIZE[1], **extra})
        for mask, kind, is_crowd in zip(true, true_kinds, crowd, strict=True):
            entry = {"image_id": image, "category_id": kind, "segmentation": mask}
            entry |= {"area": int(coco_mask.area(mask)), "iscrowd": int(is_crowd)}
            truth["annotations"].append({**entry, "id": len(truth["annotations"])})
        for mask, kind, score in zip(found, kinds, scores, strict=True):
            entry = {"image_id": image, "category_id": kind, "segmentation": mask}
            results.append({**entry, "score": score})

    numbers = load("detection").compute(
        predictions=predictions, references=references, frequencies=frequencies
    )

    score = detection.score_lvis if frequencies else detection.score_coco
    expected = detection.summarize(score(truth, results))
    assert numbers == pytest.approx(expected, nan_ok=True)
    assert ("APr" in numbers) == bool(frequencies)


def test_features(load):
    student, teacher = torch.randn(2, 6, 5, 8)

    numbers = load("features").compute(predictions=student.tolist(), references=teacher.tolist())

    records = map(features.score_tokens, student, teacher)
    assert numbers == pytest.approx(features.summarize(stack(list(records))), abs=1e-6)
