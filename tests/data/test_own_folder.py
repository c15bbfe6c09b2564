"""Folders of one's own pictures and videos."""

import json

import numpy as np
import pytest
from PIL import Image

from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.own_folder import OwnImages, OwnVideos
from efficientsam3_hf.data.sav import write_sav_videos
from efficientsam3_hf.data.synthetic import Clips


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "beach").mkdir()
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "beach" / "1.jpg")
    Image.new("L", (5, 4)).save(tmp_path / "2.PNG")
    (tmp_path / "notes.md").write_text("no picture")
    return tmp_path


def asked(samples) -> dict:
    return {sample.source_id: [query.phrase for query in sample.queries] for sample in samples}


def test_every_picture_is_asked_for_every_phrase(folder):
    (folder / "phrases.txt").write_text("a boat\n\n a dog \n")

    samples = list(load(OwnImages(str(folder)), on_error="raise"))

    assert asked(samples) == {"2.PNG": ["a boat", "a dog"], "beach/1.jpg": ["a boat", "a dog"]}
    assert [sample.image.shape for sample in samples] == [(4, 5, 3), (6, 8, 3)]
    for query in samples[0].queries:
        assert query.instances is None
        assert not query.is_negative


def test_phrases_may_be_given_or_differ(folder):
    (folder / "phrases.json").write_text(json.dumps({"beach/1.jpg": ["a boat"]}))

    assert asked(load(OwnImages(str(folder)))) == {"2.PNG": [], "beach/1.jpg": ["a boat"]}
    assert asked(load(OwnImages(str(folder), ["x"]))) == {"2.PNG": ["x"], "beach/1.jpg": ["x"]}


def test_pictures_of_16_bits_and_transparent_ones_are_as_they_look(tmp_path):
    folder = tmp_path / "video"
    folder.mkdir()
    Image.fromarray(np.full((4, 6), 51 * 257, dtype=np.uint16)).save(folder / "deep.png")
    Image.new("RGBA", (6, 4), (0, 0, 0, 204)).save(folder / "glass.png")

    samples = list(load(OwnImages(str(folder)), on_error="raise"))
    (clip,) = load(OwnVideos(str(tmp_path)), on_error="raise")

    for pixels in [*(sample.image for sample in samples), *(each.pixels for each in clip.video)]:
        assert np.array_equal(pixels, np.full((4, 6, 3), 51))


def test_photographs_are_turned_as_the_camera_was_held(tmp_path):
    picture = Image.new("RGB", (8, 6))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by a quarter
    picture.save(tmp_path / "held.jpg", exif=exif)

    (upright,) = load(OwnImages(str(tmp_path)))
    (stored,) = load(OwnImages(str(tmp_path), upright=False))

    assert (upright.size, stored.size) == ((8, 6), (6, 8))


def test_a_photograph_on_its_side_is_not_decoded_too_small(tmp_path):
    picture = Image.new("RGB", (400, 300))
    exif = picture.getexif()
    exif[0x0112] = 6  # upright it is 300 wide and 400 high
    picture.save(tmp_path / "held.jpg", exif=exif)

    (half,) = load(OwnImages(str(tmp_path), least_size=(200, 100)))
    (whole,) = load(OwnImages(str(tmp_path), least_size=(100, 200)))

    assert (half.size, half.image.shape) == ((400, 300), (200, 150, 3))
    assert whole.image.shape == (400, 300, 3)  # half of it would be 150 wide


def test_a_broken_picture_is_listed_and_an_empty_folder_is_an_error(folder, tmp_path_factory):
    (folder / "2.PNG").write_bytes(b"no picture")

    samples = load(OwnImages(str(folder)))

    assert asked(samples) == {"beach/1.jpg": []}
    assert list(samples.broken.listed()) == ["2.PNG"]
    with pytest.raises(ValueError, match="has no records"):
        load(OwnImages(str(tmp_path_factory.mktemp("empty"))))


def test_videos_are_files_and_folders_of_pictures(tmp_path):
    clip = Clips(1, side=32, num_frames=9, annotate_every=4)[0]
    write_sav_videos([clip], tmp_path)
    (tmp_path / "holiday").mkdir()
    for number in range(11):
        pixels = np.full((4, 5, 3), 20 * number, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "holiday" / f"{number}.png")

    whole = list(load(OwnVideos(str(tmp_path), ["a dog"]), on_error="raise"))
    cuts = list(load(OwnVideos(str(tmp_path), cut=Cut(3, step=2)), on_error="raise"))

    assert asked(whole) == {"holiday": ["a dog"], "train_000000.mp4": ["a dog"]}
    assert [sum(1 for _ in sample.video) for sample in whole] == [11, 9]
    assert [sample.num_frames for sample in whole + cuts] == [11, 9, 11, 9]
    start = cuts[0].frame_indices[0]
    assert [int(f.mean()) for f in cuts[0].frames] == [20 * (start + step) for step in (0, 2, 4)]
