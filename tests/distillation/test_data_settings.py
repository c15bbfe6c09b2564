"""What the section `data` makes of settings."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientsam3_hf.data.augmentations import ChooseQueries
from efficientsam3_hf.distillation.data_settings import DataSettings, load_samples
from efficientsam3_hf.distillation.launch import make_run


@pytest.fixture
def forty_categories(tmp_path) -> Path:
    """A picture with one of forty categories, in the forms of COCO and LVIS."""
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "1.jpg")
    image = {"id": 1, "file_name": "1.jpg", "height": 8, "width": 8}
    image |= {"neg_category_ids": list(range(2, 41)), "not_exhaustive_category_ids": []}
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "iscrowd": 0}
    categories = [{"id": number, "name": f"thing {number}"} for number in range(1, 41)]
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    for name in ("instances_train", "lvis_v1_train"):
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_what_evaluation_skips_is_not_in_the_list_of_training(forty_categories):
    broken = forty_categories / "broken.jsonl"
    (forty_categories / "images" / "1.jpg").write_bytes(b"")
    data = DataSettings(
        "coco", str(forty_categories), images="images", eval_limit=1, broken_list=str(broken)
    )

    evaluated = data.for_evaluation()
    assert load_samples(evaluated, "images")[0] is None
    assert not broken.exists()
    assert load_samples(data, "images")[0] is None
    assert len(broken.read_text().splitlines()) == 1


def test_training_takes_the_next_picture_for_one_that_cannot_be_read(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    data = {"root": str(tmp_path), "eval_root": str(tmp_path)}
    sections = {"stage": {"name": "stage1_image"}, "student": {"name": "any"}, "data": data}

    run = make_run({**sections, "training": {"output_dir": str(tmp_path), "use_cpu": True}})

    trained, evaluated = run.train_dataset, run.eval_dataset
    assert [int(trained[index].image[0, 0, 0]) for index in range(len(trained))] == [0, 2, 2]
    assert [evaluated[index] is None for index in range(len(evaluated))] == [False, True, False]


@pytest.mark.parametrize("name", ["coco", "lvis"])
def test_all_that_is_absent_is_asked_for_in_the_course_of_epochs(forty_categories, name: str):
    data = DataSettings(name, str(forty_categories), images="images", negatives=2, on_error="raise")
    samples = load_samples(data, "images")
    choose = ChooseQueries(data.positives, data.negatives)

    asked = []
    for epoch in range(300):
        for each in (samples, choose):
            each.set_epoch(epoch)
        asked.append({query.phrase for query in choose(samples[0]).queries if query.is_negative})

    assert {len(phrases) for phrases in asked} == {2}
    assert len(set.union(*asked)) == 39
