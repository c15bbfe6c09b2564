"""Average precision against pycocotools' own sums, lvis, and a slow computation."""

import io
import json
from contextlib import redirect_stdout
from copy import deepcopy

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from random_masks import near, random_mask

from efficientsam3_hf.evaluation.detection import score_coco, score_lvis, summarize

SIZE = (48, 120)  # has room for small, medium and large objects
CATEGORIES = (3, 7, 11)
# Names of pycocotools' twelve numbers.
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
NAMES += ("AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100")


def rle(mask: np.ndarray) -> dict:
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def box_of(mask: np.ndarray) -> list[float]:
    return coco_mask.toBbox(rle(mask)).tolist()


def random_set(rng: np.random.Generator, images: int, crowds: bool) -> tuple[dict, list]:
    """A small data set in COCO's form, with LVIS's fields, and predictions for it."""
    truth = {"images": [], "annotations": [], "categories": []}
    for category, letter in zip(CATEGORIES, "rcf", strict=True):
        truth["categories"].append({"id": category, "name": letter, "frequency": letter})
    predictions = []
    for image in range(images):
        negative, unsure = rng.permutation(CATEGORIES)[:2].tolist()
        truth["images"].append(
            {
                "id": image,
                "height": SIZE[0],
                "width": SIZE[1],
                "neg_category_ids": [negative],
                "not_exhaustive_category_ids": [unsure],
            }
        )
        masks = [random_mask(rng, SIZE) for _ in range(rng.integers(4))]
        for mask in masks:
            if not mask.any():
                continue
            category = int(rng.choice(CATEGORIES))
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": category,
                    "segmentation": rle(mask),
                    "bbox": box_of(mask),
                    "area": int(mask.sum()),
                    "iscrowd": int(crowds and rng.random() < 0.2),
                }
            )
            for _ in range(rng.integers(3)):
                moved = near(rng, mask)
                right = rng.random() < 0.8
                predictions.append(
                    {
                        "image_id": image,
                        "category_id": category if right else int(rng.choice(CATEGORIES)),
                        "segmentation": rle(moved),
                        "bbox": box_of(moved),
                        "score": float(rng.integers(20)) / 20,  # with ties
                    }
                )
    return truth, predictions


def pycocotools_numbers(truth: dict, predictions: list, kind: str) -> np.ndarray:
    with redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = deepcopy(truth)
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(deepcopy(predictions)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats == -1, np.nan, evaluation.stats)


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_coco_numbers_are_those_of_pycocotools(kind):
    rng = np.random.default_rng(0)
    for images in [8] * 200 + [150]:  # and 3 categories; many images have many equal scores
        truth, predictions = random_set(rng, images, crowds=True)
        if not predictions:
            continue

        summary = summarize(score_coco(truth, predictions, kind))

        expected = pycocotools_numbers(truth, predictions, kind)
        assert [summary[name] for name in NAMES] == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated")  # lvis 0.5.3 calls it
def test_lvis_numbers_are_those_of_lvis(tmp_path, monkeypatch):
    lvis = pytest.importorskip("lvis", reason="lvis is not installed")
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 is of before numpy 1.24
    rng = np.random.default_rng(1)
    for trial in range(200):
        truth, predictions = random_set(rng, images=8, crowds=False)
        if not predictions:
            continue
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        reference = lvis.LVIS(str(tmp_path / "truth.json"))
        results = lvis.LVISResults(reference, deepcopy(predictions))
        evaluation = lvis.LVISEval(reference, results, ("segm", "bbox")[trial % 2])
        evaluation.run()

        summary = summarize(score_lvis(truth, predictions, ("segm", "bbox")[trial % 2]))

        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR@300"):
            value = evaluation.results[name]
            expected = np.nan if value == -1 else value
            assert summary[name] == pytest.approx(expected, abs=1e-9, nan_ok=True), name


