"""The examples that track: every output they write, and what they say when they cannot."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import moving_squares, tiny_model, tiny_tracker_video

from efficientsam3_hf import zoo
from efficientsam3_hf.data.track_writers import OverlayWriter
from efficientsam3_hf.data.video import open_video
from examples import track_concepts, track_objects
from examples.track_objects import TrackedFrame

FRAMES = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model, tracker = tiny_model(), tiny_tracker_video("perceiver")
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    return zoo.save(model.config, tmp_path_factory.mktemp("model"), model, tracker)


@pytest.fixture
def video(tmp_path) -> Path:
    """A folder of pictures."""
    clip, _ = moving_squares(FRAMES)
    folder = tmp_path / "clip"
    folder.mkdir()
    for index, frame in enumerate(((clip + 1) * 127).clamp(0, 255).byte().movedim(1, -1)):
        Image.fromarray(frame.numpy()[:60, :90]).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize(
    ("example", "prompt"),
    [
        (track_concepts, ["--text", "cat", "--text", "dog"]),
        (track_concepts, ["--box", "5", "5", "40", "40", "--detect-every", "2", "--delay", "0"]),
        (track_objects, ["--point", "20", "20", "--box", "5", "5", "40", "40"]),
        (track_objects, ["--point", "20", "20", "--frame", "3", "--both", "--memory", "perceiver"]),
    ],
)
def test_every_output_is_written(example, prompt, folder, video, tmp_path, capsys):
    outputs = ["--output", str(tmp_path / "overlay.mp4"), "--rle", str(tmp_path / "tracks.json")]
    outputs += ["--davis", str(tmp_path / "davis")]
    if example is track_concepts:
        prompt = [*prompt, "--threshold", "0.05", "--new-threshold", "0.2"]

    code = example.main([str(video), "--model", str(folder), *prompt, *outputs])

    printed = capsys.readouterr().out
    assert code == 0
    assert printed.count("written: ") == 3
    assert len(list(open_video(tmp_path / "overlay.mp4"))) == FRAMES
    assert len(list((tmp_path / "davis").iterdir())) == FRAMES
    records = json.loads((tmp_path / "tracks.json").read_text())
    assert {record["frame_index"] for record in records} <= set(range(FRAMES))
    assert {record["video"] for record in records} <= {"clip"}
    assert np.array(Image.open(tmp_path / "davis" / "00000.png")).shape == (60, 90)


def test_an_overlay_is_written_beside_the_video_by_default(folder, video):
    track_concepts.main([str(video), "--model", str(folder), "--text", "cat", "--stop", "2"])

    assert len(list(open_video(video.parent / "clip.tracks.mp4"))) == 2


@pytest.mark.parametrize("example", [track_concepts, track_objects])
def test_a_video_file_is_tracked_too(example, folder, video, tmp_path):
    pictures = [Image.open(path) for path in sorted(video.iterdir())]
    with OverlayWriter(tmp_path / "clip.mp4", fps=10) as writer:
        for index, picture in enumerate(pictures):
            writer.write(TrackedFrame(index, [], [], *[np.zeros((0, 60, 90))] * 3), picture)
    prompt = (
        ["--text", "cat", "--start", "1"] if example is track_concepts else ["--point", "9", "9"]
    )

    code = example.main(
        [
            str(tmp_path / "clip.mp4"),
            "--model",
            str(folder),
            *prompt,
            "--davis",
            str(tmp_path / "d"),
        ]
    )

    assert code == 0
    first = 1 if example is track_concepts else 0
    expected = [f"{index:05d}.png" for index in range(first, FRAMES)]
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == expected


def test_objects_are_written_while_frames_come(folder, video, tmp_path, monkeypatch):
    decoded, written = [], []

    class Counted:
        fps = None

        def __iter__(self):
            for frame in open_video(video, start=2):
                decoded.append(frame.index)
                yield frame

    class Spy:
        def write(self, result, image):
            written.append((result.frame_index, decoded[-1], image.shape))

    monkeypatch.setattr(track_objects, "open_video", lambda *args, **kwargs: Counted())
    monkeypatch.setattr(track_objects, "open_writers", lambda *args: [Spy()])

    code = track_objects.main(
        [str(video), "--model", str(folder), "--point", "20", "20", "--frame", "2"]
    )

    assert code == 0
    assert written == [(index, index, (60, 90, 3)) for index in range(2, FRAMES)]


@pytest.mark.parametrize("example", [track_concepts, track_objects])
def test_a_video_that_is_not_there_is_an_error_without_a_traceback(example, folder, capsys):
    prompt = ["--text", "cat"] if example is track_concepts else ["--point", "1", "1"]

    code = example.main(["missing.mp4", "--model", str(folder), *prompt])

    assert code == 2
    assert "no video missing.mp4" in capsys.readouterr().err


@pytest.mark.parametrize("example", [track_concepts, track_objects])
def test_nothing_to_look_for_is_an_error(example, capsys):
    with pytest.raises(SystemExit):
        example.main(["video.mp4", "--model", "folder"])

    assert "say what to" in capsys.readouterr().err
