"""DAVIS, MOSE, LVOS and YouTube-VOS."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.masks_rle import decode_rle
from efficientsam3_hf.data.synthetic import Clips
from efficientsam3_hf.data.video_folders import FORMS, Davis2017, YoutubeVos, write_video_folders


@pytest.fixture(scope="module")
def clips() -> list:
    dataset = Clips(3, side=64, num_frames=6)
    return [dataset[index] for index in range(3)]


@pytest.mark.parametrize("form", list(FORMS))
def test_what_is_written_is_read(tmp_path, clips, form: str):
    split = "val" if form == "davis2017" else "valid"

    write_video_folders(clips, tmp_path, form, split)
    read = list(load(FORMS[form](str(tmp_path), split), on_error="raise"))

    for found, clip in zip(read, clips, strict=True):
        assert (found.source, found.source_id, found.size) == (form, clip.source_id, (64, 64))
        seen = [masklet for masklet in clip.masklets if masklet.rles]
        assert [m.rles for m in found.masklets] == [m.rles for m in seen]
        assert [m.source_id for m in found.masklets] == [m.source_id for m in seen]
        details = [{} if form == "davis2017" else m.details for m in seen]
        assert [m.details for m in found.masklets] == details
        frames = np.stack([frame.pixels for frame in found.video])
        assert np.abs(frames.astype(int) - np.stack(clip.frames)).mean() < 8


def test_a_zip_is_read_as_it_is(tmp_path, clips):
    write_video_folders(clips, tmp_path / "DAVIS", "davis2017", "val")
    shutil.make_archive(str(tmp_path / "trainval"), "zip", tmp_path, "DAVIS")

    zipped = load(Davis2017(f"zip://DAVIS::{tmp_path}/trainval.zip", "val"), on_error="raise")

    for found, expected in zip(zipped, load(Davis2017(str(tmp_path / "DAVIS"))), strict=True):
        assert found.masklets == expected.masklets
        frames = [[frame.pixels for frame in each.video] for each in (found, expected)]
        assert np.array_equal(*frames)


def test_cuts_begin_at_annotated_frames(tmp_path, clips):
    dataset = Clips(2, side=64, num_frames=9, annotate_every=3)
    write_video_folders([dataset[0], dataset[1]], tmp_path, "mose", "train")

    samples = load(FORMS["mose"](str(tmp_path), "train", cut=Cut(3)), on_error="raise")

    for sample in samples:
        assert sample.frame_indices[0] in (0, 3, 6)
        assert len(sample.frames) == 3
        assert set().union(*(m.rles for m in sample.masklets)) <= {sample.frame_indices[0]}


def write_by_hand(folder, size=(4, 5)) -> None:
    """Every fifth frame of a YouTube-VOS video; the second object appears in the second of them."""
    video = folder / "valid" / "JPEGImages" / "0a1b2c"
    masks = folder / "valid" / "Annotations" / "0a1b2c"
    video.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in (0, 5, 10):
        Image.new("RGB", size[::-1]).save(video / f"{number:05d}.jpg")
    for number, value in ((0, 1), (5, 2)):
        labels = np.zeros((4, 5), dtype=np.uint8)
        labels[1:3, 1:4] = value
        picture = Image.fromarray(labels)
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        picture.save(masks / f"{number:05d}.png")
    objects = {
        "1": {"category": "dog", "frames": ["00000", "00005"]},
        "2": {"category": "car", "frames": ["00005", "00010"]},
    }
    meta = {"videos": {"0a1b2c": {"objects": objects}}}
    (folder / "valid" / "meta.json").write_text(json.dumps(meta))


def test_frames_of_documented_youtube_vos_are_numbered_by_place(tmp_path):
    write_by_hand(tmp_path)

    (sample,) = load(YoutubeVos(str(tmp_path)), on_error="raise")

    assert sample.frame_names == ["00000", "00005", "00010"]
    assert (sample.num_frames, sample.annotated_frames) == (3, [0, 1])
    dog, car = sample.masklets
    assert (dog.source_id, list(dog.rles), dog.details["category"]) == (1, [0], "dog")
    assert (car.source_id, list(car.rles), car.details["frames"]) == (2, [1], ["00005", "00010"])
    expected = np.zeros((4, 5), dtype=bool)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(decode_rle(car.rles[1]), expected)


def test_void_pixels_of_davis_are_no_object(tmp_path, clips):
    write_video_folders(clips[:1], tmp_path)
    path = tmp_path / "Annotations" / "480p" / str(clips[0].source_id) / "00002.png"
    with Image.open(path) as picture:
        labels = np.array(picture)
    labels[:3, :4] = 255
    Image.fromarray(labels).save(path)

    (sample,) = load(Davis2017(str(tmp_path)), on_error="raise")

    assert list(sample.ignored) == [2]
    assert decode_rle(sample.ignored[2]).sum() == 12
    assert 255 not in [masklet.source_id for masklet in sample.masklets]
    write_video_folders([sample], tmp_path / "again")
    (again,) = load(Davis2017(str(tmp_path / "again")), on_error="raise")
    assert again.ignored == sample.ignored


def lose_frame(folder):
    (folder / "valid" / "JPEGImages" / "0a1b2c" / "00005.jpg").unlink()


def break_mask(folder):
    path = folder / "valid" / "Annotations" / "0a1b2c" / "00005.png"
    path.write_bytes(path.read_bytes()[:60])


def lose_masks(folder):
    for path in (folder / "valid" / "Annotations" / "0a1b2c").iterdir():
        path.unlink()


def colour_mask(folder):
    Image.new("RGB", (5, 4)).save(folder / "valid" / "Annotations" / "0a1b2c" / "00005.png")


def shrink_mask(folder):
    Image.new("L", (4, 4)).save(folder / "valid" / "Annotations" / "0a1b2c" / "00005.png")


def shrink_frames(folder):
    for path in (folder / "valid" / "JPEGImages" / "0a1b2c").iterdir():
        Image.new("RGB", (4, 4)).save(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lose_frame, "a frame that is not there"),
        (break_mask, "Error"),
        (lose_masks, "has no masks"),
        (colour_mask, "need a palette"),
        (shrink_mask, "not (4, 5)"),
        (shrink_frames, "its annotations (4, 5)"),
    ],
)
def test_a_broken_video_is_skipped_and_listed(tmp_path, damage, reason: str):
    write_by_hand(tmp_path)
    damage(tmp_path)

    samples = load(YoutubeVos(str(tmp_path), cut=Cut(2, place="start")))

    assert list(samples) == []
    assert reason in samples.broken.listed()["0a1b2c"]


def test_what_does_not_fit_a_png_cannot_be_written(tmp_path, clips):
    from dataclasses import replace

    query = clips[0].queries[0]
    masklets = [replace(query.masklets[0], source_id=255)]
    clip = replace(clips[0], queries=[replace(query, masklets=masklets)])

    with pytest.raises(ValueError, match="255 is no number"):
        write_video_folders([clip], tmp_path)
    with pytest.raises(ValueError, match="form is one of"):
        write_video_folders([clip], tmp_path, "ytvos")
