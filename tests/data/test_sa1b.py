"""SA-1B: tars and extracted files, near and far."""

import json
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.sa1b import Sa1b, write_sa1b
from efficientsam3_hf.data.synthetic import Scenes


@pytest.fixture(scope="module")
def scenes() -> list:
    dataset = Scenes(7, ask="anything", side=48)
    return [dataset[index] for index in range(7)]


@pytest.fixture(scope="module")
def tars(tmp_path_factory, scenes) -> str:
    folder = tmp_path_factory.mktemp("tars")
    write_sa1b(scenes, folder, per_tar=3)
    return str(folder)


@pytest.fixture(scope="module")
def far_tars(tars) -> str:
    fsspec.filesystem("memory").put(tars + "/", "/tars/", recursive=True)
    return "memory://tars"


@pytest.fixture(scope="module")
def files(tmp_path_factory, scenes) -> str:
    folder = tmp_path_factory.mktemp("files")
    write_sa1b(scenes, folder)
    return str(folder)


def check(samples, scenes) -> None:
    for sample, scene in zip(samples, scenes, strict=True):
        (query,), (original,) = sample.queries, scene.queries
        assert sample.source_id == f"sa_{scene.source_id}"
        assert sample.size == scene.size
        assert query.phrase is None
        assert not query.is_exhaustive
        for found, instance in zip(query.instances, original.instances, strict=True):
            assert found.rle == instance.rle
            assert found.box_xyxy == instance.box_xyxy
            assert found.points == instance.points
            assert found.details["predicted_iou"] == 1.0
        # A JPEG is not what was drawn, but near.
        assert np.abs(sample.image.astype(int) - scene.image).mean() < 8


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["tars", "far_tars", "files"])
def test_what_is_written_is_read(request, scenes, where: str, streaming: bool):
    samples = load(Sa1b(request.getfixturevalue(where)), streaming=streaming, on_error="raise")

    check(list(samples), scenes)


def test_documented_json_is_read_with_all_kinds_of_masks(tmp_path):
    counts = [5, 2, 2, 2, 2, 2, 5]
    kinds = [
        {"size": [4, 5], "counts": "5220003"},
        {"size": [4, 5], "counts": counts},
        [[1, 1, 4, 1, 4, 3, 1, 3]],
    ]
    annotations = [
        {
            "id": 500 + number,
            "segmentation": kind,
            "bbox": [1, 1, 3, 2],
            "area": 6,
            "predicted_iou": 0.97,
            "stability_score": 0.98,
            "crop_box": [0, 0, 5, 4],
            "point_coords": [[2.0, 1.5]],
            "label_2": "red door" if number else "a knob",
            "mask_sample_points_xy": [[1, 1], [3, 2]],
        }
        for number, kind in enumerate(kinds)
    ]
    image = {"image_id": 9, "width": 5, "height": 4, "file_name": "sa_9.jpg"}
    (tmp_path / "sa_9.json").write_text(json.dumps({"image": image, "annotations": annotations}))
    Image.new("RGB", (5, 4)).save(tmp_path / "sa_9.jpg")
    expected = np.zeros((4, 5), dtype=bool)
    expected[1:3, 1:4] = True

    (sample,) = load(Sa1b(str(tmp_path)), on_error="raise")
    (captioned,) = load(Sa1b(str(tmp_path), captions="label_2"), on_error="raise")

    for instance in sample.queries[0].instances:
        np.testing.assert_array_equal(instance.mask, expected)
        assert instance.points == [(2.0, 1.5), (1.0, 1.0), (3.0, 2.0)]
        assert instance.details["stability_score"] == 0.98
    assert [(query.phrase, len(query.instances)) for query in captioned.queries] == [
        ("a knob", 1),
        ("red door", 2),
    ]


def test_a_pattern_chooses_tars(tars):
    assert load(Sa1b(tars, tars="sa_00000[12].tar")).names == ["sa_3", "sa_4", "sa_5", "sa_6"]


def test_pictures_alone_need_no_annotations(files, tmp_path):
    Image.open(f"{files}/sa_3.jpg").save(tmp_path / "sa_3.jpg")

    (sample,) = load(Sa1b(str(tmp_path), annotations=False), on_error="raise")

    assert sample.queries == []
    assert sample.size == (48, 48)
    assert sample.image.shape == (48, 48, 3)


def test_a_picture_without_annotations_is_listed(files, tmp_path):
    Image.open(f"{files}/sa_3.jpg").save(tmp_path / "sa_3.jpg")

    samples = load(Sa1b(str(tmp_path)))

    assert list(samples) == []
    assert samples.broken.listed() == {"sa_3": "FileNotFoundError: There is no sa_3.json"}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("far", [False, True])
def test_a_tar_that_is_cut_short_is_used_as_far_as_it_goes(
    tars, tmp_path, streaming: bool, far: bool
):
    data = Path(tars, "sa_000000.tar").read_bytes()
    with tarfile.open(f"{tars}/sa_000000.tar") as tar:
        last = tar.getmembers()[-1]
    (tmp_path / "sa_000000.tar").write_bytes(data[: last.offset + 300])
    folder = str(tmp_path)
    if far:
        fsspec.filesystem("memory").put(folder + "/", "/cut/", recursive=True)
        folder = "memory://cut"

    samples = load(Sa1b(folder), streaming=streaming)

    assert [sample.source_id for sample in samples] == ["sa_0", "sa_1"]
    listed = samples.broken.listed()
    assert "sa_2" in listed
    assert "json" in listed["sa_2"]


@pytest.mark.parametrize("far", [False, True])
def test_parts_of_a_tar_may_lie_apart(files, tmp_path, far: bool):
    with tarfile.open(tmp_path / "sa_000000.tar", "w") as tar:
        for name in ("sa_0.jpg", "sa_1.jpg", "sa_1.json", "sa_0.json"):
            tar.add(f"{files}/{name}", name)
    folder = str(tmp_path)
    if far:
        fsspec.filesystem("memory").put(folder + "/", "/apart/", recursive=True)
        folder = "memory://apart"

    samples = list(load(Sa1b(folder), streaming=True, on_error="raise"))

    assert sorted(sample.source_id for sample in samples) == ["sa_0", "sa_1"]


def test_a_wrong_choice_is_an_error(tars):
    with pytest.raises(ValueError, match="label_2"):
        Sa1b(tars, captions="long")
