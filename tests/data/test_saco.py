"""SA-Co Gold, Silver and VEval."""

import json

import numpy as np
import pytest
from PIL import Image

from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.saco import SacoImages, write_saco
from efficientsam3_hf.data.saco_video import SacoVideos, write_saco_videos
from efficientsam3_hf.data.synthetic import Clips, Scenes

COUNTS = [5, 2, 2, 2, 2, 2, 5]
MASK = np.zeros((4, 5), dtype=bool)
MASK[1:3, 1:4] = True


def test_what_is_written_is_read(tmp_path):
    scenes = Scenes(5, side=64)
    samples = [scenes[index] for index in range(5)]
    for sample in samples:
        sample.file_name = f"metaclip-images/1/2/{sample.source_id}.png"
    annotations = tmp_path / "gold_metaclip_merged_a_release_test.json"

    write_saco(samples, annotations, tmp_path)
    read = list(load(SacoImages(str(annotations), str(tmp_path)), on_error="raise"))

    for found, sample in zip(read, samples, strict=True):
        assert (found.file_name, found.size) == (sample.file_name, sample.size)
        np.testing.assert_array_equal(found.image, sample.image)
        for query, original in zip(found.queries, sample.queries, strict=True):
            assert query.phrase == original.phrase
            assert query.is_negative == original.is_negative
            assert query.is_exhaustive
            for instance, drawn in zip(query.instances, original.instances, strict=True):
                assert instance.rle == drawn.rle
                np.testing.assert_allclose(instance.box_xyxy, drawn.box_xyxy, atol=1e-9)
    numbers = [query.source_id for sample in read for query in sample.queries]
    assert len(set(numbers)) == len(numbers)


def test_documented_json_of_gold_is_read(tmp_path):
    pair = {
        "id": 10000000,
        "file_name": "sa1b-images/sa_1.jpg",
        "text_input": "a red door",
        "width": 5,
        "height": 4,
        "queried_category": "77",
        "is_instance_exhaustive": 1,
        "is_pixel_exhaustive": 0,
    }
    other = {**pair, "id": 10000001, "text_input": "a zebra", "queried_category": "78"}
    unsure = {**pair, "id": 10000002, "text_input": "a crack", "is_instance_exhaustive": 0}
    annotation = {
        "id": 1,
        "image_id": 10000000,
        "source": "manual",
        "area": 0.3,
        "bbox": [0.2, 0.25, 0.6, 0.5],
        "segmentation": {"counts": "5220003", "size": [4, 5]},
        "category_id": 1,
        "iscrowd": 0,
    }
    content = {"images": [pair, other, unsure], "annotations": [annotation]}
    (tmp_path / "gold.json").write_text(json.dumps(content))
    (tmp_path / "sa1b-images").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "sa1b-images" / "sa_1.jpg")

    (sample,) = load(SacoImages(str(tmp_path / "gold.json"), str(tmp_path)), on_error="raise")

    door, zebra, crack = sample.queries
    assert (door.phrase, door.source_id) == ("a red door", 10000000)
    assert door.details == {"queried_category": "77", "is_pixel_exhaustive": 0}
    assert door.instances[0].box_xyxy == (1, 1, 4, 3)
    np.testing.assert_array_equal(door.instances[0].mask, MASK)
    assert zebra.is_negative
    assert not crack.is_negative
    assert not crack.is_exhaustive


def written_clips(tmp_path):
    dataset = Clips(3, side=64, num_frames=5, ask="phrases")
    clips = [dataset[index] for index in range(3)]
    annotations = tmp_path / "saco_veval_sav_val.json"
    write_saco_videos(clips, annotations, tmp_path / "frames")
    return clips, SacoVideos(str(annotations), str(tmp_path / "frames"))


def test_videos_that_are_written_are_read(tmp_path):
    clips, reader = written_clips(tmp_path)

    read = list(load(reader, on_error="raise"))

    for number, (found, clip) in enumerate(zip(read, clips, strict=True), start=1):
        assert (found.source_id, found.size, found.num_frames) == (number, (64, 64), 5)
        assert [(q.phrase, q.is_negative) for q in found.queries] == [
            (q.phrase, q.is_negative) for q in clip.queries
        ]
        assert [m.rles for m in found.masklets] == [m.rles for m in clip.masklets]
        frames = [frame.pixels for frame in found.video]
        assert np.abs(np.stack(frames).astype(int) - np.stack(clip.frames)).mean() < 8


def test_cuts_of_videos_have_frames_and_masks_of_their_own(tmp_path):
    clips, reader = written_clips(tmp_path)
    reader.cut = Cut(2, step=2, place="random", seed=1)

    samples = load(reader, on_error="raise")

    starts = {1: set(), 2: set(), 3: set()}
    for epoch in range(12):
        samples.set_epoch(epoch)
        for found, clip in zip(samples, clips, strict=True):
            first, second = found.frame_indices
            starts[found.source_id].add(first)
            assert second == first + 2
            assert len(found.frames) == 2
            for masklet, original in zip(found.masklets, clip.masklets, strict=True):
                expected = {f: original.rles[f] for f in (first, second) if f in original.rles}
                assert masklet.rles == expected
    assert starts == {1: {0, 1, 2}, 2: {0, 1, 2}, 3: {0, 1, 2}}
    assert [c.frame_indices for c in samples] == [c.frame_indices for c in samples]


def test_documented_json_of_veval_is_read(tmp_path):
    rle = {"size": [4, 5], "counts": COUNTS}
    content = {
        "info": {},
        "videos": [
            {
                "id": 7,
                "video_name": "sav_1",
                "file_names": ["sav_1/00000.jpg", "sav_1/00001.jpg", "sav_1/00002.jpg"],
                "height": 4,
                "width": 5,
                "length": 3,
            }
        ],
        "annotations": [
            {
                "id": 70,
                "segmentations": [None, rle, {"size": [4, 5], "counts": [20]}],
                "bboxes": [None, [1, 1, 3, 2], [0, 0, 0, 0]],
                "areas": [None, 6, 0],
                "iscrowd": 0,
                "video_id": 7,
                "height": 4,
                "width": 5,
                "category_id": 3,
                "noun_phrase": "a door",
            }
        ],
        "categories": [{"id": 3, "name": "a door"}, {"id": 4, "name": "a cat"}],
        "video_np_pairs": [
            {"id": 1, "video_id": 7, "category_id": 3, "noun_phrase": "a door", "num_masklets": 1},
            {"id": 2, "video_id": 7, "category_id": 4, "noun_phrase": "a cat", "num_masklets": 0},
        ],
    }
    path = tmp_path / "veval.json"
    path.write_text(json.dumps(content))

    (sample,) = load(SacoVideos(str(path), "nowhere", pixels=False), on_error="raise")

    door, cat = sample.queries
    assert (door.phrase, door.source_id, door.details) == ("a door", 1, {"category_id": 3})
    assert list(door.masklets[0].rles) == [1]  # where it is seen
    assert cat.is_negative
    content["video_np_pairs"][0]["num_masklets"] = 2
    path.write_text(json.dumps(content))
    samples = load(SacoVideos(str(path), "nowhere", pixels=False))
    assert list(samples) == []
    assert "should have 2" in samples.broken.listed()["7"]


def test_a_query_without_phrase_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="without phrase"):
        write_saco_videos([Clips(1, side=32, num_frames=2)[0]], tmp_path / "a.json", tmp_path)
