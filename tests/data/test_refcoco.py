"""RefCOCO in parquet shards."""

import io

import numpy as np
import pytest
from PIL import Image

from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.refcoco import RefCoco, write_refcoco


def row(number: int) -> dict:
    """A row as documented: a flat polygon, a box of x, y, width and height."""
    picture = io.BytesIO()
    Image.fromarray(np.full((4, 5, 3), 10 * number, dtype=np.uint8)).save(picture, "PNG")
    return {
        "question_id": str(number),
        "image": {"bytes": picture.getvalue(), "path": None},
        "question": "Please describe this region.",
        "answer": ["left dog", f"dog number {number}"],
        "segmentation": [1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0],
        "bbox": [1.0, 1.0, 3.0, 2.0],
        "iscrowd": 0,
        "file_name": f"COCO_train2014_{number:012d}_0.jpg",
    }


@pytest.fixture
def folder(tmp_path) -> str:
    write_refcoco([row(number) for number in range(7)], tmp_path / "data", per_shard=3)
    write_refcoco([row(9)], tmp_path / "data", split="testA")
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_written_is_read(folder, streaming: bool):
    samples = list(load(RefCoco(folder), streaming=streaming, on_error="raise"))

    assert [sample.source_id for sample in samples] == [str(number) for number in range(7)]
    sample = samples[5]
    assert (sample.size, sample.file_name) == ((4, 5), "COCO_train2014_000000000005_0.jpg")
    assert np.unique(sample.image).tolist() == [50]
    assert [query.phrase for query in sample.queries] == ["left dog", "dog number 5"]
    expected = np.zeros((4, 5), dtype=bool)
    expected[1:3, 1:4] = True
    for query in sample.queries:
        (instance,) = query.instances
        assert not query.is_exhaustive
        assert instance.box_xyxy == (1, 1, 4, 3)
        np.testing.assert_array_equal(instance.mask, expected)


def test_splits_are_told_apart_by_the_names_of_shards(folder):
    assert load(RefCoco(folder, "testA")).names == ["9"]
    with pytest.raises(FileNotFoundError, match="test-"):
        load(RefCoco(folder, "test"))


def test_a_picture_is_decoded_once_or_not_at_all(folder, monkeypatch):
    from efficientsam3_hf.data import refcoco

    decoded = []
    read_image = refcoco.read_image
    monkeypatch.setattr(refcoco, "read_image", lambda *a: decoded.append(a) or read_image(*a))

    samples = load(RefCoco(folder, least_size=(2, 2)), on_error="raise")
    assert samples[0].size == (4, 5)
    assert len(decoded) == 1
    assert load(RefCoco(folder, pixels=False), on_error="raise")[0].size == (4, 5)
    assert len(decoded) == 1


def test_a_broken_row_is_skipped_and_listed(tmp_path):
    rows = [row(number) for number in range(3)]
    rows[0]["image"]["bytes"] = rows[0]["image"]["bytes"][:30]
    rows[1]["segmentation"] = [1.0, 2.0]
    write_refcoco(rows, tmp_path)

    samples = load(RefCoco(str(tmp_path)))

    assert [sample.source_id for sample in samples] == ["2"]
    assert list(samples.broken.listed()) == ["0", "1"]
