"""COCO, LVIS and Roboflow: written and read, and hand-written files of the documented form."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from efficientsam3_hf.data.coco import CocoImages, LvisImages, RoboflowImages, write_coco
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.synthetic import CATEGORIES, Scenes

MASK = np.zeros((4, 5), dtype=bool)
MASK[1:3, 1:4] = True
COUNTS = [5, 2, 2, 2, 2, 2, 5]


def compressed() -> dict:
    rle = mask_api.encode(np.asfortranarray(MASK.astype(np.uint8)))
    return {"size": [4, 5], "counts": rle["counts"].decode()}


def write_by_hand(folder, segmentations, images=None, categories=None, **more) -> None:
    """Annotations of one picture, written as the documents have them."""
    annotations = [
        {
            "id": 10 + number,
            "image_id": 139,
            "category_id": 18,
            "bbox": [1, 1, 3, 2],
            "area": 6,
            "iscrowd": number % 2,
            "segmentation": segmentation,
        }
        for number, segmentation in enumerate(segmentations)
    ]
    image = {"id": 139, "file_name": "000000000139.jpg", "height": 4, "width": 5}
    content = {
        "images": images or [image],
        "annotations": annotations,
        "categories": categories or [{"id": 18, "name": "dog"}, {"id": 64, "name": "potted_plant"}],
        **more,
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    (folder / "val2017").mkdir()
    Image.new("RGB", (5, 4), "red").save(folder / "val2017" / "000000000139.jpg")


def without_pixels(samples) -> list:
    return [{**vars(sample), "image": None} for sample in samples]


def written_scenes() -> list:
    """Scenes whose pictures survive being written, and a query that is not exhaustive."""
    scenes = Scenes(6, ask="shapes", side=64)
    samples = []
    for index in range(6):
        sample = scenes[index]
        sample.file_name = sample.file_name.replace(".jpg", ".png")
        for query in sample.queries:
            for number, instance in enumerate(query.instances):
                instance.points = []  # which COCO has not
                instance.is_crowd = number == 1
        # Readers give what is there first.
        sample.queries.sort(key=lambda query: (query.is_negative, query.source_id))
        samples.append(sample)
    return samples


@pytest.mark.parametrize(
    ("form", "reader"), [("coco", CocoImages), ("roboflow", RoboflowImages), ("lvis", LvisImages)]
)
def test_what_is_written_is_read(tmp_path, form: str, reader):
    samples = written_scenes()
    if form == "lvis":
        samples[0].queries[0].is_exhaustive = False

    write_coco(samples, tmp_path, "val2017", form)
    read = list(load(reader(str(tmp_path), "val2017", negatives="all"), on_error="raise"))

    for sample in samples:
        sample.source = form
    assert without_pixels(read) == without_pixels(samples)
    for sample, original in zip(read, samples, strict=True):
        np.testing.assert_array_equal(sample.image, original.image)


def test_polygons_and_both_kinds_of_run_lengths_are_one_mask(tmp_path):
    polygon = [[1.0, 1.0, 4.0, 1.0, 4.0, 3.0, 1.0, 3.0]]
    write_by_hand(tmp_path, [polygon, {"size": [4, 5], "counts": COUNTS}, compressed()])

    (sample,) = load(CocoImages(str(tmp_path)), on_error="raise")

    (query,) = sample.queries
    assert (query.phrase, query.source_id, sample.size) == ("dog", 18, (4, 5))
    assert [each.is_crowd for each in query.instances] == [False, True, False]
    assert [each.source_id for each in query.instances] == [10, 11, 12]
    for instance in query.instances:
        np.testing.assert_array_equal(instance.mask, MASK)
        assert instance.box_xyxy == (1, 1, 4, 3)


def test_boxes_alone_have_no_mask(tmp_path):
    write_by_hand(tmp_path, [[], None])

    (sample,) = load(CocoImages(str(tmp_path)), on_error="raise")

    assert [each.rle for each in sample.queries[0].instances] == [None, None]
    with pytest.raises(ValueError, match="a box and no mask"):
        _ = sample.queries[0].instances[0].mask


def test_absent_categories_are_asked_for_as_often_as_told(tmp_path):
    write_by_hand(tmp_path, [compressed()])

    def phrases(negatives):
        (sample,) = load(CocoImages(str(tmp_path), negatives=negatives))
        return [(query.phrase, query.is_negative) for query in sample.queries]

    assert phrases(0) == [("dog", False)]
    assert phrases(5) == phrases("all") == [("dog", False), ("potted plant", True)]
    with pytest.raises(ValueError, match='a number or "all"'):
        CocoImages(str(tmp_path), negatives="many")


def test_negatives_of_an_image_are_the_same_each_time(tmp_path):
    write_coco(written_scenes(), tmp_path, "val2017")

    def chosen():
        samples = load(CocoImages(str(tmp_path), negatives=3, pixels=False))
        return [[q.phrase for q in sample.queries if q.is_negative] for sample in samples]

    assert chosen() == chosen()
    assert {len(phrases) for phrases in chosen()} == {3}
    assert len({tuple(phrases) for phrases in chosen()}) > 1


def test_what_a_category_belongs_to_is_told(tmp_path):
    dog = {"id": 18, "name": "dog", "supercategory": "animal"}
    write_by_hand(tmp_path, [compressed()], None, [dog, {"id": 64, "name": "potted_plant"}])

    (sample,) = load(CocoImages(str(tmp_path), negatives="all"), on_error="raise")

    assert [each.details for each in sample.queries] == [{"supercategory": "animal"}, {}]


def test_lvis_says_what_is_absent_and_what_is_not_exhaustive(tmp_path):
    image = {
        "id": 139,
        "height": 4,
        "width": 5,
        "coco_url": "http://images.cocodataset.org/train2017/000000000139.jpg",
        "neg_category_ids": [2],
        "not_exhaustive_category_ids": [18],
    }
    categories = [
        {"id": 2, "name": "bow_(weapon)", "synonyms": ["bow"], "frequency": "r"},
        {"id": 3, "name": "zebra", "synonyms": ["zebra"], "frequency": "f"},
        {"id": 18, "name": "dog", "synonyms": ["dog"], "frequency": "f"},
    ]
    write_by_hand(tmp_path, [[[1, 1, 4, 1, 4, 3, 1, 3]]], [image], categories)
    (tmp_path / "annotations" / "instances_val2017.json").rename(
        tmp_path / "annotations" / "lvis_v1_val.json"
    )
    (tmp_path / "val2017").rename(tmp_path / "train2017")  # val has pictures of train2017, too

    (sample,) = load(LvisImages(str(tmp_path)), on_error="raise")

    assert [(q.phrase, q.is_negative, q.is_exhaustive) for q in sample.queries] == [
        ("dog", False, False),
        ("bow (weapon)", True, True),
    ]
    assert sample.file_name == "000000000139.jpg"


def test_some_of_lvis_s_negatives_are_not_always_the_first(tmp_path):
    images = [
        {"id": number, "height": 4, "width": 5, "neg_category_ids": [2, 3, 5, 7, 18]}
        | {"coco_url": "http://x/val2017/000000000139.jpg", "not_exhaustive_category_ids": []}
        for number in range(40)
    ]
    categories = [{"id": number, "name": f"category {number}"} for number in (2, 3, 5, 7, 18)]
    write_by_hand(tmp_path, [], images, categories)
    (tmp_path / "annotations" / "instances_val2017.json").rename(
        tmp_path / "annotations" / "lvis_v1_val.json"
    )

    samples = list(load(LvisImages(str(tmp_path), negatives=2, pixels=False), on_error="raise"))

    asked = [query.source_id for sample in samples for query in sample.queries]
    assert len(asked) == 80
    assert set(asked) == {2, 3, 5, 7, 18}


def test_roboflow_s_heading_is_not_asked_for(tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()
    image = {"id": 0, "file_name": "a.jpg", "height": 4, "width": 5}
    annotation = {"id": 0, "image_id": 0, "category_id": 1, "bbox": [0, 0, 2, 2]}
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
        {"id": 2, "name": "dog", "supercategory": "pets"},
    ]
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    (folder / "_annotations.coco.json").write_text(json.dumps(content))
    Image.new("RGB", (5, 4)).save(folder / "a.jpg")

    (sample,) = load(RoboflowImages(str(tmp_path), negatives="all"), on_error="raise")

    assert [query.phrase for query in sample.queries] == ["cat", "dog"]


def test_a_category_of_number_zero_that_this_split_lacks_is_asked_for(tmp_path):
    image = {"id": 0, "file_name": "a.jpg", "height": 4, "width": 5}
    annotation = {"id": 0, "image_id": 0, "category_id": 1, "bbox": [0, 0, 2, 2]}
    categories = [
        {"id": 0, "name": "cat", "supercategory": "animal"},
        {"id": 1, "name": "dog", "supercategory": "animal"},
    ]
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid" / "_annotations.coco.json").write_text(json.dumps(content))

    reader = RoboflowImages(str(tmp_path), "valid", negatives="all", pixels=False)
    (sample,) = load(reader, on_error="raise")

    assert [(query.phrase, query.is_negative) for query in sample.queries] == [
        ("dog", False),
        ("cat", True),
    ]


def break_picture(folder):
    path = folder / "val2017" / "000000000139.jpg"
    path.write_bytes(path.read_bytes()[:200])


def remove_picture(folder):
    (folder / "val2017" / "000000000139.jpg").unlink()


def change_size(folder):
    Image.new("RGB", (4, 4)).save(folder / "val2017" / "000000000139.jpg")


def break_mask(folder):
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace("[5, 2, 2,", "[5, 9, 2,"))


def lose_box(folder):
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(path.read_text().replace('"bbox"', '"box"'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_picture, "OSError"),
        (remove_picture, "FileNotFoundError"),
        (change_size, "its annotations (4, 5)"),
        (break_mask, "cover 27 of 20 pixels"),
        (lose_box, "KeyError: 'bbox'"),
    ],
)
def test_a_broken_record_is_skipped_and_listed_or_raised(tmp_path, damage, reason: str):
    write_by_hand(tmp_path, [{"size": [4, 5], "counts": COUNTS}])
    damage(tmp_path)

    samples = load(CocoImages(str(tmp_path)))

    assert list(samples) == []
    assert samples[0] is None
    assert list(samples.broken.listed()) == ["139"]
    assert reason in samples.broken.listed()["139"]
    with pytest.raises(ValueError, match="Record 139 cannot be used"):
        list(load(CocoImages(str(tmp_path)), on_error="raise"))


def test_annotations_are_read_without_pictures(tmp_path):
    write_by_hand(tmp_path, [compressed()])
    remove_picture(tmp_path)

    (sample,) = load(CocoImages(str(tmp_path), pixels=False), on_error="raise")

    assert sample.image is None


def test_large_pictures_are_decoded_smaller_but_not_too_small(tmp_path):
    scene = Scenes(1, ask="shapes", side=256)[0]
    write_coco([scene], tmp_path)

    (sample,) = load(CocoImages(str(tmp_path), least_size=(60, 60)), on_error="raise")

    assert sample.image.shape == (64, 64, 3)
    assert sample.size == (256, 256)


def test_pycocotools_reads_what_is_written(tmp_path, capsys):
    from pycocotools.coco import COCO

    samples = written_scenes()
    write_coco(samples, tmp_path)

    coco = COCO(str(tmp_path / "annotations" / "instances_val2017.json"))

    assert {key: value["name"] for key, value in coco.cats.items()} == CATEGORIES
    instances = {each.source_id: each for s in samples for q in s.queries for each in q.instances}
    assert set(coco.anns) == set(instances)
    for number, annotation in coco.anns.items():
        expected = mask_api.encode(np.asfortranarray(instances[number].mask.astype(np.uint8)))
        assert coco.annToRLE(annotation)["counts"] in (
            expected["counts"],
            expected["counts"].decode(),
        )


def test_numbers_that_would_repeat_are_given_anew(tmp_path):
    samples = written_scenes()[:3]
    for sample in samples:
        for query in sample.queries:
            for instance in query.instances:
                instance.source_id = 1

    write_coco(samples, tmp_path)
    read = load(CocoImages(str(tmp_path)), on_error="raise")

    numbers = [each.source_id for s in read for q in s.queries for each in q.instances]
    count = sum(len(query.instances) for sample in samples for query in sample.queries)
    assert sorted(numbers) == list(range(1, count + 1))


def test_a_dataset_may_lie_at_an_address(tmp_path):
    import fsspec

    write_coco(written_scenes(), tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", "/far/", recursive=True)

    far = load(CocoImages("memory://far"), on_error="raise")

    near = load(CocoImages(str(tmp_path)))
    assert without_pixels(far) == without_pixels(near)
    np.testing.assert_array_equal(far[3].image, near[3].image)


def test_what_is_broken_is_named(tmp_path):
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text('{"images": [{"id": 1, "file_name": "a.jpg", "height": 2, "width": 2}], ')
    with pytest.raises(ValueError, match=r"instances_val2017\.json is no JSON that can be read"):
        load(CocoImages(str(tmp_path)))

    path.write_text(path.read_text() + '"annotations": [], "categories": []}')
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "a.jpg").write_bytes(b"no picture")
    samples = load(CocoImages(str(tmp_path)))
    assert list(samples) == []
    assert re.search(r"a\.jpg, of 10 bytes, is in no form", samples.broken.listed()["1"])
