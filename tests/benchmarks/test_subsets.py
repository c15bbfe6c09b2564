"""Datasets found by their files, written by the real writers."""

import json
from pathlib import Path

import pytest

from efficientsam3_hf.benchmarks.subsets import FINDERS, LAYOUTS, find_subsets
from efficientsam3_hf.benchmarks.suite import TASKS, look_around
from efficientsam3_hf.data.synthetic_writer import write_synthetic

# Form of the writer -> format of the command.
FORMATS = {
    "coco": "coco",
    "lvis": "lvis",
    "roboflow": "roboflow",
    "saco": "saco",
    "sa1b": "sa1b",
    "sa1b_tars": "sa1b",
    "davis2017": "davis2017",
    "mose": "mose",
    "lvos": "lvos",
    "youtube_vos": "youtube-vos",
    "sav_folders": "sa-v",
    "saco_video": "saco-video",
}


def test_every_format_of_a_task_can_be_found_and_described():
    wanted = {form for task in TASKS.values() for form in task.formats}

    assert wanted == set(FINDERS) == set(LAYOUTS)


@pytest.mark.parametrize("form", FORMATS)
def test_a_format_is_told_by_its_files(form, tmp_path):
    folder = tmp_path / "data"
    write_synthetic(folder, form, "val", count=2, side=64, num_frames=5)
    others = [name for name in FINDERS if name not in ("own", "phrases")]

    (subset,) = find_subsets(folder, others)

    assert subset.form == FORMATS[form]
    assert len(subset.open(None).samples) == 2
    assert subset.samples[0] is not None
    assert look_around(tmp_path, [FORMATS[form]], None)[0].form == FORMATS[form]


def test_a_limit_takes_the_first_and_says_so(tmp_path):
    write_synthetic(tmp_path, "coco", "val", count=3, side=64)
    (subset,) = find_subsets(tmp_path, ["coco"])

    subset.open(2)

    assert subset.samples.names == ["0", "1"]
    assert subset.split == "val2017, first 2 of 3"


def gold(folder: Path, names: str, split: str = "test") -> None:
    for name in names:
        for letter in "abc":
            write_synthetic(folder, "saco", "test", count=1, side=64)
            path = folder / "gold_synthetic_merged_a_release_test.json"
            path.rename(folder / f"gold_{name}_merged_{letter}_release_{split}.json")


def test_gold_has_subsets_with_three_annotators_each(tmp_path):
    gold(tmp_path, "xy")

    subsets = find_subsets(tmp_path, ["saco"])

    assert [subset.name for subset in subsets] == ["x", "y"]
    assert [len(subset.truth) for subset in subsets] == [3, 3]
    assert [path.name[-20:-18] for path in subsets[0].truth] == ["_a", "_b", "_c"]


def test_pictures_of_gold_lie_in_folders_of_their_own(tmp_path):
    gold(tmp_path / "gt-annotations", "x")
    (tmp_path / "gt-annotations" / "images").rename(tmp_path / "metaclip-images")

    (subset,) = find_subsets(tmp_path, ["saco"])

    assert subset.open(None).samples[0].image.shape == (64, 64, 3)


def test_of_several_splits_one_must_be_chosen(tmp_path):
    write_synthetic(tmp_path, "coco", "train", count=1, side=64)
    annotations = tmp_path / "annotations"
    content = json.loads((annotations / "instances_train2017.json").read_text())
    (annotations / "instances_mine.json").write_text(json.dumps(content))

    with pytest.raises(ValueError, match=r"splits mine, train2017: choose by --split"):
        find_subsets(tmp_path, ["coco"])
    (subset,) = find_subsets(tmp_path, ["coco"], split="train2017")
    assert subset.split == "train2017"
