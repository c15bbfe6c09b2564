"""What the section `data` makes of settings."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientsam3_hf.data.augmentations import ChooseQueries
from efficientsam3_hf.distillation.data_settings import DataSettings, load_samples


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