def square(left: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[:10, left : left + 10] = True
    return mask


def one_image(**fields: list[int]) -> dict:
    image = {"id": 0, "height": SIZE[0], "width": SIZE[1]}
    image |= {"neg_category_ids": [], "not_exhaustive_category_ids": [], **fields}
    categories = [{"id": category, "frequency": "r"} for category in CATEGORIES]
    return {"images": [image], "annotations": [], "categories": categories}


def annotation(mask: np.ndarray, number: int = 0, category: int = 3) -> dict:
    shape = {"segmentation": rle(mask), "bbox": box_of(mask), "area": int(mask.sum())}
    return {"id": number, "image_id": 0, "category_id": category, "iscrowd": 0, **shape}


def prediction(mask: np.ndarray, score: float, category: int = 3) -> dict:
    return {"image_id": 0, "category_id": category, "segmentation": rle(mask), "score": score}


def test_an_example_done_by_hand():
    truth = one_image()
    truth["annotations"] = [annotation(square(0), 1), annotation(square(40), 2)]
    predictions = [
        prediction(square(0), 0.9),
        prediction(square(80), 0.8),  # wrong
        prediction(square(40), 0.7),
    ]

    summary = summarize(score_coco(truth, predictions))

    # Precision 1 up to recall 1/2 (51 of 101 points), 2/3 from there on.
    assert summary["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert summary["AR@100"] == 1
    assert summary["AR@1"] == 0.5
    assert summary["APs"] == summary["AP"]
    assert np.isnan(summary["APl"])


def test_an_annotation_of_id_zero_can_be_found():
    truth = one_image()
    truth["annotations"] = [annotation(square(0), number=0)]
    assert summarize(score_coco(truth, [prediction(square(0), 0.9)]))["AP"] == pytest.approx(1)


def test_lvis_asks_only_for_what_an_image_was_checked_for():
    truth = one_image(neg_category_ids=[7], not_exhaustive_category_ids=[3])
    truth["annotations"] = [annotation(square(0), 1)]
    hit = prediction(square(0), 0.5)
    unmatched = prediction(square(40), 0.9)  # of a category marked in part
    unchecked = prediction(square(0), 0.9, category=11)
    summary = summarize(score_lvis(truth, [unmatched, unchecked, hit]))
    assert summary["AP"] == summary["APr"] == pytest.approx(1)
    assert np.isnan(summary["APf"])

    truth["images"][0]["not_exhaustive_category_ids"] = []
    assert summarize(score_lvis(truth, [unmatched, hit]))["AP"] == pytest.approx(0.5)


def test_lvis_counts_the_best_three_hundred_of_an_image():
    truth = one_image(neg_category_ids=[7])
    truth["annotations"] = [annotation(square(0), 1)]
    many = [prediction(square(40), 0.9, category=7)] * 300
    assert summarize(score_lvis(truth, [*many, prediction(square(0), 0.5)]))["AP"] == 0
    summary = summarize(score_lvis(truth, [*many[1:], prediction(square(0), 0.5)]))
    assert summary["AP"] == pytest.approx(1)


def test_no_prediction_and_no_truth():
    truth = one_image()
    assert np.isnan(summarize(score_coco(truth, []))["AP"])
    assert np.isnan(summarize(score_coco(truth, [prediction(square(0), 0.5)]))["AP"])
    truth["annotations"] = [annotation(square(0), 1)]
    assert summarize(score_coco(truth, []))["AP"] == 0
    assert summarize(score_lvis(truth, []))["AR@300"] == 0


def test_weights_stand_for_repeated_images():
    rng = np.random.default_rng(3)
    truth, predictions = random_set(rng, images=6, crowds=True)
    weights = np.array([2, 0, 1, 3, 1, 1])
    repeated, copies = {**truth, "images": [], "annotations": []}, []
    for image, times in enumerate(weights):
        for turn in range(times):
            number = 10 * image + turn
            repeated["images"].append({**truth["images"][image], "id": number})
            for source, target in (
                (truth["annotations"], repeated["annotations"]),
                (predictions, copies),
            ):
                chosen = [entry for entry in source if entry["image_id"] == image]
                target += [{**entry, "image_id": number} for entry in chosen]
    for entry in predictions:
        entry["score"] += rng.random() / 100  # equal scores would interleave otherwise
    for entry in copies:
        entry["score"] = next(
            p["score"]
            for p in predictions
            if p["image_id"] == entry["image_id"] // 10
            and p["segmentation"] == entry["segmentation"]
        )

    summary = summarize(score_coco(truth, predictions), weights)

    expected = summarize(score_coco(repeated, copies))
    assert summary == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_the_truth_is_left_as_it_is_and_strange_images_are_an_error():
    truth = one_image()
    truth["annotations"] = [annotation(square(0), 5)]
    before = deepcopy(truth)
    score_coco(truth, [prediction(square(0), 0.5)])
    assert truth == before
    with pytest.raises(ValueError, match="1 images that the truth does not have"):
        score_coco(truth, [{**prediction(square(0), 0.5), "image_id": 9}])
    with pytest.raises(ValueError, match="neither 'segm' nor 'bbox'"):
        score_coco(truth, [], "mask")
