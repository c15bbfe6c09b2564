"""`efficientsam3 segment` and `track`: what they write, for models of ours and of transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam3_hf import EfficientSam3Model
from efficientsam3_hf.data import track_writers, video
from efficientsam3_hf.data.masks_rle import decode_rle
from efficientsam3_hf.data.video import open_video

CPU = ("--device", "cpu")


@pytest.fixture
def picture(world) -> Path:
    return sorted((world / "coco").rglob("*.jpg"))[0]


@pytest.fixture
def clip(world) -> Path:
    return sorted((world / "davis2017" / "JPEGImages" / "480p").iterdir())[0]


@pytest.mark.parametrize(
    ("family", "prompt", "labels"),
    [
        ("ours", ["--text", "dog", "--text", "a red circle"], {"dog", "a red circle"}),
        ("ours", ["--box", "5,5,40,40", "--point", "50,50"], {"visual"}),
        ("sam3", ["--text", "dog"], {"dog"}),
    ],
)
def test_segment_writes_a_picture_and_masks(
    family, prompt, labels, command, picture, request, tmp_path
):
    model, overlay = request.getfixturevalue(family), tmp_path / "new" / "overlay.png"

    ran = command(
        *("segment", picture, "-m", model, *prompt, "--threshold", 0.01, "-o", overlay),
        *("--json", *CPU),
    )

    assert ran.code == 0, ran.err
    instances = ran.json["instances"]
    assert {each["label"] for each in instances} == labels
    assert all(each["score"] > 0.01 for each in instances)
    assert decode_rle(instances[0]["segmentation"]).shape == (96, 96)
    drawn, plain = np.asarray(Image.open(overlay)), np.asarray(Image.open(picture))
    assert drawn.shape == plain.shape
    assert (drawn != plain).any()


@pytest.mark.parametrize("kind", ["16 bits", "transparent"])
def test_the_model_sees_and_the_overlay_shows_what_the_picture_shows(
    kind, command, ours, tmp_path, monkeypatch
):
    path, value = tmp_path / "picture.png", 51
    if kind == "16 bits":
        Image.fromarray(np.full((60, 90), 51 * 257, dtype=np.uint16)).save(path)
    else:
        Image.new("RGBA", (90, 60), (0, 0, 0, 204)).save(path)
    seen = []
    original = EfficientSam3Model.get_vision_features

    def get_vision_features(self, pixel_values, **inputs):
        seen.append(pixel_values)
        return original(self, pixel_values, **inputs)

    monkeypatch.setattr(EfficientSam3Model, "get_vision_features", get_vision_features)

    ran = command("segment", path, "-m", ours, "--text", "cat", "--threshold", "1", *CPU)

    assert ran.code == 0, ran.err
    torch.testing.assert_close(seen[0], torch.full((1, 3, 112, 112), value / 127.5 - 1))
    with Image.open(path.with_suffix(".found.png")) as overlay:
        assert overlay.getcolors() == [(90 * 60, (value,) * 3)]


def test_a_picture_that_cannot_be_read_is_said(command, ours, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")

    ran = command("segment", path, "-m", ours, "--text", "cat", *CPU)

    assert ran.code == 2
    assert "is not an image that can be read" in ran.err


def test_segment_says_when_nothing_is_found(command, picture, ours, tmp_path):
    ran = command(
        *("segment", picture, "-m", ours, "-t", "dog", "--threshold", 1.0, *CPU),
        *("-o", tmp_path / "overlay.png"),
    )

    assert ran.code == 0
    assert "dog: 0 found" in ran.out
    assert "Nothing scores above 1.0" in ran.out
    assert (np.asarray(Image.open(tmp_path / "overlay.png")) == Image.open(picture)).all()


@pytest.mark.parametrize(
    ("family", "prompt", "objects"),
    [
        ("ours", ["--box", "5,5,40,40", "--point", "50,50"], [1, 2]),
        ("ours", ["--point", "50,50", "--frame", "2"], [1]),
        ("sam3", ["--box", "5,5,40,40", "--box", "50,50,90,90"], [1, 2]),
        ("edgetam", ["--point", "50,50", "--point", "20,20"], [1, 2]),
    ],
)
def test_track_follows_what_is_pointed_at(
    family, prompt, objects, command, clip, request, tmp_path
):
    model = request.getfixturevalue(family)
    outputs = {name: tmp_path / name for name in ("tracks.mp4", "tracks.json", "masks")}

    ran = command(
        *("track", clip, "-m", model, *prompt, "--json", *CPU, "-o", outputs["tracks.mp4"]),
        *("--rle", outputs["tracks.json"], "--davis", outputs["masks"]),
    )

    assert ran.code == 0, ran.err
    first = 2 if "--frame" in prompt else 0
    assert ran.json["frames"] == 4 - first
    assert [each["object_id"] for each in ran.json["objects"]] == objects
    assert min(each["first"] for each in ran.json["objects"]) == first
    assert ran.json["written"] == [str(path) for path in outputs.values()]
    assert len(list(open_video(outputs["tracks.mp4"]))) == 4 - first
    assert len(list(outputs["masks"].glob("*.png"))) == 4 - first
    records = json.loads(outputs["tracks.json"].read_text())
    assert {record["object_id"] for record in records} == set(objects)


@pytest.mark.parametrize("prompt", [["--box", "5,5,40,40"], ["--text", "dog"]])
def test_track_writes_each_frame_before_the_next_is_read(
    prompt, command, clip, ours, tmp_path, monkeypatch
):
    read: list[int] = []
    ahead: list[int] = []
    frames_of = video.PicturesVideo.frames

    def frames(self):
        for frame in frames_of(self):
            read.append(frame.index)
            yield frame

    class Spy:
        def write(self, result, pixels):
            ahead.append(len(read) - result.frame_index)

    monkeypatch.setattr(video.PicturesVideo, "frames", frames)
    monkeypatch.setattr(track_writers, "open_writers", lambda *arguments: [Spy()])

    ran = command("track", clip, "-m", ours, *prompt, "-o", tmp_path / "tracks.mp4", *CPU)

    assert ran.code == 0, ran.err
    assert len(ahead) == len(read) == 4
    if "--box" in prompt:
        assert ahead == [1] * 4  # concepts may wait until they are confirmed


@pytest.mark.parametrize(
    ("family", "prompt"),
    [
        ("ours", ["--text", "dog", "--text", "cat"]),
        ("ours", ["--box", "5,5,40,40", "--exemplars"]),
        ("sam3", ["--text", "dog", "--stop", "2"]),
    ],
)
def test_track_follows_concepts(family, prompt, command, clip, request, tmp_path):
    model = request.getfixturevalue(family)

    ran = command(
        *("track", clip, "-m", model, *prompt, "--rle", tmp_path / "tracks.jsonl", "--json", *CPU)
    )

    assert ran.code == 0, ran.err
    assert ran.json["frames"] == (2 if "--stop" in prompt else 4)
    lines = (tmp_path / "tracks.jsonl").read_text().splitlines()
    assert len(lines) == sum(each["frames"] for each in ran.json["objects"])
    if family == "sam3":  # its thresholds are low, and nothing has been removed so soon
        assert {each["label"] for each in ran.json["objects"]} == {"dog"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "PICTURE", "-m", "OURS"], "say what to find"),
        (["segment", "PICTURE", "-m", "OURS", "--box", "1,2"], "'1,2' is not X1,Y1,X2,Y2"),
        (["segment", "nowhere.jpg", "-m", "OURS", "-t", "dog"], "no image 'nowhere.jpg'"),
        (["segment", "PICTURE", "-m", "CLIP", "-t", "dog"], "holds no model"),
        (["segment", "PICTURE", "-m", "SAM3", "--box", "1,2,3,4"], "phrases alone"),
        (
            ["segment", "PICTURE", "-m", "OURS", "-t", "a", "-t", "b", "--point", "1,2"],
            "one phrase",
        ),
        (["track", "CLIP", "-m", "OURS"], "say what to follow"),
        (["track", "nowhere.mp4", "-m", "OURS", "-t", "dog"], "no video nowhere.mp4"),
        (["track", "CLIP", "-m", "OURS", "--point", "1,2", "--exemplars"], "goes with --box"),
        (["track", "CLIP", "-m", "OURS", "--point", "1,2", "--frame", "9"], "no frame 9"),
        (["track", "CLIP", "-m", "OURS", "--point", "1,2", "-o", "a.webm"], "does not end in .mp4"),
        (["track", "CLIP", "-m", "SAM3", "--point", "1,2", "--box", "1,2,9,9"], "not both"),
    ],
)
def test_what_is_wrong_is_said(arguments, message, command, ours, sam3, picture, clip):
    places = {"PICTURE": picture, "CLIP": clip, "OURS": ours, "SAM3": sam3}

    ran = command(*[places.get(each, each) for each in arguments])

    assert ran.code == 2
    assert message in " ".join(ran.err.replace("│", " ").split())
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["segment", "examples/media/scene.jpg"], "instances"),
        (["track", "examples/media/clip.mp4", "--stop", "3"], "frames"),
    ],
)
def test_without_a_model_the_miniature_is_run_and_says_so(
    arguments, key, command, tmp_path, caplog, package_log
):
    name, source, *more = arguments
    source = Path(__file__).parents[2] / source
    output = tmp_path / ("overlay.png" if name == "segment" else "overlay.gif")

    ran = command(name, source, *more, "-t", "red dog", "--json", "-o", output, *CPU)

    assert ran.code == 0, ran.err
    assert key in ran.json
    assert ran.err.count("the miniature that comes with the package") == 1
    assert "--model" in ran.err
    assert [record.message for record in caplog.records if "does not know 'dog'" in record.message]
    assert output.stat().st_size


def test_what_the_miniature_cannot_do_is_said(command, tmp_path):
    scene = Path(__file__).parents[2] / "examples" / "media" / "scene.jpg"

    ran = command("segment", scene, "--point", "80,90", "-o", tmp_path / "overlay.png", *CPU)

    assert ran.code == 2
    assert "point" in ran.err.splitlines()[-1]
    assert not (tmp_path / "overlay.png").exists()
